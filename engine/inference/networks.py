"""Networks from files: a run's checkpoints, or weights alone with torchvision's keys."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from engine.inference.class_matching import read_class_file
from engine.run import checkpoint_files
from engine.run.weights import PREFERENCE, WEIGHTS
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


def class_labels(network):
    """Return the classes of a Network in the order of its outputs; their numbers as text where they are not known."""
    return network.classes or [str(number) for number in range(network.model.fc.out_features)]


def with_class_file(network, path):
    """Return a Network whose classes are those that a text file names; DataError as of read_class_file."""
    return network._replace(classes=read_class_file(path, network.model.fc.out_features))


def load_networks(path, kinds, defaults, build):
    """Return the Networks that a file holds.

    Args:
        kinds: 'all', 'auto' (the ones that scored best, if they are of the checkpoint's epoch; else averaged before raw ones),
            or one of WEIGHTS.
        defaults: the configuration of weights alone, and of keys that a checkpoint does not know.
        build: function (config, number of classes) -> network on its device.
    Raises:
        CheckpointError: there is no such file, or it holds neither a checkpoint nor fitting weights.
    """
    path = Path(path)
    try:
        checkpoint = checkpoint_files.read(path)
    except CheckpointError as error:
        try:
            weights = checkpoint_files.read_plain_weights(path)
        except CheckpointError as other:
            raise (other if path.suffix == ".safetensors" and path.exists() else error) from None
        return [_network_of_weights(path, weights, defaults, build)]
    kinds = _chosen_kinds(checkpoint, kinds, path)
    config = defaults | checkpoint["config"]
    tensors = {weights.checkpoint_key for weights in WEIGHTS.values()} | {"optimizer", "sums", "rng"}
    facts = {key: value for key, value in checkpoint.items() if key not in tensors}
    networks = []
    for kind in kinds:
        model = build(config, len(checkpoint["classes"]))
        model.load_state_dict(_without_prefix(checkpoint[WEIGHTS[kind].checkpoint_key]))
        name = f"{path}, {WEIGHTS[kind].in_words}"
        names = checkpoint.get("class_names", {})
        networks.append(Network(name, path, kind, model, config, checkpoint["classes"], names, facts))
    return networks


def _chosen_kinds(checkpoint, kinds, path):
    """Return the list of the kinds of weights to take from a checkpoint; arguments as for load_networks."""
    states = {kind: checkpoint.get(weights.checkpoint_key) for kind, weights in WEIGHTS.items()}
    there = [kind for kind, state in states.items() if state is not None and state.get("n_averaged", 1) > 0]
    if kinds == "all":
        return there
    if kinds == "auto":
        best = checkpoint["best"]
        if best["epoch"] == checkpoint["epoch"] and best["weights"] in there:
            return [best["weights"]]
        return [next(kind for kind in PREFERENCE if kind in there)]
    if kinds not in there:
        raise CheckpointError(f"{path} holds no {WEIGHTS[kinds].in_words}; there are: {', '.join(there)}")
    return [kinds]


def _network_of_weights(path, weights, defaults, build):
    """Return the Network of a file with weights alone."""
    weights = _without_prefix(weights)
    if "fc.weight" not in weights:
        raise CheckpointError(f"{path} holds no weights of a ResNet with torchvision's keys")
    config = dict(defaults)
    classes, class_names = None, {}
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            facts = {name: json.loads(value) for name, value in (file.metadata() or {}).items() if name != "format"}
        if "blurs" in facts:  # written by --export
            config |= {"architecture": facts["architecture"], "val_resolution": facts["resolution"]}
            config |= {"val_crop_ratio": facts["crop_ratio"], "blur_pool": "BlurPool" in facts["blurs"]}
            config |= {"blur_max_pool": "blurred max-pool" in facts["blurs"]}
            classes, class_names = facts["classes"], facts["class_names"]
    model = build(config, len(weights["fc.weight"]))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f"{path} holds no weights of a {config['architecture']}; --architecture names another") from error
    return Network(str(path), path, "file", model, config, classes, class_names, {})


def _without_prefix(weights):
    """Return a state dict without the prefix that averages and DistributedDataParallel put before the keys."""
    return {key.removeprefix("module."): tensor for key, tensor in weights.items() if key != "n_averaged"}


def shared_precision(configs, device):
    """Return the precision of all of the runs as far as the device knows it; fp32 where they differ."""
    unknown = "fp16" if device.type == "cpu" else None
    asked = ["auto" if config["precision"] == unknown else config["precision"] for config in configs]
    chosen = {choose_precision({"precision": precision}, device) for precision in asked}
    return chosen.pop() if len(chosen) == 1 else "fp32"
