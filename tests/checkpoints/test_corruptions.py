"""Two hundred corrupted folders, with `--exhaustive` twice as many: each gives a clear error or the right numbers, and neither a crash, a hang, a
large allocation nor other numbers.

Every test judges its cases in a process of its own (`python -m tests.checkpoints.test_corruptions WHICH FIRST COUNT FOLDER`), which prints a line
before and after each case: what kills or stops the process shows as a case without an end.

What is right: for a source, its tensors as the reference reader reads the damaged files (a bit that flips in the data, which have no checksum, makes
another model); for a converted folder, the numbers that were converted.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors

from tests.checkpoints import corruptions, hf_folders, packed
from tests.more import mostly

REPOSITORY = Path(__file__).resolve().parents[2]
ALLOCATED = 3 << 30  # of address space beyond what is in use before the first case
GROWTH = 200e6  # bytes of the largest resident set

CONFIG = {**hf_folders.CONFIGS["qwen3_moe"], "num_hidden_layers": 2, "num_experts": 2}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}
FILES = {
    "tokenizer.json": '{"model": {"vocab": {"a": 0}}}',
    "generation_config.json": '{"eos_token_id": 2, "do_sample": true}',
    "chat_template.jinja": "{{ messages[0]['content'] }}",
}
FIRST = mostly(range(0, 200, 50), (0, 50))  # of 50 cases each
LISTED_TWICE = "listed twice"  # the reference reader takes the last one


# --- the tests --------------------------------------------------------------------------------------------------------


def run(tmp_path, which: str, first: int, count: int) -> list[dict]:
    """Judges cases in another process; gives a record of each."""
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, "-m", "tests.checkpoints.test_corruptions", which, str(first), str(count), str(tmp_path)]
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert done.returncode == 0 and lines, f"exit {done.returncode} in {lines[-1] if lines else 'the beginning'}: {done.stderr[-2000:]}"
    *cases, memory = lines
    cases = [case for case in cases if "outcome" in case]
    assert len(cases) == count
    assert memory["growth"] < GROWTH, max(cases, key=lambda case: case["growth"])
    return cases


def check(cases: list[dict]) -> None:
    problems = [f"{case['what']}: {problem}" for case in cases for problem in case["problems"]]
    assert not problems, "\n".join(problems)
    outcomes = Counter(case["outcome"] for case in cases)
    assert outcomes["refused"] >= len(cases) // 2 and outcomes["loaded"] >= 1 and not outcomes["nothing changed"], outcomes


@pytest.mark.parametrize("first", FIRST)
def test_corrupted_sources(tmp_path, first):
    check(run(tmp_path, "source", first, 50))


@pytest.mark.parametrize("first", FIRST)
def test_corrupted_conversions(tmp_path, first):
    check(run(tmp_path, "converted", first, 50))


@pytest.mark.parametrize("kinds", [corruptions.SOURCE, corruptions.CONVERTED], ids=["source", "converted"])
def test_every_kind_occurs(kinds):
    assert len(kinds) <= 50  # so that each test has every kind


def test_a_corruption_is_what_its_seed_says(tmp_path):
    for name in "ab":
        write_source(tmp_path / name, 0)
    for kind, seed in (("header flipped", 3), ("index edited", 4), ("truncated", 5)):
        said = [corruptions.damage(corruptions.SOURCE, kind, tmp_path / name, seed) for name in "ab"]
        assert said[0] == said[1] and tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_other_numbers_would_be_found(tmp_path):
    """The judge itself: against the numbers of another model, an undamaged folder is wrong."""
    from checkpoints.convert import convert

    convert(write_source(tmp_path / "hf", 0), tmp_path / "out")
    right, _ = load(tmp_path / "out", verify=True)
    assert judge_load(tmp_path / "out", right, verify=True) == ("loaded", [])
    name = next(iter(right))
    wrong = {**right, name: (*right[name][:2], bytes(len(right[name][2])))}
    outcome, problems = judge_load(tmp_path / "out", wrong, verify=False)
    assert outcome == "loaded" and problems == [f"other numbers without a word in 1 arrays: {name}"]


def test_hangs_and_large_allocations_would_be_found(tmp_path):
    """The process around the judge."""
    for seed, message in ((0, "exit -14 in .*loops"), (1, "allocates")):
        (tmp_path / str(seed)).mkdir()
        with pytest.raises(AssertionError, match=message):
            run(tmp_path / str(seed), "misbehaving", seed, 1)
    assert run(tmp_path, "misbehaving", 2, 1)[0]["problems"] == ["MemoryError"]


# --- folders ----------------------------------------------------------------------------------------------------------


def write_source(folder: Path, form: int) -> Path:
    """A tiny Hugging Face folder: 0 in shards, 1 one file of float32, 2 fp8."""
    if form < 2:
        tensors = hf_folders.random_tensors(CONFIG, ("bfloat16", "float32")[form])
        return hf_folders.write_folder(folder, CONFIG, tensors, (3, 1)[form], FILES)
    tensors: dict = {}
    for i, (name, value) in enumerate(hf_folders.random_tensors(CONFIG, "bfloat16").items()):
        if name.endswith("_proj.weight"):
            codes, scales = packed.random_fp8(value.shape, (16, 16), seed=i)
            tensors |= {name: ("F8_E4M3", codes), name + "_scale_inv": scales}
        else:
            tensors[name] = value
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": FP8}))
    packed.write(folder / "model.safetensors", tensors)
    return folder


def tree_bytes(folder: Path) -> dict[str, bytes | None]:
    """What a folder holds; None for what isn't a file."""
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def mend(folder: Path, tree: dict[str, bytes | None]) -> None:
    """Makes a folder hold just that again; only what differs is written."""
    there = tree_bytes(folder)
    for name in sorted(there, reverse=True):
        path = folder / name
        if name in tree and (path.is_dir() and not path.is_symlink()) == (tree[name] is None) and (there[name] is None) == (tree[name] is None):
            continue
        corruptions.remove(path)
        del there[name]
    for name, data in tree.items():
        if data is None:
            (folder / name).mkdir(exist_ok=True)
        elif there.get(name) != data:
            (folder / name).write_bytes(data)


