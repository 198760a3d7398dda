"""Generates text from a Hugging Face folder or a converted one; the model that ships if none is named.

    python scripts/generate.py [MODEL] --prompt TEXT | --prompt-file FILE --max-new-tokens N

A Hugging Face folder is converted once, into a cache folder. Without --prompt or --prompt-file the prompt is read from standard input.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import time
from pathlib import Path
from typing import Annotated

import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

DEFAULT_MODEL = ROOT / "checkpoints" / "default"
CACHE = Path.home() / ".cache" / "jaxmoe"


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
    json: Path | None = None
    """Write requests, results and the run's record to this file."""
    cache: Path = CACHE
    """Where converted checkpoints and compiled programs are kept."""


def read_prompts(args: Arguments) -> list[str]:
    """The prompts from the argument, the file, or standard input."""
    if args.prompt is not None and args.prompt_file is not None:
        raise ValueError("give --prompt or --prompt-file, not both")
    if args.prompt is not None:
        return [args.prompt]
    if args.prompt_file is not None:
        if not args.prompt_file.is_file():
            raise ValueError(f"{args.prompt_file}: no such file")
        prompts = [line for line in args.prompt_file.read_text(encoding="utf-8").splitlines() if line]
        if not prompts:
            raise ValueError(f"{args.prompt_file}: holds no prompt")
        return prompts
    text = sys.stdin.read()
    if not text:
        raise ValueError("no prompt: give --prompt, --prompt-file, or text on standard input")
    return [text]


def open_model(args: Arguments, console: Console):
    """Converts if need be, then restores the model and its tokenizer."""
    from checkpoints.load import load_hf_or_checkpoint
    from jaxmoe import formats
    from jaxmoe.engine.model import load_model
    from jaxmoe.engine.text import Tokenizer
    from pallas_kernels.dispatch import Kernels

    if args.dtype is not None:
        formats.leaf_dtype(args.dtype)
    tokenizer = Tokenizer(args.model)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("converting", total=None, visible=False)

        def show(done: int, total: int, what: str) -> None:
            progress.update(task, completed=done, total=total, visible=True)

        checkpoint = load_hf_or_checkpoint(args.model, args.cache / "converted", None, show)
    kernels = Kernels.default(row_invariant=not args.fast)
    dtype = args.dtype or ("float32" if kernels.backend == "cpu" else checkpoint.spec.precision.params)
    return load_model(checkpoint, dtype, kernels), tokenizer


class Streamer:
    """Prints text as it comes: one prompt streams, several are printed one after another once they are whole."""

    def __init__(self, prompts: list[str]):
        self._single = len(prompts) == 1

    def __call__(self, index: int, text: str) -> None:
        if self._single:
            sys.stdout.write(text)
            sys.stdout.flush()


def run(args: Arguments, console: Console) -> None:
    """Does the whole of it."""
    import jax

    from jaxmoe.engine.generate import Engine, Request, Sampling, check_requests

    prompts = read_prompts(args)
    began = time.perf_counter()
    model, tokenizer = open_model(args, console)
    load_seconds = time.perf_counter() - began
    jax.config.update("jax_compilation_cache_dir", str(args.cache / "compiled"))
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p, args.seed)
    texts = [tokenizer.chat([{"role": "user", "content": p}]) for p in prompts] if args.chat else prompts
    requests = [Request(tuple(tokenizer.encode(t)), args.max_new_tokens, sampling, args.stop) for t in texts]
    check_requests(model, requests)
    longest = max(len(r.prompt_ids) + r.max_new_tokens for r in requests)
    engine = Engine(model, len(requests), longest, args.temperature == 0, tokenizer.eos_ids)
    with console.status("compiling") as status:
        compile_seconds = engine.warm_up(lambda name: status.update(f"compiling {name}"))
    results, timings = engine.generate(requests, tokenizer, Streamer(prompts))
    timings.compile_seconds = compile_seconds
    if len(prompts) == 1:
        sys.stdout.write("\n")
    else:
        for prompt, result in zip(prompts, results, strict=True):
            console.rule(prompt[:60])
            sys.stdout.write(result.text + "\n")
    sys.stdout.flush()
    report(args, model, engine, results, timings, load_seconds, console)


def report(args: Arguments, model, engine, results, timings, load_seconds: float, console: Console) -> None:
    """Prints what the run achieved against the machine's bound, and writes the record if one was asked for."""
    from jaxmoe.report import record

    rows = len(results)
    sizes = model.bytes()
    steps_per_second = timings.decode_steps / timings.decode_seconds if timings.decode_steps else 0.0
    achieved = model.bytes_per_token(rows) * steps_per_second / 1e9
    ceiling = record.measure_memory_bandwidth(0.5, sum(sizes.values()))
    bound = record.make_bound("bandwidth", ceiling, achieved, "GB/s")
    decode_rate = timings.decode_tokens / timings.decode_seconds if timings.decode_tokens else 0.0
    prefill_rate = timings.prompt_tokens / timings.prefill_seconds
    console.print(
        f"[dim]{model.spec.precision.params}, {model.kernels.backend}: prefill {prefill_rate:,.0f} tok/s, decode {decode_rate:,.0f} tok/s, "
        f"first token {1e3 * timings.first_token_seconds:.1f} ms, load {load_seconds:.1f} s, compile {timings.compile_seconds:.1f} s\n"
        f"device bytes {sum(sizes.values()) / 1e6:,.1f} MB; decode reads {achieved:.1f} GB/s of {ceiling:.1f} measured "
        f"({bound['percent']:.0f} %)[/dim]",
        highlight=False,
    )
    if args.json is None:
        return
    layers = engine.empty_state().layers
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
        bytes=sizes | {"kv": layers.k.nbytes + layers.v.nbytes},
        counters={"prompt_tokens": timings.prompt_tokens, "decode_tokens": timings.decode_tokens, "decode_steps": timings.decode_steps}
        | {"prefill_tokens_per_second": prefill_rate, "decode_tokens_per_second": decode_rate},
        bound=bound,
    )
    made["requests"] = [
        {"prompt_ids": list(r.prompt_ids), "ids": r.ids, "text": r.text, "finish_reason": r.finish_reason} for r in results
    ]
    record.write_record(args.json, made)


def main() -> int:
    """Runs; a user's error is one line and exit code 2."""
    args = tyro.cli(Arguments, description=__doc__)
    console = Console(stderr=True)
    try:
        run(args, console)
    except (ValueError, FileNotFoundError, json.JSONDecodeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
