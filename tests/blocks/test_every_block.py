"""The contract of every block: streaming, causality, packing, states, gradients, precision."""

import io
import itertools

import pytest
import torch
from helpers import (
    BLOCKS,
    DIM,
    GROWING,
    SEGMENT,
    assert_close,
    block_in_pieces,
    difference,
    draw,
    everything,
    make_block,
)
from torch import Tensor
from torch.masked import masked_tensor
from torch.nn.utils.rnn import pack_sequence

from atlas_blocks import Block, State

every_block = pytest.mark.parametrize("name", BLOCKS)
# Where Newton-Schulz magnifies rounding; everything else stays below 1e-12 as well.
TOLERANCE = 1e-10


def parameter_gradients(block: Block, y: Tensor) -> dict[str, Tensor]:
    weight = draw(*y.shape, seed=2, dtype=y.dtype)
    names, leaves = zip(*block.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad((y * weight).sum(), leaves), strict=True))


@every_block
@pytest.mark.parametrize(
    "pieces", [45 * [1], [0, 1, 2, 0, 17, 21, 4], [8, 16, 21], [44, 1], [45, 0]], ids=str
)
def test_any_split_equals_the_whole(name: str, pieces: list[int]) -> None:
    block, x = make_block(name), draw(2, 45, DIM)
    assert_close(block_in_pieces(block, x, pieces), block(x), TOLERANCE)


@every_block
def test_a_token_never_changes_what_came_before_it(name: str) -> None:
    block, x = make_block(name), draw(1, 45, DIM)
    y = block(x)[0]
    for t in (1, 8, 13, 30, 44):
        other = x.clone()
        other[:, t:] = draw(1, 45 - t, DIM, seed=t + 100)
        z = block(other)[0]
        assert difference([z[:, :t]], [y[:, :t]]) < 1e-13
        assert difference([z[:, t]], [y[:, t]]) > 1e-3


@every_block
def test_packed_documents_equal_each_alone(name: str) -> None:
    block = make_block(name)
    bounds = [0, 5, 6, 23, 28, 45]  # two documents of one length
    x, more, cu_seqlens = draw(1, 45, DIM), draw(1, 45, DIM, seed=2), torch.tensor(bounds)
    y, states = block(x, cu_seqlens=cu_seqlens)
    again, ends = block(more, states, cu_seqlens=cu_seqlens.int())
    for i, (a, b) in enumerate(itertools.pairwise(bounds)):
        alone, state = block(x[:, a:b])
        assert_close((y[:, a:b], states and states[[i]]), (alone, state), TOLERANCE)
        alone = block(more[:, a:b], state)
        assert_close((again[:, a:b], ends and ends[[i]]), alone, TOLERANCE)


@every_block
def test_gradients_of_packed_documents_are_those_of_each_alone(name: str) -> None:
    block, x = make_block(name), draw(1, 30, DIM)
    y, _ = block(x, cu_seqlens=torch.tensor([0, 11, 30]))
    alone = torch.cat([block(x[:, :11])[0], block(x[:, 11:])[0]], 1)
    ours, true = parameter_gradients(block, y), parameter_gradients(block, alone)
    for parameter, gradient in true.items():
        assert difference([ours[parameter]], [gradient]) < 1e-8, parameter


@every_block
def test_rows_at_different_positions_equal_each_alone(name: str) -> None:
    block = make_block(name)
    states = [block(draw(1, n, DIM, seed=n))[1] for n in (0, 3, 8, 40, 3)]
    if states[0] is None:
        return  # nothing is carried
    x = draw(5, 20, DIM)
    together = State.cat(states)
    y, end = block(x, together)
    for i, state in enumerate(states):
        assert_close((y[[i]], end[[i]]), block(x[[i]], state), TOLERANCE)
    # Reordered, repeated and sliced states go on as their rows would.
    order = [3, 0, 3, 1]
    assert_close(block(x[order], together[order]), (y[order], end[order]), TOLERANCE)
    assert_close(block(x[1:3], together[1:3]), (y[1:3], end[1:3]), TOLERANCE)


