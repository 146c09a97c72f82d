"""What objects look like at the end of a notebook's cell: short, and without a single array's numbers."""

import dataclasses
import inspect
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import struct

import jaxmech as jm
from jaxmech.activations import text
from jaxmech.activations.stream import ArrayStream
from jaxmech.answers import score as choices
from jaxmech.behavior import scoring
from jaxmech.behavior.altruism import dictator
from jaxmech.behavior.dual_process import index as dual_index
from jaxmech.contrast import selection as contrast
from jaxmech.interventions import attribution, edits, proximity
from jaxmech.models import decoder, repetition
from jaxmech.sae import check, collect, evaluate, totals
from jaxmech.sae.module import make_sae, param_shapes
from jaxmech.sae.training import loop

LONGEST = 500


def dictionaries(layers, d_in=16, d_sae=48, **options):
    config = jm.SAEConfig(d_in=d_in, d_sae=d_sae, layers=layers, **options)
    lead = (len(layers),) if len(layers) > 1 else ()
    return make_sae(
        {name: np.ones((*lead, *shape), np.float32) for name, shape in param_shapes(config).items()}, config
    )


def test_a_model_says_what_it_is(lm):
    c, text = lm.config, repr(lm)
    assert text.startswith(f"LanguageModel('{lm.name}': {c.family}, {c.n_layers} layers of width {c.d_model}")
    weights = jax.tree.leaves(lm.params)
    kilobytes = sum(leaf.size for leaf in weights) * 4 / 1024
    assert f"vocabulary of {c.vocab_size:,}, float32, {kilobytes:.3g} KiB, on " in text
    assert str(jax.devices()[0]) in text and "array" not in text and len(text) < LONGEST


def test_dictionaries_say_where_they_stand_and_how_many_features_they_have():
    stack = dictionaries((3, 4, 5), activation="topk", k=4, source="runs/quickstart/saes")
    # W_enc, W_dec 16 x 48, b_enc 48 and b_dec 16 at each of three layers, 4 bytes each
    size = 3 * (2 * 16 * 48 + 48 + 16) * 4 / 1024
    assert repr(stack) == (
        "SAE(resid_post, layers 3 to 5: 48 features of width 16, topk with k=4, "
        f"float32, {size:.3g} KiB, from 'runs/quickstart/saes')"
    )
    assert repr(stack.at(4)).startswith("SAE(resid_post, layer 4, single: 48 features")
    assert repr(jax.tree.map(lambda _: 0, stack)).startswith("SAE(resid_post, layers 3 to 5: 48 features")
    wide = dictionaries(tuple(range(0, 40, 2)), d_sae=8)
    assert "layers 0, 2, 4, 6, 8, 10, …:" in repr(wide)


def test_choices_say_how_much_of_the_probability_they_hold():
    logprobs = np.log(np.array([[0.25, 0.25], [0.5, 0.25]], np.float32))
    assert repr(jm.Choices(logprobs)) == "Choices(logprobs=float32[2, 2], mass 0.5 to 0.75)"
    assert repr(jm.Choices(jnp.asarray(logprobs)[:1])) == "Choices(logprobs=float32[1, 2], mass 0.5)"
    assert repr(jm.Choices(np.zeros((0, 2), np.float32))) == "Choices(logprobs=float32[0, 2], mass of none)"
    seen = []
    jax.jit(lambda x: seen.append(repr(jm.Choices(x))) or x)(jnp.asarray(logprobs))
    jax.eval_shape(lambda x: seen.append(repr(jm.Choices(x))) or x, logprobs)
    assert seen == ["Choices(logprobs=float32[2, 2])"] * 2


def test_what_training_returns_is_short_and_still_a_pair():
    saes, history = trained = loop.Trained([dictionaries((0, 1))], pd.DataFrame({"step": range(1000), "fvu": 0.1}))
    assert repr(trained) == f"Trained(saes=[{saes[0]!r}], history=table of 1,000 rows and 2 columns)"
    assert trained == (saes, history) and typing.get_type_hints(jm.train_saes)["return"] is loop.Trained


