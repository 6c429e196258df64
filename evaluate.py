"""What a training run has given: scores, an ensemble, the classes of image files, weights for other programs.

python evaluate.py checkpoints/best.pt                      top-1, top-5 and loss on every validation image, once
python evaluate.py A/best.pt B/best.pt                      each as its run did, and their ensemble (mean of the probabilities)
python evaluate.py epoch_030.pt epoch_035.pt --average      the mean of their weights, in one network
python evaluate.py best.pt --details checkpoints/details    also each class's accuracy, confused pairs, calibration, pictures
python evaluate.py best.pt --data-dir imagenet-a            another test set, also of some of the classes
python evaluate.py best.pt --real-labels real.json          also by the reassessed labels of ImageNet's validation images
python evaluate.py best.pt --split train --details checkpoints/train    likely mislabels among the training images
python evaluate.py --classify cat.jpg holiday/              the five most probable classes of each image
python evaluate.py best.pt --export model.onnx              or model.pt, .safetensors, or a folder/; with a model card

Besides a run's checkpoints, weights with torchvision's keys in a .pt or .safetensors file.
"""

import sys

from config import CONFIG
from engine.cli.command_line import FlagsParser
from engine.cli.keys import positive_number
from engine.data.fetching import images_folder
from engine.inference.averaging import average_networks, refuse_to_average
from engine.inference.classify import print_classes
from engine.inference.comparison import compare_networks, details_files, note_shared_images, prefixes_of
from engine.inference.export import check_export, export_files, export_network
from engine.inference.images import open_matching_splits
from engine.inference.networks import load_networks, shared_precision, with_class_file
from engine.inference.outputs import SHEET_SOURCE, claim, picture_mark
from engine.inference.views import require_one_view
from engine.run.weights import WEIGHTS
from engine.system.console import protect_output
from engine.system.device import choose_device
from engine.system.distributed import refuse_several
from engine.system.errors import run_program
from engine.system.files import path_text
from engine.system.gpu_memory import stop_on_oom
from model import build_model


@stop_on_oom("outside of a batch: --device cpu needs none of it")
def main(arguments):
    refuse_several("evaluate.py")
    device = choose_device({"device": arguments.device})
    check_outputs(arguments)
    networks = open_networks(arguments, device)
    if arguments.average or arguments.classify:
        flag = "--average" if arguments.average else "--classify"
        require_one_view(flag, networks, arguments.resolution, arguments.scores)
    if arguments.average:
        refuse_to_average(networks)
    if arguments.classes:
        networks = [with_class_file(network, arguments.classes) for network in networks]
    if arguments.classify:
        resolution = arguments.resolution and arguments.resolution[0]
        return print_classes(networks, arguments.classify, device, resolution, arguments.contact_sheet)
    if arguments.scores or arguments.average:
        both = arguments.average or arguments.split == "train"  # the statistics of a mean come from training images
        splits = open_matching_splits(networks, images_folder(networks[0].config), ("train", "val") if both else ("val",))
        if arguments.split == "train":
            splits["val"] = splits["train"]
            print("note: these are scores on the training images, seen as in validation")
    if arguments.scores:
        note_shared_images(networks)
    members = networks
    if arguments.average:
        networks = [average_networks(networks, splits, device)]
    if arguments.export:
        export_network(networks[0], members, arguments.export, arguments.price_per_hour)
    else:
        details, real, training = arguments.details, arguments.real_labels, arguments.split == "train"
        compare_networks(networks, splits, device, arguments.resolution, details, real, training)
    return 0


def check_outputs(arguments):
    """Make the folders of the files that are asked for; raise UserError if one could not or must not be written."""
    others = [path for path in (arguments.classes, arguments.real_labels) if path]
    inputs = [*arguments.checkpoints, *(arguments.classify or []), *others]
    if arguments.export:
        check_export(arguments.export)
        claim("export", export_files(arguments.export), inputs)
    if arguments.contact_sheet:
        claim("contact-sheet", {arguments.contact_sheet: picture_mark(SHEET_SOURCE)}, inputs)
    if arguments.details:
        for prefix in prefixes_of(arguments.details, arguments.resolution or [None]).values():
            claim("details", details_files(prefix, arguments.split == "train"), inputs)


def open_networks(arguments, device):
    """Return the Networks of all files, on the device, their configurations as the command line wants them."""
    single = len(arguments.checkpoints) == 1 and arguments.scores
    kinds = arguments.weights or ("all" if single and not arguments.details else "auto")
    # One process has nothing to synchronise its norms with, and the run's device need not be here.
    here = {"device": device.type, "sync_batch_norm": False}
    defaults = CONFIG | {"architecture": arguments.architecture}
    networks = []
    for path in arguments.checkpoints:
        networks += load_networks(path, kinds, defaults, lambda config, n: build_model(config | here, n).to(device))
    flags = {"val_flip": arguments.flip, "data_dir": arguments.data_dir, "val_crop_ratio": arguments.crop_ratio}
    flags |= {"val_resolution": arguments.resolution and arguments.resolution[0]}
    here |= {key: value for key, value in flags.items() if value}
    here["precision"] = shared_precision([network.config for network in networks], device)
    return [network._replace(config=network.config | here) for network in networks]


