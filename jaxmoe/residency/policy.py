"""What a residency policy is: pure functions over small tables.

Tables are dicts of arrays with a leading layer axis; `touch` sees one layer's row of each. Steps come in blocks of S, in order: a decode step of
several sequences is one step that asks for a set of experts, a prompt of S tokens is S steps. A step that asks for nothing is no step.

A policy keeps every layer's experts within that layer's own slots, or, where it is *shared*, all layers' within one pool: then it weighs the experts
of a layer that is about to run against those of one that has just run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Tables = dict[str, Array]
Keep = tuple[Array, Array]
"""Two keys, compared in this order: the larger stays. [E] of a layer, [L, E] of a shared pool."""

DECAY = 0.9
"""What a count keeps of itself from step to step. Source: the replays of real traces in the LFRU literature; 0.9 to 0.95 differ by under a point."""

PINNED, FORESEEN = "pinned", "foreseen"
"""Tables that any policy may have: experts that never leave [L, E], and predicted uses [L, M + 1, E]."""


@flax.struct.dataclass
class Knowledge:
    """What a policy is told beforehand; each policy says what it needs.

    Attributes:
        profile: [L, E] how much each expert is used, in any unit.
        future: [S, L, E] what every coming step will ask for.
        patterns: [N, L, E] how often each of N earlier sequences used each expert.
        pinned: [L, E] experts that never leave once they are there.
        mix: the weights of HOBBIT's four terms.
        horizon: how many steps after the running one predictions reach (M).
    """

    profile: Float[Array, "L E"] | None = None
    future: Bool[Array, "S L E"] | None = None
    patterns: Float[Array, "N L E"] | None = None
    pinned: Bool[Array, "L E"] | None = None
    mix: tuple[float, ...] | None = flax.struct.field(pytree_node=False, default=None)
    horizon: int = flax.struct.field(pytree_node=False, default=1)


UNTOLD = Knowledge()
"""Nothing."""


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes that tables are made for: `layers`, `experts` and the `slots` of each layer."""

    layers: int
    experts: int
    slots: tuple[int, ...]


def same_row(row: Tables, used: Bool[Array, "S E"], high: Bool[Array, "S E"]) -> Tables:
    """Learns nothing."""
    return row


@dataclasses.dataclass(frozen=True)
class Policy:
    """A residency policy.

    Attributes:
        name: what the command line calls it.
        init: `(shape, knowledge) -> tables`.
        touch: `(one layer's tables, used [S, E], high [S, E]) -> tables` after S steps; `high` are uses that matter (HOBBIT's high precision).
        keep: `(one layer's tables) -> Keep` of its experts; None of a shared policy.
        keep_all: `(tables, layer that runs) -> Keep` of all experts, for a shared pool; None of the others.
        bypass: whether an expert that was asked for may be turned away, when those that are there are worth more. Without it every expert that was
            asked for enters, as far as there is room.
        needs: names of `Knowledge` that `init` can't do without.
        foresees: whether it reads the table of predicted uses.
        allocate: `(slots in all, layers, experts, active) -> slots of each layer`, for policies that have a say in it.
        restart: `tables -> tables` where a new text begins; None for those that go on.
    """

    name: str
    init: Callable[[Shape, Knowledge], Tables]
    touch: Callable[[Tables, Any, Any], Tables]
    keep: Callable[[Tables], Keep] | None = None
    keep_all: Callable[[Tables, Any], Keep] | None = None
    bypass: bool = False
    needs: tuple[str, ...] = ()
    foresees: bool = False
    allocate: Callable[[int, int, int, int], tuple[int, ...]] | None = None
    restart: Callable[[Tables], Tables] | None = None

    @property
    def shared(self) -> bool:
        """Whether all layers share one pool."""
        return self.keep_all is not None

    def tables(self, shape: Shape, knowledge: Knowledge) -> Tables:
        """The tables to begin with.

        Raises:
            ValueError: something that the policy needs is not known, or is of another shape, or more experts are pinned than there are slots.
        """
        for name in self.needs:
            if getattr(knowledge, name) is None:
                raise ValueError(f"the {self.name} policy needs {_WHAT[name]}: give a trace")
        for name in ("profile", "pinned", "patterns", "future"):
            value = getattr(knowledge, name)
            if value is not None and value.shape[-2:] != (shape.layers, shape.experts):
                raise ValueError(f"the {name} has {list(value.shape[-2:])} layers and experts, the model {[shape.layers, shape.experts]}")
        if knowledge.pinned is not None and not isinstance(knowledge.pinned, jax.core.Tracer):  # while shapes are found, there are no numbers
            self.check_pinned(shape, knowledge.pinned)
        tables = self.init(shape, knowledge)
        if self.foresees:
            tables = tables | {FORESEEN: jnp.full((shape.layers, knowledge.horizon + 1, shape.experts), -1.0)}
        return tables if knowledge.pinned is None else tables | {PINNED: jnp.array(knowledge.pinned, bool)}

    def check_pinned(self, shape: Shape, pinned_LE: Any) -> None:
        """Refuses to pin more experts [L, E] than there are slots.

        Raises:
            ValueError: it says how many, and where.
        """
        counts = [int(n) for n in np.asarray(pinned_LE, bool).sum(1)]
        pairs = [(sum(counts), sum(shape.slots))] if self.shared else [*zip(counts, shape.slots, strict=True)]
        for layer, (pinned, slots) in enumerate(pairs):
            if pinned > slots:
                where = "all layers together" if self.shared else f"layer {layer}"
                raise ValueError(f"{pinned} experts are pinned in {slots} slots of {where}: pin fewer, or give more slots")

    def worth(self, tables: Tables, layer: Int[Array, ""] | int) -> Keep:
        """What each expert is worth when this layer runs: those of the layer, or with a shared pool all. Pinned ones are above all others."""
        where = tables if self.keep_all is not None else layer_row(tables, layer)
        if self.keep_all is not None:
            first, second = self.keep_all(tables, layer)
        else:
            assert self.keep is not None
            first, second = self.keep(where)
        return (jnp.where(where[PINNED], jnp.inf, first), second) if PINNED in tables else (first, second)


_WHAT = {
    "profile": "a profile of how often each expert is used",
    "future": "to know the future of the run",
    "patterns": "how earlier texts used the experts",
}


def layer_row(tables: Tables, layer: jax.Array | int) -> Tables:
    """One layer's tables."""
    return {name: jax.lax.dynamic_index_in_dim(table, layer, 0, keepdims=False) for name, table in tables.items()}


def with_row(tables: Tables, layer: jax.Array | int, row: Tables) -> Tables:
    """The tables with one layer's replaced."""
    return {name: jax.lax.dynamic_update_index_in_dim(table, row[name], layer, 0) for name, table in tables.items()}