@every_block
def test_a_saved_state_goes_on_exactly(name: str) -> None:
    block, x = make_block(name), draw(2, 30, DIM)
    _, state = block(x[:, :13])
    if state is None:
        return
    file = io.BytesIO()
    torch.save(state.to_dict(), file)
    file.seek(0)
    loaded = State.from_dict(torch.load(file, weights_only=True))
    assert type(loaded) is type(state)
    ours, true = block(x[:, 13:], loaded), block(x[:, 13:], state)
    for a, b in zip(everything(ours), everything(true), strict=True):
        assert torch.equal(a, b)


@every_block
def test_every_parameter_gets_a_finite_gradient(name: str) -> None:
    block = make_block(name)
    found = parameter_gradients(block, block(draw(2, 45, DIM))[0])
    for parameter, gradient in found.items():
        assert gradient.isfinite().all(), parameter
        assert gradient.any() or not gradient.numel(), parameter


@every_block
def test_gradients_cross_a_state_that_is_not_detached(name: str) -> None:
    block, x = make_block(name), draw(1, 30, DIM)
    true = parameter_gradients(block, block(x)[0])
    y, state = block_in_pieces(block, x, [11, 0, 19], detach_state=False)
    ours = parameter_gradients(block, y)
    for parameter, gradient in true.items():
        assert difference([ours[parameter]], [gradient]) < 1e-8, parameter
    if state is not None:
        x.requires_grad_()
        assert any(t.requires_grad for t in block(x, detach_state=False)[1].tensors())
        assert not any(t.requires_grad for t in block(x)[1].tensors())


@every_block
def test_the_state_has_one_size_or_grows_evenly_and_owns_its_memory(name: str) -> None:
    block, sizes = make_block(name, torch.float32), []
    lengths = (0, 1, 8, 100, 300)
    for length in lengths:
        with torch.no_grad():
            _, state = block(draw(2, length, DIM, dtype=torch.float32))
        if state is None:
            return
        sizes.append(state.nbytes)
        for t in state.tensors():
            assert t.untyped_storage().nbytes() <= t.nbytes
    every = SEGMENT if name.startswith("caching") else 1
    each = (sizes[2] - sizes[0]) // (lengths[2] // every)
    assert sizes == [sizes[0] + length // every * each for length in lengths]
    assert (each > 0) == name.startswith(GROWING)


@pytest.mark.parametrize("name", ["memory-mlp-gd-sketch", "memory-matrix-muon-taylor_exp"])
def test_three_thousand_tokens_leave_a_state_of_the_size_of_a_hundred(name: str) -> None:
    block = make_block(name, torch.float32)
    with torch.no_grad():
        short, long = (
            block(draw(1, length, DIM, dtype=torch.float32))[1] for length in (100, 3000)
        )
    assert short.nbytes == long.nbytes
    for t in long.tensors():
        assert t.untyped_storage().nbytes() == t.nbytes
        assert t.isfinite().all()


@every_block
def test_parameters_and_buffers_round_trip(name: str) -> None:
    block = make_block(name)
    torch.manual_seed(99)
    other = BLOCKS[name](DIM, 2).double()
    x = draw(2, 20, DIM)
    assert difference([other(x)[0]], [block(x)[0]]) > 1e-3
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(x)[0], block(x)[0])


@every_block
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_the_memory_learns_in_eval_mode_and_without_autograd(name: str, mode) -> None:
    block, x = make_block(name), draw(2, 30, DIM)
    block.train()
    true = block(x)
    block.eval()
    assert_close(block(x), true, 0.0)
    with mode():
        assert_close(block(x), true, 1e-12)
        assert_close(block_in_pieces(block, x, [7, 23]), true, TOLERANCE)


