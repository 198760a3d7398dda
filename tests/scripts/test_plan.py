"""The command line of scripts/plan.py: what it takes, prints and writes, and how it refuses."""

import dataclasses
import json

import pytest

from sharding.hardware import CHIPS
from sharding.plan import load_plan
from tests.models import CONFIGS
from tests.scripts import commands
from tests.sharding.fake_bytes import device_bytes

script = commands.load("plan")


@pytest.fixture(autouse=True)
def simple_bytes(monkeypatch):
    monkeypatch.setattr(script, "device_bytes", device_bytes)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "small" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps(CONFIGS["olmoe"]))
    return path


def run(*args):
    return commands.call(script, *args)


def test_a_plan_is_printed_and_written(config, tmp_path):
    files = ("--out", tmp_path / "plan.json", "--json", tmp_path / "all.json")
    done = run(config, "--hardware", "h100:4", "--rows", 4, "--prompt", 100, "--new", 20, *files)
    assert done.code == 0 and "small on h100:4: " in done.out and "4 sequences of 100 + 20 tokens" in done.out and "not chosen" in done.out, done.err
    plan = load_plan(tmp_path / "plan.json")
    assert plan.model == "small" and plan.workload.rows == 4 and plan.made_by.startswith("jaxmoe ") and plan.split.devices in (1, 2, 4)
    made = json.loads((tmp_path / "all.json").read_text())
    assert made["plan"] == json.loads((tmp_path / "plan.json").read_text()) and made["lost"] and made["proved"] is None


def test_published_models_and_options(tmp_path):
    done = run(
        "olmoe_1b_7b", "--hardware", "v5e:2x2", "--objective", "cost", "--price", 1.5, "--slo", "ttft=500ms,tpot=0.05s", "--phases",
        "--out", tmp_path / "plan.json", "--save-hardware", tmp_path / "chip.json",
    )  # fmt: skip
    assert done.code == 0 and "requests/s" in done.out, done.err
    plan = load_plan(tmp_path / "plan.json")
    assert plan.objective == "cost" and plan.machine.hardware.price == 1.5 and plan.times.tpot <= 0.05
    again = run("olmoe_1b_7b", "--hardware", f"{tmp_path / 'chip.json'}:2x2", "--split", "tensor=4", "--out", tmp_path / "plan.json")
    assert again.code == 0 and str(load_plan(tmp_path / "plan.json").split) == "tensor=4", again.err
    listed = run("--models")
    assert listed.code == 0 and "deepseek_v3" in listed.out and "tpu7x" in listed.out


def test_this_machine(config, monkeypatch):
    monkeypatch.setattr(script, "measure", lambda progress: dataclasses.replace(CHIPS["l4"], name="measured: cpu"))
    done = run(config, "--rows", 2, "--dtype", "float32")
    assert done.code == 0 and "on measured: cpu" in done.out and "float32" in done.out, done.err


def test_memory_and_devices(config, tmp_path):
    args = (config, "--hardware", "h100", "--devices", 2, "--split", "tensor=2", "--out", tmp_path / "p.json")
    assert run(*args, "--memory", "1GB").code == 0
    assert load_plan(tmp_path / "p.json").machine.hardware.usable_bytes == 10**9 and load_plan(tmp_path / "p.json").machine.devices == 2
    done = run(*args, "--memory", "0.05MB", "--resident")
    assert done.code == 2 and done.err.startswith("error: does not fit: the least, tensor=2 with 1 sequence") and done.err.count("\n") == 1


def test_a_sweep(config, tmp_path):
    done = run(config, "--hardware", "h100:2", "--sweep", "rows", "--over", 1, 4, "--json", tmp_path / "s.json")
    assert done.code == 0, done.err
    assert [row["rows"] for row in json.loads((tmp_path / "s.json").read_text())["rows"]] == [1, 4]
    done = run(config, "--hardware", "h100", "--memory", "0.3MB", "--resident", "--sweep", "hardware", "--json", tmp_path / "s.json")
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [row["at"] for row in rows] == ["h100", "h100:2", "h100:4", "h100:8"] and rows[0]["error"] == "does not fit" and "split" in rows[-1]
    assert run(config, "--hardware", "h100:4", "--rows", 4, "--sweep", "split").out.count("=") >= 5


def test_a_sweep_is_drawn(config, tmp_path):
    pytest.importorskip("matplotlib")
    done = run(config, "--hardware", "h100:2", "--sweep", "prompt", "--over", 8, 64, "--plot", tmp_path / "p.svg")
    assert done.code == 0 and (tmp_path / "p.svg").stat().st_size > 5000, done.err