def by_reference(folder: Path) -> dict[str, tuple[str, list[int], bytes]]:
    """All tensors as the reference reader reads them: dtype, shape, bytes."""
    single = folder / "model.safetensors"
    out: dict = {}
    for path in [single] if single.exists() else sorted(folder.glob("*.safetensors")):
        found = safetensors.deserialize(path.read_bytes())
        out |= {name: (info["dtype"], list(info["shape"]), bytes(info["data"])) for name, info in found}
    return out


def rewritten(folder: Path, config: bytes, tensors: dict[str, tuple[str, list[int], bytes]]) -> Path:
    """The same tensors in one file without fault."""
    folder.mkdir()
    (folder / "config.json").write_bytes(config)
    arrays = {name: (dtype, np.frombuffer(data, np.uint8).reshape(*shape, -1)) for name, (dtype, shape, data) in tensors.items()}
    header, data = {}, b""
    for name, (dtype, array) in arrays.items():
        header[name] = {"dtype": dtype, "shape": tensors[name][1], "data_offsets": [len(data), len(data) + array.nbytes]}
        data += array.tobytes()
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


# --- the judge, in the other process ----------------------------------------------------------------------------------


def load(folder: Path, verify: bool) -> tuple[dict[str, tuple], list[str]]:
    """Every array that users get, as (dtype, shape, bytes); with `verify`, everything is compared with checksums on the way."""
    import jax

    from checkpoints.load import open_checkpoint

    checkpoint = open_checkpoint(folder)
    if verify:
        checkpoint.verify()
    trees = {"params": checkpoint.restore_params(), "experts": checkpoint.restore_experts()}
    if checkpoint.quantization is not None:
        trees["quantized"] = checkpoint.restore_experts(quantized=True)
    if not verify:
        trees["bank"] = checkpoint.restore_bank()
    for layer in checkpoint.spec.moe_layers:
        for expert in range(CONFIG["num_experts"]):
            for name, array in checkpoint.read_expert(layer, expert, verify=verify).items():
                stacked = np.asarray(trees["experts"][str(layer)][name][expert])
                assert array.tobytes() == stacked.tobytes(), f"expert {expert} of layer {layer} alone isn't what it is among the others"
    leaves = jax.tree_util.tree_leaves_with_path(trees)
    return {jax.tree_util.keystr(path): _held(np.asarray(leaf)) for path, leaf in leaves if "bank" not in str(path[0])}, [
        name for name, same in _bank_agrees(trees) if not same
    ]


