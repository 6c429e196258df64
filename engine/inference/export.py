"""A network's weights for other programs: PyTorch, safetensors or ONNX, and a model card beside them."""

import collections
import io
import json
import os
from pathlib import Path

import torch
import torchvision

from engine.inference.model_card import accuracy_in_words, facts_of_runs, hub_card, hub_config, model_card, model_facts
from engine.inference.networks import class_labels
from engine.inference.outputs import CARD_MARK, TIMM_CONFIG_MARK, is_export, mark_in, user_error_on_failure
from engine.run.weights import WEIGHTS
from engine.system.environment import commit
from engine.system.errors import UserError
from engine.system.files import readable_name, replacing
from engine.system.plain_json import to_json

OPSET = 18
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
SUFFIXES = (".pt", ".safetensors", ".onnx")
HUB_WEIGHTS, HUB_CONFIG, HUB_CARD = "model.safetensors", "config.json", "README.md"  # of a folder that timm and the Hub read


def export_network(network, members, path, price_per_hour=None):
    """Write a network's weights for other programs, and the model card beside them; print what was written.

    Args:
        network: Network of engine/inference/networks.py.
        members: the networks of files whose mean it is, or itself alone.
        path: as for export(); a folder gets its model card as README.md.
        price_per_hour: of the machine, for the model card; or None.
    """
    words = {kind: weights.in_words for kind, weights in WEIGHTS.items()} | {"mean": network.name}
    run = {
        "weights": words.get(network.kind, "as in the file"),
        "made_with": f"PyTorch {torch.__version__}, commit {commit()}",
    } | facts_of_runs([member for member in members if member.checkpoint])
    share = next((member.share for member in members if member.share), {})
    names, accuracy = network.class_names, accuracy_in_words(network)
    facts = model_facts(network.config, class_labels(network), names, accuracy, run, share)
    model = network.model.cpu().float().eval()
    facts["differs"] = None if facts["blurs"] else _difference_from_torchvision(model, facts)
    folder, (*_, card) = is_folder(path), export_files(path)
    with user_error_on_failure("export", path):
        print(export(model, path, facts))
        with replacing(card, "w") as file:
            file.write(hub_card(facts, price_per_hour) if folder else model_card(path, facts, price_per_hour))
    print(f"wrote {card}")


def export(model, path, facts):
    """Write the network in evaluation mode as the path's suffix says; return a sentence about what was written.

    Args:
        model: the network on the CPU, in float32.
        path: ends in .pt or .safetensors (a state dict with torchvision's keys, with the facts as metadata) or .onnx; or a
            folder, for timm and the Hugging Face Hub.
        facts: dict of plain values about the network, of model_facts, and how it 'differs' from torchvision's.
    Raises:
        UserError: another suffix, a package that is needed is not installed, or a folder for a network that timm does not have.
    """
    check_export(path)
    if is_folder(path):
        return _export_folder(model, Path(path), facts)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    model = model.eval().to(memory_format=torch.contiguous_format)
    if path.suffix == ".onnx":
        return _export_onnx(model, path, facts)
    weights = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
    told = {name: to_json(value) for name, value in facts.items()}
    if path.suffix == ".pt":
        marked = collections.OrderedDict(weights)
        marked._metadata = {"": {"facts": told}}  # where torch marks a module's state dict: no tensor more
        buffer = io.BytesIO()  # torch's writer turns a full disk into an error of its own
        torch.save(marked, buffer)
        with replacing(path) as file:
            file.write(buffer.getbuffer())
    else:
        from safetensors.torch import save

        with replacing(path) as file:
            file.write(save(weights, told | {"format": "pt"}))
    keys = " with the keys of torchvision's resnet"
    if facts["blurs"]:
        keys += "; mind the blur (see the model card)"
    elif facts["differs"]:
        keys = f"; WARNING: {facts['differs']}: model.py builds another network"
    return f"wrote {path}: {sum(t.numel() for t in weights.values()):,} numbers{keys}"


def _difference_from_torchvision(model, facts):
    """Return in words why torchvision's network of this name is another one, by weights or logits; None if it is not."""
    with torch.device("meta"):
        network = torchvision.models.get_model(facts["architecture"], num_classes=len(facts["classes"])).eval()
    try:
        network.load_state_dict(model.state_dict(), assign=True)
    except RuntimeError:
        return f"torchvision's {facts['architecture']} does not take them"
    images = torch.randn(2, 3, facts["resolution"], facts["resolution"], generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected, logits = model(images), network(images)
    alike = torch.allclose(logits, expected, rtol=1e-3, atol=1e-3 * max(float(expected.abs().max()), 1.0))
    return None if alike else f"with them torchvision's {facts['architecture']} gives other logits"


def is_folder(path):
    """Return whether an export's path means a folder: it ends with a slash, or is one that is not named as a file."""
    return str(path).endswith("/") or (Path(path).is_dir() and Path(path).suffix not in SUFFIXES)


def export_files(path):
    """Return {file: its mark for claim()} of an export, the model card last."""
    if is_folder(path):
        return {Path(path, HUB_WEIGHTS): is_export, Path(path, HUB_CONFIG): TIMM_CONFIG_MARK, Path(path, HUB_CARD): CARD_MARK}
    return {Path(path): is_export, _card_beside(Path(path)): CARD_MARK}


def _card_beside(path):
    """Return the path of an export's model card: model.md, or model.onnx.md where that is the card of model.pt."""
    card = path.with_suffix(".md")
    described = mark_in(card, CARD_MARK) if card.is_file() and os.access(card, os.R_OK) else None
    return path.with_name(f"{path.name}.md") if described and described[1] != os.fsencode(path.name) else card


def _export_folder(model, folder, facts):
    """Write the weights and timm's config.json into a folder; return a sentence about it."""
    if facts["blurs"]:
        raise UserError(
            f"--export {folder}/: timm would build a {facts['architecture']} without {' and '.join(facts['blurs'])} and score "
            "worse; export ONNX (--export model.onnx), or train with --blur-pool false --blur-max-pool false"
        )
    if not isinstance(model.fc, torch.nn.Linear):
        raise UserError(f"--export {folder}/: timm has no network with this last layer; export ONNX (--export model.onnx)")
    sentence = export(model, folder / HUB_WEIGHTS, facts)
    with replacing(folder / HUB_CONFIG, "w") as file:
        file.write(json.dumps(hub_config(facts, model.fc.in_features), indent=2) + "\n")
    return f"{sentence}; beside it {HUB_CONFIG}, for timm.create_model('local-dir:{folder}', pretrained=True)"


def check_export(path):
    """Raise UserError if export() could not write such a file, so that this is known before the work."""
    if is_folder(path):
        _require("safetensors")
        return
    suffix = Path(path).suffix
    if suffix not in SUFFIXES:
        raise UserError(f"--export {path}: the name must end in one of {', '.join(SUFFIXES)}, or in / for a folder")
    for package in {".onnx": ONNX_PACKAGES, ".safetensors": ("safetensors",)}.get(suffix, ()):
        _require(package)


def _require(package):
    """Return a package that the default install does without."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{package} is not installed: pip install {package}") from error


def _export_onnx(model, path, facts):
    """Write ONNX with a dynamic batch, run it with onnxruntime, and return how far it is from PyTorch."""
    onnx, _, runtime = (_require(package) for package in ONNX_PACKAGES)
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
    with readable_name(path) as name:
        session = runtime.InferenceSession(name, providers=["CPUExecutionProvider"])
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
