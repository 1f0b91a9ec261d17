"""The training loop: it learns, packed documents are as apart, a state that is carried is that of
the whole text, bad steps leave no trace, and it stays finite."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch

from atlas_blocks.graph import one_program
from atlas_blocks.recipes import TrainingConfig, build, losses, names, text, train, training
from atlas_blocks.recipes.data import Batch, Packed, Split
from atlas_blocks.recipes.losses import batch_loss, bits_per_byte, mean_loss
from atlas_blocks.recipes.training import (
    Diverged,
    TrainingState,
    make_optimizer,
    train_step,
    update,
)

PATTERN = torch.arange(4096).remainder(13).to(torch.uint8)
KINDS = ("linear-attention-tiny", "transformer-tiny", "atlas-mag-tiny", "atlas-mac-tiny")


def documents(lengths, seed=0):
    """A split of random bytes."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(0, 256, sum(lengths)).astype(np.uint8)
    return Split([tokens], [np.cumsum(lengths)])


def small(name, **changes):
    """A model that a test can afford, in float64."""
    depth = None if name.startswith("sliding") else 1
    return build(name, **({"depth": depth} if depth else {}), **changes).double()


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(ours, true, tolerance=1e-6):
    return all((ours[n] - true[n]).abs().max() <= tolerance * true[n].abs().max() for n in true)


@pytest.mark.parametrize("name", ["transformer-tiny", "omeganet-tiny"])
def test_a_simple_pattern_is_learnt(name):
    torch.manual_seed(0)
    model = build(name)
    settings = TrainingConfig(steps=30, batch=4, length=32, lr=1e-2)
    result = train(model, PATTERN, settings)
    assert result.losses[-1] < 0.3 * result.losses[0]
    assert bits_per_byte(model, PATTERN, length=32, limit=512) < 2


def test_untrained_models_are_near_uniform():
    torch.manual_seed(0)
    bits = bits_per_byte(build("transformer-tiny"), PATTERN, length=32, limit=512)
    assert 7 < bits < 9.5


def test_schedule_rises_then_falls_to_a_tenth():
    settings = TrainingConfig(steps=100, lr=1e-2, warmup=0.1)
    rates = [settings.lr_at(step) for step in range(101)]
    assert rates[9] == max(rates) == pytest.approx(1e-2)
    assert rates[100] == pytest.approx(1e-3)
    assert rates[0] == pytest.approx(1e-3)


def test_a_loss_that_is_not_finite_stops_before_the_weights():
    model = build("transformer-tiny")
    with torch.no_grad():
        model.norm.weight.fill_(math.nan)
    settings = TrainingConfig(steps=5, batch=1, length=8)
    before = model.embedding.weight.clone()
    with pytest.raises(FloatingPointError, match="step 4"):
        train_step(model, make_optimizer(model, settings), torch.zeros(1, 9).long(), settings, 3)
    assert torch.equal(before, model.embedding.weight)


# --- documents ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_packed_training_is_training_on_the_documents_apart(name):
    """Loss by loss to 1e-6, for steps that follow one another."""
    packed = Packed(documents([40, 9, 2, 25, 60, 11]), batch=2, length=24)
    config = TrainingConfig(steps=4, batch=2, length=24)
    torch.manual_seed(0)
    model = small(name)
    apart = small(name)
    apart.load_state_dict(model.state_dict())
    optimizers = [make_optimizer(m, config) for m in (model, apart)]
    several = False
    for step in range(4):
        (batch,) = packed(step)
        pieces = batch.cu_seqlens.diff().tolist()
        several |= len(pieces) > 2
        rows = zip(batch.tokens.split(pieces, 1), batch.targets.split(pieces, 1), strict=True)
        parts = [batch_loss(apart, Batch(*row), reduction="sum")[0] for row in rows]
        true = sum(parts) / batch.tokens.numel()
        alone = training.descend(apart, optimizers[1], true, config, step)
        optimizers[0].zero_grad()
        loss, _ = training.accumulate(model, [batch], config, [])
        together = update(model, optimizers[0], loss, config, step)
        assert together == pytest.approx(alone, rel=1e-6)
    assert several


@pytest.mark.parametrize("name", KINDS)
def test_micro_batches_add_up_to_the_batch(name):
    split = documents([40, 9, 2, 25, 60, 11])
    found = []
    for batch, accumulate in ((4, 1), (2, 2), (1, 4)):
        torch.manual_seed(0)
        model = small(name)
        packed = Packed(split, batch, 16, accumulate)
        loss, _ = training.accumulate(model, packed(3), TrainingConfig(steps=9), [])
        found.append((loss.item(), gradients(model)))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert close(grads, found[0][1])


# What carries a state that does not grow.
CARRIED = ("linear-attention-tiny", "atlas-mag-tiny", "atlas-mac-tiny", "lstm-tiny")


