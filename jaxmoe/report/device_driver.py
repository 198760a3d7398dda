"""The driver of the measurement of expert streaming (`jaxmoe.report.device_bench`): its processes and their records.

A bad address ends a CUDA context, and with it all that the process might still have measured. So the driver starts a process for each part (for each
method, where they are many), which writes a record as soon as it has one; for a record that did not come it writes one that says why.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmoe.report import record
from jaxmoe.report.device_bench import FILL_METHODS, GRAPHS, LINK_METHODS, Sizes, brief, empty_record, line_of, path_of
from pallas_kernels.expert_fill.api import METHODS

PINNED_AUTOTUNING = "--xla_gpu_autotune_level=0"
GRAPH_FLAGS = (
    "--xla_gpu_enable_command_buffer=FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONDITIONAL,WHILE "
    "--xla_gpu_graph_min_graph_size=1"
)
"""XLA then runs `while` and `conditional` as nodes of a CUDA graph. Both flags exist in jax 0.10.2 and in 0.11.2."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A process of the driver. Attributes: `part`; `method`, None for the one asked for or this run's best; `seconds` it may take; `flags` of XLA."""

    part: str
    method: str | None
    seconds: float
    flags: str = PINNED_AUTOTUNING

    def records(self, method: str, sizes: Sizes) -> list[tuple[str, str]]:
        """(name, file) of the records that it writes."""
        if self.part == "link":
            return [("link", f"link-{m}") for m in LINK_METHODS]
        if self.part == "fills":
            return [("fill", f"fill-{method}")]
        if self.part == "bits":
            return [("stream_bits", f"stream_bits-{m}-b{rows}") for m, rows in sizes.bits]
        if self.part == "profile":
            return [("stream_profile", f"stream_profile-{m}") for m in dict.fromkeys(("while", method))]
        return [("stream_decode", f"stream_decode-{share}") for share in sizes.shares]


