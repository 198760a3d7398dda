"""Routing traces: which experts every token of a run asked for, on disk as one .npz file.

A trace knows layers by their place among the layers that have experts. Recorders feed a `TraceBuilder`; `replay` and `bounds` read `used_steps`.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import ArrayLike, Bool, Float16, Int16, Int32, UInt8

from jaxmoe.spec import ModelSpec

FORMAT = "jaxmoe-trace"
VERSION = 1
PROMPT, DECODE, TEACHER_FORCED = 0, 1, 2
PHASES = ("prompt", "decode", "teacher-forced")
MODEL_FIELDS = ("model", "spec_hash", "layers", "experts", "active", "expert_bytes")
CSV_COLUMNS = ("turn", "phase", "step", "layer", "slot", "expert", "weight", "residency", "expert_bytes")
_DTYPES = {"ids": np.int16, "weights": np.float16, "tokens": np.int32, "sequence": np.int32, "phase": np.uint8, "step": np.int32}

AHEAD, WIDTH = 4, 3
"""Of `Trace.gates`: layers ahead, and times as many ids as a token uses."""


@dataclasses.dataclass(frozen=True)
class Trace:
    """What was routed where.

    Attributes:
        ids: the experts that each token asked for; -1 is none.
        weights: the router's weights of them.
        tokens: vocabulary ids; -1 where they are not known.
        sequence: which sequence each token belongs to.
        phase: `PROMPT`, `DECODE` or `TEACHER_FORCED`.
        step: never decreasing. The tokens of one decode step of a batch share a number; every other token has its own.
        gates: the ids that each layer's gates would choose for the layers 1 to K = `AHEAD` further, W = `WIDTH` * A of them, best first; -1 past the
            last layer and where there are no more experts (`jaxmoe.routing.ahead.chosen_ahead`). None if they were not recorded.
        meta: model, spec_hash (None if not known), layers, experts, active, expert_bytes [L], and what else the recorder has to say (source, ...).

    Raises:
        ValueError: shapes that don't belong together, ids outside the experts, a step that goes back or mixes phases; it names which and where.
    """

    ids: Int16[np.ndarray, "T L A"]
    weights: Float16[np.ndarray, "T L A"]
    tokens: Int32[np.ndarray, "T"]
    sequence: Int32[np.ndarray, "T"]
    phase: UInt8[np.ndarray, "T"]
    step: Int32[np.ndarray, "T"]
    meta: Mapping[str, Any]
    gates: Int16[np.ndarray, "T L K W"] | None = None

    def __post_init__(self):
        _check(self)

    def columns(self) -> dict[str, np.ndarray]:
        """Its arrays by name, each with a row a token; `gates` only if they were recorded."""
        return {name: getattr(self, name) for name in _DTYPES} | ({} if self.gates is None else {"gates": self.gates})

    def take(self, tokens: np.ndarray, **changes: np.ndarray) -> Trace:
        """The tokens that an index or a mask chooses, with some of the arrays replaced by others of that length."""
        return Trace(**({name: column[tokens] for name, column in self.columns().items()} | changes), meta=self.meta)

    @property
    def layers(self) -> int:
        """Layers that have experts (L)."""
        return self.ids.shape[1]

    @property
    def experts(self) -> int:
        """Experts of a layer (E)."""
        return self.meta["experts"]

    @property
    def expert_bytes(self) -> np.ndarray:
        """int64 [L], bytes of one expert of each layer."""
        return np.asarray(self.meta["expert_bytes"], np.int64)

    @property
    def n_steps(self) -> int:
        """Distinct steps (S)."""
        return len(np.unique(self.step))


def model_hash(spec: ModelSpec) -> str:
    """The spec's hash whatever its precision, for a model held in bfloat16 is the same model."""
    return spec.with_precision("float32").hash()


def model_meta(spec: ModelSpec, model: str, source: str, **more: Any) -> dict[str, Any]:
    """The meta data of a trace of `spec`.

    Args:
        spec: the model that ran.
        model: a name for people.
        source: what text it ran on, for people.
        more: further JSON values.
    """
    router, _ = spec.moe
    sizes = {"layers": len(spec.moe_layers), "experts": router.experts, "active": router.active, "expert_bytes": list(spec.expert_bytes())}
    return {"model": model, "spec_hash": model_hash(spec), **sizes, "source": source, **more}


