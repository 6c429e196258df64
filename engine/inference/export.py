"""A network's weights for other programs: PyTorch, safetensors or ONNX, and a model card beside them."""

import os
from pathlib import Path

import torch

from engine.data.loader import IMAGENET_MEAN, IMAGENET_STD
from engine.system.errors import UserError
from engine.system.files import replacing
from engine.system.plain_json import to_json

OPSET = 18
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SUFFIXES = (".pt", ".safetensors", ".onnx")


def export(model, path, facts):
    """Write the network in evaluation mode as the path's suffix says; return a sentence about what was written.

    Args:
        model: the network on the CPU, in float32.
        path: ends in .pt (a state dict with torchvision's keys), .safetensors (the same, with the facts as metadata) or .onnx.
        facts: dict of plain values about the network, of model_facts.
    Raises:
        UserError: another suffix, or a package that is needed is not installed.
    """
    check_export(path)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = model.eval().to(memory_format=torch.contiguous_format)
    if path.suffix == ".onnx":
        return _export_onnx(model, path, facts)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    if path.suffix == ".pt":
        with replacing(path) as file:
            torch.save(weights, file)
    else:
        from safetensors.torch import save

        with replacing(path) as file:
            file.write(save(weights, {name: to_json(value) for name, value in facts.items()} | {"format": "pt"}))
    warning = "; mind the blur (see the model card)" if facts["blurs"] else ""
    return f"wrote {path}: {sum(t.numel() for t in weights.values()):,} numbers with the keys of torchvision's resnet{warning}"


def check_export(path):
    """Raise UserError if export() could not write such a file, so that this is known before the work."""
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise UserError(f"--export {path}: the name must end in one of {', '.join(SUFFIXES)}")
    for package in {".onnx": ONNX_PACKAGES, ".safetensors": ("safetensors",)}.get(suffix, ()):
        _needed(package)


def _needed(package):
    """Return a package that the default install does without."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{package} is not installed: pip install {package}") from error


def _export_onnx(model, path, facts):
    """Write ONNX with a dynamic batch, run it with onnxruntime, and say how far it is from PyTorch."""
    onnx, _, runtime = (_needed(package) for package in ONNX_PACKAGES)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, facts["resolution"], facts["resolution"], generator=generator)
    program = torch.onnx.export(
        model,
        (images[:2],),
        dynamo=True,
        input_names=["images"],
        output_names=["logits"],
        opset_version=OPSET,
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        verbose=False,
    )
    exported = program.model_proto
    for name, value in facts.items():
        exported.metadata_props.add(key=name, value=to_json(value))
    onnx.checker.check_model(exported)
    with replacing(path) as file:
        file.write(exported.SerializeToString())
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.inference_mode():
        expected = model(images)
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    difference = float((torch.from_numpy(logits) - expected).abs().max())
    scale = float(expected.abs().max())
    if not difference <= 1e-3 * max(scale, 1.0):
        os.unlink(path)
        raise UserError(f"{path}: onnxruntime's logits are {difference:.2g} from PyTorch's; the file was removed")
    return (
        f"wrote {path}: opset {OPSET}, images float32 [batch, 3, {facts['resolution']}, {facts['resolution']}] of any batch; "
        f"onnxruntime's logits are at most {difference:.2g} from PyTorch's (the largest is {scale:.3g})"
    )


def model_facts(config, classes, class_names, accuracy, run):
    """Return what whoever uses the weights must know, as a dict of plain values.

    Args:
        accuracy: in words, with resolution and test-time augmentation, or None where it was not measured.
        run: dict of what is known of the training run.
    """
    blurs = [name for key, name in (("blur_pool", "BlurPool"), ("blur_max_pool", "blurred max-pool")) if config[key]]
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
    }


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
    resized = round(resolution / facts["crop_ratio"])
    row("preparation", f"shorter side resized to {resized} px with antialiasing, centre crop of {resolution} px")
    row("output", "logits, one a class, in the order of the classes' sorted names")
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
    lines += ["", "Classes: " + ", ".join(facts["class_names"].get(name, name).split(",")[0] for name in facts["classes"][:12])]
    lines[-1] += f" and {len(facts['classes']) - 12} more." if len(facts["classes"]) > 12 else "."
    return "\n".join(lines) + "\n"
