"""GLM-4.5 and 4.6: Llama's names for attention, DeepSeek-V3's for experts and the head of multi-token prediction (transformers, models/glm4_moe)."""

from __future__ import annotations

from checkpoints.families.common import ATTENTION, EXPERTS, FUSED_EXPERTS, IGNORED, MLP, TOP, Layout
from checkpoints.families.deepseek import EXTRA, SELECT_BIAS, SHARED, SHARED_WITH_HEAD

_LAYER = {**ATTENTION, **MLP, **SHARED, **SELECT_BIAS}

LAYOUTS = (
    Layout("glm4_moe", TOP, _LAYER, EXPERTS, (*IGNORED, *SHARED_WITH_HEAD), EXTRA),
    Layout("glm4_moe-fused", TOP, _LAYER, FUSED_EXPERTS, (*IGNORED, *SHARED_WITH_HEAD), EXTRA),
)
"""The released form first, then transformers 5's own."""