def _held(array: np.ndarray) -> tuple:
    return array.dtype.name, array.shape, array.tobytes()


def _bank_agrees(trees: dict):
    """Whether the resident bank holds the experts' numbers."""
    bank = trees.get("bank")
    for i, layer in enumerate(trees["experts"] if bank else ()):
        w_in, w_out = (np.asarray(bank[name][i]) for name in ("w_in", "w_out"))
        for name, array in (("gate", w_in[:, :, 0]), ("up", w_in[:, :, 1]), ("down", w_out)):
            yield f"the bank's {name} of layer {layer}", array.tobytes() == np.asarray(trees["experts"][layer][name]).tobytes()


def judge_load(folder: Path, expected: dict[str, tuple], verify: bool) -> tuple[str, list[str]]:
    """Loads a converted folder; gives the outcome, and what is wrong with it."""
    from checkpoints.errors import CheckpointError

    try:
        got, problems = load(folder, verify)
    except CheckpointError as error:
        return "refused", bad_message(error)
    except Exception as error:
        return "failed", [f"{'verified' if verify else 'direct'} load: {type(error).__name__}: {str(error)[:300]}"]
    other = [name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)]
    if other:
        problems.append(f"other numbers without a word in {len(other)} arrays: {min(other)}")
    return "loaded", problems


def bad_message(error: Exception) -> list[str]:
    text = str(error)
    if not text.strip() or len(text.splitlines()) != 1 or len(text) > 5000:
        return [f"the error is not one line: {text[:300]!r}"]
    return []


class SourceJudge:
    """Converts and loads corrupted Hugging Face folders."""

    kinds = corruptions.SOURCE
    seconds = 20  # for one case

    def __init__(self, work: Path):
        self.work = work
        self.bases = [write_source(work / f"hf{form}", form) for form in range(3)]
        self.tensors = [by_reference(base) for base in self.bases]
        self.arrays = [self._converted(base) for base in self.bases]

    def base(self, kind: str, seed: int) -> int:
        """Which folder a case corrupts."""
        return 0 if kind in corruptions.OF_SHARDS else seed % 3

    def _converted(self, hf: Path) -> dict[str, tuple]:
        from checkpoints.convert import convert

        out = hf.with_name("expected")
        convert(hf, out)
        arrays, _ = load(out, verify=True)
        shutil.rmtree(out)
        return arrays

    def judge(self, kind: str, seed: int, hf: Path) -> tuple[str, list[str]]:
        from checkpoints.convert import convert
        from checkpoints.errors import CheckpointError

        out = self.work / "out"
        try:
            convert(hf, out)
        except CheckpointError as error:
            left = [f"{out.name} was left"] if out.exists() else []
            return "refused", bad_message(error) + left
        except Exception as error:
            return "failed", [f"convert: {type(error).__name__}: {str(error)[:300]}"]
        try:
            tensors = by_reference(hf)
        except (safetensors.SafetensorError, OSError) as error:
            return "loaded", [f"the reference reader refuses it: {str(error)[:300]}"]
        if kind.startswith(LISTED_TWICE):
            return "loaded", ["a tensor that is listed twice was taken"]
        number = self.base(kind, seed)
        expected = self.arrays[number]
        if tensors != self.tensors[number]:
            expected = self._converted(rewritten(self.work / "again", (hf / "config.json").read_bytes(), tensors))
            shutil.rmtree(self.work / "again")
        return judge_load(out, expected, verify=False)


