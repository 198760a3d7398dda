"""Serves a model over HTTP as OpenAI's API: completions, chat, streaming, structured output, metrics.

    python scripts/serve.py [MODEL] [--memory 8GB] [--port 8000] [--api-key KEY]

It listens on this machine alone unless told otherwise. What a budget buys is printed before any weights are read; --dry-run-memory ends there.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import re
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
from rich.table import Table

from jaxmoe.report.command import run_command

DEFAULT_MODEL = ROOT / "checkpoints" / "default"
CACHE = Path.home() / ".cache" / "jaxmoe"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Serve a model."""

    model: tyro.conf.Positional[Path] = DEFAULT_MODEL
    """Hugging Face folder or converted folder."""
    served_model_name: str | None = None
    """What clients call it; the folder's name if not given."""
    host: str = "127.0.0.1"
    """Where to listen. Others than this machine can reach it only with --api-key or --allow-public."""
    port: int = 8000
    """0 takes a free one and prints it."""
    api_key: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """A key that opens the API (repeatable)."""
    api_key_file: Path | None = None
    """A file with one key a line, where keys should not be seen in the list of processes."""
    allow_public: bool = False
    """Listen where others can reach it although there is no key."""
    plan: Path | None = None
    """Serve as a file of scripts/plan.py for one device says: precision, sequences, length, and how many experts stay."""
    memory: str = "auto"
    """Device memory for everything: 8GB, 6GiB or auto."""
    kv_memory: str | None = None
    """Of it for keys and values; what suits best if not given."""
    expert_memory: str | None = None
    """Of it for routed experts: 4GB, 25% (of all experts); what suits best if not given. The others stay in host memory."""
    expert_slots: int | None = None
    """Experts of each layer on the device, in the place of --expert-memory."""
    expert_policy: str = "lfu"
    """Which experts stay on the device."""
    expert_mode: Literal["fused", "host-driven"] = "fused"
    """How experts are brought: in the compiled steps, or sent by the host."""
    expert_trace: Path | None = None
    """A routing trace of the model (scripts/trace.py record): shares slots out over the layers."""
    pin_experts: Path | None = None
    """Experts that never leave the device once they are there, a file of scripts/trace.py pin."""
    expert_regret: bool = False
    """Count in /metrics what the best policy would have loaded, too."""
    link_gbps: float | None = None
    """Emulate a link of this many 10^9 bytes per second between host and device."""
    host_kv_memory: str | None = "512MB"
    """Host memory for sequences that are put aside and prefixes that may come again."""
    kv_dtype: Literal["float32", "bfloat16", "int8"] | None = None
    """How keys and values are held; as the model computes if not given. int8 is not exact."""
    dtype: str | None = None
    """float32 or bfloat16; float32 on the CPU and the checkpoint's own elsewhere if not given."""
    kernels: Literal["pallas", "xla"] = "pallas"
    """On GPUs and TPUs: our own kernels, or plain XLA."""
    fast: bool = False
    """Let results depend in their last bits on what runs beside them, for faster prefill on the CPU."""
    max_model_len: int | None = None
    """The longest sequence, prompt and answer; at most what the model has. 4096 if not given."""
    max_num_seqs: int | None = None
    """Sequences on the device at a time. 16 if not given."""
    max_num_batched_tokens: int = 256
    """Tokens of a step, at most, where prompts go in chunks."""
    page_size: int = 32
    """Tokens of a page of keys and values."""
    prefill_mode: Literal["layered", "chunked", "splitfuse", "whole"] | None = None
    """How prompts are computed beside decoding: by groups of layers, where experts are streamed; else in chunks."""
    layer_groups: int = 0
    """Groups of layers; 0 takes 8, or as many as the model has layers."""
    wave_tokens: int = 1024
    """Prompt tokens that go through the layers together, at most."""
    schedule_policy: Literal["fcfs", "priority", "fair", "throughput", "expert-aware", "shortest"] = "fcfs"
    """In which order requests are taken. expert-aware learns which experts tokens ask for, and needs streamed experts."""
    preempt_margin: float | None = None
    """Points (docs/serving.md) by which one that waits has to be ahead of one that runs to take its place; never if not given."""
    max_decode_seqs: int | None = None
    """Of the sequences on the device, those that decode in a step; all if not given."""
    decode_group: Literal["arrival", "random", "pairs", "greedy", "by_expert"] | None = None
    """Which of them decode together where there are more; they take turns if not given. pairs, greedy and by_expert save experts."""
    preemption: Literal["swap", "recompute"] = "swap"
    """What becomes of a sequence when pages run out."""
    max_waiting: int = 1024
    """Requests that may wait; the next ones get 429."""
    max_concurrent: int = 1024
    """Requests that are worked on or wait at a time, answers counted by HTTP request."""
    request_seconds: float = 600.0
    """Wall time of a request."""
    allow_auto_truncate: bool = False
    """Allow requests to ask for prompts that are too long to be cut at their beginning (truncate_prompt_tokens)."""
    grammar_backend: Literal["llguidance", "none"] = "llguidance"
    """What makes answers follow schemas and grammars."""
    drain_seconds: float = 30.0
    """That running requests get after SIGTERM."""
    log_interval: float = 10.0
    """Seconds between two lines of statistics; 0 for none."""
    dry_run_memory: bool = False
    """Print what the memory comes to, and end: with 0 if it suffices, with 2 if not."""
    cache: Path = CACHE
    """Where converted checkpoints and compiled programs are kept."""


