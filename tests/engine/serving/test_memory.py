"""A budget is kept to the byte: what is counted is what lies on the device, and what programs need is below the formula. About 30 seconds,
most of them for compiling."""

import dataclasses
import gc
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.engine.host_driven import IN_FLIGHT
from jaxmoe.engine.serving import activations
from jaxmoe.engine.serving.core import ServingEngine
from jaxmoe.engine.serving.fitting import Fitted, Search, check_host, describe, fit, predicted
from jaxmoe.engine.serving.memory import NAMES, ServeMemory, TooSmall, weigh
from jaxmoe.engine.serving.requests import ServeRequest
from jaxmoe.engine.serving.runner import Runner
from jaxmoe.engine.serving.scheduler import Policy
from jaxmoe.engine.serving.types import ServeSpec
from jaxmoe.experts import SlotBank, host_store
from jaxmoe.offload.budget import BudgetError
from jaxmoe.spec import ModelSpec
from jaxmoe.spec.published import published
from pallas_kernels.dispatch import Kernels
from tests.models import CONFIGS, random_model, slot_model
from tests.quick import QuickKernels

CPU = Kernels("cpu")
SMALL = ServeMemory(slots=4, positions=128, page=16, chunk=64, wave=128, groups=2, run=16, move=4, prefill="chunked", unrolled=False)
SPECS = {family: ModelSpec.from_hf(CONFIGS[family]) for family in ("qwen3_moe", "olmoe", "mixtral")}


def asked(total: int | None = None, **more) -> ServeMemory:
    return dataclasses.replace(SMALL, total="auto" if total is None else f"{total}b", **more)


def smallest(spec: ModelSpec, **more) -> int:
    with pytest.raises(TooSmall) as error:
        fit(spec, asked(1, **more), CPU)
    return error.value.smallest


def everything(spec: ModelSpec, **more) -> int:
    return fit(spec, asked(**more), CPU).table.total


def seconds(fitted: Fitted, curves=None) -> float:
    return Search(weigh(SPECS["olmoe"], fitted.asked, CPU), fitted.asked, curves).seconds(fitted.experts, fitted.spec.pages)


# --- Sharing a budget out


