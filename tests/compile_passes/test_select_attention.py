"""select_attention: matches, ops before and after, no [T, T] mask, the numbers both ways."""

import re

import pytest
import torch
import torch.nn.functional as F
from helpers import Recorder, difference
from torch import Tensor, nn

from atlas_blocks.compile_passes.graph_pass import Passes, op_counts
from atlas_blocks.compile_passes.select_attention import SelectAttention

T, HEADS, WIDTH = 512, 2, 8


def band(length: int, window: int) -> Tensor:
    i = torch.arange(length)
    distance = i[:, None] - i
    return (distance >= 0) & (distance < window)


class Attention(nn.Module):
    """Two attentions that share one mask, written as people write it."""

    def __init__(self, mask, **options) -> None:
        super().__init__()
        self.qkv = nn.Linear(HEADS * WIDTH, 3 * HEADS * WIDTH)
        self.mask, self.options = mask, options

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(x)
        for _ in range(2):
            q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
            x = x + y.transpose(1, 2).flatten(2)
        return x


def compile_with_pass(model: nn.Module, dynamic: bool | None = None):
    one, runs, recorder = SelectAttention(), [], Recorder()

    def backend(graph, inputs):
        Passes([one], record=runs.append)(graph.graph)
        graph.recompile()
        return recorder(graph, inputs)

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    return compiled, one, runs, recorder


def additive(x: Tensor) -> Tensor:
    mask = torch.zeros(T, T).masked_fill(~band(T, 32), float("-inf"))
    return mask[None, None]


@pytest.mark.parametrize("mask", [lambda x: band(x.shape[1], 32), additive])
def test_a_band_mask_becomes_windowed_attention(mask) -> None:
    model, x = Attention(mask), torch.randn(2, T, HEADS * WIDTH)
    compiled, _, runs, recorder = compile_with_pass(model)
    results = []
    for function in (compiled, model):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append([y, *torch.autograd.grad(y.square().sum(), [leaf, *model.parameters()])])
    assert difference(*results) < 1e-4
    (run,) = runs
    assert (run.matches, run.direction) == (2, "forward")
    attention = next(op for op in run.changed if "scaled_dot_product" in op)
    assert run.changed[attention] == -2
    # Nothing of the size of a mask is computed any more, forward or backward.
    for graph in recorder.graphs:
        values = [n.meta.get("val") for n in graph.nodes]
        shapes = [v.shape for v in values if isinstance(v, Tensor)]
        assert not [s for s in shapes if sum(n >= T for n in s) > 1]


def causal(x: Tensor) -> Tensor:
    return band(T, T)


def with_a_hole(x: Tensor) -> Tensor:
    i = torch.arange(T)
    return band(T, 32) & (i != 7)


def of_the_input(x: Tensor) -> Tensor:
    return band(T, 32) & (x[0, :, 0] < 1e9)


def biased(x: Tensor) -> Tensor:
    return torch.where(band(T, 32), 0.0, -1.0)


@pytest.mark.parametrize(
    ("mask", "options", "reason"),
    [
        (causal, {}, "no gain: its last row sees 512 of 512 keys"),
        (with_a_hole, {}, "the mask is no causal band"),
        (of_the_input, {}, "the mask depends on inputs"),
        (biased, {}, "the mask adds more than 0 and -inf"),
        (lambda x: band(T, 32), {"scale": 0.3}, r"scale 0.3 is not D \*\* -0.5"),
        (lambda x: band(T, 32).expand(2, 1, T, T), {}, r"the mask is \[2, 1, 512, 512\]"),
    ],
    ids=["causal", "hole", "input", "biased", "scale", "batch"],
)
def test_everything_else_stays(mask, options, reason: str) -> None:
    model, x = Attention(mask, **options), torch.randn(2, T, HEADS * WIDTH)
    compiled, one, runs, _ = compile_with_pass(model)
    with torch.no_grad():
        assert difference([compiled(x)], [model(x)]) < 1e-5
    assert [(r.matches, r.changed) for r in runs] == [(0, {})]
    assert re.match(reason, one.skipped[0])
    assert one.skipped == one.skipped[:1] * 2  # one for each attention


def opened(mask: Tensor) -> None:
    mask[200:, :4] = True  # global tokens


def opened_in_a_view(mask: Tensor) -> None:
    mask[3:].diagonal().fill_(True)


def opened_by_an_out_argument(mask: Tensor) -> None:
    torch.logical_or(mask, torch.arange(T) < 4, out=mask)


def opened_by_an_operator(mask: Tensor) -> None:
    mask |= torch.arange(T) < 4


def opened_as_data(mask: Tensor) -> None:
    mask.data[200:, :4] = True


def opened_as_an_array(mask: Tensor) -> None:
    mask.numpy()[200:, :4] = True


def opened_as_bytes(mask: Tensor) -> None:
    mask.view(torch.uint8).index_fill_(1, torch.tensor([3]), 1)


def opened_by_an_op_of_somebodys(mask: Tensor) -> None:
    torch.ops.atlas_test.open_first(mask)


