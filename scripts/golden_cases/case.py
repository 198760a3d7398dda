"""What a golden is of."""

from __future__ import annotations

import dataclasses
from typing import Any

TINY: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 256,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
"""What small configs begin with."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A small model that is run in transformers.

    Attributes:
        config: its config.json.
        matters: changes of the config, each of which must show in the logits of the same weights.
        lengths: tokens of its two sequences.
        theirs: changes of the config under which transformers knows it.
    """

    config: dict[str, Any]
    matters: tuple[dict[str, Any], ...] = ()
    lengths: tuple[int, int] = (41, 37)
    theirs: dict[str, Any] = dataclasses.field(default_factory=dict)