def parse_arguments(arguments=None):
    """Return what the command line asks for; ends the program with status 2 where that is impossible."""
    parser = FlagsParser("evaluate.py", description=__doc__)
    flag = parser.add_argument
    flag("checkpoints", nargs="*", type=path_text, metavar="CHECKPOINT", help="default checkpoints/best.pt")
    flag("--data-dir", type=path_text, help="folder with val.arrow, val/<class>/* or <class>/*; default: the run's")
    flag("--classes", type=path_text, metavar="FILE", help="a class per line, in the order of the network's outputs")
    flag("--flip", action="store_true", help="also score the mean over image and mirror image")
    flag("--resolution", type=int, nargs="+", metavar="PX", help="score at these sizes; default: the run's")
    flag("--crop-ratio", type=float, metavar="R", help="crop over the resized shorter side; default: the run's")
    flag(
        "--weights",
        choices=("auto", "all", *WEIGHTS),
        help="default: all of one checkpoint; auto of several, and for --details",
    )
    flag("--real-labels", type=path_text, metavar="FILE", help="ReaL's real.json: also score ImageNet's val by its labels")
    flag("--average", action="store_true", help="the mean of the checkpoints' weights instead of an ensemble")
    split_help = "train scores the training images; with --details it ranks them by how likely their label is wrong"
    flag("--split", choices=("val", "train"), default="val", help=split_help)
    details_help = "write PREFIX_classes.csv, _confusions.csv, _images.csv, PREFIX.png, _calibration.png, _gallery.json"
    flag("--details", type=path_text, metavar="PREFIX", help=details_help)
    flag("--classify", nargs="+", type=path_text, metavar="PATH", help="image files and folders to classify")
    flag("--contact-sheet", type=path_text, metavar="PNG", help="of --classify: a picture of all images with their class")
    flag(
        "--export",
        type=path_text,
        metavar="FILE",
        help="write FILE.pt, .safetensors or .onnx, or FOLDER/ for timm and the Hub; and a model card",
    )
    flag("--price-per-hour", type=positive_number, help="of --export: for the model card")
    flag("--architecture", default="resnet50", help="of weights without a checkpoint; default resnet50")
    flag("--device", choices=("auto", "cuda", "cpu"), default="auto")
    parsed = parser.parse_args(arguments)
    parsed.checkpoints = parsed.checkpoints or ["checkpoints/best.pt"]
    parsed.scores = not parsed.classify and not parsed.export
    for problem in flag_problems(parsed):
        parser.error(problem)
    return parsed


def flag_problems(parsed):
    """Yield what is wrong with flags that are good by themselves."""
    for flag, owner in (("contact_sheet", "classify"), ("price_per_hour", "export")):
        if getattr(parsed, flag) is not None and not getattr(parsed, owner):
            yield f"--{flag.replace('_', '-')} belongs to --{owner}"
    if parsed.split == "train" and not parsed.scores:
        yield "--split: belongs to scores, not to --classify or --export"
    if parsed.weights == "all" and not parsed.scores:
        yield "--weights all: belongs to scores, not to --classify or --export: name one kind"
    if parsed.classify and parsed.export:
        yield "--classify and --export: one at a time"
    if parsed.average and (parsed.classify or len(parsed.checkpoints) < 2):
        yield "--average: takes two or more checkpoints, to score or to --export"
    if parsed.export and len(parsed.checkpoints) > 1 and not parsed.average:
        yield "--export takes one checkpoint, or the --average of several"
    for flag in ("flip", "details", "real_labels"):
        if getattr(parsed, flag) and not parsed.scores:
            yield f"--{flag.replace('_', '-')}: belongs to scores, not to --classify or --export"
    if parsed.export and not parsed.average and (parsed.resolution or parsed.crop_ratio):
        yield "--resolution and --crop-ratio: an exported checkpoint has those of its run"
    if parsed.crop_ratio is not None and not 0.1 <= parsed.crop_ratio <= 1:
        yield f"--crop-ratio {parsed.crop_ratio:g}: from 0.1 to 1"
    if not parsed.scores and len(parsed.resolution or []) > 1:
        yield f"--resolution {parsed.resolution}: one size for --classify and --export"
    if parsed.resolution and not all(32 <= px <= 1024 for px in parsed.resolution):
        yield f"--resolution {parsed.resolution}: from 32 to 1024 px"


if __name__ == "__main__":
    protect_output()
    sys.exit(run_program("evaluate.py", main, parse_arguments(), needs_output=True))
