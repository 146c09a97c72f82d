"""How two sides are timed: results compared first, then in turn; and what the machine can do at best."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from peers.results import Row

PACKAGES = ("jaxmech", "jax", "jaxlib", "torch", "transformers", "transformer-lens", "sae-lens", "numpy", "scipy")
TOLERANCE = 1e-3
"""Of the largest value. Two orders of summation in float32, through 18 layers, differ by about 1e-5 of it."""


class Peer(NamedTuple):
    """Another way to do the same.

    run: returns once everything is computed. difference: (ours, its result) -> the largest one, relative to the
    largest value. whole: seconds of all the work for one of `run`, where that does a sample. most: runs at most.
    """

    name: str
    run: Callable[[], Any]
    difference: Callable[[Any, Any], float]
    required: float | None = None
    whole: float = 1.0
    most: int = 100
    note: str = ""


def relative(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference over the largest value."""
    a, b = np.asarray(a), np.asarray(b)
    return float(np.abs(a - b).max() / np.abs(b).max())


def seconds_of(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(run())
    return time.perf_counter() - start, result


def compare(
    workload: str,
    what: str,
    ours: Callable[[], Any],
    peers: Sequence[Peer],
    *,
    runs: int,
    flops: float | None = None,
    tolerance: float = TOLERANCE,
    note: str = "",
) -> list[Row]:
    """One row a peer, or one without a peer.

    What jaxmech's first run takes beyond the median of the others is its compilation.

    Raises:
      SystemExit: the results differ.
    """
    first, result = seconds_of(ours)
    differences = []
    for peer in peers:
        differences.append(peer.difference(result, peer.run()))
        if not differences[-1] <= tolerance:
            raise SystemExit(f"{workload}, {what}: {peer.name} differs by {differences[-1]:.1e} of the largest value")
    del result
    timings, theirs = [], [[] for _ in peers]
    for i in range(runs):
        timings.append(seconds_of(ours)[0])
        for peer, seconds in zip(peers, theirs, strict=True):
            if i < peer.most:
                seconds.append(seconds_of(peer.run)[0] * peer.whole)
    common = {
        "workload": workload,
        "what": what,
        "seconds": timings,
        "compile_seconds": max(first - float(np.median(timings)), 0.0),
        "flops": flops,
    }
    if not peers:
        return [Row(**common, peer="", note=note)]
    return [
        Row(
            **common,
            peer=peer.name,
            peer_seconds=seconds,
            difference=difference,
            required=peer.required,
            note="; ".join(filter(None, (note, peer.note))),
        )
        for peer, seconds, difference in zip(peers, theirs, differences, strict=True)
    ]


def peak(sizes: Sequence[int] = (2048, 4096), repeats: int = 4) -> dict[str, float]:
    """The best rate, in GFLOP/s, of a dense product of two [n,n] float32 matrices in either library."""
    import torch  # the gpu part does without

    rates = {"torch": 0.0, "XLA": 0.0}
    product = jax.jit(jax.numpy.matmul)
    for n in sizes:
        a = np.random.default_rng(0).standard_normal((n, n), np.float32)
        for name, x, f in (("torch", torch.from_numpy(a), torch.matmul), ("XLA", jax.numpy.asarray(a), product)):
            times = [seconds_of(lambda x=x, f=f: f(x, x))[0] for _ in range(repeats + 1)][1:]
            rates[name] = max(rates[name], 2 * n**3 / min(times) / 1e9)
    return rates


def with_shares(rows: Sequence[Row], peak_gflops: float) -> list[Row]:
    """The rows with their share of the peak."""
    return [
        row if row.flops is None else dataclasses.replace(row, share=row.flops / row.median / peak_gflops / 1e9)
        for row in rows
    ]


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    processor, memory = platform.processor(), 0.0
    if (info := Path("/proc/cpuinfo")).exists():
        names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    if hasattr(os, "sysconf"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }
