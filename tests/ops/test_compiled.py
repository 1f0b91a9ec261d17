"""What nodes compile for themselves is what they would do without."""

import pytest
import torch
from helpers import MEMORIES, difference, draw, rule_inputs

from atlas_blocks.functional import omega_rule
from atlas_blocks.functional.rule import Arguments, Rule
from atlas_blocks.ops import compiled
from atlas_blocks.ops.omega_rule import definition_backward, definition_forward, flatten

SETTINGS = {"update": "muon", "chunk_size": 8, "write_discount": True}


@pytest.mark.usefixtures("nodes_compile")
@pytest.mark.parametrize("memory", MEMORIES)
def test_muon_chunks(memory, monkeypatch):
    """Whole ones, of any batch and length, from one compiled in each direction."""
    made, once = [], compiled.once
    monkeypatch.setattr(compiled, "once", lambda fn: made.append(fn) or once(fn))
    compiled._whole_chunk.cache_clear()
    for batch, length in ((1, 19), (2, 24), (3, 8)):
        inputs = rule_inputs(memory, batch=batch, length=length, window=3, update="muon")
        a = Arguments(**inputs, rule=Rule(memory, "l2", "muon", 5, 1, 8, True, 3), state=None)
        tensors, settings = flatten(a)
        for t in tensors:
            t.requires_grad_()
        y, state = omega_rule(**inputs, memory=memory, **SETTINGS)
        outputs = [y, *state.tensors()]
        results = definition_forward(tensors, settings, True)
        assert difference(results[: len(outputs)], outputs) < 1e-9
        grads = [draw(*t.shape, seed=5) for t in outputs[:-1]]
        found = definition_backward(grads, tensors, results[len(outputs) :], settings)
        pairs = [(t, g) for t, g in zip(outputs, grads, strict=False) if t.requires_grad]
        ends, of_ends = zip(*pairs, strict=True)
        true = torch.autograd.grad(ends, tensors, of_ends, materialize_grads=True)
        assert difference(found, true) < 1e-6
    assert len(made) == 2
