"""Where a run begins: anew, or at a checkpoint that is found, verified and reconciled with the flags."""

import os
from pathlib import Path
from typing import NamedTuple

from config import CONFIG
from engine.cli.command_line import stretching_in_words
from engine.cli.keys import ConfigError, config_problems
from engine.cli.resume_rule import RULED_ON_RESUME, resumed_config, with_keys_of_today
from engine.run import checkpoint_files
from engine.run.checkpoint_files import CURVES, RECORDS
from engine.run.events import EVENTS
from engine.run.ledger import HOURS
from engine.system import distributed
from engine.system.errors import CheckpointError
from engine.training.plan import overruled

# What its files begin with, besides the zeros that a power cut leaves; curves are drawn after the first record.
OF_A_RUN_BEFORE_ITS_FIRST_SAVE = {CURVES: None, EVENTS: b'{"event": ', HOURS: b'{"run": '}


class Beginning(NamedTuple):
    """What a run begins with."""

    config: dict
    recipe: str
    checkpoint: dict | None  # what to go on from, with its path as 'path'; None: a new run
    remarks: list  # lines to log


def source_of_run(command):
    """Return (what to go on from: a path, 'auto' or None; the folder that the run writes to)."""
    source = command.options.get("resume")
    if distributed.restarted():  # it goes on with its own run, however that was begun
        source = "auto"
    if source in (None, "auto"):
        return source, command.config["checkpoint_dir"]
    path = Path(source)
    if not os.path.lexists(path):
        checkpoint_files.read(path)  # which says what is there instead
    return source, command.given.get("checkpoint_dir", str(path if path.is_dir() else path.parent))


def beginning_of_run(command, source, folder):
    """Return the Beginning of the run that a command asks for.

    Args:
        source, folder: as source_of_run returns them.
    Raises:
        ConfigError, CheckpointError: it cannot be begun so.
    """
    overwrite = command.options.get("overwrite")
    if distributed.launched() and overwrite:
        raise ConfigError(
            [f"--overwrite: torchrun may start this program again, and the run would be lost; delete {folder} first"]
        )
    stretching = stretching_in_words(command.recipe, command.config, command.given)
    new_run = Beginning(command.config, command.recipe or "seed", None, [stretching] if stretching else [])
    if source is None:
        if not overwrite:
            checkpoint_files.refuse_to_overwrite(folder)
        refuse_to_replace_others(folder)
        return new_run
    if overwrite:
        raise ConfigError(["--resume and --overwrite: the one goes on with a run, the other deletes it"])
    path, checkpoint, remarks = find_checkpoint(source, folder)
    if path is not None:
        return _resumed(command, path, checkpoint, remarks, folder)
    if unsound := config_problems(command.config):
        raise ConfigError(unsound)
    refuse_to_replace_others(folder)
    return new_run._replace(remarks=[*new_run.remarks, f"nothing to resume in {folder}: a new run starts"])


def refuse_to_replace_others(folder):
    """Raise CheckpointError if a folder holds no run, but files of others under names that a run gives its own."""
    folder = Path(folder)
    if checkpoint_files.checkpoints_in(folder) or (folder / RECORDS).exists():
        return
    for name, beginning in OF_A_RUN_BEFORE_ITS_FIRST_SAVE.items():
        path = folder / name
        content = path.read_bytes().strip(b"\0\n") if path.is_file() else b""
        if content and not (beginning and content.startswith(beginning)):
            raise CheckpointError(
                f"{path} is there, but no run that it is of, and this one would replace it: move it away, or name another "
                "--checkpoint-dir"
            )


def find_checkpoint(source, folder):
    """Return (path, checkpoint, remarks) of what to go on from; path None: there is nothing, and a new run may start."""
    if source != "auto" and not Path(source).is_dir():
        return Path(source), checkpoint_files.read(Path(source)), []
    path, checkpoint, problems = checkpoint_files.newest_good(folder if source == "auto" else source)
    if path is None and source != "auto":
        raise CheckpointError(f"--resume {source}: the folder holds no checkpoint")
    return path, checkpoint, [f"WARNING: {problem}" for problem in problems]


def _resumed(command, path, checkpoint, remarks, folder):
    """Return the Beginning at a checkpoint, whose configuration the flags may change only as the resume rule has it."""
    if command.recipe not in (None, checkpoint["recipe"]):
        raise ConfigError([f"--recipe {command.recipe}: {path} is a run of the recipe {checkpoint['recipe']}; leave it out"])
    given = command.given | {"checkpoint_dir": str(folder)}
    if in_vain := overruled(command):  # as at the first start of the same line
        remarks += [f"{line}; without it --epochs changes them" for line in in_vain]
        del given["epochs"]
    config = resumed_config(checkpoint["config"], given, checkpoint["batch"], checkpoint["epoch"])
    checkpoint["path"] = str(path)
    position = f"after epoch {checkpoint['epoch']}" + (f" and {checkpoint['batch']} batches" if checkpoint["batch"] else "")
    remarks.append(f"resumed {path}, {position} (best so far {checkpoint['best']['top1']:.2f} %)")
    if path.name != checkpoint_files.LAST:
        remarks.append(f"note: {path.name} instead of {checkpoint_files.LAST}: whatever the run did after it is done again")
    before = CONFIG | with_keys_of_today(checkpoint["config"])
    for key, was in before.items():
        if config[key] != was:
            rule = f" ({RULED_ON_RESUME[key]})" if key in RULED_ON_RESUME else ""
            remarks.append(f"changed on resume: {key} = {config[key]!r}, was {was!r}{rule}")
    return Beginning(config, checkpoint["recipe"], checkpoint, remarks)
