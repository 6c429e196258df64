"""The model card of exported weights: what whoever uses them must know, and what the training took."""

import math
from pathlib import Path

from engine.data.loader import IMAGENET_MEAN, IMAGENET_STD
from engine.inference.class_names import class_in_short
from engine.inference.weight_files import BLURS, has_best_weights
from engine.preparation.names import are_numbers, class_order
from engine.run import checkpoint_files
from engine.run.records import read_records
from engine.run.weights import WEIGHTS


def model_facts(config, classes, class_names, accuracy, run, share):
    """Return what whoever uses the weights must know, as a dict of plain values.

    Args:
        accuracy: in words, with resolution and test-time augmentation, or None where it was not measured.
        run: dict of what is known of the training run.
        share: of a Network: so that nobody scores the weights on images that they were trained on.
    """
    blurs = [name for key, name in BLURS.items() if config[key]]
    return {
        "architecture": config["architecture"],
        "blurs": blurs,
        "resolution": config["val_resolution"],
        "crop_ratio": config["val_crop_ratio"],
        "mean": list(IMAGENET_MEAN),
        "std": list(IMAGENET_STD),
        "classes": list(classes),
        "class_names": class_names,
        "accuracy": accuracy,
        "run": run,
        "share": share,
    }


def accuracy_in_words(network):
    """Return how well a Network scored when its run validated these very weights, with resolution; None if it did not."""
    top1, config = _measured_top1(network), network.config
    if top1 is None:
        return None
    crop = f"{config['val_resolution']} px centre crop (ratio {config['val_crop_ratio']:.4g}), no test-time augmentation"
    return f"top-1 {top1:.2f} %, {crop}"


def _measured_top1(network):
    checkpoint = network.checkpoint
    if network.kind not in WEIGHTS or not checkpoint or checkpoint["batch"] > 0:  # trained on since
        return None
    best = checkpoint["best"]
    if has_best_weights(checkpoint) and best["weights"] == network.kind:
        return best["top1"]
    for record in read_records(network.path.parent / checkpoint_files.RECORDS):
        if record["epoch"] == checkpoint["epoch"] and record.get("best_top1") == best["top1"]:  # of this run, not of another
            return record.get(f"{WEIGHTS[network.kind].column}_top1")
    return None


def facts_of_runs(networks):
    """Return what the model card says of the runs that gave the networks of checkpoints: all that they took together."""
    if not networks:
        return {}

    def listed(values):
        return ", ".join(dict.fromkeys(map(str, values)))

    facts = {key: listed(network.checkpoint.get(key) for network in networks) for key in ("recipe", "hardware")}
    epochs = listed(_epochs_in_words(network.checkpoint) for network in networks)
    facts |= {"epochs": epochs, "seed": listed(network.config["seed"] for network in networks)}
    if len(images := {network.checkpoint["train_images"] for network in networks}) == 1:
        facts["train_images"] = images.pop()
    records = []
    for folder in {network.path.parent for network in networks}:
        last = max(network.checkpoint["epoch"] for network in networks if network.path.parent == folder)
        records += [r for r in read_records(folder / checkpoint_files.RECORDS) if r["epoch"] <= last]
    if records:
        facts["hours"] = sum(record["seconds"] for record in records) / 3600
        facts["energy_wh"] = sum(record.get("gpu_energy_wh", 0) for record in records)
    return facts


def _epochs_in_words(checkpoint):
    epochs, batches = checkpoint["epoch"], checkpoint["batch"]
    return f"{epochs} epoch{'s' * (epochs != 1)} and {batches} batches" if batches else str(epochs)


def _order_in_words(classes):
    if classes != class_order(classes):
        return "of the classes below, as the file names them"
    return "of the classes' numbers" if are_numbers(classes) else "of the classes' sorted names"


def resized_px(facts):
    """Return the shorter side in px that validation_view resizes to."""
    return round(facts["resolution"] / facts["crop_ratio"])


