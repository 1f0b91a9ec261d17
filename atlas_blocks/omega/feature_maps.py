"""Feature maps phi with phi(q) . phi(k) = sum_n a_n (q . k)^n (specification section 5).

D width before, W width after, p degree, a coefficients [p + 1].
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.data import remembered
from atlas_blocks.float64 import float64_device
from atlas_blocks.names import add_to, full_name


def taylor_coefficients(degree: int) -> Tensor:
    """1 / n! for n = 0..degree: the truncated exponential (phi* cut at p). float32 [p + 1]."""
    check.at_least("degree", degree, 0)
    return torch.tensor([1 / math.factorial(n) for n in range(degree + 1)])


def polynomial_width(dim: int, degree: int) -> int:
    """C(D + p, p): how many scaled monomials of degree at most p there are in D variables."""
    return math.comb(dim + degree, degree)


@functools.lru_cache
def multinomials(dim: int, degree: int) -> tuple[tuple[float, ...], ...]:
    """For n = 0..p the multinomial weight of every monomial, in the order `monomials` makes."""
    levels: list[list[tuple[int, ...]]] = [[(0,) * dim]]
    for _ in range(degree):
        previous, level = levels[-1], []
        for i in range(dim):
            for powers in previous[len(previous) - _suffix(dim - i, len(levels) - 1) :]:
                level.append((*powers[:i], powers[i] + 1, *powers[i + 1 :]))
        levels.append(level)
    return tuple(
        tuple(math.factorial(n) / math.prod(map(math.factorial, m)) for m in level)
        for n, level in enumerate(levels)
    )


@remembered
def monomial_scales(dim: int, degree: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The square root of every monomial's multinomial weight, [W] in the order of `monomials`."""
    weights = [w for level in multinomials(dim, degree) for w in level]
    return torch.tensor(weights, dtype=dtype, device=device).sqrt()


def _suffix(variables: int, degree: int) -> int:
    """Number of monomials of exactly this degree in the last `variables` variables."""
    return math.comb(variables + degree - 1, degree)


def monomials(x: Tensor, degree: int) -> list[Tensor]:
    """For n = 0..p all products of n entries of x [..., D], each unordered choice once.

    Monomials of degree n that use only x_i, x_{i+1}, ... are the tail of their list, so degree
    n + 1 is x_i times that tail, for every i.
    """
    dim = x.shape[-1]
    levels = [torch.ones_like(x[..., :1])]
    for n in range(degree):
        tails = [
            x[..., i : i + 1] * levels[-1][..., levels[-1].shape[-1] - _suffix(dim - i, n) :]
            for i in range(dim)
        ]
        levels.append(torch.cat(tails, dim=-1))
    return levels


def polynomial_features(x: Tensor, coefficients: Tensor) -> Tensor:
    """Scaled symmetric monomials (ATLAS section 3.1): the exact polynomial kernel.

        phi(x) . phi(y) = sum_{n=0}^{p} a_n (x . y)^n

    x: [..., D]. coefficients: a [p + 1], each >= 0 (its square root is taken; at exactly 0 the
    gradient to it is cut to 0). Returns [..., C(D + p, p)] in the dtype of x.
    Raises ValueError for coefficients of another shape.
    """
    check.tensor("coefficients", coefficients, "[p + 1]", (None,))
    check.at_least("coefficients' length", coefficients.shape[0], 1)
    degree = coefficients.shape[0] - 1
    # Kept where x is data: a copy from the host at every call has no place in a CUDA graph.
    plain = type(x) is Tensor and not torch.compiler.is_compiling()
    scales_of = monomial_scales if plain else monomial_scales.__wrapped__
    scales = scales_of(x.shape[-1], degree, x.dtype, x.device)
    root = _safe_sqrt(coefficients.to(x.dtype))
    levels = monomials(x, degree)
    pairs = zip(levels, scales.split([t.shape[-1] for t in levels]), strict=True)
    return torch.cat([t * (root[n] * scale) for n, (t, scale) in enumerate(pairs)], dim=-1)


