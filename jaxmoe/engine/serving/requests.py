"""What a user asks of a serving engine, and what a step gives back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxmoe.engine.generate import RequestError, Sampling

MOST_LOGPROBS = 20
"""The likeliest tokens that a request may ask to see at each position."""


class QueueFull(RequestError):
    """A request that is turned away because as many as may wait are waiting."""


@dataclasses.dataclass(frozen=True)
class ServeRequest:
    """One sequence to continue, with all that can be asked for.

    Attributes:
        prompt_ids, max_new_tokens, sampling, stop: as of `jaxmoe.engine.generate.Request`.
        logprobs: None for none; else of the chosen token and so many of the likeliest, 0 to `MOST_LOGPROBS`.
        presence_penalty, frequency_penalty, repetition_penalty, logit_bias, min_new_tokens: see `jaxmoe.decode.penalties.RowEdits`.
        grammar: a `jaxmoe.decode.grammar.Grammar` that the text has to follow.
        ignore_eos: go on after an end-of-text id.
        priority: larger goes first, under an objective that weighs it.
        user: whose request it is, under an objective that is fair to users.
        expected: new tokens that it is expected to give; 0 where nobody knows.
    """

    prompt_ids: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    grammar: Any = None
    ignore_eos: bool = False
    min_new_tokens: int = 0
    priority: int = 0
    user: str = ""
    expected: int = 0


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """A token's log probability under the model, and the likeliest tokens with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Event:
    """What a step gave one request.

    Attributes:
        id: the request's number.
        ids: new token ids, the end-of-text id included.
        text: text that has become final.
        logprobs: one for each id, where asked for.
        finish_reason: 'stop', 'length', 'abort' or 'error' when it is over, else None.
        stop_string: the one that ended it.
        error: what went wrong.
        cached_tokens: tokens of the prompt whose keys and values were there already.
    """

    id: int
    ids: tuple[int, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: str | None = None
    stop_string: str | None = None
    error: str | None = None
    cached_tokens: int = 0
