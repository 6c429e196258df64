"""The flags of benchmark.py's commands.

Each function of FLAGS is given the add_argument of its command's parser.
"""

import argparse
from pathlib import Path

from benchmarks.optimizer_evidence import KINDS
from benchmarks.recipe_evidence import contenders
from benchmarks.step_speed import CPU_CONTENDERS
from benchmarks.transfer import CONTENDERS as TRANSFERS
from benchmarks.transfer import TIMM
from engine.system.device import choose_device
from engine.system.files import path_argument
from engine.system.workers import available_cores

OWN_IMAGES = "prepared or plain images to measure with; default: synthetic ones"


def input_flags(flag):
    """Add the flags of `benchmark.py input`."""
    flag("--data-dir", type=path_argument, help=OWN_IMAGES)
    flag("--images", **count(200, "images of each round"))
    flag("--rounds", **count(5, "rounds"))
    flag("--resolutions", type=at_least_one, nargs="+", default=[128, 160, 192, 224], metavar="PX")
    flag("--num-workers", **count(available_cores(), "worker processes of the loaders"))
    flag("--loader-batches", **count(8, "batches of 256 images in each round"))


def shared_step_flags(flag):
    """Add the flags that the benchmarks of a device share; what is None depends on the device."""
    flag("--batch-size", type=at_least_one, help="images of a step; default 256; 32 on a CPU")
    flag("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    flag("--rounds", **count(3, "rounds"))
    flag("--seconds", **count(10, "of measuring the step at each size"))


def step_flags(flag):
    """Add the flags of `benchmark.py step`."""
    shared_step_flags(flag)
    flag("--resolutions", type=at_least_one, nargs="+", metavar="PX", help="default 128 160 192 224; 128 on a CPU")
    flag("--contenders", nargs="+", metavar="NAME", choices=CPU_CONTENDERS, help="default: all that can run here")


def train_flags(flag):
    """Add the flags of `benchmark.py train`."""
    shared_step_flags(flag)
    flag("--data-dir", type=path_argument, help=OWN_IMAGES)
    flag("--resolution", type=at_least_one, help="px; default 224; 128 on a CPU")
    flag("--steps", type=at_least_one, help="of an epoch; default 200; 8 on a CPU")
    flag("--compile", choices=("auto", "on", "off"), default="auto")


def mirror_flags(flag):
    """Add the flags of `benchmark.py mirror`."""
    flag(
        "--mirror",
        metavar="URL",
        help="where to upload to, to stay there; default: a folder of its own, deleted again",
    )
    flag("--batch-size", **count(32, "images of a step"))
    flag("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    flag("--resolution", **count(64, "px"))
    flag("--steps", **count(100, "of an epoch"))
    flag("--seconds", **count(45, "between saves"))
    flag("--rounds", **count(4, "rounds"))


def gpu_flags(flag):
    """Add the flags of `benchmark.py gpu`."""
    flag("--minutes", type=float, default=25, help="that it may take; default 25")
    flag("--rehearse", action="store_true", help="go through everything at a tiny size on the CPU")
    flag("--anew", action="store_true", help="do not go on with this card's newest sitting")
    flag("--parts", nargs="+", metavar="NAME", help="only those whose names begin so, such as step; default: all")
    flag("--results", type=path_argument, metavar="FILE", help="default benchmarks/gpu.jsonl, or gpu_rehearsal.jsonl")


def recipe_flags(flag):
    """Add the flags of `benchmark.py recipes`."""
    flag("--data-dir", type=path_argument, default=Path("data/hard"), help="where the images are made; default data/hard")
    flag("--architecture", default="resnet50", help="default resnet50")
    flag("--num-workers", default="auto", help="of train.py; default auto")
    flag("--resolution", **count(128, "px, in place of 224"))
    flag("--batch-size", **count(256, "images of a step"))
    flag("--epochs", **count(16, "epochs of fast; the others get the same compute"))
    flag("--train-images", **count(20_000, "training images"))
    flag("--val-images", **count(5_000, "validation images"))
    flag("--classes", **count(100, "classes of the images, at most 100"))
    flag("--min-crop-area", type=float, default=0.25, help="of all recipes, as the pictures are small; 0.25")
    flag("--seeds", **count(3, "runs of each"))
    flag("--contenders", nargs="+", metavar="NAME", choices=contenders(128, 16), help="default: all")


def optimizer_flags(flag):
    """Add the flags of `benchmark.py optimizers`."""
    flag("--data-dir", type=path_argument, default=Path("data/kinds"), help="where the images are made; default data/kinds")
    flag("--architecture", default="resnet18", help="default resnet18")
    flag("--train-images", **count(3_200, "training images"))
    flag("--val-images", **count(1_000, "validation images"))
    flag("--precision", choices=("auto", "fp32", "fp16", "bf16"), default="auto")
    flag("--kinds", nargs="+", choices=KINDS, default=list(KINDS), metavar="KIND", help="of pictures; default: all")
    flag("--epochs", **count(8, "epochs of the runs that find the rates"))
    flag("--lengths", type=at_least_one, nargs="*", default=[4, 16, 32], metavar="EPOCHS", help="of further runs")
    flag("--variants", action="store_true", help="also Muon with one thing changed")
    flag("--seeds", **count(3, "runs of each at the best rate"))
    flag("--jobs", **count(available_cores(), "runs at a time, a core for each"))
    flag("--minutes", type=float, default=float("inf"), help="after which no run is begun; default: without end")


def transfer_flags(flag):
    """Add the flags of `benchmark.py transfer`."""
    flag("--data-dir", type=path_argument, default=Path("data/transfer"), help="where the images are made; data/transfer")
    flag("--architecture", default="resnet50", help="default resnet50")
    flag("--num-workers", default="2", help="processes that decode images for each run; default 2")
    flag("--resolution", **count(64, "px"))
    flag("--batch-size", **count(32, "images of a step"))
    flag("--classes", **count(50, "classes of each half, at most 50"))
    flag("--pretrain-images", **count(20_000, "training images of the first half of the classes"))
    flag("--pretrain-epochs", **count(16, "epochs on them"))
    flag("--images", **count(1_000, "training images of the second half"))
    flag("--epochs", **count(64, "epochs on them"))
    flag("--val-images", **count(2_000, "validation images of each half"))
    flag("--seeds", **count(3, "runs of each"))
    flag("--jobs", **count(1, "runs at once"))
    flag("--timm", type=path_argument, metavar="FOLDER", help="a checkout of pytorch-image-models; its train.py runs, too")
    flag("--contenders", nargs="+", metavar="NAME", choices=[*TRANSFERS, *TIMM], help="default: all")


def count(default, text):
    """Return the options of a flag that takes a whole number of at least 1."""
    return {"type": at_least_one, "default": default, "help": f"{text}; default {default}"}


def fill_in_step_flags(arguments):
    """Put in the defaults that depend on the device: a CPU gets a job that it finishes."""
    on_cpu = choose_device({"device": arguments.device}, in_this_process=False).type == "cpu"
    defaults = {
        "batch_size": 32 if on_cpu else 256,
        "resolutions": [128] if on_cpu else [128, 160, 192, 224],
        "resolution": 128 if on_cpu else 224,
        "steps": 8 if on_cpu else 200,
    }
    for name, value in defaults.items():
        if getattr(arguments, name, value) is None:
            setattr(arguments, name, value)


def at_least_one(text):
    """Return the whole number of at least 1 that the text is."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be a whole number of at least 1")
    return int(text)


FLAGS = {  # command: function that adds its flags
    "input": input_flags,
    "step": step_flags,
    "train": train_flags,
    "mirror": mirror_flags,
    "scaling": lambda flag: None,
    "gpu": gpu_flags,
    "recipes": recipe_flags,
    "optimizers": optimizer_flags,
    "transfer": transfer_flags,
}
