import contextlib
import itertools
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import encoded
from torchvision.transforms import v2

from config import CONFIG
from engine.data.batches import BatchRequest, training_requests, validation_requests
from engine.data.demo import picture
from engine.data.loader import IMAGENET_MEAN, IMAGENET_STD, BatchLoader
from engine.data.splits import open_splits
from engine.preparation import finding
from engine.system.errors import DataError
from engine.system.interruption import Interrupted, StopRequest

CPU = torch.device("cpu")
SMALL = CONFIG | {"train_resolution": 32, "val_resolution": 32, "batch_size": 8, "num_workers": 0}


def server(splits, config=SMALL, said=None):
    log = (said if said is not None else []).append
    return BatchLoader(splits, config, CPU, torch.float32, StopRequest(), log)


def served(splits, requests, config=SMALL):
    batches = server(splits, config)
    try:
        return [batch.images.clone() for batch in batches.iterate(requests)]
    finally:
        batches.close()


# The images on disk --------------------------------------------------------------------------------------------------


def test_classes_images_and_labels_are_torchvisions_imagefolder(image_tree):
    ours = open_splits(image_tree)["train"]
    theirs = torchvision.datasets.ImageFolder(image_tree / "train")
    assert ours.classes == theirs.classes
    assert [str(image_tree / "train" / ours.name(i)) for i in range(len(ours))] == [path for path, _ in theirs.samples]
    assert ours.labels.tolist() == theirs.targets
    assert ours.read(3) == (image_tree / "train" / ours.name(3)).read_bytes()


def test_paths_and_labels_are_arrays_not_python_objects(image_tree):
    split = open_splits(image_tree)["train"]
    big = [value for value in vars(split).values() if hasattr(value, "__len__") and len(value) >= len(split)]
    assert big
    assert all(isinstance(value, np.ndarray) and value.dtype != object for value in big)


def test_a_missing_folder_is_said_with_what_to_run_instead(tmp_path):
    with pytest.raises(DataError, match=r"does not exist.*--data-dir.*--recipe demo"):
        open_splits(tmp_path / "nowhere")


@pytest.mark.parametrize("missing", ["train", "val"])
def test_a_missing_split_is_named(tmp_path, missing):
    (tmp_path / {"train": "val", "val": "train"}[missing]).mkdir()
    with pytest.raises(DataError, match=f"has neither {missing}.arrow nor a folder {missing}"):
        open_splits(tmp_path)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (["cat_1.jpg", "cat_2.jpg", "dog_1.JPG"], "3 images outside of class folders (cat_1.jpg, cat_2.jpg, dog_1.JPG)"),
        (["train/1.jpg", "val/1.jpg"], "outside of class folders"),
        (
            ["train/a/1.heic", "val/a/2.avif"],
            "2 files are not named as images (train/a/1.heic, val/a/2.avif): these end in .jpg,",
        ),
        (["val/1.jpg", "val/a/2.jpg"], "train/<class>/ in the folder {folder}. 1 image outside of class folders (val/1.jpg)"),
        (["val/a/2.jpg", "val/b/2.jpg"], "in the folder {folder}. Prepare ImageNet there"),
        (["a/1.heic", "b/.DS_Store"], "1 file is not named as an image (a/1.heic): these end in .jpg,"),
    ],
)
def test_what_lies_there_in_place_of_class_folders_is_said(tmp_path, files, said):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(encoded(np.zeros((40, 40, 3), np.uint8)))
    for share in (0.0, 0.2):
        with pytest.raises(DataError) as error:
            open_splits(tmp_path, val_share=share)
        assert said.format(folder=tmp_path) in str(error.value)


def test_a_file_in_place_of_the_folder_is_said(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"cat.jpg' is a file.*name another folder with --data-dir"):
        open_splits(tmp_path / "cat.jpg")


