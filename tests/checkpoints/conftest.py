"""Helpers for comparing trees."""

import jax
import ml_dtypes
import numpy as np
import pytest


def held(x: np.ndarray) -> np.ndarray:
    return x.view(np.uint16) if x.dtype == ml_dtypes.bfloat16 else x


@pytest.fixture
def assert_trees_equal():
    """Same structure, dtypes, shapes and bits; bfloat16 may be held as uint16 on either side."""

    def check(got, expected):
        assert jax.tree.structure(got) == jax.tree.structure(expected)
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(expected), strict=True):
            a, b = held(np.asarray(a)), held(np.asarray(b))
            assert a.dtype == b.dtype and a.shape == b.shape, (path, a.dtype, a.shape, b.dtype, b.shape)
            np.testing.assert_array_equal(
                np.ascontiguousarray(a).view(np.uint8), np.ascontiguousarray(b).view(np.uint8), str(path)
            )

    return check
