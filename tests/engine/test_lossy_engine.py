"""A lossy bank in an engine: without loss the resident model's bits, and else those of experts that are all there at each precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.cache.batch import make_batch
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import steps
from jaxmoe.engine.host_driven import HostDriven
from jaxmoe.engine.model import Offload, slot_bank
from jaxmoe.experts import SlotBank
from jaxmoe.experts.lossy import Lossy
from jaxmoe.experts.planes import build_planes, plane_format, unpack_planes
from jaxmoe.experts.source import ExpertSource, LadderSource
from jaxmoe.offload.link import Link
from jaxmoe.report import quality as q
from jaxmoe.routing.route import route
from tests.models import CONFIGS, random_model, records_of
from tests.quick import QuickKernels

KERNELS = QuickKernels("cpu")
MODEL = random_model("olmoe", kernels=KERNELS, unroll=False)
RECORDS, FMT = records_of(MODEL), plane_format(MODEL.spec)
PLANES = build_planes(FMT, RECORDS, rounds=0)
BANK = q.evaluation_bank(MODEL.spec, RECORDS, FMT, PLANES, (2, 4), Offload(3))
EVALUATED = dataclasses.replace(MODEL, bank=BANK)
SHALLOW = {**CONFIGS["olmoe"], "num_hidden_layers": 1}
TEXTS = np.random.default_rng(0).integers(0, MODEL.spec.vocab, (2, 15)).astype(np.int32)
LADDER = Lossy(high=0.4, low=0.55, low_bits=2, widths=((4, 0) * 4,) * 2, unpopular=0.5)


def streamed(lossy: Lossy) -> SlotBank:
    bank = slot_bank(MODEL.spec, RECORDS, Offload(3))
    return dataclasses.replace(bank, lossy=lossy, poison=True)


@jax.jit
def layers(bank, router: dict, x_STD: jax.Array):
    """Two MoE layers over steps of a few tokens, the second on what the first gave; `(results, moving)`."""
    spec, valid = MODEL.spec.moe[0], jnp.ones(x_STD.shape[1], bool)
    fixed, moving = bank.split()

    def one(carry, given):
        (moving, x), (layer, params) = carry, given
        bank = fixed.join(moving)
        routed = route(spec, params, x, (), valid, MODEL.kernels)[0]
        ids, weights = routed.ids, routed.weights
        if getattr(bank, "lossy", None) is not None:
            ids, weights, bank = bank.degrade(layer, routed, spec, params, valid, x.dtype, MODEL.kernels)
        x, bank, _ = bank.expert_ffn(layer, x, ids, weights, valid, MODEL.kernels)
        return (bank.split()[1], x / jnp.maximum(jnp.abs(x).mean(), 1e-6)), None

    def step(moving, x):
        return jax.lax.scan(one, (moving, x), (jnp.arange(2), router))[0]

    moving, y = jax.lax.scan(step, moving, x_STD)
    return y, moving


def run(bank, seed: int = 0):
    rng = np.random.default_rng(seed)
    d, e = MODEL.spec.width, MODEL.spec.moe[0].experts
    router = {"kernel": (2 * rng.standard_normal((2, d, e)) / d**0.5).astype(np.float32)}
    moving = bank.init_state()
    y, moving = layers(bank.join(moving), router, rng.standard_normal((12, 3, d)).astype(np.float32))
    return np.asarray(y), q.counters(moving) if moving else {}


def same(one: tuple, other: tuple) -> dict:
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        np.testing.assert_array_equal(value, other[1][name], err_msg=name)
    return {name: int(value.sum()) for name, value in one[1].items()}


def test_a_lossless_setting_gives_the_resident_banks_bits():
    y, found = run(streamed(Lossy()))
    np.testing.assert_array_equal(y, run(MODEL.bank)[0])
    counts = {name: int(value.sum()) for name, value in found.items()}
    assert counts["degraded"] == counts["skipped"] == counts["rerouted"] == 0
    assert counts["pairs"] == 12 * 3 * 2 * 2 and counts["exact"] == counts["loads"] == found["loads_by_bits"][:, 0].sum() > 0


def test_leaving_out_and_rerouting_are_the_same_in_the_compiled_step():
    lossy = Lossy(cold=0.9, prior=0.15)
    counts = same(run(streamed(lossy)), run(dataclasses.replace(BANK, lossy=lossy)))
    assert counts["skipped"] > 0 and counts["rerouted"] > 0 and counts["degraded"] == 0


def test_experts_come_at_fewer_bits_in_the_host_driven_mode(monkeypatch):
    """A prompt in two pieces, each of which asks for more experts than there are slots."""
    monkeypatch.setitem(CONFIGS, "shallow", SHALLOW)
    model = random_model("shallow", kernels=KERNELS, unroll=False)
    spec, kernels, records = model.spec, model.kernels, records_of(model)
    planes = build_planes(FMT, records, rounds=0)
    evaluated = dataclasses.replace(q.evaluation_bank(spec, records, FMT, planes, (2, 4), Offload(3)), lossy=LADDER)
    bank = dataclasses.replace(slot_bank(spec, None, Offload(3, store=False)), lossy=LADDER)
    source, link = LadderSource(ExpertSource(spec, records), FMT, planes, 8), Link()
    runner, sampling = HostDriven(spec, bank, kernels, True, source, link), sampling_params(32)

    def step(params, _, state, batch):
        _, logits, state, _ = runner.step(params, state, batch, sampling, np.zeros(32, np.int32))
        return logits, state

    seen = []
    for one, own in ((steps.logits_step(spec, kernels), evaluated), (step, bank)):
        state, logits = steps.EngineState(q._empty_layers(spec, 64), own.init_state()), []
        for at, text in ((0, TEXTS[0]), (len(TEXTS[0]), TEXTS[1])):
            out, state = one(model.params, own, state, make_batch([(0, at, text.tolist())], 32, 32, list(range(32))))
            logits.append(np.asarray(out)[: len(text)])
        seen.append((np.stack(logits), q.counters(state.bank)))
    counts, by_bits = same(*seen), seen[0][1]["loads_by_bits"].sum(0)
    assert counts["degraded"] > 0 and counts["skipped"] > 0 and all(by_bits[b] > 0 for b in (0, 2)) and by_bits.sum() == counts["loads"]
    assert link.bytes == sum(int(n) * source.bytes_at(b) for b, n in enumerate(by_bits) if n)


def test_a_bank_without_the_bits_is_refused():
    with pytest.raises(ValueError, match="3 bits, the bank has 2, 4"):
        q.with_setting(EVALUATED, Lossy(high=0.5, low_bits=3))
    with pytest.raises(ValueError, match="experts at 2 bits need a source that has them"):
        HostDriven(MODEL.spec, streamed(LADDER), MODEL.kernels, True, ExpertSource(MODEL.spec, RECORDS))


def test_a_table_gives_every_expert_its_version():
    table = np.random.default_rng(2).choice([0, 2, 4], (2, 8))
    found = q._by_table(BANK, table)
    for (layer, expert), bits in np.ndenumerate(table):
        record = RECORDS[layer * 8 + expert] if bits == 0 else unpack_planes(FMT, PLANES[layer * 8 + expert, : FMT.bytes(int(bits))], int(bits))
        both = np.concatenate([np.asarray(w[layer, expert]).reshape(-1) for w in (found.w_in, found.w_out)])
        np.testing.assert_array_equal(both, np.asarray(record).reshape(-1))


def test_nats_are_those_of_the_next_token():
    table = np.random.default_rng(3).standard_normal((MODEL.spec.vocab, MODEL.spec.vocab)).astype(np.float32)

    def step(params, bank, state, batch):
        assert (batch.segments == 0).all()
        return table[batch.tokens + batch.positions], state  # type: ignore[return-value]

    texts = TEXTS // 2
    nats, found = q.nats_by_step(EVALUATED, texts, step)
    rows = table[texts[:, :-1] + np.arange(14)]
    np.testing.assert_allclose(nats, np.log(np.exp(rows).sum(2)) - np.take_along_axis(rows, texts[:, 1:, None], 2)[..., 0], rtol=1e-5)
    assert found["loads"].tolist() == [0, 0] and "pairs" not in found


def test_intervals_hold_the_mean_and_pair_prompts():
    rng = np.random.default_rng(1)
    exact = rng.gamma(2, 2, (40, 1)) + rng.standard_normal((40, 30)) * 0.1
    worse = exact + 0.05 + rng.standard_normal((40, 30)) * 0.02
    found = q.paired_bootstrap(worse, exact)
    assert found.mean == pytest.approx((worse - exact).mean()) and found.low < found.mean < found.high
    spread = (worse - exact).mean(1).std(ddof=1) / 40**0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.15)  # the prompts' own spread, ten times larger, is not in it
    assert q.paired_bootstrap(exact, exact) == (0, 0, 0)
    with pytest.raises(ValueError, match="can't be paired"):
        q.paired_bootstrap(exact, exact[:3])


def test_a_quality_compares_bytes_with_both_kinds_of_exact_serving():
    counts = {"pairs": [60, 40], "degraded": [10, 5], "skipped": [5, 0], "rerouted": [0, 1], "exact": [10, 10], "loads": [9, 8]}
    found = {name: np.array(value) for name, value in counts.items()} | {"loads_by_bits": np.array([[4, 0, 5], [4, 0, 4]])}
    got = q.quality("x", np.full((3, 2), 1.5), found, np.ones((3, 2)), {"loads": np.array([15, 10])}, lambda bits: 100 if bits == 0 else 10)
    assert (got.degraded, got.skipped, got.rerouted, got.pairs, got.loads) == (0.15, 0.05, 0.01, 100, (8, 0, 9))
    assert (got.ratio, got.same_ratio) == (890 / 2500, 890 / 2000)
    assert got.change.mean == 0.5 and got.perplexity.mean == pytest.approx(np.exp(0.5) - 1)
    assert q.rows([got])[1][1:5] == ["15.0%", "5.0%", "1.0%", "0.356"] and got.record()["change"]["mean"] == 0.5
    with pytest.raises(ValueError, match="y: the run counted no pairs"):
        q.quality("y", np.ones((1, 1)), {"loads": np.array([1])}, np.ones((1, 1)), {}, lambda bits: 1)
