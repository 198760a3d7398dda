"""On the CPU a request's bits depend on nothing around it: not on the other requests, the buckets, how its prompt was cut, or the size of the cache.

Every way of running is compared, in raw bits, with each request alone, prefilled at once in one bucket. What holds for the single dots is tested in
`tests/pallas_kernels/test_row_invariance.py`; here whole programs have to keep it.
"""

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import pytest

from checkpoints.load import load_hf_or_checkpoint
from jaxmoe.cache.batch import make_batch
from jaxmoe.decode.sampling import sampling_params
from jaxmoe.engine import steps
from jaxmoe.engine.generate import Engine, Request, Sampling
from jaxmoe.engine.model import Model, load_model
from pallas_kernels.dispatch import Kernels
from tests.models import Schedule, decode_logits, prefill_logits, random_model
from tests.more import more

SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints" / "default"
LENGTHS = (131, 1, 33, 64, 7, 40, 31, 3)
"""Prompts of one batch. The longest reaches into a second block of keys; some fill a run, some end one token before or after."""

ROWS = len(LENGTHS)
REFERENCE_BUCKET = 512
ROW_BUCKETS = tuple(b for b in steps.ROW_BUCKETS if b <= 16)


def prompts(model: Model) -> list[list[int]]:
    rng = np.random.default_rng(7)
    return [rng.integers(0, model.spec.vocab, n).tolist() for n in LENGTHS]


def in_pieces(sizes: tuple[int, ...], tokens: int) -> Schedule:
    """Every request cut into pieces of these sizes, in turn; one piece each of as many requests as fit into a step, then the next pieces."""
    run = steps.run_length(tokens)
    at, turn, schedule = [0] * ROWS, 0, []
    while any(a < n for a, n in zip(at, LENGTHS, strict=True)):
        free, step = tokens // run, []
        for i, n in enumerate(LENGTHS):
            size = min(sizes[turn % len(sizes)], n - at[i], free * run)
            if size > 0:
                step.append((i, at[i], at[i] + size))
                at[i], free, turn = at[i] + size, free - -(-size // run), turn + 1
        schedule.append(step)
    return schedule


def alone(tokens: int, size: int | None = None) -> Schedule:
    """One request after another, in pieces of `size`: the whole bucket unless told."""
    size = size or tokens
    return [[(i, a, min(a + size, n))] for i, n in enumerate(LENGTHS) for a in range(0, n, size)]


SCHEDULES: dict[str, tuple[Schedule, int]] = {
    **{f"alone, bucket of {tokens}": (alone(tokens), tokens) for tokens in steps.TOKEN_BUCKETS},
    **{f"batch, bucket of {tokens}": (in_pieces((tokens,), tokens), tokens) for tokens in steps.TOKEN_BUCKETS},
    "alone, pieces of 23 in a bucket of 32": (alone(32, 23), 32),
    "alone, pieces of 97 in a bucket of 512": (alone(512, 97), 512),
    "batch, pieces of 1 to 32 in a bucket of 32": (in_pieces((1, 32, 17, 5), 32), 32),
    "batch, pieces of 1 to 50 in a bucket of 128": (in_pieces((31, 1, 50, 13), 128), 128),
    "batch, pieces of 2 to 130 in a bucket of 512": (in_pieces((64, 2, 65, 130), 512), 512),
}
"""(schedule, bucket) of each way to prefill."""


def decoded(model: Model, bucket: int) -> list[np.ndarray]:
    """Logits of prompts that are fed token by token, as many requests together as the bucket holds."""
    ids = prompts(model)
    out = []
    for at in range(0, ROWS, bucket):
        out += decode_logits(model, ids[at : at + bucket], bucket, rows=ROWS)
    return out


def ways(model: Model) -> dict[str, Callable[[], list[np.ndarray]]]:
    """Every way to get the logits of all prompts, by its name."""
    ids = prompts(model)
    found: dict[str, Callable] = {f"decoded, {bucket} rows": lambda b=bucket: decoded(model, b) for bucket in ROW_BUCKETS}
    return found | {name: lambda s=s, t=t: prefill_logits(model, ids, s, t, rows=ROWS) for name, (s, t) in SCHEDULES.items()}


def side_by_side(calls: list[Callable]) -> list:
    """Runs calls on two threads: nearly all of their time is that of compilers."""
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda call: call(), calls))


