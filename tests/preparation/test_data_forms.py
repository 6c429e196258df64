"""docs/data_forms.md is what the code knows; each form has a small real instance, and is recognised by it."""

import re

import published_forms as built
import pytest
from conftest import REPOSITORY, run_here, tiny_run
from published_forms import FORMS, ORIGINALS
from torchvision.datasets.imagenet import ARCHIVE_META

from engine.data.splits import open_splits
from engine.preparation import forms
from engine.system.errors import DataError

PAGE = REPOSITORY / "docs/data_forms.md"
INSTANCES = {  # what the tests of preparation build
    "the official tar files": [built.official],
    "archives of the Hugging Face Hub": [built.old_archives_of_the_hub],
    "parquet files of Hugging Face": [built.parquet, built.parquet_without_metadata, built.converted_parquet],
    "Arrow files": [built.saved_by_datasets],
    "WebDataset shards": [built.webdataset, built.webdataset_json],
    "a tree of folders": [
        built.image_folder,
        built.links_to_class_folders,
        built.kaggle_tree,
        built.flat_val_with_devkit,
        built.tiny_imagenet_tree,
    ],
    "an archive of such a tree": [
        built.kaggle_zip,
        built.tar_of_kaggles_tree,
        built.kaggles_patched_tar,
        built.imagenette_tgz,
        built.tiny_imagenet_zip,
    ],
}


INTRODUCTION = """# Forms of a data set

Written by `PYTHONPATH=.:tests python tests/preparation/test_data_forms.py` from what `engine/preparation/forms.py` knows.
`python prepare_data.py SOURCE DESTINATION` packs each of them; `python train.py --data-dir SOURCE` and
`python evaluate.py --data-dir SOURCE` also read a tree of folders as it lies. [imagenet.md](imagenet.md) says more.
"""
WHOLE_OR_REFUSED = """
A compressed tar cannot be read from the middle: it is uncompressed to a file in DESTINATION first, which is deleted at the end.
Everything else is read where it lies.

EXIF rotation is ignored, in training, validation and `evaluate.py --classify` alike, as in torchvision's ImageFolder: images
are seen as their pixels are stored.

## Whole or refused

A tar must end as tars do, with blocks of zeros and nothing behind them, the outer one and each inner one; a bad header anywhere
is refused with its byte. Compressed files are read to their checksum. What a data set says of itself must be there: the kit's
classes and validation images, the lines of Kaggle's and tiny-imagenet's lists, all of numbered files, the rows that parquet's
metadata and the data set's card promise. Refused are row groups of parquet with over 1 GiB of images (each worker holds one),
and zips with a password. A tar has no checksum of its members' bytes: that the official files arrived unharmed, only their
published MD5 sums say (`md5sum -c`):
"""


def cell(text):
    """A text as a cell of a Markdown table."""
    return re.sub(r"([|*\\])", r"\\\1", text).replace("<", "&lt;")


def page():
    """The text of docs/data_forms.md."""
    lines = [INTRODUCTION, "| form | what lies there | labels | train.py reads it as it lies |", "|---|---|---|---|"]
    for form in forms.FORMS:
        lines.append(f"| {form.name} | {cell(form.lies_there)} | {cell(form.labels)} | {'yes' if form.trains else 'no'} |")
    lines.append(WHOLE_OR_REFUSED)
    lines += [f"    {md5}  {name}" for name, md5 in ARCHIVE_META.values()]
    lines += ["", "## Not read", "", "| form | how to get images out of it |", "|---|---|"]
    lines += [f"| {cell(kind)} | {cell(way_out)} |" for _, kind, way_out in forms.FOREIGN]
    return "\n".join(lines) + "\n"


def test_the_page_is_what_the_code_knows():
    assert PAGE.read_text() == page(), "run PYTHONPATH=.:tests python tests/preparation/test_data_forms.py"


def test_every_form_has_a_small_real_instance_in_the_tests_and_is_recognised(tmp_path):
    assert list(INSTANCES) == [form.name for form in forms.FORMS]
    assert {builder for builders in INSTANCES.values() for builder in builders} == set(FORMS)
    for form in forms.FORMS:
        for builder in INSTANCES[form.name]:
            folder = tmp_path / builder.__name__ / "source"
            folder.mkdir(parents=True)
            path = builder(folder, ORIGINALS)
            assert forms.form_at(path) is form, builder.__name__
            if form.trains:
                assert len(open_splits(path)["train"]) == 15
            elif form.name != "Arrow files":
                with pytest.raises(
                    DataError, match=f"holds {form.name}, to be packed first: python prepare_data.py {path} PACKED"
                ):
                    open_splits(path)


def test_the_message_lists_what_is_known(tmp_path):
    with pytest.raises(DataError) as refused:
        forms.open_source(tmp_path)
    for form in forms.FORMS:
        assert form.lies_there in str(refused.value)


@pytest.mark.parametrize("builder", [built.kaggle_tree, built.tiny_imagenet_tree, built.flat_val_with_devkit])
def test_a_flat_val_on_disk_gives_the_images_and_labels_of_one_in_class_folders(builder, tmp_path):
    (tmp_path / "sorted").mkdir()
    (tmp_path / "flat").mkdir()
    expected = open_splits(built.image_folder(tmp_path / "sorted", ORIGINALS))
    splits = open_splits(builder(tmp_path / "flat", ORIGINALS))
    for name, split in splits.items():
        assert split.classes == expected[name].classes
        assert split.labels.tolist() == expected[name].labels.tolist()
        assert [split.read(i) for i in range(len(split))] == [expected[name].read(i) for i in range(len(split))]
        if builder is not built.flat_val_with_devkit or name == "train":
            assert split.class_names == built.ENGLISH


def test_training_goes_on_kaggles_tree_as_it_lies_and_says_what_packing_would_gain(tmp_path, capsys):
    (tmp_path / "tree").mkdir()
    built.kaggle_tree(tmp_path / "tree", ORIGINALS)
    arguments = tiny_run(tmp_path / "tree", tmp_path / "run", epochs=1, swa_start_epoch=0, batch_size=5)
    assert run_here(arguments) == 0
    said = capsys.readouterr().out
    assert "15 images of 3 classes" in said
    assert "ms each on one core; packed by python prepare_data.py it would be" in said


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
