"""One image file's bytes to the view of it that the network sees.

The crop is chosen from the file's header, the JPEG is decoded at the smallest DCT scale that still covers the crop, then
cropped, resized with antialiasing and flipped. Of a JPEG in tiles, as prepare_data.py writes them, only the tiles that the
crop touches are decoded.
"""

import io
import math
import mmap
import sys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from engine.data.jpeg_tiles import cut_out_tiles, tile_columns, with_tile_index

try:
    import simplejpeg
except ImportError:  # Pillow decodes everything then, more slowly
    simplejpeg = None

SIMPLEJPEG_ERRORS = (ValueError, KeyError)  # KeyError: a colour space that it has no name for
LARGEST_IMAGE_PIXELS = 20_000 * 20_000  # 1.2 GB decoded; above it an image counts as unreadable
PACKED_SHORTER_SIDE = 352  # px, to which prepare_data.py makes larger training images smaller by default
LARGEST_JPEG_SIDE = 65_500  # px
LONG_IMAGE = 8  # times as long as wide; resized as a whole, one of 1 x 20,000 px would take gigabytes
DEPTHS_IN_BITS = (8, 10, 12, 14, 16, 24, 31)  # of values in containers that are larger
_GUESS_SAID = mmap.mmap(-1, 1)  # shared with the processes that are forked from this one


class ImageTooLarge(ValueError):
    """The header of an image file states more pixels than this program decodes."""


def image_size(data):
    """Return (height, width) in pixels from an image file's header; EXIF rotation is ignored, as everywhere here."""
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            return _within_limit(*simplejpeg.decode_jpeg_header(data, strict=False)[:2])
        except ImageTooLarge:
            raise
        except SIMPLEJPEG_ERRORS:
            pass  # an exotic JPEG: Pillow knows more kinds
    with _open_with_pillow(data) as image:
        return image.height, image.width


def decode_rgb(data, scale=1, fast_chroma=False):
    """Return an image file's pixels, uint8 [h, w, 3], each side the ceiling of its original over `scale`.

    Args:
        data: bytes of a file in any format that Pillow reads; a plain JPEG takes the fast path.
        scale: 1, 2, 4 or 8. A JPEG is decoded at that DCT scale, at a fraction of the work; anything else is reduced.
        fast_chroma: repeat a JPEG's chroma samples instead of interpolating between them; saves about 5 % of the time.
    Raises:
        ValueError, OSError: the bytes are no image, or a damaged one.
    """
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            height, width = _within_limit(*simplejpeg.decode_jpeg_header(data)[:2])
            if scale == 1:
                return simplejpeg.decode_jpeg(data, "RGB", fastupsample=fast_chroma)
            sides = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
            return simplejpeg.decode_jpeg(data, "RGB", fastupsample=fast_chroma, min_factor=2, **sides)
        except ImageTooLarge:
            raise
        except SIMPLEJPEG_ERRORS:
            pass  # CMYK, or damaged: Pillow converts the one and refuses the other
    with _open_with_pillow(data) as image:
        width, height = -(-image.width // scale), -(-image.height // scale)
        image.draft("RGB", (max(1, image.width // scale), max(1, image.height // scale)))  # for the ceiling it halves the scale
        if image.mode.startswith(("I", "F")):  # 16 or 32 bits a pixel: Pillow's own conversion would clip, not scale
            image = Image.fromarray(_eight_bits(image))
        image = image.convert("RGB")
        if image.size != (width, height):
            image = image.resize((width, height), Image.Resampling.BOX)
        return np.array(image)


def _open_with_pillow(data):
    Image.MAX_IMAGE_PIXELS = None  # our own limit instead, which names the size
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise ValueError(f"no image of a known kind in these {len(data):,} bytes") from None
    _within_limit(image.height, image.width)
    return image


def _within_limit(height, width):
    """Return (height, width) as the header states them, before anything is decoded."""
    if height * width > LARGEST_IMAGE_PIXELS:
        raise ImageTooLarge(f"{width} x {height} pixels are more than this program decodes")
    return height, width


def _eight_bits(image):
    """Return the gray values of a Pillow image of 16 or 32 bits a pixel, uint8 [h, w].

    White is what a TIFF states as its largest value, else the full range of the smallest usual depth that holds all values:
    containers of 16 or 32 bits often hold 8 or 12. Floats of up to 1 have their white at 1. What is guessed is said once.
    """
    stated = getattr(image, "tag_v2", {})
    white = next((stated[tag] for tag in (341, 281) if tag in stated), None)  # SMaxSampleValue, MaxSampleValue
    white = white[0] if isinstance(white, tuple) else white
    pixels = np.nan_to_num(np.asarray(image, dtype=np.float32), posinf=0, neginf=0)
    darkest, brightest = float(pixels.min()), float(pixels.max())
    if white is None or not 0 < white <= 256 * brightest:  # stated wrongly, the image would be black
        white = _usual_white(brightest, image.mode == "F")
        if darkest < 0:  # no usual range: from the darkest to the brightest
            pixels, white = pixels - darkest, brightest - darkest or 1.0
        if (image.mode == "F" or white != 65535 or darkest < 0) and not _GUESS_SAID[0]:
            _GUESS_SAID[0] = 1
            print(
                f"WARNING: an image of {'floating-point' if image.mode == 'F' else '16- or 32-bit'} values from {darkest:g} to "
                f"{brightest:g} does not say what is white: taken to be {white + min(darkest, 0):g}; so are others like it",
                file=sys.stderr,
            )
    return np.clip(np.rint(pixels * (255 / white)), 0, 255).astype(np.uint8)


def _usual_white(brightest, is_float):
    """Return the value of white in an image of which only the brightest value is known."""
    if is_float and brightest <= 16:  # of 1, with highlights above it: of 255 it would be black
        return max(1.0, brightest)
    brightest /= 1.05 if is_float else 1  # resampling goes a little beyond white
    return next((float(2**bits - 1) for bits in DEPTHS_IN_BITS if brightest <= 2**bits - 1), brightest)


def _resize(pixels, height, width, flip=False, filter="bilinear"):
    """Return uint8 [h, w, 3] resized to [height, width, 3] with antialiasing, as Pillow and torchvision resize."""
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # [1, 3, h, w], in strides that torch takes for channels-last
    if pixels.shape[:2] != (height, width):
        image = F.interpolate(image, size=(height, width), mode=filter, antialias=True)
    if flip:
        image = image.flip(3)  # vectorised for channels-last; numpy's reversed copy takes several times as long
    return image[0].permute(1, 2, 0).numpy()


def _resized_part(pixels, sides, top, left, resolution):
    """Return the square at (top, left) of uint8 [h, w, 3] resized to `sides`, without making the rest of it."""
    by_row, by_column = pixels.shape[0] / sides[0], pixels.shape[1] / sides[1]
    box = left * by_column, top * by_row, (left + resolution) * by_column, (top + resolution) * by_row
    part = Image.fromarray(pixels).resize((resolution, resolution), Image.Resampling.BILINEAR, box=box)
    return np.array(part)


def _largest_scale(side, needed):
    """Return the largest DCT scale, of 8, 4, 2 and 1, at which `side` px still give `needed` px."""
    return next((scale for scale in (8, 4, 2) if side >= scale * needed), 1)


def random_resized_crop_box(height, width, rng, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)):
    """Return (top, left, height, width) of a random crop, drawn as torchvision's RandomResizedCrop draws it."""
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = height * width * (scale[0] + (scale[1] - scale[0]) * rng.random())
        aspect = math.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * rng.random())
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1)), h, w
    # the image is too long for all ten: its largest central crop within the ratio
    w, h = width, height
    if width / height < ratio[0]:
        h = max(1, round(width / ratio[0]))
    elif width / height > ratio[1]:
        w = max(1, round(height * ratio[1]))
    return (height - h) // 2, (width - w) // 2, h, w


