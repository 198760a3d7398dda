"""What is given to llguidance: sources of grammars, checked and written in its variant of Lark, and the tokenizer's file. And what it answers.

Strings in, strings out; this file imports no llguidance and knows no tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

MAX_SCHEMA_BYTES = 64 * 2**10
MAX_TEXT_BYTES = 8 * 2**10
"""Of a regular expression or a Lark grammar; the time of a mask grows with the square of the worst that can be written in it (8 KiB: 0.2 s)."""
MAX_CHOICES = 4096
MAX_SPACES = 8
"""White space between two marks of JSON that is not compact. Unbounded, a model may write it forever."""
MAX_REASON = 400
JSON_PREFIX = "at 1(8): failed to compile JSON schema: "
NO_TOKEN = "no token of the vocabulary can come next"


class GrammarError(ValueError):
    """A schema or grammar that cannot be used, or that cannot go on; the message says why."""


def schema_as_lark(schema: Mapping[str, Any] | bool | str, compact: bool) -> str:
    """A grammar of the JSON texts that meet a schema; see `GrammarCompiler.json_schema`.

    Args:
        schema: a JSON schema, or its text.
        compact: no white space between marks.

    Raises:
        GrammarError: it is too large or no JSON schema. Whether it can be enforced is not known yet.
    """
    if isinstance(schema, str):
        schema = _parse_json(bounded("a JSON schema", schema, MAX_SCHEMA_BYTES))
    text = bounded("a JSON schema", _json_text(schema), MAX_SCHEMA_BYTES)
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise GrammarError(f"a JSON schema is an object, or true, not {text[:40]}")
    if "x-guidance" in schema:
        raise GrammarError("x-guidance is not taken in a JSON schema: it would change how white space and unknown keywords are dealt with")
    spaces: dict[str, Any] = {"whitespace_flexible": False} if compact else {"whitespace_pattern": rf"[ \t\n\r]{{1,{MAX_SPACES}}}"}
    options = spaces | {"item_separator": ",", "key_separator": ":", "lenient": False, "coerce_one_of": False}
    return "start: %json " + _json_text({**schema, "x-guidance": options})


def choices_as_lark(choices: Sequence[str]) -> str:
    """A grammar of some texts; see `GrammarCompiler.choice`.

    Args:
        choices: the texts.

    Raises:
        GrammarError: there are none or too many, or one is empty.
    """
    if isinstance(choices, str) or not 0 < len(choices) <= MAX_CHOICES:
        raise GrammarError(f"choices must be a list of 1 to {MAX_CHOICES} texts, not {choices!r:.40}")
    for i, text in enumerate(choices):
        if not isinstance(text, str) or not text:
            raise GrammarError(f"choice {i} is {text!r:.40}; it must be text that is not empty")
    # A terminal, not a rule: one lexeme of all texts rather than a parser's alternative for each.
    terminal = "start: TEXT\nTEXT: " + " | ".join(_lark_text(text) for text in choices)
    return bounded("choices", terminal, MAX_SCHEMA_BYTES)


def with_plain_decoder(text: str) -> str:
    """A tokenizer.json in which llguidance finds the bytes of tokens.

    It knows decoders of two kinds: ByteLevel, and a sequence with ByteFallback and Replace. A Metaspace decoder is written as such a sequence, a
    ByteLevel decoder is taken out of its sequence; others stay, and llguidance refuses them.

    Args:
        text: of a tokenizer.json.

    Raises:
        ValueError: it is no JSON.
    """
    try:
        spec = json.loads(text)
    except ValueError as error:
        raise ValueError(f"grammars cannot use this tokenizer: it is no JSON ({error})") from error
    decoder = spec.get("decoder") or {}
    parts = decoder.get("decoders", [decoder])
    kinds = {part.get("type"): part for part in parts}
    if "ByteLevel" in kinds:
        plain: Any = kinds["ByteLevel"]
    elif "Metaspace" in kinds:
        space = {"type": "Replace", "pattern": {"String": kinds["Metaspace"].get("replacement", "\u2581")}, "content": " "}
        plain = {"type": "Sequence", "decoders": [space, {"type": "ByteFallback"}, {"type": "Fuse"}]}
    else:
        return text
    return text if plain == decoder else json.dumps(spec | {"decoder": plain}, ensure_ascii=False)


def bounded(what: str, text: str, limit: int) -> str:
    """A source, once its kind and size were checked.

    Args:
        what: how the error calls it.
        text: the source.
        limit: bytes in UTF-8.

    Raises:
        GrammarError: it is no text, or larger.
    """
    if not isinstance(text, str):
        raise GrammarError(f"{what} must be text, not {type(text).__name__}")
    size = len(text.encode("utf-8", errors="surrogatepass"))
    if size > limit:
        raise GrammarError(f"{what} of {size} bytes is larger than {limit}")
    return text


def _parse_json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is no JSON: {error}") from None


def _json_text(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"the JSON schema is no JSON: {error}") from None


def _lark_text(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # JSON may hold it as it is, a string of Lark may not


def reason(message: str) -> str:
    """llguidance's message in one line, cut to MAX_REASON, without its dump of the parser's state and of a JSON schema's source."""
    message = message.split("<state>")[0].split("\n   1 | start: %json")[0].removeprefix(JSON_PREFIX)
    line = " ".join(message.replace("<non-verbose/>", "").split())
    if line in ("NoExtension", "NoExtensionBias"):
        line = NO_TOKEN
    return line if len(line) <= MAX_REASON else line[: MAX_REASON - 3] + "..."
