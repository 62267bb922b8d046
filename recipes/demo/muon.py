"""Muon: momentum whose direction is made orthogonal (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Muon:
    """For 2-D weights. Weights of one shape are stepped together, as one batch of matrices."""

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95, decay: float = 0.02) -> None:
        self.momentum, self.decay = momentum, decay
        groups: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
        for parameter in parameters:
            groups[tuple(parameter.shape)].append(parameter)
        self.groups = [
            (group, torch.zeros(len(group), *shape, device=group[0].device)) for shape, group in groups.items()
        ]

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """Mutates the weights and takes their gradients away."""
        for group, velocity in self.groups:
            gradient = torch.stack([parameter.grad for parameter in group if parameter.grad is not None])
            velocity.lerp_(gradient, 1 - self.momentum)
            update = orthogonal(gradient.lerp(velocity, self.momentum))
            scale = rate * max(1.0, update.shape[1] / update.shape[2]) ** 0.5
            torch._foreach_mul_(group, 1 - rate * self.decay)
            torch._foreach_add_(group, list(update.to(group[0].dtype)), alpha=-scale)
            for parameter in group:
                parameter.grad = None


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """About U V^T of each of `matrices` [n, rows, cols], by a quintic Newton-Schulz iteration."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
