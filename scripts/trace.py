"""Routing traces: `trace.py import` reads one of another program, `record` makes one, `replay` runs it through a cache, `report` says what it allows,
`advise` what to switch on. `pin` finds the experts of a model that had better never leave the device.

    python scripts/trace.py record [MODEL] --prompt TEXT | --prompt-file FILE --out TRACE.npz
    python scripts/trace.py replay TRACE --slots 12 --policy lfu
    python scripts/trace.py report TRACE --slots 12 24 --plots FOLDER
    python scripts/trace.py pin [MODEL] --prompt TEXT | --prompt-file FILE --out PINNED.json
    python scripts/trace.py advise TRACE --link-gbps 25 --step-ms 4 [--slots 12]
    python scripts/trace.py advise --model MODEL --prompt-file FILE [--link-gbps 25]
"""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("jaxmoe") is None:
    sys.path.insert(0, str(ROOT))

from rich.console import Console

from jaxmoe.report.command import run_command

DEFAULT_MODEL = ROOT / "checkpoints" / "default"
CACHE = Path.home() / ".cache" / "jaxmoe"


@dataclasses.dataclass(frozen=True)
class Import:
    """Imports a route trace that BigMoeOnEdge wrote."""

    csv: tyro.conf.Positional[Path]
    """The route trace."""
    out: tyro.conf.Positional[Path]
    """The trace to write, .npz."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """What a model reads, and how."""

    prompt: str | None = None
    """What the model reads."""
    prompt_file: Path | None = None
    """A file with one prompt a line: a batch."""
    dtype: str | None = None
    """float32 or bfloat16; float32 on the CPU and the checkpoint's own elsewhere if not given."""
    cache: Path = CACHE
    """Where converted checkpoints and compiled programs are kept."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record(Reading):
    """Runs a model and records which experts every token asked for."""

    out: Path
    """The trace to write, .npz."""
    model: tyro.conf.Positional[Path] = DEFAULT_MODEL
    """Hugging Face folder or converted folder."""
    max_new_tokens: int = 128
    """Tokens to generate per prompt, at most."""
    teacher_forced: bool = False
    """Record the prompts alone, as text that counts; nothing is generated."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pin(Reading):
    """Finds super experts, whose outputs are far larger than the others', for generate.py --pin-experts."""

    out: Path
    """The list to write, .json."""
    model: tyro.conf.Positional[Path] = DEFAULT_MODEL
    """Hugging Face folder or converted folder."""
    quantile: float = 0.995
    """Their largest output is above this quantile of all experts' (Super Experts),"""
    share: float = 0.1
    """and above this share of the largest of all."""
    layers: float = 1.0
    """Look only at the first so large a share of the layers that have experts; REAP takes 0.75."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """Runs a trace through a cache of experts, warmed by the prompt, and says how often what was asked for was there."""

    trace: tyro.conf.Positional[Path]
    """A trace, or a route trace's .csv."""
    slots: tuple[int, ...]
    """Experts that a layer holds: one number, or one a layer."""
    policy: Literal["lru", "lfu", "static", "arc", "fate", "edgemoe", "hobbit", "eam", "plec", "lookahead", "opt"] = "lfu"
    """What stays; opt knows the future."""
    profile: Path | None = None
    """A trace of the same model, by which static (the trace's own prompt if not given) and eam go, and to which a predictor is fitted."""
    predictor: Literal["frequency", "previous", "eam", "path", "readme", "oracle"] | None = None
    """What foretells routing, for plec and lookahead; recent rates if not given."""
    predictor_file: Path | None = None
    """A trained predictor (scripts/train.py predictor), for path and readme."""
    horizon: int = 1
    """Steps after the running one that the predictor is asked about; only the oracle knows more than one."""
    pin: Path | None = None
    """Experts that never leave once they are there, a file of trace.py pin."""
    cold: bool = False
    """Leave the prompt out instead of letting it warm the cache."""
    json: Path | None = None
    """Write the result to this file."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Says what a trace allows: hit rates of all policies, reuse, foresight, batches, slots by layer."""

    trace: tyro.conf.Positional[Path]
    """A trace, or a route trace's .csv."""
    slots: tuple[int, ...] = ()
    """Experts that a layer holds, to be compared; two and four times what a token uses if not given."""
    seed: int = 0
    """Of the random batches."""
    json: Path | None = None
    """Write the report to this file."""
    plots: Path | None = None
    """Draw into this folder (extra `plot`)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advise(Reading):
    """Says which policy, prefetching, slots and precision to use for a model, a machine and a kind of text, and how fast that will be. Reads a trace,
    or records one of --model; measures what is not given."""

    trace: tyro.conf.Positional[Path | None] = None
    """A trace, or a route trace's .csv."""
    model: Path | None = None
    """Hugging Face folder or converted folder, run to time its decode steps, and without a trace to record one."""
    max_new_tokens: int | None = None
    """Tokens to generate per prompt, at most; 128 if not given."""
    link_gbps: float | None = None
    """Speed of the link between host and device, 10^9 bytes per second; measured if not given."""
    step_ms: float | None = None
    """Milliseconds of a decode step with all experts on the device; measured with --model if not given."""
    slots: int | None = None
    """Experts that a layer holds; without this and --expert-memory several numbers are compared."""
    expert_memory: str | None = None
    """Device memory for experts, like 4GB or 25%."""
    predictor_file: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """A trained predictor to compare too (repeatable)."""
    alone: bool = False
    """Take each sequence of a trace of a batch by itself."""
    steps: int = 256
    """Decode steps that are looked at: the first eighth fills caches, then every other block chooses, and the others check."""
    json: Path | None = None
    """Write the comparison to this file."""


