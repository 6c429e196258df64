"""What a run is for: scores, ensembles, classes of files, weights for other programs; all of a real run's checkpoints."""

import contextlib
import csv
import json
import math
import os
import re
import shutil

import numpy as np
import pytest
import torch
import torchvision
from conftest import encoded, photo, run_here, run_program, tiny_run
from PIL import Image

import evaluate
from config import CONFIG
from engine.data.batches import validation_requests
from engine.data.demo import CLASSES, make_demo_data
from engine.data.images import validation_view
from engine.data.loader import IMAGENET_MEAN, IMAGENET_STD, build_normalise
from engine.data.splits import open_splits
from engine.inference.confusion import class_rows, count_confusions, pair_rows
from engine.inference.networks import load_networks
from engine.inference.scoring import evaluate as evaluate_networks
from engine.inference.scoring import log_mean_probabilities, scores_of_logits
from engine.inference.test_sets import subset_scores
from engine.run import checkpoint_files
from engine.run.records import read_records
from engine.system import errors
from engine.system.errors import DataError, UserError

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def runs(image_tree, tmp_path_factory):
    """Two finished runs of the same network with different seeds, one with blurs."""
    folder = tmp_path_factory.mktemp("runs")
    changes = {"learning_rate": 0.003, "epochs": 4, "swa_start_epoch": 3}
    assert run_here(tiny_run(image_tree, folder / "a", **changes)) == 0
    assert run_here(tiny_run(image_tree, folder / "b", seed=1, blur_pool=True, **changes)) == 0
    return folder


def evaluated(*arguments):
    """Run evaluate.py in this process; return its exit status."""
    return evaluate.main(evaluate.parse_arguments([str(argument) for argument in (*arguments, "--device=cpu")]))


def images_and_labels(image_tree, resolution=32):
    """Return the validation images as the network sees them, and their labels, made one by one."""
    split = open_splits(image_tree)["val"]
    views = [validation_view(split.read(index), resolution, CONFIG["val_crop_ratio"]) for index in range(len(split))]
    normalise = build_normalise(CPU, torch.float32)
    return normalise(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)), torch.from_numpy(split.labels)


def network_of(path, kind="raw"):
    (network,) = load_networks(path, kind, CONFIG, lambda config, classes: evaluate.build_model(config, classes).eval())
    return network


def figures(line):
    found = re.search(r"top-1 ([\d.]+) %(?:, top-5 ([\d.]+) %)?, loss ([\d.]+)", line)
    return [float(number) for number in found.groups("nan")]


# Scores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 10, 1000])
def test_a_network_whose_outputs_are_nan_hits_no_image(classes):
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, classes))
    torch.nn.init.constant_(network[1].bias, math.nan)
    images, labels = torch.ones(10, 3, 4, 4), torch.tensor([0] * 6 + [1, 1, 2, 2])
    scores = evaluate_networks({"raw": network}, [(images, labels)], 10, contextlib.nullcontext(), by_class=True)["raw"]
    assert (scores["top1"], scores.get("top5", 0), scores["balanced_top1"]) == (0, 0, 0) and math.isnan(scores["loss"])
    again = scores_of_logits(network(images), labels)
    assert (again["top1"], again.get("top5", 0)) == (0, 0)


def test_of_five_classes_and_fewer_there_is_no_top5(tmp_path, capsys):
    make_demo_data(tmp_path / "tree", 12, 8, classes=CLASSES[:4])
    assert run_here(tiny_run(tmp_path / "tree", tmp_path / "run", epochs=1, swa_start_epoch=0, val_flip=True)) == 0
    assert evaluated(tmp_path / "run/last.pt", "--flip") == 0
    output = capsys.readouterr().out
    assert output.count(": top-1") == 2 and "top-5" not in output
    assert not [key for record in read_records(tmp_path / "run/metrics.jsonl") for key in record if "top5" in key]
    few = subset_scores(torch.eye(10), torch.arange(2).repeat(5), torch.arange(5))
    assert "top5" not in few and "top5" in subset_scores(torch.eye(10), torch.arange(10), torch.arange(6))