def _check(trace: Trace) -> None:
    missing = [key for key in MODEL_FIELDS if key not in trace.meta]
    if missing:
        raise ValueError(f"the trace's meta data lacks {missing[0]!r}")
    if trace.ids.ndim != 3 or len(trace.ids) == 0:
        raise ValueError(f"the trace's ids have the shape {list(trace.ids.shape)}; tokens, layers and experts per token are needed")
    T, L, A = trace.ids.shape
    shapes = {"weights": (T, L, A)} | dict.fromkeys(("tokens", "sequence", "phase", "step"), (T,))
    for name, dtype in _DTYPES.items():
        found, shape = getattr(trace, name), shapes.get(name, (T, L, A))
        if found.dtype != dtype or found.shape != shape:
            raise ValueError(f"the trace's {name} are {found.dtype}{list(found.shape)}; needed: {np.dtype(dtype)}{list(shape)}")
    if trace.meta["layers"] != L or len(trace.meta["expert_bytes"]) != L:
        raise ValueError(f"the trace holds {L} layers, its meta data {trace.meta['layers']} and {len(trace.meta['expert_bytes'])} expert sizes")
    _check_ids(trace)
    _check_steps(trace)
    if trace.gates is not None:
        _check_gates(trace, trace.gates)


def _check_gates(trace: Trace, gates: np.ndarray) -> None:
    T, L, A = trace.ids.shape
    shape = (T, L, AHEAD, WIDTH * A)
    if gates.dtype != np.int16 or gates.shape != shape:
        raise ValueError(f"the trace's gates are {gates.dtype}{list(gates.shape)}; needed: int16{list(shape)}")
    past = np.arange(L)[:, None] + np.arange(1, AHEAD + 1) >= L
    wrong = (gates < -1) | (gates >= trace.experts) | ((gates >= 0) & past[:, :, None])
    if wrong.any():
        t, layer, ahead, slot = np.argwhere(wrong)[0]
        raise ValueError(
            f"token {t}, layer {layer}: the gates foretell expert {gates[t, layer, ahead, slot]} of layer {layer + ahead + 1}; "
            f"there are {L} layers of {trace.experts} experts"
        )


def _check_ids(trace: Trace) -> None:
    wrong = (trace.ids < -1) | (trace.ids >= trace.experts)
    if wrong.any():
        t, layer, slot = np.argwhere(wrong)[0]
        raise ValueError(f"token {t}, layer {layer}: expert {trace.ids[t, layer, slot]} is outside the {trace.experts} experts")
    wrong = ~np.isfinite(trace.weights)
    if wrong.any():
        t, layer, _ = np.argwhere(wrong)[0]
        raise ValueError(f"token {t}, layer {layer}: a router weight is not finite")


def _check_steps(trace: Trace) -> None:
    wrong = trace.phase >= len(PHASES)
    if wrong.any():
        t = int(np.argmax(wrong))
        raise ValueError(f"token {t}: there is no phase {trace.phase[t]}")
    if (back := np.diff(trace.step) < 0).any():
        t = int(np.argmax(back)) + 1
        raise ValueError(f"token {t}: step {trace.step[t]} follows step {trace.step[t - 1]}")
    if (mixed := (np.diff(trace.step) == 0) & (np.diff(trace.phase.astype(int)) != 0)).any():
        t = int(np.argmax(mixed)) + 1
        raise ValueError(f"token {t}: step {trace.step[t]} mixes {PHASES[trace.phase[t - 1]]} and {PHASES[trace.phase[t]]}")


def used_steps(trace: Trace) -> tuple[Bool[np.ndarray, "S L E"], UInt8[np.ndarray, "S"]]:
    """The set of experts that every step asked every layer for, and each step's phase."""
    step, first, index_T = np.unique(trace.step, return_index=True, return_inverse=True)
    used_SLE = np.zeros((len(step), trace.layers, trace.experts), bool)
    t, layer, slot = np.nonzero(trace.ids >= 0)
    used_SLE[index_T[t], layer, trace.ids[t, layer, slot]] = True
    return used_SLE, trace.phase[first]


def check_model(trace: Trace, spec: ModelSpec) -> None:
    """Refuses a trace of another model.

    A trace that names no spec (an imported one) is compared by its layers and experts alone: those must fit for it to be of any use.

    Raises:
        ValueError: it is of another model; both are named.
    """
    router, _ = spec.moe
    mine, theirs = (len(spec.moe_layers), router.experts), (trace.layers, trace.experts)
    known = trace.meta["spec_hash"]
    if mine == theirs and known in (None, model_hash(spec)):
        return
    raise ValueError(
        f"the trace is of {trace.meta['model']} ({theirs[0]} layers of {theirs[1]} experts, spec {known or 'not known'}), "
        f"the model is {spec.family} ({mine[0]} layers of {mine[1]} experts, spec {model_hash(spec)})"
    )


