"""Every kind of file, and the two views of it, beside torchvision's."""

import io
import resource

import numpy as np
import pytest
import torch
import torchvision
from conftest import encoded, photo
from PIL import Image
from torchvision.transforms import v2

from engine.data import images


def psnr(first, second):
    error = np.mean((np.asarray(first, dtype=float) - np.asarray(second, dtype=float)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


@pytest.mark.parametrize("scale", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_scaled_decoding_gives_the_ceiling_of_each_side(scale, kind):
    pixels = photo(203, 309)
    decoded = images.decode_rgb(encoded(pixels, kind), scale)
    assert decoded.shape == (-(-203 // scale), -(-309 // scale), 3)
    exact = Image.fromarray(pixels).resize(decoded.shape[1::-1], Image.Resampling.BOX)
    assert psnr(decoded, exact) > 30


def odd_files():
    pixels = photo(60, 90)
    image = Image.fromarray(pixels)
    deep = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    gray = np.repeat(np.asarray(image.convert("L"))[..., None], 3, axis=2)
    return {
        "cmyk JPEG": (encoded(image.convert("CMYK")), pixels),
        "gray JPEG": (encoded(image.convert("L")), gray),
        "progressive JPEG": (encoded(image, progressive=True), pixels),
        "EXIF-rotated JPEG": (encoded(image, exif=exif), pixels),
        "JPEG with bytes after its end": (encoded(image) + b"\0" * 100, pixels),
        "PNG": (encoded(image, "PNG"), pixels),
        "16-bit PNG": (encoded(deep, "PNG"), np.repeat(pixels[..., :1], 3, axis=2)),
        "RGBA PNG": (encoded(image.convert("RGBA"), "PNG"), pixels),
        "palette PNG": (encoded(image.quantize(256), "PNG"), np.asarray(image.quantize(256).convert("RGB"))),
        "bilevel PNG": (encoded(image.convert("1"), "PNG"), np.asarray(image.convert("1").convert("RGB"))),
        "WebP": (encoded(image, "WEBP", quality=95), pixels),
    }


@pytest.mark.parametrize("name", odd_files())
def test_every_kind_of_image_is_decoded_to_its_pixels(name):
    content, pixels = odd_files()[name]
    assert images.image_size(content) == pixels.shape[:2]
    assert psnr(images.decode_rgb(content), pixels) > 30


@pytest.mark.parametrize("size", [(1, 1), (1, 700), (3000, 2)])
def test_images_of_any_shape_give_both_views(size):
    content = encoded(np.full((*size, 3), 200, dtype=np.uint8))
    for view in (
        images.training_view(content, 64, 0.08, np.random.default_rng(0)),
        images.validation_view(content, 64, 0.875),
    ):
        assert view.shape == (64, 64, 3)
        assert abs(view.mean() - 200) < 3


def test_a_20000_px_jpeg_is_decoded_at_a_small_scale():
    content = encoded(np.full((2000, 20000, 3), 90, dtype=np.uint8))
    assert images.training_view(content, 64, 0.5, np.random.default_rng(0)).shape == (64, 64, 3)
    assert images.validation_view(content, 64, 0.875).shape == (64, 64, 3)


def broken_files():
    jpeg = encoded(photo(100, 100))
    return {
        "empty": b"",
        "text": b"<html>404 Not Found</html>",
        "truncated": jpeg[: len(jpeg) // 2],
        "header alone": jpeg[:100],
        "truncated PNG": encoded(photo(100, 100), "PNG")[:5000],
    }


@pytest.mark.parametrize("name", broken_files())
def test_a_damaged_file_is_refused(name):
    with pytest.raises((ValueError, OSError)):
        images.decode_rgb(broken_files()[name])


def test_pillow_takes_over_where_simplejpeg_is_missing(monkeypatch):
    content = encoded(photo())
    fast = [images.training_view(content, 96, 0.08, np.random.default_rng(s)) for s in range(5)]
    monkeypatch.setattr(images, "simplejpeg", None)
    slow = [images.training_view(content, 96, 0.08, np.random.default_rng(s)) for s in range(5)]
    assert min(psnr(a, b) for a, b in zip(fast, slow, strict=True)) > 33


@pytest.mark.parametrize("size", [(203, 309), (375, 500), (9, 33)])
def test_pillow_decodes_to_the_same_bits_at_every_scale(size, monkeypatch):
    content = encoded(photo(*size))
    fast = [images.decode_rgb(content, scale) for scale in (1, 2, 4, 8)]
    monkeypatch.setattr(images, "simplejpeg", None)
    slow = [images.decode_rgb(content, scale) for scale in (1, 2, 4, 8)]
    assert [np.array_equal(a, b) for a, b in zip(fast, slow, strict=True)] == [True] * 4


def test_the_validation_view_is_torchvisions_resize_and_centre_crop():
    reference = v2.Compose([v2.Resize(73, antialias=True), v2.CenterCrop(64)])
    for height, width in ((375, 500), (500, 333), (80, 81), (64, 200), (1200, 1600)):
        content = encoded(photo(height, width))
        expected = reference(Image.fromarray(images.decode_rgb(content)))
        assert psnr(images.validation_view(content, 64, 64 / 73), expected) > (45 if min(height, width) < 1000 else 35)


@pytest.mark.parametrize("size", [(196, 294), (322, 161), (300, 450)])  # sides that 256 px of the shorter one divide evenly
def test_the_resized_longer_side_is_torchvisions_to_the_pixel(size):
    """To a rounding, which PyTorch 2.8 does another way: a side that is a pixel shorter differs by 6 and more."""
    pixels = photo(*size)
    view = images.validation_view(encoded(pixels, "PNG"), 224, 0.875)
    exact = v2.Compose([v2.Resize(256, antialias=True), v2.CenterCrop(224)])(torch.from_numpy(pixels).permute(2, 0, 1))
    assert np.abs(view.astype(int) - exact.permute(1, 2, 0).numpy()).max() <= 1


def test_random_crops_are_distributed_as_torchvisions():
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    for height, width in ((375, 500), (100, 900)):
        ours = np.array([images.random_resized_crop_box(height, width, rng) for _ in range(4000)])
        image = torch.empty(3, height, width)
        scale, ratio = (0.08, 1.0), (3 / 4, 4 / 3)
        theirs = np.array([torchvision.transforms.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(4000)])
        for column in range(4):
            quantiles = np.linspace(0.02, 0.98, 13)
            gap = np.abs(np.quantile(ours[:, column], quantiles) - np.quantile(theirs[:, column], quantiles)).max()
            assert gap < 0.06 * max(height, width)


def test_the_scaled_training_view_is_close_to_the_exact_one_on_the_same_crop():
    content = encoded(photo(1500, 2000))
    exact_pixels = images.decode_rgb(content)
    quality = []
    for seed in range(40):
        box = images.random_resized_crop_box(1500, 2000, np.random.default_rng(seed))
        view = images.training_view(content, 128, 0.08, np.random.default_rng(seed))
        scale = next((s for s in (8, 4, 2) if min(box[2:]) >= s * 128), 1)
        top, left, height, width = (round(side / scale) * scale for side in box)
        crop = Image.fromarray(exact_pixels[top : top + height, left : left + width])
        exact = np.asarray(crop.resize((128, 128), Image.Resampling.BILINEAR))
        quality.append(max(psnr(view, exact), psnr(view[:, ::-1], exact)))
    assert np.median(quality) > 35


def test_a_view_lies_in_memory_as_its_batch_does():
    content = encoded(photo(300, 400))
    for seed in range(20):  # flipped or not, enlarged or reduced
        view = images.training_view(content, 64, 0.08, np.random.default_rng(seed))
        assert view.flags.c_contiguous  # a planar one would take longer to copy than to resize


def test_half_of_the_training_views_are_flipped():
    half = np.zeros((64, 64, 3), dtype=np.uint8)
    half[:, 32:] = 255
    content = encoded(half)
    views = [images.training_view(content, 32, 0.999, np.random.default_rng(seed)) for seed in range(200)]
    assert 70 < sum(view[:, 0].mean() > view[:, -1].mean() for view in views) < 130


# Limits --------------------------------------------------------------------------------------------------------------


def with_stated_size(jpeg, height, width):
    """A JPEG whose header states another size."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + jpeg[at + 4 :]


@pytest.mark.parametrize("decoder", ["simplejpeg", "Pillow"])
def test_the_limit_of_pixels_holds_for_every_decoder_before_anything_is_decoded(decoder, monkeypatch):
    if decoder == "Pillow":
        monkeypatch.setattr(images, "simplejpeg", None)
    bomb = with_stated_size(encoded(photo(40, 60)), 65_500, 65_500)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for use in (
        images.image_size,
        images.decode_rgb,
        lambda data: images.decode_rgb(data, 8),
        lambda data: images.training_view(data, 32, 0.08, np.random.default_rng(0)),
        lambda data: images.validation_view(data, 32, 0.875),
        lambda data: images.packed_jpeg(data, 352),
    ):
        with pytest.raises(ValueError, match="65500 x 65500 pixels are more than this program decodes"):
            use(bomb)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 5000), (40, 700)])
def test_a_very_long_validation_image_is_not_resized_as_a_whole(size):
    pixels = np.repeat(np.linspace(0, 255, max(size)).astype(np.uint8)[:, None], min(size), axis=1)
    pixels = np.repeat((pixels if size[0] > size[1] else pixels.T)[..., None], 3, axis=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    view = images.validation_view(encoded(pixels, "PNG"), 224, 0.875)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB; 4 GB as a whole
    assert view.shape == (224, 224, 3)
    if min(size) >= 3:  # as the whole one's part
        short = round(224 / 0.875)
        sides = [max(short, int(side * short / min(size))) for side in size]
        whole = images._resize(pixels, *sides)
        top, left = (round((side - 224) / 2) for side in sides)
        expected = whole[top : top + 224, left : left + 224]
        assert np.abs(view.astype(int) - expected).max() <= 1


def test_a_long_image_that_no_jpeg_can_hold_is_packed_as_it_is():
    content = encoded(np.full((2, 800, 3), 90, dtype=np.uint8), "PNG")
    assert images.packed_jpeg(content, 1) != content
    wide = encoded(np.full((2, 140_000, 3), 90, dtype=np.uint8), "PNG")
    assert images.packed_jpeg(wide, 1) == wide


# Brightness ----------------------------------------------------------------------------------------------------------


def gray_files():
    """{name: (file, the brightest gray that it should have, in 8 bits)}; each goes from 0 to its brightest."""
    ramp = np.linspace(0, 1, 64 * 48).reshape(48, 64)

    def tiff(values, **options):
        return encoded(Image.fromarray(values), "TIFF", **options)

    return {
        "float to 255": (tiff((ramp * 255).astype(np.float32)), 255),
        "float to 1": (tiff(ramp.astype(np.float32)), 255),
        "float to 1.2": (tiff((ramp * 1.2).astype(np.float32)), 255),
        "float to 200": (tiff((ramp * 200).astype(np.float32)), 200),
        "float to 256.3": (tiff((ramp * 256.3).astype(np.float32)), 255),
        "float to 65535": (tiff((ramp * 65535).astype(np.float32)), 255),
        "float around 0": (tiff((ramp * 2 - 1).astype(np.float32)), 255),
        "int32 to 255": (tiff((ramp * 255).astype(np.int32)), 255),
        "int32 to 65535": (tiff((ramp * 65535).astype(np.int32)), 255),
        "int32 to 2^31": (tiff((ramp * (2**31 - 129)).astype(np.int32)), 255),
        "8 bits in 16, TIFF": (tiff((ramp * 255).astype(np.uint16)), 255),
        "8 bits in 16, PNG": (encoded(Image.fromarray((ramp * 255).astype(np.uint16)), "PNG"), 255),
        "12 bits in 16": (tiff((ramp * 4095).astype(np.uint16)), 255),
        "16 bits": (encoded(Image.fromarray((ramp * 65535).astype(np.uint16)), "PNG"), 255),
        "16 bits, stated": (tiff((ramp * 1000).astype(np.uint16), tiffinfo={281: 2000}), 128),
        "16 bits, stated wrongly": (tiff((ramp * 250).astype(np.uint16), tiffinfo={281: 65535}), 250),
    }


@pytest.mark.parametrize("name", gray_files())
def test_gray_values_of_any_depth_keep_their_brightness(name):
    content, brightest = gray_files()[name]
    ramp = np.linspace(0, brightest, 64 * 48).reshape(48, 64)
    decoded = images.decode_rgb(content)
    assert np.abs(decoded[..., 0] - ramp).max() <= 3
    large = Image.open(io.BytesIO(content)).resize((640, 480), Image.Resampling.NEAREST)
    if "stated" not in name:  # resizing loses what the file states
        packed = images.packed_jpeg(encoded(large, "PNG" if "PNG" in name or name == "16 bits" else "TIFF"), 100)
        assert images.decode_rgb(packed).max() > 0.9 * brightest


def test_a_guess_at_what_is_white_is_said_once(capfd):
    images._GUESS_SAID[0] = 0
    for name in ("float to 255", "8 bits in 16, PNG", "int32 to 255"):
        images.decode_rgb(gray_files()[name][0])
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1
    assert "floating-point values from 0 to 255 does not say what is white: taken to be 255" in said[0]
    images._GUESS_SAID[0] = 0
    images.decode_rgb(gray_files()["16 bits"][0])
    images.decode_rgb(gray_files()["16 bits, stated"][0])
    assert capfd.readouterr().err == ""
