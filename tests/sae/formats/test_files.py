"""Files of a dictionary: what is read, what is refused by name, and what the caller may say."""

import json
import pickle
import sys

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from safetensors import SafetensorError
from safetensors.flax import save_file

from jaxmech.sae.formats import load_sae, load_saes, saelens_save, save_sae, save_saes
from jaxmech.sae.formats.files import agree, described, read_tensors
from jaxmech.sae.formats.places import dictionaries, layer_of
from jaxmech.sae.formats.tensors import assemble, matrix_shape
from jaxmech.sae.module import SAEConfig, make_sae, param_shapes, stack_saes


def random_sae(layer=0, **options):
    rng = np.random.default_rng(layer)
    config = SAEConfig(4, 8, layers=(layer,), **options)
    return make_sae({name: rng.normal(size=shape) for name, shape in param_shapes(config).items()}, config)


# Tensors -------------------------------------------------------------------------------------------------------------


def test_half_precision_comes_as_float32(tmp_path):
    value = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2)))
    halves = {"b": value.astype(jnp.bfloat16), "h": value.astype(jnp.float16)}
    save_file(halves, tmp_path / "a.safetensors")
    read = assemble("a", read_tensors(tmp_path / "a.safetensors"), {"b": ("B", False), "h": ("H", True)},
                    {"B": (3, 2), "H": (2, 3)})  # fmt: skip
    assert {leaf.dtype for leaf in read.values()} == {np.dtype("float32")}
    np.testing.assert_array_equal(read["B"], halves["b"].astype(jnp.float32))
    np.testing.assert_array_equal(read["H"], halves["h"].astype(jnp.float32).T)


def test_damaged_files_are_named(tmp_path):
    save_file({"a": jnp.ones(1000)}, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", a=np.ones(1000))
    for name in ("a.safetensors", "a.npz"):
        whole = (tmp_path / name).read_bytes()
        for content in (whole[:-700], whole[:20], b"", b"no tensors at all"):
            (tmp_path / name).write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} is damaged or truncated"):
                read_tensors(tmp_path / name)
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
        with pytest.raises(ValueError, match="Git LFS pointer"):
            read_tensors(tmp_path / name)
    with pytest.raises(ValueError, match="none.npz: no such file"):
        read_tensors(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="expected one of .safetensors, .npz"):
        read_tensors(tmp_path / "a.bin")


def test_python_objects_in_an_npz_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.asarray([{"code": print}], object))
    with pytest.raises(ValueError, match="Python objects, which run code"):
        read_tensors(tmp_path / "a.npz")


