"""Compiles the programs of a study for TPU slices, on a machine that has none: do they fit, and what do they do.

Forward, sweep, collection, attribution and the training of dictionaries for all layers, at the sizes of published
models, in bfloat16 with float32 dictionaries, sharded as the library shards them. No weights are needed: the shapes
come from the configurations in tests/goldens/published.json. Exit code 1 if a program needs more memory than a chip
has, or gathers a whole parameter.

Needs the package libtpu (x86 Linux), for example by `pip install "jax[tpu]"`. A program takes the compiler one to three
minutes. `python compile_tpu.py --model gemma-2-9b --topology v5e:2x4 --program forward`; without options
everything. With `--out FILE.json` rows are written as they come, and rows of other programs that are already there
stay; with `--missing` too, what the file has is not compiled again. `--table FILE.json` prints a file's rows as
Markdown and compiles nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing runs; and JAX should not look for a TPU first

# ruff: noqa: E402
from rich.console import Console
from rich.table import Table

from jaxmech.ahead import GIB, Report, compile_ahead, topology_mesh
from jaxmech.ahead.programs import PROGRAMS, Sizes
from jaxmech.models.families import config_from_hf

PUBLISHED = Path(__file__).resolve().parents[2] / "tests" / "goldens" / "published.json"
COLUMNS = (
    "model", "slice", "mesh", "program", "arguments", "temporaries", "total", "of", "TFLOP", "moved", "collectives",
)  # fmt: skip


class Slice(NamedTuple):
    """A topology, and its chips as data x model."""

    topology: str
    data: int
    model: int


FEATURES = {"gemma-2-9b": 16384, "llama-3.1-8b": 32768, "gemma-3-27b": 16384}
"""Features of each layer's dictionary: Gemma Scope's and Gemma Scope 2's small width, and Llama Scope's."""
SLICES = {
    "gemma-2-9b": (Slice("v5e:2x4", 1, 8), Slice("v6e:2x4", 1, 8), Slice("v5p:2x2x1", 1, 4)),
    "llama-3.1-8b": (Slice("v5e:4x4", 1, 16), Slice("v6e:2x4", 1, 8), Slice("v5p:2x2x1", 1, 4)),
    "gemma-3-27b": (Slice("v5e:4x8", 2, 16), Slice("v6e:2x4", 1, 8), Slice("v5p:2x2x1", 1, 4)),
}


def row(model: str, where: Slice, report: Report) -> dict[str, Any]:
    """What is kept of one program."""
    facts = dataclasses.asdict(report)
    del facts["compile_seconds"]  # the compiling machine's, not the program's
    slice_facts = {"topology": where.topology, "mesh": [where.data, where.model]}
    made = {"faults": report.faults, "compiler": compiler()}
    return {"model": model, "features": FEATURES[model], **slice_facts, **facts, **made}


def cells(row: dict[str, Any]) -> list[str]:
    """A table's line."""
    kinds = row["collectives"].items()
    moves = ", ".join(f"{c['count']:.0f} {kind} ({c['bytes'] / GIB:.2f})" for kind, c in kinds)
    mesh = " x ".join(map(str, row["mesh"]))
    sizes = [f"{row[name] / GIB:.2f}" for name in ("arguments", "temporaries", "total", "hbm")]
    work = [f"{row['flops'] / 1e12:.2f}", f"{row['hbm_bytes'] / GIB:.1f}", moves or "none"]
    return [row["model"], row["topology"], mesh, row["program"], *sizes, *work]


def print_markdown(record: dict[str, Any]) -> None:
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))
    for each in record["rows"]:
        print("| " + " | ".join(cells(each)) + " |" + "".join(f" **{fault}**" for fault in set(each["faults"])))
    print("\nCompiled by " + "; or ".join(sorted({each["compiler"] for each in record["rows"]})) + ".")


def print_rich(rows: list[dict[str, Any]]) -> None:
    table = Table(title="One chip, one run; GiB. moved: to and from the chip's memory; collectives: GiB of results")
    for column in COLUMNS:
        table.add_column(column, overflow="fold")
    for each in rows:
        table.add_row(*cells(each), style="red" if each["faults"] else "")
    Console(width=170).print(table)
    for each in rows:
        for fault in sorted(set(each["faults"])):
            print(f"{each['model']}, {each['topology']}, {each['program']}: {fault}")


def compiler() -> str:
    try:
        libtpu = version("libtpu")
    except PackageNotFoundError:
        libtpu = "missing"
    return f"jax {version('jax')} and libtpu {libtpu} on {platform.system()} {platform.machine()}"


def key(row: dict[str, Any]) -> tuple[str, str, str]:
    return row["model"], row["topology"], row["program"]


def read(path: Path | None) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["rows"] if path and path.exists() else []


def write(path: Path, rows: list[dict[str, Any]], sizes: Sizes) -> None:
    """The file's rows with these in place of those of the same programs, in the order of this script."""
    merged = {key(r): r for r in [*read(path), *rows]}
    places = [(m, s.topology, p) for m in SLICES for s in SLICES[m] for p in PROGRAMS]
    order = sorted(merged, key=lambda k: places.index(k) if k in places else len(places))
    assumed = {f.name: getattr(sizes, f.name) for f in dataclasses.fields(sizes) if f.name not in ("features", "dtype")}
    record = {"sizes": assumed, "rows": [merged[k] for k in order]}
    path.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")


def slices(model: str, topologies: list[str] | None) -> list[Slice]:
    """Those of this script, or the named ones, as `NAME` or `NAME=DATAxMODEL`."""
    known = {s.topology: s for s in SLICES[model]}
    if topologies is None:
        return list(known.values())
    found = []
    for text in topologies:
        name, _, mesh = text.partition("=")
        if mesh:
            found.append(Slice(name, *map(int, mesh.split("x"))))
        elif name in known:
            found.append(known[name])
        else:
            raise SystemExit(f"--topology {name}: for {model}, {', '.join(known)} are known; state a mesh, {name}=1x8")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", choices=SLICES)
    parser.add_argument("--topology", action="append", metavar="NAME[=DATAxMODEL]")
    parser.add_argument("--program", action="append", choices=PROGRAMS)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    parser.add_argument("--missing", action="store_true")
    parser.add_argument("--table", type=Path, metavar="FILE.json")
    options = parser.parse_args()
    if options.table:
        print_markdown(json.loads(options.table.read_text()))
        return 0
    published, rows = json.loads(PUBLISHED.read_text()), []
    done = {key(r) for r in read(options.out)} if options.missing else set()
    for model in options.model or SLICES:
        config, sizes = config_from_hf(published[model]["config"]), Sizes(FEATURES[model])
        for where in slices(model, options.topology):
            mesh = topology_mesh(*where)
            for name in options.program or PROGRAMS:
                if (model, where.topology, name) in done:
                    continue
                report = compile_ahead(PROGRAMS[name](config, mesh, sizes))
                rows.append(row(model, where, report))
                took = f"{report.compile_seconds:.0f} s"
                print(model, where.topology, name, took, *sorted(set(report.faults)), file=sys.stderr, flush=True)
                if options.out:
                    write(options.out, rows, sizes)
    print_rich(rows)
    return int(any(r["faults"] for r in rows))


if __name__ == "__main__":
    sys.exit(main())
