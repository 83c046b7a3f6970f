"""A mask search in plain PyTorch around the engine, with what `search_mask` has no option for."""

from __future__ import annotations

import torch

from sparse_gen.engine.functional import training_copy
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.engine.stack import initial_weights
from sparse_gen.fitting.stop import Settled
from sparse_gen.masks.sampled import SampledNetwork
from sparse_gen.masks.selection import kept_count, prunable_layout
from sparse_gen.ops.concrete_mask import concrete_mask
from sparse_gen.ops.philox import seed_tensor


def trial(
    net, z, y, *, density=0.05, steps=2000, lr=5e-2, kl_weight=1e-7, prunable="conv_weights", temperature=0.2,
    final_temperature=None, initial_logit=0.0, kl_ramp=0.0, mean_field=0.0, antithetic=False, samples=1, decay=False,
    eps=1e-8, betas=(0.9, 0.999), seed=0, at=(), progress=None, rule=None,
):  # fmt: skip
    """Yield (steps done, logits (1, N)) at each of `at` and at the end.

    Args:
        density, steps, lr, kl_weight, prunable, initial_logit, betas, eps, seed: as for `search_mask`.
        temperature, final_temperature: of the sample, falling from one to the other in a geometric series.
        kl_ramp: over this share of the steps λ rises linearly from 0.
        mean_field: in this share of the steps, the first, s = sigmoid(logit) stands for the sample.
        antithetic: odd steps take 1 - u for the numbers u of the step before.
        samples: per step; their gradients are averaged.
        decay: whether the learning rate falls linearly to 0 over the second half of the steps.
        rule: gets the logits after every step, as a stopping rule of `search_mask` does; it ends nothing.
    """
    network = training_copy(net)
    layout = prunable_layout(network, prunable)
    whole = ParameterLayout.of(network, [n for n, _ in network.named_parameters() if n not in layout.shapes])
    weight, kept_whole = (initial_weights(net, part).to(z) for part in (layout, whole))
    sampled = SampledNetwork(network, layout, whole, kept_whole, z, 1, "auto", "rule")
    seeds, weight = seed_tensor(seed, z.device), weight[0]
    logits = torch.full((1, layout.numel), float(initial_logit), dtype=z.dtype, requires_grad=True)
    adam = torch.optim.Adam([logits], lr=lr, betas=betas, eps=eps, fused=True)
    prior_logit = torch.tensor(density, dtype=z.dtype).logit()
    count = kept_count(density, layout.numel + whole.numel, whole.numel)
    for step in range(steps):
        share = step / steps
        tau = temperature if final_temperature is None else temperature * (final_temperature / temperature) ** share
        ramp = min(1.0, share / kl_ramp) if kl_ramp else 1.0
        if decay:
            adam.param_groups[0]["lr"] = lr * min(1.0, 2 * (1 - share))
        values, gradient = logits.detach(), 0
        for number in range(samples):
            slope = 1 / tau
            if share < mean_field:
                soft, slope = torch.sigmoid(values), 1.0
            elif antithetic:
                draw = step * samples + number
                soft = concrete_mask(-values if draw % 2 else values, weight, seeds, draw // 2, temperature=tau)[0]
                soft = 1 - soft if draw % 2 else soft
            else:
                soft = concrete_mask(values, weight, seeds, step * samples + number, temperature=tau)[0]
            torch.mul(soft, weight, out=sampled.masked_weight)
            loss, by_weight = sampled.loss(y)
            gradient = gradient + by_weight * weight * soft * (1 - soft) * (slope / samples)
        p = torch.sigmoid(values)
        logits.grad = gradient.addcmul_(p * (1 - p), values - prior_logit, value=kl_weight * ramp)
        adam.step()
        if rule is not None:
            rule.update(step, logits.detach(), count)
        if progress is not None and (step % 50 == 0 or step == steps - 1):
            progress(step + 1, steps, {"loss": loss.item()})
        if step + 1 in at or step == steps - 1:
            yield step + 1, logits.detach().clone()


class Exchanges(Settled):
    """Notes what every window exchanges, and lets the search go on."""

    def __init__(self, window: int = 100):
        super().__init__(window, 0.0)
        self.shares: list[float] = []

    def update(self, step, logits, count, sizes=None) -> bool:
        super().update(step, logits, count, sizes)
        self.stopped_at.fill_(-1)
        if (step + 1) % self.window == 0:
            self.shares.append(round(self.exchanged.item(), 4))
        return False


class Snapshots(Exchanges):
    """Stores the logits after some steps of a long search."""

    def __init__(self, at, store):
        super().__init__()
        self.at, self.store = at, store

    def update(self, step, logits, count, sizes=None) -> bool:
        super().update(step, logits, count, sizes)
        if step + 1 in self.at:
            self.store(step + 1, logits)
        return False
