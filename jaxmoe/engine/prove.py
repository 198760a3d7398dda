"""A plan's own steps, compiled by the target's real compiler on a machine that has none of its devices: that they lower and fit, and the bytes they
take. It proves no speed.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable
from typing import Any

import jax
from jax._src.lib import xla_client

from jaxmoe.engine.abstract import AbstractStep, Phase, abstract_step
from jaxmoe.engine.mesh import devices_for
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels
from sharding import compile_only
from sharding.hlo import collectives
from sharding.plan import Plan
from sharding.split import Split
from sharding.workload import Workload


class NotProved(ValueError):
    """The compiler refuses a plan's program, or there is no compiler for its machine; one line."""


@dataclasses.dataclass(frozen=True)
class Program:
    """What the compiler says of one program, of one device.

    Attributes:
        argument, temp, output, alias: bytes on the device.
        host: bytes of arguments in host memory.
        compile_seconds: of this machine.
        optimal_seconds: XLA's own estimate, each loop body counted once and our kernels by what they declare; None where it has none.
        collectives: how many there are in the text, by kind.
    """

    argument: int
    temp: int
    output: int
    alias: int
    host: int
    compile_seconds: float
    optimal_seconds: float | None
    collectives: dict[str, int]

    @property
    def peak(self) -> int:
        """Bytes on the device while it runs."""
        return self.argument + self.output - self.alias + self.temp


@dataclasses.dataclass(frozen=True)
class Proved:
    """Attributes: `prefill` and `decode`, the two programs."""

    prefill: Program
    decode: Program

    @property
    def peak(self) -> int:
        """Bytes on the device while the larger one runs."""
        return max(self.prefill.peak, self.decode.peak)


def prove(plan: Plan, spec: ModelSpec, progress: Callable[[str], None] = lambda what: None) -> Proved:
    """Compiles a plan's prefill and decode steps for its machine.

    Args:
        plan: what to prove.
        spec: its model.
        progress: told what is being compiled.

    Raises:
        NotProved: there is no compiler for the machine here, or it refuses a program.
    """
    target = target_of(plan)
    found = {}
    for phase in ("prefill", "decode"):
        progress(f"compiling the {phase} step for {target}")
        found[phase] = compile_step(target, spec, plan.split, plan.workload, phase)
    return Proved(**found)


def target_of(plan: Plan) -> str:
    """The compile-only target that stands for a plan's machine.

    Raises:
        NotProved: there is none.
    """
    machine = plan.machine
    if machine.torus:
        return f"{machine.hardware.name}:{'x'.join(map(str, machine.topology))}"
    if machine.hardware.name == "h100":
        return f"h100:{plan.split.devices}"
    raise NotProved(f"hardware = {machine}: XLA compiles without devices for h100 and TPUs; plan for one of those to prove it")


def compile_step(target: str, spec: ModelSpec, split: Split, workload: Workload, phase: Phase) -> Program:
    """Compiles one step.

    Args:
        target: see `sharding.compile_only.devices`.
        spec, split, workload: what is planned.
        phase: 'prefill' or 'decode'.

    Raises:
        NotProved: as `prove`.
    """
    kernels = Kernels("gpu" if target.startswith("h100") else "tpu")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    try:
        devices = compile_only.devices(target)
    except (compile_only.MissingCompiler, ValueError) as error:
        raise NotProved(str(error)) from error
    if kernels.backend == "gpu" and workload.slots is not None:
        return _with_host(devices[0], spec, split, workload, phase, kernels)
    on = devices_for(spec, split, devices)
    began = time.perf_counter()
    compiled = _refused(lambda: abstract_step(spec, on, workload, kernels, phase).lower().compile(), target)
    seconds, optimal = time.perf_counter() - began, None if kernels.backend == "gpu" else optimal_seconds(compiled.cost_analysis())
    return _program(compiled.memory_analysis(), compiled.as_text(), seconds, optimal)


def optimal_seconds(costs: Any) -> float | None:
    """XLA's estimate out of `cost_analysis()`. For each operation that it has no time for it counts minus a second, which is taken out."""
    costs = costs[0] if isinstance(costs, list) else costs
    seconds = (costs or {}).get("optimal_seconds")
    return None if seconds is None else seconds - min(0, math.floor(seconds))


def _with_host(device: Any, spec: ModelSpec, split: Split, workload: Workload, phase: Phase, kernels: Kernels) -> Program:
    """For a GPU whose program reads host memory. Compile-only GPUs know no memory kinds, so the program is lowered with the CPU's shardings, which
    keep them, and handed to the GPU's compiler."""
    if split.devices > 1:
        raise NotProved(f"slots = {workload.slots} on {split.devices} GPUs: only one GPU's program that reads host memory compiles without a device")
    on = devices_for(spec, split, jax.devices("cpu"))
    step: AbstractStep = abstract_step(spec, on, workload, kernels, phase)
    began = time.perf_counter()
    settings = xla_client.CompileOptions()
    settings.env_option_overrides = list(kernels.compiler_options().items())
    module = step.step.trace(*step.args).lower(lowering_platforms=("cuda",)).compiler_ir("stablehlo")
    compiled = _refused(lambda: device.client.compile(module, xla_client.DeviceList((device,)), settings), "h100")
    text = compiled.hlo_modules()[0].to_string()
    return _program(compiled.get_compiled_memory_stats(), text, time.perf_counter() - began, None)


def _refused(compile_: Callable[[], Any], target: str) -> Any:
    try:
        return compile_()
    except jax.errors.JaxRuntimeError as error:
        raise NotProved(f"the compiler for {target} refuses the program: {' '.join(str(error).split())[:400]}") from error


def _program(stats: Any, text: str, seconds: float, optimal: float | None) -> Program:
    kinds: dict[str, int] = {}
    for one in collectives(text):
        kinds[one.kind] = kinds.get(one.kind, 0) + 1
    return Program(
        stats.argument_size_in_bytes, stats.temp_size_in_bytes, stats.output_size_in_bytes, stats.alias_size_in_bytes,
        stats.host_argument_size_in_bytes, seconds, optimal, dict(sorted(kinds.items())),
    )  # fmt: skip
