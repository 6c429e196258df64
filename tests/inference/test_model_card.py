"""The model card says of the exported weights what was measured of these, and nothing that was not."""

import shutil

import pytest
from conftest import run_here, tiny_run
from test_evaluate import evaluated, figures

from engine.inference.weight_files import chosen_kinds
from engine.run import checkpoint_files
from engine.run.records import read_records


@pytest.fixture(scope="module")
def run(image_tree, tmp_path_factory):
    """The folder of a finished run of three epochs that are all kept, with a running average."""
    folder = tmp_path_factory.mktemp("cards") / "run"
    changes = {"checkpoint_every_epochs": 1, "ema_half_life_images": 16, "ema_every_images": 8, "swa_start_epoch": 0}
    assert run_here(tiny_run(image_tree, folder, **changes)) == 0
    return folder


def row_of(path, name, *flags):
    """What the card of a checkpoint's export says in a row."""
    target = path.parent / "exported.pt"
    assert evaluated(path, "--export", target, *flags) == 0
    (row,) = [line for line in target.with_suffix(".md").read_text().splitlines() if line.startswith(f"| {name} |")]
    return row.split(" | ")[1].removesuffix(" |")


def test_the_card_has_the_accuracy_that_the_epoch_of_the_weights_had_best_or_not(run, capsys):
    best, seen = checkpoint_files.read(run / "last.pt")["best"], set()
    for record in read_records(run / "metrics.jsonl"):
        path = run / checkpoint_files.epoch_name(record["epoch"])
        for kind, column in (("raw", "val_top1"), ("ema", "ema_val_top1")):
            accuracy = row_of(path, "validation accuracy", f"--weights={kind}")
            assert accuracy == f"top-1 {record[column]:.2f} %, 32 px centre crop (ratio 0.875), no test-time augmentation"
            seen.add((record["epoch"], kind))
    assert len(seen - {(best["epoch"], best["weights"])}) == 5  # which best.pt does not tell
    capsys.readouterr()
    assert evaluated(run / "last.pt", "--weights=ema") == 0
    scored = f"top-1 {figures(capsys.readouterr().out)[0]:.2f} %"
    assert scored in row_of(run / "last.pt", "validation accuracy", "--weights=ema")


def test_weights_that_were_trained_on_since_or_whose_records_are_anothers_have_no_accuracy(run, tmp_path):
    best = checkpoint_files.read(run / "best.pt")
    later = best | {"batch": 3, "model": {k: v + 0 if k != "fc.bias" else v + 1 for k, v in best["model"].items()}}
    stopped = shutil.copytree(run, tmp_path / "stopped") / "last.pt"
    checkpoint_files.write(stopped, later)  # as a stop within the next epoch leaves it
    for kind in ("raw", "ema"):
        assert row_of(stopped, "validation accuracy", f"--weights={kind}") == "not measured"
    epochs = best["epoch"]
    assert row_of(stopped, "epochs") == f"{epochs} epoch{'s' * (epochs != 1)} and 3 batches"
    assert chosen_kinds(later | {"best": best["best"] | {"weights": "raw"}}, "auto", "last.pt") == ["ema"]
    assert chosen_kinds(best | {"best": best["best"] | {"weights": "raw"}}, "auto", "best.pt") == ["raw"]
    alone = tmp_path / "epoch_001.pt"
    checkpoint_files.write(alone, best | {"best": {"top1": 12.5, "epoch": 1, "weights": "raw"}, "epoch": 2})
    assert row_of(alone, "validation accuracy", "--weights=raw") == "not measured"
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 2, "val_top1": 99.0, "best_top1": 99.0, "seconds": 1.0}\n')
    assert row_of(alone, "validation accuracy", "--weights=raw") == "not measured"  # another run's records


def test_the_card_says_in_which_order_the_outputs_are(run, tmp_path):
    classes = checkpoint_files.read(run / "last.pt")["classes"]
    assert row_of(run / "last.pt", "output") == "logits, one a class, in the order of the classes' sorted names"
    for names, order in (
        (classes[::-1], "of the classes below, as the file names them"),
        ([str(number) for number in range(10)], "of the classes' numbers"),
    ):
        (tmp_path / "classes.txt").write_text("\n".join(names))
        said = row_of(run / "last.pt", "output", f"--classes={tmp_path / 'classes.txt'}")
        assert said == f"logits, one a class, in the order {order}"


def test_a_class_that_looks_like_a_tag_is_shown_in_the_card(run, tmp_path):
    (tmp_path / "classes.txt").write_text("\n".join(f"<b>{number}" for number in range(10)))
    assert evaluated(run / "last.pt", f"--classes={tmp_path / 'classes.txt'}", "--export", tmp_path / "net.pt") == 0
    assert "Classes: \\<b>0, \\<b>1, " in (tmp_path / "net.md").read_text()


def test_each_of_two_exports_of_one_stem_has_a_card_of_its_own(run, tmp_path):
    pytest.importorskip("safetensors")
    first, second = tmp_path / "model.pt", tmp_path / "model.safetensors"
    for _ in range(2):  # each replaces its own
        assert evaluated(run / "last.pt", "--weights=raw", "--export", first) == 0
        assert evaluated(run / "last.pt", "--weights=ema", "--export", second) == 0
        for card, path, weights in (("model.md", first, "raw weights"), ("model.safetensors.md", second, "running average")):
            text = (tmp_path / card).read_text()
            assert f"Weights in `{path.name}`" in text and f"| weights | {weights} |" in text
    assert len(list(tmp_path.iterdir())) == 4
