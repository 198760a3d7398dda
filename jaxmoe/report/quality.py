"""What a lossy setting costs: the change of nats per token on text, with an interval, beside what it saves.

Text is fed token by token, as decoding would see it, each prompt from empty caches and an empty device. A setting is compared with exact serving
prompt by prompt, and the interval is that of drawing prompts anew (a paired bootstrap). Two ways to run a text: through an engine's step, and through
an `EvaluationBank`, which decides as a slot bank does but has every expert on the device at every precision, so that a whole text is one program.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from jaxmoe.cache.batch import make_batch
from jaxmoe.cache.layers import init_layers
from jaxmoe.engine import steps
from jaxmoe.engine.model import Model, Offload, slot_bank
from jaxmoe.experts.dispatch import dispatch, of_experts, outputs_of, rows_of, weighted_sum
from jaxmoe.experts.lossy import STORED, WIDTHS, Lossy, counted
from jaxmoe.experts.planes import PlaneFormat, unpack_planes
from jaxmoe.experts.resident import ResidentBank
from jaxmoe.experts.slots import SlotBank, SlotState, uses
from jaxmoe.nn.transformer import forward
from jaxmoe.spec import ModelSpec
from jaxmoe.train.corpus import Corpus, windows
from pallas_kernels.dispatch import Kernels
from pallas_kernels.grouped_matmul.api import grouped_swiglu, swiglu_rows
from pallas_kernels.grouped_matmul.glu import GLUS

Texts = Int[np.ndarray, "N T+1"]
Nats = Float[np.ndarray, "N T"]
Counters = Mapping[str, np.ndarray]

# --- The bank


@flax.struct.dataclass
class EvaluationBank(SlotBank):
    """A slot bank without slots: it resolves as its base does, and computes with experts that are all there, each at the precision it would have.

    Attributes:
        versions: [V * L * E, ...] for both matrices, version after version.
        bits: the precision of each version, the first `STORED`.
        The others: see `SlotBank`.
    """

    versions: tuple[Num[Array, "X D two F"], Num[Array, "X F D"]] | None = None
    bits: tuple[int, ...] = flax.struct.field(pytree_node=False, default=(STORED,))

    def init_state(self) -> SlotState:
        """A state of empty tables; there are no pools."""
        return self._without_experts(())  # type: ignore[arg-type]

    def expert_ffn(self, moe_layer, x_TD, ids_TA, weights_TA, valid_T, kernels: Kernels, biases=None):
        """See `jaxmoe.experts.expert_ffn`."""
        assert self.versions is not None
        state, choice, _ = self.resolve(moe_layer, uses(ids_TA, valid_T, self.experts, self.ordered), ids_TA, valid_T, weights_TA)
        brought, entry = choice.enter | choice.stream, moe_layer * self.experts + jnp.arange(self.experts)
        if self.lossy is not None:
            bits = jnp.where(brought, state.marks["width"][moe_layer], state.marks["held"][moe_layer])
            entry = entry + self._version()[bits] * (len(self.slots) * self.experts)
        state = dataclasses.replace(state, loads=state.loads.at[moe_layer].add(brought.sum(dtype=jnp.int32)))
        glu, (w_in, w_out) = GLUS[self.activation], self.versions
        if x_TD.shape[0] == 1:
            own = of_experts(biases, ids_TA[0])
            y = swiglu_rows(x_TD, w_in, w_out, entry[ids_TA[0]], glu, kernels, self.layout, own)[None]
        else:
            plan = dispatch(ids_TA, valid_T, self.experts)
            y = grouped_swiglu(rows_of(x_TD, plan), w_in, w_out, entry, plan.sizes_E, glu, kernels, layout=self.layout, biases=biases)
            y = outputs_of(y, plan)
        y_TD = weighted_sum(y.astype(x_TD.dtype).astype(jnp.float32), weights_TA, valid_T).astype(x_TD.dtype)
        return y_TD, dataclasses.replace(self, state=state), {}

    def _version(self) -> Int[Array, "9"]:
        """The version of every number of bits."""
        at = np.zeros(WIDTHS[-1] + 1, np.int32)
        at[list(self.bits)] = np.arange(len(self.bits))
        return jnp.asarray(at)


def evaluation_bank(
    spec: ModelSpec, records: Num[np.ndarray, "X R C"], fmt: PlaneFormat, planes: np.ndarray, bits: Sequence[int], offload: Offload
) -> EvaluationBank:
    """A bank that holds every expert as stored and at some precisions.

    Args:
        spec: the model.
        records: of `jaxmoe.experts.host_store.read_records`, in the format's layout.
        fmt, planes: of `jaxmoe.experts.planes.build_planes`.
        bits: precisions that settings will ask for.
        offload: slots and policy of the bank that is stood in for; its store is not used.

    Returns:
        The bank, which gives nothing up; `dataclasses.replace(bank, lossy=...)` makes those that do.
    """
    plain = slot_bank(spec, None, offload, fmt.layout)
    versions = [jnp.asarray(records)]
    for b in bits:
        part = jnp.asarray(planes[:, : fmt.bytes(b)])
        versions.append(jax.lax.map(lambda data, b=b: unpack_planes(fmt, data, b), part))
    flat = jnp.concatenate(versions).reshape(len(versions) * len(records), -1)
    size = int(np.prod(plain.entries[0]))
    pools = tuple(part.reshape(-1, *entry) for part, entry in zip((flat[:, :size], flat[:, size:]), plain.entries, strict=True))
    return EvaluationBank(**{f: getattr(plain, f) for f in plain.__dataclass_fields__}, versions=pools, bits=(STORED, *bits))  # type: ignore[arg-type]


# --- Running text


def held_out(corpus: Corpus, domains: Iterable[str], per_domain: int, tokens: int) -> Texts:
    """Windows of held-out text, spread evenly over each domain's stream; int32 [N, tokens + 1]."""
    return np.concatenate([windows(corpus, domain, tokens, most=per_domain) for domain in domains])