def concatenate(traces: Sequence[Trace]) -> Trace:
    """One run after another: sequences and steps are numbered on; the first trace's meta data stay.

    Raises:
        ValueError: there are none, they are of different models, or only some have gates.
    """
    if not traces:
        raise ValueError("no traces to join")
    first = traces[0]
    for other in traces[1:]:
        for key in MODEL_FIELDS:
            if other.meta[key] != first.meta[key]:
                raise ValueError(f"traces of different models can't be joined: {key} is {first.meta[key]!r} in one, {other.meta[key]!r} in another")
    if len({trace.gates is None for trace in traces}) > 1:
        raise ValueError("traces with gates and traces without can't be joined: record all with gates, or leave them out (gates=None)")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in first.columns()}
    shift = {"step": np.int32(0), "sequence": np.int32(0)}
    for trace in traces:
        for name, column in trace.columns().items():
            parts[name].append(column + shift[name] if name in shift else column)
        shift = {name: parts[name][-1].max() + np.int32(1) for name in shift}
    return Trace(**{name: np.concatenate(part) for name, part in parts.items()}, meta=first.meta)


def as_teacher_forced(trace: Trace) -> Trace:
    """The prompt alone, as text that the model was made to read and that counts; what it wrote itself is left out.

    Raises:
        ValueError: there is no prompt.
    """
    kept = trace.phase == PROMPT
    if not kept.any():
        raise ValueError("the trace holds no prompt")
    return trace.take(kept, phase=np.full(int(kept.sum()), TEACHER_FORCED, np.uint8))


class TraceBuilder:
    """Gathers steps as they run and makes a `Trace` of them."""

    def __init__(self, meta: Mapping[str, Any]):
        """Args: meta: `model_meta(...)`."""
        self._meta = dict(meta)
        self._parts: list[tuple[np.ndarray, ...]] = []
        self._gates: list[np.ndarray] = []
        self._steps = 0

    def __len__(self) -> int:
        """Steps so far."""
        return self._steps

    def add(
        self,
        ids_TLA: ArrayLike,
        weights_TLA: ArrayLike,
        tokens_T: ArrayLike,
        sequence_T: ArrayLike,
        phase: int,
        valid_T: ArrayLike | None = None,
        gates_TLKW: ArrayLike | None = None,
    ) -> None:
        """Takes the tokens that one call of the model saw.

        Args:
            ids_TLA: experts asked for, integers; -1 is none.
            weights_TLA: their weights.
            tokens_T: vocabulary ids; what the model read, not what it wrote.
            sequence_T: which sequence each token belongs to.
            phase: `DECODE` tokens make one step together, those of other phases one step each.
            valid_T: False where a token is padding; it is left out.
            gates_TLKW: what gates foretell (`Trace.gates`); of every call or of none.

        Raises:
            ValueError: gates are given, and were not before, or the other way round.
        """
        ids = np.asarray(ids_TLA)
        valid = np.ones(len(ids), bool) if valid_T is None else np.asarray(valid_T, bool)
        count = int(valid.sum())
        if count == 0:
            return
        if self._parts and bool(self._gates) != (gates_TLKW is not None):
            raise ValueError("gates are recorded of every call or of none")
        if gates_TLKW is not None:
            self._gates.append(np.asarray(gates_TLKW)[valid].astype(np.int16))
        advance = np.zeros(count, np.int32) if phase == DECODE else np.arange(count, dtype=np.int32)
        columns = (ids, np.asarray(weights_TLA, np.float32), np.asarray(tokens_T), np.asarray(sequence_T))
        kept = [column[valid].astype(dtype) for column, dtype in zip(columns, _DTYPES.values(), strict=False)]
        self._parts.append((*kept, np.full(count, phase, np.uint8), self._steps + advance))
        self._steps += int(advance[-1]) + 1

    def build(self) -> Trace:
        """The trace of everything added so far.

        Raises:
            ValueError: nothing was.
        """
        if not self._parts:
            raise ValueError("nothing was recorded")
        columns = {name: np.concatenate(part) for name, part in zip(_DTYPES, zip(*self._parts, strict=True), strict=True)}
        return Trace(**columns, meta=dict(self._meta), gates=np.concatenate(self._gates) if self._gates else None)


def save(path: str | Path, trace: Trace) -> None:
    """Writes a trace, whole or not at all.

    Raises:
        OSError: the file can't be written.
    """
    path = Path(path)
    meta = json.dumps({"format": FORMAT, "version": VERSION, **trace.meta}).encode()
    arrays = trace.columns() | {"meta": np.frombuffer(meta, np.uint8)}
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def load(path: str | Path) -> Trace:
    """Reads what `save` wrote.

    Raises:
        OSError: the file can't be read.
        ValueError: it is no trace, a damaged one, or one of another version; the message begins with the path.
    """
    raw = Path(path).read_bytes()
    if not raw.startswith(b"PK"):
        raise ValueError(f"{path}: not a trace file")
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as file:
            meta = json.loads(file["meta"].tobytes()) if "meta" in file else {}
            if not isinstance(meta, dict) or meta.pop("format", None) != FORMAT:
                raise ValueError("not a trace file")
            version = meta.pop("version", None)
            if version != VERSION:
                raise ValueError(f"a trace of version {version}; this program reads version {VERSION}")
            return Trace(**{name: file[name] for name in _DTYPES}, meta=meta, gates=file["gates"] if "gates" in file else None)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, OSError, NotImplementedError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error
    except (ValueError, TypeError) as error:  # of `Trace`, of numpy's reader, or of the text of the meta data
        raise ValueError(f"{path}: {error}") from error


