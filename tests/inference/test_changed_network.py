"""A network that was changed in model.py: its files are good for it alone, and that is said."""

import pytest
import torch
import torchvision
from conftest import run_here, tiny_run
from test_evaluate import evaluated

import evaluate
import train
from engine.system.errors import CheckpointError, UserError

ONE_EPOCH = {"epochs": 1, "warmup_epochs": 0, "swa_start_epoch": 0}


@pytest.fixture
def changed(monkeypatch):
    """Return a function that lets train.py and evaluate.py build their network as before, but for one change."""

    def change(edit):
        for program in (train, evaluate):
            build = program.build_model
            monkeypatch.setattr(program, "build_model", lambda *arguments, build=build: edit(build(*arguments)))

    return change


def with_dropout(model):
    model.fc = torch.nn.Sequential(torch.nn.Dropout(0.2), model.fc)
    return model


def with_gelu(model):
    for module in model.modules():
        if hasattr(module, "relu"):
            module.relu = torch.nn.GELU()
    return model


def test_a_checkpoint_of_another_network_than_model_py_builds_is_refused_in_words(image_tree, tmp_path, changed):
    assert run_here(tiny_run(image_tree, tmp_path / "run", **ONE_EPOCH)) == 0
    changed(with_dropout)
    last = tmp_path / "run/last.pt"
    reason = r"than model.py builds; missing: fc.1.weight, fc.1.bias; unknown: fc.weight, fc.bias"
    with pytest.raises(CheckpointError, match=rf"{last}, raw weights holds weights of another network {reason}"):
        evaluated(last)
    with pytest.raises(CheckpointError, match=rf"the checkpoint holds weights of another network {reason}"):
        run_here([*tiny_run(image_tree, tmp_path / "run", **ONE_EPOCH | {"epochs": 2}), f"--resume={last}"])


def test_a_network_with_another_head_is_trained_scored_and_exported_with_a_warning(image_tree, tmp_path, changed, capsys):
    changed(with_dropout)
    assert run_here(tiny_run(image_tree, tmp_path / "run", **ONE_EPOCH)) == 0
    assert evaluated(tmp_path / "run/last.pt", "--export", tmp_path / "net.pt") == 0
    assert "WARNING: torchvision's resnet18 does not take them: model.py builds another network" in capsys.readouterr().out
    card = (tmp_path / "net.md").read_text()
    assert "build it so, or use the ONNX export: torchvision's resnet18 does not take them.**" in card
    assert evaluated(tmp_path / "run/last.pt") == 0
    assert "on 20 images of 10 classes" in capsys.readouterr().out
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")
    with pytest.raises(UserError, match="timm has no network with this last layer; export ONNX"):
        evaluated(tmp_path / "run/last.pt", "--export", f"{tmp_path}/hub/")


def test_an_export_that_torchvisions_network_reads_otherwise_says_so(tmp_path, whole_network, changed, capsys):
    torch.manual_seed(0)
    torch.save(torchvision.models.resnet18(num_classes=12).state_dict(), tmp_path / "w.pt")
    arguments = [tmp_path / "w.pt", "--architecture=resnet18", "--export", tmp_path / "net.pt"]
    changed(with_gelu)
    assert evaluated(*arguments) == 0
    assert "WARNING: with them torchvision's resnet18 gives other logits: model.py builds" in capsys.readouterr().out
    said = "the ONNX export: with them torchvision's resnet18 gives other logits.**"
    assert said in (tmp_path / "net.md").read_text()
    pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")
    assert evaluated(*arguments[:-1], f"{tmp_path}/hub/") == 0
    assert said in (tmp_path / "hub/README.md").read_text()
