"""What a training run has given: scores, an ensemble, the classes of image files, weights for other programs.

python evaluate.py checkpoints/best.pt                      top-1, top-5 and loss on every validation image, once
python evaluate.py A/best.pt B/best.pt                      each of them, and their ensemble (mean of the probabilities)
python evaluate.py epoch_030.pt epoch_035.pt --average      the mean of their weights, in one network
python evaluate.py best.pt --details checkpoints/details    also each class's accuracy and the most confused pairs
python evaluate.py --classify cat.jpg holiday/              the five most probable classes of each image
python evaluate.py best.pt --export model.onnx              or model.pt, model.safetensors; with a model card

Besides a run's checkpoints, weights with torchvision's keys in a .pt or .safetensors file.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from config import CONFIG
from engine import averaging, checkpoint, classify, data, metrics
from engine.class_matching import match_classes, read_class_file
from engine.confusion import count_confusions, write_details
from engine.device import AUTOCAST_DTYPES, autocast, choose_device, choose_precision
from engine.distributed import refuse_several, summed
from engine.environment import commit
from engine.errors import UserError, run_program
from engine.export import export, model_card, model_facts
from engine.files import replacing
from engine.interruption import StopRequest
from engine.metrics import topk_correct
from engine.networks import IN_WORDS, KINDS, load_networks
from model import build_model

ENSEMBLE = "ensemble"

# Scores --------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def evaluate(models, device_batches, num_images, context, flip=False, ensemble=False, confusions_of=None):
    """Return {name: {'loss', 'top1', 'top5', 'images'}} of each model; the images are read once for all.

    Of several processes each scores its own images, and all return the figures of all images.

    Args:
        models: {name: network}; put into evaluation mode.
        device_batches: yields (images [B, 3, H, W] ready for the network, labels int64 [B]); B may be 0.
        num_images: how many images there must be, over all processes.
        context: autocast of the precision.
        flip: also score the mean of the logits of each image and of its mirror image, as 'flip_loss', 'flip_top1', 'flip_top5'.
        ensemble: also score the mean of the models' probabilities, as a further name, 'ensemble'.
        confusions_of: name whose result gets 'confusions' too, of count_confusions.
    Returns:
        loss: mean cross-entropy without label smoothing; top1 and top5: percent.
    """
    totals, confusions, count = {}, 0, 0
    for model in models.values():
        model.eval()
    for images, labels in device_batches:
        for view, logits_of in _logits_by_view(models, images, context, flip, ensemble):
            for name, logits in logits_of.items():
                totals[name, view] = totals.get((name, view), 0) + _scores(logits, labels)
            if view == "" and confusions_of is not None:
                confusions = confusions + count_confusions(logits_of[confusions_of], labels)
        count += len(labels)
    count = int(summed(torch.tensor(count)))
    assert count == num_images, f"{count} images evaluated, {num_images} expected"
    results = {}
    for (name, view), total in totals.items():
        loss, top1, top5 = (summed(total) / count).tolist()
        results.setdefault(name, {"images": count})
        results[name] |= {f"{view}loss": loss, f"{view}top1": 100 * top1, f"{view}top5": 100 * top5}
    if confusions_of is not None:
        results[confusions_of]["confusions"] = confusions
    return results


def _logits_by_view(models, images, context, flip, ensemble):
    """Yield ('', {name: logits [B, C]}) and, with flip, ('flip_', the same of image and mirror image)."""
    with context:
        plain = {name: model(images).float() for name, model in models.items()}
        mirrored = {name: model(images.flip(3)).float() for name, model in models.items()} if flip else {}
    views = {"": plain}
    if flip:
        views["flip_"] = {name: (plain[name] + mirrored[name]) / 2 for name in models}
    for view, logits_of in views.items():
        if ensemble:
            logits_of = logits_of | {ENSEMBLE: log_mean_probabilities(logits_of.values())}
        yield view, logits_of


def log_mean_probabilities(logits):
    """Return the logarithm of the mean of the softmax of several logits [B, C]: logits whose softmax that mean is."""
    logs = torch.stack([F.log_softmax(of_one, dim=1) for of_one in logits])
    return logs.logsumexp(dim=0) - math.log(len(logs))  # finite where each probability underflows to 0


def _scores(logits, labels):
    """Return the batch's sums [3] of the loss, the top-1 and the top-5 hits, float64."""
    loss = F.cross_entropy(logits, labels, reduction="sum")
    return torch.stack([loss, topk_correct(logits, labels, 1), topk_correct(logits, labels, 5)]).double()


