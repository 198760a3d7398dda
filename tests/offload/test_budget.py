"""The memory budget: what it buys, where it is refused, and that its predictions are the arithmetic they claim to be."""

import dataclasses
import math
from fractions import Fraction

import jax
import numpy as np
import pytest

from jaxmoe.offload.budget import (
    Amount,
    BudgetError,
    ExpertShapes,
    describe,
    format_bytes,
    minimum_bytes,
    parse_memory,
    predict,
    solve,
    total_bytes,
)
from jaxmoe.offload.published import DEVICES_GB, PUBLISHED, fits_in, interpolate_hits
from jaxmoe.report import record
from jaxmoe.spec import ModelSpec, abstract_experts, abstract_params
from jaxmoe.spec.params import parameter_counts
from tests.scripts.commands import call, load

SMALL = ExpertShapes("small", layers=3, experts=8, active=2, expert_bytes=(1000,) * 3, dense_bytes=5000, kv_bytes_per_token=10, lookup_bytes=2000)
UNEVEN = dataclasses.replace(SMALL, expert_bytes=(1000, 2000, 1000))

CONFIGS = {
    "Mixtral-8x7B": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
    },
    "Qwen3-30B-A3B": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "rms_norm_eps": 1e-6, "max_position_embeddings": 40960,
    },
    "OLMoE-1B-7B": {
        "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
        "rms_norm_eps": 1e-5, "max_position_embeddings": 4096,
    },
}  # fmt: skip


def of_bytes(count: int) -> Amount:
    return Amount("bytes", count)


# --- Amounts


@pytest.mark.parametrize(
    ("text", "count"),
    [("4GB", 4 * 10**9), ("4GiB", 4 * 2**30), ("512MB", 512 * 10**6), ("512MiB", 512 * 2**20), ("0.5GB", 5 * 10**8), (" 4 gb ", 4 * 10**9),
     (".5gIb", 2**29), ("7B", 7), ("1.1GB", 1_100_000_000), ("1TB", 10**12), ("3kb", 3000)],
)  # fmt: skip
def test_bytes_are_read_exactly(text, count):
    assert parse_memory(text) == of_bytes(count)


def test_shares_and_auto():
    assert parse_memory("25%") == Amount("share", share=Fraction(1, 4))
    assert parse_memory("13.13 %").resolve(10_000, None) == 1313
    assert parse_memory("100%").resolve(12345, None) == 12345
    assert parse_memory("AUTO") == Amount("auto")
    assert parse_memory("auto").resolve(100, None) == 100
    assert parse_memory("auto").resolve(100, 60) == 60
    assert parse_memory("auto").resolve(100, 600) == 100


@pytest.mark.parametrize(
    "text", ["", "4", "4XB", "GB", "-4GB", "4GB5", "1e9B", "1,5GB", "%", "0GB", "0%", "101%", "0.1B", "automatic", "4 G B", "\u0664GB", "nan"]
)
def test_other_texts_are_refused_by_name(text):
    with pytest.raises(ValueError) as error:
        parse_memory(text)
    assert repr(text) in str(error.value)


def test_bytes_are_written_to_three_digits():
    assert [format_bytes(n) for n in (0, 999, 1000, 17_400, 512_000_000, 3_254_000_000, 61_000_000_000)] == [
        "0 bytes", "999 bytes", "1.00 kB", "17.4 kB", "512 MB", "3.25 GB", "61.0 GB",
    ]  # fmt: skip


# --- Shapes


def test_shapes_come_from_the_leaves():
    spec = ModelSpec.from_hf(CONFIGS["OLMoE-1B-7B"]).with_precision("float32")
    half = ExpertShapes.from_spec(spec.with_precision("bfloat16"), "half")
    full = ExpertShapes.from_spec(spec)
    assert (full.name, full.layers, full.experts, full.active) == ("olmoe", 16, 64, 8)
    assert full.expert_bytes == (3 * 2048 * 1024 * 4,) * 16
    assert (full.dense_bytes, full.kv_bytes_per_token, full.lookup_bytes) == (2 * half.dense_bytes, 2 * half.kv_bytes_per_token, 50304 * 2048 * 4)
    assert full.all_bytes == 64 * 16 * 3 * 2048 * 1024 * 4
    tied = ExpertShapes.from_spec(dataclasses.replace(spec, tied=True))
    assert (tied.lookup_bytes, tied.dense_bytes) == (0, full.dense_bytes - full.lookup_bytes)


