"""Data sets made of nothing: real JPEG files of procedural pictures. The demo's are learned in minutes on a CPU; the hard
ones tell recipes apart.

A class is a shape filled with a texture. The demo has 10: each of 5 textures comes in 2 shapes, each of 5 shapes in 2
textures. The hard set has all 100 pairs of 10 shapes and 10 textures, in which each has a near relative (a star of 5 and of
6 rays, circles and a spiral). Colours, size, place, rotation, background, clutter and noise are random, so that single
pixels say next to nothing and the network has to find both form and pattern.
"""

import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from engine.system.errors import DataError
from engine.system.lock import FolderLock
from engine.system.workers import available_cores, worker_pool

CLASSES = (
    "checks_disc",
    "checks_triangle",
    "dots_disc",
    "dots_star",
    "circles_square",
    "circles_star",
    "stripes_ring",
    "stripes_square",
    "waves_ring",
    "waves_triangle",
)
SHAPES = ("disc", "hexagon", "square", "pentagon", "triangle", "cross", "ring", "moon", "star", "star6")
TEXTURES = ("checks", "bricks", "dots", "holes", "circles", "spiral", "stripes", "zigzag", "waves", "lattice")
HARD_CLASSES = tuple(f"{texture}_{shape}" for texture in TEXTURES for shape in SHAPES)
TRAIN_IMAGES = 2000
VAL_IMAGES = 500
COMPLETE = "complete.txt"  # written last: a folder without it is the remains of an interrupted making


def make_demo_data(
    folder, train_images=TRAIN_IMAGES, val_images=VAL_IMAGES, seed=0, classes=CLASSES, sides=(80, 128), draw=None
):
    """Make the demo's ImageFolder tree at `folder`, unless it is there already.

    The tree is built beside its place and renamed, so that an interrupted making leaves nothing half-done.

    Args:
        classes: CLASSES, or HARD_CLASSES.
        sides: px, the shortest and the longest side of a picture.
        draw: {"train": function like picture(), "val": another}; None draws picture() in both.
    Returns:
        True if it was made now, False if it was there.
    Raises:
        DataError: the folder holds something else.
    """
    folder = Path(folder)
    if (folder / COMPLETE).exists():
        return False
    if folder.exists():
        raise DataError(f"{folder} holds something else than the demo's data; name another folder with --data-dir")
    lock = FolderLock(folder.with_name(f".{folder.name}.lock"), "data_dir", "name another folder with --data-dir")
    lock.acquire(print)  # of this process alone, not of a job: each machine makes its own
    counts = {"train": train_images, "val": val_images}
    draw = draw or dict.fromkeys(counts, picture)
    try:
        return _make_there(folder, folder.with_name(f".{folder.name}.unfinished"), counts, seed, classes, sides, draw)
    finally:
        lock.release()


def _make_there(folder, unfinished, counts, seed, classes, sides, draw):
    """Make the tree at `unfinished` and let it become `folder`; return False if somebody else has made it meanwhile."""
    if folder.exists():
        return False
    shutil.rmtree(unfinished, ignore_errors=True)
    jobs = []
    for split_number, (split, count) in enumerate(counts.items()):
        for name in classes:
            (unfinished / split / name).mkdir(parents=True)
        for number in range(count):
            name = classes[number % len(classes)]
            path = unfinished / split / name / f"{number:05d}.jpg"
            jobs.append((path, name, (seed, split_number, number), sides, draw[split]))
    with worker_pool(available_cores()) as pool:
        for _ in pool.map(_write_picture, *zip(*jobs, strict=True), chunksize=50):
            pass
    (unfinished / COMPLETE).write_text(f"{counts['train']} training and {counts['val']} validation pictures, seed {seed}\n")
    unfinished.rename(folder)
    return True


def _write_picture(path, class_name, seed, sides, draw):
    Image.fromarray(draw(class_name, np.random.default_rng(seed), sides)).save(path, quality=90)


