"""The mathematics in plain PyTorch: every operation here is the definition of its op."""

from atlas_blocks.functional.features import (
    FeatureMap,
    PolynomialMap,
    SketchMap,
    polynomial_features,
    polynomial_width,
    sketch_features,
    sketch_tables,
    taylor_coefficients,
)
from atlas_blocks.functional.kernel_attention import KernelState, kernel_attention
from atlas_blocks.functional.kernel_reference import kernel_attention_reference
from atlas_blocks.functional.newton_schulz import newton_schulz
from atlas_blocks.functional.omega_rule import omega_rule, read_memory
from atlas_blocks.functional.reference import omega_rule_reference
from atlas_blocks.functional.rule import OmegaState

__all__ = [
    "FeatureMap",
    "KernelState",
    "OmegaState",
    "PolynomialMap",
    "SketchMap",
    "kernel_attention",
    "kernel_attention_reference",
    "newton_schulz",
    "omega_rule",
    "omega_rule_reference",
    "polynomial_features",
    "polynomial_width",
    "read_memory",
    "sketch_features",
    "sketch_tables",
    "taylor_coefficients",
]
