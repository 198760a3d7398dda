"""The gated delta-rule layer against transformers' Qwen3-Next, whole and token by token. Needs the `bench` extra."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe import formats
from jaxmoe.cache.batch import make_batch
from jaxmoe.cache.recurrent import init_recurrent
from jaxmoe.nn.delta import GatedDelta
from jaxmoe.spec import DeltaSpec, Precision
from pallas_kernels.dispatch import Kernels
from tests.more import mostly

EPS = 1e-5
CASES = {
    "grouped": (24, DeltaSpec(k_heads=2, v_heads=6, k_dim=8, v_dim=12, conv=4)),
    "odd": (13, DeltaSpec(k_heads=3, v_heads=3, k_dim=5, v_dim=7, conv=3)),
}


def peer(width: int, spec: DeltaSpec):
    """transformers' layer with random weights."""
    torch = pytest.importorskip("torch")
    next_ = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    config = pytest.importorskip("transformers").Qwen3NextConfig(
        hidden_size=width,
        num_hidden_layers=2,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=spec.k_heads,
        linear_num_value_heads=spec.v_heads,
        linear_key_head_dim=spec.k_dim,
        linear_value_head_dim=spec.v_dim,
        linear_conv_kernel_dim=spec.conv,
        rms_norm_eps=EPS,
    )
    torch.manual_seed(0)
    layer = next_.Qwen3NextGatedDeltaNet(config, 0)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.randn_like(p) * 0.3)
    return torch, config, layer


def to_params(spec: DeltaSpec, weights: dict[str, np.ndarray]) -> dict:
    """transformers' weights as the module has them.

    The rows of `in_proj_qkvz` come by key head: its query (k_dim rows), its key (k_dim), the values of the value heads that it serves
    (group x v_dim), and their gates z (group x v_dim). Those of `in_proj_ba` likewise: group rows of beta, group of the decay. Value head h is
    served by key head h // group. The convolution's channels are all queries, then all keys, then all values, each by head.
    """
    kh, vh, dk, dv = spec.k_heads, spec.v_heads, spec.k_dim, spec.v_dim
    group, width = vh // kh, weights["in_proj_qkvz.weight"].shape[1]
    by_head = np.split(weights["in_proj_qkvz.weight"].reshape(kh, -1, width), np.cumsum([dk, dk, group * dv]), axis=1)
    q, k, v, z = (x.reshape(-1, size, width).transpose(2, 0, 1) for x, size in zip(by_head, (dk, dk, dv, dv), strict=True))
    beta, decay = (x.reshape(vh, width).T for x in np.split(weights["in_proj_ba.weight"].reshape(kh, -1, width), 2, axis=1))
    conv_q, conv_k, conv_v = np.split(weights["conv1d.weight"][:, 0], np.cumsum([kh * dk, kh * dk]))
    return {
        **{name: {"kernel": x} for name, x in (("q", q), ("k", k), ("v", v), ("z", z), ("beta", beta), ("decay", decay))},
        "conv_q": {"kernel": conv_q.reshape(kh, dk, -1)},
        "conv_k": {"kernel": conv_k.reshape(kh, dk, -1)},
        "conv_v": {"kernel": conv_v.reshape(vh, dv, -1)},
        "a_log": {"scale": weights["A_log"]},
        "dt_bias": {"bias": weights["dt_bias"]},
        "norm": {"scale": weights["norm.weight"]},
        "o": {"kernel": weights["out_proj.weight"].T.reshape(vh, dv, width)},
    }


@functools.cache
def program(width: int, spec: DeltaSpec, precision: Precision, kernels: Kernels):
    module = GatedDelta(spec, width, EPS, precision, kernels)

    def step(params, x, state, batch):
        return module.apply({"params": params}, x, 1, state, batch)

    return module, jax.jit(step, donate_argnums=2, compiler_options=kernels.compiler_options())


