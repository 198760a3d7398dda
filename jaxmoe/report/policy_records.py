"""Records of the benchmarks of policies and predictors: what `scripts/bench_policies.py` runs, and the files that it writes."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxmoe.experts.lossy import STORED, Lossy
from jaxmoe.offload.ladder import replay_ladder
from jaxmoe.offload.trace import Trace, concatenate
from jaxmoe.report import event_bench, policy_bench, predictor_bench, record
from jaxmoe.report.policy_bench import Fold, Part, Tell
from jaxmoe.train import path_predictor

BENCHES = ("policies", "predictors", "batches", "events")

HOBBIT = Lossy(high=0.6, low=0.9, low_bits=4)
"""HOBBIT's thresholds (arXiv 2411.01433)."""

LOW_SHARE = 0.25
"""Bytes of an expert at 4 bits, of those at 16."""


@dataclasses.dataclass
class Given:
    """What benchmarks are run on.

    Attributes:
        domains: traces of one model, by domain.
        single: traces of one prompt each.
        fitted: folder of trained predictors; None for none.
        steps, seed: of the training, and the seed of all.
    """

    domains: Mapping[str, Trace]
    single: Sequence[Trace]
    fitted: Path | None = None
    steps: int = 300
    seed: int = 0

    @functools.cached_property
    def folds(self) -> list[Fold]:
        """Two halves of the domains."""
        return policy_bench.folds(self.domains, self.seed)

    @functools.cached_property
    def params(self) -> list[dict[str, Any]]:
        """Predictors fitted to each half."""
        return [policy_bench.fit_predictors(fold, self._train) for fold in self.folds]

    @functools.cached_property
    def parts(self) -> list[Part]:
        """The halves, with what predictors say of them."""
        return [policy_bench.part_of(fold, params) for fold, params in zip(self.folds, self.params, strict=True)]

    def _train(self, traces: Mapping[str, Trace], kind: str, fold: int) -> path_predictor.Fitted:
        meta = next(iter(traces.values())).meta
        path = None if self.fitted is None else self.fitted / f"{kind}-{self.steps}-{fold}-{_fingerprint(self.seed, traces):08x}.npz"
        if path is not None and path.exists():
            return path_predictor.load(path, meta, kind)
        found = path_predictor.train(list(traces.values()), kind, path_predictor.FitSettings(steps=self.steps), self.seed)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path_predictor.save(path, found, meta)
        return found


def _fingerprint(seed: int, traces: Mapping[str, Trace]) -> int:
    """Of what a predictor is trained on, so that another's is not taken for it."""
    return zlib.crc32(repr((seed, [(name, trace.tokens.tobytes()) for name, trace in sorted(traces.items())])).encode())


def write(name: str, given: Given, folder: Path, tell: Tell = lambda what: None) -> list[Path]:
    """Runs one of `BENCHES` and writes its records.

    Args:
        name: which.
        given: what it is run on.
        folder: for the records.
        tell: is told what is done next.

    Returns:
        The files.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: there is no such folder for records")
    tell(f"{name}: what predictors learn")
    paths = []
    for label, meta, settings, found in _RUNS[name](given, tell):
        path = folder / f"{name}-{label}.json"
        record.write_record(path, _record(name, meta, settings, found, given.seed))
        paths.append(path)
    return paths


Made = tuple[str, Mapping[str, Any], dict[str, Any], dict[str, Any]]
"""A file's label, the trace's meta data, settings, and what was found."""


def _record(name: str, meta: Mapping[str, Any], settings: dict[str, Any], found: dict[str, Any], seed: int) -> dict[str, Any]:
    bound = found.pop("bound")
    about = {"model": meta["model"], "layers": meta["layers"], "experts": meta["experts"], "active": meta["active"]}
    seeds, size = {"halves": seed, "bootstrap": 0}, {"expert": int(meta["expert_bytes"][0])}
    return record.make_record(name, meta["spec_hash"] or "", about | settings, seeds, {}, 0.0, size, found, bound)


def _capacity(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """LFU, the default, beside the optimum of the same slots, at the second number of slots that was compared."""
    slots = sorted({row["slots"] for row in rows})
    at = slots[min(1, len(slots) - 1)]
    hit = {row["policy"]: row["hit"] for row in rows if row["slots"] == at and row["variant"] == ""}
    return record.make_bound("capacity", hit["opt"], hit["lfu"], f"hit rate at {at} slots a layer")


def _first(given: Given) -> Mapping[str, Any]:
    return next(iter(given.domains.values())).meta


def label_of(meta: Mapping[str, Any]) -> str:
    """A file's part of its name."""
    return str(meta["model"]).lower().replace("_", "-").replace("/", "-")


def _domains(given: Given) -> dict[str, Any]:
    """Settings of runs on all domains."""
    meta = _first(given)
    return {
        "domains": sorted(given.domains), "halves": [sorted(fold.judged) for fold in given.folds], "training_steps": given.steps,
        "prompts": sum(t.meta.get("prompts", 1) for t in given.domains.values()), "prompt_tokens": meta.get("prompt_tokens"),
        "new_tokens": meta.get("new_tokens"), "interval": "95 %, bootstrap over prompts, 1,000 draws",
    }  # fmt: skip


