"""OpenAI's requests for completions and chats, read strictly into `ServeRequest`s. Pure functions of the body; no HTTP, no engine.

Names are OpenAI's, and vLLM's for what OpenAI doesn't have (top_k, min_p, repetition_penalty, ignore_eos, min_tokens, priority, guided_*,
truncate_prompt_tokens, chat_template_kwargs). What isn't known or isn't supported is refused by its name, never ignored.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmoe.engine.generate import Sampling
from jaxmoe.engine.serving.requests import MOST_LOGPROBS, ServeRequest
from jaxmoe.server.errors import ApiError, shown, wrong
from jaxmoe.server.fields import boolean, check_known, integer, number, string, table
from jaxmoe.server.guides import GUIDES, grammar_text
from jaxmoe.server.prompts import Served, chat_prompt, plain_prompts, truncate

COMPLETION_TOKENS = 16  # OpenAI's default for /v1/completions
MOST_STOPS, STOP_CHARS = 16, 256
MOST_BIASES = 1024
MOST_LAST_SEED = 2**32 - 1

SHARED = {
    "model", "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "presence_penalty",
    "frequency_penalty", "logit_bias", "logprobs", "user", "top_k", "min_p", "repetition_penalty", "ignore_eos", "min_tokens", "priority",
    "truncate_prompt_tokens", "response_format", *GUIDES,
}  # fmt: skip
COMPLETION = SHARED | {"prompt", "echo"}
CHAT = SHARED | {"messages", "top_logprobs", "chat_template_kwargs"}
UNSUPPORTED = {
    "best_of", "suffix", "tools", "tool_choice", "functions", "function_call", "parallel_tool_calls", "audio", "modalities", "prediction",
    "reasoning_effort", "service_tier", "store", "metadata", "verbosity", "web_search_options", "prompt_cache_key", "safety_identifier",
    "add_generation_prompt", "continue_final_message", "documents", "chat_template", "guided_decoding_backend", "guided_whitespace_pattern",
    "structured_outputs", "use_beam_search", "length_penalty", "stop_token_ids", "prompt_logprobs", "allowed_token_ids", "bad_words",
    "skip_special_tokens", "spaces_between_special_tokens", "include_stop_str_in_output", "return_tokens_as_token_ids",
}  # fmt: skip
"""Fields that OpenAI, or vLLM, knows and this server doesn't."""


@dataclasses.dataclass(frozen=True)
class Call:
    """A request that was read.

    Attributes:
        chat: to /v1/chat/completions.
        requests: one for each prompt.
        n: answers to each prompt.
        stream, include_usage: how they are to be sent.
        logprobs: as of the requests.
        echo: the prompts' texts, where they are to come before the answers; else ().
        truncated: tokens that were taken off the beginning of each prompt.
    """

    chat: bool
    requests: tuple[ServeRequest, ...]
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    logprobs: int | None = None
    echo: tuple[str, ...] = ()
    truncated: tuple[int, ...] = ()

    @property
    def choices(self) -> int:
        """Answers in all; those to prompt i are i * n to i * n + n - 1."""
        return len(self.requests) * self.n


def parse_completion(body: Mapping[str, Any], served: Served, seed: int) -> Call:
    """Reads the body of POST /v1/completions.

    Args:
        body: as `fields.read_object` gives it.
        served: what it is read against.
        seed: below 2**31, for a request that names none.

    Returns:
        The call; nothing in it was changed silently.

    Raises:
        ApiError: 400, or 404 for another model's name.
    """
    check_known(body, COMPLETION, UNSUPPORTED)
    _check_model(body, served)
    prompts = plain_prompts(body, served)
    logprobs, echo = integer(body, "logprobs", None, 0, MOST_LOGPROBS), boolean(body, "echo")
    if echo and logprobs is not None:
        raise ApiError(400, "echo with logprobs isn't supported: log probabilities of a prompt aren't computed", param="echo")
    return _call(body, served, seed, prompts, False, logprobs, echo)


def parse_chat(body: Mapping[str, Any], served: Served, seed: int) -> Call:
    """Reads the body of POST /v1/chat/completions. Arguments, result and errors as of `parse_completion`."""
    check_known(body, CHAT, UNSUPPORTED)
    _check_model(body, served)
    prompt = chat_prompt(body, served)
    wanted, top = boolean(body, "logprobs"), integer(body, "top_logprobs", None, 0, MOST_LOGPROBS)
    if top is not None and not wanted:
        raise ApiError(400, f"top_logprobs is {top}, which needs logprobs to be true", param="top_logprobs")
    return _call(body, served, seed, [prompt], True, (top or 0) if wanted else None, False)


