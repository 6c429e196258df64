"""Which keys a resumed run may change."""

import math

from config import CONFIG, SETTINGS
from engine.cli.keys import ALLOWED, ConfigError, config_problems

# A resumed run goes on with the checkpoint's configuration. SETTINGS may change, hyperparameters are kept, and these follow a
# rule, which the run carries out and logs:
RULED_ON_RESUME = {
    "epochs": "the learning-rate schedule is rebuilt over the new length; the steps done keep their place in it",
    "batch_size": "only between epochs, since a position inside one is counted in batches",
    "swa_start_epoch": "while averaging lies ahead, to 0 or an epoch that does: no step done would have been another",
}


# Keys of old whose values were steps, and what they are called since these are images.
FORMERLY_IN_STEPS = {"ema_half_life_steps": "ema_half_life_images", "ema_every_steps": "ema_every_images"}


def with_keys_of_today(saved):
    """Return a checkpoint's configuration with the keys that it would have been written with today."""
    in_images = {new: saved[old] * saved["batch_size"] for old, new in FORMERLY_IN_STEPS.items() if old in saved}
    return {key: value for key, value in saved.items() if key in CONFIG} | in_images


def resumed_config(saved, given, batch, done=0):
    """Return the configuration that a resumed run goes on with.

    Args:
        saved: the checkpoint's configuration.
        given: the keys that flags on the command line name, with their values.
        batch: the batches that the checkpoint's epoch in progress has behind it.
        done: the whole epochs that it has behind it.
    Raises:
        ConfigError: with one line for each given key that would bend the run.
    """
    saved = with_keys_of_today(saved)
    given = {key: value for key, value in given.items() if value != "auto" or key != "learning_rate"}  # found already
    problems = _problems_of_length(CONFIG | saved, given, batch, done)
    if batch and given.get("batch_size", saved["batch_size"]) != saved["batch_size"]:
        problems.append(
            f"batch_size = {given['batch_size']}: the checkpoint lies {batch} batches of {saved['batch_size']} into its epoch; "
            "the batch size may change only between epochs; resume an epoch_NNN.pt, or leave the flag out"
        )
    for key, value in given.items():
        if key not in SETTINGS and key not in RULED_ON_RESUME and saved.get(key, CONFIG[key]) != value:
            problems.append(
                f"{key} = {value!r}: this run was started with {saved.get(key, CONFIG[key])!r}, and a resumed run keeps it "
                f"({ALLOWED[key].kept}); leave the flag out, or start a new run with another --checkpoint-dir"
            )
    config = CONFIG | saved | given
    known = config_problems(CONFIG | saved)  # of a run that an earlier version began
    long_enough = {"epochs": max(config["epochs"], _fewest_epochs(CONFIG | saved, batch, done))}  # fewer are a problem above
    problems += [problem for problem in config_problems(config | long_enough) if problem not in known]
    if problems:
        raise ConfigError(problems)
    return config


def _begun(batch, done):
    """Return how many epochs have been begun."""
    return done + (1 if batch else 0)


def _fewest_epochs(saved, batch, done):
    """Return the fewest epochs that a resumed run can have: those begun, and those in which the rate rises."""
    return max(_begun(batch, done), math.ceil(saved["warmup_epochs"]))


def _problems_of_length(saved, given, batch, done):
    """Return the problems of `epochs` and of `swa_start_epoch`, which may move while it lies ahead; arguments as above."""
    begun, fewest = _begun(batch, done), _fewest_epochs(saved, batch, done)
    where, problems = f"the checkpoint lies {done} epochs and {batch} batches into its run", []
    epochs = given.get("epochs", fewest)
    if epochs < begun:
        problems.append(f"epochs = {epochs}: {where}; give at least {fewest}, or resume an earlier epoch_NNN.pt")
    elif epochs < fewest:
        problems.append(
            f"epochs = {epochs}: the rate still rises until warmup_epochs = {saved['warmup_epochs']:g}, which a resumed run "
            f"keeps; give at least {fewest}"
        )
    was = saved["swa_start_epoch"]
    start = given.get("swa_start_epoch", was)
    if start != was and 0 < was <= begun:
        problems.append(
            f"swa_start_epoch = {start}: {where}, which averages since epoch {was}; leave the flag out, or resume an earlier "
            "epoch_NNN.pt"
        )
    elif start != was and 0 < start <= begun:
        problems.append(f"swa_start_epoch = {start}: {where}; start later than epoch {begun}, or set it to 0 for no averaging")
    return problems
