"""Tests of jaxmoe.decode.grammar with the tokenizer that ships and three of other kinds, against a small validator of JSON schemas. 5 seconds."""

import itertools
import json
import math
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxmoe.decode.grammar import LIMITS, Grammar, GrammarCompiler, GrammarError, Matcher
from jaxmoe.decode.grammar_text import MAX_CHOICES, MAX_SCHEMA_BYTES, MAX_SPACES, MAX_TEXT_BYTES

REPOSITORY = Path(__file__).resolve().parents[2]
FILE = REPOSITORY / "checkpoints/default/tokenizer.json"
TOKENS, VOCAB, EOS = 4096, 4107, (0, 2)
"""The tokenizer's tokens; a vocabulary padded beyond them, to no multiple of 32; ids that end a text, two of them."""

shipped = tokenizers.Tokenizer.from_file(str(FILE))
compiler = GrammarCompiler(FILE, VOCAB, EOS)


def ids_of(mask: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))


def encode(text: str) -> list[int]:
    return shipped.encode(text, add_special_tokens=False).ids


def takes(grammar: Grammar, text: str) -> bool:
    """Whether the grammar takes all of a text and lets it end there."""
    matcher = grammar.matcher()
    return all(matcher.consume(token) for token in encode(text)) and matcher.accepting


# --- A reference: random schemas and what they mean


def random_schema(rng, depth: int = 0) -> dict:
    """A schema whose texts are short: lengths are bounded and no object takes other properties."""
    kinds = ["null", "boolean", "integer", "range", "number", "string", "enum", "const", "pattern", "array", "object", "anyOf"]
    kind = str(rng.choice(kinds[: 9 if depth > 2 else 12]))
    low = int(rng.integers(-200, 200))
    if kind in ("null", "boolean", "integer", "number"):
        return {"type": kind}
    if kind == "range":
        return {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(0, 300))}
    if kind == "string":
        return {"type": "string", "minLength": int(rng.integers(0, 4)), "maxLength": int(rng.integers(4, 12))}
    if kind == "enum":
        return {"enum": [["red", 7, None, "a b", -1.5, True, '\u00e9\n"'][i] for i in rng.permutation(7)[:3]]}
    if kind == "const":
        return {"const": {"k": [1, "x"]} if rng.random() < 0.5 else "only"}
    if kind == "pattern":
        return {"type": "string", "pattern": "^[a-c]{2,5}-[0-9]+$"}
    if kind == "array":
        least = int(rng.integers(0, 3))
        return {"type": "array", "items": random_schema(rng, depth + 1), "minItems": least, "maxItems": least + int(rng.integers(0, 3))}
    if kind == "anyOf":
        return {"anyOf": [random_schema(rng, depth + 1) for _ in range(int(rng.integers(1, 4)))]}
    names = [str(name) for name in rng.permutation(["a", "b b", "list", "the name", '\u00fc"'])[: rng.integers(0, 5)]]
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth + 1) for name in names},
        "required": [name for name in names if rng.random() < 0.6],
        "additionalProperties": False,
    }


def same(a, b) -> bool:
    return type(a) is type(b) and a == b


def meets(value, schema: dict) -> bool:
    """Whether a value meets one of `random_schema`."""
    if "anyOf" in schema:
        return any(meets(value, option) for option in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return any(same(value, option) for option in schema.get("enum", [schema.get("const")]))
    kind = schema["type"]
    if kind == "array":
        return isinstance(value, list) and schema["minItems"] <= len(value) <= schema["maxItems"] and all(meets(x, schema["items"]) for x in value)
    if kind == "object":
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= set(value) <= set(schema["properties"])
            and all(meets(x, schema["properties"][name]) for name, x in value.items())
        )
    if kind == "string" and "pattern" in schema:
        head, _, tail = value.partition("-") if isinstance(value, str) else ("", "", "")
        return 2 <= len(head) <= 5 and set(head) <= set("abc") and tail.isascii() and tail.isdigit()
    if kind == "string":
        return isinstance(value, str) and schema["minLength"] <= len(value) <= schema["maxLength"]
    if kind == "integer":
        return type(value) is int and schema.get("minimum", -math.inf) <= value <= schema.get("maximum", math.inf)
    return {"null": value is None, "boolean": type(value) is bool, "number": type(value) in (int, float)}[kind]


