"""The measurement of expert streaming at tiny sizes on the CPU: every part runs, its records hold what readers need, failures are recorded, and what
is computed from times and bytes is right. That the step which it measures on a GPU lowers there, with its store in host memory, is compiled."""

import dataclasses
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.cache.layers import init_layers
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import steps
from jaxmoe.experts import host_store
from jaxmoe.formats import leaf_dtype
from jaxmoe.offload import trace as traces
from jaxmoe.offload.replay import replay
from jaxmoe.report import device_bench, device_driver, device_fills, device_steps, device_traced, record
from jaxmoe.report.device_bench import FULL, TINY, Part
from jaxmoe.report.device_driver import Ended, Job
from pallas_kernels.dispatch import Kernels
from sharding.compile_only import compile_with_host
from tests.quick import OPTIONS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "bench_streaming_device.py"
TRACE = ROOT / "tests" / "offload" / "data" / "qwen3_30b_a3b.npz"
SIZES = dataclasses.replace(TINY, bits=(("while", 1), ("mosaic_tma", 1)), bits_steps=4)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> dict[str, dict]:
    """Every part's records, by file name, made in this process."""
    out = tmp_path_factory.mktemp("records")
    device_fills.link(Part(SIZES, out))
    for method in ("fixed", "host_driven", "mosaic_tma", "while_graphs"):
        device_fills.fills(Part(SIZES, out, method))
    device_steps.bits(Part(SIZES, out, "while", 1000.0, TRACE))
    options = Kernels.compiler_options
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernels, "compiler_options", lambda self: options(self) | OPTIONS)
        for run in (device_steps.decode, device_steps.profiled):
            run(Part(SIZES, out, "while", 1000.0, TRACE))
    assert len(record.load_records(out)) == len(list(out.iterdir()))
    return {path.stem: json.loads(path.read_text()) for path in out.iterdir()}


def test_every_part_writes_the_records_that_the_driver_expects(records):
    jobs = [Job("link", None, 1), Job("bits", None, 1), Job("decode", None, 1), Job("profile", None, 1)]
    jobs += [Job("fills", method, 1) for method in ("fixed", "host_driven", "mosaic_tma", "while_graphs")]
    expected = {f"tiny-{stem}": name for job in jobs for name, stem in job.records(job.method or "while", SIZES)}
    assert {stem: made["name"] for stem, made in records.items()} == expected
    assert not [made["settings"] for made in records.values() if "failed" in made["settings"]]
    assert all(made["settings"]["tiny"] for made in records.values())


def test_what_needs_a_gpu_says_so_on_a_cpu(records):
    skipped = {stem for stem, made in records.items() if "skipped" in made["settings"]}
    assert skipped == {
        "tiny-link-mosaic_tma", "tiny-link-mosaic_loads", "tiny-fill-mosaic_tma", "tiny-fill-while_graphs", "tiny-stream_bits-mosaic_tma-b1",
    }  # fmt: skip
    assert "needs an NVIDIA GPU" in records["tiny-fill-mosaic_tma"]["settings"]["skipped"]
    assert records["tiny-fill-mosaic_tma"]["bound"]["percent"] is None


def test_link_and_fills(records):
    link = records["tiny-link-device_put"]
    assert set(link["timings"]) == {"0.0625MiB", "0.0625MiB_in_a_row", "0.25MiB", "0.25MiB_in_a_row"}
    seconds = link["timings"]["0.25MiB"]["median"]
    assert link["counters"]["gbps_0.25MiB"] == pytest.approx(2**18 / seconds / 1e9)
    assert records["tiny-link-fixed"]["bound"]["ceiling"] >= link["bound"]["ceiling"]
    for method in ("fixed", "host_driven"):
        fill = records[f"tiny-fill-{method}"]
        assert fill["counters"]["right"] == 1
        assert fill["counters"]["device_to_host_copies"] == 0
        assert {"small_none", "small_one", "small_all", "layers_none", "layers_one", "layers_four"} == set(fill["timings"])
    assert records["tiny-fill-fixed"]["counters"]["loops_of_unknown_length"] == 0


def test_streamed_bits_are_the_resident_ones(records):
    made = records["tiny-stream_bits-while-b1"]
    assert made["counters"]["steps_that_differ"] == 0 and made["counters"]["cache_bits_equal"] == 1 and made["counters"]["finite"] == 1
    assert made["counters"]["loads"] > 0