def check_out(path: Path) -> None:
    """Refuses a trace file that could not be written after the run."""
    from jaxmoe.report import record

    record.check_path(path, "a trace", ".npz")


def describe(trace, path: Path) -> str:
    """One line on a trace that was written."""
    about = f"{trace.layers} layers of {trace.experts} experts, {len(trace.ids)} tokens in {trace.n_steps} steps"
    return f"{path}: {trace.meta['model']}, {about}, {path.stat().st_size / 1e3:,.0f} kB"


def import_trace(args: Import, console: Console) -> None:
    """Reads a .csv and writes a trace."""
    from jaxmoe.offload.trace import import_csv, save

    check_out(args.out)
    trace = import_csv(args.csv)
    save(args.out, trace)
    console.print(describe(trace, args.out), highlight=False, markup=False, soft_wrap=True)


def replay_trace(args: Replay, console: Console) -> None:
    """Prints, and writes if asked to, what a policy did beside the optimum."""
    from jaxmoe.offload.knowledge import knowledge
    from jaxmoe.offload.replay import OPT, optimum, replay
    from jaxmoe.offload.super_experts import read_mask
    from jaxmoe.offload.trace import load_or_import
    from jaxmoe.report import record, trace_report
    from jaxmoe.residency import Knowledge, find_policy

    if args.json is not None:
        record.check_path(args.json)
    policy = find_policy(args.policy)
    if args.profile is not None and not (set(policy.needs) & {"profile", "patterns"} or args.predictor is not None):
        raise ValueError(f"--profile is for the static and eam policies and for predictors, not for {args.policy}")
    if args.predictor is not None and not policy.foresees:
        raise ValueError(f"--predictor is for plec and lookahead, not for {args.policy}")
    if args.predictor_file is not None and args.predictor not in ("path", "readme"):
        raise ValueError("--predictor-file is for the predictors path and readme")
    if args.pin is not None and args.policy == OPT:
        raise ValueError(f"--pin {args.pin}: opt is the bound of what a policy can do without pinned experts: choose another policy")
    trace = load_or_import(args.trace)
    pinned = None if args.pin is None else read_mask(args.pin, lambda read: read.check_trace(trace))
    other = None if args.profile is None else read_other(args.profile, trace)
    if other is None and "patterns" in policy.needs:
        raise ValueError("the eam policy goes by another trace of the model: give --profile")
    known = Knowledge(pinned=pinned) if other is None or args.policy == OPT else knowledge(other, policy, pinned=pinned)
    foreseen = None if args.predictor is None else foresee_trace(args, trace, other)
    found = replay(trace, args.slots, args.policy, warm=not args.cold, foreseen=foreseen, known=known)
    best = found if args.policy == OPT else optimum(trace, found, warm=not args.cold)
    made = trace_report.summary(found, best)
    console.print(trace_report.replay_tables(made))
    if args.json is not None:
        about = {"trace": trace_report.describe(trace), "warm": not args.cold, "versions": record.versions()}
        about |= {"pinned_experts": 0 if pinned is None else int(pinned.sum())}
        record.write_record(args.json, made | about)


