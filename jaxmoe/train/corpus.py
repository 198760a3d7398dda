"""The corpus of the small default model: how its texts are split, tokenized and sampled.

`build_corpus` turns the documents of `sources` into a byte-level BPE tokenizer and flat uint16 token streams;
`sample_batch` is a pure function of (corpus, seed, step). This file knows nothing of packages, file formats or where a
text lies, nor of models, optimizers or JAX.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.console
import rich.progress
import tokenizers
from jaxtyping import Int32, UInt16

from jaxmoe.train.sources import Document, Domain, MissingText, domains, load, package_versions

END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END, TURN_START, TURN_END)  # ids 0, 1, 2
SPLITS = ("train", "held_out")

# Words in their leading space, runs of letters, single digits, punctuation, newlines (the split of Qwen2 and later).
WORD_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


# --- splits ----------------------------------------------------------------------------------------------------------


def _position(document_id: str, purpose: str) -> float:
    """A number in [0, 1) that depends on the id and the purpose alone."""
    return int.from_bytes(hashlib.sha256(f"{purpose}:{document_id}".encode()).digest()[:7], "big") / 2**56


def split(documents: Sequence[Document], held_out: float = 0.04) -> tuple[list[Document], list[Document]]:
    """Splits documents by a hash of their ids, so that more documents or another order move none of them.

    Args:
        documents: (id, text) pairs.
        held_out: share of the documents to hold out.

    Returns:
        (train, held out), each in the order given. At least one document is on each side.

    Raises:
        ValueError: fewer than two documents.
    """
    if len(documents) < 2:
        raise ValueError(f"a split needs two documents or more, got {len(documents)}")
    position = {name: _position(name, "split") for name, _ in documents}
    held = {name for name, at in position.items() if at < held_out} or {min(position, key=lambda name: position[name])}
    if len(held) == len(position):
        held.remove(max(position, key=lambda name: position[name]))
    return [d for d in documents if d[0] not in held], [d for d in documents if d[0] in held]


def capped(documents: Sequence[Document], limit: int) -> list[Document]:
    """A selection by hash of at most `limit` UTF-8 bytes (one document at least), in the order given."""
    chosen: set[str] = set()
    total = 0
    for name, text in sorted(documents, key=lambda d: _position(d[0], "cap")):
        size = len(text.encode("utf-8"))
        if total + size <= limit or not chosen:
            chosen.add(name)
            total += size
    return [d for d in documents if d[0] in chosen]


# --- tokenizer -------------------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterable[str], vocab_size: int = 4096) -> tokenizers.Tokenizer:
    """Trains a byte-level BPE tokenizer without normalization, so that any text comes back as it was.

    Args:
        texts: what to count pairs on.
        vocab_size: tokens in all, the special ones (ids 0, 1, 2) and the 256 bytes included.
    """
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(WORD_SPLIT), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
        max_token_length=16,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: tokenizers.Tokenizer, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json as Hugging Face libraries read them."""
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {
        str(i): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for i, token in enumerate(SPECIAL_TOKENS)
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": [TURN_START, TURN_END],
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "pad_token": END,
        "unk_token": None,
    }
    _write_json(folder / "tokenizer_config.json", config)


def encode_documents(tokenizer: tokenizers.Tokenizer, documents: Sequence[Document]) -> UInt16[np.ndarray, "N"]:
    """Token stream of documents: `<|endoftext|>` after each, but not between passages that adjoin in one file."""
    end = tokenizer.token_to_id(END)
    parts = []
    for start in range(0, len(documents), 64):  # in slices, since an Encoding holds far more than its ids
        batch = documents[start : start + 65]
        encoded = tokenizer.encode_batch_fast([text for _, text in batch[:64]], add_special_tokens=False)
        for i, encoding in enumerate(encoded):
            parts.append(np.asarray(encoding.ids, np.uint16))
            if i + 1 == len(batch) or not _follows(batch[i + 1][0], batch[i][0]):
                parts.append(np.asarray([end], np.uint16))
    return np.concatenate(parts)


def _follows(later: str, earlier: str) -> bool:
    file, mark, number = earlier.rpartition("#")
    return bool(mark) and number.isdigit() and later == f"{file}#{int(number) + 1:04}"


# --- corpus ----------------------------------------------------------------------------------------------------------


