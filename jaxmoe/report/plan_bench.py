"""Predicted bytes and times of plans beside what XLA's compilers for TPUs and an H100 say of the very programs, with none of the devices there.

A prediction is made where nothing can be compiled (`no_compiler`); so it is of shapes alone. Compiled is the whole jitted step, at full depth.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import jax
from jax._src import compiler
from scipy import stats

from jaxmoe.engine.prove import compile_step
from jaxmoe.report.record import make_bound, make_record
from jaxmoe.spec import ModelSpec
from jaxmoe.spec.published import published
from sharding.hardware import Machine, parse_hardware
from sharding.memory import Bytes, device_bytes
from sharding.phases import decode_phase, prefill_phases
from sharding.split import layout_of, parse_split
from sharding.time_model import step_time
from sharding.workload import Workload

Phase = Literal["prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Case:
    """A model (a name of `jaxmoe.spec.published`), a machine as `parse_hardware` reads it, a split, which step, and the workload."""

    model: str
    target: str
    split: str
    phase: Phase
    workload: Workload = Workload()

    @property
    def name(self) -> str:
        """As a file is called."""
        slots = "" if self.workload.slots is None else f"-slots{self.workload.slots}"
        prompt = "" if self.workload.prompt == Workload().prompt else f"-prompt{self.workload.prompt}"
        split = self.split.replace("=", "").replace(",", "_").replace("attention", "") or "alone"
        return f"{self.model}-{self.target.replace(':', '_')}-{split}-{self.phase}{slots}{prompt}"

    @property
    def backend(self) -> Literal["tpu", "gpu"]:
        """Whose kernels run."""
        return "gpu" if self.target.startswith("h100") else "tpu"

    @property
    def held_out(self) -> bool:
        """Whether no formula was fitted to it."""
        return any((self.model, self.target, self.split, self.workload) == (*case[:3], case[4]) for case in HELD_OUT)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What a compiler says: bytes of one device, the program's `optimal_seconds` (None where it says nothing), and how long compiling took."""

    argument: int
    output: int
    alias: int
    temp: int
    host: int
    optimal: float | None
    seconds: float

    @property
    def total(self) -> int:
        """Bytes of the device while the program runs."""
        return self.argument + self.output - self.alias + self.temp


@dataclasses.dataclass(frozen=True)
class Row:
    """A case with what was predicted of it, bytes and seconds, and what its compiler says."""

    case: Case
    predicted: Bytes
    seconds: float
    compiled: Compiled

    @property
    def error(self) -> float:
        """Of the predicted total, as a share of the compiler's."""
        return self.predicted.total / self.compiled.total - 1


SPLITS: tuple[tuple[str, str, str, tuple[Phase, ...], int, int | None], ...] = (
    ("mixtral_8x7b", "v5e:2x4", "tensor=8", ("decode", "prefill"), 16, None),
    ("qwen3_30b_a3b", "v5e:2x4", "expert=8,attention=tensor", ("decode", "prefill"), 16, None),
    ("qwen3_30b_a3b", "v5e:4x4", "expert=16", ("decode", "prefill"), 128, None),
    ("olmoe_1b_7b", "v5e:2x2", "expert=4", ("decode", "prefill"), 32, None),
    ("gpt_oss_20b", "v5e:2x2", "expert=4,attention=tensor", ("decode", "prefill"), 16, None),
    ("deepseek_v2_lite", "v5e:2x2", "data=2,expert=2,attention=tensor", ("decode", "prefill"), 16, None),
    ("gpt_oss_20b", "v5e:2x2", "", ("decode",), 8, 8),
    ("qwen3_30b_a3b", "v5e:2x2", "expert=4", ("decode",), 32, 8),
    ("deepseek_v3", "v5p:8x8x4", "expert=256", ("decode",), 2048, None),
    ("deepseek_v3", "v5p:4x4x4", "expert=32,tensor=2", ("decode",), 256, None),
    ("gpt_oss_120b", "v5p:2x2x1", "expert=4", ("decode", "prefill"), 64, None),
    ("mixtral_8x7b", "v5p:2x2x1", "data=2,tensor=2", ("decode", "prefill"), 64, None),
    ("llama_4_scout_17b_16e_instruct", "v5p:2x2x1", "expert=4,attention=tensor", ("decode",), 16, None),
    ("deepseek_v3", "v6e:16x16", "expert=32,tensor=8", ("decode",), 256, None),
    ("qwen3_30b_a3b", "v6e:2x4", "expert=4,tensor=2", ("decode",), 64, None),
    ("glm_4_5_air", "v6e:4x4", "data=2,expert=8,attention=tensor", ("decode", "prefill"), 32, None),
    ("phi_3_5_moe", "v6e:2x2", "tensor=4", ("decode", "prefill"), 16, None),
    ("qwen3_30b_a3b", "v6e:2x2", "", ("decode",), 8, 32),
    ("mixtral_8x7b", "v6e:2x2", "", ("decode",), 4, 2),
    ("qwen3_235b_a22b", "tpu7x:2x2x2", "expert=16,attention=tensor", ("decode", "prefill"), 64, None),
    ("deepseek_v3", "tpu7x:4x4x4", "expert=64,tensor=2", ("decode",), 512, None),
    ("gpt_oss_120b", "tpu7x:2x2x1", "expert=8,attention=tensor", ("decode", "prefill"), 64, None),
    ("mixtral_8x7b", "tpu7x:2x2x1", "tensor=8", ("decode",), 64, None),
    ("olmoe_1b_7b", "h100", "", ("decode", "prefill"), 8, None),
    ("mixtral_8x7b", "h100:8", "tensor=8", ("decode", "prefill"), 16, None),
    ("qwen3_30b_a3b", "h100:8", "expert=8", ("decode", "prefill"), 64, None),
    ("gpt_oss_120b", "h100:8", "expert=8,attention=tensor", ("decode",), 64, None),
    ("qwen3_235b_a22b", "h100:8", "expert=8,attention=tensor", ("decode", "prefill"), 64, None),
    ("qwen3_30b_a3b", "h100", "", ("decode",), 1, 32),
)
"""Model, machine, split, steps, sequences, and slots of each layer where experts are in the host's memory. The formulas of temporaries were fitted to
these (`sharding.temporaries`)."""