def asked(args: Arguments):
    """The arguments as the builder takes them."""
    from jaxmoe.engine.serving.build import Serving
    from jaxmoe.engine.serving.memory import ServeMemory
    from jaxmoe.engine.serving.objective import Policy

    if args.expert_slots is not None and args.expert_memory is not None:
        raise ValueError(f"--expert-slots {args.expert_slots} and --expert-memory {args.expert_memory} say the same: give one of them")
    sequences = 16 if args.max_num_seqs is None else args.max_num_seqs
    positions = 4096 if args.max_model_len is None else args.max_model_len
    run = min(args.page_size, 32)
    if args.page_size < 1 or args.page_size % run:
        raise ValueError(f"--page-size {args.page_size}: give a multiple of 32 tokens, or fewer than 32")
    for option, tokens in (("--max-num-batched-tokens", args.max_num_batched_tokens), ("--wave-tokens", args.wave_tokens)):
        if tokens < run or tokens % run:
            raise ValueError(f"{option} {tokens}: with pages of {args.page_size} tokens, give a multiple of {run}")
    memory = ServeMemory(
        args.memory, args.kv_memory, args.expert_memory, args.expert_slots, sequences, positions, args.page_size,
        chunk=args.max_num_batched_tokens, wave=args.wave_tokens, groups=args.layer_groups, run=run, kv_dtype=args.kv_dtype,
        host=None if no_bytes(args.host_kv_memory) else args.host_kv_memory, policy=args.expert_policy, batch=args.max_decode_seqs,
    )  # fmt: skip
    if args.decode_group is not None and (args.max_decode_seqs is None or args.max_decode_seqs >= sequences):
        raise ValueError(f"--decode-group {args.decode_group} chooses among more sequences than decode in a step: give fewer in --max-decode-seqs")
    margin = math.inf if args.preempt_margin is None else args.preempt_margin
    policy = Policy(objective=args.schedule_policy, preemption=args.preemption, group=args.decode_group, margin=margin)
    mode, gbps, trace = args.expert_mode, args.link_gbps, args.expert_trace
    return Serving(memory, policy, args.prefill_mode, mode, gbps, trace, args.max_waiting, args.expert_regret, args.pin_experts)


def no_bytes(amount: str | None) -> bool:
    """Whether an amount is none: not given, or 0 of any unit."""
    return amount is None or re.fullmatch(r"0+(\.0*)?\s*[a-zA-Z]*", amount.strip()) is not None


def settings(args: Arguments):
    """The server's settings, checked."""
    from jaxmoe.server.settings import ServerSettings

    keys = args.api_key
    if args.api_key_file is not None:
        more = tuple(line.strip() for line in args.api_key_file.read_text(encoding="utf-8").splitlines() if line.strip())
        if not more:
            raise ValueError(f"--api-key-file {args.api_key_file} has no key in it: one a line, or leave it out")
        keys += more
    if args.max_waiting < 1:
        raise ValueError(f"--max-waiting {args.max_waiting}: a request waits at least for a moment: give 1 or more")
    found = ServerSettings(
        args.served_model_name or args.model.resolve().name, args.host, args.port, keys, args.allow_public, args.allow_auto_truncate,
        max_concurrent=args.max_concurrent, max_connections=2 * args.max_concurrent, request_seconds=args.request_seconds,
        drain_seconds=args.drain_seconds, log_seconds=args.log_interval,
    )  # fmt: skip
    found.check()
    return found


