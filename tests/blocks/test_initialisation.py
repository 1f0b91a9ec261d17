"""What layers start from, however they are built, and that it is not taken for data."""

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import BLOCKS, DIM, HEADS, difference, draw, make_block
from torch import Tensor, nn

from atlas_blocks import (
    AtlasMemory,
    AtlasMemoryConfig,
    DeepTransformerConfig,
    MemoryAsContextConfig,
    SlidingWindowAttentionConfig,
    use_provider,
)
from atlas_blocks.blocks.gates import FixedGate, Gate
from atlas_blocks.functional import SketchMap, sketch_tables
from atlas_blocks.recipes import build, checkpoint

MODELS = {
    "memory": lambda: build("omeganet-tiny", depth=1),
    "context": lambda: build("titans-mac-tiny", depth=1),
    "attention": lambda: build("transformer-tiny", depth=1, tie_embeddings=False),
    "lstm": lambda: build("lstm-tiny", depth=1),
    "fixed": lambda: build("retnet-tiny", depth=1),
    "series": lambda: build("dot-tiny", depth=1),
    "exact": lambda: DeepTransformerConfig(window=4).build(64, 4),
    "neutral": lambda: DeepTransformerConfig(window=4, gates="neutral", qk_norm="rms").build(64, 4),
    "sinks": lambda: SlidingWindowAttentionConfig(sink_tokens=50).build(64, 4),
}
every_model = pytest.mark.parametrize("name", MODELS)
ORDERS: dict[str, Callable[[list], list]] = {
    "parents first": lambda modules: modules,
    "children first": lambda modules: modules[::-1],
    "as they come": lambda modules: modules[::2] + modules[1::2],
}


def resettable(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "reset_parameters")]


@every_model
@pytest.mark.parametrize("order", ORDERS)
def test_resetting_every_module_in_any_order_starts_as_building_does(name: str, order: str) -> None:
    model, built = MODELS[name](), MODELS[name]()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    for module in ORDERS[order](resettable(model)):
        module.reset_parameters()
    for (key, p), true in zip(model.named_parameters(), built.parameters(), strict=True):
        if true.numel() < 200 or not true.std():  # a constant, or too few for statistics
            assert torch.equal(p, true) or true.std(), key
            assert p.abs().max() < 5, key
            continue
        # Five standard errors; 1.8 is that of a uniform distribution, 3 of a normal one.
        spread = 5 * 2 / p.numel() ** 0.5
        assert abs(p.std() / true.std() - 1) < spread, key
        kurtosis = [((t - t.mean()) / t.std()).pow(4).mean() for t in (p, true)]
        assert abs(kurtosis[0] - kurtosis[1]) < 5 * 10 / p.numel() ** 0.5, key


def nano_gpt(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def hugging_face(module: nn.Module) -> None:
    """What `post_init` of a transformers model does with every module of a foreign kind."""
    transformers = pytest.importorskip("transformers")
    transformers.PreTrainedModel._init_weights(
        type("Model", (), {"config": transformers.LlamaConfig()})(), module
    )


@pytest.mark.parametrize("initialise", [nano_gpt, hugging_face])
@pytest.mark.parametrize("name", BLOCKS)
def test_an_initialiser_of_whole_models_leaves_the_start_of_gates(
    name: str, initialise: Callable[[nn.Module], None]
) -> None:
    block, x = BLOCKS[name](DIM, HEADS), draw(2, 5, DIM, dtype=torch.float32)
    gates = [m for m in block.modules() if isinstance(m, (Gate, FixedGate))]
    before = [gate(x) for gate in gates]
    block.apply(initialise)
    for gate, start in zip(gates, before, strict=True):
        assert torch.equal(gate(x), start)


def test_layers_know_their_parameters_by_these_names_in_this_order() -> None:
    """Files hold weights by name and an optimizer's tensors by order."""
    gates = [f"{g}.{part}" for g in ("alpha", "eta", "theta", "gamma") for part in (
        "0.weight", "1.weight", "1.bias")]  # fmt: skip
    memory = ["log_coefficients", "qkv.weight", "conv.weight", *gates, "memory.0", "memory.1",
              "norm.weight", "gate.weight", "out.weight"]  # fmt: skip
    assert [n for n, _ in AtlasMemory(16, 2).named_parameters()] == memory
    assert list(AtlasMemory(16, 2).state_dict()) == memory
    block = MemoryAsContextConfig().build(16, 2)
    assert [n for n, _ in block.named_parameters()] == [
        "persistent", "mixer_norm.weight", *(f"memory.{n}" for n in memory), "recall_query.weight",
        "qkv.weight", "attention_out.weight", "attention_norm.weight", "memory_norm.weight",
        "mlp_norm.weight", "mlp.gate.weight", "mlp.up.weight", "mlp.down.weight",
    ]  # fmt: skip


# --- sketches ---------------------------------------------------------------------------------


def outputs(block: nn.Module) -> Tensor:
    return block(draw(2, 20, DIM, dtype=next(block.parameters()).dtype))[0]


def test_sketches_are_the_same_whatever_the_seed_of_the_process() -> None:
    layers = []
    for rank in (0, 1):
        torch.manual_seed(rank)
        layers.append(AtlasMemory(DIM, HEADS))
    layers[0].load_state_dict(layers[1].state_dict())
    assert torch.equal(*map(outputs, layers))
    other = AtlasMemory(DIM, HEADS, AtlasMemoryConfig(sketch_seed=1))
    other.load_state_dict(layers[1].state_dict())
    assert difference([outputs(other)], [outputs(layers[0])]) > 1e-4


def test_averaging_weights_and_buffers_leaves_a_sketch_as_it_is() -> None:
    """An average of equal integers, rounded down, can be one less."""
    block = AtlasMemory(DIM, HEADS)
    average = torch.optim.swa_utils.AveragedModel(
        block, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999), use_buffers=True
    )
    for _ in range(3):
        average.update_parameters(block)
    assert difference([outputs(average.module)], [outputs(block)]) < 1e-6


