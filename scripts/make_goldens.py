"""Runs models in transformers and keeps what they gave in tests/goldens, for machines that have no torch to compare with.

    python scripts/make_goldens.py [--only NAME] [--out FOLDER]         # tiny random models
    python scripts/make_goldens.py --only shipped [--corpus CORPUS]     # the model in checkpoints/default

Needs the `bench` extra. A random model's weights follow from its config alone, so that only logits are kept; a test makes the same weights again.
The shipped model's golden takes its held-out tokens from a corpus of `scripts/train.py corpus`, or again from the golden that is there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import math
import sys
import tempfile
import zlib
from pathlib import Path

import numpy as np
import tyro

ROOT = Path(__file__).resolve().parents[1]
if importlib.util.find_spec("scripts") is None:
    sys.path.insert(0, str(ROOT))

from safetensors.numpy import save_file

from checkpoints.families import LAYOUTS, Piece, hf_tensors
from jaxmoe.report.command import run_command
from jaxmoe.spec import ModelSpec
from scripts.golden_cases import CASES
from scripts.golden_cases.case import Case

GOLDENS = ROOT / "tests" / "goldens"

SHIPPED = ROOT / "checkpoints" / "default"

ROUNDING = 1e-6
"""Weights are changed by up to so much, relatively, to see whether rounding can choose other experts."""

STEADY = 2e-3
"""By how much logits may change at most when weights do by `ROUNDING`: another expert changes them by far more. Seeds are tried until one
keeps it."""

MATTERS = 1e-3
"""By how much logits have to change at least for a change of the config that is said to matter."""

SMALLEST_GAP = 1e-4
"""Between the last chosen expert's logit and the first one left out: less, and rounding may choose another."""

SHIPPED_CASE = "shipped"
"""The golden of the model in checkpoints/default."""

DOMAINS = ("austen", "python_code", "sqlite_docs", "wordnet")
"""Whose held-out text the shipped model is scored on."""

WINDOW = 500
"""Tokens of each domain: they end within a block of keys and within a run of the engine's."""

SAMPLED = 24
"""Logits kept of each position: all of them would be 32 MB."""

NEW_TOKENS = 256

PROMPTS = (
    "In the beginning God created the heaven and the earth. And the earth was without form, and void;",
    "def main():\n    parser = argparse.ArgumentParser(description=__doc__)\n",
    "=head1 DESCRIPTION\n\nThis function returns",
    "HAMLET.\nTo be, or not to be, that is the question:\n",
    "a large",
    "The SELECT statement retrieves rows from zero or more tables.",
    "func (b *Buffer) Write(p []byte) (n int, err error) {\n",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
)
"""What the shipped model continues: lines of the kinds of text it was trained on, of many lengths, so that a batch of them is padded."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Runs models in transformers and keeps what they gave."""

    out: Path = GOLDENS
    """Where the files go."""
    only: str | None = None
    """One case's name, or "shipped"; all tiny random models if not given."""
    corpus: Path | None = None
    """For "shipped": whose held-out text to take; the tokens of the golden that is there if not given."""


