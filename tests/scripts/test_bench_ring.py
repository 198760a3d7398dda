"""The command line of scripts/bench_ring.py: what it prints and writes, and how it refuses."""

import json

from tests.scripts import commands

bench_ring = commands.load("bench_ring")


def test_it_writes_a_record_whose_bytes_are_the_formulas(tmp_path):
    sizes = ("--devices", 2, "--tokens", 4, "--positions", 64, "--ways", "ring", "token")
    done = commands.call(bench_ring, "--models", "granite_3_1_1b_a400m", *sizes, "--out", tmp_path)
    assert done.code == 0 and "keys travel where" in done.out and "zigzag_runs" in done.out, done.err
    made = json.loads((tmp_path / "ring_attention-granite-3-1-1b-a400m.json").read_text())
    assert made["bound"]["percent"] == 100 and made["counters"]["zigzag_halves_work"] == 1
    assert max(made["counters"][f"{way}_error"] for way in ("ring", "token")) < 1e-5
    assert made["settings"]["attention"]["heads"] == 16 and made["bytes"]["ring_sent"] == 4 * (8 * 2 * 64 * 2 + 4)


def test_refusals():
    done = commands.call(bench_ring, "--devices", 9)
    assert done.code == 2 and "--devices 9: choose from 2 to 8" in done.err
    done = commands.call(bench_ring, "--models", "nothing")
    assert done.code == 2 and "no published model 'nothing'" in done.err
