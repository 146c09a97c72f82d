"""Hook names and module paths: translated where they mean a site of ours, refused where they do not settle it."""

import pytest

from jaxmech.sae.formats.files import Given
from jaxmech.sae.formats.hooks import HOOKS, locate, site_of


@pytest.mark.parametrize("site", HOOKS)
def test_every_site_has_a_hook(site):
    assert site_of(HOOKS[site].format(17)) == (site, 17)


@pytest.mark.parametrize(
    "name, site",
    [
        ("blocks.3.hook_in", "resid_pre"),
        ("blocks.3.hook_out", "resid_post"),
        ("blocks.3.mlp.hook_out", "mlp_out"),
        ("model.layers.3", "resid_post"),
        ("layers.3", "resid_post"),
        ("transformer.h.3", "resid_post"),
        ("model.language_model.layers.3.output", "resid_post"),
        ("model.layers.3.input", "resid_pre"),
        ("model.layers.3.self_attn.o_proj.input", "attn_z"),
        ("transformer.h.3.attn.c_proj.input", "attn_z"),
        ("layers.3.attention", "attn_out"),
        ("gpt_neox.layers.3.mlp", "mlp_out"),
        ("model.layers.3.mlp.input", "mlp_in"),
        ("model.layers.3.pre_feedforward_layernorm.output", "mlp_in"),
        ("model.layers.3.post_feedforward_layernorm.output", "mlp_out"),
        # What does not settle it: the residual before a norm, a norm that differs between models, single neurons.
        ("blocks.3.hook_mlp_in", None),
        ("model.layers.3.post_attention_layernorm.output", None),
        ("blocks.3.mlp.hook_post", None),
        ("blocks.3.ln1.hook_normalized", None),
        ("blocks.3.attn.hook_result", None),
    ],
)
def test_other_names(name, site):
    assert site_of(name) == (site, 3)


@pytest.mark.parametrize("name", ["blocks.3.mlp.hook_out", "model.layers.3.mlp", "layers.3.self_attn"])
def test_what_a_module_puts_out_before_a_norm_is_no_site(name):
    for model in ("google/gemma-2-2b", "gemma-3-270m", "allenai/OLMo-2-1124-7B"):
        assert site_of(name, model) == (None, 3)
    assert site_of(name, "google/gemma-2b")[0] is not None


def test_locate():
    names = {"hook_name": "blocks.5.hook_mlp_in", "hf_hook_name": "model.layers.5.pre_feedforward_layernorm.output"}
    assert locate("f", names, Given()) == ("mlp_in", 5)
    assert locate("f", {}, Given(site="mlp_in", layer=2)) == ("mlp_in", 2)
    assert locate("f", {"hook_name": "hook_embed"}, Given(site="resid_pre", layer=0)) == ("resid_pre", 0)
    with pytest.raises(ValueError, match="residual before the MLP's norm.*load_sae"):
        locate("f", {"hook_name": "blocks.5.hook_mlp_in"}, Given())
    with pytest.raises(ValueError, match="none of our sites"):
        locate("f", {"hook_name": "blocks.5.mlp.hook_post"}, Given(layer=5))
    names = {"hook_name": "blocks.5.hook_attn_out", "hf_hook_name": "model.layers.5.self_attn.o_proj.input"}
    with pytest.raises(ValueError, match="contradict each other.*say so"):
        locate("f", names, Given())
    assert locate("f", names, Given(site="attn_z")) == ("attn_z", 5)
    with pytest.raises(ValueError, match="contradict each other"):
        locate("f", {"hook_name": "blocks.5.hook_resid_post", "hf_hook_name": "model.layers.6"}, Given())
    with pytest.raises(ValueError, match="site: the files say 'mlp_out', asked for 'attn_out'"):
        locate("f", {"hook_name": "blocks.5.hook_mlp_out"}, Given(site="attn_out"))
    with pytest.raises(ValueError, match="layer: the files say 5, asked for 6"):
        locate("f", {"hook_name": "blocks.5.hook_mlp_out"}, Given(layer=6))
    with pytest.raises(ValueError, match=r"layer; pass"):
        locate("f", {"hook_name": "hook_embed"}, Given(site="resid_pre"))
