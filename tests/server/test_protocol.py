"""Requests read: what each field becomes, and that every wrong one is refused by name. About 3 seconds."""

import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.decode.grammar import GrammarCompiler
from jaxmoe.engine.text import Tokenizer
from jaxmoe.server.errors import ApiError
from jaxmoe.server.fields import read_object
from jaxmoe.server.guides import KINDS, compile_with
from jaxmoe.server.prompts import Served
from jaxmoe.server.protocol import CHAT, COMPLETION, parse_chat, parse_completion
from jaxmoe.server.service import parse
from tests.server.fake_engine import MODEL_FOLDER

TOKENIZER = Tokenizer(MODEL_FOLDER)


def compile_grammar(kind, text):
    if "wrong" in text:
        raise ValueError(f"{kind} is wrong")
    return kind, text


SERVED = Served(model="fake", tokenizer=TOKENIZER, positions=128, default_tokens=40, compile_grammar=compile_grammar)
PLAIN = {"model": "fake", "prompt": "the river and a stone"}
TALK = {"model": "fake", "messages": [{"role": "user", "content": "the river"}]}
PROMPT = len(TOKENIZER.encode(PLAIN["prompt"]))


def completion(served=SERVED, **fields):
    return parse_completion({name: value for name, value in (PLAIN | fields).items() if value is not None}, served, 7)


def chat(served=SERVED, **fields):
    return parse_chat({name: value for name, value in (TALK | fields).items() if value is not None}, served, 7)


def test_a_plain_completion():
    call = completion()
    (request,) = call.requests
    assert request.prompt_ids == tuple(TOKENIZER.encode(PLAIN["prompt"]))
    assert (request.max_new_tokens, request.sampling.temperature, request.sampling.seed) == (16, 1.0, 7)
    assert (call.n, call.stream, call.logprobs, call.echo, call.truncated) == (1, False, None, (), (0,))


def test_every_field_arrives():
    call = completion(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, n=2, stop=["x", "y"], seed=11, stream=True, user="me",
        stream_options={"include_usage": True}, presence_penalty=-1, frequency_penalty=2, repetition_penalty=1.5, logit_bias={"5": -100, "7": 1.5},
        logprobs=3, ignore_eos=True, min_tokens=4, priority=3, guided_regex="a+",
    )  # fmt: skip
    (request,) = call.requests
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p, sampling.seed) == (0.5, 0.9, 3, 0.1, 11)
    assert (request.max_new_tokens, request.stop, request.user, request.logprobs, request.ignore_eos) == (9, ("x", "y"), "me", 3, True)
    assert (request.presence_penalty, request.frequency_penalty, request.repetition_penalty) == (-1, 2, 1.5)
    assert request.logit_bias == {5: -100, 7: 1.5} and request.min_new_tokens == 4 and request.grammar == ("regex", "a+")
    assert request.priority == -3, "a smaller number goes first in the protocol, a larger one in the engine"
    assert (call.n, call.stream, call.include_usage, call.logprobs) == (2, True, True, 3)


def test_prompts_in_all_shapes():
    ids = [5, 6, 7]
    assert [r.prompt_ids for r in completion(prompt=ids).requests] == [(5, 6, 7)]
    assert [r.prompt_ids for r in completion(prompt=[ids, [9]]).requests] == [(5, 6, 7), (9,)]
    texts = completion(prompt=["the river", "a stone"], echo=True)
    assert [r.prompt_ids for r in texts.requests] == [tuple(TOKENIZER.encode(t)) for t in ("the river", "a stone")]
    assert texts.echo == ("the river", "a stone")
    assert [r.prompt_ids for r in completion(prompt=["the", [5]]).requests] == [tuple(TOKENIZER.encode("the")), (5,)]


def test_seeds_of_several_prompts():
    assert [r.sampling.seed for r in completion(prompt=["a", "b"], n=3).requests] == [7, 10], "n answers to a prompt take seed, seed + 1, ..."
    assert [r.sampling.seed for r in completion(prompt=["a", "b"], n=3, seed=5).requests] == [5, 5]


