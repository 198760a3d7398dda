"""Small configs of every family that together hold every field its graph depends on, each with both kinds of value.

`scripts/make_goldens.py` runs them in transformers and keeps the logits; the tests hold our own against these.
"""

from __future__ import annotations

from scripts.golden_cases import (
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
from scripts.golden_cases.case import Case

FAMILIES: dict[str, dict[str, Case]] = {
    "deepseek_v2": deepseek.V2,
    "deepseek_v3": deepseek.V3,
    "dots1": dots1.CASES,
    "ernie4_5_moe": ernie.CASES,
    "gemma4": gemma4.WHOLE,
    "gemma4_text": gemma4.TEXT,
    "glm4_moe": glm4_moe.CASES,
    "glm4_moe_lite": deepseek.GLM_LITE,
    "gpt_oss": gpt_oss.CASES,
    "granitemoe": granite.MOE,
    "granitemoeshared": granite.SHARED,
    "kimi_k2": deepseek.KIMI,
    "llama4": llama4.WHOLE,
    "llama4_text": llama4.TEXT,
    "minimax_m2": minimax.CASES,
    "mixtral": mixtral.CASES,
    "olmoe": olmoe.CASES,
    "phimoe": phimoe.CASES,
    "qwen2_moe": qwen2_moe.CASES,
    "qwen3_5_moe": qwen3_next.V3_5,
    "qwen3_5_moe_text": qwen3_next.V3_5_TEXT,
    "qwen3_moe": qwen3_moe.CASES,
    "qwen3_next": qwen3_next.NEXT,
}
"""Cases by family; the first one of each is run in every way."""

def configs() -> dict[str, list[dict]]:
    """The configs of each family: together they show all it can have."""
    return {family: [case.config for case in cases.values()] for family, cases in FAMILIES.items()}


CASES: dict[str, Case] = {name: case for cases in FAMILIES.values() for name, case in cases.items()}
"""All of them by name."""
