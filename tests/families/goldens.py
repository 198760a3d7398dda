"""What every golden case goes through. The files `test_goldens_*.py` collect these tests, each for its own `FAMILIES`, so that workers share them.

Tests with an argument `name` run for every case of those families; with `first`, for the first one of each family, which has the most in it. They are
ordered by case, and the steps that a case compiled are dropped when the next one begins: a process can map only so many programs.
"""

import dataclasses
import gc
import json
from pathlib import Path

import jax
import numpy as np

from checkpoints.convert import convert
from checkpoints.load import Checkpoint, open_checkpoint
from jaxmoe.engine import steps
from jaxmoe.engine.model import Model, load_model
from jaxmoe.spec import ModelSpec
from pallas_kernels.dispatch import Kernels
from scripts import golden_cases, make_goldens
from scripts.golden_cases import CASES
from tests.models import decode_logits, host_driven_step, prefill_logits, slot_model
from tests.quick import QuickKernels

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
TOLERANCE = 2e-5

DECODED = 12
"""Tokens of each sequence that are decoded one by one, where all would take long."""

POSITIONS = 256
"""Of every sequence's cache; longrope takes its long factors where this is more than a model was trained on."""


def golden(name: str) -> tuple[dict, list[np.ndarray], list[np.ndarray]]:
    """(what NAME.json says, ids, logits) of a case."""
    made = json.loads((GOLDENS / f"{name}.json").read_text())
    with np.load(GOLDENS / f"{name}.npz") as arrays:
        return made, [arrays["ids_0"], arrays["ids_1"]], [arrays["logits_0"], arrays["logits_1"]]


@dataclasses.dataclass
class Run:
    """A case: its converted folder, and, once asked for, the model as the CPU runs it by default with the logits of both sequences together.

    `quick` has it compiled in less time, where no other run is held to its bits.
    """

    name: str
    checkpoint: Checkpoint
    ids: list[np.ndarray]
    expected: list[np.ndarray]
    quick: bool = False
    _found: tuple[Model, list[np.ndarray]] | None = None

    def load(self, dtype: str, kernels: Kernels, unroll: bool | None = None) -> Model:
        """The model in another way."""
        return load_model(self.checkpoint, dtype, kernels, unroll).for_positions(POSITIONS)

    @property
    def on_cpu(self) -> tuple[Model, list[np.ndarray]]:
        """(model, logits)"""
        if self._found is None:
            model = self.load("float32", QuickKernels("cpu") if self.quick else Kernels("cpu"))
            self._found = model, together(model, self.ids)
        return self._found

    @property
    def requests(self) -> list[list[int]]:
        """The sequences' ids."""
        return [list(map(int, i)) for i in self.ids]


def make_run(name: str, folder: Path, quick: bool = False) -> Run:
    """A case, written, converted and opened in `folder`."""
    made, ids, expected = golden(name)
    make_goldens.write_folder(folder / "hf", made["config"], made["seed"])
    convert(folder / "hf", folder / "converted")
    return Run(name, open_checkpoint(folder / "converted"), ids, expected, quick)


MAPS = 20_000
"""Of the 65,530 that Linux gives a process, how many may be in use before small programs are dropped as well."""


def forget_programs() -> None:
    """Drops every compiled step: its program goes with the function. Single operations stay, most of which the next case wants again."""
    for cached in (steps.prefill_step, steps.logits_step, steps.decode_step):
        cached.cache_clear()
    gc.collect()
    maps = Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > MAPS:
        jax.clear_caches()


def together(model: Model, ids: list[np.ndarray]) -> list[np.ndarray]:
    """Both sequences in one step."""
    requests = [list(map(int, i)) for i in ids]
    tokens = 128 if max(map(len, requests)) <= 64 else 256
    return prefill_logits(model, requests, [[(i, 0, len(r)) for i, r in enumerate(requests)]], tokens, positions=POSITIONS)


def worst(got: list[np.ndarray], expected: list[np.ndarray]) -> float:
    return max(float(np.abs(g - e).max()) for g, e in zip(got, expected, strict=True))