def pin_experts(args: Pin, console: Console) -> None:
    """Reads prompts, finds the super experts, prints and writes them."""
    from jaxmoe.offload.super_experts import Criterion
    from jaxmoe.report import record

    prompts = read_prompts(args)
    record.check_path(args.out, "a list of pinned experts")
    criterion = Criterion(args.quantile, args.share, args.layers)

    from rich.table import Table

    from checkpoints.manifest import write_text
    from jaxmoe.engine.measuring import measure_experts
    from jaxmoe.offload.super_experts import pinned_experts, times_median
    from jaxmoe.report.opening import open_resident, prompt_requests

    ids = [request.prompt_ids for request in prompt_requests(args.model, prompts, 1)[1]]
    model = open_resident(args.model, args.dtype, args.cache)
    with Console(stderr=True).status("reading") as status:
        largest_LE = measure_experts(model, ids, lambda done, total: status.update(f"{done} of {total} prompts"))
    tokens, used = sum(map(len, ids)), int((largest_LE > 0).sum())
    found = pinned_experts(model.spec, model.spec.family, largest_LE, criterion, prompts=len(ids), tokens=tokens, used=used)
    write_text(args.out, found.to_json())
    table = Table("layer", "expert", "max |output|", "times the median", box=None)
    for layer, expert, largest in found.pinned:
        table.add_row(str(layer), str(expert), f"{largest:.4g}", f"{times_median(largest_LE)[layer, expert]:.3g}")
    console.print(table)
    about = f"{len(found.pinned)} of {largest_LE.size} experts are above {found.criterion['threshold']:.4g}; {tokens} tokens used {used}"
    console.print(f"{args.out}: {model.spec.family}, {about}", highlight=False, markup=False, soft_wrap=True)


def read_other(path: Path, trace):
    """Another trace of the same model."""
    from jaxmoe.offload.trace import MODEL_FIELDS, load_or_import

    other = load_or_import(path)
    for key in MODEL_FIELDS[:4]:
        if other.meta[key] != trace.meta[key]:
            raise ValueError(f"{path}: a trace of another model: its {key} is {other.meta[key]!r}, not {trace.meta[key]!r}")
    return other


def foresee_trace(args: Replay, trace, other):
    """What the predictor would have said at every step."""
    from jaxmoe.offload.predictors import find_predictor, foresee, sizes_of
    from jaxmoe.train import path_predictor

    name = args.predictor
    if name in path_predictor.NETS:
        if args.predictor_file is None:
            raise ValueError(f"the predictor {name!r} is trained: give --predictor-file, which scripts/train.py predictor writes")
        params = path_predictor.load(args.predictor_file, trace.meta, name)
    elif name == "oracle":
        params = find_predictor(name).fit([trace], 0, horizon=args.horizon)
    elif name == "eam":
        if other is None:
            raise ValueError("the predictor 'eam' goes by another trace of the model: give --profile")
        params = find_predictor(name).fit([other], 0)
    else:
        params = find_predictor(name).fit([] if other is None else [other], 0, sizes=sizes_of(trace))
    return foresee(find_predictor(name), params, trace, args.horizon)


def report_trace(args: Report, console: Console) -> None:
    """Prints, and writes and draws if asked to, all that a trace allows to be said."""
    from jaxmoe.offload.trace import load_or_import
    from jaxmoe.report import record, trace_report

    if args.json is not None:
        record.check_path(args.json)
    if args.plots is not None:
        trace_report.check_plots(args.plots)
    trace = load_or_import(args.trace)
    with Console(stderr=True).status("reading") as status:
        made = trace_report.report(trace, args.slots, args.seed, status.update)
    console.print(trace_report.report_tables(made))
    if args.json is not None:
        record.write_record(args.json, made | {"versions": record.versions()})
    if args.plots is not None:
        for path in trace_report.plots(made, args.plots):
            console.print(str(path), highlight=False, markup=False, soft_wrap=True)


