"""The server over a real socket on loopback, with an engine whose tokens are known. About 8 seconds."""

import asyncio
import contextlib
import json
import random
import shutil
import socket
import subprocess
import threading
import time
import urllib.parse

import httpx
import openai
import pytest

from jaxmoe.report.serve_storm import Target, read_metrics
from jaxmoe.server.raw_client import Reply, exchange
from jaxmoe.server.serve import serving
from jaxmoe.server.settings import ServerSettings
from tests.server.fake_engine import MODEL_FOLDER, FakeEngine, RecoveringEngine, expected_text

PLAIN = {"model": "fake", "prompt": "the river", "max_tokens": 8, "seed": 3, "ignore_eos": True}
TALK = {"model": "fake", "messages": [{"role": "user", "content": "the river"}], "max_tokens": 8, "seed": 3}


@pytest.fixture(scope="module")
def engine():
    return FakeEngine()


@pytest.fixture(scope="module")
def url(engine):
    with serving(engine, ServerSettings(port=0, allow_truncation=True), compile_grammar=lambda kind, text: (kind, text)) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as found:
        yield found


@contextlib.contextmanager
def running(engine, **settings):
    with serving(engine, ServerSettings(port=0, **settings)) as found:
        yield found


def wait_for(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    assert condition(), "waited in vain"


def text_of(engine, i=-1):
    return expected_text(engine, engine.requests[i])


# The official client.


def test_a_completion(client, engine):
    answer = client.completions.create(**{k: v for k, v in PLAIN.items() if k != "ignore_eos"})
    (choice,) = answer.choices
    assert choice.text == text_of(engine) and choice.finish_reason == "length" and answer.model == "fake"
    prompt = len(engine.requests[-1].prompt_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (prompt, 8, prompt + 8)


def test_streams_give_what_whole_answers_give(client, engine):
    plain = {k: v for k, v in PLAIN.items() if k != "ignore_eos"}
    whole = client.completions.create(**plain).choices[0].text
    chunks = list(client.completions.create(**plain, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "length" and len({chunk.id for chunk in chunks}) == 1
    said = client.chat.completions.create(**TALK)
    assert said.choices[0].message.role == "assistant" and said.choices[0].message.content == text_of(engine)
    chunks = list(client.chat.completions.create(**TALK, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant" and chunks[0].choices[0].delta.content == ""
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said.choices[0].message.content
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_several_prompts_and_answers(client, engine):
    answer = client.completions.create(model="fake", prompt=["the river", "a stone", [5, 6]], n=2, max_tokens=4, seed=9)
    assert [choice.index for choice in answer.choices] == list(range(6))
    assert [choice.text for choice in answer.choices] == [text_of(engine, i) for i in range(-6, 0)]
    assert [r.sampling.seed for r in engine.requests[-6:]] == [9, 10] * 3
    assert answer.usage.completion_tokens == 24 and answer.usage.prompt_tokens == sum(len(r.prompt_ids) for r in engine.requests[-6::2])
    texts = [""] * 6
    for chunk in client.completions.create(model="fake", prompt=["the river", "a stone", [5, 6]], n=2, max_tokens=4, seed=9, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in answer.choices]


def test_stop_strings_echo_and_truncation(client, engine):
    full = client.completions.create(model="fake", prompt="the river", max_tokens=40, seed=3).choices[0].text
    stop = full[len(full) // 2 :][:3]
    answer = client.completions.create(model="fake", prompt="the river", max_tokens=40, seed=3, stop=[stop, "never"], echo=True)
    assert answer.choices[0].text == "the river" + full[: full.index(stop)]
    assert answer.choices[0].finish_reason == "stop" and answer.choices[0].stop_reason == stop
    raw = client.completions.with_raw_response.create(model="fake", prompt=[5, 6, 7, 8], max_tokens=1, extra_body={"truncate_prompt_tokens": 1})
    assert engine.requests[-1].prompt_ids == (8,) and raw.headers["x-truncated-prompt-tokens"] == "3"
    assert raw.parse().usage.prompt_tokens_details.truncated_tokens == 3


def test_logprobs(client):
    shown = client.completions.create(model="fake", prompt="the", max_tokens=3, logprobs=2).choices[0].logprobs
    assert len(shown.tokens) == len(shown.token_logprobs) == len(shown.top_logprobs) == len(shown.text_offset) == 3
    assert all(len(top) == 2 for top in shown.top_logprobs)
    for stream in (False, True):
        answer = client.chat.completions.create(**TALK, logprobs=True, top_logprobs=2, stream=stream)
        choices = [chunk.choices[0] for chunk in answer] if stream else answer.choices
        tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
        assert len(tokens) == 8 and all(len(token.top_logprobs) == 2 and token.bytes for token in tokens)


def test_formats_reach_the_engine(client, engine):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    client.chat.completions.create(**TALK, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert engine.requests[-1].grammar == ("json_schema", json.dumps(schema))
    client.chat.completions.create(**TALK, extra_body={"guided_choice": ["a"], "min_tokens": 2})
    assert engine.requests[-1].grammar == ("choice", '["a"]') and engine.requests[-1].min_new_tokens == 2


def test_models(client):
    assert [model.id for model in client.models.list()] == ["fake"] and client.models.retrieve("fake").max_model_len == 256
    for call in (lambda: client.models.retrieve("a/b"), lambda: client.completions.create(model="other", prompt="a")):
        with pytest.raises(openai.NotFoundError, match="there is no model"):
            call()


def test_the_client_sees_refusals(client):
    with pytest.raises(openai.BadRequestError) as error:
        client.chat.completions.create(**TALK, tools=[{"type": "function", "function": {"name": "f", "parameters": {}}}])
    assert error.value.param == "tools" and "isn't supported" in error.value.message
    with pytest.raises(openai.BadRequestError, match="positions"):
        client.completions.create(model="fake", prompt="the river", max_tokens=256)
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model="fake", prompt=[5000])


# Without it.


def test_curl_streams(url, engine):
    curl = shutil.which("curl")
    if curl is None:  # a machine without it has nothing to show
        return
    command = [curl, "-sSN", "--fail", url + "/v1/completions", "-H", "content-type: application/json", "-d", json.dumps(PLAIN | {"stream": True})]
    output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    events = output.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])
    assert "".join(json.loads(event[6:])["choices"][0]["text"] for event in events[:-2]) == text_of(engine)


REFUSALS = {
    "no_path": ("GET", "/nope", {}, b"", 404),
    "wrong_method": ("GET", "/v1/completions", {}, b"", 405),
    "wrong_method_post": ("POST", "/health", {}, b"{}", 405),
    "no_content_type": ("POST", "/v1/completions", {}, b"{}", 415),
    "form": ("POST", "/v1/completions", {"content-type": "application/x-www-form-urlencoded"}, b"{}", 415),
    "gzip": ("POST", "/v1/completions", {"content-type": "application/json", "content-encoding": "gzip"}, b"{}", 415),
    "broken_json": ("POST", "/v1/completions", {"content-type": "application/json"}, b'{"model":', 400),
    "no_json_utf8": ("POST", "/v1/chat/completions", {"content-type": "application/json; charset=utf-8"}, b"\xff\xfe", 400),
}


@pytest.mark.parametrize(("method", "path", "headers", "body", "status"), REFUSALS.values(), ids=REFUSALS)
def test_refusals_have_a_status_and_a_body(url, method, path, headers, body, status):
    answer = httpx.request(method, url + path, headers=headers, content=body)
    error = answer.json()["error"]
    assert answer.status_code == status and set(error) == {"message", "type", "param", "code"} and error["message"]


def test_health_version_and_metrics(url, client):
    assert httpx.get(url + "/health").json()["status"] == "ok"
    assert set(httpx.get(url + "/version").json()) == {"version"}
    client.completions.create(model="fake", prompt="the", max_tokens=2)
    page = httpx.get(url + "/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    for line in ('jaxmoe:kv_pages{state="held"} 0.0', "jaxmoe:num_requests_running 0.0", 'jaxmoe:kv_swap_bytes_total{direction="in"} 5.0'):
        assert line in page.text.splitlines()


def test_an_idle_server_does_not_spin(url, engine):
    wait_for(lambda: engine.idle)
    steps, began = engine.steps, time.process_time()
    time.sleep(0.3)
    assert engine.steps == steps and time.process_time() - began < 0.15


def test_no_chat_template(tmp_path):
    shutil.copy(MODEL_FOLDER / "tokenizer.json", tmp_path)
    with running(FakeEngine(folder=tmp_path)) as url:
        answer = httpx.post(url + "/v1/chat/completions", json=TALK)
        assert answer.status_code == 400 and "no chat template" in answer.json()["error"]["message"]
        assert httpx.post(url + "/v1/completions", json=PLAIN).status_code == 200


def test_keys():
    with running(FakeEngine(), api_keys=("first", "second")) as url:
        for headers, status in (({}, 401), ({"authorization": "Bearer wrong"}, 401), ({"authorization": "Basic first"}, 401),
                                ({"authorization": "Bearer first"}, 200), ({"authorization": "bearer second"}, 200)):  # fmt: skip
            answer = httpx.post(url + "/v1/completions", json=PLAIN, headers=headers)
            assert answer.status_code == status and ("www-authenticate" in answer.headers) == (status == 401)
            assert httpx.get(url + "/v1/models", headers=headers).status_code == status
        assert httpx.get(url + "/health").status_code == 200
        with pytest.raises(openai.AuthenticationError), openai.OpenAI(base_url=url + "/v1", api_key="wrong") as client:
            client.models.list()


def test_too_big_bodies_announced_and_not():
    with running(FakeEngine(), max_body_bytes=10_000) as url:
        body = json.dumps(PLAIN | {"user": "u" * 200_000}).encode()
        headers = {"content-type": "application/json"}
        assert httpx.post(url + "/v1/completions", content=body, headers=headers).status_code == 413
        chunks = (body[i : i + 1000] for i in range(0, len(body), 1000))
        answer = httpx.post(url + "/v1/completions", content=chunks, headers=headers)
        assert answer.status_code == 413 and "more than 10000 bytes" in answer.json()["error"]["message"]


def test_slow_bodies_and_headers_time_out():
    with running(FakeEngine(), body_seconds=0.2, header_seconds=0.3) as url:
        place = urllib.parse.urlsplit(url)
        with socket.create_connection((place.hostname, place.port), timeout=5) as slow:
            slow.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{")
            assert slow.recv(1000).startswith(b"HTTP/1.1 408 ")
        with socket.create_connection((place.hostname, place.port), timeout=5) as silent:
            silent.sendall(b"POST /v1/com")
            with contextlib.suppress(ConnectionResetError):
                assert silent.recv(1000) == b""
        with httpx.Client() as patient:  # a connection that did send its headers stays
            assert [patient.get(url + "/health").status_code for _ in range(2) if not time.sleep(0.4)] == [200, 200]


def test_full_queues():
    with running(FakeEngine(running=1, waiting=1, step_seconds=0.01), max_concurrent=4, retry_seconds=7) as url:
        answers = []

        def post():
            answers.append(httpx.post(url + "/v1/completions", json=PLAIN, timeout=20))

        threads = [threading.Thread(target=post) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {answer.status_code for answer in answers} == {200, 429}
        busy = [answer for answer in answers if answer.status_code == 429]
        assert all(answer.headers["retry-after"] == "7" and answer.json()["error"]["type"] == "rate_limit_error" for answer in busy)
        assert {answer.json()["error"]["code"] for answer in busy} <= {"queue_full", "too_many_requests"}
        answer = httpx.post(url + "/v1/completions", json=PLAIN | {"prompt": ["a", "b", "c"]})
        assert answer.status_code == 429 and answer.json()["error"]["code"] == "queue_full", "three prompts never fit; none may run"
        assert httpx.post(url + "/v1/completions", json=PLAIN).status_code == 200


def test_requests_take_only_so_long():
    engine = FakeEngine(step_seconds=0.02)
    with running(engine, request_seconds=0.3) as url:
        answer = httpx.post(url + "/v1/completions", json=PLAIN | {"max_tokens": 200})
        assert answer.status_code == 504 and answer.json()["error"]["code"] == "timeout"
        with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.APIError, match="longer than 0.3 seconds"):
                list(client.completions.create(model="fake", prompt="a", max_tokens=200, stream=True))
        wait_for(lambda: not engine.live)
        assert httpx.post(url + "/v1/completions", json=PLAIN | {"max_tokens": 1}).status_code == 200


# Clients that go, and clients that don't read.


def test_200_clients_that_go():
    """Streams, whole answers, several of either, and requests that still wait: nothing of them stays in the engine."""
    engine = FakeEngine(step_seconds=0.001, running=8, waiting=400, positions=1024)
    draw = random.Random(0)

    async def go(host, port, many):
        body = PLAIN | {"max_tokens": 900, "stream": draw.random() < 0.5}
        if draw.random() < 0.4:
            body |= {"n": 2} if draw.random() < 0.5 else {"prompt": ["a", "the", "river"]}
        with contextlib.suppress(TimeoutError):
            async with many, asyncio.timeout(draw.choice([0.01, 0.1, 0.2, 0.3])):
                headers = {"content-type": "application/json"}
                leave = draw.randint(1, 3000) if body["stream"] else None
                await exchange(host, port, "/v1/completions", headers, json.dumps(body).encode(), Reply(), leave_bytes=leave)

    async def all_of_them(place):
        many = asyncio.Semaphore(24)
        await asyncio.gather(*(go(place.hostname, place.port, many) for _ in range(200)))

    with running(engine) as url:
        asyncio.run(all_of_them(urllib.parse.urlsplit(url)))
        wait_for(lambda: not engine.live and httpx.get(url + "/health").json()["requests"] == 0)
        assert len(engine.requests) > 100, "most were admitted"
        metrics = read_metrics(Target(url, "fake", 1024))
        assert metrics['jaxmoe:requests_aborted_total{reason="disconnect"}'] > 100
        assert metrics['jaxmoe:kv_pages{state="held"}'] == 0
        assert httpx.post(url + "/v1/completions", json=PLAIN).json()["choices"][0]["text"] == text_of(engine)


def stuck_reader(url, body):
    """A client that sends a request and reads nothing."""
    place = urllib.parse.urlsplit(url)
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect((place.hostname, place.port))
    data = json.dumps(body).encode()
    sock.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(data) + data)
    return sock


def test_a_reader_that_does_not_read_is_cut_off_and_stops_nobody():
    engine = FakeEngine(positions=100_000, step_seconds=0.0005)
    with running(engine, buffer_bytes=100_000, send_buffer_bytes=4096, last_word_seconds=0.2) as url:
        with stuck_reader(url, PLAIN | {"max_tokens": 90_000, "stream": True, "logprobs": 20}) as sock:
            wait_for(lambda: engine.live)
            steps = engine.steps
            assert httpx.post(url + "/v1/completions", json=PLAIN).status_code == 200
            assert engine.steps > steps
            wait_for(lambda: not engine.live, 10)
            metrics = read_metrics(Target(url, "fake", 100_000))
            assert metrics['jaxmoe:requests_aborted_total{reason="slow_reader"}'] == 1
            wait_for(lambda: httpx.get(url + "/health").json()["requests"] == 0)
            sock.settimeout(5)
            with pytest.raises(ConnectionResetError):
                while sock.recv(65536):
                    pass


def test_a_slow_reader_that_comes_back_hears_why():
    engine = FakeEngine(positions=100_000, step_seconds=0.0005)
    with running(engine, buffer_bytes=100_000, send_buffer_bytes=4096, last_word_seconds=5) as url:
        with stuck_reader(url, PLAIN | {"max_tokens": 90_000, "stream": True, "logprobs": 20}) as sock:
            wait_for(lambda: engine.live)
            wait_for(lambda: not engine.live, 10)
            sock.settimeout(5)
            got = b""
            while not got.endswith(b"0\r\n\r\n"):
                got += sock.recv(65536)
            assert b"the client reads too slowly" in got and b"data: [DONE]" in got


# An engine that fails.


def test_an_engine_that_recovers_loses_only_what_it_had():
    engine = RecoveringEngine(step_seconds=0.005)
    with running(engine) as url:
        assert httpx.get(url + "/health").json()["status"] == "ok"
        for stream in (False, True):
            wait_for(lambda: engine.idle)
            engine.fail_next = RuntimeError("device out of memory: secret path")
            answer = httpx.post(url + "/v1/completions", json=PLAIN | {"stream": stream})
            error = json.loads(answer.text.split("\n\n")[-3][6:]) if stream else answer.json()
            assert answer.status_code == (200 if stream else 500)
            assert error["error"]["code"] == "engine_error" and "secret" not in answer.text
        health = httpx.get(url + "/health")
        assert (health.status_code, health.json()["status"]) == (200, "degraded") and engine.recoveries == 2
        assert httpx.post(url + "/v1/completions", json=PLAIN).json()["choices"][0]["text"] == text_of(engine)
        assert read_metrics(Target(url, "fake", 256))['jaxmoe:request_success_total{finished_reason="error"}'] == 2


def test_an_exception_that_names_its_requests_spares_the_others():
    engine = RecoveringEngine(step_seconds=0.01)
    with running(engine) as url:
        answers = []
        thread = threading.Thread(target=lambda: answers.append(httpx.post(url + "/v1/completions", json=PLAIN | {"max_tokens": 60}, timeout=20)))
        thread.start()
        wait_for(lambda: engine.live)
        spared = next(iter(engine.live))
        other = threading.Thread(target=lambda: answers.append(httpx.post(url + "/v1/completions", json=PLAIN | {"max_tokens": 90}, timeout=20)))
        other.start()
        wait_for(lambda: len(engine.live) == 2)
        error = RuntimeError("one shard")
        error.ids = [id for id in engine.live if id != spared]
        engine.fail_next = error
        thread.join()
        other.join()
        assert sorted(answer.status_code for answer in answers) == [200, 500]


def test_an_engine_that_cannot_recover_makes_the_server_say_so():
    engine = FakeEngine()
    with running(engine) as url:
        engine.fail_next = RuntimeError("lost")
        assert httpx.post(url + "/v1/completions", json=PLAIN).status_code == 500
        assert httpx.get(url + "/health").status_code == 503
        answer = httpx.post(url + "/v1/completions", json=PLAIN)
        assert answer.status_code == 503 and answer.json()["error"]["code"] == "engine_failed"
        assert httpx.get(url + "/metrics").status_code == 200
    assert engine.closed