Step = Callable[[Any, Any, Any, Any], tuple[jax.Array, Any]]
"""`(params, bank, state, batch) -> (logits [1, V], state)`, such as `steps.logits_step` makes, or one around `HostDriven.step`."""


def nats_by_step(model: Model, texts: Texts, step: Step | None = None) -> tuple[Nats, Counters]:
    """Feeds texts token by token to an engine's step.

    Args:
        model: what runs; its bank's counters are returned.
        texts: token ids; each is a text of its own.
        step: by default the compiled one.

    Returns:
        Nats that each token after the first took, and the bank's counters, summed over texts.
    """
    step = step or steps.logits_step(model.spec, model.kernels)
    out, total, n = np.empty((len(texts), texts.shape[1] - 1)), {}, texts.shape[1] - 1  # type: tuple[Any, dict[str, np.ndarray], int]
    for i, text in enumerate(texts):
        state = steps.committed(steps.EngineState(_empty_layers(model.spec, n), model.bank.init_state()))
        for at in range(n):
            batch = steps.decode_batch(np.zeros(1, np.int32), text[at : at + 1], np.full(1, at, np.int32), np.ones(1, bool))
            logits, state = step(model.params, model.bank, state, batch)
            out[i, at] = _nats(logits, text[at + 1 : at + 2])[0]
        total = _sum(total, counters(state.bank))
    return out, total


def nats_at_once(model: Model, texts: Texts) -> tuple[Nats, Counters]:
    """`nats_by_step` with a text in one program, for a model whose bank is an `EvaluationBank`."""
    n = texts.shape[1] - 1
    fixed, _ = model.bank.split()
    out, total = np.empty((len(texts), n)), {}  # type: tuple[Any, dict[str, np.ndarray]]
    for i, text in enumerate(texts):
        state = steps.EngineState(_empty_layers(model.spec, n), model.bank.init_state())
        nats, moving = _run_text(model.spec, model.kernels, model.params, fixed, state, jnp.asarray(text))
        out[i] = np.asarray(nats)
        total = _sum(total, counters(moving))
    return out, total


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run_text(spec: ModelSpec, kernels: Kernels, params, fixed, state: steps.EngineState, text: jax.Array):
    def step(state: steps.EngineState, at):
        rows, here = jnp.zeros(1, jnp.int32), jax.lax.dynamic_slice_in_dim(text, at, 2)
        batch = steps.decode_batch(rows, here[:1], at[None], jnp.ones(1, bool))
        logits, bank, layers, _ = forward(spec, params, fixed.join(state.bank), state.layers, batch, kernels)
        return steps.EngineState(layers, bank.split()[1]), _nats(logits, here[1:])[0]

    state, nats = jax.lax.scan(step, state, jnp.arange(text.shape[0] - 1, dtype=jnp.int32))
    return nats, state.bank