def advise_trace(args: Advise, console: Console) -> None:
    """Prints, and writes if asked to, all ways compared and the one advised."""
    check_advise(args)  # before anything takes long

    from jaxmoe.experts.planes import plane_format
    from jaxmoe.offload import advise
    from jaxmoe.offload.sequences import by_sequence
    from jaxmoe.offload.trace import concatenate
    from jaxmoe.report import advice, record
    from jaxmoe.report.expert_report import measure_link

    trace, spec, trained, step = read_or_record(args)
    link = args.link_gbps or measure_link(int(trace.expert_bytes.max()))
    if link is None:
        raise ValueError("no link to measure")  # `check_advise` has seen to it
    machine = advise.Machine(link, step)
    trace = concatenate(by_sequence(trace)) if args.alone else trace
    try:
        shares = {} if spec is None else advise.bits_shares(plane_format(spec))
    except ValueError:  # widths that few bits don't come at
        shares = {}
    slots = slots_asked(args, trace, spec)
    with Console(stderr=True).status("replaying") as status:
        made = advise.compare(trace, slots, machine, trained, most_steps=args.steps, shares=shares, progress=status.update)
    found = advise.enough(made)
    files = {kind: file for file, kind in zip(args.predictor_file, trained, strict=True)}
    console.print(advice.table(found))
    if len(made) > 1:
        console.print(advice.sizes_table(made, found))
    console.print(found.describe(), highlight=False, markup=False, soft_wrap=True)
    about = f"for a link of {machine.link_gbps:.3g} GB/s and steps of {1e3 * machine.step_seconds:.3g} ms"
    console.print(f"{about}: generate.py {found.options(files)}", highlight=False, markup=False, soft_wrap=True)
    if args.json is not None:
        record.write_record(args.json, advice.as_json(found, made, files) | {"versions": record.versions()})


def check_advise(args: Advise) -> None:
    """Refuses what lacks something, or has something that nothing would read."""
    import jax

    from jaxmoe.offload import advise, budget
    from jaxmoe.report import record

    if args.json is not None:
        record.check_path(args.json)
    if args.trace is None and args.model is None:
        raise ValueError("give a trace, or --model to record one of")
    if args.step_ms is None and args.model is None:
        raise ValueError("give --step-ms, or --model to measure it")
    if args.model is None and args.dtype is not None:
        raise ValueError(f"--dtype {args.dtype} goes with --model")
    recorded = {"--prompt": args.prompt, "--prompt-file": args.prompt_file, "--max-new-tokens": args.max_new_tokens}
    for option, value in recorded.items() if args.trace is not None else ():
        if value is not None:
            raise ValueError(f"{option} {value} is for recording a trace, and {args.trace} is one: leave out either")
    if args.trace is None:
        read_prompts(args)
    if args.slots is not None and args.expert_memory is not None:
        raise ValueError("give either --slots or --expert-memory, or neither")
    if args.expert_memory is not None and budget.parse_memory(args.expert_memory).kind == "auto" and args.model is None:
        raise ValueError("--expert-memory auto needs --model, whose other weights take memory too")
    if len({file.name for file in args.predictor_file}) < len(args.predictor_file):
        raise ValueError("--predictor-file is given twice: give each once")
    if args.link_gbps is None and jax.default_backend() == "cpu":
        raise ValueError("a CPU's experts cross no link that could be measured: give --link-gbps, of the machine that the advice is for")
    advise.Machine(1.0 if args.link_gbps is None else args.link_gbps, 1.0 if args.step_ms is None else args.step_ms / 1e3)


