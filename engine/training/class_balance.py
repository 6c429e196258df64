"""Classes of unlike numbers of training images: what weighs the loss."""

import numpy as np
import torch


def class_weights(config, images, device):
    """Return what an image of each class counts in the loss, float32 [C] on a device, or None where all count the same.

    Balanced: images / (classes * images of the class), so that all classes weigh the same in an epoch and an image counts 1 on
    average (Logistic Regression in Rare Events Data, King and Zeng 2001; scikit-learn's 'balanced'). A class without images: 0.
    """
    if config["class_weights"] == "none":
        return None
    counts = np.bincount(images.labels, minlength=len(images.classes))
    weights = np.where(counts > 0, len(images) / (np.count_nonzero(counts) * np.maximum(counts, 1)), 0.0)
    return torch.tensor(weights, dtype=torch.float32, device=device)


def weights_in_words(weights, images):
    """Return the remark on the loss weights of class_weights."""
    counts = np.bincount(images.labels, minlength=len(images.classes))
    largest, smallest = counts.argmax(), np.where(counts > 0, counts, counts.max() + 1).argmin()
    first, last = (f"{counts[label]:,} images of {images.classes[label]}" for label in (largest, smallest))
    return (
        f"class_weights: in the loss each of the {first} counts {weights[largest]:.3g}, of the {last} {weights[smallest]:.3g}"
    )
