"""Requests that come when they come, at several rates: what readers see, and how many of them are served within limits.

Two arms in this process, on the same requests over the same emulated link: layers by groups with sequences put aside by swapping, beside chunks with
sequences computed again. Or a server that runs, over HTTP, beside itself with one request at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Column, Table

from jaxmoe.engine.generate import Sampling
from jaxmoe.engine.model import Model
from jaxmoe.engine.serving.core import ServingEngine
from jaxmoe.engine.serving.requests import ServeRequest
from jaxmoe.engine.serving.scheduler import Policy
from jaxmoe.engine.serving.types import ServeSpec
from jaxmoe.offload.link import Link
from jaxmoe.report import record, serve_http, serve_load, serve_stats
from jaxmoe.report.serve_drive import Sent, check_drive, drive, loads
from jaxmoe.report.serve_load import Job, Sizes
from jaxmoe.report.serve_setups import Texts, host_engine
from jaxmoe.report.serve_stats import Limits, Served

NAME = "serve_open"
CONTROL, OWN = "chunked, recompute", "layered, swap"
POLICIES = {CONTROL: Policy(prefill="chunked", preemption="recompute", keep=False), OWN: Policy()}
INPUTS, OUTPUTS = dataclasses.replace(serve_load.CHAT_IN, most=1024), Sizes(24, 0.9, 2, 96)
"""Prompts as of conversations, clipped where a small model's positions end; answers a seventh as long, so that a run on a CPU takes minutes."""
TTFT_TIMES, TPOT_TIMES = 5.0, (2.0, 4.0)
"""Limits, as multiples of what a request gets that is alone (DistServe's way, OSDI 2024)."""
ALONE = 8
"""Requests that are sent one at a time, for the limits."""
RATIOS = {"ttft": ("mean", "p90", "p99"), "tpot": ("mean", "p90"), "itl": ("p99", "max")}
Tell = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Load:
    """What is sent. Attributes: `requests` of a run; `inputs`, `outputs` lengths; `seed`."""

    requests: int
    inputs: Sizes = INPUTS
    outputs: Sizes = OUTPUTS
    seed: int = 0

    def jobs(self, rate: float, vocabulary: int) -> list[Job]:
        """At a rate, of ids below `vocabulary`; the same requests at every rate."""
        return list(serve_load.chat(self.requests, rate, self.seed, 1.0, self.inputs, self.outputs, vocabulary).jobs)


