"""What a compiled program does, read from its HLO text: matrix products, memory traffic and collectives, loops counted.

XLA's own cost analysis counts the body of a loop once, and a scan over layers is a loop: here every computation is
weighted by how often it runs. The text is that of `jax.stages.Compiled.as_text()`, after partitioning, so all figures
are those of one chip. A loop whose length is not a constant counts `trips` times; both branches of a conditional count.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
    "reduce-scatter",
)  # fmt: skip
_BITS = {"pred": 8, "token": 0, "opaque": 0} | {
    f"{kind}{bits}": bits for kind in ("s", "u", "f", "bf", "c") for bits in (1, 2, 4, 8, 16, 32, 64, 128)
}
_ARRAY = re.compile(r"\b([a-z]+\d*)(?:e\d\w*)?\[([\d,]*)\](\{[^}]*\})?")
_NO_TRAFFIC = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
    "partition-id", "replica-id", "optimization-barrier", "iota", "broadcast",
}  # fmt: skip


class Array(NamedTuple):
    """One array of an instruction's result."""

    dims: tuple[int, ...]
    bits: int
    in_hbm: bool

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        return self.size * self.bits / 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """results: the arrays of its result, flattened; operands: names; rest: its attributes, as text."""

    name: str
    op: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    rest: str
    root: bool

    def calls(self, attribute: str) -> list[str]:
        """Names of the computations that an attribute names, one or `{a, b}`."""
        match = re.search(rf"\b{attribute}=(\{{[^}}]*\}}|%?[\w.\-]+)", self.rest)
        return re.findall(r"[\w.\-]+", match[1]) if match else []


Computation = dict[str, Instruction]


class Cost(NamedTuple):
    """Of one chip and one run. flops: of matrix products; hbm_bytes: read from and written to the chip's main memory,
    roughly; collectives: kind -> {"count", "bytes"} of what they leave on a chip; gathered: for every all-gather, how
    many entries its result has and what it is part of; loops: how many loops have a length that is not a constant.
    """

    flops: float
    hbm_bytes: float
    collectives: dict[str, dict[str, float]]
    gathered: list[tuple[int, str]]
    loops: int


def parse(text: str) -> tuple[dict[str, Computation], str]:
    """All computations by name, and the name of the entry."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$", line)
        if head:
            current = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif current is not None and (match := re.match(r"\s+(ROOT )?%?([\w.\-]+) = (.*)", line)):
            instruction = _instruction(match[2], match[3], bool(match[1]))
            current[instruction.name] = instruction
    if not entry:
        raise ValueError("text: expected the HLO text of a compiled program, found no entry computation")
    return computations, entry


def _instruction(name: str, text: str, root: bool) -> Instruction:
    stop = _closing(text, 0) + 1 if text.startswith("(") else text.index(" ")
    start = text.index("(", stop)
    end = _closing(text, start)
    inside = text[start + 1 : end]
    op = text[stop:start].strip()
    operands = (inside,) if op in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", inside))
    return Instruction(name, op, _arrays(text[:stop]), operands, text[end + 1 :], root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if not depth:
            return index
    raise ValueError(f"text: unbalanced parentheses in {text[:80]!r}")


def _arrays(text: str) -> tuple[Array, ...]:
    arrays = []
    for kind, dims, layout in _ARRAY.findall(text):
        space = re.search(r"S\((\d+)\)", layout)
        sizes = tuple(int(d) for d in dims.split(",") if d)
        arrays.append(Array(sizes, _BITS.get(kind, 8), space is None or space[1] == "0"))
    return tuple(arrays)


def cost(text: str, *, trips: int = 1) -> Cost:
    """Reads the HLO text of a compiled program.

    Args:
      trips: how often a loop runs if its length is not a constant in the program.
    """
    computations, entry = parse(text)
    flops = traffic = 0.0
    collectives: dict[str, dict[str, float]] = {}
    gathered: list[tuple[int, str]] = []
    channels: dict[str, tuple[str, str]] = {}
    loops: set[str] = set()
    for name, weight, fused in _runs(computations, entry, trips, loops):
        computation = computations[name]
        for i in computation.values():
            if i.op in ("convolution", "dot"):
                flops += weight * _product_flops(i, computation)
            if not fused:
                traffic += weight * _traffic(i, computation, computations)
            kind = i.op.removesuffix("-start")
            if kind not in COLLECTIVES:
                continue
            channel = re.search(r"channel_id=(\d+)", i.rest)
            # The compiler clones a collective into the computations that it overlaps it with; it runs once.
            if channel and channels.setdefault(channel[1], (name, i.name)) != (name, i.name):
                continue
            left = _left_on_chip(i)
            totals = collectives.setdefault(kind, {"count": 0.0, "bytes": 0.0})
            totals["count"] += weight
            totals["bytes"] += weight * sum(a.bytes for a in left)
            if kind == "all-gather":
                source = re.search(r'op_name="([^"]*)"', i.rest)
                gathered += [(a.size, source[1] if source else i.name) for a in left]
    return Cost(flops, traffic, dict(sorted(collectives.items())), gathered, len(loops))


def _left_on_chip(i: Instruction) -> tuple[Array, ...]:
    """A collective's results, without the operands with which the result of an asynchronous one begins."""
    arrays = tuple(a for a in i.results if a.dims or len(i.results) == 1)
    if i.op.endswith("-start") and i.op != "all-reduce-start" and len(arrays) > len(i.operands):
        return arrays[len(i.operands) :][: len(i.operands)]
    return arrays


