"""What a model is: specs, how they are read from config.json, and the shapes of their parameters."""

from jaxmoe.spec.hf import FAMILIES, from_hf
from jaxmoe.spec.params import Leaf, abstract_experts, abstract_params, stack_layers, unstack_layers
from jaxmoe.spec.types import (
    AttentionSpec,
    DeltaSpec,
    ExpertSpec,
    GroupLimit,
    LatentSpec,
    LayerSpec,
    ModelSpec,
    Precision,
    RopeScaling,
    RopeSpec,
    RouterSpec,
    Segment,
    SpecError,
    Temperature,
    segments_of,
)

__all__ = [
    "FAMILIES",
    "AttentionSpec",
    "DeltaSpec",
    "ExpertSpec",
    "GroupLimit",
    "LatentSpec",
    "LayerSpec",
    "Leaf",
    "ModelSpec",
    "Precision",
    "RopeScaling",
    "RopeSpec",
    "RouterSpec",
    "Segment",
    "SpecError",
    "Temperature",
    "abstract_experts",
    "abstract_params",
    "from_hf",
    "segments_of",
    "stack_layers",
    "unstack_layers",
]
