import pytest
import torch
import torch.nn.functional as F
import torchvision

from config import CONFIG
from model import BlurredConv2d, BlurredMaxPool2d, build_model


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


def test_blur_pool_blurs_before_every_strided_convolution_of_16_or_more_channels():
    model = build_model(CONFIG | {"blur_pool": True}, 10)
    blurred = {name for name, module in model.named_modules() if isinstance(module, BlurredConv2d)}
    strided = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv2d) and module.stride[0] > 1}
    assert strided - blurred == {"conv1"}
    assert blurred == {f"layer{n}.0.{conv}" for n in (2, 3, 4) for conv in ("conv2", "downsample.0")}


@pytest.mark.parametrize("kernel", [1, 3])
def test_blur_pool_is_a_convolution_of_the_image_blurred_by_1_2_1(kernel):
    torch.manual_seed(0)
    conv = BlurredConv2d(16, 8, kernel, stride=2, padding=kernel // 2, bias=False)
    images = torch.randn(2, 16, 12, 14)
    padded = F.pad(images, (1, 1, 1, 1))
    rows = (padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]) / 4
    blurred = (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 4
    expected = F.conv2d(blurred, conv.weight, stride=2, padding=kernel // 2)
    torch.testing.assert_close(conv(images), expected)
    flat = conv(torch.ones(1, 16, 16, 16))[..., 2:-2, 2:-2]
    torch.testing.assert_close(flat, conv.weight.sum((1, 2, 3)).view(1, 8, 1, 1).expand_as(flat))


def test_blur_max_pool_takes_the_largest_of_every_3x3_px_and_blurs_before_its_stride():
    pool = build_model(CONFIG | {"blur_max_pool": True}, 10).maxpool
    images = torch.randn(2, 64, 12, 14)
    largest = F.max_pool2d(images, 3, stride=1, padding=1)
    ones = torch.tensor([1.0, 2.0, 1.0]) / 4
    rows = F.conv2d(largest.reshape(-1, 1, 12, 14), ones.view(1, 1, 3, 1), padding=(1, 0))
    blurred = F.conv2d(rows, ones.view(1, 1, 1, 3), padding=(0, 1)).view(2, 64, 12, 14)
    torch.testing.assert_close(pool(images), blurred[..., ::2, ::2])


@pytest.mark.parametrize("key", ["blur_pool", "blur_max_pool"])
def test_blur_pool_changes_no_weight_and_no_key(key):
    plain, blurred = (build_model(CONFIG | {key: blur}, 10) for blur in (False, True))
    first, second = plain.state_dict(), blurred.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert not torch.allclose(plain.eval()(images), blurred.eval()(images))
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in blurred.parameters() if p.ndim == 4)


def test_stochastic_depth_leaves_blocks_out_by_the_linear_rule_and_only_in_training():
    torch.manual_seed(0)
    config = CONFIG | {"stochastic_depth": 0.5, "zero_init_residual": False, "architecture": "resnet18"}
    model = build_model(config, 10)
    plain = build_model(config | {"stochastic_depth": 0.0}, 10)
    assert list(model.state_dict()) == list(plain.state_dict())
    blocks = [block for layer in (model.layer1, model.layer2, model.layer3, model.layer4) for block in layer]
    for number in (0, 1, 3, 7):
        channels = blocks[number].conv1.in_channels
        inputs = torch.randn(400, channels, 4, 4)
        blocks[number].train()
        seen = []
        blocks[number].bn2.register_forward_hook(lambda module, _, output, seen=seen: seen.append(output.clone()))
        blocks[number](inputs)
        dropped = (seen[0].flatten(1) == 0).all(1).float().mean().item()
        assert dropped == pytest.approx(0.5 * number / 7, abs=0.08)
    with torch.inference_mode():
        images = torch.randn(2, 3, 64, 64)
        fresh = build_model(config, 10).eval()
        torch.testing.assert_close(fresh(images), build_model(config | {"stochastic_depth": 0.0}, 10).eval()(images))


def test_stochastic_depth_keeps_the_mean():
    torch.manual_seed(0)
    block = build_model(CONFIG | {"stochastic_depth": 0.4, "architecture": "resnet18"}, 10).layer4[1].train()
    block.bn2.weight.data.fill_(1)
    block.bn2.bias.data.fill_(1)
    seen = []
    block.bn2.register_forward_hook(lambda module, _, output: seen.append(output.clone()))
    block(torch.randn(2000, 512, 1, 1))
    assert seen[0].mean().item() == pytest.approx(1, abs=0.05)
    kept = seen[0][(seen[0].flatten(1) != 0).any(1)]
    assert kept.mean().item() == pytest.approx(1 / 0.6, abs=0.05)


@pytest.mark.parametrize(
    "changes", [{}, {"blur_pool": True, "blur_max_pool": True, "memory": "low"}, {"architecture": "resnet18"}]
)
def test_every_stage_forward_and_backward_stays_channels_last(changes):
    model = build_model(CONFIG | changes, 10).train()
    strided = []

    def note(tensor):
        strided.append(tensor.is_contiguous(memory_format=torch.channels_last))

    def check(module, inputs, output):
        note(output)
        output.register_hook(note)  # its gradient

    layers = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.BatchNorm2d, BlurredMaxPool2d))]
    for layer in layers:
        layer.register_forward_hook(check)
    images = torch.randn(4, 3, 64, 64).to(memory_format=torch.channels_last)
    model(images).sum().backward()
    assert len(strided) >= 2 * len(layers)
    assert all(strided)
    weights = [m.weight.grad for m in layers if isinstance(m, torch.nn.Conv2d) and m.kernel_size != (1, 1)]
    assert all(gradient.is_contiguous(memory_format=torch.channels_last) for gradient in weights)
