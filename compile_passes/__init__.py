"""What happens between torch.compile and the machine: graph passes, the backend, the report.

Passes match the op nodes of atlas_blocks.ops. May import atlas_blocks, torch and rich; never
kernels or recipes.
"""
