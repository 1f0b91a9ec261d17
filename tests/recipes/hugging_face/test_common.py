"""transformers' own common tests on models of ours: a memory, attention, and a hybrid.

They are ModelTesterMixin and GenerationTesterMixin. They lie in its repository, not in its wheel,
and are not copied here: TRANSFORMERS_SOURCE names a clone of the version that is installed. They
need the package parameterized.

    git clone --depth 1 --branch vVERSION https://github.com/huggingface/transformers
    TRANSFORMERS_SOURCE=transformers pytest -m slow tests/recipes/hugging_face -k common

Its source distribution (pip download --no-deps --no-binary :all: transformers) has the first alone;
a folder tests/generation of a version near it may be put there.
What they skip is listed in SKIPPED, with the reason; another skipped test fails. That of prompt
lookup passes and has run nothing (`@is_flaky` for `@is_flaky()`): test_generate.py has it refused.
"""

from __future__ import annotations

import fnmatch
import importlib
import os
import subprocess
import sys
import types
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

SOURCE = os.environ.get("TRANSFORMERS_SOURCE", "")
LAYERS = {"memory": "atlas", "attention": "transformer", "hybrid": "atlas+transformer"}
SKIPPED = {
    "every block has one attention, or none; weights of it are not given out": (
        "test_attention_outputs",
        "test_attn_implementation_composite_models",
        "test_can_set_attention_dynamically*",
        "test_eager_*",
        "test_flash_att*",
        "test_flex_attention_*",
        "test_sdpa_*",
        "test_sliding_window_mask",
        "test_custom_4d_attention_mask",  # of a static cache
    ),
    "what a memory has written cannot be taken back": (
        "test_assisted_decoding_*",
        "test_prompt_lookup_decoding_matches_greedy_search",
    ),
    "a state has a size of its own: no static cache, no quantised one": (
        "test_generate_compil*",
        "test_generate_from_inputs_embeds_with_static_cache",
        "test_generate_with_*_cache",
    ),
    "there is none: rotary scaling, position embeddings, experts, an encoder, a sub-config": (
        "test_encoder_decoder_loss_no_double_shift",
        "test_internal_model_config_and_subconfig_are_same",
        "test_model_rope_*",
        "test_*router_logits*",
        "test_resize_position_vector_embeddings",
        "test_vision_axial_rope",
    ),
    "weights have one name and one precision, and no plan for tensor parallelism": (
        "test_can_load_from_already_mapped_keys",
        "test_keep_in_fp32_modules*",
        "test_reverse_loading_mapping",
        "test_*tp_plan*",
    ),
    "hidden states are counted by the model, not captured by hooks": (
        "test_can_capture_specific_layers_hidden_states",
        "test_capture_outputs_decorator",
    ),
    "needs a GPU, or several": (
        "test_can_load_with_*",
        "test_*_offload*",
        "test_model_parallel*",
        "test_torch_compile_for_training",
    ),
    "needs a package: deepspeed, kernels": ("test_*_with_deepspeed*", "test_kernels_*"),
    "the source has no GenerationTesterMixin": ("test_generation_tester_mixin_inheritance",),
}


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
    from atlas_blocks.recipes.hugging_face.cache import StateLayer

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
        # It asks the year of a file's copyright.
        test_can_init_all_missing_weights_before_2023 = True

        def setUp(self) -> None:
            self.model_tester = Tester(self)
            self.config_tester = configs.ConfigTester(
                self, config_class=AtlasConfig, hidden_size=32
            )

        def test_config(self) -> None:
            self.config_tester.run_common_tests()

        def _check_past_key_values_for_generate(
            self, batch_size: int, past_key_values: Any, seq_length: int, config: AtlasConfig
        ) -> None:
            """In the place of shapes of keys and values."""
            assert len(past_key_values) == config.num_hidden_layers
            for layer in past_key_values.layers:
                assert isinstance(layer, StateLayer)
                assert layer.get_seq_length() == seq_length
                assert len(layer.state) == batch_size

        def _check_caches_are_equal(self, cache1: Any, cache2: Any) -> None:
            for one, other in zip(cache1.layers, cache2.layers, strict=True):
                assert one.state.tensors()
                torch.testing.assert_close(one.state.tensors(), other.state.tensors())

        if generation is missing:

            @unittest.skip("the source has no GenerationTesterMixin")
            def test_generation_tester_mixin_inheritance(self) -> None: ...

        else:

            def test_left_padding_compatibility(self) -> None:
                """Theirs takes a model without attention weights for one without padding."""
                with mock.patch.object(Common, "has_attentions", True):
                    super().test_left_padding_compatibility()

    return Common


def _name(test: Any) -> str:
    return getattr(test, "test_case", test).id().rpartition(".")[2]


if __name__ == "__main__":
    torch.set_num_threads(1)
    loaded = unittest.defaultTestLoader.loadTestsFromTestCase(_suite(sys.argv[1]))
    result = unittest.TextTestRunner(verbosity=2).run(loaded)
    print(f"{result.testsRun} run, {len(result.skipped)} skipped", file=sys.stderr)
    known = [pattern for patterns in SKIPPED.values() for pattern in patterns]
    new = {
        f"{_name(test)}: {why}"
        for test, why in result.skipped
        if not any(fnmatch.fnmatch(_name(test), pattern) for pattern in known)
    }
    print("skipped without a reason in SKIPPED:", *sorted(new) or ["none"], file=sys.stderr)
    sys.exit(bool(new) or not result.wasSuccessful())
