"""GraSP: keep the weights whose removal would lessen the gradient flow."""

from __future__ import annotations

import torch

from sparse_gen.masks.pruning import Found, Pruning


def grasp(problem: Pruning) -> Found:
    """Score every weight by -w·(Hg), H the Hessian of the loss and g its gradient, and remove the largest.

    Removing a weight of positive score raises ‖g‖² to first order, so it is the first to go: what is kept has the
    largest w·(Hg). H is over the prunable weights.

    Wang, Zhang and Grosse, "Picking winning tickets before training by preserving gradient flow" (ICLR 2020), eq. 8 and
    algorithm 1.
    """
    leaf, gradient = problem.gradient(create_graph=True)
    (product,) = torch.autograd.grad((gradient * gradient.detach()).sum(), leaf)
    scores = problem.weight * product
    return Found(problem.choose(scores, problem.count), scores)