BOTH: tuple[Phase, ...] = ("decode", "prefill")
HELD_OUT: tuple[tuple[str, str, str, tuple[Phase, ...], Workload], ...] = (
    ("ernie_4_5_21b_a3b", "v6e:2x2", "expert=4", BOTH, Workload(32)),
    ("granite_3_1_3b_a800m", "v5e:2x2", "data=2,tensor=2", BOTH, Workload(16, 2048)),
    ("qwen1_5_moe_a2_7b", "v5e:2x2", "expert=2,tensor=2", ("decode",), Workload(8)),
    ("olmoe_1b_7b", "v6e:2x2", "expert=4", ("prefill",), Workload(8, 4096, prefill_tokens=2048)),
    ("qwen3_next_80b_a3b", "v5p:2x2x2", "expert=8,attention=tensor", ("decode",), Workload(16)),
    ("dots_llm1", "v6e:4x4", "expert=16,attention=tensor", ("decode",), Workload(64)),
    ("minimax_m2", "tpu7x:2x2x2", "expert=16", ("decode",), Workload(128)),
    ("mixtral_8x7b", "v5e:2x4", "stage=4,tensor=2", BOTH, Workload(16)),
    ("qwen3_30b_a3b", "v5p:2x2x2", "expert=2,sequence=4", BOTH, Workload(8, 8192)),
    ("qwen3_30b_a3b", "v5e:2x4", "expert=8,exchange=gather", ("decode",), Workload(64)),
    ("qwen3_30b_a3b", "v5p:2x2x2", "expert=8,exchange=weights", BOTH, Workload(64)),
    ("llama_4_scout_17b_16e_instruct", "v5p:2x2x1", "expert=4,exchange=coherent", ("decode",), Workload(16)),
    ("granite_3_1_1b_a400m", "v5e:2x2", "", BOTH, Workload(8, slots=16)),
    ("deepseek_v2", "h100:8", "expert=8,attention=tensor", BOTH, Workload(32)),
    ("olmoe_1b_7b", "h100", "", ("prefill",), Workload(4, 4096, prefill_tokens=2048)),
    ("gpt_oss_120b", "h100:8", "data=2,expert=4", ("decode",), Workload(64)),
)
"""Others, compiled once after that to see what the formulas are worth: small models, long prompts, other families and other ways to split. No formula
of bytes was changed for them."""


def cases() -> list[Case]:
    """All of them."""
    fitted = ((*case[:4], Workload(rows=case[4], slots=case[5])) for case in SPLITS)
    return [Case(model, target, split, phase, work) for model, target, split, phases, work in (*fitted, *HELD_OUT) for phase in phases]


