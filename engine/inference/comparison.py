"""The scores of networks from files on the validation images, beside each other and as an ensemble."""

import contextlib

import torch

from engine.inference.calibration import write_calibration
from engine.inference.confusion import picture_path, write_details
from engine.inference.gallery import GALLERY, write_gallery
from engine.inference.images import open_loader
from engine.inference.outputs import (
    CLASSES_MARK,
    CONFUSIONS_MARK,
    DETAILS_SOURCE,
    GALLERY_MARK,
    IMAGES_MARK,
    picture_mark,
    user_error_on_failure,
)
from engine.inference.scoring import ENSEMBLE, evaluate
from engine.inference.test_sets import (
    SUBSET_RULE,
    classes_present,
    read_real_labels,
    real_in_words,
    subset_logits,
    subset_scores,
)
from engine.inference.views import differing_views, view_of
from engine.system.device import autocast
from engine.system.errors import UserError

CALIBRATION = "_calibration.png"


def compare_networks(networks, splits, device, resolutions=None, details=None, real_labels=None, training=False):
    """Print each network's scores on the validation images, seen as its run did, and those of their ensemble.

    Args:
        splits: of open_matching_splits.
        resolutions: px, in place of the runs'.
        details: prefix of the files with the details of one network or of the ensemble, or None.
        real_labels: path of ReaL's labels, or None.
        training: whether splits['val'] are training images.
    Raises:
        UserError: details of several networks that are no ensemble.
    """
    several, differing = len({network.path for network in networks}) > 1, differing_views(networks, resolutions)
    subject = ENSEMBLE if several and not differing else networks[0].name if len(networks) == 1 else None
    if details and subject is None:
        cure = differing or "choose one kind of weights with --weights raw, averaged or ema"
        raise UserError(f"--details of several networks without an ensemble: {cure}")
    if several and differing:
        print(f"no ensemble: {differing}")
    real = read_real_labels(real_labels, splits["val"]) if real_labels else None
    if len(classes_present(splits["val"])) < len(splits["val"].classes):
        print(SUBSET_RULE)
    by_view = {}
    for network in networks:
        by_view.setdefault(view_of(network, resolutions), []).append(network)
    for view, members in by_view.items():
        settings = members[0].config | {"more_val_resolutions": list(view.resolutions)}
        with contextlib.closing(open_loader(splits, settings, device)) as loader:
            for resolution in view.resolutions:
                prefix = details and prefixes_of(details, view.resolutions)[resolution]
                _score_members(members, loader, view, resolution, subject, prefix, real, training)


def _score_members(members, loader, view, resolution, subject, details, real, training):
    """Print the scores of the networks that share a View, at one resolution; write the details of the subject.

    Args:
        real: of read_real_labels, or None.
    """
    split, precision = loader.splits["val"], members[0].config["precision"]
    models = {network.name: network.model for network in members}
    present, labels = classes_present(split), torch.from_numpy(split.labels)
    is_subset, together = len(present) < len(split.classes), [ENSEMBLE] * (subject == ENSEMBLE)
    needed = [*models, *together] if is_subset or real is not None else [subject] * bool(details and not training)
    results = evaluate(
        models,
        loader.validation(resolution),
        len(split),
        autocast(loader.device, precision),
        view.flip,
        ensemble=subject == ENSEMBLE,
        confusions_of=subject if details else None,
        logits_of=needed,
    )
    crop = f"{resolution} px centre crop (ratio {view.crop_ratio:.4g})"
    for name, scores in results.items():
        name = f"{ENSEMBLE} of {len(models)}" if name == ENSEMBLE else name
        classes, plain = len(present), f"{crop}, no test-time augmentation, {precision}"
        if is_subset:
            among = subset_scores(scores["logits"], labels, present)
            print(f"{name}: {scores_in_words(among, classes)}, {plain}, logits of the {classes:,} classes present alone")
        whole = f", all {len(split.classes):,} logits" if is_subset else ""
        print(f"{name}: {scores_in_words(scores, classes)}, {plain}{whole}")
        if real is not None:
            print(f"{name}: {real_in_words(scores['logits'], real)}, {plain}")
        if view.flip:
            print(f"{name}: {scores_in_words(scores, classes, 'flip_')}, {crop}, image and mirror image, {precision}{whole}")
    if details:
        title = f"{subject}: {scores_in_words(results[subject], len(present))}, {crop}"
        names = getattr(split, "class_names", {})
        with user_error_on_failure("details", details):
            confusions, seen = results[subject]["confusions"], results[subject]["seen"]
            written = write_details(details, confusions, split.classes, names, title)
            shown = resolution, view.crop_ratio
            written += write_gallery(details, seen, confusions.cpu().numpy(), split, shown, title, training)
            if not training:  # which a network is sure of
                logits = results[subject]["logits"]
                logits = subset_logits(logits, present) if is_subset else logits
                drawn, calibrated = write_calibration(f"{details}{CALIBRATION}", logits, labels, title)
                written += [f"{details}{CALIBRATION}"] * drawn
                print(calibrated)
            print(f"wrote {', '.join(written)}")


def prefixes_of(details, resolutions):
    """Return {resolution in px: prefix of the details' files}."""
    return {px: f"{details}_{px}" if len(resolutions) > 1 else details for px in resolutions}


def details_files(prefix, training):
    """Return {file: its mark for claim()} of the details of one resolution; of training images there is no calibration."""
    picture = picture_mark(DETAILS_SOURCE)
    marks = {
        f"{prefix}_classes.csv": CLASSES_MARK,
        f"{prefix}_confusions.csv": CONFUSIONS_MARK,
        f"{prefix}_images.csv": IMAGES_MARK,
        f"{prefix}{GALLERY}": GALLERY_MARK,
        picture_path(prefix): picture,
    }
    return marks if training else marks | {f"{prefix}{CALIBRATION}": picture}


def scores_in_words(scores, classes, view=""):
    """Return top-1, top-5 and loss of evaluate()'s result in words; of the mean with the mirror image for view 'flip_'."""
    top1, top5, loss = (scores[f"{view}{name}"] for name in ("top1", "top5", "loss"))
    return f"top-1 {top1:.2f} %, top-5 {top5:.2f} %, loss {loss:.4f} on {scores['images']:,} images of {classes:,} classes"


def note_shared_images(networks):
    """Print which networks are scored on the images of the first one's run instead of their own."""
    first = networks[0]
    for network in networks:
        if network.config["data_dir"] != first.config["data_dir"]:
            print(f"note: {network.path} is scored on the images of {first.path}, {first.config['data_dir']}")
