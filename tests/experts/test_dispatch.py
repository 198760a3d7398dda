"""Rows sorted by expert: both ways to find the order, against a plain loop."""

import functools

import jax
import numpy as np
import pytest

from jaxmoe.experts.dispatch import _counted, _sorted, dispatch


@pytest.mark.parametrize("way", [_counted, _sorted])
@pytest.mark.parametrize(("assignments", "experts"), [(1, 1), (1, 8), (32, 1), (32, 32), (257, 5), (2048, 64)])
def test_assignments_are_sorted_by_expert(assignments, experts, way):
    """Stably; padding has the number after the last expert's."""
    key = np.random.default_rng(assignments).integers(0, experts + 1, assignments).astype(np.int32)
    order, row, sizes = (np.asarray(x) for x in jax.jit(functools.partial(way, experts=experts))(key))
    expected = sorted(range(assignments), key=lambda i: key[i])
    assert order.tolist() == expected
    assert row[order].tolist() == list(range(assignments))
    assert sizes.tolist() == [int((key == e).sum()) for e in range(experts)]
    assert order.dtype == row.dtype == sizes.dtype == np.int32


def test_padding_and_ids_of_no_expert_come_last():
    ids = np.asarray([[1, 0], [3, 2], [0, 7], [-1, 1]], np.int32)
    plan = jax.jit(dispatch, static_argnums=2)(ids, np.asarray([True, False, True, True]), 4)
    assert plan.sizes_E.tolist() == [2, 2, 0, 0]
    assert plan.token_M.tolist() == [0, 2, 0, 3, 1, 1, 2, 3]
    assert plan.row_TA.tolist() == [[2, 0], [4, 5], [1, 6], [7, 3]]