def test_a_chat_takes_the_template_and_the_room_that_is_left():
    (request,) = chat().requests
    assert TOKENIZER.decode(request.prompt_ids, skip_special_tokens=False) == "<|im_start|>user\nthe river<|im_end|>\n<|im_start|>assistant\n"
    assert request.max_new_tokens == 40
    (request,) = chat(served=Served("fake", TOKENIZER, positions=30)).requests
    assert request.max_new_tokens == 30 - len(request.prompt_ids)
    parts = [{"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "river"}]}]
    assert chat(messages=parts).requests[0].prompt_ids == chat().requests[0].prompt_ids
    assert chat(logprobs=True).logprobs == 0 and chat(logprobs=True, top_logprobs=4).requests[0].logprobs == 4
    assert chat(max_completion_tokens=5).requests[0].max_new_tokens == 5


@pytest.mark.parametrize("more", [-1, 0, 1])
def test_positions_are_an_exact_bound(more):
    tokens = 128 - PROMPT + more
    if more <= 0:
        assert completion(max_tokens=tokens).requests[0].max_new_tokens == tokens
        return
    with pytest.raises(ApiError) as error:
        completion(max_tokens=tokens)
    assert error.value.status == 400 and error.value.code == "context_length_exceeded"
    for number in (PROMPT, tokens, 128):
        assert str(number) in error.value.message.split() or f"{number}," in error.value.message, error.value.message


def test_default_new_tokens_shrink_to_the_room_but_never_to_none():
    assert completion(prompt=[5] * 120).requests[0].max_new_tokens == 8
    with pytest.raises(ApiError, match="128 tokens"):
        completion(prompt=[5] * 128)


def test_truncation_only_where_allowed_keeps_the_end():
    with pytest.raises(ApiError, match="truncate_prompt_tokens isn't allowed"):
        completion(truncate_prompt_tokens=2)
    allowed = Served("fake", TOKENIZER, 128, allow_truncation=True)
    call = completion(allowed, prompt=[[1, 2, 3, 4], [5]], truncate_prompt_tokens=2)
    assert [r.prompt_ids for r in call.requests] == [(3, 4), (5,)] and call.truncated == (2, 0)


def test_response_formats():
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert chat(response_format={"type": "text"}).requests[0].grammar is None
    assert chat(response_format={"type": "json_object"}).requests[0].grammar == ("json_object", "")
    wrapped = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for fields in ({"response_format": wrapped}, {"guided_json": schema}, {"guided_json": json.dumps(schema)}):
        kind, text = chat(**fields).requests[0].grammar
        assert kind == "json_schema" and json.loads(text) == schema
    assert chat(guided_choice=["a", "b"]).requests[0].grammar == ("choice", '["a", "b"]')
    assert chat(guided_grammar="start: /a/").requests[0].grammar == ("lark", "start: /a/")


def test_every_kind_of_grammar_has_its_compiler():
    compiler = GrammarCompiler(MODEL_FOLDER / "tokenizer.json", TOKENIZER.vocab_size, TOKENIZER.eos_ids)
    served = Served("fake", TOKENIZER, 128, compile_grammar=compile_with(compiler))
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
    right = {
        "json_schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}, '{"a":12}'),
        "json_object": ({"response_format": {"type": "json_object"}}, '{"b":[1,"x"]}'),
        "regex": ({"guided_regex": "[ab]+c"}, "abbac"),
        "choice": ({"guided_choice": ["yes", "no"]}, "no"),
        "lark": ({"guided_grammar": 'start: "x" /[0-9]+/'}, "x77"),
    }
    assert set(right) == set(KINDS)
    for fields, text in right.values():
        matcher = chat(served, **fields).requests[0].grammar.matcher()
        assert all(matcher.consume(token) for token in TOKENIZER.encode(text)) and matcher.accepting
        assert not chat(served, **fields).requests[0].grammar.matcher().consume(TOKENIZER.encode("zebra")[0])
    for fields in ({"guided_regex": "("}, {"guided_grammar": "no grammar"}, {"guided_json": {"type": "no type"}}):
        with pytest.raises(ApiError) as error:
            chat(served, **fields)
        assert (error.value.status, error.value.code) == (400, "invalid_grammar")


COMPLETION_REFUSALS = {
    "no_model": ({"model": None}, "model", "fake"),
    "model_type": ({"model": 3}, "model", "3"),
    "no_prompt": ({"prompt": None}, "prompt", "missing"),
    "prompt_type": ({"prompt": 5}, "prompt", "5"),
    "prompt_object": ({"prompt": {"a": 1}}, "prompt", "{'a': 1}"),
    "prompt_empty": ({"prompt": ""}, "prompt", "empty"),
    "prompt_empty_list": ({"prompt": []}, "prompt", "empty"),
    "prompt_empty_inside": ({"prompt": [[]]}, "prompt", "empty"),
    "prompt_mixed": ({"prompt": [1, "a"]}, "prompt", "[1, 'a']"),
    "prompt_bool": ({"prompt": [True]}, "prompt", "[True]"),
    "prompt_negative": ({"prompt": [-1]}, "prompt", "-1"),
    "prompt_surrogate": ({"prompt": "\ud800"}, "prompt", "can't encode"),
    "too_many_prompts": ({"prompt": ["a"] * 65}, "prompt", "65"),
    "too_many_sequences": ({"prompt": ["a"] * 64, "n": 3}, "n", "192"),
    "best_of": ({"best_of": 2}, "best_of", "isn't supported"),
    "suffix": ({"suffix": "x"}, "suffix", "isn't supported"),
    "tools": ({"tools": []}, "tools", "isn't supported"),
    "unknown": ({"temprature": 1}, "temprature", "unknown field"),
    "messages": ({"messages": []}, "messages", "unknown field"),
    "max_tokens_type": ({"max_tokens": "9"}, "max_tokens", "'9'"),
    "max_tokens_float": ({"max_tokens": 9.0}, "max_tokens", "9.0"),
    "max_tokens_bool": ({"max_tokens": True}, "max_tokens", "True"),
    "max_tokens_zero": ({"max_tokens": 0}, "max_tokens", "0"),
    "max_tokens_huge": ({"max_tokens": 10**30}, "max_tokens", "10000"),
    "two_max_tokens": ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "give one"),
    "temperature_high": ({"temperature": 2.1}, "temperature", "2.1"),
    "temperature_low": ({"temperature": -0.1}, "temperature", "-0.1"),
    "temperature_type": ({"temperature": "hot"}, "temperature", "'hot'"),
    "temperature_infinite": ({"temperature": float("inf")}, "temperature", "inf"),
    "top_p": ({"top_p": 1.1}, "top_p", "1.1"),
    "min_p": ({"min_p": -1}, "min_p", "-1"),
    "top_k": ({"top_k": -2}, "top_k", "-2"),
    "n_zero": ({"n": 0}, "n", "0"),
    "n_many": ({"n": 17}, "n", "17"),
    "seed_negative": ({"seed": -1}, "seed", "-1"),
    "seed_large": ({"seed": 2**32}, "seed", str(2**32)),
    "seed_of_last": ({"seed": 2**32 - 1, "n": 2}, "seed", str(2**32 - 1)),
    "stop_type": ({"stop": 3}, "stop", "3"),
    "stop_inside": ({"stop": ["a", 3]}, "stop", "['a', 3]"),
    "stop_empty": ({"stop": ["a", ""]}, "stop", "''"),
    "stop_many": ({"stop": ["a"] * 17}, "stop", "16"),
    "stop_long": ({"stop": "a" * 257}, "stop", "256"),
    "stream_type": ({"stream": "yes"}, "stream", "'yes'"),
    "options_without_stream": ({"stream_options": {"include_usage": True}}, "stream_options", "stream"),
    "options_unknown": ({"stream": True, "stream_options": {"x": 1}}, "x", "stream_options.'x'"),
    "options_type": ({"stream": True, "stream_options": 3}, "stream_options", "3"),
    "usage_type": ({"stream": True, "stream_options": {"include_usage": 1}}, "include_usage", "1"),
    "presence_penalty": ({"presence_penalty": 2.5}, "presence_penalty", "2.5"),
    "frequency_penalty": ({"frequency_penalty": -2.5}, "frequency_penalty", "-2.5"),
    "repetition_penalty": ({"repetition_penalty": 0}, "repetition_penalty", "more than 0"),
    "bias_type": ({"logit_bias": [1]}, "logit_bias", "[1]"),
    "bias_key": ({"logit_bias": {"a": 1}}, "logit_bias", "'a'"),
    "bias_value": ({"logit_bias": {"5": 101}}, "logit_bias.5", "101"),
    "bias_many": ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias", "1025"),
    "logprobs_bool": ({"logprobs": True}, "logprobs", "True"),
    "logprobs_many": ({"logprobs": 21}, "logprobs", "21"),
    "echo_logprobs": ({"echo": True, "logprobs": 1}, "echo", "logprobs"),
    "user": ({"user": 3}, "user", "3"),
    "ignore_eos": ({"ignore_eos": 1}, "ignore_eos", "1"),
    "min_tokens": ({"min_tokens": 17}, "min_tokens", "17"),
    "priority": ({"priority": 1.5}, "priority", "1.5"),
    "two_guides": ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "guided_json"),
    "guided_json": ({"guided_json": "{"}, "guided_json", "no valid JSON"),
    "guided_json_type": ({"guided_json": 3}, "guided_json", "3"),
    "guided_choice": ({"guided_choice": []}, "guided_choice", "[]"),
    "guided_choice_inside": ({"guided_choice": [1]}, "guided_choice", "[1]"),
    "guided_regex": ({"guided_regex": ""}, "guided_regex", "''"),
    "grammar_wrong": ({"guided_grammar": "wrong"}, "guided_grammar", "lark is wrong"),
    "format_type": ({"response_format": {"type": "xml"}}, "response_format", "xml"),
    "format_unknown": ({"response_format": {"type": "text", "x": 1}}, "x", "response_format.'x'"),
    "format_no_schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "a"}}}, "response_format", "missing"),
    "format_schema_type": ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "None"),
}
CHAT_REFUSALS = {
    "no_messages": ({"messages": None}, "messages", "missing"),
    "empty": ({"messages": []}, "messages", "[]"),
    "prompt": ({"prompt": "a"}, "prompt", "unknown field"),
    "echo": ({"echo": True}, "echo", "unknown field"),
    "message_type": ({"messages": ["hi"]}, "messages[0]", "'hi'"),
    "role": ({"messages": [{"role": "boss", "content": "a"}]}, "messages[0].role", "'boss'"),
    "no_content": ({"messages": [{"role": "user"}]}, "messages[0].content", "None"),
    "image": ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content[0]", "text part"),
    "tool_calls": ({"messages": [{"role": "assistant", "content": "", "tool_calls": []}]}, "tool_calls", "isn't supported"),
    "message_unknown": ({"messages": [{"role": "user", "content": "a", "x": 1}]}, "x", "messages[0].'x'"),
    "name": ({"messages": [{"role": "user", "content": "a", "name": 1}]}, "messages[0].name", "1"),
    "tool_choice": ({"tool_choice": "auto"}, "tool_choice", "isn't supported"),
    "logprobs_int": ({"logprobs": 3}, "logprobs", "3"),
    "top_without": ({"top_logprobs": 3}, "top_logprobs", "logprobs"),
    "top_many": ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "21"),
    "template_variable": ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "messages"),
}


