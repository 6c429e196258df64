"""Fine-tuning's own training: what is frozen, the backbone's rate, and classes of unlike size."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import assert_same_run, fresh_state, run_here, tiny_run
from torch.utils.flop_counter import FlopCounterMode

import evaluate as evaluate_program
import train
from config import CONFIG
from engine.data.demo import make_demo_data
from engine.inference.freezing import PARTS, SHARES, work_of_a_step
from engine.inference.scoring import are_uneven, evaluate
from engine.preparation.finding import ImageFolder, Labelled
from engine.run import checkpoint_files
from engine.run.records import read_records
from engine.training.class_balance import class_weights, weights_in_words
from engine.training.loss import training_loss
from engine.training.optim import build_optimizer, build_schedule, peak_rates
from engine.training.plan import rates_stated
from model import build_model

SMALL = CONFIG | {"architecture": "resnet18", "batch_size": 8, "swa_start_epoch": 0, "zero_init_residual": False}
IMAGES = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % 5


def part_of(name):
    return name.split(".")[0] if name.startswith(("layer", "fc")) else "stem"


def trained(config, steps=2):
    """The state after a few steps, and the tensors as they were before them."""
    state = fresh_state(config)
    before = {key: tensor.clone() for key, tensor in state.model.state_dict().items()}
    state.ddp_model.train()
    for _ in range(steps):
        state.count_step(train.train_step(state, IMAGES, LABELS, config), config)
    return state, before


@pytest.mark.parametrize(
    ("freeze", "changes"),
    [
        ("stem", {"optimizer": "muon"}),
        ("layer3", {"optimizer": "sgdw", "learning_rate": 1.0, "sam_rho": 0.5, "sam_every_steps": 1}),
        ("layer4", {"optimizer": "muon"}),
    ],
)
def test_what_is_frozen_keeps_every_bit_and_the_rest_learns(freeze, changes):
    state, before = trained(
        SMALL | {"freeze": freeze, "weight_decay": 0.1, "ema_half_life_images": 8, "ema_every_images": 8} | changes
    )
    frozen = PARTS[: PARTS.index(freeze) + 1]
    for model in (state.model, state.ema_model.module):
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[key]) == (part_of(key) in frozen), key
    assert len(state.optimizer.state) == len([p for p in state.model.parameters() if p.requires_grad])


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_nothing_is_kept_for_the_backward_pass_of_what_is_frozen(memory):
    def kept(freeze):
        config = SMALL | {"freeze": freeze, "memory": memory}
        state, sizes = fresh_state(config), {}
        weights = {parameter.data_ptr() for parameter in state.model.parameters()}
        state.model.train()

        def note(tensor):
            if tensor.data_ptr() not in weights:
                sizes[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            F.cross_entropy(state.model(IMAGES), LABELS)
        return sum(sizes.values())

    assert kept("layer4") < 0.2 * kept("layer2") < 0.2 * kept("none")


@pytest.mark.slow
def test_recomputed_statistics_leave_frozen_norms_alone(image_tree, tmp_path):
    source = tmp_path / "first"
    changes = {"epochs": 2, "swa_start_epoch": 2, "swa_anneal_epochs": 0}
    assert run_here(tiny_run(image_tree, source, **changes)) == 0
    changes |= {"freeze": "layer2", "initial_weights": f"{source / 'last.pt'}:raw"}
    assert run_here(tiny_run(image_tree, tmp_path / "second", **changes)) == 0
    first, second = checkpoint_files.read(source / "last.pt")["model"], checkpoint_files.read(tmp_path / "second/last.pt")
    for key in ("bn1.running_var", "layer2.1.bn2.running_mean"):
        assert torch.equal(first[key], second["model"][key]) and torch.equal(
            first[key], second["averaged_model"][f"module.{key}"]
        )
    assert not torch.equal(first["layer3.0.bn1.running_var"], second["model"]["layer3.0.bn1.running_var"])


@pytest.mark.slow
def test_a_frozen_run_resumes_to_the_same_bits(image_tree, tmp_path):
    changes = {"freeze": "layer1", "backbone_rate_factor": 0.1, "class_weights": "balanced", "optimizer": "muon"}
    arguments = {
        name: tiny_run(image_tree, tmp_path / name, checkpoint_every_epochs=1, **changes) for name in ("whole", "parts")
    }
    assert run_here(arguments["whole"]) == 0
    (tmp_path / "parts").mkdir()
    for name in ("epoch_002.pt", "best.pt"):
        (tmp_path / "parts" / name).write_bytes((tmp_path / "whole" / name).read_bytes())
    lines = (tmp_path / "whole/metrics.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "parts/metrics.jsonl").write_text("".join(lines[:2]))
    assert run_here([*arguments["parts"], "--resume=auto"]) == 0
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_the_shares_of_work_are_those_of_the_networks_and_a_plan_counts_with_them():
    for architecture, shares in SHARES.items():
        with torch.device("meta"):
            network = getattr(torchvision.models, architecture)().eval()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                network(torch.empty(1, 3, 224, 224))
        of = {module: sum(counts.values()) for module, counts in counter.get_flop_counts().items()}
        parts = np.cumsum([of[f"ResNet.{part}"] for part in ("conv1", *PARTS[1:])]) / of["Global"]
        assert parts == pytest.approx(shares, abs=0.001)
    assert work_of_a_step(CONFIG) == 3
    frozen = CONFIG | {"freeze": "layer4"}
    assert work_of_a_step(frozen) == pytest.approx(1, abs=0.01)
    whole, part = rates_stated(300, CONFIG), rates_stated(300, frozen)
    assert part.training[224] == pytest.approx(900, rel=0.01) and part.validation == whole.validation


@pytest.mark.parametrize("optimizer", ["adamw", "sgd", "sgdw", "muon"])
@pytest.mark.parametrize("decay_norms", [False, True])
def test_the_backbones_rate_is_a_share_of_the_last_layers_all_along(optimizer, decay_norms):
    config = SMALL | {"optimizer": optimizer, "backbone_rate_factor": 0.1, "decay_norms_and_biases": decay_norms}
    model = build_model(config, 5)
    built = build_optimizer(model, config)
    schedule, last = build_schedule(built, config, 10), set(map(id, model.fc.parameters()))
    assert sorted(id(p) for group in built.param_groups for p in group["params"]) == sorted(map(id, model.parameters()))
    for step in (0, 57, 400):
        schedule.move_to(step)
        for group, peak in zip(built.param_groups, peak_rates(built, config), strict=True):
            of_last = {id(p) in last for p in group["params"]}
            assert len(of_last) == 1
            usual = config["adamw_learning_rate" if group.get("by_adamw") else "learning_rate"]
            assert peak == pytest.approx(usual * (1.0 if of_last == {True} else 0.1))
    alone = [group["lr"] / peak for group, peak in zip(built.param_groups, peak_rates(built, config), strict=True)]
    assert alone == pytest.approx([alone[0]] * len(alone))
    if optimizer != "muon":
        assert all(id(p) in last for p in built.param_groups[0]["params"])  # whose rate the records show


# Classes of unlike size ----------------------------------------------------------------------------------------------


def split_of(counts):
    labels = np.repeat(np.arange(len(counts)), counts).tolist()
    return ImageFolder(
        "nowhere", Labelled([f"c{n}" for n in range(len(counts))], [f"{n}.jpg" for n in range(sum(counts))], labels)
    )


@pytest.mark.parametrize("loss", ["cross_entropy", "bce"])
def test_with_balanced_weights_every_class_counts_the_same_in_the_loss(loss):
    images, config = split_of([12, 3, 0, 1]), CONFIG | {"class_weights": "balanced", "loss": loss, "label_smoothing": 0.1}
    weights = class_weights(config, images, "cpu")
    assert weights.tolist() == pytest.approx([16 / 36, 16 / 9, 0, 16 / 3])  # scikit-learn's 'balanced' of the three present
    assert "12 images of c0 counts 0.444" in weights_in_words(weights, images)
    logits, labels = torch.randn(16, 4), torch.from_numpy(images.labels)
    by_class = [training_loss(logits[labels == label], labels[labels == label], config) for label in (0, 1, 3)]
    assert training_loss(logits, labels, config, weights).item() == pytest.approx(torch.stack(by_class).mean().item(), rel=1e-5)
    halves = [training_loss(logits[part], labels[part], config, weights) / 2 for part in (slice(8), slice(8, 16))]
    assert sum(halves).item() == pytest.approx(training_loss(logits, labels, config, weights).item(), rel=1e-5)  # micro-batches
    mixed = training_loss(logits, F.one_hot(labels, 4).float(), config, weights)
    assert mixed.item() == pytest.approx(training_loss(logits, labels, config, weights).item(), rel=1e-5)
    assert class_weights(CONFIG, images, "cpu") is None


def test_each_classs_accuracy_and_their_mean_beside_the_plain_one():
    torch.manual_seed(0)
    labels = torch.tensor([0] * 6 + [1] * 2 + [3])
    logits = torch.eye(4)[torch.tensor([0, 0, 0, 1, 1, 0, 1, 0, 2])]
    model = torch.nn.Identity()
    batches = [(logits[:4], labels[:4]), (logits[4:], labels[4:])]
    scores = evaluate({"raw": model}, batches, 9, torch.autocast("cpu", enabled=False), by_class=True)["raw"]
    assert scores["class_top1"] == pytest.approx([100 * 4 / 6, 50, None, 0])
    assert scores["balanced_top1"] == pytest.approx((100 * 4 / 6 + 50 + 0) / 3)
    assert scores["top1"] == pytest.approx(100 * 5 / 9)


def test_records_tell_the_classes_apart_where_they_are_uneven(tmp_path, capsys):
    assert are_uneven(split_of([9, 4])) and not are_uneven(split_of([8, 4]))
    make_demo_data(tmp_path / "tree", train_images=60, val_images=20)
    for path in sorted((tmp_path / "tree/train/dots_disc").iterdir())[2:]:
        path.unlink()
    changes = {
        "epochs": 1,
        "warmup_epochs": 0,
        "swa_start_epoch": 0,
        "class_weights": "balanced",
        "tensorboard": False,
        "report": True,
    }
    assert run_here(tiny_run(tmp_path / "tree", tmp_path / "run", **changes)) == 0
    said = capsys.readouterr().out
    assert "of the 2 images of dots_disc 2.8" in said
    (record,) = read_records(tmp_path / "run/metrics.jsonl")
    assert len(record["val_class_top1"]) == 10
    assert record["val_balanced_top1"] == pytest.approx(np.mean(record["val_class_top1"]))
    assert math.isclose(record["val_balanced_top1"], record["val_top1"])  # two validation images of each class
    mean = f"{record['val_balanced_top1']:.2f} %"
    assert f" %, mean of the classes {mean}; lr " in said
    assert f"its mean of the classes' accuracies | {mean} |" in (tmp_path / "run/report.md").read_text()
    for split, told in (("val", False), ("train", True)):  # the training images are uneven
        flags = [str(tmp_path / "run/last.pt"), f"--split={split}", "--device=cpu"]
        assert evaluate_program.main(evaluate_program.parse_arguments(flags)) == 0
        assert bool(re.search(r"images of 10 classes, mean of the classes [\d.]+ %, ", capsys.readouterr().out)) is told
