"""What `Engine.generate` does with requests: where they end, what is streamed, in which order, and what is refused.

The model is small and random, and one character is one token, so that ids and text can be told from each other. Logits come from another program,
`prompt_logits`; that their bits agree is tested in `test_invariance.py`.
"""

import collections
import dataclasses
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import tokenizers

from jaxmoe.decode.sampling import sample, sampling_params
from jaxmoe.engine import steps
from jaxmoe.engine.generate import Engine, Request, RequestError, Sampling, prompt_logits
from jaxmoe.engine.text import Tokenizer
from tests.models import random_model
from tests.quick import QuickKernels

VOCAB, ROWS, POSITIONS = 96, 12, 1024
LENGTHS = (600, 1, 31, 32, 33, 5, 127, 64, 2, 129, 16, 90)
"""Prompts of one batch: one longer than the largest prefill step, and more than may end in one step."""


@pytest.fixture(scope="module")
def model():
    small = random_model("mixtral", kernels=QuickKernels("cpu"))
    return dataclasses.replace(small, spec=dataclasses.replace(small.spec, max_positions=POSITIONS))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    characters = tokenizers.Tokenizer(tokenizers.models.WordLevel({chr(ord(" ") + i): i for i in range(VOCAB)}, unk_token=" "))
    characters.decoder = tokenizers.decoders.Fuse()
    characters.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


@pytest.fixture(scope="module")
def engine(model) -> Engine:
    """With its programs compiled, two at a time; `warm_up` compiles one after another and more of them."""
    engine = Engine(model, ROWS, POSITIONS, greedy=False)
    for program in (steps.prefill_step, steps.decode_step):
        program(model.spec, model.kernels, engine.greedy)  # made once, before two threads ask for it
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda length, count: engine.generate([Request((1,) * length, 2)] * count), (600, 1, 1), (1, 3, ROWS)))
    return engine


def prompt(length: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(length).integers(0, VOCAB, length).tolist())


def sampled(seed: int) -> Sampling:
    return Sampling(temperature=0.9, top_k=60, top_p=0.98, min_p=0.001, seed=seed)


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    """Greedy and sampled ones of different lengths; some end while others go on."""
    return [Request(prompt(n), 3 + 5 * (i % 5), sampled(i) if i % 2 else Sampling()) for i, n in enumerate(LENGTHS)]


class Texts(collections.defaultdict):
    """Collects what is streamed, by request; for `on_text`."""

    def __init__(self):
        super().__init__(str)

    def __call__(self, index: int, text: str) -> None:
        self[index] += text


@pytest.fixture(scope="module")
def together(engine, tokenizer, requests):
    """(results, timings, streamed texts) of all requests in one batch."""
    texts = Texts()
    return *engine.generate(requests, tokenizer, texts), texts


@pytest.fixture(scope="module")
def free(engine, tokenizer):
    """A sampled request that nothing stops early, over several decode chunks."""
    request = Request(prompt(20), 3 * steps.CHUNK, sampled(3))
    return request, engine.generate([request], tokenizer)[0][0]


def test_the_requests_are_the_hard_ones():
    assert len(LENGTHS) == ROWS > steps.LOGIT_ROWS
    assert max(LENGTHS) > steps.TOKEN_BUCKETS[-1]


def test_a_batch_gives_each_request_what_it_gets_alone(engine, tokenizer, requests, together):
    results, _, _ = together
    assert len({tuple(result.ids) for result in results}) == len(requests)
    for request, result in zip(requests, results, strict=True):
        assert result.prompt_ids == request.prompt_ids
        assert engine.generate([request], tokenizer)[0] == [result]


def test_every_request_gets_all_its_tokens(tokenizer, requests, together):
    results, timings, _ = together
    for request, result in zip(requests, results, strict=True):
        assert len(result.ids) == request.max_new_tokens
        assert result.finish_reason == "length"
        assert result.text == tokenizer.decode(result.ids)
    assert timings.prompt_tokens == sum(LENGTHS)
    assert timings.decode_tokens == sum(r.max_new_tokens - 1 for r in requests)
    assert timings.decode_steps == max(r.max_new_tokens for r in requests) - 1


def test_streamed_text_is_the_text(together):
    results, _, texts = together
    assert texts == {i: result.text for i, result in enumerate(results)}


def test_text_streams_while_it_is_made(engine, tokenizer, free):
    request, result = free
    pieces = []
    engine.generate([request], tokenizer, lambda i, text: pieces.append(text))
    assert pieces == list(result.text)


