"""Workloads are what they say, the same for the same seed, and come back from a file unchanged. About 1 second."""

import json
import math

import numpy as np
import pytest

from jaxmoe.report.serve_load import CHAT_IN, CHAT_OUT, Job, Sizes, Workload, arrivals, batch, chat, load, mixed, save, single

DOMAINS = {"code": [(1, 2), (3, 4, 5)], "law": [(6,)], "math": [(7, 8)] * 3}
MAKERS = {
    "chat": lambda seed: chat(50, 2.0, seed, vocabulary=100),
    "batch": lambda seed: batch(32, seed),
    "single": lambda seed: single(seed=seed, vocabulary=100),
    "mixed": lambda seed: mixed(DOMAINS, 20, 5.0, Sizes(20, 0.5), seed),
}


@pytest.mark.parametrize("name", MAKERS)
def test_the_seed_decides_and_files_keep_everything(name, tmp_path):
    made, again, other = MAKERS[name](3), MAKERS[name](3), MAKERS[name](4)
    assert made == again and made.hash() == again.hash() != other.hash() and made.name == name
    times = [job.arrival for job in made.jobs]
    assert times == sorted(times) and len({job.seed for job in made.jobs}) == len(made.jobs)
    save(tmp_path / "w.json", made)
    assert load(tmp_path / "w.json") == made


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_total_and_the_spread_that_were_asked_for(burstiness):
    times = arrivals(4000, 8.0, burstiness)
    assert times[-1] == pytest.approx(500, rel=1e-12) and (np.diff(times) >= 0).all()
    pauses = np.diff(times, prepend=0)
    assert pauses.std() / pauses.mean() == pytest.approx(burstiness**-0.5, rel=0.1)


def test_arrivals_all_at_once_and_of_nobody():
    assert arrivals(3, math.inf).tolist() == [0, 0, 0] and len(arrivals(0, 1.0)) == 0
    for rate, burstiness in ((0, 1), (-1, 1), (math.nan, 1), (1, 0)):
        with pytest.raises(ValueError, match="both must be positive"):
            arrivals(3, rate, burstiness)


def test_a_higher_rate_sends_the_same_requests_closer_together():
    slow, fast = chat(30, 1.0, seed=5), chat(30, 2.0, seed=5)
    assert [(a.prompt, a.new, a.seed) for a in slow.jobs] == [(b.prompt, b.new, b.seed) for b in fast.jobs]
    assert [a.arrival for a in slow.jobs] == pytest.approx([2 * b.arrival for b in fast.jobs])


def test_conversations_are_log_normal_and_clipped():
    jobs = chat(20_000, math.inf).jobs
    for lengths, sizes in (([j.tokens for j in jobs], CHAT_IN), ([j.new for j in jobs], CHAT_OUT)):
        assert min(lengths) >= sizes.least and max(lengths) <= sizes.most
        assert np.mean(lengths) == pytest.approx(sizes.mean, rel=0.03)
        assert np.log(lengths).std() == pytest.approx(sizes.spread, rel=0.03)
    assert Sizes(64, 0).draw(3, np.random.default_rng(0)).tolist() == [64] * 3


def test_a_batch_shares_heads_within_groups_only():
    jobs = batch(20, prompt=40, shared=30, group=8, vocabulary=50_000).jobs
    heads: dict[str, set] = {}
    for job in jobs:
        assert job.tokens == 40 and job.arrival == 0
        heads.setdefault(job.user, set()).add(job.prompt[:30])
    assert sorted(heads) == ["group 0", "group 1", "group 2"] and all(len(found) == 1 for found in heads.values())
    assert len({job.prompt for job in jobs}) == 20 and [job.seed for job in jobs] != list(range(20)), "the order is shuffled"
    with pytest.raises(ValueError, match="41 shared tokens of prompts of 40"):
        batch(8, prompt=40, shared=41)


def test_domains_in_equal_parts_and_any_order():
    jobs = mixed(DOMAINS, 30).jobs
    assert {d: sum(job.user == d for job in jobs) for d in DOMAINS} == dict.fromkeys(DOMAINS, 10)
    assert all(job.prompt in DOMAINS[job.user] and job.new == 64 and job.arrival == 0 for job in jobs)
    assert [job.user for job in jobs] != ["code", "law", "math"] * 10
    with pytest.raises(ValueError, match="domains a, b: each needs"):
        mixed({"a": [(1,)], "b": []}, 3)


def test_files_that_are_no_workloads(tmp_path):
    path = tmp_path / "w.json"
    with pytest.raises(FileNotFoundError):
        load(path)
    for text, message in (
        ("{", "is no workload"),
        ("[1]", "is no workload"),
        ('{"format": "x", "version": 1}', "format 'x', version 1; expected"),
        ('{"format": "jaxmoe-workload", "version": 1, "name": "n", "about": {}, "jobs": [[0, 1]]}', "not enough values"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            load(path)
    save(path, Workload("n", (Job(0.0, 5, 6, 7, 1, "u"),)))
    found = json.loads(path.read_text())
    found["jobs"][0][1] = 6
    path.write_text(json.dumps(found))
    with pytest.raises(ValueError, match="damaged or was changed"):
        load(path)
