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
    assert "on 20 images" in first


def test_an_exported_network_is_scored_on_the_images_that_its_run_split_off_and_warns_a_run_with_another_share(
    shares, tmp_path, capsys
):
    pytest.importorskip("safetensors")
    images, runs = shares
    splits = {share: open_shares(images, share)[0] for share in runs}
    for name in ("w.pt", "w.safetensors"):
        evaluated(capsys, runs[0.4] / "last.pt", f"--export={tmp_path / name}")
        said = evaluated(capsys, tmp_path / name, f"--data-dir={images}")
        assert "never trained on" in said and "on 20 images" in said
        assert "on 40 images" in evaluated(capsys, tmp_path / name, f"--data-dir={images}", "--split=train")
        with pytest.raises(DataError, match="other images for validation"):
            evaluated(capsys, tmp_path / name, runs[0.2] / "last.pt", f"--data-dir={images}")
        found = find_weights(str(tmp_path / name), "resnet18")
        assert remarks_on_share(found, splits[0.4]) == []
        assert len(remarks_on_share(found, splits[0.2])) == 1
    with pytest.raises(DataError, match="as many images .* under other names"):
        evaluated(capsys, tmp_path / "w.pt", f"--data-dir={renamed(images, tmp_path / 'moved')}")
    evaluated(capsys, tmp_path / "w.pt", f"--export={tmp_path / 'again.pt'}")
    assert "on 20 images" in evaluated(capsys, tmp_path / "again.pt", f"--data-dir={images}")
    both = [runs[0.4] / "last.pt", runs[0.4] / "best.pt"]
    evaluated(capsys, *both, "--average", f"--export={tmp_path / 'mean.pt'}")
    assert "on 20 images" in evaluated(capsys, tmp_path / "mean.pt", f"--data-dir={images}")


def test_a_folder_that_is_no_longer_the_runs_own_is_scored_with_a_warning_that_it_may_have_been_trained_on(
    shares, tmp_path, capsys
):
    images, runs = shares
    moved = shutil.copytree(images, tmp_path / "moved")
    next(moved.glob("*/*.jpg")).unlink()
    evaluated(capsys, runs[0.2] / "last.pt", f"--export={tmp_path / 'w.pt'}")
    fewer = shutil.copytree(images, tmp_path / "fewer")
    shutil.rmtree(min(fewer.iterdir()))
    for path in (runs[0.2] / "last.pt", tmp_path / "w.pt"):
        for folder in (moved, fewer):
            warning, *rest = evaluated(capsys, path, f"--data-dir={folder}").splitlines()
            assert warning.startswith("WARNING: ") and "the accuracy is too high" in warning, rest


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
