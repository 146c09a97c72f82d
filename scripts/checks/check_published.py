"""Checks tests/goldens/published.json, the real models' configurations and parameter counts, against transformers.

Needs torch and transformers. Every model is built from its config.json on torch's meta device, without memory, and
its distinct parameters are counted; exit code 1 if a count is not the published one.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

PUBLISHED = Path(__file__).resolve().parents[2] / "tests" / "goldens" / "published.json"


def count(auto_class, config) -> int:
    """Parameters of a model that is never allocated, tied ones once."""
    with torch.device("meta"):
        return sum(p.numel() for p in auto_class.from_config(config).parameters())


def read_config(fields: dict):
    """The configuration as transformers reads it from a checkpoint folder, defaults of its class filled in."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(fields))
        return AutoConfig.from_pretrained(folder)


def main() -> int:
    table = Table("model")
    for column in ("published", "counted", "published, with vision", "counted, with vision", ""):
        table.add_column(column, justify="right", no_wrap=True)
    failed = False
    for name, entry in json.loads(PUBLISHED.read_text()).items():
        config = read_config(entry["config"])
        expected = [entry["parameters"], entry.get("parameters_with_vision")]
        found = [count(AutoModelForCausalLM, config.get_text_config()), None]
        if expected[1] is not None:
            found[1] = count(AutoModelForImageTextToText, config)
        failed |= found != expected
        pairs = ("" if n is None else f"{n:,}" for pair in zip(expected, found, strict=True) for n in pair)
        table.add_row(name, *pairs, "equal" if found == expected else "[red]different")
    Console(width=120).print(table)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
