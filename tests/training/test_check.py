"""train.py --check tells what a run would fail for, before it begins, and a start says what is not as it should be."""

import math
import re
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
from conftest import narrow_build_model, run_here, tiny_run

import train
from config import CONFIG, RECIPES
from engine.cli.command_line import parse_command_line
from engine.cli.keys import ConfigError
from engine.system.disks import mount_of, why_it_goes_away, why_not_writable
from engine.training.check import AROUND_MIB, copies_of_weights, count_weights, needed_mib, quick_check

RESNET50_WEIGHTS = 25_557_032  # torchvision's


def checked(capsys, arguments):
    """Return (exit status, {what: (verdict, text)}) of --check."""
    status = run_here([*arguments, "--check"])
    rows = [line.split(None, 1) for line in capsys.readouterr().out.splitlines()]
    table = {}
    for verdict, rest in (row for row in rows if row[0] in ("ok", "note", "FAILS")):
        what, _, text = rest.partition("  ")
        table.setdefault(what, (verdict, text.strip()))
    return status, table


def test_a_run_that_can_begin_is_told_so_line_by_line(image_tree, tmp_path, capsys):
    status, table = checked(capsys, [*tiny_run(image_tree, tmp_path / "run"), "--images-per-s=0.001"])
    assert status == 0
    assert table["images"] == ("ok", "60 for training, 20 for validation, 10 classes, the same in both")
    assert table["train images"] == ("ok", "60 of 60 decoded") and table["val images"] == ("ok", "20 of 20 decoded")
    failing = {what for what, (verdict, _) in table.items() if verdict == "FAILS"}
    assert not failing and {"versions", "device", "GPU memory", "disk space", "cores", "open files", "/dev/shm"} <= set(table)
    assert "0 needed in the first epochs (calculated from 0.001 at 224 px)" in table["disk speed"][1]
    assert not (tmp_path / "run").exists()  # nothing is written


