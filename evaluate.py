"""Top-1, top-5 and loss of a checkpoint on the validation images: python evaluate.py checkpoints/best.pt

Every image counts exactly once; the figures come with their resolution and test-time augmentation.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

from engine import checkpoint, data
from engine.device import AUTOCAST_DTYPES, autocast, choose_device, choose_precision
from engine.errors import run_program
from engine.metrics import topk_correct
from model import build_model


@torch.inference_mode()
def evaluate(models, device_batches, num_images, context):
    """Return {name: {'loss', 'top1', 'top5', 'images'}} of each model; the images are read once for all.

    Args:
        models: {name: network}; put into evaluation mode.
        device_batches: yields (images [B, 3, H, W] ready for the network, labels int64 [B]).
        num_images: how many images there must be.
        context: autocast of the precision.
    Returns:
        loss: mean cross-entropy without label smoothing; top1 and top5: percent.
    """
    totals = {}
    for name, model in models.items():
        model.eval()
        totals[name] = torch.zeros(3, dtype=torch.float64, device=next(model.parameters()).device)
    count = 0
    for images, labels in device_batches:
        for name, model in models.items():
            with context:
                logits = model(images).float()
            loss = F.cross_entropy(logits, labels, reduction="sum")
            totals[name] += torch.stack([loss, topk_correct(logits, labels, 1), topk_correct(logits, labels, 5)])
        count += len(labels)
    assert count == num_images, f"{count} images evaluated, {num_images} expected"
    results = {}
    for name, total in totals.items():
        loss, top1, top5 = (total / count).tolist()
        results[name] = {"loss": loss, "top1": 100 * top1, "top5": 100 * top5, "images": count}
    return results


def main(arguments):
    contents = checkpoint.read(arguments.checkpoint)
    config = contents["config"] | {"device": arguments.device}
    if arguments.data_dir:
        config["data_dir"] = arguments.data_dir
    device = choose_device(config)
    precision = choose_precision(config, device)
    splits = data.open_splits(config["data_dir"])
    if splits["val"].classes != contents["classes"]:
        raise data.DataError(f"the classes in {config['data_dir']} are not the {len(contents['classes'])} of the checkpoint")
    models = {"raw weights": build_model(config, len(contents["classes"])).to(device)}
    models["raw weights"].load_state_dict(contents["model"])
    if contents["averaged_model"] is not None and contents["averaged_model"]["n_averaged"] > 0:
        models["averaged weights"] = AveragedModel(models["raw weights"])
        models["averaged weights"].load_state_dict(contents["averaged_model"])

    server = data.BatchServer(splits, config, device, AUTOCAST_DTYPES[precision], guard=iter, say=print)
    try:
        results = evaluate(models, server.validation(), len(splits["val"]), autocast(device, precision))
    finally:
        server.close()
    for name, figures in results.items():
        print(
            f"{arguments.checkpoint}, {name}: top-1 {figures['top1']:.2f} %, top-5 {figures['top5']:.2f} %, "
            f"loss {figures['loss']:.4f} on {figures['images']:,} images, {config['val_resolution']} px centre crop "
            f"(ratio {config['val_crop_ratio']}), no test-time augmentation, {precision}"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="a checkpoint of a run")
    parser.add_argument("--data-dir", help="folder with val/<class>/*; default: the run's")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    sys.exit(run_program("evaluate.py", main, parser.parse_args()))
