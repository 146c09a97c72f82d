"""Compares jaxmech's dictionaries with their originals, live; needs torch and sae-lens.

python check_dictionaries.py [--seed N]        # random dictionaries of every form, both ways
python check_dictionaries.py --opened FOLDER   # opens every SAE under FOLDER (saved by jaxmech beside an io.npz
                                                       # of x, f, y) in SAELens and compares

SAELens writes its own files and computes its own numbers. The other formats are written here, and computed by the
formulas of their repositories with nothing folded. One line each: the largest difference of encode, decode and the
whole, relative to the largest value where that is above 1.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from jaxmech import load_sae, save_sae
from jaxmech.sae.module import SAEConfig, make_sae, param_shapes

D, F, N, D_OUT, HEADS = 12, 40, 16, 10, 3
TOLERANCE = 1e-4
SCALE = 0.37  # of "expected_average_only_in"
failures: list[str] = []


def report(name: str, good: bool, text: str) -> None:
    failures.extend([] if good else [name])
    print(f"{'ok  ' if good else 'FAIL'} {name}: {text}")


def compare(name: str, ours, x, f, y, whole=None) -> None:
    """What differs between `ours` and the original's code f of x, its output y of f, and its output of x."""
    x, f, y = (np.asarray(value, np.float32) for value in (x, f, y))
    expected = f, y, y if whole is None else np.asarray(whole)
    got = ours.encode(x), ours.decode(f, x), ours(x)
    off = [np.abs(a - b).max() / max(1, np.abs(b).max()) for a, b in zip(got, expected, strict=True)]
    zeros = bool(((np.asarray(got[0]) != 0) == (f != 0)).all())
    told = "encode {:.1e}, decode {:.1e}, whole {:.1e}".format(*off)
    l0 = (f != 0).sum(-1).mean()
    report(
        name, zeros and max(off) < TOLERANCE and 0 < l0 < F, f"{told}, L0 {l0:.1f}{'' if zeros else ', ZEROS DIFFER'}"
    )


def refused(name: str, part: str, call) -> None:
    try:
        call()
    except ValueError as error:
        report(name, part in str(error), f"refused: ...{str(error)[-90:]}")
    else:
        report(name, False, "accepted")


# SAELens --------------------------------------------------------------------------------------------------------------


def build(architecture: str, trained: bool = False, hook: str = "blocks.9.hook_resid_post", **options):
    """A SAELens dictionary of which every weight matters."""
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
    from sae_lens.saes.sae import SAEMetadata

    cls, config = (SAE_TRAINING_CLASS_REGISTRY if trained else SAE_CLASS_REGISTRY)[architecture]
    metadata = {"model_name": "gemma-3-270m", "hook_name": hook}
    if "transcoder" in architecture:
        options |= {"d_out": D_OUT, "apply_b_dec_to_input": False}
        metadata |= {"hook_name": "blocks.9.ln2.hook_normalized", "hook_name_out": "blocks.9.hook_mlp_out"}
    if architecture == "matryoshka_batchtopk":
        options["matryoshka_widths"] = [10, F]
    sae = cls(config(d_in=D, d_sae=F, metadata=SAEMetadata(**metadata), **options))
    with torch.no_grad():
        for name, value in sae.state_dict().items():
            noise = torch.randn(value.shape)
            scales = {"W_enc": D**-0.5, "W_dec": torch.rand(F, 1) + 0.3, "W_skip": 0.5}
            noise = noise * scales.get(name, 1.0 if value.ndim > 1 else 0.3)
            if name in ("threshold", "topk_threshold"):
                noise = noise.abs() + (name == "topk_threshold")
            value.copy_(noise)
    return sae


def numbers(sae, x):
    with torch.no_grad():
        f = sae.encode(x)
        return f, sae.decode(f), sae(x)


