"""Every block of the README runs as written, on a small model in place of those that it names."""

import re
from pathlib import Path

import jax
import pytest

import jaxmech as jm
from jaxmech.models.decoder import init_params
from jaxmech.sae.module import param_shapes
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

BLOCKS = re.findall(r"^```python\n(.*?)^```", (Path(__file__).parents[1] / "README.md").read_text(), re.M | re.S)


@pytest.mark.slow
@pytest.mark.devices
def test_every_block_runs(tokenizer, tmp_path, monkeypatch):
    config = tiny_config(n_layers=16, is_local=(False,) * 16, d_mlp=32)
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))

    def load_model(name, dtype="float32", mesh=None):
        return jm.LanguageModel(name, config, params, tokenizer)

    def load_saes(source, layers=(9, 10, 14)):
        of = jm.SAEConfig(d_in=config.d_model, d_sae=48, activation="jumprelu", layers=tuple(layers))
        keys = jax.random.split(jax.random.key(1), len(param_shapes(of)))
        shapes = zip(keys, param_shapes(of).items(), strict=True)
        return jm.SAE({name: jax.random.normal(key, (len(layers), *shape)) for key, (name, shape) in shapes}, of)

    monkeypatch.setattr(jm, "load_model", load_model)
    monkeypatch.setattr(jm, "load_saes", load_saes)
    monkeypatch.setattr(jm, "load_sae", lambda source, site, layer: load_saes(source, [layer]).at(layer))
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), names)
    assert len(BLOCKS) >= 6 and names["dist"].logprobs.shape == (17, 2, 11)


def test_what_the_readme_names_is_there():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    for name in set(re.findall(r"\bjm((?:\.\w+)+)", text)):
        found = jm
        for part in name.split(".")[1:]:
            if isinstance(found, type) or callable(found):
                break  # what a call gives
            found = getattr(found, part)
