"""ARC against the published algorithm, request by request, and against its own bounds where a step asks for several experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmoe.offload.replay import residents
from jaxmoe.residency import POLICIES, Knowledge, Shape
from jaxmoe.residency.arc import B1, B2, T1, T2, shallow_first

EXPERTS = 14
SLOTS = (1, 2, 3, 4, 5, 7, 10, 13)


class Classical:
    """ARC as Megiddo and Modha print it (FAST 2003, figure 4); every list from its least to its most recent."""

    def __init__(self, c: int):
        self.c, self.p = c, 0.0
        self.t1, self.t2, self.b1, self.b2 = [], [], [], []

    def _replace(self, in_b2: bool) -> None:
        if self.t1 and (len(self.t1) > self.p or (in_b2 and len(self.t1) == self.p)):
            self.b1.append(self.t1.pop(0))
        else:
            self.b2.append(self.t2.pop(0))

    def request(self, x: int) -> None:
        """Cases I to IV."""
        t1, t2, b1, b2, c = self.t1, self.t2, self.b1, self.b2, self.c
        for held in (t1, t2):
            if x in held:
                held.remove(x)
                t2.append(x)
                return
        if x in b1:
            self.p = min(c, self.p + max(1, len(b2) / len(b1)))
            self._replace(False)
            b1.remove(x)
            t2.append(x)
        elif x in b2:
            self.p = max(0, self.p - max(1, len(b1) / len(b2)))
            self._replace(True)
            b2.remove(x)
            t2.append(x)
        else:
            if len(t1) + len(b1) == c:
                if len(t1) < c:
                    b1.pop(0)
                    self._replace(False)
                else:
                    t1.pop(0)
            elif len(t1) + len(b1) < c <= len(t1) + len(t2) + len(b1) + len(b2):
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * c:
                    b2.pop(0)
                self._replace(False)
            t1.append(x)


def requests(seed: int, steps: int) -> np.ndarray:
    """One expert a step: skewed ones, loops of many lengths, and skewed ones between which loops run."""
    rng, out = np.random.default_rng(seed), []
    while len(out) < steps:
        kind, n = rng.integers(3), int(rng.integers(20, 120))
        skewed = rng.permutation(EXPERTS)[np.minimum(rng.geometric(0.35, n) - 1, EXPERTS - 1)]
        loop = (rng.integers(EXPERTS) + np.arange(n) % rng.integers(2, EXPERTS + 1)) % EXPERTS
        out += [*(skewed, loop, np.where(rng.random(n) < 0.5, skewed, loop))[kind]]
    return np.array(out[:steps])


def test_arc_is_the_published_one_where_steps_ask_for_one_expert():
    """Every capacity is a layer; what is there after every request is compared, and with it every hit."""
    steps = 3000
    asked_SL = np.stack([requests(seed, steps) for seed in range(len(SLOTS))], axis=1)
    used = np.arange(EXPERTS) == asked_SL[:, :, None]
    found = residents(used, np.array(SLOTS), "arc")
    for layer, slots in enumerate(SLOTS):
        plain, both = Classical(slots), [0, 0]
        for s in range(steps):
            assert set(np.flatnonzero(found[s, layer])) == {*plain.t1, *plain.t2}, (slots, s)
            plain.request(int(asked_SL[s, layer]))
            both = [both[0] + (len(plain.b1) > 0), both[1] + (0 < plain.p < slots)]
        assert slots in (1, EXPERTS - 1) or min(both) > 20


@pytest.fixture(scope="module")
def sets():
    """Steps that ask for several experts, some for more than fit: `(used [S, L, E], lists after each step, residents after each step)`."""
    rng, steps = np.random.default_rng(0), 500
    asked = [requests(7 * layer + 1, 4 * steps).reshape(steps, 4) for layer in range(len(SLOTS))]
    counted = np.arange(4) < rng.integers(0, 5, (steps, 1, 1))
    used = ((np.stack(asked, axis=1)[..., None] == np.arange(EXPERTS)) & counted[..., None]).any(2)
    used[rng.random(steps) < 0.02] = True
    policy, tables = POLICIES["arc"], POLICIES["arc"].tables(Shape(len(SLOTS), EXPERTS, SLOTS), Knowledge())

    def step(rows, used):
        rows = jax.vmap(policy.touch)(rows, used[:, None], used[:, None])
        return rows, (rows["list"], rows["border"])

    lists, borders = jax.tree.map(np.asarray, jax.jit(lambda t, u: jax.lax.scan(step, t, u))(tables, jnp.asarray(used))[1])
    there = residents(np.concatenate([used, used[:1]]), np.array(SLOTS), "arc")[1:]
    return used, lists, borders, there


def test_lists_stay_within_their_bounds(sets):
    used, lists, borders, _ = sets
    t1, t2, b1, b2 = ((lists == which).sum(2) for which in (T1, T2, B1, B2))
    c = np.array(SLOTS)
    assert (t1 + t2 <= c).all() and (t1 + b1 <= c).all() and (t1 + t2 + b1 + b2 <= 2 * c).all()
    assert (borders >= 0).all() and (borders <= c).all() and (borders[:, 2] > 0).any() and (b2 > 0).any()
    held, need = (lists == T1) | (lists == T2), used.sum(2)
    fits = need <= c
    assert (held | ~used)[fits].all() and fits.mean() > 0.5 and not fits.all()
    assert (held.sum(2) == np.minimum(c, np.maximum.accumulate(held.sum(2)))).all()  # a full cache stays full
    assert ((held & used).sum(2) == np.minimum(need, c)).all()
    np.testing.assert_array_equal((t1 + t2 < c) & (b1 + b2 > 0), False)


def test_what_choose_keeps_is_what_arc_holds(sets):
    _, lists, _, there = sets
    np.testing.assert_array_equal(there, (lists == T1) | (lists == T2))


@pytest.mark.parametrize("layers", [2, 3, 4, 8])
def test_fate_keeps_the_first_layers(layers):
    experts, active = 8, 2
    for total in range(layers * active, layers * experts + 1):
        slots = shallow_first(total, layers, experts, active)
        full = [n == experts for n in slots]
        assert len(slots) == layers and sum(slots) == total and all(active <= n <= experts for n in slots)
        deep = slots[min(3, full.index(False)) if False in full else layers :]
        assert all(full[: layers - len(deep)]) and (not deep or max(deep) - min(deep) <= 1)
        most = max(n for n in range(min(3, layers) + 1) if n * experts + (layers - n) * active <= total)
        assert all(full[:most])
    assert shallow_first(3 * experts + 5 * active, 8, experts, active) == (experts,) * 3 + (active,) * 5