def first_layers(model: Model, n: int) -> Model:
    """The model without its later layers, which are of the same shapes: a step compiles in half the time."""
    (segment,) = model.spec.segments
    spec = dataclasses.replace(model.spec, segments=(dataclasses.replace(segment, repeats=n),))
    trees = jax.tree.map(lambda leaf: leaf[:n], model.params["segments"], is_leaf=lambda t: isinstance(t, tuple) and not isinstance(t[0], dict))
    bank = dataclasses.replace(model.bank, w_in=model.bank.w_in[:n], w_out=model.bank.w_out[:n])
    return dataclasses.replace(model, spec=spec, params=model.params | {"segments": trees}, bank=bank)


@pytest.fixture(scope="module")
def model_of(tmp_path_factory) -> Callable[[str, str], Model]:
    """Models by (name, dtype): one with an array for each layer, as the CPU has them by default, and one that scans over stacked layers."""
    checkpoint = load_hf_or_checkpoint(SHIPPED, tmp_path_factory.mktemp("converted"))

    def make(name: str, dtype: str) -> Model:
        if name == "shipped":
            return first_layers(load_model(checkpoint, dtype, Kernels("cpu")), 2)
        return random_model(name, dtype, unroll=False)

    return make


WAYS = [*SCHEDULES, *(f"decoded, {bucket} rows" for bucket in ROW_BUCKETS)]
REFERENCE = f"alone, bucket of {REFERENCE_BUCKET}"
FEWER = [way for way in WAYS if not any(bucket in way for bucket in (" of 128", " 4 rows", " 16 rows"))]
WAYS_OF = {
    "shipped-float32": WAYS,
    "mixtral-bfloat16": FEWER,
}
"""By model and dtype. Another dtype, a window and stacked layers do not need every bucket once more; the shipped model has those with
`--exhaustive`."""


@pytest.fixture(scope="module")
def logits_of(model_of, exhaustive) -> Callable[[str], dict[str, list[np.ndarray]]]:
    """Logits of every prompt, by way; for the names in `WAYS_OF`. (Mixtral's float32 is `test_generate.py`'s.)"""

    @functools.cache
    def compute(name: str):
        model = model_of(*name.split("-"))
        steps.logits_step(model.spec, model.kernels)  # made once, before two threads ask for it
        calls = {way: call for way, call in ways(model).items() if way in (WAYS_OF[name] if exhaustive else FEWER)}
        return dict(zip(calls, side_by_side(list(calls.values())), strict=True))

    return compute


def bits(x) -> np.ndarray:
    x = np.ascontiguousarray(x)
    assert x.dtype == np.float32 and np.isfinite(x).all()
    return x.view(np.uint32)


CASES = [(name, way) if way in FEWER else more(name, way) for name, some in WAYS_OF.items() for way in some if way != REFERENCE]


@pytest.mark.parametrize(("name", "way"), CASES)
def test_logits(logits_of, name, way):
    for i, (got, expected) in enumerate(zip(logits_of(name)[way], logits_of(name)[REFERENCE], strict=True)):
        assert got.shape == (LENGTHS[i], expected.shape[1])
        differ = (bits(got) != bits(expected)).any(axis=1)
        assert not differ.any(), f"request {i} differs at positions {np.flatnonzero(differ).tolist()}"


@pytest.mark.parametrize("name", WAYS_OF)
def test_the_logits_say_something(logits_of, name):
    """Equal bits would be nothing if the logits did not depend on the prompt and on what came before."""
    for rows in logits_of(name)[REFERENCE]:
        assert len(np.unique(bits(rows), axis=0)) == len(rows)


def test_a_cache_of_another_size(model_of):
    model = model_of("mixtral", "bfloat16")
    ids = prompts(model)[:1]
    small, large = (prefill_logits(model, ids, [[(0, 0, LENGTHS[0])]], 512, rows, positions)[0] for rows, positions in ((1, 256), (ROWS, 512)))
    np.testing.assert_array_equal(bits(small), bits(large))


