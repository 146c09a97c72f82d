"""jaxmech beside Hugging Face, TransformerLens, SAELens and NumPy: the same work, on one machine, in one run.

Gemma 3 270M, float32. Each workload first compares the two sides' results, then times them in turn; one row is one
comparison. Peers that loop over thousands of points are timed on a few of them, which the row says (`--full`: on all).

  W1 the residual stream after every layer      W5 gradients at all layers and positions
  W2 dictionaries of all layers, encoded        W6 a contrast's tests over a million features
  W3 features patched at all layers             W7 a thousand matched random feature sets
  W4 a steering sweep (W4-last, W4-all)         gpu 9B shapes in bfloat16; runs alone, and needs no peer

`python bench_peers.py [W1 W2 ...] [--out FILE.json]` runs some or all of W1 to W7 and stores their rows in the
file, beside those of the others; `--table FILE.json` prints a file's rows as Markdown. Needs the packages of
`jaxmech[bench]`, and of `jaxmech[quickstart]` for the model (or its file, by --gguf).
"""

from __future__ import annotations

import bench_environment

if __name__ == "__main__":
    bench_environment.enter()

# ruff: noqa: E402
import argparse
import os
import sys
import warnings
from pathlib import Path

from peers.results import markdown, show, store
from rich.console import Console

WORKLOADS = {
    "W1": ("activations", "residuals"),
    "W2": ("activations", "encoding"),
    "W3": ("patching", "patching"),
    "W4-last": ("steering", "at_last"),
    "W4-all": ("steering", "everywhere"),
    "W5": ("gradient", "gradient"),
    "W6": ("contrast", "contrast"),
    "W7": ("random_sets", "random_sets"),
}
"""Module of `peers` and function in it. W4 has two halves, stored each as it comes."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "workloads",
        nargs="*",
        metavar="WORKLOAD",
        help="W1 to W7, all by default; W4-last or W4-all, its halves; or gpu",
    )
    parser.add_argument("--out", type=Path, help="JSON file to store the rows in")
    parser.add_argument("--table", type=Path, metavar="FILE.json", help="print this file's rows as Markdown, no more")
    parser.add_argument("--gguf", type=Path, help="file of Gemma 3 270M, instead of the installed package")
    parser.add_argument("--runs", type=int, default=5, help="of each side; the slowest peers run less often")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--full", action="store_true", help="peers' loops over all points: hours")
    args = parser.parse_args()
    args.workloads = [half for name in args.workloads for half in (("W4-last", "W4-all") if name == "W4" else (name,))]
    if unknown := set(args.workloads) - set(WORKLOADS) - {"gpu"}:
        parser.error(f"workloads: expected {', '.join(WORKLOADS)}, W4 or gpu, got {', '.join(sorted(unknown))}")
    if "gpu" in args.workloads and len(args.workloads) > 1:
        parser.error("workloads: gpu runs alone")
    return args


def run_gpu(args: argparse.Namespace, console: Console) -> None:
    from peers import gpu, timing

    machine, peak, rows = timing.machine() | gpu.device(), gpu.rates(quick=args.quick), []
    rates = ", ".join(f"{rate:.3g} {name}" for name, rate in peak.items())
    console.print(f"{machine['device']}: {rates}", highlight=False)
    for row in gpu.measure(peak, quick=args.quick, runs=args.runs):
        rows.append(row)
        if args.out:
            store(args.out, "gpu", rows, machine, peak)
        console.print(f"{row.what}: {row.median:.3g} s, compiled in {row.compile_seconds:.3g} s", highlight=False)
    show(console, rows)


def run(args: argparse.Namespace, console: Console) -> None:
    import importlib

    import torch
    from peer_models import model_file
    from peers import timing
    from peers.bench import QUICK, Bench, Sizes

    torch.set_num_threads(os.cpu_count())
    rows = []
    with model_file(args.gguf) as gguf:
        bench = Bench(gguf, QUICK if args.quick else Sizes(), args.runs, args.full)
        for name in args.workloads or WORKLOADS:
            module, function = WORKLOADS[name]
            before = timing.peak()
            found = getattr(importlib.import_module(f"peers.{module}"), function)(bench)
            peak = {side: max(rate, before[side]) for side, rate in timing.peak().items()}
            found = timing.with_shares(found, max(peak.values()))
            if args.out:
                store(args.out, name, found, timing.machine(), peak)
            show(console, found)
            rates = ", ".join(f"{side} {rate:.0f} GFLOP/s" for side, rate in peak.items())
            console.print(f"dense products: {rates}\n", highlight=False)
            rows += found
    for row in rows:
        if row.required and row.ratio < row.required:
            console.print(f"{row.workload} against {row.peer}: {row.ratio:.2f}×, asked {row.required:g}×")


def main() -> None:
    args, console = parse(), Console(width=200)
    warnings.filterwarnings("ignore")
    if args.table:
        print(markdown(args.table))
    elif "gpu" in args.workloads:
        run_gpu(args, console)
    else:
        run(args, console)


if __name__ == "__main__":
    sys.exit(main())
