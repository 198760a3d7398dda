"""Training a tiny model: the loss falls, a resumed run equals an uninterrupted one, and the export loads as it was trained."""

import functools
import json

import jax
import numpy as np
import pytest

from checkpoints.load import load_hf_or_checkpoint
from jaxmoe.engine.generate import prompt_logits
from jaxmoe.engine.model import load_model
from jaxmoe.spec import ModelSpec
from jaxmoe.train import card, loop
from jaxmoe.train.corpus import build_corpus, load_corpus, windows
from jaxmoe.train.evaluate import lru_hit_rate
from jaxmoe.train.sources import Domain
from pallas_kernels.dispatch import Kernels
from tests.quick import OPTIONS

CONFIG = dict(
    model_type="qwen3_moe", vocab_size=300, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-6,
    max_position_embeddings=128, norm_topk_prob=True, tie_word_embeddings=True, eos_token_id=0,
)  # fmt: skip
SETTINGS = loop.TrainConfig(steps=12, decay=4, warmup=2, batch=4, length=32, muon_lr=0.05, adam_lr=0.02, capacity=2.0)


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """Every run of these settings takes the same step: made once, not once a run, and little optimized."""
    make_step = loop.make_step

    @functools.cache
    def quick(spec, settings):
        return jax.jit(make_step(spec, settings).__wrapped__, donate_argnums=0, compiler_options=OPTIONS)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_step", quick)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    line = "the quick brown fox jumps over the lazy dog, says line {}.\n"
    documents = [(f"d{i}", "".join(line.format(i * j) for j in range(30))) for i in range(60)]
    domain = Domain("toy", "CC0-1.0", "foxes", lambda root: iter(documents))
    build_corpus(folder, [domain], vocab_size=300, held_out=0.2)
    return load_corpus(folder)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rows = [row for _, row in loop.train(ModelSpec.from_hf(CONFIG), corpus, SETTINGS, folder, save_every=5)]
    return folder, rows


def test_the_loss_falls(trained):
    _, rows = trained
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["nll"] < rows[0]["nll"] - 0.3


def test_a_resumed_run_goes_on_where_it_stopped(corpus, trained, tmp_path):
    spec = ModelSpec.from_hf(CONFIG)
    for _, row in loop.train(spec, corpus, SETTINGS, tmp_path, save_every=5):
        if row["step"] == 7:
            break  # as if killed: the last saved state is of step 5
    rows = [row for _, row in loop.train(spec, corpus, SETTINGS, tmp_path, save_every=5)]
    assert rows[0]["step"] == 6
    np.testing.assert_allclose([r["nll"] for r in rows], [r["nll"] for r in trained[1][5:]], rtol=1e-3)


def test_the_export_is_the_trained_model(corpus, trained, tmp_path):
    spec = ModelSpec.from_hf(CONFIG)
    figures = card.export(spec, CONFIG, corpus, trained[0], tmp_path / "hf", SETTINGS)
    assert 0 < figures["mean_bits_per_byte"] < 8
    assert "toy" in (tmp_path / "hf/README.md").read_text()
    assert json.loads((tmp_path / "hf/config.json").read_text())["model_type"] == "qwen3_moe"
    model = load_model(load_hf_or_checkpoint(tmp_path / "hf", tmp_path / "cache"), "float32", Kernels("cpu"))
    window = windows(corpus, "toy", 64)[0]
    logits = prompt_logits(model, window[:-1].tolist(), 32)
    nll = jax.nn.logsumexp(logits, -1) - logits[np.arange(64), window[1:]]
    assert abs(float(nll.mean()) - figures["held_out"]["toy"]["nats_per_token"]) < 0.5


def test_lru_hit_rate_counts_as_a_plain_cache_does():
    ids = np.array([[[0, 1], [1, 2], [0, 3], [1, 2]]])
    assert lru_hit_rate(ids, 4) == 4 / 8
    assert lru_hit_rate(ids, 2) == 1 / 8
