"""What our steps are compared with: the published loop, and the best plain PyTorch.

`PublishedSearch` does what the authors' loop does: logits and samples parameter by parameter, a two-class
Gumbel-softmax, a copy of the network every step, the KL through autograd, Adam over a list. `PlainSearch` is the same
step written as well as PyTorch allows: one flat vector, one uniform a weight, channels_last, fused Adam. Both take the
logistic noise from outside for the equality check. `PublishedTraining` trains the dense network and masks its
gradients; `PlainTraining` has one flat vector, channels_last and fused Adam. On a GPU, TF32, cudnn.benchmark and a CUDA
graph come to the plain ones where they are timed, and torch.compile tunes as far as it can, graphs included.
"""

from __future__ import annotations

from copy import deepcopy

import torch
from torch.func import functional_call
from torch.nn import functional as F

from sparse_gen.engine.functional import training_copy
from sparse_gen.engine.layout import ParameterLayout
from sparse_gen.fitting.optimiser import step_fused
from sparse_gen.ops.concrete_mask import KL_OFFSET, kl_divergence

TEMPERATURE = 0.2


class PublishedSearch:
    """A search over all parameters, one at a time."""

    def __init__(self, net, z, y, *, lr, kl_weight, prior):
        self.net, self.z, self.y = net, z, y
        self.kl_weight, self.prior = kl_weight, prior
        self.logits = [torch.zeros_like(p, requires_grad=True) for p in net.parameters()]
        self.adam = torch.optim.Adam(self.logits, lr=lr)

    def sample(self, logistic=None):
        """One soft mask a parameter; `logistic` is the difference of the two Gumbel numbers, if given."""
        masks = []
        for i, logit in enumerate(self.logits):
            p = torch.sigmoid(logit)
            classes = torch.stack([torch.log(p), torch.log(1 - p)], dim=-1)
            if logistic is None:
                masks.append(F.gumbel_softmax(classes, tau=TEMPERATURE)[..., 0])
            else:
                gumbel = torch.stack([logistic[i], torch.zeros_like(logistic[i])], dim=-1)
                masks.append(F.softmax((classes + gumbel) / TEMPERATURE, dim=-1)[..., 0])
        return masks

    def kl(self):
        total = 0
        for logit in self.logits:
            p = torch.sigmoid(logit)
            kept = p * torch.log((p + KL_OFFSET) / self.prior)
            total = total + (kept + (1 - p) * torch.log((1 - p + KL_OFFSET) / (1 - self.prior))).sum()
        return total

    def step(self, logistic=None):
        net = deepcopy(self.net)
        masks = self.sample(logistic)
        masked = {name: p.detach() * m for (name, p), m in zip(net.named_parameters(), masks, strict=True)}
        loss = F.mse_loss(functional_call(net, masked, (self.z,)), self.y) + self.kl_weight * self.kl()
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()

    def mask_step(self, gradients):
        """The same without the network: its gradients by the masked weights are given."""
        masks = self.sample()
        loss = sum((g * p.detach() * m).sum() for g, p, m in zip(gradients, self.net.parameters(), masks, strict=True))
        self.adam.zero_grad()
        (loss + self.kl_weight * self.kl()).backward()
        self.adam.step()

    def flat_logits(self):
        return torch.cat([logit.detach().flatten() for logit in self.logits])


class PlainSearch:
    """The same search as one flat vector."""

    def __init__(self, net, z, y, *, lr, kl_weight, prior):
        self.net = training_copy(net)
        self.layout = ParameterLayout.of(self.net)
        self.weight = self.layout.flatten(dict(self.net.named_parameters()))
        self.z = z.contiguous(memory_format=torch.channels_last)
        self.y, self.kl_weight, self.prior = y, kl_weight, prior
        self.logits = torch.zeros_like(self.weight, requires_grad=True)
        self.adam = torch.optim.Adam([self.logits], lr=lr, fused=True)

    def masked_weight(self, logistic=None):
        logistic = torch.rand_like(self.logits).logit_(eps=1e-7) if logistic is None else logistic
        return self.weight * torch.sigmoid((self.logits + logistic) / TEMPERATURE)

    def loss(self, masked_weight):
        output = functional_call(self.net, self.layout.views(masked_weight), (self.z,))
        return F.mse_loss(output, self.y) + self.kl_weight * kl_divergence(self.logits[None], self.prior).sum()

    def step(self, logistic=None):
        self.adam.zero_grad()
        self.loss(self.masked_weight(logistic)).backward()
        step_fused(self.adam)

    def mask_step(self, gradient):
        loss = (gradient * self.masked_weight()).sum()
        self.adam.zero_grad()
        (loss + self.kl_weight * kl_divergence(self.logits[None], self.prior).sum()).backward()
        step_fused(self.adam)

    def flat_logits(self):
        return self.logits.detach()


class CompiledSearch(PlainSearch):
    """The plain search with its sampling, network and loss through torch.compile."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._sampled_loss = _compiled(lambda: self.loss(self.masked_weight()), self.z)

    def step(self, logistic=None):
        self.adam.zero_grad()
        self._sampled_loss().backward()
        step_fused(self.adam)


class PublishedTraining:
    """The network trained densely: Adam over all parameters, gradients multiplied by the mask if there is one."""

    def __init__(self, net, mask, z, y, *, lr):
        self.net, self.z, self.y = deepcopy(net), z, y
        dense = {} if mask is None else mask.dense(net)
        self.masked = [(p, dense[name][0].to(z)) for name, p in self.net.named_parameters() if mask is not None]
        with torch.no_grad():
            for parameter, keep in self.masked:
                parameter.mul_(keep)
        self.adam = torch.optim.Adam(self.net.parameters(), lr=lr)

    def step(self):
        self.adam.zero_grad()
        F.mse_loss(self.net(self.z), self.y).backward()
        for parameter, keep in self.masked:
            parameter.grad.mul_(keep)
        self.adam.step()

    def output(self):
        return self.net(self.z).detach()


class PlainTraining:
    """The same as one flat vector of all weights, masked in the forward pass if there is a mask."""

    def __init__(self, net, mask, z, y, *, lr):
        self.net = training_copy(net)
        self.layout = ParameterLayout.of(self.net)
        self.keep = None if mask is None else self.layout.flatten(mask.dense(net), 1)[0].to(z)
        self.z, self.y = z.contiguous(memory_format=torch.channels_last), y
        self.weight = self.layout.flatten(dict(self.net.named_parameters())).requires_grad_()
        self.adam = torch.optim.Adam([self.weight], lr=lr, fused=True)

    def output(self):
        weight = self.weight if self.keep is None else self.weight * self.keep
        return functional_call(self.net, self.layout.views(weight), (self.z,))

    def step(self):
        self.adam.zero_grad()
        F.mse_loss(self.output(), self.y).backward()
        step_fused(self.adam)


class CompiledTraining(PlainTraining):
    """The plain training with its network and loss through torch.compile."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._loss = _compiled(lambda: F.mse_loss(self.output(), self.y), self.z)

    def step(self):
        self.adam.zero_grad()
        self._loss().backward()
        step_fused(self.adam)


def _compiled(function, like: torch.Tensor):
    if not like.is_cuda:
        return torch.compile(function)
    tuned = torch.compile(function, mode="max-autotune")

    def run():
        torch.compiler.cudagraph_mark_step_begin()
        return tuned()

    return run
