"""transformers' own common model tests on models of ours: a memory, attention, and a hybrid.

They lie in its repository and in its source distribution, not in its wheel, and are not copied
here: TRANSFORMERS_SOURCE names an unpacked one of the version that is installed.

    pip download --no-deps --no-binary :all: transformers==VERSION && tar xf transformers-*.tar.gz
    TRANSFORMERS_SOURCE=transformers-VERSION pytest -m slow tests/recipes/hugging_face -k common

The tests of generation (GenerationTesterMixin) come with the repository alone, and run where it is
named; test_generate.py has invariants of our own. They need the package parameterized.

What they skip is what our models do not have: attention weights and implementations of attention
(sdpa, flash, flex), position embeddings, experts, plans for tensor parallelism, weights kept in
float32, sub-configs; and what this machine does not: a GPU, deepspeed, libraries of kernels.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch

SOURCE = os.environ.get("TRANSFORMERS_SOURCE", "")
LAYERS = {"memory": "atlas", "attention": "transformer", "hybrid": "atlas+transformer"}


@pytest.mark.slow
@pytest.mark.skipif(not SOURCE, reason="TRANSFORMERS_SOURCE names no source of transformers")
@pytest.mark.parametrize("kind", LAYERS)
def test_common_tests_of_transformers_pass(kind: str) -> None:
    """In a process of its own, whose warnings are those of transformers."""
    command = [sys.executable, __file__, kind]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


def _stub(name: str, **members: Any) -> None:
    """A module of its tests that the source distribution lacks."""
    try:
        importlib.import_module(name)
    except ImportError:
        module = types.ModuleType(name)
        vars(module).update(members)
        sys.modules[name] = module


def _suite(kind: str) -> type[unittest.TestCase]:
    source = Path(SOURCE).resolve()
    (source / "tests" / "__init__.py").touch()  # missing there as well
    sys.path.insert(0, str(source))
    for package in ("generation", "exporters", "utils"):
        _stub(f"tests.{package}", __path__=[])
    missing = type("Missing", (), {})
    _stub("tests.generation.test_utils", GenerationTesterMixin=missing)
    _stub("tests.exporters.test_export", ExportTesterMixin=missing)
    _stub("tests.utils.test_configuration_utils", config_common_kwargs={})
    generation: Any = importlib.import_module("tests.generation.test_utils").GenerationTesterMixin
    configs: Any = importlib.import_module("tests.test_configuration_common")
    common: Any = importlib.import_module("tests.test_modeling_common")
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    from atlas_blocks.recipes.hugging_face import AtlasConfig, AtlasForCausalLM, AtlasModel

    # By these names the tests know which models have a loss.
    auto.MODEL_MAPPING_NAMES["atlas"] = "AtlasModel"
    auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["atlas"] = "AtlasForCausalLM"

    class Tester:
        batch_size, seq_length, is_training = 3, 7, True
        vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 64, 2, 4

        def __init__(self, parent: Any) -> None:
            self.parent = parent

        def get_config(self) -> AtlasConfig:
            sizes = {n: getattr(self, n) for n in ("vocab_size", "hidden_size")}
            ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
            return AtlasConfig(layers=LAYERS[kind], num_hidden_layers=2, **sizes, **ends)

        def prepare_config_and_inputs_for_common(self) -> tuple[AtlasConfig, dict[str, Any]]:
            tokens = common.ids_tensor([self.batch_size, self.seq_length], self.vocab_size)
            mask = torch.ones_like(tokens).tril()
            return self.get_config(), {"input_ids": tokens, "attention_mask": mask}

    bases = (common.ModelTesterMixin, *([] if generation is missing else [generation]))

    class Common(*bases, unittest.TestCase):  # type: ignore[misc]
        all_model_classes = (AtlasModel, AtlasForCausalLM)
        all_generative_model_classes = (AtlasForCausalLM,)
        has_attentions = False

        def setUp(self) -> None:
            self.model_tester = Tester(self)
            self.config_tester = configs.ConfigTester(
                self, config_class=AtlasConfig, hidden_size=32
            )

        def test_config(self) -> None:
            self.config_tester.run_common_tests()

        if generation is missing:

            @unittest.skip("the source has no GenerationTesterMixin")
            def test_generation_tester_mixin_inheritance(self) -> None: ...

    return Common


if __name__ == "__main__":
    torch.set_num_threads(1)
    loaded = unittest.defaultTestLoader.loadTestsFromTestCase(_suite(sys.argv[1]))
    result = unittest.TextTestRunner(verbosity=2).run(loaded)
    print(f"{result.testsRun} run, {len(result.skipped)} skipped", file=sys.stderr)
    sys.exit(not result.wasSuccessful())
