"""Processes of the project's programs without the seconds that importing torch takes: forked from one that has it imported.

A forked process is a real one: it has a process id, streams, signals and an end of its own, and runs its program as __main__.
What an import reads (PYTHONPATH, OMP_NUM_THREADS and the like) is the server's; whoever needs another value starts Python anew.
"""

import atexit
import contextlib
import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
READ_BY_IMPORTS = ("PYTHON", "OMP_", "MKL_", "LD_", "CUDA_", "NVIDIA_", "TORCH", "CXX")  # what their names begin with
PRELOADED = ("train", "evaluate", "lr_finder", "prepare_data", "report", "matplotlib.backends.backend_agg", "matplotlib.figure")


# In the tests --------------------------------------------------------------------------------------------------------


def can_fork(arguments, environment, options):
    """Return whether a Python command line may run in a forked process."""
    first = str(arguments[0])
    is_program = first == "-c" or first.endswith(".py")
    same_imports = not any(name.startswith(READ_BY_IMPORTS) for name in environment or {})
    return is_program and same_imports and set(options) <= {"start_new_session", "file_size_limit"}


class ForkServer:
    """Starts the server when it is first needed; that ends with this process."""

    _address = None

    def start(self, arguments, cwd, environment, start_new_session=False, file_size_limit=None):
        """Return the ForkedProcess that runs `python *arguments`, its output piped as text."""
        if self._address is None:
            self._address = os.path.join(tempfile.mkdtemp(prefix="fork-server-"), "socket")
            command = [sys.executable, __file__, self._address]
            self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=REPOSITORY)
            assert self._server.stdout.readline() == b"ready\n"
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(self._address)
        reading, writing = os.pipe()
        request = {"arguments": list(map(str, arguments)), "cwd": str(cwd), "environment": environment}
        request |= {"start_new_session": start_new_session, "file_size_limit": file_size_limit}
        content = json.dumps(request).encode()
        socket.send_fds(connection, [len(content).to_bytes(8, "little")], [writing])
        connection.sendall(content)
        os.close(writing)
        return ForkedProcess(connection, open(reading, encoding="utf-8", errors="replace"))


class ForkedProcess:
    """What the tests use of subprocess.Popen."""

    def __init__(self, connection, stdout):
        self._connection, self.stdout, self.returncode = connection, stdout, None
        self.pid = int.from_bytes(connection.recv(8, socket.MSG_WAITALL), "little")

    def poll(self):
        """Return the exit status, or None if the process still runs."""
        if self.returncode is None and select.select([self._connection], [], [], 0)[0]:
            self.returncode = int.from_bytes(self._connection.recv(8, socket.MSG_WAITALL), "little", signed=True)
            self._connection.close()
        return self.returncode

    def wait(self, timeout=None):
        """Return the exit status; raise subprocess.TimeoutExpired if it does not come."""
        if self.returncode is None and not select.select([self._connection], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.poll()

    def communicate(self, timeout=None):
        """Return (output, None) once the output has ended and the process, too."""
        deadline, content = None if timeout is None else time.monotonic() + timeout, []
        descriptor = self.stdout.fileno()
        while True:
            left = None if deadline is None else max(0, deadline - time.monotonic())
            if not select.select([descriptor], [], [], left)[0]:
                raise subprocess.TimeoutExpired(str(self.pid), timeout)
            if not (piece := os.read(descriptor, 1 << 16)):
                break
            content.append(piece)
        rest = b"".join(content).decode("utf-8", "replace")
        self.stdout.close()
        self.wait(timeout)
        return rest, None

    def send_signal(self, number):
        """Send a signal, if the process still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.stdout.close()
        self.wait()


# The server ----------------------------------------------------------------------------------------------------------


def serve(address):
    """Fork for each request; return the request in the process that is to carry it out, and nowhere else."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(address)
    listening.listen()
    print("ready", flush=True)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody asks how a watcher has ended
    while listening in select.select([listening, sys.stdin], [], [])[0]:
        connection, _ = listening.accept()
        if os.fork() == 0:
            listening.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            return watch(connection)
        connection.close()
    os._exit(0)  # whoever has started the server is gone


def watch(connection):
    """Fork the process of a request and report its id and how it ends; in that process, return the request."""
    size, (output,), _, _ = socket.recv_fds(connection, 8, 1)
    request = json.loads(connection.recv(int.from_bytes(size, "little"), socket.MSG_WAITALL))
    pid = os.fork()
    if pid == 0:
        connection.close()
        return request | {"output": output}
    os.close(output)
    with contextlib.suppress(OSError):  # nobody waits for it any more
        connection.sendall(pid.to_bytes(8, "little"))
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):
        connection.sendall(status.to_bytes(8, "little", signed=True))
    os._exit(0)


def become(request):
    """Turn this process into `python *arguments`; return (code, name of its file)."""
    if request["start_new_session"]:
        os.setsid()
    if request["file_size_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["file_size_limit"], resource.RLIM_INFINITY))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (request["output"], 1), (request["output"], 2)):
        os.dup2(source, target)
    os.close(nothing)
    os.close(request["output"])
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    sys.stdout = open(1, "w", encoding="utf-8", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["cwd"])
    first, *rest = request["arguments"]
    if first == "-c":
        sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
        return rest[0], "<string>"
    sys.argv, sys.path[0] = [first, *rest], str(Path(first).resolve().parent)
    return Path(first).read_text(encoding="utf-8"), first


def run_as_main(code, file):
    """Run code as the interpreter runs a script, and end this process as it does, but without taking its memory apart."""
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    main.__file__, status, interrupted = file, 0, False
    try:
        exec(code, main.__dict__)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if end.code is not None and not isinstance(end.code, int):
            print(end.code, file=sys.stderr)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        status, interrupted = 1, isinstance(error, KeyboardInterrupt)
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    if interrupted:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status & 0xFF)


if __name__ == "__main__":
    import gc
    import importlib

    sys.path[:1] = [str(REPOSITORY), str(REPOSITORY / "tests")]
    from narrow import narrow_build_model

    import model

    model.build_model = narrow_build_model()
    for module in PRELOADED:
        importlib.import_module(module)
    gc.freeze()  # what is imported is never collected: a process that has ended would spend a second on it
    source, file = become(serve(sys.argv[1]))
    run_as_main(compile(source, file, "exec"), file)