def walk(matcher: Matcher, vocab: int, eos: tuple[int, ...], rng, most: int = 300, seen=None, times=None, ends=None) -> list[int]:
    """Tokens drawn from random logits under the grammar, with an end-of-text token last.

    Lists that are given get the mask before each token, the seconds it took, and the lengths at which the text was complete.
    """
    tokens: list[int] = []
    while not tokens or tokens[-1] not in eos:
        begin = time.perf_counter()
        mask = matcher.mask()
        if times is not None:
            times.append(time.perf_counter() - begin)
        if seen is not None:
            seen.append(mask)
        if ends is not None and matcher.accepting:
            ends.append(len(tokens))
        allowed = ids_of(mask)
        assert (set(eos) <= set(allowed.tolist())) == matcher.accepting and (set(eos) & set(allowed.tolist()) in (set(), set(eos)))
        logits = rng.normal(size=vocab)
        logits[list(eos)] += 0.02 * len(tokens)
        token = int(allowed[np.argmax(logits[allowed])])
        assert matcher.consume(token)
        tokens.append(token)
        assert len(tokens) < most
    return tokens


# --- JSON


def test_what_is_drawn_under_random_schemas_meets_them():
    """300 schemas, two texts each. Also what an early end-of-text would have left, wherever it was allowed."""
    rng = np.random.default_rng(0)
    times: list[float] = []
    lengths = []
    for case in range(300):
        schema = random_schema(rng)
        grammar = compiler.json_schema(schema if case % 2 else json.dumps(schema), compact=case % 3 > 0)
        for _ in range(2):
            matcher, ends = grammar.matcher(), []
            tokens = walk(matcher, VOCAB, EOS, rng, times=times, ends=ends)
            assert matcher.finished and max(tokens) < TOKENS
            text = shipped.decode(tokens[:-1], skip_special_tokens=False)
            assert meets(json.loads(text), schema), (schema, text)
            lengths.append(len(tokens))
            for n in ends:
                assert meets(json.loads(shipped.decode(tokens[:n], skip_special_tokens=False)), schema)
    assert statistics.mean(lengths) > 8
    print(f"a mask takes {1e6 * statistics.median(times):.0f} us, median of {len(times)}; the longest {1e3 * max(times):.1f} ms")
    assert statistics.median(times) < 5e-3


def test_masks_are_what_may_be_consumed():
    """Every token of the vocabulary, at places of all kinds: allowed by the mask exactly where it can be consumed."""
    schema = {"type": "object", "properties": {"a b": {"enum": ["x", "xy", 12]}, "n": {"type": "number"}}, "required": ["n"]}
    matcher, tokens = compiler.json_schema(schema).matcher(), encode('{"a b":"xy","n":-1.5,"\u00e9 z":[tru')
    for token in tokens:
        valid = []
        for other in range(VOCAB):
            if matcher.consume(other):
                valid.append(other)
                matcher.rollback(1)
        assert ids_of(matcher.mask()).tolist() == valid
        assert matcher.consume(token)


@pytest.mark.parametrize(
    "text, compact, spaced",
    [
        ('{"a":[1,2]}', True, True),
        ('{"a": [1, 2]}', False, True),
        ("{" + " " * MAX_SPACES + '"a":[1,2]}', False, True),
        ("{" + " " * (MAX_SPACES + 1) + '"a":[1,2]}', False, False),
        ("{" + " \n" * MAX_SPACES + '"a":[1,2]}', False, False),
        (' {"a":[1,2]}', False, False),
        ('{"a":[1,2],}', False, False),
        ('{"a":[1,02]}', False, False),
        ('{"b":[1,2]}', False, False),
    ],
)
def test_white_space_is_bounded(text, compact, spaced):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "array", "items": {"type": "integer"}}},
        "required": ["a"],
        "additionalProperties": False,
    }
    assert takes(compiler.json_schema(schema), text) == compact
    assert takes(compiler.json_schema(schema, compact=False), text) == spaced


def test_any_object():
    grammar = compiler.json_object()
    assert takes(grammar, '{"a":{"b":[null,true,"\\n\u00e9"]},"c":-1e5}') and takes(grammar, "{}")
    assert not any(takes(grammar, text) for text in ("[]", "1", '{"a":nul}', '{"a":1', "{}}"))


