"""Other engines behind one interface, so that a benchmark can alternate with them on the same weights (extra `bench`).

Each opener gives an `Opened`: `run(ids [B, T], new)` prefills equal-length prompts, decodes `new` tokens greedily, and says how long each phase took
and which tokens came.
"""

from __future__ import annotations

import ctypes
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from checkpoints.safetensors_reader import SafetensorsFolder
from jaxmoe.formats import load_numpy


class Ran(NamedTuple):
    """Seconds of each phase; `ids` [B, new] the tokens generated. The first of each row came from prefill, decode made the others."""

    prefill_seconds: float
    decode_seconds: float
    ids: np.ndarray


class Opened(NamedTuple):
    """`run(ids, new) -> Ran`, and the engine's version."""

    run: Callable[[np.ndarray, int], Ran]
    version: str


def open_transformers(folder: Path, dtype: str) -> Opened:
    """transformers on the CPU: its own forward and dynamic cache, without the overhead of its `generate`."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    @torch.no_grad()
    def run(ids: np.ndarray, new: int) -> Ran:
        began = time.perf_counter()
        out = model(torch.tensor(ids), use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1].argmax(-1, keepdim=True)
        tokens = [token]
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(new - 1):
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            tokens.append(token)
        return Ran(prefill, time.perf_counter() - began, torch.cat(tokens, 1).numpy())

    return Opened(run, f"transformers {transformers.__version__}, torch {torch.__version__}")


_GGUF_ARCH = {"qwen3_moe": "qwen3moe", "olmoe": "olmoe"}
_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
_GGUF_EXPERT = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}


def write_gguf(folder: Path, out: Path, dtype: str) -> Path:
    """Writes a Hugging Face folder's weights as a GGUF file without a vocabulary, matrices in `dtype` and norms and routers in float32.

    Args:
        folder: model_type qwen3_moe (with normalised top-k, as llama.cpp has it) or olmoe, per-expert tensors.
        out: the file.
        dtype: 'float32' or 'bfloat16'.

    Raises:
        ValueError: another model type, or another top-k normalisation than llama.cpp's for it.
    """
    import gguf

    config = json.loads((folder / "config.json").read_text())
    kind = config["model_type"]
    if kind not in _GGUF_ARCH:
        raise ValueError(f"model_type {kind!r} is not one of {sorted(_GGUF_ARCH)} that can be written for llama.cpp")
    if config["norm_topk_prob"] != (kind == "qwen3_moe"):
        raise ValueError(f"norm_topk_prob = {config['norm_topk_prob']} of {kind} is not what llama.cpp computes")
    heads, layers, experts = config["num_attention_heads"], config["num_hidden_layers"], config["num_experts"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    width = config.get("moe_intermediate_size", config["intermediate_size"])
    file = gguf.GGUFWriter(out, _GGUF_ARCH[kind])
    file.add_block_count(layers)
    file.add_context_length(config["max_position_embeddings"])
    file.add_embedding_length(config["hidden_size"])
    file.add_feed_forward_length(width)
    file.add_expert_feed_forward_length(width)
    file.add_head_count(heads)
    file.add_head_count_kv(config["num_key_value_heads"])
    file.add_key_length(head_dim)
    file.add_value_length(head_dim)
    file.add_layer_norm_rms_eps(config["rms_norm_eps"])
    file.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    file.add_expert_count(experts)
    file.add_expert_used_count(config["num_experts_per_tok"])
    file.add_vocab_size(config["vocab_size"])
    file.add_tokenizer_model("no_vocab")

    def add(name: str, value: np.ndarray, matrix: bool) -> None:
        if matrix and dtype == "bfloat16":
            bits = gguf.quants.quantize(value, gguf.GGMLQuantizationType.BF16)
            file.add_tensor(name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            file.add_tensor(name, value)

    with SafetensorsFolder(folder) as source:

        def read(name: str) -> np.ndarray:
            return load_numpy(source.read(name))

        embedding = read("model.embed_tokens.weight")
        add("token_embd.weight", embedding, True)
        add("output.weight", embedding if config["tie_word_embeddings"] else read("lm_head.weight"), True)
        add("output_norm.weight", read("model.norm.weight"), False)
        for i in range(layers):
            for theirs, name in _GGUF_LAYER.items():
                add(f"blk.{i}.{name}.weight", read(f"model.layers.{i}.{theirs}.weight"), "norm" not in name and name != "ffn_gate_inp")
            for theirs, name in _GGUF_EXPERT.items():
                value = np.stack([read(f"model.layers.{i}.mlp.experts.{e}.{theirs}.weight") for e in range(experts)])
                add(f"blk.{i}.{name}.weight", value, True)
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()
    return out


def open_llama_cpp(folder: Path, dtype: str) -> Opened:
    """llama.cpp by its C interface, on all cores, from a GGUF written beside the other temporary files; its cache in the weights' precision."""
    import llama_cpp as ll

    path = write_gguf(folder, Path(os.environ.get("TMPDIR", "/tmp")) / f"jaxmoe-{folder.name}-{dtype}.gguf", dtype)
    quiet = ll.llama_log_callback(lambda level, text, data: None)
    ll.llama_log_set(quiet, ctypes.c_void_p(0))
    ll.llama_backend_init()
    model = ll.llama_model_load_from_file(str(path).encode(), ll.llama_model_default_params())
    if not model:
        raise ValueError(f"llama.cpp cannot load {path}")
    vocab = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(model))
    contexts: dict[tuple[int, int], Any] = {}

    def context(rows: int, positions: int):
        if (rows, positions) not in contexts:
            wish = ll.llama_context_default_params()
            wish.n_ctx, wish.n_seq_max = rows * positions, rows
            wish.n_batch = wish.n_ubatch = max(512, rows)
            wish.n_threads = wish.n_threads_batch = os.cpu_count()
            if dtype == "float32":
                wish.type_k = wish.type_v = ll.GGML_TYPE_F32
            contexts[rows, positions] = ll.llama_init_from_model(model, wish)
        return contexts[rows, positions]

    def step(ctx, ids: np.ndarray, at: int) -> np.ndarray:
        """Feeds ids [B, T] at positions at.. and returns the likeliest next token of each row [B]."""
        rows, length = ids.shape
        batch = ll.llama_batch_init(rows * length, 0, 1)
        batch.n_tokens = rows * length
        for n, (row, t) in enumerate((row, t) for row in range(rows) for t in range(length)):
            batch.token[n], batch.pos[n], batch.n_seq_id[n], batch.seq_id[n][0] = int(ids[row, t]), at + t, 1, row
            batch.logits[n] = t == length - 1
        if ll.llama_decode(ctx, batch):
            raise RuntimeError(f"llama_decode failed at position {at}")
        ends = [(row + 1) * length - 1 for row in range(rows)]
        out = [np.ctypeslib.as_array(ll.llama_get_logits_ith(ctx, n), (vocab,)).argmax() for n in ends]
        ll.llama_batch_free(batch)
        return np.asarray(out)

    def run(ids: np.ndarray, new: int) -> Ran:
        rows, length = ids.shape
        ctx = context(rows, -(-(length + new) // 256) * 256)
        ll.llama_memory_clear(ll.llama_get_memory(ctx), True)
        began = time.perf_counter()
        tokens = [step(ctx, ids, 0)]
        prefill = time.perf_counter() - began
        began = time.perf_counter()
        for i in range(new - 1):
            tokens.append(step(ctx, tokens[-1][:, None], length + i))
        return Ran(prefill, time.perf_counter() - began, np.stack(tokens, 1))

    run.keep = quiet  # type: ignore[attr-defined]  # the C side calls it for as long as it lives
    return Opened(run, f"llama-cpp-python {ll.__version__}")


PEERS: dict[str, Callable[[Path, str], Opened]] = {"transformers": open_transformers, "llama.cpp": open_llama_cpp}
