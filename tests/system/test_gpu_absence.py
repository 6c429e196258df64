"""A GPU that is there is used or its absence explained: no run falls silently to the CPU. Real folders, a real nvidia-smi."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import run_here, run_program, tiny_run

import benchmark
import evaluate
import lr_finder
from engine.cli.command_line import parse_command_line
from engine.system.device import choose_device
from engine.system.errors import UserError
from engine.system.gpu_absence import (
    CURES,
    INSTALL_DRIVER,
    INSTALL_TORCH,
    INSTALL_TORCH_FOR_CUDA_12,
    System,
    TorchBuild,
    absence_of_gpu,
    cure_of,
    look_for_gpus,
    runs_on,
    without_code,
)

CUDA_13 = TorchBuild("2.14.1+cu130", "13.0")
UUID = "GPU-11111111-2222-3333-4444-555555555555"
VERSION_FILE = "NVRM version: NVIDIA UNIX {kind}x86_64 Kernel Module  {driver}  Thu Mar 7 UTC 2024\nGCC version: 12.3.0\n"


def put_nvidia_smi(folder, driver=None, failure=None, mig="[N/A]", also=""):
    """Put a nvidia-smi into the folder that answers as NVIDIA's does, for one Tesla T4, or fails."""
    listing = f"echo 'GPU 0: Tesla T4 (UUID: {UUID})'; echo '{also}'"
    answers = f"-L) {listing};; *mig.mode*) echo '{mig}';; *) echo {driver};;"
    body = f"echo '{failure}'; exit 9" if failure else f'case "$*" in {answers} esac'
    put_program(folder, body)


def put_program(folder, body):
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{body}\n")
    program.chmod(0o755)


