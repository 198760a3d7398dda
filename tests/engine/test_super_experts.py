"""Super experts from measuring to pinning: maxima beside a loop over tokens in float64, a planted expert, and slots that pinned ones never leave."""

import dataclasses
import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.engine.generate import RequestError
from jaxmoe.engine.measuring import measure_experts
from jaxmoe.experts import ResidentBank
from jaxmoe.experts.measured import MeasuredBank
from jaxmoe.offload.knowledge import knowledge
from jaxmoe.offload.replay import Steps, replay, residents
from jaxmoe.offload.super_experts import Criterion, super_experts
from jaxmoe.offload.trace import used_steps
from jaxmoe.residency import find_policy
from tests.engine import test_policies_exact as policies
from tests.models import CPU, prefill_logits, random_model, slot_model
from tests.quick import QuickKernels

LENGTHS = (5, 40, 1, 33, 20, 8, 9, 31, 12)
"""More prompts than are read at a time, and most of them with padding behind."""

_seen: list[tuple] = []


@flax.struct.dataclass
class Seen(ResidentBank):
    """Notes what each layer's experts are given."""

    def outputs(self, moe_layer, x_TD, ids_TA, valid_T, kernels, biases=None):
        jax.debug.callback(lambda *given: _seen.append(tuple(map(np.asarray, given))), moe_layer, x_TD, ids_TA, valid_T)
        return super().outputs(moe_layer, x_TD, ids_TA, valid_T, kernels, biases)


def prompts() -> list[list[int]]:
    rng = np.random.default_rng(1)
    return [rng.integers(0, 96, n).tolist() for n in LENGTHS]


def looped(bank: ResidentBank, given: list[tuple], absolute: bool = True) -> np.ndarray:
    """The largest output of every expert, token by token in float64; of negative ones alone, 0 where they are not taken absolutely."""
    w_in, w_out = np.asarray(bank.w_in, np.float64), np.asarray(bank.w_out, np.float64)
    out = np.zeros(w_in.shape[:2])
    for layer, x, ids, valid in given:
        for row, own, live in zip(x.astype(np.float64), ids, valid, strict=True):
            for e in own[: len(own) * bool(live)]:
                gate, up = row @ w_in[layer, e, :, 0], row @ w_in[layer, e, :, 1]
                y = (gate / (1 + np.exp(-gate)) * up) @ w_out[layer, e]
                out[layer, e] = max(out[layer, e], np.abs(y).max() if absolute else y.max())
    return out


def measured(model) -> tuple[np.ndarray, list[tuple]]:
    """`measure_experts` of the prompts, and what it gave each layer's experts."""
    _seen.clear()
    bank = Seen(model.bank.w_in, model.bank.w_out)
    found = measure_experts(dataclasses.replace(model, bank=bank), prompts())
    jax.effects_barrier()
    return found, list(_seen)


def test_maxima_are_those_of_a_loop_over_tokens():
    model = random_model("qwen3_moe", kernels=QuickKernels("cpu"))
    found, given = measured(model)
    valid = np.concatenate([v for _, _, _, v in given])
    assert valid.sum() == model.bank.w_in.shape[0] * sum(LENGTHS) and not valid.all()
    np.testing.assert_allclose(found, looped(model.bank, given), rtol=1e-4)
    assert (found > 0).all() and found.dtype == np.float32


def test_a_planted_expert_is_found_and_a_signed_maximum_would_miss_it():
    """Its up projection is its gate's, so that what goes into its down projection is never negative, and what comes out never positive."""
    model, planted = random_model("qwen3_moe", kernels=QuickKernels("cpu")), (1, 3)
    w_in = model.bank.w_in.at[(*planted, slice(None), 1)].set(model.bank.w_in[(*planted, slice(None), 0)])
    w_out = model.bank.w_out.at[planted].set(-1e3 * jnp.abs(model.bank.w_out[planted]))
    model = dataclasses.replace(model, bank=dataclasses.replace(model.bank, w_in=w_in, w_out=w_out))
    found, given = measured(model)
    for criterion in (Criterion(), Criterion(quantile=0.5)):
        assert np.argwhere(super_experts(found, criterion)).tolist() == [[*planted]]
        assert not super_experts(looped(model.bank, given, absolute=False), criterion)[planted]
    assert found[planted] > 100 * np.delete(found.reshape(-1), np.ravel_multi_index(planted, found.shape)).max()


