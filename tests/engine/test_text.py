"""Tests of jaxmoe.engine.text against whole-text decoding, on a small byte-level tokenizer trained here."""

import json
import random
from itertools import product

import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from jaxmoe.engine.text import REPLACEMENT, WINDOW_TOKENS, StopStrings, StreamDecoder, TextError, Tokenizer

EOS, BOS = "<|end|>", "<|begin|>"
TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\n  Indented, with  spaces\tand tabs.",
    "naïve café – “quotes” … Ünïcödé ß łódź",
    "你好，世界。混合专家模型 日本語のテキスト 한국어 텍스트",
    "👋🏽 family 👨‍👩‍👧‍👦 flag 🇨🇭🇺🇳 🏴󠁧󠁢󠁳󠁣󠁴󠁿 rocket 🚀🚀🚀",
    "مرحبا بالعالم שלום עולם नमस्ते दुनिया สวัสดี",
    "zero\u0000width\u200bjoin\u0301 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀𓁐 a real \ufffd here",
]
TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {% if message.role == 'bad' %}
        {{ raise_exception('no role ' ~ message.role) }}
    {% endif %}
<{{ message.role }}>{% generation %}{{ message.content }}{% endgeneration %}{{ eos_token }}
{% endfor %}
{% if tools %}{{ tools | tojson }}{% endif %}
{% if add_generation_prompt %}
<assistant>{% endif %}"""


def byte_level_bpe() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # A small vocabulary: most characters beyond ASCII stay split over several tokens.
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=[BOS, EOS], show_progress=False),
    )
    return tokenizer


def write_folder(folder, tokenizer, **files):
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    config = {"eos_token": {"content": EOS, "special": True}, "bos_token": BOS, "chat_template": TEMPLATE}
    return Tokenizer(write_folder(tmp_path_factory.mktemp("model"), byte_level_bpe(), tokenizer_config=config))


def byte_ids(tokenizer: Tokenizer, data: bytes) -> list[int]:
    """One token per byte, by the byte-level alphabet."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in printable]
    char_of_byte = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(rest)}
    return [tokenizer._tokenizer.token_to_id(char_of_byte[byte]) for byte in data]


def stream(tokenizer: Tokenizer, ids, **options) -> list[str]:
    decoder = StreamDecoder(tokenizer, **options)
    return [decoder.push(id) for id in ids] + [decoder.flush()]


def cut_reference(text: str, stops) -> tuple[str, bool]:
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return (text[: min(ends)[1]], True) if ends else (text, False)


# --- Tokenizer


def test_round_trip(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(type(id) is int and 0 <= id < tokenizer.vocab_size for id in ids)


def test_the_training_text_splits_characters_over_tokens(tokenizer):
    """What makes the streaming tests mean something."""
    ids = tokenizer.encode(TEXTS[2] + TEXTS[3])
    assert sum(REPLACEMENT in tokenizer.decode([id]) for id in ids) > 50


def test_bos_only_where_the_post_processor_adds_it(tokenizer, tmp_path):
    assert tokenizer.encode("hello") == tokenizer.encode("hello", add_special_tokens=False)
    with_bos = byte_level_bpe()
    bos = with_bos.token_to_id(BOS)
    with_bos.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    other = Tokenizer(write_folder(tmp_path, with_bos))
    assert other.encode("hello") == [bos] + tokenizer.encode("hello")
    assert other.encode("hello", add_special_tokens=False) == tokenizer.encode("hello")


def test_truncation_and_padding_of_the_file_are_not_applied(tokenizer, tmp_path):
    trained = byte_level_bpe()
    trained.enable_truncation(3)
    trained.enable_padding(length=500)
    other = Tokenizer(write_folder(tmp_path, trained))
    assert other.encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_special_tokens_are_skipped_or_kept(tokenizer):
    ids = tokenizer.encode(f"a{EOS}b")
    assert tokenizer.decode(ids) == "ab"
    assert tokenizer.decode(ids, skip_special_tokens=False) == f"a{EOS}b"


@pytest.mark.parametrize("id", [-1, 300, 2**31, 2**40])
def test_ids_without_a_token_are_written_as_replacements(tokenizer, id):
    """They neither vanish nor end a run, and bytes on either side of one never make a character."""
    assert not tokenizer.is_token(id) and tokenizer.is_token(tokenizer.vocab_size - 1) and tokenizer.vocab_size <= 300
    assert tokenizer.decode([id]) == REPLACEMENT
    first, last = byte_ids(tokenizer, "é".encode())
    letter = tokenizer.encode("a")
    for ids, text in [
        ([*letter, id, id, *letter], f"a{REPLACEMENT * 2}a"),
        ([first, id, last], REPLACEMENT * 3),
        ([first, last, id, first, last], f"é{REPLACEMENT}é"),
    ]:
        assert tokenizer.decode(ids) == "".join(stream(tokenizer, ids)) == text


def test_text_that_cannot_be_encoded(tokenizer, tmp_path):
    with pytest.raises(TextError, match="can't encode"):
        tokenizer.encode("a\udc80")  # what Python makes of a command line that is not UTF-8
    words = tokenizers.Tokenizer(models.WordLevel({"one": 0}))
    with pytest.raises(TextError, match="can't encode 'two'.*UNK"):
        Tokenizer(write_folder(tmp_path, words)).encode("two")


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"generation_config": {"eos_token_id": [5, 7]}, "config": {"eos_token_id": 3}}, (5, 7)),
        ({"generation_config": {"eos_token_id": 0}, "config": {"eos_token_id": 3}}, (0,)),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 3}}, (3,)),
        ({"config": {"text_config": {"eos_token_id": [9]}}, "tokenizer_config": {"eos_token": BOS}}, (9,)),
        ({"tokenizer_config": {"eos_token": EOS}}, (1,)),
        ({"tokenizer_config": {"eos_token": {"content": EOS}}}, (1,)),
        ({"special_tokens_map": {"eos_token": EOS}}, (1,)),
        ({"tokenizer_config": {"eos_token": None}}, ()),
    ],
)
def test_where_end_tokens_come_from(tmp_path, files, expected):
    assert Tokenizer(write_folder(tmp_path, byte_level_bpe(), **files)).eos_ids == expected


