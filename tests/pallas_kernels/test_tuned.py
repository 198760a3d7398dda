"""Tile sizes that were measured are found again, for the shapes and the device that they were measured on."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import tuned
from pallas_kernels.grouped_matmul import gpu
from pallas_kernels.paged_attention import gpu as attention
from pallas_kernels.paged_attention.types import Pages, Queries


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
    assert tuned.find("some_op", {"m": m, "n": 64}, ("m",), "Card") == (None if rows is None else {"rows": rows})


def test_another_size_or_device_has_nothing(table):
    assert tuned.find("some_op", {"m": 64, "n": 128}, ("m",), "Card") is None
    assert tuned.find("some_op", {"m": 64, "n": 64, "k": 64}, ("m",), "Card") is None
    assert tuned.find("some_op", {"m": 64, "n": 64}, ("m",), "Other") is None
    assert tuned.find("some_op", {"m": 64, "n": 64}, ("m",)) is None  # the device of this process
    assert tuned.find("other_op", {"m": 64, "n": 64}, ("m",), "Card") is None


def test_several_things_may_differ_but_not_by_more_together(table):
    assert tuned.find("some_op", {"m": 128, "n": 128}, ("m", "n"), "Card") == {"rows": 8}
    assert tuned.find("some_op", {"m": 24, "n": 128}, ("m", "n"), "Card") is None


def test_a_damaged_file_is_named(table):
    (table / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="other.json is damaged: 'measured'"):
        tuned.find("some_op", {"m": 64, "n": 64}, ("m",), "Card")


def test_the_grouped_matmul_takes_what_was_measured_if_it_fits(tmp_path, monkeypatch):
    x, pool, sizes = jnp.zeros((64, 256), jnp.bfloat16), jnp.zeros((2, 128, 256), jnp.uint16), jnp.zeros(2, jnp.int32)
    problem = gpu.Problem.of(x, pool, sizes)
    fits, does_not = dataclasses.replace(gpu.heuristic(problem), rows=8, stages=2), dataclasses.replace(gpu.heuristic(problem), rows=24, stages=99)
    folder = tmp_path / "grouped_matmul" / "tuned"
    folder.mkdir(parents=True)
    monkeypatch.setattr(tuned, "ROOT", tmp_path)
    for config, expected in ((fits, fits), (does_not, gpu.heuristic(problem))):
        entry = {"problem": gpu.tuning_key(problem), "config": dataclasses.asdict(config)}
        (folder / "card.json").write_text(json.dumps({"device": jax.devices()[0].device_kind, "measured": [entry]}))
        tuned.read.cache_clear()
        assert gpu.choose(problem) == expected
        assert gpu.choose(dataclasses.replace(problem, m=2, groups=128)) == gpu.choose(dataclasses.replace(problem, m=2, groups=2))
    tuned.read.cache_clear()


def test_paged_attention_takes_what_was_measured_if_it_fits(tmp_path, monkeypatch):
    q = jnp.zeros((4, 8, 64), jnp.bfloat16)
    pages = Pages(jnp.zeros((8, 2, 32, 64), jnp.uint16), jnp.zeros((8, 2, 32, 64), jnp.uint16))
    ints = jnp.zeros(4, jnp.int32)
    queries = Queries(jnp.zeros((4, 64), jnp.int32), ints, ints, ints, ints)
    plain = attention.heuristic(q, pages, queries)
    folder = tmp_path / "paged_attention" / "tuned"
    folder.mkdir(parents=True)
    monkeypatch.setattr(tuned, "ROOT", tmp_path)
    for config, expected in ((attention.Config(64, 3, None, 7), attention.Config(64, 3, None, 7)), (attention.Config(64, 99), plain)):
        entry = {"problem": attention.problem_of(q, pages, queries), "config": dataclasses.asdict(config)}
        (folder / "card.json").write_text(json.dumps({"device": jax.devices()[0].device_kind, "measured": [entry]}))
        tuned.read.cache_clear()
        assert attention.choose(q, pages, queries) == expected
    tuned.read.cache_clear()
