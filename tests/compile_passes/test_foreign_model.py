"""A model of another library with one of our blocks inside: one graph, the same loss."""

import pytest
import torch
from helpers import Recorder, small_memory
from torch import Tensor, nn

from atlas_blocks import AtlasMemory
from atlas_blocks.compile_passes import backend, explain
from atlas_blocks.compile_passes.graph_pass import Passes

transformers = pytest.importorskip("transformers")
# Of torch's and transformers' own parts, while compiling.
pytestmark = pytest.mark.filterwarnings("ignore")

DIM = 32


class MemoryForAttention(nn.Module):
    """AtlasMemory with the signature of a Llama's attention."""

    def __init__(self) -> None:
        super().__init__()
        matrix = {"memory": "matrix", "feature_map": "identity", "window": 1}
        self.memory = AtlasMemory(DIM, 2, small_memory(update="gd", **matrix))

    def forward(self, hidden_states: Tensor, **unused: object) -> tuple[Tensor, None]:
        return self.memory(hidden_states)[0], None


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = transformers.LlamaForCausalLM(config)
    model.model.layers[1].self_attn = MemoryForAttention()
    return model


def step(model: nn.Module, function, ids: Tensor) -> tuple[Tensor, list[Tensor]]:
    loss = function(input_ids=ids, labels=ids, use_cache=False).loss
    return loss.detach(), list(torch.autograd.grad(loss, list(model.parameters())))


def assert_same_step(model: nn.Module, compiled) -> None:
    ids = torch.randint(0, 64, (2, 40))
    (ours, our_gradients), (true, true_gradients) = (step(model, f, ids) for f in (compiled, model))
    torch.testing.assert_close(ours, true)
    for (name, _), a, b in zip(
        model.named_parameters(), our_gradients, true_gradients, strict=True
    ):
        assert (a - b).norm() <= 1e-4 * b.norm() + 1e-7, name


@pytest.mark.slow(compile_nodes=False)
def test_a_llama_with_a_memory_layer_is_one_graph_of_the_same_loss(llama):
    recorder = Recorder(Passes(backend.make_passes({})))
    assert_same_step(llama, torch.compile(llama, backend=recorder, fullgraph=True))
    assert recorder.compiles == 1
    assert recorder.count("atlas.omega_walk.default") == [1, 0]
    assert recorder.count("atlas.omega_walk_backward.default") == [0, 1]


@pytest.mark.slow
def test_a_llama_with_a_memory_layer_under_the_atlas_backend(llama):
    assert_same_step(llama, torch.compile(llama, backend="atlas", fullgraph=True))


@pytest.mark.slow(compile_nodes=False)
def test_explain_tells_of_a_llama(llama):
    ids = torch.randint(0, 64, (2, 40))
    report = explain(llama, {"input_ids": ids, "labels": ids, "use_cache": False})
    assert report.breaks == ()
    assert len(report.graphs) == 1
    assert [(u.op, u.direction) for u in report.ops] == [
        ("omega_rule", "forward"),
        ("omega_rule", "backward"),
    ]