@every_block
def test_float32_is_as_near_as_float32_is(name: str) -> None:
    """Within twice what rounding the parameters and the input changes. Rounding on the way, before
    Newton-Schulz, grows with its small singular values: 3.4445 times in each of five steps."""
    x = draw(2, 45, DIM, dtype=torch.float32)
    block = make_block(name, torch.float32)
    y = block(x)[0]
    assert y.dtype == torch.float32
    error = y.double() - (true := block.double()(x.double())[0])

    def rounded(t: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        noise = 2 * torch.rand(t.shape, generator=generator, dtype=t.dtype) - 1
        return t * (1 + torch.finfo(torch.float32).eps * noise)

    with torch.no_grad():
        for seed, p in enumerate(block.parameters()):
            p.copy_(rounded(p, seed))
        change = block(rounded(x.double(), 100))[0] - true
    configs = [getattr(m, "config", None) for m in block.modules()]
    magnified = any(getattr(c, "update", "") == "muon" for c in configs)
    assert error.norm() < (2 * 3.4445**5 if magnified else 2) * change.norm()


@every_block
def test_bfloat16_autocast_is_finite_and_near_in_both_directions(name: str) -> None:
    block, x = make_block(name, torch.float32), draw(2, 45, DIM, dtype=torch.float32)
    x.requires_grad_()
    true, _ = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = block(x)
        z, _ = block_in_pieces(block, x, [11, 34])
    assert y.isfinite().all()
    # Two dozen roundings of 2^-8 on the way; Newton-Schulz magnifies some.
    assert (y - true).norm() < 0.15 * true.norm()
    assert (z - y).norm() < 0.15 * true.norm()
    y.float().square().sum().backward()
    for p in (x, *block.parameters()):
        assert p.grad is not None
        assert p.grad.isfinite().all()
    if state is not None and hasattr(state, "rule"):
        assert state.rule.weights[0].dtype == torch.float32


@every_block
def test_a_block_built_on_meta_is_whole_after_reset(name: str) -> None:
    with torch.device("meta"):
        block = BLOCKS[name](DIM, 2)
    assert all(t.is_meta for t in (*block.parameters(), *block.buffers()))
    block.to_empty(device="cpu")
    with torch.no_grad():
        for t in (*block.parameters(), *block.buffers()):
            t.fill_(float("nan") if t.is_floating_point() else 123456789)  # as raw memory may be
    for module in block.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    one, two = (BLOCKS[name](DIM, 2) for _ in range(2))
    for (key, p), a, b in zip(
        block.named_parameters(), one.parameters(), two.parameters(), strict=True
    ):
        assert p.isfinite().all(), key
        assert torch.equal(a, b) == torch.equal(a, p), key
    one.load_state_dict(block.state_dict())
    x = draw(2, 20, DIM, dtype=torch.float32)
    assert torch.equal(one(x)[0], block(x)[0])


@every_block
def test_no_tokens_and_no_rows_are_legal(name: str) -> None:
    block = make_block(name)
    _, state = block(draw(2, 9, DIM))
    y, after = block(draw(2, 0, DIM), state)
    assert y.shape == (2, 0, DIM)
    if state is not None:
        assert_close((y, after), (y, state), 0.0)


@every_block
def test_a_loss_of_no_tokens_has_a_backward(name: str) -> None:
    """As a batch sharded over ranks, or cut into pieces, may come to: DDP waits for a gradient of
    every parameter."""
    block = make_block(name)
    _, state = block(draw(2, 9, DIM))
    padding = torch.zeros(2, 9, dtype=torch.bool)
    for x, before, mask in (
        (draw(2, 0, DIM), None, None),
        (draw(2, 0, DIM), state, None),
        (draw(0, 9, DIM), None, None),
        (draw(2, 9, DIM), None, padding),
    ):
        y, _ = block(x, before, mask=mask, detach_state=False)
        assert y.shape == x.shape
        assert y is not x
        y.sum().backward()
        for key, p in block.named_parameters():
            assert p.grad is not None, key
            assert not p.grad.any(), key
        block.zero_grad()


@every_block
def test_a_frozen_block_hands_its_gradient_on(name: str) -> None:
    """As a backbone under what is trained, or one whose adapters are."""
    block, x = make_block(name), draw(2, 20, DIM).requires_grad_()
    weight = draw(2, 20, DIM, seed=2)
    (true,) = torch.autograd.grad((block(x)[0] * weight).sum(), x)
    block.requires_grad_(False)
    y, state = block(x, detach_state=False)
    (y * weight).sum().backward()
    assert difference([x.grad], [true]) < 1e-12
    assert all(p.grad is None for p in block.parameters())
    y, _ = block(x.detach(), state and state.detach())
    assert not y.requires_grad


def test_frozen_parameters_and_compiled_graphs_of_no_tokens() -> None:
    block, x = make_block("block-memory"), draw(2, 0, DIM)
    block.mixer.requires_grad_(False)
    torch.compile(block, backend="aot_eager", fullgraph=True)(x)[0].sum().backward()
    for key, p in block.named_parameters():
        assert (p.grad is None) == key.startswith("mixer."), key
    block.requires_grad_(False)
    assert not block(x)[0].requires_grad


@every_block
def test_an_empty_batch_is_legal(name: str) -> None:
    block = make_block(name)
    y, state = block(draw(0, 9, DIM))
    assert y.shape == (0, 9, DIM)
    assert block(draw(0, 2, DIM), state)[0].shape == (0, 2, DIM)


@every_block
def test_wrong_inputs_are_named(name: str) -> None:
    block, x = make_block(name), draw(2, 9, DIM)
    _, state = block(x)
    cases = [
        ((x[0],), {}, r"x: expected shape \[B, T, dim\] = \[any, any, 12\], got \[9, 12\]"),
        ((x[..., 1:],), {}, r"x: expected shape .*, got \[2, 9, 11\]"),
        ((x.long(),), {}, r"x: expected dtype .*, got torch.int64"),
        (("x",), {}, r"x: expected a tensor \[B, T, dim\], got str"),
        (
            (x.to_sparse(),),
            {},
            r"x: expected a dense tensor .*, got one of layout torch.sparse_coo",
        ),
        ((x, x), {}, "state: expected .*None, got Tensor"),
    ]
    if state is not None:
        cases.append(((x[:1], state), {}, r"state: expected a batch of 1 \(that of x\), got 2"))
        two = {"cu_seqlens": torch.tensor([0, 9])}
        cases.append(
            (
                (x[:1], state),
                two,
                r"state: expected a batch of 1 \(documents in cu_seqlens\), got 2",
            )
        )
    for bounds, message in (
        ([0, 4], r"cu_seqlens: expected strictly rising bounds from 0 to T = 9, got \[0, 4\]"),
        ([1, 9], "cu_seqlens: expected strictly rising"),
        ([0, 5, 5, 9], "cu_seqlens: expected strictly rising"),
        ([9], "cu_seqlens: expected strictly rising"),
        ([[0, 9]], r"cu_seqlens: expected shape \[N \+ 1\]"),
        ([0.0, 9.0], "cu_seqlens: expected dtype torch.int32 or torch.int64, got torch.float32"),
    ):
        cases.append(((x[:1],), {"cu_seqlens": torch.tensor(bounds)}, message))
    cases.append(
        (
            (x,),
            {"cu_seqlens": torch.tensor([0, 9])},
            "x: expected a batch of 1 with cu_seqlens, got 2",
        )
    )
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message):
            block(*arguments, **options)


