"""Which collectives a compiled step has: those that the split needs, and none where devices only have different sequences."""

import collections

import pytest

from jaxmoe.engine.abstract import abstract_step
from jaxmoe.engine.mesh import devices_for
from jaxmoe.spec import ModelSpec
from sharding.hlo import collectives
from sharding.split import parse_split
from sharding.workload import Workload
from tests.models import CONFIGS
from tests.quick import QuickKernels

WORK = Workload(rows=4, prompt=30, new_tokens=20, prefill_tokens=32, dtype="float32", kv_dtype="float32")


@pytest.mark.parametrize(
    ("split", "expected"),
    [
        ("data=2", {}),
        # Two layers: a sum after attention and one after the experts in each; one of the embeddings. Each device's likeliest token, and its logit.
        ("expert=2,tensor=2,attention=tensor", {"all-reduce": 5, "all-gather": 2}),
        ("expert=2", {"all-to-all": 4}),
    ],
)
def test_a_prompt_s_step_has_the_collectives_of_its_split(split, expected):
    spec = ModelSpec.from_hf(CONFIGS["mixtral"])
    kernels = QuickKernels("reference")
    step = abstract_step(spec, devices_for(spec, parse_split(split)), WORK, kernels, "prefill")
    found: collections.Counter[str] = collections.Counter()
    for one in collectives(step.lower().compile().as_text()):
        found[one.kind] += one.times
    assert dict(found) == expected
