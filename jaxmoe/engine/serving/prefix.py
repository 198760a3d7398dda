"""What prompts have in common: keys of pages by their contents, and groups of prompts that should run one after another.

Host only, and token ids only: this file knows neither pages of a pool nor a model beyond the text that its fingerprint is made of.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

KEY_BYTES = 16

Ids = Sequence[int] | np.ndarray


def fingerprint(model: str, kv_dtype: str, page: int, policy: str = "", **more: str | int) -> bytes:
    """Stands for all that a page's contents depend on besides its tokens.

    Args:
        model: hash of the model's spec, with that of its weights where pages outlive a process.
        kv_dtype: of keys and values as they are stored, "int8" for instance.
        page: W, tokens of a page.
        policy: every option that changes what the model computes (experts dropped, merged, at lower precision), in any text that tells them apart.
        more: whatever else must not be mixed: a tenant's name, for instance.

    Returns:
        16 bytes.
    """
    said: list[Any] = [model, kv_dtype, page, policy, sorted(more.items())]
    return hashlib.blake2b(json.dumps(said).encode(), digest_size=KEY_BYTES).digest()


def page_keys(ids: Ids, page: int, salt: bytes, parent: bytes | None = None, start: int = 0) -> tuple[bytes, ...]:
    """Keys of the full pages of a sequence; equal keys mean equal tokens from the beginning on, and equal fingerprints.

    Args:
        ids: the sequence from its first token.
        page: W, tokens of a page.
        salt: of `fingerprint`.
        parent: key of page `start - 1`, where pages before `start` have their keys already.
        start: the first page that needs one.

    Returns:
        Keys of pages `start` to `len(ids) // page - 1`, 16 bytes each: blake2b of the salt, the key of the page before and the page's tokens.

    Raises:
        ValueError: there is a parent but no page before, or the other way round; or a page of no tokens.
    """
    if page < 1:
        raise ValueError(f"pages of {page} tokens: give at least 1")
    if (parent is None) != (start == 0):
        raise ValueError(f"keys from page {start} on with parent {parent!r}: the key of the page before is needed, and none before page 0")
    full = len(ids) // page
    if full <= start:
        return ()
    tokens = np.asarray(ids[start * page : full * page], "<i8").tobytes()
    base = hashlib.blake2b(hashlib.blake2b(salt, digest_size=KEY_BYTES).digest(), digest_size=KEY_BYTES)
    key, size, out = parent or bytes(KEY_BYTES), 8 * page, []
    for at in range(0, len(tokens), size):
        hashed = base.copy()
        hashed.update(key + tokens[at : at + size])
        key = hashed.digest()
        out.append(key)
    return tuple(out)


# --- Offline batches


@dataclasses.dataclass(frozen=True)
class PrefixGroup:
    """Prompts that run together, since they begin alike.

    Attributes:
        prompts: their numbers, those that have more in common next to each other.
        prefix: tokens that all of them begin with; 0 of a prompt that is alone.
        uncached: tokens that have to be computed, the prefix once.
        expected: new tokens that they are expected to give together.
    """

    prompts: tuple[int, ...]
    prefix: int
    uncached: int
    expected: int

    @property
    def saved(self) -> int:
        """Tokens of prompts that need not be computed again."""
        return (len(self.prompts) - 1) * self.prefix

    @property
    def ratio(self) -> float:
        """New tokens per token of the prompts to be computed: large ratios first keeps many sequences decoding while later prompts are computed."""
        return self.expected / max(1, self.uncached)


def prefix_groups(prompts: Sequence[Ids], page: int = 1, expected: Sequence[int] | None = None) -> list[PrefixGroup]:
    """Groups all prompts of a batch by the first-level prefixes that save the most tokens.

    A prompt belongs to one group, and shares that group's prefix alone; which ones a dynamic program over the tree of all prefixes finds. Prefixes
    are whole pages, and leave every prompt a token to compute, as a cache of pages does.

    Args:
        prompts: token ids of each.
        page: W, tokens of a page.
        expected: new tokens that each is expected to give; the same of each if not given.

    Returns:
        Groups by falling `ratio`, of equals those with the first prompt first; every prompt is in one. No grouping by one prefix each has a larger
        sum of `saved`.

    Raises:
        ValueError: a prompt is empty, or there are not as many expectations as prompts.

    Source: BatchLLM (Zheng et al., 2024, arXiv 2412.03594): global prefix tree, enlarged first-level prefixes, order by decoding over prefill.
    """
    if expected is not None and len(expected) != len(prompts):
        raise ValueError(f"{len(expected)} expectations of {len(prompts)} prompts")
    nodes = _tree([_shareable(ids, page, number) for number, ids in enumerate(prompts)], page)
    members = _members(nodes, _opened(nodes))
    out = []
    for at, numbers in members.items():
        parts = [numbers] if nodes[at].depth else [[number] for number in numbers]  # those at the root have nothing in common
        for part in parts:
            prefix = nodes[at].depth if len(part) > 1 else 0
            uncached = prefix + sum(len(prompts[i]) - prefix for i in part)
            out.append(PrefixGroup(tuple(part), prefix, uncached, sum(1 if expected is None else expected[i] for i in part)))
    return sorted(out, key=lambda group: (-group.ratio, min(group.prompts)))


def request_order(groups: Iterable[PrefixGroup]) -> list[int]:
    """The numbers of all prompts in the order in which they should be admitted: group after group, prefixes side by side."""
    return [number for group in groups for number in group.prompts]


def tree_tokens(prompts: Sequence[Ids], page: int = 1) -> int:
    """Tokens of prompts that have to be computed where every page with the same tokens before it is computed once and kept.

    No order of requests needs fewer; one prefix a group (`prefix_groups`) may need more where prefixes have prefixes in common.
    """
    shareable = [_shareable(ids, page, number) for number, ids in enumerate(prompts)]
    edges = sum(node.depth - parent for node, parent in _with_parents(_tree(shareable, page)))
    return sum(map(len, prompts)) - sum(map(len, shareable)) + edges


@dataclasses.dataclass
class _Node:
    """A prefix that is some prompt's end or that prompts part at: `depth` tokens; `ends`, prompts that go no further; `children`, places of nodes."""

    depth: int
    ends: list[int] = dataclasses.field(default_factory=list)
    children: list[int] = dataclasses.field(default_factory=list)


