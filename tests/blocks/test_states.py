"""States of every block: whose memory they are, and what a call may be given to go on from."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers import BLOCKS, DIM, cast, draw, make_block, omega_rule, omega_rule_op, rule_inputs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from atlas_blocks import State
from atlas_blocks.blocks.memory import FixedMemory

every_block = pytest.mark.parametrize("name", BLOCKS)


def storages(tensors: list[Tensor]) -> list[int]:
    return [t.untyped_storage()._cdata for t in tensors if t.numel()]


@every_block
@pytest.mark.parametrize("length", [0, 3, 6, 8, 12, 20])
def test_a_returned_state_shares_memory_with_nothing(name: str, length: int) -> None:
    """With the parameters that a step of an optimizer writes to, the input, the output, itself."""
    block, x, state = make_block(name), draw(2, length, DIM), None
    for _ in range(2):
        y, state = block(x, state)
        if state is None:
            return
        own = storages(state.tensors())
        others = storages([x, y, *block.parameters(), *block.buffers()])
        assert not set(own) & set(others)
        assert len(own) == len(set(own))
        for t in state.tensors():
            assert t.is_contiguous()
            assert t.untyped_storage().nbytes() == t.nbytes


def of_all(result: tuple[Tensor, State | None]) -> list[Tensor]:
    y, state = result
    return [y, *(() if state is None else state.tensors())]


@every_block
def test_a_float32_state_goes_on_in_float64(name: str) -> None:
    block, x = make_block(name, torch.float32), draw(2, 20, DIM)
    _, state = block(x[:, :9].float())
    if state is None:
        return
    block.double()
    y, after = block(x[:, 9:], state)
    # As if each number of the state had been written in float64 in the first place.
    for a, b in zip(
        of_all((y, after)), of_all(block(x[:, 9:], state.to(torch.float64))), strict=True
    ):
        assert torch.equal(a, b)
        assert a.dtype in (torch.float64, torch.int64)


@every_block
def test_a_float64_state_goes_on_in_float32(name: str) -> None:
    block, x = make_block(name), draw(2, 20, DIM)
    _, state = block(x[:, :9])
    if state is None:
        return
    true, _ = block(x[:, 9:], state)
    y, after = block.float()(x[:, 9:].float(), state)
    assert y.dtype == torch.float32
    assert (y - true).norm() < 1e-3 * true.norm()
    again, _ = block(x[:, :1].float(), after)
    assert again.isfinite().all()


@every_block
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_a_state_lowered_by_to_goes_on_nearby(name: str, low: torch.dtype) -> None:
    """`to` keeps in float32 what must be; caches of keys and values may be rounded."""
    block, x = make_block(name, torch.float32), draw(2, 20, DIM, dtype=torch.float32)
    _, state = block(x[:, :9])
    if state is None:
        return
    true, y = (block(x[:, 9:], s)[0] for s in (state, state.to(low)))
    assert y.dtype == torch.float32
    assert (y - true).norm() < 0.05 * true.norm()


@every_block
def test_a_memory_rounded_below_float32_is_refused_by_name(name: str) -> None:
    block, x = make_block(name, torch.float32), draw(2, 20, DIM, dtype=torch.float32)
    _, state = block(x[:, :9])
    if state is None:
        return
    low = state.map(lambda t: t.bfloat16() if t.is_floating_point() else t)
    if not name.startswith(("lstm", "conv", "block-lstm", "block-attention", "block-foreign")):
        message = r"state\.\S+: expected torch\.float32 or torch\.float64, .*, got torch\.bfloat16"
        with pytest.raises(ValueError, match=message):
            block(x[:, 9:], low)
        return
    assert (block(x[:, 9:], low)[0] - block(x[:, 9:], state)[0]).norm() < 1


@every_block
def test_a_state_on_another_device_is_refused_by_name(name: str) -> None:
    block, x = make_block(name), draw(2, 20, DIM)
    _, state = block(x[:, :9])
    if state is None:
        return
    with pytest.raises(ValueError, match=r"state\.\S+: expected device cpu .*, got meta"):
        block(x[:, 9:], state.to("meta"))


def test_nested_states_are_named_as_they_are_reached() -> None:
    block, x = make_block("as-layer", torch.float32), draw(2, 9, DIM, dtype=torch.float32)
    _, state = block(x)
    memory, attention = state.parts
    rule = memory.parts[0].rule
    low = rule.replace(momentum=tuple(t.half() for t in rule.momentum))
    memory = memory.replace(parts=(memory.parts[0].replace(rule=low),))
    with pytest.raises(ValueError, match=r"state\.parts\[0\]\.parts\[0\]\.rule\.momentum\[0\]: "):
        block(x, state.replace(parts=(memory, attention)))


def parts_of(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All that a state holds, each with the way to it."""
    if path:
        yield path, value
    if isinstance(value, State):
        for name in value.field_names:
            yield from parts_of(getattr(value, name), (*path, name))
    elif isinstance(value, tuple):
        for i, part in enumerate(value):
            yield from parts_of(part, (*path, str(i)))


