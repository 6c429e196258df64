"""Other people's test sets are scored by their authors' rules, as implementations of their own do it."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torchvision
from conftest import encoded, photo
from test_class_matching import WNIDS
from test_evaluate import evaluated, figures

from engine.data.images import validation_view
from engine.data.loader import IMAGENET_MEAN, IMAGENET_STD
from engine.inference.calibration import best_temperature, calibration
from engine.inference.test_sets import real_in_words, subset_scores
from engine.system.errors import DataError

PRESENT = [3, 400, 401, 999]  # of the 1000 classes
IMAGES = [3, 400, 400, 401, 999, 999, 999]  # class of each, in the order of the labels


@pytest.fixture(scope="module")
def test_set(tmp_path_factory):
    """(weights of 1000 outputs, file of their classes, a folder with images of four of them, their logits, float64)."""
    folder = tmp_path_factory.mktemp("sets")
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=1000).eval()
    network.fc.weight.data *= 10
    network.fc.bias.data[[3, 999, 10]] += torch.tensor([7.5, 8.0, 16.0])  # two of the classes present, and one that is not
    torch.save(network.state_dict(), folder / "w.pt")
    (folder / "wnids.txt").write_text("\n".join(WNIDS))
    views = []
    for n, label in enumerate(IMAGES):
        path = folder / "imagenet-a" / WNIDS[label] / f"ILSVRC2012_val_{n + 1:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(40, 48, seed=n)))
        views.append(validation_view(path.read_bytes(), 32, 0.875))
    pixels = (np.stack(views) / 255 - IMAGENET_MEAN) / IMAGENET_STD
    with torch.inference_mode():
        logits = network(torch.from_numpy(pixels).permute(0, 3, 1, 2).float()).double().numpy()
    return folder / "w.pt", folder / "wnids.txt", folder / "imagenet-a", logits


def flags_of(test_set):
    weights, classes, folder, _ = test_set
    return [weights, "--architecture=resnet18", "--resolution=32", f"--data-dir={folder}", f"--classes={classes}"]


@pytest.mark.usefixtures("whole_network")
def test_a_subset_by_wnids_is_scored_by_the_logits_of_its_classes_and_by_all(test_set, capsys):
    *_, logits = test_set
    assert evaluated(*flags_of(test_set)) == 0
    said = capsys.readouterr().out.splitlines()
    assert "holds images of 4 of the 1,000 classes" in said[0]
    assert "hendrycks/natural-adv-examples" in said[1]
    labels = np.array(IMAGES)
    among = logits[:, PRESENT]  # as their eval.py: net(data)[:, indices_in_1k]
    top1 = 100 * np.mean(among.argmax(1) == np.searchsorted(PRESENT, labels))
    loss = np.mean(np.log(np.exp(among).sum(1)) - logits[range(7), labels])
    ours = subset_scores(torch.from_numpy(logits), torch.from_numpy(labels), torch.tensor(PRESENT))
    assert (ours["top1"], ours["loss"]) == (pytest.approx(top1), pytest.approx(loss))
    assert "on 7 images of 4 classes" in said[2] and said[2].endswith("logits of the 4 classes present alone")
    assert (figures(said[2])[0], figures(said[2])[2]) == (pytest.approx(top1, abs=0.01), pytest.approx(loss, abs=0.1))
    assert said[3].endswith("all 1,000 logits")
    whole = 100 * np.mean(logits.argmax(1) == labels)
    assert figures(said[3])[0] == pytest.approx(whole, abs=0.01) and top1 > whole


@pytest.mark.usefixtures("whole_network")
def test_the_reassessed_labels_are_scored_as_their_authors_do(test_set, tmp_path, capsys):
    *_, logits = test_set
    predictions = logits.argmax(1).tolist()
    real_labels = [[predictions[0], 5], [], [7, 8], [predictions[3]], [predictions[4] + 1], [], [9], [1]]
    path = tmp_path / "real.json"
    path.write_text(json.dumps(real_labels))
    assert evaluated(*flags_of(test_set), f"--real-labels={path}") == 0
    said = capsys.readouterr().out.splitlines()[-1]
    is_correct = [pred in real_labels[i] for i, pred in enumerate(predictions) if real_labels[i]]  # their README
    classes = len({*sum(real_labels[:7], [])})
    accuracy = f"ReaL top-1 {100 * np.mean(is_correct):.2f} % on 5 images of {classes} classes, 2 without a label left out"
    assert accuracy in said
    deep = "[" * 100_000 + "]" * 100_000
    for contents, reason in (
        *(("{", "cannot be read"), (deep, "cannot be read: .* too deep"), ("{}", "no list with a list")),
        *(("[[1]]", "is none of the 1 of"), ("\ufeff[[1]]", "is none of the 1 of")),
    ):
        path.write_text(contents, "utf-8")
        with pytest.raises(DataError, match=reason):
            evaluated(*flags_of(test_set), f"--real-labels={path}")
    path.write_text(json.dumps([[1000]] * 8))
    with pytest.raises(DataError, match="1000 is the number of no class"):
        evaluated(*flags_of(test_set), f"--real-labels={path}")
    with pytest.raises(DataError, match="none of the images has a label"):
        real_in_words(torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool))


@pytest.mark.usefixtures("whole_network")
def test_v2s_numbered_folders_count_as_the_sorted_wnids(test_set, tmp_path, capsys):
    weights, classes, folder, logits = test_set
    for label in range(1000):
        (tmp_path / f"v2/{label}").mkdir(parents=True)
    for path in folder.glob("*/*"):
        (tmp_path / f"v2/{WNIDS.index(path.parent.name)}" / path.name).write_bytes(path.read_bytes())
    assert evaluated(weights, *flags_of(test_set)[1:3], f"--data-dir={tmp_path / 'v2'}", f"--classes={classes}") == 0
    said = capsys.readouterr().out
    assert "number n is the n-th wnid" in said
    whole = 100 * np.mean(logits.argmax(1) == np.array(IMAGES))
    assert figures(said.splitlines()[-1])[0] == pytest.approx(whole, abs=0.01)


# Calibration ---------------------------------------------------------------------------------------------------------


def some_logits():
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (500,), generator=generator)
    logits = torch.randn(500, 10, generator=generator) + 1.5 * torch.eye(10)[labels]
    return 3 * logits, labels  # far too confident


def test_the_calibration_error_is_that_of_its_definition():
    logits, labels = some_logits()
    of = calibration(logits, labels)
    probabilities = np.exp(logits.numpy().astype(float))
    probabilities /= probabilities.sum(1, keepdims=True)
    confidence, right = probabilities.max(1), probabilities.argmax(1) == labels.numpy()
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert of.error == pytest.approx(error) and error > 0.1
    assert int(of.counts.sum()) == 500


def test_the_temperature_is_the_one_of_the_smallest_loss():
    logits, labels = some_logits()
    scipy = pytest.importorskip("scipy.optimize")
    loss = lambda t: torch.nn.functional.cross_entropy(logits.double() / t, labels).item()  # noqa: E731
    expected = scipy.minimize_scalar(loss, bounds=(0.1, 20), method="bounded", options={"xatol": 1e-8}).x
    assert best_temperature(logits, labels) == pytest.approx(expected, rel=1e-4) and expected > 2
    without = torch.cat([logits, torch.full((500, 3), -math.inf)], dim=1)  # as of a subset
    assert best_temperature(without, labels) == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("whole_network")
def test_details_tell_calibration_and_temperature_and_draw_them(test_set, tmp_path, capsys):
    *_, logits = test_set
    assert evaluated(*flags_of(test_set), f"--details={tmp_path / 'd'}") == 0
    said = capsys.readouterr().out
    of = calibration(torch.from_numpy(logits[:, PRESENT]), torch.from_numpy(np.searchsorted(PRESENT, IMAGES)))
    error, temperature = re.search(
        r"calibration error ([\d.]+) % .*; temperature ([\d.]+) gives the smallest loss", said
    ).groups()
    assert float(error) == pytest.approx(100 * of.error, abs=1) and float(temperature) > 1
    if pytest.importorskip("matplotlib"):
        assert (tmp_path / "d_calibration.png").stat().st_size > 10_000
