"""Expert streaming measured on a GPU: five parts, each in a process of its own with a time limit.

    link     what crosses the link, by `device_put`, by XLA's copy in a program and by a kernel's own reads, at 1 to 350 MiB
    fills    the ways to fill slots (`pallas_kernels.expert_fill`) against each other, alone and in a step of several layers
    bits     logits with streamed experts against those with resident ones
    decode   a model of Qwen3-30B-A3B's layers, routed by a trace, at several shares of resident experts, beside its bounds
    profile  what a decode step does on the device, and whether it copies anything to the host

This file holds what the parts share; `device_driver` starts them, `device_fills` and `device_steps` are the parts.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmoe.formats import aligned_empty, leaf_dtype, store_numpy
from jaxmoe.report import record
from pallas_kernels.dispatch import Kernels

MIB = 2**20
COLUMNS = 256
NOT_MEASURED = {"kind": "link", "ceiling": None, "achieved": None, "unit": "GB/s", "percent": None}
GRAPHS, HOST = "while_graphs", "host_driven"
FILL_METHODS = ("while", GRAPHS, "fixed", HOST, "mosaic_tma", "mosaic_loads")
LINK_METHODS = ("device_put", "fixed", "mosaic_tma", "mosaic_loads")
"""From the safest to the one that is most likely to end the process."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        link_mib: sizes of what crosses the link, MiB.
        fills: by a name, an expert's D and F and how many are asked for at once.
        layered: which of `fills` is used in a step of `layers` layers.
        layers, short_layers: of the decoded model, and of the one in `bits` and `profile`.
        model: fields of its config.json, in place of Qwen3-30B-A3B's.
        bits: (method, sequences in a step) of part `bits`. Eight sequences ask for more experts than there are slots, so that a step goes by waves.
        shares: percent of the experts that are resident in part `decode`.
        bits_steps, decode_steps: how many steps run; of decoding, without the prompt.
        rounds: how often decoding is repeated from the start.
        repeats: samples of everything else.
    """

    tiny: bool
    link_mib: tuple[float, ...]
    fills: Mapping[str, tuple[int, int, int]]
    layered: str
    layers: int
    short_layers: int
    model: Mapping[str, int]
    bits: tuple[tuple[str, int], ...]
    shares: tuple[int, ...]
    bits_steps: int
    decode_steps: int
    rounds: int
    repeats: int


# The vocabulary is a quarter of the model's as the layers are, so that the head has the share of a step that it has in the whole model.
FULL = Sizes(
    False, (1, 4, 9, 50, 350), {"1MB": (512, 352, 8), "9MB": (2048, 768, 8), "352MB": (4096, 14336, 2)}, "9MB", 12, 4, {"vocab_size": 37984},
    bits=(("while", 1), ("fixed", 1), ("fixed", 8), ("mosaic_tma", 1), ("mosaic_tma", 8), ("mosaic_loads", 1)), shares=(25, 15, 50),
    bits_steps=100, decode_steps=128, rounds=3, repeats=15,
)  # fmt: skip
SMALL_MODEL = {
    "vocab_size": 128, "hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
TINY = Sizes(
    True, (1 / 16, 1 / 4), {"small": (64, 32, 4)}, "small", 2, 2, SMALL_MODEL, bits=(("fixed", 8), ("mosaic_tma", 8)), shares=(25,),
    bits_steps=6, decode_steps=32, rounds=1, repeats=3,
)  # fmt: skip
"""For a check of the code on any device; its numbers mean nothing."""


@dataclasses.dataclass
class Found:
    """What a measurement gives to its record; see `record.Record`."""

    timings: dict[str, Any]
    counters: dict[str, Any]
    bound: Mapping[str, Any]
    compile_seconds: float = 0.0
    bytes: dict[str, int] = dataclasses.field(default_factory=dict)
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    seeds: dict[str, int] = dataclasses.field(default_factory=dict)
    spec_hash: str = ""


@dataclasses.dataclass
class Part:
    """What a part works with.

    Attributes:
        sizes: `FULL` or `TINY`.
        out: folder of the records.
        method: how slots are filled.
        link_gbps: the link's best rate in this run, if it is known already.
        trace: a routing trace, for `decode` and `profile`.
        pallas: multiply with our kernels; else with plain XLA.
    """

    sizes: Sizes
    out: Path
    method: str | None = None
    link_gbps: float | None = None
    trace: Path | None = None
    pallas: bool = True

    @property
    def kernels(self) -> Kernels:
        """What a step multiplies with."""
        return Kernels.default(pallas=self.pallas)

    def attempt(self, name: str, stem: str, settings: Mapping[str, Any], measure: Callable[[], Found]) -> Found | None:
        """`attempt` into the part's folder."""
        given = dict(settings) | ({} if self.pallas else {"kernels": "xla"})
        return attempt(self.out, self.sizes.tiny, name, stem, given, measure, why_not(settings.get("method")))


