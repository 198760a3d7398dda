"""What a text has to follow, as requests say it: OpenAI's response_format and vLLM's guided_*. Gives a kind and a text; knows no compiler."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from jaxmoe.server.errors import ApiError, wrong
from jaxmoe.server.fields import boolean, check_known

GUIDES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
KINDS = ("json_object", "json_schema", "regex", "choice", "lark")


def grammar_text(body: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """What a request's text has to follow.

    Args:
        body: the request; of response_format and `GUIDES` it may have one.

    Returns:
        (field, kind, text), or None. By kind, the text is: json_object "", json_schema a schema in JSON, regex and lark themselves, choice a
        list of strings in JSON.

    Raises:
        ApiError: 400, where two are given, or one is malformed. Whether a schema or grammar is right is its compiler's to say.
    """
    given = [name for name in ("response_format", *GUIDES) if name in body]
    if len(given) > 1:
        raise ApiError(400, f"{given[0]} and {given[1]} are given: a text can follow one of them", param=given[1])
    if not given:
        return None
    name, value = given[0], body[given[0]]
    if name == "response_format":
        return _response_format(value)
    if name == "guided_json":
        return name, "json_schema", _schema(value, name)
    if name == "guided_choice":
        if not isinstance(value, list) or not value or not all(isinstance(item, str) and item for item in value):
            raise wrong(name, "a list of strings, none of them empty", value)
        return name, "choice", json.dumps(value)
    if not isinstance(value, str) or not value:
        raise wrong(name, "a string that isn't empty", value)
    return name, "regex" if name == "guided_regex" else "lark", value


def compile_with(compiler: Any) -> Callable[[str, str], Any]:
    """What `Served.compile_grammar` takes, made of a `jaxmoe.decode.grammar.GrammarCompiler`, or what has its methods.

    Args:
        compiler: has a method for each of `KINDS`.

    Returns:
        (kind, text), as of `grammar_text`, -> a grammar; it raises what the compiler raises, a ValueError for a grammar that is wrong.
    """

    def compile_text(kind: str, text: str) -> Any:
        if kind == "json_object":
            return compiler.json_object()
        if kind == "choice":
            return compiler.choice(json.loads(text))
        return {"json_schema": compiler.json_schema, "regex": compiler.regex, "lark": compiler.lark}[kind](text)

    return compile_text


def _response_format(value: Any) -> tuple[str, str, str] | None:
    name = "response_format"
    if not isinstance(value, dict) or value.get("type") not in ("text", "json_object", "json_schema"):
        raise wrong(name, 'an object whose type is "text", "json_object" or "json_schema"', value)
    kind = value["type"]
    check_known(value, {"type", "json_schema"} if kind == "json_schema" else {"type"}, (), f"{name}.")
    if kind != "json_schema":
        return None if kind == "text" else (name, kind, "")
    inner = value.get("json_schema")
    if not isinstance(inner, dict):
        raise wrong(f"{name}.json_schema", "an object with name and schema", inner)
    inner = {key: item for key, item in inner.items() if item is not None}
    check_known(inner, {"name", "description", "schema", "strict"}, (), f"{name}.json_schema.")
    boolean(inner, "strict")  # the text always follows the schema
    if "schema" not in inner:
        raise ApiError(400, f"{name}.json_schema.schema is missing", param=name, code="missing_parameter")
    return name, kind, _schema(inner["schema"], f"{name}.json_schema.schema")


def _schema(value: Any, where: str) -> str:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"{where} is no valid JSON: {error}", param=where) from None
    if not isinstance(value, dict | bool):
        raise wrong(where, "a JSON schema: an object, or true or false", value)
    return json.dumps(value)
