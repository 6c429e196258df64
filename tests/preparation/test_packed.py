"""train.arrow in place of train/: the same images, the same run."""

import collections
import os
import pickle
import sys

import numpy as np
import pytest
import torch
from conftest import encoded, photo, run_here, tiny_run

from config import CONFIG
from engine.data.batches import training_requests
from engine.data.loader import BatchLoader
from engine.data.splits import open_splits
from engine.preparation import finding
from engine.preparation.packed import END_OF_STREAM, PackedSplit, packed_rows, packed_schema, write_split
from engine.run.records import read_records
from engine.system.errors import DataError
from engine.system.interruption import StopRequest

pytest.importorskip("pyarrow")


def pack(path, rows, classes, rows_in_batch=7):
    write_split(path, rows, classes, rows_in_batch)
    return path


def pack_folder(tree, destination):
    """Pack an ImageFolder tree with every file as it is."""
    destination.mkdir()
    for name, split in open_splits(tree).items():
        rows = [(split.read(i), split.name(i).split("/", 1)[1], int(split.labels[i])) for i in range(len(split))]
        pack(destination / f"{name}.arrow", rows, split.classes)
    return destination


def test_a_packed_split_and_a_folder_hold_the_same_images(image_tree, tmp_path):
    folder, packed = open_splits(image_tree), open_splits(pack_folder(image_tree, tmp_path / "packed"))
    for name in ("train", "val"):
        assert isinstance(packed[name], PackedSplit)
        assert packed[name].classes == folder[name].classes
        assert packed[name].labels.tolist() == folder[name].labels.tolist()
        for index in range(len(folder[name])):
            assert packed[name].read(index) == folder[name].read(index)
            assert packed[name].name(index) == folder[name].name(index)


def test_a_run_on_a_packed_split_ends_with_the_bits_of_one_on_the_folder(image_tree, tmp_path):
    packed = pack_folder(image_tree, tmp_path / "packed")
    for name, images in (("folder", image_tree), ("arrow", packed)):
        assert run_here(tiny_run(images, tmp_path / name, num_workers=1, epochs=2)) == 0
    first, second = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("folder", "arrow"))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_may_go_on_with_the_packed_images(image_tree, tmp_path):
    packed = pack_folder(image_tree, tmp_path / "packed")
    assert run_here(tiny_run(image_tree, tmp_path / "run", epochs=2)) == 0
    again = ["--resume", str(tmp_path / "run/last.pt"), "--epochs=3", f"--data-dir={packed}", f"--log-file={tmp_path / 'log'}"]
    assert run_here(again) == 0
    assert len(read_records(tmp_path / "run/metrics.jsonl")) == 3


def test_one_split_may_be_packed_and_the_other_a_folder(image_tree, tmp_path):
    packed = pack_folder(image_tree, tmp_path / "packed")
    (packed / "val.arrow").unlink()
    (packed / "val").symlink_to(image_tree / "val")
    splits = open_splits(packed)
    assert isinstance(splits["train"], PackedSplit)
    assert isinstance(splits["val"], finding.ImageFolder)


def test_its_index_is_arrays_not_python_objects(image_tree, tmp_path):
    split = open_splits(pack_folder(image_tree, tmp_path / "packed"))["train"]
    big = [value for value in vars(split).values() if hasattr(value, "__len__") and len(value) >= len(split)]
    assert len(big) >= 3
    assert all(isinstance(value, np.ndarray) and value.dtype != object for value in big)


def test_a_cut_file_is_refused_wherever_it_was_cut(image_tree, tmp_path):
    path = pack_folder(image_tree, tmp_path / "packed") / "train.arrow"
    whole = path.read_bytes()
    lengths = [0, 1, 100, len(whole) // 3, len(whole) // 2, len(whole) - 9, len(whole) - 8, len(whole) - 1]
    schema = packed_schema([], {}).serialize().size
    for length in [*lengths, schema]:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="is damaged"):
            PackedSplit(path)


def test_a_file_that_becomes_shorter_during_the_run_is_an_error_not_a_wrong_image(image_tree, tmp_path):
    path = pack_folder(image_tree, tmp_path / "packed") / "train.arrow"
    split = PackedSplit(path)
    last = len(split) - 1
    os.truncate(path, split.position(last)[0] + 10)
    with pytest.raises(OSError, match="has become shorter"):
        split.read(last)
    assert split.read(0) == open_splits(image_tree)["train"].read(0)


def test_an_image_is_named_though_its_file_was_cut_deleted_or_replaced_since(image_tree, tmp_path):
    path = pack_folder(image_tree, tmp_path / "packed") / "train.arrow"
    split = PackedSplit(path)
    last = len(split) - 1
    name = split.name(last)
    path.with_name("val.arrow").rename(path)  # has fewer images
    assert split.name(last) == name
    path.unlink()
    assert split.name(last) == name
    os.truncate(f"/proc/self/fd/{split._file.fileno()}", split.position(last)[0])
    assert split.name(last) == f"{split.classes[-1]}/row {last}"


def test_a_foreign_arrow_file_is_refused(tmp_path):
    import pyarrow as pa

    table = pa.table({"text": ["a", "b"]})
    with pa.ipc.new_stream(str(tmp_path / "train.arrow"), table.schema) as stream:
        stream.write_table(table)
    with pytest.raises(DataError, match=r"no column of images and of class labels \(columns: text\)"):
        PackedSplit(tmp_path / "train.arrow")


