"""How far chunks take the rule from chunks of one token, with bare and with online errors.

    python benchmarks/chunk_distance.py [--json FILE]

Relative distance of y from the same rule at b = 1 with online errors; float64, 256 tokens, D = 16,
keys of unit length with a mean cosine of about 0.36, values of length about 1, alpha 0.99 to 1, eta
up to 0.5, gamma 0.98 and 0.02, theta 0.5 where there is momentum.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from atlas_blocks import Rule
from atlas_blocks.functional import omega_rule
from atlas_blocks.omega.arguments import Arguments
from atlas_blocks.omega.memories import weight_shapes
from atlas_blocks.recipes.bench.report import commit, machine, versions

B, T, H, D = 2, 256, 2, 16


def arguments(
    memory: str,
    window: int,
    chunk: int,
    momentum: bool,
    errors: str,
    tokens: int = T,
    strength: float = 0.5,
) -> Arguments:
    """Of the rule; eta up to `strength`."""
    torch.manual_seed(0)
    base = torch.randn(B, 1, H, D, dtype=torch.float64)

    def near() -> Tensor:
        x = torch.randn(B, tokens, H, D, dtype=torch.float64)
        return F.normalize(x + 0.75 * base, dim=-1)

    k, q = near(), near()
    v = torch.randn(B, tokens, H, D, dtype=torch.float64) * D**-0.5
    gates = torch.rand(2, B, tokens, H, dtype=torch.float64)
    shapes = weight_shapes(memory, D, D, 4 * D)
    weights = [torch.randn(H, *s, dtype=torch.float64) * s[-1] ** -0.5 for s in shapes]
    gamma = torch.full((B, tokens, H, window), 0.02, dtype=torch.float64)
    gamma[..., 0] = 0.98
    return Arguments(
        q,
        k,
        v,
        alpha=0.99 + 0.01 * gates[0],
        eta=strength * gates[1],
        theta=torch.full_like(gates[0], 0.5) if momentum else None,
        gamma=gamma,
        weights=weights,
        feature_map=None,
        rule=Rule(memory=memory, chunk_size=chunk, errors=errors, window=gamma.shape[-1]),
        state=None,
    )


def outputs(*of: Any) -> Tensor:
    """y, of `arguments`."""
    a = arguments(*of)
    names = ("alpha", "eta", "theta", "gamma", "weights", "rule")
    y, _ = omega_rule(a.q, a.k, a.v, **{name: getattr(a, name) for name in names})
    return y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", help="write the figures here")
    args = parser.parse_args()
    rows = []
    print(
        "| memory | c | momentum | b = 16, bare | b = 16, online | b = 64, bare | b = 64, online |"
    )
    print("|---|---|---|---|---|---|---|")
    for memory in ("matrix", "mlp", "gated_mlp"):
        for window in (1, 16):
            for momentum in (False, True):
                true = outputs(memory, window, 1, momentum, "online")
                row = {"memory": memory, "window": window, "momentum": momentum}
                for chunk in (16, 64):
                    for errors in ("chunk", "online"):
                        y = outputs(memory, window, chunk, momentum, errors)
                        row[f"{errors} {chunk}"] = ((y - true).norm() / true.norm()).item()
                rows.append(row)
                figures = " | ".join(f"{row[n]:.2g}" for n in list(row)[3:])
                yes = "yes" if momentum else "no"
                print(f"| {memory} | {window} | {yes} | {figures} |", flush=True)
    if args.json:
        here = machine(torch.device("cpu"))
        found = {"machine": here, "versions": versions(), "commit": commit(), "rows": rows}
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
