"""A checkpoint of this program is never taken for plain weights, and what another program's checkpoint has besides is told."""

import os
import resource

import pytest
import torch
from conftest import run_here, tiny_run, within_seconds
from test_evaluate import evaluated, figures

import evaluate
from config import CONFIG
from engine.cli.command_line import parse_command_line
from engine.data.splits import open_splits
from engine.inference.export import export
from engine.inference.networks import load_networks
from engine.inference.weight_files import find_weights
from engine.run import checkpoint_files
from engine.system.errors import CheckpointError
from engine.training.initial_weights import with_initial_weights
from model import build_model


@pytest.fixture(scope="module")
def checkpoint(image_tree, tmp_path_factory):
    """last.pt of a run of one epoch, whose network blurs and has a running average."""
    folder = tmp_path_factory.mktemp("blurred") / "run"
    changes = {"epochs": 1, "warmup_epochs": 0, "swa_start_epoch": 0, "ema_half_life_images": 16, "ema_every_images": 8}
    assert run_here(tiny_run(image_tree, folder, blur_pool=True, val_resolution=64, **changes)) == 0
    return folder / "last.pt"


def test_the_running_average_in_another_programs_checkpoint_is_told_and_can_be_taken(image_tree, tmp_path, capsys):
    raw, average = (evaluate.build_model(CONFIG | {"architecture": "resnet18"}, 10).state_dict() for _ in range(2))
    average["fc.bias"] = torch.arange(10.0)
    torchvisions = {f"module.{key}": tensor for key, tensor in average.items()} | {"n_averaged": torch.tensor(7)}
    files = {name: tmp_path / name for name in ("torchvision.pth", "timm.pth.tar", "without.pth")}
    torch.save({"model": raw, "model_ema": torchvisions, "optimizer": {}, "epoch": 3}, files["torchvision.pth"])
    torch.save({"state_dict": raw, "state_dict_ema": average, "arch": "resnet18"}, files["timm.pth.tar"])
    torch.save({"model": raw}, files["without.pth"])
    (tmp_path / "classes.txt").write_text("\n".join(open_splits(image_tree)["val"].classes))
    flags = [f"--data-dir={image_tree}", f"--classes={tmp_path / 'classes.txt'}", "--architecture=resnet18", "--resolution=32"]
    torch.save(average, tmp_path / "average.pth")
    scores = {}
    for name, kind, noted in (
        ("torchvision.pth", "auto", True),
        ("torchvision.pth", "ema", False),
        ("without.pth", "ema", False),
        ("average.pth", "auto", False),
    ):
        assert evaluated(tmp_path / name, *flags, f"--weights={kind}") == 0
        said = capsys.readouterr()
        assert [line.startswith("note: ") and "--weights ema" in line for line in said.err.splitlines()] == [True] * noted
        scores[name, kind] = figures(said.out)
    assert scores["torchvision.pth", "ema"] == scores["average.pth", "auto"] != scores["torchvision.pth", "auto"]
    assert scores["without.pth", "ema"] == scores["torchvision.pth", "auto"]
    for name in ("torchvision.pth", "timm.pth.tar"):
        found = find_weights(f"{files[name]}:ema", "resnet18")
        assert found.weights.keys() == average.keys() and torch.equal(found.weights["fc.bias"], average["fc.bias"])
        assert found.name == f"{files[name]}, running average"
        assert ":ema" in find_weights(str(files[name]), "resnet18").remarks[0]
    with pytest.raises(CheckpointError, match=r"without.pth holds no running average \(model_ema or state_dict_ema\)"):
        find_weights(f"{files['without.pth']}:ema", "resnet18")


def saved_again(checkpoint, path, without=(), **changes):
    """Write a checkpoint with torch.save, as people do to share a smaller file; return its path."""
    contents = torch.load(checkpoint, weights_only=True) | changes
    torch.save({key: value for key, value in contents.items() if key not in without}, path)
    return path


