import pytest
import torch
import torchvision

from config import CONFIG
from model import build_model


def test_state_dict_is_interchangeable_with_torchvisions_resnet50():
    ours = build_model(CONFIG, 1000).eval()
    theirs = torchvision.models.resnet50(weights=None).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    ours.load_state_dict(torchvision.models.resnet50(weights=None).state_dict())


def test_it_is_v1_5_with_the_stride_in_the_3x3_convolution():
    block = build_model(CONFIG, 10).layer2[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


@pytest.mark.parametrize(("classes", "height", "width"), [(1, 32, 32), (10, 33, 47), (1234, 96, 64)])
def test_any_number_of_classes_and_any_input_size(classes, height, width):
    model = build_model(CONFIG, classes).eval()
    assert model(torch.randn(1, 3, height, width)).shape == (1, classes)


def test_convolutions_get_he_initialisation():
    weight = build_model(CONFIG, 10).layer3[1].conv2.weight
    fan_out = weight.shape[0] * 9
    assert weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.02)


@pytest.mark.parametrize("zero_init", [True, False])
def test_each_blocks_last_norm_starts_at_zero_if_asked(zero_init):
    model = build_model(CONFIG | {"zero_init_residual": zero_init}, 10)
    blocks = [block for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for block in layer]
    assert len(blocks) == 16
    assert all(block.bn3.weight.eq(0 if zero_init else 1).all() for block in blocks)
    assert model.layer1[0].bn2.weight.eq(1).all()


def test_weights_are_channels_last():
    model = build_model(CONFIG, 10)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4)


def test_weights_depend_on_the_seed_alone_and_leave_the_random_state_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = build_model(CONFIG, 10).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = build_model(CONFIG, 10).state_dict()
    other = build_model(CONFIG | {"seed": 1}, 10).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])
