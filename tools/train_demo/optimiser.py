"""Muon for the hidden matrices, AdamW for the rest: about half the steps AdamW alone needs here."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # quintic coefficients of K. Jordan's Muon (2024)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest matrix with singular values about 1, by Newton-Schulz iteration in bfloat16."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.T if tall else matrix).bfloat16()
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled so that an update's RMS is `lr` * 0.2; decoupled weight decay.

    The workers orthogonalise a share of the matrices each, and sum what they have.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every matrix."""
        for group in self.param_groups:
            updates = [self._update(i, p, group["momentum"]) for i, p in enumerate(group["params"])]
            sum_over_workers(updates)
            for parameter, update in zip(group["params"], updates, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-group["lr"] * 0.2 * max(parameter.shape) ** 0.5)

    def _update(self, index: int, parameter: Tensor, decay: float) -> Tensor:
        if index % dist.get_world_size() != dist.get_rank():
            return torch.zeros_like(parameter)
        momentum = self.state[parameter].setdefault("momentum", torch.zeros_like(parameter))
        momentum.lerp_(parameter.grad, 1 - decay)
        return orthogonalise(parameter.grad.lerp(momentum, decay))


def sum_over_workers(tensors: list[Tensor]) -> None:
    """Add up each tensor over all workers, in place, in one message."""
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def build(model: nn.Module, extra: nn.Module, muon_lr: float, adam_lr: float) -> list[torch.optim.Optimizer]:
    """The two optimisers; each group remembers its peak rate under "peak"."""
    names = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim == 2 and ("blocks." in name or "layers." in name or "merger." in name)
    }
    rest = [p for name, p in model.named_parameters() if name not in names] + list(extra.parameters())
    muon = Muon(list(names.values()), lr=muon_lr, weight_decay=0.1)
    adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.01)
    for optimiser in (muon, adam):
        for group in optimiser.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def set_rates(optimisers: list[torch.optim.Optimizer], share: float) -> None:
    """Set every group's rate to `share` of its peak."""
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["lr"] = group["peak"] * share
