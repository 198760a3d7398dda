"""Learned predictors: they learn what tokens tell, say step by step what they were trained to say, and their files refuse what they can't be."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.offload.predictors import PREDICTORS, foresee
from jaxmoe.offload.predictors.network import frequencies
from jaxmoe.offload.recall import recall
from jaxmoe.offload.trace import DECODE, TEACHER_FORCED, TraceBuilder
from jaxmoe.spec import ModelSpec
from jaxmoe.train import path_predictor
from jaxmoe.train.path_predictor import NETS, FitSettings, dense_targets, load, pieces, save, train
from tests.models import CONFIGS
from tests.offload.traces import meta
from tests.quick import OPTIONS

L, E, A, V = 3, 8, 2, 12
QUICK = FitSettings(steps=50, batch=4, length=24, rate=0.02, warmup=5)
NET = {"tokens": V, "width": 16, "heads": 2, "hidden": 16, "window": 6}


def told_by_tokens(seed, sequences=12, length=24):
    """Each layer's experts follow from the last token or two; next tokens mostly follow from the last."""
    rng, table = np.random.default_rng(seed), np.random.default_rng(0)
    one, two = (np.argsort(table.random((L, V, E)))[..., :A] for _ in range(2))
    after = table.permutation(V)
    builder = TraceBuilder(meta(L, E, A))
    for s in range(sequences):
        tokens = [int(rng.integers(V))]
        while len(tokens) < length:
            tokens.append(int(after[tokens[-1]] if rng.random() < 0.8 else rng.integers(V)))
        tokens = np.array(tokens)
        ids = one[:, tokens].swapaxes(0, 1)
        ids[1:, 2] = two[2, tokens[:-1]]
        builder.add(ids, rng.random(ids.shape) + 0.1, tokens, np.full(length, s), TEACHER_FORCED)
    return builder.build()


FIT, JUDGE = told_by_tokens(1), told_by_tokens(2, sequences=1, length=72)


@pytest.fixture(scope="module", autouse=True)
def one_program():
    """Every run of the same settings takes the same step, and it is little optimized."""

    def quick(make, **how):
        return functools.cache(lambda *settings: jax.jit(make(*settings).__wrapped__, compiler_options=OPTIONS, **how))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_predictor, "make_step", quick(path_predictor.make_step, donate_argnums=(0, 1)))
        patch.setattr(path_predictor, "make_init", quick(path_predictor.make_init))
        yield


@functools.cache
def trained(kind, seed=3):
    return train([FIT], kind, QUICK, seed, **NET, **({"pairs": 64} if kind == "path" else {}))


@pytest.mark.parametrize("kind", ("path", "readme"))
def test_it_learns_what_tokens_tell(kind):
    known, guess = PREDICTORS[kind], PREDICTORS["frequency"]
    found = recall(known, trained(kind), JUDGE).share()
    assert found[0] > 0.65 > 0.5 > recall(guess, guess.fit([FIT]), JUDGE).share()[0]
    table = foresee(known, trained(kind), JUDGE, 1)
    assert 0 <= table.min() and table.max() <= 1
    used = np.stack([np.isin(np.arange(E), own) for token in JUDGE.ids for own in token]).reshape(-1, L, E)
    going_on = np.diff(JUDGE.sequence) == 0
    said_next, uses_next = table[:-1, 1][going_on], used[1:][going_on]
    assert said_next[uses_next].mean() > 1.5 * said_next[~uses_next].mean()


@pytest.mark.parametrize("kind", ("path", "readme"))
def test_a_step_says_what_the_whole_sequence_was_trained_to(kind):
    params = trained(kind)
    batch = pieces([JUDGE], 72)
    used, _ = dense_targets(jnp.asarray(batch["ids"]), jnp.asarray(batch["weights"]), E)
    recent = [frequencies(used, decay) for decay in params.settings.decays]
    recent = jnp.stack(recent, 2) if recent else jnp.zeros((*used.shape[:2], 0, L, E))
    net = NETS[kind](params.settings)
    apply = jax.jit(functools.partial(net.apply, method="probabilities"), compiler_options=OPTIONS)
    whole = apply({"params": params.leaves}, batch["tokens"], recent)
    np.testing.assert_allclose(foresee(PREDICTORS[kind], params, JUDGE, 1), np.asarray(whole).reshape(-1, 2, L, E), atol=2e-3)


def test_frequencies_are_of_what_came_before():
    used = np.random.default_rng(0).random((1, 7, 2, 3)) < 0.5
    for decay in (0.0, 0.8):
        total, weight = np.zeros((2, 3)), 0.0
        for t, found in enumerate(np.asarray(frequencies(jnp.asarray(used, jnp.float32), decay))[0]):
            np.testing.assert_allclose(found, total / max(weight, 1e-9), atol=1e-6)
            total, weight = total * decay + used[0, t], weight * decay + 1