def test_errors_name_the_file(tmp_path):
    with pytest.raises(TextError, match=r"nowhere.*tokenizer\.json"):
        Tokenizer(tmp_path / "nowhere")
    folder = write_folder(tmp_path / "a", byte_level_bpe(), tokenizer_config={"eos_token": "<absent>"})
    with pytest.raises(TextError, match="<absent>"):
        Tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(TextError, match=r"tokenizer_config\.json is damaged"):
        Tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[]")
    with pytest.raises(TextError, match=r"tokenizer_config\.json is damaged"):
        Tokenizer(folder)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(TextError, match=r"tokenizer\.json is damaged"):
        Tokenizer(folder)
    folder = write_folder(tmp_path / "b", byte_level_bpe(), generation_config={"eos_token_id": "2"})
    with pytest.raises(TextError, match=r"generation_config\.json.*'2'"):
        Tokenizer(folder)
    for token in (3, {"id": 3}):
        folder = write_folder(tmp_path / "c", byte_level_bpe(), tokenizer_config={"bos_token": token})
        with pytest.raises(TextError, match="bos_token .* expected a string"):
            Tokenizer(folder)
    (folder / "tokenizer_config.json").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(TextError, match=r"tokenizer_config\.json is damaged"):
        Tokenizer(folder)


# --- Chat templates


def test_chat(tokenizer):
    messages = [{"role": "user", "content": "Hi <b> & é"}, {"role": "assistant", "content": "Yes"}]
    conversation = f"{BOS}<user>Hi <b> & é{EOS}\n<assistant>Yes{EOS}\n"
    assert tokenizer.chat(messages, add_generation_prompt=False) == conversation
    assert tokenizer.chat(messages) == conversation + "<assistant>"
    with_tools = tokenizer.chat(messages, add_generation_prompt=False, tools=[{"name": "f<é>"}])
    assert with_tools == conversation + '[{"name": "f<é>"}]'  # neither HTML nor ASCII escapes


def test_a_template_may_refuse(tokenizer):
    with pytest.raises(TextError, match="no role bad"):
        tokenizer.chat([{"role": "bad", "content": ""}])


def with_template(folder, template, as_file=False):
    config = {} if as_file else {"chat_template": template}
    write_folder(folder, byte_level_bpe(), tokenizer_config=config)
    if as_file:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return Tokenizer(folder)