@pytest.mark.parametrize(("fields", "param", "said"), COMPLETION_REFUSALS.values(), ids=COMPLETION_REFUSALS)
def test_completions_refuse(fields, param, said):
    with pytest.raises(ApiError) as error:
        completion(**fields)
    assert (error.value.status, error.value.param) == (400, param) and said in error.value.message, error.value.message
    json.dumps(error.value.body()).encode()


@pytest.mark.parametrize(("fields", "param", "said"), CHAT_REFUSALS.values(), ids=CHAT_REFUSALS)
def test_chats_refuse(fields, param, said):
    with pytest.raises(ApiError) as error:
        chat(**fields)
    assert (error.value.status, error.value.param) == (400, param) and said in error.value.message, error.value.message


def test_another_model_is_not_found():
    for parser in (completion, chat):
        with pytest.raises(ApiError) as error:
            parser(model="other")
        assert (error.value.status, error.value.code) == (404, "model_not_found") and "'other'" in error.value.message


def test_without_template_or_grammars(tmp_path):
    shutil.copy(MODEL_FOLDER / "tokenizer.json", tmp_path)
    bare = Served("fake", Tokenizer(tmp_path), 128)
    with pytest.raises(ApiError, match="has no chat template") as error:
        chat(bare)
    assert error.value.status == 400 and str(tmp_path) not in error.value.message
    with pytest.raises(ApiError, match="runs without grammars"):
        completion(bare, guided_regex="a")