def _nats(logits: Float[Array, "R V"], target: Int[Array, "R"]) -> Float[Array, "R"]:
    return jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, jnp.asarray(target)[:, None], axis=1)[:, 0]


def _empty_layers(spec: ModelSpec, tokens: int):
    run = steps.run_length(steps.TOKEN_BUCKETS[-1])
    return init_layers(spec, 1, -(-tokens // run) * run, run)


def counters(state: SlotState) -> dict[str, np.ndarray]:
    """A bank's counters on the host: `requests`, `hits` and `loads` by layer, and of a lossy bank its marks' (`jaxmoe.experts.lossy.counted`)."""
    found = {name: np.asarray(getattr(state, name)) for name in ("requests", "hits", "loads")}
    return found | counted(state.marks)


def _sum(total: dict[str, np.ndarray], more: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: value + total.get(name, 0) for name, value in more.items()}


# --- Comparing


class Interval(NamedTuple):
    """A mean, and the interval that holds 95 % of the means of prompts drawn anew."""

    mean: float
    low: float
    high: float


def paired_bootstrap(nats: Nats, exact: Nats, draws: int = 4000, seed: int = 0) -> Interval:
    """The difference in nats per token between two runs of the same prompts.

    Prompts are drawn with replacement, each with both of its runs, for tokens of one prompt are not independent of each other.

    Args:
        nats, exact: of the setting and of exact serving.
        draws: resamples.
        seed: of the drawing.

    Raises:
        ValueError: runs of different prompts.
    """
    if nats.shape != exact.shape:
        raise ValueError(f"runs of {list(nats.shape)} and {list(exact.shape)} prompts and tokens can't be paired")
    each = (nats - exact).mean(1)
    chosen = np.random.default_rng(seed).integers(len(each), size=(draws, len(each)))
    low, high = np.quantile(each[chosen].mean(1), (0.025, 0.975))
    return Interval(float(each.mean()), float(low), float(high))


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a setting cost and saved.

    Attributes:
        name: of the setting.
        change: in nats per token; a perplexity is e to the nats.
        pairs: assignments of tokens to experts; of those, shares:
        degraded, skipped, rerouted: computed at fewer bits, left out, and sent to an expert that the router had not chosen.
        loads: experts brought, by bits.
        ratio: bytes brought over those of exact serving of the same text.
        same_ratio: the same over the bytes of what the router's own choices would have brought, what was on the device being as it was.
    """

    name: str
    change: Interval
    pairs: int
    degraded: float
    skipped: float
    rerouted: float
    loads: tuple[int, ...]
    ratio: float
    same_ratio: float

    @property
    def perplexity(self) -> Interval:
        """The relative change of perplexity."""
        return Interval(*(float(np.expm1(x)) for x in self.change))

    def record(self) -> dict[str, Any]:
        """The numbers, for a JSON file."""
        return dataclasses.asdict(self) | {"change": self.change._asdict(), "perplexity": self.perplexity._asdict()}


def quality(name: str, nats: Nats, found: Counters, exact: Nats, exact_found: Counters, size: Callable[[int], int]) -> Quality:
    """Compares a lossy run with the exact one.

    Args:
        name: of the setting.
        nats, found: of the setting (`nats_by_step`, `nats_at_once`).
        exact, exact_found: of the same texts served exactly.
        size: bytes of an expert at some bits (`LadderSource.bytes_at`).

    Raises:
        ValueError: a run without a ladder's counters.
    """
    if "pairs" not in found:
        raise ValueError(f"{name}: the run counted no pairs; its bank needs a Lossy setting, Lossy() for none")
    loads, pairs = found["loads_by_bits"].sum(0), int(found["pairs"].sum())
    brought = sum(int(n) * size(bits) for bits, n in enumerate(loads) if n)
    shares = {what: float(found[what].sum()) / pairs for what in ("degraded", "skipped", "rerouted")}
    over = [brought / (int(n.sum()) * size(STORED)) if n.sum() else 1.0 for n in (exact_found["loads"], found["exact"])]
    return Quality(name, paired_bootstrap(nats, exact), pairs, **shares, loads=tuple(map(int, loads)), ratio=over[0], same_ratio=over[1])


def measure(model: Model, settings: Mapping[str, Lossy], texts: Texts, size: Callable[[int], int]) -> list[Quality]:
    """Runs every setting over the texts with an `EvaluationBank` that has its precisions, beside exact serving."""
    exact, exact_found = nats_at_once(model, texts)
    found = []
    for name, lossy in settings.items():
        nats, seen = nats_at_once(with_setting(model, lossy), texts)
        found.append(quality(name, nats, seen, exact, exact_found, size))
    return found


def with_setting(model: Model, lossy: Lossy | None) -> Model:
    """The model with its `EvaluationBank` at a setting.

    Raises:
        ValueError: the bank lacks a precision that the setting asks for.
    """
    lacking = [] if lossy is None else [b for b in lossy.bits if b not in model.bank.bits]
    if lacking:
        raise ValueError(f"the setting asks for experts of {lacking[0]} bits, the bank has {', '.join(map(str, model.bank.bits[1:])) or 'none'}")
    return dataclasses.replace(model, bank=dataclasses.replace(model.bank, lossy=lossy))


def rows(found: Sequence[Quality]) -> list[list[str]]:
    """A table of settings as text, its head first."""
    head = ["setting", "degraded", "left out", "rerouted", "miss bytes", "nats per token (95 %)", "perplexity"]
    lines = [
        [q.name, f"{q.degraded:.1%}", f"{q.skipped:.1%}", f"{q.rerouted:.1%}", f"{q.ratio:.3f}",
         f"{q.change.mean:+.4f} ({q.change.low:+.4f} to {q.change.high:+.4f})", f"{q.perplexity.mean:+.2%}"]
        for q in found
    ]  # fmt: skip
    return [head, *lines]


def table_loss(model: Model, texts: Texts) -> Callable[[np.ndarray], float]:
    """What a table of widths costs: `(bits [L, E]) -> change in nats per token`, every expert being as the table has it whenever it is used.

    So it is when experts come at the width of the table and nothing else is given up: residency does not matter then. Texts run whole.

    Args:
        model: with an `EvaluationBank` that has the precisions.
        texts: for calibration.
    """
    run, size = steps.run_length(steps.TOKEN_BUCKETS[0]), -(-(texts.shape[1] - 1) // steps.TOKEN_BUCKETS[0]) * steps.TOKEN_BUCKETS[0]
    step = steps.logits_step(model.spec, model.kernels)

    def nats(table: np.ndarray) -> float:
        resident = dataclasses.replace(model, bank=_by_table(model.bank, jnp.asarray(table)))
        total = 0.0
        for text in texts:
            ids = text[:-1].tolist()
            batch = make_batch([(0, 0, ids)], run, size, list(range(size)))
            state = steps.EngineState(_empty_layers(model.spec, size), ())
            logits, _ = step(resident.params, resident.bank, state, batch)
            total += float(_nats(logits[: len(ids)], text[1:]).mean())
        return total / len(texts)

    whole = nats(np.full((len(model.bank.slots), model.bank.experts), STORED))
    return lambda table: nats(table) - whole


@jax.jit
def _by_table(bank: EvaluationBank, table: Int[Array, "L E"]) -> ResidentBank:
    """Every expert at the width of a table."""
    assert bank.versions is not None
    entry = bank._version()[table] * table.size + jnp.arange(table.size).reshape(table.shape)
    return ResidentBank(bank.versions[0][entry], bank.versions[1][entry], bank.activation, bank.layout)
