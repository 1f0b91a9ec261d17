"""The operations as ops of torch, by a provider: what torch.compile and export see of them."""

import atlas_blocks.omega.flops  # noqa: F401  (brings the rule's formulas)
from atlas_blocks.graph.checkpointing import checkpoint_policy
from atlas_blocks.graph.flops import register_flop_formulas
from atlas_blocks.graph.providers import (
    Choice,
    Provider,
    ProviderWarning,
    explain_choice,
    keep_provider,
    register_provider,
    use_provider,
)
from atlas_blocks.newton_schulz.op import newton_schulz
from atlas_blocks.omega.op import omega_rule
from atlas_blocks.omega.step_op import omega_rule_step

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
    "register_flop_formulas",
    "register_provider",
    "use_provider",
]
