"""The same model in transformers and here, side by side: logits in float32 and bfloat16, and greedy text. Needs the `bench` extra."""

from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints.convert import convert
from checkpoints.load import load_hf_or_checkpoint, open_checkpoint
from jaxmoe.engine.generate import Engine, Request, prompt_logits
from jaxmoe.engine.model import load_model
from jaxmoe.engine.text import Tokenizer
from pallas_kernels.dispatch import Kernels
from scripts import make_goldens
from tests.models import prefill_logits

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CASES = {"qwen3_moe_normalized": 4, "olmoe_clipped": 4, "mixtral_windowed": 3}
"""Cases, each with a seed of weights whose greedy text doesn't soon repeat itself."""

NEW_TOKENS = 64

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"

TEXTS = (
    *make_goldens.PROMPTS[:2],
    "na\N{LATIN SMALL LETTER I WITH DIAERESIS}ve \u6771\u4eac \N{OWL}\u200d\r\n\x00e\u0301",
    "  1234567890 \t\n\n\n    x_1 != 3.14e-05;   ",
    "<|im_start|>user\nHello there<|im_end|>\n<|endoftext|>",
)
"""Prose, code, characters of several bytes, white space and digits, and special tokens."""


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
    config, folder = make_goldens.CASES[request.param].config, tmp_path_factory.mktemp(request.param)
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
    assert all(len(set(e)) >= 15 for e in expected)
    engine = Engine(load_model(checkpoint, "float32", Kernels("cpu")), 3, 128, greedy=True)
    requests = [Request(tuple(p), NEW_TOKENS) for p in prompts]
    together, _ = engine.generate(requests)
    alone = [engine.generate([r])[0][0] for r in requests]
    assert [r.ids for r in together] == expected
    assert [r.ids for r in alone] == expected


def test_the_shipped_model(tmp_path):
    """Every logit of 1,000 held-out tokens; and the folder is one that transformers takes as it is."""
    _, info = transformers.AutoModelForCausalLM.from_pretrained(make_goldens.SHIPPED, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs, ours = transformers.AutoTokenizer.from_pretrained(make_goldens.SHIPPED), Tokenizer(make_goldens.SHIPPED)
    assert [ours.encode(text) for text in TEXTS] == [theirs.encode(text) for text in TEXTS]
    with np.load(GOLDENS / "shipped.npz") as arrays:
        windows = arrays["ids"][:2]
    exact = make_goldens.load_transformers(make_goldens.SHIPPED)
    model = load_model(load_hf_or_checkpoint(make_goldens.SHIPPED, tmp_path), "float32", Kernels("cpu"))
    whole = 0
    for ids in windows:
        expected, gaps = make_goldens.run_transformers(exact, ids)
        got = prompt_logits(model, ids.tolist())
        assert got.shape == expected.shape == (make_goldens.WINDOW, 4096)
        held = np.abs(got - expected).max(1) <= 1e-4
        assert held.all() or gaps[np.argmin(held)] < 1e-5  # rounding may choose a token's experts, and so what comes after it
        whole += held.all()
    assert whole >= 1