@pytest.fixture
def writing_op():
    """An op that writes to its argument, as C++ extensions do, without a word to autograd."""

    def write(mask: Tensor) -> None:
        mask[:, :4] = True

    library = torch.library.Library("atlas_test", "FRAGMENT")
    library.define("open_first(Tensor(a!) mask) -> ()")
    library.impl("open_first", write, "CPU")
    library.impl("open_first", lambda mask: None, "Meta")
    yield
    library._destroy()


@pytest.mark.usefixtures("writing_op")
@pytest.mark.parametrize(
    "edit",
    [
        opened,
        opened_in_a_view,
        opened_by_an_out_argument,
        opened_by_an_operator,
        opened_as_data,
        opened_as_an_array,
        opened_as_bytes,
        opened_by_an_op_of_somebodys,
    ],
)
@pytest.mark.parametrize("adds", [False, True], ids=["boolean", "additive"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mask_edited_in_place_is_what_attention_reads(edit, adds: bool, mode) -> None:
    """Also where what is edited is only what the mask is made from."""

    def mask(x: Tensor) -> Tensor:
        seen = band(T, 32)
        edit(seen)
        return torch.zeros(T, T).masked_fill(~seen, float("-inf")) if adds else seen

    model, x = Attention(mask), torch.randn(1, T, HEADS * WIDTH)
    compiled, one, _, _ = compile_with_pass(model)
    with mode():
        assert difference([compiled(x)], [model(x)]) < 1e-5
    assert set(one.skipped) == {"the mask is edited in place"}


def test_an_additive_mask_edited_in_place_is_what_attention_reads() -> None:
    def mask(x: Tensor) -> Tensor:
        seen = torch.zeros(T, T).masked_fill(~band(T, 32), float("-inf"))
        seen[64:, 0] = 0
        return seen

    model, x = Attention(mask), torch.randn(1, T, HEADS * WIDTH)
    compiled, _, _, _ = compile_with_pass(model)
    with torch.no_grad():
        assert difference([compiled(x)], [model(x)]) < 1e-5


EDITS = {
    "method": lambda x: x.add_(1),
    "view": lambda x: x[:, 3].fill_(7),
    "out": lambda x: torch.add(x, 1, out=x),
    "function": lambda x: F.relu(x, inplace=True),
    "data": lambda x: x.data.mul_(2),
    "foreach": lambda x: torch._foreach_add_([x], 1),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_what_else_is_edited_in_place_stays_so(edit) -> None:
    """The pass takes away the mask and nothing else that looks unused."""

    def attend(x: Tensor) -> Tensor:
        y = x * 2
        edit(y)
        q = y.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q, attn_mask=band(T, 32))

    compiled, _, runs, _ = compile_with_pass(attend)
    x = torch.randn(1, T, HEADS * WIDTH)
    with torch.no_grad():
        assert difference([compiled(x)], [attend(x)]) < 1e-5
    assert [r.matches for r in runs] == [1]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_under_autocast_attention_of_mixed_dtypes_stays() -> None:
    """As norms in float32 leave q and k, which SDPA casts under autocast and others do not."""

    def attend(x: Tensor) -> Tensor:
        v = x @ torch.eye(WIDTH)
        q = v.float()
        return F.scaled_dot_product_attention(q, q, v, attn_mask=band(T, 32))

    compiled, one, runs, _ = compile_with_pass(attend)
    x = torch.randn(1, HEADS, T, WIDTH)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, true = compiled(x), attend(x)
    assert ours.dtype == true.dtype == torch.bfloat16
    torch.testing.assert_close(ours, true, atol=0, rtol=0)
    assert [r.matches for r in runs] == [0]
    dtypes = "torch.float32, torch.float32 and torch.bfloat16"
    assert one.skipped == [f"queries, keys and values are {dtypes}"]


def test_under_autocast_attention_of_one_dtype_is_windowed() -> None:
    """It casts inside as autocast would: the error is that of bfloat16, not another's."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=band(T, 32))

    compiled, _, runs, _ = compile_with_pass(attend)
    qkv = torch.randn(3, 1, HEADS, T, WIDTH).unbind()
    with torch.no_grad():
        true = attend(*(t.double() for t in qkv))
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = compiled(*qkv), attend(*qkv)
    assert [r.matches for r in runs] == [1]
    assert ours.dtype == theirs.dtype == torch.bfloat16
    ours, theirs = ((t.double() - true).abs().max() for t in (ours, theirs))
    assert ours <= 2 * theirs


def test_symbolic_lengths_stay() -> None:
    model, x = Attention(lambda x: band(x.shape[1], 32)), torch.randn(1, T, HEADS * WIDTH)
    compiled, one, runs, _ = compile_with_pass(model, dynamic=True)
    with torch.no_grad():
        assert difference([compiled(x)], [model(x)]) < 1e-5
    assert [r.matches for r in runs] == [0]
    assert one.skipped[0].startswith("lengths are symbolic")


def test_graphs_without_attention_are_not_touched() -> None:
    compiled, one, runs, recorder = compile_with_pass(nn.Linear(4, 4))
    compiled(torch.randn(2, 4))
    assert [(r.matches, r.before) for r in runs] == [(0, r.after) for r in runs]
    assert one.skipped == []
    assert op_counts(recorder.graphs[0])["aten.addmm.default"] == 1
