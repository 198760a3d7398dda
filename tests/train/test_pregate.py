"""Pre-gated models: how one is read, that every form of it runs alike, and what tuning changes."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.cache.full import FullState
from jaxmoe.experts import ResidentBank
from jaxmoe.nn.transformer import chosen_experts, forward
from jaxmoe.routing.ahead import stack_gates
from jaxmoe.routing.route import RouterOut
from jaxmoe.spec import ModelSpec, SpecError
from jaxmoe.train import loop, pregate
from jaxmoe.train.corpus import Corpus
from jaxmoe.train.loss import sequences
from tests.models import CONFIGS, random_model
from tests.quick import OPTIONS, QuickKernels

SPEC = ModelSpec.from_hf(CONFIGS["mixtral"])
AHEAD = pregate.pregated(SPEC)
CONFIG = pregate.PregateConfig(steps=4, warmup=1, batch=2, length=16, weights="routers", adam_lr=0.01, distill=0.5, capacity=4.0)
KERNELS = QuickKernels("cpu")


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    text = np.tile(np.arange(40, dtype=np.uint16), 20)
    entry = {"held_out": {"bytes_per_token": 2.0}}
    return Corpus(Path("."), {"domains": {"counting": entry}}, {"train": {"counting": text}, "held_out": {"counting": text[:200]}})


@pytest.fixture(scope="module")
def start() -> tuple[dict, ResidentBank]:
    model = random_model("mixtral", unroll=False)
    return model.params, model.bank


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    make_step = pregate.make_step
    monkeypatch.setattr(pregate, "make_step", lambda *args: jax.jit(make_step(*args).__wrapped__, compiler_options=OPTIONS))


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_a_config_says_that_routers_choose_ahead(family):
    config = CONFIGS[family]
    plain, ahead = ModelSpec.from_hf(config), ModelSpec.from_hf(config | {"jaxmoe_pregated": True})
    assert ahead == pregate.pregated(plain) and pregate.pregated(ahead, False) == plain != ahead
    assert ModelSpec.from_hf(config | {"jaxmoe_pregated": False}) == plain
    assert "pregated" not in str(plain.to_json()) and ModelSpec.from_json(ahead.to_json()) == ahead
    with pytest.raises(SpecError, match="jaxmoe_pregated = 'yes' is not supported"):
        ModelSpec.from_hf(config | {"jaxmoe_pregated": "yes"})


def test_a_nested_config_may_say_so_outside():
    config = json.loads((Path(__file__).parents[1] / "goldens/llama4_nested.json").read_text())["config"]
    assert ModelSpec.from_hf(config | {"jaxmoe_pregated": True}) == pregate.pregated(ModelSpec.from_hf(config))


def test_scanned_and_unrolled_layers_choose_alike():
    """All but the first layer otherwise than without; each as the gates of the layer before foretold."""
    model, unrolled = random_model("mixtral", unroll=False), random_model("mixtral").params
    tokens = np.random.default_rng(0).integers(0, SPEC.vocab, (2, 8))

    def run(spec, params):
        gates = stack_gates(spec, params)
        logits, _, _, aux = forward(spec, params, model.bank, FullState(2), sequences(jnp.asarray(tokens)), KERNELS, True, gates)
        return logits, *chosen_experts(spec, aux["routed"])

    cases = [(SPEC, model.params), (AHEAD, model.params), (AHEAD, unrolled)]
    plain, scanned, other = jax.jit(lambda: [run(*case) for case in cases], compiler_options=OPTIONS)()
    for logits, ids, _, gates in (scanned, other):
        np.testing.assert_allclose(logits, scanned[0], atol=1e-4)
        assert (ids == scanned[1]).all() and (gates[:, 0, 0, : ids.shape[2]] == ids[:, 1]).all()
    assert (plain[1][:, 0] == scanned[1][:, 0]).all() and (plain[1][:, 1] != scanned[1][:, 1]).any()
    assert (plain[3][:, 0, 0, : SPEC.moe[0].active] == scanned[1][:, 1]).all()
    assert np.abs(plain[0] - scanned[0]).max() > 1e-3


def test_tuning_routers_alone_changes_nothing_else(corpus, start):
    params, bank = pregate.of_resident(SPEC, *start)
    *_, (state, last) = [(s, row) for s, row in pregate.tune(AHEAD, params, bank, corpus, CONFIG)]
    assert last["step"] == CONFIG.steps and last["distance"] > 0
    tuned, experts = pregate.joined(state)
    np.testing.assert_array_equal(experts.w_in, bank.w_in)
    changed = jax.tree.map_with_path(lambda path, a, b: ("router" in str(path), bool((a != b).any())), tuned, params)
    leaves = jax.tree.leaves(changed, is_leaf=lambda pair: isinstance(pair, tuple) and isinstance(pair[0], bool))
    assert all(router == differs for router, differs in leaves) and any(router for router, _ in leaves)


def test_tuning_all_weights_learns(corpus, start):
    params, bank = pregate.of_resident(SPEC, *start)
    config = dataclasses.replace(CONFIG, steps=6, weights="all", distill=0.0, adam_lr=0.02)
    rows = [row for _, row in pregate.tune(AHEAD, params, bank, corpus, config)]
    assert rows[-1]["nll"] < rows[0]["nll"] - 0.2 and rows[-1]["distance"] == 0


def test_held_out_nats_are_those_of_each_domain(corpus, start, monkeypatch):
    """With a scorer that finds a token as unlikely as its number is high."""
    monkeypatch.setattr(pregate, "make_scorer", lambda *_: lambda tokens: (tokens[:, 1:], np.zeros((1, tokens[:, 1:].size, 1), int)))
    found = pregate.nats(AHEAD, pregate.of_resident(SPEC, *start), corpus, length=16, most=2)
    text = corpus.streams["held_out"]["counting"]
    expected = np.concatenate([text[1:17], text[177:193]]).mean()  # the first window of 16 and the last
    assert found == {"counting": expected, "mean": expected}


def test_distance_is_the_divergence_of_distributions():
    rng = np.random.default_rng(0)
    own, other = rng.standard_normal((2, 2, 5, 4))

    def routed(logits):
        return [RouterOut(None, None, jnp.asarray(layer[None], jnp.float32)) for layer in logits]

    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (other, own))
    np.testing.assert_allclose(pregate.distance(routed(own), routed(other)), (p * np.log(p / q)).sum(-1).mean(), rtol=1e-5)
    assert abs(float(pregate.distance(routed(own), routed(own)))) < 1e-6


def test_weights_in_another_form_are_refused(start):
    params, bank = start
    with pytest.raises(ValueError, match="unroll=False"):
        pregate.of_resident(SPEC, random_model("mixtral").params, bank)
    with pytest.raises(ValueError, match="needs float32 weights"):
        pregate.of_resident(SPEC, params, dataclasses.replace(bank, layout="2fd"))
    with pytest.raises(ValueError, match="choose all or routers"):
        pregate.PregateConfig(weights="some")
    for tied in (False, True):  # loaders put a transposed copy beside a tied embedding
        kept, _ = pregate.of_resident(dataclasses.replace(SPEC, tied=tied), params, bank)
        assert ("lm_head" in kept) != tied


def test_the_rate_falls_to_zero_from_the_first_step():
    rate = loop.schedule(CONFIG.training, 1.0)
    np.testing.assert_allclose([float(rate(step)) for step in range(5)], [1, 0.75, 0.5, 0.25, 0], atol=1e-6)
