"""Short names and hub ids: what they ask the hub for, and what they say when it is not there. The hub is faked."""

import json
from fnmatch import fnmatch
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.flax import save_file

from jaxmech.io import hub
from jaxmech.sae.formats import load_sae, load_saes, suites

D, F = 4, 8
COMMIT = "0123456789abcdef"


class FakeHub:
    """Repositories as folders; `fetched` lists the files asked for, one entry per call."""

    def __init__(self, root):
        self.root, self.fetched, self.listed = root, [], []

    def folder(self, repo):
        return self.root / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT

    def add(self, repo, path, content):
        file = self.folder(repo) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        content(file)

    def list_files(self, repo, revision=None):
        self.listed.append((repo, revision))
        folder = self.folder(repo)
        if not folder.exists():
            raise ValueError(f"{repo!r} could not be fetched from the Hugging Face hub: 404")
        return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())

    def fetch(self, repo, patterns, revision=None, ignore=()):
        there = self.list_files(repo, revision)
        self.listed.pop()
        self.fetched.append([name for name in there if any(fnmatch(name, pattern) for pattern in patterns)])
        return self.folder(repo)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(hub, "list_files", fake.list_files)
    monkeypatch.setattr(hub, "fetch", fake.fetch)
    return fake


def params(lower=False, seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,)}
    return {name.lower() if lower else name: rng.normal(size=s).astype(np.float32) for name, s in shapes.items()}


def npz(seed=0):
    return lambda path: np.savez(path, **params(seed=seed))


def gemma_3(path):
    save_file({name: jnp.asarray(value) for name, value in params(lower=True).items()}, path)


def llama(fake, layer, kind="R", width="8x"):
    repo, folder = f"fnlp/Llama3_1-8B-Base-LX{kind}-{width}", f"Llama3_1-8B-Base-L{layer}{kind}-{width}"
    weights = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F), "decoder.bias": (D,)}
    rng = np.random.default_rng(layer)
    tensors = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in weights.items()}
    cfg = {
        "hook_point_in": f"blocks.{layer}.hook_resid_post",
        "hook_point_out": f"blocks.{layer}.hook_resid_post",
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "d_model": D,
        "d_sae": F,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.1,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 3.0, "out": 3.0},
        "sparsity_include_decoder_norm": True,
        "use_glu_encoder": False,
    }
    fake.add(repo, f"{folder}/hyperparams.json", lambda path: path.write_text(json.dumps(cfg)))
    fake.add(repo, f"{folder}/checkpoints/final.safetensors", lambda path: save_file(tensors, path))
    return repo


def test_gemma_scope_2(fake):
    repo = "google/gemma-scope-2-270m-pt"
    for layer in (0, 1, 10):
        for l0 in ("small", "big", "small_seed_1"):
            fake.add(repo, f"resid_post_all/layer_{layer}_width_16k_l0_{l0}/params.safetensors", gemma_3)
        fake.add(repo, f"resid_post_all/layer_{layer}_width_262k_l0_small/params.safetensors", gemma_3)
    fake.add(repo, "config.json", lambda path: path.write_text("{}"))
    fake.add(repo, "clt/width_16k/params_layer_0.safetensors", gemma_3)
    stack = load_saes("gemma-scope-2-270m-pt/resid_post_all/16k/small", revision="v1")
    c = stack.config
    assert (c.layers, c.site, c.model) == ((0, 1, 10), "resid_post", "google/gemma-3-270m")
    assert c.source == f"gemma-scope-2-270m-pt/resid_post_all/16k/small@{COMMIT[:12]}"
    assert fake.listed == [(repo, "v1")]
    folders = [f"resid_post_all/layer_{layer}_width_16k_l0_small" for layer in (0, 1, 10)]
    assert fake.fetched == [sorted(["config.json", *(f"{folder}/params.safetensors" for folder in folders)])]
    np.testing.assert_array_equal(stack.params["W_enc"][2], params()["W_enc"])

    one = load_sae("gemma-scope-2-270m-pt/resid_post_all/16k/small", layer=10)
    assert one.config.source == f"{repo}/{folders[2]}@{COMMIT[:12]}" and not one.stacked
    assert fake.fetched[1] == ["config.json", f"{folders[2]}/params.safetensors"]
    assert load_saes("gemma-scope-2-270m-pt/resid_post_all/16k/big", layers=[10, 0]).config.layers == (10, 0)
    with pytest.raises(ValueError, match="holds 3 dictionaries.*layer="):
        load_sae("gemma-scope-2-270m-pt/resid_post_all/16k/small")
    with pytest.raises(ValueError, match="nothing for layer 9; it has layers 0, 1, 10"):
        load_sae("gemma-scope-2-270m-pt/resid_post_all/16k/small", layer=9)
    with pytest.raises(ValueError, match=r"has no such dictionary; nearest: .*layer_\*_width_16k_l0_small"):
        load_saes("gemma-scope-2-270m-pt/resid_post_all/16k/smal")
    with pytest.raises(ValueError, match="a cross-layer transcoder"):
        load_saes(f"{repo}/clt")