def uniform(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """float32 values of variance one. Raw bits of a generator are the same in every version of numpy; its distributions need not be."""
    raw = np.random.PCG64(seed).random_raw(math.prod(shape)) >> np.uint64(40)
    return ((raw.astype(np.float64) / 2**23 - 1.0) * math.sqrt(3.0)).astype(np.float32).reshape(shape)


def weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor of a Hugging Face folder of this config, float32: norms around one, biases small, matrices such that activations stay near one."""
    spec = ModelSpec.from_hf(config)
    out = {}
    for name, (shape, parts) in hf_tensors(spec, LAYOUTS[spec.family][0]).items():
        path, piece = parts[0]
        middle, spread = size_of(spec, path, piece)
        value = uniform(shape, zlib.crc32(f"{seed} {name}".encode()))
        out[name] = (middle + spread * value if middle else value * np.float32(spread)).astype(np.float32)
    return out


def size_of(spec: ModelSpec, path: str, piece: Piece) -> tuple[float, float]:
    """Mean and standard deviation of a leaf's random values."""
    parent, name = path.split(".")[-2:]
    if name == "table":
        return 0.0, 0.5
    if name == "scale":
        own = parent.startswith("norm_") or parent in ("final_norm", "q_norm", "k_norm")
        latent = any(layer.attention is not None and layer.attention.latent for layer in spec.layers) and parent in ("q_norm", "kv_norm")
        if parent in ("sinks", "a_log"):
            return (0.7, 0.5) if parent == "a_log" else (0.0, 1.0)
        return 1.0 - (spec.norm_offset if own and not latent else 0.0), 0.2
    if name in ("input_scale", "expert_scale"):
        return 1.0, 0.2
    if name in ("bias", "select_bias", "w_in", "w_out"):
        return 0.0, 0.2
    if parent.startswith("conv_") or parent in ("k_up", "v_up"):
        fan = piece.shape[-1]
    else:  # a linear map, whose sum runs along the tensor's columns unless it is stored transposed
        fan = piece.rows if piece.order == tuple(range(len(piece.order))) else piece.cols
    gain = 2.0 if parent == "router" else 1.0
    if parent == "router" and any(layer.router is not None and layer.router.input_norm for layer in spec.layers):
        gain *= math.sqrt(spec.width)
    return 0.0, gain / math.sqrt(fan)


def write_folder(folder: Path, config: dict, seed: int = 0, theirs: dict | None = None) -> Path:
    """A Hugging Face folder of this config with `weights`; `theirs` changes what config.json says."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | (theirs or {})))
    save_file(weights(config, seed), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def digest(config: dict, seed: int = 0) -> str:
    """SHA-256 of all weights in the order of their names: whether two machines made the same ones."""
    made = weights(config, seed)
    found = hashlib.sha256()
    for name in sorted(made):
        found.update(name.encode())
        found.update(made[name].astype("<f4").tobytes())
    return found.hexdigest()


def sequence(config: dict, length: int, seed: int) -> np.ndarray:
    """int32 token ids."""
    raw = np.random.PCG64(1000 + seed).random_raw(length)
    return (raw % np.uint64(ModelSpec.from_hf(config).vocab)).astype(np.int32)


def load_transformers(folder: Path, dtype: str = "float32"):
    """The folder in transformers, in eager mode; refuses one whose tensors are not exactly those that the model has."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation="eager", experts_implementation="eager", output_loading_info=True
    )
    wrong = {kind: sorted(names) for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"{folder}: transformers takes the tensors otherwise: {wrong}")
    return model.eval()


def run_transformers(model, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 logits [T, V] of one sequence, and [T] the smallest gap in any layer between a chosen expert's logit and one left out."""
    import torch

    with torch.no_grad():
        out = model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False, output_router_logits=True)
    active = model.config.num_experts_per_tok
    ranked = [np.sort(logits.float().numpy(), axis=-1)[:, ::-1] for logits in out.router_logits]
    gaps = np.min([r[:, active - 1] - r[:, active] for r in ranked], axis=0)
    return out.logits[0].float().numpy(), gaps


def logits_in_transformers(model, ids: np.ndarray) -> np.ndarray:
    """float32 logits [T, V] of one sequence."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0].float().numpy()


def unsteady(model, ids: list[np.ndarray], logits: list[np.ndarray]) -> float:
    """By how much logits change when weights do by `ROUNDING`: a lot, where a token's experts hang on rounding."""
    import torch

    worst = 0.0
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for trial in range(3):
        generator = torch.Generator().manual_seed(trial)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(before[name] * (1 + ROUNDING * (2 * torch.rand(p.shape, generator=generator) - 1)))
        worst = max(worst, *(float(np.abs(logits_in_transformers(model, i) - x).max()) for i, x in zip(ids, logits, strict=True)))
    return worst


def run_case(name: str, seed: int) -> tuple[dict[str, np.ndarray], float, list[dict]]:
    """`{ids_0, logits_0, ids_1, logits_1}` of one case, how unsteady they are, and what each change that matters does; no more than the second where
    that is too much."""
    case = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        model = load_transformers(write_folder(Path(folder), case.config, seed, case.theirs))
        ids = [sequence(case.config, length, i) for i, length in enumerate(case.lengths)]
        logits = [logits_in_transformers(model, i) for i in ids]
        change = unsteady(model, ids, logits)
        if change > STEADY:
            return {}, change, []
        matters = [change_by(case, other, seed, ids[0], logits[0]) for other in case.matters]
    arrays = {f"ids_{i}": one for i, one in enumerate(ids)} | {f"logits_{i}": one for i, one in enumerate(logits)}
    return arrays, change, matters


