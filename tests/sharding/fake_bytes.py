"""Bytes of a device for tests of the planner: simple, monotone, and not the real ones."""

import dataclasses
import math

from jaxmoe.spec import abstract_experts, abstract_params
from sharding.workload import WIDTH


@dataclasses.dataclass(frozen=True)
class Bytes:
    weights: int
    experts: int
    kv: int
    host_store: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.experts + self.kv

    @property
    def items(self):
        return tuple(sorted((("weights", self.weights), ("experts", self.experts), ("kv", self.kv)), key=lambda item: -item[1]))

    def to_json(self):
        return dataclasses.asdict(self) | {"total": self.total}


def _size(tree):
    return sum(map(_size, tree.values())) if isinstance(tree, dict) else math.prod(tree.shape)


def device_bytes(spec, layout, workload, backend, hardware=None):
    """Everything is divided evenly by the axes that it lies over."""
    assert backend in ("tpu", "gpu", "cpu")
    width, stages = WIDTH[workload.dtype], layout.split.stage
    own = max((x.router.experts for x in spec.layers if x.router), default=1) // layout.size(layout.experts)
    experts = _size(abstract_experts(spec)) * width // layout.size(layout.experts) // layout.size(layout.expert_hidden) // stages
    share = 1 if workload.slots is None else min(1, workload.slots / own)
    kv = workload.local_rows(layout) * workload.positions * spec.kept_per_token * WIDTH[workload.kv_dtype]
    kv //= layout.size(layout.heads) * stages * layout.split.sequence
    weights = _size(abstract_params(spec)) * width // layout.size(layout.heads) // stages
    return Bytes(weights, int(experts * share), kv, 0 if share == 1 else experts)
