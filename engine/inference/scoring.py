"""Loss and accuracy of networks on every validation image, each counted once."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from engine.inference.confusion import count_confusions, count_each
from engine.system.distributed import all_reduce_sum
from engine.system.errors import DataError
from engine.system.gpu_memory import retry_in_parts_on_oom

ENSEMBLE = "ensemble"
UNEVEN = 2  # the largest class has more than so many times the images of the smallest; on ImageNet-1K 1.8
SEEN_CLASSES = 5
TOP = (1, 5)


class Seen(NamedTuple):
    """What a network sees in N images, on the CPU."""

    shares: torch.Tensor  # float32 [N, min(5, C)], probabilities of the most probable classes, the most probable first
    classes: torch.Tensor  # int64 [N, min(5, C)], which these are
    of_label: torch.Tensor  # float32 [N], probability of the label


def are_uneven(images):
    """Return whether a split's classes differ in their numbers of images so much that one accuracy hides it."""
    counts = np.bincount(images.labels, minlength=len(images.classes))
    return bool(counts.max() > UNEVEN * counts.min())


@torch.inference_mode()
def evaluate(
    models,
    device_batches,
    num_images,
    context,
    flip=False,
    ensemble=False,
    confusions_of=None,
    by_class=False,
    logits_of=(),
):
    """Return {name: {'loss', 'top1', 'top5', 'images'}} of each model; the images are read once for all.

    Of several processes each scores its own images, and all return the figures of all images.

    Args:
        models: {name: network}; put into evaluation mode.
        device_batches: yields (images [B, 3, H, W] ready for the network, labels int64 [B]); B may be 0.
        num_images: how many images there must be, over all processes.
        context: autocast of the precision.
        flip: also score the mean of the logits of each image and of its mirror image, as 'flip_loss', 'flip_top1', 'flip_top5'.
        ensemble: also score the mean of the models' probabilities, as a further name, 'ensemble'.
        confusions_of: name whose result gets 'confusions' too, of count_confusions, and 'seen', every image's Seen in order.
        by_class: also give 'balanced_top1', the mean of the classes' accuracies, and 'class_top1', those, None without images.
        logits_of: names whose results get this process's 'logits', float32 [N, C] on the CPU in the order of the images.
    Returns:
        loss: mean cross-entropy without label smoothing; top1 and, of more than five classes, top5: percent.
    Raises:
        DataError: another number of images came.
        TrainingStopped: the GPU's memory does not suffice for a single image; batches that do not fit are scored in parts.
    """
    for model in models.values():
        model.eval()
    sums_in_parts = retry_in_parts_on_oom(
        lambda images, labels: _sums(
            _logits_by_view(models, images, context, flip, ensemble), labels, confusions_of, by_class, logits_of
        )
    )
    totals, count, seen, logits = {}, 0, [], {name: [] for name in logits_of}
    for images, labels in device_batches:
        for sums, seen_in_part in sums_in_parts(images, labels):
            seen += seen_in_part
            for name, kept in logits.items():
                kept.append(sums.pop((name, "logits")))
            totals = {key: totals.get(key, 0) + value for key, value in sums.items()}
        count += len(labels)
    count = int(all_reduce_sum(torch.tensor(count)))
    if count != num_images:
        raise DataError(f"{count} images evaluated, {num_images} expected: an accuracy is never that of fewer or more images")
    confusions, results = totals.pop((confusions_of, "confusions"), None), {}
    of_classes = {name: _class_accuracies(totals.pop((name, "classes"))) for name, what in list(totals) if what == "classes"}
    for (name, view), total in totals.items():
        loss, *hits = (all_reduce_sum(total) / count).tolist()
        results.setdefault(name, {"images": count})
        results[name] |= {f"{view}loss": loss} | {f"{view}top{k}": 100 * share for k, share in zip(TOP, hits, strict=False)}
    for name, figures in of_classes.items():
        results[name] |= figures
    for name, kept in logits.items():
        results[name]["logits"] = torch.cat(kept)
    if confusions_of is not None:
        results[confusions_of]["confusions"] = confusions
        results[confusions_of]["seen"] = Seen(*(torch.cat(parts) for parts in zip(*seen, strict=True)))
    return results


