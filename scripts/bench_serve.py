"""Measures serving, each arm beside its controls: in virtual time, over an emulated link, on a queue, under open-loop load, and on a GPU.

    python scripts/bench_serve.py --tier virtual [--traces T.npz ...] [--out benchmarks]     exact, the same on every machine
    python scripts/bench_serve.py --tier link [--model DIR] [--gbps 0.02] [--out benchmarks] long prompts arrive while others decode, on this CPU
    python scripts/bench_serve.py --tier queue [--model DIR] [--out benchmarks]              a mixed queue, grouped by experts and not
    python scripts/bench_serve.py --tier open [--model DIR] [--rates 0.25 0.5 0.75 1]        requests that come when they come
    python scripts/bench_serve.py --tier open --url http://127.0.0.1:8000 [--api-key KEY]    the same against a server that runs
    python scripts/bench_serve.py --tier storm --url http://127.0.0.1:8000 [--clients 64]    good and bad clients, and whether all is well after
    python scripts/bench_serve.py --tier device [--tiny] [--out benchmarks]                  long prompts on a GPU, in under ten minutes

Records go to the folder --out. Links of the tiers link and open are EMULATED: every expert byte is paced against real time.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

from rich.console import Console

from jaxmoe.report.command import run_command

LINK_GBPS, OPEN_GBPS = 0.02, 0.1
"""Over the first, all experts take longer to come than a prompt takes to be computed on two cores, as on a GPU whose host holds them; over the
second, runs with many requests end within minutes."""
TRACES = (ROOT / "tests/offload/data/qwen3_30b_a3b.npz",)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Benchmark serving."""

    tier: Literal["virtual", "link", "queue", "open", "device", "storm"] = "virtual"
    """What is measured."""
    out: Path | None = None
    """Folder for records; none are written if not given."""
    model: Path = ROOT / "checkpoints" / "default"
    """Hugging Face folder or converted checkpoint, for link, queue and open."""
    text: Path = ROOT / "LICENSE"
    """File that prompts are passages of, for link and open; random ids for a model without a tokenizer."""
    traces: tuple[Path, ...] = TRACES
    """Recorded routing, for virtual."""
    verify: bool = False
    """Check every read and every invariant in every step, for virtual."""
    seed: int = 0
    """Of what is drawn."""
    slots: int = 0
    """Slots a layer, for link and open; a quarter of the experts if 0."""
    gbps: float = 0.0
    """Speed of the emulated link, 10^9 bytes per second; if 0, 0.02 for link and 0.1 for open."""
    groups: tuple[int, ...] = (4, 8)
    """Groups of layers, for link and device."""
    chunks: tuple[int, ...] = (256,)
    """Prompt tokens of a step, for link and device."""
    rounds: int = 0
    """How often every arm runs, in turn; 6 if 0, 3 on a device."""
    prompts: int = 4
    """Prompts that arrive together, for link and device; another scene has one."""
    tokens: int = 1024
    """Of each of them, for link."""
    alone: int = 1984
    """Of a prompt that arrives alone, for link; 0 for none."""
    streams: int = 2
    """Sequences that decode when prompts arrive, for link."""
    requests: int = 0
    """Requests of a run; if 0, 48 for open and 2,000 for storm."""
    clients: int = 64
    """At a time, for storm."""
    rates: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    """For open: parts of the rate that the control bears when all requests are there at once; requests per second with --url."""
    url: str = ""
    """A server that runs, without /v1, for open and storm."""
    api_key: str = ""
    """Of that server."""
    layers: int = 12
    """Of the generated model, for device."""
    percent: int = 25
    """Of its experts that are on the device."""
    tiny: bool = False
    """For device: sizes that check the code anywhere; the numbers mean nothing."""
    cache: Path = Path(tempfile.gettempdir()) / "jaxmoe-bench"
    """Converted checkpoints and compiled programs."""


Tell = Callable[[str], None]
Save = Callable[[Mapping[str, Any]], None]


def virtual(args: Arguments, console: Console, tell: Tell, save: Save) -> None:
    """Every comparison in virtual time."""
    from jaxmoe.offload.trace import load_or_import
    from jaxmoe.report.serve_virtual import virtual_records

    traces = {path.stem: load_or_import(path) for path in args.traces}
    made = virtual_records(traces, args.seed, verify=args.verify, tell=tell)
    save({"-".join((r["name"], r["settings"]["routing"], r["settings"]["what"], r["settings"]["arm"])): r for r in made})


