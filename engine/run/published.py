"""Published figures that a run on ImageNet-1K is held against; each with its source. None of them was measured here."""

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
MOSAIC_MILD = {
    "epochs": 28.8,
    "top1": 76.19,
    "source": "Mosaic's mild recipe (mosaicml/benchmarks, blogs/resnet), 224 of 232 px",
}


def published_result(recipe, epochs):
    """Return (top-1 in %, source) published for a recipe of this project at so many epochs, or None."""
    if recipe in ("fast", "long") and epochs in FFCV_TOP1:
        return FFCV_TOP1[epochs], FFCV_SOURCE
    if recipe == "mild" and epochs == 29:
        return MOSAIC_MILD["top1"], MOSAIC_MILD["source"]
    if recipe == "seed":
        return SEED_RUN["top1"], SEED_RUN["source"]
    return None


def published_curve(recipe, epochs):
    """Return ({epoch: validation top-1 in %}, name) published for a recipe at so many epochs, or None."""
    if recipe == "fast" and epochs == 16:
        return FFCV_16_CURVE, "FFCV, 16 epochs"
    if recipe == "seed":
        return SEED_RUN["curve"], SEED_RUN["name"]
    return None