@pytest.mark.parametrize("index", [0, 2])
def test_greedy_takes_the_likeliest_token(model, requests, together, index):
    ids = together[0][index].ids
    assert requests[index].sampling.temperature == 0
    logits = teacher_forced(model, requests[index], ids)
    assert logits.argmax(axis=1).tolist() == ids


def test_sampled_tokens_are_draws_from_the_logits(model, requests, together):
    """Noise belongs to the position of the token that is drawn, and to the seed."""
    request, ids = requests[3], together[0][3].ids
    logits = teacher_forced(model, request, ids)
    params = sampling_params(len(ids), **dataclasses.asdict(request.sampling))
    drawn = jax.jit(sample)(logits, params, len(request.prompt_ids) + np.arange(len(ids), dtype=np.int32))
    assert drawn.tolist() == ids
    assert logits.argmax(axis=1).tolist() != ids


def teacher_forced(model, request: Request, ids: list[int]) -> np.ndarray:
    """The logits from which each of `ids` was chosen."""
    fed = [*request.prompt_ids, *ids[:-1]]
    return prompt_logits(model, fed, 512 if len(fed) > 256 else 32)[-len(ids) :]


def test_a_seed_draws_its_tokens_and_no_others(engine):
    request = Request(prompt(9), 12, sampled(5))
    others = [dataclasses.replace(request, sampling=s) for s in (sampled(5), sampled(6), Sampling())]
    first, same, other, greedy = (r.ids for r in engine.generate([request, *others])[0])
    assert first == same
    assert first != other and first != greedy and other != greedy


@pytest.mark.parametrize("count", [1, 2, steps.CHUNK, steps.CHUNK + 1, steps.CHUNK + 2])
def test_max_new_tokens_is_exact(engine, tokenizer, free, count):
    request, whole = free
    (result,), timings = engine.generate([dataclasses.replace(request, max_new_tokens=count)], tokenizer)
    assert result.ids == whole.ids[:count]
    assert result.text == whole.text[:count]
    assert result.finish_reason == "length"
    assert timings.decode_steps == timings.decode_tokens == count - 1


def test_a_request_may_fill_the_model(engine):
    request = Request(prompt(POSITIONS - 3), 3)
    ((result,), _), ((shorter,), _) = engine.generate([request]), engine.generate([dataclasses.replace(request, max_new_tokens=2)])
    assert len(result.ids) == 3 and result.ids[:2] == shorter.ids


def test_without_a_tokenizer_only_ids_come_back(engine, requests, together):
    texts = Texts()
    results, _ = engine.generate(requests[1:3], on_text=texts)
    assert [result.ids for result in results] == [result.ids for result in together[0][1:3]]
    assert {result.text for result in results} | set(texts.values()) == {""}


def engine_with_eos(model, *eos: int) -> Engine:
    return Engine(model, ROWS, POSITIONS, greedy=False, eos=eos)


def test_end_of_text_ends_requests_of_a_batch_one_by_one(model, tokenizer, requests, together):
    free = together[0]
    eos = {id for id, _ in collections.Counter(id for result in free for id in set(result.ids)).most_common(2)}
    texts = Texts()
    results, _ = engine_with_eos(model, *eos).generate(requests, tokenizer, texts)
    assert {result.finish_reason for result in results} == {"stop", "length"}
    for i, (result, whole) in enumerate(zip(results, free, strict=True)):
        end = next((n for n, id in enumerate(whole.ids) if id in eos), None)
        if end is None:
            assert result == whole
        else:
            assert result.finish_reason == "stop"
            assert result.ids == whole.ids[: end + 1], "the end-of-text id is among the ids"
            assert result.text == whole.text[:end], "and has no text"
        assert texts[i] == result.text


@pytest.mark.parametrize("at_least", [0, 2, steps.CHUNK + 2])
def test_end_of_text_at(model, tokenizer, free, at_least):
    """In prefill, in the first chunk and in a later one."""
    request, whole = free
    end = next(n for n, id in enumerate(whole.ids) if n >= at_least and id not in whole.ids[:n])
    engine = engine_with_eos(model, whole.ids[end])
    for most in (request.max_new_tokens, end + 1):  # on the last token allowed, it is still the end of text that ends it
        (result,), timings = engine.generate([dataclasses.replace(request, max_new_tokens=most)], tokenizer)
        assert (result.ids, result.text, result.finish_reason) == (whole.ids[: end + 1], whole.text[:end], "stop")
        assert timings.decode_steps == timings.decode_tokens == end


