"""Short names of the well-known suites, such as "gemma-scope-2-270m-pt/resid_post_all/16k/small".

A short name stands for one dictionary per layer: `load_saes` takes all layers or those asked for, `load_sae` one. The
repository's list of files tells which layers there are, and which L0 each has.

| short name | for example |
|---|---|
| gemma-scope-2-{size}-{pt or it}/{folder}/{width}/{l0} | gemma-scope-2-1b-it/transcoder_all/262k/small_affine |
| gemma-scope-{size}-{pt or it}-{res, mlp, att or transcoders}/{width}/{l0} | gemma-scope-2b-pt-res/16k/canonical |
| llama-scope/{R, A, M or TC}/{8x or 32x} | llama-scope/R/8x |
| qwen-scope/{model}/{width}/{k} | qwen-scope/Qwen3-1.7B-Base/32K/50 |
| eleuther/{repository}/{resid, mlp or attention} | eleuther/sae-llama-3-8b-32x/resid |
| gpt2-small-oai/{resid-post, resid-mid, mlp-out or attn-out}/{32k or 128k} | gpt2-small-oai/resid-post/32k |

An l0 of Gemma Scope 1 is a number that every layer asked for has, "near-N" for each layer's nearest to N (the lower of
two equally near), or "canonical": nearest to 100, as SAELens' `pretrained_saes.yaml` has it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

_CANONICAL_L0 = 100
# Two layers have two that are equally near; SAELens takes the lower in one and the higher in the other.
_CANONICAL_HIGHER = ("google/gemma-scope-9b-pt-att", "layer_27/width_16k")


class Suite(NamedTuple):
    """A family of repositories.

    Attributes:
      name: regular expression of the short names; repo: the repository.
      inside: regular expression of a dictionary's path there, {groups} of `name` filled in; (?P<l0>...) where
        dictionaries of several L0 lie side by side.
      example: a short name.
    """

    name: str
    repo: str
    inside: str
    example: str


SUITES = (
    Suite(
        r"gemma-scope-2-(?P<model>\w+-(?:pt|it))/(?P<folder>\w+)/(?P<width>\w+)/(?P<l0>\w+)",
        "google/gemma-scope-2-{model}",
        r"{folder}/layer_\d+_width_{width}_l0_{l0}",
        "gemma-scope-2-270m-pt/resid_post_all/16k/small",
    ),
    Suite(
        r"gemma-scope-(?P<model>\w+-(?:pt|it)-(?:res|mlp|att|transcoders))/(?P<width>\w+)/"
        r"(?P<l0>\d+|near-\d+|canonical)",
        "google/gemma-scope-{model}",
        r"layer_\d+/width_{width}/average_l0_(?P<l0>\d+)",
        "gemma-scope-2b-pt-res/16k/canonical",
    ),
    Suite(
        r"llama-scope/(?P<site>R|A|M|TC)/(?P<width>\d+x)",
        "fnlp/Llama3_1-8B-Base-LX{site}-{width}",
        r"Llama3_1-8B-Base-L\d+{site}-{width}",
        "llama-scope/R/8x",
    ),
    Suite(
        r"qwen-scope/(?P<model>[\w.-]+)/W?(?P<width>\d+K)/(?P<k>\d+)",
        "Qwen/SAE-Res-{model}-W{width}-L0_{k}",
        r"layer\d+\.sae\.pt",
        "qwen-scope/Qwen3-1.7B-Base/32K/50",
    ),
    Suite(
        r"eleuther/(?P<repo>[\w.-]+)/resid",
        "EleutherAI/{repo}",
        r"layers\.\d+",
        "eleuther/sae-llama-3-8b-32x/resid",
    ),
    Suite(
        r"eleuther/(?P<repo>[\w.-]+)/(?P<part>mlp|attention)",
        "EleutherAI/{repo}",
        r"layers\.\d+\.{part}",
        "eleuther/sae-SmolLM2-135M-64x/mlp",
    ),
    Suite(
        r"gpt2-small-oai/(?P<site>resid-post|resid-mid|mlp-out|attn-out)/(?P<width>32k|128k)",
        "jbloom/GPT2-Small-OAI-v5-{width}-{site}-SAEs",
        r"v5_{width}_layer_\d+(?:\.pt)?",
        "gpt2-small-oai/resid-post/32k",
    ),
)


class Known(NamedTuple):
    """A short name, resolved: its repository, and which of the dictionaries there it means."""

    short: str
    repo: str
    inside: str
    l0: str | None

    def choose(self, names: Sequence[str], layers: Collection[int] | None) -> list[str]:
        """Those of `names` that are meant, all of one layer's L0 considered together.

        Raises:
          ValueError: none is, or the L0 asked for is not there for some layer.
        """
        matches = [match for name in names if (match := re.fullmatch(self.inside, name))]
        if not matches:
            kinds = {re.sub(r"(layers?[._]?|average_l0_|-L)\d+", r"\1*", name) for name in names}
            near = difflib.get_close_matches(self.short, sorted(kinds), 5, 0.0)
            raise ValueError(f"source: {self.short!r}: {self.repo} has no such dictionary; nearest: {', '.join(near)}")
        available = {_layer(match[0]) for match in matches}
        if missing := sorted(set(layers or ()) - available):
            raise ValueError(f"source: {self.short!r}: nothing for layer {', '.join(map(str, missing))}; it has layers "
                             f"{', '.join(map(str, sorted(available)))}")  # fmt: skip
        matches = [match for match in matches if layers is None or _layer(match[0]) in layers]
        if "(?P<l0>" not in self.inside:
            return [match[0] for match in matches]
        by_layer: dict[str, dict[int, str]] = {}
        for match in matches:
            by_layer.setdefault(match[0].rpartition("/")[0], {})[int(match["l0"])] = match[0]
        return [self._of_l0(place, by_l0) for place, by_l0 in by_layer.items()]

    def _of_l0(self, place: str, by_l0: dict[int, str]) -> str:
        if self.l0 == "canonical":
            higher = (self.repo, place) == _CANONICAL_HIGHER
            return by_l0[min(by_l0, key=lambda l0: (abs(l0 - _CANONICAL_L0), -l0 if higher else l0))]
        assert self.l0 is not None  # suites with several L0 ask for one in their short names
        wanted = int(self.l0.removeprefix("near-"))
        if self.l0.startswith("near-"):
            return by_l0[min(by_l0, key=lambda l0: (abs(l0 - wanted), l0))]
        if wanted not in by_l0:
            raise ValueError(
                f"source: {self.short!r}: {self.repo}/{place} has L0 {', '.join(map(str, sorted(by_l0)))}; each layer "
                f"has its own: name one with load_sae(..., layer=), or take 'near-{wanted}' or 'canonical'"
            )
        return by_l0[wanted]


def find(short: str) -> Known | None:
    """What a short name stands for; None for any other string.

    Raises:
      ValueError: it begins like one but is not.
    """
    for suite in SUITES:
        if match := re.fullmatch(suite.name, short):
            fields = match.groupdict()
            return Known(short, suite.repo.format(**fields), _filled_in(suite.inside, fields), fields.get("l0"))
    if re.match(r"gemma-scope|llama-scope|qwen-scope|eleuther/|gpt2-small-oai", short):
        raise ValueError(f"source: {short!r} is not a short name of a suite; examples are "
                         f"{', '.join(suite.example for suite in SUITES)}; nearest: {nearest(short, 0.0)}")  # fmt: skip
    return None


def _filled_in(pattern: str, fields: Mapping[str, str]) -> str:
    return re.sub(r"\{(\w+)\}", lambda field: re.escape(fields[field[1]]), pattern)


def nearest(source: str, cutoff: float = 0.6) -> str | None:
    """The example of a short name that looks most like `source`, for messages; None when none does."""
    near = difflib.get_close_matches(source, [suite.example for suite in SUITES], 1, cutoff)
    return near[0] if near else None


def _layer(name: str) -> int:
    """Of a dictionary's path in any of these repositories."""
    return int(re.findall(r"(?:layers?[._]?|-L)(\d+)", name)[0])
