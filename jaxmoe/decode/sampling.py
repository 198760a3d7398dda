"""Draw the next token of each row from its logits.

A draw is `argmax(z + g)`: z are the row's logits after temperature and filters, g is Gumbel noise that depends on
nothing but (request seed, absolute position of the token being drawn, purpose). So a request gets the same tokens in
any batch row, bucket or split, with or without speculation, and a verifier can redraw the target's token before it has
looked at the draft.

Nothing here sorts. A filter is a threshold on a row's values, found by bisection over the bits of a float32, and the
probability mass above a threshold is summed in integers. Integer sums do not depend on their order, so neither does
the set that is kept.

This file knows rows of logits. It does not know requests, batches, grammars (a forbidden token comes in as -inf) or
penalties.
"""

from __future__ import annotations

import enum
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

# Sums of limbs of this many bits stay below 2**32 up to a vocabulary of MAX_VOCAB.
LIMB_BITS = 13
MAX_VOCAB = 2**19 - 1
PRNG_IMPL = "threefry2x32"


class Purpose(enum.IntEnum):
    """What a random number is for: draws of different purposes at one position are independent. Values are stable."""

    SAMPLE = 0
    DRAFT = 1
    VERIFY = 2
    ROUTE = 3


@flax.struct.dataclass
class SamplingParams:
    """How each row is sampled; a pytree of per-row arrays, so that rows of one batch may differ without a new program.

    Attributes:
        temperature: f32[R], >= 0; 0 takes the most likely token, the lowest id among equals.
        top_k: i32[R]; 0 is off.
        top_p: f32[R] in [0, 1]; 1 is off.
        min_p: f32[R] in [0, 1]; 0 is off.
        seed: u32[R], the request's seed.
    """

    temperature: Float[Array, "R"]
    top_k: Int[Array, "R"]
    top_p: Float[Array, "R"]
    min_p: Float[Array, "R"]
    seed: UInt32[Array, "R"]


