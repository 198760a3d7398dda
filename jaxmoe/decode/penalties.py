"""Count a request's tokens for its penalties, and lay the edits of a batch out as arrays.

Host side, numpy. An edit depends on the settings and on the tokens so far, not on how or when they were counted: a request that was put aside and
rebuilt from its token ids gets the same bits. This file does not know grammars: a grammar's mask comes in as bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxmoe.decode.adjust import WORD, Adjust, words

MAX_BIASES = 1024
MAX_BIAS = 100.0
MAX_PENALTY = 2.0


def check_edits(
    vocab: int,
    presence: float = 0.0,
    frequency: float = 0.0,
    repetition: float = 1.0,
    logit_bias: Mapping[int, float] | None = None,
    min_new_tokens: int = 0,
    eos_ids: Iterable[int] = (),
) -> None:
    """Check a request's settings; see `RowEdits` for what they are.

    Raises:
        ValueError: a value lies outside its range, or an id outside the vocabulary; the message names the setting as requests do, and the value.
    """
    for name, value in (("presence_penalty", presence), ("frequency_penalty", frequency)):
        if not _is_number(value) or not -MAX_PENALTY <= value <= MAX_PENALTY:
            raise ValueError(f"{name} = {value!r} is outside [{-MAX_PENALTY:g}, {MAX_PENALTY:g}]")
    if not _is_number(repetition) or not 0 < _float32(repetition) < math.inf:
        raise ValueError(f"repetition_penalty = {repetition!r}; it must be a float32 above 0 (1 is off)")
    if not _is_integer(min_new_tokens) or min_new_tokens < 0:
        raise ValueError(f"min_new_tokens = {min_new_tokens!r}; it must be an integer, 0 or more")
    for token in eos_ids:
        _check_id("eos_ids", token, vocab)
    biases = logit_bias or {}
    if len(biases) > MAX_BIASES:
        raise ValueError(f"logit_bias has {len(biases)} entries; at most {MAX_BIASES} are taken")
    for token, value in biases.items():
        _check_id("logit_bias", token, vocab)
        if not _is_number(value) or not -MAX_BIAS <= value <= MAX_BIAS:
            raise ValueError(f"logit_bias of token {token} = {value!r} is outside [{-MAX_BIAS:g}, {MAX_BIAS:g}]")


class RowEdits:
    """What one request's penalties and biases do to its next token's logits; `push` takes each token as it comes.

    Presence and frequency are as OpenAI defines them: a token generated c > 0 times loses presence + c * frequency. The repetition penalty is as in
    transformers and vLLM: it divides a positive logit, and multiplies another, of every token of the prompt or of what was generated. A logit_bias of
    -100 is a number like others and forbids nothing.

    Attributes:
        vocab: tokens that it may be about; logits may have more.
        repetition: the repetition penalty, 1 if off.
        generated: tokens pushed.
    """

    def __init__(
        self,
        vocab: int,
        presence: float = 0.0,
        frequency: float = 0.0,
        repetition: float = 1.0,
        logit_bias: Mapping[int, float] | None = None,
        min_new_tokens: int = 0,
        eos_ids: Iterable[int] = (),
        prompt_ids: Sequence[int] = (),
    ):
        """Begin with a prompt.

        Args:
            vocab: ids of all tokens lie below it.
            presence, frequency: in [-2, 2]; 0 is off.
            repetition: above 0; 1 is off.
            logit_bias: token id -> number in [-100, 100] to add, at most `MAX_BIASES`.
            min_new_tokens: end-of-text is forbidden until so many tokens were generated.
            eos_ids: which tokens end a text.
            prompt_ids: the request's prompt.

        Raises:
            ValueError: as `check_edits`; or an id of the prompt is outside the vocabulary.
        """
        eos_ids = tuple(eos_ids)
        check_edits(vocab, presence, frequency, repetition, logit_bias, min_new_tokens, eos_ids)
        self.vocab = vocab
        self.repetition = _float32(repetition)
        self.generated = 0
        self._presence, self._frequency = float(presence), float(frequency)
        self._constant = {int(token): float(value) for token, value in (logit_bias or {}).items() if value}
        self._min_new_tokens, self._eos_ids = min_new_tokens, eos_ids
        self._counts: Counter[int] = Counter()
        biased = self._presence or self._frequency or self._constant or self.eos_forbidden
        # Rows of a vocabulary, kept only where there is something to keep in them.
        self._bias = np.zeros(vocab, np.float32) if biased else None
        self._seen = np.zeros(words(vocab), np.uint32) if self.repetition != 1 else None
        for token in (*self._constant, *(eos_ids if self.eos_forbidden else ())):
            self._update(token)
        for token in prompt_ids:
            _check_id("prompt_ids", token, vocab)
            self._see(token)

    @classmethod
    def of(cls, prompt_ids: Sequence[int], generated_ids: Sequence[int], vocab: int, **settings: Any) -> RowEdits:
        """The state after a prompt and what was generated, the same as if each token had been pushed when it came.

        Args:
            prompt_ids: the request's prompt.
            generated_ids: tokens generated so far.
            vocab, settings: as the constructor's.

        Raises:
            ValueError: as the constructor and `push`.
        """
        edits = cls(vocab, prompt_ids=prompt_ids, **settings)
        for token in generated_ids:
            edits.push(token)
        return edits

    @property
    def eos_forbidden(self) -> bool:
        """Whether end-of-text is forbidden for the next token."""
        return self.generated < self._min_new_tokens and bool(self._eos_ids)

    @property
    def neutral(self) -> bool:
        """Whether the next token's logits stay as they are, whatever was generated so far."""
        return self.repetition == 1 and not (self._presence or self._frequency or self._constant or self.eos_forbidden)

    def push(self, token: int) -> None:
        """Count a generated token.

        Raises:
            ValueError: it is outside the vocabulary.
        """
        _check_id("generated token", token, self.vocab)
        was_forbidden = self.eos_forbidden
        self.generated += 1
        self._see(token)
        if self._presence or self._frequency:
            self._counts[int(token)] += 1
            self._update(token)
        if was_forbidden and not self.eos_forbidden:
            for eos in self._eos_ids:
                self._update(eos)

    def fill(self, bias_row: np.ndarray, seen_row: np.ndarray, allowed_row: np.ndarray | None = None) -> None:
        """Write the edits of the next token; all of both rows is written.

        Args:
            bias_row: f32[at least vocab].
            seen_row: u32[words of bias_row].
            allowed_row: u32[words of bias_row], what a grammar allows. Where that is end-of-text alone, `min_new_tokens` gives way: a text that is
                complete cannot go on.
        """
        bias_row[:], seen_row[:] = 0, 0
        if self._seen is not None:
            seen_row[: self._seen.size] = self._seen
        if self._bias is None:
            return
        bias_row[: self.vocab] = self._bias
        if self.eos_forbidden and allowed_row is not None and not _has_other(allowed_row, self._eos_ids):
            for eos in self._eos_ids:
                bias_row[eos] = self._value(eos)

    def _see(self, token: int) -> None:
        if self._seen is not None:
            self._seen[token // WORD] |= np.uint32(1 << (token % WORD))

    def _update(self, token: int) -> None:
        if self._bias is not None:
            self._bias[token] = -math.inf if self.eos_forbidden and token in self._eos_ids else self._value(token)

    def _value(self, token: int) -> float:
        # From the count each time: sums of rounded steps would depend on the order of the steps.
        count = self._counts[token] if token in self._counts else 0
        return self._constant.get(token, 0.0) - (self._presence if count else 0.0) - self._frequency * count


def build_adjust(edits: Sequence[RowEdits | None], masks: Sequence[np.ndarray | None], rows: int, vocab: int) -> Adjust:
    """Lay out the edits and masks of a batch; rows beyond them are neutral.

    Args:
        edits: of each request; None where there are none.
        masks: u32[words] of each request, the tokens that its grammar allows; None where there is no grammar. Tokens beyond a short mask are
            forbidden.
        rows: R, at least as many as there are requests.
        vocab: V, of the logits; at least that of each `edits`.

    Returns:
        Adjust of numpy arrays.

    Raises:
        ValueError: lengths do not fit, or a row would allow no token.
    """
    if len(edits) != len(masks) or len(edits) > rows:
        raise ValueError(f"{len(edits)} edits and {len(masks)} masks for {rows} rows; there must be one of each per request, and no more than rows")
    bias, repetition = np.zeros((rows, vocab), np.float32), np.ones(rows, np.float32)
    seen, allowed = np.zeros((rows, words(vocab)), np.uint32), np.full((rows, words(vocab)), 2**WORD - 1, np.uint32)
    for row, (edit, mask) in enumerate(zip(edits, masks, strict=True)):
        if mask is not None:
            allowed[row] = _padded_mask(mask, vocab, row)
        if edit is not None and edit.vocab > vocab:
            raise ValueError(f"row {row}: its edits are for {edit.vocab} tokens, the logits have {vocab}")
        if edit is not None:
            edit.fill(bias[row], seen[row], None if mask is None else allowed[row])
            repetition[row] = edit.repetition
    arrays: dict[str, Any] = dict(bias=bias, seen=seen, repetition=repetition, allowed=allowed)  # numpy's stand in for jax's until the step
    return Adjust(**arrays)


def _padded_mask(mask: np.ndarray, vocab: int, row: int) -> np.ndarray:
    if mask.dtype != np.uint32 or mask.ndim != 1 or mask.size > words(vocab):
        raise ValueError(f"row {row}: its mask is {mask.dtype}{list(mask.shape)}; expected uint32 of at most {words(vocab)} words")
    padded = np.zeros(words(vocab), np.uint32)
    padded[: mask.size] = mask
    if vocab % WORD:
        padded[-1] &= np.uint32((1 << (vocab % WORD)) - 1)
    if not padded.any():
        raise ValueError(f"row {row}: its mask allows no token")
    return padded


def _has_other(allowed: np.ndarray, tokens: Iterable[int]) -> bool:
    """Whether a set holds a token other than these."""
    rest = allowed.copy()
    for token in tokens:
        rest[token // WORD] &= ~np.uint32(1 << (token % WORD))
    return bool(rest.any())


def _check_id(what: str, token: Any, vocab: int) -> None:
    if not _is_integer(token) or not 0 <= token < vocab:
        raise ValueError(f"{what}: {token!r} is no token id; they are integers from 0 to {vocab - 1}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def _float32(value: float) -> float:
    try:
        with np.errstate(over="ignore", under="ignore"):
            return float(np.float32(value))
    except OverflowError:  # of an integer beyond float64
        return math.inf