def change_by(case: Case, other: dict, seed: int, ids: np.ndarray, logits: np.ndarray) -> dict:
    """By how much the logits of a sequence change when the same weights are run with another config.

    Raises:
        ValueError: by less than `MATTERS`.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_folder(Path(folder), case.config, seed, case.theirs)
        config = case.config | case.theirs | other
        (Path(folder) / "config.json").write_text(json.dumps(config))
        change = float(np.abs(logits_in_transformers(load_transformers(Path(folder)), ids) - logits).max())
    if change < MATTERS:
        raise ValueError(f"{other} changes the logits by {change:.3g} only: it does not matter in this case")
    return {"change": other, "logits": float(f"{change:.3g}")}


def make(name: str, out: Path) -> int:
    """Writes NAME.npz (ids and logits) and NAME.json (config, seed and provenance); returns their bytes."""
    config = CASES[name].config
    for seed in range(20):
        arrays, change, matters = run_case(name, seed)
        if change <= STEADY:
            break
    else:
        raise ValueError(f"{name}: with each of 20 seeds, logits change by more than {STEADY} when weights change by {ROUNDING}")
    made = {
        "config": config,
        "seed": seed,
        "weights_sha256": digest(config, seed),
        "versions": versions(),
        "unsteady": float(f"{change:.3g}"),
        "matters": matters,
    }
    return write(name, out, made, arrays)


def versions() -> dict[str, str]:
    """Of what computes a golden."""
    import torch
    import transformers

    return {"torch": torch.__version__, "transformers": transformers.__version__, "numpy": np.__version__}


def write(name: str, out: Path, made: dict, arrays: dict[str, np.ndarray]) -> int:
    """Writes a golden's two files; returns their bytes."""
    (out / f"{name}.json").write_text(json.dumps(made, indent=1) + "\n")
    np.savez_compressed(out / f"{name}.npz", **arrays)
    return sum((out / f"{name}.{kind}").stat().st_size for kind in ("json", "npz"))


# --- the shipped model -----------------------------------------------------------------------------------------------


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled_ids(vocab: int) -> np.ndarray:
    """int32 [4, WINDOW, SAMPLED] ids whose logits are kept, others at every position."""
    shape = (len(DOMAINS), WINDOW, SAMPLED)
    return (np.random.PCG64(4).random_raw(math.prod(shape)) % np.uint64(vocab)).astype(np.int32).reshape(shape)


def summary(logits: np.ndarray, sampled: np.ndarray) -> dict[str, np.ndarray]:
    """What is kept of logits [T, V]: `argmax` [T], `top` [T, 2] the largest logit and the next, `lse` [T], `sampled` [T, SAMPLED] of those ids."""
    largest = logits.max(1)
    return {
        "argmax": logits.argmax(1).astype(np.uint16),
        "top": np.sort(logits, axis=1)[:, :-3:-1],
        "lse": (largest + np.log(np.exp(logits.astype(np.float64) - largest[:, None]).sum(1))).astype(np.float32),
        "sampled": np.take_along_axis(logits, sampled, axis=1),
    }