def put(root, **files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.fixture
def machine(tmp_path):
    """Return the function that makes a System with an NVIDIA card on its bus.

    Args:
        driver: version of the driver that has been loaded, with its files in /proc and /dev; '' for none.
        smi: whether there is a nvidia-smi, which lists the card.
        bound_to: kernel driver of the card.
    """

    def made(driver="", smi=False, bound_to="", failure=None, **environment):
        root = tmp_path / "root"
        put_device(root, "0000:00:1e.0", "0x10de", "0x030200")
        if bound_to:
            (root / f"sys/bus/pci/drivers/{bound_to}").mkdir(parents=True)
            (root / "sys/bus/pci/devices/0000:00:1e.0/driver").symlink_to(root / f"sys/bus/pci/drivers/{bound_to}")
        if driver:
            put(root, **{"proc/driver/nvidia/version": VERSION_FILE.format(kind="Open ", driver=driver)})
            put(root, **{"proc/driver/nvidia/gpus/0000:00:1e.0/information": "Model: Tesla T4\n"})
            put(root, **{f"dev/{name}": "" for name in ("nvidia0", "nvidiactl", "nvidia-uvm")})
        if smi or failure:
            put_nvidia_smi(root / "usr/bin", driver, failure)
        return System(root, {"PATH": f"{root}/usr/bin:/usr/bin:/bin"} | environment)

    return made


def put_device(root, address, vendor, kind):
    folder = f"sys/bus/pci/devices/{address}"
    put(root, **{f"{folder}/vendor": f"{vendor}\n", f"{folder}/class": f"{kind}\n"})


def causes_of(system, build=CUDA_13):
    seen, causes = absence_of_gpu(build, system)
    assert seen
    return causes


def only_cause_of(system, build=CUDA_13):
    (cause,) = causes_of(system, build)
    return cause


def test_a_machine_without_nvidias_gpus_shows_none(tmp_path):
    put_device(tmp_path, "0000:00:02.0", "0x8086", "0x030000")  # another maker's display
    put_device(tmp_path, "0000:01:00.1", "0x10de", "0x040300")  # the sound of a card that is handed to somebody else
    put_nvidia_smi(tmp_path / "bin", failure="No devices were found")
    assert absence_of_gpu(CUDA_13, System(tmp_path, {"PATH": f"{tmp_path}/bin"})) == ("", [])
    assert absence_of_gpu(CUDA_13, System(tmp_path / "nothing", {})) == ("", [])


def test_each_place_that_shows_a_gpu_is_looked_at(machine, tmp_path):
    assert absence_of_gpu(CUDA_13, machine())[0] == "PCI device 0000:00:1e.0 is one of NVIDIA's"
    assert absence_of_gpu(CUDA_13, machine("580.65.06"))[0] == "/proc/driver/nvidia/gpus has 0000:00:1e.0"
    assert absence_of_gpu(CUDA_13, machine("580.65.06", smi=True))[0] == "nvidia-smi lists Tesla T4"


TABLE = """| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4 |
|   0  Tesla T4            Off |   00000000:00:1E.0 Off |                    0 |"""


@pytest.mark.parametrize(
    ("answer", "names", "driver"),
    [
        (TABLE, ["Tesla T4"], "550.54.15"),
        ("GPU 0: Tesla T4 (UUID: GPU-1)\nGPU 1: NVIDIA A100 80GB (UUID: GPU-2)", ["Tesla T4", "NVIDIA A100 80GB"], None),
        ("GPU 0: NVIDIA H100 (UUID: GPU-1)\n  MIG 1g.10gb Device 0: (UUID: MIG-3)", ["NVIDIA H100"], None),
        ("Tesla T4, 550.54.15", ["Tesla T4, 550.54.15"], "550.54.15"),
        ("No devices were found", [], None),
        ("", [], None),
    ],
)
def test_whatever_nvidia_smi_answers_is_understood(tmp_path, answer, names, driver):
    put_program(tmp_path / "bin", f"cat <<'END'\n{answer}\nEND")
    evidence = look_for_gpus(System(tmp_path, {"PATH": f"{tmp_path}/bin:/usr/bin:/bin"}))
    assert (evidence.names, evidence.driver) == (names, driver)


def test_a_card_without_a_driver(machine):
    assert only_cause_of(machine()) == ("NVIDIA's driver is not loaded", INSTALL_DRIVER)


def test_a_card_whose_driver_is_installed_but_not_loaded(machine):
    failure = "NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver."
    assert only_cause_of(machine(failure=failure)) == ("NVIDIA's driver is not loaded", "sudo modprobe nvidia")


@pytest.mark.parametrize("other", ["nouveau", "vfio-pci"])
def test_a_card_in_the_hands_of_another_driver(machine, other):
    reason, _ = only_cause_of(machine(bound_to=other))
    assert other in reason


@pytest.mark.parametrize("smi", [False, True])
@pytest.mark.parametrize(
    ("driver", "cuda", "least"),
    [("550.54.15", "13.0", 580), ("470.256.02", "13.0", 580), ("470.256.02", "12.8", 525), ("418.87", "11.8", 450)],
)
def test_a_driver_that_is_too_old_for_pytorchs_cuda(machine, driver, cuda, least, smi):
    reason, cure = only_cause_of(machine(driver, smi), TorchBuild("2.14.1", cuda))
    assert driver in reason and f"CUDA {cuda}" in reason and f"{least} or newer" in reason
    assert INSTALL_DRIVER in cure
    assert ("cu126" in cure) == (driver == "550.54.15")  # which that driver runs


@pytest.mark.parametrize(
    ("driver", "cuda"), [("580.65.06", "13.0"), ("595.10", "13.1"), ("550.54.15", "12.8"), ("600.1", "14.0")]
)
def test_a_driver_that_is_new_enough_is_not_accused(machine, driver, cuda):
    assert causes_of(machine(driver, smi=True), TorchBuild("2.14.1", cuda)) == []


def test_a_pytorch_without_cuda(machine):
    reason, cure = only_cause_of(machine("580.65.06", smi=True), TorchBuild("2.14.1+cpu", None))
    assert (reason, cure) == ("PyTorch 2.14.1+cpu is no CUDA build", INSTALL_TORCH)


@pytest.mark.parametrize("visible", ["", "-1", "1", "1,0", "NoDevFiles", "GPU-99999999", "none"])
def test_a_gpu_that_cuda_visible_devices_hides(machine, visible):
    reason, cure = only_cause_of(machine("580.65.06", smi=True, CUDA_VISIBLE_DEVICES=visible))
    assert reason.startswith("CUDA_VISIBLE_DEVICES") and (visible in reason)
    assert cure == "unset CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize("visible", ["0", "0,1", " 0", UUID, "GPU-1111"])
def test_a_gpu_that_cuda_visible_devices_shows(machine, visible):
    assert causes_of(machine("580.65.06", smi=True, CUDA_VISIBLE_DEVICES=visible)) == []


def test_all_that_is_wrong_is_said_at_once(machine):
    system = machine("550.54.15", smi=True, CUDA_VISIBLE_DEVICES="")
    assert [reason[:20] for reason, _ in causes_of(system)] == ["CUDA_VISIBLE_DEVICES", "NVIDIA's driver 550."]


@pytest.mark.parametrize(("mark", "cure"), [("", "sudo nvidia-modprobe -u -c 0"), (".dockerenv", "docker run --gpus all ...")])
def test_a_driver_whose_device_files_are_missing(machine, mark, cure):
    system = machine("580.65.06")
    (system.root / "dev/nvidia0").unlink()
    if mark:
        (system.root / mark).touch()
    assert only_cause_of(system)[1] == cure


def test_without_nvidia_uvm_cuda_does_not_start(machine):
    system = machine("580.65.06", smi=True)
    (system.root / "dev/nvidia-uvm").unlink()
    assert only_cause_of(system)[1] == "sudo nvidia-modprobe -u -c 0"


def test_device_files_that_this_user_may_not_open(machine, tmp_path):
    made = machine("580.65.06", smi=True)
    for name, mode in (("nvidiactl", 0o666), ("nvidia-uvm", 0o666), ("nvidia0", 0o600)):
        (made.root / "dev" / name).chmod(mode)
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)  # nobody may look into pytest's own
        system = made._replace(root=shutil.copytree(made.root, f"{folder}/root"))
        if user == 0:  # who may open everything
            os.seteuid(65534)
        else:
            os.chmod(f"{folder}/root/dev/nvidia0", 0o000)
        try:
            causes = causes_of(system._replace(root=Path(system.root)))
        finally:
            os.seteuid(user)
    assert causes == [("this user may not open /dev/nvidia0", "sudo chmod a+rw /dev/nvidia0")]


