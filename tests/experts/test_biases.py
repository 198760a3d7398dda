"""Experts with biases, which every bank is given beside its weights: streamed or resident, a token's bits are the same, alone and among others.

That the values are right is tested in `tests/contracts/test_grouped_matmul.py`; here the biases have to be those of the right experts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.experts import ResidentBank, SlotBank, expert_ffn, host_store
from jaxmoe.experts.ranked import rank
from jaxmoe.formats import load_numpy, store_numpy
from jaxmoe.residency import Choice
from jaxmoe.train.bank import TrainBank
from pallas_kernels.dispatch import Kernels

LAYERS, EXPERTS, ACTIVE, WIDTH, HIDDEN = 2, 8, 2, 64, 32
CPU = Kernels("cpu")
DTYPES = ("float32", "bfloat16")


def draw(seed: int, *shape: int, scale: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32) * np.float32(scale)


@functools.cache
def weights(dtype: str) -> tuple[np.ndarray, np.ndarray]:
    w_in, w_out = draw(0, LAYERS, EXPERTS, WIDTH, 2, HIDDEN, scale=0.125), draw(1, LAYERS, EXPERTS, HIDDEN, WIDTH, scale=0.2)
    return store_numpy(w_in, dtype), store_numpy(w_out, dtype)


def biases(dtype: str, asked: np.ndarray | None = None) -> tuple[jax.Array, jax.Array]:
    """Of one layer's experts; NaN of those that nobody asks for."""
    both = draw(2, EXPERTS, 2, HIDDEN), draw(3, EXPERTS, WIDTH)
    for b in both if asked is not None else ():
        b[np.setdiff1d(np.arange(EXPERTS), asked)] = np.nan
    return tuple(jnp.asarray(store_numpy(b, dtype)) for b in both)


def resident(dtype: str) -> ResidentBank:
    return ResidentBank(*map(jnp.asarray, weights(dtype)), activation="clamped_swiglu")


def streamed(dtype: str, slots: int, ahead: bool) -> SlotBank:
    w_in, w_out = weights(dtype)
    n = LAYERS * EXPERTS
    records = np.concatenate([w_in.reshape(n, -1), w_out.reshape(n, -1)], axis=1).reshape(n, -1, 256)
    return SlotBank(
        host_store.pinned(records), slots=(slots,) * LAYERS, staging=1, experts=EXPERTS, entries=(w_in.shape[2:], w_out.shape[2:]), dtype=dtype,
        activation="clamped_swiglu", read_ahead=ahead, poison=True,
    )  # fmt: skip


def tokens(count: int, seed: int, dtype: str) -> tuple:
    """Rows, experts of which some are asked for by nobody, weights, and which rows are real: not the last, where there are many."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((count, EXPERTS - 1)), axis=1)[:, :ACTIVE].astype(np.int32)
    x = rng.standard_normal((count, WIDTH), np.float32)
    return jnp.asarray(x, dtype), ids, rng.random((count, ACTIVE), np.float32), np.arange(count) < max(count - 1, 4)


@functools.cache
def program():
    def run(fixed, moving, layer, *tokens_and_biases):
        y, bank, _ = expert_ffn(fixed.join(moving), layer, *tokens_and_biases[:4], CPU, *tokens_and_biases[4:])
        return y, bank.split()[1]

    return jax.jit(run, compiler_options=CPU.compiler_options())


def bits(x) -> np.ndarray:
    x = np.asarray(x)
    return x.view(f"u{x.dtype.itemsize}")


@pytest.mark.parametrize(
    ("count", "slots", "ahead", "dtype"),
    [(1, 2, False, "bfloat16"), (4, 8, False, "float32"), (12, 3, False, "float32"), (12, 3, True, "bfloat16")],
    ids=["one row", "at once", "waves", "ahead"],
)
def test_streamed_experts_have_the_resident_bits(count, slots, ahead, dtype):
    bank = streamed(dtype, slots, ahead)
    (fixed, _), moving = bank.split(), bank.init_state()
    for seed in range(3):
        step = tokens(count, seed, dtype)
        own = biases(dtype, step[1][step[3]])
        expected, _ = program()(resident(dtype), (), seed % LAYERS, *step, own)
        got, moving = program()(fixed, moving, seed % LAYERS, *step, own)
        assert np.isfinite(np.asarray(expected, np.float32)).all()
        np.testing.assert_array_equal(bits(got), bits(expected))
    assert np.asarray(moving.loads).sum() > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_alone_has_the_bits_it_has_among_others(dtype):
    step = tokens(12, 5, dtype)
    together, _ = program()(resident(dtype), (), 1, *step, biases(dtype))
    for t in range(3):
        alone, _ = program()(resident(dtype), (), 1, *(part[t : t + 1] for part in step), biases(dtype))
        np.testing.assert_array_equal(bits(alone), bits(together[t : t + 1]))


def test_biases_of_zero_change_nothing_and_others_do():
    step = tokens(12, 6, "float32")
    plain, _ = program()(resident("float32"), (), 1, *step)
    zeros = tuple(map(jnp.zeros_like, biases("float32")))
    np.testing.assert_array_equal(program()(resident("float32"), (), 1, *step, zeros)[0], plain)
    for i in range(2):
        some = tuple(b if i == j else zero for j, (b, zero) in enumerate(zip(biases("float32"), zeros, strict=True)))
        different = np.abs(program()(resident("float32"), (), 1, *step, some)[0] - plain).max(1)
        assert (different[step[3]] > 0.1).all() and not different[~step[3]].any()


def test_training_adds_them_too():
    step, own = tokens(12, 7, "float32"), biases("float32")
    w_in, w_out = map(jnp.asarray, weights("float32"))
    bank = TrainBank(w_in, w_out, capacity=float(EXPERTS), activation="clamped_swiglu")
    trained, _ = program()(bank, (), 1, *step, own)
    expected, _ = program()(resident("float32"), (), 1, *step, own)
    np.testing.assert_allclose(trained, expected, rtol=1e-4, atol=1e-5)


def test_ranks_have_the_biases_of_their_experts():
    x, ids, _, valid = tokens(12, 8, "bfloat16")
    need = np.isin(np.arange(EXPERTS), ids[valid])
    hit, nobody = jnp.asarray(need & (np.arange(EXPERTS) % 2 == 0)), jnp.zeros(EXPERTS, bool)
    choice = Choice(hit=hit, enter=jnp.asarray(need) & ~hit, stream=nobody, leave=nobody)
    slot = jnp.where(need, jnp.arange(EXPERTS), -1)
    ranked = jax.jit(rank)(choice, slot, x, ids, valid, biases("bfloat16"))
    for of_ranks, of_experts in zip(ranked.biases, biases("bfloat16"), strict=True):
        np.testing.assert_array_equal(load_numpy(np.asarray(of_ranks)), load_numpy(np.asarray(of_experts))[np.asarray(ranked.experts)])
    assert jax.eval_shape(rank, choice, slot, x, ids, valid).biases is None