def test_chat_template_sources(tmp_path):
    assert with_template(tmp_path / "file", "é {{ x }}", as_file=True).chat([], x=3) == "é 3"
    named = [{"name": "rag", "template": "wrong"}, {"name": "default", "template": "right"}]
    assert with_template(tmp_path / "named", named).chat([]) == "right"
    with pytest.raises(TextError, match="rag"):
        with_template(tmp_path / "unnamed", named[:1])
    with pytest.raises(TextError, match="no chat template"):
        with_template(tmp_path / "none", None).chat([])
    for wrong in ("{% if %}", "{{ messages + 1 }}", "{{ 1 / 0 }}", "{{ messages[0].role.name.first }}"):
        with pytest.raises(TextError, match="chat template of"):
            with_template(tmp_path / "wrong", wrong).chat([])
    for wrong in (3, {"default": "text"}, [{"name": "default", "template": 3}], ["text"]):
        with pytest.raises(TextError, match="chat_template|chat templates"):
            with_template(tmp_path / "type", wrong)
    (tmp_path / "type" / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(TextError, match=r"chat_template\.jinja is damaged"):
        Tokenizer(tmp_path / "type")


def test_template_helpers(tmp_path):
    year = with_template(tmp_path / "date", "{{ strftime_now('%Y') }}").chat([])
    assert year.isdigit() and len(year) == 4
    loop = "{% for m in messages %}{% if m == 2 %}{% break %}{% endif %}{{ m }}{% endfor %}"
    assert with_template(tmp_path / "loop", loop).chat([1, 2, 3]) == "1"


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"])
def test_templates_are_sandboxed(tmp_path, template):
    with pytest.raises(TextError, match="chat template of"):
        with_template(tmp_path, template).chat([])


# --- StreamDecoder


def test_stream_joins_to_the_whole(tokenizer):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        pieces = stream(tokenizer, ids)
        assert "".join(pieces) == text
        assert sum(piece != "" for piece in pieces) > len(text) // 8  # text comes as it goes, not all in the end


def test_stream_never_splits_a_character(tokenizer):
    text = "a👨‍👩‍👧é你b"
    ids = byte_ids(tokenizer, text.encode())
    assert None not in ids
    decoder = StreamDecoder(tokenizer)
    pushed = [decoder.push(id) for id in ids]
    ends = [len(text[: i + 1].encode()) for i in range(len(text))]
    for n, piece in enumerate(pushed, start=1):
        assert piece == (text[ends.index(n)] if n in ends else "")
    assert decoder.flush() == ""


def test_stream_of_every_pair_of_hard_bytes(tokenizer):
    """Beginnings, continuations, surrogates, overlong forms and bytes that never occur, in every order of four."""
    hard = [0x41, 0x80, 0xBF, 0xC3, 0xE4, 0xED, 0xF0, 0x9F, 0xFF]
    for data in product(hard, repeat=4):
        ids = byte_ids(tokenizer, bytes(data))
        assert "".join(stream(tokenizer, ids)) == bytes(data).decode("utf-8", errors="replace")


def test_stream_of_random_ids(tokenizer):
    rng = random.Random(0)
    for _ in range(300):
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(60))]
        for skip in (True, False):
            expected = tokenizer.decode(ids, skip_special_tokens=skip)
            assert "".join(stream(tokenizer, ids, skip_special_tokens=skip)) == expected


def test_unfinished_bytes_come_out_in_the_end(tokenizer):
    decoder = StreamDecoder(tokenizer)
    assert [decoder.push(id) for id in byte_ids(tokenizer, b"a\xf0\x9f\x98")] == ["a", "", "", ""]
    assert decoder.flush() == REPLACEMENT
    assert decoder.push(tokenizer.encode("b")[0]) == "b"  # and the decoder begins anew


@pytest.mark.parametrize("data", [b"\xff" * 400, b"\xf0\x9f" * 200, b"text \xf0\x9f\x98\x80" * 50, b"\xe4\xbd\xa0\xff" * 100])
def test_cost_per_token_does_not_grow(tokenizer, data, monkeypatch):
    decoded = []
    decode = Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, **k: decoded.append(len(ids)) or decode(self, ids, **k))
    pieces = stream(tokenizer, byte_ids(tokenizer, data))
    assert "".join(pieces) == data.decode("utf-8", errors="replace")
    assert max(decoded) <= 2 * WINDOW_TOKENS
    assert sum(decoded) <= 3 * WINDOW_TOKENS * len(data)
    shown = [len("".join(pieces[:n])) for n in range(len(pieces))]
    behind = [len(decode(tokenizer, byte_ids(tokenizer, data[:n]))) - shown[n] for n in range(0, len(data), 37)]
    assert max(behind) <= 3


