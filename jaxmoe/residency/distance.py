"""Policies that weigh use by how soon a layer's turn comes: EdgeMoE, HOBBIT, MoE-Infinity.

All layers share one pool, or there would be nothing to weigh.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxmoe import formats
from jaxmoe.residency.ahead import until_turn
from jaxmoe.residency.counts import no_stamps, stamp
from jaxmoe.residency.policy import Keep, Knowledge, Policy, Shape, Tables

HIGH = 0.6
"""A use matters to a token whose stronger experts have at most this share of its weight. Source: HOBBIT (arXiv 2411.01433), T1."""

MIX = (0.25, 0.25, 0.25, 0.25)
"""HOBBIT's weights where none were calibrated (`jaxmoe.offload.calibrate`): of recency, frequency, uses in high precision, and layer distance."""


def _no_totals(shape: Shape, knowledge: Knowledge) -> Tables:
    sizes = (shape.layers, shape.experts)
    return no_stamps(shape) | {name: jnp.zeros(sizes, jnp.float32) for name in ("total", "total_high")}  # donated, so two arrays


def _total(row: Tables, used: Bool[Array, "S E"], high: Bool[Array, "S E"]) -> Tables:
    """Uses since the text began, and those of them that matter."""
    return stamp(row, used) | {"total": row["total"] + used.sum(0), "total_high": row["total_high"] + (used & high).sum(0)}


def _restart(tables: Tables) -> Tables:
    """Counts anew."""
    return tables | {name: jnp.zeros_like(tables[name]) for name in ("clock", "total", "total_high")} | {"stamp": jnp.full_like(tables["stamp"], -1)}


def nearness(tables: Tables, layer) -> Float[Array, "L 1"]:
    """One for the layer whose turn is next, 1 / L for the one that has just run."""
    layers = tables["stamp"].shape[0]
    return ((layers + 1 - until_turn(layers, layer)) / layers)[:, None]


def _keep_edgemoe(tables: Tables, layer) -> Keep:
    return tables["total"] * nearness(tables, layer), tables["stamp"]


EDGEMOE = Policy("edgemoe", _no_totals, _total, keep_all=_keep_edgemoe, restart=_restart)
"""EdgeMoE (arXiv 2308.14352): activation frequency times nearness of the layer's turn."""


def _with_mix(shape: Shape, knowledge: Knowledge) -> Tables:
    mix = jnp.asarray(MIX if knowledge.mix is None else knowledge.mix, jnp.float32)
    return _no_totals(shape, knowledge) | {"mix": jnp.tile(mix, (shape.layers, 1))}


def _keep_hobbit(tables: Tables, layer) -> Keep:
    steps = jnp.maximum(1, tables["clock"])[:, None]
    terms = (jnp.maximum(0, tables["stamp"]), tables["total"], tables["total_high"], nearness(tables, layer) * steps)
    parts = [formats.rounded(tables["mix"][:, i, None] * term / steps) for i, term in enumerate(terms)]
    return parts[0] + parts[1] + parts[2] + parts[3], tables["stamp"]


HOBBIT = Policy("hobbit", _with_mix, _total, keep_all=_keep_hobbit, restart=_restart)
"""HOBBIT (arXiv 2411.01433), its multidimensional cache: recency, frequency, high-precision uses and layer distance, weighted, counted per text.
The distance is read such that layers whose turn is near weigh more; as often transcribed, (l_now - l) mod L, it would send those away first."""


def _patterns(shape: Shape, knowledge: Knowledge) -> Tables:
    patterns = jnp.asarray(knowledge.patterns, jnp.float32)
    rows = patterns / jnp.maximum(patterns.sum(-1, keepdims=True), 1e-9)
    return _no_totals(shape, knowledge) | {"patterns": rows.swapaxes(0, 1)}


def _keep_eam(tables: Tables, layer) -> Keep:
    """The nearest earlier text, by the cosine between activation matrices whose rows sum to one, foretells what this one will use."""
    now_LE = tables["total"] / jnp.maximum(tables["total"].sum(-1, keepdims=True), 1e-9)
    product = jnp.einsum("LNE,LE->N", tables["patterns"], now_LE)
    length = jnp.sqrt(jnp.einsum("LNE,LNE->N", tables["patterns"], tables["patterns"]))
    nearest = jnp.argmax(product / jnp.maximum(length, 1e-9))
    layers = now_LE.shape[0]
    decay = 1.0 - until_turn(layers, layer)[:, None] / (layers + 1)
    return jax.lax.dynamic_index_in_dim(tables["patterns"], nearest, 1, keepdims=False) * decay, tables["stamp"]


EAM = Policy("eam", _patterns, _total, keep_all=_keep_eam, needs=("patterns",), restart=_restart)
"""MoE-Infinity (arXiv 2401.14361): the rest of the nearest recorded activation matrix, less for layers whose turn is far."""