def _call(body: Mapping[str, Any], served: Served, seed: int, prompts: list[list[int]], chat: bool, logprobs: int | None, echo: bool) -> Call:
    n = integer(body, "n", 1, 1, served.max_choices) or 1
    if n * len(prompts) > served.max_sequences:
        message = f"{len(prompts)} prompts with n {n} are {n * len(prompts)} sequences; at most {served.max_sequences} are taken"
        raise ApiError(400, message, param="n")
    stream = boolean(body, "stream")
    options = {name: value for name, value in table(body, "stream_options").items() if value is not None}
    if options and not stream:
        raise ApiError(400, "stream_options needs stream to be true", param="stream_options")
    check_known(options, {"include_usage"}, (), "stream_options.")
    kept = [truncate(body, prompt, served) for prompt in prompts]
    shared, own_seeds = _settings(body, served, n, logprobs), integer(body, "seed", None, 0, MOST_LAST_SEED - (n - 1))
    requests = []
    for i, prompt in enumerate(kept):
        # Prompts of one request share a seed that was asked for, so that what each gives doesn't depend on its place; else they have their own.
        sampling = dataclasses.replace(shared.sampling, seed=(seed + i * n) % 2**31 if own_seeds is None else own_seeds)
        tokens = _new_tokens(body, len(prompt), served, chat)
        if shared.min_new_tokens > tokens:
            raise ApiError(400, f"min_tokens is {shared.min_new_tokens}, more than the {tokens} new tokens at most", param="min_tokens")
        requests.append(dataclasses.replace(shared, prompt_ids=tuple(prompt), max_new_tokens=tokens, sampling=sampling))
    return Call(
        chat=chat, requests=tuple(requests), n=n, stream=stream, include_usage=boolean(options, "include_usage"), logprobs=logprobs,
        echo=tuple(served.tokenizer.decode(prompt, skip_special_tokens=False) for prompt in kept) if echo else (),
        truncated=tuple(len(prompt) - len(rest) for prompt, rest in zip(prompts, kept, strict=True)),
    )  # fmt: skip


def _settings(body: Mapping[str, Any], served: Served, n: int, logprobs: int | None) -> ServeRequest:
    """All that the sequences of a request share; its prompt is empty."""
    top_k = integer(body, "top_k", 0, -1)
    # OpenAI's default is 1, the model's own distribution.
    temperature, top_p, min_p = number(body, "temperature", 1, 0, 2), number(body, "top_p", 1, 0, 1), number(body, "min_p", 0, 0, 1)
    return ServeRequest(
        prompt_ids=(),
        max_new_tokens=0,
        sampling=Sampling(temperature=temperature, top_k=max(top_k or 0, 0), top_p=top_p, min_p=min_p),  # -1 is off, as in vLLM
        stop=_stops(body),
        logprobs=logprobs,
        presence_penalty=number(body, "presence_penalty", 0, -2, 2),
        frequency_penalty=number(body, "frequency_penalty", 0, -2, 2),
        repetition_penalty=number(body, "repetition_penalty", 1, 0, open_low=True),
        logit_bias=_biases(body),
        grammar=_grammar(body, served),
        ignore_eos=boolean(body, "ignore_eos"),
        min_new_tokens=integer(body, "min_tokens", 0) or 0,
        priority=-(integer(body, "priority", 0, -(2**31)) or 0),  # smaller goes first in vLLM's protocol, larger in the engine
        user=string(body, "user", "") or "",
    )


def _check_model(body: Mapping[str, Any], served: Served) -> None:
    name = string(body, "model")
    if name is None:
        raise ApiError(400, f"model is missing; this server has {served.model!r}", param="model", code="missing_parameter")
    if name != served.model:
        raise ApiError(404, f"there is no model {shown(name)}; this server has {served.model!r}", param="model", code="model_not_found")


def _new_tokens(body: Mapping[str, Any], prompt: int, served: Served, chat: bool) -> int:
    """New tokens at most; a 400 with the three numbers where the prompt and they don't fit."""
    plain, named = integer(body, "max_tokens", None, 1), integer(body, "max_completion_tokens", None, 1)
    if plain is not None and named is not None and plain != named:
        raise ApiError(400, f"max_tokens is {plain} and max_completion_tokens {named}: give one of them", param="max_tokens")
    wanted = plain if plain is not None else named
    room = served.positions - prompt
    if room < (wanted or 1):
        param = "messages" if chat else "prompt"
        asked = f"max_tokens is {wanted}" if wanted is not None else "one new token at least is needed"
        message = f"the prompt has {prompt} tokens and {asked}, together {prompt + (wanted or 1)}; the model has {served.positions} positions"
        raise ApiError(400, message, param=param, code="context_length_exceeded")
    return min(served.default_tokens if chat else COMPLETION_TOKENS, room) if wanted is None else wanted


def _stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    value = body.get("stop", [])
    stops: Sequence[Any] = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise wrong("stop", f"a string or a list of at most {MOST_STOPS} strings", value)
    for stop in stops:
        if not 0 < len(stop) <= STOP_CHARS:
            raise wrong("stop", f"strings of 1 to {STOP_CHARS} characters", stop)
    return tuple(stops)


def _biases(body: Mapping[str, Any]) -> dict[int, float]:
    given = table(body, "logit_bias")
    if len(given) > MOST_BIASES:
        raise ApiError(400, f"logit_bias has {len(given)} entries; at most {MOST_BIASES} are taken", param="logit_bias")
    for key in given:
        if not re.fullmatch("[0-9]{1,9}", key):
            raise ApiError(400, f"logit_bias has the key {shown(key)}; keys are token ids in digits", param="logit_bias")
    return {int(key): number(given, key, 0, -100, 100, where="logit_bias.") for key in given}


def _grammar(body: Mapping[str, Any], served: Served) -> Any:
    found = grammar_text(body)
    if found is None:
        return None
    param, kind, text = found
    if served.compile_grammar is None:
        raise ApiError(400, f"{param} isn't supported: this server runs without grammars", param=param, code="unsupported_parameter")
    try:
        return served.compile_grammar(kind, text)
    except ValueError as error:
        raise ApiError(400, f"{param}: {error}", param=param, code="invalid_grammar") from None