def held_out_ids(corpus: Path | None, out: Path, tokenizer_digest: str) -> np.ndarray:
    """uint16 [4, WINDOW] tokens from the middle of each domain's held-out text, or those of the golden in `out`.

    Raises:
        ValueError: neither is there, or it was written by another tokenizer.
    """
    if corpus is None:
        if not (out / f"{SHIPPED_CASE}.npz").exists():
            raise ValueError(f"{out} has no {SHIPPED_CASE}.npz to take tokens from: give --corpus, a folder that `scripts/train.py corpus` wrote")
        with np.load(out / f"{SHIPPED_CASE}.npz") as arrays:
            ids = arrays["ids"]
        tokenizer = json.loads((out / f"{SHIPPED_CASE}.json").read_text())["tokenizer_sha256"]
    else:
        from jaxmoe.train.corpus import load_corpus

        opened = load_corpus(corpus)
        streams = opened.streams["held_out"]
        if missing := [d for d in DOMAINS if d not in streams or len(streams[d]) < 2 * WINDOW]:
            raise ValueError(f"{corpus} has no held-out text, or too little, of {', '.join(missing)}")
        ids = np.stack([streams[d][len(streams[d]) // 2 :][:WINDOW] for d in DOMAINS])
        tokenizer = opened.manifest["tokenizer_sha256"]
    if tokenizer != tokenizer_digest:
        raise ValueError(f"the tokens of {corpus or out} are of another tokenizer than the model's: give --corpus with one of the model's")
    return ids


def generate(model, prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Greedy text of prompts as one batch, padded on the left.

    Returns:
        int16 [R, NEW_TOKENS] ids, -1 after an end of text, and float32 [R, NEW_TOKENS] by how much each one's logit was the largest.
    """
    import torch

    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    end = model.config.eos_token_id
    made = model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        eos_token_id=end,
        pad_token_id=end,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = made.sequences[:, longest:].numpy()
    top = torch.stack(made.logits, 1).float().topk(2).values.numpy()
    ended = np.cumsum(new == end, axis=1) - (new == end) > 0
    text, gaps = np.full((len(prompts), NEW_TOKENS), -1, np.int16), np.full((len(prompts), NEW_TOKENS), np.inf, np.float32)
    text[:, : new.shape[1]] = np.where(ended, -1, new)
    gaps[:, : new.shape[1]] = np.where(ended, np.inf, top[..., 0] - top[..., 1])
    return text, gaps


def make_shipped(out: Path, corpus: Path | None) -> int:
    """Writes shipped.npz and shipped.json; returns their bytes.

    The arrays: `ids`, what `summary` keeps of their logits, `router_gap` [4, WINDOW] of `run_transformers`; `text` and `text_gap` of `generate`, each
    prompt alone, and `text_batch` where transformers gave other ids to all prompts as one batch (near a tie, its padding can decide).
    """
    import torch
    import transformers

    tokenizer_digest = file_digest(SHIPPED / "tokenizer.json")
    ids = held_out_ids(corpus, out, tokenizer_digest)
    torch.set_num_threads(1)  # a model this small is faster without the pool
    model = load_transformers(SHIPPED)
    rows: list[dict[str, np.ndarray]] = []
    for window, sampled in zip(ids, sampled_ids(model.config.vocab_size), strict=True):
        logits, gaps = run_transformers(model, window)
        rows.append({**summary(logits, sampled), "router_gap": gaps})
    arrays = {"ids": ids} | {key: np.stack([row[key] for row in rows]) for key in rows[0]}

    encode = transformers.AutoTokenizer.from_pretrained(SHIPPED).encode
    prompts = [encode(prompt) for prompt in PROMPTS]
    alone = [generate(model, [prompt]) for prompt in prompts]
    arrays["text"], arrays["text_gap"] = (np.concatenate(a) for a in zip(*alone, strict=True))
    batch, _ = generate(model, prompts)
    differs = {i: int(np.argmax(row)) for i, row in enumerate(batch != arrays["text"]) if row.any()}
    if differs:
        arrays["text_batch"] = batch
    made = {
        "model_sha256": file_digest(SHIPPED / "model.safetensors"),
        "tokenizer_sha256": tokenizer_digest,
        "versions": versions(),
        "domains": DOMAINS,
        "prompts": PROMPTS,
        "smallest_router_gap": float(f"{arrays['router_gap'].min():.3g}"),
        "smallest_text_gap": float(f"{arrays['text_gap'].min():.3g}"),
        "batch_agrees": not differs,
        "batch_differs": [{"prompt": i, "step": step, "gap": float(f"{arrays['text_gap'][i, step]:.3g}")} for i, step in differs.items()],
    }
    return write(SHIPPED_CASE, out, made, arrays)


def run(args: Arguments) -> None:
    """Makes the files asked for."""
    if args.only not in (None, SHIPPED_CASE, *CASES):
        raise ValueError(f"--only {args.only}: there is no such case; choose one of {', '.join((SHIPPED_CASE, *CASES))}")
    if args.corpus is not None and args.only != SHIPPED_CASE:
        raise ValueError(f"--corpus is for --only {SHIPPED_CASE}: the tiny models' tokens are random")
    args.out.mkdir(parents=True, exist_ok=True)
    for name in CASES if args.only is None else (args.only,):
        print(f"{name}: {make_shipped(args.out, args.corpus) if name == SHIPPED_CASE else make(name, args.out):,} bytes")


def main() -> int:
    """Runs; gives the exit code."""
    args = tyro.cli(Arguments, description=__doc__)
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