def test_gemma_scope_1(fake):
    repo = "google/gemma-scope-2b-pt-res"
    for layer, found in {19: (30, 60, 140), 20: (71, 116), 21: (71, 98, 200)}.items():
        for l0 in found:
            fake.add(repo, f"layer_{layer}/width_16k/average_l0_{l0}/params.npz", npz(seed=l0))
    fake.add(repo, "embedding/width_4k/average_l0_6/params.npz", npz())
    assert load_saes("gemma-scope-2b-pt-res/16k/canonical").config.l0 == (60, 116, 98)  # the lower of two as near
    assert load_saes("gemma-scope-2b-pt-res/16k/near-70").config.l0 == (60, 71, 71)
    assert load_saes("gemma-scope-2b-pt-res/16k/71", layers=[20, 21]).config.l0 == (71, 71)
    sae = load_sae("gemma-scope-2b-pt-res/16k/71", layer=20)
    assert (sae.config.l0, sae.config.layers, sae.config.model) == ((71,), (20,), "google/gemma-2-2b")
    np.testing.assert_array_equal(sae.params["W_dec"], params(seed=71)["W_dec"])
    with pytest.raises(ValueError, match="layer_19/width_16k has L0 30, 60, 140.*near-71"):
        load_saes("gemma-scope-2b-pt-res/16k/71")

    # The same by hub id: a dictionary, all of a layer, all of a repository.
    by_id = load_sae(f"{repo}/layer_20/width_16k/average_l0_71")
    np.testing.assert_array_equal(by_id.params["W_dec"], sae.params["W_dec"])
    assert by_id.config == sae.config
    assert load_sae(f"{repo}/layer_20/width_16k/average_l0_71/params.npz").config.l0 == (71,)
    with pytest.raises(ValueError, match="holds 2 dictionaries .*average_l0_116.*say which"):
        load_sae(f"{repo}/layer_20")
    with pytest.raises(ValueError, match="several dictionaries of layer 19, 20, 21"):
        load_saes(repo)
    with pytest.raises(ValueError, match="no 'layer_5' there"):
        load_sae(f"{repo}/layer_5")
    stack = load_saes([f"{repo}/layer_{layer}/width_16k/average_l0_71" for layer in (21, 20)])
    assert stack.config.layers == (20, 21)


def test_the_one_canonical_dictionary_that_is_the_higher_of_two(fake):
    for layer in (27, 28):
        for l0 in (64, 136):
            fake.add("google/gemma-scope-9b-pt-att", f"layer_{layer}/width_16k/average_l0_{l0}/params.npz", npz())
    assert load_saes("gemma-scope-9b-pt-att/16k/canonical").config.l0 == (136, 64)


def test_gemma_scope_transcoders(fake):
    fake.add("google/gemma-scope-2b-pt-transcoders", "layer_3/width_16k/average_l0_54/params.npz", npz())
    config = load_sae("gemma-scope-2b-pt-transcoders/16k/near-50").config
    assert (config.site, config.site_out) == ("mlp_normed", "mlp_out")


def test_llama_scope(fake):
    for layer in (0, 3, 31):
        repo = llama(fake, layer)
    stack = load_saes("llama-scope/R/8x")
    assert load_saes("llama-scope/R/8x/").config.layers == stack.config.layers == (0, 3, 31)
    assert stack.config.model == "meta-llama/Llama-3.1-8B"
    assert load_sae("llama-scope/R/8x", layer=3).config.source.startswith(f"{repo}/Llama3_1-8B-Base-L3R-8x@")
    assert [len(files) for files in fake.fetched] == [6, 6, 2]


