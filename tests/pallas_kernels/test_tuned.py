"""Tile sizes that were measured are found again, for the shapes and the device that they were measured on."""

import json

import pytest

from pallas_kernels import tuned


@pytest.fixture
def table(tmp_path, monkeypatch):
    """A table of two problems, in the place of those that ship."""
    folder = tmp_path / "some_op" / "tuned"
    folder.mkdir(parents=True)
    measured = [{"problem": {"m": m, "n": 64}, "config": {"rows": m // 8}, "seconds": 1e-5, "tried": 3} for m in (64, 512)]
    (folder / "card.json").write_text(json.dumps({"device": "Card", "versions": {}, "measured": measured}))
    monkeypatch.setattr(tuned, "ROOT", tmp_path)
    tuned.read.cache_clear()
    yield folder
    tuned.read.cache_clear()


@pytest.mark.parametrize(("m", "rows"), [(64, 8), (100, 8), (200, 64), (512, 64), (2048, 64), (16, 8), (15, None), (2049, None)])
def test_the_nearest_number_of_rows_is_taken_up_to_four_times_as_many_or_few(table, m, rows):
    assert tuned.find("some_op", {"m": m, "n": 64}, "m", "Card") == (None if rows is None else {"rows": rows})


def test_another_size_or_device_has_nothing(table):
    assert tuned.find("some_op", {"m": 64, "n": 128}, "m", "Card") is None
    assert tuned.find("some_op", {"m": 64, "n": 64, "k": 64}, "m", "Card") is None
    assert tuned.find("some_op", {"m": 64, "n": 64}, "m", "Other") is None
    assert tuned.find("some_op", {"m": 64, "n": 64}, "m") is None  # the device of this process
    assert tuned.find("other_op", {"m": 64, "n": 64}, "m", "Card") is None


def test_a_damaged_file_is_named(table):
    (table / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json is damaged: 'measured'"):
        tuned.find("some_op", {"m": 64, "n": 64}, "m", "Card")
