"""Tokens that pass groups of layers in parts come out as if one device had run all layers on all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxmoe.cache.batch import Batch, make_batch
from jaxmoe.nn.pipeline import parts_of, run_stages
from sharding.split import Split

ROWS, POSITIONS, WIDTH = 4, 32, 3
WEIGHTS = np.random.default_rng(0).standard_normal((4, WIDTH, WIDTH)).astype(np.float32)


def prompts(lengths: list[int], run: int, tokens: int) -> Batch:
    return make_batch([(row, 3 * row, list(range(1, 1 + n))) for row, n in enumerate(lengths)], run, tokens)


def decoding(rows: int) -> Batch:
    """The last row is padding."""
    return make_batch([(row, 2 + row, [9]) for row in range(rows - 1)], 1, rows)


CASES = {
    "a part a stage": (2, prompts([8, 8], 4, 16), 2),
    "padding parts": (4, prompts([4, 2], 4, 16), 4),
    "fewer parts than stages": (4, prompts([9, 5], 4, 24), 3),
    "one part": (2, prompts([4, 7], 4, 12), 1),
    "nothing at all": (2, make_batch([], 4, 8, [0]), 2),
    "decoding": (4, decoding(4), 4),
    "a single row": (4, make_batch([(1, 5, [9])], 1, 1), 1),
}
"""Stages, tokens, and into how many parts they are cut."""


def layers(weight, x, kept, batch: Batch):
    """What layers do to tokens: they mix a token with those before it in its sequence, which may be of another part, and keep what they saw."""
    at = jnp.where(batch.segments >= 0, batch.segments * POSITIONS + batch.positions, ROWS * POSITIONS)
    real = (jnp.arange(batch.run_lengths.shape[0]) < batch.n_runs).sum()
    seen = kept["seen"].reshape(-1, WIDTH).at[at].set(x["h"], mode="drop").reshape(ROWS, POSITIONS, WIDTH)
    before = (jnp.arange(POSITIONS) < batch.positions[:, None])[..., None]
    mixed = jnp.sum(seen[batch.segments] * before, axis=1)
    h = jnp.tanh(x["h"] @ weight + 0.1 * mixed)
    found = {"seen": seen, "runs": kept["runs"] + real, "tokens": kept["tokens"] + (batch.segments >= 0).sum()}
    return {"h": h, "id": x["id"] + batch.tokens}, found


def by_loop(stages: int, x: np.ndarray, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """(h, what each stage has seen), token after token."""
    h, kept = x.copy(), np.zeros((stages, ROWS, POSITIONS, WIDTH), np.float32)
    for stage in range(stages):
        for token in np.flatnonzero(batch.segments >= 0):
            row, position = batch.segments[token], batch.positions[token]
            kept[stage, row, position] = h[token]
            h[token] = np.tanh(h[token] @ WEIGHTS[stage] + 0.1 * kept[stage, row, :position].sum(0))
    return h, kept


@pytest.mark.parametrize("case", CASES)
def test_the_same_as_all_layers_on_one_device(case):
    stages, batch, parts = CASES[case]
    assert parts_of(batch, stages) == parts
    x = np.random.default_rng(1).standard_normal((len(batch.tokens), WIDTH)).astype(np.float32)

    def one(weight, x, batch):
        kept = {"seen": jnp.zeros((ROWS, POSITIONS, WIDTH)), "runs": jnp.int32(0), "tokens": jnp.int32(0)}
        given = {"h": x, "id": jnp.zeros(len(x), jnp.int32)}
        out, kept = run_stages(lambda x, kept, batch: layers(weight[0], x, kept, batch), stages, given, kept, batch)
        return jax.tree.map(lambda t: t[None], (out, kept))

    inputs = (P("stage"), P(), P())
    whole = jax.shard_map(one, mesh=Split(stage=stages).mesh(), in_specs=inputs, out_specs=P("stage"), check_vma=False)
    out, kept = jax.tree.map(np.asarray, jax.jit(whole)(WEIGHTS[:stages], x, batch))
    h, seen = by_loop(stages, x, batch)
    real = batch.segments >= 0
    np.testing.assert_allclose(kept["seen"], seen, atol=1e-6)
    assert (kept["runs"] == batch.n_runs).all() and (kept["tokens"] == real.sum()).all(), "each stage has each real run once"
    for stage in range(stages):
        np.testing.assert_allclose(out["h"][stage][real], h[real], atol=1e-6, err_msg="on every stage")
        np.testing.assert_array_equal(out["id"][stage][real], stages * batch.tokens[real])
