"""The readers of the small model's texts, on files made here."""

import gzip
import struct
import zlib

import pytest

from jaxmoe.train import sources
from tests.train.prose import prose


def test_table_is_complete():
    table = sources.domains()
    assert len({d.name for d in table}) == len(table)
    assert all(d.name.isidentifier() and d.licence and d.description for d in table)
    assert all(d.debian or d.python or d.name == "python_code" for d in table)


@pytest.mark.parametrize("domain", [d for d in sources.domains() if d.debian], ids=lambda d: d.name)
def test_missing_text_names_the_packages(domain, tmp_path):
    with pytest.raises(sources.MissingText) as error:
        sources.load(domain, tmp_path)
    assert domain.name in str(error.value)
    assert all(package in str(error.value) for package in domain.debian)


def test_passages_join_to_the_text():
    for body in (prose(1, 6000), "one line without an end", "a\n" * 5000, ""):
        parts = sources.passages(body, 2000)
        assert "".join(parts) == body
        assert all(1000 < len(part) < 4000 for part in parts[:-1])


def test_html_becomes_text():
    page = """<html><head><title>T</title><style>x{}</style></head><body><nav>Menu</nav>
    <div class="navheader">Prev</div>
    <main><h2>Slots &amp; pools<a class="headerlink">¶</a></h2><p>A slot holds
    one <b>expert</b>.<br>Next line.</p><ul><li><p>first</p></li><li>second</li></ul><pre>a  =  1
  b = 2</pre></main><footer>Copyright</footer><script>var x;</script></body></html>"""
    found = sources.html_text(page.replace("one <b>", "one " + "very " * 20 + "<b>"))
    assert found.startswith("## Slots & pools\n\nA slot holds one very")
    assert "expert.\nNext line." in found
    assert "- first" in found and "- second" in found
    assert "a  =  1\n  b = 2" in found
    assert not any(word in found for word in ("Menu", "Prev", "Copyright", "var x", "x{}", "¶"))


def test_lines_on_most_pages_are_dropped():
    pages = [(f"p{i}", f"Project manual, version 9\nPage {i} says {i}.\n") for i in range(40)]
    assert sources._without_repeated_lines(pages)[3] == ("p3", "Page 3 says 3.\n")


def test_readers_of_packed_formats(tmp_path):
    lines = ["EMMA", "", *(f"Line {i} of a caf\u00e9 novel." for i in range(150))]
    strings = b"".join(struct.pack(">II", 0x40009, len(s.encode())) + s.encode() for s in lines)
    block = zlib.compress(b"X\n\0\0\0\3\0\4\2\1\0\3\5\0\0\0\0\5UTF-8" + struct.pack(">II", 16, len(lines)) + strings)
    data = tmp_path / "usr/lib/R/site-library/janeaustenr/data"
    data.mkdir(parents=True)
    (data / "Rdata.rdb").write_bytes(2 * (struct.pack(">I", 9999) + block))
    novels = list(sources._novels_of_austen(tmp_path))
    assert [name for name, _ in novels] == ["austen/0-emma", "austen/1-emma"]
    assert novels[0][1] == "\n".join(lines) + "\n"

    module = tmp_path / "usr/share/sword/modules/texts/ztext/engWEBtest"
    module.mkdir(parents=True)
    book = zlib.compress(b'<title>Ruth</title><w lemma="x">In</w> the days .<note>n</note><chapter eID="1"/>More')
    (module / "ot.bzz").write_bytes(b"\xff" * 5 + book)
    (module / "ot.bzs").write_bytes(struct.pack("<III", 5, len(book), 0))
    ((name, found),) = sources._world_english_bible(tmp_path)
    assert name == "web/ot-00"
    assert [line.strip() for line in found.splitlines()] == ["Ruth", "In the days.", "More"]

    glosses = tmp_path / "usr/share/wordnet"
    glosses.mkdir(parents=True)
    line = '00001740 03 n 02 big_cat 0 lion(p) 0 000 | a large animal; "it roars"  '
    (glosses / "data.noun").write_text(f"  1 licence | text\n{line}\n")
    assert list(sources._wordnet(tmp_path)) == [("wordnet/noun", 'big cat, lion (n.): a large animal; "it roars"\n')]


def test_text_files_of_any_encoding(tmp_path):
    (tmp_path / "a.txt").write_bytes("na\u00efve\r\nend".encode("latin-1"))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfna\xc3\xafve\nend")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress("na\u00efve\nend".encode()))
    assert {sources.read_text(path) for path in tmp_path.iterdir()} == {"na\u00efve\nend"}


def test_book_loses_its_distributor_notices():
    body = "Notice\n*** START OF THIS BOOK ***\nIt was a night.\n*** END OF THIS BOOK ***\nMore notice"
    assert sources._book(body) == "It was a night.\n"
    assert sources._book("Plain sources.") == "Plain sources.\n"