@pytest.mark.parametrize("change", [{"layers": 4}, {"active": 9}, {"active": 0}, {"expert_bytes": (1000, 0, 1000)}])
def test_shapes_that_do_not_belong_together_are_refused(change):
    with pytest.raises(ValueError, match="small"):
        dataclasses.replace(SMALL, **change)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_add_up_to_the_published_total(name):
    model = PUBLISHED[name]
    own = {path: leaf for path, leaf in abstract_experts(model.spec).items() if int(path) < model.spec.n_layers}
    experts = sum(math.prod(leaf.shape) for layer in own.values() for leaf in layer.values())
    assert model.shapes(name, "4-bit").all_bytes == pytest.approx(experts * 4.25 / 8, rel=1e-6)
    assert model.shapes(name).all_bytes == 2 * experts
    total, _ = parameter_counts(model.spec)
    assert model.shapes(name).dense_bytes == pytest.approx(2 * (total - experts), rel=0.01)  # some leaves are float32


def test_latent_attention_by_hand():
    query, compressed, expanded, out = 2048 * 16 * 192, 2048 * (512 + 64) + 512, 512 * 16 * (128 + 128), 16 * 128 * 2048
    model = PUBLISHED["DeepSeek-V2-Lite"]
    leaves = [leaf for layer in abstract_params(model.spec)["layers"].values() for leaf in jax.tree.leaves(layer["attn"])]
    assert sum(math.prod(leaf.shape) for leaf in leaves) == 27 * (query + compressed + expanded + out)
    assert model.shapes("V2").kv_bytes_per_token == 27 * (512 + 64) * 2


@pytest.mark.parametrize("name", CONFIGS)
def test_published_sizes_are_those_of_the_spec(name):
    spec = ModelSpec.from_hf(CONFIGS[name]).with_precision("bfloat16")
    assert PUBLISHED[name].shapes(name) == ExpertShapes.from_spec(spec, name)


# --- Slots


@pytest.mark.parametrize("shapes", [SMALL, UNEVEN])
@pytest.mark.parametrize("staging", [1, 2, 5])
def test_the_minimum_fits_and_a_byte_less_does_not(shapes, staging):
    need = minimum_bytes(shapes, staging)
    plan = solve(shapes, of_bytes(need), staging)
    assert (plan.slots, plan.staging, plan.device_bytes, plan.unused_bytes) == ((2, 2, 2), staging, need, 0)
    with pytest.raises(BudgetError) as error:
        solve(shapes, of_bytes(need - 1), staging)
    assert f"{need:,} bytes" in str(error.value) and f"{need - 1:,} bytes" in str(error.value)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_percentage_named_as_minimum_is_enough(name):
    shapes = PUBLISHED[name].shapes(name, "4-bit")
    with pytest.raises(BudgetError) as error:
        solve(shapes, parse_memory("1%"))
    percent = str(error.value).split("the minimum is ")[1].split("(")[1].split(")")[0]
    assert solve(shapes, parse_memory(percent)).slots == (shapes.active,) * shapes.layers


def test_slots_are_uniform_as_far_as_that_goes_and_the_rest_is_reported():
    plan = solve(SMALL, of_bytes(15_500))
    assert (plan.slots, plan.staging, plan.device_bytes, plan.unused_bytes, plan.pool_slots) == ((5, 4, 4), 2, 15_000, 500, 15)
    assert (plan.resident_bytes, plan.all_resident) == (24_000, False)
    plan = solve(UNEVEN, parse_memory("50%"))  # 16,000: 4,000 for staging, 4,000 for a slot in each layer
    assert (plan.slots, plan.device_bytes) == ((3, 3, 3), 16_000)


