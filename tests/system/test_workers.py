import contextlib
import multiprocessing.connection
import os
import signal
import time

import pytest

from engine.system.workers import WorkerDied, available_cores, worker_pool


def test_a_killed_worker_is_said_and_the_others_end():
    with pytest.raises(WorkerDied, match="a worker process was killed"), worker_pool(2) as pool:
        first = pool.submit(os.getpid).result()
        others = [pool.submit(time.sleep, 600) for _ in range(4)]
        processes = list(pool._processes)
        os.kill(first, signal.SIGKILL)
        others[0].result(timeout=60)
    assert len(processes) == 2
    for pid in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def _dies_while_it_answers(number):
    """Let this worker be killed once half of its answer, more than a pipe takes, is on its way."""

    def send_half(connection, content, write=os.write):
        write(connection.fileno(), content[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    multiprocessing.connection.Connection._send = send_half
    return bytes(100_000)


def _asks_workers_that_die():
    os.setsid()
    with contextlib.suppress(WorkerDied), worker_pool(2) as pool:
        list(pool.map(_dies_while_it_answers, range(4)))
        os._exit(1)


@pytest.mark.slow
def test_a_worker_killed_in_the_middle_of_its_answer_is_no_wait_without_end():
    asking = multiprocessing.get_context("fork").Process(target=_asks_workers_that_die)
    asking.start()
    asking.join(60)
    if asking.is_alive():
        os.killpg(asking.pid, signal.SIGKILL)
        asking.join()
    assert asking.exitcode == 0


def test_a_ctrl_c_leaves_the_workers_alone():
    with worker_pool(1) as pool:
        worker = pool.submit(os.getpid).result()
        os.kill(worker, signal.SIGINT)
        assert pool.submit(os.getpid).result() == worker


V2, V1 = "sys/fs/cgroup", "sys/fs/cgroup/cpu,cpuacct"


@pytest.mark.parametrize(
    ("cores", "groups", "files"),
    [
        (8, "0::/\n", {}),
        (8, "0::/\n", {f"{V2}/cpu.max": "max 100000"}),
        (2, "0::/\n", {f"{V2}/cpu.max": "200000 100000"}),  # a container that sees its own group as the root
        (2, "0::/docker/ab\n", {f"{V2}/cpu.max": "150000 100000"}),  # or under the path that the machine knows
        (3, "0::/a.slice/b.scope\n", {f"{V2}/a.slice/cpu.max": "300000 100000", f"{V2}/a.slice/b.scope/cpu.max": "max 100000"}),
        (1, "0::/\n", {f"{V2}/cpu.max": "10000 100000"}),
        (8, "0::/\n", {f"{V2}/cpu.max": "6400000 100000"}),  # more than there are
        (8, "4:cpu,cpuacct:/\n", {f"{V1}/cpu.cfs_quota_us": "-1", f"{V1}/cpu.cfs_period_us": "100000"}),
        (2, "4:cpu,cpuacct:/\n1:name=systemd:/\n", {f"{V1}/cpu.cfs_quota_us": "100001", f"{V1}/cpu.cfs_period_us": "100000"}),
        (4, "3:cpuset:/\n2:cpu,cpuacct:/docker/ab\n", {f"{V1}/cpu.cfs_quota_us": "40000", f"{V1}/cpu.cfs_period_us": "10000"}),
        (
            4,
            "2:cpu:/x\n0::/\n",
            {"sys/fs/cgroup/cpu/x/cpu.cfs_quota_us": "4000", "sys/fs/cgroup/cpu/x/cpu.cfs_period_us": "1000"},
        ),
    ],
)
def test_cores_are_those_of_the_affinity_or_fewer_by_a_containers_quota(cores, groups, files, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n" if text != groups else text)
    assert available_cores(tmp_path) == cores


def test_without_control_groups_cores_are_those_of_the_affinity(tmp_path):
    assert available_cores(tmp_path) == len(os.sched_getaffinity(0))