def _runs(computations, entry: str, trips: int, loops: set[str]) -> Iterator[tuple[str, float, bool]]:
    """Every computation that does work, how often it runs, and whether it is part of a fusion; adds to `loops` those
    without a constant length."""
    stack = [(entry, 1.0, False)]
    while stack:
        name, weight, fused = stack.pop()
        yield name, weight, fused
        for i in computations[name].values():
            if i.op == "while":
                length = _length(i, computations)
                if length is None:
                    loops.add(i.name)
                stack += [(body, weight * (trips if length is None else length), fused) for body in i.calls("body")]
            elif i.op == "conditional":
                branches = i.calls("branch_computations") + i.calls("true_computation") + i.calls("false_computation")
                stack += [(branch, weight, fused) for branch in branches]
            elif i.op in ("fusion", "call", "async-start", "custom-call"):
                inside = i.calls("calls") + i.calls("called_computations") + (i.calls("to_apply") * (i.op == "call"))
                stack += [(c, weight, fused or i.op == "fusion") for c in inside if c in computations]


def _length(loop: Instruction, computations) -> int | None:
    """How often a loop runs, where it counts from 0 up to a constant, as scans do."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.rest):
        return int(known[1])
    condition = list(computations[loop.calls("condition")[0]].values())
    limits = [int(i.operands[0]) for i in condition if i.op == "constant" and re.fullmatch(r"-?\d+", i.operands[0])]
    return limits[0] if len(limits) == 1 and not any(i.op in ("or", "and", "not") for i in condition) else None


def _product_flops(i: Instruction, computation: Computation) -> float:
    """Two per multiply-add; the TPU compiler writes matrix products as convolutions."""
    left, right = (computation[name].results[0].dims for name in i.operands[:2])
    out = i.results[0].dims
    if i.op == "dot":
        dims = re.findall(r"lhs_contracting_dims=\{([\d,]*)\}", i.rest)[0]
        return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in dims.split(",") if d)
    a, b, c = re.findall(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest)[0]
    groups = re.search(r"batch_group_count=(\d+)", i.rest)
    per_place = right[b.index("i")] * out[c.index("f")] * left[a.index("b")] / (int(groups[1]) if groups else 1)
    inside = re.search(r"window=\{([^}]*)\}", i.rest)
    window = dict(re.findall(r"(\w+)=([\w\-]+)", inside[1] if inside else ""))
    places = 1
    for n, axis in enumerate(sorted(set(a) - {"b", "f"})):
        places *= _places(window, n, left[a.index(axis)], right[b.index(axis)], out[c.index(axis)])
    return 2.0 * per_place * places


def _places(window: dict[str, str], n: int, size: int, kernel: int, out: int) -> int:
    """Pairs of an output and a kernel position, along one axis, that meet an input rather than padding."""

    def option(name: str, default: str) -> str:
        return window[name].split("x")[n] if name in window else default

    low = int(option("pad", "0_0").split("_")[0])
    stride, spread, gaps = (int(option(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
    index = stride * np.arange(out)[:, None] + gaps * np.arange(kernel) - low
    return int(((index >= 0) & (index < spread * (size - 1) + 1) & (index % spread == 0)).sum())


def _traffic(i: Instruction, computation: Computation, computations) -> float:
    """Bytes that an instruction outside a fusion moves to and from main memory. For an array that is only sliced, or
    gathered from, the slices count; for one that is updated in place, the update."""
    if i.op in _NO_TRAFFIC or i.op.endswith("-done"):
        return 0.0
    if i.op == "fusion":
        inside = computations[i.calls("calls")[0]]
        read = sum(
            _read(inside, _parameter(inside, n), computations)
            for n, name in enumerate(i.operands)
            if computation[name].results and computation[name].results[0].in_hbm
        )
        return read + _written(i, inside)
    read = sum(a.bytes for name in i.operands for a in computation[name].results if a.in_hbm)
    write = sum(a.bytes for a in i.results if a.in_hbm)
    if i.op in ("dynamic-slice", "slice", "gather"):
        moved = sum(a.bytes for a in i.results)
        return moved * (computation[i.operands[0]].results[0].in_hbm + i.results[0].in_hbm)
    if i.op == "dynamic-update-slice":
        update = computation[i.operands[1]].results[0]
        return update.bytes * (update.in_hbm + i.results[0].in_hbm)
    if i.op.endswith("-start"):  # its result repeats the operand
        moved = min((a.bytes for a in i.results if a.dims), default=0.0)
        return moved * sum(a.in_hbm for a in i.results if a.dims)
    return read + write


def _parameter(inside: Computation, n: int) -> Instruction:
    return next(i for i in inside.values() if i.op == "parameter" and i.operands[0] == str(n))


def _read(inside: Computation, source: Instruction, computations) -> float:
    """Bytes that a fused computation reads of one of its parameters."""
    total, size = 0.0, sum(a.bytes for a in source.results)
    for user in inside.values():
        if source.name not in user.operands:
            continue
        first = user.operands[0] == source.name
        if user.op in ("dynamic-slice", "slice", "gather") and first:
            total += user.results[0].bytes
        elif user.op == "dynamic-update-slice" and first:
            continue
        elif user.op == "bitcast" and not user.root:
            total += _read(inside, user, computations)
        elif user.op == "fusion":
            within = computations[user.calls("calls")[0]]
            total += _read(within, _parameter(within, user.operands.index(source.name)), computations)
        else:
            return size
    return min(total, size)


def _written(i: Instruction, inside: Computation) -> float:
    root = next(r for r in inside.values() if r.root)
    while root.op == "bitcast":
        root = inside[root.operands[0]]
    if root.op == "dynamic-update-slice":
        return inside[root.operands[1]].results[0].bytes * i.results[0].in_hbm
    return sum(a.bytes for a in i.results if a.in_hbm)
