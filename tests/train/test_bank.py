"""The training bank against a plain loop, in values and gradients; and what it leaves out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.experts import ResidentBank
from jaxmoe.train.bank import TrainBank, slots
from pallas_kernels.dispatch import Kernels

T, D, F, E, A = 37, 16, 8, 6, 2
KERNELS = Kernels("cpu", row_invariant=False)


@pytest.fixture(scope="module")
def arrays():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(T, D)).astype(np.float32)
    ids = np.stack([rng.permutation(E)[:A] for _ in range(T)]).astype(np.int32)
    weights = rng.random((T, A)).astype(np.float32)
    w_in = rng.normal(size=(2, E, D, 2, F)).astype(np.float32)
    w_out = rng.normal(size=(2, E, F, D)).astype(np.float32)
    return jax.tree.map(jnp.asarray, (x, ids, weights, w_in, w_out))


def plain(x, ids, weights, w_in, w_out):
    """Every expert on every token, then the chosen ones."""
    both = jnp.einsum("td,edcf->tecf", x, w_in[1])
    out = jnp.einsum("tef,efd->ted", jax.nn.silu(both[:, :, 0]) * both[:, :, 1], w_out[1])
    return (jnp.take_along_axis(out, ids[..., None], 1) * weights[..., None]).sum(1)


def test_values_and_gradients_equal_a_plain_loop(arrays):
    x, ids, weights, w_in, w_out = arrays
    valid = jnp.ones(T, bool)
    probe = jnp.asarray(np.random.default_rng(1).normal(size=(T, D)), jnp.float32)

    def trained(x, weights, w_in, w_out):
        y, _, aux = TrainBank(w_in, w_out, capacity=float(E)).expert_ffn(1, x, ids, weights, valid, KERNELS)
        return (y * probe).sum(), aux["dropped"]

    def reference(x, weights, w_in, w_out):
        return (plain(x, ids, weights, w_in, w_out) * probe).sum()

    (value, dropped), grads = jax.jit(jax.value_and_grad(trained, argnums=(0, 1, 2, 3), has_aux=True))(x, weights, w_in, w_out)
    expected, expected_grads = jax.jit(jax.value_and_grad(reference, argnums=(0, 1, 2, 3)))(x, weights, w_in, w_out)
    assert int(dropped) == 0
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for got, want in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-4, atol=2e-4)


def test_equals_the_resident_bank(arrays):
    x, ids, weights, w_in, w_out = arrays
    valid = jnp.arange(T) % 5 != 0

    @jax.jit
    def both(x, weights):
        banks = TrainBank(w_in, w_out, capacity=float(E)), ResidentBank(w_in, w_out)
        return [bank.expert_ffn(1, x, ids, weights, valid, KERNELS)[0] for bank in banks]

    trained, resident = both(x, weights)
    np.testing.assert_allclose(np.where(valid[:, None], trained, 0), resident, rtol=1e-4, atol=1e-4)
    assert not np.asarray(resident)[~np.asarray(valid)].any()


def test_slots_leave_out_exactly_the_overflow(arrays):
    ids = np.zeros((T, 1), np.int32)
    slot, token = slots(jnp.asarray(ids), jnp.ones(T, bool), E, 10)
    assert (np.asarray(slot) < E * 10).sum() == 10
    assert np.asarray(token)[:10].tolist() == list(range(10))
    assert (np.asarray(token)[10:] == T).all()
