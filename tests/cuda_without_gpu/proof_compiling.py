"""Every kernel that torch.compile makes of ResNet-18's forward and backward pass compiles for the card; none is run."""

import contextlib
import json
import os
from pathlib import Path

import torch
import torch._inductor.runtime.triton_heuristics as heuristics
from conftest import fresh_state
from fake_cuda import CUDA, QUICK, batch, fake_cuda

from config import CONFIG
from engine.system.device import autocast, choose_precision
from engine.training.loss import training_loss


def test_all_kernels_compile_for_the_card(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    compiled, failed = set(), []
    real = heuristics.CachingAutotuner._precompile_config

    def noting(autotuner, configuration):
        name = autotuner.inductor_meta.get("kernel_name")
        try:
            result = real(autotuner, configuration)
        except Exception as error:
            failed.append((name, error))
            raise
        compiled.add(name)
        return result

    monkeypatch.setattr(heuristics.CachingAutotuner, "_precompile_config", noting)
    config = CONFIG | QUICK | {"compile": "on", "optimizer": "sgd", "swa_start_epoch": 0}
    precision = choose_precision(config, CUDA)
    with fake_cuda():
        state = fresh_state(config, precision, 1000, 50, CUDA)
        state.ddp_model.train()
        images, labels = batch(16, 64, precision)
        with autocast(CUDA, precision):
            logits = state.ddp_model(images)
        forward = len(compiled)
        with contextlib.suppress(torch._subclasses.fake_tensor.FakeTensorDeviceMismatchError):  # compiled, it is run, on fakes
            training_loss(logits.float(), labels, config).backward()
    assert failed == []
    assert forward > 20 and len(compiled) - forward > 20
    targets = [json.loads(path.read_text()).get("target", {}) for path in Path(tmp_path).rglob("triton_*.json")]
    architectures = {target["arch"] for target in targets if target}
    assert architectures == {int(os.environ["STANDIN_CAPABILITY"])}
    assert len(list(tmp_path.rglob("*.cubin"))) >= len(compiled)
