"""Tokens that every device sees: gathered from all ('gather'), or there from the beginning."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmoe.experts.dispatch import weighted_sum
from jaxmoe.experts.exchange.meeting import Meeting
from jaxmoe.experts.exchange.wire import bits_of, from_bits, one_of, pack, unpack
from sharding.split import SplitError


def gather_tokens(bank, at: Meeting, x_TD, ids_TA, valid_T):
    """Every device sees the tokens of all, computes those of its experts, and gets its own tokens' results by a scattered sum, in which each
    result has one term."""
    rows = pack(x_TD, jnp.where(valid_T[:, None], ids_TA, -1))
    x, ids = unpack(jax.lax.all_gather(rows, at.axes, axis=0, tiled=True), x_TD.shape[1], x_TD.dtype)
    y, mine, bank = _computed(bank, at, x, ids)
    return _or_zero(one_of(y, mine, at.axes, at.kernels.backend, True), valid_T), bank


def gather_sums(bank, at: Meeting, x_TD, ids_TA, weights_TA, valid_T):
    """`gather_tokens` whose results are weighted and added up before they go back: a part as many bytes, and no longer the bits of one device.

    Returns:
        The weighted sums [T, D] in x's dtype, in which the devices' parts are added, and the bank.
    """
    (width, active), dtype = (x_TD.shape[1], ids_TA.shape[1]), x_TD.dtype
    rows = pack(x_TD, jnp.concatenate([jnp.where(valid_T[:, None], ids_TA, -1), bits_of(weights_TA, dtype)], 1))
    x, whole = unpack(jax.lax.all_gather(rows, at.axes, axis=0, tiled=True), width, dtype)
    y, mine, bank = _computed(bank, at, x, whole[:, :active])
    part = weighted_sum(jnp.where(mine, y, 0).astype(jnp.float32), from_bits(whole[:, active:], active), whole[:, 0] >= 0)
    return jax.lax.psum_scatter(part.astype(dtype), at.axes, scatter_dimension=0, tiled=True), bank


def own_experts(bank, at: Meeting, x_TD, ids_TA, valid_T):
    """Where every device has all tokens: each computes those of its experts, and all get all results.

    Raises:
        SplitError: the devices have different tokens.
    """
    if set(at.axes) & set(at.layout.batch):
        raise SplitError(f"exchange = {at.layout.split.exchange!r} needs all tokens on each device, they are split over {at.layout.batch}")
    y, mine, bank = _computed(bank, at, x_TD, jnp.where(valid_T[:, None], ids_TA, -1))
    return _or_zero(one_of(y, mine, at.axes, at.kernels.backend, False), valid_T), bank


def part_of_experts(bank, at: Meeting, x_TD, ids_TA, valid_T):
    """The results of this device's experts for tokens that every device has, and zeros elsewhere: a part of a sum that is the caller's."""
    y, mine, bank = _computed(bank, at, x_TD, jnp.where(valid_T[:, None], ids_TA, -1))
    return jnp.where(mine, y, jnp.zeros_like(y)), bank


def _computed(bank, at: Meeting, x_MD, ids_MA):
    """Results [M, A, D] of this device's experts, and where they are."""
    ids = jnp.where(ids_MA >= 0, ids_MA - jax.lax.axis_index(at.axes) * at.count, -1)
    mine = (ids >= 0) & (ids < at.count)
    y, bank = at.compute(bank, jnp.repeat(x_MD, ids.shape[1], axis=0), ids.reshape(-1), mine.reshape(-1))
    return y.reshape(*ids.shape, -1), mine[..., None], bank


def _or_zero(y_TAD, valid_T):
    return jnp.where(valid_T[:, None, None], y_TAD, jnp.zeros_like(y_TAD))
