"""Every family against transformers: logits that it gave in float32 for tiny random models (`scripts/make_goldens.py` made the files)."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints.convert import convert
from checkpoints.load import open_checkpoint
from jaxmoe.engine.model import Model, load_model
from jaxmoe.spec import FAMILIES, ModelSpec
from pallas_kernels.dispatch import Kernels
from scripts import golden_cases, make_goldens
from scripts.golden_cases import CASES
from tests.models import decode_logits, host_driven_step, prefill_logits, slot_model

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
TOLERANCE = 2e-5
FIRST = tuple(next(iter(cases)) for cases in golden_cases.FAMILIES.values())
"""The case of each family that is run in every way."""

DECODED = 12
"""Tokens of each sequence that are decoded one by one, where all would take long."""

POSITIONS = 256
"""Of every sequence's cache; longrope takes its long factors where this is more than a model was trained on."""

MATTERS = [(name, change) for name, case in CASES.items() for change in case.matters]


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


@pytest.fixture(scope="module")
def run_on_cpu(checkpoint_of):
    """Runs a case as the CPU does by default: `(model, logits of both sequences together)`."""
    found = {}

    def run(name: str):
        if name not in found:
            model = load(checkpoint_of(name), "float32", Kernels("cpu"))
            found[name] = model, together(model, golden(name)[1])
        return found[name]

    return run


def load(checkpoint, dtype: str, kernels: Kernels, unroll: bool | None = None) -> Model:
    return load_model(checkpoint, dtype, kernels, unroll).for_positions(POSITIONS)


def requests_of(ids: list[np.ndarray]) -> list[list[int]]:
    return [list(map(int, i)) for i in ids]


def together(model, ids: list[np.ndarray]) -> list[np.ndarray]:
    """Both sequences in one step."""
    requests = requests_of(ids)
    tokens = 128 if max(map(len, requests)) <= 64 else 256
    return prefill_logits(model, requests, [[(i, 0, len(r)) for i, r in enumerate(requests)]], tokens, positions=POSITIONS)


def worst(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.abs(g - e).max()) for g, e in zip(got, expected, strict=True))


def same_bits(got: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(np.array_equal(g.view(np.uint32), e.view(np.uint32)) for g, e in zip(got, expected, strict=True))


def test_every_family_has_goldens():
    assert sorted(golden_cases.FAMILIES) == sorted(FAMILIES)
    names = sorted([*CASES, make_goldens.SHIPPED_CASE])
    assert sorted(p.stem for p in GOLDENS.glob("*.json")) == sorted(p.stem for p in GOLDENS.glob("*.npz")) == names
    for name, case in CASES.items():
        made, ids, logits = golden(name)
        assert made["config"] == case.config
        assert made["unsteady"] <= make_goldens.STEADY
        assert ModelSpec.from_hf(case.config).family in golden_cases.FAMILIES
        for i, expected in zip(ids, logits, strict=True):
            assert len(expected) == len(i) and expected.dtype == np.float32
            assert expected.std() > 0.3 and np.abs(expected).max() < 50


@pytest.mark.parametrize("name", CASES)
def test_the_weights_are_those_that_transformers_ran(name):
    made, _, _ = golden(name)
    assert make_goldens.digest(made["config"], made["seed"]) == made["weights_sha256"]


@pytest.mark.parametrize("name", CASES)
def test_prompts_in_a_ragged_batch(run_on_cpu, name):
    assert worst(run_on_cpu(name)[1], golden(name)[2]) <= TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_stacked_layers_and_plain_kernels(checkpoint_of, name):
    """The form that accelerators run: layers scanned, caches gathered, no CPU kernels."""
    _, ids, expected = golden(name)
    model = load(checkpoint_of(name), "float32", Kernels("reference"), unroll=False)
    assert worst(together(model, ids), expected) <= TOLERANCE


@pytest.mark.parametrize("name", FIRST)
def test_decoding_gives_the_bits_of_the_prompt(run_on_cpu, name):
    """Token by token out of the cache, alone and side by side."""
    model, expected = run_on_cpu(name)
    requests = [r[:DECODED] for r in requests_of(golden(name)[1])]
    cut = [e[:DECODED] for e in expected]
    assert same_bits(decode_logits(model, requests, 4, positions=POSITIONS), cut)
    assert same_bits(decode_logits(model, requests[:1], 1, rows=2, positions=POSITIONS), cut[:1])


@pytest.mark.parametrize("name", FIRST)
def test_a_prompt_in_pieces_and_alone_gives_the_same_bits(run_on_cpu, name):
    model, expected = run_on_cpu(name)
    requests = requests_of(golden(name)[1])
    longest = max(map(len, requests))
    borders = [0, 17, 20, *range(60, longest, 60), longest]
    pieces = [
        [(i, start, min(stop, len(r))) for i, r in enumerate(requests) if start < len(r)] for start, stop in zip(borders, borders[1:], strict=False)
    ]
    assert same_bits(prefill_logits(model, requests, pieces, 128, positions=POSITIONS), expected)
    assert same_bits(
        prefill_logits(model, requests[1:], [[(0, 0, len(requests[1]))]], 128 if len(requests[1]) <= 128 else 256, positions=POSITIONS), expected[1:]
    )


@pytest.mark.parametrize("name", FIRST)
def test_streamed_experts_at_the_smallest_budget_give_the_resident_bits(run_on_cpu, name):
    """As many slots a layer as a token needs experts, and one to pass through: the prompt in waves, decoding, and the host-driven mode."""
    model, expected = run_on_cpu(name)
    requests = requests_of(golden(name)[1])
    streamed = slot_model(model, model.spec.moe[0].active, staging=1)
    assert same_bits(together(streamed, golden(name)[1]), expected)
    short, cut = [r[:DECODED] for r in requests], [e[:DECODED] for e in expected]
    assert same_bits(decode_logits(streamed, short, 4, positions=POSITIONS), cut)
    assert same_bits(decode_logits(streamed, short, 4, positions=POSITIONS, step=host_driven_step(streamed)), cut)


@pytest.mark.parametrize("name", FIRST)
def test_bfloat16_stays_near(run_on_cpu, checkpoint_of, name):
    _, ids, expected = golden(name)
    model = load(checkpoint_of(name), "bfloat16", Kernels("cpu"))
    got = together(model, ids)
    errors = np.concatenate([np.linalg.norm(g - e, axis=1) / np.linalg.norm(e, axis=1) for g, e in zip(got, expected, strict=True)])
    assert np.median(errors) < 0.06 and not np.isnan(errors).any()


@pytest.mark.parametrize(("name", "change"), MATTERS, ids=[f"{name}-{'-'.join(f'{k}={v}' for k, v in c.items())[:60]}" for name, c in MATTERS])
def test_every_field_matters(checkpoint_of, name, change):
    """The same weights read by another config give other logits: the goldens would notice a field that is ignored."""
    made, ids, expected = golden(name)
    model = load(checkpoint_of(name), "float32", Kernels("reference"), unroll=False)
    spec = ModelSpec.from_hf({**made["config"], **change}).for_positions(POSITIONS)
    changed = dataclasses.replace(model, spec=dataclasses.replace(spec, precision=model.spec.precision))
    assert worst(together(changed, ids), expected) > 50 * TOLERANCE