def training_view(data, resolution, min_crop_area, rng):
    """Return the training view of an image file, uint8 [resolution, resolution, 3]: random crop, resize, flip.

    The crop is drawn from the size in the header, before decoding; it is then rounded to the grid of the DCT scale, so
    that it moves by at most half of 8 px in an image that is at least 8 times too large.
    """
    top, left, height, width = random_resized_crop_box(*image_size(data), rng, scale=(min_crop_area, 1.0))
    flip = rng.random() < 0.5
    scale = _largest_scale(min(height, width), resolution)
    data, tile_top, tile_left = cut_out_tiles(data, top, left, height, width, scale)
    pixels = decode_rgb(data, scale, fast_chroma=True)
    top, left, height, width = (round(side / scale) for side in (top, left, height, width))
    top, left = top - tile_top // scale, left - tile_left // scale
    return _resize(pixels[top : top + height, left : left + width], resolution, resolution, flip)


def validation_view(data, resolution, crop_ratio):
    """Return the validation view, uint8 [resolution, resolution, 3]: shorter side resized, then the centre crop.

    Decoded at full scale unless the image is at least twice too large, so that the figure stays the customary one.
    """
    short = round(resolution / crop_ratio)
    pixels = decode_rgb(data, _largest_scale(min(image_size(data)), 2 * short))
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    sides = int(short * height / shorter), int(short * width / shorter)  # cut off, as torchvision's Resize: in this order
    top, left = (round((side - resolution) / 2) for side in sides)
    if max(sides) > LONG_IMAGE * short:
        return _resized_part(pixels, sides, top, left, resolution)
    pixels = _resize(pixels, *sides)
    return pixels[top : top + resolution, left : left + resolution]


def packed_jpeg(data, shorter_side, quality=90):
    """Return an image file made smaller, as a JPEG in tiles; or its bytes as they are if it is small enough.

    Args:
        data: bytes of an image file; decoded in either case, so that a damaged one is found.
        shorter_side: of the result, px.
        quality: of the JPEG, from 1 to 100.
    Raises:
        ValueError, OSError: the bytes are no image, or a damaged one.
    """
    height, width = image_size(data)
    if min(height, width) <= shorter_side:
        decode_rgb(data)
        return data
    factor = shorter_side / min(height, width)
    pixels = decode_rgb(data, _largest_scale(min(height, width), 2 * shorter_side))
    if round(max(height, width) * factor) > LARGEST_JPEG_SIDE:
        return data
    pixels = _resize(pixels, round(height * factor), round(width * factor), filter="bicubic")
    blocks = -(-pixels.shape[1] // 16)  # in a row, with the chroma at half the size
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(
        buffer, "JPEG", quality=quality, subsampling="4:2:0", restart_marker_blocks=blocks // tile_columns(blocks)
    )
    return with_tile_index(buffer.getvalue())
