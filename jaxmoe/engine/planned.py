"""What a user asked for about devices: a split, or a plan's file; checked, and turned into a model on a mesh with an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from checkpoints.load import Checkpoint
from jaxmoe.engine.generate import Engine, cache_positions
from jaxmoe.engine.memory import available_host_memory
from jaxmoe.engine.mesh import HERE, Devices, bank_spec, devices_for
from jaxmoe.engine.model import Offload, load_model
from jaxmoe.engine.steps import TOKEN_BUCKETS
from jaxmoe.engine.streaming import Streaming, make_plan
from jaxmoe.engine.switching import Switching, by_traffic, with_exchange
from jaxmoe.offload.budget import ExpertShapes, format_bytes, parse_memory
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels
from sharding.placement import Placement, Replicas, read_placement
from sharding.plan import load_plan, planned_spec
from sharding.split import Exchange, SplitError, parse_split
from sharding.workload import Workload

ELSEWHERE = ("trace", "link_gbps", "host_memory", "predictor", "predictor_file", "lossy", "prefetch", "pinned")
"""Options of streaming that one device alone has."""


@dataclasses.dataclass(frozen=True)
class Planned:
    """Where a model is to run. Attributes: `spec` the model in the precision it is to have, `on` the devices, `offload` how each device streams its
    experts (None: they all stay), `placement` in which order experts stand; of a plan, `prefill_tokens` the most tokens of a prefill step in a group
    of devices, and `positions` what caches have (None: as the engine chooses); `switching`, see `switched`."""

    spec: ModelSpec
    on: Devices = HERE
    offload: Offload | None = None
    placement: Placement | Replicas | None = None
    prefill_tokens: int | None = None
    positions: int | None = None
    switching: bool = False


def choose_devices(
    spec: ModelSpec, split: str | None, plan: Path | None, streaming: Streaming | None, rows: int, positions: int, placement: Path | None = None
) -> Planned:
    """What was asked for, checked against the model and the process's devices.

    Args:
        spec: the model, in the precision that was asked for.
        split: as `parse_split` reads it.
        plan: a file of `scripts/plan.py`, which brings its own split, precision and slots.
        streaming: what was asked for about experts; its memory is that of each device.
        rows, positions: sequences at a time, and tokens of the longest.
        placement: a file of `scripts/place.py`.

    Raises:
        ValueError: options that don't go together, or that the model or the devices can't do.
    """
    placed = None if placement is None else _read_placement(placement)
    if placed is not None:
        placed.check_model(len(spec.moe_layers), spec.moe[0].experts, None)
        if split is None and plan is None:
            raise ValueError(f"--placement {placement} is for a model on several devices: give --split or --plan too")
    if plan is not None:
        if split is not None or streaming is not None:
            raise ValueError(f"--plan {plan} brings its own split and expert memory: leave out --split and --expert-memory")
        read = load_plan(plan)
        spec = planned_spec(dataclasses.replace(spec, extra_heads=()), read.workload)
        read.check_model(spec.hash())
        work = read.workload
        _check_work(plan, work, rows, positions)
        offload = None if work.slots is None else Offload(work.slots, max(1, work.staging))
        on = devices_for(spec, read.split)
        _check_streamed(on, offload)
        _check_placed(placed, placement, on, offload)
        _check_copies(plan, work, spec, placed)
        return Planned(spec, on, offload, placed, work.prefill_tokens, work.positions)
    if split is None:
        return Planned(spec)
    on = devices_for(spec, parse_split(split))
    offload = None if streaming is None else _offload(spec, on, streaming, rows, positions)
    _check_streamed(on, offload)
    _check_placed(placed, placement, on, offload)
    whole_prompts = streaming is None or streaming.mode != "fused"
    return Planned(spec, on, offload, placed, None if whole_prompts else TOKEN_BUCKETS[-1])


def _check_work(plan: Path, work: Workload, rows: int, positions: int) -> None:
    """Refuses more than a plan was made for: its bytes are those of its own sequences."""
    if rows > work.rows:
        raise ValueError(f"--plan {plan} is for {work.rows} sequences, there are {rows}: plan with --rows {rows}")
    if positions > work.positions:
        tokens = f"{work.prompt} + {work.new_tokens} tokens"
        raise ValueError(f"--plan {plan} is for {tokens}, a request needs {positions}: plan with more --prompt or --new")


def _check_copies(plan: Path, work: Workload, spec: ModelSpec, placed: Placement | Replicas | None) -> None:
    """Refuses more copies of experts than a plan has room for."""
    copies = 0 if placed is None else placed.order.shape[1] - spec.moe[0].experts
    if copies > work.copies:
        room = f"--plan {plan} has room for {work.copies} copies of experts a layer"
        raise ValueError(f"{room}, the placement has {copies}: plan with --expert-copies {copies}")


def _read_placement(path: Path) -> Placement | Replicas:
    try:
        return read_placement(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _check_streamed(on: Devices, offload: Offload | None) -> None:
    split = on.layout.split
    if offload is not None and on.layout.experts and split.attention == "data" and split.exchange == "weights":
        raise SplitError("exchange = 'weights' sends experts that all stay on their devices: choose 'tokens', or leave out the expert memory")


def _check_placed(placed: Placement | Replicas | None, path: Path | None, on: Devices, offload: Offload | None) -> None:
    """Refuses, before any weights are read, what `load_model` would refuse."""
    if placed is None:
        return
    if placed.devices != on.layout.split.expert:
        raise SplitError(f"{path}: the placement is for {placed.devices} devices, the split {on.layout.split} has expert = {on.layout.split.expert}")
    if offload is not None:
        raise SplitError(f"{path}: a placement is for experts that all stay on their devices: leave out the placement or the expert memory")


def _offload(spec: ModelSpec, on: Devices, asked: Streaming, rows: int, positions: int) -> Offload | None:
    for name in ELSEWHERE:
        if getattr(asked, name) is not None:
            raise SplitError(f"{name} = {getattr(asked, name)!r} is for experts on one device: leave it or the split out")
    if asked.mode == "host-driven":
        raise SplitError("the mode 'host-driven' is for one device: choose fused or layer-grouped, or leave the split out")
    if jax.process_count() > 1 and parse_memory(asked.expert_memory).kind == "auto":
        raise SplitError("--expert-memory auto with several processes: give an amount, the same in all of them")
    own = bank_spec(spec, on.layout)
    found = make_plan(asked, own, -(-rows // on.layout.shards), positions)
    assert on.mesh is not None
    every, free = len(on.mesh.local_devices) * ExpertShapes.from_spec(own).all_bytes, available_host_memory()
    if not found.budget.all_resident and free is not None and every > free:
        held = f"{format_bytes(every)} of experts, of {len(on.mesh.local_devices)} devices"
        raise ValueError(f"{held}, don't fit into the {format_bytes(free)} of host memory that is available: use more hosts, or no expert memory")
    return None if found.budget.all_resident else Offload(found.budget.slots, found.budget.staging, found.asked.policy, fill=found.asked.fill)


def load_planned(
    planned: Planned, checkpoint: Checkpoint, kernels: Kernels, rows: int, positions: int, greedy: bool, eos: Sequence[int] = (),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Engine:  # fmt: skip
    """Reads each device's part of the weights and makes the engine; arguments as for `load_model` and `Engine`."""
    spec = planned.spec
    how: dict[str, Any] = {"offload": planned.offload, "progress": progress, "on": planned.on, "placement": planned.placement}
    model = load_model(checkpoint, spec.precision.params, kernels, **how)
    model = dataclasses.replace(model, spec=dataclasses.replace(model.spec, precision=spec.precision))
    exact, most = planned.positions is not None, planned.positions or positions
    programs = None
    if planned.switching:
        own = model.for_positions(most if exact else cache_positions(model.spec, most))
        programs = Switching(own.spec, kernels, greedy, planned.on, by_traffic(own.spec, planned.on, kernels, exchanges(planned)))
    return Engine(model, rows, most, greedy, eos, programs=programs, prefill_tokens=planned.prefill_tokens, exact=exact)


def exchanges(planned: Planned) -> tuple[Exchange, ...]:
    """What steps may switch between: experts that are streamed can't be sent."""
    return ("tokens", "gather", "weights") if planned.offload is None else ("tokens", "gather")


def switched(planned: Planned) -> Planned:
    """The same, each step by the exchange that sends the fewest bytes for its number of tokens (`jaxmoe.engine.switching`).

    Raises:
        SplitError: a split that has no exchange, or one with a layout of its own.
    """
    with_exchange(planned.on, "tokens")
    return dataclasses.replace(planned, switching=True)