def read_or_record(args: Advise) -> tuple:
    """The trace, the model's spec where there is a model, trained predictors by name, and seconds of a decode step."""
    from checkpoints.load import read_spec
    from jaxmoe.engine import observing
    from jaxmoe.offload.trace import check_model, load_or_import, model_meta
    from jaxmoe.report.opening import check_rows, model_dtype, open_resident, prompt_requests
    from jaxmoe.train import path_predictor

    trace = None if args.trace is None else load_or_import(args.trace)
    spec = None if args.model is None else read_spec(args.model).with_precision(model_dtype(args.model, args.dtype))
    meta = model_meta(spec, spec.family, "") if trace is None else trace.meta
    trained = {params.kind: params for params in (path_predictor.load(file, meta) for file in args.predictor_file)}
    if trace is not None and spec is not None:
        try:
            check_model(trace, spec)
        except ValueError as error:
            raise ValueError(f"{args.trace}: {error}") from error
        trace = dataclasses.replace(trace, meta=trace.meta | {"expert_bytes": list(spec.expert_bytes())})  # in the dtype that is to run
    if trace is not None and args.step_ms is not None:
        return trace, spec, trained, args.step_ms / 1e3
    prompts = read_prompts(args) if trace is None else ["The"] * rows_of(trace)  # for the time of a step any text will do
    tokenizer, requests = prompt_requests(args.model, prompts, 128 if args.max_new_tokens is None else args.max_new_tokens)
    check_rows(len(requests))
    model = open_resident(args.model, args.dtype, args.cache)
    with Console(stderr=True).status("generating") as status:
        trace = observing.observed(model, requests, tokenizer.eos_ids, ahead=True) if trace is None else trace
        status.update("timing")
        alike = requests[:1] if args.alone else requests
        step = observing.step_seconds(model, alike) if args.step_ms is None else args.step_ms / 1e3
    return trace, spec, trained, step


def rows_of(trace) -> int:
    """Sequences that most decode steps of a trace have."""
    import numpy as np

    from jaxmoe.offload.trace import PROMPT

    _, counts = np.unique(trace.step[trace.phase != PROMPT], return_counts=True)
    return int(np.median(counts)) if len(counts) else 1


def slots_asked(args: Advise, trace, spec) -> tuple[int, ...]:
    """One number, or several to be compared where no amount of memory is given."""
    from jaxmoe.engine.memory import free_device_bytes
    from jaxmoe.offload import advise, budget

    if args.slots is not None:
        return (args.slots,)
    if args.expert_memory is None:
        return advise.sizes_to_compare(trace)
    amount = budget.parse_memory(args.expert_memory)
    free = free_device_bytes(budget.ExpertShapes.from_spec(spec), spec.max_positions) if amount.kind == "auto" else None
    return (advise.slots_for(trace, amount, free),)


def read_prompts(args: Reading) -> list[str]:
    """The prompts from the argument or the file."""
    from jaxmoe.report.opening import prompt_lines

    if (args.prompt is None) == (args.prompt_file is None):
        raise ValueError("give either --prompt or --prompt-file")
    prompts = prompt_lines(args.prompt_file) if args.prompt_file is not None else [args.prompt] if args.prompt else []
    if not prompts:
        raise ValueError("there is no prompt")
    return prompts


def record_trace(args: Record, console: Console) -> None:
    """Generates greedily, or reads the prompts alone, and writes what was routed where."""
    from jaxmoe.engine import observing
    from jaxmoe.offload.trace import as_teacher_forced, save
    from jaxmoe.report.opening import check_rows, open_resident, prompt_requests

    prompts = read_prompts(args)
    check_out(args.out)
    tokenizer, requests = prompt_requests(args.model, prompts, 1 if args.teacher_forced else args.max_new_tokens)
    check_rows(len(requests))
    model = open_resident(args.model, args.dtype, args.cache)
    with Console(stderr=True).status("generating"):
        trace = observing.observed(model, requests, tokenizer.eos_ids)
    save(args.out, as_teacher_forced(trace) if args.teacher_forced else trace)
    console.print(describe(trace, args.out), highlight=False, markup=False, soft_wrap=True)


COMMANDS = {Import: import_trace, Record: record_trace, Pin: pin_experts, Replay: replay_trace, Report: report_trace, Advise: advise_trace}


def main() -> int:
    """Runs; gives the exit code."""
    chosen = tyro.cli(
        Annotated[Import, tyro.conf.subcommand("import")]
        | Annotated[Record, tyro.conf.subcommand("record")]
        | Annotated[Pin, tyro.conf.subcommand("pin")]
        | Annotated[Replay, tyro.conf.subcommand("replay")]
        | Annotated[Report, tyro.conf.subcommand("report")]
        | Annotated[Advise, tyro.conf.subcommand("advise")],  # type: ignore[arg-type]
        description=__doc__,
    )
    return run_command(lambda: COMMANDS[type(chosen)](chosen, Console()))


if __name__ == "__main__":
    sys.exit(main())