def test_classes_without_validation_images_are_not_called_the_same_in_both(image_tree, tmp_path, capsys):
    shutil.copytree(image_tree, tmp_path / "tree")
    shutil.rmtree(tmp_path / "tree/val/waves_ring")
    assert run_here([*tiny_run(tmp_path / "tree", tmp_path / "run"), "--check"]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^ok +images +60 for training, 18 for validation, 10 classes$", output, re.MULTILINE)
    assert "val has no images of 1 of the 10 classes: waves_ring" in output


def test_what_would_stop_a_run_is_named_and_ends_in_status_1(image_tree, tmp_path, capsys):
    tree = tmp_path / "tree"
    shutil.copytree(image_tree, tree)
    broken = next((tree / "val").glob("*/*.jpg"))
    broken.write_bytes(broken.read_bytes()[:100])
    next((tree / "train").glob("*/*.jpg")).write_bytes(b"nothing")
    (tmp_path / "file").write_text("in the way")
    arguments = tiny_run(tree, tmp_path / "file" / "run", images_per_s=1e9)
    status, table = checked(capsys, arguments)
    assert status == 1
    assert table["val images"][0] == "FAILS" and broken.name in table["val images"][1]
    assert table["train images"][0] == "note"  # another one takes its place
    assert table["checkpoint_dir"][0] == "FAILS" and "file is no folder" in table["checkpoint_dir"][1]
    assert table["disk speed"][0] == "note" and "the disk and decoding will hold the run up" in table["disk speed"][1]
    status, table = checked(capsys, tiny_run(tmp_path / "nowhere", tmp_path / "run"))
    assert status == 1 and "does not exist" in table["images"][1]
    status, table = checked(capsys, tiny_run(image_tree, tmp_path / "run", batch_size=61))
    assert status == 1 and "make no batch" in table["images"][1]


def test_a_metadata_service_that_does_not_answer_is_noted(image_tree, tmp_path, capsys, metadata_service):
    arguments = tiny_run(image_tree, tmp_path / "run", spot_notice="true")
    _, table = checked(capsys, [*arguments, f"--spot_notice_url=http://127.0.0.1:{metadata_service.server_port}"])
    assert table["spot notice"][0] == "ok"
    _, table = checked(capsys, [*arguments, "--spot_notice_url=http://127.0.0.1:1"])
    assert table["spot notice"][0] == "note" and "does not answer" in table["spot notice"][1]


def test_a_mirror_that_takes_nothing_is_found_and_one_that_takes_something_stays_empty(image_tree, tmp_path, capsys):
    pytest.importorskip("obstore")
    arguments = tiny_run(image_tree, tmp_path / "run")
    _, table = checked(capsys, [*arguments, f"--mirror={tmp_path / 'mirror'}"])
    assert table["mirror"][0] == "ok" and not (tmp_path / "mirror").exists()
    assert table["mirror's disk"][0] == "note"  # of no use when the machine goes away
    _, table = checked(capsys, [*arguments, f"--mirror={tmp_path / 'new/deeper/mirror'}"])
    assert table["mirror"][0] == "ok" and not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("no folder")
    status, table = checked(capsys, [*arguments, f"--mirror={tmp_path / 'file' / 'below'}"])
    assert status == 1 and table["mirror"][0] == "FAILS"


def test_another_run_in_the_folder_or_its_mirror_is_found_as_the_start_finds_it(image_tree, tmp_path, capsys):
    pytest.importorskip("obstore")
    arguments = tiny_run(image_tree, tmp_path / "run", epochs=1, swa_start_epoch=0, mirror=tmp_path / "mirror")
    assert run_here(arguments) == 0
    status, table = checked(capsys, arguments)
    assert status == 1 and table["checkpoint_dir"][0] == "FAILS" and "holds another run (last.pt" in table["checkpoint_dir"][1]
    assert table["mirror"][0] == "FAILS" and "holds another run. Go on with it" in table["mirror"][1]
    assert (tmp_path / "mirror").is_dir()
    status, table = checked(capsys, [*arguments, "--overwrite"])
    assert status == 0 and table["checkpoint_dir"][0] != "FAILS" and table["mirror"][0] == "ok"


def test_initial_weights_that_no_run_could_begin_with_are_found(image_tree, tmp_path, capsys):
    arguments = tiny_run(image_tree, tmp_path / "run")
    status, table = checked(capsys, [*arguments, "--initial-weights=nope.pt"])
    assert status == 1 and table["initial weights"][0] == "FAILS" and "nope.pt" in table["initial weights"][1]
    weights = train.build_model(parse_command_line(arguments, train.OWN_FLAGS).config, 7, "cpu").state_dict()
    train.torch.save(weights, tmp_path / "w.pt")
    weights["conv1.weight"] = weights["conv1.weight"][:, :, :3]
    train.torch.save(weights, tmp_path / "other.pt")
    for name, status, text in (
        ("other", 1, "FAILS  initial weights  .* of another shape: conv1.weight"),
        ("w", 0, r"ok     initial weights  .* begins anew \(7 classes there, 10 here\)"),
    ):
        assert run_here([*arguments, f"--initial-weights={tmp_path / name}.pt", "--check"]) == status
        assert re.search(text, capsys.readouterr().out)


def test_frozen_random_weights_are_noted_and_warned_of_at_the_start(image_tree, tmp_path, capsys):
    arguments = tiny_run(image_tree, tmp_path / "run", freeze="layer4", epochs=1, swa_start_epoch=0)
    status, table = checked(capsys, arguments)
    assert status == 0 and table["initial weights"][0] == "note" and "stay random" in table["initial weights"][1]
    assert run_here(arguments) == 0
    assert "WARNING: freeze = 'layer4' without initial_weights" in capsys.readouterr().out


def test_flags_that_the_start_refuses_together_are_refused_by_the_check(image_tree, tmp_path):
    with pytest.raises(ConfigError, match="--dollars without --price-per-hour"):
        run_here([*tiny_run(image_tree, tmp_path / "run"), "--check", "--dollars=3"])


def test_what_the_size_rule_makes_of_the_flags_is_checked_too(image_tree, tmp_path, capsys):
    arguments = [*tiny_run(image_tree, tmp_path / "run", epochs=5), "--size-rule=bit"]
    arguments = [argument for argument in arguments if not argument.startswith("--warmup_epochs")]
    status, table = checked(capsys, arguments)
    assert status == 0 and table["size_rule"][0] == "note" and "warmup_epochs = 1" in table["size_rule"][1]


def findings(**changes):
    config = CONFIG | changes
    device = train.torch.device("cpu")
    return {finding.what: finding for finding in quick_check(config, device, 10, narrow_build_model())}


def test_too_few_open_files_and_too_little_disk_are_found(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, hard))
    try:
        assert findings()["open files"].verdict == "FAILS"
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    free = shutil.disk_usage(tmp_path).free
    one = copies_of_weights(CONFIG) * 4 * count_weights(CONFIG, 10, train.build_model)
    folder = {"checkpoint_dir": str(tmp_path), "log_file": None}
    enough = max(1, int(free / one / 2) - 4)
    assert findings(**folder, epochs=enough, checkpoint_every_epochs=1)["disk space"].verdict == "ok"
    more = findings(**folder, epochs=math.ceil(free / one) + 1, checkpoint_every_epochs=1)["disk space"]
    assert more.verdict == "note" and "--keep-checkpoints 2" in more.text


