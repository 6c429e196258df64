"""Which keys a resumed run may change."""

from config import CONFIG, SETTINGS
from engine.cli.keys import ALLOWED, ConfigError, config_problems

# A resumed run goes on with the checkpoint's configuration. SETTINGS may change, hyperparameters are kept, and these follow a
# rule, which the run carries out and logs:
RULED_ON_RESUME = {
    "epochs": "the learning-rate schedule is rebuilt over the new length; the steps done keep their place in it",
    "batch_size": "only between epochs, since a position inside one is counted in batches",
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
    problems, saved = [], with_keys_of_today(saved)
    given = {key: value for key, value in given.items() if value != "auto" or key != "learning_rate"}  # found already
    begun = done + (1 if batch else 0)
    if given.get("epochs", begun) < begun:
        problems.append(
            f"epochs = {given['epochs']}: the checkpoint lies {done} epochs and {batch} batches into its run; give at least "
            f"{begun}, or resume an earlier epoch_NNN.pt"
        )
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
    problems += [problem for problem in config_problems(config) if problem not in known]
    if problems:
        raise ConfigError(problems)
    return config