def with_part(value: Any, path: tuple[str, ...], part: Any) -> Any:
    """The state with another part there."""
    if not path:
        return part
    key, *rest = path
    if isinstance(value, State):
        return value.replace(**{key: with_part(getattr(value, key), tuple(rest), part)})
    parts = list(value)
    parts[int(key)] = with_part(parts[int(key)], tuple(rest), part)
    return tuple(parts)


def others(part: Any) -> dict[str, Any]:
    """What no block can go on from in the place of this part."""
    if part is None:
        return {}
    if isinstance(part, Tensor):
        other = part.double() if part.dtype == torch.int64 else part.bool()
        wider = torch.cat([part, part[..., :1]], -1) if part.ndim > 1 else part[:, None]
        return {"kind": None, "dtype": other, "axes": part.sum(), "rows": part[:1], "size": wider}
    if isinstance(part, tuple):
        return {"kind": list(part), "length": part[:-1]} if part else {"length": (torch.ones(2),)}
    return {"kind": torch.ones(2)}


@every_block
def test_a_part_of_another_kind_or_size_is_refused_by_name(name: str) -> None:
    block, x = make_block(name, torch.float32), draw(2, 21, DIM, dtype=torch.float32)
    _, state = block(x[:, :16])
    if state is None:
        return
    for path, part in parts_of(state):
        # Values in a module of somebody's are its own business, but for the batch.
        foreign, empty = "value" in path, isinstance(part, Tensor) and part.shape == (2, 0)
        for what, other in others(part).items():
            if (what == "size" and empty) or (foreign and what != "rows"):
                continue
            with pytest.raises(ValueError, match=r"^state[.:]"):
                block(x[:, 16:], with_part(state, path, other))


@pytest.mark.parametrize("rule", [omega_rule, omega_rule_op])
def test_the_rule_alone_takes_states_as_a_layer_does(rule) -> None:
    options = {"memory": "mlp", "chunk_size": 4}
    inputs = rule_inputs("mlp", length=6)
    _, state = rule(**cast(inputs, torch.float32, torch.float32), **options)
    _, after = rule(**inputs, **options, state=state)
    _, true = rule(**inputs, **options, state=state.to(torch.float64))
    assert all(torch.equal(a, b) for a, b in zip(after.tensors(), true.tensors(), strict=True))
    with pytest.raises(ValueError, match=r"state\.weights\[0\]: expected device cpu .*, got meta"):
        rule(**inputs, **options, state=state.to("meta"))
    low = state.map(lambda t: t.half() if t.is_floating_point() else t)
    with pytest.raises(ValueError, match=r"state\.weights\[0\]: expected torch\.float32 or"):
        rule(**inputs, **options, state=low)


