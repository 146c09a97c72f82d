"""Exact answers of Gemma 3 270M beside samples of what it writes, parsed by a reader who knows no tokens.

    python scripts/checks/check_answers.py            # needs `pip install -e '.[quickstart]'`; some minutes

Prompts on which an answer easily stands for more than it says: decimals, thousands, answers that begin alike. Of the
allowed answers that a text begins with, the longest after which neither a letter or digit nor, of numbers, decimals or
thousands follow is the one that was given. Every share of samples has to lie within 4 standard errors of the exact one.
"""

from __future__ import annotations

import argparse
import re
import sys

import jax
import numpy as np

import jaxmech as jm

TEA = "Do you want tea? yes please\nDo you want cake? yes please\nDo you want milk? yes please\n"
CASES = {
    "decimals": ("Price list: apple $1.5, pear $1.5, plum $1.5, fig $1.5, date $1.5, kiwi $", ["1", "2", "3"]),
    "decimals among the answers": ("Fees: $1.5, $2, $1, $1.5, $2.5, $1, $", ["1", "1.5", "2", "2.5", "3"]),
    "thousands": ("$1,000; $1,000; $1,000; $1,000; $1,000; $", ["1", "100", "1000"]),
    "answers that begin alike": (
        TEA + "Do you want jam? yes please\nDo you want more?",
        [" yes", " yes please", " no"],
    ),
    "names that begin alike": (
        "Where do they live? Ann: New York. Bob: New York City. Cy: Boston. Di: New York City. Eve:",
        [" New York", " New York City", " Boston"],
    ),
    "README": (
        "Q: A kind player has $10. How much does the player give?\nA: $5\n"
        "Q: A generous player has $10. How much does the player give?\nA: $",
        [str(a) for a in range(11)],
    ),
}
NEW, BATCH = 7, 100


def given(text: str, answers: list[str]) -> int:
    """Which answer the text gives, -1 for none."""
    fits = []
    for n, answer in enumerate(answers):
        more = r"[.,]?\d" if answer[-1].isdigit() else r"\w|['’-]\w"
        spellings = {answer, f"{int(answer):,}" if answer.isdigit() else answer}
        fits += [(len(s), n) for s in spellings if text.startswith(s) and not re.match(more, text[len(s) :])]
    return max(fits, default=(0, -1))[1]


def samples(lm, prompt: str, count: int, key: jax.Array) -> list[str]:
    """What the model writes after the prompt, which is run once."""
    tokens, mask = jm.encode_prompts(lm, [prompt])
    early = jm.forward(lm.config, lm.params, tokens[:, :-1], mask=mask[:, :-1], logits="none", return_cache=True).cache
    cache = (early._replace(rows=np.zeros(BATCH, np.int32)),)
    last, texts = np.repeat(np.asarray(tokens[:, -1:]), BATCH, 0), []
    for own in jax.random.split(key, -(-count // BATCH)):
        ids = jm.generate(
            lm.config, lm.params, last, cache=cache, max_new_tokens=NEW, temperature=1.0, key=own, eos_ids=()
        )
        texts += lm.tokenizer.batch_decode(np.asarray(ids))
    return texts[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="gemma-3-270m")
    options = parser.parse_args()
    lm, worst = jm.load_model(options.model), 0.0
    for i, (name, (prompt, answers)) in enumerate(CASES.items()):
        exact = np.exp(np.asarray(jm.choice_distribution(lm, [prompt], answers).logprobs[0], np.float64))
        texts = samples(lm, prompt, options.samples, jax.random.fold_in(jax.random.key(options.seed), i))
        seen = np.bincount([given(text, answers) + 1 for text in texts], minlength=len(answers) + 1)[1:] / len(texts)
        off = np.abs(seen - exact) / np.sqrt(np.maximum(exact * (1 - exact), 1 / len(texts)) / len(texts))
        worst = max(worst, off.max())
        print(f"{name}: mass {exact.sum():.3f}, of samples {seen.sum():.3f}")
        for answer, p, share, z in zip(answers, exact, seen, off, strict=True):
            print(f"  {answer!r:>16}  exact {p:.4f}  samples {share:.4f}  {z:.1f} standard errors")
    print(f"the furthest off: {worst:.1f} standard errors")
    if worst > 4:
        sys.exit("samples and exact answers disagree")


if __name__ == "__main__":
    main()