def sketch_tables(
    dim: int, width: int, degree: int, seed: int = 0, device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Tables of `sketch_features`: one hash of the D coordinates for every factor.

    They depend on the arguments alone: no generator is drawn from, every device makes the same.
    seed: an int in [0, 2^31). Returns buckets int64 [F, D] and signs float32 [F, D],
    F = 2 + 3 + ... + p factors. Raises ValueError where `width` leaves a degree without a bucket.
    """
    check.at_least("degree", degree, 2)
    check.at_least("seed", seed, 0)
    sizes, degrees = sketch_sizes(dim, width, degree), list(range(2, degree + 1))
    place = torch.arange(sum(degrees) * dim, device=device).view(-1, dim)
    first, second = (_mixed(2 * place + odd, seed) for odd in (0, 1))
    rows = zip(first.split(degrees), sizes, strict=True)
    buckets = torch.cat([row.remainder(size) for row, size in rows])
    return buckets, ((second & 1) * 2 - 1).float()


_kept_tables = remembered(sketch_tables)


def sketch_tables_for(
    like: Tensor, dim: int, width: int, degree: int, seed: int
) -> tuple[Tensor, Tensor]:
    """`sketch_tables` on the device of `like`, made once where that is data: not to be written."""
    make = _kept_tables if type(like) is Tensor else sketch_tables
    return make(dim, width, degree, seed, like.device)


def _mixed(place: Tensor, seed: int) -> Tensor:
    """A hash in [0, 2^32) of every integer in [0, 2^31), another for every seed.

    Multiplications and shifts that spread each bit over all; no product leaves 63 bits.
    """
    x = (place * 0x9E3779B1 + _mixed_seed(seed)) & 0xFFFFFFFF
    for _ in range(3):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _mixed_seed(seed: int) -> int:
    # Far from those of neighbouring seeds, whose tables would else be shifted copies.
    x = seed + 1
    for _ in range(3):
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    return x


def sketch_sizes(dim: int, width: int, degree: int) -> list[int]:
    """Buckets of degrees 2..p: what the constant and the exact linear part leave, shared evenly."""
    rest = width - 1 - dim
    if rest < degree - 1:
        check.fail("sketch width", f"at least 1 + D + (degree - 1) = {dim + degree}", width)
    share, extra = divmod(rest, degree - 1)
    return [share + (i < extra) for i in range(degree - 1)]


def sketch_features(
    x: Tensor, coefficients: Tensor, buckets: Tensor, signs: Tensor, width: int
) -> Tensor:
    """TensorSketch (Pham & Pagh 2013) of the polynomial kernel; constant and linear part exact.

        E[phi(x) . phi(y)] = sum_{n=0}^{p} a_n (x . y)^n   over the random tables

    Degree n >= 2 is the circular convolution of n count sketches of x, which is the product of
    their discrete Fourier transforms. Sketch and transform are linear in x, so both are one matrix,
    and the way back is another: at these sizes faster than an FFT, and all of it real numbers.
    x: [..., D]; coefficients: a [p + 1], p >= 2; buckets, signs: from `sketch_tables`.
    Returns [..., width] in the dtype of x (computed in float32 or float64).
    """
    dim, degree = x.shape[-1], coefficients.shape[0] - 1
    check.tensor(
        "buckets", buckets, "[F, D]", ((degree + 2) * (degree - 1) // 2, dim), [torch.int64]
    )
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    root = _safe_sqrt(coefficients.to(wide.dtype))
    degrees, sizes = list(range(2, degree + 1)), sketch_sizes(dim, width, degree)
    hashes = zip(buckets.split(degrees), signs.split(degrees), sizes, strict=True)
    tables = [_spectrum(*one, wide.dtype) for one in hashes]
    back = {size: _back(size, x.device, wide.dtype) for size in set(sizes)}
    # The spectra of all sketches in one product, then all of theirs: compiled, few kernels.
    spectra = (wide @ torch.cat(tables, 1)).split([t.shape[1] for t in tables], -1)
    factors = [
        t.unflatten(-1, (n, 2, -1)).unbind(-3) for n, t in zip(degrees, spectra, strict=True)
    ]
    products = [functools.reduce(_complex_product, pair).flatten(-2) for pair in factors]
    found = zip(degrees, sizes, products, strict=True)
    parts = [root[n] * (product @ back[size]) for n, size, product in found]
    constant = root[0].expand(*x.shape[:-1], 1)
    return torch.cat([constant, root[1] * wide, *parts], dim=-1).to(x.dtype)


def _spectrum(buckets: Tensor, signs: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Of n count sketches, as a matrix on x: [D, n (real and imaginary part) (size // 2 + 1)]."""
    frequency = torch.arange(size // 2 + 1, device=buckets.device)
    waves = _waves(buckets.mT[..., None] * frequency, size, dtype)
    return (waves * signs.mT[..., None, None].detach().to(dtype)).flatten(1)


def _back(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """From the first size // 2 + 1 frequencies of a real sequence to it: [2 (size // 2 + 1), size].

    The others are the same again, conjugate.
    """
    frequency = torch.arange(size // 2 + 1, device=device)
    waves = _waves(torch.arange(size, device=device)[:, None] * frequency, size, dtype)
    return (waves * torch.where(2 * frequency % size == 0, 1, 2) / size).flatten(1).mT


def _waves(place: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """exp(-2 pi i place / size) of integers [..., n]: its two parts [..., 2, n], rounded once."""
    device = float64_device(place.device)
    turn = place.remainder(size).to(device).double() * (2 * math.pi / size)
    return torch.stack([turn.cos(), -turn.sin()], -2).to(dtype).to(place.device)


def _complex_product(a: Tensor, b: Tensor) -> Tensor:
    """Of real and imaginary parts [..., 2, n]."""
    (a_re, a_im), (b_re, b_im) = a.unbind(-2), b.unbind(-2)
    return torch.stack([a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re], -2)


def _safe_sqrt(a: Tensor) -> Tensor:
    positive = a > 0
    return torch.where(positive, torch.where(positive, a, 1).sqrt(), 0)


class FeatureMap(Protocol):
    """phi of `omega_rule`. One with a method `kernel(x, y)` too, phi(x) . phi(y) of x [..., m, D]
    and y [..., n, D], is asked for that where features would cost more."""

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., Dphi]."""
        ...

    def width_of(self, dim: int) -> int:
        """Dphi for D."""
        ...


@dataclass(frozen=True)
class PolynomialMap:
    """`polynomial_features` as the `feature_map` of `omega_rule`. coefficients: a [p + 1] >= 0."""

    coefficients: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., C(D + p, p)]."""
        return polynomial_features(x, self.coefficients)

    def width_of(self, dim: int) -> int:
        """Width after the map of vectors of width D."""
        return polynomial_width(dim, len(self.coefficients) - 1)

    def kernel(self, x: Tensor, y: Tensor) -> Tensor:
        """phi(x) . phi(y) for x [..., m, D], y [..., n, D] -> [..., m, n], without features."""
        dots = x @ y.mT
        a = self.coefficients.to(dots.dtype)
        value = a[-1].expand_as(dots)
        for n in range(len(a) - 2, -1, -1):
            value = value * dots + a[n]
        return value


@dataclass(frozen=True)
class SketchMap:
    """`sketch_features` as the `feature_map` of `omega_rule`."""

    coefficients: Tensor
    buckets: Tensor
    signs: Tensor
    width: int

    def __call__(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., width]."""
        return sketch_features(x, self.coefficients, self.buckets, self.signs, self.width)

    def width_of(self, dim: int) -> int:
        """Width after the map, whatever D."""
        return self.width


class MapKind(NamedTuple):
    """A class of maps, and the fields that it is made of, in this order."""

    cls: type[Any]
    tensors: tuple[str, ...]
    numbers: tuple[str, ...]


FEATURE_MAPS: dict[str, MapKind] = {
    "polynomial": MapKind(PolynomialMap, ("coefficients",), ()),
    "sketch": MapKind(SketchMap, ("coefficients", "buckets", "signs"), ("width",)),
}


def register_feature_map(name: str, cls: type[Any]) -> None:
    """Let the op take maps of this class, and layers build one as `feature_map=name`.

    cls: a frozen dataclass of tensors and then ints, as a node of a compiled graph makes it again
    of them. A layer calls `cls.of(width, degree)` for a map, whose tensors become its buffers, or
    for an nn.Module without arguments whose result is one, where something of it is learned.
    Raises ValueError for a name that is taken, and for fields of other types.
    """
    if name in ("identity", "taylor_exp"):
        check.fail("feature map's name", "a str that is not taken yet", repr(name))
    if not callable(getattr(cls, "of", None)):
        check.fail("cls", "a class with `of(width, degree)`", repr(cls))
    kinds = {field.name: field.type for field in fields(cls)} if is_dataclass(cls) else {"": None}
    numbers = [n for n, kind in kinds.items() if kind in (int, "int")]
    tensors = [n for n, kind in kinds.items() if kind in (Tensor, "Tensor", "torch.Tensor")]
    if [*tensors, *numbers] != list(kinds):
        check.fail("cls", "a dataclass of tensors, then ints", f"{cls.__name__} of {kinds}")
    add_to("feature map", FEATURE_MAPS, name, MapKind(cls, tuple(tensors), tuple(numbers)))


def name_of_map(phi: FeatureMap | None) -> str:
    """Its name in `FEATURE_MAPS`, "identity" for None; of a map that is not there, a subclass too,
    its class in full, which is no name."""
    if phi is None:
        return "identity"
    known = [name for name, kind in FEATURE_MAPS.items() if type(phi) is kind.cls]
    return known[0] if known else full_name(type(phi))


def parts_of(phi: FeatureMap | None, name: str) -> tuple[list[Tensor], list[int]]:
    """The tensors and the numbers that a map of this name in `FEATURE_MAPS` is made of."""
    if name == "identity":
        return [], []
    kind = FEATURE_MAPS[name]
    return [getattr(phi, n) for n in kind.tensors], [getattr(phi, n) for n in kind.numbers]


def map_of(name: str, tensors: Sequence[Tensor], numbers: Sequence[int]) -> FeatureMap | None:
    """The map whose `name_of_map` and `parts_of` these are."""
    return None if name == "identity" else FEATURE_MAPS[name].cls(*tensors, *numbers)


def tensors_of_map(name: str) -> int:
    """How many tensors a map of this name is made of."""
    return 0 if name == "identity" else len(FEATURE_MAPS[name].tensors)


def features_of(phi: FeatureMap | None, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """phi(q) and phi(k) of [B, n, ...], in one call: a map makes its tables once for both."""
    if phi is None:
        return q, k
    both = phi(torch.cat([q, k], 1))
    return both[:, : q.shape[1]], both[:, q.shape[1] :]
