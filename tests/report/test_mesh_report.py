"""What a run on a mesh reports: bytes of each device by hand, and a hit rate over all of them."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxmoe.engine.generate import Engine, Timings
from jaxmoe.engine.mesh import bank_spec
from jaxmoe.engine.model import Offload, slot_bank
from jaxmoe.report.mesh_report import lines, mesh_report
from tests.mesh_models import on_split
from tests.models import random_model

ROWS = 8


@pytest.fixture(scope="module")
def model():
    return random_model("olmoe")


def nbytes(tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_resident_experts(model):
    split = on_split(model, "data=2,expert=4")
    found = mesh_report(Engine(split, ROWS, 200, True), Timings())
    kv = 2 * 2 * 2 * 16 * 384 * 4  # layers, keys and values, heads, their width, 200 positions in 256 and a run of 64 in whole lines of 128
    assert found == {
        "split": "data=2,expert=4,attention=data,exchange=tokens", "devices": 8,
        "device_bytes": {"params": nbytes(model.params), "experts": nbytes(model.bank) // 4, "kv": kv},
    }  # fmt: skip
    (line,) = lines(found)
    assert line.startswith("8 devices (data=2,expert=4,attention=data,exchange=tokens); each holds params ") and line.endswith("kv 197 kB")


def test_streamed_experts(model):
    split = on_split(model, "expert=4,attention=tensor")
    own = bank_spec(split.spec, split.on.layout)
    split = dataclasses.replace(split, bank=slot_bank(own, None, Offload(2, 1)))
    counted = {"requests": np.array([30, 10]), "hits": np.array([20, 9]), "loads": np.array([10, 1])}
    found = mesh_report(Engine(split, ROWS, 200, True), Timings(decode_tokens=22, decode_experts=counted))
    record = 3 * 64 * 48 * 4
    assert found["slots"] == [2, 2] and found["hit_rate"] == 29 / 40 and found["bytes_per_token"] == 11 * record / 22
    assert found["device_bytes"]["experts"] == (2 * 2 + 1) * record, "slots of two layers, and one for staging"
    assert found["device_bytes"]["params"] < nbytes(model.params)
    assert lines(found)[1] == "2 slots a layer on each device: 72.5 % hits, 18.4 kB a token over all links"
    assert lines(found | {"slots": [2, 3]})[1].startswith("2 to 3 slots a layer")


def test_nothing_decoded(model):
    split = dataclasses.replace(on_split(model, "data=2"), bank=slot_bank(model.spec, None, Offload(2, 1)))
    nothing = dict.fromkeys(("requests", "hits", "loads"), np.zeros(2, int))
    found = mesh_report(Engine(split, ROWS, 200, True), Timings(decode_experts=nothing))
    assert found["hit_rate"] is None and found["bytes_per_token"] is None and len(lines(found)) == 1