def flatten(folder: Path) -> None:
    """Rewrites a cfg.json as SAELens wrote it before version 6."""
    cfg = json.loads((folder / "cfg.json").read_text())
    metadata = cfg.pop("metadata")
    cfg |= {"model_name": metadata["model_name"], "hook_point": metadata["hook_name"], "hook_point_layer": 9,
            "hook_point_head_index": None, "activation_fn_str": "relu", "activation_fn_kwargs": {}, "prepend_bos": True,
            "context_size": 128, "dataset_path": "a/b", "lr": 3e-4, "finetuning_scaling_factor": False}  # fmt: skip
    if cfg["architecture"] == "topk":
        cfg |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": cfg.pop("k")}}
    if cfg["architecture"] in ("topk", "standard"):
        del cfg["architecture"]
    if cfg["normalize_activations"] in ("none", "expected_average_only_in"):
        cfg["normalize_activations"] = cfg["normalize_activations"] != "none"
    if cfg["reshape_activations"] == "hook_z":
        del cfg["reshape_activations"]
    (folder / "cfg.json").write_text(json.dumps(cfg))


def saelens_forms():
    """(architecture, options): every form but the transcoders, with every normalisation."""
    forms = [("standard", {}), ("gated", {}), ("jumprelu", {})]
    for name, rescale in itertools.product(("topk", "abstopk"), (False, True)):
        forms.append((name, {"k": 5, "rescale_acts_by_decoder_norm": rescale}))
    normalizations = ("none", "expected_average_only_in", "constant_norm_rescale", "layer_norm")
    for (name, options), normalize, subtract in itertools.product(forms, normalizations, (True, False)):
        yield name, options | {"normalize_activations": normalize, "apply_b_dec_to_input": subtract}


