"""Our logits against those that transformers gave in float32 for tiny models of every family (`scripts/make_goldens.py` made the files)."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints.convert import convert
from checkpoints.load import open_checkpoint
from jaxmoe.engine.model import load_model
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels
from scripts import make_goldens
from tests.models import prefill_logits

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
TOLERANCE = 2e-5
KERNELS = {"cpu": Kernels("cpu"), "cpu-fast": Kernels("cpu", row_invariant=False), "reference": Kernels("reference")}
EVERY_WAY = ("qwen3_moe_tied", "olmoe_clipped", "mixtral_windowed")
WAYS = [
    (name, kernels, unroll)
    for name in make_goldens.CASES
    for kernels in KERNELS
    for unroll in (True, False)
    if name in EVERY_WAY or (kernels, unroll) in (("cpu", True), ("reference", False))
]
"""Every way of running one case of each family; the CPU's own and the plainest way of running the others."""

MATTERS = [
    ("qwen3_moe_normalized", {"norm_topk_prob": False}),
    ("qwen3_moe_tied", {"use_sliding_window": False}),
    ("qwen3_moe_tied", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    ("olmoe_clipped", {"clip_qkv": None}),
    ("olmoe_clipped", {"norm_topk_prob": True}),
    ("olmoe_normalized", {"rope_theta": 1e6}),
    ("mixtral_windowed", {"sliding_window": 15}),
    ("mixtral_windowed", {"rope_theta": 1e4}),
    ("mixtral_full", {"rms_norm_eps": 1e-2}),
]
"""Cases, and a change of one field that must show."""


def golden(name: str) -> tuple[dict, list[np.ndarray], list[np.ndarray]]:
    """(what NAME.json says, ids, logits) of a case."""
    made = json.loads((GOLDENS / f"{name}.json").read_text())
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        return made, [arrays["ids_0"], arrays["ids_1"]], [arrays["logits_0"], arrays["logits_1"]]


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory):
    """Opens a case's converted folder, made at its first use."""
    found = {}

    def make(name: str):
        if name not in found:
            made, folder = golden(name)[0], tmp_path_factory.mktemp(name)
            make_goldens.write_folder(folder / "hf", made["config"], made["seed"])
            convert(folder / "hf", folder / "converted")
            found[name] = open_checkpoint(folder / "converted")
        return found[name]

    return make


def logits_of(model, ids: list[np.ndarray]) -> list[np.ndarray]:
    """Both sequences in one step."""
    requests = [list(map(int, i)) for i in ids]
    tokens = 128 if max(map(len, requests)) <= 64 else 256
    return prefill_logits(model, requests, [[(i, 0, len(r)) for i, r in enumerate(requests)]], tokens, positions=256)


def worst(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.abs(g - e).max()) for g, e in zip(got, expected, strict=True))


def test_the_files_are_those_of_the_cases():
    names = sorted([*make_goldens.CASES, make_goldens.SHIPPED_CASE])
    assert sorted(p.stem for p in GOLDENS.glob("*.json")) == sorted(p.stem for p in GOLDENS.glob("*.npz")) == names
    for name, config in make_goldens.CASES.items():
        made, ids, logits = golden(name)
        assert made["config"] == config
        assert made["smallest_router_gap"] >= make_goldens.SMALLEST_GAP
        for i, expected in zip(ids, logits, strict=True):
            assert expected.shape == (len(i), config["vocab_size"]) and expected.dtype == np.float32
            assert expected.std() > 0.3 and np.abs(expected).max() < 30


@pytest.mark.parametrize("name", make_goldens.CASES)
def test_the_weights_are_those_that_transformers_ran(name):
    made, _, _ = golden(name)
    assert make_goldens.digest(made["config"], made["seed"]) == made["weights_sha256"]


@pytest.mark.parametrize(("name", "kernels", "unroll"), WAYS, ids=[f"{n}-{k}-{'unrolled' if u else 'stacked'}" for n, k, u in WAYS])
def test_logits(checkpoint_of, name, kernels, unroll):
    _, ids, expected = golden(name)
    model = load_model(checkpoint_of(name), "float32", KERNELS[kernels], unroll)
    got = logits_of(model, ids)
    assert worst(got, expected) <= TOLERANCE


@pytest.mark.parametrize(("name", "change"), MATTERS, ids=[f"{name}-{key}={value}" for name, c in MATTERS for key, value in c.items()])
def test_every_field_matters(checkpoint_of, name, change):
    """The same weights read by another config give other logits: the goldens would notice a field that is ignored."""
    made, ids, expected = golden(name)
    model = load_model(checkpoint_of(name), "float32", Kernels("reference"), unroll=False)
    spec = ModelSpec.from_hf({**made["config"], **change})
    changed = dataclasses.replace(model, spec=dataclasses.replace(spec, precision=model.spec.precision))
    assert worst(logits_of(changed, ids), expected) > 50 * TOLERANCE
