"""Optimizers by name: AdamW, and Muon with AdamW as one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

ADAMW_SLOTS, MUON_SLOTS = ("step", "exp_avg", "exp_avg_sq"), ("momentum_buffer",)


def adamw(model: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW over all parameters; only matrices decay."""
    return _adamw(list(model.parameters()), lr, weight_decay)


def muon(model: nn.Module, lr: float, weight_decay: float) -> MuonAdamW:
    """Muon for the matrices, AdamW for the rest, embedding and head among it."""
    outside = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    head = getattr(model, "head", None)
    outside |= set(head.parameters()) if isinstance(head, nn.Module) else set()
    matrices = [p for p in model.parameters() if p.ndim == 2 and p not in outside]
    inside = set(matrices)
    rest = [p for p in model.parameters() if p not in inside]
    return MuonAdamW(
        # With AdamW's size of a step, so that both take the same rate and decay.
        torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw"),
        _adamw(rest, lr, weight_decay),
    )


def _adamw(parameters: Sequence[Tensor], lr: float, weight_decay: float) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95))


class MuonAdamW(torch.optim.Optimizer):
    """Two optimizers of different parameters as one: its groups and its state are theirs."""

    def __init__(self, first: torch.optim.Muon, second: torch.optim.AdamW) -> None:
        self.parts = (first, second)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups: Iterator[dict[str, Any]] = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()


def slots(optimizer: torch.optim.Optimizer) -> list[tuple[Tensor, tuple[str, ...]]]:
    """Every parameter, in order, and the names of the tensors that its optimizer keeps for it."""
    return [
        (parameter, MUON_SLOTS if "ns_steps" in group else ADAMW_SLOTS)
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]
