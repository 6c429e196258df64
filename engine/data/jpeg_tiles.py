"""A part of a JPEG without decoding the rest.

After a restart marker a JPEG decoder knows nothing of what came before. Where the markers come at regular places of every
row of blocks, the stretches between them are tiles: those outside of a crop can be dropped, the size in the header lowered,
the markers numbered anew, and what is left is a smaller JPEG with the very same pixels. `with_tile_index` writes down where the
tiles lie, in a comment; for any other decoder the file is an ordinary JPEG.
"""

import math
import struct

import numpy as np

COMMENT = b"\xff\xfe"
MAGIC = b"jpegtile"
FIXED = struct.Struct(">8sHHHHII")  # magic; height, width of image and of tile, px; positions of the size and of the tiles
RESTART_0 = 0xD0  # the second byte of the first of eight restart markers
END_OF_IMAGE = b"\xff\xd9"


def tile_columns(blocks_in_row):
    """Return how many tiles to make of a row of blocks: about 8, and a divisor, so that they form columns."""
    divisors = [count for count in range(1, 17) if blocks_in_row % count == 0]
    return min(divisors, key=lambda count: abs(math.log(count / 8)))


def cut_out_tiles(data, top, left, height, width, scale=1):
    """Return (JPEG, its first row, its first column): the tiles of the JPEG `data` that a crop touches.

    A margin of one pixel of the decoded image is kept, so that the crop's chroma is interpolated from the same neighbours as
    in the whole image. A file without an index of tiles is returned as it is.

    Args:
        top, left, height, width: of the crop, px.
        scale: the DCT scale that it will be decoded at, 1, 2, 4 or 8.
    """
    index_at = 8 + int.from_bytes(data[4:6])  # after the first segment and the comment's own marker and length
    if data[index_at : index_at + 8] != MAGIC:
        return data, 0, 0
    _, image_height, image_width, tile_height, tile_width, size_at, scan_at = FIXED.unpack_from(data, index_at)
    rows, columns = -(-image_height // tile_height), -(-image_width // tile_width)
    lengths = np.frombuffer(data, ">u2", rows * columns, index_at + FIXED.size).astype(np.int64)
    starts = np.concatenate([[scan_at], scan_at + lengths.cumsum()])
    if starts[-1] != len(data):
        return data, 0, 0  # cut off: the decoder will say so
    first_row, first_column = max(0, top - scale) // tile_height, max(0, left - scale) // tile_width
    end_row = (min(top + height + scale, image_height) - 1) // tile_height + 1
    end_column = (min(left + width + scale, image_width) - 1) // tile_width + 1
    end_column = min(columns, max(end_column, first_column + -(-8 * scale // tile_width)))  # of an image of one or two columns
    while first_column and image_width - first_column * tile_width < 8 * scale:  # of chroma the decoder interpolates none
        first_column -= 1
    part_height = min(image_height, end_row * tile_height) - first_row * tile_height
    part_width = min(image_width, end_column * tile_width) - first_column * tile_width

    pieces = [data[:size_at], struct.pack(">HH", part_height, part_width), data[size_at + 4 : scan_at]]
    row_starts = starts[:-1].reshape(rows, columns)[first_row:end_row, first_column].tolist()
    row_ends = starts[1:].reshape(rows, columns)[first_row:end_row, end_column - 1].tolist()
    pieces += [data[start:end] for start, end in zip(row_starts, row_ends, strict=True)]
    part = bytearray().join(pieces)
    markers = scan_at + lengths.reshape(rows, columns)[first_row:end_row, first_column:end_column].ravel().cumsum() - 2
    np.frombuffer(part, np.uint8)[markers + 1] = RESTART_0 + np.arange(len(markers)) % 8
    part[-2:] = END_OF_IMAGE
    return bytes(part), first_row * tile_height, first_column * tile_width


def with_tile_index(data):
    """Return the JPEG with an index of its tiles for cut_out_tiles, or as it is where there are no tiles to speak of.

    Args:
        data: a JPEG; tiles need a baseline one with restart markers at regular places of every row of blocks.
    """
    tiling = _tiling(data)
    if tiling is None:
        return data
    (height, width, tile_height, tile_width, size_at, scan_at), after_first_segment = tiling
    content = np.frombuffer(data, np.uint8)
    at = np.flatnonzero(content[scan_at:-2] == 0xFF) + scan_at
    markers = at[content[at + 1] & 0xF8 == RESTART_0]  # in the pixels' data no other FF is followed by D0 to D7
    lengths = np.diff([scan_at, *(markers + 2).tolist(), len(data)])
    size = FIXED.size + 2 * len(lengths)
    if len(lengths) != -(-height // tile_height) * -(-width // tile_width) or lengths.max() > 65535 or size + 2 > 65535:
        return data
    moved = 4 + size
    index = FIXED.pack(MAGIC, height, width, tile_height, tile_width, size_at + moved, scan_at + moved)
    comment = COMMENT + struct.pack(">H", 2 + size) + index + lengths.astype(">u2").tobytes()
    return data[:after_first_segment] + comment + data[after_first_segment:]


def _tiling(data):
    """Return ((height, width, tile height, tile width in px, positions of the size and of the tiles), end of the first
    segment) of a baseline JPEG with restart markers at regular places of every row of blocks, else None."""
    if data[:2] != b"\xff\xd8" or data[-2:] != END_OF_IMAGE:
        return None
    frame_at, interval, position = None, 0, 2
    while True:
        if position + 4 > len(data) or data[position] != 0xFF:
            return None
        marker, length = data[position + 1], int.from_bytes(data[position + 2 : position + 4])
        if marker == 0xDA:  # start of the scan
            break
        if marker == 0xC0:  # the frame of a baseline JPEG
            frame_at = position
        elif marker == 0xDD:
            interval = int.from_bytes(data[position + 4 : position + 6])
        position += 2 + length
    if frame_at is None or data[position + 4] != data[frame_at + 9]:  # another kind of frame; components in scans of their own
        return None
    height, width, components = struct.unpack_from(">HHB", data, frame_at + 5)
    sampling = [data[frame_at + 11 + 3 * component] for component in range(components)] if components > 1 else [0x11]
    tile_height, block_width = 8 * max(factors & 15 for factors in sampling), 8 * max(factors >> 4 for factors in sampling)
    if not interval or not height or -(-width // block_width) % interval:
        return None
    after_first_segment = 4 + int.from_bytes(data[4:6])
    return (height, width, tile_height, block_width * interval, frame_at + 5, position + 2 + length), after_first_segment
