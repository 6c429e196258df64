"""One image file's bytes to the view of it that the network sees.

The crop is chosen from the file's header, the JPEG is decoded at the smallest DCT scale that still covers the crop, then
cropped, resized with antialiasing and flipped. Of a JPEG in tiles, as prepare_data.py writes them, only the tiles that the
crop touches are decoded.
"""

import io
import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, UnidentifiedImageError

from engine.jpeg_tiles import cut_out_tiles, tile_columns, with_tile_index

try:
    import simplejpeg
except ImportError:  # Pillow decodes everything then, more slowly
    simplejpeg = None

SIMPLEJPEG_ERRORS = (ValueError, KeyError)  # KeyError: a colour space that it has no name for
LARGEST_IMAGE_PIXELS = 20_000 * 20_000  # 1.2 GB decoded; above it an image counts as unreadable


def image_size(data):
    """Return (height, width) in pixels from an image file's header; EXIF rotation is ignored, as everywhere here."""
    if simplejpeg is not None and data[:2] == b"\xff\xd8":
        try:
            return simplejpeg.decode_jpeg_header(data, strict=False)[:2]
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
            if scale == 1:
                return simplejpeg.decode_jpeg(data, "RGB", fastupsample=fast_chroma)
            height, width, _, _ = simplejpeg.decode_jpeg_header(data)
            sides = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
            return simplejpeg.decode_jpeg(data, "RGB", fastupsample=fast_chroma, min_factor=2, **sides)
        except SIMPLEJPEG_ERRORS:
            pass  # CMYK, or damaged: Pillow converts the one and refuses the other
    with _open_with_pillow(data) as image:
        width, height = -(-image.width // scale), -(-image.height // scale)
        image.draft("RGB", (width, height))
        if image.mode.startswith(("I", "F")):  # 16 bits a pixel: Pillow's own conversion would clip instead of scaling
            pixels = np.asarray(image, dtype=np.float64) / 257
            image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
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
    if image.width * image.height > LARGEST_IMAGE_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than this program decodes")
    return image


def _resize(pixels, height, width, flip=False, filter="bilinear"):
    """Return uint8 [h, w, 3] resized to [height, width, 3] with antialiasing, as Pillow and torchvision resize."""
    image = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)  # [1, 3, h, w], in strides that torch takes for channels-last
    if pixels.shape[:2] != (height, width):
        image = F.interpolate(image, size=(height, width), mode=filter, antialias=True)
    if flip:
        image = image.flip(3)  # vectorised for channels-last; numpy's reversed copy takes several times as long
    return image[0].permute(1, 2, 0).numpy()


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
    factor = short / min(height, width)  # the longer side is cut off, not rounded up: torchvision's Resize
    pixels = _resize(pixels, max(short, int(height * factor)), max(short, int(width * factor)))
    top, left = ((side - resolution) / 2 for side in pixels.shape[:2])
    top, left = round(top), round(left)
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
    pixels = _resize(pixels, round(height * factor), round(width * factor), filter="bicubic")
    blocks = -(-pixels.shape[1] // 16)  # in a row, with the chroma at half the size
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(
        buffer, "JPEG", quality=quality, subsampling="4:2:0", restart_marker_blocks=blocks // tile_columns(blocks)
    )
    return with_tile_index(buffer.getvalue())