def scores_of_logits(logits, labels, classes=None):
    """Return evaluate()'s figures of logits [N, C] that are there already, of which so many count; default all."""
    count = len(labels)
    hits = zip(TOP, _hits(logits, labels_to_hit(logits, labels), classes or logits.shape[1]), strict=False)
    return {"images": count, "loss": F.cross_entropy(logits, labels).item()} | {
        f"top{k}": 100 * n.item() / count for k, n in hits
    }


def _hits(logits, known, classes):
    """Return the numbers of images hit, of labels_to_hit(), for each k of TOP that tells anything: among so many all are."""
    return [topk_correct(logits, known, k) for k in TOP if k < classes or k == 1]


def _logits_by_view(models, images, context, flip, ensemble):
    """Yield ('', {name: logits [B, C]}) and, with flip, ('flip_', the same of image and mirror image)."""
    with context:
        plain = {name: model(images).float() for name, model in models.items()}
        mirrored = {name: model(images.flip(3)).float() for name, model in models.items()} if flip else {}
    views = {"": plain}
    if flip:
        views["flip_"] = {name: (plain[name] + mirrored[name]) / 2 for name in models}
    for view, logits_of in views.items():
        if ensemble:
            logits_of = logits_of | {ENSEMBLE: log_mean_probabilities(logits_of.values())}
        yield view, logits_of


def log_mean_probabilities(logits):
    """Return the logarithm of the mean of the softmax of several logits [B, C]: logits whose softmax that mean is."""
    logs = torch.stack([F.log_softmax(of_one, dim=1) for of_one in logits])
    return logs.logsumexp(dim=0) - math.log(len(logs))  # finite where each probability underflows to 0


def _class_accuracies(hits):
    """Return the figures of evaluate()'s by_class from this process's int64 [C, 2]: wrong and right images of each class."""
    wrong, right = all_reduce_sum(hits).double().cpu().unbind(1)
    accuracies = 100 * right / (wrong + right)  # NaN without images
    of_each = [None if math.isnan(value) else value for value in accuracies.tolist()]
    return {"balanced_top1": accuracies.nanmean().item(), "class_top1": of_each}


def _sums(logits_by_view, labels, confusions_of, by_class, kept):
    """Return (sums, seen) of some images: {(name, view): float64 [K] of the loss and the _hits}, and [].

    With confusions_of also {(confusions_of, 'confusions'): int64 [C, C]} and a list with the Seen of the images, by_class
    {(name, 'classes'): int64 [C, 2]}, and of the names in kept {(name, 'logits'): float32 [B, C] on the CPU}.
    """
    sums, seen = {}, []
    for view, logits_of in logits_by_view:
        for name, logits in logits_of.items():
            loss = F.cross_entropy(logits, labels, reduction="sum")
            known = labels_to_hit(logits, labels)
            sums[name, view] = torch.stack([loss, *_hits(logits, known, logits.shape[1])]).double()
            if view == "" and name in kept:
                sums[name, "logits"] = on_its_way(logits)
            if view == "" and by_class:
                right, classes = (logits.argmax(dim=1) == known).long(), logits.shape[1]
                sums[name, "classes"] = count_each(2 * labels + right, 2 * classes).view(classes, 2)
        if view == "" and confusions_of is not None:
            sums[confusions_of, "confusions"] = count_confusions(logits_of[confusions_of], labels)
            seen.append(seen_in(logits_of[confusions_of], labels))
    return sums, seen


def seen_in(logits, labels):
    """Return the Seen of logits [B, C] and labels int64 [B]."""
    shares = logits.float().softmax(dim=1)
    best = shares.topk(min(SEEN_CLASSES, logits.shape[1]), dim=1)
    return Seen(*map(on_its_way, (best.values, best.indices, shares.gather(1, labels[:, None])[:, 0])))


def on_its_way(tensor):
    """Return the tensor on the CPU; of a GPU's nothing may be read before the host has waited for it, as for the sums."""
    return tensor.to("cpu", non_blocking=True)  # into pinned memory, as PyTorch has it


def labels_to_hit(logits, labels):
    """Return the labels int64 [B], -1 where a logit is NaN: such a network guesses nothing, but torch orders NaN first."""
    return labels.masked_fill(logits.isnan().any(dim=1), -1)


def topk_correct(logits, labels, k):
    """Count the images whose label is among the k highest logits.

    Args:
        logits: float [B, C].
        labels: int64 [B], each in [0, C), or -1 for none.
        k: at most C counts.
    Returns:
        int64 scalar on the device of logits; a sum, so that batches add exactly.
    """
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).sum()