def build_corpus(
    out_folder: Path,
    chosen: Sequence[Domain] | None = None,
    *,
    root: Path = Path("/"),
    vocab_size: int = 4096,
    cap_bytes: int = 12_000_000,
    sample_bytes: int = 1_200_000,
    held_out: float = 0.04,
    allow_missing: bool = False,
    tokenizer_file: Path | None = None,
    console: rich.console.Console | None = None,
) -> dict:
    """Reads the domains, trains the tokenizer and writes token streams, tokenizer files and corpus.json.

    Args:
        out_folder: gets `train/{domain}.npy` and `held_out/{domain}.npy` (uint16), tokenizer.json,
            tokenizer_config.json and corpus.json.
        chosen: domains; all of `domains()` by default.
        root: folder under which Debian packages' files lie.
        vocab_size: tokens in all; at most 65536, since streams are uint16.
        cap_bytes: most training bytes of one domain; held-out text is capped at the same share of it.
        sample_bytes: most bytes of one domain that the tokenizer is trained on, so that none dominates.
        held_out: share of documents held out.
        allow_missing: list domains without files under "missing" instead of raising.
        tokenizer_file: a tokenizer.json to use instead of training one.
        console: where progress goes.

    Returns:
        What was written to corpus.json.

    Raises:
        MissingText: a domain has no files and `allow_missing` is false, or no domain has any.
        ValueError: vocab_size does not fit uint16.
    """
    if not len(SPECIAL_TOKENS) + 256 <= vocab_size <= 65536:
        raise ValueError(
            f"vocab_size must be from {len(SPECIAL_TOKENS) + 256} to 65536 (streams are uint16), got {vocab_size}"
        )
    out_folder = Path(out_folder)
    for name in SPLITS:
        (out_folder / name).mkdir(parents=True, exist_ok=True)
    chosen = domains() if chosen is None else tuple(chosen)
    with rich.progress.Progress(console=console) as progress:
        read, missing = _read_domains(chosen, root, cap_bytes, held_out, allow_missing, progress)
        task = progress.add_task("tokenizer", total=None)
        if tokenizer_file is None:
            sample = [text for one in read.values() for _, text in capped(one.kept["train"], sample_bytes)]
            tokenizer = train_tokenizer(sample, vocab_size)
        else:
            tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
        save_tokenizer(tokenizer, out_folder)
        tokenizer.encode_special_tokens = True  # such words in a text are text
        progress.update(task, total=1, completed=1)
        entries = _encode_domains([d for d in chosen if d.name in read], read, tokenizer, out_folder, progress)
    manifest = {
        "format": 1,
        "vocab_size": tokenizer.get_vocab_size(),
        "special_tokens": {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS},
        "held_out_share": held_out,
        "cap_bytes": cap_bytes,
        "tokenizer_sha256": _sha256(out_folder / "tokenizer.json"),
        "totals": {
            name: {key: sum(entry[name][key] for entry in entries.values()) for key in ("documents", "bytes", "tokens")}
            for name in SPLITS
        },
        "domains": entries,
        "missing": missing,
    }
    _write_json(out_folder / "corpus.json", manifest)
    return manifest


class _Read(NamedTuple):
    """A domain's documents by the names of `SPLITS`, and how much of it is in neither."""

    kept: dict[str, list[Document]]
    left_out: dict[str, int]


def _read_domains(
    chosen: Sequence[Domain], root: Path, cap_bytes: int, held_out: float, allow_missing: bool, progress: rich.progress.Progress
) -> tuple[dict[str, _Read], dict[str, str]]:
    """Domains by name, and why others are missing."""
    read: dict[str, _Read] = {}
    missing: dict[str, str] = {}
    task = progress.add_task("reading", total=len(chosen))
    for domain in chosen:
        progress.update(task, description=f"reading {domain.name}")
        try:
            documents = load(domain, root)
        except MissingText as error:
            if not allow_missing:
                raise
            missing[domain.name] = str(error)
        else:
            train, held = split(documents, held_out)
            most = int(cap_bytes * held_out / (1 - held_out))
            kept = {"train": capped(train, cap_bytes), "held_out": capped(held, most)}
            unused = {"documents": len(documents) - sum(map(len, kept.values())), "bytes": _bytes(documents) - sum(map(_bytes, kept.values()))}
            read[domain.name] = _Read(kept, unused)
        progress.advance(task)
    if not read:
        raise MissingText("no domain has any text here: " + "; ".join(missing.values()))
    return read, missing


def _encode_domains(
    chosen: Sequence[Domain], read: Mapping[str, _Read], tokenizer: tokenizers.Tokenizer, out_folder: Path, progress: rich.progress.Progress
) -> dict[str, dict[str, Any]]:
    """Writes their token streams; what the manifest says of each."""
    entries: dict[str, dict[str, Any]] = {}
    task = progress.add_task("encoding", total=len(chosen))
    for domain in chosen:
        progress.update(task, description=f"encoding {domain.name}")
        entry: dict[str, Any] = {"licence": domain.licence, "description": domain.description, "packages": package_versions(domain)}
        for name in SPLITS:
            entry[name] = _write_stream(out_folder / name / f"{domain.name}.npy", tokenizer, read[domain.name].kept[name])
        entries[domain.name] = entry | {"left_out": read[domain.name].left_out}
        progress.advance(task)
    return entries


def _bytes(documents: Iterable[Document]) -> int:
    return sum(len(text.encode("utf-8")) for _, text in documents)


