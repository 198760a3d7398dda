"""Measured serving: driving an engine on a made-up clock, ratios of made-up samples, a small model over a link. About 12 seconds."""

import dataclasses
import http.server
import json
import math
import threading
import types

import numpy as np
import pytest

from jaxmoe.engine.generate import RequestError
from jaxmoe.engine.serving.requests import Event, ServeRequest
from jaxmoe.offload.link import Link
from jaxmoe.report import serve_bench, serve_http, serve_judge, serve_open, serve_setups
from jaxmoe.report.serve_bench import Arm, Ready, Sample, Scene
from jaxmoe.report.serve_drive import Sent, check_drive, drive
from jaxmoe.report.serve_load import Job, Sizes
from tests.models import random_model, slot_model
from tests.quick import QuickKernels

# --- Driving


class Engine:
    """Gives each request a token a step, its prompt's first id counted up; a step takes a second of `clock`."""

    def __init__(self, fails: bool = False):
        self.now, self.live, self.gone, self.seen, self.fails = 0.0, {}, [], [], fails

    @property
    def idle(self):
        return not self.live and not self.gone

    def counters(self):
        return {"xla_compiles_after_warmup": 0}

    def submit(self, request):
        if not request.prompt_ids:
            raise RequestError("the prompt is empty")
        id = len(self.seen)
        self.seen.append((self.now, request))
        self.live[id] = 0
        return [id]

    def cancel(self, ids):
        self.gone += [id for id in ids if self.live.pop(id, None) is not None]

    def step(self):
        self.now += 1.0
        events, self.gone = [Event(id, finish_reason="abort") for id in self.gone], []
        if self.fails:
            return [Event(id, finish_reason="error", error="out of luck") for id in self.live]
        for id in list(self.live):
            request = self.seen[id][1]
            self.live[id] += 1
            over = self.live[id] == request.max_new_tokens
            events.append(Event(id, (request.prompt_ids[0] + self.live[id],), finish_reason="length" if over else None))
            if over:
                del self.live[id]
        return events

    def sleep(self, seconds):
        self.now += seconds


def run(engine, sent, **more):
    return drive(engine, sent, clock=lambda: engine.now, sleep=engine.sleep, **more)


def test_an_open_loop_counts_from_when_a_request_was_due():
    engine = Engine()
    sent = [Sent(ServeRequest((10,), 3), 0.0), Sent(ServeRequest((20,), 2), 0.5), Sent(ServeRequest((30,), 1), 10.0)]
    found = run(engine, sent)
    assert [at for at, _ in engine.seen] == [0.0, 1.0, 10.0], "taken in after the step that runs, and the engine sleeps until the last is due"
    assert [s.arrived for s in found.served] == [0.0, 0.5, 10.0] and [s.ttft for s in found.served] == [1.0, 1.5, 1.0]
    assert found.tokens == ((11, 12, 13), (21, 22), (31,)) and all(s.done for s in found.served)
    assert found.seconds == 11.0 and found.compiles == 0


def test_prompts_come_once_streams_are_calm_and_streams_end_with_them():
    engine, marks = Engine(), []
    sent = [Sent(ServeRequest((10,), 50)), Sent(ServeRequest((20,), 50)), *[Sent(ServeRequest((30 + i,), 2), calm=4) for i in range(2)]]
    found = run(engine, sent, enough=(2, 3), submitted=lambda i: marks.append((i, engine.now)))
    assert marks == [(0, 0.0), (1, 0.0), (2, 4.0), (3, 4.0)]
    assert [s.done for s in found.served] == [False, False, True, True] and [s.tokens for s in found.served] == [6, 6, 2, 2]
    assert found.served[2].arrived == 4.0 and engine.idle


def test_a_drive_refuses_what_would_not_be_a_measurement():
    engine = Engine()
    with pytest.raises(ValueError, match="order of their times"):
        run(engine, [Sent(ServeRequest((1,), 1), 2.0), Sent(ServeRequest((1,), 1), 1.0)])
    with pytest.raises(RequestError, match="empty"):
        run(engine, [Sent(ServeRequest((), 1))])
    engine.submit(ServeRequest((1,), 1))
    with pytest.raises(ValueError, match="other work"):
        run(engine, [])
    with pytest.raises(RuntimeError, match="request 0 ended with an error: out of luck"):
        run(Engine(fails=True), [Sent(ServeRequest((1,), 1))])
    found = run(Engine(), [Sent(ServeRequest((1,), 1))])
    with pytest.raises(RuntimeError, match="x: 3 programs were compiled"):
        check_drive(dataclasses.replace(found, compiles=3), "x")