def test_mig_without_an_instance(machine):
    made = machine("580.65.06")
    put_nvidia_smi(made.root / "usr/bin", "580.65.06", mig="Enabled")
    reason, cure = only_cause_of(made)
    assert "MIG is on" in reason and cure.startswith("sudo nvidia-smi mig -cgi 0 -C")
    put_nvidia_smi(made.root / "usr/bin", "580.65.06", mig="Enabled", also="  MIG 1g.10gb Device 0: (UUID: MIG-1)")
    assert causes_of(made) == []
    put_nvidia_smi(made.root / "usr/bin", "580.65.06", mig="Enabled\nDisabled")  # the other card could be seen
    assert causes_of(made) == []


LOST_GPU = "Unable to determine the device handle for GPU0: 0000:00:1E.0: GPU is lost.  Reboot the system to recover this GPU"


@pytest.mark.parametrize("failure", [LOST_GPU, "Unable to determine the device handle for GPU 0000:00:1E.0: Unknown Error"])
def test_a_gpu_that_no_longer_answers(machine, tmp_path, failure):
    assert causes_of(machine("580.65.06", failure=failure))[0] == (
        f"nvidia-smi says: {' '.join(failure.split())}",
        "sudo reboot",
    )
    bare = System(tmp_path / "bare", {"PATH": f"{tmp_path}/root/usr/bin:/usr/bin:/bin"})  # a container that shows nothing else
    assert absence_of_gpu(CUDA_13, bare)[0].startswith("nvidia-smi says: Unable")