def _write_stream(path: Path, tokenizer: tokenizers.Tokenizer, documents: Sequence[Document]) -> dict:
    tokens = encode_documents(tokenizer, documents)
    np.save(path, tokens)
    size = _bytes(documents)
    return {
        "documents": len(documents),
        "bytes": size,
        "tokens": len(tokens),
        "bytes_per_token": round(size / len(tokens), 4),
        "sha256": _sha256(path),
    }


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Token streams as they lie on disk, mapped, not read.

    Attributes:
        folder: where build_corpus wrote it.
        manifest: corpus.json.
        streams: split -> domain -> uint16 tokens.
    """

    folder: Path
    manifest: dict
    streams: Mapping[str, Mapping[str, UInt16[np.ndarray, "N"]]]

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(self.manifest["domains"])


def load_corpus(folder: Path) -> Corpus:
    """Opens what build_corpus wrote; raises ValueError, naming the file, if a stream is not as corpus.json says."""
    folder = Path(folder)
    manifest = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    streams: dict[str, dict[str, np.ndarray]] = {name: {} for name in SPLITS}
    for name in SPLITS:
        for domain, entry in manifest["domains"].items():
            path = folder / name / f"{domain}.npy"
            tokens = np.load(path, mmap_mode="r")
            if tokens.dtype != np.uint16 or tokens.shape != (entry[name]["tokens"],):
                raise ValueError(
                    f"{path}: expected {entry[name]['tokens']} uint16 tokens, found {tokens.shape} {tokens.dtype}"
                )
            streams[name][domain] = tokens
    return Corpus(folder, manifest, streams)


def domain_weights(corpus: Corpus, split: str = "train", power: float = 0.7) -> dict[str, float]:
    """Share of each domain in a batch, proportional to its tokens to the `power` (1: by size; 0: all alike)."""
    sizes = {domain: len(tokens) ** power for domain, tokens in corpus.streams[split].items()}
    total = sum(sizes.values())
    return {domain: size / total for domain, size in sizes.items()}


def sample_batch(
    corpus: Corpus,
    rng_seed: int,
    step: int,
    B: int,
    T: int,
    weights: Mapping[str, float] | None = None,
    split: str = "train",
) -> Int32[np.ndarray, "B T+1"]:
    """Random windows of random domains; the same (corpus, rng_seed, step, B, T, weights, split) give the same batch.

    Args:
        corpus: from load_corpus.
        rng_seed: seed of the run.
        step: training step; steps are independent of each other, so a run resumes anywhere.
        B: rows.
        T: tokens of input per row; one more comes with them, as the last target.
        weights: relative weight per domain, `domain_weights(corpus, split)` by default; others are not drawn.
        split: "train" or "held_out".

    Returns:
        int32 [B, T+1] token ids.

    Raises:
        KeyError: weights name a domain that the corpus lacks.
        ValueError: weights do not sum to a positive number, or a domain to be drawn is shorter than a window.
    """
    weights = domain_weights(corpus, split) if weights is None else weights
    streams = corpus.streams[split]
    names = [name for name, weight in weights.items() if weight > 0]
    for name in names:
        if name not in streams:
            raise KeyError(f"no domain {name!r} in the corpus; it has {', '.join(streams)}")
        if len(streams[name]) < T + 1:
            raise ValueError(f"{split} text of {name!r} has {len(streams[name])} tokens, a window needs {T + 1}")
    if not names:
        raise ValueError("all weights are zero")
    rng = np.random.default_rng((rng_seed, step, SPLITS.index(split)))
    draws = rng.random((B, 2))  # [B, (domain, place)]
    edges = np.cumsum([weights[name] for name in names])
    which = np.minimum(np.searchsorted(edges, draws[:, 0] * edges[-1], side="right"), len(names) - 1)
    batch = np.empty((B, T + 1), np.int32)
    for row in range(B):
        tokens = streams[names[which[row]]]
        at = int(draws[row, 1] * (len(tokens) - T))
        batch[row] = tokens[at : at + T + 1]
    return batch


def windows(
    corpus: Corpus, domain: str, T: int, split: str = "held_out", most: int | None = None
) -> Int32[np.ndarray, "N T+1"]:
    """Windows of a domain in order, for evaluation: they share only a border token, so each is predicted once.

    Args:
        corpus: from load_corpus.
        domain: its name.
        T: tokens predicted per window; a rest shorter than that is not returned.
        split: "held_out" or "train".
        most: most windows, spread evenly over the stream.

    Returns:
        int32 [N, T+1] token ids.
    """
    tokens = corpus.streams[split][domain]
    starts = np.arange(0, len(tokens) - T, T)
    if most is not None and len(starts) > most:
        starts = starts[np.linspace(0, len(starts) - 1, most).astype(int)]
    return np.asarray(tokens)[starts[:, None] + np.arange(T + 1)].astype(np.int32)
