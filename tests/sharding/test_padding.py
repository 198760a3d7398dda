"""The bytes of arrays on TPUs: against what XLA's compiler says of them."""

import itertools
import math
import random

import numpy as np
import pytest

from sharding.padding import default_order, held_order, padded_size

XLA = (
    # What `get_default_layout` of a compile-only v5e says (jax 0.10.2): shape, bytes of a number, axes outermost first, rows of a tile.
    ((201088, 2880), 2, (1, 0), 8),
    ((2880, 201088), 2, (0, 1), 8),
    ((2, 32, 2, 2880, 2880), 2, (0, 1, 2, 3, 4), 8),
    ((2, 8), 2, (0, 1), 2),
    ((2, 1), 4, (1, 0), 1),
    ((2, 2880, 64, 64), 2, (0, 2, 3, 1), 8),
    ((2, 64, 64, 2880), 2, (0, 1, 2, 3), 8),
    ((2, 2880), 2, (0, 1), 2),
    ((2, 7168, 64), 2, (0, 2, 1), 8),
    ((320, 576, 3, 100, 50304), 1, (0, 2, 3, 1, 4), 32),
    ((130, 7168, 256, 64, 12), 4, (0, 1, 4, 3, 2), 8),
    ((384, 1, 50304, 192), 4, (0, 1, 3, 2), 8),
    ((160, 5, 48, 72), 4, (1, 2, 3, 0), 8),
    ((32, 3, 100, 7168, 5), 2, (1, 2, 4, 0, 3), 8),
    ((768, 4), 2, (1, 0), 4),
    ((16, 72, 3, 5, 2), 2, (0, 2, 3, 4, 1), 2),
    ((7, 100, 5), 4, (2, 0, 1), 8),
    ((64, 4, 2), 1, (2, 1, 0), 4),
    ((384, 94), 1, (1, 0), 8),
    ((1024, 320), 1, (1, 0), 32),
)
ALONE = (
    # Argument bytes of a program of one array, which v5e, v5p and TPU7x agree on.
    ((), 4, 512),
    ((1,), 4, 512),
    ((129,), 4, 1024),
    ((300,), 2, 1024),
    ((1025,), 4, 8192),
    ((7, 100), 4, 4096),
    ((3, 130), 2, 2048),
    ((2, 2880), 2, 11776),
    ((5, 7, 9), 2, 10240),
    ((1, 5), 2, 512),
)


@pytest.mark.parametrize("shape, itemsize, order, rows", XLA)
def test_the_order_and_size_are_those_of_xla(shape, itemsize, order, rows):
    assert default_order(shape, itemsize) == order
    *outer, second, last = (shape[axis] for axis in order)
    assert padded_size(shape, itemsize) == math.prod(outer) * -(-second // rows) * rows * -(-last // 128) * 128


@pytest.mark.parametrize("shape, itemsize, nbytes", ALONE)
def test_bytes_are_those_of_a_program_s_argument(shape, itemsize, nbytes):
    assert padded_size(shape, itemsize) * itemsize == nbytes


def test_no_order_takes_less_than_the_default():
    draw = random.Random(0)
    for _ in range(200):
        shape = tuple(draw.choice((1, 2, 3, 8, 64, 100, 128, 130, 2880)) for _ in range(draw.randint(2, 4)))
        itemsize = draw.choice((1, 2, 4))
        every = [padded_size(shape, itemsize, order) for order in itertools.permutations(range(len(shape)))]
        assert padded_size(shape, itemsize) == min(every) >= math.prod(shape)


@pytest.mark.parametrize(
    "shape, axes, order",
    [
        ((4, 201088, 2880), ("layers", "vocab", "embed"), (0, 1, 2)),
        ((201088, 2880), ("vocab", "embed"), (0, 1)),
        ((36, 128, 2, 2880, 2880), ("layers", "experts", None, "embed", "hidden"), (0, 1, 2, 3, 4)),
        ((4, 4096, 64, 128), ("layers", "embed", "heads", "head_dim"), (0, 1, 2, 3)),
        ((4, 4096, 4, 128), ("layers", "embed", "kv_heads", "head_dim"), (0, 1, 2, 3)),
        ((4, 4096, 1, 128), ("layers", "embed", "kv_heads", "head_dim"), (0, 2, 1, 3)),
        ((4, 5120, 10, 128), ("layers", "embed", "heads", "head_dim"), (0, 2, 3, 1)),
        ((45, 4096, 176), ("layers", "embed", "shared_hidden"), (0, 1, 2)),
        ((45, 4096, 96), ("layers", "embed", "shared_hidden"), (0, 2, 1)),
        ((4, 2880, 64, 64), ("layers", "embed", "heads", "head_dim"), (0, 2, 3, 1)),
        ((4, 1536, 128, 192), ("layers", None, "heads", "head_dim"), (0, 2, 3, 1)),
        ((4, 64, 64, 2880), ("layers", "heads", "head_dim", "embed"), (0, 1, 2, 3)),
        ((4, 7168, 64), ("layers", "embed", None), (0, 2, 1)),
        ((2880, 32), ("embed", None), (1, 0)),
        ((48, 6, 128), ("layers", "heads", "head_dim"), (1, 0, 2)),
    ],
)
def test_weights_are_held_as_steps_compute_with_them(shape, axes, order):
    assert held_order(shape, axes) == order


@pytest.mark.compile_only
@pytest.mark.parametrize("target", ["v5e:2x2", "tpu7x:2x2x1"])
def test_random_shapes_get_the_order_that_xla_gives_them(target):
    from sharding.compile_only import devices

    device, draw = devices(target)[0], random.Random(1)
    for _ in range(300):
        shape = tuple(draw.choice((1, 2, 3, 5, 8, 30, 64, 96, 100, 128, 130, 300, 2880)) for _ in range(draw.randint(1, 5)))
        dtype = np.dtype(draw.choice((np.uint8, np.uint16, np.float32)))
        found = str(device.client.get_default_layout(dtype, shape, device))  # such as {1,0:T(8,128)(2,1)}: the last axis first
        order, _, tiles = found.strip("{}").partition(":")
        assert default_order(shape, dtype.itemsize) == tuple(int(axis) for axis in order.split(","))[::-1], (shape, dtype)
        tile = [int(n) for n in tiles.split(")")[0].removeprefix("T(").split(",")]
        if len(shape) > 1:
            *outer, second, last = (shape[axis] for axis in default_order(shape, dtype.itemsize))
            assert padded_size(shape, dtype.itemsize) == math.prod(outer) * -(-second // tile[0]) * tile[0] * -(-last // tile[1]) * tile[1]
        else:
            assert padded_size(shape, dtype.itemsize) == -(-shape[0] // tile[0]) * tile[0], (shape, dtype)