@pytest.mark.parametrize(("rows", "reason"), [([(b"x", "a", 5)], "labels outside"), ([(None, "a", 0)], "without an image")])
def test_rows_that_cannot_be_trained_on_are_refused(rows, reason, tmp_path):
    with pytest.raises(DataError, match=reason):
        PackedSplit(pack(tmp_path / "train.arrow", rows, ["cat", "dog"]))


def test_validation_labels_count_in_the_order_of_the_training_classes(tmp_path):
    pack(tmp_path / "train.arrow", [(b"a", "a", 0), (b"b", "b", 1)], ["cat", "dog"])
    pack(tmp_path / "val.arrow", [(b"d", "d", 0), (b"c", "c", 1)], ["dog", "cat"])
    val = open_splits(tmp_path)["val"]
    assert val.classes == ["cat", "dog"]
    assert {val.read(i): (val.classes[val.labels[i]], val.name(i)) for i in range(2)} == {
        b"c": ("cat", "cat/c"),
        b"d": ("dog", "dog/d"),
    }
    assert pickle.loads(pickle.dumps(val)).labels.tolist() == val.labels.tolist()
    pack(tmp_path / "val.arrow", [(b"c", "c", 0), (b"e", "e", 1)], ["cat", "emu"])
    with pytest.raises(DataError, match="different classes .only in val: emu"):
        open_splits(tmp_path)


def test_a_packed_split_may_lack_a_class_which_is_said(tmp_path):
    pack(tmp_path / "train.arrow", [(b"a", "a", 0), (b"b", "b", 2)], ["cat", "dog", "emu"])
    pack(tmp_path / "val.arrow", [(b"a", "a", 0)], ["cat", "dog", "emu"])
    said = []
    splits = open_splits(tmp_path, log=said.append)
    assert splits["train"].labels.tolist() == [0, 2]
    assert said == [
        "WARNING: train has no images of 1 of the 3 classes: dog",
        "WARNING: val has no images of 2 of the 3 classes: dog, emu",
    ]


def test_a_damaged_packed_image_is_named(tmp_path, capsys):
    jpeg = encoded(photo(40, 40))
    for name, count in (("train", 20), ("val", 4)):
        rows = [(jpeg if n != 7 else b"damaged", f"{n}.JPEG", n % 2) for n in range(count)]
        pack(tmp_path / f"{name}.arrow", rows, ["cat", "dog"])
    assert run_here(tiny_run(tmp_path, tmp_path / "run", epochs=1, swa_start_epoch=0)) == 0
    assert "bad image dog/7.JPEG" in capsys.readouterr().out


def private_memory(pid):
    """Return the process's memory that it shares with no file and no other process, bytes."""
    with open(f"/proc/{pid}/smaps_rollup") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith(("Private_Dirty", "Private_Clean")))


@pytest.mark.slow
def test_a_workers_memory_does_not_grow_over_an_epoch(tmp_path):
    content = [encoded(photo(200, 240, seed), quality=95) + bytes(40_000) for seed in range(8)]
    rows = [(content[n % 8], f"{n}.JPEG", n % 2) for n in range(3000)]
    for name in ("train", "val"):
        pack(tmp_path / f"{name}.arrow", rows, ["cat", "dog"], rows_in_batch=512)
    config = CONFIG | {"batch_size": 50, "train_resolution": 64, "num_workers": 1}
    batches = BatchLoader(open_splits(tmp_path), config, torch.device("cpu"), torch.float32, StopRequest(), print)
    memory = []
    for _ in batches.iterate(training_requests(batches.splits["train"], config, epoch=0)):
        worker = batches._iterator._workers[0].pid
        memory.append(private_memory(worker))
    batches.close()
    assert len(memory) == 60
    assert (tmp_path / "train.arrow").stat().st_size > 150e6
    assert max(memory) - memory[15] < 20e6


@pytest.mark.slow
def test_a_split_of_imagenets_size_is_opened_without_a_look_at_each_image(tmp_path):
    schema = packed_schema([f"n{number:08d}" for number in range(1000)], {})
    images, piece = 1_281_167, 512
    with open(tmp_path / "train.arrow", "wb") as file:
        file.write(schema.serialize())
        for start in range(0, images, piece):
            numbers = range(start, min(start + piece, images))
            file.write(packed_rows(schema, [(b"%020d" % n, f"n01440764_{n}.JPEG", n % 1000) for n in numbers]))
        file.write(END_OF_STREAM)
    calls = collections.Counter()
    sys.setprofile(lambda frame, event, argument: calls.update([event]))
    try:
        split = PackedSplit(tmp_path / "train.arrow")
    finally:
        sys.setprofile(None)
    assert len(split) == images
    assert [int(split.read(n)) for n in (0, 511, 512, 1_281_166)] == [0, 511, 512, 1_281_166]
    assert calls.total() < images / 5, calls
    os.unlink(tmp_path / "train.arrow")


def test_without_pyarrow_it_is_said_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("engine.preparation.packed.pa", None)
    for attempt in (lambda: write_split(tmp_path / "train.arrow", [], ["a"]), lambda: PackedSplit(tmp_path / "train.arrow")):
        with pytest.raises(DataError, match="pip install pyarrow"):
            attempt()