def test_schemas_may_recurse():
    schema = {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "array", "items": {"$ref": "#/$defs/tree"}}}}
    assert takes(compiler.json_schema(schema), "[[],[[],[[]]]]") and not takes(compiler.json_schema(schema), "[1]")


# --- Other grammars


def test_regular_expressions():
    grammar = compiler.regex(r"(yes|no), [0-9]{2,3} \p{L}+")
    assert takes(grammar, "yes, 123 \u00e9t\u00e9") and takes(grammar, "no, 12 x")
    assert not any(takes(grammar, text) for text in ("yes, 1 x", "maybe", "no, 12 ", "no, 12 x "))
    assert takes(compiler.regex("^ab$"), "ab") and ids_of(compiler.regex("").matcher().mask()).tolist() == [0, 2]


def test_lark_grammars():
    grammar = compiler.lark('start: sum\nsum: NUMBER ("+" sum)?\nNUMBER: /[0-9]+/')
    assert takes(grammar, "1+22+333") and not takes(grammar, "1+") and not takes(grammar, "+1")


def test_choices():
    texts = ["a", "ab", "abc", 'x"y\\z\n', "/*\u00e9*/", "<|endoftext|>x", "\x00\x1b\x7f\u2028\U0001f600", "a | b"]
    grammar = compiler.choice(texts)
    for text in texts[:5] + texts[6:]:
        assert takes(grammar, text)
    assert not takes(grammar, "b") and not takes(grammar, "abcd") and not takes(grammar, texts[5])  # there it is encoded as the token, no text
    assert not compiler.choice(["a", "ab"]).matcher(encode("a")).finished and compiler.choice(["b", "ab"]).matcher(encode("ab")).finished
    many = [f"answer no {i}" for i in range(3000)]
    assert takes(compiler.choice(many), many[1234])


# --- The end of a text


def test_end_of_text_is_allowed_where_the_text_is_complete():
    grammar = compiler.regex("[0-9]{1,3}")
    matcher, digits = grammar.matcher(), [encode(d)[0] for d in "123"]
    states = []
    for token in digits:
        states.append((matcher.accepting, matcher.finished, sorted(set(ids_of(matcher.mask())) & set(EOS))))
        assert matcher.consume(token)
    assert states == [(False, False, []), (True, False, [0, 2]), (True, False, [0, 2])]
    assert matcher.accepting and matcher.finished and ids_of(matcher.mask()).tolist() == [0, 2]
    assert not matcher.consume(digits[0]) and matcher.finished
    assert grammar.matcher().consume(0) is False and grammar.matcher(digits[:1]).consume(2) is True


def test_after_end_of_text_there_is_only_end_of_text():
    matcher = compiler.regex("[0-9]{1,3}").matcher(encode("1") + [2])
    digit = encode("2")[0]
    assert matcher.finished and matcher.accepting and ids_of(matcher.mask()).tolist() == [0, 2]
    assert not matcher.consume(digit) and matcher.validate([digit]) == 0 and matcher.validate([0, 2, digit]) == 2
    assert matcher.consume(0)
    matcher.rollback(2)
    assert not matcher.finished and matcher.consume(digit)


# --- Going back, copies, drafts


def test_rollback_copies_and_replay_give_the_same_masks():
    rng = np.random.default_rng(2)
    for case in range(30):
        grammar, masks = compiler.json_schema(random_schema(rng), compact=bool(case % 2)), []
        matcher = grammar.matcher()
        tokens = walk(matcher, VOCAB, EOS, rng, seen=masks)
        masks.append(matcher.mask())
        place = len(tokens)
        for target in rng.integers(0, len(tokens) + 1, 6).tolist():
            if target <= place:
                matcher.rollback(place - target)
            else:
                assert all(matcher.consume(token) for token in tokens[place:target])
            place = target
            np.testing.assert_array_equal(matcher.mask(), masks[place])
            np.testing.assert_array_equal(grammar.matcher(tokens[:place]).mask(), masks[place])
            other = matcher.copy()
            walk(other, VOCAB, EOS, rng)
            np.testing.assert_array_equal(matcher.mask(), masks[place])
    with pytest.raises(ValueError, match=r"cannot take back \d+ tokens of"):
        matcher.rollback(place + 1)


