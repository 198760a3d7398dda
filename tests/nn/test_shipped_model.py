"""The model that ships against what transformers gave for it in float32: logits of held-out text, and greedy text.

`python scripts/make_goldens.py --only shipped` makes the files.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from checkpoints.load import load_hf_or_checkpoint
from jaxmoe.engine.generate import Engine, Request, prompt_logits
from jaxmoe.engine.model import load_model
from jaxmoe.engine.text import Tokenizer
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels
from scripts import make_goldens
from scripts.make_goldens import NEW_TOKENS, SHIPPED, WINDOW

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
TOLERANCE = 1e-4
CLEAR = 1e-3
"""By how much a logit must be the largest for the argmax to be held to it."""

TIE = 1e-4
"""Of the two largest logits: nearer, and rounding may choose the other token."""

ROUTER_TIE = 1e-5
"""Of the last chosen expert's logit and the first one left out: nearer, and rounding may choose the other expert."""


@pytest.fixture(scope="module")
def golden():
    """(what shipped.json says, arrays)"""
    made = json.loads((GOLDENS / "shipped.json").read_text())
    with np.load(GOLDENS / "shipped.npz") as arrays:
        return made, dict(arrays)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return load_hf_or_checkpoint(SHIPPED, tmp_path_factory.mktemp("converted"))


@pytest.fixture(scope="module")
def model(checkpoint):
    return load_model(checkpoint, "float32", Kernels("cpu"))


@pytest.fixture(scope="module")
def requests(golden):
    tokenizer = Tokenizer(SHIPPED)
    return [Request(tuple(tokenizer.encode(prompt)), NEW_TOKENS) for prompt in golden[0]["prompts"]]


def test_the_golden_is_of_the_model_that_ships(golden):
    made, arrays = golden
    for key, name in (("model_sha256", "model.safetensors"), ("tokenizer_sha256", "tokenizer.json")):
        same = make_goldens.file_digest(SHIPPED / name) == made[key]
        assert same, f"{name} is not the one that tests/goldens/shipped.npz is of: run `python scripts/make_goldens.py --only shipped`"
    assert tuple(made["prompts"]) == make_goldens.PROMPTS and tuple(made["domains"]) == make_goldens.DOMAINS
    assert made["batch_agrees"] == ("text_batch" not in arrays)


def test_the_golden_tells_something(golden):
    _, arrays = golden
    assert arrays["ids"].shape == (4, WINDOW) and len(np.unique(arrays["ids"], axis=0)) == 4
    assert arrays["sampled"].shape == (4, WINDOW, make_goldens.SAMPLED) and arrays["sampled"].std() > 0.5
    assert len(np.unique(arrays["ids"])) > 300 and len(np.unique(arrays["argmax"])) > 50
    assert arrays["text"].shape == (8, NEW_TOKENS) and len(np.unique(arrays["text"])) > 30
    nll = arrays["lse"] - arrays["top"][..., 0]  # at its likeliest token, a model that knows nothing has log 4096
    assert nll.mean() < 0.5 * np.log(4096)


def test_the_model_is_small_and_has_enough_experts(checkpoint):
    assert sum(file.stat().st_size for file in SHIPPED.iterdir()) <= 32e6
    config = json.loads((SHIPPED / "config.json").read_text())
    assert config["model_type"] == "qwen3_moe" and config["dtype"] == "bfloat16"
    assert checkpoint.spec == ModelSpec.from_hf(config).with_precision("bfloat16")
    router, _ = checkpoint.spec.moe
    assert len(checkpoint.spec.moe_layers) >= 6 and router.experts >= 32 and router.active >= 4


def test_logits(golden, model):
    """What is kept of 2,000 held-out tokens' logits, at every one of them."""
    arrays = golden[1]
    sampled = make_goldens.sampled_ids(model.spec.vocab)
    got = [make_goldens.summary(prompt_logits(model, ids.tolist()), s) for ids, s in zip(arrays["ids"], sampled, strict=True)]
    errors = np.stack([np.abs(np.column_stack([g[k] - arrays[k][i] for k in ("sampled", "top", "lse")])).max(1) for i, g in enumerate(got)])
    whole = 0
    for error, g, kept, top, gaps in zip(errors, got, arrays["argmax"], arrays["top"], arrays["router_gap"], strict=True):
        held = np.cumprod(error <= TOLERANCE).astype(bool)
        clear = held & (top[:, 0] - top[:, 1] > CLEAR)
        np.testing.assert_array_equal(g["argmax"][clear], kept[clear])
        whole += held.all()
        if not held.all():  # only a token whose experts rounding may choose excuses what comes after it
            first = int(np.argmin(held))
            assert gaps[first] < ROUTER_TIE, f"token {first}: {error[first]:.2g} off, and its experts' logits are {gaps[first]:.2g} apart"
    assert whole >= 3, f"largest differences by window: {errors.max(1)}"


def check_text(got: list[list[int]], arrays: dict[str, np.ndarray]) -> None:
    """Ids must be those of transformers; one row of eight may part from them at a near tie of its two largest logits."""
    assert len(got) == len(arrays["text"])
    same = 0
    for i, (ids, row, gaps) in enumerate(zip(got, arrays["text"], arrays["text_gap"], strict=True)):
        padded = np.asarray(ids + [-1] * (NEW_TOKENS - len(ids)))
        same += np.array_equal(padded, row)
        if not np.array_equal(padded, row):
            first = int(np.argmax(padded != row))
            assert gaps[first] < TIE, f"prompt {i}, token {first}: {padded[first]}, not {row[first]}, whose logit leads by {gaps[first]:.2g}"
    assert same >= 7


def test_greedy_text_alone(golden, model, requests):
    engine = Engine(model, 1, NEW_TOKENS + max(len(r.prompt_ids) for r in requests), greedy=True, eos=Tokenizer(SHIPPED).eos_ids)
    check_text([engine.generate([r])[0][0].ids for r in requests], golden[1])


def test_greedy_text_in_a_batch(golden, model, requests):
    """The same as alone: what transformers' own padding does to near ties is none of ours."""
    assert len({len(r.prompt_ids) for r in requests}) >= 5
    engine = Engine(model, 8, NEW_TOKENS + max(len(r.prompt_ids) for r in requests), greedy=True, eos=Tokenizer(SHIPPED).eos_ids)
    check_text([r.ids for r in engine.generate(requests)[0]], golden[1])
