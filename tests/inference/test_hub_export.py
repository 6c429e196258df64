"""A folder that timm and the Hugging Face Hub read holds the same network."""

import json
import math

import pytest
import torch
import torchvision
from conftest import encoded, photo, run_here, tiny_run
from PIL import Image
from test_evaluate import evaluated

from engine.data.images import validation_view
from engine.data.loader import build_normalise
from engine.inference.model_card import hub_config
from engine.inference.weight_files import find_weights
from engine.system.errors import UserError

pytest.importorskip("safetensors")
CLASSES = [f"kind {number}" for number in range(12)]


@pytest.fixture
def exported(tmp_path, whole_network, capsys):
    """(a network, the folder that it was exported to)"""
    torch.manual_seed(0)
    network = torchvision.models.resnet18(num_classes=12).eval()
    torch.save(network.state_dict(), tmp_path / "w.pt")
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    flags = [tmp_path / "w.pt", "--architecture=resnet18", f"--classes={tmp_path / 'classes.txt'}"]
    assert evaluated(*flags, "--export", f"{tmp_path / 'hub'}/") == 0
    assert (
        "with the keys of torchvision's resnet; beside it config.json, for timm.create_model('local-dir:"
        in capsys.readouterr().out
    )
    return network, tmp_path / "hub"


def test_the_folder_says_what_timm_and_the_hub_need(exported):
    network, folder = exported
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    config = json.loads((folder / "config.json").read_text())
    assert (config["architecture"], config["num_classes"], config["label_names"]) == ("resnet18", 12, CLASSES)
    assert config["pretrained_cfg"]["input_size"] == [3, 224, 224] and config["pretrained_cfg"]["crop_pct"] == 0.875
    card = (folder / "README.md").read_text()
    assert card.startswith("---\ntags:\n- image-classification") and "library_name: timm\n---\n# resnet18, 12 classes" in card
    found = find_weights(str(folder / "model.safetensors"), "resnet50")
    assert found.network["architecture"] == "resnet18" and found.classes == CLASSES
    assert all(torch.equal(tensor, network.state_dict()[key]) for key, tensor in found.weights.items())


def test_timm_loads_it_and_scores_the_same_images_alike(exported, tmp_path):
    timm = pytest.importorskip("timm")
    network, folder = exported
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    by_path = timm.create_model("resnet18", num_classes=12, checkpoint_path=str(folder / "model.safetensors")).eval()
    path = tmp_path / "1.png"
    path.write_bytes(encoded(photo(375, 500), "PNG"))
    ours = build_normalise(torch.device("cpu"), torch.float32)(
        torch.from_numpy(validation_view(path.read_bytes(), 224, 0.875).copy()).permute(2, 0, 1)[None]
    )
    with torch.inference_mode():
        for model in (theirs, by_path):
            torch.testing.assert_close(model(ours), network(ours), rtol=1e-4, atol=1e-5)
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(theirs))
        pixels = transform(Image.open(path))[None]
        assert pixels.shape == ours.shape
        torch.testing.assert_close(theirs(pixels), network(ours), rtol=0, atol=0.02)  # Pillow's resizing against torch's
    assert theirs.pretrained_cfg["label_names"] == CLASSES


@pytest.mark.parametrize("resolution", [128, 160, 224, 256])
@pytest.mark.parametrize("crop_ratio", [0.875, 0.9, 224 / 232, 1.0])
def test_timm_resizes_to_as_many_px_as_the_run_did(resolution, crop_ratio):
    facts = {"architecture": "resnet18", "resolution": resolution, "crop_ratio": crop_ratio, "mean": [], "std": []}
    told = hub_config(facts | {"classes": [], "class_names": {}}, 512)["pretrained_cfg"]["crop_pct"]
    assert math.floor(resolution / told) == round(resolution / crop_ratio)  # timm.data.transforms_imagenet_eval
    assert abs(told - crop_ratio) < 0.01


def test_a_network_that_blurs_is_refused_with_the_way_out(image_tree, tmp_path):
    changes = {"epochs": 1, "warmup_epochs": 0, "swa_start_epoch": 0, "blur_pool": True}
    assert run_here(tiny_run(image_tree, tmp_path / "run", **changes)) == 0
    with pytest.raises(UserError, match=r"without BlurPool and score worse; export ONNX \(--export model.onnx\), or train"):
        evaluated(tmp_path / "run/last.pt", "--export", f"{tmp_path / 'hub'}/")
    assert not list((tmp_path / "hub").glob("*"))