def test_as_many_end_of_text_ids_as_a_program_watches_for(model, free):
    request, whole = free
    unused = [id for id in range(VOCAB) if id not in whole.ids][: steps.EOS_SLOTS - 1]
    assert len(unused) == steps.EOS_SLOTS - 1
    (result,), _ = engine_with_eos(model, *unused, whole.ids[-1]).generate([request])
    assert result.ids == whole.ids[: whole.ids.index(whole.ids[-1]) + 1]


@pytest.mark.parametrize("start", [0, 5, steps.CHUNK - 1, 2 * steps.CHUNK])
def test_a_stop_string_ends_the_text_before_it(engine, tokenizer, free, start):
    """At the very beginning, within a chunk, across two chunks, and in the third."""
    request, whole = free
    stop = whole.text[start : start + 4]
    end = whole.text.index(stop)
    texts = Texts()
    (result,), _ = engine.generate([dataclasses.replace(request, stop=("\N{SNOWMAN}", stop))], tokenizer, texts)
    assert (result.text, result.finish_reason) == (whole.text[:end], "stop")
    assert result.ids == whole.ids[: end + len(stop)]
    assert texts[0] == result.text


def test_the_beginning_of_a_stop_string_is_held_back_then_shown(engine, tokenizer, free):
    request, whole = free
    texts = Texts()
    (result,), _ = engine.generate([dataclasses.replace(request, stop=(whole.text[-2:] + "\N{SNOWMAN}",))], tokenizer, texts)
    assert (result.text, result.ids, result.finish_reason) == (whole.text, whole.ids, "length")
    assert texts[0] == whole.text


def test_a_stop_string_is_one_requests_own(engine, tokenizer, free):
    request, whole = free
    stopped = dataclasses.replace(request, stop=(whole.text[3:6],))
    results, _ = engine.generate([request, stopped, request], tokenizer)
    assert [r.finish_reason for r in results] == ["length", "stop", "length"]
    assert results[0] == results[2] == whole
    assert results[1].text == whole.text[: whole.text.index(whole.text[3:6])]


GOOD = Request((1, 2, 3), 4)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (Request((), 1), "prompt 9 is empty"),
        (Request((1,), 0), "max_new_tokens = 0"),
        (Request((1,), -2), "max_new_tokens = -2"),
        (Request((1, VOCAB, 2), 1), f"prompt 9 .* id {VOCAB}, outside the vocabulary of {VOCAB}"),
        (Request((1, -3, 2), 1), f"prompt 9 .* id -3, outside the vocabulary of {VOCAB}"),
        (Request(prompt(1000), 30), f"prompt 9 has 1000 tokens and max_new_tokens is 30: 1030 positions.* {POSITIONS}"),
        (Request((1,), 1, Sampling(temperature=-1.0)), "temperature = -1"),
        (Request((1,), 1, Sampling(top_p=1.5)), r"top_p = 1\.5"),
        (Request((1,), 1, stop=("x",)), "stop"),
    ],
    ids=["empty", "no-tokens", "negative-tokens", "id-too-large", "id-negative", "too-long", "temperature", "top-p", "stop-without-tokenizer"],
)
def test_refused_before_anything_runs(engine, bad, message):
    """Behind more good requests than one prefill step ends, so that they would have run first."""
    texts = Texts()
    with pytest.raises(RequestError, match=message):
        engine.generate([GOOD] * (steps.LOGIT_ROWS + 1) + [bad], on_text=texts)
    assert not texts


def test_what_an_engine_has_no_room_for_is_refused(engine, model):
    with pytest.raises(RequestError, match=f"{ROWS + 1} requests .* {ROWS} rows"):
        engine.generate([GOOD] * (ROWS + 1))
    with pytest.raises(RequestError, match="260 positions, the engine has 256"):
        Engine(model, 1, 100, greedy=False).generate([Request(prompt(250), 10)])
    with pytest.raises(RequestError, match=f"9 end-of-text ids .* {steps.EOS_SLOTS}"):
        engine_with_eos(model, *range(9))
    with pytest.raises(RequestError, match=f"{POSITIONS + 1} tokens .* {POSITIONS} positions"):
        prompt_logits(model, prompt(POSITIONS + 1))


def test_a_greedy_engine_refuses_to_sample(model):
    with pytest.raises(RequestError, match=r"temperature.* 0\.9"):
        Engine(model, 1, 64, greedy=True).generate([Request((1,), 1, sampled(0))])
