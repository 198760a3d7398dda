"""Tests of jaxmoe.decode.penalties: counts, what they do to logits, and that state can be rebuilt from tokens. About 3 seconds."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxmoe.decode.adjust import adjust_logits
from jaxmoe.decode.penalties import MAX_BIASES, RowEdits, build_adjust, check_edits

VOCAB = 70
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=40)
SETTINGS = st.fixed_dictionaries(
    dict(
        presence=st.sampled_from([0.0, -2.0, 0.3, 2.0]),
        frequency=st.sampled_from([0.0, 0.1, -0.7, 2.0]),
        repetition=st.sampled_from([1.0, 0.5, 1.3]),
        logit_bias=st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-100, 100), max_size=5),
        min_new_tokens=st.integers(0, 30),
        eos_ids=st.sampled_from([(), (0,), (2, 69)]),
    )
)


def filled(edits: RowEdits, vocab: int = VOCAB, allowed=None) -> tuple[np.ndarray, np.ndarray]:
    bias, seen = np.full(vocab, 7, np.float32), np.full(-(-vocab // 32), 7, np.uint32)
    edits.fill(bias, seen, allowed)
    return bias, seen


def members(row: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(row.astype("<u4").view(np.uint8), bitorder="little")).tolist()


def mask_of(*tokens: int, size: int = 3) -> np.ndarray:
    mask = np.zeros(size, np.uint32)
    for token in tokens:
        mask[token // 32] |= np.uint32(1 << (token % 32))
    return mask


@settings(deadline=None, max_examples=150, derandomize=True)
@given(prompt=TOKENS, generated=TOKENS, chosen=SETTINGS)
def test_edits_are_those_of_the_definition_at_every_step(prompt, generated, chosen):
    """And those of a state that is rebuilt from the tokens, to the bit."""
    edits = RowEdits(VOCAB, prompt_ids=prompt, **chosen)
    for step in range(len(generated) + 1):
        bias, seen = filled(edits, 80)
        count = Counter(generated[:step])
        early = step < chosen["min_new_tokens"]
        expected = np.zeros(80)
        for token in range(VOCAB):
            penalty = chosen["presence"] * (count[token] > 0) + chosen["frequency"] * count[token]
            expected[token] = chosen["logit_bias"].get(token, 0) - penalty
            if early and token in chosen["eos_ids"]:
                expected[token] = -math.inf
        np.testing.assert_allclose(bias, expected, rtol=1e-6, atol=1e-30)
        assert members(seen) == (sorted({*prompt, *generated[:step]}) if chosen["repetition"] != 1 else [])
        if edits.neutral:
            assert not bias.any() and edits.repetition == 1
        rebuilt = RowEdits.of(prompt, generated[:step], VOCAB, **chosen)
        for got, want in zip(filled(rebuilt, 80), (bias, seen), strict=True):
            np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
        assert (rebuilt.generated, rebuilt.neutral) == (step, edits.neutral)
        if step < len(generated):
            edits.push(generated[step])


def test_what_is_neutral():
    assert RowEdits(9).neutral and RowEdits(9, logit_bias={3: 0.0}, repetition=1 + 1e-9, min_new_tokens=4).neutral
    for changed in ({"presence": 0.1}, {"frequency": -0.1}, {"repetition": 1.1}, {"logit_bias": {3: 1}}, {"min_new_tokens": 1, "eos_ids": [0]}):
        assert not RowEdits(9, **changed).neutral


def test_end_of_text_is_forbidden_until_there_are_enough_tokens():
    edits = RowEdits(VOCAB, min_new_tokens=2, eos_ids=(2, 69), logit_bias={69: 5}, presence=1, prompt_ids=[2, 69])
    for token in (2, 4):
        assert edits.eos_forbidden and not edits.neutral
        assert np.flatnonzero(np.isneginf(filled(edits)[0])).tolist() == [2, 69]
        edits.push(token)
    assert not edits.eos_forbidden
    bias = filled(edits)[0]
    assert (bias[2], bias[4], bias[69]) == (-1, -1, 5) and np.isfinite(bias).all()


def test_a_complete_text_may_end_early():
    """A grammar that allows only end-of-text wins over min_new_tokens; one that allows more does not."""
    edits = RowEdits(VOCAB, min_new_tokens=5, eos_ids=(2, 69), logit_bias={69: 5})
    adjust = build_adjust([edits, edits, edits], [mask_of(2, 69), mask_of(2, 69, 7), mask_of(69)], 3, VOCAB)
    assert [(row[2], row[69]) for row in adjust.bias.tolist()] == [(0, 5), (-math.inf, -math.inf), (0, 5)]
    logits = np.asarray(adjust_logits(np.zeros((3, VOCAB), np.float32), adjust))
    assert [np.flatnonzero(np.isfinite(row)).tolist() for row in logits] == [[2, 69], [7], [69]]


def test_a_batch_is_padded_with_neutral_rows():
    edits = RowEdits(VOCAB, repetition=1.5, prompt_ids=[1, 65], logit_bias={3: -4})
    adjust = build_adjust([None, edits, None], [None, None, mask_of(5, 40, size=2)], 5, 100)
    assert {name: (x.shape, x.dtype.name) for name, x in vars(adjust).items()} == dict(
        bias=((5, 100), "float32"), seen=((5, 4), "uint32"), repetition=((5,), "float32"), allowed=((5, 4), "uint32")
    )
    assert adjust.repetition.tolist() == [1, 1.5, 1, 1, 1]
    assert [members(row) for row in adjust.seen] == [[], [1, 65], [], [], []]
    assert [members(row) == list(range(128)) for row in adjust.allowed] == [True, True, False, True, True] and members(adjust.allowed[2]) == [5, 40]
    assert np.argwhere(adjust.bias).tolist() == [[1, 3]] and adjust.bias[1, 3] == -4
    logits = np.random.default_rng(0).normal(size=(5, 100)).astype(np.float32)
    got = np.asarray(adjust_logits(logits, adjust))
    np.testing.assert_array_equal(got[[0, 3, 4]].view(np.uint32), logits[[0, 3, 4]].view(np.uint32))
    assert not np.array_equal(got[1], logits[1])
    still = build_adjust([], [], 2, 33)
    assert not still.bias.any() and not still.seen.any() and (still.repetition == 1).all() and (still.allowed == 2**32 - 1).all()


@pytest.mark.parametrize(
    "edits, masks, message",
    [
        ([None], [], "1 edits and 0 masks for 2 rows"),
        ([None] * 3, [None] * 3, "3 edits and 3 masks for 2 rows"),
        ([RowEdits(71)], [None], "row 0: its edits are for 71 tokens, the logits have 70"),
        ([None, None], [None, np.zeros(3, np.uint32)], "row 1: its mask allows no token"),
        ([None], [np.array([0, 0, 1 << 6], np.uint32)], "row 0: its mask allows no token"),  # token 70, one beyond the vocabulary
        ([None], [np.ones(4, np.uint32)], "expected uint32 of at most 3 words"),
        ([None], [np.ones(3, np.int32)], "its mask is int32"),
    ],
)
def test_batches_that_do_not_fit_are_refused(edits, masks, message):
    with pytest.raises(ValueError, match=message):
        build_adjust(edits, masks, 2, VOCAB)


@pytest.mark.parametrize(
    "chosen, message",
    [
        ({"presence": 2.1}, r"presence_penalty = 2.1 is outside \[-2, 2\]"),
        ({"frequency": -3}, "frequency_penalty = -3 is outside"),
        ({"frequency": math.nan}, "frequency_penalty = nan"),
        ({"presence": "1"}, "presence_penalty = '1'"),
        ({"presence": True}, "presence_penalty = True"),
        ({"repetition": 0}, "repetition_penalty = 0; it must be a float32 above 0"),
        ({"repetition": -1.0}, "repetition_penalty = -1.0"),
        ({"repetition": math.inf}, "repetition_penalty = inf"),
        ({"repetition": math.nan}, "repetition_penalty = nan"),
        ({"repetition": 1e-60}, "repetition_penalty = 1e-60"),
        ({"repetition": 1e60}, r"repetition_penalty = 1e\+60"),
        ({"repetition": 10**400}, "repetition_penalty = 1000"),
        ({"logit_bias": {70: 1}}, "logit_bias: 70 is no token id; they are integers from 0 to 69"),
        ({"logit_bias": {-1: 1}}, "logit_bias: -1 is no token id"),
        ({"logit_bias": {"3": 1}}, "logit_bias: '3' is no token id"),
        ({"logit_bias": {3: 100.5}}, r"logit_bias of token 3 = 100.5 is outside \[-100, 100\]"),
        ({"logit_bias": {3: math.nan}}, "logit_bias of token 3 = nan"),
        ({"logit_bias": dict.fromkeys(range(MAX_BIASES + 1), 1)}, f"logit_bias has {MAX_BIASES + 1} entries; at most {MAX_BIASES}"),
        ({"min_new_tokens": -1}, "min_new_tokens = -1"),
        ({"min_new_tokens": 1.5}, "min_new_tokens = 1.5"),
        ({"eos_ids": [70]}, "eos_ids: 70 is no token id"),
    ],
)
def test_settings_out_of_range_are_refused(chosen, message):
    for build in (RowEdits, check_edits):
        with pytest.raises(ValueError, match=message):
            build(VOCAB, **chosen)


def test_tokens_outside_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match="prompt_ids: 70 is no token id"):
        RowEdits(VOCAB, prompt_ids=[70])
    edits = RowEdits(VOCAB, frequency=1)
    with pytest.raises(ValueError, match="generated token: -1 is no token id"):
        edits.push(-1)
    assert edits.generated == 0
