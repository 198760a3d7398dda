"""The same model in transformers and here, side by side: logits in float32 and bfloat16, and greedy text. Needs the `bench` extra."""

import jax
import numpy as np
import pytest

from checkpoints.convert import convert
from checkpoints.load import open_checkpoint
from jaxmoe.engine.generate import Engine, Request, prompt_logits
from jaxmoe.engine.model import load_model
from pallas_kernels.dispatch import Kernels
from scripts import make_goldens
from tests.models import decode_logits, prefill_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = ("qwen3_moe_normalized", "olmoe_clipped", "mixtral_windowed")
NEW_TOKENS = 64


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(config, Hugging Face folder, converted checkpoint)"""
    config, folder = make_goldens.CASES[request.param], tmp_path_factory.mktemp(request.param)
    make_goldens.write_folder(folder / "hf", config, seed=7)
    convert(folder / "hf", folder / "converted")
    return config, folder / "hf", open_checkpoint(folder / "converted")


def test_float32_logits(case):
    """A sequence longer than a block of keys, in several steps of the engine."""
    config, folder, checkpoint = case
    ids = make_goldens.sequence(config, 200, seed=3)
    expected, gaps = make_goldens.run_transformers(make_goldens.load_transformers(folder), ids)
    got = prompt_logits(load_model(checkpoint, "float32", Kernels("cpu")), ids.tolist(), tokens=128)
    certain = np.cumprod(gaps > make_goldens.SMALLEST_GAP).astype(bool)  # up to a token whose experts rounding may choose
    assert certain.sum() >= 100
    np.testing.assert_allclose(got[certain], expected[certain], rtol=0, atol=2e-5)


def test_bfloat16_logits(case):
    config, folder, checkpoint = case
    ids = make_goldens.sequence(config, 64, seed=3)
    exact, _ = make_goldens.run_transformers(make_goldens.load_transformers(folder), ids)
    theirs, gaps = make_goldens.run_transformers(make_goldens.load_transformers(folder, "bfloat16"), ids)
    model = load_model(checkpoint, "bfloat16", Kernels("cpu"))
    assert {leaf.dtype for leaf in jax.tree.leaves((model.params, model.bank))} == {np.dtype(np.uint16)}
    (got,) = prefill_logits(model, [ids.tolist()], [[(0, 0, 64)]], 64)
    err=lambda a,b: np.linalg.norm(a-b,axis=1)/np.linalg.norm(b,axis=1)
    e=err(got,theirs); print("gap", np.sort(gaps)[:8]); print("ours-theirs", np.sort(e)[-8:], np.median(e), "total", np.linalg.norm(got-theirs)/np.linalg.norm(theirs))
    print("ours-exact", np.sort(err(got,exact))[-8:],np.linalg.norm(got-exact)/np.linalg.norm(exact)); print("theirs-exact", np.sort(err(theirs,exact))[-8:],np.linalg.norm(theirs-exact)/np.linalg.norm(exact))
    top=np.sort(theirs,1); print("agree", (got.argmax(1)==theirs.argmax(1)).mean(), "margins of disagreement", (top[:,-1]-top[:,-2])[got.argmax(1)!=theirs.argmax(1)], [exact.std()])
    assert 0


def test_greedy_text(case):
    config, folder, checkpoint = case
    theirs = make_goldens.load_transformers(folder)
    prompts = [make_goldens.sequence(config, n, seed=10 + n).tolist() for n in (1, 23, 40)]
    options = dict(do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0)
    expected = [theirs.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    assert [len(e) for e in expected] == [NEW_TOKENS] * 3
    assert all(len(set(e)) > 3 for e in expected)
    engine = Engine(load_model(checkpoint, "float32", Kernels("cpu")), 3, 128, greedy=True)
    requests = [Request(tuple(p), NEW_TOKENS) for p in prompts]
    together, _ = engine.generate(requests)
    alone = [engine.generate([r])[0][0] for r in requests]
    assert [r.ids for r in together] == expected
    assert [r.ids for r in alone] == expected
