"""The shapes that planners compile are those that a run has: the arguments of each step as an engine on devices hands them over."""

import jax
import numpy as np
import pytest

from checkpoints.convert import convert
from checkpoints.load import open_checkpoint
from jaxmoe.engine.abstract import abstract_step
from jaxmoe.engine.generate import Engine, Request
from jaxmoe.engine.planned import choose_devices, load_planned
from jaxmoe.engine.streaming import Streaming
from pallas_kernels.dispatch import Kernels
from scripts import make_goldens
from scripts.golden_cases import CASES
from sharding.split import SplitError
from sharding.workload import Workload
from tests.checkpoints import hf_folders

KERNELS = Kernels("reference")
"""Their layers are stacked, as those of accelerators are."""

ROWS, PROMPT, NEW = 8, 200, 56


class Caught(Exception):
    """Ends a run."""


class Listening:
    """Programs that keep what they are called with, and run nothing."""

    stalled, groups = 0.0, 0

    def __init__(self):
        self.args = {}

    def prefill(self, *args):
        self.args["prefill"] = args
        return np.zeros(args[-1].shape, np.int32), args[2], ()

    def decode(self, *args):
        self.args["decode"] = args
        raise Caught


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """By name: biases, sinks and windows; a dense layer, biases of attention, few key-value heads; plain layers."""
    folder = tmp_path_factory.mktemp("abstract")
    make_goldens.write_folder(folder / "gpt_oss", CASES["gpt_oss_yarn"].config)
    for family in ("qwen3_moe", "olmoe"):
        hf_folders.tiny(folder / family, family, num_experts=8, max_position_embeddings=512)
    found = {}
    for name in ("gpt_oss", "qwen3_moe", "olmoe"):
        convert(folder / name, folder / f"{name}_converted")
        found[name] = open_checkpoint(folder / f"{name}_converted")
    return found


def engine_args(checkpoint, split: str, streaming: Streaming | None) -> tuple[Engine, dict]:
    """An engine's, of a full prefill step and of a decode step."""
    spec = checkpoint.spec.with_precision("float32")
    found = choose_devices(spec, split, None, streaming, ROWS, PROMPT + NEW)
    engine = load_planned(found, checkpoint, KERNELS, ROWS, PROMPT + NEW, True)
    engine.programs = Listening()
    with pytest.raises(Caught):
        engine.generate([Request((1,) * PROMPT, NEW)] * ROWS)
    return engine, engine.programs.args


def same_place(real: jax.Array, shape: jax.ShapeDtypeStruct) -> bool:
    kind = shape.sharding.memory_kind or jax.devices()[0].default_memory().kind
    return real.sharding.is_equivalent_to(shape.sharding, real.ndim) and real.sharding.memory_kind == kind


def shape_and_dtype(x) -> tuple:
    return np.shape(x), np.dtype(x.dtype) if hasattr(x, "dtype") else np.asarray(x).dtype


@pytest.mark.parametrize(
    "name, split, memory",
    [
        ("gpt_oss", "data=2,expert=2,tensor=2", None),
        ("qwen3_moe", "expert=2,tensor=4", None),
        ("qwen3_moe", "data=2,expert=2,tensor=2", "75%"),
        ("olmoe", "stage=2,expert=2,sequence=2", None),
    ],
)
def test_arguments_are_those_of_a_run(checkpoints, name, split, memory):
    engine, found = engine_args(checkpoints[name], split, None if memory is None else Streaming(memory))
    model = engine.model
    slots = None if memory is None else model.bank.slots[0]
    work = Workload(rows=ROWS, prompt=PROMPT, new_tokens=NEW, dtype="float32", kv_dtype="float32", slots=slots)
    for phase in ("prefill", "decode"):
        made = abstract_step(checkpoints[name].spec, model.on, work, KERNELS, phase)
        assert made.spec == model.spec
        names = ("params", "bank", "state", *(f"rest {i}" for i in range(len(made.args) - 3)))
        for what, real, shapes in zip(names, found[phase], made.args, strict=True):
            assert jax.tree.structure(real) == jax.tree.structure(shapes), (phase, what)
            for (path, x), s in zip(jax.tree.leaves_with_path(real), jax.tree.leaves(shapes), strict=True):
                where = phase, what, jax.tree_util.keystr(path)
                assert shape_and_dtype(x) == shape_and_dtype(s), where
                assert not isinstance(x, jax.Array) or what.startswith("rest") or same_place(x, s), (where, x.sharding, s.sharding)


def test_a_step_that_can_not_be(checkpoints):
    spec = checkpoints["olmoe"].spec
    on = choose_devices(spec, "data=2,expert=2", None, None, 4, 100).on
    with pytest.raises(SplitError, match="rows = 6 don't divide among 4 groups"):
        abstract_step(spec, on, Workload(rows=6), KERNELS, "decode")
    with pytest.raises(ValueError, match="slots"):
        abstract_step(spec, on, Workload(rows=4, slots=1), KERNELS, "decode")
