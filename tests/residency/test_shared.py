"""Policies that share one pool, against one pool in plain Python: keys by their definitions, layer after layer, step after step."""

import itertools

import numpy as np
import pytest

from jaxmoe.offload.replay import Steps, policy_hits, residents
from jaxmoe.residency import POLICIES, Knowledge
from jaxmoe.residency.policy import DECAY

LAYERS, EXPERTS, STEPS = 4, 7, 120
F = np.float32
MIX = (1.0, 0.5, 0.25, 2.0)


class Plain:
    """What is known of every expert, and what it is worth when a layer runs: numbers in float32, by the policies' docstrings."""

    def __init__(self, patterns: np.ndarray):
        self.patterns = patterns / np.maximum(patterns.sum(-1, keepdims=True), F(1e-9))
        self.foreseen = np.full((2, LAYERS, EXPERTS), -1, F)
        self.count = np.zeros((LAYERS, EXPERTS), F)
        self.forget()

    def forget(self) -> None:
        """What a new text begins with."""
        self.clock = np.zeros(LAYERS, int)
        self.stamp = np.full((LAYERS, EXPERTS), -1)
        self.total, self.high = np.zeros((2, LAYERS, EXPERTS), F)

    def use(self, layer: int, used: np.ndarray, high: np.ndarray) -> None:
        """A step that asks a layer for something."""
        if used.any():
            self.clock[layer] += 1
            self.count[layer] = self.count[layer] * F(DECAY) + used
        self.stamp[layer][used] = self.clock[layer]
        self.total[layer] += used
        self.high[layer] += used & high

    def turn(self, of: int, layer: int) -> int:
        """Layers until this one's turn."""
        return next(n for n in range(1, LAYERS + 1) if (layer + n) % LAYERS == of)

    def edgemoe(self, of: int, e: int, layer: int) -> float:
        """Frequency times nearness."""
        return self.total[of, e] * F((LAYERS + 1 - self.turn(of, layer)) / LAYERS)

    def hobbit(self, of: int, e: int, layer: int) -> float:
        """Four shares, weighted."""
        steps = F(max(1, self.clock[of]))
        near = F((LAYERS + 1 - self.turn(of, layer)) / LAYERS)
        terms = F(max(0, self.stamp[of, e])), self.total[of, e], self.high[of, e], near * steps
        out = F(0)
        for weight, term in zip(MIX, terms, strict=True):
            out = out + F(weight) * term / steps
        return out

    def eam(self, of: int, e: int, layer: int) -> float:
        """The most similar earlier text's share."""
        now = self.total / np.maximum(self.total.sum(-1, keepdims=True), F(1e-9))
        similar = [float((p.astype(float) * now).sum() / np.sqrt((p.astype(float) ** 2).sum())) for p in self.patterns]
        return self.patterns[int(np.argmax(similar)), of, e] * F(1 - self.turn(of, layer) / (LAYERS + 1))

    def plec(self, of: int, e: int, layer: int) -> float:
        """Minus the steps until it is expected to be used."""
        rate = np.clip(self.count[of, e] * F(1 - DECAY), F(1e-3), F(1))
        p = [rate if chance < 0 else chance for chance in self.foreseen[:, of, e]]
        p = p if of > layer else p[1:]
        wait = F(1) / rate
        for m in range(len(p) - 1, -1, -1):
            wait = (F(1) - p[m]) * (wait if m == len(p) - 1 else F(1) + wait)
        return -(wait + F(self.turn(of, layer) / LAYERS))


def plain_residents(policy: str, seen: Steps, slots: int, patterns: np.ndarray, pinned: np.ndarray) -> np.ndarray:
    """What a layer finds when its turn comes, [S, L, E]."""
    known, pool, out = Plain(patterns), set(), np.zeros(seen.used.shape, bool)
    for s in range(len(seen.used)):
        if seen.new_text[s] and policy != "plec":
            known.forget()
        known.foreseen = seen.foreseen[s] if policy == "plec" else known.foreseen
        for layer in range(LAYERS):
            out[s, layer] = [(layer, e) in pool for e in range(EXPERTS)]
            asked = {(layer, int(e)) for e in np.flatnonzero(seen.used[s, layer])}
            known.use(layer, seen.used[s, layer], seen.high[s, layer])
            worth = {}
            for of, e in pool | asked:
                first = np.inf if pinned[of, e] else getattr(known, policy)(of, e, layer)
                lets_in = policy != "plec" and (of, e) in asked
                worth[of, e] = (not (lets_in or pinned[of, e]), -first, -known.stamp[of, e], of, e)
            pool = set(sorted(worth, key=worth.__getitem__)[:slots])
    return out


@pytest.mark.parametrize("policy", [name for name, policy in POLICIES.items() if policy.shared])
def test_a_pool_holds_what_plain_python_says(policy):
    rng = np.random.default_rng(len(policy))
    chance = rng.dirichlet(np.full(EXPERTS, 0.7), LAYERS)
    used = rng.random((STEPS, LAYERS, EXPERTS)) < 2.5 * chance
    used[rng.random((STEPS, LAYERS)) < 0.1] = False
    used[50] = True  # more than any pool here holds
    new = np.isin(np.arange(STEPS), [0, 40, 41, 90])
    foreseen = np.where(rng.random((STEPS, 2, LAYERS, EXPERTS)) < 0.3, -1, rng.random((STEPS, 2, LAYERS, EXPERTS))).astype(F)
    seen = Steps(used, used & (rng.random(used.shape) < 0.5), new, foreseen)
    patterns = rng.random((5, LAYERS, EXPERTS)).astype(F) * (rng.random((5, LAYERS, EXPERTS)) < 0.7)
    some = (np.arange(LAYERS * EXPERTS) % 9 == 4).reshape(LAYERS, EXPERTS)
    for slots, pinned in itertools.product(((1, 1, 2, 2), (4, 3, 3, 5)), (some, some & False)):
        known = Knowledge(patterns=patterns, mix=MIX, pinned=pinned)
        found = residents(seen, np.array(slots), policy, known)
        wanted = plain_residents(policy, seen, sum(slots), patterns, pinned)
        np.testing.assert_array_equal(found, wanted, err_msg=str(slots))
        assert (found[1:] | ~(found[:-1] & pinned)).all() and (found & some).any()
    np.testing.assert_array_equal(policy_hits(seen, np.array(slots), policy, known), (used & wanted).sum(2))


def test_a_pool_goes_where_the_work_is():
    """One layer uses two experts, the others all of theirs in turn: a pool gives the others what the one does not need, layers with slots of
    their own can't."""
    used = np.zeros((60, LAYERS, EXPERTS), bool)
    used[:, 0, 0] = True
    for layer in range(1, LAYERS):
        used[np.arange(60), layer, np.arange(60) % 4] = True
    slots = np.array([4, 4, 4, 1])
    own, shared = (policy_hits(used, slots, policy).sum() for policy in ("lfu", "edgemoe"))
    assert shared > own and shared == used.sum() - (1 + 3 * 4)
