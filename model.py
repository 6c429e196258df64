"""ResNet-50 (v1.5: the stride sits in the 3x3 convolution), as torchvision defines it.

Source: arXiv:1512.03385; torchvision.models.resnet, whose state-dict keys it keeps, so that weights interchange.
"""

import torch
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.ops import stochastic_depth

from engine.system.random_state import drawing_from
from engine.training.activation_checkpointing import with_activation_checkpointing
from engine.training.loss import start_bias_for
from engine.training.sync_batch_norm import synced_batch_norm

LAYERS = {  # the names that --architecture admits stand in engine/cli/keys.py
    "resnet18": (BasicBlock, [2, 2, 2, 2]),
    "resnet34": (BasicBlock, [3, 4, 6, 3]),
    "resnet50": (Bottleneck, [3, 4, 6, 3]),
    "resnet101": (Bottleneck, [3, 4, 23, 3]),
}


def build_model(config, num_classes, device="cpu"):
    """Return a freshly initialised network in channels-last format on a device, its weights drawn from config['seed'].

    Convolutions get Kaiming's normal initialisation by fan-out, norms weight 1 and bias 0, or what draw_by_fan_in says; with
    `zero_init_residual` the last norm of each block starts at weight 0.
    Input: float [B, 3, H, W] of any size from 32 px; output: logits [B, num_classes].
    With `blur_pool` the strided convolutions blur their input; the state-dict keys stay the same.
    """
    block, layers = LAYERS[config["architecture"]]
    block = with_activation_checkpointing(block, config["memory"])
    with drawing_from(config["seed"]):  # the caller's random state stays as it was
        zero_init, norm = config["zero_init_residual"], None
        if config["sync_batch_norm"]:
            norm = synced_batch_norm(torch.device(device))
        model = ResNet(block, layers, num_classes=num_classes, zero_init_residual=zero_init, norm_layer=norm)
        if config["initialization"] == "fan_in":
            draw_by_fan_in(model, zero_init)
    torch.nn.init.constant_(model.fc.bias, start_bias_for(config["loss"], num_classes))
    drop_blocks_by_chance(model, config["stochastic_depth"])
    if config["blur_pool"]:
        blur_before_strides(model)
    if config["blur_max_pool"]:
        model.maxpool = BlurredMaxPool2d(channels=64)
    return model.to(device, memory_format=torch.channels_last)


def draw_by_fan_in(model, zero_init_residual):
    """Draw the weights anew as MosaicML's recipes do.

    Convolutions and the last layer: normal by fan-in (arXiv:1502.01852); norms: weight uniform in [0, 1], bias 0.
    """
    for module in model.modules():
        if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
            torch.nn.init.kaiming_normal_(module.weight)
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            torch.nn.init.uniform_(module.weight)
    for norm in last_norms(model) if zero_init_residual else ():
        torch.nn.init.zeros_(norm.weight)


def last_norms(model):
    """Return the last batch norm of each residual block, in order."""
    blocks = [block for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for block in layer]
    return [block.bn3 if isinstance(block, Bottleneck) else block.bn2 for block in blocks]


def _blur_filter(channels):
    """Return the fixed 3 x 3 filter [1 2 1] x [1 2 1] / 16 for each channel, [channels, 1, 3, 3]."""
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    return torch.outer(taps, taps).repeat(channels, 1, 1, 1)


class BlurredMaxPool2d(torch.nn.Module):
    """ResNet's max-pool without its stride, and then the blur with it (arXiv:1904.11486). It has no state-dict keys."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("blur", _blur_filter(channels), persistent=False)

    def forward(self, images):
        """Return [B, C, H/2, W/2] of [B, C, H, W]."""
        largest = F.max_pool2d(images, kernel_size=3, stride=1, padding=1)
        return F.conv2d(largest, self.blur, stride=2, padding=1, groups=images.shape[1])


class BlurredConv2d(torch.nn.Conv2d):
    """A convolution that first blurs its input, channel by channel.

    What a stride leaves out then still counts: fewer artefacts of sampling (arXiv:1904.11486; here as FFCV applies it).
    The filter is no part of the state dict, whose keys are those of Conv2d.
    """

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.register_buffer("blur", _blur_filter(self.in_channels), persistent=False)

    def forward(self, images):
        """Return the convolution of the blurred [B, C, H, W]."""
        return super().forward(F.conv2d(images, self.blur, padding=1, groups=self.in_channels))


def blur_before_strides(model):
    """Put a BlurredConv2d with the same weights in place of every strided convolution of 16 or more input channels."""
    for parent in list(model.modules()):
        for name, conv in parent.named_children():
            if type(conv) is torch.nn.Conv2d and max(conv.stride) > 1 and conv.in_channels >= 16:
                shape = (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding)
                blurred = BlurredConv2d(*shape, bias=False)
                blurred.weight = conv.weight
                setattr(parent, name, blurred)


def drop_blocks_by_chance(model, probability):
    """In training, let each image pass by each block with a probability that rises from 0 to `probability` at the last block.

    What is left is scaled up, so that evaluation needs nothing. A hook on each block's last norm: no key changes.
    """
    norms = last_norms(model)
    for number, norm in enumerate(norms if probability else ()):
        norm.register_forward_hook(_Drop(probability * number / (len(norms) - 1)))


class _Drop:
    """A forward hook that leaves out the output for some images, and can be copied and pickled."""

    def __init__(self, probability):
        self.probability = probability

    def __call__(self, module, inputs, output):
        return stochastic_depth(output, self.probability, "row", module.training)
