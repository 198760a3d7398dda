"""From what a user asks for (a memory budget, a policy, a mode) to an engine that streams experts: checks first, weights last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from checkpoints.load import Checkpoint
from jaxmoe import formats
from jaxmoe.engine import steps
from jaxmoe.engine.generate import Engine, cache_positions, positions_bucket
from jaxmoe.engine.host_driven import HostDriven
from jaxmoe.engine.memory import check_fits_host, free_device_bytes
from jaxmoe.engine.model import Model, Offload, load_model, read_store
from jaxmoe.engine.predicting import both_predictors, check_predictor, make_foresight
from jaxmoe.experts import host_store
from jaxmoe.experts.lossy import Lossy
from jaxmoe.experts.planes import plane_format
from jaxmoe.experts.source import DiskSource, ExpertSource, LadderSource
from jaxmoe.offload import bounds, budget
from jaxmoe.offload.advise import best_policy
from jaxmoe.offload.knowledge import knowledge
from jaxmoe.offload.link import Link
from jaxmoe.offload.lossy_options import parse_lossy
from jaxmoe.offload.predictors import PREDICTORS, find_predictor
from jaxmoe.offload.prefetch import Prefetch
from jaxmoe.offload.replay import replay
from jaxmoe.offload.staging import Staging
from jaxmoe.offload.super_experts import read_pinned
from jaxmoe.offload.trace import PROMPT, Trace, as_teacher_forced, check_model, load_or_import
from jaxmoe.residency import Knowledge, find_policy
from jaxmoe.residency.policies import DEFAULT
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels
from pallas_kernels.expert_fill import gpu

Mode = Literal["fused", "layer-grouped", "host-driven"]
MODES: tuple[Mode, ...] = ("fused", "layer-grouped", "host-driven")
"""fused: all in the compiled steps, prompts in pieces. layer-grouped: the same with a prompt in one piece, so that each expert crosses the link once.
host-driven: the host sends experts between the halves of each layer."""

AUTO = "auto"
"""The policy that is chosen for the user, with the rest of what there is to choose."""

AUTO_STAGING = 8
"""Records that `auto` lets prefetching hold."""


@dataclasses.dataclass(frozen=True)
class Streaming:
    """What a user may ask for.

    Attributes:
        expert_memory: device memory for routed experts: '4GB', '25%' of them, or 'auto'.
        mode: one of `MODES`; None for layer-grouped, or host-driven where `link_gbps` or `host_memory` needs it.
        policy: which experts stay; 'auto' chooses it, and prefetching.
        staging: slots for experts that pass through.
        trace: a routing trace of the model, by which slots are shared out over the layers, and which gives the static policy its profile.
        fill: how the compiled step brings experts; None for the backend's way.
        link_gbps: emulate a link of this speed.
        host_memory: host memory for experts; the others are read from disk when they are asked for.
        predictor: what foretells routing (`jaxmoe.offload.predictors`), for prefetching and for policies that look ahead.
        predictor_file: of a predictor that is trained.
        lossy: what may be given up for fewer bytes (`jaxmoe.offload.lossy_options`); None for nothing.
        prefetch: records sent ahead of their being asked for that the device holds beside the slots, at most; None for no prefetching.
        pinned: a file of experts that never leave once they are there (`jaxmoe.offload.super_experts`); None for none.
    """

    expert_memory: str
    mode: Mode | None = None
    policy: str = DEFAULT
    staging: int = 2
    trace: Path | None = None
    fill: str | None = None
    link_gbps: float | None = None
    host_memory: str | None = None
    predictor: str | None = None
    predictor_file: Path | None = None
    prefetch: int | None = None
    lossy: str | None = None
    pinned: Path | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """A request that was checked: `budget` what it buys, `mode` how it runs, `trace` what was read, `pinned` which experts [L, E] never leave."""

    asked: Streaming
    mode: Mode
    budget: budget.BudgetPlan
    trace: Trace | None = None
    pinned: np.ndarray | None = None


@dataclasses.dataclass
class Streamed:
    """An engine that streams. `link` and `source` are those of the host-driven mode, `staging` that of prefetching, else None."""

    plan: Plan
    model: Model
    engine: Engine
    link: Link | None = None
    source: Any = None
    staging: Staging | None = None


def make_plan(asked: Streaming, spec: ModelSpec, rows: int, positions: int) -> Plan:
    """Checks a request against the model and this machine; reads no weights.

    Args:
        asked: the request.
        spec: the model, in the precision it is to run in.
        rows, positions: sequences at a time and tokens of the longest, whose keys and values need memory too.

    Raises:
        ValueError: a budget that the model can't run in, or options that don't go together; the message says what to change.
    """
    mode = _mode(asked)
    auto = asked.policy == AUTO
    asked = dataclasses.replace(asked, policy=DEFAULT) if auto else asked
    policy = find_policy(asked.policy)
    Link(asked.link_gbps)  # refuses a speed that is none
    _check_fill(asked, mode, spec)
    _check_lossy(asked, mode, spec)
    if policy.needs and asked.trace is None:
        raise ValueError(f"the policy {asked.policy!r} goes by a trace of the model: give --expert-trace")
    trace = None if asked.trace is None else load_or_import(asked.trace)
    curves: dict[str, Any] = {}
    if trace is not None:
        _check_trace(trace, asked, spec)
    if trace is not None and not policy.shared and policy.allocate is None:
        only_prompts = (trace.phase == PROMPT).all()
        curves = {"curves_LC": bounds.marginal_hits(as_teacher_forced(trace) if only_prompts else trace), "allocate": bounds.allocate}
    shapes = budget.ExpertShapes.from_spec(spec)
    free = free_device_bytes(shapes, rows * positions_bucket(positions))
    amount = budget.parse_memory(asked.expert_memory)
    found = budget.solve(shapes, amount, asked.staging, free, bypass=policy.bypass, **curves)
    if auto and not found.all_resident:
        chosen = _chosen(asked, spec, mode, found, trace)
        try:
            return make_plan(chosen, spec, rows, positions)
        except budget.BudgetError:  # a policy that turns experts away needs more staging
            return make_plan(dataclasses.replace(chosen, policy=DEFAULT), spec, rows, positions)
    if auto and asked.predictor is None:  # nothing to foretell, where all are there
        asked = dataclasses.replace(asked, predictor_file=None, prefetch=None)
    _check_foresight(asked, trace)
    if policy.allocate is not None and not found.all_resident:
        slots = policy.allocate(sum(found.slots), shapes.layers, shapes.experts, shapes.active)
        found = dataclasses.replace(found, slots=slots)
    pinned = None if asked.pinned is None else read_pinned(asked.pinned, spec, asked.policy, None if found.all_resident else found.slots)
    check_fits_host(spec, asked.host_memory, shapes.all_bytes, found.all_resident)
    return Plan(asked, mode, found, trace, pinned)


def _chosen(asked: Streaming, spec: ModelSpec, mode: Mode, found: budget.BudgetPlan, trace: Trace | None) -> Streaming:
    """What `auto` comes to: the policy with the most hits on the trace, if there is one, and where the host sends experts, prefetching by a trained
    predictor, if one is given, and by the model's own routers; whether that pays is measured as it runs."""
    if trace is not None and (trace.phase == PROMPT).all():
        trace = as_teacher_forced(trace)
    policy = DEFAULT if trace is None else best_policy(trace, sum(found.slots) // len(found.slots))
    more: dict[str, Any] = {}
    lossy = _lossy(asked, spec)
    as_stored = (lossy is None or not lossy.bits) and asked.host_memory is None
    predictor = asked.predictor or both_predictors(spec, asked.predictor_file)
    if mode == "host-driven" and as_stored and predictor is not None:
        more = {"predictor": predictor, "prefetch": asked.prefetch or AUTO_STAGING}
    return dataclasses.replace(asked, policy=policy, mode=mode, **more)


def _mode(asked: Streaming) -> Mode:
    needs = [name for name in ("link_gbps", "host_memory", "prefetch", "predictor", "predictor_file") if getattr(asked, name) is not None]
    mode = asked.mode or ("host-driven" if needs else "layer-grouped")
    if mode not in MODES:
        raise ValueError(f"there is no expert mode {mode!r}: choose one of {', '.join(MODES)}")
    if needs and mode != "host-driven":
        option = "--" + needs[0].replace("_", "-")
        raise ValueError(f"{option} needs --expert-mode host-driven, not {mode}: in a compiled step the host can't pace, read or foresee experts")
    return mode


def _check_foresight(asked: Streaming, trace: Trace | None) -> None:
    """Refuses a predictor that nothing asks, or that lacks what it goes by."""
    if asked.prefetch is not None:
        Prefetch(asked.prefetch)  # refuses a number that is none
    if asked.predictor is None:
        given = "--prefetch" if asked.prefetch is not None else "--predictor-file" if asked.predictor_file is not None else None
        if given is not None:
            raise ValueError(f"{given} goes with --expert-predictor, which says what will be asked for")
        return
    check_predictor(asked.predictor, asked.predictor_file, trace)
    before = find_policy(asked.policy).foresees and find_predictor(asked.predictor).ahead
    if asked.prefetch is None and not before:
        raise ValueError(
            f"--expert-predictor {asked.predictor} has no use without --prefetch, or a policy that looks ahead (plec, lookahead) and a predictor "
            f"that speaks before a step ({', '.join(name for name, p in PREDICTORS.items() if p.ahead)})"
        )


def _lossy(asked: Streaming, spec: ModelSpec) -> Lossy | None:
    return None if asked.lossy is None else parse_lossy(asked.lossy, len(spec.moe_layers), spec.moe[0].experts)


def _check_lossy(asked: Streaming, mode: Mode, spec: ModelSpec) -> None:
    found = _lossy(asked, spec)
    if found is not None and found.prior and spec.moe[0].select != "topk":
        raise ValueError(f"--lossy {asked.lossy}: cache-prior needs a router that chooses by top-k, and this model's is {spec.moe[0].select!r}")
    if found is None or not found.bits:
        return
    plane_format(spec)  # says whether the model's experts can be had in few bits
    if mode != "host-driven":
        raise ValueError(f"--lossy {asked.lossy} brings experts in {found.bits[0]} bits, which needs --expert-mode host-driven, not {mode}")
    if asked.host_memory is not None or asked.prefetch is not None:
        given = "--host-memory" if asked.host_memory is not None else "--prefetch"
        raise ValueError(f"--lossy {asked.lossy} brings experts in {found.bits[0]} bits, and {given} knows them only as they are stored")


def _check_fill(asked: Streaming, mode: Mode, spec: ModelSpec) -> None:
    """Refuses a way to fill that this mode, device or model does not take, which would be known only when the step is compiled."""
    if asked.fill is None:
        return
    if mode == "host-driven":
        raise ValueError(f"--expert-fill {asked.fill} is for compiled steps, and --expert-mode host-driven sends experts from the host")
    if not asked.fill.startswith("mosaic"):
        return
    if jax.devices()[0].platform not in ("gpu", "cuda"):
        raise ValueError(f"--expert-fill {asked.fill} is for NVIDIA GPUs, and this device is {jax.devices()[0].device_kind}")
    held = formats.leaf_dtype(spec.precision.params)
    pools: Any = tuple(jax.ShapeDtypeStruct((1, *entry), held) for entry in host_store.entry_shapes(spec))
    store: Any = jax.ShapeDtypeStruct((1, *host_store.record_shape(spec)), held)
    try:
        gpu.tile_rows(pools, store)
    except NotImplementedError as error:
        raise ValueError(f"--expert-fill {asked.fill}: {error}") from error


def _check_trace(trace: Trace, asked: Streaming, spec: ModelSpec) -> None:
    try:
        check_model(trace, spec)
    except ValueError as error:
        raise ValueError(f"{asked.trace}: {error}") from error


def _known(plan: Plan) -> Knowledge:
    """What the plan's policy is told beforehand."""
    if plan.trace is None:
        return Knowledge(pinned=None if plan.pinned is None else jnp.asarray(plan.pinned))
    return knowledge(plan.trace, find_policy(plan.asked.policy), pinned=plan.pinned)


def foretell(plan: Plan, spec: ModelSpec, rows: int, positions: int, link_gbps: float | None) -> str:
    """What a plan will take and bring, in two lines, before any weights are read.

    Args:
        plan, spec: the plan, and the model it was made for.
        rows, positions: as for `make_plan`.
        link_gbps: of the link, 10^9 bytes per second; None where there is none.

    Returns:
        Slots and bytes, then bytes a token and the link's ceiling: at the policy's hits on the plan's trace, or else at those of even routing.
    """
    shapes = budget.ExpertShapes.from_spec(spec)
    hits = None if plan.trace is None or plan.budget.all_resident else _replayed(plan, plan.trace)
    prediction = budget.predict(plan.budget, shapes, hits, link_gbps, None, rows)
    return budget.describe(plan.budget, shapes, positions_bucket(positions), prediction, rows)


def _replayed(plan: Plan, trace: Trace) -> float:
    """The policy's hits on the trace that it goes by."""
    policy = find_policy(plan.asked.policy)
    counted = as_teacher_forced(trace) if (trace.phase == PROMPT).all() else trace
    return replay(counted, plan.budget.slots, policy.name, known=None if policy.name == "opt" else _known(plan)).hit_rate


def load_streamed(
    plan: Plan, checkpoint: Checkpoint, dtype: str, kernels: Kernels, rows: int, positions: int, greedy: bool, eos: Sequence[int] = (),
    record: bool = True, progress: Callable[[int, int], None] = lambda done, total: None,
) -> Streamed:  # fmt: skip
    """Reads the weights and makes the engine.

    Args:
        plan: of `make_plan`.
        checkpoint, dtype, kernels: as for `load_model`.
        rows, positions, greedy, eos: as for `Engine`.
        record: keep a trace of the routing, which the optimum is computed from.
        progress: called with experts read and experts in all.

    Raises:
        CheckpointError: an expert that is damaged.
    """
    asked = plan.asked
    if plan.budget.all_resident:
        model = load_model(checkpoint, dtype, kernels)
        return Streamed(plan, model, Engine(model, rows, positions, greedy, eos, record))
    offload = Offload(plan.budget.slots, plan.budget.staging, asked.policy, _known(plan), asked.fill, lossy=_lossy(asked, checkpoint.spec))
    if plan.mode != "host-driven":
        model = load_model(checkpoint, dtype, kernels, offload=offload, progress=progress)
        most = steps.TOKEN_BUCKETS[-1] if plan.mode == "fused" else None
        return Streamed(plan, model, Engine(model, rows, positions, greedy, eos, record, prefill_tokens=most))
    model = load_model(checkpoint, dtype, kernels, offload=dataclasses.replace(offload, store=False))
    source = make_source(plan, checkpoint, model.spec, progress, kernels.expert_layout)
    link = Link(asked.link_gbps)
    model = model.for_positions(cache_positions(model.spec, positions))
    foresight = None
    if asked.predictor is not None:
        foresight = make_foresight(asked.predictor, model.spec, rows, asked.predictor_file, [] if plan.trace is None else [plan.trace])
    ahead = None if asked.prefetch is None else Prefetch(asked.prefetch)
    programs = HostDriven(model.spec, model.bank, kernels, greedy, source, link, record, prefetch=ahead, foresight=foresight)
    return Streamed(plan, model, Engine(model, rows, positions, greedy, eos, record, programs), link, source, programs.ahead)


def make_source(plan: Plan, checkpoint: Checkpoint, spec: ModelSpec, progress: Callable[[int, int], None], layout: formats.ExpertLayout = "d2f"):
    """Where the host-driven mode gets experts from, in `layout`."""
    if plan.asked.host_memory is None:
        records, lossy = read_store(checkpoint, spec, progress, layout), _lossy(plan.asked, spec)
        if lossy is not None and lossy.bits:
            return LadderSource.from_records(spec, records, plane_format(spec, layout), progress)
        return ExpertSource(spec, records)
    room = budget.parse_memory(plan.asked.host_memory).resolve(plan.budget.resident_bytes, None)

    def read(moe_layer: int, expert: int) -> dict[str, np.ndarray]:
        return checkpoint.read_expert(spec.moe_layers[moe_layer], expert, spec.precision.params, verify=True)

    return DiskSource(spec, read, room, layout)



