"""Parameters as published: Phi-3.5-MoE (arXiv:2404.14219), 41.9B. Its 6.6B activated count the embedding too, which makes 6.64B; ours without
it are 6.51B."""

REAL = {"phi_3_5_moe": (41.9e9, None)}

UNSURE = {"phi_3_5_moe": ("rope_scaling.short_factor", "rope_scaling.long_factor", "hidden_dropout", "router_aux_loss_coef", "input_jitter_noise")}
"""Fields of the file whose presence or value was written from memory and not checked. The factors, all 1.0 here, are others in the released file;
they change the graph."""