def test_a_damaged_or_newer_checkpoint_is_not_read_as_weights_alone(checkpoint, tmp_path):
    files = {name: tmp_path / f"{name}.pt" for name in ("digit", "letter", "newer", "newer_again", "stripped")}
    content = bytearray(checkpoint.read_bytes())
    for name, last in (("digit", b"10"[content[-1] == ord("1")]), ("letter", ord("g"))):  # another checksum, or none any more
        files[name].write_bytes(content[:-1] + bytes([last]))
    newer = checkpoint_files.read(checkpoint) | {"version": checkpoint_files.VERSION + 1}
    checkpoint_files.write(files["newer"], newer)
    torch.save(newer, files["newer_again"])
    saved_again(checkpoint, files["stripped"], without=("config", "best", "optimizer"))
    for name, said in (
        ("digit", "digit.pt is damaged: its checksum does not match"),
        ("letter", "letter.pt is damaged or cut short"),
        ("newer", "newer.pt was written by a newer version of this program .*: update the program"),
        ("newer_again", "newer_again.pt was written by a newer version"),
        ("stripped", "stripped.pt is a checkpoint .* without its config, best: .* --export"),
    ):
        with pytest.raises(CheckpointError, match=said):
            load_networks(files[name], "auto", CONFIG, build_model)
        with pytest.raises(CheckpointError, match=said):
            find_weights(str(files[name]), "resnet18")


def test_a_checkpoint_saved_again_without_its_optimizer_is_read_as_its_run_says_with_a_warning(checkpoint, tmp_path, capsys):
    stripped = saved_again(checkpoint, tmp_path / "stripped.pt", without=["optimizer"])
    for flags in ([], ["--weights=ema"]):
        assert evaluated(checkpoint, *flags) == evaluated(stripped, *flags) == 0
        said = capsys.readouterr()
        (warning,) = said.err.splitlines()
        assert warning.startswith(f"WARNING: {stripped} ") and "saved again" in warning
        lines = said.out.splitlines()
        whole, ours = lines[: len(lines) // 2], lines[len(lines) // 2 :]
        assert [figures(line) for line in ours] == [figures(line) for line in whole]
        assert all("64 px" in line for line in ours)
    found = find_weights(f"{stripped}:ema", "resnet18")
    assert found.network == {"architecture": "resnet18", "blur_pool": True, "blur_max_pool": False}
    command = parse_command_line([f"--initial-weights={stripped}"], ["resume PATH"])
    command, _, lines = with_initial_weights(command)
    assert command.config["blur_pool"] is True and lines[0] == warning
    content, weights = bytearray(stripped.read_bytes()), torch.load(stripped, weights_only=True)["model"]["fc.weight"]
    content[content.index(weights.numpy().tobytes()) + 2] ^= 1
    stripped.write_bytes(content)
    with pytest.raises(CheckpointError, match="stripped.pt is damaged: the checksum of .*/data/"):
        find_weights(str(stripped), "resnet18")


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_an_export_that_the_disk_has_no_room_for_fails_as_any_file_does_and_leaves_nothing(suffix, tmp_path):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors", reason="safetensors is not installed: pip install safetensors")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            export(torch.nn.Linear(100, 100), str(tmp_path / f"model{suffix}"), {"blurs": []})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["pt", "safetensors", pytest.param("onnx", marks=pytest.mark.slow)])
def test_an_export_in_a_folder_whose_name_is_no_utf_8_is_written_and_known_again(suffix, checkpoint, tmp_path):
    if suffix != "pt":
        pytest.importorskip({"onnx": "onnxruntime"}.get(suffix, suffix))
    path = tmp_path / os.fsdecode(b"caf\xe9") / f"model.{suffix}"
    for _ in range(2):  # the second takes the place of the first
        assert evaluate.main(evaluate.parse_arguments([str(checkpoint), "--device=cpu", f"--export={path}"])) == 0
    if suffix != "onnx":
        assert find_weights(str(path), "resnet18").classes


@pytest.mark.parametrize("name", ["pipe.pt", "pipe.safetensors"])
def test_a_pipe_in_place_of_weights_is_refused_and_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(CheckpointError, match=f"{name} is no regular file"), within_seconds(20):
        find_weights(str(tmp_path / name), "resnet18")


def test_a_folder_or_a_file_of_something_else_is_called_what_it_is(checkpoint, tmp_path):
    (tmp_path / "cat.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(100))
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n')
    for read in (lambda path: find_weights(str(path), "resnet18"), lambda path: evaluated(path)):
        with pytest.raises(CheckpointError, match=r"run is a folder; found .*last.pt.* there: name a file in it$"):
            read(checkpoint.parent)
        for name in ("cat.jpg", "metrics.jsonl"):
            with pytest.raises(CheckpointError, match=f"{name} holds no weights: torch.save has not written it") as error:
                read(tmp_path / name)
            assert "weights_only" not in str(error.value)
