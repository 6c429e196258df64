"""What all measurements share: rounds, ratios, and the facts that a figure depends on."""

import itertools
import multiprocessing
import os
import statistics
import subprocess
import time
from pathlib import Path

from engine.system.plain_json import from_json, to_json

REPOSITORY = Path(__file__).resolve().parent.parent
RESULTS = REPOSITORY / "benchmarks"


def installed_timm():
    """Return timm, or None for one contender less; imported here, since it takes a second."""
    try:
        import timm
    except ImportError:
        return None
    return timm


def measured_in_rounds(contenders, rounds, count, clock):
    """Run every contender once a round, in turn; return {name: [images/s of each round]}.

    Args:
        contenders: {name: function without arguments that handles `count` images}.
        clock: time.perf_counter; or time.process_time for work of this process alone, which a busy machine disturbs less.
    """
    rates = {name: [] for name in contenders}
    for round_number in range(rounds + 1):
        for name, run in contenders.items():
            started = clock()
            run()
            if round_number:  # the first round warms up
                rates[name].append(round(count / (clock() - started), 1))
    return rates


def ratio(rates, reference):
    """Return the median over the rounds of one contender's images/s over another's in the same round."""
    return statistics.median(ours / theirs for ours, theirs in zip(rates, reference, strict=True))


def rate_cell(rates, reference=None):
    """Return a table's cell: median and range of images/s, and the ratio to the reference, if there is one."""
    digits = 0 if min(rates) >= 100 else 1
    median, low, high = (f"{value:,.{digits}f}" for value in (statistics.median(rates), min(rates), max(rates)))
    return f"{median} ({low} to {high})" + (f", {ratio(rates, reference):.2f}x" if reference else "")


def run_quietly(command):
    """Run a command to its end in the repository's root; raise RuntimeError with the end of its output if it fails."""
    done = subprocess.run([*map(str, command)], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command[1]} ended with status {done.returncode}: {done.stdout[-2000:]}")


def last_words(output):
    """Return the message of the exception that a process ended with, in a line, or the last line of its output; '' if none."""
    lines = output.strip().splitlines()
    start = max((number for number, line in enumerate(lines) if line.startswith("Traceback (")), default=len(lines))
    message = list(itertools.dropwhile(lambda line: line[:1] in ("", " "), lines[start + 1 :]))
    return " ".join(message or lines[-1:])[:500]


def record(name, results):
    """Append the results to benchmarks/NAME.jsonl."""
    with open(RESULTS / f"{name}.jsonl", "a", encoding="utf-8") as file:
        file.write(to_json(results) + "\n")


def recorded(name):
    """Return the results in benchmarks/NAME.jsonl, oldest first."""
    path = RESULTS / f"{name}.jsonl"
    return [from_json(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def in_processes(work, argument_lists):
    """Run work(*arguments) in a process of its own for each of the lists, all at once."""
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=work, args=arguments) for arguments in argument_lists]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


def cpus_granted(processes, seconds=1.0):
    """Return how many CPUs' worth of time so many busy processes get: fewer than the cores where a machine is shared."""
    before = os.times()
    in_processes(_spin, [(seconds,)] * processes)
    after = os.times()
    return (after.children_user + after.children_system - before.children_user - before.children_system) / seconds


def _spin(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass
