"""Weights from files of this program and of others, and from torchvision: by torchvision's keys, and what is known of them."""

import argparse
import re
import zipfile
from pathlib import Path
from typing import NamedTuple

import torch

from engine.preparation.names import some
from engine.run import checkpoint_files
from engine.run.checkpoint_folder import all_finite
from engine.run.weights import PREFERENCE, WEIGHTS
from engine.system.errors import CheckpointError, UserError, first_line
from engine.system.files import readable_name
from engine.system.plain_json import parse_json

TORCHVISION = "torchvision:"
NESTED = ("state_dict", "model")  # where timm's and torchvision's training scripts keep the weights in their checkpoints
NESTED_AVERAGES = ("model_ema", "state_dict_ema")  # and the running average of them
PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")  # of averages and DistributedDataParallel, and of torch.compile
NEEDED = ("config", "classes", "epoch", "batch", "best", "train_images")  # of a checkpoint, to use its weights
BLURS = {"blur_pool": "BlurPool", "blur_max_pool": "blurred max-pool"}  # key: its name in exports


class FoundWeights(NamedTuple):
    """Weights and what their source tells of them."""

    name: str  # in words
    weights: dict  # {torchvision's key: tensor}
    network: dict  # architecture, blur_pool, blur_max_pool, as far as they are told
    classes: list | None
    facts: dict = {}  # an export's
    share_digests: dict | None = None  # of the images of a run with val_share
    remarks: tuple = ()  # lines for the user
    kind: str = "file"  # or 'ema', the running average in another program's checkpoint


def find_weights(source, architecture):
    """Return the FoundWeights that config['initial_weights'] names.

    Args:
        source: path of a file, with :raw, :averaged or :ema behind that of a checkpoint, or :ema behind that of another
            program's; or torchvision:NAME.
        architecture: of the network that they are for.
    Raises:
        UserError: there are no such weights.
    """
    if source.startswith(TORCHVISION):
        return _of_torchvision(source.removeprefix(TORCHVISION), architecture)
    path, _, kind = source.rpartition(":")
    if not path or kind not in WEIGHTS:
        path, kind = source, "auto"
    try:
        checkpoint, remarks = read_checkpoint(path)
    except CheckpointError as error:
        if kind not in ("auto", "ema"):
            raise
        found = read_weights(path, error, kind)
        if kind == "ema" and found.kind != "ema":
            raise CheckpointError(f"{path} holds no running average ({' or '.join(NESTED_AVERAGES)})") from error
        return found
    (kind,) = chosen_kinds(checkpoint, kind, path)
    network = {key: checkpoint["config"][key] for key in ("architecture", *BLURS) if key in checkpoint["config"]}
    weights = without_prefix(checkpoint[WEIGHTS[kind].checkpoint_key])
    in_words, digests = f"{path}, {WEIGHTS[kind].in_words}", checkpoint.get("share_digests")
    return FoundWeights(in_words, weights, network, checkpoint["classes"], share_digests=digests, remarks=remarks)


def read_checkpoint(path):
    """Return (contents, remarks) of a run's checkpoint, also of one that was saved again with torch.save, unsealed.

    People do that to share a smaller file, without the optimizer's state.

    Raises:
        CheckpointError: as of checkpoint_files.read; or what its weights cannot be used without is no longer there.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; {checkpoint_files.what_is_there(path)}: name a file in it")
    try:
        return checkpoint_files.read(path), ()
    except checkpoint_files.NotSealedError as error:
        contents = _contents_or_none(path)
        if not _is_checkpoint(contents) or (zipfile.is_zipfile(path) and zipfile.ZipFile(path).comment):
            raise  # something else, or a seal that is damaged
        checkpoint_files.require_known_version(contents, path)
        _require_undamaged(path)
        kinds = [weights.checkpoint_key for weights in WEIGHTS.values()]
        missing = [key for key in NEEDED if key not in contents] + ["weights"] * (not any(map(contents.get, kinds)))
        if missing:
            raise CheckpointError(
                f"{path} is a checkpoint of this program that was saved again without its {', '.join(missing)}: take the "
                "original, or what evaluate.py --export makes of it"
            ) from error
    return contents, (f"WARNING: {path} was saved again by something else: what it says of its run and network is believed",)


def _contents_or_none(path):
    """Return what torch has saved in a file, None where that cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever is wrong with it, others say
        return None