def test_kinds_of_numbers_that_are_not_read(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.asarray(jnp.ones(2, jnp.bfloat16)))  # of which NumPy keeps the bytes alone
    with pytest.raises(ValueError, match=r"a: expected floating-point numbers, got \|V2"):
        assemble("here", read_tensors(tmp_path / "a.npz"), {"a": ("A", False)}, {"A": (2,)})
    save_file({"a": jnp.ones(2, jnp.float8_e4m3fn)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="a.safetensors: holds numbers of an unsupported kind"):
        read_tensors(tmp_path / "a.safetensors")


def test_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    value = torch.arange(6.0).reshape(2, 3)
    content = {"w": value.T, "half": value.bfloat16(), "step": 3, "kind": "TopK", "act": {"k": 32}, "none": None}
    torch.save(content, tmp_path / "a.pt")
    read = read_tensors(tmp_path / "a.pt")
    np.testing.assert_array_equal(read["w"], value.T.numpy())
    np.testing.assert_array_equal(read["half"], value.numpy())
    assert (int(read["step"]), str(read["kind"]), int(read["act.k"])) == (3, "TopK", 32) and "none" not in read
    whole = (tmp_path / "a.pt").read_bytes()
    for part in (whole[:-300], whole[:100], b"", b"no tensors at all"):
        (tmp_path / "a.pt").write_bytes(part)
        with pytest.raises(ValueError, match="a.pt is damaged or truncated"):
            read_tensors(tmp_path / "a.pt")


class Code:
    def __reduce__(self):
        return (print, ("run",))


def test_a_torch_file_with_code_is_refused_unopened(tmp_path, capsys):
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(2), "c": Code()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt: holds .*print.* besides tensors; opening that runs code"):
        read_tensors(tmp_path / "a.pt")
    assert "run" not in capsys.readouterr().out
    for protocol in (2, 4):  # what is named, and what torch cannot even tell and would have us run
        (tmp_path / "a.pt").write_bytes(pickle.dumps({"c": Code()}, protocol))
        with pytest.raises(ValueError, match="a.pt.* holds .*run.* code") as error:
            read_tensors(tmp_path / "a.pt")
        assert "likely succeed" not in str(error.value) and "run" not in capsys.readouterr().out
    torch.save({"w": torch.ones(2, 2).to_sparse()}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="a.pt: w: an unsupported kind of tensor"):
        read_tensors(tmp_path / "a.pt")
    torch.save(torch.ones(2), tmp_path / "b.pth")
    with pytest.raises(ValueError, match="expected a dictionary of tensors, got Tensor"):
        read_tensors(tmp_path / "b.pth")
    torch.save({"w": [torch.ones(2)]}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="w: expected a tensor, got list"):
        read_tensors(tmp_path / "c.pt")


def test_without_torch_its_files_say_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "a.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"needs torch; pip install 'jaxmech\[pt\]'"):
        read_tensors(tmp_path / "a.pt")


def test_assemble_names_every_fault_at_once():
    rules = {"a": ("A", False), "a2": ("A", False), "b": ("B", True), "c": ("C", False), "t": ("threshold", False)}
    shapes = {"A": (2,), "B": (2, 3), "C": (1,), "D": (1,), "threshold": (2,)}
    tensors = {"a": np.ones(2), "a2": np.ones(2), "b": np.ones((2, 3)), "x": np.ones(1), "c": np.ones(1, int)}
    with pytest.raises(ValueError) as error:
        assemble("here", tensors | {"t": np.asarray([1, -np.inf])}, rules, shapes, hints={"D": "ask for it"})
    assert str(error.value).startswith("here: ")
    assert sorted(str(error.value).removeprefix("here: ").split("; ")) == sorted([
        "a2: A is also stored under another name",
        "b: expected (3, 2), got (2, 3)",
        "x: unknown tensor",
        "c: expected floating-point numbers, got int64",
        "t: 1 values are NaN or infinite",
        "D: missing (ask for it)",
    ])  # fmt: skip


def test_a_threshold_may_be_infinite_and_what_is_ignored_is_not_asked_for():
    read = assemble("here", {"t": np.asarray([1, np.inf]), "junk": np.ones(3)}, {"t": ("threshold", False)},
                    {"threshold": (2,)}, ignore=["junk"])  # fmt: skip
    np.testing.assert_array_equal(read["threshold"], [1, np.inf])


def test_numbers_beyond_float32_are_not_finite():
    with pytest.raises(ValueError, match="a: 1 values are NaN or infinite"):
        assemble("here", {"a": np.asarray([1e300, 1])}, {"a": ("A", False)}, {"A": (2,)})


def test_matrix_shape():
    assert matrix_shape("here", {"w": np.ones((2, 3))}, "W", "w") == (2, 3)
    with pytest.raises(ValueError, match="here: w: expected a matrix, got shape"):
        matrix_shape("here", {"w": np.ones(3)}, "w")
    with pytest.raises(ValueError, match="here: W or w: missing; it holds a, b"):
        matrix_shape("here", {"a": 1, "b": 2}, "W", "w")


# What the caller says ------------------------------------------------------------------------------------------------


def test_agree():
    assert agree("here", "site", None, "mlp_out") == agree("here", "site", "mlp_out", None) == "mlp_out"
    assert agree("here", "layer", 0, None, needed=True) == 0 and agree("here", "layer", None, None) is None
    assert agree("here", "model", "google/gemma-2-2b", "gemma-2-2B") == "google/gemma-2-2b"
    with pytest.raises(ValueError, match="here: layer: the files say 0, asked for 1"):
        agree("here", "layer", 0, 1)
    with pytest.raises(ValueError, match=r"here: nothing in it says its layer; pass load_sae\(..., layer=\)"):
        agree("here", "layer", None, None, needed=True)


def test_names_in_the_hubs_cache_are_those_of_the_hub(tmp_path):
    snapshot = tmp_path / "models--google--gemma-scope-2b-pt-res" / "snapshots" / "abc"
    assert described(snapshot / "layer_3" / "width_16k") == "google/gemma-scope-2b-pt-res/layer_3/width_16k"
    assert described(snapshot) == "google/gemma-scope-2b-pt-res"
    assert described(tmp_path / "a") == (tmp_path / "a").as_posix()


# Finding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, layer",
    [
        ("layer_3/width_16k/average_l0_71", 3),
        ("resid_post_all/layer_12_width_16k_l0_small", 12),
        ("layers.7.mlp", 7),
        ("blocks.10.hook_resid_pre", 10),
        ("Llama3_1-8B-Base-L31TC-32x", 31),
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", 19),
        ("layer5.sae.pt", 5),
        ("v5_32k_layer_2.pt", 2),
        ("resid_post_layer_8/trainer_1", 8),
        ("autoencoders/4.pt", 4),
        ("Qwen3-1.7B-Base-W32K-L0_50", None),
        ("trainer_0/ae", None),
    ],
)
def test_layers_that_names_tell(name, layer):
    assert layer_of(name) == layer


