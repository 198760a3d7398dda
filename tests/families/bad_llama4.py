"""What the reader of Llama 4 refuses."""

_BAD = [
    ({"num_experts_per_tok": 2}, r"num_experts_per_tok = 2 is not supported \(1 is\)"),
    ({"num_key_value_heads": 4}, "num_attention_heads = 6 is not a multiple of num_key_value_heads = 4"),
    ({"num_experts": 5}, "num_experts = 5"),
    ({"no_rope_layers": [1, 0, 1]}, r"no_rope_layers = \[1, 0, 1\] must hold 0 or 1 for each of 2 layers"),
    ({"no_rope_layers": [1, 2]}, r"no_rope_layers = \[1, 2\]"),
    ({"moe_layers": [4]}, r"moe_layers = \[4\] must list layers, from 0 to 1"),
    ({"moe_layers": []}, r"moe_layers = \[\] leaves none of 2 layers with experts"),
    ({"interleave_moe_layer_step": 5}, "interleave_moe_layer_step = 5 leaves none of 2 layers"),
    ({"interleave_moe_layer_step": None}, "interleave_moe_layer_step = None"),
    ({"attention_chunk_size": None}, "attention_chunk_size = None"),
    ({"attention_chunk_size": -8}, "attention_chunk_size = -8"),
    ({"layer_types": ["full_attention"] * 3}, "layer_types = .* must name the kinds of 2 layers"),
    ({"layer_types": ["sliding_attention"] * 2}, "layer_types holds 'sliding_attention'"),
    ({"attn_temperature_tuning": "yes"}, "attn_temperature_tuning = 'yes'"),
    ({"attn_temperature_tuning": None}, "attn_temperature_tuning = None"),
    ({"floor_scale": 0}, "floor_scale = 0"),
    ({"attn_scale": None}, "attn_scale = None"),
    ({"rope_scaling": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor leaves 8 of 16 channels"),
    ({"rope_scaling": {"rope_type": "su"}}, "rope type 'su'"),
    ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
    ({"quantization_config": {"quant_method": "compressed-tensors"}}, "quant_method = 'compressed-tensors'"),
]

BAD = {
    "llama4": [*(({"text_config": change}, message) for change, message in _BAD), ({"text_config": 7}, "text_config = 7")],
    "llama4_text": [*_BAD, ({"no_rope_layer_interval": 0}, "no_rope_layer_interval = 0")],
}
