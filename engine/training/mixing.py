"""What a batch goes through as a whole before the network sees it: ColOut, mixup, cutmix."""

import torch
from torchvision.transforms import v2

from engine.system.micro_batches import network_px


def build_mixing(config, num_classes):
    """Return the function (images [B, 3, H, W], labels int64 [B]) -> (images, targets) that a batch goes through.

    ColOut (see drop_rows_and_columns) comes first. Then mixup (arXiv:1710.09412) blends each image with another, cutmix
    (arXiv:1905.04899) pastes a box of another into it; with both, each batch gets one of them by chance, and targets become
    float [B, C]. Without either, labels stay as they are. All draw from torch's random state on the CPU, which checkpoints
    keep and each rank has for itself, and never wait for the device.
    """
    mix = _build_mixup_and_cutmix(config, num_classes)
    if not config["colout"]:
        return mix
    return lambda images, labels: mix(drop_rows_and_columns(images, config), labels)


def _build_mixup_and_cutmix(config, num_classes):
    mixers = []
    if config["mixup_alpha"]:
        mixers.append(_in_channels_last(v2.MixUp(alpha=config["mixup_alpha"], num_classes=num_classes)))
    if config["cutmix_alpha"]:
        mixers.append(v2.CutMix(alpha=config["cutmix_alpha"], num_classes=num_classes))
    if not mixers:
        return lambda images, labels: (images, labels)
    return v2.RandomChoice(mixers)


def _in_channels_last(mixup):
    """Return mixup for images [B, 3, H, W] in channels-last: its roll would lay them out anew, so it gets [B, H, W, 3]."""

    def mix(images, labels):
        mixed, targets = mixup(images.permute(0, 2, 3, 1), labels)
        return mixed.permute(0, 3, 1, 2), targets

    return mix


def drop_rows_and_columns(images, config):
    """Return a batch without rows and columns drawn at random, the same in all its images: ColOut by batch.

    MosaicML's (Composer 0.7.1, method card ColOut). The rows kept are joined from slices: an index would have to be copied to
    the device. Each rank draws its own.

    Args:
        images: [B, 3, H, W] in channels-last, as is the result, [B, 3, network_px(H), network_px(W)].
        config: `colout` is the share dropped of each side.
    """
    images = images.permute(0, 2, 3, 1)  # torch.cat joins slices of this layout in one kernel
    for dim in (1, 2):
        runs = draw_kept_runs(images.shape[dim], network_px(config, images.shape[dim]))
        images = torch.cat([images.narrow(dim, first, length) for first, length in runs], dim)
    return images.permute(0, 3, 1, 2)


def draw_kept_runs(px, kept):
    """Return (first, length) of each unbroken run of `kept` rows or columns out of `px`, drawn without repetition, in order."""
    dropped = sorted(torch.randperm(px)[kept:].tolist())
    firsts, ends = [0, *(number + 1 for number in dropped)], [*dropped, px]
    return [(first, end - first) for first, end in zip(firsts, ends, strict=True) if first < end]
