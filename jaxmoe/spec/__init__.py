"""What a model is: specs, how they are read from config.json, and the shapes of their parameters."""

from jaxmoe.spec.hf import FAMILIES, from_hf
from jaxmoe.spec.params import Leaf, abstract_experts, abstract_params, stack_layers, unstack_layers
from jaxmoe.spec.types import (
    AttentionSpec,
    ExpertSpec,
    GroupLimit,
    LayerSpec,
    ModelSpec,
    Precision,
    RopeSpec,
    RouterSpec,
    Segment,
    SpecError,
    segments_of,
)

__all__ = [
    "FAMILIES",
    "AttentionSpec",
    "ExpertSpec",
    "GroupLimit",
    "LayerSpec",
    "Leaf",
    "ModelSpec",
    "Precision",
    "RopeSpec",
    "RouterSpec",
    "Segment",
    "SpecError",
    "abstract_experts",
    "abstract_params",
    "from_hf",
    "segments_of",
    "stack_layers",
    "unstack_layers",
]
