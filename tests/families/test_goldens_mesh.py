"""Families whose parts differ most, divided over eight devices, against the logits of transformers."""

import pytest

from tests.families import goldens
from tests.mesh_models import mesh_logits, on_split
from tests.quick import QuickKernels

SPLITS = {
    "deepseek_v3_yarn": "data=2,expert=2,tensor=2,attention=tensor",
    "gpt_oss_yarn": "data=2,expert=2,tensor=2",
    "qwen3_next_interval": "data=2,expert=2,tensor=2,exchange=weights",
}
"""Latent attention and shared experts; biases, sinks and windows; the delta rule, and heads with gates."""


@pytest.mark.parametrize("name", SPLITS)
def test_the_golden_logits_on_a_mesh(name, tmp_path):
    """Prompts in a step, their last two tokens decoded one by one."""
    run = goldens.make_run(name, tmp_path)
    model = on_split(run.load("float32", QuickKernels("reference"), unroll=False), SPLITS[name])
    assert model.on.layout.shards == (2 if "attention" in SPLITS[name] else 4)
    assert goldens.worst(mesh_logits(model, run.requests, decoded=2), run.expected) <= goldens.TOLERANCE
    goldens.forget_programs()