def test_outputs_and_prompts_show_shapes(lm):
    tokens, mask = jm.encode_prompts(lm, ["one two", "three"])
    out = jm.forward(lm.config, lm.params, tokens, mask=mask, taps=("resid_post",))
    L, (B, T), D = lm.config.n_layers, tokens.shape, lm.config.d_model
    assert f"taps={{resid_post: float32[{L}, {B}, {T}, {D}]}}, cache=None" in repr(out)
    prompts = jm.make_prompts(lm, ["one two", "three"], ["one", "two"])
    assert repr(prompts).startswith(f"Prompts(tokens=int32[{B}, {T}], mask=bool[{B}, {T}], trie=Trie(tokens=int32[")
    assert repr(jm.Tap("resid_post")) == "Tap(site='resid_post', reduce=<lambda>, args=None)"


def test_edits_show_shapes_and_so_do_those_of_a_kind_of_ones_own():
    @struct.dataclass
    class Doubled(edits.Edit):
        much: jax.Array

        def change(self, x):
            return x

    saes = dictionaries((0, 1))
    everywhere, chosen = edits.everywhere(2), edits.select([(0, 7), (1, 3)], 2)
    made = [
        edits.add_vector(jnp.ones((2, 16)), everywhere),
        edits.features(saes, chosen, gain=2.0, shift=0.0, spans=everywhere),
        edits.features(dictionaries((0, 1), activation="topk", k=4), chosen, gain=2.0, shift=0.0, spans=everywhere),
        Doubled(much=jnp.ones((2, 1, 300)), spans=everywhere),
    ]
    assert "vector=float32[2, 1, 16]" in repr(made[0]) and "encoder=Gathered(W_enc=float32[2, 16, 1]" in repr(made[1])
    assert "encoder=Full(sae=SAE(" in repr(made[2]) and "much=float32[2, 1, 300]" in repr(made[3])
    assert all("Array(" not in repr(one) and len(repr(one)) < LONGEST for one in made)


def test_streams_and_stored_activations_say_what_they_hold(lm, tmp_path):
    stream = ArrayStream(np.ones((2, 300, 8), np.float32), batch_size=64, layers=(4, 7))
    assert repr(stream) == "ArrayStream(resid_post, layers 4, 7: 300 activations of width 8, batches of 64)"
    tokens = np.ones((3, 5), np.int32)
    kept = jm.save_activations(lm.config, lm.params, tokens, mask=None, folder=tmp_path / "kept", layers=[1])
    assert repr(kept) == f"Activations('{tmp_path / 'kept'}': resid_post, layer 1, 3 texts of 5 tokens, float32)"


MODULES = (
    attribution, choices, collect, contrast, edits, proximity, dictator, dual_index, scoring, decoder, repetition,
    check, evaluate, text, totals, loop,
)  # fmt: skip


def with_arrays():
    """Every public class of these modules whose fields may be arrays, tables or things that hold them."""
    for module in MODULES:
        for name, kind in inspect.getmembers(module, inspect.isclass):
            record = issubclass(kind, tuple) and hasattr(kind, "_fields") or dataclasses.is_dataclass(kind)
            types = str(getattr(kind, "__annotations__", {}))
            if kind.__module__ == module.__name__ and record and not name.startswith("_"):
                if any(word in types for word in ("Array", "ndarray", "DataFrame", "Any", "SAE")):
                    yield pytest.param(kind, id=f"{module.__name__}.{name}")


@pytest.mark.parametrize("kind", list(with_arrays()))
def test_no_result_prints_its_arrays(kind):
    names = getattr(kind, "_fields", None) or [field.name for field in dataclasses.fields(kind)]
    large, table = np.linspace(0.1234, 1, 10_000).reshape(100, 100), pd.DataFrame({"a": range(1000)})
    for value in (large, jnp.asarray(large), table, {"x": large}, [large] * 1000, ("a" * 5000,), None):
        text = repr(kind(**dict.fromkeys(names, value)))
        assert text.startswith(f"{kind.__name__}(") and len(text) < 100 * len(names) + 100 and "0.1234" not in text
