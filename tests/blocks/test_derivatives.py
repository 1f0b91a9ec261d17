"""Every block under torch.func, in forward mode and differentiated twice, against differences."""

import pytest
import torch
from helpers import BLOCKS, DIM, draw, make_block
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from atlas_blocks import Block, State
from atlas_blocks.graph import providers
from atlas_blocks.omega.op import definition_backward, definition_forward
from atlas_blocks.ops import Provider, register_provider, use_provider

# Of torch: where forward mode is first used, and where vmap takes one row after the other.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
]
every_block = pytest.mark.parametrize("name", BLOCKS)
STEP = 1e-6


@pytest.fixture(autouse=True)
def plain_attention():
    """torch's fused attention on a CPU has first derivatives alone."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def loss(block: Block, x: Tensor) -> Tensor:
    return block(x)[0].square().sum()


def gradient(block: Block, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(loss(block, x), x)[0]


def of_parameters(block: Block, x: Tensor) -> dict[str, Tensor]:
    names, leaves = zip(*block.named_parameters(), strict=True)
    found = torch.autograd.grad(loss(block, x), leaves, allow_unused=True, materialize_grads=True)
    return dict(zip(names, found, strict=True))


@every_block
def test_torch_func_grad_is_autograd_s(name: str) -> None:
    block, x = make_block(name), draw(2, 19, DIM)
    parameters = dict(block.named_parameters())
    found = grad(lambda p: functional_call(block, p, (x,))[0].square().sum())(parameters)
    for key, true in of_parameters(block, x).items():
        torch.testing.assert_close(found[key], true, rtol=1e-8, atol=1e-8)


@every_block
def test_gradients_of_each_sample_are_those_of_it_alone(name: str) -> None:
    block, x = make_block(name), draw(2, 19, DIM)
    if "lstm" in name:
        return  # torch's LSTM has no rule for vmap of its own
    parameters = dict(block.named_parameters())

    def one(p: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(block, p, (row[None],))[0].square().sum()

    found = vmap(grad(one), (None, 0))(parameters, x)
    for i in range(2):
        for key, true in of_parameters(block, x[[i]]).items():
            torch.testing.assert_close(found[key][i], true, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["as-layer", "memory-mlp-gd-sketch", "attention-neutral", "conv"])
def test_an_ensemble_returns_the_state_of_each_member(name: str) -> None:
    block, x = make_block(name), draw(2, 19, DIM)
    parameters = dict(block.named_parameters())
    scaled = {key: 1.1 * t for key, t in parameters.items()}
    both = {key: torch.stack([t, scaled[key]]) for key, t in parameters.items()}

    def rows(p: dict[str, Tensor]) -> tuple[Tensor, State]:
        y, state = functional_call(block, p, (x,))
        return y, state

    y, states = vmap(rows)(both)
    for i, p in enumerate((parameters, scaled)):
        true, state = rows(p)
        torch.testing.assert_close(y[i], true)
        for a, b in zip(states.tensors(), state.tensors(), strict=True):
            torch.testing.assert_close(a[i], b)


def apart(state: State) -> State:
    """The rows of a state as rows of a vmap, each a batch of one."""
    return state.map(lambda t: t[:, None])


@pytest.mark.parametrize("name", [n for n in BLOCKS if n not in ("lstm", "block-lstm")])
def test_rows_of_a_vmap_go_on_from_states_of_their_own(name: str) -> None:
    block, x = make_block(name), draw(3, 9, DIM)
    _, state = block(x)
    if state is None:
        return
    for length in (1, 6):
        more = draw(3, length, DIM, seed=3)
        true, end = block(more, state)
        y, after = vmap(block)(more[:, None], apart(state))
        pairs = zip([y, *after.tensors()], [true, *end.tensors()], strict=True)
        for a, b in pairs:
            torch.testing.assert_close(a[:, 0], b, rtol=1e-9, atol=1e-9)
        # Only one of the two is the vmap's.
        from_one = vmap(lambda row: block(row[None], state[[1]])[0])(more)
        torch.testing.assert_close(from_one[1], true[[1]], rtol=1e-9, atol=1e-9)
        onto_one = vmap(lambda s: block(more[[1]], s)[0])(apart(state))  # noqa: B023
        torch.testing.assert_close(onto_one[1], true[[1]], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["memory-mlp-gd-sketch", "as-context", "block-attention", "dot"])
def test_rows_of_a_vmap_at_different_places_go_on_or_are_refused(name: str) -> None:
    """What a memory computes depends on the place in its chunk, which is read on the host."""
    block, x, more = make_block(name), draw(2, 9, DIM), draw(2, 6, DIM, seed=3)
    state = State.cat([block(x[:1, :4])[1], block(x[:1])[1]])
    if name == "block-attention":
        y, _ = vmap(block)(more[:, None], apart(state))
        torch.testing.assert_close(y[:, 0], block(more, state)[0], rtol=1e-9, atol=1e-9)
        return
    message = r"state\.position: expected one position for all rows of a vmap, got \[\[4\], \[9\]\]"
    with pytest.raises(ValueError, match=message):
        vmap(block)(more[:, None], apart(state))


@every_block
def test_forward_mode_is_the_difference(name: str) -> None:
    block, x, t = make_block(name), draw(2, 19, DIM), draw(2, 19, DIM, seed=5)
    with torch.no_grad():
        true = (block(x + STEP * t)[0] - block(x - STEP * t)[0]) / (2 * STEP)
        _, found = jvp(lambda x: block(x)[0], (x,), (t,))
        with forward_ad.dual_level():
            dual = forward_ad.unpack_dual(block(forward_ad.make_dual(x, t))[0]).tangent
    for tangent in (found, dual):
        assert (tangent - true).norm() < 1e-6 * true.norm()


@every_block
def test_a_second_derivative_is_the_difference_of_first_ones(name: str) -> None:
    """autograd.grad of a gradient, which leaves out in silence what it finds no path through."""
    block, x, t = make_block(name), draw(2, 19, DIM), draw(2, 19, DIM, seed=5)
    true = (gradient(block, x + STEP * t) - gradient(block, x - STEP * t)) / (2 * STEP)
    leaf = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(block, leaf), leaf, create_graph=True)
    torch.testing.assert_close(first, gradient(block, x), rtol=1e-8, atol=1e-8)
    found, *second = torch.autograd.grad(
        (first * t).sum(), [leaf, *block.parameters()], allow_unused=True, materialize_grads=True
    )
    assert (found - true).norm() < 1e-5 * true.norm()
    # The gradient by a parameter of (gradient by x) . t is the derivative along t of its gradient.
    ahead, behind = (of_parameters(block, x + s * t).values() for s in (STEP, -STEP))
    true = [(a - b) / (2 * STEP) for a, b in zip(ahead, behind, strict=True)]
    size = max(one.norm() for one in true)
    for one, other in zip(second, true, strict=True):
        assert (one - other).norm() < 1e-5 * size


def test_a_provider_has_no_second_derivative_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {op: dict(entries) for op, entries in providers._PROVIDERS.items()}
    monkeypatch.setattr(providers, "_PROVIDERS", table)
    provider = Provider("once", lambda call: None, definition_forward, definition_backward)
    register_provider("omega_rule", provider, automatic_on=())
    block, x = make_block("memory-mlp-gd-sketch"), draw(1, 9, DIM).requires_grad_()
    with use_provider("once"):
        (first,) = torch.autograd.grad(loss(block, x), x, create_graph=True)
        torch.testing.assert_close(first, gradient(block, x))
        with pytest.raises(NotImplementedError, match="OmegaRule: no second derivative"):
            torch.autograd.grad(first.square().sum(), x)
