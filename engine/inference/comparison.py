"""The scores of networks from files on the validation images, beside each other and as an ensemble."""

import contextlib
import os
from pathlib import Path

import torch

from engine.inference.calibration import write_calibration
from engine.inference.confusion import count_confusions, picture_path, write_details
from engine.inference.gallery import GALLERY, write_gallery
from engine.inference.images import open_loader
from engine.inference.outputs import (
    CLASSES_MARK,
    CONFUSIONS_MARK,
    DETAILS_SOURCE,
    GALLERY_MARK,
    IMAGES_MARK,
    has_mark,
    picture_mark,
    user_error_on_failure,
)
from engine.inference.provenance import checkpoints_of, images_in_words, is_of_folder
from engine.inference.scoring import ENSEMBLE, are_uneven, evaluate, seen_in
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
from engine.system.plain_json import from_json

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
    origin = details and {
        "images": images_in_words(networks, splits["val"], training),
        "checkpoints": checkpoints_of(networks, os.path.dirname(details)),
    }
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
                subject_scores = _score_members(members, loader, view, resolution, subject, bool(details), real, training)
                if details:
                    crop = resolution, view.crop_ratio
                    _write_details(prefix, subject, subject_scores, splits["val"], crop, origin, training)


def _score_members(members, loader, view, resolution, subject, details, real, training):
    """Print the scores of the networks that share a View, at one resolution; return evaluate()'s of the subject, if any.

    Args:
        details: whether those of the subject are wanted.
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
        by_class=not is_subset and are_uneven(split),
        logits_of=needed,
    )
    crop = _crop_in_words(resolution, view.crop_ratio)
    for name, scores in results.items():
        name = f"{ENSEMBLE} of {len(models)}" if name == ENSEMBLE else name
        classes, plain = len(present), f"{crop}, no test-time augmentation, {precision}"
        if is_subset:
            among = subset_scores(scores["logits"], labels, present)
            print(f"{name}: {scores_in_words(among, classes)}, {plain}{_rule(split, present)}")
        whole = f", all {len(split.classes):,} logits" if is_subset else ""
        print(f"{name}: {scores_in_words(scores, classes)}, {plain}{whole}")
        if real is not None:
            print(f"{name}: {real_in_words(scores['logits'], real)}, {plain}")
        if view.flip:
            print(f"{name}: {scores_in_words(scores, classes, 'flip_')}, {crop}, image and mirror image, {precision}{whole}")
    return results.get(subject)


def _write_details(prefix, subject, scores, split, crop, origin, training):
    """Write the details of a subject, and print their names; where images of some of the classes are there, by those alone.

    Args:
        scores: evaluate()'s of the subject, with its logits where they are needed.
        crop: (resolution in px, crop ratio).
        origin: of write_gallery.
    """
    present, labels, logits = classes_present(split), torch.from_numpy(split.labels), scores.get("logits")
    rule = _rule(split, present)
    if rule:
        logits = subset_logits(logits, present)
        seen = [of[:, : len(present)] if of.ndim == 2 else of for of in seen_in(logits, labels)]
        scores = subset_scores(scores["logits"], labels, present) | {
            "seen": seen,
            "confusions": count_confusions(logits, labels),
        }
    where = "" if origin["images"].startswith("validation") else f", {origin['images']}"
    title = f"{subject}: {scores_in_words(scores, len(present))}, {_crop_in_words(*crop)}{where}{rule}"
    with user_error_on_failure("details", prefix):
        written = write_details(prefix, scores["confusions"], split.classes, getattr(split, "class_names", {}), title)
        confusions = scores["confusions"].cpu().numpy()
        written += write_gallery(prefix, scores["seen"], confusions, split, crop, title, origin, training)
        if not training:  # which a network is sure of
            drawn, calibrated = write_calibration(f"{prefix}{CALIBRATION}", logits, labels, title)
            written += [f"{prefix}{CALIBRATION}"] * drawn
            print(f"{calibrated}{rule}")
        print(f"wrote {', '.join(written)}")


def _rule(split, present):
    """Return by which logits a set of some of the classes is scored, in words; nothing of a set of all classes."""
    return f", logits of the {len(present):,} classes present alone" if len(present) < len(split.classes) else ""


def _crop_in_words(resolution, crop_ratio):
    return f"{resolution} px centre crop (ratio {crop_ratio:.4g})"


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


def delete_details(folder):
    """Delete the details of checkpoints of a folder that lie in it, as far as they are as --details has written them."""
    for gallery in list(Path(folder).glob(f"*{GALLERY}")):
        try:
            content = from_json(gallery.read_text(encoding="utf-8"))
            is_own = has_mark(gallery, GALLERY_MARK) and is_of_folder(content.get("checkpoints"))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # whatever it is, it is none
        marks = details_files(str(gallery).removesuffix(GALLERY), training=False) if is_own else {}
        for path, mark in marks.items():
            if os.path.isfile(path) and (os.path.getsize(path) == 0 or has_mark(path, mark)):  # 0: no confusions
                os.unlink(path)


def scores_in_words(scores, classes, view=""):
    """Return top-1, any top-5 and loss of evaluate()'s result in words; of the mean with the mirror image for view 'flip_'."""
    top5 = f", top-5 {scores[f'{view}top5']:.2f} %" if f"{view}top5" in scores else ""
    mean = f", mean of the classes {scores['balanced_top1']:.2f} %" if "balanced_top1" in scores and not view else ""
    images = f"{scores['images']:,} images of {classes:,} classes{mean}"
    return f"top-1 {scores[f'{view}top1']:.2f} %{top5}, loss {scores[f'{view}loss']:.4f} on {images}"


def note_shared_images(networks):
    """Print which networks are scored on the images of the first one's run instead of their own."""
    first = networks[0]
    for network in networks:
        if network.config["data_dir"] != first.config["data_dir"]:
            print(f"note: {network.path} is scored on the images of {first.path}, {first.config['data_dir']}")