def test_an_empty_split_and_an_empty_class_are_named(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    with pytest.raises(DataError, match="hold no class folders with images"):
        open_splits(tmp_path)
    for folder in ("train/cat", "train/dog", "val/cat"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "1.jpg").write_bytes(b"")
    (tmp_path / "train/emu").mkdir()
    with pytest.raises(DataError, match="without images: emu"):
        open_splits(tmp_path)


# Batches -------------------------------------------------------------------------------------------------------------


def test_samples_do_not_depend_on_num_workers(image_tree):
    splits = open_splits(image_tree)
    alone = served(splits, training_requests(splits["train"], SMALL, epoch=1))
    for workers in (1, 3):
        config = SMALL | {"num_workers": workers}
        others = served(splits, training_requests(splits["train"], config, epoch=1), config)
        assert len(alone) == len(others) == 7
        assert all(torch.equal(a, b) for a, b in zip(alone, others, strict=True))


def test_persistent_workers_augment_each_epoch_anew_and_the_same_epoch_the_same(image_tree):
    config = SMALL | {"num_workers": 2}
    splits = open_splits(image_tree)
    batches = server(splits, config)
    order = np.arange(8)
    requests = [BatchRequest("train", epoch, 32, order) for epoch in (0, 1, 0)]
    first, second, again = (next(iter([*batches.iterate([request])])).images.clone() for request in requests)
    batches.close()
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_a_view_depends_on_seed_epoch_and_index_alone(image_tree):
    splits = open_splits(image_tree)
    request = BatchRequest("train", 3, 32, np.array([5, 9, 5]))
    (images,) = served(splits, [request])
    assert torch.equal(images[0], images[2])
    assert torch.equal(images[1], served(splits, [request._replace(indices=np.array([9]))])[0][0])
    assert not torch.equal(images[0], served(splits, [request], SMALL | {"seed": 1})[0][0])


def test_an_epoch_shows_no_image_twice_and_each_epoch_has_its_order(image_tree):
    split = open_splits(image_tree)["train"]
    epochs = [np.concatenate([r.indices for r in training_requests(split, SMALL, epoch)]) for epoch in range(3)]
    assert all(len(set(epoch.tolist())) == len(epoch) == 56 for epoch in epochs)
    assert not np.array_equal(epochs[0], epochs[1])
    assert np.array_equal(epochs[2], np.concatenate([r.indices for r in training_requests(split, SMALL, 2)]))


def test_a_resumed_epoch_reads_none_of_the_images_before_its_position(image_tree, monkeypatch):
    splits = open_splits(image_tree)
    read = []
    original = finding.ImageFolder.read
    monkeypatch.setattr(finding.ImageFolder, "read", lambda split, index: read.append(index) or original(split, index))
    whole = served(splits, training_requests(splits["train"], SMALL, epoch=0))
    order, read[:] = list(read), []
    rest = served(splits, training_requests(splits["train"], SMALL, epoch=0, start_batch=4))
    assert read == order[32:]
    assert all(torch.equal(a, b) for a, b in zip(whole[4:], rest, strict=True))


@pytest.mark.parametrize("batch_size", [1, 7, 20, 64])
def test_validation_requests_cover_every_image_exactly_once(image_tree, batch_size):
    split = open_splits(image_tree)["val"]
    requests = list(validation_requests(split, SMALL | {"batch_size": batch_size}, 32))
    assert np.concatenate([r.indices for r in requests]).tolist() == list(range(20))
    assert all(0 < len(r.indices) <= batch_size for r in requests)


def test_batches_reach_the_network_normalised_and_channels_last(image_tree):
    splits = open_splits(image_tree)
    requests = list(training_requests(splits["train"], SMALL, 0))
    (raw,) = server(splits).iterate(requests[:1])
    ((images, labels),) = server(splits).training(requests[:1], set())
    assert raw.images.dtype == torch.uint8
    assert raw.images.shape == (8, 32, 32, 3)
    assert images.shape == (8, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    normalise = v2.Normalize(IMAGENET_MEAN, IMAGENET_STD)
    torch.testing.assert_close(images, normalise(raw.images.permute(0, 3, 1, 2) / 255), atol=1e-5, rtol=1e-5)
    assert torch.equal(labels, raw.labels)
    assert labels.tolist() == splits["train"].labels[requests[0].indices].tolist()


def test_serving_leaves_the_runs_random_state_alone(image_tree):
    splits = open_splits(image_tree)
    before = torch.get_rng_state()
    served(splits, training_requests(splits["train"], SMALL, 0), SMALL | {"num_workers": 1})
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_a_batch_stays_as_it_is_until_the_next_but_one_is_asked_for(image_tree, workers):
    config = SMALL | {"num_workers": workers}
    splits = open_splits(image_tree)
    requests = [r for epoch in range(4) for r in training_requests(splits["train"], config, epoch)]
    expected = served(splits, requests)
    batches = server(splits, config)
    before = None
    for number, batch in enumerate(batches.iterate(requests)):
        time.sleep(0.01)  # the workers run ahead as far as they may
        assert torch.equal(batch.images, expected[number])
        assert before is None or torch.equal(before.images, expected[number - 1])
        before = batch
    batches.close()


def test_a_pass_broken_off_leaves_nothing_in_the_next_one(image_tree):
    config = SMALL | {"num_workers": 2}
    splits = open_splits(image_tree)
    requests = list(training_requests(splits["train"], config, 0))
    expected = served(splits, requests)
    batches = server(splits, config)
    for taken in (1, 2, 3, 5):
        for _ in itertools.islice(batches.iterate(requests), taken):
            pass
        whole = [batch.images.clone() for batch in batches.iterate(requests)]
        assert all(torch.equal(a, b) for a, b in zip(whole, expected, strict=True))
    batches.close()


@pytest.mark.parametrize("asks", ["a signal", "another thread"])
@pytest.mark.parametrize("taken", [0, 1])
def test_a_run_that_is_asked_to_stop_does_not_wait_for_images_that_do_not_come(asks, taken, image_tree):
    config, splits = SMALL | {"num_workers": 1}, open_splits(image_tree)
    with StopRequest() as stop, contextlib.closing(BatchLoader(splits, config, CPU, torch.float32, stop, print)) as loader:
        (worker,) = loader.worker_states()
        batches = loader.training(training_requests(splits["train"], config, 0), set())
        for _ in range(taken):
            next(batches)
        os.kill(worker, signal.SIGSTOP)  # as one that waits for a network disk
        ask = (os.kill, (os.getpid(), signal.SIGTERM)) if asks == "a signal" else (stop.request, ("a notice", 143))
        threading.Timer(0.2, *ask).start()
        woken = []
        awake = threading.Timer(20, lambda: woken.append(os.kill(worker, signal.SIGCONT)))  # a failure is no wait without end
        awake.start()
        with pytest.raises(Interrupted) as stopped:
            for _ in batches:  # those that it has made before
                pass
        assert stopped.value.exit_code == 143 and not woken
        awake.cancel()
    assert not Path(f"/proc/{worker}").exists()


def test_batches_need_no_room_in_dev_shm(image_tree):
    config = SMALL | {"num_workers": 2}
    splits = open_splits(image_tree)
    batches = server(splits, config)
    for _ in batches.iterate(training_requests(splits["train"], config, 0)):
        worker = batches._iterator._workers[0].pid
        mapped = Path(f"/proc/{worker}/maps").read_text()
        assert "/dev/shm/torch" not in mapped and "/torch_" not in mapped
    assert "/dev/zero (deleted)" in mapped  # anonymous shared memory
    batches.close()


# Bad images ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged_tree(tmp_path):
    """A tree whose training files 3 and 7 are unreadable."""
    for split, count in (("train", 24), ("val", 6)):
        for number in range(count):
            folder = tmp_path / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = picture("dots_disc", np.random.default_rng(number))
            (folder / f"{number:03d}.jpg").write_bytes(encoded(pixels))
    files = sorted((tmp_path / "train").rglob("*.jpg"))
    files[3].write_bytes(b"")
    files[7].write_bytes(files[8].read_bytes()[:700])
    return tmp_path


def test_a_bad_image_is_named_once_counted_and_replaced_deterministically(damaged_tree):
    splits = open_splits(damaged_tree)
    requests = [r for epoch in range(3) for r in training_requests(splits["train"], SMALL, epoch)]
    runs = []
    for workers in (0, 2):
        said, bad = [], set()
        batches = server(splits, SMALL | {"num_workers": workers}, said)
        runs.append([(images.clone(), labels) for images, labels in batches.training(requests, bad)])
        batches.close()
        assert bad == {3, 7}
        assert sorted(re.findall(r"bad image (\S+)", "\n".join(said))) == ["class0/006.jpg", "class0/014.jpg"]
        assert len(said) == 2
    for (images, labels), (others, other_labels) in zip(*runs, strict=True):
        assert torch.equal(images, others)
        assert torch.equal(labels, other_labels)


def test_too_many_bad_images_stop_the_run(damaged_tree):
    splits = open_splits(damaged_tree)
    requests = training_requests(splits["train"], SMALL, 0)
    with pytest.raises(DataError, match="2 training images cannot be read, more than max_bad_images = 1"):
        list(server(splits, SMALL | {"max_bad_images": 1}).training(requests, set()))


def test_a_run_that_too_many_bad_images_have_stopped_goes_on_once_they_are_mended(image_tree, damaged_tree):
    for tree, stops in ((image_tree, False), (damaged_tree, True)):
        splits, known = open_splits(tree), {3, 7, 11}  # as the checkpoint knows them
        batches = server(splits, SMALL | {"max_bad_images": 1}).training(training_requests(splits["train"], SMALL, 0), known)
        with pytest.raises(DataError) if stops else contextlib.nullcontext():
            assert list(batches)
        assert known == {3, 7, 11}


def test_a_bad_validation_image_stops_the_run_and_is_named(damaged_tree):
    (damaged_tree / "val/class0/004.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"class0/004\.jpg cannot be read"):
        list(server(open_splits(damaged_tree)).validation())


def test_a_data_set_of_nothing_readable_is_called_so(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
        for number in range(8):
            (tmp_path / split / "a" / f"{number}.jpg").write_bytes(b"no image")
    splits = open_splits(tmp_path)
    for workers in (0, 1):
        loader = server(splits, SMALL | {"num_workers": workers})
        with pytest.raises(
            DataError, match=r"^100 images in a row could not be read, the last: a/\d\.jpg \(ValueError: [^\n]*$"
        ):
            list(loader.training(training_requests(splits["train"], SMALL, 0), set()))
        loader.close()
