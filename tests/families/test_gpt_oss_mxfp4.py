"""gpt-oss as it is released: experts in mxfp4, whose rows are outputs, give what the plain folder of the same numbers gives."""

import copy
import json

import ml_dtypes
import numpy as np
import pytest

from checkpoints.convert import convert
from checkpoints.load import open_checkpoint
from jaxmoe import formats
from jaxmoe.engine.model import load_model
from pallas_kernels.dispatch import Kernels
from scripts import golden_cases, make_goldens
from tests.checkpoints import packed
from tests.models import prefill_logits

CONFIG = copy.deepcopy(golden_cases.CASES["gpt_oss_yarn"].config) | {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2}
"""Of widths that mxfp4's groups of 32 divide."""

_PLAIN = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
MXFP4 = {"quant_method": "mxfp4", "modules_to_not_convert": _PLAIN}


def plain_and_packed() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The same weights in bfloat16: with tensors `[E, in, out]`, and packed as `[E, out, in]`, so large that the glu clamps."""
    plain = {name: value.astype(ml_dtypes.bfloat16) for name, value in make_goldens.weights(CONFIG).items()}
    released = dict(plain)
    for i, name in enumerate(name for name in plain if name.endswith(("experts.gate_up_proj", "experts.down_proj"))):
        experts, inputs, outputs = released.pop(name).shape
        blocks, scales = packed.random_mxfp4((experts, outputs, inputs), seed=i)
        scales = 124 + scales % 2 if "gate" in name else 122 + scales % 2
        released |= {name + "_blocks": blocks, name + "_scales": scales.astype(np.uint8)}
        plain[name] = packed.decode_mxfp4(blocks, scales).swapaxes(1, 2).astype(ml_dtypes.bfloat16)
    return plain, released


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(plain, released) folders."""
    out = []
    for name, tensors in zip(("plain", "released"), plain_and_packed(), strict=True):
        folder = tmp_path_factory.mktemp(name)
        (folder / "config.json").write_text(json.dumps(CONFIG | ({"quantization_config": MXFP4} if name == "released" else {})))
        packed.write(folder / "model.safetensors", tensors)
        out.append(folder)
    return out


@pytest.fixture(scope="module")
def checkpoints(folders, tmp_path_factory):
    """Both converted."""
    out = []
    for folder in folders:
        to = tmp_path_factory.mktemp("converted") / "out"
        convert(folder, to)
        out.append(open_checkpoint(to))
    return out


def logits(checkpoint) -> list[np.ndarray]:
    model = load_model(checkpoint, "float32", Kernels("cpu"))
    ids = [list(map(int, make_goldens.sequence(CONFIG, length, seed))) for seed, length in enumerate((41, 37))]
    return prefill_logits(model, ids, [[(i, 0, len(one)) for i, one in enumerate(ids)]], 128, positions=256)


def test_leaves_and_logits_are_those_of_the_plain_folder(checkpoints):
    plain, released = checkpoints
    assert (plain.manifest.names, released.manifest.names) == ("gpt_oss", "gpt_oss-mxfp4")
    assert plain.manifest.dtype == released.manifest.dtype == "bfloat16"
    assert plain.manifest.leaves.keys() == released.manifest.leaves.keys()
    for path in plain.manifest.leaves:
        np.testing.assert_array_equal(plain.read(path), released.read(path), err_msg=path)
    for one, other in zip(logits(plain), logits(released), strict=True):
        np.testing.assert_array_equal(one.view(np.uint32), other.view(np.uint32))


def test_transformers_gives_the_same_where_the_glu_clamps(folders, checkpoints):
    """In float32, in which bfloat16's numbers are the same; the goldens' gates and ups are too small for the limit."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    model = make_goldens.load_transformers(folders[0])
    beyond = []
    for layer in model.model.layers:
        experts = layer.mlp.experts
        real = experts._apply_gate
        experts._apply_gate = lambda gate_up, real=real: beyond.append(float((gate_up.abs() > 7).float().mean())) or real(gate_up)
    ids = [make_goldens.sequence(CONFIG, length, seed) for seed, length in enumerate((41, 37))]
    expected = [make_goldens.logits_in_transformers(model, one) for one in ids]
    assert 0.05 < np.mean(beyond) < 0.95
    got = logits(checkpoints[1])
    scale = max(float(np.abs(e).max()) for e in expected)
    assert max(float(np.abs(g - e).max()) for g, e in zip(got, expected, strict=True)) <= 2e-5 * max(scale, 1.0)


def test_numbers_are_exact(checkpoints):
    """Two significant bits and a power of two: nothing is rounded."""
    _, released = plain_and_packed()
    name = "model.layers.0.mlp.experts.gate_up_proj"
    values = packed.decode_mxfp4(released[name + "_blocks"], released[name + "_scales"])
    gate = formats.load_numpy(checkpoints[1].read("experts.0.gate"))
    np.testing.assert_array_equal(gate, values[:, 0::2].swapaxes(1, 2))