def test_what_is_a_dictionary_among_files():
    files = [
        *("a/cfg.json", "a/sae_weights.safetensors", "a/sparsity.safetensors", "README.md", "b/layer_0.safetensors"),
        *("L3R-8x/hyperparams.json", "L3R-8x/checkpoints/final.safetensors", "c/trainer_0/ae.pt", "c/trainer_0/x.pt"),
    ]
    assert dictionaries(files) == ["L3R-8x", "a", "c/trainer_0", "b/layer_0.safetensors"]
    assert dictionaries(["cfg.json", "sae_weights.safetensors", "old/sae_weights.safetensors"]) == [""]


def test_a_stack_of_what_lies_in_a_folder_or_a_list(tmp_path):
    for layer, name in zip((5, 2, 11), "abc", strict=True):
        save_sae(random_sae(layer), tmp_path / "all" / f"run_{name}")
    assert load_saes(tmp_path / "all").config.layers == (2, 5, 11)  # the layers are in the files alone
    assert load_saes(tmp_path / "all", layers=[11, 2]).config.layers == (11, 2)
    assert load_saes([tmp_path / "all" / "run_c", str(tmp_path / "all" / "run_a")]).config.layers == (5, 11)
    with pytest.raises(ValueError, match="nothing for layer 3; it has layers 2, 5, 11"):
        load_saes(tmp_path / "all", layers=[2, 3])
    save_sae(random_sae(5), tmp_path / "all" / "run_again")
    with pytest.raises(ValueError, match="layer 5 twice: .*run_.*run_"):
        load_saes(tmp_path / "all")


def test_a_folder_whose_name_tells_another_layer(tmp_path):
    save_saes(random_sae(3), tmp_path)
    (tmp_path / "layer_3").rename(tmp_path / "layer_4")
    with pytest.raises(ValueError, match="layer: the files say 3, asked for 4"):
        load_saes(tmp_path)