def test_an_invalid_token_changes_nothing():
    grammar = compiler.json_object()
    matcher = grammar.matcher(encode('{"a":'))
    before = matcher.mask()
    for token in (encode("}")[0], *EOS, 1, TOKENS, VOCAB, -1, 10**9):
        assert not matcher.consume(token)
        np.testing.assert_array_equal(matcher.mask(), before)
    assert all(matcher.consume(token) for token in encode("1}"))


def test_drafts_are_cut_at_the_first_invalid_token():
    matcher = compiler.json_schema({"type": "array", "items": {"type": "integer"}, "maxItems": 2}).matcher(encode("[1"))
    good, bad = encode(",2]"), encode("x")[0]
    before = matcher.mask()
    for n in range(len(good) + 1):
        assert matcher.validate(good[:n] + [bad] + good[n:]) == n
    assert matcher.validate(good + [0]) == len(good) + 1 and matcher.validate([0]) == 0 and matcher.validate([]) == 0
    np.testing.assert_array_equal(matcher.mask(), before)


def test_texts_that_are_not_of_the_grammar_cannot_be_replayed():
    with pytest.raises(GrammarError, match="token 0, number 1, is not allowed"):
        compiler.json_object().matcher([*encode("{")[:1], 0])


def test_an_abandoned_text_leaves_the_grammar_as_it_was():
    rng, schema = np.random.default_rng(3), {"type": "array", "items": {"type": "string", "maxLength": 9}, "minItems": 2, "maxItems": 3}
    grammar = compiler.json_schema(schema)
    first = grammar.matcher().mask()
    for n in range(12):
        matcher = grammar.matcher()
        for _ in range(n):
            matcher.consume(int(rng.choice(ids_of(matcher.mask()))))
        del matcher
        np.testing.assert_array_equal(grammar.matcher().mask(), first)
    text = walk(grammar.matcher(), VOCAB, EOS, rng)
    assert 2 <= len(json.loads(shipped.decode(text[:-1]))) <= 3


def test_threads_share_a_compiler_and_a_grammar():
    shared = compiler.json_schema(
        {"type": "object", "properties": {"a": {"type": "string", "maxLength": 20}, "b": {"type": "number"}}, "additionalProperties": False}
    )
    results: dict[int, list] = {}

    def work(seed: int) -> list:
        rng = np.random.default_rng(seed)
        own = compiler.json_schema(random_schema(rng))
        return [walk(grammar.matcher(), VOCAB, EOS, rng, most=2000) for grammar in (own, shared, own)]

    threads = [threading.Thread(target=lambda seed=seed: results.update({seed: work(seed)})) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {seed: work(seed) for seed in range(4)}


# --- Other tokenizers

PIECES = [chr(c) for c in range(33, 127)] + ['{"', '":', "\u2581the", "ab", "true", "\u2581{", "},", '"]', "\u2581"]


def unigram(decoder, bytes_too: bool) -> tokenizers.Tokenizer:
    special = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    spelled = [(f"<0x{i:02X}>", -20.0) for i in range(256)] if bytes_too else []
    tokenizer = tokenizers.Tokenizer(models.Unigram(special + spelled + [(piece, -float(5)) for piece in PIECES], unk_id=0, byte_fallback=bytes_too))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    tokenizer.decoder = decoder
    return tokenizer


def byte_level(decoder) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoder
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(['{"the name":[1,22,true]} the cat'] * 20, trainer)
    return tokenizer


@pytest.mark.parametrize(
    "tokenizer",
    [
        unigram(decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]), True),
        unigram(decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")]), True),
        unigram(decoders.Metaspace(prepend_scheme="never"), False),
        byte_level(decoders.ByteLevel()),
        byte_level(decoders.Sequence([decoders.ByteLevel()])),
    ],
    ids=["unigram", "unigram-metaspace", "unigram-no-bytes", "bytes", "bytes-in-a-sequence"],
)
def test_tokenizers_of_other_kinds(tokenizer):
    vocab = tokenizer.get_vocab_size() + 37
    own, rng = GrammarCompiler(tokenizer.to_str(), vocab, [2]), np.random.default_rng(4)
    text = ' the cat "has" {ab}'
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text and own.choice([text]).matcher(ids).finished
    schema = {
        "type": "object",
        "properties": {"the name": {"type": "string", "maxLength": 8}, "a": {"enum": ["the ab", 7]}},
        "required": ["the name"],
    }
    schema["additionalProperties"] = False
    grammar = own.json_schema(schema)
    for _ in range(10):
        tokens = walk(grammar.matcher(), vocab, (2,), rng)
        assert max(tokens) < tokenizer.get_vocab_size()
        value = json.loads(tokenizer.decode(tokens[:-1]))
        assert len(value.pop("the name")) <= 8 and list(value.values()) in ([], ["the ab"], [7])


