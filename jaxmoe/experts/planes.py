"""Experts at any number of bits from 2 to 8, of which each is a prefix of the bytes of the next: nested bit planes.

    W(b) = lo + step * q + s_3 Q_3 + ... + s_b Q_b        q in {0, 1, 2, 3}, Q_i in {-1, +1}; lo, step and s_i per group of weights along K

as in D2MoE's matryoshka quantization (arXiv:2504.15299), without its error compensation. The *base* (q, lo, step) is the first chunk of an expert's
bytes, and every further plane a chunk of its own, so that one artefact serves all low precisions and an expert that is wanted at more bits needs only
the chunks that are missing. The numbers per group are bfloat16: a product with q or Q_i is then exact in float32, and the sum, taken in the order of
the planes, has the same bits wherever it is computed. Knows neither checkpoints nor links.

Within a group, numbers share bytes by strided pieces (the i-th quarter or eighth of the group is in the i-th bits), so that unpacking is shifts only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jaxtyping import Array, Float, Num, UInt8

from jaxmoe import formats
from jaxmoe.experts.host_store import COLUMNS
from jaxmoe.formats import ExpertLayout
from jaxmoe.spec import ModelSpec

BASE, MOST = 2, 8
"""Bits of the base, and of all planes together."""

GROUP = 64
"""Weights along K that share `lo`, `step` and `s_i`, where K allows."""

ROUNDS = 3
"""How often the numbers of a group are fitted again; see `encode`."""


@dataclasses.dataclass(frozen=True)
class PlaneFormat:
    """The shape of an artefact and of the record that it stands for.

    Attributes:
        width, hidden: D and F of the model.
        layout: the order of axes in the record.
        dtype: in which the record holds weights.
        group: weights along K that share numbers; a multiple of 8 that divides D and F.

    Raises:
        ValueError: a group that does not fit.
    """

    width: int
    hidden: int
    layout: ExpertLayout = "d2f"
    dtype: str = "float32"
    group: int = GROUP

    def __post_init__(self):
        if self.group < 8 or self.group % 8 or self.width % self.group or self.hidden % self.group:
            raise ValueError(f"groups of {self.group} weights: give a multiple of 8 that divides {self.width} and {self.hidden}")

    @property
    def matrices(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """[K, N] of the input matrices side by side, and of the output matrix."""
        return (self.width, 2 * self.hidden), (self.hidden, self.width)

    @property
    def weights(self) -> int:
        """Weights of an expert."""
        return sum(map(math.prod, self.matrices))

    def chunk(self, bits: int) -> int:
        """Bytes of the chunk that leads to `bits`: with `BASE` of the base, else of a plane."""
        shift = 4 if bits == BASE else 8
        numbers = 2 if bits == BASE else 1
        return self.weights // shift + 2 * numbers * self.weights // self.group

    def bytes(self, bits: int) -> int:
        """Bytes of an expert at `bits`.

        Raises:
            ValueError: other bits than 2 to 8.
        """
        if not BASE <= bits <= MOST:
            raise ValueError(f"{bits} bits: experts come at {BASE} to {MOST} bits")
        return sum(self.chunk(b) for b in range(BASE, bits + 1))

    @property
    def starts(self) -> tuple[int, ...]:
        """Where each chunk begins, and at last where the artefact ends."""
        return (0, *(self.bytes(bits) for bits in range(BASE, MOST + 1)))


def plane_format(spec: ModelSpec, layout: ExpertLayout = "d2f", group: int | None = None) -> PlaneFormat:
    """The format for a model's experts.

    Args:
        spec: the model, in the precision of its records.
        layout: the order of axes in them.
        group: weights that share numbers; None for the largest up to `GROUP` that fits.

    Raises:
        ValueError: widths that no group of 8 or more divides.
    """
    hidden = spec.moe[1].width
    return PlaneFormat(spec.width, hidden, layout, spec.precision.params, group or math.gcd(spec.width, hidden, GROUP))


# --- Fitting and packing, on the host


def pack_planes(fmt: PlaneFormat, record: Num[np.ndarray, "R C"], rounds: int = ROUNDS) -> UInt8[np.ndarray, "N"]:
    """All planes of one expert.

    Args:
        fmt: the format.
        record: the expert as it is stored (`jaxmoe.experts.host_store`).
        rounds: see `encode`.

    Returns:
        uint8 [bytes(8)]; its first `bytes(b)` are the expert at b bits.

    Raises:
        ValueError: a weight is not finite.
    """
    flat = formats.load_numpy(record).reshape(-1)
    if not np.isfinite(flat).all():
        raise ValueError("an expert has a weight that is not finite: it can't be had at fewer bits")
    fitted = [encode(w, fmt.group, rounds) for w in _matrices(fmt, flat, np)]
    out, starts = np.empty(fmt.bytes(MOST), np.uint8), fmt.starts
    for i, bits in enumerate(range(BASE, MOST + 1)):
        of_bits = [_pack(codes, numbers, bits) for codes, numbers in fitted]
        out[starts[i] : starts[i + 1]] = np.concatenate([part for parts in of_bits for part in parts])
    return out


def build_planes(
    fmt: PlaneFormat, records: Num[np.ndarray, "X R C"], rounds: int = ROUNDS, progress: Callable[[int, int], None] = lambda done, total: None
) -> UInt8[np.ndarray, "X N"]:
    """The planes of every record; `progress` is called with experts done and experts in all."""
    out = np.empty((len(records), fmt.bytes(MOST)), np.uint8)
    for i, record in enumerate(records):
        out[i] = pack_planes(fmt, record, rounds)
        progress(i + 1, len(records))
    return out


def encode(
    w: Float[np.ndarray, "K N"], group: int, rounds: int = ROUNDS
) -> tuple[UInt8[np.ndarray, "H G N"], Float[np.ndarray, "H 8 N"]]:
    """Fits a matrix's groups.

    The base's four levels begin at the middles of four equal cells of the group's range, so that what is left is spread alike around each; planes are
    greedy, Q_i the sign of what is left and s_i its mean size, which is the best s_i for it. Then, `rounds` times, all numbers of a group are fitted
    again by least squares, codes given, and codes are chosen again, numbers given. What is minimised is the sum over b of 2^b times the squared error
    at b bits, so that no precision is good at another's cost.

    Args:
        w: a matrix, float32.
        group: weights along K that share numbers.
        rounds: 0 for greedy planes alone.

    Returns:
        Codes, the base's in bits 0 and 1 and the sign of plane b in bit b - 1; and numbers `lo, step, s_3 .. s_8`, float32 values of bfloat16.
    """
    k, n = w.shape
    x = np.ascontiguousarray(w.reshape(k // group, group, n).transpose(0, 2, 1)).reshape(-1, group)
    numbers = _greedy(x)
    for _ in range(rounds):
        numbers = _refitted(x, _codes(x, numbers), numbers)
    numbers = numbers.astype(ml_dtypes.bfloat16).astype(np.float32)
    codes = _codes(x, numbers)

    def back(values: np.ndarray) -> np.ndarray:
        return values.reshape(k // group, n, -1).transpose(0, 2, 1)

    return back(codes), back(numbers)


def _greedy(x: np.ndarray) -> Float[np.ndarray, "M 8"]:
    low, high = x.min(1), x.max(1)
    step = (high - low) / 4
    numbers = np.zeros((len(x), MOST), np.float32)
    numbers[:, 0], numbers[:, 1] = low + step / 2, step
    left = x - _base(x, numbers)[1]
    for i in range(BASE, MOST):
        numbers[:, i] = np.abs(left).mean(1)
        left -= np.where(left >= 0, numbers[:, i, None], -numbers[:, i, None])
    return numbers


def _base(x: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The base's codes, and the weights that they stand for."""
    lo, step = numbers[:, :1], numbers[:, 1:2]
    q = np.clip(np.rint((x - lo) / np.where(step == 0, 1, step)), 0, 3)
    return q, lo + step * q