@every_block
def test_a_prefix_read_under_inference_mode_is_trained_on(name: str) -> None:
    block, x = make_block(name), draw(2, 20, DIM)
    with torch.inference_mode():
        _, inferred = block(x[:, :9])
    _, state = block(x[:, :9])
    gradients = []
    for s in (inferred, state):
        leaf = x[:, 9:].clone().requires_grad_()
        y, after = block(leaf, s)
        gradients.append(
            torch.autograd.grad(
                y.square().sum(),
                [leaf, *block.parameters()],
                allow_unused=True,
                materialize_grads=True,
            )
        )
        assert after is None or not any(t.is_inference() for t in after.tensors())
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow(compile_nodes=False)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo's own doing
@pytest.mark.parametrize("name", ["attention-plain", "block-lstm"])
def test_compiled_too_a_prefix_read_under_inference_mode_is_trained_on(name: str) -> None:
    """Torch refuses to save tensors of inference_mode for a backward, and names none of them."""
    block, x = make_block(name), draw(2, 20, DIM)
    with torch.inference_mode():
        _, inferred = block(x[:, :9])
    _, state = block(x[:, :9])
    whole = torch.compile(block, backend="aot_eager", fullgraph=True)
    with pytest.raises(
        RuntimeError, match=r"state: it was made under inference_mode; state\.clone"
    ):
        whole(x[:, 9:], inferred)
    whole(x[:, 9:], inferred.clone())[0].sum().backward()
    compiled = torch.compile(block, backend="aot_eager")
    true = torch.autograd.grad(block(x[:, 9:], state)[0].square().sum(), [*block.parameters()])
    for s in (inferred, state, inferred):
        y, after = compiled(x[:, 9:], s)
        found = torch.autograd.grad(y.square().sum(), [*block.parameters()])
        assert not any(t.is_inference() for t in after.tensors())
        for a, b in zip(found, true, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_fixed_memory_is_taken_as_other_states_are() -> None:
    block, x = make_block("memory-mlp-gd-sketch"), draw(2, 20, DIM)
    with torch.inference_mode():
        _, inferred = block(x)
    _, state = block(x)
    y, true = (block(x, FixedMemory(s.rule.weights))[0] for s in (inferred, state))
    y.sum().backward()  # what reads is trained
    assert torch.equal(y, true)
    moved = FixedMemory(tuple(w.to("meta") for w in state.rule.weights))
    with pytest.raises(ValueError, match=r"state\.weights\[0\]: expected device cpu .*, got meta"):
        block(x, moved)


def shapes(result: tuple[Tensor, State | None]) -> list[tuple[torch.Size, torch.dtype]]:
    return [(t.shape, t.dtype) for t in of_all(result)]


@every_block
def test_on_the_meta_device_a_call_gives_shapes(name: str) -> None:
    block, x = make_block(name, torch.float32), draw(2, 11, DIM, dtype=torch.float32)
    bounds = torch.tensor([0, 4, 11])
    first, packed = block(x), block(x[:1], cu_seqlens=bounds)
    true = [shapes(first), shapes(block(x, first[1])), shapes(packed)]
    with torch.device("meta"):
        block = BLOCKS[name](DIM, 2)
    x = x.to("meta").requires_grad_()
    y, state = block(x)
    again = block(x, state)
    # A state that was moved keeps its positions; one made here has none to be read.
    moved = block(x, first[1] and first[1].to("meta"))
    packed = block(x[:1], cu_seqlens=bounds)
    assert [shapes((y, state)), shapes(again), shapes(packed)] == true
    assert shapes(moved) == shapes(again)
    again[0].sum().backward()
    assert x.grad is not None


@every_block
def test_among_fake_tensors_a_call_gives_shapes(name: str) -> None:
    real, x = make_block(name, torch.float32), draw(3, 13, DIM, dtype=torch.float32)
    with FakeTensorMode():
        block, fake = BLOCKS[name](DIM, 2), torch.empty(3, 13, DIM, requires_grad=True)
        y, state = block(fake)
        again = block(fake, state)
        again[0].sum().backward()
        assert fake.grad is not None
    # What was made on the way is not kept for calls on data.
    first = real(x)
    assert all(type(t) is Tensor for t in of_all(first))
    assert shapes((y, state)) == shapes(first)
    # How many segments have been read is not known where positions hold nothing.
    if not name.startswith("caching"):
        assert shapes(again) == shapes(real(x, first[1]))


@pytest.mark.slow(compile_nodes=False)
@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo's own doing
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("name", ["memory-mlp-gd-sketch", "dot"])
def test_compiled_too_a_state_is_not_the_parameters_it_began_as(name: str) -> None:
    block, x = make_block(name), draw(2, 3, DIM)
    _, state = torch.compile(block, backend="aot_eager")(x)
    kept = state.clone()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.fill_(7.0)
    for a, b in zip(state.tensors(), kept.tensors(), strict=True):
        assert torch.equal(a, b)
