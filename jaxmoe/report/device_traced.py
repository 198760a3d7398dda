"""A model of real layer shapes with generated weights, and its decode program with experts that a trace asks for.

A random router has none of a real one's habits; so a bank takes the place of each choice by a trace's. Everything else is the engine's own.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxmoe.cache.layers import init_layers
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import steps
from jaxmoe.experts import ResidentBank, SlotBank, host_store
from jaxmoe.formats import store_numpy
from jaxmoe.offload import trace as traces
from jaxmoe.report.device_bench import compiled, random_records, to_device
from jaxmoe.spec import ModelSpec, abstract_params, stack_layers
from pallas_kernels.dispatch import Kernels

QWEN3_30B_A3B: dict[str, Any] = {
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8,
    "norm_topk_prob": True, "mlp_only_layers": [], "rms_norm_eps": 1e-6, "max_position_embeddings": 40960, "rope_theta": 1e6,
    "tie_word_embeddings": False,
}  # fmt: skip
POSITIONS = 512
DRAWN = 2**20 + 7
"""Random values that parameters are made of; no row of a matrix is a multiple of it, so that no two rows are alike."""
NO_EOS = np.full(steps.EOS_SLOTS, -2, np.int32)


# --- Routing from a trace


@flax.struct.dataclass
class TracedBank:
    """A slot bank that is asked for the experts of a trace in the place of those that the router chose.

    What it asks for is known to a step as data alone, and only once the router has run.

    Attributes:
        bank: the bank that computes.
        ids: [S, L, A], by step and layer; all tokens of a step ask for the same experts.
        step: which step comes next; it goes on with every step that has a token.
    """

    bank: SlotBank
    ids: Int[Array, "S L A"] | None = None
    step: Int[Array, ""] | None = None

    def split(self) -> tuple[TracedBank, tuple]:
        """See `SlotBank.split`."""
        fixed, state = self.bank.split()
        return TracedBank(fixed), (state, self.ids, self.step)

    def join(self, moving: tuple) -> TracedBank:
        """See `SlotBank.join`."""
        state, ids, step = moving
        return TracedBank(self.bank.join(state), ids, step)

    def in_order(self) -> TracedBank:
        """See `SlotBank.in_order`."""
        return dataclasses.replace(self, bank=self.bank.in_order())

    def start(self, ids_SLA: Any) -> tuple:
        """The moving part at the beginning of a trace, with nothing on the device."""
        return self.bank.init_state(), jnp.asarray(ids_SLA, jnp.int32), jnp.int32(0)

    def expert_ffn(self, moe_layer, x_TD, ids_TA, weights_TA, valid_T, kernels, biases=None):
        """See `jaxmoe.experts.expert_ffn`."""
        assert self.ids is not None and self.step is not None
        ids_LA = jax.lax.dynamic_index_in_dim(self.ids, self.step % self.ids.shape[0], 0, keepdims=False)
        asked_A = jax.lax.dynamic_index_in_dim(ids_LA, moe_layer, 0, keepdims=False)
        # The router never gives a negative id, but the compiler does not know: nothing can be brought before the router has run.
        ids_TA = jnp.where(ids_TA >= 0, asked_A[None], ids_TA)
        y_TD, bank, aux = self.bank.expert_ffn(moe_layer, x_TD, ids_TA, weights_TA, valid_T, kernels, biases)
        ends = (jnp.asarray(moe_layer) == len(self.bank.slots) - 1) & valid_T.any()
        return y_TD, TracedBank(bank, self.ids, self.step + ends.astype(jnp.int32)), aux


def trace_ids(trace: traces.Trace, layers: int, decode_steps: int) -> tuple[np.ndarray, int]:
    """Experts [S, L, A] of a trace's first layers, a token a step, and how many of the steps are prompt.

    Raises:
        ValueError: it has too few layers or steps, or tokens without experts there.
    """
    prompt = int((trace.phase == traces.PROMPT).sum())
    if trace.layers < layers or len(trace.ids) < prompt + decode_steps:
        raise ValueError(f"a trace of {trace.layers} layers and {len(trace.ids)} tokens; needed: {layers} and {prompt + decode_steps}")
    ids_SLA = trace.ids[: prompt + decode_steps, :layers].astype(np.int32)
    if (ids_SLA < 0).any():
        raise ValueError(f"the trace's first {layers} layers have tokens without experts")
    return ids_SLA, prompt


# --- The model


def spec_of(model: Any, layers: int, active: int) -> ModelSpec:
    """Qwen3-30B-A3B in bfloat16 with other fields, so many layers, and so many experts a token."""
    fields = QWEN3_30B_A3B | dict(model) | {"num_hidden_layers": layers, "num_experts_per_tok": active}
    return ModelSpec.from_hf(fields).with_precision("bfloat16")


def make_params(spec: ModelSpec) -> dict:
    """Random parameters, layers stacked: norms one, all else normal with a deviation of 0.02, in turns of one drawing as `random_records` are."""
    drawn = store_numpy(np.random.default_rng(0).standard_normal(DRAWN, dtype=np.float32) * 0.02, "bfloat16")

    def leaf(path, abstract):
        ones = store_numpy(np.ones(abstract.shape, np.float32), "bfloat16")
        return ones if path[-1].key == "scale" else np.resize(drawn, abstract.shape)

    layered = jax.tree.map_with_path(leaf, abstract_params(spec))
    return jax.tree.map(to_device, stack_layers(spec, layered, np.stack))


def make_records(spec: ModelSpec) -> np.ndarray:
    """Random experts, [L * E, rows, columns]."""
    return random_records(len(spec.moe_layers) * spec.moe[0].experts, *host_store.record_shape(spec))


def slots_of(spec: ModelSpec, percent: int) -> int:
    """Slots of a layer that are this share of its experts, and at least what one token asks for."""
    return max(spec.moe[0].active, round(percent * spec.moe[0].experts / 100))


def make_bank(spec: ModelSpec, store: Any, slots: int, method: str | None, kernels: Kernels) -> SlotBank:
    """A slot bank over experts in pinned host memory."""
    layout = kernels.expert_layout
    return SlotBank(
        store, slots=(slots,) * len(spec.moe_layers), experts=spec.moe[0].experts, entries=host_store.entry_shapes(spec, layout), layout=layout,
        dtype="bfloat16", activation=spec.moe[1].activation, fill=method,
    )  # fmt: skip


def resident_bank(spec: ModelSpec, records: np.ndarray, kernels: Kernels) -> ResidentBank:
    """The same experts, all on the device."""
    layout = kernels.expert_layout
    first, second = host_store.entry_shapes(spec, layout)
    flat = records.reshape(len(spec.moe_layers), spec.moe[0].experts, -1)
    w_in, w_out = (to_device(part) for part in (flat[..., : math.prod(first)], flat[..., math.prod(first) :]))
    return ResidentBank(w_in.reshape(*w_in.shape[:2], *first), w_out.reshape(*w_out.shape[:2], *second), spec.moe[1].activation, layout)


def committed(tree: Any) -> Any:
    """The arrays bound to their device, as those are that a step with a pinned store returns."""
    return jax.tree.map(lambda x: jax.device_put(x, x.sharding), tree)


class Decoder:
    """The decode program of one sequence under a traced bank. Attributes: `compile_seconds`; `bytes` that it needs; `program`."""

    def __init__(self, spec: ModelSpec, params: dict, bank: SlotBank, ids_SLA: np.ndarray, kernels: Kernels):
        self._spec, self._params, self._ids = spec, params, ids_SLA
        self._state: Any = None
        self._bank = TracedBank(bank)
        self._step = steps.decode_step(spec, kernels, greedy=True)
        self.start()
        self.program, self.compile_seconds, self.bytes = compiled(self._step, *self._arguments(0, steps.CHUNK))

    def start(self) -> None:
        """Begins the trace with no expert on the device."""
        self._state = None  # the old pools go before the new ones come
        self._state = committed(steps.EngineState(init_layers(self._spec, 1, POSITIONS, 1), self._bank.start(self._ids)))

    def rewind(self) -> None:
        """Begins the trace again with the experts that are there."""
        experts, ids, step = self._state.bank
        self._state = self._state.replace(bank=(experts, ids, committed(jnp.zeros_like(step))))

    def _arguments(self, at: int, count: int) -> tuple:
        row = np.zeros(1, np.int32)
        return (self._params, self._bank, self._state, row, row, row + np.int32(at), row + np.int32(count), NO_EOS, sampling_params(1))

    def run(self, at: int, count: int) -> jax.Array:
        """Steps `at` to `at + count`, at most `steps.CHUNK` of them, in one call."""
        tokens, self._state, _ = self.program(*self._arguments(at, count))
        return tokens

    def counters(self) -> dict[str, int]:
        """Experts asked for, hits and loads since the start, of all layers."""
        return {name: int(n.sum()) for name, n in self._bank.bank.counters(self._state.bank[0]).items()}


def run_all(decoder: Decoder, first: int, stop: int) -> list[float]:
    """Runs steps `first` to `stop`; seconds of each call, which has `steps.CHUNK` steps if there are so many left."""
    out = []
    for at in range(first, stop, steps.CHUNK):
        began = time.perf_counter()
        jax.block_until_ready(decoder.run(at, min(steps.CHUNK, stop - at)))
        out.append(time.perf_counter() - began)
    return out