def ours(case: str, params: dict, x: np.ndarray, steps: list[tuple[int, int, int]], dtype: str = "float32", backend: str = "cpu"):
    """Outputs of the sequence x [S, D] in cache row 2, in steps of (tokens, run, bucket)."""
    width, spec = CASES[case]
    precision = Precision(params=dtype, compute=dtype, kv=dtype)
    _, step = program(width, spec, precision, Kernels(backend))
    params = jax.tree.map(lambda w: formats.store(jnp.asarray(w), dtype), params)
    state, at, out = init_recurrent(spec, 2, 3, precision), 0, []
    for tokens, run, bucket in steps:
        padded = np.zeros((bucket, width), formats.compute_dtype(dtype))
        padded[:tokens] = x[at : at + tokens]
        got, state = step(params, padded, state, make_batch([(2, at, [0] * tokens)], run, bucket))
        out.append(np.asarray(got[:tokens], np.float32))
        at += tokens
    return np.concatenate(out)


def theirs(torch, config, layer, x: np.ndarray, pieces: list[int], dtype: str = "float32") -> np.ndarray:
    cache, at, out = torch_cache(config), 0, []
    layer = layer.to(getattr(torch, dtype))
    with torch.no_grad():
        for n in pieces:
            out.append(layer(torch.tensor(x[None, at : at + n]).to(getattr(torch, dtype)), cache_params=cache)[0].float().numpy())
            at += n
    return np.concatenate(out)


def torch_cache(config):
    from transformers import DynamicCache

    return DynamicCache(config=config)


def weights_of(layer) -> dict[str, np.ndarray]:
    return {name: p.detach().float().numpy().copy() for name, p in layer.named_parameters()}


@pytest.mark.parametrize("case, backend", [("grouped", "cpu"), ("grouped", "gpu"), ("odd", "cpu")])
def test_transformers(case, backend):
    width, spec = CASES[case]
    torch, config, layer = peer(width, spec)
    params = to_params(spec, weights_of(layer))
    x = np.random.default_rng(1).standard_normal((80, width)).astype(np.float32)
    expected = theirs(torch, config, layer, x, [70] + [1] * 10)
    got = ours(case, params, x, [(70, 32, 96)] + [(1, 1, 1)] * 10, backend=backend)
    np.testing.assert_allclose(got, expected, rtol=0, atol=5e-6 * np.abs(expected).max())


def test_bfloat16():
    width, spec = CASES["grouped"]
    torch, config, layer = peer(width, spec)
    layer = layer.to(torch.bfloat16)
    params = to_params(spec, weights_of(layer))
    x = np.random.default_rng(1).standard_normal((40, width)).astype(np.float32)
    rounded = np.asarray(formats.load_numpy(formats.store_numpy(x, "bfloat16")))
    steps = [(30, 32, 32)] + [(1, 1, 1)] * 10
    got = ours("grouped", params, x, steps, "bfloat16")
    expected = theirs(torch, config, layer, x, [30] + [1] * 10, "bfloat16")
    exact = theirs(torch, config, layer.float(), rounded, [40])
    error, their_error = (np.linalg.norm(y - exact) / np.linalg.norm(exact) for y in (got, expected))
    assert error < 1.1 * their_error < 0.03
    assert np.linalg.norm(got - expected) < 0.5 * np.linalg.norm(expected - exact)


@pytest.mark.parametrize("case", mostly(CASES, CASES.keys() - {"odd"}))  # which cache/test_recurrent.py cuts as well
def test_bits_of_cuts(case):
    """Three heads are the hard case: of few numbers XLA takes some one by one, and rounds some exponentials otherwise."""
    width, spec = CASES[case]
    module, _ = program(width, spec, Precision(), Kernels("cpu"))
    rng = np.random.default_rng(2)
    state = init_recurrent(spec, 2, 3, module.precision)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((4, width)), 0, state, make_batch([(0, 0, [0])], 4, 4))["params"]
    params = jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) * 0.3, shapes)
    x = rng.standard_normal((70, width)).astype(np.float32)
    expected = ours(case, params, x, [(70, 64, 128)])
    for steps in ([(33, 64, 128)] + [(1, 1, 1)] * 37, [(32, 32, 32)] * 2 + [(1, 1, 4)] * 6):
        np.testing.assert_array_equal(ours(case, params, x, steps).view(np.uint32), expected.view(np.uint32))