def check_saelens(root: Path) -> None:
    from sae_lens import SAE

    x = 3 * torch.randn(N, D) + 0.5
    for i, (name, options) in enumerate(saelens_forms()):
        for form in ("current", "before 6"):
            folder = root / f"{i}-{form}"
            build(name, **options).save_model(folder)
            if form == "before 6" and name != "abstopk":
                flatten(folder)
            theirs = SAE.load_from_disk(folder)
            if options["normalize_activations"] == "expected_average_only_in":
                theirs.fold_activation_norm_scaling_factor(SCALE)
                (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": SCALE}))
            flags = ", ".join(f"{key}={value}" for key, value in options.items())
            compare(f"SAELens {form} {name} ({flags})", load_sae(folder), x, *numbers(theirs, x))
    for name in ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder"):
        build(name).save_model(root / name)
        f, y, whole = numbers(SAE.load_from_disk(root / name), x)
        # SAELens leaves the skip term to the whole.
        compare(f"SAELens {name}", load_sae(root / name), x, f, whole if "skip" in name else y, whole)
    for form in ("current", "before 6"):
        folder = root / f"hook_z {form}"
        build("standard", hook="blocks.9.attn.hook_z", reshape_activations="hook_z").save_model(folder)
        if form == "before 6":
            flatten(folder)
        f, y, whole = numbers(SAE.load_from_disk(folder), x.reshape(N, HEADS, -1))
        compare(f"SAELens {form} hook_z", load_sae(folder), x, f, y.reshape(N, D), whole.reshape(N, D))


def check_saelens_trained(root: Path) -> None:
    """What training saves, against what SAELens exports of it."""
    from sae_lens import SAE

    x = 3 * torch.randn(N, D)
    ranked = {"topk": 5, "abstopk": 5, "batchtopk": 4.5, "matryoshka_batchtopk": 4.0}
    for name, rescale in itertools.product(("standard", "gated", "jumprelu", *ranked), (False, True)):
        if name not in ranked and rescale:
            continue
        options = {"k": ranked[name], "rescale_acts_by_decoder_norm": rescale} if name in ranked else {}
        sae, folder = build(name, trained=True, **options), root / f"trained-{name}-{rescale}"
        sae.save_model(folder)
        sae.save_inference_model(folder / "exported")
        told = f"SAELens trainer's {name}{', rescaled' if rescale else ''}"
        theirs = numbers(SAE.load_from_disk(folder / "exported"), x)
        ours = load_sae(folder, batch_topk=False)
        compare(told, ours, x, *theirs)
        compare(f"{told}, exported", load_sae(folder / "exported"), x, *theirs)
        if "batchtopk" in name:
            with torch.no_grad():
                f = sae.encode(x)
                y = sae.decode(f)
            compare(f"{told}, as trained", load_sae(folder, batch_topk=True), x, f, y)
            exported = load_sae(folder / "exported", batch_topk=True)
            compare(f"{told}, exported, as trained", exported, x, f, y)
            sae.topk_threshold.fill_(0)
            sae.save_model(folder / "unset")
            sae.save_inference_model(folder / "unset exported")
            for kind in ("unset", "unset exported"):
                refused(f"{told}, {kind} threshold", "batch_topk=True", lambda at=folder / kind: load_sae(at))


def check_written(root: Path) -> None:
    """The other way round: dictionaries saved by jaxmech, opened in SAELens."""
    from sae_lens import SAE, TrainingSAE

    rng = np.random.default_rng(torch.randint(2**31, ()).item())
    forms = []
    for name, normalize, subtract in itertools.product(
        ("relu", "jumprelu", "topk", "abstopk"), ("none", "norm", "layer_norm"), (True, False)
    ):
        forms.append({"activation": name, "normalize": normalize, "subtract_b_dec": subtract})
    for name, skip, subtract in itertools.product(("relu", "jumprelu"), (True, False), (True, False)):
        d_out = D if subtract else D_OUT
        forms.append({"activation": name, "skip": skip, "subtract_b_dec": subtract, "d_out": d_out, "site": "mlp_in",
                      "site_out": "mlp_out"})  # fmt: skip
    forms += [{"activation": "batchtopk"}]
    for i, form in enumerate(forms):
        k = {"k": 4} if "topk" in form["activation"] else {}
        config = SAEConfig(d_in=D, d_sae=F, layers=(9,), **form, **k)
        sae = make_sae({name: 0.4 * rng.normal(size=s) for name, s in param_shapes(config).items()}, config)
        folder = save_sae(sae, root / f"written-{i}")
        x = 3 * torch.randn(N, D)
        f, y, whole = numbers((TrainingSAE if form["activation"] == "batchtopk" else SAE).load_from_disk(folder), x)
        told = ", ".join(f"{key}={value}" for key, value in form.items())
        compare(f"in SAELens ({told})", sae, x, f, whole if config.skip else y, whole)


def check_opened(root: Path) -> None:
    """Compares what jaxmech computed with what SAELens computes from the files that jaxmech wrote."""
    from sae_lens import SAE

    found = sorted(path.parent for path in root.rglob("cfg.json"))
    if not found:
        sys.exit(f"no cfg.json under {root}")
    for folder in found:
        io, sae = np.load(folder / "io.npz"), SAE.load_from_disk(folder)
        with torch.no_grad():
            f = sae.encode(torch.tensor(io["x"]))
            y = sae.decode(f)
        off = [np.abs(a.numpy() - io[b]).max() / max(1, np.abs(io[b]).max()) for a, b in ((f, "f"), (y, "y"))]
        good = max(off) < TOLERANCE and bool(((f.numpy() != 0) == (io["f"] != 0)).all())
        report(str(folder), good, f"{type(sae).__name__}, {sae.cfg.metadata.hook_name}: {off[0]:.1e}, {off[1]:.1e}")


# The other formats, by the formulas of their own repositories ---------------------------------------------------------


def random_tensors(**shapes) -> dict[str, torch.Tensor]:
    return {name: 0.4 * torch.randn(shape if isinstance(shape, tuple) else (shape,)) for name, shape in shapes.items()}


def keep(pre: torch.Tensor, k: int) -> torch.Tensor:
    """The k largest of each row, the rest 0."""
    values, index = pre.topk(k, dim=-1)
    return torch.zeros_like(pre).scatter_(-1, index, values)


def check_sparsify(root: Path) -> None:
    x = 3 * torch.randn(N, D)
    forms = [("layers.3", {}), ("layers.3.mlp", {"transcode": True}), ("h.2.attn", {"signed": True}), ("layers.1.mlp",
             {"transcode": True, "skip_connection": True}), ("layers.2.mlp", {"skip_connection": True})]  # fmt: skip
    for name, options in forms:
        t = random_tensors(W=(F, D), b=F, W_dec=(F, D), b_dec=D, W_skip=(D, D))
        folder = root / "sparsify" / name
        folder.mkdir(parents=True, exist_ok=True)
        cfg = {"d_in": D, "num_latents": F, "k": 6, "expansion_factor": 32, "normalize_decoder": True, **options}
        (folder / "cfg.json").write_text(json.dumps(cfg))
        skip = {"W_skip": t["W_skip"]} if options.get("skip_connection") else {}
        save_file({"encoder.weight": t["W"], "encoder.bias": t["b"], "W_dec": t["W_dec"], "b_dec": t["b_dec"], **skip},
                  folder / "sae.safetensors")  # fmt: skip
        pre = (x if options.get("transcode") else x - t["b_dec"]) @ t["W"].T + t["b"]
        if options.get("signed"):
            index = pre.abs().topk(6, dim=-1).indices
            f = torch.zeros_like(pre).scatter_(-1, index, pre.gather(-1, index))
        else:
            f = keep(torch.relu(pre), 6)
        y = f @ t["W_dec"] + t["b_dec"] + (x @ t["W_skip"].T if skip else 0)
        compare(f"sparsify {name} {options}", load_sae(folder), x, f, y)


def check_dictionary_learning(root: Path) -> None:
    x = 3 * torch.randn(N, D)
    linear = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F)}
    canonical = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}

    def check(name: str, t: dict[str, torch.Tensor], f: torch.Tensor, y: torch.Tensor, **given) -> Path:
        folder = root / f"{name}{len(given)}"
        folder.mkdir(exist_ok=True)
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": F, "layer": 4, "lm_name": "pythia-70m",
                   "submodule_name": "resid_post_layer_4"} | ({"k": 6} if "TopK" in name else {})  # fmt: skip
        (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128, "io": "out"}}))
        torch.save(t, folder / "ae.pt")
        compare(f"dictionary_learning {name} {given}", load_sae(folder, **given), x, f, y)
        return folder

    t = random_tensors(bias=D, **linear)
    f = torch.relu((x - t["bias"]) @ t["encoder.weight"].T + t["encoder.bias"])
    check("AutoEncoder", t, f, f @ t["decoder.weight"].T + t["bias"])
    t = random_tensors(**linear, **{"decoder.bias": D})
    f = torch.relu(x @ t["encoder.weight"].T + t["encoder.bias"])
    check("AutoEncoderNew", t, f, f @ t["decoder.weight"].T + t["decoder.bias"])
    shapes = {name: linear[name] for name in ("encoder.weight", "decoder.weight")}
    t = random_tensors(decoder_bias=D, r_mag=F, gate_bias=F, mag_bias=F, **shapes)
    u = (x - t["decoder_bias"]) @ t["encoder.weight"].T
    f = (u + t["gate_bias"] > 0) * torch.relu(t["r_mag"].exp() * u + t["mag_bias"])
    check("GatedAutoEncoder", t, f, f @ t["decoder.weight"].T + t["decoder_bias"])
    t = random_tensors(**canonical, threshold=F)
    t["threshold"] = t["threshold"].abs()
    pre = x @ t["W_enc"] + t["b_enc"]
    f = torch.relu(pre * (pre > t["threshold"]))
    check("JumpReluAutoEncoder", t, f, f @ t["W_dec"] + t["b_dec"])
    for name in ("AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        t = random_tensors(**(canonical if name.startswith("M") else {**linear, "b_dec": D}))
        t |= {"k": torch.tensor(6, dtype=torch.int), "threshold": torch.tensor(1.2)}
        if name.startswith("M"):
            t["group_sizes"] = torch.tensor([10, F - 10])
            post = torch.relu((x - t["b_dec"]) @ t["W_enc"] + t["b_enc"])
        else:
            post = torch.relu((x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
        W_dec = t["W_dec"] if name.startswith("M") else t["decoder.weight"].T
        f = keep(post, 6) if name == "AutoEncoderTopK" else post * (post > 1.2)
        folder = check(name, t, f, f @ W_dec + t["b_dec"])
        if name == "AutoEncoderTopK":
            continue
        f = keep(post.flatten()[None], 6 * N).reshape(N, F)
        check(name, t, f, f @ W_dec + t["b_dec"], batch_topk=True)
        torch.save(t | {"threshold": torch.tensor(-1.0)}, folder / "ae.pt")
        refused(f"dictionary_learning {name}, unset threshold", "batch_topk=True", lambda at=folder: load_sae(at))


def check_bare(root: Path) -> None:
    x = 3 * torch.randn(N, D) + 1
    t = random_tensors(**{"encoder_linear.weight": (F, D), "encoder_linear.bias": F, "decoder_linear.weight": (D, F),
                          "decoder_linear.bias": D})  # fmt: skip
    f = torch.relu(x @ t["encoder_linear.weight"].T + t["encoder_linear.bias"])
    torch.save(t, root / "Llama-3.1-8B-Instruct-SAE-l19.pth")
    y = f @ t["decoder_linear.weight"].T + t["decoder_linear.bias"]
    compare("Goodfire", load_sae(root / "Llama-3.1-8B-Instruct-SAE-l19.pth"), x, f, y)

    t = random_tensors(pre_bias=D, latent_bias=F, **{"encoder.weight": (F, D), "decoder.weight": (D, F)})
    folder = root / "resid_post_mlp_v5_32k" / "autoencoders"
    folder.mkdir(parents=True)
    extra = {"stats_last_nonzero": torch.zeros(F, dtype=torch.long), "activation": "TopK",
             "activation_state_dict": {"k": 6, "postact_fn": "ReLU"}}  # fmt: skip
    torch.save(t | extra, folder / "6.pt")
    mean, std = x.mean(-1, keepdim=True), x.std(-1, keepdim=True)
    f = torch.relu(keep(((x - mean) / (std + 1e-5) - t["pre_bias"]) @ t["encoder.weight"].T + t["latent_bias"], 6))
    y = (f @ t["decoder.weight"].T + t["pre_bias"]) * std + mean
    compare("OpenAI GPT-2", load_sae(folder / "6.pt"), x, f, y)

    t = random_tensors(W_enc=(F, D), W_dec=(D, F), b_enc=F, b_dec=D)
    folder = root / "SAE-Res-Qwen3-8B-Base-W64K-L0_6"
    folder.mkdir()
    torch.save(t, folder / "layer22.sae.pt")
    f = keep(x @ t["W_enc"].T + t["b_enc"], 6)
    compare("Qwen-Scope", load_sae(folder / "layer22.sae.pt"), x, f, f @ t["W_dec"].T + t["b_dec"])


class _Code:
    """What a malicious file holds: opening it would call this."""

    def __reduce__(self):
        return os.system, ("echo THIS RAN; exit 1",)


def check_damage(root: Path) -> None:
    path = root / "layer1.sae.pt"
    torch.save({"W_enc": torch.zeros(2, 2), "hook": _Code()}, path)
    refused("a .pt with code in it", "code", lambda: load_sae(path, k=1))
    torch.save(random_tensors(W_enc=(F, D), W_dec=(D, F), b_enc=F, b_dec=D), path)
    path.write_bytes(path.read_bytes()[:-200])
    refused("a truncated .pt", "truncated", lambda: load_sae(path, k=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--opened", type=Path, help="a folder of SAEs saved by jaxmech")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    if args.opened:
        check_opened(args.opened)
    else:
        for check in (check_saelens, check_saelens_trained, check_written, check_sparsify, check_dictionary_learning,
                      check_bare, check_damage):  # fmt: skip
            with tempfile.TemporaryDirectory() as root:
                check(Path(root))
    print(f"{len(failures)} failed" + "".join(f"\n  {name}" for name in failures))
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
