"""What a batch goes through as a whole before the network sees it: mixup and cutmix."""

from torchvision.transforms import v2


def build_mixing(config, num_classes):
    """Return the function (images [B, 3, H, W], labels int64 [B]) -> (images, targets) that a batch goes through.

    Mixup (arXiv:1710.09412) blends each image with another, cutmix (arXiv:1905.04899) pastes a box of another into it; with
    both, each batch gets one of them by chance. Targets become float [B, C]. It draws from torch's random state on the CPU,
    which checkpoints keep, and never waits for the device. Without either, labels stay as they are.
    """
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
