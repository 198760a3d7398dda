"""Parameters as published: ERNIE 4.5 (its technical report, Baidu 2025). 21B-A3B's numbers are rounded by more than they are compared with: its
weights are 21.8B without the head of multi-token prediction, of which a token uses 3.09B and the embedding, which is the output matrix too."""

REAL = {"ernie_4_5_21b_a3b": (21.8e9, None), "ernie_4_5_300b_a47b": (300e9, 47e9)}

UNSURE = {
    "ernie_4_5_21b_a3b": ("moe_capacity", "moe_gate", "moe_use_aux_free", "num_nextn_predict_layers", "use_cache"),
    "ernie_4_5_300b_a47b": ("moe_layer_end_index", "moe_num_shared_experts"),
}
"""Fields of the files whose presence was written from memory and not checked; where they change the graph, their values follow from the counts."""
