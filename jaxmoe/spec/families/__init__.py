"""Model families as data: which fields of a config.json each has, and how they become layers."""

from __future__ import annotations

from jaxmoe.spec.families import (
    deepseek,
    dots1,
    ernie,
    gemma4,
    glm4_moe,
    gpt_oss,
    granite,
    llama4,
    minimax,
    mixtral,
    olmoe,
    phimoe,
    qwen2_moe,
    qwen3_moe,
    qwen3_next,
)
from jaxmoe.spec.families.common import Family

FAMILIES: dict[str, Family] = {
    "deepseek_v2": deepseek.V2,
    "deepseek_v3": deepseek.V3,
    "dots1": dots1.FAMILY,
    "ernie4_5_moe": ernie.FAMILY,
    "gemma4": gemma4.WHOLE,
    "gemma4_text": gemma4.TEXT,
    "glm4_moe": glm4_moe.FAMILY,
    "glm4_moe_lite": deepseek.GLM_LITE,
    "gpt_oss": gpt_oss.FAMILY,
    "granitemoe": granite.MOE,
    "granitemoeshared": granite.SHARED,
    "kimi_k2": deepseek.KIMI_K2,
    "llama4": llama4.WHOLE,
    "llama4_text": llama4.TEXT,
    "minimax_m2": minimax.FAMILY,
    "mixtral": mixtral.FAMILY,
    "olmoe": olmoe.FAMILY,
    "phimoe": phimoe.FAMILY,
    "qwen2_moe": qwen2_moe.FAMILY,
    "qwen3_5_moe": qwen3_next.V3_5,
    "qwen3_5_moe_text": qwen3_next.V3_5_TEXT,
    "qwen3_moe": qwen3_moe.FAMILY,
    "qwen3_next": qwen3_next.NEXT,
}
"""The `model_type`s that can be read."""
