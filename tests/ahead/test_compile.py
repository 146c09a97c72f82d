"""Programs compiled for TPU slices that are not there: small ones, so that a change that stops fitting is seen here."""

from __future__ import annotations

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxmech.ahead import HBM, Program, compile_ahead, topology_mesh
from jaxmech.ahead.hlo import cost
from jaxmech.ahead.programs import PROGRAMS, Sizes
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

pytest.importorskip("libtpu", reason="compiling for a TPU needs the package libtpu, which is for x86 Linux")

SIZES = Sizes(
    features=1536, prompts=8, tokens=24, families=4, choices=3, nodes=3, rows=96, points=4, window=8, dtype=jnp.float32
)
"""No activation has as many entries as a parameter."""


@pytest.fixture(scope="module")
def mesh():
    return topology_mesh("v5e:2x2", 1, 4)


def shaped(mesh, shape, *spec, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))


def perceptron(w1, w2, x):
    def layer(x, w):
        return x + jnp.tanh(x @ w[0]) @ w[1], None

    return jax.lax.scan(layer, x, (w1, w2))[0]


def layers(mesh, n=6, d=512, m=1024):
    """Two stacked matrices, hidden units over chips, and what goes through them."""
    x = shaped(mesh, (96, d))
    return shaped(mesh, (n, d, m), None, None, "model"), shaped(mesh, (n, m, d), None, "model"), x


def program(function, *args, lead=6):
    return Program("test", jax.jit(function), args, dict(zip(("w1", "w2"), args, strict=False)), (lead,))


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_fit_and_gather_no_parameter(name):
    mesh = topology_mesh("v5e:2x2", 2, 2)
    config = tiny_config(n_layers=4, d_model=128, n_heads=4, n_kv_heads=4, head_dim=64, d_mlp=512, vocab_size=512)
    report = compile_ahead(PROGRAMS[name](config, mesh, SIZES))
    assert not report.faults
    assert report.flops > 0 and report.hbm_bytes > report.arguments / 2 and report.collectives


def test_loops_count_as_often_as_they_run(mesh):
    report = compile_ahead(program(perceptron, *layers(mesh)))
    assert report.flops == 6 * 2 * 2 * 96 * 512 * 1024 / 4
    weights = 6 * 2 * 512 * 1024 * 2 / 4
    assert weights < report.hbm_bytes < 1.5 * weights  # activations stay in the chip's fast memory
    assert report.collectives == {"all-reduce": {"count": 6, "bytes": 6 * 96 * 512 * 2}}
    assert report.loops == 0 and not report.faults


def test_what_jaxs_cache_on_disk_cannot_give_back_is_compiled_anew(mesh):
    first = compile_ahead(program(perceptron, *layers(mesh)))
    jax.clear_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = compile_ahead(program(perceptron, *layers(mesh)))
    assert dataclasses.replace(again, compile_seconds=first.compile_seconds) == first


def test_flops_are_the_compilers_own_where_nothing_loops(mesh):
    def batched(a, b):
        return jnp.einsum("bij,bjk->bik", a, b)

    a, b = shaped(mesh, (8, 256, 384), "model"), shaped(mesh, (8, 384, 512), "model")
    compiled = jax.jit(batched).lower(a, b).compile()
    read = cost(compiled.as_text())
    assert read.flops == compiled.cost_analysis()["flops"] == 2 * 8 * 256 * 384 * 512 / 4
    assert read.hbm_bytes == 2 * 8 * (256 * 384 + 384 * 512 + 256 * 512) / 4


def test_a_gathered_layer_is_found(mesh):
    def by_rows(x):
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P("model")))

    def gathering(w1, w2, x):  # rows and hidden units over the same chips: every chip needs whole matrices
        def layer(x, w):
            return by_rows(x + by_rows(by_rows(jnp.tanh(x @ w[0])) @ w[1])), None

        return jax.lax.scan(layer, x, (w1, w2))[0]

    report = compile_ahead(program(gathering, *layers(mesh)))
    assert report.fits and len(report.faults) == 2
    assert "gathers a whole parameter: one layer of w1 (512, 1024) in jit(gathering)/while/body" in report.faults[0]


def test_a_gathered_stack_is_found(mesh):
    def gathering(w1, w2, x):
        whole = jax.lax.optimization_barrier(jax.lax.with_sharding_constraint(w1, NamedSharding(mesh, P())))
        return perceptron(whole, w2, x)

    w1, w2, _ = layers(mesh)
    report = compile_ahead(program(gathering, w1, w2, shaped(mesh, (96, 512), "model")))
    assert any("gathers a whole parameter: w1 (6, 512, 1024)" in fault for fault in report.faults)


def test_a_program_that_does_not_fit_is_found(mesh):
    w1, w2, _ = layers(mesh, n=6, d=16384, m=65536)
    whole = [shaped(mesh, w.shape) for w in (w1, w2)]  # replicated: 25.8 GB on every chip
    x = shaped(mesh, (96, 16384))
    report = compile_ahead(program(perceptron, *whole, x))
    assert not report.fits and "GiB of a chip's 15.75" in report.faults[0]
    assert report.total > 6 * 2 * 16384 * 65536 * 2 and not math.isinf(report.total)
    assert compile_ahead(program(perceptron, w1, w2, x)).fits


@pytest.mark.parametrize("name, kind", [("v6e:2x2", "TPU v6 lite"), ("v5p:2x2x1", "TPU v5")])
def test_other_chips(name, kind):
    report = compile_ahead(program(perceptron, *layers(topology_mesh(name, 2, 2))))
    assert (report.chip, report.chips, report.hbm) == (kind, 4, HBM[kind])


def test_what_cannot_be_compiled_is_refused(mesh):
    with pytest.raises(ValueError, match="v9z:2x2.*names are like v5e:2x4"):
        topology_mesh("v9z:2x2", 2, 2)
    with pytest.raises(ValueError, match="has 4 chips"):
        topology_mesh("v5e:2x2", 2, 4)
    bare = dataclasses.replace(program(perceptron), args=(jax.ShapeDtypeStruct((2, 2), jnp.float32),))
    with pytest.raises(ValueError, match="arguments with shardings"):
        compile_ahead(bare)
