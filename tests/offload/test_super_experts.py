"""Which experts are super experts, against the definition by hand; and their file: what it keeps, and how wrong ones are refused."""

import json

import numpy as np
import pytest

from jaxmoe.offload.super_experts import Criterion, PinnedExperts, load, pinned_experts, super_experts, times_median
from jaxmoe.offload.trace import model_hash
from jaxmoe.spec import ModelSpec
from tests.models import CONFIGS
from tests.offload import traces

SPEC = ModelSpec.from_hf(CONFIGS["qwen3_moe"])
LAYERS, EXPERTS = 2, 8


def by_hand(values: np.ndarray, quantile: float, share: float, layers: float) -> set[tuple[int, int]]:
    """The definition in plain Python: of the sorted values, the quantile lies on the line between its two neighbours."""
    ordered = sorted(values.reshape(-1).tolist())
    at = quantile * (len(ordered) - 1)
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    limit = ordered[low] + (at - low) * (ordered[high] - ordered[low])
    within = range(int(len(values) * layers))
    return {(l, e) for l in within for e in range(values.shape[1]) if values[l, e] > limit and values[l, e] > ordered[-1] * share}


@pytest.mark.parametrize("seed", range(40))
def test_the_criterion_is_its_definition(seed):
    rng = np.random.default_rng(seed)
    values = np.exp(3 * rng.standard_normal((rng.integers(2, 9), rng.integers(2, 65)))).astype(np.float32)
    values[rng.random(values.shape) < 0.3] = 0
    values[0, 0] = 1
    setting = (0.995, 0.1, 1.0) if seed % 2 else (rng.random(), rng.random(), 0.5 + rng.random() / 2)
    found = super_experts(values, Criterion(*setting))
    assert {tuple(place) for place in np.argwhere(found).tolist()} == by_hand(values, *setting)


def test_the_largest_are_found_and_later_layers_left_out():
    values = np.linspace(1, 2, 8 * 64).reshape(8, 64)
    values[1, 5], values[7, 3] = 500, 1000
    assert np.argwhere(super_experts(values)).tolist() == [[1, 5], [7, 3]]  # of 512, three are above the quantile and one of them is ordinary
    assert np.argwhere(super_experts(values, Criterion(layers=0.75))).tolist() == [[1, 5]]
    tall = np.ones((50, 4))
    tall[28, 1] = 99
    assert super_experts(tall, Criterion(layers=0.58))[28, 1] and not super_experts(tall, Criterion(layers=0.56)).any()
    for count in (16, 27, 61):
        with pytest.raises(ValueError, match="of .* layers is none: give at least") as refused:
            super_experts(np.ones((count, 4)), Criterion(layers=0.01))
        super_experts(np.ones((count, 4)) + np.eye(count, 4), Criterion(layers=float(str(refused.value).rsplit(" ", 1)[1])))
    assert np.argwhere(super_experts(values, Criterion(share=0.6))).tolist() == [[7, 3]]
    assert times_median(values)[7, 3] == pytest.approx(1000 / 1.5, rel=0.01)


@pytest.mark.parametrize(
    ("values", "criterion", "message"),
    [
        ([[1.0, np.nan]], {}, "layer 0: expert 1 has nan as its largest"),
        ([[1.0, 2.0], [np.inf, 1.0]], {}, "layer 1: expert 0 has inf"),
        ([[-1.0, 2.0]], {}, "layer 0: expert 0 has -1.0"),
        ([[0.0, 0.0]], {}, "no expert has given anything"),
        ([[1.0, 2.0]], {"layers": 0.75}, "layers = 0.75 of 1 layers is none"),
        ([[1.0, 2.0]], {"quantile": 1.5}, "quantile = 1.5 of super experts: give 0 to 1"),
        ([[1.0, 2.0]], {"share": float("nan")}, "share = nan"),
        ([[1.0, 2.0]], {"layers": 0.0}, "layers = 0.0 of super experts: give more than 0"),
    ],
)
def test_numbers_that_are_none(values, criterion, message):
    with pytest.raises(ValueError, match=message):
        super_experts(np.array(values), Criterion(**criterion))