def test_decoding_follows_the_trace(records):
    made = records["tiny-stream_decode-25"]
    trace = traces.load(TRACE)
    stop = made["settings"]["prompt_steps"] + made["settings"]["steps"]
    parts = {name: getattr(trace, name)[:stop] for name in ("tokens", "sequence", "phase", "step")}
    parts |= {name: getattr(trace, name)[:stop, : SIZES.layers] for name in ("ids", "weights")}
    meta = dict(trace.meta) | {"layers": SIZES.layers, "expert_bytes": trace.meta["expert_bytes"][: SIZES.layers]}
    cut = traces.Trace(**parts, meta=meta)
    wanted = replay(cut, made["settings"]["slots"], "lfu")
    counters = made["counters"]
    assert (counters["requests"], counters["hits"]) == (SIZES.decode_steps * SIZES.layers * 6, int(wanted.hits_L.sum()))
    assert counters["loads"] == counters["requests"] - counters["hits"]
    assert counters["missed_bytes_per_step"] == counters["loads"] * made["bytes"]["record"] / SIZES.decode_steps
    assert counters["link_gbps"] == 1000.0, "the run's best rate, not this process's"


def test_percentages_are_of_the_bounds_beside_them(records):
    made = records["tiny-stream_decode-25"]
    step, counters = made["timings"]["step"]["median"], made["counters"]
    assert counters["link_seconds"] == pytest.approx(counters["missed_bytes_per_step"] / 1e12)
    assert made["bound"]["percent"] == pytest.approx(counters["serial_percent"])
    assert counters["overlapped_percent"] == pytest.approx(100 * max(counters["link_seconds"], counters["memory_seconds"]) / step)
    assert counters["serial_percent_of_all_hits"] >= 100 * made["timings"]["step_all_hits"]["median"] / step


def test_bounds_by_hand():
    found = device_steps.Bounds(step=10e-3, link=6e-3, memory=1e-3, hits=3e-3).percents()
    assert found == pytest.approx(
        {"overlapped_percent": 60, "serial_percent": 70, "overlapped_percent_of_all_hits": 60, "serial_percent_of_all_hits": 90}
    )


def test_seconds_per_miss():
    assert device_fills.seconds_per_miss("while", 1.0, 8.0, 8) == 1.0
    assert device_fills.seconds_per_miss("fixed", 7.9, 8.0, 8) == 1.0, "it moves all of them, always"
    assert device_fills.seconds_per_miss("while", 9.0, 8.0, 8) == 1.0, "no slope to be seen"


def test_slots_hold_their_records_or_not():
    store, pools, ids, slots = device_fills.fill_arrays(64, 32, 4)
    assert len({row.tobytes() for row in store}) == 8, "no two records alike"
    full = tuple(
        np.stack([store[ids[list(slots).index(z)]].reshape(-1)[a:b].reshape(p.shape[1:]) for z in range(4)])
        for p, a, b in ((pools[0], 0, 64 * 64), (pools[1], 64 * 64, 64 * 96))
    )
    assert device_fills.is_right(full, store, ids, slots)
    full[1][2, 5, 5] ^= 1
    assert not device_fills.is_right(full, store, ids, slots)


def test_profiles_are_read_off_the_streams():
    def line(name, *events):
        return SimpleNamespace(name=name, events=[SimpleNamespace(name=n, duration_ns=d) for n, d in events])

    busy = line("Stream #14(Compute)", ("expert_fill", 5000.0), ("expert_fill", 1000.0), ("MemcpyD2H", 500.0))
    planes = [
        SimpleNamespace(name="/device:GPU:0", lines=[busy, line("XLA Ops", ("expert_fill", 6000.0)), line("Stream #2", ("MemcpyH2D", 100.0))]),
        SimpleNamespace(name="/host:CPU", lines=[line("tf_XLA", ("dot", 1.0))]),
    ]
    events = device_bench.device_events(planes, "gpu")
    assert device_bench.device_to_host(events) == [("MemcpyD2H", 0.5)]
    assert device_bench.largest(events, 2) == {"expert_fill": 6.0, "MemcpyD2H": 0.5}
    assert device_bench.device_events(planes, "cpu") == [("dot", 0.001)]