def four_bits():
    """A quantizer to 4 bits in groups of 8."""
    from checkpoints.quantizer import Quantizer

    def rounded(path: str, expert: int, w: np.ndarray, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        groups = w.reshape(-1, 8, w.shape[1])
        scales = np.abs(groups).max(axis=1, keepdims=True) / 7
        return np.rint(groups / scales).astype(np.int8).reshape(w.shape), scales[:, 0]

    return Quantizer("nearest", 4, 8, rounded)


class ConvertedJudge:
    """Loads corrupted converted folders, one of them quantized, with and without checking them first."""

    kinds = corruptions.CONVERTED
    seconds = 20

    def __init__(self, work: Path):
        from checkpoints.convert import convert

        self.bases = [work / f"base{i}" for i in range(3)]
        for i, quantizer in enumerate((None, None, four_bits())):
            convert(write_source(work / f"hf{i}", (0, 1, 0)[i]), self.bases[i], quantizer=quantizer)
        self.arrays = [load(base, verify=True)[0] for base in self.bases]

    def base(self, kind: str, seed: int) -> int:
        """Which folder a case corrupts."""
        return seed % 3

    def judge(self, kind: str, seed: int, folder: Path) -> tuple[str, list[str]]:
        expected = self.arrays[self.base(kind, seed)]
        checked, problems = judge_load(folder, expected, verify=True)
        _, more = judge_load(folder, expected, verify=False)
        if kind in corruptions.KEPT and checked != "refused":
            problems = [*problems, "verify didn't notice"]
        return checked, problems + [f"without verify: {problem}" for problem in more]


class Misbehaving:
    """What the tests must see: a case that never ends, one that takes a lot of memory, and one that asks for more than there is."""

    kinds = {name: lambda folder, rng: corruptions.cut(folder / "file", 0) for name in ("loops", "allocates", "asks for a terabyte")}
    seconds = 1

    def __init__(self, work: Path):
        self.bases = [work / "base"]
        self.bases[0].mkdir()
        (self.bases[0] / "file").write_bytes(b"x")

    def base(self, kind: str, seed: int) -> int:
        return 0

    def judge(self, kind: str, seed: int, folder: Path) -> tuple[str, list[str]]:
        while kind == "loops":
            pass
        try:
            np.ones(2 * int(GROWTH) if kind == "allocates" else 1 << 40, np.uint8)
        except MemoryError:
            return "failed", ["MemoryError"]
        return "refused", []


JUDGES = {"source": SourceJudge, "converted": ConvertedJudge, "misbehaving": Misbehaving}


def main(which: str, first: int, count: int, work: Path) -> None:
    os.fsync = lambda fd: None  # the disk is not what is tested
    judge = JUDGES[which](work)
    trees = [tree_bytes(base) for base in judge.bases]
    limit_memory()
    start = status("VmRSS")
    for seed in range(first, first + count):
        kind = list(judge.kinds)[seed % len(judge.kinds)]
        base = judge.base(kind, seed)
        folder = judge.bases[base]
        what = corruptions.damage(judge.kinds, kind, folder, seed)
        print(json.dumps({"begun": what}), flush=True)
        signal.alarm(judge.seconds)  # nothing catches it: the process ends
        outcome, problems = ("nothing changed", []) if tree_bytes(folder) == trees[base] else judge.judge(kind, seed, folder)
        signal.alarm(0)
        print(json.dumps({"what": what, "outcome": outcome, "problems": problems, "growth": status("VmHWM") - start}), flush=True)
        for name in ("out", "out.partial"):
            shutil.rmtree(work / name, ignore_errors=True)
        mend(folder, trees[base])
    assert [tree_bytes(base) for base in judge.bases] == trees, "mended folders aren't what they were"
    print(json.dumps({"growth": status("VmHWM") - start}), flush=True)


def limit_memory() -> None:
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (status("VmSize") + ALLOCATED, hard))


def status(field: str) -> int:
    """A number of bytes out of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
