"""A model whose experts live in host memory gives the bits of one whose experts are all on the device, whatever the setting.

Few combinations, over 16 decode steps each (64 with `--exhaustive`), that hold every pair of model, dtype, batch, budget, policy and mode. Empty
slots and used staging slots hold NaN. The shipped model is in `test_slots_exact.py`.
"""

import functools
import itertools
from collections.abc import Callable

import numpy as np
import pytest

from jaxmoe.engine.model import Model
from tests.engine.test_invariance import bits
from tests.models import decode_logits, host_driven_step, prefill_logits, random_model, slot_model

LENGTHS = (16, 16, 12, 16, 7, 16, 16, 3)
"""Sequences of a batch of 8, four times as long with `--exhaustive`; rows become padding as the shorter ones end."""

FACTORS = {
    "model": ("olmoe", "qwen3_moe"),
    "dtype": ("float32", "bfloat16"),
    "batch": (1, 8),
    "budget": ("minimum", "half", "all"),
    "policy": ("lru", "lfu", "static"),
    "mode": ("fused", "layer-grouped", "host-driven"),
}


def whole_prompts(model: Model, requests: list[list[int]], batch: int) -> list[np.ndarray]:
    """All requests in one step, as prompts: each expert crosses the link once."""
    return prefill_logits(model, requests, [[(i, 0, len(ids)) for i, ids in enumerate(requests)]], 512 if batch > 1 else 128)


def host_driven(model: Model, requests: list[list[int]], batch: int) -> list[np.ndarray]:
    return decode_logits(model, requests, batch, step=host_driven_step(model))


MODES: dict[str, Callable] = {"fused": decode_logits, "layer-grouped": whole_prompts, "host-driven": host_driven}
"""How a model is run for its logits, by mode: `(model, requests, batch) -> logits of each`."""


def pairs_of(choice: tuple) -> set:
    """Every two factors of a combination, with their values."""
    return set(itertools.combinations(enumerate(choice), 2))


def cover(factors: dict[str, tuple]) -> list[tuple]:
    """Few combinations of values, one a factor, that hold every pair of values of every two factors: greedily, the first best."""
    every = list(itertools.product(*factors.values()))
    left, chosen = set().union(*map(pairs_of, every)), []
    while left:
        chosen.append(max(every, key=lambda choice: len(pairs_of(choice) & left)))
        left -= pairs_of(chosen[-1])
    return chosen


COVER = cover(FACTORS)


def test_every_pair_is_held():
    for (a, some), (b, others) in itertools.combinations(enumerate(FACTORS.values()), 2):
        assert {(choice[a], choice[b]) for choice in COVER} == set(itertools.product(some, others))
    assert len(COVER) <= 13


@pytest.fixture(scope="module")
def model_of() -> Callable[[str, str], Model]:
    """Resident models by (name, dtype), scanned over stacked layers: a program compiles in less time, and knows its layer only as it runs."""
    return functools.cache(lambda name, dtype: random_model(name, dtype, unroll=False))


@pytest.fixture(scope="module")
def requests_of(exhaustive) -> Callable[[Model], list[list[int]]]:
    def requests(model: Model) -> list[list[int]]:
        rng = np.random.default_rng(3)
        return [rng.integers(0, model.spec.vocab, 4 * n if exhaustive else n).tolist() for n in LENGTHS]

    return requests


@pytest.fixture(scope="module")
def resident_logits(model_of, requests_of) -> Callable[[str, str], list[np.ndarray]]:
    """Of all requests side by side; that a request alone has the same bits is tested in `test_invariance.py`."""
    return functools.cache(lambda name, dtype: decode_logits(model_of(name, dtype), requests_of(model_of(name, dtype)), len(LENGTHS)))


def slots_of(model: Model, budget: str) -> int:
    router, _ = model.spec.moe
    return {"minimum": router.active, "half": router.experts // 2, "all": router.experts}[budget]


@pytest.mark.parametrize(tuple(FACTORS), COVER)
def test_a_pairwise_cover(model_of, requests_of, resident_logits, model, dtype, batch, budget, policy, mode):
    resident = model_of(model, dtype)
    offloaded = slot_model(resident, slots_of(resident, budget), 1 + (policy == "lru"), policy)
    got = MODES[mode](offloaded, requests_of(resident)[:batch], batch)
    for i, (ours, expected) in enumerate(zip(got, resident_logits(model, dtype), strict=False)):
        differ = (bits(ours) != bits(expected)).any(axis=1)
        assert not differ.any(), f"request {i} differs at steps {np.flatnonzero(differ).tolist()}"
