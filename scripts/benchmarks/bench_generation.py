"""Greedy generation from few prompts, Gemma 3 270M, float32, beside Hugging Face's with its cache.

    python scripts/benchmarks/bench_generation.py            # needs `pip install -e '.[quickstart,bench]'`

Results are compared first, then both sides are timed in turn; compilation is told apart. A step reads every weight
once, however few the rows: so one prompt should take no longer than two.
"""

from __future__ import annotations

import argparse

import bench_environment

if __name__ == "__main__":
    bench_environment.enter()

import numpy as np
import peer_models
import torch
from peers.results import Row
from peers.timing import Peer, compare, machine

import jaxmech as jm

NEW = 32
TEXT = "Q: A generous player has $10. How much does the player give?\nA: $5\nQ:"


def rows(lm, model, counts: list[int], runs: int) -> list[Row]:
    """One row a number of prompts."""
    out = []
    for count in counts:
        tokens, mask = jm.encode_prompts(lm, [TEXT] * count)
        length = int(mask[0].sum())
        ids = torch.from_numpy(np.asarray(tokens[:, -length:])).long()

        def ours(tokens=tokens, mask=mask):
            return jm.generate(lm.config, lm.params, tokens, mask=mask, max_new_tokens=NEW, eos_ids=())

        def theirs(ids=ids):
            with torch.no_grad():
                return model.generate(ids, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False)[:, -NEW:].numpy()

        peer = Peer("Hugging Face generate", theirs, lambda a, b: float(np.mean(np.asarray(a) != b)), required=1.0)
        what = f"{NEW} new tokens for {count} prompt{'s' * (count > 1)} of {length}"
        out += compare("generation", what, ours, [peer], runs=runs)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 2, 8])
    options = parser.parse_args()
    lm = jm.load_model("gemma-3-270m")
    with peer_models.model_file(None) as gguf:
        model = peer_models.hf_model(gguf)
    print(machine())
    for row in rows(lm, model, options.prompts, options.runs):
        print(
            f"{row.what}: jaxmech {row.median:.2f} s ({min(row.seconds):.2f} to {max(row.seconds):.2f}; compiled in "
            f"{row.compile_seconds:.1f} s), {row.peer} {np.median(row.peer_seconds):.2f} s, ratio {row.ratio:.2f}"
        )


if __name__ == "__main__":
    main()