def sentencepiece_like() -> tokenizers.Tokenizer:
    """The decoder of Llama 2: words begin with U+2581, bytes have tokens of their own, a leading space is stripped."""
    pieces = ["<unk>", "▁", "▁Hello", "▁you", "lo", "é", *[f"<0x{byte:02X}>" for byte in range(256)]]
    tokenizer = tokenizers.Tokenizer(models.BPE({p: i for i, p in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return tokenizer


def test_stream_of_words_with_byte_fallback(tmp_path):
    tokenizer = Tokenizer(write_folder(tmp_path, sentencepiece_like()))
    id_of = tokenizer._tokenizer.token_to_id
    units = [["▁"], ["▁Hello"], ["▁you"], ["lo"], ["é"], ["</s>"], ["<0xF0>", "<0x9F>", "<0x9A>", "<0x80>"], ["<0x0A>"]]
    for words in product(units, repeat=4):
        ids = [id_of(piece) for unit in words for piece in unit]
        assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize("data", [b"\xff\xf0\x9f" * 40, "🚀".encode() + b"\xff" * 99, "🚀".encode() + b"\xf0\x9f"])
def test_wrong_fallback_bytes_are_neither_lost_nor_held_for_ever(tmp_path, data, monkeypatch):
    tokenizer = Tokenizer(write_folder(tmp_path, sentencepiece_like()))
    ids = [tokenizer._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in data]
    longest, decode = [], Tokenizer.decode
    monkeypatch.setattr(Tokenizer, "decode", lambda self, ids, **k: longest.append(len(ids)) or decode(self, ids, **k))
    text = "".join(stream(tokenizer, ids))
    right = "🚀" if data.startswith("🚀".encode()) else ""
    assert text == right + REPLACEMENT * (len(data) - len(right.encode()))
    assert max(longest) <= 2 * WINDOW_TOKENS


# --- StopStrings

STOPS = [["\n\n"], ["stop"], ["aab"], ["aba", "b"], ["abc", "b"], ["👋🏽", "🇨🇭"], ["a", "ab", "ba"], [EOS, "</s>"], []]


@pytest.mark.parametrize("stops", STOPS)
def test_stop_strings_at_every_split(stops):
    texts = ["xaabaabay", "ab", "aaab", "abab", "bbb", "a\n\nb\n", "sstop it", "👋👋🏽!", "x</s", f"say {EOS} no </s>"]
    for text in texts:
        for i, j in product(range(len(text) + 1), repeat=2):
            if i > j:
                continue
            cutter = StopStrings(stops)
            results = [cutter.push(piece) for piece in (text[:i], text[i:j], text[j:])]
            shown = "".join(piece for piece, _ in results) + cutter.flush()
            assert (shown, results[-1][1]) == cut_reference(text, stops)
            assert (cutter.matched in stops) == results[-1][1]


def test_only_what_may_begin_a_stop_is_held():
    cutter = StopStrings(["<end>", "\n\n"])
    assert [cutter.push(piece) for piece in ["one <", "en", "x two\n", "three"]] == [
        ("one ", False), ("", False), ("<enx two", False), ("\nthree", False),
    ]  # fmt: skip
    assert cutter.push(" <end") == (" ", False)
    assert cutter.flush() == "<end" and cutter.flush() == ""


def test_after_a_stop_nothing_comes():
    cutter = StopStrings(["b"])
    assert cutter.push("abc") == ("a", True)
    assert cutter.push("d") == ("", True)
    assert cutter.flush() == "" and cutter.matched == "b"


@pytest.mark.parametrize("stops", ["end", ["a", ""]])
def test_stop_strings_that_mean_nothing_are_refused(stops):
    with pytest.raises(TextError, match="stop string"):
        StopStrings(stops)


@pytest.mark.parametrize("stops", [["dog"], ["🚀🚀"], ["\ufffd"], ["世界", "。"], ["‍👩"], ["nowhere"], [" ", "é"]])
def test_streamed_and_stopped_equals_decoded_and_cut(tokenizer, stops):
    """The property the engine needs: pieces of text, cut on the fly, join to the whole text, cut."""
    for text in TEXTS:
        for ids in (tokenizer.encode(text), byte_ids(tokenizer, text.encode())):
            cutter, shown = StopStrings(stops), ""
            for piece in stream(tokenizer, ids):
                shown += cutter.push(piece)[0]
            shown += cutter.flush()
            assert (shown, cutter.matched is not None) == cut_reference(tokenizer.decode(ids), stops)