JOBS = (
    Job("link", None, 60, ""),
    *(Job("fills", method, 50, f"{PINNED_AUTOTUNING} {GRAPH_FLAGS}" if method == GRAPHS else PINNED_AUTOTUNING) for method in FILL_METHODS),
    Job("bits", None, 120),
    Job("decode", None, 200, ""),
    Job("profile", None, 90),
)
"""In this order: decoding takes the fastest fill that gave the right bits, in stores of more than 2^31 elements too. Autotuning is left on where
only speed is measured: it may choose differently for two programs, and then their bits differ too."""
LEAST_SECONDS = 15.0
"""A process that has less than this left is not started."""


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a process ended: `seconds` it took, and `reason` why it failed, or None."""

    seconds: float
    reason: str | None = None


def parser_of(description: str | None, parts: Iterable[str], out: Path) -> argparse.ArgumentParser:
    """What every command that measures on a device takes.

    By argparse and not tyro: where the GPU is, there may be jax and what a model needs, and little else.

    Args:
        description: of the command.
        parts: that it has.
        out: where records go by default.
    """
    known = tuple(parts)

    def some(text: str) -> list[str]:
        names = text.split(",")
        if unknown := [name for name in names if name not in known]:
            raise argparse.ArgumentTypeError(f"there is no part {unknown[0]!r}: choose from {', '.join(known)}")
        return names

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out, help="folder for records")
    parser.add_argument("--only", type=some, default=list(known), help="parts, with commas between them")
    parser.add_argument("--tiny", action="store_true", help="small sizes, for a check of the code; its numbers mean nothing")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all parts together")
    parser.add_argument("--part", choices=known, help="run one part in this process (the driver's own use)")
    return parser


def need_gpu(tiny: bool) -> None:
    """Ends the process where there is no GPU, but for a check of the code with `tiny` sizes."""
    platform = jax.devices()[0].platform
    if platform != "gpu" and not tiny:
        sys.exit(f"this needs a GPU, and jax found a {platform}; --tiny checks the code without one")


def drive(
    parts: Sequence[str], out: Path, sizes: Sizes, seconds: float, run: Callable[[Job, str, float | None, float], Ended], method: str | None = None
) -> bool:
    """Runs all jobs of some parts, whatever becomes of each.

    Args:
        parts: their names.
        out: folder of the records; those that this run is to write are removed first.
        sizes: `FULL` or `TINY`.
        seconds: for all of it.
        run: `(job, method, the link's GB/s if it is known, seconds) -> Ended`.
        method: how slots are filled in `decode` and `profile`; by default the fastest fill of this run.

    Returns:
        Whether every record came, none of them failed.
    """
    jobs = [job for job in JOBS if job.part in parts]
    began = time.monotonic()
    made: dict[str, dict[str, Any]] = {}
    for job in jobs:
        fill = job.method or method or best_fill(list(made.values())) or ("while" if sizes.tiny else "mosaic_tma")
        left = min(job.seconds, seconds - (time.monotonic() - began))
        rate = link_rate(made.values())
        settings = {"part": job.part, "method": fill, "tiny": sizes.tiny}
        run_one(out, job.records(fill, sizes), settings, left, functools.partial(run, job, fill, rate), made)
    return not any("failed" in r["settings"] for r in made.values())


def run_one(
    out: Path, records: Iterable[tuple[str, str]], settings: Mapping[str, Any], seconds: float, start: Callable[[float], Ended], made: dict[str, dict]
) -> None:
    """Runs a process that writes records, and writes one that says why for each that did not come.

    Args:
        out: their folder. Files that the process is to write are removed first.
        records: (name, file without its suffix) of each.
        settings: of a record that says why; `tiny` is among them.
        seconds: that are left.
        start: runs the process for so many seconds at most.
        made: by file, what has been written so far; the new ones are added.
    """
    files = {stem: (name, path_of(out, settings["tiny"], stem)) for name, stem in records}
    for _, path in files.values():
        path.unlink(missing_ok=True)
    ended = start(seconds) if seconds >= LEAST_SECONDS else Ended(0.0, "no time was left to start it")
    for stem, (name, path) in files.items():
        if not path.exists():
            failed = dict(settings) | {"failed": brief(ended.reason or "it ended without this record")}
            record.write_record(path, empty_record(name, failed) | {"device": _device_of(made.values())})
            print(line_of(stem, _read(path)), flush=True)
        made[stem] = _read(path)
    print(f"{settings['part']} {settings.get('method') or ''}: {ended.seconds:.0f} s", flush=True)


def start_process(command: Sequence[str], environment: Mapping[str, str], seconds: float) -> Ended:
    """Runs a command, ended when its time is over."""
    began = time.monotonic()
    try:
        done = subprocess.run(command, env=dict(environment), stderr=subprocess.PIPE, text=True, errors="replace", timeout=seconds)
    except subprocess.TimeoutExpired as error:
        print(str(error.stderr or "")[-4000:], file=sys.stderr)
        return Ended(seconds, f"it had not ended after {seconds:.0f} s")
    took = time.monotonic() - began
    if done.returncode == 0:
        return Ended(took)
    print(done.stderr[-4000:], file=sys.stderr)
    return Ended(took, f"the process ended with {done.returncode}: {reason_of(done.stderr)}")


def _device_of(made: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The device that another record of this run names: the driver itself keeps off it."""
    unknown = {"platform": "unknown", "kind": "unknown", "count": 0, "cpu": record.device()["cpu"]}
    return next((r["device"] for r in made if r["device"]["platform"] != "unknown"), unknown)


def best_fill(made: Sequence[Mapping[str, Any]]) -> str | None:
    """The fastest method in a step of layers, of those that a model's step can be made with and that gave no wrong bits in any part so far."""
    wrong = {r["settings"].get("method") for r in made if r["name"] == "stream_bits" and r["counters"].get("steps_that_differ") != 0}
    good = [r for r in made if r["name"] == "fill" and r["counters"].get("right") == 1 and r["settings"]["method"] in METHODS]
    good = [r for r in good if r["settings"]["method"] not in wrong]
    return min(good, key=lambda r: r["timings"]["layers_four"]["median"])["settings"]["method"] if good else None


def link_rate(made: Iterable[Mapping[str, Any]]) -> float | None:
    """GB/s: the best that part `link` saw."""
    return max((r["bound"]["ceiling"] for r in made if r["name"] == "link" and r["bound"]["ceiling"]), default=None)


def reason_of(errors: str) -> str:
    """What a process that failed said last: its last line that names an error, or the last one."""
    lines = errors.strip().splitlines() or ["it said nothing"]
    return next((line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception|Exit)\b", line)), lines[-1])


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))