def spec_of(load: Load, slots: int = 8, page: int = 32, chunk: int = 256, wave: int = 1024, groups: int = 4) -> ServeSpec:
    """Sizes of both arms: pages for half of what the running sequences may come to, so that some are put aside. No prefix is found again, since the
    same requests come at every rate."""
    positions = -(-(load.inputs.most + load.outputs.most) // page) * page
    pages = slots * positions // page
    few = max(pages // 2, positions // page)
    return ServeSpec(slots, page, few, positions, slots, chunk, wave, groups, burst=1, run=page, host_pages=pages, sharing=False)


# --- In this process


def sent_of(jobs: Sequence[Job], texts: Texts | None) -> list[Sent]:
    """Jobs as requests, with passages of a text in the place of their ids if there is one."""
    out = []
    for i, job in enumerate(jobs):
        ids = job.prompt if texts is None else texts(i, job.tokens)
        assert not isinstance(ids, int)
        out.append(Sent(ServeRequest(tuple(ids), job.new, Sampling(1.0, seed=job.seed), ignore_eos=True, user=job.user), job.arrival))
    return out


def alone(engine: ServingEngine, sent: Sequence[Sent]) -> list[Served]:
    """Requests one at a time."""
    return [drive(engine, [dataclasses.replace(one, at=0.0)]).served[0] for one in sent]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An arm that can run. Attributes: `engine`; `link` of its own; `seconds` that its programs took to compile."""

    engine: ServingEngine
    link: Link
    seconds: float = 0.0


def prepare(
    model: Model, records: Any, texts: Texts | None, gbps: float, load: Load, spec: ServeSpec, tell: Tell = lambda what: None
) -> dict[str, Prepared]:
    """Both arms, warmed up: everything compiled, and run once with nothing to wait for.

    Args:
        model: with slots for some of its experts.
        records: all experts'.
        texts: what prompts say; random ids without it.
        gbps: of the emulated link of each.
        load: see there.
        spec: sizes.
        tell: is told what comes next.
    """
    out, flood = {}, sent_of(load.jobs(math.inf, model.spec.vocab), texts)
    for name, policy in POLICIES.items():
        link = Link(gbps)
        engine = host_engine(model, records, spec, policy, link)
        seconds = engine.warm_up(lambda what, name=name: tell(f"{name}: compiling {what}"))  # type: ignore[misc]
        tell(f"{name}: rehearsal")
        link.gbps = None
        drive(engine, flood)
        alone(engine, flood[:ALONE])
        link.gbps = gbps
        out[name] = Prepared(engine, link, seconds)
    return out


def open_records(
    prepared: Mapping[str, Prepared], texts: Texts | None, load: Load, rates: Sequence[float], about: Mapping[str, Any],
    tell: Tell = lambda what: None,
) -> Iterator[list[dict[str, Any]]]:  # fmt: skip
    """Both arms at every rate, in turn.

    Args:
        prepared: of `prepare`.
        texts, load: as there.
        rates: parts of what the control bears when all requests are there at once.
        about: settings for the records.
        tell: is told what comes next.

    Yields:
        After each rate, a record an arm.

    Raises:
        RuntimeError: a program was compiled while something was measured, or arms gave different tokens on a CPU.
    """
    control, spec = prepared[CONTROL].engine, prepared[CONTROL].engine.spec
    model = control.runner.model
    flood = sent_of(load.jobs(math.inf, model.spec.vocab), texts)
    tell(f"{CONTROL}: one at a time, then all at once")
    single = alone(control, flood[:ALONE])
    within = [serve_stats.limits_of(single, TTFT_TIMES, times) for times in TPOT_TIMES]
    capacity = load.requests / check_drive(drive(control, flood), "all at once").seconds
    for turn, part in enumerate(rates):
        rate = part * capacity
        sent = sent_of(load.jobs(rate, model.spec.vocab), texts)
        runs, moved = {}, {}
        for name in list(prepared)[:: 1 if turn % 2 == 0 else -1]:
            tell(f"{name}: {rate:.3g} requests a second")
            engine = prepared[name].engine
            before = loads(engine)["all"]
            runs[name] = check_drive(drive(engine, sent), f"{name}, {rate:.3g} requests a second")
            moved[name] = (loads(engine)["all"] - before) * model.bank.record_bytes
        if model.kernels.backend == "cpu" and runs[OWN].tokens != runs[CONTROL].tokens:
            raise RuntimeError(f"{rate:.3g} requests a second: the arms gave different tokens")
        out = []
        for name, one in prepared.items():
            settings = dict(about) | {"arm": name, "control": CONTROL, "link_gbps": one.link.gbps, "link_emulated": True, "part_of_capacity": part}
            settings |= {"capacity": capacity, "slots": spec.slots, "pages": spec.pages, "host_pages": spec.host_pages}
            found = summaries(runs[name].served, within, rate) | {"compiles": runs[name].compiles}
            if name != CONTROL:
                found |= ratios(runs[name].served, runs[CONTROL].served, within)
            out.append(_record(runs[name].served, rate, settings, found, load, model.spec.hash(), one.seconds, {"link": moved[name]}))
        yield out


# --- A server


def url_records(
    server: serve_http.Server, load: Load, rates: Sequence[float], tell: Tell = lambda what: None, vocabulary: int = 1000
) -> Iterator[list[dict[str, Any]]]:
    """A server at every rate, beside itself with one request at a time.

    Args:
        server: its model's name is asked for if it has none.
        load: see there; prompts are ids below `vocabulary`.
        rates: requests a second.
        tell: is told what comes next.
        vocabulary: as many as any model's.

    Yields:
        The record of each rate.

    Raises:
        ValueError: the server answers no request in full; says what it answers.
        OSError: it can't be reached.
    """
    server = server if server.model else serve_http.find_model(server)
    tell("one at a time")
    single, wrong = serve_http.send_all(server, load.jobs(math.inf, vocabulary)[:ALONE], together=False)
    if not any(s.done for s in single):
        raise ValueError(f"{server.url} answered none of {len(single)} requests in full: {'; '.join(wrong)[:300]}")
    within = [serve_stats.limits_of([s for s in single if s.done], TTFT_TIMES, times) for times in TPOT_TIMES]
    for turn, rate in enumerate(rates):
        tell(f"{rate:.3g} requests a second")
        others = dataclasses.replace(load, seed=load.seed + turn + 1)  # the server may keep prefixes
        served, wrong = serve_http.send_all(server, others.jobs(rate, vocabulary), tell=lambda n, r=rate: tell(f"{r:.3g} a second: {n} sent"))  # type: ignore[misc]
        settings = {"arm": "server", "control": "one at a time", "model": server.model, "over": "http", "problems": [w[:200] for w in wrong[:8]]}
        found = summaries(served, within, rate) | ratios(served, single, within)
        yield [_record(served, rate, settings, found, load, "", 0.0, {})]


# --- Records


def summaries(served: Sequence[Served], within: Sequence[Limits], rate: float) -> dict[str, Any]:
    """`serve_stats.summary` within the first limits; attainment and goodput within the others as well, and all by their multiples of TPOT."""
    out: dict[str, Any] = serve_stats.summary(served, within[0]) | {"rate": rate}
    for times, limit in zip(TPOT_TIMES, within, strict=True):
        found = serve_stats.summary(served, limit)
        out[f"tpot_x{times:g}"] = {name: found[name] for name in ("limits", "attainment", "goodput")}
    return out


def ratios(served: Sequence[Served], control: Sequence[Served], within: Sequence[Limits]) -> dict[str, float]:
    """"number / control" -> ratio; those whose control is 0 or was not measured are left out."""
    own, other = (serve_stats.summary(some, within[0]) for some in (served, control))
    pairs = {f"{what} {which}": (own[what].get(which), other[what].get(which)) for what, each in RATIOS.items() for which in each}
    pairs["tokens_per_second"] = own["tokens_per_time"], other["tokens_per_time"]
    for times, limit in zip(TPOT_TIMES, within, strict=True):
        pairs[f"goodput, tpot x{times:g}"] = tuple(serve_stats.summary(some, limit)["goodput"] for some in (served, control))  # type: ignore[assignment]
    return {f"{name} / control": float(a / b) for name, (a, b) in pairs.items() if a is not None and b}


def _record(
    served: Sequence[Served], rate: float, settings: Mapping[str, Any], found: Mapping[str, Any], load: Load, spec_hash: str, seconds: float,
    bytes: Mapping[str, int],
) -> dict[str, Any]:  # fmt: skip
    values: dict[str, list[float | None]] = {"ttft": [s.ttft for s in served], "tpot": [s.tpot for s in served]}
    values["itl"] = [gap for s in served for gap in s.gaps]
    timings = {name: record.timing(there) for name, each in values.items() if (there := [value for value in each if value is not None])}
    sizes = {"requests": load.requests, "inputs": dataclasses.asdict(load.inputs), "outputs": dataclasses.asdict(load.outputs), "rate": rate}
    return record.make_record(
        name=NAME, spec_hash=spec_hash, settings=dict(settings) | sizes, seeds={"load": load.seed}, timings=timings, compile_seconds=seconds,
        bytes=bytes, counters=found, bound=record.make_bound("capacity", rate, float(found["goodput"]), "requests/s"),
    )  # fmt: skip


def stem(made: Mapping[str, Any]) -> str:
    """Of the record's file."""
    s = made["settings"]
    return f"{NAME}-{s['model']}-{s['arm']}-{s.get('part_of_capacity', s['rate']):g}"


def table(made: Sequence[Mapping[str, Any]]) -> Table:
    """Records as a table: seconds, and shares of requests within limits, by the multiple of TPOT."""
    names = ("arm", "req/s", "done", "TTFT p50", "p99", "TPOT p50", "p99", "ITL p99", *(f"in x{t:g}" for t in TPOT_TIMES))
    out = Table(*(Column(name, no_wrap=True) for name in names), box=SIMPLE, padding=(0, 1, 0, 0))
    for r in made:
        c = r["counters"]
        shown = (("ttft", "p50"), ("ttft", "p99"), ("tpot", "p50"), ("tpot", "p99"), ("itl", "p99"))
        numbers = [c[what].get(which, math.nan) for what, which in shown]
        shares = [f"{100 * c[f'tpot_x{t:g}']['attainment']:.0f} %" for t in TPOT_TIMES]
        out.add_row(r["settings"]["arm"], f"{c['rate']:.3g}", f"{c['done']}/{c['requests']}", *(f"{n:.3f}" for n in numbers), *shares)
    return out


def best(made: Sequence[Mapping[str, Any]], times: float, target: float = 0.9) -> dict[str, float]:
    """By arm the highest rate that was tried at which so many requests kept their limits; 0 where none was."""
    out: dict[str, float] = {}
    for r in made:
        kept = r["counters"][f"tpot_x{times:g}"]["attainment"] >= target
        out[r["settings"]["arm"]] = max(out.get(r["settings"]["arm"], 0.0), r["counters"]["rate"] if kept else 0.0)
    return out