@pytest.mark.parametrize("amount", [parse_memory("100%"), parse_memory("1GB"), parse_memory("auto"), of_bytes(24_000)])
def test_all_resident_needs_no_staging(amount):
    plan = solve(SMALL, amount)
    assert (plan.slots, plan.staging, plan.device_bytes, plan.all_resident) == ((8, 8, 8), 0, 24_000, True)


def test_a_byte_less_than_all_experts_streams():
    plan = solve(SMALL, of_bytes(23_999))
    assert (plan.slots, plan.staging) == ((7, 7, 7), 2)


def test_a_model_whose_minimum_is_everything():
    shapes = dataclasses.replace(SMALL, layers=1, experts=3, expert_bytes=(1000,))
    assert minimum_bytes(shapes) == 3000
    assert solve(shapes, of_bytes(3000)).all_resident
    with pytest.raises(BudgetError, match="3,000 bytes .100.00%., for all experts"):
        solve(shapes, of_bytes(2999))


def test_auto_takes_what_is_free():
    assert solve(SMALL, parse_memory("auto"), free_bytes=15_500) == dataclasses.replace(solve(SMALL, of_bytes(15_500)))
    for free in (7999, 0, -10):
        with pytest.raises(BudgetError, match=f"{max(free, 0):,} bytes.*8,000 bytes"):
            solve(SMALL, parse_memory("auto"), free_bytes=free)


def test_more_than_is_free_is_refused():
    assert solve(SMALL, of_bytes(15_500), free_bytes=15_000).device_bytes == 15_000
    with pytest.raises(BudgetError, match="15,000 bytes.*14,999 free.*at most 62.49%"):
        solve(SMALL, of_bytes(15_500), free_bytes=14_999)
    with pytest.raises(BudgetError, match="7,999 bytes.*the minimum is 8,000"):
        solve(SMALL, of_bytes(15_500), free_bytes=7999)
    with pytest.raises(BudgetError, match="24,000 bytes"):
        solve(SMALL, parse_memory("100%"), free_bytes=23_999)


def test_bypass_stages_a_whole_token():
    assert solve(dataclasses.replace(SMALL, active=4), of_bytes(16_000), bypass=True).staging == 4
    assert solve(SMALL, of_bytes(16_000), staging=3, bypass=True).staging == 3
    with pytest.raises(ValueError, match="staging = 0"):
        solve(SMALL, of_bytes(16_000), staging=0)


def by_weight(curves_LC, total, minimum):
    """Slots one by one to the layer that its next slot helps most."""
    slots = [minimum] * len(curves_LC)
    for _ in range(total - sum(slots)):
        gains = [curves_LC[layer][n + 1] if n < 8 else -1.0 for layer, n in enumerate(slots)]
        slots[int(np.argmax(gains))] += 1
    return slots


CURVES = np.array([[0.0] + [weight / n for n in range(1, 9)] for weight in (1.0, 4.0, 2.0)])


def test_slots_by_a_trace():
    plan = solve(SMALL, of_bytes(15_500), curves_LC=CURVES, allocate=by_weight)
    assert sum(plan.slots) == 13 and plan.device_bytes == 15_000
    assert plan.slots[1] > plan.slots[2] > plan.slots[0] >= 2


def test_slots_by_a_trace_fill_the_bytes_of_uneven_layers():
    plan = solve(UNEVEN, of_bytes(20_000), curves_LC=CURVES, allocate=by_weight)
    more = by_weight(CURVES, sum(plan.slots) + 1, 2)
    assert plan.device_bytes <= 20_000 < sum(n * size for n, size in zip(more, UNEVEN.expert_bytes, strict=True)) + 4000


@pytest.mark.parametrize("wrong", [(2, 2), (1, 2, 2), (9, 2, 2), (8, 8, 8)])
def test_a_wrong_allocation_is_refused(wrong):
    with pytest.raises(ValueError, match="allocating"):
        solve(SMALL, of_bytes(15_500), curves_LC=CURVES, allocate=lambda *_: wrong)
    with pytest.raises(ValueError, match="without a function"):
        solve(SMALL, of_bytes(15_500), curves_LC=CURVES)


