"""The ladder's decisions against plain loops over tokens and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.experts.lossy import STORED, Lossy, counted, decide, degrade, init_marks, reroute, settle
from jaxmoe.offload.ladder import popularity_widths
from jaxmoe.residency import Choice
from jaxmoe.routing.route import RouterOut, route
from jaxmoe.spec import GroupLimit, RouterSpec
from pallas_kernels.dispatch import Kernels

CPU = Kernels("cpu")
choose_again = jax.jit(reroute, static_argnames=("lossy", "spec", "dtype", "kernels"))
decided = jax.jit(decide, static_argnames=("lossy", "moe_layer", "ordered"))
routing = jax.jit(lambda spec, params, x, valid: route(spec, params, x, (), valid, CPU)[0], static_argnums=0)
T, E, A, D = 5, 12, 4, 16
ROUTERS = {
    "qwen": RouterSpec(E, A, normalize=True),
    "olmoe": RouterSpec(E, A),
    "gpt_oss": RouterSpec(E, A, score="none", weight_from="softmax_selected_logits", logits_bias=True),
    "deepseek": RouterSpec(
        E, A, score="sigmoid", select_bias=True, group_limit=GroupLimit(4, 2, "top2sum", None), normalize=True, norm_eps=1e-20, scale=2.5
    ),
    "gemma": RouterSpec(E, A, normalize=True, expert_scale=True),
}


def routed_of(spec: RouterSpec, seed: int) -> tuple[RouterOut, dict, np.ndarray]:
    rng = np.random.default_rng(seed)
    draw = {"kernel": (D, E), "bias": (E,), "select_bias": (E,), "expert_scale": (E,)}
    params = {name: rng.standard_normal(shape, np.float32) for name, shape in draw.items()}
    valid = np.arange(T) != 3
    return routing(spec, params, rng.standard_normal((T, D), np.float32), valid), params, valid


def plain_decision(lossy: Lossy, layer, ids, weights, valid, resident, held, ordered):
    """`decide` one token and expert after the other."""
    rank = lambda bits: 99 if bits == STORED else bits  # noqa: E731
    level, rows = {}, np.zeros(len(resident), int)
    for t in np.flatnonzero(valid):
        size = np.abs(weights[t]).astype(np.float64)
        order, before = np.argsort(-size, kind="stable"), 0.0
        for n, a in enumerate(order):
            share, e = size[a] / size.sum(), ids[t, a]
            demand = 2 if before <= lossy.high or lossy.high >= 1 else 1 if before <= lossy.low or lossy.low >= 1 else 0
            if n and share < lossy.cold / len(order):
                demand = 0
            level[e] = max(level.get(e, 0), demand)
            rows[e] += 1
            before += share
    width = {}
    for e, demand in level.items():
        width[e] = lossy.widths[layer][e] if lossy.widths else STORED
        if demand == 1:
            width[e] = min(width[e], lossy.low_bits, key=rank)
    missing = np.array([level.get(e, 0) > 0 and not (resident[e] and rank(held[e]) >= rank(width[e])) for e in range(len(resident))])
    if ordered and lossy.unpopular:
        few = popularity_widths(rows, missing, lossy.unpopular, lossy.unpopular_bits)
        width = {e: min(w, few[e], key=rank) for e, w in width.items()}
    for e in level:
        if resident[e] and (level[e] == 0 or rank(held[e]) >= rank(width[e])):
            width[e] = held[e]
    out = ids.copy(), weights.copy(), np.zeros(ids.shape, bool)
    for t in np.flatnonzero(valid):
        for a, e in enumerate(ids[t]):
            if not resident[e] and level[e] == 0:
                out[0][t, a], out[1][t, a], out[2][t, a] = ids[t, np.argmax(np.abs(weights[t]))], 0, True
    return *out, width


SETTINGS = {
    "hobbit": Lossy(high=0.6, low=0.9, low_bits=4),
    "drop-cold": Lossy(cold=0.9),
    "both": Lossy(high=0.3, low=0.6, low_bits=2, cold=0.5),
    "table": Lossy(widths=tuple(tuple(int(b) for b in row) for row in np.random.default_rng(3).choice([0, 8, 4, 2], (2, E))), high=0.6, low=0.9),
    "unpopular and table": Lossy(unpopular=0.5, unpopular_bits=3, widths=((4,) * E, (2, 0, 8) * 4)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_decisions_are_those_of_a_plain_loop(name):
    lossy, rng = SETTINGS[name], np.random.default_rng(7)
    changed = 0
    for seed in range(5):
        routed, _, valid = routed_of(ROUTERS["qwen"], seed)
        ids, weights = np.asarray(routed.ids), np.asarray(routed.weights)
        resident, ordered = rng.random(E) < 0.4, bool(lossy.unpopular)
        held = np.where(resident, rng.choice([0, 0, 2, 4, 8], E), 0)
        found = decided(lossy, 1, routed.ids, routed.weights, valid, resident, held, ordered)
        new_ids, new_weights, skipped, width = plain_decision(lossy, 1, ids, weights, valid, resident, held, ordered)
        np.testing.assert_array_equal(np.asarray(found.ids)[valid], new_ids[valid])
        np.testing.assert_array_equal(np.asarray(found.weights)[valid], new_weights[valid])
        np.testing.assert_array_equal(np.asarray(found.skipped), skipped)
        assert {e: int(found.width[e]) for e in width} == width
        kept = valid[:, None] & ~skipped
        degraded = kept & np.array([[width.get(e, STORED) != STORED for e in row] for row in ids])
        np.testing.assert_array_equal(np.asarray(found.degraded), degraded)
        changed += skipped.sum() + degraded.sum()
    assert changed > 0


@pytest.mark.parametrize("name", ["qwen", "deepseek"])
def test_lossless_settings_change_no_bit(name):
    routed, params, valid = routed_of(ROUTERS[name], 1)
    resident, lossy = np.arange(E) % 2 == 0, Lossy(low_bits=2, kept=0, reach=3)
    assert lossy.lossless and lossy.bits == ()
    step = jax.jit(degrade, static_argnums=(0, 2, 5, 8, 9, 10))
    ids, weights, marks = step(lossy, init_marks(lossy, 2, E), 1, resident, routed, ROUTERS[name], params, valid, True, jnp.float32, CPU)
    np.testing.assert_array_equal(np.asarray(ids), np.asarray(routed.ids))
    np.testing.assert_array_equal(np.asarray(weights), np.asarray(routed.weights))
    found = counted(marks)
    asked = set(np.asarray(ids)[valid].reshape(-1).tolist())
    assert found["pairs"].tolist() == [0, 4 * A] and found["exact"][1] == sum(e % 2 for e in asked)
    assert not any(found[key].any() for key in ("degraded", "skipped", "rerouted")) and init_marks(None, 2, E) == {}


@pytest.mark.parametrize("name", ROUTERS)
def test_rerouting_keeps_the_best_and_takes_weights_from_scores_as_they_were(name):
    spec = ROUTERS[name]
    for seed in range(4):
        routed, params, valid = routed_of(spec, seed)
        resident = np.random.default_rng(seed).random(E) < 0.5
        found = choose_again(Lossy(prior=0.3), spec, params, routed, resident, valid, jnp.float32, CPU)
        ids, weights = map(np.asarray, found)
        assert all(len(set(row)) == A for row in ids.tolist())
        assert (ids == np.asarray(routed.ids[:, :1])).any(1).all()
        logits = np.asarray(routed.logits, np.float64)
        raw = {"none": logits, "sigmoid": 1 / (1 + np.exp(-logits))}.get(spec.score, np.exp(logits) / np.exp(logits).sum(1, keepdims=True))
        own = np.take_along_axis(raw, ids, 1)
        if spec.weight_from == "softmax_selected_logits":
            own = np.exp(own) / np.exp(own).sum(1, keepdims=True)
        own = own / own.sum(1, keepdims=True) if spec.normalize else own
        own = own * (np.asarray(params["expert_scale"])[ids] if spec.expert_scale else 1) * spec.scale
        np.testing.assert_allclose(weights, own * valid[:, None], rtol=2e-6)


def test_the_prior_goes_from_nothing_to_whatever_is_there():
    spec = ROUTERS["qwen"]
    routed, params, valid = routed_of(spec, 2)
    resident = np.arange(E) < 6

    def there(**setting) -> np.ndarray:
        ids, weights = choose_again(Lossy(**setting), spec, params, routed, resident, valid, jnp.float32, CPU)
        same = (np.sort(ids, 1) == np.sort(routed.ids, 1)).all(1)
        np.testing.assert_array_equal(np.asarray(ids)[same], np.asarray(routed.ids)[same])
        np.testing.assert_array_equal(np.asarray(weights)[same], np.asarray(routed.weights)[same])
        return resident[np.asarray(ids)]

    plain = resident[np.asarray(routed.ids)].sum()
    assert there(prior=1e-9, kept=0).sum() == plain < there(prior=1.0, kept=2).sum() < T * A
    best = np.argsort(np.argsort(-np.asarray(routed.logits), axis=1), axis=1)
    ids, _ = choose_again(Lossy(prior=1.0, kept=0, reach=6), spec, params, routed, resident, valid, jnp.float32, CPU)
    for t in range(T):  # max-rank: those there among the six best first, then the others by rank
        order = sorted(range(E), key=lambda e: (not (resident[e] and best[t, e] < 6), best[t, e]))
        assert set(np.asarray(ids)[t].tolist()) == set(order[:A])


def test_too_few_bits_make_a_hit_a_miss_that_keeps_its_slot():
    marks = init_marks(Lossy(), 2, 6)
    marks |= {"held": np.array([[0] * 6, [4, 4, 0, 2, 0, 0]], np.int8), "width": np.array([[0] * 6, [0, 4, 0, 0, 2, 8]], np.int8)}
    member = lambda *ids: np.isin(np.arange(6), ids)  # noqa: E731
    choice, marks = jax.jit(settle)(marks, 1, Choice(hit=member(0, 1, 2, 3), enter=member(4), stream=member(5), leave=member(3)))
    assert [np.flatnonzero(m).tolist() for m in choice] == [[1, 2, 3], [0, 4], [5], [3]]
    assert marks["held"][1].tolist() == [0, 4, 0, 0, 2, 0] and not marks["held"][0].any()
    assert marks["loads"][1].tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 1] and not marks["loads"][0].any()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"high": 0.9, "low": 0.6}, "0.9 and 0.6: give 0 <= high <= low <= 1"),
        ({"cold": 2.0}, r"cold = 2.0: give 0 \(off\) to 1"),
        ({"low_bits": 1}, "1 bits: experts come at 2 to 8"),
        ({"widths": ((16,),)}, "16 bits"),
        ({"kept": -1}, "kept = -1"),
    ],
)
def test_settings_that_cant_be_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Lossy(**setting)


def test_a_router_without_top_k_is_not_rerouted():
    spec = RouterSpec(E, 2, score="none", select="sparsemixer", weight_from="sparsemixer")
    routed, params, valid = routed_of(ROUTERS["qwen"], 0)
    with pytest.raises(ValueError, match="needs a router that chooses by top-k, not 'sparsemixer'"):
        reroute(Lossy(prior=0.1), spec, params, routed, jnp.ones(E, bool), valid, jnp.float32, CPU)
