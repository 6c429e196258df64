"""ResNet-50 (v1.5: the stride sits in the 3x3 convolution), as torchvision defines it.

Source: arXiv:1512.03385; torchvision.models.resnet, whose state-dict keys it keeps, so that weights interchange.
"""

import torch
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

LAYERS = {
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
}


def build_model(config, num_classes):
    """Return a freshly initialised network in channels-last format, on the CPU, its weights drawn from config['seed'].

    Convolutions get He initialisation (fan-out), norms weight 1 and bias 0; with `zero_init_residual` the last norm of
    each block starts at weight 0. Input: float [B, 3, H, W] of any size from 32 px; output: logits [B, num_classes].
    """
    block, layers = LAYERS[config["architecture"]]
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        torch.manual_seed(config["seed"])
        model = ResNet(block, layers, num_classes=num_classes, zero_init_residual=config["zero_init_residual"])
    return model.to(memory_format=torch.channels_last)