def test_the_dtype_of_keys_and_values_is_searched(config, tmp_path):
    """Narrower ones take less time to read; a model in bfloat16 has them already."""
    args = (config, "--hardware", "h100:2", "--rows", 8, "--prompt", 64, "--new", 64, "--out", tmp_path / "p.json", "--kv-dtype", "auto")
    shown = run(*args, "--dtype", "float32")
    assert load_plan(tmp_path / "p.json").workload.kv_dtype == "bfloat16" and "keys and values bfloat16" in shown.out
    narrow = load_plan(tmp_path / "p.json").times.tpot
    run(*args[:-1], "float32", "--dtype", "float32")
    assert narrow < load_plan(tmp_path / "p.json").times.tpot
    assert "keys and values" not in run(*args).out


def test_a_proof_is_shown(config, monkeypatch):
    from jaxmoe.engine import prove as engine

    def prove(plan, spec, progress):
        progress("compiling")
        assert spec.hash() == plan.spec_hash
        program = engine.Program(plan.nbytes["total"], 0, 3, 3, 5, 0.1, None, {"all-reduce": 2})
        return engine.Proved(program, program)

    monkeypatch.setattr(engine, "prove", prove)
    done = run(config, "--hardware", "h100:2", "--rows", 2, "--prove")
    assert done.code == 0 and "the compiler says" in done.out and "+0.0" in done.out, done.err


def test_a_recorded_routing(config, tmp_path):
    from jaxmoe.offload.trace import save
    from tests.offload import traces

    save(tmp_path / "t.npz", traces.random_trace(0, experts=8, active=2))
    args = (config, "--hardware", "h100", "--rows", 8, "--slots", 4, "--out", tmp_path / "p.json")
    even, own = (run(*args, *more) and load_plan(tmp_path / "p.json").times.decode.host for more in ((), ("--trace", tmp_path / "t.npz")))
    assert 0 < own < even  # what is asked for most is on the device
    save(tmp_path / "t.npz", traces.random_trace(0))
    done = run(*args, "--trace", tmp_path / "t.npz")
    assert done.code == 2 and "the trace is of" in done.err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("nomodel",), "nomodel: neither a folder nor a published model; these are deepseek_v2"),
        (("olmoe_1b_7b", "--hardware", "h101"), "hardware = 'h101': 'h101' is not known"),
        (("olmoe_1b_7b", "--slo", "ttft=1"), "--slo 'ttft=1': 'ttft=1' is not a limit"),
        (("olmoe_1b_7b", "--slo", "ttft=1s,ttft=2s"), "is not a limit"),
        (("olmoe_1b_7b", "--rows", "0"), "rows = 0"),
        (("olmoe_1b_7b", "--hardware", "h100:2", "--expert-copies", "3"), "copies = 3: no split divides 64 experts"),
        (("olmoe_1b_7b", "--expert-copies", "-1"), "copies = -1"),
        (("olmoe_1b_7b", "--prompt", "100000"), "goes up to 4096 positions"),
        (("olmoe_1b_7b", "--hardware", "h100:2", "--split", "tensor=x"), "tensor = 'x'"),
        (("olmoe_1b_7b", "--hardware", "h100:2", "--split", "tensor=4"), "takes 4 devices"),
        (("olmoe_1b_7b", "--hardware", "h100", "--memory", "50%"), "give the bytes"),
        (("olmoe_1b_7b", "--hardware", "h100", "--devices", "0"), "--devices 0"),
        (("olmoe_1b_7b", "--hardware", "none.json"), "none.json: No such file"),
        (("olmoe_1b_7b", "--hardware", "h100", "--plot", "p.png"), "--plot is for --sweep"),
        (("olmoe_1b_7b", "--hardware", "h100", "--over", "1"), "--over is for --sweep"),
        (("olmoe_1b_7b", "--hardware", "h100", "--sweep", "rows", "--prove"), "leave out"),
        (("olmoe_1b_7b", "--hardware", "h100", "--sweep", "rows", "--over", "x"), "--sweep rows needs whole numbers"),
        (("olmoe_1b_7b", "--hardware", "h100", "--price", "-1"), "hardware.price = -1.0"),
    ],
)  # fmt: skip
def test_nonsense_is_one_line(args, says):
    done = run(*args if "--hardware" in args else (*args, "--hardware", "h100"))
    assert done.code == 2 and says in done.err and done.err.startswith("error: ") and done.err.count("\n") == 1
    assert done.out == ""
