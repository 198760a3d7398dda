"""With the kernels of GPUs and TPUs, in the layouts that they want: streamed experts give the resident ones' bits, and both give the CPU's values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.experts import ResidentBank, SlotBank, host_store
from jaxmoe.formats import LAYOUTS, expert_axes, expert_shapes, store_numpy
from pallas_kernels.dispatch import Kernels

LAYERS, EXPERTS, ACTIVE, D, F = 2, 4, 1, 64, 64
GPU, TPU = Kernels("gpu", interpret=True), Kernels("tpu", interpret=True)


def experts(layout: str) -> tuple[np.ndarray, np.ndarray]:
    """w_in [L, E, D, 2, F] and w_out [L, E, F, D] in bfloat16, in the order of `layout`."""
    rng = np.random.default_rng(0)
    w_in = rng.standard_normal((LAYERS, EXPERTS, D, 2, F), np.float32) * D**-0.5
    w_out = rng.standard_normal((LAYERS, EXPERTS, F, D), np.float32) * F**-0.5
    first, second = (np.argsort(axes) for axes in expert_axes(layout))
    return tuple(
        np.ascontiguousarray(store_numpy(w, "bfloat16").transpose(0, 1, *(2 + a for a in axes))) for w, axes in ((w_in, first), (w_out, second))
    )


def both_banks(kernels: Kernels, slots: int, fill: str) -> tuple[SlotBank, ResidentBank]:
    layout = kernels.expert_layout
    w_in, w_out = experts(layout)
    n = LAYERS * EXPERTS
    records = np.concatenate([w_in.reshape(n, -1), w_out.reshape(n, -1)], axis=1).reshape(n, -1, 256)
    # Where a GPU's kernel is interpreted, jax takes no argument in host memory.
    store = jnp.asarray(records) if kernels.backend == "gpu" else host_store.pinned(records)
    streamed = SlotBank(
        store, slots=(slots,) * LAYERS, staging=1, experts=EXPERTS, entries=expert_shapes(D, F, layout), layout=layout,
        dtype="bfloat16", fill=fill, poison=True,
    )  # fmt: skip
    return streamed, ResidentBank(jnp.asarray(w_in), jnp.asarray(w_out), layout=layout)


def call(kernels: Kernels):
    def run(fixed, moving, layer, x, ids, weights, valid):
        y, bank, _ = fixed.join(moving).expert_ffn(layer, x, ids, weights, valid, kernels)
        return y, bank.split()[1]

    return jax.jit(run, compiler_options=kernels.compiler_options())


def tokens(count: int, seed: int) -> tuple:
    """Rows, experts, weights and which of them are real: the last is not, where there are several."""
    rng = np.random.default_rng(seed)
    ids = np.argsort(rng.random((count, EXPERTS)), axis=1)[:, :ACTIVE].astype(np.int32)
    weights = rng.random((count, ACTIVE)).astype(np.float32)
    x = jnp.asarray(rng.standard_normal((count, D), np.float32), jnp.bfloat16)
    return x, ids, weights, np.arange(count) < max(1, count - 1)


@pytest.mark.parametrize(
    ("kernels", "fill", "count", "layers"),
    [(TPU, "while", 1, (0, 1, 0)), (TPU, "while", 4, (0, 1, 0)), pytest.param(GPU, "fixed", 4, (0,), marks=pytest.mark.slow)],
    ids=["tpu-1", "tpu-4", "gpu-4"],
)
def test_streamed_experts_have_the_resident_bits(kernels, fill, count, layers):
    """One token fits into the slots; four ask for more experts than there are, and go by waves."""
    streamed, resident = both_banks(kernels, 1, fill)
    reference = both_banks(Kernels("cpu"), 1, fill)[1]
    run, plain = call(kernels), call(Kernels("cpu"))
    fixed, _ = streamed.split()
    moving = streamed.init_state()
    for seed, layer in enumerate(layers):
        step = tokens(count, seed)
        y, moving = run(fixed, moving, layer, *step)
        expected, _ = run(resident, (), layer, *step)
        np.testing.assert_array_equal(np.asarray(y).view(np.uint16), np.asarray(expected).view(np.uint16))
        values, _ = plain(reference, (), layer, *step)
        values = np.asarray(values, np.float32)
        assert np.abs(np.asarray(y, np.float32) - values).max() <= 2e-2 * np.abs(values).max()
        assert not np.asarray(y)[~step[3]].any()
    assert np.asarray(moving.loads).sum() > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_shapes_and_axes_of_a_layout_agree(layout):
    for shape, axes, plain in zip(expert_shapes(D, F, layout), expert_axes(layout), ((D, 2, F), (F, D)), strict=True):
        assert np.zeros(shape).transpose(axes).shape == plain
