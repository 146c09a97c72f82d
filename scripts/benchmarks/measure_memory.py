"""Measures how peak memory grows with the work: prompts collected, texts whose activations are written, sweep points.

`python measure_memory.py` runs every workload at 1, 2 and 8 times its size, each in a process of its own, on a
random model, and writes the peak resident memory of each, and what the compiled programs ask for. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import jaxmech as jm
from jaxmech.behavior.scoring import encode_table, take
from jaxmech.contrast.moments import empty_moments
from jaxmech.models.config import ModelConfig, Rope
from jaxmech.models.decoder import init_params
from jaxmech.sae.collect import update_moments
from jaxmech.sae.module import SAE, SAEConfig
from jaxmech.study.stages.contrast import find_pairs, stream_moments

ALPHABET, SIZES = "0123456789 abcdefghijklmnopqrstuvwxyz$.:?\n", (1, 2, 8)
LAYERS, WIDTH, FEATURES, FAMILIES, BATCH, LENGTH = 8, 256, 4096, 4, 32, 128
PAIRS, TEXTS, POINTS, CHUNK = 24, 128, 128, 32  # of each family; in all; in all; in a chunk


def language_model() -> jm.LanguageModel:
    """A random model over characters."""
    vocab = {"<bos>": 0} | {c: i + 1 for i, c in enumerate(ALPHABET)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<bos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    config = ModelConfig(
        family="llama", vocab_size=len(vocab), n_layers=LAYERS, d_model=WIDTH, n_heads=4, n_kv_heads=2, head_dim=64,
        d_mlp=1024, activation="silu", norm_eps=1e-6, rope=Rope(1e4), query_scale=0.125, max_positions=1024,
        is_local=(False,) * LAYERS, bos_id=0,
    )  # fmt: skip
    params = init_params(config, jax.random.key(0))
    return jm.LanguageModel(
        "random", config, params, PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")
    )


def dictionaries() -> SAE:
    keys = jax.random.split(jax.random.key(1), 2)
    config = SAEConfig(d_in=WIDTH, d_sae=FEATURES, activation="relu", layers=tuple(range(LAYERS)))
    params = {
        "W_enc": jax.random.normal(keys[0], (LAYERS, WIDTH, FEATURES)),
        "b_enc": jnp.zeros((LAYERS, FEATURES)),
        "W_dec": jax.random.normal(keys[1], (LAYERS, FEATURES, WIDTH)),
        "b_dec": jnp.zeros((LAYERS, WIDTH)),
    }
    return SAE(params, config)


def prompt_table(pairs: int) -> pd.DataFrame:
    """Pairs of prompts in families, worked examples in front, as a study builds them."""
    words = ["alpha", "bravo", "delta", "gamma", "hotel", "india", "kilos", "limas"]
    rows = []
    for family in range(FAMILIES):
        prefix = "".join(f"the {word} one has $10. how many: {i}\n" for i, word in enumerate(words * (family + 1)))
        for pair in range(pairs):
            for condition in ("plus", "minus"):
                query = f"a {condition} {words[pair % 8]} {pair} has $10. how many: "
                rows.append((prefix[-300:], query, family, pair, condition))
    table = pd.DataFrame(rows, columns=["prefix", "query", "family", "pair", "condition"])
    amounts = range(11)
    return table.assign(answers=[[str(a) for a in amounts]] * len(rows), score=[[a / 10 for a in amounts]] * len(rows))


def collection(times: int) -> tuple[str, dict]:
    lm, saes, table = language_model(), dictionaries(), prompt_table(PAIRS * times)
    encoded = encode_table(lm, table)
    ctx = SimpleNamespace(lm=lm, saes=saes, config=SimpleNamespace(batch=BATCH))
    pairs = find_pairs(table, encoded.prompts, "plus", "minus")
    jax.block_until_ready(stream_moments(ctx, encoded, pairs))
    peak = peak_memory()
    prompts, values = take(encoded, np.arange(BATCH))
    member, moments = jnp.ones((BATCH // 2, FAMILIES)), empty_moments(LAYERS, FAMILIES, FEATURES)
    lowered = update_moments.lower(
        lm.config, lm.params, prompts, saes=saes, values=values, member=member, moments=moments
    )
    return f"{len(table)} prompts", {"peak": peak} | compiled_memory(lowered)


def activations(times: int) -> tuple[str, dict]:
    lm, rng = language_model(), np.random.default_rng(0)
    tokens = rng.integers(1, lm.config.vocab_size, (TEXTS * times, LENGTH))
    with tempfile.TemporaryDirectory() as folder:
        jm.save_activations(lm.config, lm.params, tokens, mask=None, folder=folder, dtype="bfloat16", batch=8, rows=16)
    return f"{len(tokens)} texts", {"peak": peak_memory()}


def steered(vectors: jax.Array, coefficient: jax.Array) -> jm.edits.Edits:
    """The edit of one point: vectors [L,D] times its coefficient, at the decision token."""
    return {"resid_post": (jm.edits.add_vector(coefficient * vectors, jm.edits.at_last(LAYERS, LENGTH)),)}


def sweep(times: int) -> tuple[str, dict]:
    lm = language_model()
    prompts = jm.make_prompts(lm, [("a very generous one. " * 9)[-LENGTH + 1 :]] * 8, [str(a) for a in range(11)])
    length = prompts.tokens.shape[1]
    assert length == LENGTH, length
    vectors = jax.random.normal(jax.random.key(2), (LAYERS, WIDTH))
    points = jnp.linspace(-4.0, 4.0, POINTS * times)
    jm.sweep(lm.config, lm.params, prompts, jax.tree_util.Partial(steered, vectors), points, chunk=CHUNK)
    return f"{len(points)} points", {"peak": peak_memory()}


def peak_memory() -> int:
    """The most bytes that this process ever had resident."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM")


def compiled_memory(lowered) -> dict[str, int]:
    """Bytes that a program holds besides its arguments, and how many of its results stand where arguments stood."""
    memory = lowered.compile().memory_analysis()
    return {"temporaries": memory.temp_size_in_bytes, "reused": memory.alias_size_in_bytes}


WORKLOADS = {"collection": collection, "activations": activations, "sweep": sweep}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--times", type=int, help="run one workload, in this process, at so many times its size")
    args = parser.parse_args()
    if unknown := sorted(set(args.workloads) - set(WORKLOADS)):
        parser.error(f"workloads: expected {', '.join(WORKLOADS)}, got {', '.join(unknown)}")
    if args.times:
        what, measured = WORKLOADS[args.workloads[0]](args.times)
        print(json.dumps({"workload": args.workloads[0], "times": args.times, "what": what} | measured))
        return
    rows = []
    for name in args.workloads or WORKLOADS:
        for times in SIZES:
            begun = time.perf_counter()
            command = [sys.executable, __file__, name, "--times", str(times)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            rows.append(json.loads(done.stdout.splitlines()[-1]) | {"seconds": time.perf_counter() - begun})
            first = next(row for row in rows if row["workload"] == name)
            more = rows[-1]["peak"] - first["peak"]
            asked = {k: f"{rows[-1][k] / 2**20:.0f} MiB" for k in ("temporaries", "reused") if k in rows[-1]}
            print(
                f"{name}: {rows[-1]['what']}, peak {rows[-1]['peak'] / 2**20:.0f} MiB ({more / 2**20:+.0f}), "
                f"{rows[-1]['seconds']:.0f} s {asked or ''}",
                flush=True,
            )
    if args.out:
        args.out.write_text(json.dumps(rows, indent=2))


if __name__ == "__main__":
    main()