def test_one_of_several_gpus_that_no_longer_answers(machine):
    made = machine("580.65.06")
    put_nvidia_smi(made.root / "usr/bin", "580.65.06", also=LOST_GPU)
    assert look_for_gpus(made).names == ["Tesla T4"]
    assert only_cause_of(made)[1] == "sudo reboot"


@pytest.mark.parametrize(
    ("visible", "hides"),
    [(UUID, False), ("GPU-1111", False), ("GPU-99999999", True), ("MIG-1", False), ("NoDevFiles", True)],
)
def test_without_nvidia_smi_a_uuid_is_compared_with_the_drivers(machine, visible, hides):
    made = machine("580.65.06", CUDA_VISIBLE_DEVICES=visible)
    put(made.root, **{"proc/driver/nvidia/gpus/0000:00:1e.0/information": f"Model: Tesla T4\nGPU UUID: \t {UUID}\n"})
    assert bool(causes_of(made)) == hides


def test_a_uuid_that_nothing_here_knows_is_not_accused(machine):
    made = machine("580.65.06", CUDA_VISIBLE_DEVICES=UUID)
    for unknown in ("", "GPU UUID: \t GPU-????????-????-????-????-????????????\n"):  # as until somebody uses the card
        put(made.root, **{"proc/driver/nvidia/gpus/0000:00:1e.0/information": f"Model: Tesla T4\n{unknown}"})
        assert causes_of(made) == []


@pytest.mark.parametrize("visible", ["", "NoDevFiles", None])
def test_a_slurm_job_without_a_gpu_is_told_to_ask_for_one(machine, visible):
    hidden = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    made = machine("580.65.06", SLURM_JOB_ID="7", **hidden)
    if visible is None:
        (made.root / "dev/nvidia0").unlink()
    reason, cure = only_cause_of(made)
    assert reason.startswith("Slurm has given this job no GPU") and "--gres=gpu:1" in cure
    given = made._replace(environment=made.environment | {"SLURM_JOB_GPUS": "0"})
    assert "--gres" not in only_cause_of(given)[1]


def test_a_pod_without_a_gpu_is_told_to_ask_for_one(machine):
    made = machine("580.65.06", KUBERNETES_SERVICE_HOST="10.0.0.1")
    (made.root / "dev/nvidia0").unlink()
    assert "nvidia.com/gpu: 1" in only_cause_of(made)[1]


def test_wsls_nvidia_smi_is_found_beside_the_path(tmp_path):
    put_nvidia_smi(tmp_path / "usr/lib/wsl/lib", "580.65.06")
    evidence = look_for_gpus(System(tmp_path, {"PATH": "/usr/bin:/bin"}))
    assert (evidence.names, evidence.driver) == (["Tesla T4"], "580.65.06")
    assert "/usr/lib/wsl/lib" in cure_of("Found no NVIDIA driver on your system.")


def test_a_driver_that_was_updated_under_a_running_system(machine):
    reason, cure = causes_of(machine("580.65.06", failure="Failed to initialize NVML: Driver/library version mismatch"))[0]
    assert "version mismatch" in reason and cure == "sudo reboot"


@pytest.mark.parametrize(
    "complaint",
    [
        "The NVIDIA driver on your system is too old (found version 12040).",
        "Found no NVIDIA driver on your system.",
        "CUDA unknown error - this may be due to an incorrectly set up environment",
        "something that nobody has seen",
    ],
)
def test_every_complaint_of_pytorchs_has_a_cure(complaint):
    assert cure_of(complaint) in CURES.values()


