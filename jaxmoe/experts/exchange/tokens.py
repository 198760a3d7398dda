"""Tokens travel to their experts' devices, and results come back: two all-to-alls ('tokens').

A token goes to a device once, with the list of its experts there; results come back one for each expert, for the token's own device to add them up in
the order of its experts. So a device sends another at most T rows, and gets at most T * min(A, E / n) back.

Instead of one program for each capacity (Tutel, arXiv:2206.03382, section 3.3) there is one capacity, of somewhat more than an even share, and as
many rounds as it takes, nearly always one: the worst case costs time when it comes, not memory in every step.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxmoe.experts.exchange.meeting import Meeting
from jaxmoe.experts.exchange.wire import listed, pack, swap, to_words, unpack
from sharding.exchange_cost import Rooms, Transport, even_rooms, transport, worst_rooms


class _Plan(NamedTuple):
    """Which token goes where. `device_TA`, `column_TA`: of each result, whose it is (n for padding) and which of the token's there; `ids_TNJ`: the
    experts of each token on each device, -1 past the last; `pairs_TN`: how many; `rank_TN`, `first_TN`: tokens and pairs before, by device."""

    device_TA: Int[Array, "T A"]
    column_TA: Int[Array, "T A"]
    ids_TNJ: Int[Array, "T n J"]
    pairs_TN: Int[Array, "T n"]
    rank_TN: Int[Array, "T n"]
    first_TN: Int[Array, "T n"]


def exchange_tokens(bank, at: Meeting, x_TD, ids_TA, valid_T, how: Transport | None = None):
    """See `jaxmoe.experts.exchange`; `how` replaces what is chosen by the size of the worst case."""
    (tokens, width), active = x_TD.shape, ids_TA.shape[1]
    worst = worst_rooms(tokens, active, at.count)
    how = how or transport(at.kernels.backend, at.devices * worst.results * width * x_TD.dtype.itemsize)
    rooms = even_rooms(tokens, active, at.count, at.devices) if how == "rounds" else worst
    plan = _plan(at, ids_TA, valid_T)
    none = jnp.zeros(at.devices, jnp.int32)
    sent_N, paired_N, y_TAD = none, none, jnp.zeros((tokens, active, width), x_TD.dtype)
    if rooms == worst:
        _, _, y_TAD, bank = _round(at, plan, x_TD, rooms, how == "ragged", sent_N, paired_N, y_TAD, bank)
        return y_TAD, bank
    goals_N = jnp.sum(plan.pairs_TN > 0, axis=0, dtype=jnp.int32)
    fixed, moving = bank.split()

    def one_round(carry):
        _, sent_N, paired_N, y_TAD, moving = carry
        sent_N, paired_N, y_TAD, bank = _round(at, plan, x_TD, rooms, False, sent_N, paired_N, y_TAD, fixed.join(moving))
        more = jax.lax.pmax((sent_N < goals_N).any().astype(jnp.int32), at.deciding)
        return more, sent_N, paired_N, y_TAD, bank.split()[1]

    carry = (jnp.int32(1), sent_N, paired_N, y_TAD, moving)
    *_, y_TAD, moving = jax.lax.while_loop(lambda carry: carry[0] > 0, one_round, carry)
    return y_TAD, fixed.join(moving)


def _plan(at: Meeting, ids_TA: Int[Array, "T A"], valid_T: Bool[Array, "T"]) -> _Plan:
    n, most = at.devices, min(ids_TA.shape[1], at.count)
    device_TA = jnp.where(valid_T[:, None], ids_TA // at.count, n)
    on_TAN = device_TA[:, :, None] == jnp.arange(n)
    before_TAN = jnp.cumsum(on_TAN, axis=1, dtype=jnp.int32) - on_TAN
    column_TA = jnp.sum(jnp.where(on_TAN, before_TAN, 0), axis=2, dtype=jnp.int32)
    in_column_TAJ = column_TA[:, :, None] == jnp.arange(most)
    takes_TANJ = on_TAN[..., None] & in_column_TAJ[:, :, None, :]
    ids_TNJ = jnp.sum(jnp.where(takes_TANJ, (ids_TA % at.count + 1)[:, :, None, None], 0), axis=1, dtype=jnp.int32) - 1
    pairs_TN = jnp.sum(on_TAN, axis=1, dtype=jnp.int32)
    goes_TN = (pairs_TN > 0).astype(jnp.int32)
    rank_TN, first_TN = (jnp.cumsum(t, axis=0, dtype=jnp.int32) - t for t in (goes_TN, pairs_TN))
    return _Plan(device_TA, column_TA, ids_TNJ, pairs_TN, rank_TN, first_TN)


def _round(at: Meeting, plan: _Plan, x_TD, rooms: Rooms, ragged: bool, sent_N, paired_N, y_TAD, bank: Any):
    """Sends as many more tokens to each device as there is room for, and takes in their results."""
    n, (tokens, width), backend = at.devices, x_TD.shape, at.kernels.backend
    slot_TN, first_TN = plan.rank_TN - sent_N, plan.first_TN - paired_N
    go_TN = (plan.pairs_TN > 0) & (slot_TN >= 0) & (slot_TN < rooms.tokens) & (first_TN + plan.pairs_TN <= rooms.results)
    to = jnp.arange(n)
    token_NC = listed(jnp.where(go_TN, slot_TN, rooms.tokens).T, rooms.tokens)
    x = x_TD.at[token_NC].get(mode="fill", fill_value=0)
    ids = plan.ids_TNJ.at[token_NC, to[:, None]].get(mode="fill", fill_value=-1)
    leaving, results = (jnp.sum(t, axis=0, dtype=jnp.int32) for t in (go_TN, jnp.where(go_TN, plan.pairs_TN, 0)))
    came = swap(pack(x, ids), leaving, None, at.axes, backend, ragged)
    y, asked, bank = _answers(bank, at, *unpack(came, width, x_TD.dtype), rooms.results)
    back = jax.lax.bitcast_convert_type(swap(to_words(y), asked, results, at.axes, backend, ragged), y.dtype)
    device = jnp.minimum(plan.device_TA, n - 1)
    token = jnp.arange(tokens)[:, None]
    mine = go_TN[token, device] & (plan.device_TA < n)
    got = back[device, jnp.where(mine, first_TN[token, device] + plan.column_TA, 0)]
    return sent_N + leaving, paired_N + results, jnp.where(mine[..., None], got, y_TAD), bank


def _answers(bank, at: Meeting, x_NCD: Float[Array, "n C D"], ids_NCJ: Int[Array, "n C J"], room: int):
    """Results for each device [n, room, D], in the order in which it asked; how many; and the bank."""
    n, _, most = ids_NCJ.shape
    ids = ids_NCJ.reshape(n, -1)
    there = ids >= 0
    rank = jnp.cumsum(there, axis=1, dtype=jnp.int32) - there
    pair_NR = listed(jnp.where(there, rank, room), room)
    source = jnp.arange(n)[:, None]
    rows = x_NCD.at[source, pair_NR // most].get(mode="fill", fill_value=0)
    own = ids.at[source, pair_NR].get(mode="fill", fill_value=-1).reshape(-1)
    y, bank = at.compute(bank, rows.reshape(n * room, -1), own, own >= 0)
    return y.reshape(n, room, -1), there.sum(1, dtype=jnp.int32), bank