def test_more_memory_never_buys_less():
    for kwargs in ({}, {"curves_LC": CURVES, "allocate": by_weight}):
        plans = [solve(UNEVEN, of_bytes(n), **kwargs) for n in range(minimum_bytes(UNEVEN), UNEVEN.all_bytes + 1, 500)]
        assert all(plan.device_bytes <= plan.budget_bytes for plan in plans)
        assert all(b >= a for one, other in zip(plans, plans[1:], strict=False) for a, b in zip(one.slots, other.slots, strict=True))
        speeds = [predict(plan, UNEVEN, None, 1.0, 10.0).overlapped for plan in plans]
        assert speeds == sorted(speeds)


# --- Speed


def test_a_prediction_is_the_hand_calculation():
    plan = solve(SMALL, of_bytes(14_000))
    got = predict(plan, SMALL, 0.75, link_gbps=1e-6, memory_gbps=1e-5, context=100)  # 1,000 and 10,000 bytes a second
    assert (got.hit_rate, got.even_routing) == (pytest.approx(0.75), False)
    assert got.link_bytes_per_token == pytest.approx(1500)  # 3 layers, 2 experts, a quarter missing
    assert got.memory_bytes == pytest.approx(3000 + 6000 + 1000)  # dense without lookups, experts, keys and values
    assert got.overlapped == pytest.approx(1 / 1.5)
    assert got.serial == pytest.approx(1 / 2.5)
    even = predict(plan, SMALL, None, link_gbps=1e-6)
    assert (even.hit_rate, even.even_routing, even.memory_seconds) == (pytest.approx(0.5), True, 0.0)
    assert even.overlapped == even.serial == pytest.approx(1 / 3)
    one_by_layer = predict(plan, UNEVEN, (1.0, 0.5, 0.0), link_gbps=1e-6)
    assert (one_by_layer.link_bytes, one_by_layer.hit_rate) == (pytest.approx(2000 + 2000), pytest.approx(0.5))


def test_the_published_ceiling_of_a_full_miss():
    shapes = PUBLISHED["gpt-oss-120b"].shapes("gpt-oss-120b", "4-bit")
    plan = solve(shapes, of_bytes(minimum_bytes(shapes)))
    assert predict(plan, shapes, 0.0, 25.0).overlapped == pytest.approx(25e9 / (36 * 4 * 3 * 2880 * 2880 * 4.25 / 8))
    assert predict(plan, shapes, 0.0, 25.0).overlapped == pytest.approx(13.1, abs=0.1)


def test_rows_of_a_step_share_experts():
    plan = solve(SMALL, of_bytes(14_000))
    steps = [predict(plan, SMALL, 0.5, 1.0, tokens=n) for n in (1, 2, 4, 64)]
    assert [s.link_bytes for s in steps[:2]] == pytest.approx([3 * 2 * 500, 3 * (2 + 2 * 6 / 8) * 500])
    assert [s.link_bytes for s in steps] == sorted(s.link_bytes for s in steps)
    assert [s.overlapped for s in steps] == sorted(s.overlapped for s in steps)
    assert steps[-1].link_bytes <= 12_000
    read = [predict(plan, SMALL, 0.5, 1.0, tokens=2, context=n).memory_bytes for n in (0, 7)]
    assert read[1] - read[0] == pytest.approx(2 * 7 * 10)


def test_resident_experts_use_no_link():
    plan = solve(SMALL, parse_memory("auto"))
    got = predict(plan, SMALL, 0.3, 1e-6)
    assert (got.link_bytes, got.hit_rate, got.overlapped) == (0, 1, math.inf)
    assert predict(plan, SMALL, None, 1e-6, 1e-5).serial == pytest.approx(10_000 / 9000)


@pytest.mark.parametrize(
    "wrong", [{"hit_rate": 1.1}, {"hit_rate": -0.1}, {"hit_rate": math.nan}, {"link_gbps": 0}, {"memory_gbps": 0}, {"tokens": 0}, {"context": -1}]
)
def test_impossible_predictions_are_refused(wrong):
    with pytest.raises(ValueError, match="no prediction"):
        predict(solve(SMALL, of_bytes(14_000)), SMALL, **({"hit_rate": 0.5, "link_gbps": 1.0} | wrong))


