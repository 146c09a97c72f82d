"""Measures the host memory that loading a checkpoint takes beyond its parameters, and the seconds.

Writes a random sharded Llama checkpoint in bfloat16 (about 2.5 GB by default) into a temporary folder and loads it:
`python scripts/benchmarks/measure_loading.py --layers 16 --width 2048`. Linux only: it samples /proc/self/status.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxmech.models.load import load_model

VOCAB, GIB = 32_000, 2**30


def write(folder: Path, layers: int, width: int) -> int:
    """A checkpoint of one shard a layer. Returns the bytes of its largest tensor."""
    rng, hidden = np.random.default_rng(0), 4 * width
    config = {"model_type": "llama", "vocab_size": VOCAB, "hidden_size": width, "intermediate_size": hidden}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 16, "num_key_value_heads": 16, "hidden_act": "silu"}
    config |= {"rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 2048, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    shapes = [
        {"model.embed_tokens.weight": (VOCAB, width), "lm_head.weight": (VOCAB, width), "model.norm.weight": (width,)}
    ]
    for i in range(layers):
        names = {f"self_attn.{p}_proj": (width, width) for p in "qkvo"}
        names |= {"mlp.gate_proj": (hidden, width), "mlp.up_proj": (hidden, width), "mlp.down_proj": (width, hidden)}
        names |= dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (width,))
        shapes.append({f"model.layers.{i}.{name}.weight": shape for name, shape in names.items()})
    index = {}
    for i, shard in enumerate(shapes):
        name = f"model-{i:05}.safetensors"
        save_file({k: rng.random(s, np.float32).astype(ml_dtypes.bfloat16) for k, s in shard.items()}, folder / name)
        index |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return 2 * max(int(np.prod(s)) for shard in shapes for s in shard.values())


def write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(folder)


def anonymous() -> int:
    """Bytes of this process that are no mapped file."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--width", type=int, default=2048)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as warm, tempfile.TemporaryDirectory() as name:
        write(Path(warm), 1, 64)
        write_tokenizer(Path(warm))
        load_model(warm, dtype="bfloat16")  # imports and compilations take memory of their own
        folder = Path(name)
        largest = write(folder, args.layers, args.width)
        write_tokenizer(folder)
        before, most, done = anonymous(), 0, threading.Event()

        def watch():
            nonlocal most
            while not done.wait(0.002):
                most = max(most, anonymous())

        watcher = threading.Thread(target=watch)
        watcher.start()
        begun = time.perf_counter()
        lm = jax.block_until_ready(load_model(folder, dtype="bfloat16").params)
        seconds = time.perf_counter() - begun
        done.set()
        watcher.join()
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(lm))
    extra = most - before - (size if jax.default_backend() == "cpu" else 0)
    print(f"parameters {size / GIB:.2f} GiB, largest tensor {largest / GIB:.3f} GiB, loaded in {seconds:.1f} s")
    print(
        f"host memory beyond the parameters, at the peak: {extra / GIB:.3f} GiB, {extra / largest:.1f} largest tensors"
    )


if __name__ == "__main__":
    main()