@pytest.mark.parametrize("family", SPECS)
@pytest.mark.parametrize("more", [{}, {"kv_dtype": "int8", "host": "1MB"}, {"expert_slots": 3}, {"kv": "300kB"}], ids=str)
def test_a_budget_is_kept_or_refused_with_both_numbers(family, more):
    spec = SPECS[family]
    least, most = smallest(spec, **more), everything(spec, **more)
    for total in [least, least + 1, *(least + (most + 50_000 - least) * i // 12 for i in range(13))]:
        found = fit(spec, asked(total, **more), CPU)
        assert found.table.total <= total and found.table.left == total - found.table.total
        assert found.spec.pages >= found.spec.table
        assert min(found.experts.slots) >= spec.moe[0].active
        assert tuple(name for name, _ in found.table.items) == NAMES and min(n for _, n in found.table.items) >= 0
    for total in (least - 1, least // 2, 1):
        with pytest.raises(TooSmall) as error:
            fit(spec, asked(total, **more), CPU)
        text = str(error.value)
        assert f"{total:,} bytes" in text and f"{least:,} bytes" in text and error.value.table.largest[0][0] in text
        assert error.value.smallest == least == error.value.table.total and error.value.table.left == total - least


def curves_of(kind: str) -> np.ndarray | None:
    if kind == "even":
        return None
    at = np.arange(9)
    return np.stack([(1000 * np.sqrt(at / 8)).astype(int), 500 * (at > 3) + 60 * at])


@settings(deadline=None, max_examples=40, derandomize=True)
@given(share=st.floats(0, 1), link=st.sampled_from([0.5, 25.0, 1e4]), expected=st.integers(1, 128), kind=st.sampled_from(["even", "trace"]))
def test_slots_and_pages_are_the_best_of_all_that_fit(share, link, expected, kind):
    spec, curves = SPECS["olmoe"], curves_of(kind)
    more = {"link_gbps": link, "memory_gbps": 100.0, "expected": expected}
    least, most = smallest(spec, **more), everything(spec, **more)
    total = least + int(share * (most - least))
    found = fit(spec, asked(total, **more), CPU, curves_LC=curves)
    search = Search(weigh(spec, found.asked, CPU), found.asked, curves)
    every = [
        (search.seconds(plan, pages), search.sizes.table(plan, pages, None).total)
        for plan in search.plans for pages in range(search.least_pages, search.most_pages + 1)
    ]  # fmt: skip
    best = min(time for time, needed in every if needed <= total)
    assert search.seconds(found.experts, found.spec.pages) <= best * (1 + 1e-9)


def test_more_memory_never_makes_a_token_slower():
    least, most = smallest(SPECS["olmoe"]), everything(SPECS["olmoe"])
    found = [fit(SPECS["olmoe"], asked(total), CPU) for total in range(least, most, (most - least) // 60)]
    times = [seconds(one) for one in found]
    assert all(later <= before * (1 + 1e-9) for before, later in zip(times, times[1:], strict=False))
    assert times[-1] < times[0] and found[-1].resident and not found[0].resident


@pytest.mark.parametrize("fixed, of", [({"expert_slots": 4}, "pages"), ({"kv": "200kB"}, "slots")])
def test_with_one_of_both_given_the_other_never_falls(fixed, of):
    least, most = smallest(SPECS["olmoe"], **fixed), everything(SPECS["olmoe"], **fixed)
    found = [fit(SPECS["olmoe"], asked(total, **fixed), CPU) for total in range(least, most, (most - least) // 40)]
    counts = [one.spec.pages if of == "pages" else sum(one.experts.slots) for one in found]
    assert counts == sorted(counts) and counts[0] < counts[-1]
    assert len({one.experts.slots if of == "pages" else one.spec.pages for one in found}) == 1


def test_a_slow_link_gets_slots_and_a_fast_one_pages():
    total = (smallest(SPECS["olmoe"]) + everything(SPECS["olmoe"])) // 2
    slow, fast = (fit(SPECS["olmoe"], asked(total, expected=128, link_gbps=link, memory_gbps=10.0), CPU) for link in (0.01, 1e5))
    assert sum(slow.experts.slots) > sum(fast.experts.slots) and slow.spec.pages < fast.spec.pages


def test_what_the_device_has_free_is_what_auto_means():
    total = (smallest(SPECS["olmoe"]) + everything(SPECS["olmoe"])) // 2
    one, other = fit(SPECS["olmoe"], asked(), CPU, free=total), fit(SPECS["olmoe"], asked(total), CPU)
    assert (one.spec, one.experts, one.table) == (other.spec, other.experts, other.table)
    with pytest.raises(BudgetError, match=f"{total:,} .* more than the {total - 1:,}"):
        fit(SPECS["olmoe"], asked(total), CPU, free=total - 1)


@pytest.mark.parametrize(
    "more, said",
    [
        ({"total": "50%"}, "a share is one of all experts"), ({"total": "much"}, "'much' is not an amount"), ({"kv": "10%"}, "kv = '10%'"),
        ({"kv": "1kB"}, "one sequence of 128 positions needs 8"), ({"experts": "1%"}, "minimum is"), ({"expert_slots": 9}, "needs 2 to 8"),
        ({"expert_slots": 2, "experts": "50%"}, "give one of them"), ({"batch": 5}, "give 1 to slots = 4"), ({"run": 5}, "multiples of run = 5"),
        ({"groups": 9}, "9 groups of layers"), ({"page": 48, "run": 48, "chunk": 48, "wave": 48}, "pages of 48 tokens"), ({"slots": 0}, "slots = 0"),
        ({"kv_dtype": "int4"}, "'int4'"), ({"policy": "static"}, "give a trace"), ({"expected": 0}, "expected = 0"),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_what_cannot_be_is_refused_by_name(more, said):
    with pytest.raises(ValueError, match=said):
        fit(SPECS["olmoe"], dataclasses.replace(SMALL, **more), CPU)


# --- What it comes to


def test_the_table_and_the_lines_say_what_was_found():
    spec = published("qwen3_30b_a3b").with_precision("bfloat16")
    wanted = ServeMemory(total="24GB", host="8GB", slots=32, positions=8192, chunk=1024, wave=4096, link_gbps=25.0, memory_gbps=2000.0)
    found = fit(spec, wanted, Kernels("gpu"))
    lines, rows = describe(found), found.table.lines()
    tokens = found.spec.pages * found.spec.page
    assert f"{tokens:,} tokens at a time in {found.spec.pages:,} pages of 32: {tokens // 8192} sequences of 8,192" in lines[0]
    assert f"{found.spec.host_pages * 32:,} tokens put aside in 8.00 GB" in lines[1]
    assert f"of 128 experts in each of 48 layers and {found.staging} in staging" in lines[2] and found.slots is not None
    assert "a token cross the link: at most" in lines[3] and "even routing" in lines[4]
    assert [row[0] for row in rows] == [*NAMES, "total", "budget", "left"] and rows[-2][1] == "24.0 GB"
    assert json.loads(json.dumps(found.table.to_json()))["total"] == found.table.total == sum(n for _, n in found.table.items)
    # Arithmetic by hand: 48 layers of 4 heads of 128, keys and values; an expert's three matrices.
    assert found.table["KV pages"] == (found.spec.pages + 1) * 32 * 48 * 4 * 128 * 2 * 2
    assert found.table["experts"] == sum(found.slots) * 3 * 2048 * 768 * 2 and found.host["experts"] == 48 * 128 * 3 * 2048 * 768 * 2
    assert found.table["parked wave"] == 4096 * 2048 * 2 and found.table["recurrent states"] == 0
    assert predicted(found, 1).link_bytes == pytest.approx(48 * 8 * (1 - sum(found.slots) / 48 / 128) * 3 * 2048 * 768 * 2)
    resident = fit(spec, dataclasses.replace(wanted, total="90GB"), Kernels("gpu"))
    assert resident.resident and resident.slots is None and "experts" not in resident.host and "all 128 experts" in describe(resident)[-1]


def test_layers_with_a_state_count_it_and_share_no_pages():
    spec = published("qwen3_next_80b_a3b").with_precision("bfloat16")
    found = fit(spec, ServeMemory(slots=8, chunk=128, wave=256, total="40GB"), Kernels("gpu"))
    delta = next(layer.delta for layer in spec.layers if layer.delta is not None)
    channels, layers = 2 * delta.k_heads * delta.k_dim + delta.v_heads * delta.v_dim, sum(layer.delta is not None for layer in spec.layers)
    state = delta.v_heads * delta.k_dim * delta.v_dim * 4 + (delta.conv - 1) * channels * 2
    assert found.table["recurrent states"] == layers * 8 * state and not found.spec.sharing


def test_experts_that_the_host_sends_are_counted_on_their_way():
    plain, driven = (fit(SPECS["olmoe"], asked(expert_slots=4, host_driven=sends), CPU) for sends in (False, True))
    assert driven.table["expert staging"] == plain.table["expert staging"] + (IN_FLIGHT + 1) * host_store.record_bytes(SPECS["olmoe"])
    assert driven.table.total - plain.table.total == (IN_FLIGHT + 1) * host_store.record_bytes(SPECS["olmoe"])
    assert fit(SPECS["olmoe"], asked(host_driven=True), CPU).table["expert staging"] == 0  # all are there


def test_a_trace_says_what_to_expect():
    curves = curves_of("trace")
    found = fit(SPECS["olmoe"], asked(expert_slots=4, link_gbps=1.0), CPU, curves_LC=curves)
    assert found.hits == tuple(curves[:, 4] / curves[:, 8])
    assert predicted(found).hit_rate == pytest.approx(np.mean(found.hits)) and "as in the trace" in describe(found)[-1]
    with pytest.raises(ValueError, match=r"\[2, 8\].*\[2, 9\]"):
        fit(SPECS["olmoe"], asked(), CPU, curves_LC=curves[:, :-1])


def test_the_host_has_to_have_room_too():
    found = fit(SPECS["olmoe"], asked(expert_slots=4, host="100kB"), CPU)
    needed = sum(found.host.values())
    assert found.host["pages"] <= 100_000 and found.host["experts"] == 2 * 8 * host_store.record_bytes(SPECS["olmoe"])
    check_host(found, needed)
    check_host(found, None)
    check_host(found, needed + found.table.total, same=True)
    for available, same in ((needed - 1, False), (needed + found.table.total - 1, True)):
        with pytest.raises(BudgetError, match=f"{needed + same * found.table.total:,} bytes .* {available:,} of host memory"):
            check_host(found, available, same)


# --- Against what is there


def on_device() -> int:
    """Bytes of all arrays there are, those that share memory counted once."""
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in jax.live_arrays() if not x.is_deleted() and len(x.devices()) == 1}.values())


def fitted_runner(family: str, of: int | None, dtype: str = "float32", kernels: Kernels = CPU, **more) -> tuple[Fitted, Runner, int]:
    """A runner made as `fit` says, with `of` slots a layer, and the bytes that it has added to the device."""
    resident = random_model(family, dtype, kernels, unroll=False)
    found = fit(resident.spec, asked(**{"expert_slots": of or resident.spec.moe[0].experts, "kv": "400kB"} | more), CPU)
    model = resident if found.slots is None else slot_model(resident, found.slots, found.staging)
    model = dataclasses.replace(model, bank=dataclasses.replace(model.bank, poison=False)) if of else model
    gc.collect()
    before = on_device()
    runner = Runner(model, found.spec, kv=more.get("kv_dtype"))
    return found, runner, on_device() - before


@pytest.mark.parametrize("family, slots, kv_dtype", [("qwen3_moe", None, "int8"), ("olmoe", 4, "bfloat16"), ("mixtral", 3, None)])
def test_what_is_counted_is_what_lies_on_the_device(family, slots, kv_dtype):
    found, runner, added = fitted_runner(family, slots, kv_dtype=kv_dtype, host="100kB")
    table, bank = found.table, runner.model.bank
    assert sum(x.nbytes for x in jax.tree.leaves(runner.state.layers)) == table["KV pages"] + table["recurrent states"]
    assert runner.page_bytes() * (found.spec.pages + 1) == table["KV pages"]
    assert bank.device_bytes == table["experts"] + table["expert staging"]
    params = sum(x.nbytes for x in jax.tree.leaves(runner.model.params))
    copy = runner.model.spec.vocab * runner.model.spec.width * 4 if runner.model.spec.tied else 0  # `load_model` makes one, these models don't
    assert params + copy == table["parameters"]
    streamed = table["experts"] + table["expert staging"] if isinstance(bank, SlotBank) else 0
    assert table["KV pages"] + streamed <= added <= table["KV pages"] + table["recurrent states"] + streamed + table["tables"]


COMPILED = [("qwen3_moe", None, "float32", "waves", {"wave": 256, "prefill": "layered"}), ("mixtral", 2, "bfloat16", "decode", {"slots": 32})]


@pytest.mark.parametrize("family, slots, dtype, kind, more", COMPILED)
def test_programs_need_no_more_than_the_formula_and_not_much_less(family, slots, dtype, kind, more):
    found, runner, _ = fitted_runner(family, slots, dtype, **more)
    name, step, args = next(one for one in activations.compiled_steps(runner, "layered", True) if one[0].startswith(kind))
    needed = activations.needed(step, args)
    shape = activations.program_steps(found.spec, "layered")[kind == "waves"]
    bound = activations.program_bytes(runner.model.spec, shape, CPU, slots is not None, False)
    assert needed <= bound <= 4 * needed, f"{name}: {needed:,} bytes, the formula has {bound:,}"
    assert bound <= found.table["activations"]


@pytest.mark.slow
def test_an_engine_that_is_short_of_pages_stays_within_its_table():
    found, runner, begun = fitted_runner("olmoe", 4, kernels=QuickKernels("cpu"), host="200kB", kv="160kB", prefill=Policy().prefill)
    there = on_device() - begun
    engine, rng = ServingEngine(runner, None, (5,), Policy()), np.random.default_rng(0)
    for i in range(12):
        engine.submit(ServeRequest(tuple(rng.integers(6, 96, 20 + i).tolist()), 60, logprobs=2 if i % 3 else None))
    most = events = 0
    while not engine.idle:
        events += sum(event.finish_reason in ("length", "stop") for event in engine.step())
        most = max(most, on_device() - there)
    held = {name: n for name, n in found.table.items if name not in ("parameters", "activations")}
    assert begun <= most <= sum(held.values())
    assert events == 12 and engine.errors == 0 and runner.host.bytes_out > 0


def test_programs_and_what_goes_with_them_follow_from_how_prompts_are_computed():
    spec = ServeSpec(slots=8, page=16, pages=4, positions=128, batch=4, chunk=64, wave=256, groups=1, run=16, mixed=False)
    mixed, decode = dataclasses.replace(spec, mixed=True), (4, 4)
    expected = {"chunked": (64, 8), "splitfuse": (64, 8), "whole": (128, 8), "layered": (256, 8)}
    for prefill, prompts in expected.items():
        assert [(step.tokens, step.logits) for step in activations.program_steps(spec, prefill)] == [decode, prompts]
    assert [(step.tokens, step.logits) for step in activations.program_steps(mixed, "whole")] == [decode, (132, 12)]
    streamed, resident = (fit(SPECS["olmoe"], asked(expert_slots=slots, prefill=None), CPU) for slots in (4, 8))
    assert streamed.table["parked wave"] == 128 * 64 * 4 and resident.table["parked wave"] == 0
    for one, prefill in ((streamed, "layered"), (resident, "chunked")):
        assert fit(SPECS["olmoe"], dataclasses.replace(one.asked, prefill=prefill), CPU).table == one.table


def test_models_whose_experts_the_host_sends_are_not_measured():
    model = slot_model(random_model("mixtral", unroll=False), 2)
    model = dataclasses.replace(model, bank=dataclasses.replace(model.bank, store=None))
    runner = Runner(model, ServeSpec(2, 16, 8, 64, 2, 32, 32, 1, run=16), run=object())
    with pytest.raises(ValueError, match="the host sends"):
        activations.measured(runner, "layered")
