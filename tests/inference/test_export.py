"""What evaluate.py writes: weights for other programs with their model card, and no file in the place of another."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import encoded, photo, run_here, tiny_run
from test_evaluate import evaluated, images_and_labels, network_of, two_runs

import evaluate
from engine.data.loader import IMAGENET_MEAN, IMAGENET_STD
from engine.run import checkpoint_files
from engine.system import errors
from engine.system.errors import UserError


@pytest.fixture(scope="module")
def runs(image_tree, tmp_path_factory):
    return two_runs(image_tree, tmp_path_factory.mktemp("runs"))


def test_the_place_of_an_output_is_made_or_refused_before_anything_is_scored(runs, image_tree, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder.pt").mkdir()
    picture = next((image_tree / "val").rglob("*.jpg"))
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "open_networks", lambda *arguments: pytest.fail("it began"))
        for flags, said in (
            (["--details", tmp_path / "file/x"], "--details .* could not be written"),
            (["--export", tmp_path / "file/x.pt"], "--export .* could not be written"),
            (["--export", tmp_path / "folder.pt"], "is a folder: name a file"),
            (["--export", tmp_path / "x.bin"], "must end in one of"),
            (["--classify", picture, "--contact-sheet", tmp_path / "file/x.png"], "--contact-sheet .* could not be written"),
        ):
            with pytest.raises(UserError, match=said):
                evaluated(runs / "a/last.pt", *flags)
    assert evaluated(runs / "a/last.pt", "--details", f"{tmp_path}/new/er/") == 0
    assert (tmp_path / "new/er/_classes.csv").exists()
    sheet = tmp_path / "newest/sheet.png"
    assert evaluated(runs / "a/last.pt", "--classify", picture, "--contact-sheet", sheet) == 0
    assert sheet.exists()


def accepted(*arguments):
    """Do what evaluate.py does before it opens a network."""
    evaluate.check_outputs(evaluate.parse_arguments([str(argument) for argument in arguments]))


def test_no_output_replaces_an_input_a_runs_file_or_one_of_the_users_and_its_own_it_does(runs, image_tree, tmp_path, capfd):
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")
    run, theirs = tmp_path / "run", tmp_path / "theirs"
    shutil.copytree(runs / "a", run)
    theirs.mkdir()
    (run / "report.md").write_text("# Training report: run\n")
    for name in ("README.md", "config.json", "net.md", "d.png", "d_classes.csv", "new.safetensors"):
        (theirs / name).write_text("{}")
    torch.save({"fc.weight": torch.zeros(3)}, theirs / "weights.pt")
    picture, names = theirs / "a.jpg", theirs / "names.txt"
    picture.write_bytes(encoded(photo(70, 90)))
    (theirs / "link.png").symlink_to(picture)
    os.mkfifo(theirs / "fifo.pt")
    names.write_text("a\nb\n")
    before = {path: path.read_bytes() for path in [*run.iterdir(), *theirs.iterdir()] if path.is_file()}
    best = run / "best.pt"
    for flags, said in (
        ([best, "--export", run / "last.pt"], "last.pt is there and was not written by this flag"),
        ([best, "--export", best], "best.pt is one of the inputs"),
        ([best, run / "last.pt", "--average", "--export", run / "last.pt"], "last.pt is one of the inputs"),
        ([best, "--export", f"{theirs}/"], "theirs/config.json is there"),
        ([best, "--export", theirs / "net.pt"], "net.md is there"),
        ([best, "--export", theirs / "weights.pt"], "weights.pt is there"),
        ([best, "--export", theirs / "new.safetensors"], "new.safetensors is there"),
        ([best, "--export", theirs / "fifo.pt"], "fifo.pt is no regular file"),
        ([best, "--export", run / "report.safetensors"], "report.md is there"),
        ([best, "--classify", picture, "--contact-sheet", picture], "a.jpg is one of the inputs"),
        ([best, "--classify", picture, "--contact-sheet", theirs / "link.png"], "link.png is one of the inputs"),
        ([best, "--classify", theirs, "--contact-sheet", picture], "a.jpg is there"),
        ([best, "--classify", picture, "--contact-sheet", run / "curves.png"], "curves.png is there"),
        ([best, "--classify", picture, "--classes", names, "--contact-sheet", names], "names.txt is one of the inputs"),
        ([best, "--details", theirs / "d"], "d_classes.csv is there"),
        ([best, "--details", run / "curves"], "curves.png is there"),
    ):
        assert errors.run_program("evaluate.py", evaluated, *flags) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert said in line
    assert before == {path: path.read_bytes() for path in before}
    (tmp_path / "empty.png").touch()
    for flags in (
        [best, "--export", tmp_path / "net.pt"],
        [best, "--export", tmp_path / "net.safetensors"],
        [best, "--export", f"{tmp_path}/hub/"],
        [best, "--classify", picture, "--contact-sheet", tmp_path / "empty.png"],
        [best, "--details", tmp_path / "d"],
        [best, "--details", f"{tmp_path}/d/", "--split=train"],
    ):
        assert evaluated(*flags) == 0
        accepted(*flags)
    assert sorted(path.name for path in (tmp_path / "d").iterdir()) == [
        *("_classes.csv", "_confusions.csv", "_confusions.png", "_gallery.json", "_images.csv")
    ]
    accepted(tmp_path / "net.pt", "--export", tmp_path / "other.pt")
    with pytest.raises(UserError, match="net.pt is one of the inputs"):
        accepted(tmp_path / "net.pt", "--export", tmp_path / "net.pt")


@pytest.mark.usefixtures("whole_network")
@pytest.mark.slow
def test_exported_weights_load_into_torchvisions_own_network(image_tree, tmp_path, capsys):
    runs = tmp_path / "runs"
    assert run_here(tiny_run(image_tree, runs / "a", epochs=2)) == 0
    safetensors = pytest.importorskip("safetensors.torch")
    load_file = safetensors.load_file
    images, _ = images_and_labels(image_tree)
    expected = network_of(runs / "a/last.pt", "averaged").model(images)
    for name, load in (("model.pt", lambda path: torch.load(path, weights_only=True)), ("model.safetensors", load_file)):
        assert evaluated(runs / "a/last.pt", "--weights=averaged", "--export", tmp_path / name) == 0
        theirs = torchvision.models.resnet18(num_classes=10).eval()
        theirs.load_state_dict(load(tmp_path / name))
        torch.testing.assert_close(theirs(images), expected, atol=1e-5, rtol=1e-5)
    with safetensors.safe_open(tmp_path / "model.safetensors", "pt") as file:
        facts = {key: json.loads(value) for key, value in file.metadata().items() if key != "format"}
    assert facts["classes"] == checkpoint_files.read(runs / "a/last.pt")["classes"]
    assert (facts["resolution"], facts["mean"], facts["std"]) == (32, list(IMAGENET_MEAN), list(IMAGENET_STD))


def test_an_exported_safetensors_file_is_scored_as_the_checkpoint_it_came_from(runs, image_tree, tmp_path, capsys):
    pytest.importorskip("safetensors")
    assert evaluated(runs / "b/last.pt", "--weights=raw") == 0
    expected = capsys.readouterr().out.split(": ", 1)[1].split(", loss")[0]
    assert evaluated(runs / "b/last.pt", "--weights=raw", "--export", tmp_path / "b.safetensors") == 0
    capsys.readouterr()
    assert evaluated(tmp_path / "b.safetensors", f"--data-dir={image_tree}") == 0  # it knows its blur, its size, its crop
    assert capsys.readouterr().out.split(": ", 1)[1].split(", loss")[0] == expected


@pytest.mark.slow
def test_onnxruntime_gives_the_networks_logits_for_any_batch(runs, image_tree, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    assert evaluated(runs / "b/last.pt", "--weights=raw", "--export", tmp_path / "b.onnx") == 0
    said = capsys.readouterr().out
    assert re.search(r"opset 18, images float32 \[batch, 3, 32, 32\] of any batch; .* at most [\d.e-]+ from PyTorch's", said)
    images, _ = images_and_labels(image_tree)
    expected = network_of(runs / "b/last.pt").model(images).detach().numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "b.onnx"), providers=["CPUExecutionProvider"])
    for count in (1, 2, 7, 20):
        (logits,) = session.run(["logits"], {"images": images[:count].numpy()})
        np.testing.assert_allclose(logits, expected[:count], atol=1e-4, rtol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["resolution"]) == 32
    accepted(runs / "b/last.pt", "--export", tmp_path / "b.onnx")
    (tmp_path / "b.onnx").write_bytes(b"another's")
    with pytest.raises(UserError, match="b.onnx is there and was not written by this flag"):
        accepted(runs / "b/last.pt", "--export", tmp_path / "b.onnx")


def test_the_model_card_says_how_the_weights_came_about_and_what_to_mind(runs, tmp_path, capsys):
    best = checkpoint_files.read(runs / "b/best.pt")["best"]
    assert evaluated(runs / "b/best.pt", "--export", tmp_path / "b.pt", "--price-per-hour=3600") == 0
    assert "mind the blur" in capsys.readouterr().out
    card = (tmp_path / "b.md").read_text()
    assert f"top-1 {best['top1']:.2f} %, 32 px centre crop (ratio 0.875), no test-time augmentation" in card
    for part in (
        "recipe `seed`",
        "| seed | 1 |",
        "| training data | 60 images |",
        "at 3600 per hour",
        "has BlurPool",
        "| hardware | CPU, ",
        "commit",
    ):
        assert part in card
    records = [json.loads(line) for line in (runs / "b/metrics.jsonl").read_text().splitlines()]
    seconds = sum(record["seconds"] for record in records if record["epoch"] <= best["epoch"])
    assert f"| cost of the training time | {seconds:.2f} at" in card
    assert evaluated(runs / "a/last.pt", "--export", tmp_path / "a.pt") == 0
    assert "blur" not in (tmp_path / "a.md").read_text().lower()


def test_an_unknown_form_and_flags_that_do_not_go_together_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match=r"must end in one of \.pt, \.safetensors, \.onnx"):
        evaluated(runs / "a/last.pt", "--export", tmp_path / "model.bin")
    for flags in (["--contact-sheet=x.png"], ["--average"], ["a.pt", "b.pt", "--export=m.pt"], ["--resolution=8"]):
        with pytest.raises(SystemExit) as ended:
            evaluate.parse_arguments(flags)
        assert ended.value.code == 2


def test_all_kinds_of_weights_at_once_are_for_scores_alone(capsys):
    for flags in (["--export=m.pt"], ["--classify", "a.jpg"], ["a.pt", "b.pt", "--average", "--export=m.pt"]):
        with pytest.raises(SystemExit):
            evaluate.parse_arguments(["--weights=all", *flags])
        assert "--weights all: belongs to scores, not to --classify or --export" in capsys.readouterr().err