def test_the_calculated_memory_is_that_of_the_stand_in_and_with_the_rest_of_the_seeds_run_on_a_t4():
    assert count_weights(CONFIG, 1000, train.build_model) == RESNET50_WEIGHTS
    seed = needed_mib(CONFIG, 256, "fp16", RESNET50_WEIGHTS)
    assert seed == pytest.approx(11_701, rel=0.02)  # NVML's figure there
    stand_in = {"fast": 10.96, "low": 6.07, "lowest": 4.63}  # GiB alive at the peak, AdamW and SWA: docs/speed.md
    for memory, gib in stand_in.items():
        calculated = needed_mib(CONFIG | {"memory": memory}, 256, "fp16", RESNET50_WEIGHTS) - AROUND_MIB
        assert calculated / 1024 == pytest.approx(gib, rel=0.02)
    fast = needed_mib(CONFIG | RECIPES["fast"], 256, "fp16", RESNET50_WEIGHTS) - AROUND_MIB
    assert fast / 1024 == pytest.approx(8.72, rel=0.03)  # with BlurPool at 192 px
    assert needed_mib(CONFIG | {"architecture": "resnet18"}, 256, "fp16", 1) is None


def made_root(folder, mounts, models):
    """A folder in place of /, with mounts and disks."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/mounts").write_text("".join(f"{' '.join(mount)} rw 0 0\n" for mount in mounts))
    for disk, model in models.items():
        (folder / f"sys/block/{disk}/device").mkdir(parents=True)
        (folder / f"sys/block/{disk}/device/model").write_text(model + "   \n")
    return folder


def test_an_instance_store_and_main_memory_are_told_from_a_disk_that_stays(tmp_path):
    data, own, ebs = (str(tmp_path / name) for name in ("in memory", "own", "ebs"))
    for folder in (data, own, ebs):
        Path(folder).mkdir()
    mounts = [("/dev/nvme0n1p1", "/", "ext4"), ("tmpfs", data.replace(" ", "\\040"), "tmpfs"), ("/dev/nvme1n1", own, "ext4")]
    models = {"nvme1n1": "Amazon EC2 NVMe Instance Storage", "nvme2n1": "Amazon Elastic Block Store"}
    root = made_root(tmp_path / "root", [*mounts, ("/dev/nvme2n1p1", ebs, "xfs")], models)
    assert mount_of(f"{own}/new/run", root).device == "/dev/nvme1n1"
    assert "instance store" in why_it_goes_away(f"{own}/new/run", root)
    assert "main memory (tmpfs)" in why_it_goes_away(data, root)
    assert why_it_goes_away(ebs, root) is None and why_it_goes_away("/", root) is None
    assert mount_of(own, tmp_path / "nothing") is None
    assert why_not_writable(f"{own}/new/run") is None
    (tmp_path / "astray").symlink_to(tmp_path / "nowhere")
    assert why_not_writable(tmp_path / "astray/run") == f"{tmp_path}/astray is a link that leads nowhere"


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs /dev/shm")
def test_a_start_says_that_its_checkpoints_lie_in_main_memory_and_nothing_of_what_is_in_order(image_tree, tmp_path, capsys):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        assert run_here(tiny_run(image_tree, Path(folder) / "run", epochs=1, swa_start_epoch=0)) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "check: " in line]
    assert len(said) == 2 and all("lies in main memory (tmpfs)" in line for line in said)  # checkpoint_dir and log_file
