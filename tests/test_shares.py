"""No image that a network was trained on is scored as a validation image of it, whatever happens to a folder with val_share."""

import shutil

import pytest
from conftest import run_here, tiny_run

import evaluate
from engine.inference.weight_files import find_weights
from engine.preparation.val_share import open_shares
from engine.run import checkpoint_files
from engine.system.errors import DataError
from engine.training.initial_weights import remarks_on_share

QUICK = {"epochs": 1, "warmup_epochs": 0, "swa_start_epoch": 0}


@pytest.fixture(scope="module")
def shares(image_tree, tmp_path_factory):
    """(class folders alone, {share: the folder of a run of one epoch with it})."""
    folder = tmp_path_factory.mktemp("shares")
    images, runs = shutil.copytree(image_tree / "train", folder / "images"), {}
    for share in (0.4, 0.2):
        runs[share] = folder / f"run{share}"
        assert run_here(tiny_run(images, runs[share], val_share=share, **QUICK)) == 0
    return images, runs


def evaluated(capsys, *arguments):
    capsys.readouterr()
    assert evaluate.main(evaluate.parse_arguments([*map(str, arguments), "--device=cpu"])) == 0
    return capsys.readouterr().out


def renamed(images, folder):
    """A copy of the class folders in which every image has another name."""
    shutil.copytree(images, folder)
    for path in sorted(folder.glob("*/*")):
        path.rename(path.with_name(f"new_{path.name}"))
    return folder


def test_networks_of_different_shares_are_not_scored_together(shares, tmp_path, capsys):
    images, runs = shares
    for order in ((0.4, 0.2), (0.2, 0.4)):
        with pytest.raises(DataError, match="other images for validation: .* trained on images that .* one at a time"):
            evaluated(capsys, *(runs[share] / "last.pt" for share in order))
    both = evaluated(capsys, runs[0.4] / "last.pt", runs[0.4] / "best.pt")
    assert both.count("never trained on") == 1 and "on 20 images" in both
    evaluated(capsys, runs[0.4] / "last.pt", f"--export={tmp_path / 'w.pt'}")
    first = evaluated(capsys, tmp_path / "w.pt", runs[0.4] / "last.pt", f"--data-dir={images}")
    assert "on 20 images" in first  # those of the share, though the first file tells of none


def test_renamed_images_make_another_share_and_are_refused(shares, tmp_path, capsys):
    images, runs = shares
    moved = renamed(images, tmp_path / "moved")
    run = shutil.copytree(runs[0.2], tmp_path / "run")
    with pytest.raises(DataError, match="as many images .* under other names"):
        evaluated(capsys, run / "last.pt", f"--data-dir={moved}")
    go_on = [f"--resume={run}/last.pt", "--epochs=2", f"--data-dir={moved}"]
    with pytest.raises(DataError, match="under other names .* their names back"):
        run_here(go_on)
    older = checkpoint_files.read(run / "last.pt")
    del older["share_digests"]
    checkpoint_files.write(run / "last.pt", older, {}, run / "previous.pt")
    assert "on 10 images" in evaluated(capsys, run / "last.pt", f"--data-dir={moved}")
    assert run_here(go_on) == 0


def test_a_run_that_begins_with_weights_of_another_share_says_that_its_validation_images_may_have_been_trained_on(shares):
    images, runs = shares
    found = find_weights(str(runs[0.4] / "last.pt"), "resnet18")
    splits = {share: open_shares(images, share)[0] for share in runs}
    assert remarks_on_share(found, splits[0.4]) == []
    (warning,) = remarks_on_share(found, splits[0.2])
    assert warning.startswith("WARNING: ") and "Take the val_share of then" in warning
    assert remarks_on_share(found._replace(classes=["of", "another", "set"]), splits[0.2]) == []
    torchvisions = found._replace(share_digests=None)
    assert remarks_on_share(torchvisions, splits[0.2]) == remarks_on_share(None, splits[0.2]) == []