@pytest.mark.parametrize(
    "short, repo, path",
    [
        ("qwen-scope/Qwen3-1.7B-Base/32K/50", "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50", "layer7.sae.pt"),
        ("eleuther/sae-llama-3-8b-32x/resid", "EleutherAI/sae-llama-3-8b-32x", "layers.7"),
        ("eleuther/sae-SmolLM2-135M-64x/mlp", "EleutherAI/sae-SmolLM2-135M-64x", "layers.7.mlp"),
        ("gpt2-small-oai/resid-post/32k", "jbloom/GPT2-Small-OAI-v5-32k-resid-post-SAEs", "v5_32k_layer_7.pt"),
        ("gpt2-small-oai/attn-out/128k", "jbloom/GPT2-Small-OAI-v5-128k-attn-out-SAEs", "v5_128k_layer_7"),
        ("llama-scope/TC/32x", "fnlp/Llama3_1-8B-Base-LXTC-32x", "Llama3_1-8B-Base-L7TC-32x"),
    ],
)
def test_where_other_suites_are(short, repo, path):
    known = suites.find(short)
    others = [path.replace("7", "8", 1), "layers.7.attention", "other"]
    assert known.repo == repo and known.choose([path, *others], [7]) == [path]


def test_names_that_are_none(fake):
    for wrong in ("gemma-scope-2-270m/resid_post_all/16k/small", "llama-scope/X/8x", "gemma-scope-2b-pt-res/16k/best"):
        with pytest.raises(ValueError, match="is not a short name of a suite; examples are .*nearest: "):
            load_saes(wrong)
    with pytest.raises(ValueError, match="(?s)404.*nearest short name of a suite is 'gemma-scope-2b-pt-res/16k/canon"):
        load_saes("gema-scope-2b-pt-res/16k/canonical")
    with pytest.raises(ValueError, match="does not exist; expected a folder, a file, a hub id"):
        load_saes("nonsense")
    assert all(suites.find(suite.example) for suite in suites.SUITES)


@pytest.fixture(params=["asked for", "no route"])
def offline(request, monkeypatch, tmp_path):
    """A cache of its own and no hub, because the user says so or because nobody answers."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", request.param == "asked for")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    return tmp_path


def test_an_unreachable_hub_is_one_message(offline):
    for asking in (lambda: hub.list_files("some-org/none"), lambda: hub.fetch("some-org/none", ["*"], "v1")):
        with pytest.raises(ValueError, match="'some-org/none'.* could not be fetched from the Hugging Face hub"):
            asking()


def test_a_connection_lost_while_fetching_is_the_same_message(monkeypatch):
    from huggingface_hub.errors import HfHubHTTPError

    def lost(*_, **__):
        raise HfHubHTTPError.__bases__[0]("the connection was lost")  # the HTTP library's own, not the hub's

    monkeypatch.setattr("huggingface_hub.snapshot_download", lost)
    with pytest.raises(ValueError, match="'some-org/none' is not a local path.*the connection was lost"):
        hub.fetch("some-org/none", ["*"])


def test_without_the_hub_the_cache_answers(offline):
    folder = offline / "models--some-org--some" / "snapshots" / COMMIT
    (folder / "layer_1").mkdir(parents=True)
    npz()(folder / "layer_1" / "params.npz")
    (offline / "models--some-org--some" / "refs").mkdir()
    (offline / "models--some-org--some" / "refs" / "main").write_text(COMMIT)
    assert hub.list_files("some-org/some") == ["layer_1/params.npz"]
    assert hub.fetch("some-org/some", ["layer_1/*"]) == folder
    sae = load_sae("some-org/some", site="resid_post")
    assert sae.config.source == f"some-org/some/layer_1@{COMMIT[:12]}"


def test_without_the_hub_what_was_never_fetched_is_missed(offline):
    """The hub listed two layers once, and one was fetched: all of them are not that one."""
    repo = offline / "models--some-org--some"
    folder = repo / "snapshots" / COMMIT
    (folder / "layer_9").mkdir(parents=True)
    npz()(folder / "layer_9" / "params.npz")
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    (repo / ".jaxmech").mkdir()
    (repo / ".jaxmech" / COMMIT).write_text("layer_10/params.npz\nlayer_9/params.npz")
    assert load_saes("some-org/some", layers=[9], site="resid_post").config.layers == (9,)
    with pytest.raises(ValueError, match="layer_10"):
        load_saes("some-org/some", site="resid_post")


def test_what_the_hub_lists_is_kept(offline, monkeypatch):
    class Hub:
        def repo_info(self, repo, revision=None):
            return SimpleNamespace(sha=COMMIT)

        def list_repo_files(self, repo, revision=None):
            return ["b/c.npz", "a.json"]

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    assert hub.list_files("some-org/some") == ["a.json", "b/c.npz"]
    kept = offline / "models--some-org--some" / ".jaxmech" / COMMIT
    assert kept.read_text() == "a.json\nb/c.npz"
