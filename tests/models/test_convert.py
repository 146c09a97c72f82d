"""Table conversion: what lands where, and that every misfit is reported at once."""

from __future__ import annotations

from functools import partial

import jax
import ml_dtypes
import numpy as np
import pytest

from jaxmech.models.convert import Rule, Table, aligned_empty, convert, flatten, unflatten

TABLE = Table(
    rules=(
        Rule(r"embed", "embed/embedding"),
        Rule(r"block\.(?P<layer>\d+)\.w", "layers/w/kernel", lambda x: x.T),
        Rule(r"old\.(?P<layer>\d+)\.w", "layers/w/kernel", lambda x: x.T),
        Rule(r"block\.(?P<layer>\d+)\.heads", "layers/h/kernel", lambda x: x.reshape(2, 3, 4)),
        Rule(r"block\.(?P<layer>\d+)\.extra", "layers/extra/kernel"),
    ),
    strays=(r".*inv_freq",),
    twins=((r"head", "embed/embedding"),),
)
SHAPES = {"embed": {"embedding": (5, 4)}, "layers": {"w": {"kernel": (2, 4, 3)}, "h": {"kernel": (2, 2, 3, 4)}}}


def target(dtype=np.float32):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    leaf = partial(jax.ShapeDtypeStruct, dtype=dtype, sharding=sharding)
    return jax.tree.map(leaf, SHAPES, is_leaf=lambda x: isinstance(x, tuple))


class Arrays(dict):
    def names(self):
        return list(self)

    def shape(self, name):
        return self[name].shape

    def kind(self, name):
        return "I8" if self[name].dtype == np.int8 else "F32"

    def read(self, name):
        return self[name].copy()


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    made = {"embed": (5, 4), **{f"block.{i}.w": (3, 4) for i in (1, 0)}, **{f"block.{i}.heads": (6, 4) for i in (0, 1)}}
    return Arrays({name: rng.normal(size=shape).astype(np.float32) for name, shape in made.items()})


def test_stacks_and_transforms(arrays):
    got = convert(arrays, TABLE, target())
    np.testing.assert_array_equal(got["embed"]["embedding"], arrays["embed"])
    for i in range(2):
        np.testing.assert_array_equal(got["layers"]["w"]["kernel"][i], arrays[f"block.{i}.w"].T)
        np.testing.assert_array_equal(got["layers"]["h"]["kernel"][i].reshape(6, 4), arrays[f"block.{i}.heads"])


def test_rounds_to_the_dtype_asked_for(arrays):
    got = convert(arrays, TABLE, target(ml_dtypes.bfloat16))
    assert all(leaf.dtype == ml_dtypes.bfloat16 for leaf in flatten(got).values())
    np.testing.assert_array_equal(got["embed"]["embedding"], arrays["embed"].astype(ml_dtypes.bfloat16))


def test_one_tensor_may_hold_several_parameters(arrays):
    fused = [np.concatenate([arrays.pop(f"block.{i}.w"), arrays.pop(f"block.{i}.heads")]) for i in (0, 1)]
    arrays |= {f"block.{i}.fused": tensor for i, tensor in enumerate(fused)}
    name = r"block\.(?P<layer>\d+)\.fused"
    rules = (
        Rule(name, "layers/w/kernel", lambda x: x[:3].T),
        Rule(name, "layers/h/kernel", lambda x: x[3:].reshape(2, 3, 4)),
    )
    got = convert(arrays, Table((*TABLE.rules, *rules)), target())
    for i in range(2):
        np.testing.assert_array_equal(got["layers"]["w"]["kernel"][i], fused[i][:3].T)
        np.testing.assert_array_equal(got["layers"]["h"]["kernel"][i].reshape(6, 4), fused[i][3:])


def test_all_problems_in_one_message(arrays):
    arrays["block.0.new"] = np.zeros(3)  # unknown
    arrays["block.2.w"] = np.zeros((3, 4))  # a layer too many
    arrays["block.0.extra"] = np.zeros(3)  # in the table, not in this model
    arrays["old.0.w"] = np.zeros((3, 4))  # given twice
    arrays["block.1.heads"] = np.zeros((7, 4))  # cannot be split into heads
    arrays["embed"] = np.zeros((6, 4))  # of a wrong shape
    arrays["rotary.inv_freq"] = np.zeros(3)  # allowed
    del arrays["block.1.w"]
    with pytest.raises(ValueError) as error:
        convert(arrays, TABLE, target())
    text = str(error.value)
    assert "3 unknown:" in text and all(n in text for n in ("block.0.new [3]", "block.2.w", "block.0.extra"))
    assert "1 missing:\n    layers/w/kernel[1]" in text
    assert "1 given twice:\n    old.0.w and block.0.w are both layers/w/kernel[0]" in text
    assert "2 of a wrong shape:" in text and "embed [6, 4]: gives [6, 4], embed/embedding needs [5, 4]" in text
    assert "block.1.heads [7, 4]" in text and "inv_freq" not in text


def test_long_lists_are_cut(arrays):
    arrays |= {f"odd.{i}": np.zeros(1) for i in range(50)}
    with pytest.raises(ValueError, match=r"50 unknown:(?s:.*)and 30 more"):
        convert(arrays, TABLE, target())


def test_a_stored_tied_unembedding_must_equal_the_embedding(arrays):
    arrays["head"] = arrays["embed"].copy()
    convert(arrays, TABLE, target())
    arrays["head"][0, 0] += 1
    with pytest.raises(ValueError, match="ties 'head' to 'embed/embedding'"):
        convert(arrays, TABLE, target())


def test_flatten_and_back():
    tree = {"a": {"b": 1, "c": {"d": 2}}, "e": 3}
    assert flatten(tree) == {"a/b": 1, "a/c/d": 2, "e": 3}
    assert unflatten(flatten(tree)) == tree


def test_aligned_arrays():
    for shape in ((3,), (5, 7), (1000, 333)):
        array = aligned_empty(shape, ml_dtypes.bfloat16)
        assert array.shape == shape and array.ctypes.data % 64 == 0 and array.flags.c_contiguous