def load_or_import(path: str | Path) -> Trace:
    """Reads a trace file, or imports a .csv."""
    return import_csv(path) if Path(path).suffix == ".csv" else load(path)


def import_csv(path: str | Path) -> Trace:
    """Imports a route trace of BigMoeOnEdge (github.com/Helldez/BigMoeOnEdge): comment lines, then a row per token, layer and expert.

    Raises:
        OSError: the file can't be read.
        ValueError: it isn't such a file, or a row is wrong; the message begins with the path.
    """
    raw = Path(path).read_bytes()
    try:
        lines = raw.decode("utf-8").splitlines()
        facts, sizes = _csv_comments([line for line in lines if line.startswith("#")])
        rows = _csv_rows([line for line in lines if line and not line.startswith("#")])
        return _from_rows(rows, facts, sizes, {"source": Path(path).name, "source_sha256": hashlib.sha256(raw).hexdigest()})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _csv_comments(comments: list[str]) -> tuple[dict[str, str], dict[int, int]]:
    """The facts of the line that names the model, and layer -> bytes of one of its experts."""
    facts: dict[str, str] = {}
    sizes: dict[int, int] = {}
    for line in comments:
        pairs = dict(re.findall(r"(\w+)=(\S+)", line))
        if "model" in pairs:
            facts = pairs
        elif {"layer", "expert_bytes"} <= pairs.keys():
            sizes[int(pairs["layer"])] = int(pairs["expert_bytes"])
    missing = [key for key in ("model", "n_expert", "n_expert_used") if key not in facts]
    if missing:
        raise ValueError(f"not a route trace: no comment line says {missing[0]}=...")
    return facts, sizes


def _csv_rows(lines: list[str]) -> dict[str, np.ndarray]:
    """Column name -> its values."""
    found = next(csv.reader(lines[:1]), [])
    if tuple(found) != CSV_COLUMNS:
        raise ValueError(f"not a route trace: the columns are {','.join(found)!r}, not {','.join(CSV_COLUMNS)!r}")
    if len(lines) < 2:
        raise ValueError("the route trace holds no rows")
    table = np.loadtxt(lines[1:], delimiter=",", ndmin=2)
    if table.shape[1] != len(CSV_COLUMNS):
        raise ValueError(f"rows of {table.shape[1]} columns, not {len(CSV_COLUMNS)}")
    return {name: column if name == "weight" else column.astype(np.int64) for name, column in zip(CSV_COLUMNS, table.T, strict=True)}


def _from_rows(rows: dict[str, np.ndarray], facts: dict[str, str], sizes: dict[int, int], origin: dict[str, str]) -> Trace:
    layer, layer_row = np.unique(rows["layer"], return_inverse=True)
    unsized = [int(index) for index in layer if int(index) not in sizes]
    if unsized:
        raise ValueError(f"no comment line says layer={unsized[0]} expert_bytes=...")
    active, slot = int(facts["n_expert_used"]), rows["slot"]
    if slot.min() < 0 or slot.max() >= active:
        raise ValueError(f"a row has the slot {slot[(slot < 0) | (slot >= active)][0]}, but tokens have {active} experts")
    token, token_row = np.unique(np.stack([rows[key] for key in ("turn", "phase", "step")], 1), axis=0, return_inverse=True)
    token_row = token_row.reshape(-1)
    shape = (len(token), len(layer), active)
    at = np.ravel_multi_index((token_row, layer_row.reshape(-1), slot), shape)
    if len(np.unique(at)) < len(at):
        raise ValueError("two rows have one turn, phase, step, layer and slot")
    ids, weights = np.full(shape, -1, np.int16), np.zeros(shape, np.float16)
    ids.flat[at], weights.flat[at] = rows["expert"], rows["weight"]
    counts = {"layers": len(layer), "experts": int(facts["n_expert"]), "active": active}
    name = re.split(r"[/\\]", facts["model"])[-1].removesuffix(".gguf")
    meta = {"model": name, "spec_hash": None, **counts, "expert_bytes": [sizes[int(i)] for i in layer], **origin}
    numbers = np.arange(len(token), dtype=np.int32)
    return Trace(ids, weights, np.full(len(token), -1, np.int32), token[:, 0].astype(np.int32), token[:, 1].astype(np.uint8), numbers, meta)