def _shareable(ids: Ids, page: int, number: int) -> np.ndarray:
    if len(ids) < 1:
        raise ValueError(f"prompt {number} is empty")
    if page < 1:
        raise ValueError(f"pages of {page} tokens: give at least 1")
    return np.asarray(ids[: (len(ids) - 1) // page * page], np.int64)


def _tree(prompts: list[np.ndarray], page: int) -> list[_Node]:
    """The tree of all prefixes without its unbranched ways; children come before their parents, the root is last.

    Built from the sorted prompts and what neighbours have in common, as a suffix tree is from a suffix array.
    """
    order = sorted(range(len(prompts)), key=lambda i: (tuple(prompts[i].tolist()), i))
    done: list[_Node] = []
    way = [_Node(0)]

    def close(depth: int) -> None:
        """Leaves all nodes of the way that are deeper, with a node at that depth at its end."""
        while way[-1].depth > depth:
            node = way.pop()
            if way[-1].depth < depth:
                way.append(_Node(depth))
            done.append(node)
            way[-1].children.append(len(done) - 1)

    before = None
    for number in order:
        ids = prompts[number]
        close(0 if before is None else _common(before, ids) // page * page)
        if len(ids) > way[-1].depth:
            way.append(_Node(len(ids)))
        way[-1].ends.append(number)
        before = ids
    close(0)
    return [*done, way[0]]


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    apart = a[:n] != b[:n]
    return int(apart.argmax()) if apart.any() else n


def _with_parents(nodes: list[_Node]) -> list[tuple[_Node, int]]:
    """Each node with its parent's depth."""
    parent = {child: node.depth for node in nodes for child in node.children}
    return [(node, parent.get(at, 0)) for at, node in enumerate(nodes)]


def _opened(nodes: list[_Node]) -> list[bool]:
    """Which nodes are the prefix of a group: an open one costs its depth, and gives it to each prompt whose deepest open prefix it is.

    `best[at][j]` is the most that the prompts below a node can save where their deepest open prefix above it is its j-th ancestor, the root being 0.
    """
    above: list[list[int]] = [[] for _ in nodes]  # depths of the ancestors
    for at in range(len(nodes) - 1, -1, -1):
        for child in nodes[at].children:
            above[child] = [*above[at], nodes[at].depth]
    best: dict[int, np.ndarray] = {}
    gain: list[np.ndarray] = []  # of opening a node, over not doing so
    for at, node in enumerate(nodes):
        depths = np.asarray([*above[at], node.depth], np.int64)
        closed = len(node.ends) * depths + sum((best.pop(child) for child in node.children), np.zeros(len(depths), np.int64))
        opened = closed[-1] - node.depth
        best[at] = np.maximum(closed[:-1], opened)
        gain.append(opened - closed[:-1])
    out = [False] * len(nodes)
    out[-1] = True
    place = {len(nodes) - 1: 0}  # which ancestor is open, of nodes that are reached
    for at in range(len(nodes) - 1, -1, -1):
        out[at] = out[at] or bool(gain[at][place[at]] > 0)
        for child in nodes[at].children:
            place[child] = len(above[at]) if out[at] else place[at]
    return out


def _members(nodes: list[_Node], opened: list[bool]) -> dict[int, list[int]]:
    """The prompts of each open node, in the order of the tree."""
    own: dict[int, int] = {}
    for at in range(len(nodes) - 1, -1, -1):
        own[at] = at if opened[at] else own[at]
        own.update(dict.fromkeys(nodes[at].children, own[at]))
    out: dict[int, list[int]] = {}
    for at, node in enumerate(nodes):
        if node.ends:
            out.setdefault(own[at], []).extend(node.ends)
    return out
