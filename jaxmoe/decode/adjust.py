"""Change a row's logits as its request asked, draw its token, and give the log probabilities of the model's own law.

This file knows rows of logits, numbers added to them and sets of tokens as bits. It does not know where those come from: penalties are counted in
`jaxmoe.decode.penalties`, grammars are followed in `jaxmoe.decode.grammar`, both on the host.
"""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxmoe.decode.sampling import SamplingParams, sample

WORD = 32
"""Tokens of one word of a set; bit j of word w is token 32w + j."""


@flax.struct.dataclass
class Adjust:
    """What is done to each row's logits before its token is drawn; a pytree of per-row arrays.

    Attributes:
        bias: f32[R, V], added; -inf forbids a token. 0 leaves it alone.
        seen: u32[R, ceil(V/32)], the tokens that the repetition penalty is for.
        repetition: f32[R], above 0; 1 is off.
        allowed: u32[R, ceil(V/32)], the tokens that may be drawn; all ones is off. A row that allows none gets a token that means nothing, and no
            error: the host sees to it that there is one (`penalties.build_adjust` refuses such a row).
    """

    bias: Float[Array, "R V"]
    seen: UInt32[Array, "R words"]
    repetition: Float[Array, "R"]
    allowed: UInt32[Array, "R words"]


@flax.struct.dataclass
class Drawn:
    """What `draw` gives.

    Attributes:
        tokens: i32[R].
        logprob: f32[R], natural logarithm of the token's probability; None where `top` was 0.
        top_ids: i32[R, top], the likeliest tokens, likeliest first, the lowest id first among equals; None where `top` was 0.
        top_logprobs: f32[R, top], theirs; None where `top` was 0.
    """

    tokens: Int[Array, "R"]
    logprob: Float[Array, "R"] | None
    top_ids: Int[Array, "R top"] | None
    top_logprobs: Float[Array, "R top"] | None


def words(vocab: int) -> int:
    """Words of a set of tokens of a vocabulary."""
    return -(-vocab // WORD)


def adjust_logits(logits: Float[Array, "R V"], adjust: Adjust) -> Float[Array, "R V"]:
    """Apply the repetition penalty, then the bias, then the mask, so that nothing undoes the mask.

    A logit that no part of `adjust` is about keeps its bits. What comes out is what temperature and filters are applied to. The order is that of
    transformers; vLLM adds a request's logit_bias before it applies the penalties, so there a repetition penalty scales the bias too.

    Args:
        logits: f32[R, V].
        adjust: for the same rows and vocabulary.

    Returns:
        f32[R, V]; -inf where a token may not be drawn. A finite logit that a penalty takes beyond float32 stays finite.

    Raises:
        ValueError: shapes do not belong together.

    Source: repetition penalty, Keskar et al. 2019 (arXiv:1909.05858), section 4.1, with the sign that transformers gave it.
    """
    rows, vocab = logits.shape
    shapes = (adjust.bias.shape, adjust.seen.shape, adjust.repetition.shape, adjust.allowed.shape)
    if shapes != ((rows, vocab), (rows, words(vocab)), (rows,), (rows, words(vocab))):
        raise ValueError(f"bias, seen, repetition and allowed have shapes {shapes}; logits are {logits.shape} and a set is {words(vocab)} words")
    with jax.named_scope("adjust"):
        rate, limit = adjust.repetition[:, None], np.finfo(np.float32).max
        penalised = jnp.clip(jnp.where(logits > 0, logits / rate, logits * rate), -limit, limit)
        # Selects rather than neutral operands: -0.0 + 0 is 0.0, other bits.
        changed = _members(adjust.seen, vocab) & (rate != 1) & jnp.isfinite(logits)
        adjusted = jnp.where(changed, penalised, logits)
        adjusted = jnp.where(adjust.bias != 0, adjusted + adjust.bias, adjusted)
        return jnp.where(_members(adjust.allowed, vocab), adjusted, -jnp.inf)


def draw(
    logits: Float[Array, "R V"],
    params: SamplingParams,
    position: Int[Array, "R"],
    adjust: Adjust | None = None,
    top: int = 20,
    greedy_only: bool = False,
) -> Drawn:
    """Draw one token per row from its adjusted logits; rows do not influence each other.

    Log probabilities are those of the model's own distribution: log_softmax of `logits` as they came, before adjustments, temperature and filters
    (what vLLM calls raw_logprobs). A token that a mask forces has the log probability that the model gave it.

    Args:
        logits: f32[R, V]. Ids beyond the tokenizer, where the vocabulary is padded, are tokens like others here.
        params: per-row settings.
        position: i32[R], absolute position of the token being drawn.
        adjust: None leaves all rows as they are. Rows of a neutral one get the same tokens as without.
        top: static; likeliest tokens to give, at most V of them. 0 leaves out log probabilities altogether, the drawn token's too.
        greedy_only: static; as in `sampling.sample`.

    Returns:
        Drawn.

    Raises:
        TypeError, ValueError: as `sampling.sample` and `adjust_logits`; or `top` is negative.
    """
    if top < 0:
        raise ValueError(f"top = {top}; it must be 0 or more")
    adjusted = logits if adjust is None else adjust_logits(logits, adjust)
    tokens = sample(adjusted, params, position, greedy_only=greedy_only)
    if not top:
        return Drawn(tokens=tokens, logprob=None, top_ids=None, top_logprobs=None)
    with jax.named_scope("logprobs"):
        total = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        # Of equals top_k takes the lowest id, but -0.0 and 0.0 it does not count as equals. Logits rather than log probabilities: rounding would
        # make more of them equal.
        top_logits, top_ids = jax.lax.top_k(jnp.where(logits == 0, jnp.float32(0), logits), min(top, logits.shape[-1]))
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)
        return Drawn(tokens=tokens, logprob=(chosen - total)[:, 0], top_ids=top_ids.astype(jnp.int32), top_logprobs=top_logits - total)


def _members(sets: UInt32[Array, "R words"], vocab: int) -> Bool[Array, "R V"]:
    bits = (sets[:, :, None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    return bits.reshape(sets.shape[0], -1)[:, :vocab].astype(bool)
