"""Fast providers of the ops in atlas_blocks.ops (Triton kernels), and their offline compile check.

Imported only when a provider is first needed. May import atlas_blocks, torch and triton; never
compile_passes or recipes.
"""