def test_an_ensemble_scores_the_mean_of_the_probabilities_and_each_member_is_beside_it(runs, image_tree, capsys):
    members = [runs / "a/last.pt", runs / "b/last.pt"]
    assert evaluated(*members, "--weights=raw") == 0
    *lines, ensemble = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == [str(path) for path in members]
    assert ensemble.startswith("ensemble of 2: ")
    images, labels = images_and_labels(image_tree)
    with torch.inference_mode():
        probabilities = [network_of(path).model(images).softmax(1) for path in members]
    for line, shares in zip([*lines, ensemble], [*probabilities, sum(probabilities) / 2], strict=True):
        top1, _, loss = figures(line)
        assert top1 == pytest.approx(100 * (shares.argmax(1) == labels).float().mean().item(), abs=0.01)
        assert loss == pytest.approx(torch.nn.functional.nll_loss(shares.log(), labels).item(), abs=2e-4)
        assert "on 20 images of 10 classes, 32 px centre crop (ratio 0.875), no test-time augmentation" in line


def test_an_ensembles_loss_is_finite_where_every_probability_underflows():
    logits = [torch.tensor([[0.0, 300.0]]), torch.tensor([[0.0, 400.0]])]
    assert torch.softmax(logits[0], 1)[0, 0] == 0
    expected = torch.tensor([[-300 - math.log(2), 0.0]])
    torch.testing.assert_close(log_mean_probabilities(logits), expected)


def test_several_resolutions_and_flip_are_stated_with_each_figure(runs, image_tree, capsys):
    assert evaluated(runs / "a/last.pt", "--weights=raw", "--resolution", 32, 64, "--flip") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [
        re.search(r"(\d+) px centre crop .*, (no test-time augmentation|image and mirror image)", x).groups() for x in lines
    ] == [
        ("32", "no test-time augmentation"),
        ("32", "image and mirror image"),
        ("64", "no test-time augmentation"),
        ("64", "image and mirror image"),
    ]
    images, labels = images_and_labels(image_tree, 64)
    with torch.inference_mode():
        model = network_of(runs / "a/last.pt").model
        logits = (model(images) + model(images.flip(3))) / 2
    assert figures(lines[3])[2] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), abs=2e-4)


@pytest.mark.parametrize("others", ["none", "layer4"])
def test_in_a_mean_only_norms_that_all_networks_froze_keep_their_statistics(others, runs, tmp_path):
    states = []
    for name, freeze in (("last.pt", "layer4"), ("best.pt", others)):
        checkpoint = checkpoint_files.read(runs / "a" / name)
        checkpoint["config"]["freeze"] = freeze
        checkpoint_files.write(tmp_path / name, checkpoint)
        states.append(checkpoint["model"])
    files = [tmp_path / "last.pt", tmp_path / "best.pt"]
    assert evaluated(*files, "--average", "--weights=raw", "--export", tmp_path / "mean.pt") == 0
    mean = torch.load(tmp_path / "mean.pt", weights_only=True)
    copied = (states[0]["bn1.running_var"] + states[1]["bn1.running_var"]) / 2
    assert torch.allclose(mean["bn1.running_var"], copied) == (others == "layer4")


def test_the_mean_of_checkpoints_weights_gets_batch_norm_statistics_of_its_own(runs, image_tree, capsys, tmp_path):
    both = [runs / "a/last.pt", runs / "a/best.pt"]
    assert evaluated(*both, "--average", "--weights=raw", "--export", tmp_path / "mean.pt") == 0
    card = (tmp_path / "mean.md").read_text()
    assert f"| weights | mean of the weights of {both[0]}, raw weights and {both[1]}, raw weights |" in card
    epochs = [checkpoint_files.read(path)["epoch"] for path in both]
    assert f"| epochs | {', '.join(dict.fromkeys(map(str, epochs)))} |" in card
    assert "| seed | 0 |" in card
    mean = torch.load(tmp_path / "mean.pt", weights_only=True)
    states = [checkpoint_files.read(path)["model"] for path in both]
    torch.testing.assert_close(mean["conv1.weight"], (states[0]["conv1.weight"] + states[1]["conv1.weight"]) / 2)
    copied = (states[0]["bn1.running_var"] + states[1]["bn1.running_var"]) / 2
    assert not torch.allclose(mean["bn1.running_var"], copied)
    capsys.readouterr()
    assert evaluated(*both, "--average", "--weights=raw") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("mean of the weights of ")


