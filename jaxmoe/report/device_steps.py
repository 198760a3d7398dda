"""Parts `bits`, `decode` and `profile` of the measurement of expert streaming (`jaxmoe.report.device_bench`): steps of a model."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmoe.cache.layers import init_layers
from jaxmoe.engine import steps
from jaxmoe.engine.model import Model
from jaxmoe.experts import SlotBank, host_store
from jaxmoe.offload import trace as traces
from jaxmoe.report import record
from jaxmoe.report.device_bench import Found, Part, compiled, device_to_host, host_questions, largest, link_ceiling, profile
from jaxmoe.report.device_traced import (
    POSITIONS,
    QWEN3_30B_A3B,
    Decoder,
    committed,
    make_bank,
    make_params,
    make_records,
    resident_bank,
    run_all,
    slots_of,
    spec_of,
    trace_ids,
)
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels

PROFILE_SHARE = 25
"""Percent of the experts that are resident in parts `bits` and `profile`."""


# --- Decode


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Seconds of one step. `step` as measured; `link` for the bytes that it misses; `memory` for the weights that it reads; `hits` the same program's
    step when every expert is there."""

    step: float
    link: float
    memory: float
    hits: float

    def percents(self) -> dict[str, float]:
        """% of the overlapped and of the serial bound; beside the memory's time, and beside that of the measured step without misses."""
        return {
            "overlapped_percent": 100 * max(self.link, self.memory) / self.step,
            "serial_percent": 100 * (self.link + self.memory) / self.step,
            "overlapped_percent_of_all_hits": 100 * max(self.link, self.hits) / self.step,
            "serial_percent_of_all_hits": 100 * (self.link + self.hits) / self.step,
        }


def decode(part: Part) -> None:
    """Writes the records of part `decode`: first the step with every expert there, which all are compared with, then one record a share."""
    assert part.trace is not None
    sizes, trace = part.sizes, traces.load(part.trace)
    spec = spec_of(sizes.model, sizes.layers, trace.ids.shape[2])
    ids_SLA, prompt = trace_ids(trace, sizes.layers, sizes.decode_steps)
    began = time.perf_counter()
    store = host_store.pinned(make_records(spec))
    store_seconds, params = time.perf_counter() - began, make_params(spec)
    memory_gbps = record.measure_memory_bandwidth(*((0.05, 2**24) if sizes.tiny else (0.3,)))
    link_gbps = link_ceiling(part)
    full = Decoder(spec, params, make_bank(spec, store, spec.moe[0].experts, part.method, part.kernels), ids_SLA, part.kernels)
    run_all(full, 0, len(ids_SLA))
    hits = []
    for _ in range(sizes.rounds):
        full.rewind()
        run_all(full, 0, prompt)
        hits.append(sum(run_all(full, prompt, len(ids_SLA))) / (len(ids_SLA) - prompt))
    del full
    common = {
        "trace": trace.meta["model"], "trace_layers": f"0 to {sizes.layers - 1}", "active": spec.moe[0].active, "layers": sizes.layers,
        "vocab": spec.vocab, "policy": "lfu", "prompt_steps": prompt, "steps": len(ids_SLA) - prompt,
    }  # fmt: skip
    rates = {"link_gbps": link_gbps, "memory_gbps": memory_gbps, "store_seconds": store_seconds}

    def measure(share: int) -> Found:
        bank = make_bank(spec, store, slots_of(spec, share), part.method, part.kernels)
        model = Model(spec, params, bank, part.kernels)
        return measure_decode(Decoder(spec, params, bank, ids_SLA, part.kernels), model, prompt, len(ids_SLA), hits, rates, sizes.rounds)

    for share in sizes.shares:
        settings = common | {"method": part.method, "resident_percent": share, "slots": slots_of(spec, share)}
        part.attempt("stream_decode", f"stream_decode-{share}", settings, lambda s=share: measure(s))  # type: ignore[misc]