def test_a_batch_and_a_row_that_was_reset():
    path, params = PREDICTORS["path"], trained("path")
    state = path.init(params, 4)
    for t in range(4):
        state = path.after(params, state, np.array([0, 3]), JUDGE.tokens[[t, t + 5]], JUDGE.ids[[t, t + 5]])
    rows, tokens = np.array([3, 0, 1]), np.array([2, 5, 7])
    each = [path.before(params, state, rows[i : i + 1], tokens[i : i + 1]) for i in range(3)]
    np.testing.assert_allclose(path.before(params, state, rows, tokens), 1 - np.prod(1 - np.stack(each), 0), atol=1e-5)
    state = path.reset(params, state, np.array([3]))
    np.testing.assert_allclose(path.before(params, state, rows[:1], tokens[2:]), each[2], atol=1e-6)


def test_the_same_seed_gives_the_same_parameters():
    seen = []
    same = train([FIT], "readme", QUICK, 3, lambda *row: seen.append(row), **NET).leaves["head"]["kernel"]
    np.testing.assert_array_equal(trained("readme").leaves["head"]["kernel"], same)
    assert [row[:2] for row in seen] == [(50, 50)] and 0 < seen[0][2] < 20
    orders = [path_predictor.piece_order(10, QUICK, seed) for seed in (3, 4)]
    assert (orders[0] != orders[1]).any() and (np.sort(orders[0].reshape(-1, 10)) == np.arange(10)).all()


def test_what_can_not_be_trained_is_refused():
    with pytest.raises(ValueError, match="no token ids"):
        train([dataclasses.replace(FIT, tokens=FIT.tokens * 0 - 1)], "path", QUICK)
    with pytest.raises(ValueError, match="'tarot'"):
        train([FIT], "tarot")
    with pytest.raises(ValueError, match="needs a trace"):
        train([], "path")
    blind = dataclasses.replace(JUDGE, tokens=JUDGE.tokens * 0 - 1)
    with pytest.raises(ValueError, match="no token ids"):
        foresee(PREDICTORS["path"], trained("path"), blind)


def test_a_long_sequence_is_cut_and_a_short_one_filled():
    builder = TraceBuilder(meta(L, E, A))
    for t in range(5):
        rows = np.array([0, 1]) if t < 2 else np.array([1])
        builder.add(np.full((len(rows), L, A), t), np.ones((len(rows), L, A)), rows * 10 + t, rows, DECODE)
    found = pieces([builder.build()], 3)
    np.testing.assert_array_equal(found["tokens"], [[0, 1, -1], [10, 11, 12], [13, 14, -1]])
    np.testing.assert_array_equal(found["ids"][..., 0, 0], [[0, 1, -1], [0, 1, 2], [3, 4, -1]])


def test_a_file_gives_back_what_was_saved(tmp_path):
    params = trained("path")
    save(tmp_path / "p.npz", params, FIT.meta)
    again = load(tmp_path / "p.npz", JUDGE.meta, "path")
    assert again.settings == params.settings and again.kind == "path"
    np.testing.assert_array_equal(foresee(PREDICTORS["path"], again, JUDGE), foresee(PREDICTORS["path"], params, JUDGE))
    assert not list(tmp_path.glob("*.tmp"))


def rewritten(path, **changes):
    """The file with some arrays replaced, or fields of its description."""
    with np.load(path) as file:
        arrays = dict(file)
    about = json.loads(arrays["about"].tobytes())
    about |= {name: changes.pop(name) for name in list(changes) if name in about}
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(path, **(arrays | changes))


@pytest.mark.parametrize(
    "harm, said",
    [
        (lambda path: path.write_bytes(b"not at all"), "not a predictor file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-200]), "damaged"),
        (lambda path: np.savez(path, a=np.zeros(3)), "not a predictor file"),
        (lambda path: rewritten(path, version=9), "version 9"),
        (lambda path: rewritten(path, kind="readme"), "readme"),
        (lambda path: rewritten(path, settings={"sizes": {}}), "damaged"),
        (lambda path: rewritten(path, **{"gain": np.zeros((2, 2), np.float32)}), "gain"),
        (lambda path: rewritten(path, **{"heads/bias": np.full(2 * L * E, np.nan, np.float32)}), "finite"),
        (lambda path: rewritten(path, meta={"model": "other", "spec_hash": "abc"}), None),
    ],
)
def test_other_files_are_refused(tmp_path, harm, said):
    path = tmp_path / "p.npz"
    save(path, path_predictor.Fitted("path", trained("path").settings, trained("path").leaves), FIT.meta)
    harm(path)
    if said is None:  # a model that names no spec is known by its sizes
        assert load(path, FIT.meta).kind == "path"
        of, said = {**FIT.meta, "spec_hash": "def"}, "spec abc"
    else:
        of = FIT.meta
    with pytest.raises(ValueError, match=said) as error:
        load(path, of, "path")
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_a_predictor_of_another_model_is_refused(tmp_path):
    save(tmp_path / "p.npz", trained("path"), FIT.meta)
    with pytest.raises(ValueError, match="train one for it"):
        load(tmp_path / "p.npz", ModelSpec.from_hf(CONFIGS["olmoe"]))