def test_a_failing_measurement_is_recorded(tmp_path):
    def measure():
        raise RuntimeError("CUDA_ERROR_ILLEGAL_ADDRESS in /home/someone/jax/fill.cc")

    assert Part(SIZES, tmp_path).attempt("fill", "fill-fixed", {"method": "fixed"}, measure) is None
    (made,) = record.load_records(tmp_path)
    assert made["settings"]["failed"] == "RuntimeError: CUDA_ERROR_ILLEGAL_ADDRESS in ..."


def written(out: Path, stem: str, name: str, settings: dict, timings: dict, counters: dict, bound: dict) -> None:
    record.write_record(out / f"tiny-{stem}.json", record.make_record(name, "", settings, {}, timings, 0.0, {}, counters, bound))


def test_the_driver_goes_on_after_a_failure(tmp_path, capsys):
    """The link part ends early, one fill crashes, one never ends; decoding takes the fastest fill that was right, and the link's best rate."""
    written(tmp_path, "fill-while", "fill", {"method": "while", "old": True}, {}, {}, device_bench.NOT_MEASURED)
    seen = []
    speeds = {"fixed": (3.0, 1), "mosaic_tma": (1.0, 0), "mosaic_loads": (2.0, 1), "host_driven": (0.5, 1)}

    def run(job, method, link_gbps, seconds):
        seen.append((job.part, method, link_gbps))
        if job.part == "link":
            written(tmp_path, "link-device_put", "link", {}, {}, {}, record.make_bound("link", 50.0, 40.0, "GB/s"))
            return Ended(1.0, "the process ended with -6: core dumped")
        if job.part == "fills" and method in speeds:
            speed, right = speeds[method]
            timings = {"layers_four": record.timing([speed])}
            written(tmp_path, f"fill-{method}", "fill", {"method": method}, timings, {"right": right}, record.make_bound("link", 50, 1, "GB/s"))
            return Ended(1.0)
        return Ended(seconds, f"it had not ended after {seconds:.0f} s")

    assert not device_driver.drive(["link", "fills", "decode"], tmp_path, SIZES, 600.0, run)
    assert seen[0] == ("link", "while", None), "nothing is known yet"
    assert seen[-1] == ("decode", "mosaic_loads", 50.0)
    assert len(seen) == 2 + len(device_bench.FILL_METHODS)
    by_name = {path.stem: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert by_name["tiny-link-mosaic_tma"]["settings"]["failed"] == "the process ended with -6: core dumped"
    assert by_name["tiny-fill-while"]["settings"]["failed"] == "it had not ended after 50 s", "not the record of an earlier run"
    assert by_name["tiny-stream_decode-25"]["settings"]["failed"].startswith("it had not ended")
    assert "failed" in capsys.readouterr().out


def test_a_fill_that_gave_wrong_bits_in_a_model_is_not_decoded_with():
    def made(name, method, counters, seconds=1.0):
        return {"name": name, "settings": {"method": method}, "counters": counters, "timings": {"layers_four": {"median": seconds}}}

    seconds = {"mosaic_loads": 1.0, "fixed": 2.0, "host_driven": 0.1}
    fills = [made("fill", method, {"right": 1}, s) for method, s in seconds.items()]
    assert device_driver.best_fill(fills) == "mosaic_loads"
    for counters in ({}, {"steps_that_differ": 1}):
        assert device_driver.best_fill([*fills, made("stream_bits", "mosaic_loads", counters)]) == "fixed"
    assert device_driver.best_fill([*fills, made("stream_bits", "mosaic_loads", {"steps_that_differ": 0})]) == "mosaic_loads"
    assert device_driver.best_fill([]) is None


def test_the_last_error_of_a_process():
    assert device_driver.reason_of("Traceback\n  File x\njax.errors.JaxRuntimeError: no memory\n----\nFor simplicity, frames were left out") == (
        "jax.errors.JaxRuntimeError: no memory"
    )
    assert device_driver.reason_of("Segmentation fault\n") == "Segmentation fault"
    assert device_driver.reason_of("") == "it said nothing"


def test_what_time_ran_out_for_is_recorded(tmp_path):
    assert not device_driver.drive(["bits"], tmp_path, SIZES, 10.0, lambda *job: pytest.fail("it was started"))
    made = record.load_records(tmp_path)
    assert {r["settings"]["failed"] for r in made} == {"no time was left to start it"} and len(made) == len(SIZES.bits)


def test_the_command_runs_its_parts_in_processes_of_their_own(tmp_path):
    run = [sys.executable, SCRIPT, "--tiny", "--out", tmp_path, "--only", "link"]
    done = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert {r["settings"]["method"] for r in record.load_records(tmp_path)} == set(device_bench.LINK_METHODS)


def test_full_sizes_are_refused_without_a_gpu(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("bench_streaming_device", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--part", "link", "--out", str(tmp_path)])
    with pytest.raises(SystemExit, match="needs a GPU"):
        script.main()
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--only", "link,speed"])
    with pytest.raises(SystemExit):
        script.main()


def test_all_of_it_fits_into_the_time_and_the_trace():
    assert sum(job.seconds for job in device_driver.JOBS if job.part in ("link", "decode")) < 300
    ids_SLA, prompt = device_traced.trace_ids(traces.load(TRACE), FULL.layers, FULL.decode_steps)
    assert ids_SLA.shape == (28 + 128, 12, 6) and prompt == 28 and FULL.decode_steps % steps.CHUNK == 0
    with pytest.raises(ValueError, match="156 tokens"):
        device_traced.trace_ids(traces.load(TRACE), FULL.layers, 200)


@pytest.mark.compile_only
def test_the_measured_step_lowers_for_an_h100_with_its_store_in_host_memory():
    trace = traces.load(TRACE)
    spec = device_traced.spec_of(FULL.model, FULL.layers, trace.ids.shape[2])
    ids_SLA, _ = device_traced.trace_ids(trace, FULL.layers, FULL.decode_steps)
    store = jax.ShapeDtypeStruct((FULL.layers * 128, *host_store.record_shape(spec)), leaf_dtype("bfloat16"))
    bank = device_traced.TracedBank(device_traced.make_bank(spec, store, device_traced.slots_of(spec, 25), "mosaic_tma", Kernels("gpu")))
    params = jax.eval_shape(lambda: device_traced.make_params(spec))
    state = jax.eval_shape(lambda: steps.EngineState(init_layers(spec, 1, device_traced.POSITIONS, 1), bank.start(jnp.asarray(ids_SLA))))
    kernels, row = Kernels("gpu"), np.zeros(1, np.int32)
    program = compile_with_host(
        "h100", steps.decode_step(spec, kernels, greedy=True).__wrapped__, params, bank, state, row, row, row, row, device_traced.NO_EOS,
        sampling_params(1), host={1}, donate=(2,), options=kernels.compiler_options(),
    )  # fmt: skip
    assert "S(5)" in program.text.splitlines()[0]
    assert program.host_argument_size == 12 * 128 * 9 * 2**20 and program.host_temp_size == 0
    pools = sum(int(np.prod(p.shape)) * p.dtype.itemsize for p in state.bank[0].pools)
    assert program.alias_size >= pools, "the pools are updated in place"
    assert program.temp_size < pools / 10
    assert "expert_fill" in program.text or "mosaic_gpu" in program.text
    loops = [line for line in program.text.splitlines() if " while(" in line]
    assert loops and all("known_trip_count" in line for line in loops)
    assert not re.search(r" (conditional|send|recv|infeed|outfeed)\(", program.text)


@pytest.mark.compile_only
def test_only_a_loop_of_unknown_length_asks_the_host():
    width, hidden, asked = FULL.fills[FULL.layered]
    i32, layers = jnp.int32, FULL.layers
    pools = tuple(jax.ShapeDtypeStruct((asked, *entry), jnp.uint16) for entry in ((width, 2, hidden), (hidden, width)))
    store = jax.ShapeDtypeStruct((2 * asked, 3 * width * hidden // 256, 256), jnp.uint16)
    x, n = jax.ShapeDtypeStruct((1, width), jnp.bfloat16), jax.ShapeDtypeStruct((), i32)
    w_LDD, ids_LM = jax.ShapeDtypeStruct((layers, width, width), jnp.bfloat16), jax.ShapeDtypeStruct((layers, asked), i32)
    rest = (w_LDD, ids_LM, jax.ShapeDtypeStruct((asked,), i32))
    found = {}
    for method in ("while", "fixed", "mosaic_tma", "mosaic_loads"):
        step = device_fills.layered_step(method, Kernels("gpu"))
        program = compile_with_host("h100", step, pools, x, n, *rest, store, host={6}, donate=(0,))
        assert program.host_argument_size == 16 * 9 * 2**20
        found[method] = device_bench.host_questions(SimpleNamespace(as_text=lambda p=program: p.text))["loops_of_unknown_length"]
    assert found == {"while": 1, "fixed": 0, "mosaic_tma": 0, "mosaic_loads": 0}