SINGLE = {"prompts": 1, "interval": "95 %, bootstrap over blocks of 16 decode steps, 1,000 draws"}


def _policies(given: Given, tell: Tell) -> Iterator[Made]:
    rows = policy_bench.policies(given.parts, tell)
    slots = sorted({row["slots"] for row in rows})
    mixes = {str(count): [[round(weight, 4) for weight in policy_bench.mix(part, count)] for part in given.parts] for count in slots}
    yield "domains", _first(given), _domains(given), {"rows": rows, "hobbit_mix": mixes, "bound": _capacity(rows)}
    for trace in given.single:
        rows = policy_bench.policies([policy_bench.alone(trace)], functools.partial(_of, tell, trace))
        yield label_of(trace.meta), trace.meta, {"source": trace.meta["source"], **SINGLE}, {"rows": rows, "bound": _capacity(rows)}


def _of(tell: Tell, trace: Trace, what: str) -> None:
    tell(f"{trace.meta['model']}: {what}")


def _predictors(given: Given, tell: Tell) -> Iterator[Made]:
    rows = predictor_bench.on_domains(given.folds, given.params, tell)
    yield "domains", _first(given), _domains(given), {"rows": rows, "bound": _recall_bound(rows)}
    for trace in given.single:
        _of(tell, trace, "recall")
        rows = predictor_bench.on_one(trace)
        yield label_of(trace.meta), trace.meta, {"source": trace.meta["source"], **SINGLE}, {"rows": rows, "bound": _recall_bound(rows)}


def _recall_bound(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    best = max((row for row in rows if row["distance"] == 1), key=lambda row: row["k"][0])
    return record.make_bound("capacity", 1.0, best["k"][0], f"recall at k, {best['predictor']}")


def _batches(given: Given, tell: Tell) -> Iterator[Made]:
    meta = _first(given)
    slots = [ratio * meta["active"] for ratio in (2, 4) if ratio * meta["active"] < meta["experts"]]
    rows = policy_bench.batches(given.parts, slots, tell=tell)
    ahead = policy_bench.ahead_rows(given.parts, slots, tell=tell)
    yield "domains", meta, _domains(given), {"rows": rows, "ahead": ahead, "bound": _capacity([r for r in rows if r["batch"] == 4])}


def _events(given: Given, tell: Tell) -> Iterator[Made]:
    trace = given.single[0]
    rows = event_bench.by_recall(trace, tell=tell)
    ladder = [_ladder(t.meta["model"], t, tell) for t in given.single]
    ladder.append(_ladder("recorded domains", concatenate(list(given.domains.values())), tell))
    at = max(row["gain"] for row in rows)
    bound = record.make_bound("overlapped", at, max(row["gain"] for row in rows if row["recall"] <= 0.8), "times the speed without prefetching")
    settings = {"source": trace.meta["source"], "front": event_bench.FRONT, "steps": event_bench.STEPS, "policy": "lfu"}
    yield label_of(trace.meta), trace.meta, settings, {"rows": rows, "ladder": ladder, "bound": bound}
    fold, fitted = given.folds[0], given.params[0]
    meta = _first(given)
    names = [n for n in ("frequency", "path", "gate") if n in fitted and (n != "gate" or next(iter(fold.judged.values())).gates is not None)]
    params = {name: fitted[name] for name in names} | {"oracle": None}
    found = event_bench.by_predictor(list(fold.judged.values()), params, 2 * meta["active"], tell=tell)
    most = {name: max(row["speed"] for row in found if row["predictor"] == name) for name in params}
    bound = record.make_bound("overlapped", most["oracle"], most.get("gate", most["oracle"]), "times LFU without prefetching")
    run = {"front": event_bench.FRONT, "judged": sorted(fold.judged), "prompts": event_bench.SAMPLE, "widths": list(event_bench.WIDTHS)}
    yield "domains", meta, _domains(given) | run, {"rows": found, "bound": bound}


def _ladder(name: str, trace: Trace, tell: Tell) -> dict[str, Any]:
    """HOBBIT's thresholds at twice and four times the experts of a token."""
    out: dict[str, Any] = {"model": name, "active": trace.meta["active"]}
    for ratio in (2, 4):
        tell(f"ladder, {name}, {ratio} k slots")
        found = replay_ladder(trace, ratio * trace.meta["active"], "lfu", HOBBIT)
        missed = [n / sum(found.missed) for n in found.missed]
        run = found.miss_byte_ratio(lambda bits: 1.0 if bits == STORED else LOW_SHARE, of_run=True)
        out[f"{ratio}k"] = {"missed": [round(share, 4) for share in missed], "ratio": round(found.missed_ratio(LOW_SHARE), 4), "run": round(run, 4)}
    return out


_RUNS: dict[str, Callable[[Given, Tell], Iterator[Made]]] = {
    "policies": _policies, "predictors": _predictors, "batches": _batches, "events": _events,
}  # fmt: skip
