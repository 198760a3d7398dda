"""Generates text from a Hugging Face folder or a converted one; the model that ships if none is named.

    python scripts/generate.py [MODEL] --prompt TEXT | --prompt-file FILE --max-new-tokens N

A Hugging Face folder is converted once, into a cache folder. Without --prompt or --prompt-file the prompt is read from standard input.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text

from jaxmoe.report.command import run_command

DEFAULT_MODEL = ROOT / "checkpoints" / "default"
CACHE = Path.home() / ".cache" / "jaxmoe"
STREAMING = {
    "expert_mode": "mode", "expert_policy": "policy", "expert_staging": "staging", "expert_trace": "trace", "expert_fill": "fill",
    "link_gbps": "link_gbps", "host_memory": "host_memory", "expert_predictor": "predictor", "predictor_file": "predictor_file",
    "prefetch": "prefetch", "lossy": "lossy", "pin_experts": "pinned",
}  # fmt: skip
"""Options that go with --expert-memory, and the fields of `Streaming` that they set."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Generate text."""

    model: tyro.conf.Positional[Path] = DEFAULT_MODEL
    """Hugging Face folder or converted folder."""
    prompt: str | None = None
    """The prompt."""
    prompt_file: Path | None = None
    """A file with one prompt a line: a batch."""
    chat: bool = False
    """Put each prompt into the tokenizer's chat template, as a user's turn."""
    max_new_tokens: int = 128
    """Tokens to generate per prompt, at most."""
    temperature: float = 0.0
    """0 takes the likeliest token."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the likeliest tokens that together have this probability."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the likeliest."""
    seed: int = 0
    """Noise depends on the seed and the position alone."""
    stop: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """End at this text (repeatable)."""
    dtype: str | None = None
    """float32 or bfloat16; float32 on the CPU and the checkpoint's own elsewhere if not given."""
    fast: bool = False
    """Let results depend in their last bits on batch and prompt length, for faster prefill on the CPU."""
    kernels: Literal["pallas", "xla"] = "pallas"
    """On GPUs and TPUs: our own kernels for experts, or plain XLA."""
    expert_memory: str | None = None
    """Device memory for routed experts: 4GB, 512MiB, 25% (of all experts) or auto. The others stay in host memory."""
    expert_policy: Literal["lru", "lfu", "static", "arc", "fate", "edgemoe", "hobbit", "eam", "plec", "lookahead", "opt", "auto"] | None = None
    """Which experts stay on the device; lfu if not given. auto chooses by --expert-trace, and in the host-driven mode prefetches. static and eam go
    by --expert-trace too, and opt by a trace of this very run."""
    expert_predictor: str | None = None
    """What foretells which experts come next, for --prefetch and for the policies plec and lookahead: frequency, previous, transitions, eam, path,
    readme, gate or oracle; or what one of them says before a step, corrected by another as its layers are routed, as path+gate."""
    predictor_file: Path | None = None
    """A trained predictor (scripts/train.py predictor), for path and readme."""
    prefetch: int | None = None
    """Send experts ahead of their being asked for, and hold at most so many on the device beside the slots; off while it does not pay."""
    expert_mode: Literal["fused", "layer-grouped", "host-driven"] | None = None
    """How experts are brought: in the compiled step, the same with whole prompts at once (the default), or sent by the host."""
    expert_staging: int | None = None
    """Device slots for experts that pass through; 2 if not given."""
    expert_trace: Path | None = None
    """A routing trace of the model (scripts/trace.py record): shares slots out over the layers, and profiles for the static policy."""
    pin_experts: Path | None = None
    """Experts that never leave the device once they are there, a file of scripts/trace.py pin."""
    expert_fill: Literal["while", "fixed", "mosaic_tma", "mosaic_loads"] | None = None
    """How a compiled step reads host memory, if not in the backend's way."""
    host_memory: str | None = None
    """Host memory for experts; the others are read from disk when they are asked for."""
    link_gbps: float | None = None
    """Emulate a link of this many 10^9 bytes per second between host and device."""
    lossy: str | None = None
    """Give up exactness for fewer bytes: hobbit, drop-cold, cache-prior, bits=4, or fields like high=0.6,low=0.9,low_bits=4 (docs/offloading.md)."""
    split: str | None = None
    """Run on several devices, such as data=2,expert=4 or expert=8,attention=tensor (docs/planning.md); --expert-memory is then that of each."""
    plan: Path | None = None
    """Run as a file of scripts/plan.py says."""
    switch_exchange: bool = False
    """With --split or --plan: each step by the exchange that sends the fewest bytes for its number of tokens (Tutel)."""
    placement: Path | None = None
    """Where experts stand, a file of scripts/place.py: those that work together on one device, or copies of hot ones."""
    coordinator: str | None = None
    """Run with other processes, each with its own devices: HOST:PORT of process 0, or auto. Needs --split or --plan, the same in all."""
    processes: int | None = None
    """How many processes there are."""
    process: int | None = None
    """Which of them this is, from 0; the first one prints."""
    json: Path | None = None
    """Write requests, results and the run's record to this file."""
    cache: Path = CACHE
    """Where converted checkpoints and compiled programs are kept."""