# --- Numbers


def sample(gap=1.0, prompt=100, ttft=(1.0, 3.0), tokens=((1,), (2,), (5, 6, 7))):
    return Sample(ttft, gap, (0.2, 0.3, 0.4), prompt, 2 * prompt, max(ttft), tokens)


def test_ratios_are_paired_by_round():
    found = serve_judge.paired([1, 2, 30], [2, 4, 60])
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)
    spread = serve_judge.paired([1, 2, 3, 4, 5], [1, 1, 1, 1, 1])
    assert spread.low < spread.value == 3 < spread.high
    rows = {"a": [serve_judge.numbers(sample(gap=1.0), 10)] * 2, "b": [serve_judge.numbers(sample(gap=4.0, prompt=0), 10)] * 2}
    beside = serve_judge.beside(rows, "a", ["b"])
    assert beside["gap_worst / b"] == {"value": 0.25, "low": 0.25, "high": 0.25} and beside["ttft_mean / b"]["value"] == 1.0
    assert "prompt_bytes / b" not in beside, "a ratio to nothing says nothing"


def test_an_arm_beside_the_cost_model():
    setting = serve_judge.Setting(100, 1000, 1e-4, True, {})  # 10^5 bytes a second
    ready = Ready(Arm("layered, 4", "layered", 4), Scene("x", 2, 64), None, compute=0.5)
    found = serve_judge.judge(ready, [sample(gap=0.67)], setting)
    assert found["once"] == 1.0 and found["rho"] == 2.0
    assert found["gap_bound"] == pytest.approx(0.4 + 1.1 * 0.25) and found["gap_holds"]
    assert found["gap_bound_typical"] == pytest.approx(0.3 + 1.1 * 0.25)
    assert found["gap_model_overlapped"] == pytest.approx(0.4 + 0.25) and found["gap_model_serial"] == pytest.approx(0.4 + 1.5 / 4)
    assert not serve_judge.judge(ready, [sample(gap=0.68)], setting)["gap_holds"]
    assert not serve_judge.judge(ready, [sample(gap=0.9)], setting)["gap_model_holds"]
    whole = serve_judge.judge(dataclasses.replace(ready, arm=Arm("whole", "whole")), [sample()], setting)
    assert whole["gap_bound"] == pytest.approx(0.4 + 1.1 / 2), "two prompts, one after another"
    chunks = dataclasses.replace(ready, arm=Arm("chunked, 32", "chunked", chunk=32), compute=None)
    found = serve_judge.judge(chunks, [sample()], setting)
    assert found["gap_bound"] == pytest.approx(0.4 + 1.1 / 4) and "rho" not in found


def test_arms_must_give_the_same_tokens():
    scene = Scene("x", 2, 64, streams=1)
    serve_bench.check_tokens(scene, {"a": sample(), "b": sample(tokens=((1,), (2,), (5, 6)))})
    for wrong in (((1,), (3,), (5, 6, 7)), ((1,), (2,), (5, 9)), ((1,), (), (5, 6, 7))):
        with pytest.raises(RuntimeError, match="'a' and 'b' gave request"):
            serve_bench.check_tokens(scene, {"a": sample(), "b": sample(tokens=wrong)})


def test_sizes_fit_what_is_to_run():
    scene = Scene("x", 4, 1000, streams=3)
    arms = serve_bench.arms((4, 8), (256, 128))
    assert [a.name for a in arms] == ["layered, 4", "layered, 8", "chunked, 256", "chunked, 128", "whole"]
    for arm in arms:
        spec = serve_bench.spec_for(arm, scene, serve_setups.smallest(arms))
        assert spec.slots == spec.batch == 7 and spec.pages == 7 * spec.table and spec.wave == 4 * 1024 and spec.groups == arm.groups
        assert spec.positions >= max(1004, 32 + scene.stream_new(128)) and spec.chunk - 7 >= arm.chunk
    texts = serve_setups.random_texts(50)
    sent = serve_bench.requests_of(scene, texts, 128, 1)
    assert sent == serve_bench.requests_of(scene, texts, 128, 1) != serve_bench.requests_of(scene, texts, 128, 2)
    assert [s.calm for s in sent] == [0] * 3 + [16] * 4 and len({s.request.prompt_ids[:9] for s in sent}) == 7


