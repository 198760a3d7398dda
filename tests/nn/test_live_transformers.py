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
from tests.models import prefill_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = {"qwen3_moe_normalized": 4, "olmoe_clipped": 4, "mixtral_windowed": 3}
"""Cases, each with a seed of weights whose greedy text doesn't soon repeat itself."""

NEW_TOKENS = 64


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread():
    """Models this small are faster without torch's pool, which would compete with jax's."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(config, Hugging Face folder, converted checkpoint)"""
    config, folder = make_goldens.CASES[request.param], tmp_path_factory.mktemp(request.param)
    make_goldens.write_folder(folder / "hf", config, CASES[request.param])
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
    theirs, _ = make_goldens.run_transformers(make_goldens.load_transformers(folder, "bfloat16"), ids)
    model = load_model(checkpoint, "bfloat16", Kernels("cpu"))
    assert {leaf.dtype for leaf in jax.tree.leaves((model.params, model.bank))} == {np.dtype(np.uint16)}
    (got,) = prefill_logits(model, [ids.tolist()], [[(0, 0, 64)]], 64)
    errors = row_errors(got, theirs)
    assert np.linalg.norm(got - theirs) < 3e-2 * np.linalg.norm(theirs)
    assert (errors < 3e-2).mean() >= 0.95  # the rest: tokens whose experts' logits are a rounding apart
    assert np.median(row_errors(got, exact)) < 1.25 * np.median(row_errors(theirs, exact))
    ranked = np.sort(theirs, axis=1)
    clear = ranked[:, -1] - ranked[:, -2] > 0.1
    assert clear.mean() > 0.7
    assert (got.argmax(1) == theirs.argmax(1))[clear].all()


def row_errors(got: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Distance of each row, relative to the row's length."""
    return np.linalg.norm(got - expected, axis=1) / np.linalg.norm(expected, axis=1)


def test_greedy_text(case):
    config, folder, checkpoint = case
    theirs = make_goldens.load_transformers(folder)
    prompts = [make_goldens.sequence(config, n, seed=10 + n).tolist() for n in (1, 23, 31)]
    options = dict(do_sample=False, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0)
    expected = [theirs.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]
    assert [len(e) for e in expected] == [NEW_TOKENS] * 3
    assert all(len(set(e)) >= 20 for e in expected)
    engine = Engine(load_model(checkpoint, "float32", Kernels("cpu")), 3, 128, greedy=True)
    requests = [Request(tuple(p), NEW_TOKENS) for p in prompts]
    together, _ = engine.generate(requests)
    alone = [engine.generate([r])[0][0] for r in requests]
    assert [r.ids for r in together] == expected
    assert [r.ids for r in alone] == expected
