"""Model families as data: which fields of a config.json each has, and how they become layers."""

from __future__ import annotations

from jaxmoe.spec.families import deepseek, mixtral, olmoe, qwen3_moe
from jaxmoe.spec.families.common import Family

FAMILIES: dict[str, Family] = {
    "deepseek_v3": deepseek.V3,
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "qwen3_moe": qwen3_moe.FAMILY,
}
"""The `model_type`s that can be read."""
