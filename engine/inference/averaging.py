"""One network whose weights are the mean of several networks' weights."""

import contextlib
import functools
import itertools

import torch

from engine.data.batches import training_requests
from engine.inference.batch_norm import recompute_bn_stats, remark_on_left_out
from engine.inference.freezing import freeze, least_frozen
from engine.inference.images import open_loader
from engine.inference.weight_files import BLURS
from engine.system.device import autocast
from engine.system.errors import UserError
from engine.system.gpu_memory import retry_pass_on_oom

SAME_KEYS = {"architecture": "architecture"} | BLURS  # key: in words


def refuse_to_average(networks):
    """Raise UserError unless the networks are the same but for the numbers in their weights."""
    first = networks[0]
    for other in networks[1:]:
        for key, words in SAME_KEYS.items():
            if first.config[key] != other.config[key]:
                values = f"{first.path} has {words} {first.config[key]}, {other.path} {other.config[key]}"
                raise UserError(f"--average: {values}; only the weights of one network have a mean. Without it they vote")
        if None not in (first.classes, other.classes) and first.classes != other.classes:
            raise UserError(f"--average: {first.path} and {other.path} were trained on different classes")
        shapes, others = ({k: t.shape for k, t in n.model.state_dict().items()} for n in (first, other))
        if differing := [key for key in shapes | others if shapes.get(key) != others.get(key)]:
            raise UserError(f"--average: {first.path} and {other.path} differ in {len(differing)} keys, as in {differing[0]}")


def average_networks(networks, splits, device):
    """Return one Network whose weights are the mean of the others', with batch-norm statistics of its own.

    Args:
        networks: what refuse_to_average has let through; the first one's model gets the mean.
        splits: with the training images that give the statistics, as the last epoch of the networks saw them.
    """
    first = networks[0]
    first.model.load_state_dict(mean_of_weights([network.model.state_dict() for network in networks]))
    freeze(first.model, least_frozen(network.config for network in networks))  # norms that all froze keep their statistics
    epoch = max(network.checkpoint.get("epoch", 1) for network in networks) - 1
    recompute = functools.partial(recompute_bn_stats, first.model, autocast=autocast(device, first.config["precision"]))
    with contextlib.closing(open_loader(splits, first.config, device)) as loader:

        def batches():
            requests = training_requests(splits["train"], first.config, epoch)
            return loader.training(itertools.islice(requests, first.config["swa_batch_norm_batches"]), set())

        left_out, count = retry_pass_on_oom(recompute, batches, first.config["batch_size"], device)
    for line in remark_on_left_out(int(left_out), count):
        print(line)
    name = f"mean of the weights of {' and '.join(network.name for network in networks)}"
    members = [network._replace(model=None) for network in networks]
    return first._replace(name=name, kind="mean", checkpoint=first.checkpoint | {"members": members})


def mean_of_weights(states):
    """Return the state dict of the means of several; what is no floating-point tensor is the first one's."""
    return {
        key: torch.stack([state[key] for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for key, tensor in states[0].items()
    }
