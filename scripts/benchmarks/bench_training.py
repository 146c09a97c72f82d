"""Training a dictionary here against SAELens: tokens per second and quality, on one CPU in one run.

Gemma 3 270M, residual stream after layer 9, BatchTopK with 4,096 features of which 32 are active. Both sides get the
same tokens, batch size and number of steps, and their own defaults unless the table says otherwise. Printed are the
trainers' speeds on the same activations, the two sides in turn and the median of all their blocks of steps compared,
the speeds from token ids on, and the dictionaries' quality on activations held out, by one NumPy formula. Exit code 1
if any dictionary trained here has a worse FVU than the best of SAELens', or the trainer is less than twice as fast.

Needs the packages of `jaxmech[bench]`, and of `jaxmech[quickstart]` for the model (or its file, by --gguf). About ten
minutes on two cores: `python scripts/benchmarks/bench_training.py`.

`n` denotes tokens, `D` the width of the residual stream, `F` features.
"""

from __future__ import annotations

import bench_environment

if __name__ == "__main__":
    bench_environment.enter()

# ruff: noqa: E402
import argparse
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import torch
from datasets import Dataset
from peer_models import NAME, hf_model, keep_off_the_hub, model_file
from rich.console import Console
from rich.table import Table
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens import HookedTransformer

import jaxmech as jm
from jaxmech.activations.stream import ActivationStream, ArrayStream
from jaxmech.sae.formats import load_sae
from jaxmech.sae.training import SAETrainConfig, train_saes

LAYER, FEATURES, K = 9, 4096, 32
LENGTH, BOS = 128, 2
HELD = 32
"""Texts that nothing is trained on."""
LEAST = 2.0
"""Times SAELens' speed."""
TIMED_STEPS = 8
"""Steps that are timed together."""
PEER = {
    "its defaults, scaled": {"normalize": "expected_average_only_in", "lr": 3e-4, "rise": 0.0, "fall": 0.0},
    "scaled, lr 3e-3": {"normalize": "expected_average_only_in", "lr": 3e-3, "rise": 0.1, "fall": 0.3},
    "scaled, lr 1e-2": {"normalize": "expected_average_only_in", "lr": 1e-2, "rise": 0.1, "fall": 0.3},
    "whitened, lr 3e-3": {"normalize": "covariance_whitening", "lr": 3e-3, "rise": 0.1, "fall": 0.3},
}
"""SAELens' settings: its normalisation of activations, without which nothing is learnt in so few steps; the learning
rate, and the shares of the steps in which that rises and falls."""
OURS = {"its defaults": 0, "its defaults, seed 1": 1}
"""Seeds."""


class Trained(NamedTuple):
    """weights: of one dictionary, for raw activations. blocks: seconds of each `TIMED_STEPS` steps but the first ones,
    with their compilation. total: seconds of all of it, from asking for the first activations on."""

    weights: Mapping[str, np.ndarray]
    blocks: np.ndarray
    total: float


class Clock:
    """Notes when each batch is asked for."""

    def __init__(self):
        self._times: list[float] = []

    def __call__(self) -> None:
        self._times.append(time.perf_counter())

    def blocks(self, steps: int) -> np.ndarray:
        """Seconds of each `TIMED_STEPS` of the last `steps` steps."""
        return np.diff([*self._times[-steps:], time.perf_counter()][::TIMED_STEPS])