def test_passages_of_a_text():
    class Words:
        def encode(self, text):
            return [int(word) for word in text.split()]

    texts = serve_setups.passages(Words(), " ".join(map(str, range(100))))
    assert texts(0, 3) == (0, 1, 2) and texts(0, 120)[99:102] == (99, 0, 1) and texts(1, 3) == (61, 62, 63)
    with pytest.raises(ValueError, match="empty"):
        serve_setups.passages(Words(), "")


# --- A small model


@pytest.fixture(scope="module")
def model():
    return slot_model(random_model("olmoe", unroll=False, kernels=QuickKernels("cpu")), 2)


def test_layers_by_groups_bring_each_expert_once_over_a_link(model):
    arms = (Arm("layered, 2", "layered", 2), Arm("chunked, 32", "chunked", chunk=32))
    scene = Scene("2 together", 2, 96, 1, 1, 8, 6)
    ready = serve_setups.linked(model, np.asarray(model.bank.store), arms, [scene], 0.02)
    told = []
    samples = serve_bench.rounds(ready, serve_setups.random_texts(96), 2, 32, told.append)["2 together"]
    assert told[-2:] == ["round 2 of 2: 2 together, chunked, 32", "round 2 of 2: 2 together, layered, 2"], "the order is turned round"
    layered, chunked = samples["layered, 2"], samples["chunked, 32"]
    experts = len(model.bank.slots) * model.bank.experts
    assert all(0.5 * experts <= s.prompt_loads <= experts for s in layered), "some are there already"
    assert all(c.prompt_loads >= 5 * l.prompt_loads for c, l in zip(chunked, layered, strict=True)), "six chunks"
    assert all(s.all_loads > s.prompt_loads for s in layered) and all(len(s.ttft) == 2 for s in layered + chunked)
    assert all(math.isfinite(s.gap) and s.gap >= min(s.calm) > 0 and s.seconds == max(s.ttft) for s in layered + chunked)
    assert all(r.compute is not None and 0 < r.compute < r.warm_seconds and r.link.gbps == 0.02 for r in ready)
    setting = serve_judge.Setting(experts, model.bank.record_bytes, 0.02, True, {"model": "small"})
    made = serve_judge.records(ready, samples={"2 together": samples}, setting=setting, name="serve_link")
    assert list(made) == ["serve_link-2-together-layered-2", "serve_link-2-together-chunked-32"]
    one = made["serve_link-2-together-layered-2"]
    assert one["bound"]["kind"] == "overlapped" and 0 < one["bound"]["percent"] <= 100 and one["counters"]["compiles"] == 0
    assert one["bytes"]["prompt_bytes"] <= one["bytes"]["once"] and one["settings"]["link_emulated"] is True
    assert one["counters"]["ttft_worst / chunked, 32"]["value"] > 0 and json.dumps(made)
    texts = [text for text, _ in serve_judge.claims(made)]
    assert any("brings" in text and "at most 1.05" in text for text in texts) and any("below 1 throughout" in text for text in texts)


