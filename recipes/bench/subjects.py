"""What `bench NAME` runs: a recipe or a block, and the four things that are done with it.

B batch, T tokens.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import atlas_blocks
from atlas_blocks import Block, check
from atlas_blocks.recipes import losses, registry, training
from atlas_blocks.recipes.model import LanguageModel

FORWARD, BOTH, TRAINING, DECODE = "forward", "forward+backward", "training step", "decode"
MODES = (FORWARD, BOTH, TRAINING, DECODE)
EAGER, INDUCTOR, ATLAS = "eager", "inductor", "atlas"
CONTENDERS = (EAGER, INDUCTOR, ATLAS)
BLOCKS: dict[str, type[Block]] = {
    name: member
    for name in atlas_blocks.__all__
    if isinstance(member := getattr(atlas_blocks, name), type)
    and issubclass(member, Block)
    and member is not Block
}


def unavailable(contender: str) -> str:
    """Why a contender cannot take part; empty where it can."""
    if contender == EAGER:
        return ""
    from torch._dynamo import list_backends  # imports Triton

    if contender in list_backends(exclude_tags=()):
        return ""
    return f"no torch.compile backend of this name is registered ({contender})"


@dataclass(frozen=True)
class Size:
    """batch, tokens: B and T of a call, T those before the decoded token too. dim, heads: of a
    block; a recipe has its own."""

    batch: int
    tokens: int
    dim: int
    heads: int

    def __post_init__(self) -> None:
        for name in ("batch", "tokens", "dim", "heads"):
            check.at_least(name, getattr(self, name), 1)


def build(name: str, size: Size, device: torch.device) -> nn.Module:
    """The model of what registry.config takes, or a block by the name of its class, with seeded
    weights.

    Raises ValueError, with near matches, for a name that is neither.
    """
    torch.manual_seed(0)
    if name in BLOCKS:
        block: Any = BLOCKS[name]
        without_heads = name in ("ShortConv", "SquaredReLU", "SwiGLU")
        return (block(size.dim) if without_heads else block(size.dim, size.heads)).to(device)
    if not registry.is_composed(name) and name not in registry.names():
        known = ["kernels", *BLOCKS, *registry.names()]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"name: expected a recipe, a block or kernels, got {name!r}{hint}")
    return registry.build(name).to(device)


class Entrant(NamedTuple):
    """A row to be: a model, and the backend that runs it.

    model: None with a `problem` that says why. checked: whether it is timed only where its results
    are those of float64.
    """

    name: str
    model: nn.Module | None
    backend: str
    checked: bool = True
    problem: str = ""


class Subject:
    """One contender's copy of a model, made ready for one mode.

    call: runs the mode once, the same at every call but for the weights that a training step
    changes. compiled: whether its first call compiles.
    """

    def __init__(self, model: nn.Module, contender: str, mode: str, size: Size) -> None:
        self.model = copy.deepcopy(model)
        self.mode = mode
        self.device = next(self.model.parameters()).device
        self.rows = _inputs(self.model, size, size.tokens + 1)
        if contender != EAGER:
            # Its own frames: the prefix of a decode is computed eagerly.
            self.model.compile(backend=contender)
        self.config = training.TrainingConfig(steps=1, batch=size.batch, length=size.tokens)
        self.optimizer = training.make_optimizer(self.model, self.config)
        self.state: Any = None
        if mode == DECODE:
            with torch.no_grad():
                self.state = model(self.rows[:, :-1])[1]

    @property
    def call(self) -> Callable[[], object]:
        """What is timed."""
        return {
            FORWARD: self.outputs,
            BOTH: self.backward,
            TRAINING: self.train,
            DECODE: self.outputs,
        }[self.mode]

    def outputs(self) -> tuple[Tensor, Any]:
        """y and the state, without gradients."""
        with torch.no_grad():
            if self.mode == DECODE:
                return tuple(self.model(self.rows[:, -1:], self.state))
            return tuple(self.model(self.rows[:, :-1]))

    def backward(self) -> dict[str, Tensor]:
        """Gradients of every parameter for a loss; what .grad holds is left alone."""
        named = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        found = torch.autograd.grad(self._loss(), list(named.values()), allow_unused=True)
        return {n: g for n, g in zip(named, found, strict=True) if g is not None}

    def train(self) -> float:
        """One step of the training loop, its loss."""
        if isinstance(self.model, LanguageModel):
            step = training.train_step(self.model, self.optimizer, self.rows, self.config, 0)
            return step[0]
        self.optimizer.zero_grad()
        loss = self._loss()
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def _loss(self) -> Tensor:
        if isinstance(self.model, LanguageModel):
            return losses.next_byte_loss(self.model, self.rows)
        y, _ = self.model(self.rows[:, :-1])
        return y.square().mean()

    def results(self) -> dict[str, dict[str, Tensor]]:
        """What equality is judged by: outputs and state, gradients, or both loss and gradients of a
        step."""
        if self.mode == BOTH:
            return {"gradients": self.backward()}
        if self.mode == TRAINING:
            loss = torch.tensor(self.train(), dtype=torch.float64)
            named = self.model.named_parameters()
            gradients = {n: p.grad for n, p in named if p.grad is not None}
            return {"loss": {"loss": loss}, "gradients": gradients}
        y, state = self.outputs()
        tensors = [] if state is None else [t for t in state.tensors() if t.is_floating_point()]
        return {"outputs": {"y": y}, "state": {f"state[{i}]": t for i, t in enumerate(tensors)}}


def _inputs(model: nn.Module, size: Size, tokens: int) -> Tensor:
    """Tokens int64 [B, T] of a language model, or x [B, T, dim] of a block."""
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(1)
    if isinstance(model, LanguageModel):
        shape = (size.batch, tokens)
        rows = torch.randint(model.config.vocab_size, shape, generator=generator)
        return rows.to(parameter.device)
    x = torch.randn(size.batch, tokens, size.dim, generator=generator, dtype=torch.float64)
    return x.to(parameter.device, parameter.dtype)