def link(args: Arguments, console: Console, tell: Tell, save: Save) -> None:
    """Long prompts over an emulated link."""
    from jaxmoe.report import serve_bench, serve_judge, serve_setups

    model, records, passages = load(args, tell)
    texts = passages or serve_setups.random_texts(model.spec.vocab, args.seed)
    scenes = [serve_bench.Scene(f"{args.prompts} together", args.prompts, args.tokens, streams=args.streams)]
    scenes += [serve_bench.Scene("1 alone", 1, args.alone, streams=args.streams)] if args.alone else []
    gbps, arms = args.gbps or LINK_GBPS, serve_bench.arms(args.groups, args.chunks)
    for scene in scenes:
        if (needed := scene.positions(serve_setups.smallest(arms))) > model.spec.max_positions:
            raise ValueError(f"{scene.name}: {needed} positions are needed, and the model has {model.spec.max_positions}: fewer or shorter prompts")
    ready = serve_setups.linked(model, records, arms, scenes, gbps)
    samples = serve_bench.rounds(ready, texts, args.rounds or 6, serve_setups.smallest(arms), tell)
    about = {"model": args.model.name, "dtype": "float32", "slots_a_layer": list(model.bank.slots), "mode": "host-driven", "text": args.text.name}
    setting = serve_judge.Setting(len(model.bank.slots) * model.bank.experts, model.bank.record_bytes, gbps, True, about)
    made = serve_judge.records(ready, samples, setting, "serve_link")
    save(made)
    show_scenes(made, console)


def queue(args: Arguments, console: Console, tell: Tell, save: Save) -> None:
    """A mixed queue."""
    from jaxmoe.report.serve_queue_bench import queue_records

    made = queue_records(args.model, seed=args.seed, tell=tell)
    save({f"{r['name']}-{r['settings']['arm']}": r for r in made})


def opened(args: Arguments, console: Console, tell: Tell, save: Save) -> None:
    """Open-loop load, in this process or on a server."""
    from jaxmoe.report import serve_http, serve_open

    wanted = serve_open.Load(args.requests or 48, seed=args.seed)
    if args.url:
        rounds = serve_open.url_records(serve_http.Server(args.url.rstrip("/"), args.api_key), wanted, args.rates, tell)
    else:
        model, records, texts = load(args, tell)
        about = {"model": args.model.name, "dtype": "float32", "slots_a_layer": list(model.bank.slots), "mode": "host-driven"}
        spec = serve_open.spec_of(wanted)
        prepared = serve_open.prepare(model, records, texts, args.gbps or OPEN_GBPS, wanted, spec, tell)
        rounds = serve_open.open_records(prepared, texts, wanted, args.rates, about, tell)
    made = []
    for some in rounds:  # a run that is stopped has written what it measured
        save({serve_open.stem(r): r for r in some})
        made += some
    console.print(serve_open.table(made))
    for times in serve_open.TPOT_TIMES:
        for arm, rate in serve_open.best(made, times).items():
            within = f"{serve_open.TTFT_TIMES:g} x TTFT and {times:g} x TPOT of a request alone"
            console.print(f"{arm}: 9 of 10 within {within}, of the rates tried up to {rate:.3g}", highlight=False, markup=False, soft_wrap=True)


def device(args: Arguments, console: Console, tell: Tell, save: Save) -> None:
    """Long prompts on the default device, experts fetched by compiled steps."""
    from jaxmoe.report import serve_bench, serve_device

    sizes = serve_device.TINY
    if not args.tiny:
        full = serve_device.FULL
        sizes = dataclasses.replace(full, layers=args.layers, prompts=args.prompts, alone=full.alone if args.alone else 0)
    groups = tuple(n for n in args.groups if n <= sizes.layers) or (sizes.layers,)
    arms = serve_bench.arms(groups, (sizes.chunk,) if args.tiny else args.chunks)
    for made in serve_device.measure(sizes, arms, args.percent, args.rounds or sizes.rounds, tell):
        save({f"tiny-{stem}" if args.tiny else stem: r for stem, r in made.items()})
        show_scenes(made, console)


