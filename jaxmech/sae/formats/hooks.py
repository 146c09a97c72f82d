"""Where a dictionary belongs: TransformerLens' hook names and HF's module paths, and the site of ours that each is.

A name is translated only where it always means the same activations as the site. TransformerLens' `hook_mlp_in`, for
one, is what comes before the MLP's norm: `resid_mid`, but `resid_pre` where attention and MLP run in parallel.
"""

from __future__ import annotations

import re
from pathlib import Path

from jaxmech.sae.formats.files import Given, agree

HOOKS = {
    "resid_pre": "blocks.{}.hook_resid_pre",
    "attn_z": "blocks.{}.attn.hook_z",
    "attn_out": "blocks.{}.hook_attn_out",
    "resid_mid": "blocks.{}.hook_resid_mid",
    "mlp_normed": "blocks.{}.ln2.hook_normalized",
    "mlp_in": "blocks.{}.mlp.hook_in",
    "mlp_out": "blocks.{}.hook_mlp_out",
    "resid_post": "blocks.{}.hook_resid_post",
}
"""Our sites -> hook names to write; `mlp.hook_in` is of TransformerLens 3's bridge, the only one with that site."""

_BLOCK = {hook.removeprefix("blocks.{}"): site for site, hook in HOOKS.items()}
_BLOCK |= {".hook_in": "resid_pre", ".hook_out": "resid_post", ".mlp.hook_out": "mlp_out"}
"""What follows the layer in a hook name -> site; the last three are the bridge's other names."""

_ATTENTION, _MLP = r"(?:self_attn|attn|attention)", r"mlp"
_MODULES = {
    r"|\.output": "resid_post",
    r"\.input": "resid_pre",
    rf"\.{_ATTENTION}\.(?:o_proj|c_proj|dense|out_proj)\.input": "attn_z",
    rf"\.{_ATTENTION}(?:\.output)?": "attn_out",
    rf"\.{_MLP}\.input|\.pre_feedforward_layernorm(?:\.output)?": "mlp_in",
    rf"\.{_MLP}(?:\.output)?|\.post_feedforward_layernorm(?:\.output)?": "mlp_out",
}
"""What follows the layer in a module path (its output is meant where it does not say) -> site."""

_BEFORE_POST_NORM = rf"\.{_ATTENTION}(?:\.output)?|\.{_MLP}(?:\.output)?|\.mlp\.hook_out"
_POST_NORMS = re.compile(r"gemma-?(?:2(?!b)|3)|olmo-?[23]|glm-?4", re.IGNORECASE)
"""Models that normalise what attention and MLP put out before they add it: there a module's output is no site."""


def site_of(name: str, model: str | None = None) -> tuple[str | None, int | None]:
    """(site, layer) of a hook name or module path; None where the name does not settle it."""
    match = re.fullmatch(r"(?:[a-z_]+\.)*?(blocks|layers|h)\.(\d+)((?:\.\w+)*)", name)
    if not match:
        return None, None
    container, layer, suffix = match[1], int(match[2]), match[3]
    if re.fullmatch(_BEFORE_POST_NORM, suffix) and _POST_NORMS.search(model or ""):
        return None, layer
    if container == "blocks":
        return _BLOCK.get(suffix), layer
    return next((site for pattern, site in _MODULES.items() if re.fullmatch(pattern, suffix)), None), layer


def locate(
    where: str | Path,
    names: dict[str, str],
    given: Given,
    model: str | None = None,
    remedy: str = "say so: load_sae(..., site=, layer=)",
) -> tuple[str, int]:
    """Site and layer of a dictionary whose files give `names` (their key -> hook name or module path).

    Raises:
      ValueError: the names contradict each other or the caller, or nothing settles the site or the layer.
    """
    resolved = {f"{key} {name!r}": site_of(name, model) for key, name in names.items()}
    sites = {site for site, _ in resolved.values() if site is not None}
    layers = {layer for _, layer in resolved.values() if layer is not None}
    if len(layers) > 1 or (len(sites) > 1 and given.site not in sites):
        raise ValueError(
            f"{where}: its hook names contradict each other: {', '.join(resolved)}; if one is right, {remedy}"
        )
    site = given.site if given.site in sites else next(iter(sites), None)
    layer = next(iter(layers), None)
    if names and site is None and given.site is None:
        why = "the residual before the MLP's norm" if "hook_mlp_in" in str(names) else "none of our sites"
        raise ValueError(
            f"{where}: {' and '.join(resolved)} is {why}, as far as the name goes; "
            f"if it is one of {', '.join(HOOKS)}, {remedy}"
        )
    site = agree(where, "site", site, given.site, needed=True)
    return site, agree(where, "layer", layer, given.layer, needed=True)
