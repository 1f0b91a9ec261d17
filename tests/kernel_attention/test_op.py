"""Exact phi* compiled is exact phi* eager: one node, both directions, any length."""

import pytest
import torch
from helpers import assert_close, difference, draw, make_block
from torch.library import opcheck

from atlas_blocks.functional import kernel_attention
from atlas_blocks.kernel_attention.definition import complete, settings

NAMES = ("dot", pytest.param("attention-plain", marks=pytest.mark.slow))


@pytest.mark.slow(compile_nodes=False)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("name", NAMES)
def test_compiled_equals_eager_whatever_the_length(name: str) -> None:
    block = make_block(name)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (9, 17):
            x = draw(2, length, 12, seed=length).requires_grad_()
            y, state = compiled(x)
            true, end = block(x)
            assert_close((y, state), (true, end), 1e-12)
            grads = [
                torch.autograd.grad(t.cos().sum(), [x, *block.parameters()]) for t in (y, true)
            ]
            assert difference(*grads) < 1e-10
    more = draw(2, 5, 12)
    with torch.no_grad():
        assert_close(compiled(more, end), block(more, end), 1e-12)


@pytest.mark.parametrize(
    ("objective", "errors"), [("dot", "chunk"), ("l2", "chunk"), ("l2", "online")]
)
@pytest.mark.filterwarnings("ignore")  # opcheck warns of its own parts
def test_the_op_keeps_its_contract(objective: str, errors: str) -> None:
    q, k, v = (draw(1, 7, 2, 4, seed=i) for i in range(3))
    gate = torch.rand(1, 7, 2, dtype=torch.float64)
    gamma = torch.rand(1, 7, 2, 3, dtype=torch.float64)
    s = settings(q, gamma, objective, 0.5, True, 3, errors)
    _, state = kernel_attention(
        q,
        k,
        v,
        eta=gate,
        gamma=gamma,
        objective=objective,
        scale=0.5,
        chunk_size=3,
        errors=errors,
    )
    gates, _ = complete(s, q, v, gate, gate, gamma, None)
    tensors = [t.clone() for t in (q, k, v, *gates, *state.tensors())]
    wanted = [t.is_floating_point() for t in tensors]
    for w in ([], wanted):
        opcheck(torch.ops.atlas.kernel_attention.default, (tensors, *s, w))
    *outputs, _, key = torch.ops.atlas.kernel_attention.default(tensors, *s, wanted)
    grads = [torch.randn_like(t) for t in outputs]
    backward = torch.ops.atlas.kernel_attention_backward.default
    opcheck(backward, (grads, tensors, [], key, *s, wanted))