# The three uses ------------------------------------------------------------------------------------------------------


def averaged_network(networks, batches, context):
    """Return one Network whose weights are the mean of the others', with batch-norm statistics of its own.

    Args:
        batches: BatchServer whose training images give the statistics.
    """
    first = networks[0]
    states = [network.model.state_dict() for network in networks]
    mean = {
        key: torch.stack([state[key] for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for key, tensor in states[0].items()
    }
    first.model.load_state_dict(mean)
    requests = data.training_requests(batches.splits["train"], first.config, epoch=0)
    requests = itertools.islice(requests, first.config["swa_batch_norm_batches"])
    averaging.refresh_batch_norm(first.model, batches.training(requests, set()), context)
    return first._replace(name=f"mean of the weights of {', '.join(network.name for network in networks)}", kind="mean")


def score(networks, arguments, device):
    """Print each network's figures on the validation images, and those of their ensemble."""
    config = networks[0].config
    needed = ("train", "val") if arguments.average else ("val",)  # the statistics of a mean come from training images
    splits, precision = open_matching_splits(networks, config, needed), choose_precision(config, device)
    context = autocast(device, precision)
    resolutions = arguments.resolution or [config["val_resolution"]]
    settings = config | {"more_val_resolutions": resolutions}
    server = data.BatchServer(splits, settings, device, AUTOCAST_DTYPES[precision], StopRequest(), say=print)
    try:
        if arguments.average:
            networks = [averaged_network(networks, server, context)]
        models = {network.name: network.model for network in networks}
        several = len({network.path for network in networks}) > 1
        subject = ENSEMBLE if several else networks[-1].name if len(networks) == 1 else None
        if arguments.details and subject is None:
            raise UserError("--details with several kinds of weights: choose one with --weights raw, averaged or ema")
        for resolution in resolutions:
            batches, of = server.validation(resolution), subject if arguments.details else None
            flip = config["val_flip"]
            results = evaluate(models, batches, len(splits["val"]), context, flip, ensemble=several, confusions_of=of)
            where = f"{resolution} px centre crop (ratio {config['val_crop_ratio']:.4g})"
            for name, figures in results.items():
                name = f"{ENSEMBLE} of {len(models)}" if name == ENSEMBLE else name
                print(f"{name}: {_in_words(figures, '')}, {where}, no test-time augmentation, {precision}")
                if flip:
                    print(f"{name}: {_in_words(figures, 'flip_')}, {where}, image and mirror image, {precision}")
            if arguments.details:
                prefix = arguments.details + (f"_{resolution}" if len(resolutions) > 1 else "")
                title = f"{subject}: {_in_words(results[subject], '')}, {where}"
                names = getattr(splits["val"], "class_names", {})
                print(
                    "wrote "
                    + ", ".join(write_details(prefix, results[subject]["confusions"], splits["val"].classes, names, title))
                )
    finally:
        server.close()


def _in_words(figures, view):
    top1, top5, loss = (figures[f"{view}{name}"] for name in ("top1", "top5", "loss"))
    return f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f} on {figures['images']:,} images"


def open_matching_splits(networks, config, needed):
    """Return the splits of data_dir with labels in the order of the networks' outputs; DataError where that is not certain."""
    where, orders, remarks = config["data_dir"], {}, {}
    splits = data.open_splits(where, needed)
    for network in networks:
        outputs = network.model.fc.out_features
        match_classes(splits["val"], network.classes, outputs, network.path, where, remarks.setdefault)
        orders[network.path] = splits["val"].classes
    first_path, first = next(iter(orders.items()))
    for path, order in orders.items():
        if order != first:
            raise data.DataError(f"{first_path} and {path} know other classes, or in another order: score one at a time")
    if "train" in splits:
        match_classes(splits["train"], first, len(first), first_path, where, remarks.setdefault)
    for remark in remarks:
        print(remark)
    return splits


def classify_files(networks, arguments, device):
    """Print the most probable classes of each image file; return 1 if one could not be read, else 0."""
    first = networks[0]
    precision = choose_precision(first.config, device)
    classes = first.classes or [str(number) for number in range(first.model.fc.out_features)]
    if any((network.classes or classes) != classes for network in networks):
        raise UserError("these checkpoints were trained on different classes: classify with one at a time")
    skipped, seen = [], []

    def probabilities(images):
        with autocast(device, precision):
            return log_mean_probabilities([network.model.eval()(images).float() for network in networks]).exp()

    def skip(path, reason):
        skipped.append(path)
        print(f"evaluate.py: skipped {path} ({reason})", file=sys.stderr)

    files = classify.image_files(arguments.classify, skip, lambda line: print(line, file=sys.stderr))
    config = first.config | ({"val_resolution": arguments.resolution[0]} if arguments.resolution else {})
    dtype = AUTOCAST_DTYPES[precision]
    for prediction in classify.classify(files, probabilities, classes, config, device, dtype, skip):
        names = [f"{100 * share:.1f} % {first.class_names.get(name, name)}" for name, share in prediction.best]
        print(f"{prediction.name}: {'; '.join(names)}")
        seen.append(prediction)
    if arguments.contact_sheet and seen:
        classify.write_contact_sheet(arguments.contact_sheet, seen, first.class_names)
        print(f"wrote {arguments.contact_sheet}")
    if not seen:
        raise UserError(f"no image was classified in {', '.join(arguments.classify)}")
    return 1 if skipped else 0


def export_network(network, arguments):
    """Write the network's weights for other programs, and the model card beside them."""
    contents, config = network.contents, network.config
    best = contents.get("best", {})
    accuracy = None
    if best and best["epoch"] == contents["epoch"] and best["weights"] == network.kind:
        crop = f"{config['val_resolution']} px centre crop (ratio {config['val_crop_ratio']:.4g}), no test-time augmentation"
        accuracy = f"top-1 {best['top1']:.2f} %, {crop}"
    run = {
        "weights": IN_WORDS.get(network.kind, "as in the file"),
        "made_with": f"PyTorch {torch.__version__}, commit {commit()}",
    }
    if contents:
        run |= {key: contents.get(key) for key in ("recipe", "train_images", "hardware")} | {
            "epochs": contents["epoch"],
            "seed": config["seed"],
        }
        records = metrics.read_records(network.path.parent / checkpoint.RECORDS)
        records = [record for record in records if record["epoch"] <= contents["epoch"]]
        if records:
            run["hours"] = sum(record["seconds"] for record in records) / 3600
            run["energy_wh"] = sum(record.get("gpu_energy_wh", 0) for record in records)
    classes = network.classes or [str(number) for number in range(network.model.fc.out_features)]
    facts = model_facts(config, classes, network.class_names, accuracy, run)
    print(export(network.model.cpu().float(), arguments.export, facts))
    card = Path(arguments.export).with_suffix(".md")
    with replacing(card, "w") as file:
        file.write(model_card(arguments.export, facts, arguments.price_per_hour))
    print(f"wrote {card}")


def parse_arguments(arguments=None):
    """Return what the command line asks for; ends the program with status 2 where that is impossible."""
    parser = argparse.ArgumentParser(
        "evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoints", nargs="*", metavar="CHECKPOINT", help="default checkpoints/best.pt")
    parser.add_argument("--data-dir", help="folder with val.arrow, val/<class>/* or <class>/*; default: the run's")
    parser.add_argument("--classes", metavar="FILE", help="a class per line, in the order of the network's outputs")
    parser.add_argument("--flip", action="store_true", help="also score the mean over image and mirror image")
    parser.add_argument("--resolution", type=int, nargs="+", metavar="PX", help="score at these sizes; default: the run's")
    parser.add_argument("--weights", choices=("auto", "all", *KINDS), help="default: all of one checkpoint, auto of several")
    parser.add_argument("--average", action="store_true", help="the mean of the checkpoints' weights instead of an ensemble")
    parser.add_argument("--details", metavar="PREFIX", help="write PREFIX_classes.csv, PREFIX_confusions.csv and PREFIX.png")
    parser.add_argument("--classify", nargs="+", metavar="PATH", help="image files and folders to classify")
    parser.add_argument("--contact-sheet", metavar="PNG", help="of --classify: a picture of all images with their class")
    parser.add_argument("--export", metavar="FILE", help="write FILE.pt, FILE.safetensors or FILE.onnx, and a model card")
    parser.add_argument("--price-per-hour", type=float, help="of --export: for the model card")
    parser.add_argument("--architecture", default="resnet50", help="of weights without a checkpoint; default resnet50")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parsed = parser.parse_args(arguments)
    parsed.checkpoints = parsed.checkpoints or ["checkpoints/best.pt"]
    for flag, owner in (("contact_sheet", "classify"), ("price_per_hour", "export")):
        if getattr(parsed, flag) is not None and not getattr(parsed, owner):
            parser.error(f"--{flag.replace('_', '-')} belongs to --{owner}")
    if parsed.classify and parsed.export:
        parser.error("--classify and --export: one at a time")
    if parsed.average and (parsed.classify or len(parsed.checkpoints) < 2):
        parser.error("--average: takes two or more checkpoints, to score or to --export")
    if parsed.export and len(parsed.checkpoints) > 1 and not parsed.average:
        parser.error("--export takes one checkpoint, or the --average of several")
    if parsed.resolution and not all(32 <= px <= 1024 for px in parsed.resolution):
        parser.error(f"--resolution {parsed.resolution}: from 32 to 1024 px")
    return parsed


def main(arguments):
    refuse_several("evaluate.py")
    device = choose_device({"device": arguments.device})
    single = len(arguments.checkpoints) == 1 and not (arguments.classify or arguments.export)
    kinds = arguments.weights or ("all" if single else "auto")
    defaults = CONFIG | {"architecture": arguments.architecture}
    networks = []
    for path in arguments.checkpoints:
        networks += load_networks(path, kinds, defaults, lambda *of: build_model(*of).to(device))
    if arguments.classes:
        networks = [
            network._replace(classes=read_class_file(arguments.classes, network.model.fc.out_features)) for network in networks
        ]
    changes = {"device": device.type}
    if arguments.flip:
        changes["val_flip"] = True
    if arguments.data_dir:
        changes["data_dir"] = arguments.data_dir
    networks = [network._replace(config=network.config | changes) for network in networks]
    if arguments.classify:
        return classify_files(networks, arguments, device)
    if arguments.export:
        network = networks[0]
        if arguments.average:
            network = averaged_for_export(networks, device)
        export_network(network, arguments)
        return 0
    score(networks, arguments, device)
    return 0


def averaged_for_export(networks, device):
    """Return the averaged_network of several; its statistics come from the training images."""
    config = networks[0].config
    precision = choose_precision(config, device)
    splits = open_matching_splits(networks, config, ("train", "val"))
    server = data.BatchServer(splits, config, device, AUTOCAST_DTYPES[precision], StopRequest(), say=print)
    try:
        return averaged_network(networks, server, autocast(device, precision))
    finally:
        server.close()


if __name__ == "__main__":
    sys.exit(run_program("evaluate.py", main, parse_arguments()))
