"""The collectives of a compiled program, read from its HLO text: what kind, how many bytes, among which devices, how often.

Reads what XLA writes for CPUs, TPUs and GPUs, with jax 0.10 and 0.11: operations in two halves (`-start`, `-done`) count once, and so do those that
TPU compilers spread over several fusions. Knows no model and no mesh.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "collective-broadcast",
)  # fmt: skip
"""What counts as one; a GPU compiler that was told to cut permutes into sends and receives is not followed."""

_SIZES = {"pred": 8, "token": 0, "opaque": 0, "bf16": 16}


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
        kind: one of `KINDS`.
        bytes: of its arrays on one device, the larger of operands and results: for an all-gather of what is gathered, for a reduce-scatter of
            what is reduced. Of logical shapes: tiles that a TPU fills up are not in it.
        dtype, shape: of its largest array, such as 'bf16' and (8, 128).
        groups: devices that take part, by their place in the mesh; of a permute its (source, target) pairs; empty for all devices.
        times: how often it runs in one call of the program; None in a loop of unknown length.
        asynchronous: whether it is begun and awaited apart, so that something can be computed meanwhile.
        computation, name: where it stands in the text.
    """

    kind: str
    bytes: int
    dtype: str
    shape: tuple[int, ...]
    groups: tuple[tuple[int, ...], ...]
    times: int | None
    asynchronous: bool
    computation: str
    name: str

    @property
    def sent(self) -> float:
        """Bytes that a device sends each time: as they are for a permute, (n-1)/n of them round a ring of n, and that twice for an all-reduce.

        Not known, and counted as all, where the groups are (`groups` is empty).
        """
        if self.kind in ("collective-permute", "collective-broadcast"):
            return self.bytes
        part = 1 - 1 / len(self.groups[0]) if self.groups else 1.0
        return self.bytes * part * (2 if self.kind == "all-reduce" else 1)


@dataclasses.dataclass(frozen=True)
class _Line:
    name: str
    shape: str
    op: str
    operands: str
    attributes: str
    root: bool


def collectives(hlo_text: str) -> list[Collective]:
    """The collectives of an optimized program, in the order of the text.

    Args:
        hlo_text: `compiled.as_text()`.

    Returns:
        Each once; those of computations that nothing calls are left out.
    """
    computations, entry = _computations(hlo_text)
    times = _times(computations, entry)
    begins = [line for lines in computations.values() for line in lines if line.op == "async-start"]
    awaited = {called for line in begins for called in _called(line.attributes)}
    found = []
    for where, lines in computations.items():
        if where not in times or _goes_on(where, lines):
            continue
        begun_here = where in awaited or any(_START in line.attributes for line in lines)
        for line in lines:
            kind = line.op.removesuffix("-start")
            if kind in KINDS and not any(called in times and _has(computations[called], kind) for called in _called(line.attributes)):
                found.append(_collective(kind, line, where, times[where], begun_here))
    return found


_START, _DONE = 'custom_call_target="AsyncCollectiveStart"', 'custom_call_target="AsyncCollectiveDone"'


def _goes_on(where: str, lines: list[_Line]) -> bool:
    """Whether a TPU's fusion only goes on with a collective, or ends it, that another has begun."""
    if any(_START in line.attributes for line in lines):
        return False
    return where.startswith("async_collective_fusion") or any(_DONE in line.attributes for line in lines)


def _has(lines: list[_Line], kind: str) -> bool:
    return any(line.op == kind for line in lines)


def _collective(kind: str, line: _Line, where: str, times: int | None, begun_here: bool) -> Collective:
    started = line.op.endswith("-start")
    result = line.shape
    if started and result.startswith("((" if kind == "all-reduce" else "("):  # (operands, results, ...); an all-reduce may give its results alone
        operands, result = _parts(result)[:2]
        result = max(operands, result, key=lambda text: sum(map(_bytes, _arrays(text))))
    arrays, groups = _arrays(result), _groups(kind, line.attributes)
    total = sum(map(_bytes, arrays))
    dtype, shape = max(arrays, key=_bytes)
    if kind == "reduce-scatter" and not started and groups:
        total *= len(groups[0])
    apart = (started and '"is_sync":true' not in line.attributes) or begun_here  # a GPU compiler writes halves also where it awaits at once
    return Collective(kind, total, dtype, shape, groups, times, apart, where, line.name)


# --- Arrays and groups


def _arrays(text: str) -> list[tuple[str, tuple[int, ...]]]:
    """(dtype, shape) of every array in a shape's text."""
    found = re.findall(r"\b([a-z][a-z0-9]*)\[([0-9,<=]*)\]", re.sub(r"/\*.*?\*/|\{[^{}]*\}", "", text))
    return [(dtype, tuple(int(size.lstrip("<=")) for size in sizes.split(",") if size)) for dtype, sizes in found]


