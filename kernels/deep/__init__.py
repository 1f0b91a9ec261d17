"""Kernels of the deep memories, mlp and gated_mlp, with gradient descent."""
