"""A model split over devices gives what it gives on one: the same bits where no sum is split, the same numbers within rounding where one is."""

import dataclasses

import numpy as np
import pytest

from jaxmoe.engine.generate import Engine, Request, Sampling
from jaxmoe.engine.mesh import devices_for
from jaxmoe.spec import ModelSpec
from sharding.split import SplitError, parse_split
from tests.mesh_models import mesh_logits, on_split
from tests.models import CONFIGS, prefill_logits, random_model
from tests.more import more
from tests.quick import QuickKernels

LENGTHS = (5, 40, 17)
WHOLE = ("data=2,expert=4", "expert=4,exchange=gather")
"""Splits that part no sum."""
PARTED = ("expert=2,tensor=2,attention=tensor",)
"""One that does; families/test_goldens_mesh.py has another."""
ROUNDING = 3e-5


def requests(model) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [list(map(int, rng.integers(0, model.spec.vocab, size=n))) for n in LENGTHS]


@pytest.fixture(scope="module")
def model(exhaustive):
    """With arrays of stacked layers; with one for each layer, which takes longer to compile, in `--exhaustive` and in `test_planned.py`."""
    return random_model("olmoe", unroll=exhaustive)


@pytest.fixture(scope="module")
def alone(model):
    """Logits and greedy tokens of one device."""
    prompts = requests(model)
    logits = prefill_logits(model, prompts, [[(i, 0, len(p)) for i, p in enumerate(prompts)]], 256)
    made, _ = Engine(model, len(prompts), 128, True).generate([Request(tuple(p), 20) for p in prompts])
    return logits, [r.ids for r in made]


@pytest.mark.parametrize("split", [*WHOLE, *PARTED])
def test_the_same_logits(model, alone, split):
    """In bits where no sum is split."""
    kernels = model.kernels if split in WHOLE else QuickKernels("cpu")
    logits = mesh_logits(on_split(dataclasses.replace(model, kernels=kernels), split), requests(model), decoded=1)
    if split in WHOLE:
        assert all(np.array_equal(a.view(np.uint32), b.view(np.uint32)) for a, b in zip(logits, alone[0], strict=True))
    assert max(float(np.abs(a - b).max()) for a, b in zip(logits, alone[0], strict=True)) < ROUNDING


@pytest.mark.parametrize("split", [WHOLE[0], *map(more, PARTED)])
def test_the_same_tokens(model, alone, split):
    """Greedy: every token but those whose rival is within 1e-4, after which texts may part. The logits decide what is a tie."""
    prompts = requests(model)
    made, timings = Engine(on_split(model, split), len(prompts), 128, True).generate([Request(tuple(p), 20) for p in prompts])
    assert timings.decode_tokens == 19 * len(prompts)
    for prompt, result, expected in zip(prompts, made, alone[1], strict=True):
        if result.ids != expected:
            assert split in PARTED
            first = next(i for i, (a, b) in enumerate(zip(result.ids, expected, strict=True)) if a != b)
            text = [*prompt, *expected[:first]]
            (logits,) = prefill_logits(model, [text], [[(0, 0, len(text))]], 128)
            best = np.sort(logits[-1])[-2:]
            assert best[1] - best[0] <= 1e-4


def test_sampling_and_the_trace_go_by_request(model):
    """Noise is of seed and position, whichever device draws; routing is filed under the request's number."""
    model = dataclasses.replace(model, kernels=QuickKernels("cpu"))
    asked = [Request(tuple(p), 6, Sampling(temperature=1.5, top_k=20, seed=i)) for i, p in enumerate(requests(model))]

    def recorded(one):
        engine = Engine(one, 3, 128, False, record=True)
        results, _ = engine.generate(asked)
        return [r.ids for r in results], engine.trace()

    (ids, expected), (same, made) = recorded(model), recorded(on_split(model, "data=2"))
    assert ids == same
    for sequence in range(3):
        a, b = (np.flatnonzero(t.sequence == sequence) for t in (expected, made))
        assert len(a) and np.array_equal(expected.tokens[a], made.tokens[b])
        assert np.array_equal(np.sort(expected.ids[a]), np.sort(made.ids[b]))


@pytest.mark.parametrize(
    "split, message",
    [
        ("expert=3", "expert = 3 doesn't divide the model's 8 experts"),
        ("tensor=3", "tensor = 3 doesn't divide the model's 4 heads"),
        ("data=16", "takes 16 devices, there are 8"),
        ("stage=2", "stage = 2 doesn't divide the model's segments"),
        ("expert=2,exchange=coherent", "'coherent' is for one active expert a token, the model has 2"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(split, message):
    spec = ModelSpec.from_hf(CONFIGS["qwen3_moe"])
    with pytest.raises(SplitError, match=message):
        devices_for(spec, parse_split(split))
