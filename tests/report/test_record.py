"""Tests of jaxmoe.report.record: records, their files, the measured ceilings, and tables."""

import datetime
import json
import os
import platform
import re
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmoe
from jaxmoe.report import record as record_module
from jaxmoe.report.record import (
    Record,
    check_path,
    device,
    load_records,
    make_bound,
    make_record,
    measure_matmul_rate,
    measure_memory_bandwidth,
    table,
    timing,
    update_readme,
    versions,
    write_record,
)


def a_record(name="decode", **changes):
    fields = {
        "name": name,
        "spec_hash": "1234abcd",
        "settings": {"batch": 4, "budget_gb": 1.5, "policy": "lru", "buckets": (8, 16), "offload": True},
        "seeds": {"sample": 7},
        "timings": {"step": timing([0.2, 0.1, 0.4])},
        "compile_seconds": 3.25,
        "bytes": {"pool": 1 << 30},
        "counters": {"hits": 90, "misses": 10},
        "bound": make_bound("bandwidth", ceiling=20.0, achieved=5.0, unit="GB/s"),
    }
    return make_record(**fields | changes)


# --- Records


def test_a_record_holds_what_was_given_and_where_it_ran():
    record = a_record()
    assert set(record) == set(Record.__dataclass_fields__)
    assert record["settings"] == {"batch": 4, "budget_gb": 1.5, "policy": "lru", "buckets": [8, 16], "offload": True}
    assert record["timings"]["step"] == {"median": 0.2, "spread": {"min": 0.1, "max": 0.4}, "n": 3}
    assert record["bound"] == {"kind": "bandwidth", "ceiling": 20, "achieved": 5, "unit": "GB/s", "percent": 25}
    assert json.loads(json.dumps(record)) == record


def test_versions_are_those_that_run():
    found = versions()
    assert list(found) == ["python", "jax", "jaxlib", "flax", "numpy", "jaxmoe"]
    assert found["jax"] == jax.__version__ and found["numpy"] == np.__version__
    assert found["python"] == platform.python_version() and found["jaxmoe"] == jaxmoe.__version__


def test_device_says_what_it_is_but_not_which():
    found = device()
    assert found["platform"] == jax.devices()[0].platform and found["count"] == len(jax.devices())
    assert 1 <= found["cpu"]["cores"] <= os.cpu_count() and len(found["cpu"]["model"]) > 2
    name = re.compile(rf"\b{re.escape(socket.gethostname())}\b")
    assert not name.search(json.dumps(a_record(name="x")))


def test_the_timestamp_is_now_in_utc():
    stamp = datetime.datetime.fromisoformat(a_record()["timestamp"])
    assert stamp.utcoffset() == datetime.timedelta(0)
    assert abs(stamp.timestamp() - time.time()) < 60


def test_numpy_and_jax_scalars_become_numbers():
    record = a_record(
        counters={"a": np.int64(3), "b": jnp.float32(0.5), "c": np.array(2)}, seeds={"x": np.uint32(2**32 - 1)}
    )
    assert record["counters"] == {"a": 3, "b": 0.5, "c": 2}
    assert record["seeds"] == {"x": 2**32 - 1} and type(record["seeds"]["x"]) is int


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"counters": {"rate": float("nan")}}, "counters.rate"),
        ({"compile_seconds": np.inf}, "compile_seconds"),
        ({"settings": {"a": [1, {"b": object()}]}}, r"settings\.a\[1\]\.b"),
        ({"settings": {"ids": np.arange(3)}}, r"settings\.ids"),
        ({"timings": {"step": {"median": 1.0, "n": 2}}}, "timings.step of a record lacks spread"),
        ({"bound": {"kind": "compute", "achieved": 1.0}}, "bound of a record lacks ceiling, unit, percent"),
    ],
)
def test_what_cannot_be_recorded_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        a_record(**changes)


