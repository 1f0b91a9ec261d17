"""The exact GELU and its derivatives."""

import triton
import triton.language as tl


@triton.jit
def _normal(z):
    return tl.exp(-0.5 * z * z) * 0.3989422804014327


@triton.jit
def gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def gelu_slope(z):
    return 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + z * _normal(z)


@triton.jit
def gelu_bend(z):
    """The second derivative."""
    return (2.0 - z * z) * _normal(z)