WHEEL = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # of torch 2.14.1+cu130, as get_arch_list() has them


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        *(((int(c), int(f)), WHEEL, True) for c, f in ("75", "80", "86", "90")),
        *((capability, WHEEL, True) for capability in ((8, 9), (10, 3), (12, 1))),  # later than that of the same major version
        *((capability, WHEEL, False) for capability in ((6, 0), (7, 0), (7, 2), (11, 0), (13, 0))),
        ((13, 0), [*WHEEL, "compute_120"], True),
        ((11, 0), [*WHEEL, "compute_120"], False),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_90a"], True),
        ((10, 0), ["sm_90a", "compute_90a"], False),
        ((10, 3), ["sm_100f"], True),
        ((11, 0), ["sm_100f", "compute_100f"], False),
        ((9, 0), [], True),  # of which nothing is known
        ((9, 0), ["gfx90a"], True),  # another maker's
    ],
)
def test_pytorchs_code_runs_on_the_cards_that_nvidia_says(capability, architectures, runs):
    assert runs_on(capability, architectures) == runs


@pytest.mark.parametrize(
    ("capability", "cure"),
    [((7, 0), INSTALL_TORCH_FOR_CUDA_12), ((5, 2), INSTALL_TORCH_FOR_CUDA_12), ((13, 0), INSTALL_TORCH)],
)
def test_a_card_that_pytorch_has_no_code_for_is_sent_to_the_pytorch_that_has_some(capability, cure):
    reason, command = without_code("Tesla V100", capability, WHEEL, CUDA_13)
    assert "PyTorch 2.14.1+cu130 has code for sm_75, " in reason and "Tesla V100 of compute capability" in reason
    assert command == cure
    assert "5.0 or newer" in without_code("Tesla K80", (3, 7), WHEEL, CUDA_13)[1]


# In the programs -----------------------------------------------------------------------------------------------------

here = pytest.mark.skipif(torch.cuda.is_available(), reason="PyTorch sees a GPU here")


@pytest.fixture
def unused_gpu(tmp_path, monkeypatch):
    """A nvidia-smi on the PATH of this process that lists a GPU, with a driver that is too old."""
    put_nvidia_smi(tmp_path / "bin", "390.157")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin", prepend=os.pathsep)


@here
def test_a_run_stops_instead_of_training_on_the_cpu_for_days(unused_gpu, tiny_arguments, tmp_path):
    status, output = run_program("train.py", [*tiny_arguments, "--device=auto"])
    assert status == 1
    assert "train.py: device = 'auto': this machine has a GPU (nvidia-smi lists Tesla T4), but PyTorch sees none" in output
    assert "Mend it with: " in output and "--device cpu does without a GPU" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


@here
def test_every_program_says_so(unused_gpu, image_tree, tmp_path):
    arguments = tiny_run(image_tree, tmp_path / "run", device="auto")
    for program in (
        lambda: run_here([*arguments, "--plan"]),
        lambda: lr_finder.main(parse_command_line(arguments, lr_finder.OWN_FLAGS)),
        lambda: evaluate.main(evaluate.parse_arguments(["best.pt"])),
        lambda: benchmark.main(benchmark.parse_arguments(["step", "--no-record"])),
        lambda: benchmark.main(benchmark.parse_arguments(["gpu", f"--results={tmp_path / 'gpu.jsonl'}"])),
        lambda: choose_device({"device": "cuda"}),
    ):
        with pytest.raises(UserError, match="Tesla T4"):
            program()


@here
def test_device_cpu_trains_all_the_same(unused_gpu, tiny_arguments):
    assert run_here([*tiny_arguments, "--epochs=2", "--device=cpu"]) == 0


@here
def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error():
    if absence_of_gpu(CUDA_13)[0]:
        pytest.skip("this machine has a GPU")
    assert choose_device({"device": "auto"}).type == "cpu"
    with pytest.raises(UserError, match="shows none of NVIDIA's"):
        choose_device({"device": "cuda"})
