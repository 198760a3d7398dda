"""Benchmark records: what was measured, of what, on what, beside the bound it is held against; and tables of them.

A record is one JSON object in one file. Nothing here puts a host name, a user name or a path into it; settings are the
caller's. This file also measures the two ceilings that bounds are made of, memory bandwidth and matmul rate, by methods
that it states.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

import jaxmoe
from checkpoints.manifest import write_text

FORMAT = 1
BOUND_KINDS = ("bandwidth", "compute", "link", "overlapped", "serial", "capacity")
# Below this many samples a 10th percentile is a guess, and the extremes are given in its place.
PERCENTILE_SAMPLES = 10
GIB = 2**30
MEMORY_BANDWIDTH_METHOD = (
    "best of repeated jitted float32 sum reductions over one buffer "
    "(1 GiB on CPU, 2 GiB or half of the free memory on accelerators), in two shapes; bytes read / wall time"
)
MATMUL_RATE_METHOD = (
    "best of repeated jitted products of square matrices of normal values (2048 on CPU, 8192 on accelerators), "
    "jax's default precision for the dtype; 2 n^3 / wall time"
)


@dataclasses.dataclass(frozen=True)
class Record:
    """One benchmark result.

    Attributes:
        name: which benchmark, such as "decode".
        spec_hash: hash of the model spec that was run.
        settings: what was chosen: batch, budget, policy, ...
        seeds: seeds of weights, prompts, sampling.
        timings: name -> `timing(...)`.
        compile_seconds: spent in compiling.
        bytes: name -> bytes, from `memory_analysis()`, leaves or counters.
        counters: hits, misses, tokens, ...
        bound: `make_bound(...)`.
        versions: of python, jax, jaxlib, flax, numpy, jaxmoe.
        device: platform, kind, count, cpu {model, cores}.
        timestamp: UTC, ISO 8601, to the second.
        format: version of this layout.
    """

    name: str
    spec_hash: str
    settings: Mapping[str, Any]
    seeds: Mapping[str, int]
    timings: Mapping[str, Mapping[str, Any]]
    compile_seconds: float
    bytes: Mapping[str, int]
    counters: Mapping[str, float]
    bound: Mapping[str, Any]
    versions: Mapping[str, str]
    device: Mapping[str, Any]
    timestamp: str
    format: int = FORMAT


def make_record(
    name: str,
    spec_hash: str,
    settings: Mapping[str, Any],
    seeds: Mapping[str, int],
    timings: Mapping[str, Mapping[str, Any]],
    compile_seconds: float,
    bytes: Mapping[str, int],
    counters: Mapping[str, float],
    bound: Mapping[str, Any],
) -> dict[str, Any]:
    """Put a result together with the versions, the device and the time.

    Args:
        See `Record`. Numbers may be numpy's or jax's scalars.

    Returns:
        A `Record` as a dict of plain JSON values.

    Raises:
        ValueError: a timing or the bound lacks a field, or a value is not JSON (NaN and infinity are not); it is named.
    """
    for timing_name, found in timings.items():
        _require(found, ("median", "spread", "n"), f"timings.{timing_name}")
    _require(bound, ("kind", "ceiling", "achieved", "unit", "percent"), "bound")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = Record(
        name, spec_hash, settings, seeds, timings, compile_seconds, bytes, counters, bound, versions(), device(), now
    )
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return _plain(fields, "")


def timing(samples: Sequence[float]) -> dict[str, Any]:
    """Summarise repeated timings of one thing.

    Args:
        samples: seconds (or any one unit), at least one; warm-up already left out.

    Returns:
        {"median", "spread", "n"}; spread is {"p10", "p90"} from 10 samples on, else {"min", "max"}.

    Raises:
        ValueError: there are no samples, or one is negative or not finite.
    """
    values = [float(sample) for sample in samples]
    if not values:
        raise ValueError("timing needs at least one sample")
    wrong = [value for value in values if not (math.isfinite(value) and value >= 0)]
    if wrong:
        raise ValueError(f"a timing of {wrong[0]} is not a duration")
    if len(values) >= PERCENTILE_SAMPLES:
        spread = {"p10": float(np.percentile(values, 10)), "p90": float(np.percentile(values, 90))}
    else:
        spread = {"min": min(values), "max": max(values)}
    return {"median": statistics.median(values), "spread": spread, "n": len(values)}


def make_bound(kind: str, ceiling: float, achieved: float, unit: str) -> dict[str, Any]:
    """Set what was achieved beside the measured ceiling.

    Args:
        kind: what limits, one of `BOUND_KINDS`. "overlapped" is the largest of link, memory and compute; "serial" is
            the time of their sum.
        ceiling: the most this machine gave in a measurement, such as `measure_memory_bandwidth()`.
        achieved: what the benchmark reached, in the same unit; more is better.
        unit: such as "GB/s", "TFLOP/s" or "tok/s".

    Returns:
        {"kind", "ceiling", "achieved", "unit", "percent"}; percent = 100 achieved / ceiling, and can exceed 100, since
        the ceiling is a measurement, not a data sheet.

    Raises:
        ValueError: the kind is unknown, the ceiling is not positive, or a number is not finite.
    """
    if kind not in BOUND_KINDS:
        raise ValueError(f"bound kind {kind!r} is not one of {', '.join(BOUND_KINDS)}")
    if not (math.isfinite(ceiling) and ceiling > 0 and math.isfinite(achieved) and achieved >= 0):
        raise ValueError(
            f"a bound needs a positive ceiling and a finite achievement, got {ceiling} and {achieved} {unit}"
        )
    percent = 100 * float(achieved) / float(ceiling)
    return {"kind": kind, "ceiling": float(ceiling), "achieved": float(achieved), "unit": unit, "percent": percent}


def versions() -> dict[str, str]:
    """Versions of python and of the packages that decide what runs."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")}
    return {"python": platform.python_version()} | packages | {"jaxmoe": jaxmoe.__version__}