def picture(class_name, rng, sides=(80, 128)):
    """Return a random picture of the class, uint8 [h, w, 3], h and w from the first to the second of `sides` px."""
    texture, shape = class_name.split("_")
    height, width = rng.integers(sides[0], sides[1] + 1, size=2)
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    image = _background(x, y, rng)
    _add_clutter(image, x, y, rng)

    radius = rng.uniform(0.32, 0.46) * min(height, width)
    center_x = rng.uniform(0.8 * radius, width - 0.8 * radius)
    center_y = rng.uniform(0.8 * radius, height - 0.8 * radius)
    u, v = _rotated((x - center_x) / radius, (y - center_y) / radius, rng.uniform(0, 2 * np.pi))
    inside = _shape_mask(shape, u, v)
    s, t = _rotated(x - center_x, y - center_y, rng.uniform(0, 2 * np.pi))
    pattern = _texture_mask(texture, s, t, period=radius * rng.uniform(0.4, 0.55), phase=rng.uniform(0, 2 * np.pi))
    bright, dark = _contrasting_colours(rng)
    image[inside & pattern] = bright
    image[inside & ~pattern] = dark

    image += rng.normal(0, rng.uniform(2, 10), size=image.shape)
    return np.clip(image, 0, 255).astype(np.uint8)


def _rotated(x, y, angle):
    return x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)


def _background(x, y, rng):
    """Return a smooth passage between two random colours, float32 [h, w, 3]."""
    along, _ = _rotated(x / x.max() - 0.5, y / y.max() - 0.5, rng.uniform(0, 2 * np.pi))
    share = (along[..., None] + 0.75) / 1.5
    return (share * rng.uniform(0, 255, 3) + (1 - share) * rng.uniform(0, 255, 3)).astype(np.float32)


def _add_clutter(image, x, y, rng):
    """Draw a few small blobs and lines of random colours, in place."""
    height, width = x.shape
    for _ in range(rng.integers(2, 7)):
        u, v = _rotated(x - rng.uniform(0, width), y - rng.uniform(0, height), rng.uniform(0, 2 * np.pi))
        if rng.random() < 0.5:
            spot = (np.abs(v) < rng.uniform(0.7, 2)) & (np.abs(u) < rng.uniform(10, 60))
        else:
            spot = (u / rng.uniform(2, 8)) ** 2 + (v / rng.uniform(2, 8)) ** 2 < 1
        image[spot] = rng.uniform(0, 255, 3)


def _contrasting_colours(rng):
    """Return two random colours whose brightness differs by at least 70 of 255."""
    while True:
        first, second = rng.uniform(0, 255, (2, 3))
        if abs(first.mean() - second.mean()) >= 70:
            return first, second


def _shape_mask(shape, u, v):
    """Return where (u, v) lies inside the shape of about unit radius."""
    distance, angle = np.hypot(u, v), np.arctan2(v, u)
    if shape == "disc":
        return distance < 0.9
    if shape == "ring":
        return (distance < 1) & (distance > 0.55)
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) < 0.78
    if shape in ("star", "star6"):
        return distance < 0.68 + 0.38 * np.cos((6 if shape == "star6" else 5) * angle)
    if shape == "moon":
        return (distance < 0.95) & (np.hypot(u - 0.4, v) > 0.6)
    if shape == "cross":
        return np.minimum(np.abs(u), np.abs(v)) < np.where(distance < 1.05, 0.3, 0)
    corners = {"triangle": (3, 0.55), "pentagon": (5, 0.75), "hexagon": (6, 0.8)}
    if shape in corners:
        number, reach = corners[shape]
        turns = 2 * np.pi * np.arange(number) / number
        return np.maximum.reduce([u * np.cos(a) + v * np.sin(a) for a in turns]) < reach
    raise ValueError(f"no shape {shape!r}")


def _texture_mask(texture, s, t, period, phase):
    """Return where (s, t), in px from the shape's centre, lies on the brighter part of the texture."""
    if texture in ("circles", "spiral"):
        turn = np.arctan2(t, s) if texture == "spiral" else 0
        return np.sin(2 * np.pi * np.hypot(s, t) / period + turn + phase) > 0
    s, t = 2 * np.pi * s / period + phase, 2 * np.pi * t / period + phase
    if texture == "checks":
        return np.sin(s) * np.sin(t) > 0
    if texture == "bricks":
        row = np.floor(t / np.pi)
        return (np.sin(s / 2 + row * np.pi / 2) ** 2 > 0.15) & (np.mod(t, np.pi) > 0.8)
    if texture == "dots":
        return np.sin(s) + np.sin(t) > 0.75
    if texture == "holes":
        return np.sin(s) + np.sin(t) > -0.75
    if texture == "stripes":
        return np.sin(s) > 0
    if texture == "waves":
        return np.sin(s + 1.6 * np.sin(0.6 * t)) > 0
    if texture == "zigzag":
        return np.sin(s + 1.2 * np.abs(np.mod(t, 2 * np.pi) - np.pi)) > 0
    if texture == "lattice":
        return np.maximum(np.sin(s), np.sin(t)) > 0.6
    raise ValueError(f"no texture {texture!r}")