def test_a_checkpoint_with_tables_of_its_own_keeps_them() -> None:
    """Layers of before drew their tables at random and saved them."""
    block, tables = make_block("memory-mlp-gd-sketch"), sketch_tables(DIM // HEADS, DIM, 2, 77)
    old = block.state_dict() | dict(zip(("buckets", "signs"), tables, strict=True))
    true = copy.deepcopy(block)
    true.feature_map = lambda: SketchMap(true.log_coefficients.exp(), *tables, DIM)
    assert difference([outputs(true)], [outputs(block)]) > 1e-3
    loaded = make_block("memory-mlp-gd-sketch")
    loaded.load_state_dict(old)
    again = make_block("memory-mlp-gd-sketch")
    again.load_state_dict(loaded.state_dict())
    for one in (loaded, again, copy.deepcopy(loaded)):
        assert torch.equal(outputs(one), outputs(true))
    compiled = torch.compile(loaded, backend="aot_eager")
    with torch.no_grad(), use_provider("definition"):
        assert difference([outputs(compiled)], [outputs(true)]) < 1e-12
    # Gone where a checkpoint of today is loaded, and where the layer starts anew.
    again.load_state_dict(block.state_dict())
    loaded.reset_parameters()
    assert torch.equal(outputs(again), outputs(block))
    assert not {"buckets", "signs"} & {*loaded.state_dict()}


def test_a_segment_that_is_compiled_has_the_tables_of_its_checkpoint() -> None:
    block = MemoryAsContextConfig(AtlasMemoryConfig(update="gd"), segment=8).build(DIM, HEADS)
    tables = sketch_tables(DIM // HEADS, DIM, 2, 77)
    names = ("memory.buckets", "memory.signs")
    block.load_state_dict(block.state_dict() | dict(zip(names, tables, strict=True)))
    block = block.double()
    with torch.no_grad():
        compiled = torch.compile(block, backend="aot_eager")
        assert difference([outputs(compiled)], [outputs(block)]) < 1e-10


def test_a_layer_without_persistent_tokens_has_no_empty_parameter() -> None:
    block = MemoryAsContextConfig(persistent_tokens=0).build(DIM, HEADS)
    assert all(p.numel() for p in block.parameters())
    # As it was saved while it had.
    block.load_state_dict(block.state_dict() | {"persistent": torch.empty(0, DIM)})
    with pytest.raises(RuntimeError, match="persistent"):
        block.load_state_dict(block.state_dict() | {"persistent": torch.empty(1, DIM)})


# --- constants --------------------------------------------------------------------------------


@pytest.mark.parametrize("moved", [
    lambda gate: gate.half(),
    lambda gate: gate.bfloat16().float(),
    lambda gate: gate.to("meta").to_empty(device="cpu"),
    lambda gate: copy.deepcopy(gate).double(),
])  # fmt: skip
def test_fixed_gates_are_never_less_than_float32(moved: Callable) -> None:
    values = [0.999, 0.98, 1 / 3]
    gate = moved(FixedGate(values))
    for dtype in (torch.float16, torch.float32, torch.float64):
        found = gate(torch.zeros(2, 5, 4, dtype=dtype))
        wide = torch.promote_types(dtype, torch.float32)
        if gate.row.dtype == torch.float32:
            torch.testing.assert_close(found[1, 4], torch.tensor(values).to(wide), rtol=0, atol=0)
        else:
            torch.testing.assert_close(found[1, 4], torch.tensor(values, dtype=wide))
    assert not gate.state_dict()


def test_no_layer_makes_a_tensor_from_python_numbers_in_its_forward() -> None:
    """Each would be a copy from the host, for which a GPU waits and which no CUDA graph takes."""
    real, made = torch.tensor, []
    for name in BLOCKS:
        block, x = make_block(name), draw(1, 20, DIM)
        block(x)  # what is made once is there now
        try:
            torch.tensor = lambda *a, name=name, **k: made.append(name) or real(*a, **k)
            block(x)
        finally:
            torch.tensor = real
    assert not made


def test_every_read_of_a_weight_is_inside_the_forward_of_its_module() -> None:
    """Offloading (accelerate) and sharding (FSDP) bring a module's own weights for that long."""
    names = itertools.chain(BLOCKS, ["omeganet-tiny", "atlas-mac-tiny", "retnet-tiny"])
    for name in names:
        if name in BLOCKS:
            model, x = make_block(name), draw(1, 20, DIM)
        else:
            model, x = build(name, depth=1), torch.arange(20)[None]
        model.requires_grad_(False)
        true = model(x)
        for module in model.modules():
            offload(module)
        found = model(x)
        assert torch.equal(found[0], true[0]), name
        assert all(p.is_meta for p in model.parameters()), name
        more = x[:, :1]
        assert model(more, found[1])[0].isfinite().all(), name


def offload(module: nn.Module) -> None:
    """Its own weights are on the meta device but while its forward runs."""
    kept = dict(module.named_parameters(recurse=False))

    def put(where: Callable[[Tensor], Tensor]) -> None:
        for name, p in kept.items():
            module._parameters[name] = nn.Parameter(where(p), requires_grad=False)

    put(lambda p: p.to("meta"))
    module.register_forward_pre_hook(lambda *_: put(lambda p: p))
    module.register_forward_hook(lambda *_: put(lambda p: p.to("meta")))


def test_a_memory_as_context_runs_no_linear_on_no_tokens() -> None:
    """Quantised ones take none."""
    block, sizes = make_block("as-context"), []
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[1]))
    block(draw(1, 20, DIM))
    assert sizes
    assert 0 not in sizes


