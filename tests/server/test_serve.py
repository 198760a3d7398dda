"""The server as a process: its address, a storm of clients, its end on signals, and settings that it refuses. About 9 seconds."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxmoe.report.command import run_command
from jaxmoe.report.serve_storm import KINDS, REFUSED, Outcome, Shot, StormReport, Target, judge, make_shots, percentile, storm, storm_lines
from jaxmoe.server.metrics import GAUGES, HISTOGRAMS, TOTALS, Metrics, kv_usage
from jaxmoe.server.raw_client import Reply
from jaxmoe.server.serve import run_server, serving, statistics_line
from jaxmoe.server.settings import ServerSettings, is_loopback
from tests.server.fake_engine import FakeEngine

PROGRAM = Path(__file__).with_name("run_fake.py")
PLAIN = {"model": "fake", "prompt": "the river", "max_tokens": 8, "seed": 3}


class Running:
    """The server in a process of its own."""

    def __init__(self, **settings):
        command = [sys.executable, str(PROGRAM), json.dumps({"port": 0} | settings)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines = []

    def __enter__(self):
        self.lines.append(self.process.stderr.readline())
        found = re.search(r"http://127\.0\.0\.1:\d+$", self.lines[0].strip())
        assert found, self.lines[0] + self.process.stderr.read()
        self.url = found[0]
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()
        self.process.stderr.close()

    def end(self, seconds=15):
        """Waits for the end; its exit code, and all that it said."""
        code = self.process.wait(seconds)
        return code, "".join(self.lines) + self.process.stderr.read()


def post_in_thread(url, answers, **fields):
    thread = threading.Thread(target=lambda: answers.append(httpx.post(url + "/v1/completions", json=PLAIN | fields, timeout=30)))
    thread.start()
    return thread


def wait_for_requests(url, count):
    end = time.monotonic() + 5
    while httpx.get(url + "/health").json()["requests"] != count:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def processes():
    """All the servers of this file, begun together, since each takes seconds to import what it needs."""
    return {
        "storm": Running(api_keys=["k"], drain_seconds=20, log_seconds=0.5),
        "late": Running(drain_seconds=0.3, step_seconds=0.02),
        "stubborn": Running(drain_seconds=60, step_seconds=0.02),
    }


def test_a_storm_from_another_process_and_a_graceful_end(processes):
    with processes["storm"] as server:
        report = asyncio.run(storm(Target(server.url, "fake", 4096, "k"), clients=32, requests=400))
        assert not report.problems, "\n".join(storm_lines(report))
        results = {outcome.result for outcome in report.outcomes}
        assert {"answered", "refused", "left"} <= results <= {"answered", "refused", "left", "busy", "cut"}
        assert set(report.statuses) >= {200, 400, 401, 404, 413} and len(report.outcomes) == 400
        headers = {"authorization": "Bearer k"}
        with httpx.Client(headers=headers, timeout=20) as client:
            with client.stream("POST", server.url + "/v1/completions", json=PLAIN | {"max_tokens": 150, "stream": True}) as stream:
                lines = stream.iter_lines()
                next(lines)
                server.process.send_signal(signal.SIGTERM)
                end = time.monotonic() + 5
                while (answer := httpx.post(server.url + "/v1/completions", json=PLAIN, headers=headers)).status_code == 200:
                    assert time.monotonic() < end
                assert answer.status_code == 503 and "retry-after" in answer.headers and answer.json()["error"]["code"] == "shutting_down"
                health = httpx.get(server.url + "/health")
                assert health.status_code == 503 and health.json()["status"] == "draining"
                rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]" and json.loads(rest[-2][6:])["choices"][0]["finish_reason"] == "length"
        code, said = server.end()
        assert code == 0 and "no more requests are taken" in said and "Traceback" not in said, said
        assert re.search(r"generation [1-9][\d.]* tok/s, running \d+, waiting \d+, swapped 0, KV [\d.]+%, expert hits 75.0%", said), said


def test_a_drain_ends_what_takes_too_long_and_a_second_signal_ends_all(processes):
    with processes["late"] as late, processes["stubborn"] as stubborn:
        answers = []
        thread = post_in_thread(late.url, answers, max_tokens=4000)
        wait_for_requests(late.url, 1)
        late.process.send_signal(signal.SIGINT)
        with httpx.stream("POST", stubborn.url + "/v1/completions", json=PLAIN | {"max_tokens": 4000, "stream": True}) as stream:
            next(stream.iter_raw())
            stubborn.process.send_signal(signal.SIGTERM)
            stubborn.lines.append(stubborn.process.stderr.readline())
            began = time.monotonic()
            stubborn.process.send_signal(signal.SIGTERM)
            assert stubborn.end(5)[0] == 130 and time.monotonic() - began < 2
        thread.join()
        assert answers[0].status_code == 503 and answers[0].json()["error"]["code"] == "shutting_down"
        code, said = late.end()
        assert code == 0 and "Traceback" not in said, said


def test_a_user_error_is_one_line(capsys):
    assert run_command(lambda: run_server(FakeEngine(), ServerSettings(host="0.0.0.0"))) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: host '0.0.0.0'") and said.count("\n") == 1


# In this process.


def test_addresses():
    for host, loopback in (("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("", False),
                           ("::", False), ("192.0.2.1", False), ("no-such-host.invalid", False)):  # fmt: skip
        assert is_loopback(host) == loopback, host
        if not loopback:
            with pytest.raises(ValueError, match="no API key"):
                ServerSettings(host=host).check()
            ServerSettings(host=host, api_keys=("k",)).check()
            ServerSettings(host=host, allow_public=True).check()


WRONG = [{"port": 70000}, {"port": -1}, {"max_body_bytes": 0}, {"max_choices": 0}, {"request_seconds": -1.0}, {"drain_seconds": float("nan")}]
WRONG += [{"api_keys": (key,)} for key in ("", "a b ", "\u00e9")]


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_settings_that_cannot_be_used(wrong):
    with pytest.raises(ValueError, match="API key" if "api_keys" in wrong else next(iter(wrong))):
        ServerSettings(**wrong).check()


def test_a_port_that_is_taken():
    with serving(FakeEngine(), ServerSettings(port=0)) as url:
        with pytest.raises(OSError, match="can't listen on 127.0.0.1:"):
            with serving(FakeEngine(), ServerSettings(port=int(url.rpartition(":")[2]))):
                pass


def test_every_counter_of_the_table_is_shown():
    metrics = Metrics()
    histogram = {"bounds": [1, 2], "counts": [3, 0, 4], "sum": 20.0}
    counters = {name: {"a": 1, "b": 2} if label else 3 for table in (TOTALS, GAUGES) for name, (_, label, _) in table.items()}
    metrics.snapshot = counters | {name: histogram for name in HISTOGRAMS} | {"of its own": 7, "pages": {"free": 1, "cached": 2, "held": 1}}
    page = {family.name: family for family in text_string_to_metric_families(metrics.page().decode())}
    for name, (metric, label, _) in (TOTALS | GAUGES).items():
        samples = page["jaxmoe:" + metric].samples
        assert len(samples) == (1 if not label else 3 if name == "pages" else 2), name
        assert all(set(sample.labels) == ({label} if label else set()) for sample in samples)
    for name in HISTOGRAMS:
        samples = page["jaxmoe:" + HISTOGRAMS[name][0]].samples
        assert [s.value for s in samples if s.name.endswith("_bucket")] == [3, 3, 7] and samples[-1].value == 20.0
    assert page["jaxmoe:engine_of_its_own"].samples[0].value == 7 and page["jaxmoe:kv_cache_usage_perc"].samples[0].value == 0.25
    assert kv_usage({}) is None


def test_the_line_of_statistics():
    line = statistics_line({"running": 2, "prefix_hits": 1, "prefix_queries": 4}, {"prompt": 30, "generation": 5}, {"prompt": 10}, 10)
    assert line == "prompt 2.0 tok/s, generation 0.5 tok/s, running 2, prefix hits 25.0%"


# The storm itself.


def shot(kind, **fields):
    return Shot(**({"kind": kind, "prompts": ("a",), "n": 1, "tokens": 3, "seed": 0, "leave": 0.9} | fields))


def reply(status, body, headers=None, complete=True):
    return Reply(status, headers or {}, body if isinstance(body, bytes) else json.dumps(body).encode(), 0.0, complete)


WHOLE = {"choices": [{"index": 0, "finish_reason": "length"}], "usage": {"completion_tokens": 3}}
STREAM = {"content-type": "text/event-stream; charset=utf-8"}
EVENT = b"data: " + json.dumps(WHOLE).encode() + b"\n\n"
JUDGED = {
    "right": (shot("whole"), reply(200, WHOLE), "", "answered"),
    "streamed": (shot("stream"), reply(200, EVENT + b"data: [DONE]\n\n", STREAM), "", "answered"),
    "no_done": (shot("stream"), reply(200, EVENT, STREAM), "", "wrong"),
    "error_in_stream": (shot("stream"), reply(200, b'data: {"error": {}}\n\ndata: [DONE]\n\n', STREAM), "", "wrong"),
    "too_few_tokens": (shot("whole", tokens=4), reply(200, WHOLE), "", "wrong"),
    "missing_choice": (shot("several", n=2), reply(200, WHOLE), "", "wrong"),
    "bad_end": (shot("whole"), reply(200, {"choices": [{"index": 0, "finish_reason": "abort"}]}), "", "wrong"),
    "server_error": (shot("whole"), reply(500, {"error": {"message": "x"}}), "", "wrong"),
    "never": (shot("whole"), reply(0, b"", complete=False), "no answer", "wrong"),
    "broken_off": (shot("whole"), reply(200, b"", complete=False), "", "wrong"),
    "busy": (shot("whole"), reply(429, b"", {"retry-after": "1"}), "", "busy"),
    "busy_without_retry": (shot("whole"), reply(429, b""), "", "wrong"),
    "refused": (shot("too_long"), reply(400, {"error": {"message": "x"}}), "", "refused"),
    "refused_bare": (shot("too_long"), reply(400, b"no"), "", "wrong"),
    "wrong_refusal": (shot("wrong_key"), reply(400, {"error": {"message": "x"}}), "", "wrong"),
    "not_refused": (shot("too_long"), reply(200, WHOLE), "", "wrong"),
    "left": (shot("leave_whole"), reply(0, b"", complete=False), "", "left"),
    "cut": (shot("slow"), reply(200, b"", STREAM, complete=False), "", "cut"),
}


@pytest.mark.parametrize(("made", "got", "error", "result"), JUDGED.values(), ids=JUDGED)
def test_the_storm_sees_what_is_wrong(made, got, error, result):
    found, problem, _ = judge(made, got, error)
    assert found == result and bool(problem) == (result == "wrong")


def test_storms_are_the_same_for_a_seed_and_report_what_stays_behind():
    target = Target("http://x", "m", 10, "k")
    shots = make_shots(400, target, 1)
    assert shots == make_shots(400, target, 1) != make_shots(400, target, 2)
    assert {made.kind for made in shots} == set(KINDS) >= set(REFUSED)
    assert not {"chat", "wrong_key"} & {made.kind for made in make_shots(400, Target("http://x", "m", 10, chat=False), 1)}
    report = StormReport((Outcome("whole", "answered", 200, 1.0, tokens=3),), 2.0, {}, {'jaxmoe:kv_pages{state="held"}': 4.0})
    assert report.problems == ['afterwards jaxmoe:kv_pages{state="held"} is 4, not 0'] and report.counts == {"whole": {"answered 200": 1}}
    assert [percentile([4, 1, 3, 2], q) for q in (25, 50, 99, 100)] == [1, 2, 4, 4]
