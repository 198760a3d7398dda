"""Parameters as published: Granite 3.1 (their model cards). The 800M and 400M activated are rounded and count no embedding, which is the output
matrix too: without it ours are 807M and 378M. The smaller one's 1.3B in all are 1.33B where its weights are counted."""

REAL = {"granite_3_1_1b_a400m": (1.33e9, None), "granite_3_1_3b_a800m": (3.3e9, None)}

_FIELDS = ("attention_dropout", "router_aux_loss_coef", "transformers_version")
UNSURE = {"granite_3_1_1b_a400m": _FIELDS, "granite_3_1_3b_a800m": (*_FIELDS, "logits_scaling")}
"""Fields of the files whose presence or value was written from memory and not checked; `logits_scaling` changes the graph."""
