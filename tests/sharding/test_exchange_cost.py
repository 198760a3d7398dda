"""Closed forms of what exchanges send, against counts of random routings."""

import dataclasses

import numpy as np
import pytest

from sharding.exchange_cost import (
    Shape,
    best_exchange,
    coherent_ragged,
    devices_of_token,
    distinct,
    even_rooms,
    traffic,
    transport,
    wave_size,
    waves,
    worst_rooms,
)  # fmt: skip

LAYER = Shape(tokens=512, active=8, experts=128, devices=8, width=2048, hidden=768)


def test_expected_numbers_are_those_of_random_routing():
    r = np.random.default_rng(0)
    ids = np.stack([r.permutation(128)[:8] for _ in range(4000)])
    to = np.mean([len(set(row)) for row in ids // 16])
    asked = np.mean([len(np.unique(part)) for part in ids.reshape(-1, 20, 8)])
    assert devices_of_token(8, 8) == pytest.approx(to, rel=0.04)  # a little fewer: a token's experts differ, which spreads them
    assert distinct(128, 8, 20) == pytest.approx(asked, rel=0.01)


def test_rooms_hold_even_shares_and_never_more_than_the_worst_case():
    assert worst_rooms(10, 8, 16) == (10, 80) and worst_rooms(10, 8, 4) == (10, 40)
    for tokens in (1, 7, 64, 513):
        for devices in (2, 8, 64):
            even, worst = even_rooms(tokens, 8, 128 // devices, devices), worst_rooms(tokens, 8, 128 // devices)
            assert even.tokens <= worst.tokens and min(8, 128 // devices) <= even.results <= worst.results
            assert even.results >= min(worst.results, tokens * 8 / devices) and even.tokens >= 1


def test_traffic_in_numbers():
    one = dataclasses.replace(LAYER, tokens=1)
    assert transport("tpu", 8 * 8 * 2048 * 2) == "whole"
    assert traffic("tokens", one) == 8 * ((2048 + 8) + 8 * 2048) * 2 * 7 / 8
    assert traffic("gather", one) == traffic("tokens", one)
    assert traffic("weights", LAYER) == 8 * 2 * waves(LAYER) * 3 * 2048 * 768 * 2 * 7 / 8 and wave_size(128, 8) == 2 and waves(LAYER) == 8
    top1 = Shape(1, 1, 16, 8, 512, 768, kv_width=256)
    assert not coherent_ragged("tpu", 8, 8, 512, 2)
    assert traffic("coherent", top1) == (8 * 8 * 515 * 2 + 8 * 256 * 2) * 7 / 8
    with pytest.raises(ValueError, match="exchange = 'mail'"):
        traffic("mail", LAYER)  # type: ignore[arg-type]


def test_what_is_best_changes_with_the_number_of_tokens():
    cpu = dataclasses.replace(LAYER, backend="cpu")
    assert best_exchange(dataclasses.replace(cpu, tokens=1)) == "tokens" and traffic("gather", cpu) > traffic("tokens", cpu)
    assert best_exchange(dataclasses.replace(cpu, tokens=1), sums=True) == "gather"
    assert best_exchange(dataclasses.replace(cpu, devices=64), sums=True) == "tokens"
    for tokens in (1, 3, 100):
        for devices in (2, 32, 128):
            few = dataclasses.replace(cpu, tokens=tokens, devices=devices)
            assert traffic("tokens", few) <= traffic("gather", few)
    many = dataclasses.replace(cpu, tokens=3 * 768 * 128)
    assert best_exchange(many) == "weights" and best_exchange(dataclasses.replace(many, tokens=768)) == "tokens"
