"""One step of Adam on the kept values, in place and in one pass over memory (28 bytes a float32 value).

What becomes of a value depends on neither its place nor the length of the vector: experiments have the same bits alone
and beside others.
"""

from __future__ import annotations

import torch

from sparse_gen.ops.dispatch import register_operator


def masked_adam_reference(values, exp_avg, exp_avg_sq, grad, step, lr, beta1, beta2, eps):
    count = step.double() + 1
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = (lr / (1 - beta1**count)).to(values.dtype)
    denominator = exp_avg_sq.sqrt() / (1 - beta2**count).sqrt().to(values.dtype) + eps
    values.sub_(step_size * exp_avg / denominator)


register_operator(
    "masked_adam(Tensor(a!) values, Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, Tensor grad, Tensor step,"
    " float lr, float beta1, float beta2, float eps) -> ()",
    reference=masked_adam_reference,
    fake=lambda *_: None,
)


@torch.no_grad()
def masked_adam_(
    values: torch.Tensor,
    grad: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    step: int | torch.Tensor,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> None:
    """Take one step of Adam, in place.

    Args:
        values: (E, kept), float32 or float64, contiguous like the three that follow.
        grad: (E, kept), gradient of the loss by the values; only read.
        exp_avg, exp_avg_sq: (E, kept), Adam's two averages (zero before step 0).
        step: number of the step, from 0, an integer or a () int64 tensor on the same device.
        lr, betas, eps: as torch.optim.Adam means them; without weight decay.

    Raises:
        ValueError: shapes, dtypes, devices or layouts do not fit together, or a number is out of its range.

    Kingma & Ba, "Adam" (ICLR 2015), algorithm 1.
    """
    if values.ndim != 2 or values.dtype not in (torch.float32, torch.float64) or not values.is_contiguous():
        raise ValueError(
            f"expected contiguous values of shape (E, kept), float32 or float64, "
            f"got {tuple(values.shape)} of {values.dtype} with strides {values.stride()}"
        )
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if tensor.shape != values.shape:
            raise ValueError(f"expected {name} of shape {tuple(values.shape)}, got {tuple(tensor.shape)}")
        if tensor.dtype != values.dtype or tensor.device != values.device:
            raise ValueError(
                f"expected {name} of {values.dtype} on {values.device} like the values, "
                f"got {tensor.dtype} on {tensor.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"expected a contiguous {name}, got strides {tensor.stride()}, call .contiguous()")
    if not isinstance(step, torch.Tensor):
        step = torch.tensor(step, device=values.device)
    elif step.ndim or step.dtype != torch.int64 or step.device != values.device:
        raise ValueError(
            f"expected step as a () int64 tensor on {values.device}, "
            f"got {tuple(step.shape)} of {step.dtype} on {step.device}"
        )
    if not (lr >= 0 and 0 <= betas[0] < 1 and 0 <= betas[1] < 1 and eps >= 0):
        raise ValueError(f"expected lr and eps from 0 on and betas from 0 to below 1, got {lr}, {eps} and {betas}")
    torch.ops.sparse_gen.masked_adam(values, exp_avg, exp_avg_sq, grad, step, lr, *betas, eps)
