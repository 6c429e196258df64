"""Published figures that a run on ImageNet-1K is held against; each with its source. None of them was measured here."""

import itertools
import math
from typing import NamedTuple

from engine.preparation.trees import IMAGENET_COUNTS

SEED_RUN = {
    "name": "the seed's run",
    "source": "the run that this project set out to beat: ResNet-50 on a T4 (g4dn.2xlarge), recipe seed",
    "top1": 59.21,  # %, averaged weights
    "epochs": 51,  # of 100, about
    "hours": 65,
    "images_per_s": 282,
    "memory_mib": 11_701,
    "price_per_hour": 0.752,  # USD, on demand
    "interruptions": 2,
    "curve": {1: 13.90, 5: 37.19, 6: 38.90, 10: 44.15, 15: 46.53, 20: 48.01},  # epoch: validation top-1, raw weights
}

# libffcv/ffcv-imagenet, assets/agg.csv: rn50, top-1 at 256 px with flip, by epochs.
FFCV_SOURCE = "FFCV (libffcv/ffcv-imagenet), 8 A100s, 256 px, image and mirror image"
FFCV_TOP1 = {16: 73.76, 24: 75.56, 32: 76.59, 40: 77.24, 88: 78.43}
FFCV_16_CURVE = dict(
    enumerate(
        [6.0, 16.9, 30.8, 36.5, 38.8, 43.3, 45.7, 48.8, 55.4, 56.1, 59.3, 62.2, 64.3, 67.0, 71.1, 73.8],
        start=1,
    )
)
MILD_SOURCE = "Mosaic's mild recipe (mosaicml/benchmarks, blogs/resnet), 224 of 232 px"
RANGE_SOURCE = "an end of the range that MosaicML gives (databricks.com/blog/mosaic-resnet-deep-dive)"


PUBLISHED_FOR = "resnet50"  # the architecture of all these figures


def trains_on_imagenet(classes, images):
    """Return whether training images are ImageNet-1K's, by their numbers; a hundredth of them may be missing."""
    return classes == 1000 and abs(images - IMAGENET_COUNTS[0]) < 0.01 * IMAGENET_COUNTS[0]


def validates_on_imagenet(images):
    """Return whether validation images are ImageNet-1K's, by their number (None: not known)."""
    return images == IMAGENET_COUNTS[1]


class Published(NamedTuple):
    """A top-1 accuracy, and where it is from."""

    top1: float  # %
    source: str
    between: tuple = ()  # epochs of the two published lengths that it is interpolated between; empty: published as it is


# {recipe: {epochs: Published}}. The seed's run is none of them: it was of 100 epochs and ended at about the 51st.
FFCV_POINTS = {epochs: Published(top1, FFCV_SOURCE) for epochs, top1 in FFCV_TOP1.items()}
POINTS = {
    "fast": FFCV_POINTS,
    "long": FFCV_POINTS,
    "mild": {29: Published(76.19, MILD_SOURCE), 60: Published(78.1, RANGE_SOURCE)},  # 28.8 epochs there
    "medium": {60: Published(78.1, RANGE_SOURCE), 240: Published(79.5, RANGE_SOURCE)},
    "hot": {},  # MosaicML has it for runs of more than 240 epochs, and gives no figure
}


def published_result(recipe, epochs):
    """Return the Published accuracy of a recipe of this project at so many epochs, or None.

    Between two published lengths it is interpolated, linearly in the logarithm of the epochs; beyond them there is none.
    """
    if recipe == "seed":
        return Published(SEED_RUN["top1"], SEED_RUN["source"])
    points = POINTS.get(recipe, {})
    if epochs in points:
        return points[epochs]
    for low, high in itertools.pairwise(sorted(points)):
        if low < epochs < high:
            top1 = top1_on_line(points, low, high, epochs)
            sources = dict.fromkeys((points[low].source, points[high].source))
            return Published(top1, "; ".join(sources), (low, high))
    return None


def top1_on_line(points, low, high, epochs):
    """Return the top-1 in % at so many epochs: linear in their logarithm, through the points at `low` and `high` epochs."""
    share = math.log(epochs / low) / math.log(high / low)
    return points[low].top1 + share * (points[high].top1 - points[low].top1)


def published_curve(recipe, epochs):
    """Return ({epoch: validation top-1 in %}, name) published for a recipe at so many epochs, or None.

    Where no whole curve is published, it is the last epoch's point alone.
    """
    if recipe in ("fast", "long") and epochs == 16:
        return FFCV_16_CURVE, "FFCV, 16 epochs"
    if recipe == "seed":
        return SEED_RUN["curve"], SEED_RUN["name"]
    result = published_result(recipe, epochs)
    if result is None:
        return None
    name = "the last epoch alone"
    if result.between:
        name += ", interpolated between {} and {} epochs".format(*result.between)
    return {epochs: result.top1}, name
