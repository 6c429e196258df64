"""MosaicML's RandAugment (Composer 0.7.1, augmentation set `all`), on torchvision's operations."""

import math

import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F


class ComposerRandAugment:
    """Changes an image, uint8 [3, H, W], by operations drawn with repetition, each at a strength drawn anew.

    Draws from torch's random state on the CPU.
    """

    def __init__(self, num_ops, magnitude):
        """Take `num_ops` operations for an image, of a magnitude from 0 to 30: Composer's severity, from 0 to 10, times 3."""
        self.num_ops, self.severity = num_ops, magnitude / 3

    def __call__(self, image):
        for _ in range(self.num_ops):
            draw, change = OPERATIONS[int(torch.randint(len(OPERATIONS), ()))]
            image = change(image, draw(self.severity))
        return image


# Strengths -----------------------------------------------------------------------------------------------------------


def _uniform(low, high):
    return low + (high - low) * torch.rand((), dtype=torch.float64).item()


def draw_level(severity):
    """Return a level, of which 10 is the strongest."""
    return _uniform(0.1, severity)


def draw_signed_level(severity):
    """Return a level that is as often below 0."""
    return draw_level(severity) * (1 if _uniform(0, 1) < 0.5 else -1)


def draw_factor(severity):
    """Return a factor, as often to either side of 1, which changes nothing; to the letter, also at severities below 1."""
    return _uniform(1, severity) if _uniform(0, 1) < 0.5 else _uniform(1 - 0.09 * severity, 1)


# Operations: (image, strength) -> image ------------------------------------------------------------------------------


def autocontrast(image, _):
    return F.autocontrast(image)


def equalize(image, _):
    return F.equalize(image)


def posterize(image, level):
    """Keep 4 bits or fewer."""
    return F.posterize(image, 4 - int(level * 4 / 10))


def solarize(image, level):
    """Invert what is bright: 256 values at level 10."""
    inverted = int(level * 256 / 10)
    return F.solarize(image, 256 - inverted) if inverted else image


def rotate(image, level):
    """Turn by whole degrees: 30 at level 10."""
    return F.rotate(image, int(level * 30 / 10), interpolation=InterpolationMode.BILINEAR)


def shear_x(image, level):
    """Move each row by a share of its distance from the top: 0.3 at level 10."""
    return _affine(image, shear_x=level * 0.3 / 10)


def shear_y(image, level):
    """Move each column by a share of its distance from the left: 0.3 at level 10."""
    return _affine(image, shear_y=level * 0.3 / 10)


def translate_x(image, level):
    """Move by whole pixels: a third of the width at level 10."""
    return _affine(image, left=int(level * image.shape[2] / 3 / 10))


def translate_y(image, level):
    """Move by whole pixels: a third of the height at level 10."""
    return _affine(image, up=int(level * image.shape[1] / 3 / 10))


def _affine(image, left=0, up=0, shear_x=0.0, shear_y=0.0):
    """Return the image whose pixel (x, y) was at (x + left + shear_x * y, y + up + shear_y * x), black where there was none."""
    shear = [math.degrees(math.atan(shear_x)), math.degrees(math.atan(shear_y))]
    return F.affine(image, 0.0, [-left, -up], 1.0, shear, interpolation=InterpolationMode.BILINEAR, center=[0.0, 0.0])


def brighten(image, factor):
    """Multiply the values, brightening them by three quarters of a factor above 1."""
    return F.adjust_brightness(image, factor * 0.75 if factor > 1 else factor)


OPERATIONS = (  # how a strength is drawn, and what it does
    (draw_level, autocontrast),
    (draw_level, equalize),
    (draw_level, posterize),
    (draw_level, solarize),
    (draw_signed_level, rotate),
    (draw_signed_level, shear_x),
    (draw_signed_level, shear_y),
    (draw_signed_level, translate_x),
    (draw_signed_level, translate_y),
    (draw_factor, F.adjust_saturation),
    (draw_factor, F.adjust_contrast),
    (draw_factor, brighten),
    (draw_factor, F.adjust_sharpness),
)
