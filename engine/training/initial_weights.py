"""The weights that a new run begins with instead of random ones."""

from engine.inference.weight_files import BLURS, find_weights
from engine.preparation.val_share import share_digests

WORDS = {"architecture": "architecture"} | BLURS


def with_initial_weights(command):
    """Return (command, found, lines): the Command of a new run with the network of its initial weights, and those.

    What the weights' source tells of their network rules where no flag says otherwise. The lines are to be logged.

    Returns:
        found: FoundWeights, or None where the run begins with random ones.
    Raises:
        UserError: there are no such weights.
    """
    source = command.config["initial_weights"]
    if source == "none":
        freeze = command.config["freeze"]
        warning = f"WARNING: freeze = {freeze!r} without initial_weights: what is frozen are random weights, and stay random"
        return command, None, [warning] if freeze != "none" else []
    found, followed = find_weights(source, command.config["architecture"]), {}
    lines = list(found.remarks)
    for key, value in found.network.items():
        present = command.config[key]
        if key in command.given and value != present:
            lines.append(f"WARNING: {key} = {present!r}, but {found.name} are of a network with {WORDS[key]} {value!r}")
        elif value != present:
            followed[key] = value
            lines.append(f"{key} = {value!r}, as the initial weights have it")
    if not set(BLURS) <= set(found.network):
        lines.append(
            f"note: {found.name} does not tell whether its network blurs where it strides; taken for one with "
            + " and ".join(f"{key} = {command.config[key]}" for key in BLURS)
        )
    return command._replace(config=command.config | followed, given=command.given | followed), found, lines


def remarks_on_share(found, splits):
    """Return lines to log where initial weights may have been trained on images that val_share now validates on."""
    digests = share_digests(splits)
    if None in (found, digests) or found.share_digests in (None, digests) or found.classes != splits["train"].classes:
        return []
    return [
        f"WARNING: {found.name} were trained on another share of images of these classes. If that was in this folder, some of "
        "them validate now, and the accuracy is too high. Take the val_share of then, and no image away"
    ]