def measure_decode(
    decoder: Decoder, model: Model, prompt: int, stop: int, hits: Sequence[float], rates: dict[str, float], rounds: int
) -> Found:
    """One share of resident experts.

    Args:
        decoder, model: the program, and the model that it runs.
        prompt, stop: steps before `prompt` fill the slots; those up to `stop` are measured.
        hits: seconds a step where every expert is there, by round.
        rates: `link_gbps`, `memory_gbps`, and what else the record is to hold.
        rounds: how often the trace is run, each from empty slots.
    """
    rounds_of_calls = []
    for _ in range(rounds):  # each counts the same
        decoder.start()
        run_all(decoder, 0, prompt)
        before = decoder.counters()
        rounds_of_calls.append(run_all(decoder, prompt, stop))
        after = decoder.counters()
    count = stop - prompt
    asked, there, loads = (after[name] - before[name] for name in ("requests", "hits", "loads"))
    missed = (asked - there) * model.bank.record_bytes / count
    timings = {
        "step": record.timing([sum(calls) / count for calls in rounds_of_calls]), "step_all_hits": record.timing(hits),
        f"call_of_{steps.CHUNK}": record.timing([s for calls in rounds_of_calls for s in calls]),
    }  # fmt: skip
    found = Bounds(
        timings["step"]["median"], missed / rates["link_gbps"] / 1e9, model.bytes_per_token(1) / rates["memory_gbps"] / 1e9,
        timings["step_all_hits"]["median"],
    )  # fmt: skip
    counters = rates | found.percents() | {
        "hit_rate": there / asked, "requests": asked, "hits": there, "loads": loads, "missed_bytes_per_step": missed,
        "link_seconds": found.link, "memory_seconds": found.memory,
    }  # fmt: skip
    bytes_ = decoder.bytes | {"pools": model.bank.device_bytes, "store": model.bank.store.nbytes, "record": model.bank.record_bytes}
    bound = record.make_bound("serial", 1 / (found.link + found.memory), 1 / found.step, "tok/s")
    return Found(timings, counters, bound, decoder.compile_seconds, bytes_, seeds={"records": 0, "params": 0}, spec_hash=model.spec.hash())


# --- Bits


def bits(part: Part) -> None:
    """Writes the records of part `bits`: logits and keys of every step, streamed against resident."""
    sizes = part.sizes
    spec = spec_of(sizes.model, sizes.short_layers, QWEN3_30B_A3B["num_experts_per_tok"])
    records, params = make_records(spec), make_params(spec)
    store, resident = host_store.pinned(records), resident_bank(spec, records, part.kernels)
    del records
    link_gbps = link_ceiling(part)
    wanted = {rows: run_steps(spec, params, resident, rows, sizes.bits_steps, part.kernels) for rows in {rows: 0 for _, rows in sizes.bits}}
    for method, rows in sizes.bits:
        bank = make_bank(spec, store, slots_of(spec, PROFILE_SHARE), method, part.kernels)
        settings = {"method": method, "rows": rows, "layers": sizes.short_layers, "steps": sizes.bits_steps, "slots": bank.slots[0]}
        part.attempt(
            "stream_bits", f"stream_bits-{method}-b{rows}", settings,
            lambda b=bank, r=rows: measure_bits(spec, params, b, wanted[r], link_gbps, part.kernels),  # type: ignore[misc]
        )  # fmt: skip


@dataclasses.dataclass
class Ran:
    """What came of `run_steps`: `logits` [R, V] of every step, `layers` the keys and values, `bank` its moving part, seconds a step, of compiling."""

    logits: list[jax.Array]
    layers: Any
    bank: Any
    seconds: float
    compile_seconds: float
    bytes: dict[str, int]


def run_steps(spec: ModelSpec, params: dict, bank: Any, rows: int, count: int, kernels: Kernels) -> Ran:
    """Decodes random tokens, the same for every bank, one step a call."""
    tokens = np.random.default_rng(rows).integers(0, spec.vocab, (count, rows)).astype(np.int32)
    live, row = np.ones(rows, bool), np.arange(rows, dtype=np.int32)
    batches = [steps.decode_batch(row, tokens[i], np.full(rows, i, np.int32), live) for i in range(count)]
    state = committed(steps.EngineState(init_layers(spec, rows, POSITIONS, 1), bank.init_state()))
    program, compile_seconds, nbytes = compiled(steps.logits_step(spec, kernels), params, bank, state, batches[0])
    logits = []
    began = time.perf_counter()
    for batch in batches:
        out, state = program(params, bank, state, batch)
        logits.append(out)
    jax.block_until_ready(logits)
    return Ran(logits, state.layers, state.bank, (time.perf_counter() - began) / count, compile_seconds, nbytes)