def _is_checkpoint(contents):
    return isinstance(contents, dict) and contents.get("format") == checkpoint_files.FORMAT


def chosen_kinds(checkpoint, kinds, path):
    """Return the list of the kinds of weights to take from a checkpoint.

    Args:
        kinds: 'all', 'auto' (the ones that scored best, if the checkpoint has those; else averaged before raw ones),
            or one of WEIGHTS.
        path: of the checkpoint, for messages.
    """
    states = {kind: checkpoint.get(weights.checkpoint_key) for kind, weights in WEIGHTS.items()}
    there = [kind for kind, state in states.items() if state is not None and state.get("n_averaged", 1) > 0]
    if kinds == "all":
        return there
    if kinds == "auto":
        best = checkpoint["best"]["weights"]
        if has_best_weights(checkpoint) and best in there:
            return [best]
        return [next(kind for kind in PREFERENCE if kind in there)]
    if kinds not in there:
        raise CheckpointError(f"{path} holds no {WEIGHTS[kinds].in_words}; there are: {', '.join(there)}")
    return [kinds]


def has_best_weights(checkpoint):
    """Return whether a checkpoint's weights are of the epoch that scored best, and were not trained on since."""
    return 0 < checkpoint["best"]["epoch"] == checkpoint["epoch"] and checkpoint["batch"] == 0


def read_weights(path, no_checkpoint=None, kind="auto"):
    """Return the FoundWeights of a file with weights alone, or of another program's checkpoint.

    Args:
        no_checkpoint: the error to raise, where it says more, if the file holds no weights either.
        kind: 'ema' takes the running average out of another program's checkpoint, if that has one.
    """
    path = Path(path)
    try:
        weights, average = _read_tensors(path, kind == "ema", no_checkpoint)
    except CheckpointError as error:
        if error is no_checkpoint or no_checkpoint is None or (path.suffix == ".safetensors" and path.exists()):
            raise
        if isinstance(no_checkpoint, checkpoint_files.NotSealedError):
            raise CheckpointError(
                f"{error}; if it was a checkpoint of this program, it is damaged or cut short: its checksum is missing"
            ) from error
        raise no_checkpoint from error
    facts = _facts_of_export(path, weights)
    network = {}
    if facts:
        network = {"architecture": facts["architecture"]} | {key: name in facts["blurs"] for key, name in BLURS.items()}
    weights = without_prefix(weights)
    if "fc.weight" not in weights or weights["fc.weight"].ndim != 2:
        raise CheckpointError(f"{path} holds no weights of a ResNet with torchvision's keys: {some(list(weights), 3)}")
    if bad := [key for key, tensor in weights.items() if not all_finite(tensor)]:
        raise CheckpointError(f"{path} holds numbers that are not finite: {some(bad, 3)}; damaged, or of a run that diverged")
    digests = facts.get("share", {}).get("share_digests")
    found = FoundWeights(str(path), weights, network, facts.get("classes"), facts, digests)
    if average and kind == "ema":
        return found._replace(name=f"{path}, {WEIGHTS['ema'].in_words}", kind="ema")
    note = f"note: {path} also holds a running average ({average}): evaluate.py --weights ema or initial_weights {path}:ema"
    return found._replace(remarks=(note,)) if average else found


def _read_tensors(path, take_average=False, no_checkpoint=None):
    """Return the state dict that a file holds, by itself or nested, and the key of the running average beside it, or None.

    Args:
        take_average: return the running average, where there is one.
        no_checkpoint: as of read_weights.
    """
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path} is no regular file")  # of a pipe there is nothing to wait for
    if path.suffix == ".safetensors":
        return checkpoint_files.read_plain_weights(path), None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments that training scripts save beside them
            contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        if "GLOBAL" in str(error):
            raise CheckpointError(
                f"{path} holds pickled objects, which could run any code and are not loaded: save the network's state_dict()"
            ) from error
        why = "torch.save has not written it, or it is damaged" if "weights_only" in str(error) else first_line(error)
        raise CheckpointError(f"{path} holds no weights: {why}") from error
    if _is_checkpoint(contents):
        raise no_checkpoint or CheckpointError(f"{path} is a checkpoint of this program")
    _require_undamaged(path)
    nested = contents if isinstance(contents, dict) else {}
    average = next((key for key in NESTED_AVERAGES if isinstance(nested.get(key), dict)), None)
    for key in [average] if average and take_average else NESTED:
        if isinstance(contents, dict) and isinstance(contents.get(key), dict):
            contents = contents[key]
    if not isinstance(contents, dict) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in contents.items()
    ):
        raise CheckpointError(f"{path} holds something else than weights")
    return contents, average