def test_sources_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="nothing there"):
        load_sae(tmp_path)
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(ValueError, match="no dictionary there; it holds notes.txt"):
        load_saes(tmp_path)
    with pytest.raises(ValueError, match="does not exist; expected a folder, a file, a hub id"):
        load_sae(tmp_path / "missing")
    with pytest.raises(ValueError, match="site: expected one of resid_pre, .*got 'resid'"):
        load_sae(tmp_path, site="resid")
    with pytest.raises(ValueError, match="revision: .* is a local path"):
        load_sae(tmp_path, revision="main")
    np.savez(tmp_path / "other.npz", a=np.ones(2))
    with pytest.raises(ValueError, match="other.npz: in none of the formats known here"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    "weights, config",
    [("sae_weights.safetensors", "cfg.json"), ("sae.safetensors", "cfg.json"), ("ae.pt", "config.json")],
)
def test_weights_without_their_configuration(weights, config, tmp_path):
    (tmp_path / weights).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{config}: missing; the weights beside it cannot be read without it"):
        load_sae(tmp_path)


def test_a_configuration_that_is_no_object(tmp_path):
    save_sae(random_sae(), tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="cfg.json: expected a JSON object, got list"):
        load_sae(tmp_path)


# Links, copies and typos ---------------------------------------------------------------------------------------------