def attempt(
    out: Path, tiny: bool, name: str, stem: str, settings: Mapping[str, Any], measure: Callable[[], Found], reason: str | None = None
) -> Found | None:
    """Measures and writes a record; one that says why, where there is a `reason` why it can't run here, or the measurement fails."""
    given = dict(settings) | {"tiny": tiny, "xla_flags": os.environ.get("XLA_FLAGS", "")}
    found = None
    if reason is not None:
        made = empty_record(name, given | {"skipped": reason})
    else:
        try:
            found = measure()
            made = record.make_record(
                name, found.spec_hash, given | found.settings, found.seeds, found.timings, found.compile_seconds, found.bytes, found.counters,
                found.bound,
            )  # fmt: skip
        except Exception as error:
            found, made = None, empty_record(name, given | {"failed": brief(f"{type(error).__name__}: {error}")})
    record.write_record(path_of(out, tiny, stem), made)
    print(line_of(stem, made), flush=True)
    return found


def path_of(out: Path, tiny: bool, stem: str) -> Path:
    """The file of a record; one of tiny sizes never takes the place of a measurement."""
    return out / f"{'tiny-' if tiny else ''}{stem}.json"


def why_not(method: str | None) -> str | None:
    """Why a method can't run on this device; None where it can."""
    platform = jax.devices()[0].platform
    if platform != "gpu" and method in (GRAPHS, "mosaic_tma", "mosaic_loads"):
        return f"{method} needs an NVIDIA GPU; this is a {platform}"
    return None


