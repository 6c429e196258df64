"""The files that flags ask for: nobody else's and writable, which is seen before the work begins; errors in words.

A file is written where there is none, an empty one, or this program's own of the same kind, which its mark shows. So no input,
checkpoint, record or other file of the user's is lost.
"""

import contextlib
import os
import re
import tempfile
from pathlib import Path

from engine.inference.weight_files import read_weights
from engine.system.errors import UserError
from engine.system.files import make_folder

HEAD_BYTES = 1 << 16  # at a file's beginning, in which its mark lies


def is_export(path):
    """Return whether a file with weights says of itself what --export writes into each."""
    try:
        if Path(path).suffix == ".onnx":
            import onnx

            return any(entry.key == "blurs" for entry in onnx.load(path, load_external_data=False).metadata_props)
        return bool(read_weights(path).facts)
    except Exception:  # whatever it is, it is none
        return False


def picture_mark(source):
    """Return the mark of a PNG in which stands which program and flag it is of."""
    return re.compile(re.escape(f"tEXtSource\0{source}".encode("latin-1")))


SHEET_SOURCE, DETAILS_SOURCE = "evaluate.py --contact-sheet", "evaluate.py --details"
PREVIEW_SOURCE, RANGE_TEST_SOURCE = "train.py --preview", "lr_finder.py"
CARD_MARK = re.compile(rb"^# .+, \d+ classes\n\nWeights in `(.+)`, trained with the recipe `", re.MULTILINE)
TIMM_CONFIG_MARK = re.compile(rb'"classifier": "fc"\s*\},\s*"label_names": \[')
CLASSES_MARK = re.compile(rb"\Aclass,name,images,correct,top1,most_taken_for,times\n")
CONFUSIONS_MARK = re.compile(rb"\Aclass,name,taken_for,taken_for_name,times,percent_of_class\n")
IMAGES_MARK = re.compile(rb"\Aimage,class,predicted,probability_of_class,probability_of_predicted,suspicion\n")
GALLERY_MARK = re.compile(rb'\A\{"title": ".*", "training": (true|false), "calibration_error": ')
RANGE_TEST_MARK = re.compile(rb'\A\{"rates": \[')


@contextlib.contextmanager
def user_error_on_failure(flag, path):
    """Turn an OSError of the block, which writes what a flag has asked for, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--{flag} {path} could not be written: {error}") from error


def claim(flag, marks, inputs=()):
    """Make the folders of a flag's files before the work begins; raise UserError if one cannot or must not be written.

    Args:
        marks: {path of a file: what shows that an earlier call has written it}, a pattern of bytes in its head or a function
            of its path.
        inputs: paths of what is read.
    """
    for path, mark in marks.items():
        path = Path(path)
        with user_error_on_failure(flag, path):
            make_folder(path.parent)
            tempfile.TemporaryFile(dir=path.parent).close()
            if problem := _problem(path, mark, inputs):
                raise UserError(f"--{flag} {path} {problem}")


def _problem(path, mark, inputs):
    """Return why what is at a path must not be replaced, or None."""
    if not path.exists():
        return None
    if path.is_dir():
        return "is a folder: name a file"
    if not path.is_file():
        return "is no regular file: name another"
    if any(os.path.exists(other) and os.path.samefile(path, other) for other in inputs):
        return "is one of the inputs: name another file"
    if path.stat().st_size and not has_mark(path, mark):
        return "is there and was not written by this flag: name another file, or move that one away"
    return None


def has_mark(path, mark):
    """Return whether a file has a mark, as of claim()."""
    return mark(path) if callable(mark) else mark_in(path, mark) is not None


def mark_in(path, mark):
    """Return the match of a pattern of bytes in a file's head, or None."""
    with open(path, "rb") as file:
        return mark.search(file.read(HEAD_BYTES))


def named_prefix(flag, prefix):
    """Return what the names of a flag's files begin with; UserError where it names a folder alone: they would be hidden."""
    if str(prefix).endswith("/"):
        raise UserError(f"--{flag} {prefix} is a folder: name the files in it, such as {prefix}{flag}")
    return str(prefix)
