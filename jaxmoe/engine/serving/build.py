"""From what a user asks for to an engine that serves: checks first, weights last."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp

from checkpoints.load import Checkpoint
from jaxmoe.decode.grammar import GrammarCompiler
from jaxmoe.engine.memory import RESERVE, available_host_memory
from jaxmoe.engine.model import Offload, load_model, read_store
from jaxmoe.engine.serving.core import ServingEngine
from jaxmoe.engine.serving.fitting import Fitted, check_host, fit
from jaxmoe.engine.serving.host_programs import HostPrograms
from jaxmoe.engine.serving.memory import ServeMemory
from jaxmoe.engine.serving.objective import Policy, check_policy
from jaxmoe.engine.serving.paths import BLIND, RequestPaths, by_token_seen
from jaxmoe.engine.serving.prefix import fingerprint
from jaxmoe.engine.serving.runner import Runner
from jaxmoe.engine.serving.types import PrefillMode
from jaxmoe.engine.text import Tokenizer
from jaxmoe.experts.source import ExpertSource
from jaxmoe.nn.transformer import layer_groups
from jaxmoe.offload import bounds
from jaxmoe.offload.knowledge import knowledge
from jaxmoe.offload.link import Link
from jaxmoe.offload.super_experts import read_pinned
from jaxmoe.offload.trace import PROMPT, as_teacher_forced, check_model, load_or_import
from jaxmoe.residency import find_policy
from jaxmoe.spec import DeltaSpec, ModelSpec
from pallas_kernels.dispatch import Kernels
from sharding.plan import load_plan, planned_spec

Mode = Literal["fused", "host-driven"]
STREAMED_GROUPS = 8
"""Groups of layers that a prompt goes through where experts are streamed, if a model has so many layers and nobody says otherwise."""


@dataclasses.dataclass(frozen=True)
class Serving:
    """What a user may ask for.

    Attributes:
        memory: the device's memory, and the engine's sizes; `groups` 0 takes as many as suit the model.
        policy: how steps are put together; its `prefill` is 'layered' for streamed experts and 'chunked' for resident ones if None is given here.
        prefill: see `policy`.
        mode: 'fused' brings experts inside the compiled steps, 'host-driven' has the host send them.
        link_gbps: emulate a link of this speed; needs the host-driven mode.
        trace: a routing trace of the model, by which slots are shared out over the layers.
        pinned: a file of experts that never leave once they are there (`jaxmoe.offload.super_experts`).
        max_waiting: requests that may wait before others are turned away.
        regret: count what the best policy would have loaded; takes some of the host's time.
    """

    memory: ServeMemory
    policy: Policy = Policy()
    prefill: PrefillMode | None = None
    mode: Mode = "fused"
    link_gbps: float | None = None
    trace: Path | None = None
    max_waiting: int | None = 1024
    regret: bool = False
    pinned: Path | None = None


@dataclasses.dataclass(frozen=True)
class ServingPlan:
    """A request that was checked. Attributes: `fitted` what the memory comes to, `policy` with its mode of prefill."""

    asked: Serving
    fitted: Fitted
    policy: Policy


def as_planned(asked: Serving, path: Path, spec: ModelSpec) -> tuple[Serving, ModelSpec]:
    """A request as a file of `scripts/plan.py` has it: precision, sequences, positions, and how many experts stay on the device.

    Args:
        asked: what else is asked for; it says none of these.
        path: the plan's file.
        spec: the model.

    Returns:
        The request, and the model in the plan's precision.

    Raises:
        ValueError: a plan of several devices, of another model, or none.
    """
    plan = load_plan(path)
    if plan.split.devices > 1:
        wide = f"{plan.split.devices} devices ({plan.split})"
        raise ValueError(f"{path}: a plan for {wide}, and serving is for one: plan for one, such as --hardware h100:1")
    work = plan.workload
    spec = planned_spec(dataclasses.replace(spec, extra_heads=()), work)
    plan.check_model(spec.hash())
    memory = dataclasses.replace(
        asked.memory, slots=work.rows, positions=work.positions, staging=max(1, work.staging), kv_dtype=work.kv_dtype,
        expert_slots=spec.moe[0].experts if work.slots is None else work.slots,
    )  # fmt: skip
    return dataclasses.replace(asked, memory=memory), spec


def make_serving_plan(asked: Serving, spec: ModelSpec, kernels: Kernels, free: int | None = None) -> ServingPlan:
    """Checks a request against the model and this machine; reads no weights.

    Args:
        asked: the request.
        spec: the model, in the precision that it is to run in.
        kernels: of the device.
        free: bytes that the device has; asked of it if not given.

    Raises:
        ValueError: sizes, policies or a memory that don't go together; the message says which, and what would.
    """
    Link(asked.link_gbps)  # refuses a speed that is none
    if asked.link_gbps is not None and asked.mode != "host-driven":
        raise ValueError(f"a link of {asked.link_gbps} GB/s is emulated where the host sends experts: choose the mode host-driven, not {asked.mode}")
    find_policy(asked.memory.policy)
    memory, curves = asked.memory, None
    pieces = sum(segment.repeats for segment in spec.segments)
    memory = dataclasses.replace(
        memory, unrolled=False, sharing=memory.sharing and not any(isinstance(kind, DeltaSpec) for kind in spec.state_kinds),
        groups=memory.groups or min(STREAMED_GROUPS, pieces), positions=min(memory.positions, spec.max_positions), link_gbps=asked.link_gbps,
        prefill=asked.prefill, host_driven=asked.mode == "host-driven",
    )  # fmt: skip
    layer_groups(spec, memory.groups)
    if asked.trace is not None:
        trace = load_or_import(asked.trace)
        check_model(trace, spec)
        counted = as_teacher_forced(trace) if (trace.phase == PROMPT).all() else trace
        curves = bounds.marginal_hits(counted)
        memory = dataclasses.replace(memory, knowledge=knowledge(trace, find_policy(memory.policy)))
    if asked.pinned is not None:
        mask = read_pinned(asked.pinned, spec, memory.policy, None)
        memory = dataclasses.replace(memory, knowledge=dataclasses.replace(memory.knowledge, pinned=None if mask is None else jnp.asarray(mask)))
    fitted = fit(spec, memory, kernels, _free_bytes() if free is None else free, curves)
    if asked.pinned is not None and not fitted.resident:
        read_pinned(asked.pinned, spec, memory.policy, fitted.slots)  # refuses more than there are slots
    check_host(fitted, available_host_memory(), jax.devices()[0].platform == "cpu")
    prefill: PrefillMode = asked.prefill or ("chunked" if fitted.resident else "layered")
    policy = dataclasses.replace(asked.policy, prefill=prefill)
    check_policy(fitted.spec, policy)
    if asked.mode == "host-driven" and fitted.resident:
        raise ValueError("the mode host-driven is for experts that don't all fit on the device, and here they do: give the experts less memory")
    learned = (["the regret"] if asked.regret else []) + (["a policy that goes by experts"] if by_experts(policy) else [])
    if learned and (fitted.resident or asked.mode == "host-driven"):
        why = "all experts are on the device" if fitted.resident else "where the host sends experts it does not record their routing"
        raise ValueError(f"{learned[0]} needs the routing of streamed experts, and {why}: leave it out")
    return ServingPlan(asked, fitted, policy)


def load_serving(
    plan: ServingPlan, checkpoint: Checkpoint, kernels: Kernels, tokenizer: Tokenizer | None, name: str = "jaxmoe", dtype: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ServingEngine:  # fmt: skip
    """Reads the weights and makes the engine, which still has to be warmed up.

    Args:
        plan: of `make_serving_plan`.
        checkpoint, kernels: as for `load_model`.
        tokenizer: for text; its end-of-text ids end answers.
        name: of the model, for answers.
        dtype: as for `load_model`; the checkpoint's own if not given.
        progress: called with experts read and experts in all.
    """
    fitted, memory = plan.fitted, plan.fitted.asked
    dtype = dtype or checkpoint.spec.precision.params
    host = plan.asked.mode == "host-driven"
    offload = None
    if not fitted.resident:
        assert fitted.slots is not None
        offload = Offload(fitted.slots, fitted.staging, memory.policy, memory.knowledge, store=not host)
    # Stacked layers compile in the time of one; what slicing them costs the CPU is little beside a step.
    model = load_model(checkpoint, dtype, kernels, False, offload, progress)
    run = None
    if host:
        source = ExpertSource(model.spec, read_store(checkpoint, model.spec, progress, kernels.expert_layout))
        run = HostPrograms(model, fitted.spec, source, Link(plan.asked.link_gbps))
    eos = () if tokenizer is None else tokenizer.eos_ids
    foretold = by_experts(plan.policy)
    runner = Runner(model, fitted.spec, eos, memory.kv_dtype, run, foretold or plan.asked.regret, plan.asked.regret)
    paths = None
    if foretold:
        router, _ = model.spec.moe
        paths = RequestPaths(by_token_seen(len(model.spec.moe_layers), router.experts, router.active), runner, plan.policy)
    salt = fingerprint(model.spec.hash(), memory.kv_dtype or model.spec.precision.kv, fitted.spec.page)
    return ServingEngine(runner, tokenizer, eos, plan.policy, name, max_waiting=plan.asked.max_waiting, salt=salt, paths=paths,
                         longest=min(plan.asked.memory.positions, checkpoint.spec.max_positions))  # fmt: skip


def by_experts(policy: Policy) -> bool:
    """Whether a policy asks what experts sequences will ask for."""
    return bool(policy.weights.experts) or policy.group not in BLIND


def grammar_compiler(spec: ModelSpec, tokenizer: Tokenizer) -> GrammarCompiler | None:
    """What turns schemas and grammars into masks for a model; None where its texts have no end.

    Raises:
        ValueError: llguidance is not installed, or can't read the tokenizer.
    """
    if not tokenizer.eos_ids:
        return None
    try:
        return GrammarCompiler(Path(tokenizer.folder) / "tokenizer.json", spec.vocab, tokenizer.eos_ids)
    except (ImportError, ValueError) as error:
        raise ValueError(f"{error}; --grammar-backend none serves without structured output") from error


def _free_bytes() -> int | None:
    """What the device has free; None where it does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return None if "bytes_limit" not in stats else int(stats["bytes_limit"] * (1 - RESERVE) - stats.get("bytes_in_use", 0))
