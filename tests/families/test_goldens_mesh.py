"""Families whose parts differ most, divided over eight devices, against the logits of transformers."""

import numpy as np
import pytest

from jaxmoe.engine.mesh import HERE, devices_for
from jaxmoe.engine.model import load_model
from sharding.placement import replicate, shuffled
from sharding.split import parse_split
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


@pytest.mark.parametrize("split", ["expert=2,tensor=2", "expert=2,exchange=weights"])
def test_the_golden_logits_of_placed_experts_with_biases(split, tmp_path):
    """Biases stand where their experts do, copies' too; and the first device along `tensor` adds them."""
    run = goldens.make_run("gpt_oss_yarn", tmp_path)
    spec, on = run.checkpoint.spec, devices_for(run.checkpoint.spec.with_precision("float32"), parse_split(split))
    layers, experts = len(spec.moe_layers), spec.moe[0].experts
    for layers_of, where, says in ((layers, HERE, "divided among them"), (layers + 1, on, f"{layers + 1} layers of experts, this one has {layers}")):
        with pytest.raises(ValueError, match=says):
            load_model(run.checkpoint, "float32", QuickKernels("cpu"), on=where, placement=shuffled(layers_of, experts, 2, seed=1))
    load = np.random.default_rng(0).random((layers, experts)) ** 4
    for placement in (shuffled(layers, experts, 2, seed=1), replicate(load, 2, experts // 2 + 2)):
        model = load_model(run.checkpoint, "float32", QuickKernels("cpu"), on=on, placement=placement).for_positions(goldens.POSITIONS)
        assert model.bank.own.w_in.shape[1] == placement.order.shape[1]
        assert goldens.worst(mesh_logits(model, run.requests, decoded=2), run.expected) <= goldens.TOLERANCE
    goldens.forget_programs()