def test_an_open_loop_with_its_control(model):
    engines = {name: Engine() for name in (serve_open.OWN, serve_open.CONTROL)}
    load = serve_open.Load(8, Sizes(8, 0.2, 4, 12), Sizes(6, 0.2, 4, 8))
    for engine in engines.values():
        engine.runner, engine.spec = types.SimpleNamespace(model=model), serve_open.spec_of(load)
    told = []
    prepared = {name: serve_open.Prepared(engine, Link(0.1)) for name, engine in engines.items()}
    made = [r for some in serve_open.open_records(prepared, None, load, (0.01, 0.02), {"model": "m"}, told.append) for r in some]
    assert [what.split(":")[0] for what in told[1:]] == [serve_open.OWN, serve_open.CONTROL, serve_open.CONTROL, serve_open.OWN], "in turn"
    assert [serve_open.stem(r) for r in made[:2]] == ["serve_open-m-layered, swap-0.01", "serve_open-m-chunked, recompute-0.01"]
    for r in made:
        c = r["counters"]
        assert c["done"] == c["requests"] == 8 and r["bound"]["kind"] == "capacity" and c["rate"] == pytest.approx(r["settings"]["rate"])
        assert ("tokens_per_second / control" in c) == (r["settings"]["arm"] == serve_open.OWN) and c["compiles"] == 0
    engines[serve_open.OWN].step = lambda: [dataclasses.replace(e, ids=(1,) * len(e.ids)) for e in Engine.step(engines[serve_open.OWN])]
    with pytest.raises(RuntimeError, match="the arms gave different tokens"):
        next(serve_open.open_records(prepared, None, load, (0.02,), {"model": "m"}))


# --- Over HTTP


class Answers(http.server.BaseHTTPRequestHandler):
    """A server of streams: as many events as tokens, unless the seed says otherwise."""

    def do_GET(self):
        self._send(200, json.dumps({"data": [{"id": "m"}]}).encode())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append((body, self.headers.get("authorization")))
        if body["seed"] == 3:
            return self._send(400, b'{"error": {"message": "too long"}}')
        tokens = body["max_tokens"] - (body["seed"] == 4)
        texts = ["x"] * tokens if body["seed"] != 2 else ["x", "", *["y"] * (tokens - 3)]  # some tokens have no text, some come together
        events = [{"choices": [{"text": text}], "usage": None} for text in texts] + [{"choices": [], "usage": {"completion_tokens": tokens}}]
        data = b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"
        self._send(200, data)

    def _send(self, status, data):
        self.send_response(status)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.seen = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_requests_over_http(address):
    server = serve_http.find_model(serve_http.Server(f"http://127.0.0.1:{address.server_port}", "k"))
    assert server.model == "m"
    jobs = [Job(0.02 * i, (5, 6, 7), 4, i) for i in range(5)]
    served, wrong = serve_http.send_all(server, jobs)
    assert [s.done for s in served] == [True, True, True, False, False] and [s.tokens for s in served] == [4, 4, 4, 0, 3]
    assert [s.arrived for s in served] == [job.arrival for job in jobs] and all(s.ttft > 0 for s in served[:3])
    assert len(served[2].events) == 2 and served[2].events[-1][1] == 3, "tokens without text of their own count with the last"
    assert wrong == ["3 tokens of the 4 that were asked for", 'status 400: {"error": {"message": "too long"}}']
    body, key = address.seen[0]
    assert key == "Bearer k" and body["prompt"] == [5, 6, 7] and body["ignore_eos"] and body["stream_options"] == {"include_usage": True}


def test_records_of_a_server(address):
    server = serve_http.Server(f"http://127.0.0.1:{address.server_port}")
    load = serve_open.Load(6, Sizes(8, 0.2, 4, 12), Sizes(6, 0.2, 4, 8))
    made = [r for some in serve_open.url_records(server, load, (50.0, 200.0)) for r in some]
    assert [serve_open.stem(r) for r in made] == ["serve_open-m-server-50", "serve_open-m-server-200"]
    for r in made:
        assert r["name"] == "serve_open" and r["counters"]["requests"] == 6 and r["counters"]["done"] == 4, "two seeds are refused or cut short"
        assert r["bound"]["kind"] == "capacity" and r["bound"]["ceiling"] == r["settings"]["rate"] and len(r["settings"]["problems"]) == 2
        assert "ttft mean / control" in r["counters"] and 0 <= r["counters"]["tpot_x4"]["attainment"] <= 4 / 6
    assert set(serve_open.best(made, 2.0)) == {"server"} and serve_open.table(made).row_count == 2
    with pytest.raises(ValueError, match="no address of a server"):
        next(serve_open.url_records(serve_http.Server("127.0.0.1:80"), load, (1.0,)))
    with pytest.raises(OSError):
        next(serve_open.url_records(serve_http.Server("http://127.0.0.1:9"), load, (1.0,)))