def read_model(name: str) -> ModelSpec:
    """A published model in bfloat16, without its heads for more tokens at once.

    Raises:
        SpecError: there is none of the name.
    """
    return dataclasses.replace(published(name).with_precision("bfloat16"), extra_heads=())


@contextlib.contextmanager
def no_compiler() -> Iterator[None]:
    """While this lasts, whatever asks XLA to compile fails."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a prediction asked XLA to compile something")

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(jax.stages.Lowered, "compile", refuse))
        for name in ("compile_or_get_cached", "backend_compile_and_load"):
            stack.enter_context(mock.patch.object(compiler, name, refuse))
        yield


def predict(case: Case) -> tuple[Bytes, float]:
    """Bytes of a device, and seconds as XLA's `optimal_seconds` counts them: each loop body once, all rows that kernels have room for, the copies
    that the compiler makes, and nothing for the host's link or the launch."""
    with no_compiler():
        spec, split = read_model(case.model), parse_split(case.split)
        layout = layout_of(spec, split)
        found = device_bytes(spec, layout, case.workload, case.backend, machine(case).hardware, case.phase)
        phase = decode_phase(case.workload, layout) if case.phase == "decode" else prefill_phases(case.workload, layout)[0]
        time = step_time(spec, machine(case), layout, case.workload, phase, "compiled", temporaries=found.temporaries)
        return found, time.expected - time.host - time.launch


def machine(case: Case) -> Machine:
    """The case's."""
    return parse_hardware(case.target)


def compile_case(case: Case) -> Compiled:
    """Lowers and compiles the step; what its compiler says.

    Raises:
        NotProved: it isn't installed, or it refuses the program.
    """
    program = compile_step(case.target, read_model(case.model), parse_split(case.split), case.workload, case.phase)
    sizes = (program.argument, program.output, program.alias, program.temp, program.host)
    return Compiled(*sizes, program.optimal_seconds, program.compile_seconds)


def rank_correlation(rows: Sequence[Row]) -> float | None:
    """Spearman's, of predicted seconds and XLA's; None for fewer than three.

    Without cases whose experts come from the host: XLA counts a loop over missing experts as one pass.
    """
    known = [(row.seconds, row.compiled.optimal) for row in rows if row.compiled.optimal is not None and row.case.workload.resident]
    return float(stats.spearmanr(*zip(*known, strict=True)).statistic) if len(known) > 2 else None


def record(row: Row) -> dict[str, Any]:
    """A benchmark record."""
    case, c = row.case, row.compiled
    usable = machine(case).hardware.usable_bytes
    settings = {
        "model": case.model, "target": case.target, "split": case.split, "phase": case.phase, "workload": case.workload.to_json(),
        "predicted": row.predicted.to_json(), "predicted_seconds": row.seconds, "optimal_seconds": c.optimal, "held_out": case.held_out,
    }  # fmt: skip
    sizes = {"argument": c.argument, "output": c.output, "alias": c.alias, "temp": c.temp, "host": c.host, "total": c.total}
    return make_record(
        "plans", read_model(case.model).hash(), settings, {}, {}, c.seconds, sizes, {"error_percent": 100 * row.error},
        make_bound("capacity", usable / 1e9, c.total / 1e9, "GB"),
    )  # fmt: skip


def write(row: Row, folder: Path) -> Path:
    """Writes a case's record."""
    path = path_of(row.case, folder)
    path.write_text(json.dumps(record(row), indent=1) + "\n")
    return path


def predict_again(row: Row, folder: Path) -> None:
    """Puts today's prediction into a case's record; what was compiled, and when, stays."""
    path = path_of(row.case, folder)
    data, new = json.loads(path.read_text()), record(row)
    settings = {name: new["settings"][name] for name in ("predicted", "predicted_seconds", "held_out")}
    path.write_text(json.dumps(data | {"settings": data["settings"] | settings, "counters": new["counters"]}, indent=1) + "\n")


def path_of(case: Case, folder: Path) -> Path:
    """Where a case's record is."""
    return folder / f"plans_{case.name}.json"


def read(case: Case, folder: Path) -> Row | None:
    """A case's row from its record, predicted anew; None where there is no record."""
    path = path_of(case, folder)
    if not path.exists():
        return None
    data = json.loads(path.read_text())
    sizes = data["bytes"]
    c = Compiled(
        sizes["argument"], sizes["output"], sizes["alias"], sizes["temp"], sizes["host"], data["settings"]["optimal_seconds"], data["compile_seconds"]
    )
    return Row(case, *predict(case), c)
