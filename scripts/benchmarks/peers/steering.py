"""W4: a steering vector times many coefficients, for prompts with worked examples, exact distributions over answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import cycle, islice

import jax
import jax.numpy as jnp
import numpy as np
import torch

import jaxmech as jm
from jaxmech.models.text import token_ids
from peers import hf_choices
from peers.bench import ANSWERS, APART, MIDDLE, Bench, steering_vector, to_torch
from peers.flops import attention_flops, layer_flops, unembed_flops
from peers.results import Row
from peers.timing import Peer, compare

TOLERANCE = 5e-3
"""Of log probabilities, absolute. The least likely answers differ most."""


def steered(vector: np.ndarray, coefficients: np.ndarray, n_layers: int, length: int, last: bool) -> jm.edits.Edits:
    """The sweep's edits: `vector` [D] times each of S coefficients, at the middle layer."""
    spans = jm.edits.at_last(n_layers, length, [MIDDLE]) if last else jm.edits.everywhere(n_layers, [MIDDLE])
    one = jm.edits.add_vector(jnp.broadcast_to(vector, (n_layers, len(vector))), spans)
    every = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (len(coefficients), *leaf.shape)), one)
    return {"resid_post": (every.replace(vector=every.vector * coefficients[:, None, None, None]),)}


def needed_flops(config, prefixes: dict[str, int], lengths: list[tuple[int, int]], points: int, nodes: int, last: bool):
    """Of a sweep that computes nothing twice: what lies before the edit once, what lies after it at every point.

    Args:
      prefixes: worked examples -> their tokens. lengths: of each prompt, tokens of its worked examples and of all.
    """
    before, behind = MIDDLE + 1, config.n_layers - MIDDLE - 1
    once, steered = config.n_layers, before + points * behind

    def tokens(start: int, stop: int) -> float:  # of one layer, for the tokens from `start` to `stop`
        return (stop - start) * (layer_flops(config) + attention_flops(config, (start + stop + 1) / 2))

    earlier = sum(tokens(0, P) for P in prefixes.values()) + sum(tokens(P, T - 1) for P, T in lengths)
    later = sum(tokens(T - 1, T + nodes) for _, T in lengths)
    read = len(lengths) * points * (1 + nodes) * unembed_flops(config)
    return earlier * (once if last else steered) + later * steered + read


class Loops:
    """The peers' loops, over a sample of the points (prompt, coefficient) that moves on with each run."""

    def __init__(self, bench: Bench, vector: np.ndarray, coefficients: np.ndarray, last: bool):
        self.bench, self.last = bench, last
        self.vectors = [float(c) * to_torch(vector) for c in coefficients]
        texts = bench.table["prefix"] + bench.table["query"]
        bos = bench.lm.config.bos_id
        self.prompts = [torch.tensor([bos, *token_ids(bench.lm.tokenizer, text)]) for text in texts]
        self.answers = hf_choices.encode_answers(bench.lm, texts.iloc[0], ANSWERS)
        S, B = len(self.vectors), len(self.prompts)
        # A step that shares no factor with the number of points visits all of them, prompts and coefficients mixed.
        order = [(i * 7919) % (S * B) for i in range(S * B)]
        self.points = cycle([divmod(i, B) for i in order])
        self.rows = cycle(range(B))

    def peer(self, name: str, run: Callable, required: float | None, least: int, note: str = "") -> Peer:
        """A loop over points; `least` of them in a sample."""
        total = len(self.vectors) * len(self.prompts)
        count = total if self.bench.full else min(least, total)

        def loop() -> list[tuple[int, int, np.ndarray]]:
            done = []
            for s, b in islice(self.points, count):
                logprobs = run(self.bench.hf, MIDDLE, self.prompts[b], self.answers, self.vectors[s], self.last)
                done.append((s, b, logprobs.numpy()))
            return done

        timed = "" if count == total else f"{count} of {total} points timed"
        note = "; ".join(filter(None, (timed, note)))
        return Peer(name, loop, furthest, required, whole=total / count, most=3, note=note)

    def kept(self, required: float) -> Peer:
        """The loop that keeps a prompt's cache over all coefficients."""
        B = len(self.prompts)
        count = B if self.bench.full else 1

        def loop() -> list[tuple[int, int, np.ndarray]]:
            done = []
            for b in islice(self.rows, count):
                every = hf_choices.kept_cache(self.bench.hf, MIDDLE, self.prompts[b], self.answers, self.vectors)
                done += [(s, b, logprobs.numpy()) for s, logprobs in enumerate(every)]
            return done

        points = len(self.vectors) * count
        timed = "" if count == B else f"{points} of {len(self.vectors) * B} points timed"
        return Peer("HF, prompt cache kept over coefficients", loop, furthest, required, B / count, most=3, note=timed)


def furthest(ours: np.ndarray, points: list[tuple[int, int, np.ndarray]]) -> float:
    """The largest difference of log probabilities [S,B,N] at the points that the peer computed."""
    return max(float(np.abs(ours[s, b] - logprobs).max()) for s, b, logprobs in points)


def at_last(bench: Bench) -> list[Row]:
    """W4, the edit at the last position."""
    return _rows(bench, last=True)


def everywhere(bench: Bench) -> list[Row]:
    """W4, the edit at all positions."""
    return _rows(bench, last=False)


@torch.no_grad()
def _rows(bench: Bench, last: bool) -> list[Row]:
    bench.hf.set_attn_implementation("sdpa")
    lm, table, sizes = bench.lm, bench.table, bench.sizes
    coefficients = np.linspace(-2, 2, sizes.coefficients, dtype=np.float32)
    vector = steering_vector(bench)
    choices = list(ANSWERS)
    shared = jm.make_prompts(lm, list(table["query"]), choices, prefixes=list(table["prefix"]))
    alone = jm.make_prompts(lm, list(table["prefix"] + table["query"]), choices)

    def sweep(prompts):
        edits = steered(vector, coefficients, lm.config.n_layers, prompts.tokens.shape[1], last)
        return np.asarray(jm.sweep(lm.config, lm.params, prompts, edits).logprobs)

    loops, sample = Loops(bench, vector, coefficients, last), sizes.sampled
    each = "one forward pass of the 11 answers a point"
    peers = [
        loops.peer("HF hooks, a plain loop", hf_choices.whole_texts, 80 if last else 20, sample, each),
        loops.peer("HF, prompt cache per coefficient", hf_choices.cached_prompt, 12 if last else 2.2, 2 * sample),
    ]
    if last:
        difference = lambda a, b: float(np.abs(a - b).max())  # noqa: E731
        peers.append(loops.kept(3.5))
        peers.append(Peer("jaxmech, nothing shared", partial(sweep, alone), difference, most=2, note=APART))
    whole = [len(prompt) for prompt in loops.prompts]
    own = [n - len(token_ids(lm.tokenizer, query)) for n, query in zip(whole, table["query"], strict=True)]
    return compare(
        "W4",
        f"{len(coefficients)} coefficients × {len(table)} prompts of {int(np.median(whole))} tokens, "
        + ("last position" if last else "all positions"),
        partial(sweep, shared),
        peers,
        runs=bench.runs,
        flops=needed_flops(
            lm.config,
            dict(zip(table["prefix"], own, strict=True)),
            list(zip(own, whole, strict=True)),
            len(coefficients),
            alone.trie.tokens.shape[1],
            last,
        ),
        tolerance=TOLERANCE,
    )
