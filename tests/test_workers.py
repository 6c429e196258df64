import os
import signal
import time

import pytest

from engine.workers import WorkerDied, worker_pool


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


def test_a_ctrl_c_leaves_the_workers_alone():
    with worker_pool(1) as pool:
        worker = pool.submit(os.getpid).result()
        os.kill(worker, signal.SIGINT)
        assert pool.submit(os.getpid).result() == worker
