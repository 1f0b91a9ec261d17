"""The mixture of experts against a loop over tokens, and as the MLP of the stacks."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint as recomputed

from atlas_blocks import AtlasBlockConfig, Config, MixtureOfExpertsConfig, with_settings
from atlas_blocks.blocks.feed_forward import MixtureOfExperts, SwiGLU, balance_loss
from atlas_blocks.blocks.stacks import STACKS
from atlas_blocks.recipes import TrainingConfig, build, checkpoint, generate, registry, training
from atlas_blocks.recipes.model import LanguageModelConfig

SMALL = MixtureOfExpertsConfig(experts=5, experts_per_token=2)


def made(dim=16, width=12, config=SMALL, dtype=torch.float64):
    torch.manual_seed(0)
    return MixtureOfExperts(dim, width, config).to(dtype)


def by_token(block, x):
    """The definition, token by token."""
    rows = []
    for row in x.flatten(0, 1):
        p = torch.softmax(block.router.weight @ row, 0)
        best = p.argsort(descending=True)[: block.config.experts_per_token].tolist()
        total = sum(p[e] for e in best)
        y = torch.zeros_like(row)
        for e in best:
            hidden = F.silu(block.gate.weight[e] @ row) * (block.up.weight[e] @ row)
            y = y + p[e] / total * (block.down.weight[e] @ hidden)
        rows.append(y)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_it_is_the_loop_over_tokens(k, dtype):
    """float32 takes grouped products, float64 the definition; forward and every gradient."""
    block = made(config=SMALL.replace(experts_per_token=k), dtype=dtype)
    assert block.gate.serves(torch.zeros(1, dtype=dtype)) == (dtype == torch.float32)
    double = copy.deepcopy(block).double()
    x = torch.randn(2, 9, 16, dtype=dtype, requires_grad=True)
    exact = x.detach().double().requires_grad_()
    y, true = block(x)[0], by_token(double, exact)
    tolerance = {} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y.double(), true, **tolerance)
    found = torch.autograd.grad(y.square().sum(), [x, *block.parameters()])
    wanted = torch.autograd.grad(true.square().sum(), [exact, *double.parameters()])
    for g, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(g.double(), w, **tolerance)


def test_one_expert_is_a_swiglu():
    block, plain = made(config=MixtureOfExpertsConfig(1, 1)), SwiGLU(16, 12).double()
    for name in ("gate", "up", "down"):
        getattr(plain, name).weight.data.copy_(getattr(block, name).weight[0])
    x = torch.randn(1, 7, 16, dtype=torch.float64)
    torch.testing.assert_close(block(x)[0], plain(x)[0])


@pytest.mark.parametrize(("dim", "width"), [(6, 12), (16, 7)])
def test_widths_that_grouped_products_refuse(dim, width):
    block = made(dim, width, dtype=torch.float32)
    x = torch.randn(1, 5, dim)
    torch.testing.assert_close(block(x)[0], by_token(block, x), rtol=1e-4, atol=1e-5)


def test_autocast_and_no_tokens():
    block = made(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = block(torch.randn(1, 5, 16))
    assert y.isfinite().all()
    assert block(torch.zeros(2, 0, 16))[0].shape == (2, 0, 16)


def test_the_balance_loss_by_hand():
    block = made(4, 4, MixtureOfExpertsConfig(experts=2, experts_per_token=1, balance=0.5))
    block.router.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]).double()
    x = torch.tensor([[[2.0, 0, 0, 0], [1.0, 0, 0, 0], [0, 1.0, 0, 0], [3.0, 0, 0, 0]]]).double()
    block(x)
    p = torch.sigmoid(torch.tensor([2.0, 1.0, -1.0, 3.0]).double()).mean()
    expected = 2 * (3 / 4 * p + 1 / 4 * (1 - p))
    copy.deepcopy(block)  # a graph that is left is no obstacle
    loss, mean = balance_loss(block)
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(loss, 0.5 * expected)
    loss.backward()
    assert block.router.weight.grad.abs().sum() > 0
    assert balance_loss(block) is None
    block.eval()(x)
    assert balance_loss(block) is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: MixtureOfExpertsConfig(experts=0), "experts: expected an int >= 1, got 0"),
        (lambda: MixtureOfExpertsConfig(2, 3), "experts_per_token: expected at most experts = 2"),
        (lambda: MixtureOfExpertsConfig(2, 0), "experts_per_token: expected an int >= 1, got 0"),
        (lambda: MixtureOfExpertsConfig(balance=-1), "balance: expected a finite number >= 0"),
        (lambda: MixtureOfExpertsConfig(balance=True), "balance: expected a finite number >= 0"),
        (lambda: MixtureOfExperts(4, 4, {}), "config: expected MixtureOfExpertsConfig, got dict"),
        (lambda: MixtureOfExperts(0), "dim: expected an int >= 1"),
        (lambda: MixtureOfExperts(4, 0), "width: expected an int >= 1"),
        (lambda: AtlasBlockConfig(mlp="mo"), "mlp: expected one of moe, relu2, swiglu, got 'mo'"),
    ],
)
def test_bad_settings_are_named(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_what_a_checkpoint_computes_again_leaves_no_balance():
    block = made(4, 4, MixtureOfExpertsConfig(experts=2, balance=0.5))
    gradients = []
    for run in (block, functools.partial(recomputed, block, use_reentrant=False)):
        y, _ = run(
            torch.randn(
                1, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
            ).requires_grad_()
        )
        loss = y.sum() + balance_loss(block)[0]
        gradients.append(torch.autograd.grad(loss, list(block.parameters())))
        assert balance_loss(block) is None
    torch.testing.assert_close(*gradients)


def test_padding_has_no_part_in_the_balance():
    """Rows without a token run as a call of none."""
    built, tokens = model(), torch.randint(256, (3, 9))
    built(tokens[:2])
    wanted = balance_loss(built)[1]
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[2] = False
    built(tokens, mask=mask)
    torch.testing.assert_close(balance_loss(built)[1], wanted)
    built(tokens[:, :0])
    assert balance_loss(built) is None


def test_an_expert_overflows_for_its_own_tokens_alone():
    block = made(4, 4, MixtureOfExpertsConfig(experts=2, experts_per_token=1))
    block.router.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]).double()
    block.gate.weight.data[0] = 1e300
    x = torch.tensor([[[0, 1e9, 1e9, 0]]]).double().requires_grad_()
    y = block(x)[0]
    y.sum().backward()
    assert y.isfinite().all()
    assert y.any()
    assert x.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_torch_func_and_shapes(dtype):
    block = made(width=16, dtype=dtype)
    parameters = dict(block.named_parameters())
    x = torch.randn(3, 1, 9, 16, dtype=dtype)

    def loss(parameters, x):
        return torch.func.functional_call(block, parameters, (x,))[0].square().sum()

    found = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        wanted = torch.autograd.grad(block(x[i])[0].square().sum(), list(parameters.values()))
        torch.testing.assert_close([g[i] for g in found.values()], list(wanted))
    _, slope = torch.func.jvp(lambda x: block(x)[0], (x[0],), (x[1],))
    step = 1e-3 if dtype == torch.float32 else 1e-6
    ends = [block(x[0] + sign * step * x[1])[0] for sign in (1, -1)]
    torch.testing.assert_close(slope, (ends[0] - ends[1]) / (2 * step), rtol=1e-3, atol=1e-4)
    with torch.device("meta"):
        shapes = MixtureOfExperts(16, 16, SMALL).to(dtype)
        assert shapes(torch.zeros(1, 9, 16, dtype=dtype))[0].shape == (1, 9, 16)


# --- in the stacks and in models ------------------------------------------------------------------


def model(**settings):
    torch.manual_seed(0)
    config = registry.config("atlas-mag-tiny").replace(depth=1)
    paths = {"layers.*.mlp": "moe", "layers.*.mlp_width": 32}
    return with_settings(config, paths | settings).build()


@pytest.mark.parametrize("kind", STACKS)
def test_every_stack_takes_it(kind):
    config = kind(mlp="moe", mlp_width=8)
    assert config.mlp == MixtureOfExpertsConfig()
    assert Config.from_json(config.to_json()) == config
    whole = LanguageModelConfig("x", 256, 16, 2, layers=config)
    built = whole.build()
    assert any(isinstance(m, MixtureOfExperts) for m in built.modules())
    assert registry.parameter_count(whole) == built.parameter_count()


def test_settings_checkpoint_and_generation(tmp_path):
    built = model(**{"layers.*.mlp.experts": 4, "layers.*.mlp.experts_per_token": 1}).eval()
    assert built.config.layers[0].mlp == MixtureOfExpertsConfig(4, 1)
    checkpoint.save(tmp_path / "model", built)
    same = checkpoint.load(tmp_path / "model").eval()
    tokens = torch.randint(256, (2, 12))
    whole = built(tokens).logits
    torch.testing.assert_close(same(tokens).logits, whole, rtol=0, atol=0)
    state, parts = None, []
    for t in range(12):
        logits, state = built(tokens[:, t : t + 1], state)
        parts.append(logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-3, atol=1e-4)
    greedy = generate(built, tokens[:1], max_new_tokens=4, temperature=0)
    for t in range(12, 16):
        assert built(greedy[:, :t]).logits[0, -1].argmax() == greedy[0, t]
    packed = built(tokens.flatten()[None], cu_seqlens=torch.tensor([0, 12, 24])).logits
    torch.testing.assert_close(packed.view_as(whole), whole, rtol=1e-3, atol=1e-4)


def test_training_lowers_the_loss_and_tells_the_balance():
    built = model()
    config = TrainingConfig(steps=8, batch=2, length=16, compile=False, warmup=0.0)
    data = torch.arange(400).remainder(7).to(torch.uint8)
    told = []
    losses = training.train(built, data, config, on_step=told.append).losses
    assert losses[-1] < losses[0] - 0.1
    assert all(0.9 < at.balance < 8 for at in told)
    plain = build("transformer-tiny", depth=1)
    training.train(plain, data, config.replace(steps=1), on_step=told.append)
    assert told[-1].balance is None


def test_only_the_chosen_experts_work_is_counted():
    from torch.utils.flop_counter import FlopCounterMode

    from atlas_blocks.graph.flops import register_flop_formulas

    register_flop_formulas()
    block = made(dtype=torch.float32)
    with FlopCounterMode(display=False) as counter:
        block(torch.randn(1, 10, 16))[0].sum().backward()
    router, experts = 2 * 10 * 16 * 5, 2 * 2 * 10 * (3 * 16 * 12)
    # x needs no gradient, and so neither the first products' rows.
    assert counter.get_total_flops() == pytest.approx(3 * (router + experts), rel=0.3)


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_one_graph_at_every_length(dtype):
    block, lengths = made(width=16, dtype=dtype), (9, 11, 13)
    low = dtype == torch.bfloat16
    tolerance = {"rtol": 0.1, "atol": 0.05} if low else {"rtol": 1e-4, "atol": 1e-5}
    torch._dynamo.reset()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True, dynamic=True)
    for length in lengths:
        x = torch.randn(2, length, 16, dtype=dtype)
        loss = compiled(x)[0].sum() + balance_loss(block)[0]
        found = torch.autograd.grad(loss, list(block.parameters()))
        true = block(x)[0].sum() + balance_loss(block)[0]
        wanted = torch.autograd.grad(true, list(block.parameters()))
        torch.testing.assert_close(found, wanted, **tolerance)
