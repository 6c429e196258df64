"""What a training run has given: scores, an ensemble, the classes of image files, weights for other programs.

python evaluate.py checkpoints/best.pt                      top-1, top-5 and loss on every validation image, once
python evaluate.py A/best.pt B/best.pt                      each as its run did, and their ensemble (mean of the probabilities)
python evaluate.py epoch_030.pt epoch_035.pt --average      the mean of their weights, in one network
python evaluate.py best.pt --details checkpoints/details    also each class's accuracy and the most confused pairs
python evaluate.py --classify cat.jpg holiday/              the five most probable classes of each image
python evaluate.py best.pt --export model.onnx              or model.pt, model.safetensors; with a model card

Besides a run's checkpoints, weights with torchvision's keys in a .pt or .safetensors file.
"""

import argparse
import contextlib
import functools
import itertools
import os
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from config import CONFIG
from engine.data.batches import training_requests
from engine.data.loader import BatchLoader
from engine.data.splits import open_splits
from engine.inference import classify
from engine.inference.class_matching import match_classes, read_class_file
from engine.inference.confusion import write_details
from engine.inference.export import check_export, export, model_card, model_facts
from engine.inference.networks import IN_WORDS, KINDS, load_networks
from engine.inference.scoring import ENSEMBLE, evaluate, log_mean_probabilities
from engine.run import checkpoint_files
from engine.run.records import read_records
from engine.system.console import protect_output
from engine.system.device import AUTOCAST_DTYPES, autocast, choose_device, choose_precision
from engine.system.distributed import refuse_several
from engine.system.environment import commit
from engine.system.errors import DataError, UserError, run_program
from engine.system.files import path_argument, replacing
from engine.system.gpu_memory import retry_pass_on_oom, stop_on_oom
from engine.system.interruption import StopRequest
from engine.training import averaging
from model import build_model

# The three uses ------------------------------------------------------------------------------------------------------