def test_timing_of_few_and_of_many():
    assert timing([2.0]) == {"median": 2.0, "spread": {"min": 2.0, "max": 2.0}, "n": 1}
    many = timing([float(i) for i in range(101)][::-1])
    assert many == {"median": 50.0, "spread": {"p10": 10.0, "p90": 90.0}, "n": 101}
    assert timing(np.array([1.0, 4.0, 2.0, 3.0]))["median"] == 2.5


@pytest.mark.parametrize("samples", [[], [0.1, -0.1], [float("nan")], [float("inf")]])
def test_timing_refuses_what_is_no_duration(samples):
    with pytest.raises(ValueError, match="timing"):
        timing(samples)


def test_bounds():
    assert make_bound("serial", 8, 2, "tok/s")["percent"] == 25.0
    assert make_bound("compute", 1.0, 1.25, "TFLOP/s")["percent"] == 125.0  # not hidden
    for wrong in [("speed", 1, 1), ("link", 0, 1), ("link", float("inf"), 1), ("link", 1, float("nan"))]:
        with pytest.raises(ValueError, match="bound"):
            make_bound(*wrong, "GB/s")


# --- Files


def test_records_come_back_in_order(tmp_path):
    folder = tmp_path / "runs" / "decode"
    for name in ("b", "a", "é"):
        write_record(folder / f"{name}.json", a_record(name=name))
    (folder / "notes.txt").write_text("not a record")
    assert [record["name"] for record in load_records(folder)] == ["a", "b", "é"]
    again = a_record(name="a", compile_seconds=9.0)
    write_record(str(folder / "a.json"), again)
    assert load_records(folder)[0] == again
    assert sorted(path.name for path in folder.iterdir()) == ["a.json", "b.json", "notes.txt", "é.json"]


