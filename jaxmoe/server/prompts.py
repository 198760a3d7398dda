"""Prompts: token ids from strings, from lists of them, and from the messages of a chat. Pure functions of the body and the tokenizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.engine.text import TextError
from jaxmoe.server.errors import ApiError, shown, wrong
from jaxmoe.server.fields import check_known, integer, is_int, table

ROLES = ("system", "developer", "user", "assistant")


@dataclasses.dataclass(frozen=True)
class Served:
    """What a request is read against.

    Attributes:
        model: the name that requests have to give.
        tokenizer: a `jaxmoe.engine.text.Tokenizer`, or what has its encode, decode, chat, chat_template and folder.
        positions: the longest sequence, prompt and new tokens together.
        default_tokens, allow_truncation, max_choices, max_prompts, max_sequences: see `ServerSettings`.
        compile_grammar: (kind, text) -> what `ServeRequest.grammar` takes, see `guides.grammar_text`; it raises ValueError for a grammar that is
            wrong. None: this server has no grammars.
    """

    model: str
    tokenizer: Any
    positions: int
    default_tokens: int = 1024
    allow_truncation: bool = False
    max_choices: int = 16
    max_prompts: int = 64
    max_sequences: int = 128
    compile_grammar: Callable[[str, str], Any] | None = None


def plain_prompts(body: Mapping[str, Any], served: Served) -> list[list[int]]:
    """Token ids of each prompt of a completion, which gives them as a string, a list of strings, a list of ids or a list of such lists.

    Args:
        body: with `prompt`.
        served: what it is read against.

    Raises:
        ApiError: 400, for another type, too many prompts, or an empty one. Whether ids are in the vocabulary is the engine's to say.
    """
    value = body.get("prompt")
    if value is None:
        raise ApiError(400, "prompt is missing", param="prompt", code="missing_parameter")
    several = isinstance(value, list) and not all(is_int(item) for item in value)
    given = value if several else [value]
    if len(given) > served.max_prompts:
        raise ApiError(400, f"prompt has {len(given)} prompts; at most {served.max_prompts} are taken", param="prompt")
    return [_prompt_ids(item, value, served) for item in given]


def _prompt_ids(item: Any, value: Any, served: Served) -> list[int]:
    if isinstance(item, str):
        return _encode(item, served, "prompt", add_special_tokens=True)
    if not isinstance(item, list) or not all(is_int(id) for id in item):
        raise wrong("prompt", "a string, a list of strings, a list of token ids or a list of such lists", value)
    if not item:
        raise ApiError(400, "prompt is empty: it needs one token at least", param="prompt")
    for id in item:
        if not 0 <= id < 2**31:
            raise ApiError(400, f"prompt has the token id {shown(id)}, which no vocabulary has", param="prompt")
    return list(item)


def chat_prompt(body: Mapping[str, Any], served: Served) -> list[int]:
    """Token ids of a chat, as the model's template writes it.

    Args:
        body: with `messages`, whose contents are text, and perhaps `chat_template_kwargs` for the template.
        served: what it is read against.

    Raises:
        ApiError: 400, for a malformed message, one that the template refuses, or a model without a template.
    """
    if served.tokenizer.chat_template is None:
        raise ApiError(400, f"model {served.model!r} has no chat template; /v1/completions takes its prompts as they are", param="messages")
    messages = body.get("messages")
    if messages is None:
        raise ApiError(400, "messages is missing", param="messages", code="missing_parameter")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", "a list of one message at least", messages)
    variables = table(body, "chat_template_kwargs")
    own = {"self", "messages", "tools", "documents", "add_generation_prompt", *getattr(served.tokenizer, "special_tokens", {})}
    if taken := sorted(own & set(variables)):
        raise ApiError(400, f"chat_template_kwargs may not set {taken[0]}", param="chat_template_kwargs")
    try:
        text = served.tokenizer.chat([_message(i, message) for i, message in enumerate(messages)], **variables)
    except TextError as error:
        raise ApiError(400, _without_folder(error, served), param="messages") from None
    return _encode(text, served, "messages", add_special_tokens=False)


def _message(i: int, message: Any) -> dict[str, str]:
    where = f"messages[{i}]"
    if not isinstance(message, dict):
        raise wrong(where, "an object with role and content", message)
    given = {name: value for name, value in message.items() if value is not None}
    unsupported = {"tool_calls", "tool_call_id", "function_call", "audio", "refusal", "reasoning_content", "reasoning"}
    check_known(given, {"role", "content", "name"}, unsupported, f"{where}.")
    role = given.get("role")
    if role not in ROLES:
        raise wrong(f"{where}.role", "one of " + ", ".join(ROLES), role)
    found = {"role": role, "content": _content(given.get("content"), f"{where}.content")}
    if "name" in given:
        if not isinstance(given["name"], str):
            raise wrong(f"{where}.name", "a string", given["name"])
        found["name"] = given["name"]
    return found


def _content(content: Any, where: str) -> str:
    """The text of a message; its parts follow each other as they are, with nothing between."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise wrong(where, "a string or a list of text parts", content)
    texts = []
    for i, part in enumerate(content):
        if not isinstance(part, dict) or set(part) != {"type", "text"} or part["type"] != "text" or not isinstance(part["text"], str):
            raise wrong(f"{where}[{i}]", 'a text part, {"type": "text", "text": ...}: nothing else is supported', part)
        texts.append(part["text"])
    return "".join(texts)


def _encode(text: str, served: Served, param: str, add_special_tokens: bool) -> list[int]:
    try:
        ids = served.tokenizer.encode(text, add_special_tokens=add_special_tokens)
    except TextError as error:
        raise ApiError(400, _without_folder(error, served), param=param) from None
    if not ids:
        raise ApiError(400, f"{param} is empty: it needs one token at least", param=param)
    return ids


def _without_folder(error: TextError, served: Served) -> str:
    """What a tokenizer says, with the model's name where it names a folder of the server's."""
    return str(error).replace(str(served.tokenizer.folder), served.model)


def truncate(body: Mapping[str, Any], prompt: list[int], served: Served) -> list[int]:
    """The end of a prompt, as long as `truncate_prompt_tokens` says; a 400 where the server doesn't allow that."""
    most = integer(body, "truncate_prompt_tokens", None, 1)
    if most is None:
        return prompt
    if not served.allow_truncation:
        raise ApiError(400, "truncate_prompt_tokens isn't allowed by this server", param="truncate_prompt_tokens", code="unsupported_parameter")
    return prompt[-most:]
