"""Op contracts: what torch.compile, export and FLOP counters see of functional/."""

from atlas_blocks.ops.flops import register_flop_formulas
from atlas_blocks.ops.newton_schulz import newton_schulz
from atlas_blocks.ops.omega_rule import omega_rule
from atlas_blocks.ops.omega_step import omega_rule_step
from atlas_blocks.ops.polynomial_features import polynomial_features
from atlas_blocks.ops.providers import (
    Choice,
    Provider,
    ProviderWarning,
    explain_choice,
    keep_provider,
    register_provider,
    use_provider,
)
from atlas_blocks.ops.recompute import checkpoint_policy

__all__ = [
    "Choice",
    "Provider",
    "ProviderWarning",
    "checkpoint_policy",
    "explain_choice",
    "keep_provider",
    "newton_schulz",
    "omega_rule",
    "omega_rule_step",
    "polynomial_features",
    "register_flop_formulas",
    "register_provider",
    "use_provider",
]
