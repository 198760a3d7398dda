"""Runs a scheduler's plans on a model: pages, programs, and what they need of each sequence. Holds the device state and decides nothing."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from jaxmoe import formats
from jaxmoe.cache.layers import init_paged_layers
from jaxmoe.cache.paged import PagedKV
from jaxmoe.decode.penalties import RowEdits, build_adjust
from jaxmoe.decode.sampling import SamplingParams, sampling_params
from jaxmoe.engine import steps
from jaxmoe.engine.generate import Sampling
from jaxmoe.engine.model import Model
from jaxmoe.engine.serving import programs
from jaxmoe.engine.serving.batches import page_tables, places_of, prompt_batch, sizes
from jaxmoe.engine.serving.host_store import IN_FLIGHT, HostStore
from jaxmoe.engine.serving.regret import Regret
from jaxmoe.engine.serving.requests import TokenLogprob
from jaxmoe.engine.serving.routing import DecodeCounts, Routed, decoded, prompted
from jaxmoe.engine.serving.types import Move, Piece, Row, ServeSpec, StepPlan
from jaxmoe.engine.steps import EngineState
from jaxmoe.experts import SlotBank
from jaxmoe.nn.transformer import layer_groups
from jaxmoe.spec import DeltaSpec

MODES = ("decode", "chunk", "whole", "group", "pages")
"""Kinds of programs."""


class Live(Protocol):
    """What a runner has to know of a sequence. Attributes: `ids` its tokens so far; `sampling`; `edits` of its logits, `mask` what a grammar allows
    next, each None where there is none; `logprobs` how many of the likeliest tokens are wanted, None for no log probabilities."""

    ids: list[int]
    sampling: Sampling
    logprobs: int | None
    mask: np.ndarray | None

    @property
    def edits(self) -> RowEdits | None: ...


@dataclasses.dataclass(frozen=True)
class Given:
    """New tokens of a sequence, and their log probabilities where they were asked for."""

    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class FusedPrograms:
    """The compiled steps of `programs`, experts included."""

    stalled = 0.0

    def __init__(self, model: Model, spec: ServeSpec, record: bool = False):
        self._model, self._record = model, record
        own, kernels = model.spec, model.kernels
        self._decode = [programs.decode_step(own, kernels, spec.burst, adjusted, record) for adjusted in (False, True)]
        self._prompts, self._group = programs.prompts_step(own, kernels, record), programs.group_step(own, kernels)
        self._edges = layer_groups(own, spec.groups)

    def decode(self, state, rows, tokens, positions, budget, tables, eos, sampling, adjust):
        """See `programs.decode_step`."""
        run = self._decode[adjust is not None]
        return run(self._model.params, self._model.bank, state, rows, tokens, positions, budget, tables, eos, sampling, adjust)

    def prompts(self, state, batch, sampling, positions, adjust):
        """See `programs.prompts_step`."""
        return self._prompts(self._model.params, self._model.bank, state, batch, sampling, positions, adjust)

    def park(self, tokens: int) -> Any:
        """A wave before its first group."""
        return programs.nothing_parked(self._model.spec, tokens, formats.compute_dtype(self._model.spec.precision.compute))

    def group(self, state, parked, batch, group: int, sampling, positions, adjust):
        """See `programs.group_step`; `group` counts groups of layers."""
        edges = np.int32(self._edges[group]), np.int32(self._edges[group + 1])
        return self._group(self._model.params, self._model.bank, state, parked, batch, *edges, sampling, positions, adjust)


class Runner:
    """Attributes: `state` on the device; `host` pages in host memory; `padded` tokens so far; `record`, whether `routed` has the
    last step's routing, waves excepted; `decoded` what decoding asked the bank for; `regret` beside the best policy, or None."""

    def __init__(
        self, model: Model, spec: ServeSpec, eos: Sequence[int] = (), kv: str | None = None, run: Any = None, record: bool = False,
        regret: bool = False,
    ):  # fmt: skip
        """
        Args:
            model: on one device.
            spec: sizes.
            eos: ids that end a text.
            kv: how keys and values are held, as for `init_paged_layers`.
            run: what runs the steps; the compiled ones if not given.
            record: keep each step's routing, for what learns from it. A wave's groups of layers do not give theirs.
            regret: count what the best policy would have loaded, beside what is; needs `record` and streamed experts.

        Raises:
            ValueError: a model on a mesh, more end-of-text ids than a step watches for, steps of `run` that are to be recorded, or a regret where
                nothing is recorded or streamed.
        """
        if model.on.mesh is not None:
            raise ValueError(f"serving is for a model on one device: leave out the split {model.on.layout.split}")
        if len(eos) > steps.EOS_SLOTS:
            raise ValueError(f"{len(eos)} end-of-text ids are more than the {steps.EOS_SLOTS} that a step can watch for")
        if record and run is not None:
            raise ValueError("the compiled steps give their routing, those that are given do not: leave out record or run")
        if regret and not (record and isinstance(model.bank, SlotBank)):
            raise ValueError("regret is counted of experts that are streamed, by the recorded routing: it needs a slot bank, and record")
        self.spec, self.kv, self.record = spec, kv, record
        self.regret = Regret(model.bank) if regret and isinstance(model.bank, SlotBank) else None
        self.routed: list[Routed] = []
        self.decoded = DecodeCounts()
        self.model = model = model.for_positions(spec.positions)
        self._run = run or FusedPrograms(model, spec, record)
        self._eos, self._none = steps.pad_to(eos, steps.EOS_SLOTS, -2), steps.pad_to((), steps.EOS_SLOTS, -2)
        self.state: Any = self._fresh()
        self._copy, self._read, self._write = (make(model.kernels) for make in (programs.copy_pages, programs.read_pages, programs.write_pages))
        self.host = HostStore(spec.host_pages)
        self._slotted = any(isinstance(kind, DeltaSpec) for kind in model.spec.state_kinds)  # slots hold what no page does
        self._parked: Any = None
        self._neutral: dict[int, Any] = {}
        self.padded = 0
        self.row_buckets = tuple(b for b in steps.ROW_BUCKETS if b < spec.batch) + (spec.batch,)
        self.chunk_buckets, self.wave_buckets = sizes(spec.chunk, 64, spec.run), sizes(spec.wave, 64, spec.run)
        self.chunk_buckets += (spec.positions,) if spec.positions > spec.chunk else ()  # for prompts in one piece

    def _fresh(self) -> EngineState:
        return steps.committed(EngineState(self._empty(), self.model.bank.init_state()))

    def rebuild(self) -> None:
        """Makes the device's state anew, after a step that failed may have left none; what was in host memory is forgotten too."""
        self.state = self._parked = None  # before new ones take their memory
        self.host.clear()
        if self.regret is not None:
            self.regret.drop()
        self.state = self._fresh()

    def _empty(self):
        return init_paged_layers(self.model.spec, self.spec.slots, self.spec.pages, self.spec.page, self.model.kernels, self.kv)

    def page_bytes(self) -> int:
        """Bytes of one page, in all layers."""
        held = jax.eval_shape(self._empty).states
        return sum(_bytes(pool.pages) // (self.spec.pages + 1) for pool in held if isinstance(pool, PagedKV))

    # --- A step

    def run(self, plan: StepPlan, live: Mapping[int, Live]) -> dict[int, Given]:
        """Does what a plan says.

        Args:
            plan: of the scheduler.
            live: every sequence that it names.

        Returns:
            New tokens, by sequence.
        """
        spec, given = self.spec, dict[int, Given]()
        tables, self.routed = page_tables(spec, plan.tables), []
        self._move_pages(plan)
        if plan.chunk and spec.mixed:
            given |= self._prompts(plan.decode, plan.chunk, live, tables)
        else:
            if plan.decode:
                given |= self._decode(plan.decode, live, tables)
            if plan.chunk:
                given |= self._prompts((), plan.chunk, live, tables)
        if plan.group is not None:
            given |= self._group(plan.group, live, tables)
        return given

    def _move_pages(self, plan: StepPlan) -> None:
        most = self.spec.move
        for at in range(0, len(plan.copies), most):
            pairs = plan.copies[at : at + most]
            source, target = (self._padded([pair[k] for pair in pairs]) for k in range(2))
            self.state = self._copy(self.state, source, target)
        for move in plan.out:
            for device, host in self._parts(move):
                self.host.put(self._read(self.state, self._padded(device), np.int32(move.slot)), host, move.id)
        parts = [(move, *part) for move in plan.into for part in self._parts(move)]
        for turn, (move, device, host) in enumerate(parts, 1):
            self.state = self._write(self.state, self._padded(device), np.int32(move.slot), self.host.get(host, move.id, most))
            if turn % IN_FLIGHT == 0:  # blocks that are sent before their turn take memory
                jax.block_until_ready(self.state.layers)

    def _parts(self, move: Move):
        """A move in blocks; one of nothing but what its slot holds has a block too."""
        most, blocks = self.spec.move, -(-len(move.device) // self.spec.move)
        for at in range(0, most * max(blocks, int(self._slotted)), most):
            yield move.device[at : at + most], move.host[at : at + most]

    def _padded(self, pages: Sequence[int]) -> np.ndarray:
        return steps.pad_to(pages, self.spec.move, self.spec.trash)

    def _decode(self, rows: Sequence[Row], live: Mapping[int, Live], tables: np.ndarray) -> dict[int, Given]:
        n = steps.bucket(len(rows), self.row_buckets)
        adjust = self._adjust([live[row.id] for row in rows], n)
        columns = [[live[row.id].ids[row.at] for row in rows], [row.at for row in rows], [row.count for row in rows]]
        tokens, positions, budget = (steps.pad_to(column, n) for column in columns)
        sampling = self._sampling([live[row.id] for row in rows], n)
        slots = steps.pad_to([row.slot for row in rows], n)
        before = self.decoded.look(self.state.bank)
        if self.regret is not None:
            self.regret.before(self.state.bank)
        out, self.state, more, routed = self._run.decode(self.state, slots, tokens, positions, budget, tables, self._eos, sampling, adjust)
        out = np.asarray(out)
        self.decoded.add(before, self.state.bank, int((out >= 0).any(1).sum()))
        if self.record:
            self.routed.append(decoded(rows, tokens, positions, out, routed[0]))
        if self.regret is not None:
            self.regret.after(self.routed[-1], self.state.bank)
        self.padded += int((n - len(rows)) * max(1, (out >= 0).any(1).sum()))
        more = jax.device_get(more)
        return {row.id: _given(live[row.id], [t for t in out[:, i].tolist() if t >= 0], more, i) for i, row in enumerate(rows)}

    def _prompts(self, rows: Sequence[Row], pieces: Sequence[Piece], live: Mapping[int, Live], tables: np.ndarray) -> dict[int, Given]:
        spec = self.spec
        self._end_window()
        places, used = places_of(spec, pieces)
        tokens, singles = steps.bucket(used, self.chunk_buckets), spec.batch if spec.mixed else 0
        ids = {id: live[id].ids for id in {r.id for r in rows} | {p.id for p in pieces}}
        batch = prompt_batch(spec, rows, pieces, places, tokens, singles, ids, tables)
        drawing = self._drawing(rows, pieces, live, singles)
        new, self.state, more, routed = self._run.prompts(self.state, batch, *drawing)
        if self.record:
            self.routed.append(prompted(rows, pieces, batch, routed[0]))
        self._count(pieces, tokens + singles, len(rows))
        return self._ends(rows, pieces, live, new, more, singles)

    def _group(self, step, live: Mapping[int, Live], tables: np.ndarray) -> dict[int, Given]:
        tokens = steps.bucket(step.tokens, self.wave_buckets)
        self._end_window()
        batch = prompt_batch(self.spec, (), step.pieces, step.places, tokens, 0, {p.id: live[p.id].ids for p in step.pieces}, tables)
        parked = self._run.park(tokens) if step.group == 0 else self._parked
        drawing = self._drawing((), step.pieces, live, 0)
        new, self.state, self._parked, more = self._run.group(self.state, parked, batch, step.group, *drawing)
        if not step.last:
            return {}
        self._parked = None
        self._count(step.pieces, tokens, 0)
        return self._ends((), step.pieces, live, new, more, 0)

    def _end_window(self) -> None:
        if self.regret is not None:
            self.regret.close(self.state.bank)

    def _count(self, pieces: Sequence[Piece], tokens: int, rows: int) -> None:
        real = sum(piece.count for piece in pieces) + rows
        self.padded += tokens - real

    def _ends(self, rows, pieces: Sequence[Piece], live, new, more, singles: int) -> dict[int, Given]:
        new, more = np.asarray(new), jax.device_get(more)
        at = [(row.id, i) for i, row in enumerate(rows)]
        at += [(piece.id, singles + i) for i, piece in enumerate(piece for piece in pieces if piece.ends)]
        return {id: _given(live[id], [int(new[i])], more, i) for id, i in at}

    # --- What sampling takes

    def _drawing(self, rows: Sequence[Row], pieces: Sequence[Piece], live: Mapping[int, Live], singles: int) -> tuple:
        """Sampling, positions and adjustments of the rows and of the pieces that end, as `prompt_batch` orders their logits."""
        ends = [piece for piece in pieces if piece.ends]
        all_rows: list[Live | None] = [live[row.id] for row in rows] + [None] * (singles - len(rows)) + [live[piece.id] for piece in ends]
        total = singles + self.spec.slots
        all_rows += [None] * (total - len(all_rows))
        positions = np.zeros(total, np.int32)
        positions[: len(rows)] = [row.at + 1 for row in rows]
        positions[singles : singles + len(ends)] = [piece.at + piece.count for piece in ends]
        adjust = self._adjust(all_rows, total)
        return self._sampling(all_rows, total), positions, self._nothing(total) if adjust is None else adjust

    def _sampling(self, rows: Sequence[Live | None], n: int) -> SamplingParams:
        given = [Sampling() if row is None else row.sampling for row in rows] + [Sampling()] * (n - len(rows))
        return sampling_params(n, **{f.name: np.asarray([getattr(s, f.name) for s in given]) for f in dataclasses.fields(Sampling)})

    def _adjust(self, rows: Sequence[Live | None], n: int):
        """What changes the rows' logits; None if nothing does and nobody asks for log probabilities."""
        masks = [None if row is None else row.mask for row in rows]
        edits = [None if row is None or row.edits is None or row.edits.neutral else row.edits for row in rows]
        if all(m is None for m in masks) and all(e is None for e in edits):
            return self._nothing(n) if any(row is not None and row.logprobs is not None for row in rows) else None
        return build_adjust(edits, masks, n, self.model.spec.vocab)

    def _nothing(self, n: int):
        """Adjustments of n rows that change nothing, which stay on the device."""
        if n not in self._neutral:
            self._neutral[n] = jax.device_put(build_adjust([None] * n, [None] * n, n, self.model.spec.vocab))
        return self._neutral[n]

    # --- Warming up

    def programs(self, modes: Sequence[str] = MODES) -> list[tuple[str, Callable[[], None]]]:
        """Every program that plans can need, as a name and what runs it on padding.

        Args:
            modes: of 'decode', 'chunk', 'whole' (prompts in one piece, of any length), 'group' and 'pages'.
        """
        out: list[tuple[str, Callable[[], None]]] = []
        if "decode" in modes:
            both = [(n, adjusted) for n in self.row_buckets for adjusted in (False, True)]
            out += [(f"decode of {n}{', adjusted' if some else ''}", functools.partial(self._try_decode, n, some)) for n, some in both]
        pieces = self.chunk_buckets if "whole" in modes else [n for n in self.chunk_buckets if n <= self.spec.chunk] if "chunk" in modes else ()
        out += [(f"prompts of {n}", functools.partial(self._try_prompts, n)) for n in pieces]
        out += [(f"waves of {n}", functools.partial(self._try_wave, n)) for n in (self.wave_buckets if "group" in modes else ())]
        return out + ([("copies of pages", self._try_pages)] if "pages" in modes else [])

    def warm_up(self, progress: Callable[[str], None] = lambda name: None, modes: Sequence[str] = MODES) -> float:
        """Compiles every program that plans can need, by running it on padding; returns the seconds that took.

        Args:
            progress: called with the name of each.
            modes: as for `programs`.
        """
        began = time.perf_counter()
        for name, attempt in self.programs(modes):
            progress(name)
            attempt()
        # Committed again: what the host makes of the tables is not, and steps that take them would be compiled once more.
        self.state = steps.committed(dataclasses.replace(self.state, bank=self.model.bank.forget(self.state.bank)))
        jax.block_until_ready(jax.tree.leaves(self.state))
        return time.perf_counter() - began

    def _try_decode(self, n: int, adjusted: bool) -> None:
        zeros, ones, tables = np.zeros(n, np.int32), np.ones(n, np.int32), page_tables(self.spec, {})
        adjust = self._nothing(n) if adjusted else None
        sampling = sampling_params(n, temperature=0.0)
        self.decoded.look(self.state.bank)
        _, self.state, _, _ = self._run.decode(self.state, zeros, zeros, zeros, ones, tables, self._none, sampling, adjust)

    def _try_prompts(self, tokens: int) -> None:
        singles = self.spec.batch if self.spec.mixed else 0
        _, self.state, _, _ = self._run.prompts(self.state, *self._padding(tokens, singles))

    def _try_wave(self, tokens: int) -> None:
        parked = self._run.park(tokens)
        for group in range(self.spec.groups):
            batch, *drawing = self._padding(tokens, 0)
            _, self.state, parked, _ = self._run.group(self.state, parked, batch, group, *drawing)

    def _try_pages(self) -> None:
        nothing = self._padded(())
        self.state = self._copy(self.state, nothing, nothing)
        block = jax.device_get(self._read(self.state, nothing, np.int32(0)))
        self.state = self._write(self.state, nothing, np.int32(0), block)
        self.host.shape(block)

    def _padding(self, tokens: int, singles: int) -> tuple:
        """A batch of next to nothing, and what goes with it."""
        tables = page_tables(self.spec, {})
        one = Piece(-1, 0, 0, 1, False)  # a real token, its keys in the trash page: what brings experts runs only where somebody asks for them
        return prompt_batch(self.spec, (), (one,), (0,), tokens, singles, {-1: [0]}, tables), *self._drawing((), (), {}, singles)

    def counters(self) -> dict[str, np.ndarray]:
        """The bank's, by layer."""
        return self.model.bank.counters(self.state.bank) if isinstance(self.model.bank, SlotBank) else {}

    @property
    def stalled(self) -> float:
        """Seconds that the host waited for experts."""
        return self._run.stalled


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def _given(live: Live, ids: list[int], more: Any, at: int) -> Given:
    if live.logprobs is None or not more:
        return Given(tuple(ids))
    logprob, top_ids, top = (np.asarray(part)[at] for part in more)
    likeliest = tuple((int(i), float(l)) for i, l in zip(top_ids[: live.logprobs], top[: live.logprobs], strict=True))
    return Given(tuple(ids), (TokenLogprob(ids[0], float(logprob), likeliest),))
