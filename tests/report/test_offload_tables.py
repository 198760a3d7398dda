"""Tables of the benchmarks of offloading: what a record's rows come to."""

from jaxmoe.report import offload_tables

LFU = {
    "way": "lfu", "gbps": 0.1, "ms": 20.0, "over_on_demand": 1.5, "over_lfu": 1.0, "over_lfu_low": 1.0, "over_lfu_high": 1.0, "hit_rate": 0.5,
    "stall": 0.25, "demand_bytes": 2_000_000, "same_ids": True, "foretold_ms": 21.0,
}  # fmt: skip
GATE = LFU | {
    "way": "lfu + gate", "gbps": 0.01, "over_lfu": 1.2, "over_lfu_low": 1.1, "over_lfu_high": 1.3, "foretold_gain": 1.25, "share_of_foretold": 0.8,
    "useful_bytes": 1_000_000, "late_bytes": 0, "wasted_bytes": 500_000, "same_ids": False,
}  # fmt: skip


def test_a_record_becomes_a_table_in_the_order_to_be_read():
    made = offload_tables.tables([{"name": "prefetch", "counters": {"rows": [LFU, GATE]}}, {"name": "other", "counters": {}}])
    assert list(made) == ["prefetch"]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in made["prefetch"].splitlines()]
    assert lines[2][:6] == ["0.01", "lfu + gate", "50.0", "20.0", "1.50", "1.20 (1.10 to 1.30)"] and lines[2][7:] == [
        "1.25", "80", "2.0", "1.0 / 0.0 / 0.5", "25.0", "NO",
    ]  # fmt: skip
    assert lines[3][1] == "lfu" and lines[3][5] == "" and lines[3][10] == ""
    assert offload_tables.terminal(offload_tables.PREFETCH, [LFU]).row_count == 1
    both = [{"name": "prefetch", "settings": {"model": name}, "counters": {"rows": [row]}} for name, row in (("default", LFU), ("pregated", GATE))]
    apart = offload_tables.tables(both)
    assert list(apart) == ["prefetch", "prefetch_pregated"] and "gate" not in apart["prefetch"] and "lfu + gate" in apart["prefetch_pregated"]


def test_quality_and_pregate_rows():
    interval = {"mean": 0.01, "low": -0.002, "high": 0.022}
    row = {"name": "hobbit", "degraded": 0.25, "skipped": 0.05, "rerouted": 0.0, "ratio": 0.6, "perplexity": interval, "bit_equal": False}
    made = offload_tables.tables([
        {"name": "quality", "counters": {"rows": [row]}},
        {"name": "pregate", "counters": {"rows": [{"name": "tuned", "nats": 3.5, "change": 0.011}]}},
    ])  # fmt: skip
    assert made["quality"].splitlines()[2] == "| hobbit | 25.0 | 5.0 | 0.0 | 0.60 | +1.00 (-0.20 to +2.20) |  |"
    assert made["pregate"].splitlines()[2] == "| tuned | 3.5000 | +1.10 |"