@every_block
@pytest.mark.filterwarnings("ignore:The PyTorch API of (nested tensors|MaskedTensors)")
def test_padding_is_refused_in_other_forms(name: str) -> None:
    """Nested tensors, packed sequences, masks by other names than `mask` (test_padding.py)."""
    block, x = make_block(name), draw(2, 9, DIM)
    mask = torch.ones(2, 9, dtype=torch.bool)
    for word in ("attention_mask", "attn_mask", "key_padding_mask"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{word}'"):
            block(x, **{word: mask})
    with pytest.raises(ValueError, match=r"state: expected .*None, got Tensor"):
        block(x, mask)
    with pytest.raises(ValueError, match=r"cu_seqlens: expected dtype torch.int32 or torch.int64"):
        block(x[:1], cu_seqlens=mask[0])
    rows = [x[0, :5], x[1]]
    for layout in (torch.jagged, torch.strided):
        nested = torch.nested.nested_tensor(rows, layout=layout)
        with pytest.raises(ValueError, match=r"x: expected a dense tensor .*cu_seqlens.* nested"):
            block(nested)
    with pytest.raises(ValueError, match=r"x: expected a dense tensor .*cu_seqlens.* a masked one"):
        block(masked_tensor(x, mask[..., None].expand_as(x)))
    with pytest.raises(ValueError, match=r"x: expected a tensor .*, got PackedSequence"):
        block(pack_sequence(rows, enforce_sorted=False))


@every_block
def test_the_state_of_another_block_is_refused(name: str) -> None:
    block, x = make_block(name), draw(2, 9, DIM)
    _, own = block(x)
    mine = [] if own is None else [t.shape for t in own.tensors()]
    for other_name in BLOCKS:
        _, state = make_block(other_name)(x)
        if state is None:
            continue
        if type(state) is type(own) and [t.shape for t in state.tensors()] == mine:
            continue
        with pytest.raises(ValueError, match="state"):
            block(x, state)
