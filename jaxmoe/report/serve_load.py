"""Requests for measuring a server: who sends what and when, the same for the same seed, saved and replayed as JSON.

Nothing here knows a server or an engine. Sizes follow what is published of conversations (log-normal, clipped), not recorded text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from checkpoints.manifest import write_text

FORMAT = "jaxmoe-workload"
VERSION = 1


@dataclasses.dataclass(frozen=True)
class Job:
    """One request of a workload.

    Attributes:
        arrival: seconds after the beginning.
        prompt: its token ids, or how many there are where they do not matter.
        new: tokens to be generated.
        seed: of its draws.
        priority: larger goes first.
        user: whose it is; of mixed domains the domain.
    """

    arrival: float
    prompt: int | tuple[int, ...]
    new: int
    seed: int
    priority: int = 0
    user: str = ""

    @property
    def tokens(self) -> int:
        """Of the prompt."""
        return self.prompt if isinstance(self.prompt, int) else len(self.prompt)


@dataclasses.dataclass(frozen=True)
class Workload:
    """Jobs in order of arrival. Attributes: `name`; `jobs`; `about`, what they were made with, JSON values."""

    name: str
    jobs: tuple[Job, ...]
    about: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def hash(self) -> str:
        """Of the jobs alone: equal hashes mean that the same requests were sent at the same times."""
        return hashlib.sha256(json.dumps([_row(job) for job in self.jobs]).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Log-normal lengths, clipped. Attributes: `mean` before clipping; `spread`, standard deviation of the logarithm; `least` and `most`."""

    mean: float
    spread: float
    least: int = 1
    most: int = 1 << 30

    def draw(self, n: int, rng: np.random.Generator) -> Int[np.ndarray, "n"]:
        """`n` lengths; with a spread of 0 all are the mean."""
        drawn = np.exp(math.log(self.mean) - self.spread**2 / 2 + self.spread * rng.standard_normal(n))
        return np.clip(np.rint(drawn), self.least, self.most).astype(int)


CHAT_IN, CHAT_OUT = Sizes(220, 1.0, 4, 4096), Sizes(180, 0.9, 2, 2048)
"""Tokens of conversations' prompts and answers."""


def arrivals(n: int, rate: float, burstiness: float = 1.0, seed: int = 0) -> Float[np.ndarray, "n"]:
    """When requests arrive: gamma-distributed pauses, scaled such that the last request arrives at exactly n / rate.

    Args:
        n: requests.
        rate: a second; infinite where all are there at 0.
        burstiness: shape of the gamma distribution: 1 is a Poisson process, less comes in bursts, more is more even.
        seed: of the draws.

    Raises:
        ValueError: the rate or the burstiness is not positive.

    Source: vLLM's `bench serve`, for pauses and their scaling.
    """
    if not rate > 0 or not burstiness > 0:
        raise ValueError(f"a rate of {rate} requests per second with burstiness {burstiness}: both must be positive")
    if math.isinf(rate) or n == 0:
        return np.zeros(n)
    times = np.cumsum(np.random.default_rng([seed, 1]).gamma(burstiness, 1.0, n))
    return times * (n / rate / times[-1])


# --- Workloads


def chat(
    n: int, rate: float, seed: int = 0, burstiness: float = 1.0, inputs: Sizes = CHAT_IN, outputs: Sizes = CHAT_OUT, vocabulary: int | None = None
) -> Workload:
    """Conversations.

    Args:
        n: requests.
        rate, burstiness: of `arrivals`.
        seed: of everything.
        inputs, outputs: lengths.
        vocabulary: prompts are ids drawn from so many; lengths alone if not given.
    """
    rng = np.random.default_rng([seed, 2])
    times, prompts, news = arrivals(n, rate, burstiness, seed), inputs.draw(n, rng), outputs.draw(n, rng)
    jobs = [Job(float(t), _ids(int(p), vocabulary, rng), int(new), i) for i, (t, p, new) in enumerate(zip(times, prompts, news, strict=True))]
    about = {"rate": str(rate), "burstiness": burstiness, "seed": seed, "inputs": dataclasses.asdict(inputs), "outputs": dataclasses.asdict(outputs)}
    return Workload("chat", tuple(jobs), about)


