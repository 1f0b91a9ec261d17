"""The example for torchtitan builds its model as torchtitan does; its trainer needs a GPU."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchtitan")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def titan(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples" / "torchtitan")
    import atlas_titan

    yield atlas_titan
    del sys.modules["atlas_titan"]


def test_it_is_the_recipe_and_documents_do_not_see_each_other(titan):
    config = titan.atlas_hybrid_tiny()
    with torch.device("meta"):
        model = config.model_spec.model.build()
    model.verify_module_protocol()
    model.to_empty(device="cpu")
    model.init_states()
    tokens = torch.randint(256, (2, 32))
    positions = torch.arange(32).expand(2, 32) % 20
    together = model(tokens, positions)
    apart = [model.model(tokens[:, span]).logits for span in (slice(20), slice(20, 32))]
    torch.testing.assert_close(together, torch.cat(apart, 1), atol=1e-4, rtol=1e-4)
    count, _ = config.model_spec.model.get_nparams_and_flops(model, 32)
    assert count == model.model.parameter_count()


def test_torchtitan_finds_it(titan):
    from torchtitan.config import ConfigManager

    config = ConfigManager().parse_args(
        ["--module", "atlas_titan", "--config", "omeganet_170m", "--training.steps", "3"]
    )
    assert (config.training.steps, config.model_spec.flavor) == (3, "omeganet-170m")
