"""Every form of weights that a run may begin with gives the same network; what does not fit is refused."""

import argparse
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import assert_same_run, run_here, tiny_run

import evaluate
from config import CONFIG
from engine.cli.command_line import parse_command_line
from engine.cli.keys import ConfigError
from engine.inference.weight_files import find_weights, load_weights
from engine.run import checkpoint_files
from engine.system.errors import CheckpointError, UserError
from engine.training.initial_weights import with_initial_weights
from model import build_model

SMALL = {"architecture": "resnet18"}
QUICK = {"epochs": 1, "swa_start_epoch": 0, "warmup_epochs": 0, "batch_size": 20}


@pytest.fixture(scope="module")
def pretrained(image_tree, tmp_path_factory):
    """The folder of a finished run with all three kinds of weights."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    assert run_here(tiny_run(image_tree, folder, ema_half_life_images=16, ema_every_images=8)) == 0
    return folder


@pytest.fixture(scope="module")
def resnet():
    return torchvision.models.resnet18(num_classes=7)


def saved(weights, path):
    torch.save(weights, path)
    return str(path)


def loaded(source, classes, **config):
    """The state dict of a network of our own that has begun with the source's weights, and what was said."""
    config = CONFIG | SMALL | config
    model = build_model(config, len(classes))
    return model.state_dict(), load_weights(model, find_weights(source, config["architecture"]), classes)


def assert_equal(ours, theirs, but=()):
    assert ours.keys() == theirs.keys()
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == list(but)


def test_other_programs_files_are_understood_however_they_nest_and_name_the_weights(resnet, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    plain, seven = resnet.state_dict(), [str(number) for number in range(7)]
    wrapped = {f"module._orig_mod.{key}": tensor for key, tensor in plain.items()}
    safetensors.save_file(plain, tmp_path / "w.safetensors")
    sources = [
        saved(plain, tmp_path / "torchvision.pth"),
        saved(
            {"state_dict": wrapped, "epoch": 3, "arch": "resnet18", "args": argparse.Namespace(lr=0.1)}, tmp_path / "timm.pth"
        ),
        saved({"model": {f"_orig_mod.{k}": v for k, v in plain.items()}, "optimizer": {"state": {}}}, tmp_path / "nested.pt"),
        str(tmp_path / "w.safetensors"),
    ]
    for source in sources:
        ours, said = loaded(source, seven)
        assert_equal(ours, plain)
        assert said == [f"initial weights: {source}"]
    old = {key: tensor for key, tensor in plain.items() if not key.endswith("num_batches_tracked")}
    assert_equal(loaded(saved(old, tmp_path / "old.pth"), seven)[0], plain)


def test_timms_own_network_and_file_are_understood(tmp_path):
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("resnet18", num_classes=7)
    images = torch.randn(2, 3, 64, 64)
    model = build_model(CONFIG | SMALL, 7)
    found = find_weights(saved({"state_dict": theirs.state_dict()}, tmp_path / "timm.pth.tar"), "resnet18")
    load_weights(model, found, [str(number) for number in range(7)])
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-4)


def test_the_last_layer_begins_anew_for_other_classes_and_that_is_said(resnet, tmp_path):
    source = saved(resnet.state_dict(), tmp_path / "w.pth")
    ours, said = loaded(source, ["cat", "dog"])
    assert said[1] == "the last layer begins anew (7 classes there, 2 here)"
    fresh = build_model(CONFIG | SMALL, 2).state_dict()
    assert_equal(ours, resnet.state_dict() | {key: fresh[key] for key in ("fc.weight", "fc.bias")})