def test_tokens_that_cannot_spell_a_text_are_an_error_of_that_text():
    own = GrammarCompiler(unigram(decoders.Metaspace(), False).to_str(), 200, [2])
    with pytest.raises(GrammarError, match="choice: .*no token of the vocabulary can come next"):
        own.choice(["\u00e9"])
    matcher = own.choice(["a\u00e9"]).matcher()
    with pytest.raises(GrammarError, match="no token of the vocabulary can come next"):
        for token in itertools.repeat(3 + PIECES.index("a"), 2):
            assert matcher.consume(token)
            matcher.mask()


@pytest.mark.parametrize(
    "tokenizer, vocab, eos, message",
    [
        (FILE, TOKENS - 1, [0], "grammars cannot use this tokenizer: vocab size too small; 4095 vs 4096"),
        (FILE, TOKENS, [], r"eos_ids are \[\]; a grammar needs at least one"),
        (FILE, TOKENS, [0, TOKENS], r"eos_ids are \[0, 4096\]"),
        ("{", TOKENS, [0], "it is no JSON"),
        (unigram(decoders.WordPiece(), False).to_str(), 200, [2], "grammars cannot use this tokenizer: can't determine decoder type"),
    ],
)
def test_tokenizers_that_cannot_be_used_are_refused(tokenizer, vocab, eos, message):
    with pytest.raises(ValueError, match=message):
        GrammarCompiler(tokenizer, vocab, eos)


def test_llguidance_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ImportError, match=r"pip install 'jaxmoe\[serve\]'"):
        GrammarCompiler(FILE, VOCAB, EOS)


# --- Refusals


