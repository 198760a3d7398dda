"""Rotary positions: frequencies and tables of cosines and sines from a `RopeSpec`, and turning the channels of heads by them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxmoe import formats
from jaxmoe.spec import RopeScaling, RopeSpec, SpecError
from pallas_kernels.one_kernel import one_kernel


def rope_tables(spec: RopeSpec, positions: Int[Array, "T"], dtype) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of each position's angles, computed and multiplied by the scaling's magnitude in float32.

    Args:
        spec: which frequencies.
        positions: of the tokens.
        dtype: of the tables. Some families turn channels in float32 whatever the activations' dtype: then it is float32.

    Returns:
        Two arrays [T, width / 2].

    Raises:
        SpecError: the scaling can't be computed as described.
    """
    cos, sin = _turns(positions, jnp.asarray(inverse_frequencies(spec)))
    if (magnitude := magnitude_of(spec)) != 1.0:
        cos, sin = cos * magnitude, sin * magnitude
    # The barrier keeps XLA from fusing cosines and sines into every layer's use of them, once per head. On the CPU it doesn't, but a kernel does.
    return jax.lax.optimization_barrier((cos.astype(dtype), sin.astype(dtype)))


@one_kernel()
def _turns(positions_T: Int[Array, "T"], frequencies_C: Float[Array, "C"]) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines of positions times frequencies, [T, C]."""
    angles = positions_T.astype(jnp.float32)[:, None] * frequencies_C
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(spec: RopeSpec, tables: tuple[jax.Array, jax.Array], x: Float[Array, "T H C"]) -> jax.Array:
    """Turns the first `spec.width` channels of every head by its token's angles (RoFormer, eq. 34).

    Args:
        spec: how many channels turn, and which make a pair.
        tables: of `rope_tables`; in float32, the turn is in float32 and rounded to x's dtype at the end.
        x: queries or keys.

    Returns:
        As `x`.
    """
    cos, sin = (t[:, None, :] for t in tables)
    turned, rest = x[..., : spec.width], x[..., spec.width :]
    if spec.style == "half":
        a, b = jnp.split(turned, 2, axis=-1)
        turned = jnp.concatenate(_turned(a, b, cos, sin), axis=-1)
    else:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = jnp.stack(_turned(a, b, cos, sin), axis=-1).reshape(turned.shape)
    turned = turned.astype(x.dtype)
    return jnp.concatenate([turned, rest], axis=-1) if rest.shape[-1] else turned


def _turned(a: jax.Array, b: jax.Array, cos: jax.Array, sin: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pairs of channels turned, with each product rounded: else XLA rounds one of two, and which depends on the program."""
    rounded = formats.rounded
    return rounded(a * cos) - rounded(b * sin), rounded(b * cos) + rounded(a * sin)


def magnitude_of(spec: RopeSpec) -> float:
    """What cosines and sines are multiplied by."""
    scaling = spec.scaling
    if scaling is None:
        return 1.0
    return scaling.long_magnitude if scaling.kind == "longrope" and scaling.extended else scaling.magnitude


def inverse_frequencies(spec: RopeSpec) -> np.ndarray:
    """The angle, in radians, by which each pair of channels turns per position.

    Constants, computed on the host: powers in float64 and rounded to float32, everything after them in float32 steps, as
    transformers' modeling_rope_utils.py has them, so that frequencies agree with its own to a rounding of the power.

    Args:
        spec: base, width, how many pairs turn, and the scaling.

    Returns:
        float32 [width / 2]; zero from `spec.pairs` on.

    Raises:
        SpecError: longrope has another number of factors than pairs, or the scaling's kind is unknown.
    """
    exponents = np.arange(0, spec.width, 2, dtype=np.float32) / np.float32(spec.width)
    powers = (spec.theta ** exponents.astype(np.float64)).astype(np.float32)
    inverse = _scaled(spec, spec.scaling, powers) if spec.scaling is not None else 1 / powers
    if spec.pairs is not None:
        inverse[spec.pairs :] = 0
    return inverse


def _scaled(spec: RopeSpec, scaling: RopeScaling, powers: np.ndarray) -> np.ndarray:
    if scaling.kind == "linear":
        return (1 / powers) / np.float32(scaling.factor)
    if scaling.kind == "llama3":
        return _llama3(scaling, 1 / powers)
    if scaling.kind == "yarn":
        return _yarn(spec, scaling, powers)
    if scaling.kind == "longrope":
        return _longrope(scaling, powers)
    raise SpecError(f"RopeScaling.kind {scaling.kind!r} is not supported")


def _llama3(scaling: RopeScaling, inverse: np.ndarray) -> np.ndarray:
    """Waves longer than `original / low` positions are stretched, those shorter than `original / high` kept, and in between is a blend."""
    waves = 1 / inverse * np.float32(2 * math.pi)
    slow, fast = waves > np.float32(scaling.original / scaling.low), waves < np.float32(scaling.original / scaling.high)
    stretched = inverse / np.float32(scaling.factor)
    if scaling.low == scaling.high:  # as Llama 4 has it: nothing is in between
        return np.where(fast, inverse, stretched)
    keep = (1 / waves * np.float32(scaling.original) - np.float32(scaling.low)) / np.float32(scaling.high - scaling.low)
    blend = (1 - keep) * inverse / np.float32(scaling.factor) + keep * inverse
    return np.where(slow, stretched, np.where(fast, inverse, blend))


def _yarn(spec: RopeSpec, scaling: RopeScaling, powers: np.ndarray) -> np.ndarray:
    """Pairs that turn more than `high` times in `original` positions are kept, those below `low` times stretched; linear by index in between."""

    def pair_of(turns: float) -> float:
        return spec.width * math.log(scaling.original / (turns * 2 * math.pi)) / (2 * math.log(spec.theta))

    first, last = pair_of(scaling.high), pair_of(scaling.low)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    # The bound is the width, though there are half as many pairs: so every implementation has it.
    first, last = max(first, 0), min(last, spec.width - 1)
    span = last - first if last != first else 0.001
    ramp = np.clip((np.arange(spec.width // 2, dtype=np.float32) - np.float32(first)) / np.float32(span), 0, 1)
    keep = 1 - ramp
    return 1 / (np.float32(scaling.factor) * powers) * (1 - keep) + 1 / powers * keep


def _longrope(scaling: RopeScaling, powers: np.ndarray) -> np.ndarray:
    name = "long" if scaling.extended else "short"
    factors: tuple[float, ...] = getattr(scaling, name)
    if len(factors) != len(powers):
        raise SpecError(f"RopeScaling.{name} has {len(factors)} factors for {len(powers)} frequencies")
    return 1 / (np.asarray(factors, np.float32) * powers)
