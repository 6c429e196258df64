"""A run that an unreadable validation image has stopped goes on by what its message says."""

import shutil

import pytest
from conftest import encoded, photo, run_here, tiny_run

from engine.data.splits import open_splits
from engine.system.errors import DataError

QUICK = {"epochs": 1, "warmup_epochs": 0, "swa_start_epoch": 0}
ADVICE = "put another image of its class there, under its name"


def test_before_the_first_score_a_bad_validation_image_may_be_removed_and_later_replaced(image_tree, tmp_path, capsys):
    tree, resume = shutil.copytree(image_tree, tmp_path / "tree"), f"--resume={tmp_path / 'run'}"
    bad, other = sorted((tree / "val").glob("*/*"))[3:5]
    bad.write_bytes(b"no image")
    assert run_here(tiny_run(tree, tmp_path / "run", **QUICK)) == 1
    said = capsys.readouterr().out
    assert f"{bad.name} cannot be read" in said and ADVICE in said
    bad.unlink()
    assert run_here([resume]) == 0
    assert "note: 19 validation images now, 20 when the run began" in capsys.readouterr().out
    other.write_bytes(b"no image")
    assert run_here([resume, "--epochs=2"]) == 1
    other.unlink()
    with pytest.raises(DataError, match=f"18 validation images; .* scored on 19, .*{ADVICE}"):
        run_here([resume, "--epochs=2"])
    other.write_bytes(encoded(photo(40, 48)))
    assert run_here([resume, "--epochs=2"]) == 0


@pytest.mark.parametrize(("share", "may_go"), [(0.25, True), (0.2, False)])
def test_in_a_share_it_may_be_removed_where_no_image_trained_on_takes_its_place(share, may_go, image_tree, tmp_path, capsys):
    tree, resume = shutil.copytree(image_tree / "train", tmp_path / "tree"), f"--resume={tmp_path / 'run'}"
    bad = tree / open_splits(tree, val_share=share)["val"].name(0)
    bad.write_bytes(b"no image")
    assert run_here(tiny_run(tree, tmp_path / "run", val_share=share, **QUICK)) == 1
    bad.unlink()
    if may_go:
        assert run_here([resume]) == 0
        return
    with pytest.raises(DataError, match="saw 50 .* with val_share a removed image moves others between the splits"):
        run_here([resume])
    bad.write_bytes(encoded(photo(40, 48)))
    assert run_here([resume]) == 0