@pytest.mark.slow
def test_torchvisions_own_weights_are_scored_from_pt_and_safetensors(image_tree, tmp_path, capsys):
    torch.manual_seed(0)
    network = torchvision.models.resnet50(num_classes=10).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(network.state_dict(), tmp_path / "weights.safetensors")
    images, labels = images_and_labels(image_tree, 64)
    with torch.inference_mode():
        expected = torch.nn.functional.cross_entropy(network(images), labels).item()
    (tmp_path / "classes.txt").write_text("\n".join(open_splits(image_tree)["val"].classes))
    flags = [f"--data-dir={image_tree}", f"--classes={tmp_path / 'classes.txt'}", "--resolution=64", "--flip"]
    for name in ("weights.pt", "weights.safetensors"):
        assert evaluated(tmp_path / name, *flags) == 0
        assert figures(capsys.readouterr().out.splitlines()[0])[2] == pytest.approx(expected, abs=0.05)  # bf16 where there is


@pytest.mark.usefixtures("whole_network")
def test_weights_that_do_not_fit_are_refused_with_a_word(image_tree, tmp_path):
    torch.save({"something": torch.zeros(3)}, tmp_path / "odd.pt")
    torch.save(torchvision.models.resnet18(num_classes=7).state_dict(), tmp_path / "seven.pt")
    for name, flags, message in (
        ("odd.pt", [], "odd.pt"),
        ("seven.pt", [], "--architecture names another"),
        ("seven.pt", ["--architecture=resnet18"], "tells 7 classes apart"),
    ):
        arguments = [tmp_path / name, f"--data-dir={image_tree}", "--device=cpu", *flags]
        with pytest.raises(ValueError, match=message):
            evaluate.main(evaluate.parse_arguments([str(argument) for argument in arguments]))


def test_confusions_count_every_image_once_and_the_worst_come_first():
    labels = torch.tensor([0, 0, 0, 1, 1, 2])
    taken = torch.tensor([0, 1, 1, 1, 0, 2])
    confusions = count_confusions(torch.nn.functional.one_hot(taken, 3).float(), labels)
    assert confusions.tolist() == [[1, 2, 0], [1, 1, 0], [0, 0, 1]]
    classes, names = ["n1", "n2", "n3"], {"n1": "tench"}
    of_classes = class_rows(confusions.numpy(), classes, names)
    assert [(row["class"], row["top1"], row["most_taken_for"]) for row in of_classes] == [
        ("n1", 33.33, "n2"),
        ("n2", 50.0, "n1"),
        ("n3", 100.0, ""),
    ]
    assert of_classes[0]["name"] == "tench"
    of_pairs = pair_rows(confusions.numpy(), classes, names)
    assert [(row["class"], row["taken_for"], row["times"]) for row in of_pairs] == [("n1", "n2", 2), ("n2", "n1", 1)]


def test_details_are_written_as_csv_and_picture_and_add_up_to_the_accuracy(runs, tmp_path, capsys):
    assert evaluated(runs / "a/last.pt", "--weights=raw", "--details", tmp_path / "details") == 0
    line = capsys.readouterr().out.splitlines()[0]
    with open(tmp_path / "details_classes.csv") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 10
    assert sum(int(row["images"]) for row in rows) == 20
    assert 100 * sum(int(row["correct"]) for row in rows) / 20 == figures(line)[0]
    with open(tmp_path / "details_confusions.csv") as file:
        wrong = sum(int(row["times"]) for row in csv.DictReader(file))
    assert wrong == 20 - sum(int(row["correct"]) for row in rows)
    with Image.open(tmp_path / "details.png") as picture:
        assert picture.width > 1000


def changed(path, target, **config):
    """A copy of a checkpoint whose run had another configuration; return its path."""
    contents = checkpoint_files.read(path)
    checkpoint_files.write(target, contents | {"config": contents["config"] | config})
    return target


