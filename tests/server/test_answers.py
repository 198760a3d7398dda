"""The JSON of answers, and the mailbox between engine and client. Under a second."""

import asyncio
import json
import math

import pytest

from jaxmoe.engine.serving.requests import Event, ServeRequest, TokenLogprob
from jaxmoe.engine.text import Tokenizer
from jaxmoe.server.answers import Answer, sse
from jaxmoe.server.errors import ApiError
from jaxmoe.server.mailbox import Mailbox, Piece
from jaxmoe.server.protocol import Call
from tests.server.fake_engine import MODEL_FOLDER

TOKENIZER = Tokenizer(MODEL_FOLDER)
(PART, REST) = TOKENIZER.encode("\N{SNOWMAN}")[:2]  # a character of several tokens
ONE = TOKENIZER.encode("a")[0]


def answer(chat=False, **fields):
    call = Call(chat=chat, requests=(ServeRequest((1, 2, 3), 5),), **fields)
    return Answer(call, TOKENIZER, id="x", created=1, model="m")


def test_completion_logprobs_tell_equal_texts_apart():
    tokens = [TokenLogprob(PART, -0.5, ((PART, -0.5), (REST, -2.0))), TokenLogprob(ONE, -math.inf, ((PART, math.nan), (REST, -1.0)))]
    made = answer(logprobs=2, echo=("abc",))
    (first,) = made.chunks(0, Piece(["x"], tokens[:1]))
    (second,) = made.chunks(0, Piece(["y"], tokens[1:], "length"))
    replacement = "\N{REPLACEMENT CHARACTER}"
    shown = first["choices"][0]["logprobs"]
    assert shown == {
        "tokens": [replacement], "token_logprobs": [-0.5], "top_logprobs": [{replacement: -0.5, f"token_id:{REST}": -2.0}], "text_offset": [3],
    }  # fmt: skip
    shown = second["choices"][0]["logprobs"]
    assert shown["token_logprobs"] == [-9999.0] and shown["text_offset"] == [4]
    assert shown["top_logprobs"] == [{"a": -9999.0, replacement: -9999.0, f"token_id:{REST}": -1.0}]
    assert [chunk["choices"][0]["text"] for chunk in (first, second)] == ["abcx", "y"], "the echo comes once"
    json.loads(sse(second)[6:])


def test_chat_logprobs_have_bytes_only_of_whole_characters():
    made = answer(chat=True, logprobs=1)
    role, content, end = made.chunks(0, Piece(["a"], [TokenLogprob(ONE, -1.0, ((PART, -0.5), (ONE, -1.0)))], "stop", "."))
    assert role["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    (token,) = content["choices"][0]["logprobs"]["content"]
    assert (token["token"], token["bytes"], token["logprob"]) == ("a", [97], -1.0)
    assert [(top["bytes"], top["logprob"]) for top in token["top_logprobs"]] == [(None, -0.5)], "as many as asked for"
    assert end["choices"][0] == {"index": 0, "delta": {}, "finish_reason": "stop", "stop_reason": ".", "logprobs": None}
    assert [len(made.chunks(0, Piece(["b"]))), len(made.chunks(0, Piece())), len(made.chunks(1, Piece()))] == [1, 0, 1]


def test_streams_are_ascii_lines():
    line = sse({"text": "\u2028\n\x85\N{SNOWMAN}"})
    assert line.isascii() and line.count(b"\n") == 2 and json.loads(line[6:]) == {"text": "\u2028\n\x85\N{SNOWMAN}"}
    with pytest.raises(ValueError):
        sse({"x": math.nan})


def test_usage_counts_a_prompt_once_and_says_what_was_cut_off():
    made = answer(n=2, truncated=(4,))
    mailbox = Mailbox(2)
    for choice, ids in ((0, (1, 2)), (1, (3,))):
        mailbox.put(choice, Event(choice, ids, "t", finish_reason="stop", cached_tokens=2))
    usage = made.usage(mailbox)
    assert usage == {
        "prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6, "prompt_tokens_details": {"cached_tokens": 2, "truncated_tokens": 4},
    }  # fmt: skip


def test_a_mailbox_merges_what_waits():
    async def body():
        mailbox = Mailbox(2, limit=100)
        for i in range(5):
            mailbox.put(i % 2, Event(0, (i,), str(i)))
        pieces = await mailbox.take()
        assert {choice: piece.text for choice, piece in pieces.items()} == {0: "024", 1: "13"} and mailbox.tokens == [3, 2]
        waiting = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        assert not waiting.done()
        mailbox.put(0, Event(0, (9,), "", finish_reason="length"))
        assert (await waiting)[0].finish_reason == "length" and mailbox.left == 1
        mailbox.put(1, Event(1, (9,), "z", finish_reason="stop"))
        assert (await mailbox.take())[1].text == "z" and await mailbox.take() == {}

    asyncio.run(body())


def test_a_mailbox_that_is_too_full_fails_once():
    async def body():
        mailbox = Mailbox(1, limit=10)
        mailbox.put(0, Event(0, (1,), "x" * 10))
        assert mailbox.error is None
        mailbox.put(0, Event(0, (1,), "x"))
        assert mailbox.error.code == "slow_reader" and "11 bytes" in mailbox.error.message and mailbox.failed.is_set()
        mailbox.fail(ApiError(500, "later"))
        with pytest.raises(ApiError, match="too slowly"):
            await mailbox.take()
        endless = Mailbox(1)
        endless.put(0, Event(0, (1,), "x" * 1000, finish_reason="stop"))
        assert len((await endless.take_whole())[0].text) == 1000

    asyncio.run(body())


@pytest.mark.parametrize(("reason", "status"), [("error", 500), ("abort", 503)])
def test_a_sequence_that_ends_badly_fails_its_request(reason, status):
    async def body():
        mailbox = Mailbox(2)
        mailbox.put(0, Event(0, (1,), "x", finish_reason="stop"))
        mailbox.put(1, Event(1, finish_reason=reason, error="/a/file"))
        with pytest.raises(ApiError) as error:
            await mailbox.take_whole()
        assert error.value.status == status and "/a/file" not in error.value.message

    asyncio.run(body())
