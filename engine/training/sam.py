"""Sharpness-aware minimisation (SAM, arXiv:2010.01412): at some steps the gradient is taken uphill of the weights."""

import contextlib

import torch

EPSILON = 1e-12  # beside the gradient's norm, as in MosaicML's recipes


def period(config):
    """Return every how many steps the gradient is taken uphill, or 0 where it never is."""
    return config["sam_every_steps"] if config["sam_rho"] > 0 else 0


def is_due(state, config, probe=False):
    """Return whether the step in progress takes its gradient uphill: one in each period does, and each probe."""
    every = period(config)
    return every > 0 and (probe or (state.schedule.last_epoch + 1) % every == 0)


@contextlib.contextmanager
def uphill(state, config):
    """Within, the weights lie sam_rho along the gradient from where they are, and no gradient is there yet.

    Then weights and batch-norm statistics are again what they were, to the bit, and the gradient is that of the other place.
    A gradient that is not finite leads to one that is not finite either, so that the step is skipped whole.
    """
    weights = [weight for weight in state.model.parameters() if weight.requires_grad]
    changed = [*weights, *state.model.buffers()]
    before = [tensor.detach().clone() for tensor in changed]
    try:
        _move_uphill(weights, config["sam_rho"], state.scaler)
        state.optimizer.zero_grad(set_to_none=True)
        yield
    finally:
        with torch.no_grad():
            torch._foreach_copy_(changed, before)


@torch.no_grad()
def _move_uphill(weights, rho, scaler):
    """Move the weights by rho along their gradient, which is at the GradScaler's scale and is not needed any more."""
    gradients = [weight.grad for weight in weights]
    norm = torch.nn.utils.get_total_norm(gradients)
    torch._foreach_mul_(gradients, rho / (norm + scaler.scale(torch.full_like(norm, EPSILON))))
    torch._foreach_add_(weights, gradients)