def empty_record(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a measurement that gave nothing; `settings` say why, by 'skipped' or 'failed'."""
    return record.make_record(name, "", settings, {}, {}, 0.0, {}, {}, NOT_MEASURED)


def brief(text: str) -> str:
    """A message as a record may hold it: one line, without paths."""
    return re.sub(r"(/[\w.+-]+){2,}", "...", " ".join(text.split()))[:400]


def line_of(stem: str, made: Mapping[str, Any]) -> str:
    """A record in one line, for people."""
    for key in ("failed", "skipped"):
        if key in made["settings"]:
            return f"{stem}: {key}: {made['settings'][key]}"
    b = made["bound"]
    return f"{stem}: {b['achieved']:.4g} of {b['ceiling']:.4g} {b['unit']} ({b['percent']:.0f} % of the {b['kind']} bound)"


# --- Timing


def seconds_of(call: Callable[[], Any], times: int, in_a_row: int = 1) -> list[float]:
    """Wall seconds of a call, `times` samples, each the mean of `in_a_row` calls of which only the last is waited for."""
    out = []
    jax.block_until_ready(call())
    for _ in range(times):
        began = time.perf_counter()
        for _ in range(in_a_row):
            last = call()
        jax.block_until_ready(last)
        out.append((time.perf_counter() - began) / in_a_row)
    return out


def compiled(jitted: Any, *args: Any) -> tuple[Any, float, dict[str, int]]:
    """The program for these arguments, the seconds it took to compile, and the bytes it needs."""
    began = time.perf_counter()
    program = jitted.lower(*args).compile()
    seconds = time.perf_counter() - began
    stats = program.memory_analysis()
    kinds = ("argument", "output", "temp", "alias", "host_argument", "host_temp")
    return program, seconds, {kind: int(getattr(stats, f"{kind}_size_in_bytes", 0)) for kind in kinds}


def host_questions(program: Any) -> dict[str, int]:
    """What in a program has a GPU ask the host how to go on: loops of unknown length, and branches."""
    text = program.as_text()
    loops = [line for line in text.splitlines() if " while(" in line]
    return {"loops_of_unknown_length": sum("known_trip_count" not in line for line in loops), "branches": text.count(" conditional(")}


# --- Profiles

Event = tuple[str, float]
"""A kernel's or a copy's name, and microseconds."""


def profile(call: Callable[[], Any]) -> list[Event]:
    """What ran on the device during a call; on the CPU, what ran in XLA's threads.

    Raises:
        RuntimeError: the profiler saw nothing of the device.
    """
    jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(call())
        (path,) = Path(folder).rglob("*.xplane.pb")
        events = device_events(jax.profiler.ProfileData.from_file(str(path)).planes, jax.devices()[0].platform)
    if not events:
        raise RuntimeError("the profile holds nothing of the device; on NVIDIA GPUs the profiler needs CUPTI")
    return events


def device_events(planes: Any, platform: str) -> list[Event]:
    """Events of a profile's planes that are the device's work: on a GPU its streams, beside which there are summaries of the same events."""
    plane_start, line_start = ("/host:CPU", "tf_XLA") if platform == "cpu" else ("/device:", "Stream")
    lines = [line for plane in planes if plane.name.startswith(plane_start) for line in plane.lines if line.name.startswith(line_start)]
    return [(event.name, event.duration_ns / 1e3) for line in lines for event in line.events if not event.name.startswith(("end: ", "Threadpool"))]


def device_to_host(events: Sequence[Event]) -> list[Event]:
    """The copies from the device to the host."""
    return [event for event in events if re.search(r"memcpyd2h|memcpydtoh|devicetohost", re.sub(r"[\s_-]", "", event[0].lower()))]


def largest(events: Sequence[Event], most: int = 15) -> dict[str, float]:
    """Microseconds by name, of the names that took most."""
    total: dict[str, float] = {}
    for name, us in events:
        total[name[:80]] = total.get(name[:80], 0.0) + us
    return dict(sorted(total.items(), key=lambda item: -item[1])[:most])


# --- Arrays


def random_records(count: int, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Records [count, rows, columns] of normal bfloat16 values with a deviation of 0.02, held as uint16.

    One record is drawn, and the others are turns of it, no two alike: 14 GB of random numbers would take a minute.
    """
    size = rows * columns
    drawn = np.random.default_rng(seed).standard_normal(size, dtype=np.float32) * 0.02
    twice = np.tile(store_numpy(drawn, "bfloat16"), 2)
    out = aligned_empty((count, rows, columns), leaf_dtype("bfloat16"))
    stride = size // max(count, 1) | 1
    for i in range(count):
        start = i * stride % size
        out[i] = twice[start : start + size].reshape(rows, columns)
    return out


def pinned(x: np.ndarray) -> jax.Array:
    """An array in the default device's pinned host memory."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")
    return jax.block_until_ready(jax.device_put(x, sharding))


def to_device(x: Any) -> jax.Array:
    """An array in the default device's own memory. By its sharding: by the device alone, `device_put` refuses an array in its pinned host memory."""
    return jax.device_put(x, jax.sharding.SingleDeviceSharding(jax.devices()[0]))


def link_ceiling(part: Part) -> float:
    """GB/s of the link: the run's best, and what `device_put` gives in this process for 64 MiB."""
    nbytes = MIB if part.sizes.tiny else 64 * MIB
    x = pinned(np.ones(nbytes, np.uint8))
    own = nbytes / min(seconds_of(lambda: to_device(x), 5)) / 1e9
    return max(own, part.link_gbps or 0.0)