def model_card(path, facts, price_per_hour=None):
    """Return the model card of an exported file, in Markdown."""
    run, resolution = facts["run"], facts["resolution"]
    lines = [f"# {facts['architecture']}, {len(facts['classes'])} classes", ""]
    lines += [f"Weights in `{Path(path).name}`, trained with the recipe `{run.get('recipe', 'unknown')}`.", ""]
    lines += ["| | |", "|---|---|"]

    def row(name, value):
        if value is not None:
            lines.append(f"| {name} | {value} |")

    row("validation accuracy", facts["accuracy"] or "not measured")
    row("input", f"RGB, float [batch, 3, {resolution}, {resolution}], (pixel / 255 - mean) / std")
    row("mean, std", f"{tuple(facts['mean'])}, {tuple(facts['std'])}")
    row("preparation", f"shorter side resized to {resized_px(facts)} px (antialiased bilinear), centre crop of {resolution} px")
    row("output", f"logits, one a class, in the order {_order_in_words(facts['classes'])}")
    row("training data", f"{run['train_images']:,} images" if "train_images" in run else None)
    row("epochs", run.get("epochs"))
    row("weights", run.get("weights"))
    row("seed", run.get("seed"))
    hours, energy = run.get("hours"), run.get("energy_wh")
    row("training time", f"{hours:.2f} hours of training, without validation" if hours is not None else None)
    row("energy of the GPU", f"{energy / 1000:.2f} kWh (NVML, sampled once a second)" if energy else "not measured")
    if price_per_hour is not None and hours is not None:
        row("cost of the training time", f"{hours * price_per_hour:.2f} at {price_per_hour:g} per hour")
    row("hardware", run.get("hardware"))
    row("made with", run.get("made_with"))
    if facts["blurs"]:
        lines += [
            "",
            f"**The network has {' and '.join(facts['blurs'])}.** The keys are those of torchvision's {facts['architecture']}, "
            "but the network must blur where it strides: build it with this project's `model.py`, or use the ONNX export. In a "
            f"plain `torchvision.models.{facts['architecture']}()` the weights load without an error and score worse.",
        ]
    if facts["differs"]:
        lines += [
            "",
            f"**The weights are those of a changed `model.py`: build it so, or use the ONNX export: {facts['differs']}.**",
        ]
    shown = ", ".join(class_in_short(name, facts["class_names"]) for name in facts["classes"][:12])
    lines += ["", "Classes: " + shown.replace("<", "\\<")]  # else it may be a tag
    lines[-1] += f" and {len(facts['classes']) - 12} more." if len(facts["classes"]) > 12 else "."
    return "\n".join(lines) + "\n"


# For timm and the Hugging Face Hub ------------------------------------------------------------------------------------


def hub_config(facts, num_features):
    """Return the config.json that timm writes and reads (timm.models.save_for_hf, 1.0), as a dict.

    Args:
        num_features: inputs of the last layer.
    """
    resolution, crop_ratio = facts["resolution"], facts["crop_ratio"]
    if math.floor(resolution / crop_ratio) != resized_px(facts):  # what timm resizes to, which cuts off
        crop_ratio = resolution / (resized_px(facts) + 0.5)
    return {
        "architecture": facts["architecture"],
        "num_classes": len(facts["classes"]),
        "num_features": num_features,
        "global_pool": "avg",
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, resolution, resolution],
            "fixed_input_size": False,
            "interpolation": "bilinear",
            "crop_pct": crop_ratio,
            "crop_mode": "center",
            "mean": facts["mean"],
            "std": facts["std"],
            "num_classes": len(facts["classes"]),
            "pool_size": [-(-resolution // 32)] * 2,
            "first_conv": "conv1",
            "classifier": "fc",
        },
        "label_names": facts["classes"],
        "label_descriptions": facts["class_names"],
    }


def hub_card(facts, price_per_hour=None):
    """Return the README.md of a folder for the Hub: what the Hub reads of a model, the model card, and how timm loads it."""
    return f"""---
tags:
- image-classification
- timm
pipeline_tag: image-classification
library_name: timm
---
{model_card("model.safetensors", facts, price_per_hour)}
    timm.create_model("local-dir:FOLDER", pretrained=True)  # or hf-hub:OWNER/NAME
"""