def _codes(x: np.ndarray, numbers: np.ndarray) -> UInt8[np.ndarray, "M G"]:
    """The codes that come nearest, plane by plane."""
    q, w = _base(x, numbers)
    codes = q.astype(np.uint8)
    for i in range(BASE, MOST):
        above = x >= w
        w = w + np.where(above, numbers[:, i, None], -numbers[:, i, None])
        codes |= above.astype(np.uint8) << i
    return codes


_WORTH = 2.0 ** np.arange(MOST + 1)
_FROM = np.cumsum(_WORTH[::-1])[::-1]  # what all precisions from b bits on are worth
_FIRST = np.maximum(np.arange(1, MOST + 1), BASE)  # bits from which a number takes part


def _refitted(x: np.ndarray, codes: np.ndarray, before: np.ndarray) -> Float[np.ndarray, "M 8"]:
    """The best numbers for these codes; those of a group that can't be solved stay."""
    columns = np.empty((*x.shape, MOST))
    columns[..., 0], columns[..., 1] = 1, codes & 3
    for i in range(BASE, MOST):
        columns[..., i] = np.where(codes >> i & 1, 1, -1)
    gram = columns.swapaxes(1, 2) @ columns * _FROM[np.maximum(_FIRST[:, None], _FIRST[None, :])]
    right = (columns.swapaxes(1, 2) @ x[..., None]) * _FROM[_FIRST][:, None]
    little = 1e-6 * np.trace(gram, axis1=1, axis2=2)[:, None, None] / MOST  # where codes leave a number free, it stays
    gram += little * np.eye(MOST)
    right += little * before[..., None]
    found = np.linalg.solve(gram, right)[..., 0]
    return np.where(np.isfinite(found).all(1, keepdims=True), found, before).astype(np.float32)


