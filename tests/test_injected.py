"""What `scripts/checks/check_injected.py` plants: least-noise readers, rows that do nothing, a wired neuron."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmech as jm
from scripts.checks.injected import inert, reader, sublayer, wire

ASKED = ("give 7 of 10? $", "a kind man has 10. gives: $", "keep 2, then give $")
DIGITS = [str(n) for n in range(10)]


def test_reader_reads_as_wanted_with_least_noise():
    rng = np.random.default_rng(0)
    noise, columns = np.cov(rng.normal(size=(40, 12)).T), rng.normal(size=(12, 3))
    w = reader(noise, columns, np.array([1.0, 0.0, -2.0]))
    np.testing.assert_allclose(w @ columns, [1.0, 0.0, -2.0], atol=1e-12)
    other = inert(rng.normal(size=(20, 12)), columns.T)  # what may be added without being read in the columns
    assert (np.einsum("nd,de,ne->n", w + 0.01 * other, noise, w + 0.01 * other) > w @ noise @ w).all()


@pytest.mark.slow
def test_inert_rows_are_orthogonal_to_every_gradient_and_do_nothing_to_first_order(lm):
    prompts, values, L = jm.make_prompts(lm, ASKED, DIGITS), jnp.arange(10) / 9, lm.config.n_layers
    gradient = np.asarray(jm.attribution.residual_gradient(lm.config, lm.params, prompts, values)[1], np.float64)
    row = np.random.default_rng(1).normal(size=32)
    left = inert(row, np.concatenate([gradient, 2 * gradient[:1]]))  # of less than full rank
    assert np.abs(gradient @ left).max() < 1e-9 * np.abs(gradient @ row).max()
    np.testing.assert_allclose(inert(left, gradient), left, atol=1e-12)
    vectors = np.zeros((3, L, 1, 32), np.float32)
    vectors[1:, 1, 0] = 0.02 * np.stack([row, left])
    g = np.asarray(jm.steering.steer(lm.config, lm.params, prompts, vectors).expected(values))
    moved = np.abs(g[1:] - g[0]).max(1)
    assert moved[1] < 0.1 * moved[0]


@pytest.mark.slow
def test_a_wired_neuron_does_what_its_sublayer_by_hand_does(lm, tokens):
    """Gate, value and both norms in NumPy: put in place of the sublayer's output, later layers see what wiring does."""
    layer, (reads, writes), L = 2, jax.random.normal(jax.random.key(2), (2, 32)), lm.config.n_layers
    cut, wired = (wire(lm.params, layer, 5, reads, row) for row in (jnp.zeros(32), writes))

    def run(params, edits=None):
        return jm.forward(lm.config, params, tokens, edits=edits, logits="all", taps=("resid_mid", "mlp_out"))

    def by_hand(out, params):
        return sublayer(lm.config, params, layer, np.asarray(out.taps["resid_mid"][layer]).reshape(-1, 32))

    base, moved = run(cut), run(wired)
    np.testing.assert_allclose(by_hand(base, cut)[0].reshape(3, 12, 32), base.taps["mlp_out"][layer], atol=1e-5)
    donor = jnp.zeros((L, 3, 12, 32)).at[layer].set(by_hand(base, wired)[0].reshape(3, 12, 32))
    there = run(cut, {"mlp_out": (jm.edits.Replace(donor=donor, spans=jm.edits.everywhere(L, [layer])),)})
    assert np.abs(moved.logits - base.logits).max() > 0.1
    np.testing.assert_allclose(there.logits, moved.logits, atol=1e-4)