def batch(n: int, seed: int = 0, prompt: int = 512, shared: int = 384, group: int = 8, new: int = 128, vocabulary: int = 32000) -> Workload:
    """An offline batch, all there at 0 in shuffled order: groups of prompts that begin alike.

    Args:
        n: requests; the last group is smaller where `group` doesn't divide it.
        seed: of the ids and of the order.
        prompt, shared: tokens of a prompt, and of those that a group has in common.
        group: prompts of a group.
        new: tokens that each asks for.
        vocabulary: ids are drawn from so many.

    Raises:
        ValueError: more tokens are shared than a prompt has.
    """
    if not 0 <= shared <= prompt:
        raise ValueError(f"{shared} shared tokens of prompts of {prompt}: give 0 to {prompt}")
    rng = np.random.default_rng([seed, 4])
    heads = rng.integers(0, vocabulary, (-(-n // group), shared))
    prompts = [(*heads[i // group].tolist(), *rng.integers(0, vocabulary, prompt - shared).tolist()) for i in range(n)]
    jobs = [Job(0.0, prompts[i], new, seed=int(i), user=f"group {i // group}") for i in rng.permutation(n)]
    return Workload("batch", tuple(jobs), {"prompt": prompt, "shared": shared, "group": group, "new": new, "seed": seed})


def single(prompt: int = 128, new: int = 512, seed: int = 0, vocabulary: int | None = None) -> Workload:
    """One request alone, as of a person at their own machine."""
    return Workload("single", (Job(0.0, _ids(prompt, vocabulary, np.random.default_rng([seed, 5])), new, 0),), {"seed": seed})


def mixed(prompts: Mapping[str, Sequence[Sequence[int]]], n: int, rate: float = math.inf, outputs: Sizes | None = None, seed: int = 0) -> Workload:
    """Requests of several domains in shuffled order, each domain as often as the others; the job's user is its domain.

    Args:
        prompts: by domain; a domain's prompts are used in turn, and again where there are too few.
        n: requests.
        rate: of `arrivals`; all at 0 if not given.
        outputs: lengths; 64 tokens of each if not given.
        seed: of order, times and lengths.

    Raises:
        ValueError: there is no domain, or one has no prompts.
    """
    if not prompts or not all(prompts.values()):
        raise ValueError(f"domains {', '.join(prompts) or '(none)'}: each needs at least one prompt")
    rng = np.random.default_rng([seed, 6])
    names = list(prompts)
    chosen = [(names[i % len(names)], i // len(names)) for i in range(n)]
    news = (outputs or Sizes(64, 0)).draw(n, rng)
    jobs = []
    for i, (at, time) in enumerate(zip(rng.permutation(n), arrivals(n, rate, seed=seed), strict=True)):
        domain, turn = chosen[at]
        ids = prompts[domain][turn % len(prompts[domain])]
        jobs.append(Job(float(time), tuple(map(int, ids)), int(news[i]), i, user=domain))
    return Workload("mixed", tuple(jobs), {"domains": names, "rate": str(rate), "seed": seed})


def _ids(tokens: int, vocabulary: int | None, rng: np.random.Generator) -> int | tuple[int, ...]:
    return tokens if vocabulary is None else tuple(rng.integers(0, vocabulary, tokens).tolist())


# --- Files


def save(path: str | Path, workload: Workload) -> None:
    """Writes a workload to a JSON file, a job a line, whole or not at all.

    Raises:
        OSError: the file can't be written.
    """
    head = json.dumps({"format": FORMAT, "version": VERSION, "name": workload.name, "about": dict(workload.about), "hash": workload.hash()})
    rows = ",\n".join(json.dumps(_row(job)) for job in workload.jobs)
    write_text(Path(path), f'{head[:-1]}, "jobs": [\n{rows}\n]}}\n')


def load(path: str | Path) -> Workload:
    """Reads what `save` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no workload, of another version, or damaged; names the file and what is wrong.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        kind = (found["format"], found["version"])
        if kind != (FORMAT, VERSION):
            raise ValueError(f"format {kind[0]!r}, version {kind[1]!r}; expected {FORMAT!r}, version {VERSION}")
        workload = Workload(found["name"], tuple(_job(row) for row in found["jobs"]), found["about"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no workload: {error if isinstance(error, ValueError) else repr(error)}") from error
    if workload.hash() != found.get("hash"):
        raise ValueError(f"{path} is damaged or was changed by hand: its jobs have hash {workload.hash()}, it says {found.get('hash')}")
    return workload


def _row(job: Job) -> list[object]:
    prompt = job.prompt if isinstance(job.prompt, int) else list(job.prompt)
    return [job.arrival, prompt, job.new, job.seed, job.priority, job.user]


def _job(row: Sequence) -> Job:
    arrival, prompt, new, seed, priority, user = row
    return Job(float(arrival), prompt if isinstance(prompt, int) else tuple(map(int, prompt)), int(new), int(seed), int(priority), str(user))
