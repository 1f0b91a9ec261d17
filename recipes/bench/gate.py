"""Whether what will be timed computes the rule: its error against float64, forward and backward."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from atlas_blocks.graph.providers import DEFINITION
from atlas_blocks.recipes.bench.contenders import (
    COMPILED,
    Candidate,
    Implementation,
    Shape,
    Variant,
    first_line,
    leaves_of,
    served_by,
    why_not,
)

LIMIT = 2.0


@dataclass(frozen=True)
class Verdict:
    """What the gate found of one implementation of one variant.

    errors: |x - true| / |true| of y, of the memory after the call and of every gradient, where true
    is the definition in float64 on inputs that are not rounded; definition: the same of the
    definition on the rounded inputs. refusal: why there was nothing to check. failure: the error
    that a provider raised.
    """

    name: str
    rule: str
    refusal: str = ""
    failure: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    definition: dict[str, float] = field(default_factory=dict)

    @property
    def problem(self) -> str:
        """What is wrong, in one line; empty where nothing is."""
        if self.failure:
            return f"{self.name} fails ({self.rule}): {self.failure}"
        for name, error in self.errors.items():
            allowed = LIMIT * self.definition[name]
            if not error <= allowed:  # NaN is no pass
                return (
                    f"{self.name} is wrong ({self.rule}): the error of {name} against float64 is "
                    f"{error:.2g}, twice the definition's is {allowed:.2g}"
                )
        return ""

    def to_dict(self) -> dict[str, Any]:
        """For the record."""
        return asdict(self) | {"passed": not self.problem}


def check(candidates: Iterable[Candidate], shape: Shape, device: torch.device) -> list[Verdict]:
    """A verdict for every candidate but the definition, on bfloat16 inputs of this shape."""
    verdicts: list[Verdict] = []
    truths: dict[Variant, tuple[dict[str, Tensor], dict[str, float]]] = {}
    for candidate in candidates:
        name, variant, run, _ = candidate
        if name == DEFINITION:
            continue
        exact = variant.arguments(shape, device, torch.float64, torch.float64)
        # As AtlasMemory under autocast: streams in bfloat16, gates and weights in float32.
        rounded = exact._replace(
            **{n: getattr(exact, n).bfloat16() for n in ("q", "k", "v")},
            **{n: getattr(exact, n).float() for n in ("alpha", "eta", "gamma")},
            theta=None if exact.theta is None else exact.theta.float(),
            weights=[w.float() for w in exact.weights],
        )
        reason = why_not(name, rounded)
        if reason is not None:
            verdicts.append(Verdict(name, str(variant), refusal=reason))
            continue
        if variant not in truths:
            true = _results(served_by(DEFINITION), exact)
            truths[variant] = true, _errors(_results(served_by(DEFINITION), rounded), true)
        true, definition = truths[variant]
        try:
            errors = _errors(_results(run, rounded), true)
        except Exception as error:
            words = f"{type(error).__name__}: {first_line(error)}"
            # That there is no working compiler says nothing against the kernels.
            refusal, failure = (words, "") if name == COMPILED else ("", words)
            verdicts.append(Verdict(name, str(variant), refusal, failure))
            continue
        verdicts.append(Verdict(name, str(variant), errors=errors, definition=definition))
    return verdicts


def _results(run: Implementation, a: Any) -> dict[str, Tensor]:
    """y, the memory after the call, and the gradients of a loss that weighs all of them."""
    a, leaves = leaves_of(a)
    y, memory = run(a)
    found = {"y": y} | {f"memory[{i}]": t for i, t in enumerate(memory)}
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=y.device)
    for t in found.values():
        weight = torch.randn(t.shape, generator=generator, dtype=torch.float64)
        loss = loss + (t.double() * weight.to(t.device)).sum()
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"the gradient of {n}": g for n, g in zip(leaves, gradients, strict=True)}
    return {n: t.detach().double() for n, t in (found | named).items()}


def _errors(found: dict[str, Tensor], true: dict[str, Tensor]) -> dict[str, float]:
    return {n: ((found[n] - t).norm() / t.norm()).item() for n, t in true.items()}
