"""Keys that count only where others have certain values, and notes on those that were given in vain."""

from engine.system.files import SCHEMES


def _one_of(*words):
    return ", ".join(words[:-1]) + " or " * (len(words) > 1) + words[-1], lambda value: value in words


def _not(word):
    return f"other than {word}", lambda value: value != word


ABOVE_0 = "above 0", lambda value: value > 0
TRUE = "true", lambda value: value is True
A_URL = "a URL", lambda value: value.startswith(SCHEMES)

# {key: {other key: (what it must be, in words; whether a value is that)}}. A key in vain is no error: the same flags may be
# meant for several recipes. What is refused is not here: nesterov.
ONLY_WITH = {
    "zero_init_residual": {"initial_weights": _one_of("none")},
    "resolution_step": {"start_resolution": ABOVE_0},
    "resolution_ramp_start": {"start_resolution": ABOVE_0},
    "resolution_ramp_end": {"start_resolution": ABOVE_0},
    "randaugment_ops": {"augmentation": _one_of("randaugment", "composer_randaugment")},
    "randaugment_magnitude": {"augmentation": _one_of("randaugment", "composer_randaugment")},
    "adamw_learning_rate": {"optimizer": _one_of("muon")},
    "backbone_rate_factor": {"freeze": _not("layer4")},
    "momentum": {"optimizer": _one_of("sgd", "sgdw", "muon")},
    "decay_norms_and_biases": {"weight_decay": ABOVE_0},
    "sam_every_steps": {"sam_rho": ABOVE_0},
    "step_epochs": {"schedule": _one_of("step")},
    "step_factor": {"schedule": _one_of("step")},
    "onecycle_anneal": {"schedule": _one_of("onecycle")},
    "onecycle_div_factor": {"schedule": _one_of("onecycle")},
    "onecycle_final_div_factor": {"schedule": _one_of("onecycle")},
    "swa_learning_rate": {"swa_start_epoch": ABOVE_0},
    "swa_anneal_epochs": {"swa_start_epoch": ABOVE_0, "swa_learning_rate": ABOVE_0},
    "swa_batch_norm_batches": {"swa_start_epoch": ABOVE_0},
    "ema_every_images": {"ema_half_life_images": ABOVE_0},
    "local_data_dir": {"data_dir": A_URL},
    "keep_checkpoints": {"checkpoint_every_epochs": ABOVE_0},
    "spot_notice_url": {"spot_notice": TRUE},
}


def notes_on_unused(config, given):
    """Return a line for each given key that has no effect in a configuration.

    Args:
        given: the keys that flags on the command line name.
    """
    return [
        f"{key} is not used: it counts with " + " and ".join(f"{other} {words}" for other, (words, _) in needs.items())
        for key, needs in ONLY_WITH.items()
        if key in given and not all(holds(config[other]) for other, (_, holds) in needs.items())
    ]