def test_a_saved_model_with_tables_of_its_own_keeps_them(tmp_path: Path) -> None:
    model, tokens = build("omeganet-tiny", depth=1), torch.arange(40)[None]
    tables = sketch_tables(16, 32, 2, 77)
    names = ("blocks.0.mixer.buckets", "blocks.0.mixer.signs")
    model.load_state_dict(model.state_dict() | dict(zip(names, tables, strict=True)))
    file = tmp_path / "model.safetensors"
    checkpoint.save(file, model)
    loaded = checkpoint.load(file)
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(loaded.blocks[0].mixer.buckets, tables[0])
    # Another checkpoint, without any, is none the wiser.
    checkpoint.save(file, build("omeganet-tiny", depth=1))
    assert checkpoint.load(file).blocks[0].mixer.buckets is None


def test_a_layer_added_to_a_pretrained_model_starts_as_it_is_built(tmp_path: Path) -> None:
    """transformers builds on meta, loads what there is and has `_init_weights` fill the rest."""
    transformers = pytest.importorskip("transformers")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.LlamaConfig

        def __init__(self, config: Any, memories: bool = True) -> None:
            super().__init__(config)
            self.base = nn.Linear(DIM, DIM)
            self.layers = nn.ModuleList(
                [BLOCKS[name](DIM, HEADS) for name in FRESH] if memories else []
            )
            self.post_init()

        def _init_weights(self, module: nn.Module) -> None:
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()

    config = transformers.LlamaConfig()
    base = Model(config, memories=False)
    base.save_pretrained(tmp_path)
    model = Model.from_pretrained(tmp_path)
    assert torch.equal(model.base.weight, base.base.weight)
    x = draw(2, 20, DIM, dtype=torch.float32)
    for name, layer in zip(FRESH, model.layers, strict=True):
        built = BLOCKS[name](DIM, HEADS)
        built.load_state_dict(layer.state_dict())
        assert torch.equal(built(x)[0], layer(x)[0])
        one, two = BLOCKS[name](DIM, HEADS), BLOCKS[name](DIM, HEADS)
        pairs = zip(layer.parameters(), one.parameters(), two.parameters(), strict=True)
        for p, a, b in pairs:
            assert p.isfinite().all()
            assert torch.equal(a, b) == torch.equal(a, p)


FRESH = ("memory-mlp-gd-sketch", "memory-fixed-gates", "as-context", "dot", "block-attention")
