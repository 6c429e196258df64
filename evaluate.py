"""Top-1, top-5 and loss of a checkpoint on the validation images: python evaluate.py checkpoints/best.pt

Every image counts exactly once; the figures come with their resolution and test-time augmentation.
"""

import argparse
import sys

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import AveragedModel

from config import CONFIG
from engine import checkpoint, data
from engine.device import AUTOCAST_DTYPES, autocast, choose_device, choose_precision
from engine.errors import run_program
from engine.metrics import topk_correct
from model import build_model


@torch.inference_mode()
def evaluate(models, device_batches, num_images, context, flip=False):
    """Return {name: {'loss', 'top1', 'top5', 'images'}} of each model; the images are read once for all.

    Args:
        models: {name: network}; put into evaluation mode.
        device_batches: yields (images [B, 3, H, W] ready for the network, labels int64 [B]).
        num_images: how many images there must be.
        context: autocast of the precision.
        flip: also score the mean of the logits of each image and of its mirror image, as 'flip_loss', 'flip_top1', 'flip_top5'.
    Returns:
        loss: mean cross-entropy without label smoothing; top1 and top5: percent.
    """
    views = ("", "flip_") if flip else ("",)
    totals = {}
    for name, model in models.items():
        model.eval()
        device = next(model.parameters()).device
        totals[name] = {view: torch.zeros(3, dtype=torch.float64, device=device) for view in views}
    count = 0
    for images, labels in device_batches:
        for name, model in models.items():
            with context:
                logits = model(images).float()
                if flip:
                    mean_logits = (logits + model(images.flip(3)).float()) / 2
            totals[name][""] += _scores(logits, labels)
            if flip:
                totals[name]["flip_"] += _scores(mean_logits, labels)
        count += len(labels)
    assert count == num_images, f"{count} images evaluated, {num_images} expected"
    results = {}
    for name, of_views in totals.items():
        results[name] = {"images": count}
        for view, total in of_views.items():
            loss, top1, top5 = (total / count).tolist()
            results[name] |= {f"{view}loss": loss, f"{view}top1": 100 * top1, f"{view}top5": 100 * top5}
    return results


def _scores(logits, labels):
    """Return the batch's sums [3] of the loss, the top-1 and the top-5 hits."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, topk_correct(logits, labels, 1), topk_correct(logits, labels, 5)])


def main(arguments):
    contents = checkpoint.read(arguments.checkpoint)
    config = CONFIG | contents["config"] | {"device": arguments.device}
    if arguments.flip:
        config["val_flip"] = True
    if arguments.data_dir:
        config["data_dir"] = arguments.data_dir
    device = choose_device(config)
    precision = choose_precision(config, device)
    splits = data.open_splits(config["data_dir"])
    if splits["val"].classes != contents["classes"]:
        raise data.DataError(f"the classes in {config['data_dir']} are not the {len(contents['classes'])} of the checkpoint")
    models = {"raw weights": build_model(config, len(contents["classes"])).to(device)}
    models["raw weights"].load_state_dict(contents["model"])
    for key, name in (("averaged_model", "averaged weights"), ("ema_model", "running average")):
        if contents.get(key) is not None and contents[key]["n_averaged"] > 0:
            models[name] = AveragedModel(models["raw weights"], use_buffers=True)
            models[name].load_state_dict(contents[key])

    server = data.BatchServer(splits, config, device, AUTOCAST_DTYPES[precision], guard=iter, say=print)
    try:
        results = evaluate(models, server.validation(), len(splits["val"]), autocast(device, precision), config["val_flip"])
    finally:
        server.close()
    crop = f"{config['val_resolution']} px centre crop (ratio {config['val_crop_ratio']})"
    for name, figures in results.items():
        print(f"{arguments.checkpoint}, {name}: {_in_words(figures, '')}, {crop}, no test-time augmentation, {precision}")
        if config["val_flip"]:
            print(f"{arguments.checkpoint}, {name}: {_in_words(figures, 'flip_')}, {crop}, image and mirror image, {precision}")


def _in_words(figures, view):
    top1, top5, loss = (figures[f"{view}{name}"] for name in ("top1", "top5", "loss"))
    return f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f} on {figures['images']:,} images"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", help="a checkpoint of a run")
    parser.add_argument("--data-dir", help="folder with val/<class>/*; default: the run's")
    parser.add_argument("--flip", action="store_true", help="also score the mean over image and mirror image")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    sys.exit(run_program("evaluate.py", main, parser.parse_args()))