def stormed(args: Arguments, console: Console, tell: Tell, save: Save) -> None:
    """Good and bad clients against a server that runs; what it should not have done ends the command with an error."""
    import asyncio

    from jaxmoe.report import serve_http, serve_storm

    found = serve_http.find_model(serve_http.Server(args.url.rstrip("/"), args.api_key))
    if not found.positions:
        raise ValueError(f"{args.url}/v1/models does not say how long a sequence may be (max_model_len), which the storm goes beyond")
    target = serve_storm.Target(found.url, found.model, found.positions, found.key, chat=False)
    tell(f"{args.clients} clients")
    report = asyncio.run(serve_storm.storm(target, args.clients, args.requests or 2000, args.seed))
    for line in serve_storm.storm_lines(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if report.problems:
        raise ValueError(f"{len(report.problems)} things went wrong, the first: {report.problems[0]}")


TIERS: dict[str, Callable[[Arguments, Console, Tell, Save], None]] = {
    "virtual": virtual, "link": link, "queue": queue, "open": opened, "device": device, "storm": stormed,
}  # fmt: skip


def load(args: Arguments, tell: Tell) -> tuple[Any, Any, Any]:
    """The model with slots for some of its experts, all experts' records, and passages of the text, if it has a tokenizer."""
    from checkpoints.load import load_hf_or_checkpoint, read_spec
    from jaxmoe.engine.model import Offload, load_model, read_store
    from jaxmoe.engine.text import Tokenizer
    from jaxmoe.report.serve_setups import passages
    from pallas_kernels.dispatch import Kernels

    tell("loading")
    spec = read_spec(args.model)
    if spec.moe is None:
        raise ValueError(f"{args.model} has no experts: nothing would cross a link")
    slots = args.slots or max(spec.moe[0].active, spec.moe[0].experts // 4)
    checkpoint = load_hf_or_checkpoint(args.model, args.cache)
    kernels = Kernels.default()
    model = load_model(checkpoint, "float32", kernels, False, offload=Offload(slots, store=False))
    texts = None
    if (args.model / "tokenizer.json").exists():
        texts = passages(Tokenizer(args.model), args.text.read_text(encoding="utf-8"))
    return model, read_store(checkpoint, model.spec, layout=kernels.expert_layout), texts


def show_scenes(made: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    """A table of scenes and arms, and whether they show what they should."""
    from rich.box import SIMPLE
    from rich.table import Column, Table

    from jaxmoe.report import serve_judge

    names = ("scene, arm", "x once", "TTFT s", "worst", "gap s", "bound", "step s", "rho", "% bound")
    table = Table(*(Column(name, no_wrap=True) for name in names), box=SIMPLE, padding=(0, 1, 0, 0))
    for r in made.values():
        t, c = r["timings"], r["counters"]
        numbers = [t[name]["median"] for name in ("ttft_mean", "ttft_worst", "gap_worst")]
        table.add_row(
            f"{r['settings']['scene']}: {r['settings']['arm']}", f"{c['once']:.2f}", *(f"{n:.3f}" for n in numbers), f"{c['gap_bound']:.3f}",
            f"{t['t_dec']['median']:.3f}", f"{c['rho']:.2f}" if "rho" in c else "", f"{r['bound']['percent']:.0f}",
        )  # fmt: skip
    console.print(table)
    for text, holds in serve_judge.claims(made):
        console.print(f"{'holds ' if holds else 'NOT   '} {text}", highlight=False, markup=False, soft_wrap=True)


def run(args: Arguments) -> None:
    """Measures, prints, writes."""
    import jax

    from jaxmoe.report.record import write_record

    check(args)
    jax.config.update("jax_compilation_cache_dir", str(args.cache / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # the host-driven mode has many small programs
    screen, console = Console(stderr=True), Console(width=None if sys.stdout.isatty() else 120)
    written = 0

    def save(made: Mapping[str, Any]) -> None:
        nonlocal written
        for stem, one in made.items() if args.out is not None else ():
            write_record(args.out / f"{file_stem(stem)}.json", one)  # type: ignore[operator]
            written += 1

    with screen.status(args.tier) as status:
        TIERS[args.tier](args, console, lambda what: status.update(f"{args.tier}: {what}"), save)
    if args.out is not None:
        console.print(f"{written} records in {args.out}", highlight=False, markup=False, soft_wrap=True)


def file_stem(stem: str) -> str:
    """A record's name as a file's."""
    return "-".join("".join(c if c.isalnum() or c in "._" else " " for c in stem).split()).lower()


def check(args: Arguments) -> None:
    """Refuses arguments before anything takes long.

    Raises:
        ValueError: see the messages.
    """
    if args.out is not None and not args.out.is_dir():
        raise ValueError(f"{args.out}: there is no such folder for records")
    for name in ("prompts", "tokens", "streams", "clients", "layers"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)}: give at least 1")
    if not args.groups or min(args.groups) < 1 or min(args.chunks, default=32) < 32:
        raise ValueError(f"--groups {args.groups}, --chunks {args.chunks}: groups of at least 1, chunks of at least 32 tokens")
    if any(chunk % 32 for chunk in args.chunks):
        raise ValueError(f"--chunks {args.chunks}: give multiples of 32 tokens")
    if not args.rates or min(args.rates) <= 0:
        raise ValueError(f"--rates {args.rates}: give positive numbers")
    for name in ("gbps", "slots", "rounds", "alone", "requests"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} {getattr(args, name):g}: give 0 or more")
    if args.tier == "storm" and not args.url:
        raise ValueError("--tier storm needs a server that runs: --url http://127.0.0.1:8000")
    if not 1 <= args.percent <= 100:
        raise ValueError(f"--percent {args.percent}: give 1 to 100")


def main() -> int:
    """Runs; gives the exit code."""
    parsed = tyro.cli(Arguments, description=__doc__)
    return run_command(lambda: run(parsed))


if __name__ == "__main__":
    sys.exit(main())