def sampling_params(rows: int, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, seed=0) -> SamplingParams:
    """Check the values of a batch and lay them out per row, on the host.

    Args:
        rows: R.
        temperature, top_k, top_p, min_p, seed: a number for all rows, or R numbers. See `SamplingParams`.

    Returns:
        SamplingParams of numpy arrays, each [R].

    Raises:
        ValueError: a value lies outside its range; the message names the field and the value.
    """
    ranges = dict(
        temperature=(0, np.finfo(np.float32).max), top_k=(0, 2**31 - 1), top_p=(0, 1), min_p=(0, 1), seed=(0, 2**32 - 1)
    )
    dtypes = dict(temperature=np.float32, top_k=np.int32, top_p=np.float32, min_p=np.float32, seed=np.uint32)
    given = dict(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    rows_of: dict[str, Any] = {  # numpy's arrays stand in for jax's until the step
        name: _row_values(name, value, rows, *ranges[name], dtypes[name]) for name, value in given.items()
    }
    return SamplingParams(**rows_of)


def _row_values(name: str, value, rows: int, low, high, dtype) -> np.ndarray:
    values = np.asarray(value)
    if values.shape not in ((), (rows,)):
        raise ValueError(f"{name} has shape {values.shape}; expected one number or {rows}, one per row")
    if np.issubdtype(dtype, np.integer) and not np.issubdtype(values.dtype, np.integer):
        raise ValueError(f"{name} must be of integers, got {values.dtype}")
    wrong = values[~((values >= low) & (values <= high))]  # written so that NaN is wrong too
    if wrong.size:
        raise ValueError(f"{name} = {wrong.flat[0]} is outside [{low}, {high}]")
    return np.broadcast_to(values.astype(dtype), (rows,)).copy()


def sample(
    logits: Float[Array, "R V"],
    params: SamplingParams,
    position: Int[Array, "R"],
    *,
    purpose: Purpose = Purpose.SAMPLE,
    greedy_only: bool = False,
) -> Int[Array, "R"]:
    """Draw one token per row; rows do not influence each other.

    Args:
        logits: f32[R, V]; -inf forbids a token. A row needs one finite logit, and no NaN or +inf, or its token means
            nothing.
        params: per-row settings.
        position: i32[R], absolute position of the token being drawn (a prompt of n tokens draws its first token at n).
        purpose: static; separates streams of random numbers.
        greedy_only: static; the caller's word that every temperature is 0. Only the argmax is left: no noise, no
            filter.

    Returns:
        i32[R], token ids.

    Raises:
        TypeError: logits are not float32.
        ValueError: V is larger than `MAX_VOCAB`.

    Source: Gumbel-max, Maddison et al. 2014 (arXiv:1411.0030), section 2.
    """
    _check_logits(logits)
    greedy = first_largest(logits)
    if greedy_only:
        return greedy
    with jax.named_scope("sample"):
        noise = gumbel_noise(params.seed, position, purpose, logits.shape[-1])
        drawn = first_largest(process_logits(logits, params) + noise)
    return jnp.where(params.temperature > 0, drawn, greedy)


_COLUMNS = 64


def first_largest(x: Float[Array, "R V"]) -> Int[Array, "R"]:
    """Where the largest value of each row is, the first of equals (some column where there is a NaN)."""
    return jax.lax.platform_dependent(x, cpu=_first_largest, default=lambda x: jnp.argmax(x, axis=-1).astype(jnp.int32))


def _first_largest(x: Float[Array, "R V"]) -> Int[Array, "R"]:
    """`argmax` by whole vectors: XLA's CPU backend makes it one comparison at a time."""
    columns = x.shape[1]

    def over_row(reduce, x):
        if columns % _COLUMNS == 0:
            x = reduce(x.reshape(x.shape[0], -1, _COLUMNS), 1)
        return reduce(x, 1)

    top = over_row(jnp.max, x)[:, None]
    return over_row(jnp.min, jnp.where((x == top) | jnp.isnan(x), jnp.arange(columns, dtype=jnp.int32), columns))


def process_logits(logits: Float[Array, "R V"], params: SamplingParams) -> Float[Array, "R V"]:
    """Apply temperature, top-k, top-p and min-p, in this order; the one function that samplers and verifiers share.

    Each filter sees the distribution that the one before it left, renormalised, as in transformers and vLLM. The kept
    set is always {tokens whose logit is at least a threshold}: **tokens that tie with the last one kept are kept
    too**, so the set depends on values alone, never on an order among equals. (transformers and vLLM do this for top-k
    and min-p; for top-p they cut inside a tie, in the order of their sort.) The most likely token is always kept.

    Args:
        logits: f32[R, V].
        params: per-row settings; a row of temperature 0 is filtered as if its temperature were 1.

    Returns:
        f32[R, V]: (logits - row maximum) / temperature where kept, else -inf.

    Raises:
        TypeError, ValueError: as `sample`.
    """
    _check_logits(logits)
    temperature = jnp.where(params.temperature > 0, params.temperature, jnp.float32(1))
    # Distances below the maximum, rather than logits, never overflow to NaN however small the temperature, and their
    # bits, read as an integer, are in the order of their values.
    distance = (jnp.max(logits, axis=-1, keepdims=True) - logits) / temperature[:, None]
    key = jax.lax.bitcast_convert_type(distance, jnp.uint32)
    with jax.named_scope("top_k"):
        keep = key <= _top_k_threshold(key, params.top_k)[:, None]
    with jax.named_scope("top_p"):
        keep &= key <= _top_p_threshold(key, jnp.where(keep, jnp.exp(-distance), 0), params.top_p)[:, None]
    with jax.named_scope("min_p"):
        # p >= min_p * p_max, in logarithms; log(0) = -inf keeps all.
        keep &= distance <= jnp.maximum(-jnp.log(params.min_p), 0)[:, None]
    return jnp.where(keep, -distance, -jnp.inf)


def gumbel_noise(
    seed: UInt32[Array, "R"], position: Int[Array, "R"], purpose: Purpose, vocab: int
) -> Float[Array, "R V"]:
    """Standard Gumbel noise for every token of a row, a pure function of (seed, position, purpose, token id).

    The uniform variate is taken on the side where the noise is large, so the noise reaches ln(2**33) = 22.9: tokens
    keep their odds down to a probability of about 2**-32.

    Args:
        seed: u32[R].
        position: i32[R], absolute positions.
        purpose: static.
        vocab: V.

    Returns:
        f32[R, V], finite.
    """
    # The generator and the layout of its counters are given here: left to jax's configuration, they would change
    # tokens.
    with jax.threefry_partitionable(True):
        bits = jax.vmap(lambda s, p: jax.random.bits(_key(s, p, purpose), (vocab,), jnp.uint32))(seed, position)
    uniform = (bits.astype(jnp.float32) + jnp.float32(0.5)) * jnp.float32(2.0**-32)
    uniform = jnp.minimum(uniform, jnp.float32(1 - 2.0**-24))  # rounding may have given 1, whose noise would be -inf
    return -jnp.log(-jnp.log1p(-uniform))


def _key(seed: UInt32[Array, ""], position: Int[Array, ""], purpose: Purpose) -> Key[Array, ""]:
    # Key data rather than jax.random.key: that one reads jax_random_seed_offset and, for its width, jax_enable_x64.
    key = jax.random.wrap_key_data(jnp.stack([jnp.uint32(0), seed.astype(jnp.uint32)]), impl=PRNG_IMPL)
    return jax.random.fold_in(jax.random.fold_in(key, position.astype(jnp.uint32)), int(purpose))


def _check_logits(logits: Float[Array, "R V"]) -> None:
    if logits.dtype != jnp.float32:
        raise TypeError(f"logits are {logits.dtype}; sampling takes float32")
    if logits.shape[-1] > MAX_VOCAB:
        raise ValueError(
            f"a vocabulary of {logits.shape[-1]} is larger than {MAX_VOCAB}, beyond which integer sums may overflow"
        )


def _smallest_key(enough, rows: int) -> UInt32[Array, "R"]:
    """The smallest u32 key for which `enough(key)` holds, per row, for a condition that is monotone in the key.

    Keys are bits of non-negative floats, so 31 rounds settle all bits. A fixed trip count: no round trip to the host
    on GPU.
    """

    def settle_bit(i, found):
        candidate = found | (jnp.uint32(1) << (jnp.uint32(30) - i.astype(jnp.uint32)))
        return jnp.where(enough(candidate - 1), found, candidate)

    return jax.lax.fori_loop(0, 31, settle_bit, jnp.zeros((rows,), jnp.uint32))


def _top_k_threshold(key: UInt32[Array, "R V"], top_k: Int[Array, "R"]) -> UInt32[Array, "R"]:
    """The key of the k-th smallest distance; the largest possible key where the filter is off."""
    rows, vocab = key.shape
    wanted = jnp.where(top_k > 0, jnp.minimum(top_k, vocab), vocab).astype(jnp.int32)
    return _smallest_key(lambda t: jnp.sum(key <= t[:, None], axis=-1, dtype=jnp.int32) >= wanted, rows)


def _top_p_threshold(
    key: UInt32[Array, "R V"], weight: Float[Array, "R V"], top_p: Float[Array, "R"]
) -> UInt32[Array, "R"]:
    """The smallest key such that the tokens up to it hold at least top_p of all weight; weights lie in [0, 1]."""
    limbs = _limbs(weight)
    wanted = top_p * _mass(limbs, jnp.ones(key.shape, bool))
    threshold = _smallest_key(lambda t: _mass(limbs, key <= t[:, None]) >= wanted, key.shape[0])
    return jnp.where(top_p < 1, threshold, jnp.uint32(2**32 - 1))


def _limbs(weight: Float[Array, "R V"]) -> list[UInt32[Array, "R V"]]:
    """A weight in [0, 1] as three integers of LIMB_BITS bits, most significant first; every step is exact."""
    scale, rest, limbs = jnp.float32(2**LIMB_BITS), weight, []
    for _ in range(3):
        scaled = rest * scale
        whole = jnp.floor(scaled)
        limbs.append(whole.astype(jnp.uint32))
        rest = scaled - whole
    return limbs


def _mass(limbs: list[UInt32[Array, "R V"]], keep: Bool[Array, "R V"]) -> Float[Array, "R"]:
    """Sum of the kept weights, in units of 2**-LIMB_BITS: exact integer sums, rounded to float32 once they are done."""
    sums = [jnp.sum(jnp.where(keep, limb, 0), axis=-1, dtype=jnp.uint32).astype(jnp.float32) for limb in limbs]
    return sums[0] + (sums[1] + sums[2] * jnp.float32(2.0**-LIMB_BITS)) * jnp.float32(2.0**-LIMB_BITS)