def test_each_checkpoint_is_scored_as_its_own_run_did_and_votes_only_with_its_like(runs, tmp_path, capsys):
    ours = runs / "a/last.pt"
    other = changed(runs / "b/last.pt", tmp_path / "other.pt", val_resolution=64, val_crop_ratio=1.0)
    assert evaluated(ours, "--weights=raw") == evaluated(other, "--weights=raw") == 0
    alone = capsys.readouterr().out.splitlines()
    assert "64 px centre crop (ratio 1)" in alone[1]
    assert evaluated(ours, other, "--weights=raw") == 0
    said, *lines = capsys.readouterr().out.splitlines()
    assert said.startswith(f"no ensemble: each was validated in its own way ({ours}: 32 px, crop ratio 0.875; {other}: 64 px")
    assert "--resolution, --crop-ratio and --flip name one for all" in said
    assert lines == alone
    assert evaluated(ours, other, "--weights=raw", "--resolution=64", "--crop-ratio=1") == 0
    _, second, ensemble = capsys.readouterr().out.splitlines()
    assert second == alone[1]
    assert ensemble.startswith("ensemble of 2: ")
    for flags in (["--average"], ["--details", tmp_path / "x"]):
        with pytest.raises(UserError, match="in its own way"):
            evaluated(ours, other, "--weights=raw", *flags)


def test_the_mean_of_different_networks_is_refused_in_words(runs, tmp_path):
    contents = checkpoint_files.read(runs / "a/last.pt")
    larger = contents["config"] | {"architecture": "resnet34"}
    checkpoint_files.write(
        tmp_path / "34.pt", contents | {"config": larger, "model": evaluate.build_model(larger, 10).state_dict()}
    )
    checkpoint_files.write(tmp_path / "named.pt", contents | {"classes": [f"other {name}" for name in contents["classes"]]})
    for other, said in (
        (tmp_path / "34.pt", r"architecture resnet18, .*34.pt resnet34"),
        (runs / "b/last.pt", r"BlurPool False, .*last.pt True"),
        (tmp_path / "named.pt", "trained on different classes"),
    ):
        with pytest.raises(UserError, match=rf"--average: .*{said}"):
            evaluated(runs / "a/last.pt", other, "--average", "--weights=raw", "--export", tmp_path / "mean.pt")


def test_a_run_of_gpus_is_scored_on_a_cpu(runs, tmp_path, capsys):
    path = changed(runs / "a/last.pt", tmp_path / "gpu.pt", device="cuda", sync_batch_norm=True)
    assert evaluated(path, runs / "a/last.pt", "--weights=raw") == 0
    theirs, ours, _ = capsys.readouterr().out.splitlines()
    assert theirs.split(": ")[1] == ours.split(": ")[1]
    path = changed(runs / "a/last.pt", tmp_path / "gpu.pt", precision="fp16")
    assert evaluated(path, "--weights=raw") == 0


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


def test_a_validation_batch_lost_on_the_way_is_noticed(runs, image_tree, tmp_path, monkeypatch, capsys):
    requests = validation_requests
    monkeypatch.setattr("engine.data.loader.validation_requests", lambda *arguments: list(requests(*arguments))[:-1])
    with pytest.raises(DataError, match="16 images evaluated, 20 expected"):
        evaluated(runs / "a/last.pt", "--weights=raw")
    assert run_here(tiny_run(image_tree, tmp_path / "run", epochs=1, swa_start_epoch=0)) == 1
    assert "stopped by 16 images evaluated, 20 expected" in capsys.readouterr().out
    assert checkpoint_files.read(tmp_path / "run/last.pt")["best"]["epoch"] == 0


# Classes of files ----------------------------------------------------------------------------------------------------


