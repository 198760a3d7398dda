"""What a model carries from token to token: one state for each kind that its layers need, behind the two methods that layers call.

Layers whose caches have the same shape share arrays, whatever their masks; a layer is addressed by its number among those of its kind
(`ModelSpec.state_index`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxmoe.cache.batch import Batch
from jaxmoe.cache.contiguous import init_kv
from jaxmoe.cache.paged import init_paged
from jaxmoe.cache.recurrent import init_recurrent
from jaxmoe.cache.split_kv import init_split_kv
from jaxmoe.spec import AttentionSpec, DeltaSpec, ModelSpec
from pallas_kernels.dispatch import Kernels


@flax.struct.dataclass
class LayerStates:
    """Attributes: `states` one per kind; `kinds` what each is for (`LayerSpec.state`)."""

    states: tuple[Any, ...]
    kinds: tuple[Any, ...] = flax.struct.field(pytree_node=False)

    def logical_axes(self) -> dict[str, dict[str, tuple[str | None, ...]]]:
        """The logical name of every axis of every leaf, by the kind's number."""
        return {str(i): state.logical_axes() for i, state in enumerate(self.states)}

    def attend(
        self,
        spec: AttentionSpec,
        layer: Int[Array, ""],
        q: Float[Array, "T H C"],
        k: Float[Array, "T K C"],
        v: Float[Array, "T K C"] | None,
        batch: Batch,
        kernels: Kernels,
        sinks: Float[Array, "H"] | None = None,
    ) -> tuple[Float[Array, "T H C"], LayerStates]:
        """See `KVState.attend`."""
        at = self.kinds.index(spec.cached)
        out, state = self.states[at].attend(spec, layer, q, k, v, batch, kernels, sinks)
        return out, self._with(at, state)

    def delta(
        self, spec: DeltaSpec, layer: Int[Array, ""], q, k, v, log_decay, beta, conv_kernels, batch: Batch, kernels: Kernels
    ) -> tuple[jax.Array, LayerStates]:
        """See `RecurrentState.delta`."""
        at = self.kinds.index(spec)
        state, outs = self.states[at], []
        for mine, part in batch.parts():
            out, state = state.delta(spec, layer, q[mine], k[mine], v[mine], log_decay[mine], beta[mine], conv_kernels, part, kernels)
            outs.append(out)
        return outs[0] if len(outs) == 1 else jnp.concatenate(outs), self._with(at, state)

    def _with(self, at: int, state: Any) -> LayerStates:
        return dataclasses.replace(self, states=(*self.states[:at], state, *self.states[at + 1 :]))


def init_layers(spec: ModelSpec, rows: int, positions: int, max_run: int, parts: int = 1) -> LayerStates:
    """Empty states for `rows` sequences of up to `positions` tokens, written by runs of up to `max_run`.

    With several `parts`, each state is one device's part of the positions (`SplitKVState`).
    """
    kinds = spec.state_kinds

    def init(kind, layers: int):
        if isinstance(kind, DeltaSpec):
            return init_recurrent(kind, layers, rows, spec.precision)
        if parts > 1:
            return init_split_kv(kind, layers, rows, positions, max_run, spec.precision.kv, parts)
        return init_kv(kind, layers, rows, positions, max_run, spec.precision.kv)

    return LayerStates(tuple(init(kind, layers) for kind, layers in kinds.items()), tuple(kinds))


def init_paged_layers(spec: ModelSpec, rows: int, pages: int, page: int, kernels: Kernels, kv: str | None = None) -> LayerStates:
    """Empty states whose keys and values lie in pages, and what other layers carry in `rows` rows.

    Args:
        spec: the model.
        rows: sequences that a step may name (`Batch.segments`).
        pages: of each layer, besides a trash page, the last one, which takes what padding writes.
        page: W, tokens of a page.
        kernels: what will attend.
        kv: 'float32', 'bfloat16' or 'int8'; the spec's own precision if not given.
    """
    kinds = spec.state_kinds

    def init(kind, layers: int):
        if isinstance(kind, DeltaSpec):
            return init_recurrent(kind, layers, rows, spec.precision)
        return init_paged(kind, layers, pages, page, kv or spec.precision.kv, kernels)

    return LayerStates(tuple(init(kind, layers) for kind, layers in kinds.items()), tuple(kinds))
