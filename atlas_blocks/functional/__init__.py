"""The mathematics in plain PyTorch: every operation here is the definition of its op."""

from atlas_blocks.kernel_attention.definition import KernelState, kernel_attention
from atlas_blocks.kernel_attention.reference import kernel_attention_reference
from atlas_blocks.newton_schulz.definition import newton_schulz
from atlas_blocks.omega.definition import omega_rule, read_memory
from atlas_blocks.omega.feature_maps import (
    FeatureMap,
    PolynomialMap,
    SketchMap,
    polynomial_features,
    polynomial_width,
    sketch_features,
    sketch_tables,
    taylor_coefficients,
)
from atlas_blocks.omega.reference import omega_rule_reference
from atlas_blocks.omega.state import OmegaState

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