@pytest.mark.parametrize("kind", ["raw", "averaged", "ema"])
def test_a_checkpoints_kinds_of_weights_can_be_chosen_and_other_classes_of_the_same_number_are_noticed(pretrained, kind):
    path, key = pretrained / "last.pt", {"raw": "model", "averaged": "averaged_model", "ema": "ema_model"}[kind]
    checkpoint = checkpoint_files.read(path)
    found = find_weights(f"{path}:{kind}", "resnet18")
    theirs = {name.removeprefix("module."): tensor for name, tensor in checkpoint[key].items() if name != "n_averaged"}
    assert found.network == {"architecture": "resnet18", "blur_pool": False, "blur_max_pool": False}
    model = evaluate.build_model(CONFIG | SMALL, 10)
    assert len(load_weights(model, found, checkpoint["classes"])) == 1
    assert_equal(model.state_dict(), theirs)
    others = [f"other {number}" for number in range(10)]
    assert load_weights(model, found, others)[1] == "the last layer begins anew (other classes there)"


def test_weights_of_another_network_are_refused_with_the_first_names_and_shapes(resnet, tmp_path):
    source = saved(resnet.state_dict(), tmp_path / "w.pth")
    with pytest.raises(CheckpointError) as error:
        loaded(source, ["cat"], architecture="resnet50")
    assert "layer1.0.conv1.weight [64, 64, 3, 3] in place of [64, 64, 1, 1]" in str(error.value)
    assert "missing: layer1.0.conv3.weight" in str(error.value)
    with pytest.raises(CheckpointError, match=r"unknown: layer1.2.conv1.weight, .* and \d+ more"):
        loaded(saved(torchvision.models.resnet34(num_classes=7).state_dict(), tmp_path / "34.pth"), ["cat"])
    with pytest.raises(CheckpointError, match="no weights of a ResNet with torchvision's keys: a, b"):
        loaded(saved({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "other.pt"), ["cat"])
    with pytest.raises(CheckpointError, match="its checksum is missing"):
        loaded(saved([1, 2], tmp_path / "list.pt"), ["cat"])
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        loaded(str(tmp_path / "nowhere.pt"), ["cat"])


def test_damaged_weights_and_those_of_a_run_that_diverged_are_refused(resnet, tmp_path):
    plain = resnet.state_dict()
    nowhere = {"fc.bias": torch.full((7,), float("nan")), "layer4.1.conv2.weight": plain["layer4.1.conv2.weight"] / 0}
    with pytest.raises(CheckpointError, match=r"nan.pt holds numbers that are not finite: .*fc.bias"):
        loaded(saved(plain | nowhere, tmp_path / "nan.pt"), ["cat"])
    flipped = Path(saved(plain, tmp_path / "flipped.pt"))
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1  # within a tensor: torch.load does not look at the archive's checksums
    flipped.write_bytes(content)
    with pytest.raises(CheckpointError, match="flipped.pt is damaged: the checksum of .*/data/"):
        loaded(str(flipped), ["cat"])
    torch.serialization.set_crc32_options(False)
    try:
        saved(plain, tmp_path / "without.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    loaded(str(tmp_path / "without.pt"), ["cat"])  # nothing can be known of these


def test_files_that_hold_something_else_are_called_what_they_are(resnet, tmp_path):
    torch.save(resnet, tmp_path / "network.pt")
    with pytest.raises(CheckpointError, match=r"network.pt holds pickled objects, .* state_dict"):
        loaded(str(tmp_path / "network.pt"), ["cat"])
    one = torch.ones(1)
    for odd in ({1: one}, {"fc.weight": torch.ones(())}, {"fc.weight": one[None], "fc.bias": "two"}, one):
        with pytest.raises(CheckpointError, match="odd.pt holds"):
            loaded(saved(odd, tmp_path / "odd.pt"), ["cat"])
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(resnet.state_dict(), tmp_path / "w.safetensors", {"blurs": "none of ours"})
    loaded(str(tmp_path / "w.safetensors"), ["cat"])


def command_of(*arguments):
    return parse_command_line([str(argument) for argument in arguments], ["resume PATH"])


def test_what_a_file_tells_of_its_network_rules_unless_a_flag_says_otherwise(image_tree, tmp_path):
    pytest.importorskip("safetensors")
    assert run_here(tiny_run(image_tree, tmp_path / "run", blur_pool=True, **QUICK)) == 0
    for name in ("w.pt", "w.safetensors"):
        export = [str(tmp_path / "run/last.pt"), "--export", str(tmp_path / name), "--device=cpu"]
        assert evaluate.main(evaluate.parse_arguments(export)) == 0
    for name in ("run/last.pt", "w.pt", "w.safetensors"):
        source = f"--initial-weights={tmp_path / name}"
        command, _, said = with_initial_weights(command_of(source, "--recipe=demo"))
        assert {key: command.config[key] for key in ("architecture", "blur_pool")} == {
            "architecture": "resnet18",
            "blur_pool": True,
        }
        assert any("blur_pool = True, as the initial weights have it" in line for line in said)
        command, _, said = with_initial_weights(command_of(source, "--blur-pool=false"))
        assert command.config["blur_pool"] is False
        assert any(line.startswith("WARNING: blur_pool = False") for line in said)
    assert load_weights(evaluate.build_model(CONFIG | SMALL, 10), find_weights(str(tmp_path / "w.pt"), "resnet18"), ["a"])


def test_what_a_file_cannot_tell_of_blurs_is_said(resnet, tmp_path):
    command = command_of(f"--initial-weights={saved(resnet.state_dict(), tmp_path / 'w.pth')}", "--architecture=resnet18")
    said = with_initial_weights(command)[2]
    assert "does not tell whether its network blurs" in said[0] and "blur_pool = False" in said[0]


def test_torchvisions_weights_come_through_its_own_api_and_without_a_network_one_line_says_so(resnet, tmp_path, monkeypatch):
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cached = tmp_path / "hub/checkpoints" / weights.url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    saved(resnet.state_dict(), cached)
    command = command_of("--initial-weights=torchvision:IMAGENET1K_V1", "--architecture=resnet18", "--blur-pool=true")
    _, found, said = with_initial_weights(command)
    assert_equal(found.weights, resnet.state_dict())
    assert said == ["WARNING: blur_pool = True, but torchvision's resnet18, IMAGENET1K_V1 are of a network with BlurPool False"]
    cached.unlink()
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # where nobody listens
    with pytest.raises(UserError, match=f"cannot be had .*refused.*: fetch {weights.url}") as error:
        find_weights("torchvision:IMAGENET1K_V1", "resnet18")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="of resnet18 there are IMAGENET1K_V1"):
        find_weights("torchvision:IMAGENET1K_V9", "resnet18")


def test_a_run_begins_with_them_and_a_resumed_one_with_its_checkpoint(pretrained, image_tree, tmp_path, capsys):
    source = tmp_path / "best.pt"
    source.write_bytes((pretrained / "best.pt").read_bytes())
    changes = QUICK | {"epochs": 2, "initial_weights": f"{source}:raw", "learning_rate": 1e-12, "weight_decay": 0.0}
    assert run_here(tiny_run(image_tree, tmp_path / "whole", **changes)) == 0
    assert "initial weights: " in capsys.readouterr().out
    began, theirs = (checkpoint_files.read(path)["model"] for path in (tmp_path / "whole/last.pt", source))
    parameters = [key for key in theirs if not key.endswith(("running_mean", "running_var", "num_batches_tracked"))]
    assert all(torch.allclose(began[key], theirs[key], atol=1e-6) for key in parameters)
    changes |= {"learning_rate": 0.001, "checkpoint_every_epochs": 1}
    assert run_here(tiny_run(image_tree, tmp_path / "reference", **changes)) == 0
    (tmp_path / "resumed").mkdir()
    (tmp_path / "resumed/epoch_001.pt").write_bytes((tmp_path / "reference/epoch_001.pt").read_bytes())
    (tmp_path / "resumed/metrics.jsonl").write_text((tmp_path / "reference/metrics.jsonl").read_text().splitlines()[0] + "\n")
    source.unlink()  # the checkpoint has all that is needed
    assert run_here([*tiny_run(image_tree, tmp_path / "resumed", **changes), "--resume=auto"]) == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "reference")


def test_pretrained_gets_a_hint_at_the_key():
    with pytest.raises(ConfigError, match="--pretrained: no such flag; weights to begin with: --initial-weights FILE"):
        command_of("--pretrained")