@pytest.mark.parametrize(
    "kind, source, message",
    [
        ("json_schema", {"type": "frob"}, "json_schema: Invalid type: frob"),
        ("json_schema", '{"type":', "the JSON schema is no JSON: Expecting value"),
        ("json_schema", "[" * 50_000, "the JSON schema is no JSON: maximum recursion depth"),
        ("json_schema", [1], r"a JSON schema is an object, or true, not \[1\]"),
        ("json_schema", False, "a JSON schema is an object, or true, not false"),
        ("json_schema", {"enum": []}, "Unsatisfiable schema"),
        ("json_schema", {"type": "integer", "minimum": 5, "maximum": 3}, "Unsatisfiable schema: minimum"),
        ("json_schema", {"$ref": "#"}, "no token of the vocabulary can come next"),
        ("json_schema", {"$ref": "http://example.com/x.json"}, "does not fetch resources"),
        ("json_schema", {"type": "array", "uniqueItems": True}, 'Unimplemented keys: ."uniqueItems"'),
        ("json_schema", {"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf constraints are not supported"),
        ("json_schema", {"x-guidance": {"whitespace_flexible": True}}, "x-guidance is not taken"),
        ("json_schema", {"const": math.nan}, "the JSON schema is no JSON: Out of range"),
        ("json_schema", {"const": object()}, "the JSON schema is no JSON: Object of type object"),
        ("json_schema", {"const": "\ud800"}, "json_schema: "),
        ("json_schema", {"description": "x" * MAX_SCHEMA_BYTES}, f"a JSON schema of {MAX_SCHEMA_BYTES + 18} bytes is larger than {MAX_SCHEMA_BYTES}"),
        ("regex", "a(", 'regex: .*invalid regex "a.".*unclosed group'),
        ("regex", "(?=a)b", "look-around"),
        ("regex", "x" * (MAX_TEXT_BYTES + 1), f"a regular expression of {MAX_TEXT_BYTES + 1} bytes is larger"),
        ("regex", 5, "a regular expression must be text, not int"),
        ("regex", "\ud800", "surrogates not allowed"),
        ("regex", "(a|b*)" * (MAX_TEXT_BYTES // 6), "regex: .*lexer"),
        ("lark", "start: x", 'unknown name: "x"'),
        ("lark", "start: start", "no token of the vocabulary can come next"),
        ("lark", "", "no start rule found"),
        ("choice", [], r"choices must be a list of 1 to 4096 texts, not \[\]"),
        ("choice", "ab", "choices must be a list of 1 to 4096 texts, not 'ab'"),
        ("choice", ["a", ""], "choice 1 is ''"),
        ("choice", ["a", 5], "choice 1 is 5"),
        ("choice", ["a"] * (MAX_CHOICES + 1), "choices must be a list"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(kind, source, message):
    with pytest.raises(GrammarError, match=message) as caught:
        getattr(compiler, kind)(source)
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value) or "no JSON" in str(caught.value)


def test_a_grammar_that_becomes_too_complex_is_an_error_of_its_text(monkeypatch):
    monkeypatch.setitem(LIMITS, "step_lexer_fuel", 9000)
    grammar = GrammarCompiler(FILE, VOCAB, EOS).regex(r"\p{L}{1,200} \w+\s[\p{Han}\p{Hiragana}]{0,50}")
    matcher, rng = grammar.matcher(), np.random.default_rng(0)
    with pytest.raises(GrammarError, match="cannot be followed: .*too many expressions"):
        for _ in range(100):
            assert matcher.consume(int(rng.choice(ids_of(matcher.mask()))))
    for use in (matcher.mask, lambda: matcher.consume(5), lambda: matcher.rollback(1)):
        with pytest.raises(GrammarError, match="cannot be followed"):
            use()
    assert not matcher.consume(0) and not matcher.finished
    assert grammar.matcher().mask().any()


CHAINS = """
import string, itertools
from jaxmoe.decode.grammar import *
from jaxmoe.decode.grammar_text import *
compiler = GrammarCompiler({file!r}, {vocab}, [0])
names = ["".join(c) for k in (1, 2, 3) for c in itertools.product(string.ascii_lowercase, repeat=k)]
def schema(before, after, size):
    links = [before + '{{"$ref":"#/$defs/' + name + '"}}' + after for name in names[1:]]
    count = size // (len(links[-1]) + 8)
    defs = ",".join(f'"{{name}}":{{link}}' for name, link in zip(names, links[:count])) + f',"{{names[count]}}":{{{{"type":"null"}}}}'
    return '{{"$ref":"#/$defs/a","$defs":{{' + defs + '}}}}'
def lark(up, size):
    own = [name.upper() if up else name for name in names]
    count = size // 8
    return f"start: {{own[0]}}\\n" + "\\n".join(f"{{a}}:{{b}}" for a, b in zip(own[:count], own[1:])) + f'\\n{{own[count]}}: "x"'
for before, after in (("", ""), ('{{"items":' * 20, "}}" * 20), ('{{"anyOf":[' * 25, "]}}" * 25), ('{{"properties":{{"a":' * 20, "}}}}" * 20)):
    try:
        compiler.json_schema(schema(before, after, MAX_SCHEMA_BYTES - 200)).matcher().mask()
    except GrammarError as error:
        assert "too big" in str(error), error
for up in (False, True):
    compiler.lark(lark(up, MAX_TEXT_BYTES - 200)).matcher().mask()
print("done")
"""


def test_the_longest_chains_of_rules_do_not_end_the_process():
    code = CHAINS.format(file=str(FILE), vocab=TOKENS)
    got = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert (got.returncode, got.stdout) == (0, "done\n"), got.stderr[-2000:]


def test_a_vocabulary_that_fills_its_words_has_no_word_more():
    """The shipped model's, of 4,096 tokens."""
    compiler = GrammarCompiler(FILE, 4096, (0,))
    matcher = compiler.json_schema({"type": "integer"}).matcher()
    assert matcher.mask().shape == (128,)