def test_logits_are_the_resident_models():
    model, ids = random_model("olmoe", dtype="bfloat16"), prompts()[:1]
    whole = [[(0, 0, len(ids[0]))]]
    watched = dataclasses.replace(model, bank=MeasuredBank(model.bank))
    [own], [other] = (prefill_logits(m, ids, whole, 32) for m in (watched, model))
    assert np.isfinite(own).all() and (own.view(np.uint32) == other.view(np.uint32)).all()


@pytest.mark.parametrize("tokens", [1, 6])
def test_padding_counts_for_nothing(tokens):
    rng = np.random.default_rng(tokens)
    own = random_model("olmoe").bank
    x = rng.standard_normal((tokens, 64)).astype(np.float32)
    ids = np.stack([rng.permutation(8)[:2] for _ in range(tokens)]).astype(np.int32)
    valid = np.arange(tokens) != 2
    x[~valid] = np.nan
    bank = MeasuredBank(own, jnp.full((2, 8), 1e-3))
    weights = np.full((tokens, 2), 1e6, np.float32)  # which the maxima are taken before
    step = jax.jit(lambda bank, *given: bank.expert_ffn(1, *given, CPU)[:2])
    (y, after), (expected, _) = step(bank, x, ids, weights, valid), step(own, x, ids, weights, valid)
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_allclose(after.max_abs_LE, np.maximum(1e-3, looped(own, [(1, x, ids, valid)])), rtol=1e-4)


def test_what_can_not_be_measured_is_refused():
    model = policies.resident()
    with pytest.raises(ValueError, match="all of them are on one device"):
        measure_experts(slot_model(model, 4), [[1]])
    with pytest.raises(RequestError, match="prompt 1 is empty"):
        measure_experts(model, [[1], []])


# --- pinning --------------------------------------------------------------------------------------------------------------


@functools.cache
def asked() -> np.ndarray:
    """[L, E] one expert a layer that the prompt asks for, and that leaves later where nothing is pinned."""
    used, _ = used_steps(policies.recorded())
    seen = Steps(used, used, np.arange(len(used)) == 0)
    there = residents(seen, np.array(policies.SLOTS), "lru")
    leaves = (there[:-1] & ~there[1:]).any(0)
    some = leaves & used[: policies.PROMPT_TOKENS].any(0)
    return np.stack([np.arange(some.shape[1]) == row.argmax() for row in some]) & some


def run_pinned(host_driven: bool) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Logits, slot tables and hits by layer of each step."""
    known = knowledge(policies.recorded(), find_policy("lru"), pinned=asked())
    model = slot_model(policies.resident(), policies.SLOTS, staging=1, policy="lru", knowledge=known)
    tables, hits = [], []

    def noted(step):
        def run(state, batch):
            logits, state = step(state, batch)
            tables.append(np.array(state.bank.slot_of_expert))
            hits.append(np.array(state.bank.hits))
            return logits, state

        return run

    with pytest.MonkeyPatch.context() as patch:
        run = policies.run
        patch.setattr(policies, "run", lambda model, step: run(model, noted(step)))
        logits = (policies.run_host_driven if host_driven else policies.run_fused)(model)[0]
    return logits, tables, hits


@pytest.mark.parametrize("host_driven", [False, True], ids=["fused", "host-driven"])
def test_a_pinned_expert_never_leaves_and_changes_nothing(host_driven):
    pinned = asked()
    assert pinned.any(1).all()
    logits, tables, hits = run_pinned(host_driven)
    policies.same_bits(logits, policies.expected())
    where = np.stack(tables)[:, pinned]
    assert (where >= 0).all() and (where == where[0]).all()
    known = knowledge(policies.recorded(), find_policy("lru"), pinned=pinned)
    found, free = (replay(policies.recorded(), policies.SLOTS, "lru", known=told) for told in (known, None))
    assert (hits[-1] - hits[0]).tolist() == found.hits_L.tolist() != free.hits_L.tolist()