def some() -> PinnedExperts:
    values = np.ones((LAYERS, EXPERTS), np.float32)
    values[1, 3], values[0, 6] = 1e3 / 3, 2e3
    return pinned_experts(SPEC, "small", values, Criterion(0.8, 0.1), tokens=7)


def test_the_file_keeps_everything(tmp_path):
    pinned = some()
    assert [row[:2] for row in pinned.pinned] == [(0, 6), (1, 3)] and pinned.criterion["tokens"] == 7 and pinned.criterion["quantile"] == 0.8
    assert np.argwhere(pinned.mask).tolist() == [[0, 6], [1, 3]] and pinned.mask.shape == (LAYERS, EXPERTS)
    (tmp_path / "p.json").write_text(pinned.to_json())
    assert load(tmp_path / "p.json") == pinned
    read = json.loads(pinned.to_json())
    assert read["format"] == "jaxmoe-pinned-experts" and read["version"] == 1 and read["spec_hash"] == model_hash(SPEC)
    none = PinnedExperts("small", None, LAYERS, EXPERTS, ())
    assert PinnedExperts.from_json(none.to_json()) == none and not none.mask.any()


def test_another_model_is_refused():
    pinned = some()
    pinned.check_model(SPEC)
    pinned.check_model(SPEC.with_precision("bfloat16"))
    with pytest.raises(ValueError, match=r"pins experts of small \(2 layers of 8 experts, spec .*, the model is olmoe \(2 layers of 8 experts"):
        pinned.check_model(ModelSpec.from_hf(CONFIGS["olmoe"]))
    pinned.check_trace(traces.random_trace(0, experts=EXPERTS))  # which doesn't say its spec
    with pytest.raises(ValueError, match=r"the model is random \(2 layers of 9 experts, spec not known\)"):
        pinned.check_trace(traces.random_trace(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no JSON", "not a file of pinned experts: Expecting value"),
        ({"format": "jaxmoe-placement"}, "its format is 'jaxmoe-placement', not 'jaxmoe-pinned-experts'"),
        ({"version": 2}, "a file of pinned experts of version 2; this program reads version 1"),
        ({"layers": 0}, "'s layers is 0, not a whole number"),
        ({"experts_a_layer": "8"}, "'s experts_a_layer is '8', not a whole number"),
        ({"spec_hash": 5}, "'s spec_hash is 5, neither"),
        ({"model": None}, "its model and its criterion are None"),
        ({"experts": None}, "its experts are None, not a list"),
        ({"experts": [[0, 8, 1.0]]}, "there is no expert 8 of layer 0: there are 2 layers of 8 experts"),
        ({"experts": [[-1, 0, 1.0]]}, "there is no expert 0 of layer -1"),
        ({"experts": [[0, 1, 1.0], [1, 1, 1], [0, 1, 2.0]]}, "expert 1 of layer 0 is pinned twice"),
        ({"experts": [[0, 1]]}, r"experts: \[0, 1\] is not layer, expert and largest"),
        ({"experts": [[0, True, 1.0]]}, "is not layer, expert and largest"),
        ({"experts": [[0, 1, float("nan")]]}, "experts: nan of expert 1 of layer 0"),
    ],
)
def test_files_that_are_wrong(tmp_path, change, message):
    path = tmp_path / "p.json"
    path.write_text(change if isinstance(change, str) else json.dumps(json.loads(some().to_json()) | change))
    with pytest.raises(ValueError, match=message) as refused:
        load(path)
    assert str(refused.value).startswith(f"{path}: ") and "\n" not in str(refused.value)
    path.write_bytes(b"\xff")
    with pytest.raises(ValueError, match="p.json: 'utf-8' codec can't decode"):
        load(path)