NEW_TOKENS = steps.CHUNK + 1
PROMPTS = (20, 3, 32, 9, 31, 1, 26, 14)


def requests_of(model: Model) -> list[Request]:
    """Greedy and sampled ones."""
    rng = np.random.default_rng(11)
    how = [Sampling(), Sampling(1.0, seed=1), Sampling(0.7, top_p=0.9, seed=2), Sampling(1.3, top_k=20, min_p=0.01, seed=3)]
    return [Request(tuple(rng.integers(0, model.spec.vocab, n).tolist()), NEW_TOKENS, how[i % 4]) for i, n in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def engine(model_of) -> Engine:
    return Engine(model_of("mixtral", "bfloat16"), ROWS, 256, greedy=False)


def programs(engine: Engine) -> tuple[Callable, Callable]:
    """The engine's (prefill, decode)."""
    args = (engine.model.spec, engine.model.kernels, engine.greedy)
    return steps.prefill_step(*args), steps.decode_step(*args)


def run_programs(engine: Engine, requests: list[Request], bucket: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """Prefills in one step of `bucket` tokens and decodes one chunk: (tokens [CHUNK + 1, n], the cached keys and values, both [..., S, C])."""
    prefill, decode = programs(engine)
    params, (fixed, _), n = engine.model.params, engine.model.bank.split(), len(requests)
    rows = steps.bucket(n, steps.ROW_BUCKETS)
    lengths = [len(r.prompt_ids) for r in requests]

    def sampling(rows: int):
        columns = {f.name: [getattr(r.sampling, f.name) for r in requests] for f in dataclasses.fields(Sampling)}
        return sampling_params(rows, **{name: np.asarray(c + c[-1:] * (rows - n)) for name, c in columns.items()})

    batch = make_batch([(i, 0, list(r.prompt_ids)) for i, r in enumerate(requests)], steps.run_length(bucket), bucket, n_logits=steps.LOGIT_ROWS)
    at = steps.pad_to(lengths, steps.LOGIT_ROWS)
    first, state, _ = prefill(params, fixed, engine.start(), batch, sampling(steps.LOGIT_ROWS), at)
    first = np.asarray(first)[:n]
    given = [steps.pad_to(x, rows) for x in (range(n), first, lengths, [steps.CHUNK] * n)]
    out, state, _ = decode(params, fixed, state, *given, steps.pad_to((), steps.EOS_SLOTS, -2), sampling(rows))
    (kv,) = state.layers.states
    return np.concatenate([first[None], np.asarray(out)[:, :n]]), [np.asarray(kv.k).swapaxes(-1, -2), np.asarray(kv.v)]


def test_generation_alone_and_in_a_batch(engine):
    """The programs that generate, with their loops, draw the same tokens, and cache the same keys and values in every layer."""
    requests = requests_of(engine.model)
    programs(engine)  # made once, before two threads ask for them
    (tokens, held), _ = side_by_side([lambda: run_programs(engine, requests, 512), lambda: run_programs(engine, requests[:1], 32)])
    results, _ = engine.generate(requests)
    assert [r.ids for r in results] == tokens.T.tolist()
    assert len({tuple(r.ids) for r in results}) == len(requests)
    for i, request in enumerate(requests):
        tokens_alone, held_alone = run_programs(engine, [request], 32)
        used = PROMPTS[i] + steps.CHUNK
        for one, many in zip(held_alone, held, strict=True):
            ours, theirs = one[:, 0, :, :used], many[:, i, :, :used]
            assert ours.any(axis=-1).all()
            differ = (ours.view(f"u{ours.itemsize}") != theirs.view(f"u{ours.itemsize}")).any(axis=(0, 1, 3))
            assert not differ.any(), f"request {i} differs at positions {np.flatnonzero(differ).tolist()}"
        assert tokens_alone[:, 0].tolist() == results[i].ids
        assert engine.generate([request])[0] == [results[i]]
