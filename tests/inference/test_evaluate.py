"""What a run is for: scores, ensembles and classes of files; all of a real run's checkpoints."""

import contextlib
import csv
import math
import re

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
from engine.data.loader import build_normalise
from engine.data.splits import open_splits
from engine.inference.confusion import class_rows, count_confusions, pair_rows
from engine.inference.networks import load_networks
from engine.inference.scoring import evaluate as evaluate_networks
from engine.inference.scoring import log_mean_probabilities, scores_of_logits
from engine.inference.test_sets import subset_scores
from engine.run import checkpoint_files
from engine.run.records import read_records
from engine.system.errors import DataError, UserError

CPU = torch.device("cpu")


def two_runs(image_tree, folder):
    """Train the same network to the end with two seeds, with blurs the second time; return the folder, with a/ and b/."""
    changes = {"learning_rate": 0.003, "epochs": 4, "swa_start_epoch": 3}
    assert run_here(tiny_run(image_tree, folder / "a", **changes)) == 0
    assert run_here(tiny_run(image_tree, folder / "b", seed=1, blur_pool=True, **changes)) == 0
    return folder


@pytest.fixture(scope="module")
def runs(image_tree, tmp_path_factory):
    return two_runs(image_tree, tmp_path_factory.mktemp("runs"))


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