def measure_bits(spec: ModelSpec, params: dict, bank: SlotBank, wanted: Ran, link_gbps: float, kernels: Kernels) -> Found:
    """One method. Counters: `steps_that_differ` in any bit of their logits, `cache_bits_equal`, and `finite`, without which equality says nothing."""
    count, rows = len(wanted.logits), wanted.logits[0].shape[0]
    ran = run_steps(spec, params, bank, rows, count, kernels)
    same = [same_bits(a, b) for a, b in zip(ran.logits, wanted.logits, strict=True)]
    counted = {name: int(n.sum()) for name, n in bank.counters(ran.bank).items()}
    counters = counted | {
        "steps_that_differ": same.count(False),
        "cache_bits_equal": int(all(jax.tree.leaves(jax.tree.map(same_bits, ran.layers, wanted.layers)))),
        "finite": int(all(bool(jnp.isfinite(x).all()) for x in wanted.logits)),
        "link_gbps": link_gbps,
    }
    moved = counted["loads"] * bank.record_bytes / count / ran.seconds / 1e9
    timings = {"step": record.timing([ran.seconds]), "step_resident": record.timing([wanted.seconds])}
    bound = record.make_bound("link", link_gbps, moved, "GB/s")
    return Found(timings, counters, bound, ran.compile_seconds, ran.bytes, seeds={"tokens": rows}, spec_hash=spec.hash())


def same_bits(a: jax.Array, b: jax.Array) -> bool:
    """Whether two arrays hold the same bits; NaN equals itself."""
    unsigned = {2: jnp.uint16, 4: jnp.uint32}[a.dtype.itemsize]
    return bool((a.view(unsigned) == b.view(unsigned)).all())


# --- Profile


def profiled(part: Part) -> None:
    """Writes the records of part `profile`: the method that was asked for, and beside it `while`, in which a GPU asks the host."""
    assert part.trace is not None and part.method is not None
    sizes, trace = part.sizes, traces.load(part.trace)
    spec = spec_of(sizes.model, sizes.short_layers, trace.ids.shape[2])
    ids_SLA, prompt = trace_ids(trace, sizes.short_layers, sizes.decode_steps)
    store, params = host_store.pinned(make_records(spec)), make_params(spec)
    link_gbps = link_ceiling(part)

    def measure(method: str) -> Found:
        bank = make_bank(spec, store, slots_of(spec, PROFILE_SHARE), method, part.kernels)
        return measure_profile(Decoder(spec, params, bank, ids_SLA, part.kernels), bank, spec, prompt, link_gbps)

    for method in dict.fromkeys(("while", part.method)):
        settings = {"method": method, "layers": sizes.short_layers, "slots": slots_of(spec, PROFILE_SHARE), "steps": steps.CHUNK}
        part.attempt("stream_profile", f"stream_profile-{method}", settings, lambda m=method: measure(m))  # type: ignore[misc]


def measure_profile(decoder: Decoder, bank: SlotBank, spec: ModelSpec, prompt: int, link_gbps: float) -> Found:
    """One call of `steps.CHUNK` decode steps. Counters are by step; `us` are microseconds, and `largest_us` those of the largest kernels."""
    run_all(decoder, 0, prompt)
    at = iter(range(prompt, POSITIONS, steps.CHUNK))
    events = profile(lambda: decoder.run(next(at), steps.CHUNK))  # reads nothing back: a copy to the host in it is the step's own
    first = next(at)
    before = decoder.counters()
    (seconds,) = run_all(decoder, first, first + steps.CHUNK)
    seconds /= steps.CHUNK
    copies = device_to_host(events)
    counters: dict[str, Any] = {
        "device_to_host_copies": len(copies) / steps.CHUNK,
        "device_to_host_us": sum(us for _, us in copies) / steps.CHUNK,
        "device_us": sum(us for _, us in events) / steps.CHUNK,
        "largest_us": {name: us / steps.CHUNK for name, us in largest(events).items()},
    } | host_questions(decoder.program)
    loads = decoder.counters()["loads"] - before["loads"]
    moved = loads * bank.record_bytes / steps.CHUNK / seconds / 1e9
    bound = record.make_bound("link", link_gbps, moved, "GB/s")
    timings = {"step": record.timing([seconds])}
    return Found(timings, counters, bound, decoder.compile_seconds, decoder.bytes, seeds={"records": 0}, spec_hash=spec.hash())