def test_faster_links_and_more_hits_never_slow_down():
    plan = solve(SMALL, of_bytes(14_000))
    by_hits = [predict(plan, SMALL, h, 1.0, 4.0).serial for h in (0, 0.3, 0.9, 1)]
    by_link = [predict(plan, SMALL, 0.5, gbps, 4.0).serial for gbps in (1, 2, 30)]
    for speeds in (by_hits, by_link):
        assert speeds == sorted(set(speeds))


# --- What is printed


def test_totals_and_devices():
    plan = solve(SMALL, of_bytes(14_000))
    assert total_bytes(plan, SMALL, context=100, rows=2) == 5000 + 14_000 + 2000
    assert total_bytes(None, SMALL, context=0) == 29_000
    assert [fits_in(n) for n in (1, 8 * 10**9, 8 * 10**9 + 1, 80 * 10**9, 80 * 10**9 + 1)] == ["8 GB", "8 GB", "12 GB", "80 GB", "none"]
    assert list(DEVICES_GB) == sorted(DEVICES_GB)


def test_hits_are_read_off_a_curve():
    curve = [(1.0, 0.4), (2.0, 0.6), (4.0, 0.8)]
    assert [interpolate_hits(curve, slots, 8) for slots in (4, 8, 12, 32, 64)] == pytest.approx([0.4, 0.4, 0.5, 0.8, 0.8])


def test_a_plan_in_words():
    plan = solve(SMALL, of_bytes(15_500))
    text = describe(plan, SMALL, 100, predict(plan, SMALL, None, 1e-6))
    assert "4 to 5 of 8 experts in each of 3 layers and 2 in staging, 15.0 kB of 24.0 kB (500 bytes of the budget unused)" in text
    assert "21.0 kB with the other weights and 100 tokens of KV, 30 % less than resident" in text
    assert "at 54 % hits (even routing) 2.75 kB a token cross the link: at most 0.4 tok/s" in text
    assert "2 to 8" in describe(dataclasses.replace(plan, slots=(2, 8, 2)), SMALL)
    assert describe(solve(SMALL, parse_memory("auto")), SMALL) == "small: all 8 experts of 3 layers on the device, 24.0 kB"


def test_the_script_plans_and_refuses():
    script = load("plan_budget")
    done = call(script, "--expert-memory", "25%")
    assert (done.code, done.err) == (0, "") and "7 to 8 of 32 experts in each of 8 layers" in done.out
    done = call(script, "--expert-memory", "1MB")
    assert done.code == 2 and "3,342,336 bytes" in done.err
    done = call(script, "--expert-memory", "auto", "--free-memory", "20MB", "--policy", "static")
    assert done.code == 0 and "24 to 25 of 32 experts in each of 8 layers and 4 in staging" in done.out
    done = call(script, "--table")
    assert done.code == 2 and "--trace" in done.err


def test_the_table_has_a_record_a_row(tmp_path):
    script = load("plan_budget")
    rows = list(script.table_rows([(1.0, 0.4), (8.0, 0.9)], "Qwen3-30B-A3B-Q4", context=4096))
    script.write_rows(rows, tmp_path)
    records = record.load_records(tmp_path)
    assert len(records) == len(rows) == 31
    found = {(r["settings"]["model"], r["settings"]["experts_dtype"], r["settings"]["budget"]): r for r in records}
    assert ("Mixtral-8x7B", "4-bit", "25%") not in found
    one = found["Qwen3-30B-A3B", "bfloat16", "25%"]
    assert (round(one["counters"]["slots"]), one["settings"]["fits_in"], one["settings"]["resident_fits_in"]) == (32, "24 GB", "80 GB")
    missing = 8 * (1 - one["counters"]["slots"] / 128)
    assert one["counters"]["pcie4_even_tokens_per_second"] == pytest.approx(25e9 / (48 * missing * 3 * 2048 * 768 * 2))
    assert one["bound"]["percent"] == pytest.approx(100 - one["counters"]["saving_percent"])
    assert {key[0] for key, r in found.items() if r["settings"]["own_trace"]} == {"Qwen3-30B-A3B"}
    assert {key[0] for key, r in found.items() if key[1] == "bfloat16" and r["settings"]["supported"]} >= set(CONFIGS)
