"""With `deterministic` every operator of the step, of recomputed batch norm and of validation has a deterministic form: PyTorch
raises at those that have none.

The operators run for real, on the stand-in, since fake tensors know nothing of it. Convolutions and products of matrices,
which need cuDNN and cuBLAS, are left out: the switches that proof_card.py looks at make those deterministic.
"""

import pytest
import torch
from conftest import fresh_state
from fake_cuda import CUDA, QUICK, batch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from config import CONFIG
from engine.inference.batch_norm import recompute_bn_stats
from engine.inference.scoring import evaluate
from engine.system.device import autocast
from engine.training.mixing import build_mixing
from train import train_step

LIBRARIES = ("conv", "linear", "mm", "addmm", "batch_norm")  # of cuDNN and cuBLAS; batch norm's own kernels have no atomics
LIBRARIES += ("topk", "index_add")  # these sort by CUB, which finds no kernel here; both have such a form, PyTorch says


class WithoutLibraries(TorchDispatchMode):
    """Gives the libraries' operators results of the right shape and no content."""

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        options = options or {}
        if not any(name in operator.__name__.split(".")[0] for name in LIBRARIES):
            return operator(*arguments, **options)
        with FakeTensorMode(allow_non_fake_inputs=True) as fake:
            results = operator(*tree_map_only(torch.Tensor, fake.from_tensor, (arguments, options))[0], **options)
        return tree_map_only(
            torch.Tensor, lambda t: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device), results
        )


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "sgd", "mixup_alpha": 0.2, "cutmix_alpha": 1.0, "loss": "bce", "blur_pool": True, "blur_max_pool": True},
        {"optimizer": "adamw", "label_smoothing": 0.1, "stochastic_depth": 0.2, "memory": "low", "micro_batch_size": 4},
        {"optimizer": "sgdw", "colout": 0.05, "mixup_alpha": 0.25},
        {"optimizer": "muon"},
        {"sam_rho": 0.5, "sam_every_steps": 1, "memory": "lowest", "ema_half_life_images": 8, "ema_every_images": 8},
        {"class_weights": "balanced", "loss": "bce", "label_smoothing": 0.1, "freeze": "stem"},
        {"class_weights": "balanced", "optimizer": "sgd", "nesterov": True, "backbone_rate_factor": 0.1},
    ],
)
def test_no_operator_of_the_step_lacks_a_deterministic_form(deterministic, changes):
    config = CONFIG | QUICK | {"batch_size": 8} | changes
    state = fresh_state(config, "fp16", 10, 50, CUDA)
    state.ddp_model.train()
    if config["class_weights"] != "none":
        state.class_weights = torch.ones(10, device=CUDA)
    torch.autograd.set_multithreading_enabled(False)
    with WithoutLibraries():
        for _ in range(2 if state.ema_model else 1):
            result = train_step(state, *build_mixing(config, 10)(*batch(8, 32, "fp16", 10)), config)
            state.count_step(result, config)


def test_no_operator_of_recomputed_batch_norm_and_of_validation_lacks_one(deterministic):
    state = fresh_state(CONFIG | QUICK, "fp16", 10, 50, CUDA)
    model, images = state.averaged_model, batch(8, 32, "fp16", 10)
    with WithoutLibraries():
        recompute_bn_stats(model, [images] * 2, autocast(CUDA, "fp16"))
        everything = {"flip": True, "ensemble": True, "confusions_of": "averaged", "by_class": True, "logits_of": ("averaged",)}
        scores = evaluate({"averaged": model}, [images] * 2, 16, autocast(CUDA, "fp16"), **everything)
    assert scores["averaged"]["logits"].shape == (16, 10)


def test_control_an_operator_without_one_is_noticed(deterministic):
    images = torch.empty(2, 4, 8, 8, device="cuda", requires_grad=True)
    with WithoutLibraries(), pytest.raises(RuntimeError, match="does not have a deterministic implementation"):
        torch.nn.functional.adaptive_max_pool2d(images, 4).sum().backward()
