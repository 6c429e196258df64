"""Two kinds of made pictures beside those of engine/data/demo.py: characters in many fonts, and textures under noise."""

from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CHARACTERS = tuple("ABCDEFGHKLMNPRSTUXYZ")
# matplotlib's own fonts; those of the validation pictures are of families that training never sees.
TRAIN_FONTS = (
    *(f"DejaVuSans{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    "cmb10",
    "cmss10",
    "cmtt10",
)
VAL_FONTS = ("STIXGeneral", "STIXGeneralBol", "STIXGeneralItalic", "STIXGeneralBolIta", "cmr10", "DejaVuSerif-Bold")
DEGREES = (0, 30, 60, 90)  # of a texture's waves; no mirror image of one is another
WAVELENGTHS = (3.0, 4.5, 6.8, 10.0, 15.0)  # px
WAVES = tuple(f"waves{degrees}_{length}" for degrees in DEGREES for length in WAVELENGTHS)


def character(class_name, rng, sides, fonts):
    """Return a letter in one of the fonts, turned, on a cluttered background, uint8 [h, w, 3]."""
    side = int(rng.integers(sides[0], sides[1] + 1))
    size = int(side * rng.uniform(0.45, 0.8))
    mask = Image.new("L", (side, side))
    middle = tuple(side / 2 + rng.uniform(-0.1, 0.1, 2) * side)
    ImageDraw.Draw(mask).text(middle, class_name, fill=255, font=_font(str(rng.choice(fonts)), size), anchor="mm")
    share = np.asarray(mask.rotate(rng.uniform(-25, 25), Image.Resampling.BILINEAR), np.float32)[..., None] / 255
    paper, ink = rng.uniform(0, 255, (2, 3))
    while abs(paper.mean() - ink.mean()) < 40:
        ink = rng.uniform(0, 255, 3)
    image = paper + 25 * _smooth_noise(rng, side)[..., None]
    image = (1 - share) * image + share * ink + rng.normal(0, rng.uniform(5, 30), (side, side, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def waves(class_name, rng, sides):
    """Return noise filtered to about one wavelength and direction, under four times its power of white noise."""
    degrees, wavelength = class_name.removeprefix("waves").split("_")
    side = int(rng.integers(sides[0], sides[1] + 1))
    angle = np.deg2rad(float(degrees) + rng.normal(0, 4))
    fy, fx = np.meshgrid(np.fft.fftfreq(side), np.fft.fftfreq(side), indexing="ij")
    along, across = fx * np.cos(angle) + fy * np.sin(angle), fy * np.cos(angle) - fx * np.sin(angle)
    frequency = 1 / float(wavelength)
    passed = np.exp(-((np.abs(along) - frequency) ** 2 + across**2) / (2 * (0.2 * frequency) ** 2))
    pattern = np.fft.ifft2(np.fft.fft2(rng.normal(size=(side, side))) * passed).real
    pattern /= pattern.std()
    strength = rng.uniform(10, 20)
    image = rng.uniform(60, 195, 3) + strength * pattern[..., None] * rng.uniform(0.5, 1, 3)
    image = image + 20 * _smooth_noise(rng, side)[..., None] + rng.normal(0, 2 * strength, (side, side, 3))
    return np.clip(image, 0, 255).astype(np.uint8)


def _smooth_noise(rng, side):
    """Return noise of long waves, float32 [side, side], of about unit size."""
    coarse = Image.fromarray(rng.normal(size=(4, 4)).astype(np.float32))
    return np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC))


@cache
def _font(name, size):
    import matplotlib

    return ImageFont.truetype(Path(matplotlib.get_data_path(), "fonts", "ttf", f"{name}.ttf"), size)


DRAW = {  # kind: its classes, and what draws them
    "characters": (CHARACTERS, {"train": partial(character, fonts=TRAIN_FONTS), "val": partial(character, fonts=VAL_FONTS)}),
    "waves": (WAVES, {"train": waves, "val": waves}),
}
