"""Activations made from a known dictionary, and a training that takes a second."""

import jax
import numpy as np

from jaxmech.activations.stream import ArrayStream
from jaxmech.sae.training import SAETrainConfig, train_saes

D, F = 24, 32
KEY = jax.random.key(0)
SMALL = SAETrainConfig(
    d_sae=F, sparsity=3, steps=24, lr=3e-3, dead_after=4, aux_features=8, start_l0=4, log_every=4, checkpoint_every=8
)
SPARSITY = {"topk": 3, "batchtopk": 3, "matryoshka": 3, "jumprelu": 0.1, "gated": 0.3, "standard": 0.1}
"""What leaves each kind with about the right L0 on this data."""


def sparse_data(layers=2, n=1024, features=24, active=3, seed=0):
    """Sums of a few known unit directions, plus a mean far from zero."""
    rng = np.random.default_rng(seed)
    W = rng.normal(size=(layers, features, D))
    W /= np.linalg.norm(W, axis=-1, keepdims=True)
    codes = np.zeros((layers, n, features))
    for code in codes.reshape(-1, features):
        code[rng.choice(features, active, replace=False)] = rng.uniform(1, 3, active)
    x = codes @ W + 50 * rng.normal(size=(layers, 1, D))
    return W, x.astype(np.float32)


def stream(layers=2, **options):
    return ArrayStream(sparse_data(layers)[1], batch_size=128, layers=range(3, 3 + layers), model="toy", **options)


def fit(config, data=None, **options):
    return train_saes(config, data or stream(), key=KEY, progress=False, **options)