def device() -> dict[str, Any]:
    """What runs here, without saying which machine: {"platform", "kind", "count", "cpu": {"model", "cores"}}."""
    first = jax.devices()[0]
    # The cores that this process may use, which in a container are fewer than the machine's.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    cpu = {"model": _cpu_model(), "cores": cores}
    return {"platform": first.platform, "kind": first.device_kind, "count": jax.device_count(), "cpu": cpu}


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _require(found: Mapping[str, Any], fields: Sequence[str], where: str) -> None:
    missing = [field for field in fields if field not in found]
    if missing:
        raise ValueError(f"{where} of a record lacks {', '.join(missing)}")


def _plain(value: Any, where: str) -> Any:
    """The value in plain JSON types; `where` is its dotted path, for the error."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}".lstrip(".")) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        value = value.item()
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    raise ValueError(f"{where} of a record is {value!r}, which JSON cannot hold")


# --- Files


def write_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record to a file, whole or not at all; a file that is there is replaced.

    Args:
        path: ends in .json, for `load_records`; its folder is made if it is missing.
        record: of `make_record`.

    Raises:
        ValueError: the path does not end in .json, or a value is not JSON.
    """
    path = Path(path)
    if path.suffix != ".json":
        raise ValueError(f"a record goes to a .json file, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(_plain(record, ""), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def check_path(path: str | Path, what: str = "a record", suffix: str = ".json") -> None:
    """Find out before a long run whether a file, such as one of `write_record`, can be written there; leaves nothing behind.

    Args:
        path: the file.
        what: what it is to hold, for messages.
        suffix: what its name has to end in.

    Raises:
        ValueError: the path has another suffix, is a folder, or lies in a folder that does not exist (mistyped, rather than to be made).
        OSError: no file can be made in its folder.
    """
    path = Path(path)
    if path.suffix != suffix:
        raise ValueError(f"{what} goes to a {suffix} file, got {path}")
    if path.is_dir():
        raise ValueError(f"{path}: is a folder, not a file")
    if not path.parent.is_dir():
        raise ValueError(f"{path}: there is no folder {path.parent}")
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise OSError(error.errno, f"no file can be made here: {error.strerror}", str(path.parent)) from error


def load_records(folder: str | Path) -> list[dict[str, Any]]:
    """Read all records of a folder (its *.json files, not those of folders in it), in the order of their file names.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: a file is damaged, or is of another format; it is named.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    return [_read_record(path) for path in sorted(folder.glob("*.json"))]


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} is not a record of format {FORMAT}: its format is {found!r}")
    _require(record, [field.name for field in dataclasses.fields(Record)], str(path))
    return record


# --- Ceilings


def measure_memory_bandwidth(seconds: float = 1.0, bytes: int | None = None) -> float:
    """Measure how fast the default device reads its memory (`MEMORY_BANDWIDTH_METHOD`).

    The best repetition counts, as in STREAM: others are slower only by what disturbed them. A program that does nothing
    but read may still beat a sum that XLA compiled, so percentages of this ceiling can come out a little above 100.

    Args:
        seconds: for how long to repeat each of the two shapes.
        bytes: size of the buffer, in steps of 64 KiB. It must be well larger than the caches; the default is (see the method).

    Returns:
        GB/s (10^9 bytes per second).

    Raises:
        ValueError: the accelerator has too little free memory for a buffer larger than its caches.

    Source: McCalpin, STREAM benchmark, for the method of repeating and taking the best.
    """
    count = max(1, (_buffer_bytes() if bytes is None else bytes) // (4 * 2**14)) * 2**14
    buffer = jnp.ones((count,), jnp.float32)
    # XLA vectorises and spreads over cores one shape or the other, depending on backend and version.
    shapes: tuple[tuple[int, ...], ...] = ((count,), (64, -1, 256))
    best = min(_best_seconds(functools.partial(_sum_in_shape, shape=shape), buffer, seconds) for shape in shapes)
    return 4 * count / best / 1e9


def _sum_in_shape(x: Array, shape: tuple[int, ...]) -> Array:
    return jnp.sum(x.reshape(shape), axis=len(shape) // 2)


def _buffer_bytes() -> int:
    first = jax.devices()[0]
    if first.platform == "cpu":
        return GIB
    memory = first.memory_stats() or {}
    free = memory.get("bytes_limit", 4 * GIB) - memory.get("bytes_in_use", 0)
    size = min(2 * GIB, free // 2)
    if size < GIB // 2:
        raise ValueError(f"{free} bytes are free on the device; measuring its bandwidth needs {GIB}")
    return size


def measure_matmul_rate(dtype: Any = jnp.bfloat16, seconds: float = 1.0, size: int | None = None) -> float:
    """Measure how fast the default device multiplies matrices (`MATMUL_RATE_METHOD`).

    Args:
        dtype: of both operands; floats accumulate in float32 or wider, integers in int32. float32 runs at jax's
            default precision, which is less than float32 on most accelerators.
        seconds: for how long to repeat.
        size: n of the n x n matrices.

    Returns:
        TFLOP/s (10^12 multiplications and additions per second).
    """
    n = size or (2048 if jax.devices()[0].platform == "cpu" else 8192)
    dtype = jnp.dtype(dtype)
    accumulator = jnp.promote_types(dtype, jnp.float32) if jnp.issubdtype(dtype, jnp.floating) else jnp.dtype(jnp.int32)
    # Random values, since accelerators draw less power, and so run faster, on constant ones.
    values = jax.random.normal(jax.random.key(0), (n, n), jnp.float32)
    matrix = (values if jnp.issubdtype(dtype, jnp.floating) else values * 32).astype(dtype)
    best = _best_seconds(lambda x: jnp.dot(x, x, preferred_element_type=accumulator), matrix, seconds)
    return 2 * n**3 / best / 1e12


def _best_seconds(f: Callable[[Array], Array], x: Array, seconds: float) -> float:
    """Shortest wall time of one call of jitted `f(x)`, over batches of calls that keep the device busy between
    launches."""
    run = jax.jit(f)
    jax.block_until_ready(run(x))  # compiles

    def batch(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            result = run(x)
        jax.block_until_ready(result)
        return (time.perf_counter() - start) / calls

    once = batch(1)
    calls = max(1, math.ceil(seconds / 10 / max(once, 1e-6)))
    end = time.perf_counter() + seconds
    times = [once, *(batch(calls) for _ in range(2))]
    while time.perf_counter() < end:
        times.append(batch(calls))
    return min(times)


# --- Tables


def table(records: Sequence[Mapping[str, Any]], columns: Sequence[tuple[str, ...]]) -> str:
    """Write records as a Markdown table.

    Args:
        records: one row each, in this order.
        columns: (header, dotted path into the record) or (header, path, format), such as
            ("tok/s", "bound.achieved", ".1f"). Columns with a format are right-aligned.

    Returns:
        Lines of Markdown, without a newline at the end.

    Raises:
        ValueError: a record lacks a path, or a value does not take its format; names the record and the path.
    """
    lines = ["| " + " | ".join(_cell(header) for header, *_ in columns) + " |"]
    lines.append("|" + "|".join(" ---: " if len(column) > 2 else " --- " for column in columns) + "|")
    for record in records:
        lines.append("| " + " | ".join(_cell(_look_up(record, *column[1:])) for column in columns) + " |")
    return "\n".join(lines)


def _look_up(record: Mapping[str, Any], path: str, format_spec: str = "") -> str:
    value: Any = record
    for part in path.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise ValueError(
                f"record {record.get('name')!r} of {record.get('timestamp')} has no {path}: {part} is missing"
            )
        value = value[part]
    try:
        return format(value, format_spec)
    except (TypeError, ValueError) as error:
        raise ValueError(f"record {record.get('name')!r}: {path} is {value!r}, not {format_spec!r}: {error}") from error


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def update_readme(path: str | Path, name: str, markdown: str) -> bool:
    """Replace what stands between `<!-- records:NAME -->` and the next `<!-- end -->` in a Markdown file.

    Args:
        path: the file.
        name: NAME.
        markdown: what is to stand there, such as a `table`.

    Returns:
        Whether the file changed.

    Raises:
        ValueError: the markers are not there exactly once, in order, or the text itself holds the end marker.
    """
    path = Path(path)
    begin, end = f"<!-- records:{name} -->", "<!-- end -->"
    text = path.read_text(encoding="utf-8")
    if text.count(begin) != 1:
        raise ValueError(f"{path} has the marker {begin} {text.count(begin)} times; expected once")
    if end in markdown:
        raise ValueError(f"the text for {begin} contains {end}")
    before, rest = text.split(begin)
    old, found, after = rest.partition(end)
    if not found or "<!-- records:" in old:
        raise ValueError(f"{path} has no {end} after {begin}")
    new = f"{before}{begin}\n{markdown.strip()}\n{end}{after}"
    if new != text:
        write_text(path, new)
    return new != text
