"""Networks from files: a run's checkpoints, or weights alone with torchvision's keys."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from engine.run import checkpoint_files
from engine.system.errors import CheckpointError

KINDS = {"raw": "model", "averaged": "averaged_model", "ema": "ema_model"}  # name: where a checkpoint keeps them
IN_WORDS = {"raw": "raw weights", "averaged": "averaged weights", "ema": "running average"}


class Network(NamedTuple):
    """A network and what is known of it."""

    name: str  # file and kind of weights, for people
    path: Path
    kind: str  # of KINDS, or 'file' for weights alone
    model: torch.nn.Module
    config: dict
    classes: list | None  # None: weights alone do not tell
    class_names: dict  # {class: what people call it}, as far as known
    contents: dict  # of the checkpoint, without its tensors


def load_networks(path, kinds, defaults, build):
    """Return the Networks that a file holds.

    Args:
        kinds: 'all', 'auto' (the ones that scored best, if they are of the checkpoint's epoch; else averaged before raw ones),
            or one of KINDS.
        defaults: the configuration of weights alone, and of keys that a checkpoint does not know.
        build: function (config, number of classes) -> network on its device.
    Raises:
        CheckpointError: there is no such file, or it holds neither a checkpoint nor fitting weights.
    """
    path = Path(path)
    try:
        contents = checkpoint_files.read(path)
    except CheckpointError as error:
        try:
            weights = checkpoint_files.read_plain_weights(path)
        except CheckpointError as other:
            raise (other if path.suffix == ".safetensors" and path.exists() else error) from None
        return [_network_of_weights(path, weights, defaults, build)]
    there = [kind for kind, key in KINDS.items() if contents.get(key) is not None and contents[key].get("n_averaged", 1) > 0]
    if kinds == "auto":
        best = contents["best"]
        fallback = next(kind for kind in ("averaged", "ema", "raw") if kind in there)
        kinds = best["weights"] if best["epoch"] == contents["epoch"] and best["weights"] in there else fallback
    if kinds != "all" and kinds not in there:
        raise CheckpointError(f"{path} holds no {IN_WORDS[kinds]}; there are: {', '.join(there)}")
    config = defaults | contents["config"]
    facts = {key: value for key, value in contents.items() if key not in (*KINDS.values(), "optimizer", "sums", "rng")}
    networks = []
    for kind in there if kinds == "all" else [kinds]:
        model = build(config, len(contents["classes"]))
        model.load_state_dict(_without_prefix(contents[KINDS[kind]]))
        name = f"{path}, {IN_WORDS[kind]}"
        names = contents.get("class_names", {})
        networks.append(Network(name, path, kind, model, config, contents["classes"], names, facts))
    return networks


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