def test_a_template_that_refuses_says_so_without_the_folder(tmp_path):
    shutil.copy(MODEL_FOLDER / "tokenizer.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('no system turn') }}")
    with pytest.raises(ApiError, match="no system turn") as error:
        chat(Served("fake", Tokenizer(tmp_path), 128))
    assert str(tmp_path) not in error.value.message


BROKEN = [b"", b"{", b"[]", b"3", b"null", b'"x"', b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1, "a": 2}', b"\xff", b"{}{}", b"[" * 100000]
BROKEN += [b'{"a": ' + b"9" * 5000 + b"}", b'{"a":' * 990 + b"1" + b"}" * 990]


@pytest.mark.parametrize("body", BROKEN, ids=lambda body: repr(body[:12]))
def test_broken_json(body):
    with pytest.raises(ApiError) as error:
        parse(body, SERVED, False, 0)
    assert error.value.status == 400


def test_null_is_absent():
    assert read_object(b'{"a": null, "b": 1}') == {"b": 1}
    nulls = {name: None for name in COMPLETION if name not in PLAIN}
    assert parse(json.dumps(PLAIN | nulls).encode(), SERVED, False, 7) == completion()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from(["fake", "the river"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "role", "content", "5", "text"]), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.dictionaries(st.sampled_from(sorted(COMPLETION | CHAT)), VALUES, max_size=4), st.booleans())
def test_any_body_is_read_or_refused(fields, is_chat):
    body = json.dumps((TALK if is_chat else PLAIN) | fields).encode()
    try:
        call = parse(body, SERVED, is_chat, 7)
    except ApiError as error:
        assert error.status in (400, 404)
        json.dumps(error.body(), allow_nan=False).encode()
    else:
        assert all(0 < len(r.prompt_ids) and 0 < r.max_new_tokens and len(r.prompt_ids) + r.max_new_tokens <= 128 for r in call.requests)
