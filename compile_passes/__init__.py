"""What happens between torch.compile and the machine: graph passes, the backend, the report.

Passes match the op nodes of atlas_blocks.ops. May import atlas_blocks, torch and rich; never
kernels or recipes.
"""

from atlas_blocks.compile_passes.backend import PASSES, compile, compile_blocks
from atlas_blocks.compile_passes.diagnose import explain
from atlas_blocks.compile_passes.graph_pass import GraphPass, PassRun
from atlas_blocks.compile_passes.report import Report

__all__ = ["PASSES", "GraphPass", "PassRun", "Report", "compile", "compile_blocks", "explain"]