@pytest.mark.parametrize("name", CARRIED)
def test_a_carried_document_is_read_as_if_whole(name):
    """The mean of the losses of its crops is that of one call."""
    split = documents([97, 49])
    model = small(name)
    packed = Packed(split, batch=1, length=16, carry=True)
    crops = mean_loss(model, map(packed, range(packed.steps)))
    order = [0, 1] if int(packed._epoch(0).documents[0]) == 0 else [1, 0]
    nats = [
        batch_loss(model, Batch.of(whole[None]), reduction="sum")[0]
        for whole in (torch.from_numpy(split.read(d, 0, split.lengths[d])).long() for d in order)
    ]
    assert crops == pytest.approx(sum(nats).item() / 144, rel=1e-6)
    alone = mean_loss(model, map(dataclasses.replace(packed, carry=False), range(packed.steps)))
    assert abs(alone - crops) > 1e-6


@pytest.mark.parametrize("name", CARRIED)
def test_documents_that_begin_learn_their_first_state(name):
    """Gradients are those without a state to carry; what is carried on is cut from the graph."""
    packed = Packed(documents([33, 12, 40, 9, 30]), batch=2, length=16, carry=True)
    model = small(name)
    (batch,) = packed(0)
    plain = dataclasses.replace(batch, before=None, last=None)
    found = []
    for one in (batch, plain):
        model.zero_grad()
        loss, carried = training.accumulate(model, [one], TrainingConfig(steps=1), [])
        found.append((loss.item(), gradients(model)))
        assert (carried[0] is None) == (one is plain)
        assert carried[0] is None or not any(t.requires_grad for t in carried[0].tensors())
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1].keys() == found[1][1].keys()
    assert close(*(grads for _, grads in found))


def test_a_state_that_is_carried_comes_back():
    model = small("atlas-mag-tiny")
    packed = Packed(documents([300, 200]), batch=2, length=16, accumulate=2, carry=True)
    config = TrainingConfig(steps=9, carry=True, accumulate=2)
    _, carried = training.accumulate(model, packed(0), config, [])
    state = TrainingState(1, 2, [0.1, 1 / 3], carried)
    again = TrainingState.restored(model, 1, state.record(), state.tensors(torch.device("cpu")))
    assert (again.step, again.skipped, again.losses) == (1, 2, [0.1, 1 / 3])
    for ours, true in zip(again.carried, carried, strict=True):
        assert ours.named_tensors().keys() == true.named_tensors().keys()
        assert all(map(torch.equal, ours.tensors(), true.tensors()))
    cut = dict(list(state.tensors(torch.device("cpu")).items())[:-1])
    with pytest.raises(ValueError, match="carried: expected a state of"):
        TrainingState.restored(model, 1, state.record(), cut)


@pytest.mark.filterwarnings("ignore")  # the compiler warns of its own parts
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("name", ["linear-attention-tiny", "lstm-tiny"])
def test_documents_of_whatever_length_share_their_graphs(monkeypatch, name, carry):
    """Those of the first step serve all others, but for one where documents run one by one."""
    monkeypatch.setattr(one_program, "inductor", lambda graph, inputs, *_: graph.forward)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters["stats"]
    lengths = np.random.default_rng(0).integers(3, 60, 100).tolist()
    packed = Packed(documents(lengths), batch=2, length=32, carry=carry)
    model, graphs, pieces = build(name), [], set()

    def told(at):
        graphs.append(counters["unique_graphs"])
        pieces.add(len(packed(at.step - 1)[0].cu_seqlens) - 1)

    train(model, packed, TrainingConfig(steps=6, compile=True, carry=carry), on_step=told)
    assert len(pieces) > 2
    assert graphs[0] > 0
    assert graphs[-1] - graphs[0] <= (name == "lstm-tiny")


# --- optimizers and schedules -------------------------------------------------------------------


def test_muon_takes_the_matrices_of_the_blocks_alone():
    model = build("atlas-mag-tiny")
    optimizer = make_optimizer(model, TrainingConfig(steps=1, optimizer="muon"))
    first, second = ([p for g in o.param_groups for p in g["params"]] for o in optimizer.parts)
    assert {p for p in first} == {p for p in model.blocks.parameters() if p.ndim == 2}
    assert {*first, *second} == set(model.parameters())
    assert model.embedding.weight in set(second)


def test_both_optimizers_step_as_they_do_alone():
    config = TrainingConfig(steps=4, batch=2, length=16, optimizer="muon")
    torch.manual_seed(0)
    model, other = build("linear-attention-tiny"), build("linear-attention-tiny")
    other.load_state_dict(model.state_dict())
    joint = make_optimizer(model, config)
    apart = make_optimizer(other, config).parts
    for step in range(3):
        rows = text.random_batch(PATTERN, 2, 16, 0, step)
        train_step(model, joint, rows, config, step)
        other.zero_grad()
        losses.next_byte_loss(other, rows).backward()
        torch.nn.utils.clip_grad_norm_(other.parameters(), config.clip)
        for part in apart:
            for group in part.param_groups:
                group["lr"] = config.lr_at(step)
            part.step()
        # What was loaded is what was there.
        saved = joint.state_dict()
        joint = make_optimizer(model, config)
        joint.load_state_dict(saved)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_wsd_rises_stays_and_falls_to_zero():
    settings = TrainingConfig(steps=100, lr=1e-2, warmup=0.1, schedule="wsd", decay=0.2)
    rates = [settings.lr_at(step) for step in range(101)]
    assert rates[9:81] == [1e-2] * 72
    assert rates[100] == 0
    assert all(a > b for a, b in itertools.pairwise(rates[80:]))
    # A run that is made longer before it decays has taken the steps of the longer one.
    longer = settings.replace(steps=200, warmup=0.05)
    assert [longer.lr_at(step) for step in range(81)] == rates[:81]


