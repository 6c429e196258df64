"""A data set as it was found, whatever its form: the images of each split, with their labels and where their bytes lie."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from engine.preparation.archives import FileSlice, ParquetRow, Zipped


class Entry(NamedTuple):
    """One image of a split."""

    name: str  # text: a file name, or a path below the class's folder
    label: int  # index into the source's classes
    place: FileSlice | Zipped | ParquetRow


@dataclass
class Source:
    """A data set as it was found."""

    kind: str  # in words
    classes: list  # text, in the order of the labels: sorted wnids, for ImageNet
    splits: dict  # {'train': [Entry], 'val': [Entry]}, sorted by label and name, parquet as it lies
    class_names: dict = field(default_factory=dict)  # {class: what people call it}, as far as known
    remarks: list = field(default_factory=list)  # lines for the user: what was left out, and what was chosen


class Options(NamedTuple):
    """What a source may need besides its path."""

    scratch: Path | None = None  # folder for uncompressed archives
    image_column: str | None = None  # of parquet files
    label_column: str | None = None
    log: Callable = print
