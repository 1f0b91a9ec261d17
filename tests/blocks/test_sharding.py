"""FSDP2 over units finer than a block, and what is built without storage, in one process."""

from collections.abc import Callable, Iterator

import pytest
import torch
from helpers import BLOCKS, DIM, HEADS, difference, draw, make_block
from torch import Tensor, nn
from torch import distributed as dist

from atlas_blocks import AtlasMemory, State
from atlas_blocks.recipes import build

# Of what is changed in place after a unit has returned it: nothing is.
pytestmark = pytest.mark.filterwarnings("ignore:FSDP2-wrapped module .* returned a view")

fsdp = pytest.importorskip("torch.distributed.fsdp")
fully_shard = fsdp.fully_shard


@pytest.fixture(scope="module", autouse=True)
def _process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


UNITS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "memories": lambda model: [m for m in model.modules() if isinstance(m, AtlasMemory)],
    "all that has parameters": lambda model: [
        m for m in model.modules() if m is not model and any(True for _ in m.parameters(False))
    ],
    "every Linear": lambda model: [m for m in model.modules() if isinstance(m, nn.Linear)],
}


def full(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def gradients(model: nn.Module, y: Tensor) -> list[Tensor]:
    (y * draw(*y.shape, seed=2, dtype=y.dtype)).sum().backward()
    return [full(p.grad) for p in model.parameters()]


@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("name", [n for n in BLOCKS if n.startswith(("as", "block-memory"))])
def test_units_of_a_block_are_the_block(name: str, units: str) -> None:
    whole, model = make_block(name), make_block(name)
    for unit in reversed(UNITS[units](model)):  # parts before what holds them
        fully_shard(unit)
    fully_shard(model)
    x = draw(2, 30, DIM)
    y, state = model(x)
    true, _ = whole(x)
    assert difference([y], [true]) < 1e-12
    assert difference(gradients(model, y), gradients(whole, true)) < 1e-10
    again, _ = model(x[:, :3], state)
    assert difference([again], [whole(x[:, :3], state)[0]]) < 1e-12


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", ["omeganet-tiny", "atlas-mac-tiny"])
def test_an_embedding_that_is_the_head_too_is_a_unit(name: str, tied: bool) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build(name, depth=2, tie_embeddings=tied).double())
    whole, model = models
    for unit in (model.embedding, *(b.memory for b in model.blocks if hasattr(b, "memory"))):
        fully_shard(unit)
    for unit in (*model.blocks, model):
        fully_shard(unit)
    tokens = torch.arange(40)[None] % 256
    y, true = model(tokens).logits, whole(tokens).logits
    assert difference([y], [true]) < 1e-10
    assert difference(gradients(model, y), gradients(whole, true)) < 1e-8


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize("units", UNITS)
@pytest.mark.parametrize("name", ["block-attention", "block-memory", "as-context", "swdt", "lstm"])
def test_a_gradient_that_comes_through_a_state_alone_finds_the_parameters(
    name: str, units: str, reshard: bool
) -> None:
    """FSDP2 walks no State: what it had taken away after the second call's backward was read."""
    whole, model = make_block(name), make_block(name)
    for unit in reversed([u for u in UNITS[units](model) if u is not model]):
        fully_shard(unit, reshard_after_forward=reshard)
    fully_shard(model, reshard_after_forward=reshard)
    x, found = draw(2, 30, DIM), []
    for m in (model, whole):
        _, state = m(x[:, :13].clone().requires_grad_(), detach_state=False)
        found.append(m(x[:, 13:].clone().requires_grad_(), state)[0])
    assert difference(*found) < 1e-12
    assert difference(gradients(model, found[0]), gradients(whole, found[1])) < 1e-10


@pytest.mark.parametrize("name", ["transformer-tiny", "omeganet-tiny"])
def test_blocks_of_a_model_are_units_across_calls(name: str) -> None:
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(build(name, depth=2).double())
    whole, model = models
    for unit in (*model.blocks, model):
        fully_shard(unit)
    tokens, found = torch.arange(40)[None] % 256, []
    for m in models:
        _, state = m(tokens[:, :17], detach_state=False)
        found.append(m(tokens[:, 17:], state).logits)
    assert difference(gradients(model, found[1]), gradients(whole, found[0])) < 1e-8


class Around(nn.Module):
    """A parameter around a block, as in somebody's layer."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.scale = block, nn.Parameter(torch.ones(DIM).double())

    def forward(self, x: Tensor, state: State | None, detach_state: bool) -> tuple[Tensor, State]:
        y, state = self.block(x, state, detach_state=detach_state)
        return y * self.scale, state


@pytest.mark.parametrize("name", ["block-attention", "memory-mlp-gd-sketch", "lstm"])
def test_a_state_that_a_unit_around_the_block_returns_is_no_wrong_gradient(name: str) -> None:
    model = Around(Around(make_block(name)))
    for unit in (model.block, model):
        fully_shard(unit)
    first, second = draw(1, 30, DIM).split([13, 17], 1)
    _, state = model(first.clone().requires_grad_(), None, False)
    y, _ = model(second.clone().requires_grad_(), state, False)
    with pytest.raises(RuntimeError, match=r"state: its gradient .* \(fully_shard\(block\)\)"):
        y.sum().backward()


def test_no_persistent_tokens_are_no_empty_shard() -> None:
    model, x = make_block("as-context-muon"), draw(1, 9, DIM)
    assert model.config.persistent_tokens == 0
    fully_shard(model)
    model(x)[0].sum().backward()


def test_a_memory_keeps_float32_under_a_policy_of_bfloat16() -> None:
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    model = make_block("as-context", torch.float32)
    x = draw(1, 30, DIM, dtype=torch.float32)
    true = model(x)[0]
    for unit in (model.memory, model):
        fully_shard(unit, mp_policy=policy)
    y, state = model(x)
    assert all(w.dtype == torch.float32 for w in (*state.memory.rule.weights, *state.read))
    assert (y - true).norm() < 0.1 * true.norm()


@pytest.mark.filterwarnings("ignore:DTensor random operators")
@pytest.mark.parametrize("name", BLOCKS)
def test_a_sharded_block_built_on_meta_is_whole_after_reset(name: str) -> None:
    """Whatever the order; with a mesh of one, which is DTensors all the same."""
    with torch.device("meta"):
        block = BLOCKS[name](DIM, HEADS)
    fully_shard(block)
    block.to_empty(device="cpu")
    with torch.no_grad():
        for t in (*block.parameters(), *block.buffers()):
            if t.is_floating_point():
                t.fill_(float("nan"))  # as raw memory may be
    assert all(full(p).isnan().all() for p in block.parameters() if p.numel())
    for module in reversed(list(block.modules())):
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    built, other = (BLOCKS[name](DIM, HEADS) for _ in range(2))
    for (key, p), a, b in zip(
        block.named_parameters(), built.parameters(), other.parameters(), strict=True
    ):
        assert full(p).isfinite().all(), key
        assert torch.equal(a, b) == torch.equal(a, full(p)), key
    built.load_state_dict({n: full(t) for n, t in block.state_dict().items()})
    x = draw(1, 20, DIM, dtype=torch.float32)
    assert torch.equal(block(x)[0], built(x)[0])
