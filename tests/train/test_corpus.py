"""The corpus of the small model: splits, tokenizer, streams and sampler, on text made here."""

import json
import random
import zlib
from pathlib import Path

import jinja2
import numpy as np
import pytest
import tokenizers

from jaxmoe.train.corpus import build_corpus, capped, domain_weights, encode_documents, load_corpus, sample_batch, split, windows
from jaxmoe.train.sources import Domain, MissingText, _files, load
from tests.train.prose import prose


def notes_domain(name: str = "notes", passage: int | None = None) -> Domain:
    return Domain(
        name,
        "CC0-1.0",
        "invented notes",
        _files(f"usr/share/{name}/*.txt"),
        debian=(f"{name}-data", f"{name}-more"),
        passage=passage,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("root")
    for name, files, words in (("notes", 40, 300), ("letters", 30, 120), ("book", 1, 9000)):
        (folder / "usr/share" / name).mkdir(parents=True)
        for i in range(files):
            (folder / "usr/share" / name / f"{i:02}.txt").write_text(prose(seed_of(name, i), words))
    return folder


def seed_of(name: str, i: int) -> int:
    return zlib.crc32(f"{name}{i}".encode())


@pytest.fixture(scope="module")
def built(root, tmp_path_factory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("corpus")
    chosen = [notes_domain(), notes_domain("letters"), notes_domain("book", passage=2000)]
    return out, build_corpus(out, chosen, root=root, vocab_size=400, held_out=0.2)


def test_missing_text_is_listed_where_allowed(root, tmp_path):
    chosen = [notes_domain(), notes_domain("absent")]
    with pytest.raises(MissingText, match="absent-data"):
        build_corpus(tmp_path, chosen, root=root, vocab_size=300)
    manifest = build_corpus(tmp_path, chosen, root=root, vocab_size=300, allow_missing=True)
    assert list(manifest["domains"]) == ["notes"]
    assert "absent-data" in manifest["missing"]["absent"]
    with pytest.raises(MissingText, match="absent-data"):
        build_corpus(tmp_path, chosen[1:], root=root, vocab_size=300, allow_missing=True)


def test_split_is_deterministic_disjoint_and_stable():
    documents = [(f"doc/{i}", "x" * 300) for i in range(2000)]
    train, held = split(documents)
    assert (train, held) == split(documents)
    assert sorted(train + held) == sorted(documents)
    assert not {name for name, _ in train} & {name for name, _ in held}
    assert 0.03 < len(held) / len(documents) < 0.05
    more_train, more_held = split(documents[::-1] + [(f"new/{i}", "y") for i in range(100)])
    assert set(held) <= set(more_held) and set(train) <= set(more_train)


def test_split_keeps_both_sides_and_refuses_one_document():
    for n in (2, 3, 5):
        train, held = split([(f"d{i}", "x") for i in range(n)], held_out=0.0)
        assert len(held) == 1 and len(train) == n - 1
        train, held = split([(f"d{i}", "x") for i in range(n)], held_out=1.0)
        assert len(train) == 1 and len(held) == n - 1
    with pytest.raises(ValueError, match="two documents"):
        split([("only", "x")])


def test_cap_is_nested_and_ordered():
    documents = [(f"d{i}", "x" * 100) for i in range(50)]
    small, large = capped(documents, 1000), capped(documents, 3000)
    assert len(small) == 10 and len(large) == 30
    assert set(small) < set(large)
    assert large == [d for d in documents if d in large]


def test_tokenizer_returns_any_text(built):
    out, _ = built
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    rng = random.Random(0)
    ranges = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF))
    texts = [
        "",
        " leading",
        "tabs\t\tand\r\nlines\n\n\n  end  ",
        "e\u0301 is not \u00e9",
        "it's 1234567 o'clock",
        "\0\ufeff",
    ]
    texts += ["".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(50)) for _ in range(40)]
    for sample in texts:
        ids = tokenizer.encode(sample, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == sample
    assert all(tokenizer.token_to_id(chr(b)) is not None for b in range(0x21, 0x7F))
    assert len(tokenizer.encode("2048").ids) == 4  # digits stay single


def test_special_tokens_come_first_and_only_where_meant(built):
    out, manifest = built
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    assert manifest["special_tokens"] == {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
    assert tokenizer.encode("<|im_start|>user").ids[0] == 1
    tokenizer.encode_special_tokens = True
    stream = encode_documents(tokenizer, [("a", "mentions <|endoftext|> only")])
    assert stream.tolist().count(0) == 1 and stream[-1] == 0


def test_tokenizer_files_hold_a_chat_template(built):
    out, _ = built
    config = json.loads((out / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert config["eos_token"] == "<|endoftext|>"
    chat = jinja2.Template(config["chat_template"]).render(
        messages=[{"role": "user", "content": "Hi"}], add_generation_prompt=True
    )
    assert chat == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


def test_streams_hold_the_documents(built, root):
    out, manifest = built
    tokenizer = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    corpus = load_corpus(out)
    for domain in (notes_domain(), notes_domain("book", passage=2000)):
        train, held = split(load(domain, root), 0.2)
        for name, documents in (("train", train), ("held_out", held)):
            stream = corpus.streams[name][domain.name]
            entry = manifest["domains"][domain.name][name]
            assert stream.dtype == np.uint16 and len(stream) == entry["tokens"] and stream[-1] == 0
            assert entry["bytes"] == sum(len(body.encode()) for _, body in documents)
            decoded = tokenizer.decode(np.asarray(stream).tolist(), skip_special_tokens=False)
            assert decoded.replace("<|endoftext|>", "") == "".join(body for _, body in documents)
    # Passages that follow each other are one document; a held-out passage between them ends it.
    numbers = [
        int(name.rpartition("#")[2])
        for name, _ in split(load(notes_domain("book", passage=2000), root), 0.2)[0]
    ]
    runs = 1 + sum(b != a + 1 for a, b in zip(numbers, numbers[1:], strict=False))
    assert np.count_nonzero(corpus.streams["train"]["book"] == 0) == runs


def test_a_given_tokenizer_gives_the_same_streams(built, root, tmp_path):
    out, manifest = built
    chosen = [notes_domain(), notes_domain("letters"), notes_domain("book", passage=2000)]
    again = build_corpus(
        tmp_path / "given", chosen, root=root, held_out=0.2, tokenizer_file=out / "tokenizer.json"
    )
    assert again == manifest
    assert build_corpus(tmp_path / "trained", chosen, root=root, vocab_size=400, held_out=0.2) == manifest


def test_damaged_stream_is_named(built, root, tmp_path):
    build_corpus(tmp_path, [notes_domain()], root=root, vocab_size=300)
    np.save(tmp_path / "train" / "notes.npy", np.zeros(7, np.uint16))
    with pytest.raises(ValueError, match=r"train/notes\.npy"):
        load_corpus(tmp_path)


@pytest.mark.parametrize("vocab_size", [100, 70_000])
def test_vocabulary_that_does_not_fit(vocab_size, root, tmp_path):
    with pytest.raises(ValueError, match="uint16"):
        build_corpus(tmp_path, [notes_domain()], root=root, vocab_size=vocab_size)


def test_sampler_is_pure(built):
    corpus = load_corpus(built[0])
    batch = sample_batch(corpus, 3, 11, B=8, T=32)
    assert batch.shape == (8, 33) and batch.dtype == np.int32
    assert batch.min() >= 0 and batch.max() < 400
    np.testing.assert_array_equal(batch, sample_batch(corpus, 3, 11, B=8, T=32))
    for other in (sample_batch(corpus, 3, 12, B=8, T=32), sample_batch(corpus, 4, 11, B=8, T=32)):
        assert (batch != other).any()
    assert (batch != sample_batch(corpus, 3, 11, B=8, T=32, split="held_out")).any()


def test_sampler_follows_the_weights(built):
    corpus = load_corpus(built[0])
    stream = np.asarray(corpus.streams["train"]["letters"]).astype(np.int32)
    every = np.lib.stride_tricks.sliding_window_view(stream, 17)
    for row in sample_batch(corpus, 0, 0, B=20, T=16, weights={"letters": 1.0, "notes": 0.0}):
        assert (every == row).all(axis=1).any()
    weights = domain_weights(corpus)
    assert sum(weights.values()) == pytest.approx(1)
    sizes = {name: len(stream) for name, stream in corpus.streams["train"].items()}
    assert weights["notes"] / weights["letters"] == pytest.approx((sizes["notes"] / sizes["letters"]) ** 0.7)
    with pytest.raises(KeyError, match="nowhere"):
        sample_batch(corpus, 0, 0, B=1, T=16, weights={"nowhere": 1.0})
    with pytest.raises(ValueError, match="window needs"):
        sample_batch(corpus, 0, 0, B=1, T=10**7)


def test_windows_predict_each_token_once(built):
    corpus = load_corpus(built[0])
    stream = np.asarray(corpus.streams["held_out"]["notes"])
    found = windows(corpus, "notes", T=50)
    assert len(found) == (len(stream) - 1) // 50
    np.testing.assert_array_equal(found[:, 1:].ravel(), stream[1 : 1 + found.shape[0] * 50])
    assert len(windows(corpus, "notes", T=50, most=3)) == 3
