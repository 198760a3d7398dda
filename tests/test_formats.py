"""Quantized leaves: what a packed number means, and how far it may be from the weight it stands for."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.formats import PACK_BLOCK, Quantized, contiguous, dequantize, pack_block, pack_int4, quantize, unpack_int4


def plain_dequantize(q: Quantized) -> np.ndarray:
    """Number by number, as the docstrings say where each one lies."""
    values, scales = np.moveaxis(np.asarray(q.values), q.axis, 1), np.asarray(q.scales)
    k = q.shape[q.axis]
    out = np.zeros((values.shape[0], k, *values.shape[2:]), np.float32)
    for i in range(k):
        if q.bits == 8:
            number = values[:, i].astype(np.int32)
        else:
            half = pack_block(k) // 2
            block, j = divmod(i, 2 * half)
            byte = values[:, block * half + j % half].astype(np.uint8).astype(np.int32)
            number = byte & 15 if j < half else byte >> 4
            number = np.where(number > 7, number - 16, number)
        out[:, i] = number * scales[:, i // q.group]
    return np.moveaxis(out, 1, q.axis)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("shape", "axis"), [((3, 192, 10), -2), ((3, 10, 192), -1), ((2, 256, 2, 6), -3), ((2, 2, 6, 256), -1)])
@pytest.mark.parametrize("group", [32, 64])
def test_rounds_to_the_nearest_step_of_its_group(bits, shape, axis, group):
    w = np.random.default_rng(0).standard_normal(shape, np.float32)
    q = quantize(jnp.asarray(w), bits, group, axis)
    assert q.shape == shape and q.values.dtype == jnp.int8 and q.nbytes == q.values.size + 4 * q.scales.size
    assert q.values.size == w.size * bits // 8
    np.testing.assert_array_equal(np.asarray(dequantize(q)), plain_dequantize(q))
    step = np.moveaxis(np.repeat(np.asarray(q.scales), group, axis=1), 1, axis)
    assert (np.abs(plain_dequantize(q) - w) <= step * 0.5001).all()
    # The largest of a group is a whole number of steps away from zero.
    assert np.abs(np.moveaxis(plain_dequantize(q), axis, 1)).max() == pytest.approx(np.abs(w).max(), rel=1e-6)


def test_zeros_stay_zeros():
    q = quantize(jnp.zeros((1, 64, 2)), 4, 32, -2)
    assert not np.asarray(q.scales).any() and not np.asarray(dequantize(q)).any()


@pytest.mark.parametrize(("k", "block"), [(2880, 64), (2048, 128), (768, 128), (96, 32), (2, 2), (6, 2)])
def test_packing_keeps_every_number(k, block):
    assert pack_block(k) == block <= PACK_BLOCK
    numbers = np.random.default_rng(0).integers(-8, 8, (2, k, 3)).astype(np.int8)
    packed = pack_int4(jnp.asarray(numbers), 1)
    assert packed.shape == (2, k // 2, 3)
    np.testing.assert_array_equal(np.asarray(unpack_int4(packed, 1)), numbers)


def test_bad_input_is_named():
    w = jnp.ones((1, 96, 2))
    with pytest.raises(ValueError, match="to 4 or 8 bits, not 3"):
        quantize(w, 3, 32, -2)
    with pytest.raises(ValueError, match="K = 96 is not a whole number of groups of 64"):
        quantize(w, 8, 64, -2)
    with pytest.raises(ValueError, match="packed in pairs along K, and 3 is odd"):
        quantize(jnp.ones((1, 3, 2)), 4, 3, -2)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32, np.int8])
@pytest.mark.parametrize(
    "view",
    [
        lambda x: x,
        lambda x: x.T,
        lambda x: x[3:200, 5:301].T,
        lambda x: x.reshape(15, 20, 310).transpose(2, 0, 1),
        lambda x: x.reshape(300, 31, 10).transpose(1, 2, 0)[4:9],
        lambda x: x.reshape(10, 30, 310).transpose(1, 0, 2),
        lambda x: x[::-1, ::2].T,
        lambda x: x[:0].T,
        lambda x: x[7],
    ],
)
def test_contiguous(view, dtype):
    x = view(np.random.default_rng(0).integers(0, 100, (300, 310)).astype(dtype))
    got = contiguous(x)
    assert got.flags.c_contiguous and got.dtype == x.dtype
    np.testing.assert_array_equal(got, x)
