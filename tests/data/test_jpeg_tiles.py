"""A crop of a JPEG in tiles has the pixels that it has in the whole image, to the last bit."""

import io

import numpy as np
import pytest
from conftest import encoded, photo
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from engine.data import images
from engine.data.jpeg_tiles import cut_out_tiles, tile_columns, with_tile_index


def tiled(pixels, subsampling="4:2:0", blocks=None):
    block_width = 8 if pixels.ndim == 2 or subsampling == "4:4:4" else 16
    blocks_in_row = -(-pixels.shape[1] // block_width)
    blocks = blocks or blocks_in_row // tile_columns(blocks_in_row)
    return with_tile_index(encoded(pixels, quality=90, subsampling=subsampling, restart_marker_blocks=blocks))


@settings(deadline=None, max_examples=200)
@given(
    size=st.tuples(st.integers(1, 200), st.integers(1, 260)),
    corners=st.tuples(*[st.floats(0, 1)] * 4),
    scale=st.sampled_from([1, 2, 4, 8]),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    gray=st.booleans(),
    seed=st.integers(0, 3),
)
def test_a_crop_has_the_same_bits_as_in_the_whole_image(size, corners, scale, subsampling, gray, seed):
    pytest.importorskip("simplejpeg", reason="Pillow reduces the smallest images otherwise than by the DCT")
    pixels = photo(*size, seed=seed)
    data = tiled(pixels[..., 0] if gray else pixels, subsampling)
    (top, bottom), (left, right) = (
        sorted(min(side - 1, int(share * side)) for share in pair)
        for side, pair in zip(size, (corners[:2], corners[2:]), strict=True)
    )
    bottom, right = bottom + 1, right + 1
    part, part_top, part_left = cut_out_tiles(data, top, left, bottom - top, right - left, scale)
    top, bottom, left, right = (round(side / scale) for side in (top, bottom, left, right))
    part_top, part_left = part_top // scale, part_left // scale
    expected = images.decode_rgb(data, scale)[top:bottom, left:right]
    actual = images.decode_rgb(part, scale)[top - part_top : bottom - part_top, left - part_left : right - part_left]
    np.testing.assert_array_equal(actual, expected)


def test_only_the_tiles_of_the_crop_are_left():
    data = tiled(photo(352, 480))
    part, top, left = cut_out_tiles(data, 100, 200, 64, 80)
    assert images.image_size(part) == (80, 96)  # tiles of 16 x 48 px
    assert (top, left) == (96, 192)
    assert len(part) < 0.15 * len(data) + 1200


def test_a_prepared_image_is_an_ordinary_jpeg_of_a_few_percent_more_bytes():
    pixels = photo(352, 469)
    plain, data = encoded(pixels, quality=90), tiled(pixels)
    assert len(data) < 1.08 * len(plain)
    with Image.open(io.BytesIO(plain)) as first, Image.open(io.BytesIO(data)) as second:
        np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


def test_packed_images_are_in_tiles():
    data = images.packed_jpeg(encoded(photo(500, 700)), 352)
    part, _, _ = cut_out_tiles(data, 0, 0, 100, 100)
    assert len(part) < len(data)


@pytest.mark.parametrize(
    "options", [{}, {"restart_marker_blocks": 7}, {"restart_marker_rows": 2}, {"progressive": True, "restart_marker_rows": 1}]
)
def test_a_jpeg_without_regular_tiles_stays_as_it_is(options):
    data = encoded(photo(100, 200), **options)
    assert with_tile_index(data) == data
    assert cut_out_tiles(data, 10, 10, 20, 20) == (data, 0, 0)


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"\xff\xd8\xff\xe0\xff", b"\0" * 100])
def test_bytes_that_are_no_jpeg_stay_as_they_are(data):
    assert with_tile_index(data) == data
    assert cut_out_tiles(data, 0, 0, 1, 1) == (data, 0, 0)


def test_a_damaged_file_is_an_error_or_an_image_but_never_a_crash():
    data = tiled(photo(100, 200))
    rng = np.random.default_rng(0)
    failed = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] ^= 1 << rng.integers(8)
        for content in (bytes(damaged), data[: rng.integers(len(data))]):
            try:
                view = images.training_view(content, 32, 0.08, np.random.default_rng(0))
                assert view.shape == (32, 32, 3)
            except (ValueError, OSError):
                failed += 1
    assert failed > 100


@pytest.mark.parametrize("blocks", range(1, 65))
def test_tiles_stand_above_each_other(blocks):
    assert blocks % tile_columns(blocks) == 0