def _pack(codes: np.ndarray, numbers: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """The bytes of one chunk of a matrix: codes, and numbers."""
    width = 2 if bits == BASE else 1
    own = codes & 3 if bits == BASE else codes >> (bits - 1) & 1
    pieces = own.reshape(own.shape[0], 8 // width, -1, own.shape[2])
    shifts = (np.arange(8 // width) * width).astype(np.uint8)[:, None, None]
    packed = np.bitwise_or.reduce(pieces << shifts, axis=1)
    part = numbers[:, :2] if bits == BASE else numbers[:, bits - 1 : bits]
    return packed.reshape(-1), part.astype(ml_dtypes.bfloat16).reshape(-1).view(np.uint8)


# --- Unpacking, on the device


@functools.partial(jax.jit, static_argnums=(0, 2))
def unpack_planes(fmt: PlaneFormat, data: UInt8[Array, "N"] | tuple[UInt8[Array, "n"], ...], bits: int) -> Num[Array, "R C"]:
    """An expert's record of the first `bytes(bits)` of its planes.

    Args:
        fmt: the format.
        data: the bytes, or a tuple of their chunks.
        bits: 2 to 8.

    Returns:
        The record as `jaxmoe.experts.host_store` has it, for a slot: [rows, columns] of `fmt.dtype`, held as its leaves are.
    """
    flat = jnp.concatenate(data) if isinstance(data, (tuple, list)) else data
    matrices = tuple(jnp.zeros(shape, jnp.float32) for shape in fmt.matrices)
    return _record(fmt, _added(fmt, matrices, flat, BASE, bits))


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
def upgraded(fmt: PlaneFormat, record: Num[Array, "R C"], data: UInt8[Array, "N"], held: int, bits: int) -> Num[Array, "R C"]:
    """A record of `held` bits made one of `bits` by the chunks between them: the bits of unpacking all of them at once.

    Only records of float32 hold the sum that planes are added to. One of bfloat16 holds it rounded, and is unpacked again from its first byte: that
    costs `bytes(bits)` of the link instead of `bytes(bits) - bytes(held)`.

    Args:
        fmt: the format.
        record: of `unpack_planes` with `held` bits.
        data: bytes `bytes(held)` to `bytes(bits)` of the planes.
        held, bits: before and after.

    Raises:
        ValueError: records that don't hold float32, or no more bits than before.
    """
    if fmt.dtype != "float32":
        raise ValueError(f"a record of {fmt.dtype} can't be upgraded in place: unpack all of its {bits} bits")
    if not BASE <= held < bits <= MOST:
        raise ValueError(f"an upgrade from {held} to {bits} bits: give more bits than there are, {BASE} to {MOST}")
    return _record(fmt, _added(fmt, _matrices(fmt, record.reshape(-1), jnp), data, held + 1, bits))


def _added(fmt: PlaneFormat, matrices: tuple[jax.Array, ...], data: jax.Array, first: int, last: int) -> tuple[jax.Array, ...]:
    """The matrices with the chunks of `first` to `last` bits added, one after the other."""
    at, out = 0, list(matrices)
    for bits in range(first, last + 1):
        for i, (k, n) in enumerate(fmt.matrices):
            groups, per_byte, count = k // fmt.group, 4 if bits == BASE else 8, 2 if bits == BASE else 1
            codes = data[at : at + k * n // per_byte].reshape(groups, 1, fmt.group // per_byte, n)
            at += k * n // per_byte
            raw = data[at : at + 2 * count * groups * n].reshape(groups, count, 1, n, 2)
            at += 2 * count * groups * n
            numbers = jax.lax.bitcast_convert_type(raw, jnp.bfloat16).astype(jnp.float32)
            shifts = (jnp.arange(per_byte, dtype=jnp.uint8) * (8 // per_byte))[:, None, None]
            codes = (codes >> shifts & (3 if bits == BASE else 1)).reshape(groups, fmt.group, n)
            if bits == BASE:
                out[i] = (numbers[:, 0] + numbers[:, 1] * codes.astype(jnp.float32)).reshape(k, n)
            else:
                out[i] = out[i] + jnp.where(codes == 1, numbers[:, 0], -numbers[:, 0]).reshape(k, n)
    return tuple(out)


def _matrices(fmt: PlaneFormat, flat, module) -> tuple:
    """The input matrices side by side [D, 2 F] and the output matrix [F, D], of a record's elements."""
    shapes, axes = formats.expert_shapes(fmt.width, fmt.hidden, fmt.layout), formats.expert_axes(fmt.layout)
    size = math.prod(shapes[0])
    parts = flat[:size].reshape(shapes[0]), flat[size:].reshape(shapes[1])
    return tuple(module.transpose(part, order).reshape(shape) for part, order, shape in zip(parts, axes, fmt.matrices, strict=True))


def _record(fmt: PlaneFormat, matrices: tuple[jax.Array, ...]) -> jax.Array:
    """The inverse of `_matrices`, as a record holds it."""
    axes = formats.expert_axes(fmt.layout)
    apart = matrices[0].reshape(fmt.width, 2, fmt.hidden), matrices[1]
    flat = [jnp.transpose(w, tuple(int(i) for i in np.argsort(order))).reshape(-1) for w, order in zip(apart, axes, strict=True)]
    held = formats.store(jnp.concatenate(flat), fmt.dtype)
    return held.reshape(-1, COLUMNS if fmt.weights % COLUMNS == 0 else fmt.weights)


def errors(fmt: PlaneFormat, record: Num[np.ndarray, "R C"], rounds: int = ROUNDS) -> dict[int, tuple[float, float]]:
    """How far an expert at each number of bits is from itself, beside plain rounding.

    Args:
        fmt: the format.
        record: the expert as it is stored.
        rounds: see `encode`.

    Returns:
        By bits: the root of the squared error over the squared weights, of the planes and of rounding to the nearest of 2^bits even steps between a
        group's least and greatest weight, whose numbers are bfloat16 too.
    """
    whole = _matrices(fmt, formats.load_numpy(record).reshape(-1), np)
    size = sum(float((w.astype(np.float64) ** 2).sum()) for w in whole)
    found = {bits: np.zeros(2) for bits in range(BASE, MOST + 1)}
    for w in whole:
        for bits, planes in _by_bits(*encode(w, fmt.group, rounds)):
            plain = rounded_to_nearest(w, bits, fmt.group)
            found[bits] += [((v.reshape(w.shape) - w).astype(np.float64) ** 2).sum() for v in (planes, plain)]
    return {bits: (math.sqrt(ours / size), math.sqrt(plain / size)) if size else (0.0, 0.0) for bits, (ours, plain) in found.items()}


def _by_bits(codes: np.ndarray, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """What the codes of `encode` stand for, at every number of bits."""
    w = numbers[:, :1] + numbers[:, 1:2] * (codes & 3)
    yield BASE, w
    for bits in range(BASE + 1, MOST + 1):
        w = w + np.where(codes >> (bits - 1) & 1, 1, -1).astype(np.float32) * numbers[:, bits - 1 : bits]
        yield bits, w


def rounded_to_nearest(w: Float[np.ndarray, "K N"], bits: int, group: int) -> Float[np.ndarray, "K N"]:
    """The nearest of 2^bits even steps from the least to the greatest weight of a group along K."""
    x = w.reshape(w.shape[0] // group, group, w.shape[1])
    least, greatest = x.min(1, keepdims=True), x.max(1, keepdims=True)
    low, step = (v.astype(ml_dtypes.bfloat16).astype(np.float32) for v in (least, (greatest - least) / (2**bits - 1)))
    q = np.clip(np.rint((x - low) / np.where(step == 0, 1, step)), 0, 2**bits - 1)
    return (low + step * q).reshape(w.shape)
