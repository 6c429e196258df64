"""Networks from files: a run's checkpoints, or weights alone with torchvision's keys."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch

from engine.inference.class_matching import read_class_file
from engine.inference.weight_files import chosen_kinds, load_whole, read_checkpoint, read_weights, without_prefix
from engine.run.weights import WEIGHTS
from engine.system.device import choose_precision
from engine.system.errors import CheckpointError


class Network(NamedTuple):
    """A network and what is known of it."""

    name: str  # file and kind of weights, for people
    path: Path
    kind: str  # of WEIGHTS, 'file' for weights alone, 'mean' of several
    model: torch.nn.Module
    config: dict
    classes: list | None  # None: weights alone do not tell
    class_names: dict  # {class: what people call it}, as far as known
    checkpoint: dict  # without its tensors; empty for weights alone
    share: dict  # of a run whose validation images were a share of its folder: what they are known by; else empty


def class_labels(network):
    """Return the classes of a Network in the order of its outputs; their numbers as text where they are not known."""
    return network.classes or [str(number) for number in range(network.model.fc.out_features)]


def with_class_file(network, path):
    """Return a Network whose classes are those that a text file names; DataError as of read_class_file."""
    return network._replace(classes=read_class_file(path, network.model.fc.out_features))


def load_networks(path, kinds, defaults, build):
    """Return the Networks that a file holds.

    Args:
        kinds: of chosen_kinds.
        defaults: the configuration of weights alone, and of keys that a checkpoint does not know.
        build: function (config, number of classes) -> network on its device.
    Raises:
        CheckpointError: there is no such file, or it holds neither a checkpoint nor fitting weights.
    """
    path = Path(path)
    try:
        checkpoint, remarks = read_checkpoint(path)
    except CheckpointError as error:
        found = read_weights(path, error, kinds)
        _print_remarks(found.remarks)
        return [_network_of_weights(found, path, defaults, build)]
    _print_remarks(remarks)
    kinds = chosen_kinds(checkpoint, kinds, path)
    config = defaults | checkpoint["config"]
    tensors = {weights.checkpoint_key for weights in WEIGHTS.values()} | {"optimizer", "sums", "rng"}
    facts = {key: value for key, value in checkpoint.items() if key not in tensors}
    networks = []
    for kind in kinds:
        model, name = build(config, len(checkpoint["classes"])), f"{path}, {WEIGHTS[kind].in_words}"
        load_whole(model, without_prefix(checkpoint[WEIGHTS[kind].checkpoint_key]), name)
        names = checkpoint.get("class_names", {})
        share = _share_of_run(checkpoint)
        networks.append(Network(name, path, kind, model, config, checkpoint["classes"], names, facts, share))
    return networks


def _share_of_run(checkpoint):
    """Return the `share` of a checkpoint's Network; an older checkpoint does not tell for certain that there was one."""
    share, digests = checkpoint["config"].get("val_share"), checkpoint.get("share_digests", "not told")
    if not share or digests is None:
        return {}
    facts = {key: checkpoint.get(key) for key in ("train_images", "val_images", "share_digests", "classes")}
    return {"val_share": share} | facts


def _print_remarks(lines):
    for line in lines:
        print(line, file=sys.stderr)  # beside the results, whatever they are


def _network_of_weights(found, path, defaults, build):
    """Return the Network of a file with weights alone, of read_weights."""
    config, facts = defaults | found.network, found.facts
    if facts:
        config |= {"val_resolution": facts["resolution"], "val_crop_ratio": facts["crop_ratio"]}
    model = build(config, len(found.weights["fc.weight"]))
    try:
        model.load_state_dict(found.weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds no weights of a {config['architecture']}; --architecture names another") from error
    names, share = facts.get("class_names", {}), facts.get("share", {})
    return Network(found.name, path, found.kind, model, config, found.classes, names, {}, share)


def shared_precision(configs, device):
    """Return the precision of all of the runs as far as the device knows it; fp32 where they differ."""
    unknown = "fp16" if device.type == "cpu" else None
    asked = ["auto" if config["precision"] == unknown else config["precision"] for config in configs]
    chosen = {choose_precision({"precision": precision}, device) for precision in asked}
    return chosen.pop() if len(chosen) == 1 else "fp32"
