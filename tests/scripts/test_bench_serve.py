"""The benchmark of serving from the command line: records and tables of each tier, and one line for what is wrong. About 8 seconds."""

import dataclasses
import json

import pytest

from jaxmoe.report import record, serve_bench, serve_device, serve_http, serve_judge, serve_open, serve_setups, serve_storm, serve_virtual
from jaxmoe.report.serve_bench import Ready, Sample
from tests.scripts import commands

bench = commands.load("bench_serve")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Converted once."""
    return tmp_path_factory.mktemp("cache")


def test_virtual_time(tmp_path, monkeypatch):
    monkeypatch.setattr(serve_virtual, "COMPARISONS", {"preemption": lambda setup: serve_virtual.preemption(setup, requests=3, new=64)})
    monkeypatch.setattr(serve_virtual, "REUSES", (0.45,))
    monkeypatch.setattr(serve_virtual.virtual_records, "__defaults__", (0, (0.45,), ("preemption",), False, lambda what: None))
    done = commands.call(bench, "--traces", "--out", tmp_path, "--cache", tmp_path / "cache")
    assert done.code == 0 and "3 records in" in done.out, done.err
    made = record.load_records(tmp_path)
    assert {r["settings"]["arm"] for r in made} == {"recompute", "recompute, prefixes", "swap"} and all(r["name"] == "serve_virtual" for r in made)
    assert all(path.name == bench.file_stem(path.stem) + ".json" for path in tmp_path.glob("*.json"))


def samples_of(ready, texts, count, chunk, tell):
    """Made-up runs: layers by groups take a second, the others more."""
    out = {}
    for one in ready:
        slow = {"layered": 1, "whole": 2, "chunked": 8}[one.arm.prefill]
        run = Sample((0.5 * slow, 1.0 * slow), 0.2 * slow, (0.1, 0.1), 100 * slow, 150 * slow, 1.0 * slow, ())
        out.setdefault(one.scene.name, {})[one.arm.name] = [run] * count
        one.compute = 0.5
    tell("done")
    return out


class Engine:
    class model_spec:
        @staticmethod
        def hash():
            return "abc"


def ready_of(model, records, arms, scenes, gbps=None):
    return [Ready(arm, scene, Engine()) for scene in scenes for arm in arms]


def test_a_link(tmp_path, monkeypatch, cache):
    monkeypatch.setattr(serve_setups, "linked", ready_of)
    monkeypatch.setattr(serve_bench, "rounds", samples_of)
    done = commands.call(bench, "--tier", "link", "--rounds", 2, "--tokens", 512, "--out", tmp_path, "--cache", cache)
    assert done.code == 0 and "8 records in" in done.out, done.err
    made = {r["settings"]["arm"] + ", " + r["settings"]["scene"]: r for r in record.load_records(tmp_path)}
    one = made["layered, 8, 4 together"]
    assert one["settings"]["tokens"] == 512 and one["settings"]["link_gbps"] == 0.02 and one["settings"]["slots_a_layer"] == [8] * 8
    assert one["bytes"]["once"] == 256 * 196608 and one["counters"]["ttft_worst / chunked, 256"]["value"] == 0.125
    assert "holds  4 together: layered, 4: chunks of 256 bring 8.00 x that; at least 6" in done.out and "NOT " not in done.out
    assert str(tmp_path) not in json.dumps(made)


def test_open_loops(tmp_path, monkeypatch):
    asked = {}

    def url_records(server, load, rates, tell):
        asked.update(server=server, load=load, rates=rates)
        served = [serve_open.Served(0.0, ((1.0, 1), (2.0, 1)))] * load.requests
        within = [serve_open.Limits(5.0, 2.0), serve_open.Limits(5.0, 4.0)]
        found = serve_open.summaries(served, within, rates[0])
        yield [serve_open._record(served, rates[0], {"arm": "server", "model": "m"}, found, load, "", 0.0, {})]

    monkeypatch.setattr(serve_open, "url_records", url_records)
    more = ("--url", "http://127.0.0.1:8000/", "--api-key", "k", "--rates", 2, "--requests", 5, "--cache", tmp_path / "cache")
    done = commands.call(bench, "--tier", "open", *more, "--out", tmp_path)
    assert done.code == 0 and "5/5" in done.out and "server: 9 of 10 within 5 x TTFT and 2 x TPOT" in done.out, done.err
    assert (asked["server"].url, asked["server"].key, asked["rates"], asked["load"].requests) == ("http://127.0.0.1:8000", "k", (2.0,), 5)
    (made,) = record.load_records(tmp_path)
    assert made["counters"]["tpot"]["mean"] == 1.0 and (tmp_path / "serve_open-m-server-2.json").exists()


def test_a_storm_says_what_came_of_it(tmp_path, monkeypatch):
    asked, problems = [], [""]

    async def storm(target, clients, requests, seed):
        asked.append((target, clients, requests, seed))
        outcome = serve_storm.Outcome("whole", "wrong" if problems[0] else "answered", 200, 1.0, 0.5, 7, problems[0])
        return serve_storm.StormReport((outcome,), 1.5, {}, {})

    monkeypatch.setattr(serve_storm, "storm", storm)
    monkeypatch.setattr(serve_http, "find_model", lambda server: dataclasses.replace(server, model="m", positions=64))
    how = ("--tier", "storm", "--url", "http://127.0.0.1:8000/", "--api-key", "k", "--cache", tmp_path / "cache")
    done = commands.call(bench, *how)
    assert done.code == 0 and "1 answered with 7 tokens" in done.out, done.err
    assert asked == [(serve_storm.Target("http://127.0.0.1:8000", "m", 64, "k", False), 64, 2000, 0)]
    problems[0] = "it breaks off"
    done = commands.call(bench, *how, "--clients", 3, "--requests", 5)
    assert done.code == 2 and "WRONG whole: it breaks off" in done.out and "1 things went wrong, the first: whole: it breaks off" in done.err
    assert asked[1][1:3] == (3, 5)


def test_a_device(tmp_path, monkeypatch):
    asked = []

    def measure(sizes, arms, percent, rounds, tell):
        asked.append((sizes, [arm.name for arm in arms], percent, rounds))
        setting = serve_judge.Setting(16, 100, 1e-6, False, {"model": "generated"})
        for scene in sizes.scenes():
            ready = ready_of(None, None, arms, [scene])
            yield serve_judge.records(ready, samples_of(ready, None, rounds, 32, tell), setting, "serve_device")

    monkeypatch.setattr(serve_device, "measure", measure)
    done = commands.call(bench, "--tier", "device", "--tiny", "--out", tmp_path, "--cache", tmp_path / "cache")
    assert done.code == 0 and "6 records in" in done.out, done.err
    assert asked == [(serve_device.TINY, ["layered, 2", "chunked, 32", "whole"], 25, 1)]
    assert {path.stem.split("-")[0] for path in tmp_path.glob("*.json")} == {"tiny"}, "they never take the place of a measurement"
    done = commands.call(bench, "--tier", "device", "--layers", 8, "--alone", 0, "--cache", tmp_path / "cache")
    sizes, names, _, rounds = asked[1]
    assert done.code == 0 and (sizes.layers, sizes.alone, rounds) == (8, 0, 3) and "layered, 8" in names and len(sizes.scenes()) == 1


@pytest.mark.parametrize(
    "given, said",
    [
        (("--tier", "storm"), "--tier storm needs a server that runs"), (("--requests", -1), "--requests -1: give 0 or more"),
        (("--out", "no/such/folder"), "no/such/folder: there is no such folder for records"),
        (("--tier", "link", "--chunks", 100), "--chunks (100,): give multiples of 32 tokens"),
        (("--tier", "link", "--groups", 0), "--groups (0,), --chunks (256,): groups of at least 1"),
        (("--tier", "link", "--tokens", 0), "--tokens 0: give at least 1"),
        (("--tier", "link", "--tokens", 4000), "2048"),
        (("--tier", "link", "--groups", 9), "9 groups of layers: the model can be cut into 1 to 8"),
        (("--tier", "open", "--rates", -1), "--rates (-1.0,): give positive numbers"),
        (("--tier", "open", "--gbps", -1), "--gbps -1: "),
        (("--tier", "open", "--url", "127.0.0.1"), "'127.0.0.1' is no address of a server"),
        (("--tier", "open", "--url", "http://127.0.0.1:9"), "refused"),
        (("--tier", "device", "--percent", 0), "--percent 0: give 1 to 100"),
        (("--tier", "link", "--model", "no/model"), "no/model"),
        (("--traces", "no.npz"), "no.npz"),
    ],
)
def test_what_is_wrong_is_one_line(cache, given, said):
    done = commands.call(bench, *given, "--cache", cache)
    assert done.code == 2 and done.err.startswith("error: ") and done.err.count("\n") == 1 and said in done.err, done.err