def _bytes(array: tuple[str, tuple[int, ...]]) -> int:
    dtype, shape = array
    digits = re.search(r"\d+", dtype)
    bits = _SIZES.get(dtype, int(digits[0]) if digits else 0)
    return -(-math.prod(shape) * bits // 8)


def _parts(text: str) -> list[str]:
    """The parts of a tuple's text, at its first level."""
    parts, depth, begin = [], 0, 1
    for at, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if (depth == 1 and letter == ",") or depth == 0:
            parts.append(text[begin:at].strip())
            begin = at + 1
    return [part for part in parts if part]


def _groups(kind: str, attributes: str) -> tuple[tuple[int, ...], ...]:
    """Devices that belong together: written out, as an iota that is reshaped and transposed, or as axes of a mesh."""
    if kind == "collective-permute":
        return _written(attributes, "source_target_pairs")
    if "replica_groups={{" in attributes:
        return _written(attributes, "replica_groups")
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes):
        shape, of, order = (_numbers(part) for part in found.groups(default=""))
        ids = np.arange(math.prod(of)).reshape(of)
        return _rows((ids.transpose(order) if order else ids).reshape(shape))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", attributes):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", found[1])}
        axes = re.findall(r"'([^']*)'", found[2])
        if set(axes) <= sizes.keys() and ":(" not in found[2]:
            names = list(sizes)
            order = [names.index(name) for name in (*(n for n in names if n not in axes), *axes)]
            ids = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values())).transpose(order)
            return _rows(ids.reshape(-1, math.prod(sizes[name] for name in axes)))
    return ()


def _written(attributes: str, field: str) -> tuple[tuple[int, ...], ...]:
    found = re.search(field + r"=\{(\{.*?\})\}", attributes)
    return tuple(tuple(_numbers(group)) for group in re.findall(r"\{([\d,]*)\}", found[1])) if found else ()


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",") if part]


def _rows(ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(i) for i in row) for row in ids)


# --- Computations, and how often each runs

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_NAMED = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")


def _computations(text: str) -> tuple[dict[str, list[_Line]], str]:
    """The lines of each computation, and the name of the first that runs."""
    computations: dict[str, list[_Line]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if head := _HEAD.match(line):
            current = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and (named := _NAMED.match(line)):
            current.extend(_line(named[2], named[3], bool(named[1])))
    return computations, entry or next(reversed(computations), "")


def _line(name: str, rest: str, root: bool) -> Iterator[_Line]:
    """`shape op(operands), attributes`, in which shapes and operands have brackets of their own."""
    at = _end(rest, 0) if rest.startswith("(") else rest.find(" ")
    found = re.match(r"\s*([\w\-]+)\(", rest[at:])
    if at > 0 and found:
        begin = at + found.end() - 1
        end = _end(rest, begin)
        yield _Line(name, rest[:at], found[1], rest[begin + 1 : end - 1], rest[end:], root)


def _end(text: str, begin: int) -> int:
    """Behind the bracket that closes the one at `begin`."""
    depth = 0
    for at in range(begin, len(text)):
        depth += (text[at] == "(") - (text[at] == ")")
        if depth == 0:
            return at + 1
    return len(text)


def _called(attributes: str) -> list[str]:
    """Computations that a line calls; the function that a reduction applies to two numbers is none."""
    names = re.findall(r"\b(?:calls|body|condition|true_computation|false_computation)=%?([\w.\-]+)", attributes)
    for several in re.findall(r"\b(?:branch_computations|called_computations|calls)=\{([^}]*)\}", attributes):
        names += re.findall(r"%?([\w.\-]+)", several)
    return names


def _times(computations: dict[str, list[_Line]], entry: str) -> dict[str, int | None]:
    """How often each computation runs that the first one leads to; every branch of a conditional counts as taken."""
    out: dict[str, int | None] = {}

    def visit(where: str, times: int | None) -> None:
        before = out.get(where, 0)
        out[where] = None if before is None or times is None else before + times
        for line in computations.get(where, []):
            trips = _trips(line, computations, where) if line.op == "while" else 1
            called = _called(line.attributes)
            if line.op == "call" and not called:
                called = re.findall(r"\bto_apply=%?([\w.\-]+)", line.attributes)
            for name in called:
                if name in computations:
                    visit(name, None if times is None or trips is None else times * trips)

    visit(entry, 1)
    return out


def _trips(loop: _Line, computations: dict[str, list[_Line]], where: str) -> int | None:
    """Turns of a loop: as XLA notes it, or from a counter that begins at a constant, grows by one and is compared with a constant."""
    if noted := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(noted[1])
    parts = dict(re.findall(r"\b(condition|body)=%?([\w.\-]+)", loop.attributes))
    condition, body = (_Lines(computations.get(parts.get(key, ""), [])) for key in ("condition", "body"))
    around = _Lines(computations[where])
    test = condition.root
    if test is None or test.op != "compare" or "direction=LT" not in test.attributes or body.root is None or body.root.op != "tuple":
        return None
    counter, limit = condition.operands(test)[:2]
    end = condition.constant(limit)
    index = re.search(r"index=(\d+)", counter.attributes) if counter is not None and counter.op == "get-tuple-element" else None
    first = around.operands(loop)[0]
    if end is None or index is None or first is None or first.op != "tuple":
        return None
    at = int(index[1])
    begin, grown = around.constant(around.operands(first)[at]), body.operands(body.root)[at]
    steps = [body.constant(line) for line in body.operands(grown)] if grown is not None and grown.op == "add" else []
    return max(0, end - begin) if begin is not None and 1 in steps else None


class _Lines:
    """Lines by name."""

    def __init__(self, lines: list[_Line]):
        self._by_name = {line.name: line for line in lines}
        self.root = next((line for line in lines if line.root), None)

    def operands(self, line: _Line) -> list[_Line | None]:
        """What a line takes."""
        names = [part.split(" ")[-1].lstrip("%") for part in _parts(f"({re.sub(r'/[*].*?[*]/', '', line.operands)})")]
        return [self._by_name.get(name) for name in names]

    def constant(self, line: _Line | None) -> int | None:
        """The whole number that it is, behind copies."""
        while line is not None and line.op in ("copy", "bitcast"):
            line = self.operands(line)[0]
        return int(line.operands) if line is not None and line.op == "constant" and re.fullmatch(r"-?\d+", line.operands) else None
