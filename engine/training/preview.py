"""A batch of a run as a picture: what the network will see, with the names of its labels."""

import contextlib
import itertools

import torch
from PIL import Image, ImageDraw

from engine.cli.keys import ConfigError
from engine.data.batches import training_requests
from engine.data.loader import IMAGENET_MEAN, IMAGENET_STD, BatchLoader
from engine.inference.class_names import class_in_short, class_in_words
from engine.inference.classify import png_of, shortened
from engine.inference.outputs import PREVIEW_SOURCE, claim, picture_mark, user_error_on_failure
from engine.run.curves import label_font
from engine.system.distributed import refuse_several
from engine.system.files import replacing
from engine.system.interruption import StopRequest
from engine.training.images import open_images
from engine.training.mixing import build_mixing

PREVIEW = "preview.png"  # in the working folder
MOST_IMAGES, WIDTH = 64, 1800  # shown; px of the picture
SMALLEST_CELL, LINE = 96, 17  # px
CHANCES = ("mixup_alpha", "cutmix_alpha", "colout")  # of what torch's random state decides


def write_preview(command):
    """Write the first batch of an epoch, exactly as a new run's network will see it, to preview.png; return the exit status.

    Raises:
        ConfigError: the run has no such epoch.
        UserError: the picture cannot be written, or another's is there.
    """
    refuse_several("train.py --preview")
    config, epoch = command.config, epoch_to_show(command)
    claim("preview", {PREVIEW: picture_mark(PREVIEW_SOURCE)})
    splits = open_images(config, None, print)
    images, targets = first_batch(config, epoch, splits)
    split = splits["train"]
    names = split.classes, getattr(split, "class_names", {})
    pixels = pixels_of(images[:MOST_IMAGES])
    title = title_of(config, epoch, len(images), pixels)
    with user_error_on_failure("preview", PREVIEW), replacing(PREVIEW) as file:
        file.write(sheet(pixels, [label_in_words(target, *names) for target in targets[:MOST_IMAGES]], title))
    print(f"wrote {PREVIEW}: {title}")
    if epoch > 1 and any(config[key] for key in CHANCES):
        print("note: the crops are that epoch's own; what is mixed with what is an example, drawn anew")
    return 0


def epoch_to_show(command):
    """Return the number of the epoch, from 1, that --preview asks for."""
    text, epochs = command.options["preview"] or "1", command.config["epochs"]
    if not (text.isdecimal() and 1 <= int(text) <= epochs):
        raise ConfigError([f"--preview {text}: must be an epoch of the run, from 1 to {epochs}"])
    return int(text)


def first_batch(config, epoch, splits):
    """Return (images float32 [B, 3, H, W], targets) of an epoch's first batch, as train_one_epoch hands them to the step.

    What is mixed with what follows from torch's random state, which a run seeds before its first step.
    """
    classes = len(splits["train"].classes)
    torch.default_generator.manual_seed(config["seed"])
    settings = config | {"num_workers": 0}
    loader = BatchLoader(splits, settings, torch.device("cpu"), torch.float32, StopRequest(), print)
    with contextlib.closing(loader):
        request = itertools.islice(training_requests(splits["train"], config, epoch - 1), 1)
        ((images, labels),) = loader.training(request, set())
        return build_mixing(config, classes)(images, labels)


def pixels_of(images):
    """Return uint8 [B, H, W, 3] of normalised images [B, 3, H, W]."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (images.float() * std + mean).mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


def label_in_words(target, names, class_names):
    """Return the class of a target, an int64 scalar; of a mixed one, float [C], the two largest shares on a line each."""
    if target.ndim == 0:
        return class_in_words(names[int(target)], class_names)
    shares, classes = target.topk(min(2, len(target)))
    parts = [(share, names[label]) for share, label in zip(shares.tolist(), classes.tolist(), strict=True) if share > 0]
    if len(parts) == 1:
        return class_in_words(parts[0][1], class_names)
    return "\n".join(f"{100 * share:.0f} % {class_in_short(name, class_names)}" for share, name in parts)


def title_of(config, epoch, in_batch, pixels):
    """Return in words what the picture shows."""
    height, width = pixels.shape[1:3]
    what = [f"{width} px" if width == height else f"{width} x {height} px"]
    what += [config["augmentation"]] if config["augmentation"] != "none" else []
    what += [
        key.removesuffix("_alpha").replace("_", " ") for key in (*CHANCES, "color_jitter", "random_erasing") if config[key]
    ]
    shown = f"{len(pixels)} of {in_batch}" if len(pixels) < in_batch else str(in_batch)
    return f"epoch {epoch} of {config['epochs']}, first batch, {shown} images: {', '.join(what)}"


def sheet(pixels, labels, title):
    """Return a PNG of the images, pixel by pixel, each with its label below it."""
    count, height, width = pixels.shape[:3]
    cell, lines = max(width, SMALLEST_CELL) + 8, max(label.count("\n") + 1 for label in labels)
    cell_height = height + lines * LINE + 8
    columns = max(1, min(WIDTH // cell, 8, count))
    rows = -(-count // columns)
    page = Image.new("RGB", (max(cell * columns, 480), cell_height * rows + 2 * LINE), "white")
    draw, font = ImageDraw.Draw(page), label_font(12)
    draw.text((4, 6), shortened(title, draw, font, page.width - 8), fill="black", font=font)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        left, top = cell * (number % columns) + 4, cell_height * (number // columns) + 2 * LINE
        page.paste(Image.fromarray(image), (left, top))
        for line, words in enumerate(label.split("\n")):
            place = left, top + height + 2 + line * LINE
            draw.text(place, shortened(words, draw, font, cell - 8), fill="black", font=font)
    return png_of(page, PREVIEW_SOURCE)