def averaged_network(networks, batches, context):
    """Return one Network whose weights are the mean of the others', with batch-norm statistics of its own.

    Args:
        networks: what refuse_to_average() has let through.
        batches: BatchLoader whose training images give the statistics, as the last epoch of the networks saw them.
    """
    first = networks[0]
    states = [network.model.state_dict() for network in networks]
    mean = {
        key: torch.stack([state[key] for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for key, tensor in states[0].items()
    }
    first.model.load_state_dict(mean)
    epoch = max(network.contents.get("epoch", 1) for network in networks) - 1

    def some_batches():
        requests = training_requests(batches.splits["train"], first.config, epoch)
        return batches.training(itertools.islice(requests, first.config["swa_batch_norm_batches"]), set())

    refresh = functools.partial(averaging.recompute_bn_stats, first.model, autocast=context)
    retry_pass_on_oom(refresh, some_batches, first.config["batch_size"], batches.device)
    return first._replace(name=f"mean of the weights of {' and '.join(network.name for network in networks)}", kind="mean")


def refuse_to_average(networks):
    """Raise UserError unless the networks are the same but for the numbers in their weights."""
    first = networks[0]
    for other in networks[1:]:
        for key, words in (("architecture", "architecture"), ("blur_pool", "BlurPool"), ("blur_max_pool", "blurred max-pool")):
            if first.config[key] != other.config[key]:
                values = f"{first.path} has {words} {first.config[key]}, {other.path} {other.config[key]}"
                raise UserError(f"--average: {values}; only the weights of one network have a mean. Without it they vote")
        if None not in (first.classes, other.classes) and first.classes != other.classes:
            raise UserError(f"--average: {first.path} and {other.path} were trained on different classes")
        shapes, others = ({k: t.shape for k, t in n.model.state_dict().items()} for n in (first, other))
        if differing := [key for key in shapes | others if shapes.get(key) != others.get(key)]:
            raise UserError(f"--average: {first.path} and {other.path} differ in {len(differing)} keys, as in {differing[0]}")


class View(NamedTuple):
    """How the images are shown to a network that is scored."""

    resolutions: tuple  # px
    crop_ratio: float
    flip: bool

    def __str__(self):
        sizes = " and ".join(f"{resolution} px" for resolution in self.resolutions)
        return f"{sizes}, crop ratio {self.crop_ratio:.4g}" + (", also mirrored" if self.flip else "")


def view_of(network, arguments):
    """Return the View of the network's own run, unless the command line names another."""
    config, scores = network.config, not (arguments.classify or arguments.export)
    resolutions = tuple(arguments.resolution or [config["val_resolution"]])
    return View(resolutions, config["val_crop_ratio"], scores and config["val_flip"])


def differing_views(networks, arguments):
    """Return how the networks differ in their View, in words; an empty text if they agree."""
    views = {network.path: view_of(network, arguments) for network in networks}
    if len(set(views.values())) == 1:
        return ""
    theirs = "; ".join(f"{path}: {view}" for path, view in views.items())
    return f"each was validated in its own way ({theirs}); --resolution, --crop-ratio and --flip name one for all"


def score(networks, arguments, device):
    """Print each network's figures on the validation images, seen as its run did, and those of their ensemble."""
    first = networks[0]
    needed = ("train", "val") if arguments.average else ("val",)  # the statistics of a mean come from training images
    splits, context = open_matching_splits(networks, first.config, needed), autocast(device, first.config["precision"])
    for network in networks:
        if network.config["data_dir"] != first.config["data_dir"]:
            print(f"note: {network.path} is scored on the images of {first.path}, {first.config['data_dir']}")
    if arguments.average:
        with served(splits, first.config, device) as server:
            networks = [averaged_network(networks, server, context)]
    several, differing = len({network.path for network in networks}) > 1, differing_views(networks, arguments)
    subject = ENSEMBLE if several and not differing else networks[0].name if len(networks) == 1 else None
    if arguments.details and subject is None:
        cure = differing or "choose one kind of weights with --weights raw, averaged or ema"
        raise UserError(f"--details of several networks without an ensemble: {cure}")
    if several and differing:
        print(f"no ensemble: {differing}")
    groups = {}
    for network in networks:
        groups.setdefault(view_of(network, arguments), []).append(network)
    for view, members in groups.items():
        models = {network.name: network.model for network in members}
        settings = members[0].config | {"more_val_resolutions": list(view.resolutions)}
        with served(splits, settings, device) as server:
            for resolution in view.resolutions:
                ensemble, of = subject == ENSEMBLE, subject if arguments.details else None
                batches, images = server.validation(resolution), len(splits["val"])
                results = evaluate(models, batches, images, context, view.flip, ensemble, confusions_of=of)
                where = f"{resolution} px centre crop (ratio {view.crop_ratio:.4g})"
                print_results(results, where, len(models), view.flip, first.config["precision"])
                if arguments.details:
                    prefix = arguments.details + (f"_{resolution}" if len(view.resolutions) > 1 else "")
                    print_details(prefix, subject, results[subject], where, splits["val"])


@contextlib.contextmanager
def served(splits, config, device):
    """Give a BatchLoader of the splits; its workers end with the block."""
    server = BatchLoader(splits, config, device, AUTOCAST_DTYPES[config["precision"]], StopRequest(), log=print)
    try:
        yield server
    finally:
        server.close()


def print_results(results, where, models, flip, precision):
    for name, figures in results.items():
        name = f"{ENSEMBLE} of {models}" if name == ENSEMBLE else name
        print(f"{name}: {_in_words(figures, '')}, {where}, no test-time augmentation, {precision}")
        if flip:
            print(f"{name}: {_in_words(figures, 'flip_')}, {where}, image and mirror image, {precision}")


def print_details(prefix, subject, figures, where, split):
    """Write the details of a network's or an ensemble's confusions and print where they are."""
    title, names = f"{subject}: {_in_words(figures, '')}, {where}", getattr(split, "class_names", {})
    with writing("details", prefix):
        print(f"wrote {', '.join(write_details(prefix, figures['confusions'], split.classes, names, title))}")


def _in_words(figures, view):
    top1, top5, loss = (figures[f"{view}{name}"] for name in ("top1", "top5", "loss"))
    return f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f} on {figures['images']:,} images"


def open_matching_splits(networks, config, needed):
    """Return the splits of data_dir with labels in the order of the networks' outputs; DataError where that is not certain."""
    where, orders, remarks = config["data_dir"], {}, {}
    splits = open_splits(where, needed)
    for network in networks:
        outputs = network.model.fc.out_features
        match_classes(splits["val"], network.classes, outputs, network.path, where, remarks.setdefault)
        orders[network.path] = splits["val"].classes
    first_path, first = next(iter(orders.items()))
    for path, order in orders.items():
        if order != first:
            raise DataError(f"{first_path} and {path} know other classes, or in another order: score one at a time")
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


def export_network(network, members, arguments):
    """Write the network's weights for other programs, and the model card beside them.

    Args:
        members: the networks of files whose mean it is, or itself alone.
    """
    contents, config = network.contents, network.config
    best = contents.get("best", {})
    accuracy = None
    if best and best["epoch"] == contents["epoch"] and best["weights"] == network.kind:
        crop = f"{config['val_resolution']} px centre crop (ratio {config['val_crop_ratio']:.4g}), no test-time augmentation"
        accuracy = f"top-1 {best['top1']:.2f} %, {crop}"
    run = {
        "weights": network.name if network.kind == "mean" else IN_WORDS.get(network.kind, "as in the file"),
        "made_with": f"PyTorch {torch.__version__}, commit {commit()}",
    } | facts_of_runs([member for member in members if member.contents])
    classes = network.classes or [str(number) for number in range(network.model.fc.out_features)]
    facts = model_facts(config, classes, network.class_names, accuracy, run)
    with writing("export", arguments.export):
        print(export(network.model.cpu().float(), arguments.export, facts))
        card = Path(arguments.export).with_suffix(".md")
        with replacing(card, "w") as file:
            file.write(model_card(arguments.export, facts, arguments.price_per_hour))
    print(f"wrote {card}")


def facts_of_runs(networks):
    """Return what the model card says of the runs that gave the networks of checkpoints: all that they took together."""
    if not networks:
        return {}

    def listed(values):
        return ", ".join(dict.fromkeys(map(str, values)))

    facts = {key: listed(network.contents.get(key) for network in networks) for key in ("recipe", "hardware")}
    facts |= {"epochs": listed(n.contents["epoch"] for n in networks), "seed": listed(n.config["seed"] for n in networks)}
    if len(images := {network.contents["train_images"] for network in networks}) == 1:
        facts["train_images"] = images.pop()
    records = []
    for folder in {network.path.parent for network in networks}:
        last = max(network.contents["epoch"] for network in networks if network.path.parent == folder)
        records += [r for r in read_records(folder / checkpoint_files.RECORDS) if r["epoch"] <= last]
    if records:
        facts["hours"] = sum(record["seconds"] for record in records) / 3600
        facts["energy_wh"] = sum(record.get("gpu_energy_wh", 0) for record in records)
    return facts


@contextlib.contextmanager
def writing(flag, path):
    """Turn an OSError of the block, which writes what a flag has asked for, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--{flag} {path} could not be written: {error}") from error


def make_room_for(flag, path):
    """Make the folder of an output before the work begins; raise UserError if nothing can be written there."""
    path = Path(path)
    with writing(flag, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path.parent).close()
    if path.is_dir():
        raise UserError(f"--{flag} {path} is a folder: name a file")


def local_text(text):
    """Return an argument's path as text: of a prefix a slash at the end counts."""
    path_argument(text)
    return os.path.expanduser(text)


def parse_arguments(arguments=None):
    """Return what the command line asks for; ends the program with status 2 where that is impossible."""
    parser = argparse.ArgumentParser(
        "evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("checkpoints", nargs="*", type=local_text, metavar="CHECKPOINT", help="default checkpoints/best.pt")
    parser.add_argument(
        "--data-dir", type=local_text, help="folder with val.arrow, val/<class>/* or <class>/*; default: the run's"
    )
    parser.add_argument(
        "--classes", type=local_text, metavar="FILE", help="a class per line, in the order of the network's outputs"
    )
    parser.add_argument("--flip", action="store_true", help="also score the mean over image and mirror image")
    parser.add_argument("--resolution", type=int, nargs="+", metavar="PX", help="score at these sizes; default: the run's")
    parser.add_argument("--crop-ratio", type=float, metavar="R", help="crop over the resized shorter side; default: the run's")
    parser.add_argument("--weights", choices=("auto", "all", *KINDS), help="default: all of one checkpoint, auto of several")
    parser.add_argument("--average", action="store_true", help="the mean of the checkpoints' weights instead of an ensemble")
    parser.add_argument(
        "--details", type=local_text, metavar="PREFIX", help="write PREFIX_classes.csv, PREFIX_confusions.csv and PREFIX.png"
    )
    parser.add_argument("--classify", nargs="+", type=local_text, metavar="PATH", help="image files and folders to classify")
    parser.add_argument(
        "--contact-sheet", type=local_text, metavar="PNG", help="of --classify: a picture of all images with their class"
    )
    parser.add_argument(
        "--export", type=local_text, metavar="FILE", help="write FILE.pt, FILE.safetensors or FILE.onnx, and a model card"
    )
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
    scores = not parsed.classify and not parsed.export
    for flag in ("flip", "details"):
        if getattr(parsed, flag) and not scores:
            parser.error(f"--{flag}: belongs to scores, not to --classify or --export")
    if parsed.export and not parsed.average and (parsed.resolution or parsed.crop_ratio):
        parser.error("--resolution and --crop-ratio: an exported checkpoint has those of its run")
    if parsed.crop_ratio is not None and not 0.1 <= parsed.crop_ratio <= 1:
        parser.error(f"--crop-ratio {parsed.crop_ratio:g}: from 0.1 to 1")
    if not scores and len(parsed.resolution or []) > 1:
        parser.error(f"--resolution {parsed.resolution}: one size for --classify and --export")
    if parsed.resolution and not all(32 <= px <= 1024 for px in parsed.resolution):
        parser.error(f"--resolution {parsed.resolution}: from 32 to 1024 px")
    return parsed


@stop_on_oom("outside of a batch: --device cpu needs none of it")
def main(arguments):
    refuse_several("evaluate.py")
    device = choose_device({"device": arguments.device})
    if arguments.export:
        check_export(arguments.export)
    for flag, path in (("export", arguments.export), ("contact-sheet", arguments.contact_sheet)):
        if path:
            make_room_for(flag, path)
    if arguments.details:
        make_room_for("details", f"{arguments.details}_classes.csv")
    networks = opened_networks(arguments, device)
    if arguments.average or arguments.classify:
        flag = "--average" if arguments.average else "--classify"
        if differing := differing_views(networks, arguments):
            raise UserError(f"{flag}: {differing}")
    if arguments.average:
        refuse_to_average(networks)
    if arguments.classes:
        networks = [
            network._replace(classes=read_class_file(arguments.classes, network.model.fc.out_features)) for network in networks
        ]
    if arguments.classify:
        return classify_files(networks, arguments, device)
    if arguments.export:
        network = averaged_for_export(networks, device) if arguments.average else networks[0]
        export_network(network, networks, arguments)
        return 0
    score(networks, arguments, device)
    return 0


def opened_networks(arguments, device):
    """Return the Networks of all files, on the device, their configurations as the command line wants them."""
    single = len(arguments.checkpoints) == 1 and not (arguments.classify or arguments.export)
    kinds = arguments.weights or ("all" if single else "auto")
    # One process has nothing to synchronise its norms with, and the run's device need not be here.
    here = {"device": device.type, "sync_batch_norm": False}
    networks = []
    for path in arguments.checkpoints:
        defaults = CONFIG | {"architecture": arguments.architecture}
        networks += load_networks(path, kinds, defaults, lambda config, n: build_model(config | here, n).to(device))
    if arguments.flip:
        here["val_flip"] = True
    if arguments.data_dir:
        here["data_dir"] = arguments.data_dir
    if arguments.crop_ratio:
        here["val_crop_ratio"] = arguments.crop_ratio
    if arguments.resolution:
        here["val_resolution"] = arguments.resolution[0]
    here["precision"] = shared_precision([network.config for network in networks], device)
    return [network._replace(config=network.config | here) for network in networks]


def shared_precision(configs, device):
    """Return the precision of all of the runs as far as the device knows it; fp32 where they differ."""
    unknown = "fp16" if device.type == "cpu" else None
    asked = ["auto" if config["precision"] == unknown else config["precision"] for config in configs]
    chosen = {choose_precision({"precision": precision}, device) for precision in asked}
    return chosen.pop() if len(chosen) == 1 else "fp32"


def averaged_for_export(networks, device):
    """Return the averaged_network of several; its statistics come from the training images."""
    config = networks[0].config
    with served(open_matching_splits(networks, config, ("train", "val")), config, device) as server:
        return averaged_network(networks, server, autocast(device, config["precision"]))


if __name__ == "__main__":
    protect_output()
    sys.exit(run_program("evaluate.py", main, parse_arguments(), needs_output=True))