def read_prompts(args: Arguments) -> list[str]:
    """The prompts from the argument, the file, or standard input."""
    if args.prompt is not None and args.prompt_file is not None:
        raise ValueError("give --prompt or --prompt-file, not both")
    if args.prompt is not None:
        if not args.prompt:
            raise ValueError("the prompt is empty")
        return [args.prompt]
    if args.prompt_file is not None:
        from jaxmoe.report.opening import prompt_lines

        prompts = prompt_lines(args.prompt_file)
    else:
        sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        try:
            prompts = [text for text in [sys.stdin.read()] if text]
        except UnicodeDecodeError as error:
            raise ValueError(f"standard input: not UTF-8: {error.reason} at byte {error.start}") from error
    if not prompts:
        raise ValueError(f"{args.prompt_file or 'standard input'}: holds no prompt; give --prompt, --prompt-file, or text on standard input")
    return prompts


def check_arguments(args: Arguments, prompts: list[str]) -> None:
    """Refuses whatever can be known to be wrong before a model is read, and an output file that could not be written after the run."""
    from jaxmoe import formats
    from jaxmoe.decode.sampling import sampling_params
    from jaxmoe.engine.text import StopStrings
    from jaxmoe.report import record
    from jaxmoe.report.opening import check_rows

    if args.max_new_tokens < 1:
        raise ValueError(f"max_new_tokens = {args.max_new_tokens} must be at least 1")
    if args.top_p == 0:
        raise ValueError(f"top_p = {args.top_p} is outside (0, 1]")
    sampling_params(1, args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    StopStrings(args.stop)
    alone = args.split is None and args.plan is None  # else so many in each group of devices, which the engine sees to
    if alone:
        check_rows(len(prompts))
    if args.dtype is not None:
        formats.leaf_dtype(args.dtype)
    if args.json is not None:
        record.check_path(args.json)


def plan_streaming(args: Arguments, spec, rows: int, positions: int):
    """What was asked for about experts and devices, checked; None if nothing was."""
    from jaxmoe.engine.planned import choose_devices, switched
    from jaxmoe.engine.streaming import Streaming, make_plan

    options = {name: getattr(args, option) for option, name in STREAMING.items() if getattr(args, option) is not None}
    streaming = None if args.expert_memory is None else Streaming(args.expert_memory, **options)
    if args.switch_exchange and args.split is None and args.plan is None:
        raise ValueError("--switch-exchange is for a model on several devices: give --split or --plan too")
    if streaming is not None and args.split is None and args.plan is None:
        return make_plan(streaming, spec, rows, positions)
    if options and streaming is None:
        option = next(option for option, name in STREAMING.items() if name in options)
        raise ValueError(f"--{option.replace('_', '-')} is for streamed experts: give --expert-memory too")
    if args.split is None and args.plan is None and args.placement is None:
        return None
    found = choose_devices(spec, args.split, args.plan, streaming, rows, positions, args.placement)
    if args.plan is not None and args.dtype not in (None, found.spec.precision.params):
        raise ValueError(f"--dtype {args.dtype}: the plan is for {found.spec.precision.params}: leave it out, or plan anew")
    return switched(found) if args.switch_exchange else found


def load(args: Arguments, plan, checkpoint, spec, kernels, requests, eos, console: Console):
    """The model and its engine, and what streams its experts if anything does."""
    from jaxmoe.engine.generate import Engine
    from jaxmoe.engine.model import load_model
    from jaxmoe.engine.planned import Planned, load_planned
    from jaxmoe.engine.streaming import load_streamed

    size = (len(requests), max(len(r.prompt_ids) + r.max_new_tokens for r in requests), args.temperature == 0, eos)
    dtype = spec.precision.params
    if plan is None:
        model = load_model(checkpoint, dtype, kernels)
        return model, Engine(model, *size), None
    columns = (TextColumn("reading experts"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None)

        def show(n: int, total: int) -> None:
            progress.update(task, completed=n, total=total)

        if isinstance(plan, Planned):
            engine = load_planned(plan, checkpoint, kernels, *size, progress=show)
            return engine.model, engine, None
        streamed = load_streamed(plan, checkpoint, dtype, kernels, *size, progress=show)
    return streamed.model, streamed.engine, streamed


def join_processes(args: Arguments) -> bool:
    """Joins other processes if there are any; whether this one is to be silent."""
    from jaxmoe.engine import processes

    if args.coordinator is None:
        if args.processes is not None or args.process is not None:
            raise ValueError("--processes and --process are for runs of several processes: give --coordinator HOST:PORT too")
        return False
    if args.split is None and args.plan is None:
        raise ValueError(f"--coordinator {args.coordinator}: say how the model is split over the processes' devices, with --split or --plan")
    processes.join(processes.Group(args.coordinator, args.processes, args.process))
    return not processes.is_first()


def make_requests(args: Arguments, prompts: list[str], tokenizer):
    """One request a prompt; a chat template writes special tokens itself, so none are added to its text."""
    from jaxmoe.engine.generate import Request, Sampling

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    texts = [tokenizer.chat([{"role": "user", "content": p}]) for p in prompts] if args.chat else prompts
    ids = [tokenizer.encode(text, add_special_tokens=not args.chat) for text in texts]
    return [Request(tuple(i), args.max_new_tokens, sampling, args.stop) for i in ids]


class Streamer:
    """Prints text as it comes: one prompt streams, several are printed one after another once they are whole."""

    def __init__(self, prompts: list[str]):
        self._single = len(prompts) == 1

    def __call__(self, index: int, text: str) -> None:
        if self._single:
            sys.stdout.write(text)
            sys.stdout.flush()


def run(args: Arguments, console: Console) -> None:
    """Does the whole of it; what is quick to check comes before what takes long."""
    prompts = read_prompts(args)

    import jax

    if join_processes(args):
        console.quiet = True

    from checkpoints.load import read_spec
    from jaxmoe.engine.generate import check_requests
    from jaxmoe.engine.processes import together
    from jaxmoe.engine.text import Tokenizer
    from jaxmoe.report.opening import find_kernels, open_model

    check_arguments(args, prompts)
    kernels = find_kernels(args.fast, args.kernels == "pallas")
    spec = read_spec(args.model)  # first, so that a folder that holds no model is refused as such, not for its lack of a tokenizer
    began = time.perf_counter()
    tokenizer = Tokenizer(args.model)
    requests = make_requests(args, prompts, tokenizer)
    check_requests(spec, requests)
    spec = spec.with_precision(args.dtype or ("float32" if kernels.backend == "cpu" else spec.precision.params))
    plan = plan_streaming(args, spec, len(requests), max(len(r.prompt_ids) + r.max_new_tokens for r in requests))
    model, engine, streamed = load(args, plan, open_model(args.model, args.cache, console), spec, kernels, requests, tokenizer.eos_ids, console)
    load_seconds = time.perf_counter() - began
    jax.config.update("jax_compilation_cache_dir", str(args.cache / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)  # the host-driven mode has many small programs
    with console.status("compiling") as status, together():
        compile_seconds = engine.warm_up(lambda name: status.update(f"compiling {name}"), requests)
    with together():
        results, timings = engine.generate(requests, tokenizer, Streamer(prompts) if not console.quiet else lambda i, text: None)
    timings.compile_seconds = compile_seconds
    if console.quiet:
        return
    if len(prompts) == 1:
        sys.stdout.write("\n")
    else:
        for prompt, result in zip(prompts, results, strict=True):
            console.rule(Text(prompt[:60]))  # a str would be read as markup
            sys.stdout.write(result.text + "\n")
    sys.stdout.flush()
    report(args, model, engine, streamed, results, timings, load_seconds, console)


def report(args: Arguments, model, engine, streamed, results, timings, load_seconds: float, console: Console) -> None:
    """Prints what the run achieved against the machine's bound, and writes the record if one was asked for."""
    from jaxmoe.report import expert_report, mesh_report, record

    rows = len(results)
    sizes = model.bytes()
    steps_per_second = timings.decode_steps / timings.decode_seconds if timings.decode_steps else 0.0
    achieved = model.bytes_per_token(rows) * steps_per_second / 1e9
    ceiling = record.measure_memory_bandwidth(0.5, sum(sizes.values()))
    bound = record.make_bound("bandwidth", ceiling, achieved, "GB/s")
    decode_rate = timings.decode_tokens / timings.decode_seconds if timings.decode_tokens else 0.0
    prefill_rate = timings.prompt_tokens / timings.prefill_seconds
    experts = {} if streamed is None else expert_report.expert_report(streamed, timings, ceiling, rows)
    mark = expert_report.emulation_mark(experts)
    console.print(
        f"[dim]{model.spec.precision.params}, {model.kernels.backend}: prefill {prefill_rate:,.0f} tok/s, decode {decode_rate:,.0f} tok/s, "
        f"first token {1e3 * timings.first_token_seconds:.1f} ms, load {load_seconds:.1f} s, compile {timings.compile_seconds:.1f} s{mark}\n"
        f"device bytes {sum(sizes.values()) / 1e6:,.1f} MB; decode reads {achieved:.1f} GB/s of {ceiling:.1f} measured "
        f"({bound['percent']:.0f} %){mark}[/dim]",
        highlight=False, soft_wrap=True,
    )
    if streamed is not None:
        for line in expert_report.lines(experts, model.spec.moe[0].experts):
            console.print(line, style="dim", highlight=False, soft_wrap=True, markup=False)
    on_mesh = {} if model.on.mesh is None else mesh_report.mesh_report(engine, timings)
    for line in mesh_report.lines(on_mesh) if on_mesh else []:
        console.print(line, style="dim", highlight=False, soft_wrap=True, markup=False)
    if args.json is None:
        return
    seconds = {n: getattr(timings, f"{n}_seconds") for n in ("prefill", "decode", "first_token")} | {"load": load_seconds}
    made = record.make_record(
        name="generate",
        spec_hash=model.spec.hash(),
        settings={
            "model": model.spec.family, "dtype": model.spec.precision.params, "requests": rows, "max_new_tokens": args.max_new_tokens,
            "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p, "min_p": args.min_p, "stop": list(args.stop),
            "row_invariant": model.kernels.row_invariant,
        },
        seeds={"sampling": args.seed},
        timings={name: record.timing([value]) for name, value in seconds.items()},
        compile_seconds=timings.compile_seconds,
        bytes=sizes | {"kv": engine.kv_bytes()},
        counters={"prompt_tokens": timings.prompt_tokens, "decode_tokens": timings.decode_tokens, "decode_steps": timings.decode_steps}
        | {"prefill_tokens_per_second": prefill_rate, "decode_tokens_per_second": decode_rate},
        bound=bound,
    )
    made |= experts | on_mesh
    made["requests"] = [
        {"prompt_ids": list(r.prompt_ids), "ids": r.ids, "text": r.text, "finish_reason": r.finish_reason} for r in results
    ]
    record.write_record(args.json, made)


def main() -> int:
    """Runs; gives the exit code."""
    args = tyro.cli(Arguments, description=__doc__)
    return run_command(lambda: run(args, Console(stderr=True)))


if __name__ == "__main__":
    sys.exit(main())