def same_bits(got: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(np.array_equal(g.view(np.uint32), e.view(np.uint32)) for g, e in zip(got, expected, strict=True))


def test_the_golden_is_of_this_case(name):
    made, ids, logits = golden(name)
    case = CASES[name]
    assert made["config"] == case.config
    assert made["unsteady"] <= make_goldens.STEADY
    assert make_goldens.digest(made["config"], made["seed"]) == made["weights_sha256"], "the weights are those that transformers ran"
    for i, expected in zip(ids, logits, strict=True):
        assert len(expected) == len(i) and expected.dtype == np.float32
        assert expected.std() > 0.3 and np.abs(expected).max() < 50


def test_fields_that_matter_change_the_spec(name):
    """transformers gave other logits with each of these changes (`make_goldens.py` saw to it), so they must change the graph."""
    case, made = CASES[name], golden(name)[0]
    assert [one["change"] for one in made["matters"]] == list(case.matters)
    for one in made["matters"]:
        assert one["logits"] >= make_goldens.MATTERS
        assert ModelSpec.from_hf({**case.config, **one["change"]}) != ModelSpec.from_hf(case.config)


def test_stacked_layers_and_plain_kernels(run, name):
    """The form that accelerators run: layers scanned, caches gathered, no CPU kernels; both sequences in one ragged batch."""
    model = run.load("float32", QuickKernels("reference"), unroll=False)
    assert worst(together(model, run.ids), run.expected) <= TOLERANCE


def test_prompts_in_a_ragged_batch(run, first):
    """As the CPU runs them by default."""
    assert worst(run.on_cpu[1], run.expected) <= TOLERANCE


def test_decoding_gives_the_bits_of_the_prompt(run, halved):
    """Token by token out of the cache, alone and side by side, for the families that have every kind of attention and of state among them."""
    model, expected = run.on_cpu
    short, cut = [r[:DECODED] for r in run.requests], [e[:DECODED] for e in expected]
    assert same_bits(decode_logits(model, short, 4, positions=POSITIONS), cut)
    assert same_bits(decode_logits(model, short[:1], 4, rows=2, positions=POSITIONS), cut[:1])


def test_decoding_a_single_row_gives_the_bits_of_the_prompt(run, halved):
    """By the program of one row, whose kernels are others."""
    model, expected = run.on_cpu
    (short, _), (cut, _) = [r[:DECODED] for r in run.requests], [e[:DECODED] for e in expected]
    assert same_bits(decode_logits(model, [short], 1, rows=2, positions=POSITIONS), [cut])


def test_a_prompt_in_pieces_and_alone_gives_the_same_bits(run, halved):
    model, expected = run.on_cpu
    requests = run.requests
    longest = max(map(len, requests))
    borders = [0, 17, 20, *range(60, longest, 60), longest]
    cuts = zip(borders, borders[1:], strict=False)
    pieces = [[(i, start, min(stop, len(r))) for i, r in enumerate(requests) if start < len(r)] for start, stop in cuts]
    assert same_bits(prefill_logits(model, requests, pieces, 128, positions=POSITIONS), expected)
    alone, bucket = requests[1:], 128 if len(requests[1]) <= 128 else 256
    assert same_bits(prefill_logits(model, alone, [[(0, 0, len(alone[0]))]], bucket, rows=2, positions=POSITIONS), expected[1:])


def test_streamed_experts_at_the_smallest_budget_give_the_resident_bits(run, decoded):
    """As many slots a layer as a token needs experts, and one to pass through: sequences side by side ask for more, and go in waves."""
    model, expected = run.on_cpu
    streamed = slot_model(model, model.spec.moe[0].active, staging=1)
    short, cut = [r[:DECODED] for r in run.requests], [e[:DECODED] for e in expected]
    assert same_bits(decode_logits(streamed, short, 4, positions=POSITIONS), cut)


def test_a_prompt_with_streamed_experts_gives_the_resident_bits(run, prompted):
    model, expected = run.on_cpu
    assert same_bits(together(slot_model(model, model.spec.moe[0].active, staging=1), run.ids), expected)


def test_experts_sent_by_the_host_give_the_resident_bits(run, decoded):
    """The step cut in two at every MoE layer, for the families whose layers end in a way of their own."""
    model, expected = run.on_cpu
    streamed = slot_model(model, model.spec.moe[0].active, staging=1)
    short, cut = [r[:DECODED] for r in run.requests], [e[:DECODED] for e in expected]
    assert same_bits(decode_logits(streamed, short, 4, positions=POSITIONS, step=host_driven_step(streamed)), cut)


def test_bfloat16_stays_near(run, halved):
    got = together(run.load("bfloat16", QuickKernels("cpu")), run.ids)
    errors = np.concatenate([np.linalg.norm(g - e, axis=1) / np.linalg.norm(e, axis=1) for g, e in zip(got, run.expected, strict=True)])
    assert np.median(errors) < 0.06 and not np.isnan(errors).any()


HALVED = ("deepseek_v3", "gemma4_text", "gpt_oss", "granitemoeshared", "llama4_text", "mixtral", "phimoe", "qwen3_next")
"""Families whose kinds of layers end differently from one another: shared experts, with a gate, scaled residuals, norms after experts, a dense
network beside them, biases, scaled inputs. A bank of slots sees no more of a family than that: rows, ids and weights come to it as to a resident
one. A compiled step of streamed experts runs for half of them as a prompt and for the others as decoding, in waves either way: how a layer ends does
not depend on how many tokens there are (that prompts and decoding give the same bits is tested for every family, and that both do with streamed
experts in `tests/engine/test_slots_cover.py`)."""

AMONG = {"halved": HALVED, "prompted": HALVED[0::2], "decoded": HALVED[1::2]}
"""Families that tests with these arguments are for."""

BITS = [next(iter(golden_cases.FAMILIES[family])) for family in HALVED]
"""Cases with runs that are held to each other's bits."""

ALWAYS = {
    "halved": ("deepseek_v3", "gpt_oss", "llama4_text", "qwen3_next"),
    "prompted": ("gpt_oss", "llama4_text"),
    "decoded": ("gemma4_text", "qwen3_next"),
}
"""Those of them that have a kind of attention, of state or of expert that no other has: latents; biases and sinks; chunks, and inputs that are
scaled; a delta rule, and a gate of the shared expert. Streamed experts as well with norms behind them and a dense network beside them. The others run
with `--exhaustive`."""

WRAPPED = {"gemma4": "gemma4_text", "llama4": "llama4_text", "qwen3_5_moe": "qwen3_5_moe_text"}
"""Families that are others' models within a config of several modalities: their graphs are those."""


def names_of(families: tuple[str, ...], argument: str) -> list[str]:
    """The cases that a test with this argument runs for."""
    if argument == "name":
        return [name for family in families for name in golden_cases.FAMILIES[family]]
    chosen = [family for family in families if (family not in WRAPPED if argument == "first" else family in AMONG[argument])]
    return [next(iter(golden_cases.FAMILIES[family])) for family in chosen]


ARGUMENTS = ("name", "first", "halved", "prompted", "decoded")
"""Of these tests; each names a case."""
