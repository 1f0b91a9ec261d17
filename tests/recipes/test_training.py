"""The training loop: it learns, it stops where it must, and it stays finite."""

import math

import pytest
import torch

from atlas_blocks.recipes import TrainingConfig, build, names, text, train
from atlas_blocks.recipes.training import bits_per_byte, make_optimizer, train_step

PATTERN = torch.arange(4096).remainder(13).to(torch.uint8)


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


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((f, -1) for f in ("steps", "batch", "length", "lr", "warmup", "clip", "weight_decay")),
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
@pytest.mark.parametrize(("bf16", "steps"), [(False, 2000), (True, 300)])
@pytest.mark.parametrize("name", ["omeganet-tiny", "atlas-mag-tiny"])
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
