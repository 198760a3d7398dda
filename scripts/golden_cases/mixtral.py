"""Mixtral: a window that slides past a whole block of keys, one head of keys and values, a head's width that follows from the model's."""

from scripts.golden_cases.case import TINY, Case

_CONFIG = {**TINY, "model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": None}

CASES = {
    "mixtral_windowed": Case({**_CONFIG, "sliding_window": 16}, ({"sliding_window": 15}, {"rope_theta": 1e4}), (41, 150)),
    "mixtral_full": Case({**_CONFIG, "sliding_window": None, "rope_theta": 2e4, "num_key_value_heads": 1}, ({"rms_norm_eps": 1e-2},)),
}
