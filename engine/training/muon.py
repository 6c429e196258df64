"""Muon (kellerjordan.github.io/posts/muon): a filter moves along its momentum with all singular values made about equal.

A convolution's filter is a matrix [out, kh * kw * in], the order in which a channels-last filter lies in memory. What is no
such filter is trained by AdamW at a rate of its own.
"""

import math

import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the post's quintic: steep at 0, so that five steps suffice
NEWTON_SCHULZ_STEPS = (2, 3)  # with a new Gram matrix after two, which bounds what rounding adds to its eigenvalues
EPSILON = 1e-7  # the least that a matrix is divided by


def orthogonalize(matrices, dtype):
    """Return about U V^T for each matrix U S V^T: its singular values come to lie between about 0.7 and 1.2.

    Args:
        matrices: float32 [n, rows, columns].
        dtype: of the matrix products and of the result.
    """
    # In float32 and before the cast: then no singular value is above 1, and float16 holds all that the steps make of them.
    norms = torch.linalg.vector_norm(matrices, dim=(1, 2), keepdim=True)
    x = torch.div(matrices, norms.clamp(min=EPSILON), out=torch.empty_like(matrices, dtype=dtype))  # and cast, in one pass
    tall = x.shape[1] > x.shape[2]
    if tall:  # the products are cheapest on the shorter side
        x = x.mT
    for steps in NEWTON_SCHULZ_STEPS:
        x = torch.bmm(_product_of_steps(torch.bmm(x, x.mT), steps), x)
    return x.mT if tall else x


def _product_of_steps(gram, steps):
    """Return Q, by which so many Newton-Schulz steps multiply X of the Gram matrix X X^T, all of them on its short side.

    A step multiplies X by P = aI + b G + c G^2, and so G by P^2. P commutes with G: there is no transpose to mind. Source:
    dao-lab.ai/blog/2026/gram-newton-schulz, which also shows why half precision needs a new Gram matrix after a few steps.
    """
    a, b, c = COEFFICIENTS
    product = None
    for step in range(steps):
        p = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # without aI, which would cost it digits
        if product is None:
            product = p.clone()
            product.diagonal(dim1=1, dim2=2).add_(a)
        else:
            product = torch.baddbmm(product, p, product, beta=a)
        if step < steps - 1:
            for _ in range(2):
                gram = torch.baddbmm(gram, p, gram, beta=a)
    return product


def split_groups(groups):
    """Return (filters, groups of the rest): the filters of all convolutions but that of the images, which have 3 channels."""
    filters = [p for group in groups for p in group["params"] if p.ndim == 4 and p.shape[1] != 3]
    chosen = set(map(id, filters))
    rest = [group | {"params": [p for p in group["params"] if id(p) not in chosen]} for group in groups]
    return filters, [group for group in rest if group["params"]]


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov's momentum for filters and torch's fused AdamW for the rest, to the outside one optimizer.

    Both decay the weights by weight_decay times their rate. The host waits for nothing, and a step that the GradScaler skips
    changes no bit. Across ranks each one moves all filters.
    """

    _step_supports_amp_scaling = True  # the GradScaler hands its verdict over as found_inf, on the device

    def __init__(self, filters, other_groups, *, lr, weight_decay, momentum, adamw_lr, dtype):
        """filters: parameters [out, in, ...]; other_groups: with `weight_decay`; dtype: of the Newton-Schulz steps."""
        self._adamw = torch.optim.AdamW([group | {"by_adamw": True} for group in other_groups], lr=adamw_lr, fused=True)
        self._dtype = dtype
        of_filters = {"params": filters, "lr": lr, "weight_decay": weight_decay, "momentum": momentum, "by_adamw": False}
        super().__init__([of_filters, *self._adamw.param_groups], {})
        for weight in filters:  # before the first step, which cannot run out of memory for it then
            self.state[weight]["momentum_buffer"] = torch.zeros_like(weight)

    @torch.no_grad()
    def step(self):
        """Take a step along the gradient, which is unscaled already."""
        assert getattr(self, "grad_scale", None) is None
        of_filters, *others = self.param_groups
        found_inf = getattr(self, "found_inf", None)
        skip = None if found_inf is None else found_inf.reshape(()) > 0
        keep, same_shape = 1 - of_filters["lr"] * of_filters["weight_decay"], {}
        if skip is not None:
            keep = torch.where(skip, 1.0, keep)
        for weight in of_filters["params"]:
            if weight.grad is not None:
                same_shape.setdefault(weight.shape, []).append(weight)
        for weights in same_shape.values():
            torch._foreach_mul_(weights, keep)
            self._follow_momentum(weights, of_filters, skip)
        self._adamw.param_groups, self._adamw.state = others, self.state  # load_state_dict() replaces both
        self._adamw.found_inf = found_inf
        self._adamw.step()

    def _follow_momentum(self, weights, group, skip):
        """Bring the momentum of filters of one shape up to date, and move them along it, in one batch of matrices."""
        buffers = [self.state[weight]["momentum_buffer"] for weight in weights]
        gradient, before = _stacked([weight.grad for weight in weights]), _stacked(buffers)
        momentum = torch.lerp(before, gradient, 1 - group["momentum"])
        if skip is not None:
            momentum = torch.where(skip, before, momentum)
        torch._foreach_copy_(_channels_last(buffers), momentum.unbind())

        ahead = torch.lerp(gradient, momentum, group["momentum"])
        matrices = ahead.flatten(2)
        update = orthogonalize(matrices, self._dtype)
        if skip is not None:
            update = update.masked_fill(skip, 0.0)  # a weight minus 0 keeps its bits
        out, columns = matrices.shape[1:]
        rate = group["lr"] * math.sqrt(max(1, out / columns))  # the post's rule, and torch.optim.Muon's "original"
        update = update.to(ahead.dtype).reshape(ahead.shape).unbind()
        torch._foreach_add_(_channels_last(weights), update, alpha=-rate)


def _channels_last(tensors):
    """Return views [out, kh, kw, in] of filters [out, in, kh, kw]; of a channels-last filter they are contiguous."""
    return [tensor.movedim(1, -1) for tensor in tensors]


def _stacked(filters):
    """Return [n, out, kh, kw, in] of n filters [out, in, kh, kw]."""
    return torch.stack(_channels_last(filters))
