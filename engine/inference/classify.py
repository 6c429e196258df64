"""Image files to the classes that networks see in them, and a contact sheet to look at."""

import io
import os
import sys
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageOps
from PIL.PngImagePlugin import PngInfo

from engine.data.images import decode_rgb, validation_view
from engine.data.loader import build_normalise
from engine.inference.class_names import class_in_short, class_in_words
from engine.inference.networks import class_labels
from engine.inference.outputs import SHEET_SOURCE
from engine.inference.scoring import log_mean_probabilities
from engine.preparation.finding import FolderTree, LeftOut, files_below, join_path
from engine.preparation.names import text_of
from engine.run.curves import label_font
from engine.system.device import AUTOCAST_DTYPES, autocast
from engine.system.errors import UserError
from engine.system.files import replacing
from engine.system.gpu_memory import retry_in_parts_on_oom

IMAGES_AT_ONCE = 64
THUMBNAIL = 168  # px


class Prediction(NamedTuple):
    """What the networks see in one file."""

    name: str  # text of the path
    path: bytes
    best: list  # (class, probability from 0 to 1), the most probable first


def print_classes(networks, paths, device, resolution=None, contact_sheet=None):
    """Print the most probable classes of each image file, by the mean of the networks' probabilities.

    Args:
        paths: of files and folders.
        resolution: px, in place of the run's.
        contact_sheet: path of a PNG with all images, or None.
    Returns:
        1 if a file could not be read, else 0.
    Raises:
        UserError: the networks know different classes, or some do not name theirs; or no image was classified.
    """
    first = networks[0]
    precision, classes = first.config["precision"], class_labels(first)
    _require_same_classes(networks)
    skipped, seen = [], []

    def probabilities(images):
        with autocast(device, precision):
            return log_mean_probabilities([network.model.eval()(images).float() for network in networks]).exp()

    def skip(path, reason):
        skipped.append(path)
        print(f"evaluate.py: skipped {path} ({reason})", file=sys.stderr)

    files = image_files(paths, skip, lambda line: print(line, file=sys.stderr))
    config = first.config | ({"val_resolution": resolution} if resolution else {})
    for prediction in classify(files, probabilities, classes, config, device, AUTOCAST_DTYPES[precision], skip):
        names = [f"{100 * share:.1f} % {class_in_words(name, first.class_names)}" for name, share in prediction.best]
        print(f"{prediction.name}: {'; '.join(names)}")
        seen.append(prediction)
    if contact_sheet and seen:
        write_contact_sheet(contact_sheet, seen, first.class_names)
        print(f"wrote {contact_sheet}")
    if not seen:
        raise UserError(f"no image was classified in {', '.join(paths)}")
    return 1 if skipped else 0


def _require_same_classes(networks):
    """Raise UserError unless the outputs of all networks are known to be the same classes, in the same order."""
    first = networks[0]
    for other in networks[1:]:
        if class_labels(other) == class_labels(first):
            continue
        unnamed = [network for network in (first, other) if network.classes is None]
        if len(unnamed) == 1:
            raise UserError(
                f"{unnamed[0].path} does not name its classes: classify with one at a time, or name a file with one class per "
                "line, in the order of the outputs of all: --classes FILE"
            )
        raise UserError("these checkpoints were trained on different classes: classify with one at a time")


def image_files(paths, skip, log):
    """Yield the paths, bytes, of the files named, and of folders every file in and below them, in order.

    What is no image is found out when it is read.

    Args:
        skip: called with (text of the path, reason) for each path that is no file and no folder, or an empty one.
        log: called with a line for each kind of things in the folders that were left out.
    """
    for path in paths:
        if os.path.isdir(path):
            tree, left_out, found = FolderTree(path), LeftOut(), 0
            for folder, files in files_below(tree, "", left_out):
                yield from (tree.path(join_path(folder, name)) for name in files)
                found += len(files)
            if not found:
                skip(shown(os.fsencode(path)), "no files in this folder")
            for line in left_out.lines(shown(os.fsencode(path))):
                log(line)
        elif os.path.exists(path) and not os.path.isfile(path):
            skip(shown(os.fsencode(path)), "no regular file")  # reading a pipe would wait for ever
        else:
            yield os.fsencode(path)


def shown(path):
    """Return a path, bytes, as text."""
    return text_of(path.decode("utf-8", "surrogateescape"))


def read(path):
    """Return the bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


@torch.inference_mode()
def classify(paths, probabilities, classes, config, device, dtype, skip, k=5):
    """Yield a Prediction for each file that can be read.

    Args:
        probabilities: function of images [B, 3, H, W] on the device, normalised: float [B, C], each row adding up to 1.
        config: for val_resolution and val_crop_ratio.
        paths: bytes.
        skip: called with (text of the path, reason) for each file that cannot be read.
    """
    views, files = [], []
    normalise, in_parts = build_normalise(device, dtype), retry_in_parts_on_oom(probabilities)

    def predictions():
        batch = torch.from_numpy(np.stack(views)).to(device).permute(0, 3, 1, 2)
        best = torch.cat(in_parts(normalise(batch))).topk(min(k, len(classes)), dim=1)
        for path, shares, labels in zip(files, best.values.tolist(), best.indices.tolist(), strict=True):
            yield Prediction(shown(path), path, [(classes[label], share) for label, share in zip(labels, shares, strict=True)])
        views.clear()
        files.clear()

    for path in paths:
        try:
            views.append(validation_view(read(path), config["val_resolution"], config["val_crop_ratio"]))
        except Exception as error:  # decoders fail in their own ways
            skip(shown(path), getattr(error, "strerror", None) or f"{type(error).__name__}: {error}")
            continue
        files.append(path)
        if len(files) == IMAGES_AT_ONCE:
            yield from predictions()
    if files:
        yield from predictions()


def shortened(words, draw, font, width):
    """Return words so far as they fit into a width in px."""
    while draw.textlength(words, font) > width and len(words) > 1:
        words = words[:-2] + "…"
    return words


def png_of(picture, source):
    """Return a Pillow image as PNG, bytes; source says which program and flag it is of."""
    buffer, entries = io.BytesIO(), PngInfo()
    entries.add_text("Source", source)
    picture.save(buffer, "PNG", pnginfo=entries)
    return buffer.getvalue()


def write_contact_sheet(path, predictions, class_names, columns=6):
    """Write a PNG of every image in small, with its first class and that one's probability."""
    width, height = THUMBNAIL + 12, THUMBNAIL + 40
    rows = -(-len(predictions) // columns)
    sheet = Image.new("RGB", (width * min(columns, max(len(predictions), 1)), height * max(rows, 1)), "white")
    draw, font = ImageDraw.Draw(sheet), label_font(12)
    for number, prediction in enumerate(predictions):
        left, top = width * (number % columns) + 6, height * (number // columns) + 6
        picture = Image.fromarray(decode_rgb(read(prediction.path)))
        picture = ImageOps.contain(picture, (THUMBNAIL, THUMBNAIL))
        sheet.paste(picture, (left + (THUMBNAIL - picture.width) // 2, top + (THUMBNAIL - picture.height) // 2))
        name, probability = prediction.best[0]
        words = shortened(class_in_short(name, class_names), draw, font, THUMBNAIL - 38)
        draw.text((left, top + THUMBNAIL + 6), f"{words} {100 * probability:.0f} %", fill="black", font=font)
    with replacing(path) as file:
        file.write(png_of(sheet, SHEET_SOURCE))