def _require_undamaged(path):
    """Raise CheckpointError if some of the checksums of torch.save's archive are wrong; where all are, it was saved without."""
    if not zipfile.is_zipfile(path):  # of torch before 1.6
        return
    wrong = []
    with zipfile.ZipFile(path) as archive:
        members = [member for member in archive.infolist() if member.file_size]
        for member in members:
            try:
                with archive.open(member) as file:
                    while file.read(1 << 20):
                        pass
            except zipfile.BadZipFile:
                wrong.append(member.filename)
    if len(wrong) not in (0, len(members)):
        raise CheckpointError(f"{path} is damaged: the checksum of {some(wrong, 3)} does not match")


def _facts_of_export(path, weights):
    """Return the facts that evaluate.py --export has put into a file, {} where another program has written it."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with readable_name(path) as name, safe_open(name, "pt") as file:
            facts = {name: value for name, value in (file.metadata() or {}).items() if name != "format"}
    else:
        facts = getattr(weights, "_metadata", {}).get("", {}).get("facts", {})
    if not {"architecture", "blurs"} <= facts.keys():
        return {}
    try:
        return {name: parse_json(value) for name, value in facts.items()}
    except ValueError:  # names like ours
        return {}


def without_prefix(weights):
    """Return a state dict without the prefixes that averages, DistributedDataParallel and torch.compile put before the keys."""
    return {PREFIXES.sub("", key): tensor for key, tensor in weights.items() if key != "n_averaged"}


def _of_torchvision(name, architecture):
    """Return the FoundWeights of torchvision's own pretrained network, which are downloaded unless they are in its cache."""
    import torchvision

    known = torchvision.models.get_model_weights(architecture)
    if name not in known.__members__:
        raise UserError(f"initial_weights = {TORCHVISION}{name}: of {architecture} there are {', '.join(known.__members__)}")
    try:
        weights = known[name].get_state_dict(progress=False, check_hash=True)
    except (OSError, RuntimeError) as error:  # urllib's errors are OSErrors
        raise UserError(
            f"initial_weights = {TORCHVISION}{name} cannot be had ({first_line(error)}): fetch {known[name].url} where there "
            "is a network, and name the file"
        ) from error
    network = {"architecture": architecture} | dict.fromkeys(BLURS, False)
    return FoundWeights(f"torchvision's {architecture}, {name}", weights, network, None)


# Into a network ------------------------------------------------------------------------------------------------------


def load_weights(model, found, classes):
    """Load FoundWeights into a network, all but a last layer for other classes; return lines on what was done.

    Args:
        classes: of the network's outputs.
    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; names the first.
    """
    own, weights = model.state_dict(), dict(found.weights)
    lines = [f"initial weights: {found.name}"]
    there = len(weights["fc.weight"])
    if there != len(classes) or found.classes not in (None, classes):
        why = f"{there:,} classes there, {len(classes):,} here" if there != len(classes) else "other classes there"
        lines.append(f"the last layer begins anew ({why})")
        weights |= {key: own[key] for key in ("fc.weight", "fc.bias")}
    if problems := _differences(own, weights):
        raise CheckpointError(f"{found.name} holds weights of another network; {problems}; see --architecture")
    model.load_state_dict({key: weights.get(key, tensor) for key, tensor in own.items()})
    return lines


def load_whole(model, weights, name):
    """Load all weights of a checkpoint into a network.

    Args:
        name: of the checkpoint, in words.
    Raises:
        CheckpointError: they are not those of this network; names the first that differ.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{name} holds weights of another network than model.py builds; {_differences(model.state_dict(), weights)}. "
            "model.py must be what it was when the run began"
        ) from error


def _differences(own, weights):
    """Return in words how weights differ from a network's own by name or shape, with the first of each; '' if they do not."""
    missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]  # torch < 0.4.1 has none
    unknown = [key for key in weights if key not in own]
    shapes = [
        f"{key} {list(weights[key].shape)} in place of {list(own[key].shape)}"
        for key in own
        if key in weights and weights[key].shape != own[key].shape
    ]
    differing = ("of another shape", shapes), ("missing", missing), ("unknown", unknown)
    return "; ".join(f"{what}: {some(names, 3)}" for what, names in differing if names)