class TimedStream(ArrayStream):
    def __init__(self, clock: Clock, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._clock = clock

    def batch(self, i: int) -> jax.Array:
        self._clock()
        return super().batch(i)


def text_rows(tokenizer, n: int) -> np.ndarray:
    """Token ids [n,LENGTH] of the documents that came with the installed Python packages, each row with a BOS."""
    folder, ids, seen = Path(np.__file__).parents[1], [], set()
    names = ("METADATA", "LICENSE", "LICENSE.txt")
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".md", ".rst") or p.name in names):
        if path.is_file() and (text := path.read_text(errors="ignore")) not in seen:
            seen.add(text)
            ids += tokenizer(text, add_special_tokens=False).input_ids
    rows = np.array(ids[: len(ids) // (LENGTH - 1) * (LENGTH - 1)], np.int32).reshape(-1, LENGTH - 1)
    if len(rows) < n:
        raise SystemExit(f"the installed packages have text for {len(rows)} rows of {LENGTH} tokens; {n} are needed")
    rows = np.random.default_rng(0).permutation(rows)[:n]
    return np.concatenate([np.full((n, 1), BOS, np.int32), rows], axis=1)


def peer_model(gguf: Path, tokenizer):
    """The same weights in TransformerLens, as SAELens uses them by default; `difference` compares what comes out."""
    keep_off_the_hub(tokenizer)
    return HookedTransformer.from_pretrained_no_processing(
        NAME, hf_model=hf_model(gguf), tokenizer=tokenizer, device="cpu", dtype=torch.float32
    )


def peer_store(model, rows: np.ndarray, batch: int) -> ActivationsStore:
    """SAELens' stream of activations from token ids, without those of the BOS."""
    return ActivationsStore(
        model=model,
        dataset=Dataset.from_dict({"tokens": rows.tolist()}),
        streaming=False,
        hook_name=f"blocks.{LAYER}.hook_resid_post",
        hook_head_index=None,
        context_size=LENGTH,
        d_in=model.cfg.d_model,
        n_batches_in_buffer=20,
        total_training_tokens=rows.size,
        store_batch_size_prompts=32,
        train_batch_size_tokens=batch,
        prepend_bos=True,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        exclude_special_tokens=torch.tensor([BOS]),
    )


def shuffled(x: np.ndarray, batch: int) -> Iterator[torch.Tensor]:
    """Batches of x [n,D], every row once before any twice."""
    x, rng = torch.from_numpy(x), np.random.default_rng(0)
    while True:
        order = torch.from_numpy(rng.permutation(len(x)))
        for start in range(0, len(x) - batch + 1, batch):
            yield x[order[start : start + batch]]


def peer_train(
    batches: Iterator[torch.Tensor], d_in: int, batch: int, steps: int, *, normalize, lr, rise, fall
) -> Trained:
    torch.manual_seed(0)
    clock = Clock()

    def timed():
        for x in batches:
            clock()
            yield x

    shape = {"d_in": d_in, "d_sae": FEATURES, "k": K, "device": "cpu", "dtype": "float32"}
    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(**shape, normalize_activations=normalize))
    config = SAETrainerConfig(
        n_checkpoints=0,
        checkpoint_path=None,
        save_final_checkpoint=False,
        total_training_samples=batch * steps,
        device="cpu",
        autocast=False,
        lr=lr,
        lr_end=lr / 10,
        lr_scheduler_name="constant",
        lr_warm_up_steps=round(rise * steps),
        adam_beta1=0.9,
        adam_beta2=0.999,
        lr_decay_steps=round(fall * steps),
        n_restart_cycles=1,
        train_batch_size_samples=batch,
        dead_feature_window=50,  # as here
        feature_sampling_window=2000,
        logger=LoggingConfig(log_to_wandb=False),
        n_batches_for_norm_estimate=10,
    )
    start = time.perf_counter()
    SAETrainer(config, sae, timed()).fit()
    total, blocks = time.perf_counter() - start, clock.blocks(steps)
    with tempfile.TemporaryDirectory() as folder:
        sae.save_inference_model(folder)
        weights = jax.device_get(load_sae(folder, site="resid_post", layer=LAYER).params)
    return Trained(weights, blocks[1:], total)


def our_train(stream, steps: int, clock: Clock | None = None, seed: int = 0) -> Trained:
    config = SAETrainConfig(d_sae=FEATURES, sparsity=K, kind="batchtopk", steps=steps, log_every=TIMED_STEPS)
    start = time.perf_counter()
    (stack,), _ = train_saes(config, stream, key=jax.random.key(seed), progress=False)
    total = time.perf_counter() - start
    blocks = clock.blocks(steps)[1:] if clock else np.zeros(0)
    return Trained(jax.device_get(stack.at(LAYER).params), blocks, total)


def quality(weights: Mapping[str, np.ndarray], x: np.ndarray) -> dict[str, float]:
    """Of a dictionary on raw activations x [n,D], kept as BatchTopK keeps them: the K*n entries that exceed their
    thresholds by the largest factor. FVU: squared error over squared distance from the mean."""
    p = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    pre = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    factor = pre / p["threshold"]
    cut = max(np.partition(factor, factor.size - K * len(x), axis=None)[-K * len(x)], 0.0)
    code = np.where(factor >= cut, pre, 0.0)
    error = np.mean((x - code @ p["W_dec"] - p["b_dec"]) ** 2, axis=0)
    variance = np.var(x, axis=0, dtype=np.float64)
    return {
        "fvu": error.sum() / variance.sum(),
        "median": float(np.median(error / variance)),
        "l0": np.count_nonzero(code) / len(x),
        "l0_threshold": np.count_nonzero(pre > p["threshold"]) / len(x),
        "used": float(np.mean(np.any(code, axis=0))),
    }


def activations(lm, rows: np.ndarray) -> np.ndarray:
    """The residual stream after LAYER, [n,D], without the BOS."""
    stream = ActivationStream(lm.config, lm.params, rows, layers=(LAYER,), buffer_tokens=rows.size, forward_batch=16)
    return np.asarray(stream.buffer(0)[0])


def difference(lm, model, rows: np.ndarray) -> float:
    """The largest difference between the two models' activations of some rows, over the largest activation."""
    name = f"blocks.{LAYER}.hook_resid_post"
    out = jm.forward(lm.config, lm.params, rows, taps={"x": jm.Tap("resid_post")}, logits="none")
    tokens = torch.from_numpy(rows.astype(np.int64))
    with torch.no_grad():
        cache = model.run_with_cache(tokens, names_filter=[name], stop_at_layer=LAYER + 1, prepend_bos=False)[1]
    ours, theirs = np.asarray(out.taps["x"][LAYER])[:, 1:], cache[name].numpy()[:, 1:]
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def products(n: int = 2048) -> dict[str, float]:
    """GFLOP/s of a dense product of two [n,n] float32 matrices on each side: what the machine can do."""
    a = np.random.default_rng(0).standard_normal((n, n), np.float32)
    sides = {"torch": (torch.from_numpy(a), torch.matmul), "XLA": (jax.numpy.asarray(a), jax.jit(jax.numpy.matmul))}
    rates = {}
    for name, (x, product) in sides.items():
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            jax.block_until_ready(product(x, x))
            seconds.append(time.perf_counter() - start)
        rates[name] = 2 * n**3 / min(seconds[1:]) / 1e9
    return rates


def trainers(x: np.ndarray, batch: int, steps: int) -> dict[tuple[str, str], Trained]:
    """Every training on the same activations, the two sides in turn."""
    clock = Clock()
    stream = TimedStream(clock, x[None], batch_size=batch, layers=(LAYER,))
    results = {}
    for place in range(max(len(PEER), len(OURS))):
        for name, settings in list(PEER.items())[place : place + 1]:
            batches = shuffled(x, batch)
            results["SAELens", name] = peer_train(batches, x.shape[1], batch, steps, **settings)
        for name, seed in list(OURS.items())[place : place + 1]:
            results["jaxmech", name] = our_train(stream, steps, clock, seed)
    return results


def end_to_end(lm, model, rows: np.ndarray, batch: int, steps: int) -> dict[str, float]:
    """Tokens per second from token ids to a trained dictionary; compiled before."""
    rows = rows[: -(-batch * steps // (LENGTH - 1)) + 1]

    def stream(rows):
        return ActivationStream(lm.config, lm.params, rows, layers=(LAYER,), batch_size=batch, forward_batch=32)

    our_train(stream(rows[: batch // (LENGTH - 1) + 2]), steps)
    store = peer_store(model, rows, batch)
    theirs = peer_train(iter(store), model.cfg.d_model, batch, steps, **next(iter(PEER.values())))
    ours = our_train(stream(rows), steps)
    return {"SAELens": batch * steps / theirs.total, "jaxmech": batch * steps / ours.total}


def report(console: Console, results: Mapping[tuple[str, str], Trained], held: np.ndarray, batch: int) -> tuple:
    """Prints the trainings; returns the FVUs and the tokens per second of both sides."""
    table = Table(title=f"The same activations, batches of {batch}")
    columns = (
        "",
        "settings",
        "tokens/s",
        "FVU",
        "FVU of the median dimension",
        "L0",
        "L0 by threshold",
        "features used",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in columns[:2] else "right")
    fvu, blocks = {}, {}
    for (side, name), trained in results.items():
        rate, q = TIMED_STEPS * batch / np.median(trained.blocks), quality(trained.weights, held)
        fvu.setdefault(side, []).append(q["fvu"])
        blocks.setdefault(side, []).extend(trained.blocks)
        numbers = (
            f"{rate:,.0f}",
            f"{q['fvu']:.4f}",
            f"{q['median']:.3f}",
            f"{q['l0']:.1f}",
            f"{q['l0_threshold']:.1f}",
        )
        table.add_row(side, name, *numbers, f"{q['used']:.0%}")
    console.print(table)
    return fvu, {side: TIMED_STEPS * batch / np.median(seconds) for side, seconds in blocks.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="file of Gemma 3 270M, instead of the installed package")
    parser.add_argument("--batch", type=int, default=1024, help="activations in a batch")
    parser.add_argument("--steps", type=int, default=160, help="of the trainings whose quality is compared")
    parser.add_argument("--rows", type=int, default=600, help=f"texts of {LENGTH} tokens to train on")
    parser.add_argument("--end-to-end-steps", type=int, default=32, help="of the trainings from token ids")
    args = parser.parse_args()
    if any(steps % TIMED_STEPS or steps < 2 * TIMED_STEPS for steps in (args.steps, args.end_to_end_steps)):
        parser.error(f"steps: expected multiples of {TIMED_STEPS}, at least {2 * TIMED_STEPS}")
    return args


def main() -> int:
    args, console = parse(), Console(width=130)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(os.cpu_count())
    with model_file(args.gguf) as gguf:
        lm = jm.load_model(str(gguf))
        model = peer_model(gguf, lm.tokenizer)
    rows = text_rows(lm.tokenizer, args.rows + HELD)
    held, x = activations(lm, rows[:HELD]), activations(lm, rows[HELD:])
    rates = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in products().items())
    console.print(
        f"{len(x):,} activations, {len(held):,} held out, the same within {difference(lm, model, rows[:4]):.0e} of the"
        f" largest; {args.steps} steps, float32, {os.cpu_count()} threads; dense products: {rates}"
    )
    fvu, speed = report(console, trainers(x, args.batch, args.steps), held, args.batch)
    whole = end_to_end(lm, model, rows[HELD:], args.batch, args.end_to_end_steps)
    ratio = speed["jaxmech"] / speed["SAELens"]
    console.print(
        f"trainer: {speed['jaxmech']:,.0f} against {speed['SAELens']:,.0f} tokens/s in the median, {ratio:.2f} times"
    )
    console.print(
        f"from token ids: {whole['jaxmech']:,.0f} against {whole['SAELens']:,.0f} tokens/s,"
        f" {whole['jaxmech'] / whole['SAELens']:.2f} times"
    )
    failed = []
    ours, theirs = max(fvu["jaxmech"]), min(fvu["SAELens"])
    if ours > theirs:
        failed.append(f"the FVU is worse: {ours:.4f} against {theirs:.4f}")
    if ratio < LEAST:
        failed.append(f"the trainer is less than {LEAST:g} times as fast")
    console.print("; ".join(failed) or f"FVU at worst {ours:.4f}, SAELens' at best {theirs:.4f}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