# --- bad steps ----------------------------------------------------------------------------------


def poisoned(monkeypatch, factors):
    """Losses times these, by number of the micro-batch, which all models share."""
    loss, calls = training.batch_loss, []

    def poison(model, batch, carried=None, **options):
        calls.append(batch)
        value, state = loss(model, batch, carried, **options)
        return value * factors.get(len(calls), 1), state

    monkeypatch.setattr(training, "batch_loss", poison)


@pytest.mark.parametrize("factor", [math.nan, math.inf, 50.0])
def test_a_bad_step_is_skipped_and_leaves_no_trace(monkeypatch, factor):
    """The weights after it are those of a run that never saw its batch."""
    config = TrainingConfig(steps=34, batch=1, length=8)
    poisoned(monkeypatch, {30: factor})
    torch.manual_seed(0)
    model, told = build("linear-attention-tiny", depth=1), []
    state = TrainingState()
    result = train(model, PATTERN, config, state=state, on_step=told.append)
    assert [bool(at.skipped) for at in told] == [step == 29 for step in range(34)]
    assert (result.step, len(result.losses), state.skipped) == (34, 33, 0)
    assert ("a spike from" in told[29].skipped) == (factor == 50)

    monkeypatch.undo()
    torch.manual_seed(0)
    true = build("linear-attention-tiny", depth=1)
    optimizer = make_optimizer(true, config)
    for step in range(34):
        if step != 29:
            rows = text.random_batch(PATTERN, 1, 8, 0, step)
            train_step(true, optimizer, rows, config, step)
    assert all(map(torch.equal, model.parameters(), true.parameters()))


def test_bad_steps_in_a_row_stop_the_run(monkeypatch):
    config = TrainingConfig(steps=99, batch=1, length=8, patience=2)
    poisoned(monkeypatch, dict.fromkeys((3, 4, 6, 7, 8), math.nan))
    model, state = build("linear-attention-tiny", depth=1), TrainingState()
    with pytest.raises(Diverged, match="step 8: loss nan") as stopped:
        train(model, PATTERN, config, state=state)
    assert (stopped.value.step, state.step, state.skipped) == (7, 7, 2)
    (batch,) = stopped.value.batches
    assert torch.equal(batch.tokens, text.random_batch(PATTERN, 1, 8, 0, 7)[:, :-1])


def test_spikes_are_measured_against_what_was_good():
    config = TrainingConfig(steps=1, spike=4)
    draw = torch.Generator().manual_seed(0)
    good = (3 + 0.1 * torch.randn(training.WINDOW, generator=draw)).tolist()
    assert TrainingState(losses=good).spike_from(config) == pytest.approx(3.4, abs=0.1)
    assert TrainingState(losses=good[: training.ENOUGH - 1]).spike_from(config) == math.inf
    assert TrainingState(losses=good).spike_from(config.replace(spike=0)) == math.inf
    # Losses that are all alike are no reason to call the next one a spike.
    assert TrainingState(losses=[3.0] * 50).spike_from(config) == pytest.approx(3.12)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((f, -1) for f in ("steps", "batch", "length", "lr", "warmup", "clip", "weight_decay")),
        *((f, -1) for f in ("accumulate", "decay", "spike", "patience")),
        *((f, "other") for f in ("optimizer", "schedule")),
        *((f, 1) for f in ("carry", "compile")),
        ("seed", 2**33),
        ("seed", "0"),
        ("seed", True),
        ("bf16", 1),
        ("lr", float("nan")),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"{field}: expected"):
        TrainingConfig(**{"steps": 1, field: value})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "bf16", "steps"),
    [
        ("omeganet-tiny", False, 600),
        ("omeganet-tiny", True, 150),
        ("atlas-mag-tiny", False, 200),  # Muon's steps take four times as long
        ("atlas-mag-tiny", True, 100),
    ],
)
def test_real_text_never_gives_nan(name, bf16, steps):
    """train raises at the first loss or gradient that is not finite."""
    torch.manual_seed(0)
    model, corpus = build(name), text.standard_library()
    settings = TrainingConfig(steps=steps, batch=2, length=128, bf16=bf16)
    result = train(model, corpus.train, settings)
    assert result.step == steps
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert sum(result.losses[-50:]) < 0.8 * sum(result.losses[:50])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in names() if name.endswith("-tiny")])
def test_every_recipe_learns_real_text(name):
    torch.manual_seed(0)
    settings = TrainingConfig(steps=60, batch=2, length=128, lr=4e-3)
    losses = train(build(name), text.standard_library().train, settings).losses
    assert sum(losses[-10:]) / 10 < 0.65 * losses[0]