@pytest.fixture
def three(tmp_path, monkeypatch):
    """runs/study/saes/layer_0, layer_1 and layer_3, in the working folder; layer_1 is elsewhere, behind a link."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    folder = tmp_path / "runs" / "study" / "saes"
    save_saes(stack_saes([random_sae(layer) for layer in (0, 1, 3)]), folder)
    (folder / "layer_1").rename(tmp_path / "elsewhere")
    (folder / "layer_1").symlink_to(tmp_path / "elsewhere")
    return folder


def test_dictionaries_behind_links_are_loaded(three):
    stack = load_saes(three)
    assert stack.config.layers == (0, 1, 3)
    np.testing.assert_array_equal(stack.params["W_enc"][1], random_sae(1).params["W_enc"])
    (three / "round").symlink_to(three)  # entered, it would be entered for ever
    (three / "notes").mkdir()
    (three / ".cache" / "layer_7").mkdir(parents=True)  # what downloads leave behind
    assert load_saes(three).config.layers == (0, 1, 3)


def test_files_behind_links_are_loaded(three, tmp_path):
    for layer in (0, 1, 3):
        folder = tmp_path / "linked" / f"layer_{layer}"
        folder.mkdir(parents=True)
        for file in (three / f"layer_{layer}").iterdir():
            (folder / file.name).symlink_to(file)
    assert load_saes(tmp_path / "linked").config.layers == (0, 1, 3)


def link_to_nothing(folder):
    folder.symlink_to("/gone/away")


def config_alone(folder):
    save_sae(random_sae(1), folder)
    (folder / "sae_weights.safetensors").unlink()


def half_a_file(folder):
    config_alone(folder)
    (folder / ".sae_weights.safetensors.Xy12").write_bytes(b"half")


@pytest.mark.parametrize("broken", [link_to_nothing, config_alone, half_a_file, lambda folder: folder.mkdir()])
def test_half_copied_dictionaries_are_named_and_not_passed_over(broken, three):
    (three / "layer_1").unlink()
    broken(three / "layer_1")
    for call in (lambda: load_saes(three), lambda: load_saes(three, layers=[0, 1]), lambda: load_sae(three)):
        with pytest.raises(ValueError, match="saes: layer_1: without weights: half copied, or a broken link"):
            call()
    assert load_saes(three, layers=[0, 3]).config.layers == (0, 3)  # what nobody asked for is in nobody's way
    assert load_sae(three, layer=3).config.layers == (3,)


def test_half_copied_dictionaries_whose_name_tells_no_layer(three):
    (three / "layer_1").unlink()
    config_alone(three / "run_b")
    with pytest.raises(ValueError, match="saes: run_b: without weights"):
        load_saes(three)
    with pytest.raises(ValueError, match="nothing for layer 1"):
        load_saes(three, layers=[0, 1])
    with pytest.raises(ValueError, match="layer_9.safetensors: without weights"):
        (three / "layer_9.safetensors").symlink_to("/gone/away")
        (three / "run_b").rename(three / ".run_b")
        load_saes(three)


def test_an_empty_folder_of_one_size(tmp_path):
    for l0 in (22, 71):
        (tmp_path / "layer_3" / "width_16k" / f"average_l0_{l0}").mkdir(parents=True)
    np.savez(tmp_path / "layer_3" / "width_16k" / "average_l0_71" / "params.npz", a=np.ones(1))
    with pytest.raises(ValueError, match="layer_3/width_16k/average_l0_22: without weights"):
        load_saes(tmp_path, site="resid_post")


@pytest.mark.parametrize(
    "layers", [np.array([1, 3]), jnp.array([1, 3]), pd.Series([1, 3]), range(1, 4, 2), (n for n in (1, 3))]
)
def test_layers_of_any_kind_of_list(layers, three):
    assert load_saes(three, layers=layers).config.layers == (1, 3)


def test_layers_that_are_none(three):
    assert load_sae(three, layer=np.int64(3)).config.layers == (3,)
    for wrong in (["1", "3"], "13", 3, [1.0, 3.0], np.array([True, False])):
        with pytest.raises(ValueError, match="layers: expected .*whole number"):
            load_saes(three, layers=wrong)
    for wrong in ([], [1, 1]):
        with pytest.raises(ValueError, match="layers: expected distinct layers, at least one"):
            load_saes(three, layers=wrong)
    with pytest.raises(ValueError, match="layer: expected a whole number, got '3'"):
        load_sae(three, layer="3")


@pytest.mark.parametrize(
    "typo, said",
    [
        ("runs/study/sae", "runs/study has no 'sae', but saes; did you mean 'runs/study/saes'"),
        ("runs/stdy/saes", "runs has no 'stdy', but study; did you mean 'runs/study'"),
        ("runs/other", "runs has no 'other', but study$"),
        ("./runs/study/sae", "runs/study has no 'sae', but saes; did you mean 'runs/study/saes'"),
        ("runs/study/saes/layer_2", "has no 'layer_2', but layer_0, layer_1, layer_3; did you mean 'runs/study/saes/l"),
        ("{}/runs/studies", "runs has no 'studies', but study"),
        ("rnus", "did you mean 'runs'"),
    ],
)
def test_a_typo_of_a_local_path_tells_what_is_there(typo, said, three, tmp_path):
    for load in (load_saes, load_sae):
        with pytest.raises(ValueError, match=f"(?s)does not exist.*{said}") as error:
            load(typo.format(tmp_path))
        assert "hf auth login" not in str(error.value)


def test_a_name_that_may_be_of_the_hub_keeps_the_hubs_message(three):
    with pytest.raises(
        ValueError, match="(?s)could not be fetched from the .* hub.*Among local paths: did you mean 'runs'"
    ):
        load_saes("run/study/saes")


def test_where_dictionaries_cannot_be_written_the_path_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file/layer_0 could not be written .*; make room, or choose another folder"):
        save_saes(random_sae(0), tmp_path / "file")
    for error in (OSError(30, "Read-only file system"), OSError(28, "No space left on device"),
                  SafetensorError("I/O error: No space left on device (os error 28)")):  # fmt: skip

        def fails(*_, error=error):
            raise error

        monkeypatch.setattr(saelens_save, "save_file", fails)
        why = getattr(error, "strerror", None) or "No space left on device"
        with pytest.raises(ValueError, match=f"layer_0 could not be written .*{why}"):
            save_saes(random_sae(0), tmp_path / "saes")
        assert not (tmp_path / "saes" / "layer_0" / "cfg.json").exists()
