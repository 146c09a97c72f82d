"""GGUF files to read, written by the `gguf` package."""

import gguf
import pytest


def _write(path, tensors, architecture="llama", facts=None, kinds=None, tokens=("<unk>", "a", "é"), **more):
    """A GGUF file.

    Args:
      tensors: name -> array, quantised here unless it is of bytes.
      facts: `{architecture}.*` metadata; integers become uint32, floats float32, lists arrays.
      kinds: name -> quantisation, float32 without one.
      tokens: the vocabulary, a sentencepiece one whose beginning token is the third and whose end is the second.
      more: further metadata, with "__" for ".".
    """
    writer = gguf.GGUFWriter(path, architecture)
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add[list] = writer.add_array
    facts = {f"{architecture}.{key}": value for key, value in (facts or {}).items()}
    for key, value in {**facts, **{key.replace("__", "."): value for key, value in more.items()}}.items():
        add[type(value)](key, value)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(list(tokens))
    writer.add_uint32("tokenizer.ggml.bos_token_id", 2)
    writer.add_uint32("tokenizer.ggml.eos_token_id", 1)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name)
        if kind is not None and array.dtype != "uint8":
            array = gguf.quants.quantize(array, kind)
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def write_gguf():
    return _write
