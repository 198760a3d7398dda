"""Tables of serving's records: which rows and columns there are, in what order, and that a table without records is left out."""

from jaxmoe.report import serve_tables


def cells(text: str) -> list[list[str]]:
    """Rows of a table, the header first, without the line of dashes."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [lines[0], *lines[2:]]


def virtual(what: str, arm: str, counters: dict, routing: str = "recorded", **more) -> dict:
    drawn = routing != "recorded"
    settings = {"what": what, "arm": arm, "routing": routing, "source": "drawn" if drawn else "recording", "reuse": 0.25, "layers": 2}
    bytes = {"prompt_bytes": 2 * 10**9, "expert_bytes": 5 * 10**9}
    return {"name": "serve_virtual", "settings": settings | more, "counters": counters, "bytes": bytes}


def prompts(arm: str, routing: str = "recorded", **beside) -> dict:
    counters = {"prompt_loads": 30, "prompt_asked": 60, "ttft": 0.5, "gap": 0.1, "gap_bound": 0.2, "gap_unloaded": 0.05}
    return virtual("prefill", arm, counters | beside, routing)


def test_controls_come_first_and_numbers_in_their_order():
    arms = ["layered, 16", "whole", "layered, 8", "chunked, 512", "chunked, 256"]
    beside = {"ttft / whole": 1.5, "gap / whole": 0.25, "ttft / chunked, 256": 0.5, "gap / chunked, 256": 0.125}
    made = [prompts(arm, "other", **({} if arm == "whole" else beside)) for arm in arms]
    found = serve_tables.tables([*made, prompts("whole"), {"name": "prefetch", "counters": {}, "settings": {}}])
    assert list(found) == ["serve_prefill"]
    header, *rows = cells(found["serve_prefill"])
    assert [row[0] for row in rows] == ["recorded"] + 5 * ["other"], "recordings before what is drawn"
    assert [row[2] for row in rows[1:]] == ["whole", "chunked, 256", "chunked, 512", "layered, 8", "layered, 16"]
    assert rows[1][3:] == ["2.0", "0.50", "0.50", "", "", "0.100", "0.200", "", "", "2.0"]
    assert rows[4][3:] == ["2.0", "0.50", "0.50", "1.50", "0.50", "0.100", "0.200", "0.25", "0.12", "2.0"] and len(header) == len(rows[4])


def test_other_comparisons_in_virtual_time():
    grouped = {"distinct": 600, "decoded": 100, "bytes_per_token": 2_500_000, "per_token": 0.004, "waited": 3, "distinct / arrival": 0.75}
    aside = {"preemptions": 4, "recomputed": 1248, "resume": 0.25, "resume_extra": 0.2, "total": 20.0, "resume_extra / recompute": 0.05}
    order = {"computed": 300, "unique": 200, "total": 9.5, "computed / arrival": 0.5}
    found = serve_tables.tables([
        virtual("grouping", "greedy", grouped), virtual("preemption", "swap", aside), virtual("offline", "prefix groups", order),
    ])  # fmt: skip
    assert cells(found["serve_grouping"])[1] == ["recorded", "25", "greedy", "3.00", "0.75", "2", "", "4.0", "", "", "3"]
    assert cells(found["serve_preemption"])[1] == ["recorded", "25", "swap", "4", "1,248", "250.0", "200.0", "0.05", "5", "20.0", ""]
    assert cells(found["serve_offline"])[1] == ["recorded", "25", "prefix groups", "300", "1.50", "0.50", "5", "9.5", ""]


def test_goodput_is_a_row_for_both_arms():
    def pair(times: float, control: float, own: float) -> list[dict]:
        what, limits = ("goodput", {"ttft_times": 5.0, "tpot_times": times})
        name = "chunked, recompute, fcfs"
        ratio = {f"goodput_rate / {name}": own / control} if control else {}
        return [
            virtual(what, name, {"goodput_rate": control}, **limits),
            virtual(what, "layered, swap, expert-aware", {"goodput_rate": own} | ratio, **limits),
        ]

    rows = cells(serve_tables.goodput([*pair(2.0, 0.2, 0.1), *pair(4.0, 0.5, 1.0)]))[1:]
    assert rows == [["recorded", "25", "5, 2", "0.20", "0.10", "0.50"], ["recorded", "25", "5, 4", "0.50", "1.00", "2.00"]]
    assert cells(serve_tables.goodput(pair(2.0, 0.0, 0.1)))[1][3:] == ["0.00", "0.10", ""], "no ratio to a control that bears nothing"
    assert serve_tables.goodput(pair(2.0, 0.2, 0.1)[:1]) == ""


def scene(arm: str, name: str = "serve_link", platform: str = "cpu", **counters) -> dict:
    settings = {"model": "small", "scene": "2 together", "arm": arm, "prompts": 2, "tokens": 1024, "rounds": 6}
    timings = {"ttft_mean": {"median": 1.25}, "gap_worst": {"median": 0.5}}
    counters = {"once": 1.0, "gap_bound": 0.6} | counters
    return {"name": name, "settings": settings, "timings": timings, "device": {"platform": platform}, "counters": counters}


def test_scenes_have_their_ratios_with_intervals():
    interval = {"value": 0.5, "low": 0.4, "high": 0.75}
    layered = scene("layered, 8", **{f"{what} / {arm}": interval for what in ("ttft_mean", "gap_worst") for arm in ("whole", "chunked, 256")})
    header, *rows = cells(serve_tables.link([layered, scene("whole")]))
    ratios = "0.50 (0.40 to 0.75) whole, 0.50 (0.40 to 0.75) chunked, 256"
    assert rows[0] == ["small", "2 of 1,024", "whole", "1.00", "1.25", "", "0.500", "0.600", "", "6"]
    assert rows[1] == ["small", "2 of 1,024", "layered, 8", "1.00", "1.25", ratios, "0.500", "0.600", ratios, "6"] and len(header) == len(rows[1])


def test_a_gpus_scenes_are_a_gpus():
    assert serve_tables.device([scene("whole", "serve_device")]) == "", "what a CPU wrote is a check of the code"
    assert cells(serve_tables.device([scene("whole", "serve_device", "gpu"), scene("whole")]))[1][2] == "whole"


def test_a_queue_beside_its_controls():
    def way(arm: str, batch: int, slots: int, **beside) -> dict:
        counters = {"bytes_per_token": 2_500_000.0, "decode_hit_rate": 0.25, "distinct_per_token": 2.0, "tokens_per_second": 100.0}
        counters |= {"waited": 3, "tokens": 2000}
        settings, timings = {"arm": arm, "batch": batch, "slots": slots}, {"processor": {"median": 5.0}}
        return {"name": "serve_queue", "settings": settings, "timings": timings, "counters": counters | beside}

    made = [way("grouped by token", 8, 32, **{"bytes_per_token / arrival": 0.5, "tokens_per_second / one at a time": 3.0}), way("arrival", 8, 8)]
    rows = cells(serve_tables.queue(made))[1:]
    assert rows[0] == ["arrival", "8 of 8", "2.00", "25", "2.50", "", "", "", "100", "", "", "", "2.50", "3"]
    assert rows[1] == ["grouped by token", "8 of 32", "2.00", "25", "2.50", "0.50", "", "", "100", "", "", "3.00", "2.50", "3"]


def test_loads_by_rate_with_blanks_for_what_was_not_seen():
    def run(arm: str, rate: float, **settings) -> dict:
        counters = {"rate": rate, "requests": 8, "done": 7, "ttft": {"p50": 0.5, "p99": 1.0}, "tpot": {"n": 0}, "itl": {"p99": 0.25}}
        counters |= {"tpot_x2": {"attainment": 0.5}, "tpot_x4": {"attainment": 0.875}}
        return {"name": "serve_open", "settings": {"model": "small", "arm": arm} | settings, "counters": counters}

    made = [run("layered, swap", 2.0), run("layered, swap", 1.0, part_of_capacity=0.5), run("chunked, recompute", 2.0)]
    rows = cells(serve_tables.opened(made))[1:]
    assert [row[1:4] for row in rows] == [["layered, swap", "1", "0.50"], ["chunked, recompute", "2", ""], ["layered, swap", "2", ""]]
    assert rows[0][4:] == ["7 of 8", "0.500", "1.000", "", "0.250", "50", "88"]