def test_a_failed_write_leaves_the_old_record(tmp_path, monkeypatch):
    path, old = tmp_path / "a.json", a_record()
    write_record(path, old)
    with pytest.raises(ValueError, match="counters"):
        write_record(path, old | {"counters": {"x": float("nan")}})

    def fail(fd):
        raise OSError("disk full")

    monkeypatch.setattr(record_module.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_record(path, a_record(name="other"))
    assert load_records(tmp_path) == [old]
    assert [found.name for found in tmp_path.iterdir()] == ["a.json"]


def test_a_place_is_checked_before_the_run(tmp_path):
    write_record(tmp_path / "old.json", a_record())
    (tmp_path / "folder.json").mkdir()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    check_path(tmp_path / "new.json")
    check_path(str(tmp_path / "old.json"))
    for path in ("new.txt", "folder.json", "nowhere/new.json", "old.json/new.json"):
        with pytest.raises(ValueError, match=path):
            check_path(tmp_path / path)
    with pytest.raises(OSError, match="no file can be made here.*/proc"):
        check_path("/proc/new.json")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_files_that_are_no_records_are_named(tmp_path):
    with pytest.raises(ValueError, match="a.txt"):
        write_record(tmp_path / "a.txt", a_record())
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_records(tmp_path / "nowhere")
    incomplete = {key: value for key, value in a_record().items() if key != "bound"}
    contents = ['{"name": "cut o', "[]", json.dumps(a_record() | {"format": 0}), json.dumps(incomplete)]
    for content in contents:
        (tmp_path / "wrong.json").write_text(content)
        with pytest.raises(ValueError, match=r"wrong\.json"):
            load_records(tmp_path)


# --- Ceilings


def test_memory_bandwidth_is_that_of_a_sum(monkeypatch):
    """Bytes over seconds: checked against numpy reading the same bytes, to an order of magnitude."""
    size = 64 * 2**20
    measured = measure_memory_bandwidth(seconds=0.1, bytes=size)
    buffer = np.ones(size // 4, np.float32)
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        buffer.max()
        seconds.append(time.perf_counter() - start)
    assert size / min(seconds) / 1e9 / 10 < measured < 1000 * size / min(seconds) / 1e9
    sizes = []
    monkeypatch.setattr(record_module, "_best_seconds", lambda f, x, s: sizes.append(f(x).size and x.nbytes) or 0.5)
    assert measure_memory_bandwidth(bytes=size) == pytest.approx(size / 0.5 / 1e9)
    assert sizes == [size, size]
    assert measure_memory_bandwidth(bytes=1) == pytest.approx(2**16 / 0.5 / 1e9)  # never of nothing, which would be no bound


def test_the_default_buffer_is_larger_than_caches():
    assert record_module._buffer_bytes() >= 512 * 2**20


@pytest.mark.parametrize(
    "dtype, accumulator", [(jnp.float32, "float32"), (jnp.bfloat16, "float32"), (jnp.int8, "int32")]
)
def test_matmul_rate_counts_two_per_product(dtype, accumulator, monkeypatch):
    assert measure_matmul_rate(dtype, seconds=0.02, size=128) > 1e-5
    seen = []
    monkeypatch.setattr(record_module, "_best_seconds", lambda f, x, s: seen.append((x.dtype, f(x).dtype)) or 0.5)
    assert measure_matmul_rate(dtype, size=100) == pytest.approx(2 * 100**3 / 0.5 / 1e12)
    assert seen == [(jnp.dtype(dtype), jnp.dtype(accumulator))]


def test_best_seconds_waits_for_the_result_and_takes_the_best():
    delays = iter([0.03, 0.03, *[0.01] * 1000])  # the first call traces; the second is the trial

    def slow(x):
        return jax.pure_callback(lambda v: time.sleep(next(delays)) or v, jax.ShapeDtypeStruct((), jnp.float32), x)

    assert 0.01 <= record_module._best_seconds(slow, jnp.float32(1), 0.1) < 0.03


# --- Tables


def test_table():
    records = [a_record(name="a|b"), a_record(name="c", bound=make_bound("link", 3.0, 1.0, "GB/s"))]
    columns = [
        ("benchmark", "name"),
        ("policy", "settings.policy"),
        ("GB/s", "bound.achieved", ".2f"),
        ("%", "bound.percent", ".0f"),
    ]
    assert table(records, columns) == (
        "| benchmark | policy | GB/s | % |\n"
        "| --- | --- | ---: | ---: |\n"
        "| a\\|b | lru | 5.00 | 25 |\n"
        "| c | lru | 1.00 | 33 |"
    )
    assert table([], columns[:1]) == "| benchmark |\n| --- |"


@pytest.mark.parametrize(
    "column, message",
    [
        (("x", "settings.absent"), "'decode'.*settings.absent"),
        (("x", "name.deeper"), "name.deeper: deeper is missing"),
        (("x", "settings.policy", ".1f"), r"settings\.policy is 'lru'"),
    ],
)
def test_a_table_names_what_a_record_lacks(column, message):
    with pytest.raises(ValueError, match=message):
        table([a_record()], [column])


README = "# Title\n\n<!-- records:one -->\nold\n<!-- end -->\n\nbetween\n<!-- records:two --><!-- end -->\nlast\n"


def test_update_readme_replaces_only_between_its_markers(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(README)
    assert update_readme(path, "one", "| a |\n| --- |\n") is True
    assert path.read_text() == README.replace("old\n", "| a |\n| --- |\n")
    assert update_readme(path, "one", "| a |\n| --- |") is False
    assert update_readme(path, "two", "x") is True
    assert path.read_text().endswith("between\n<!-- records:two -->\nx\n<!-- end -->\nlast\n")
    assert [found.name for found in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    "text, name, markdown, message",
    [
        (README, "three", "x", "0 times"),
        (README + README, "one", "x", "2 times"),
        ("<!-- end --><!-- records:one -->", "one", "x", "no <!-- end --> after"),
        ("<!-- records:one -->\n<!-- records:two -->\n<!-- end -->", "one", "x", "no <!-- end --> after"),
        (README, "one", "x <!-- end --> y", "contains"),
    ],
)
def test_update_readme_refuses_unclear_markers(tmp_path, text, name, markdown, message):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        update_readme(path, name, markdown)
    assert path.read_text() == text