def test_files_and_folders_are_classified_and_a_bad_file_is_named_and_skipped(runs, image_tree, tmp_path):
    folder = tmp_path / "pictures/inside"
    folder.mkdir(parents=True)
    pixels = photo(70, 90)
    for name, kind, options in (("a.png", "PNG", {}), ("b.webp", "WEBP", {"lossless": True}), ("c.bmp", "BMP", {})):
        (folder / name).write_bytes(encoded(pixels, kind, **options))
    (folder / "d.gif").write_bytes(encoded(Image.fromarray(pixels).convert("P"), "GIF"))
    (folder / "notes.txt").write_text("no picture")
    single = next((image_tree / "val").rglob("*.jpg"))
    arguments = [runs / "a/last.pt", "--classify", single, tmp_path / "pictures", "--contact-sheet", tmp_path / "sheet.png"]
    status, output = run_program("evaluate.py", [*arguments, "--device=cpu"])
    assert status == 1
    assert f"skipped {folder / 'notes.txt'} (ValueError: no image of a known kind" in output
    lines = {line.split(": ")[0]: line.split(": ", 1)[1] for line in output.splitlines() if " % " in line}
    assert set(lines) == {str(single), *(str(folder / name) for name in ("a.png", "b.webp", "c.bmp", "d.gif"))}
    assert lines[str(folder / "a.png")] == lines[str(folder / "b.webp")] == lines[str(folder / "c.bmp")]  # the same pixels
    shares = [float(part.split(" % ")[0]) for part in lines[str(single)].split("; ")]
    assert len(shares) == 5
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) <= 100.3
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 500


def test_what_is_not_there_or_holds_nothing_is_said_in_words(runs, tmp_path, capsys):
    (tmp_path / "empty/inside").mkdir(parents=True)
    (tmp_path / "small.png").write_bytes(encoded(photo(40, 40), "PNG"))
    names = "nowhere.jpg", "empty", "small.png"
    assert evaluated(runs / "a/last.pt", "--weights=raw", "--classify", *(tmp_path / name for name in names)) == 1
    said = [f"evaluate.py: skipped {tmp_path / 'empty'} (no files in this folder)"]
    said += [f"evaluate.py: skipped {tmp_path / 'nowhere.jpg'} (No such file or directory)"]
    assert sorted(capsys.readouterr().err.splitlines()) == said


def test_classify_says_what_the_network_says(runs, image_tree, capsys):
    path = sorted((image_tree / "val").rglob("*.jpg"))[3]
    assert evaluated(runs / "a/last.pt", runs / "b/last.pt", "--weights=raw", "--classify", path) == 0
    best = capsys.readouterr().out.strip().split(": ", 1)[1].split("; ")[0]
    view = build_normalise(CPU, torch.float32)(
        torch.from_numpy(validation_view(path.read_bytes(), 32, 0.875))[None].permute(0, 3, 1, 2)
    )
    with torch.inference_mode():
        shares = sum(network_of(runs / f"{name}/last.pt").model(view).softmax(1) for name in "ab")[0] / 2
    classes = checkpoint_files.read(runs / "a/last.pt")["classes"]
    assert best == f"{100 * shares.max().item():.1f} % {classes[int(shares.argmax())]}"


def test_several_networks_classify_together_only_where_their_classes_are_known_to_be_the_same(
    runs, image_tree, tmp_path, capsys
):
    ours, picture = runs / "a/last.pt", next((image_tree / "val").rglob("*.jpg"))
    torch.save(checkpoint_files.read(runs / "a/last.pt")["model"], tmp_path / "unnamed.pt")
    more = evaluate.build_model(CONFIG | {"architecture": "resnet18"}, 12)
    torch.save(more.state_dict(), tmp_path / "more.pt")
    flags = ["--architecture=resnet18", "--resolution=32", "--weights=raw", "--classify", picture]
    for other in ("unnamed.pt", "more.pt"):
        for paths in ((ours, tmp_path / other), (tmp_path / other, ours)):
            with pytest.raises(UserError, match=rf"{other} does not name its classes.* --classes FILE"):
                evaluated(*paths, *flags)
    with pytest.raises(UserError, match="different classes"):
        evaluated(tmp_path / "unnamed.pt", tmp_path / "more.pt", *flags)
    (tmp_path / "classes.txt").write_text("\n".join(checkpoint_files.read(ours)["classes"]))
    assert evaluated(ours, *flags) == 0
    alone = capsys.readouterr().out
    assert evaluated(ours, tmp_path / "unnamed.pt", *flags, f"--classes={tmp_path / 'classes.txt'}") == 0
    assert capsys.readouterr().out == alone
    assert evaluated(tmp_path / "unnamed.pt", tmp_path / "unnamed.pt", *flags) == 0


# Weights for other programs ------------------------------------------------------------------------------------------


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