def show(found, console: Console) -> None:
    """What the memory comes to: a `MemoryTable`, on standard output; everything else that is said goes to standard error."""
    table = Table("device memory", "bytes", "", title=None, box=None)
    for line in found.lines():
        table.add_row(*line)
    console.print(table)


def run(args: Arguments, console: Console) -> None:
    """Does the whole of it; what is quick to check comes before what takes long."""
    try:
        from jaxmoe.server.serve import run_server
    except ImportError as error:
        raise ValueError(f"serving needs packages that are not installed ({error.name}): pip install 'jaxmoe[serve]'") from error
    import jax

    from checkpoints.load import read_spec
    from jaxmoe import formats
    from jaxmoe.engine.serving.build import as_planned, grammar_compiler, load_serving, make_serving_plan
    from jaxmoe.engine.serving.fitting import describe
    from jaxmoe.engine.serving.memory import TooSmall
    from jaxmoe.engine.text import Tokenizer
    from jaxmoe.report.opening import find_kernels, open_model
    from jaxmoe.server.guides import compile_with

    if args.dtype is not None:
        formats.leaf_dtype(args.dtype)
    limits = settings(args)
    kernels = find_kernels(args.fast, args.kernels == "pallas")
    spec = read_spec(args.model)
    tokenizer = Tokenizer(args.model)
    wanted, spec = asked(args), spec.with_precision(args.dtype or ("float32" if kernels.backend == "cpu" else spec.precision.params))
    if args.plan is not None:
        for option in ("dtype", "kv_dtype", "expert_memory", "expert_slots", "max_num_seqs", "max_model_len"):
            if getattr(args, option) is not None:
                raise ValueError(f"--plan {args.plan} brings its own --{option.replace('_', '-')}: leave out {getattr(args, option)}, or plan anew")
        wanted, spec = as_planned(wanted, args.plan, spec)
    try:
        plan = make_serving_plan(wanted, spec, kernels)
    except TooSmall as error:
        show(error.table, Console())
        raise
    out = Console()
    show(plan.fitted.table, out)
    for text in describe(plan.fitted):
        out.print(text, soft_wrap=True)
    if args.dry_run_memory:
        return
    compiler = None if args.grammar_backend == "none" else grammar_compiler(spec, tokenizer)
    began = time.perf_counter()
    checkpoint = open_model(args.model, args.cache, console)
    with Progress(TextColumn("reading experts"), BarColumn(), MofNCompleteColumn(), console=console, transient=True,
                  disable=not console.is_terminal) as progress:  # fmt: skip
        task = progress.add_task("", total=None)
        engine = load_serving(plan, checkpoint, kernels, tokenizer, limits.model, spec.precision.params,
                              lambda done, total: progress.update(task, completed=done, total=total))  # fmt: skip
    loaded = time.perf_counter()
    jax.config.update("jax_compilation_cache_dir", str(args.cache / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    with Progress(TextColumn("compiling {task.description}"), BarColumn(), MofNCompleteColumn(), console=console, transient=True,
                  disable=not console.is_terminal) as progress:  # fmt: skip
        task = progress.add_task("", total=engine.programs)
        engine.warm_up(lambda name: progress.update(task, advance=1, description=name))
    kinds = "programs" if args.expert_mode == "fused" else "kinds of steps"
    console.print(f"{engine.programs} {kinds}: {plan.policy.prefill} prefill, {args.schedule_policy}; load {loaded - began:.1f} s, "
                  f"compile {time.perf_counter() - loaded:.1f} s")  # fmt: skip
    run_server(engine, limits, console, None if compiler is None else compile_with(compiler))


def main() -> int:
    """Runs; gives the exit code."""
    args = tyro.cli(Arguments, description=__doc__)
    return run_command(lambda: run(args, Console(stderr=True)))


if __name__ == "__main__":
    sys.exit(main())
