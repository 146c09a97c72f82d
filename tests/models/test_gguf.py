"""GGUF files, written here with the `gguf` package: header, dequantisation, parts, damage."""

from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest

from jaxmech.models.gguf import QUANTISATIONS, GGUFFile

Kind = gguf.GGMLQuantizationType


@pytest.fixture
def small(tmp_path, write_gguf):
    rng = np.random.default_rng(0)
    tensors = {"token_embd.weight": rng.normal(size=(7, 64)), "w": rng.normal(size=(3, 256)), "b": rng.normal(size=5)}
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    facts = {"attention.layer_norm_rms_epsilon": 1e-6, "block_count": 3}
    kinds = {"token_embd.weight": Kind.Q8_0, "w": Kind.Q4_1}
    return write_gguf(tmp_path / "small.gguf", tensors, facts=facts, kinds=kinds)


def test_agrees_with_the_gguf_package(small):
    ours, theirs = GGUFFile(small), gguf.GGUFReader(small)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            expected = field.contents()
            got = ours.metadata[key]
            assert np.float32(got) == np.float32(expected) if isinstance(got, float) else got == expected
    assert ours.names() == [t.name for t in theirs.tensors]
    for tensor in theirs.tensors:
        expected = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(ours.read(tensor.name), expected.reshape(ours.shape(tensor.name)))


def test_floats_are_read_as_they_were_written(small):
    assert GGUFFile(small).metadata["llama.attention.layer_norm_rms_epsilon"] == 1e-6


# Quantisations, decoded here value by value from the layout of ggml's blocks (ggml-common.h, ggml-quants.c) ----------


def half(b, at=0):
    return struct.unpack_from("<e", b, at)[0]


def low_then_high(qs):
    return [q & 15 for q in qs] + [q >> 4 for q in qs]


def legacy(b, fifth, offset):
    """Q4_0, Q4_1, Q5_0, Q5_1: scale, minimum unless `offset` stands for it, fifth bits if any, nibbles."""
    at, minimum = (2, None) if offset else (4, half(b, 2))
    bits = struct.unpack_from("<I", b, at)[0] if fifth else 0
    values = [q + 16 * (bits >> i & 1) for i, q in enumerate(low_then_high(b[at + 4 * fifth :]))]
    return [half(b) * (q - offset) + (minimum or 0) for q in values]


def scale_and_min(s, j):
    """The j-th of eight six-bit scales and minima of Q4_K and Q5_K, packed in twelve bytes."""
    if j < 4:
        return s[j] & 63, s[j + 4] & 63
    return s[j + 4] & 15 | s[j - 4] >> 6 << 4, s[j + 4] >> 4 | s[j] >> 6 << 4


def q45_k(b, high, qs):
    """Q4_K and Q5_K: nibbles of 32 bytes make two runs of 32 values; `high` holds their fifth bits, run by run."""
    out = []
    for run in range(8):
        scale, minimum = scale_and_min(b[4:16], run)
        for i in range(32):
            q = qs[run // 2 * 32 + i] >> 4 * (run % 2) & 15
            q += 16 * (high[i] >> run & 1) if high else 0
            out.append(half(b) * scale * q - half(b, 2) * minimum)
    return out


def q2_k(b):
    out, scales, qs = [], b[:16], b[16:80]
    for i in range(256):
        q = qs[i // 128 * 32 + i % 32] >> 2 * (i % 128 // 32) & 3
        out.append(half(b, 80) * (scales[i // 16] & 15) * q - half(b, 82) * (scales[i // 16] >> 4))
    return out


def q3_k(b):
    out, high, qs, s = [], b[:32], b[32:96], b[96:108]
    for i in range(256):
        j, group = i // 16, i // 32
        scale = (s[j] & 15 if j < 8 else s[j - 8] >> 4) | (s[8 + j % 4] >> 2 * (j // 4) & 3) << 4
        q = qs[i // 128 * 32 + i % 32] >> 2 * (group % 4) & 3
        out.append(half(b, 108) * (scale - 32) * (q - (0 if high[i % 32] >> group & 1 else 4)))
    return out


def q6_k(b):
    out, low, high = [], b[:128], b[128:192]
    scales = struct.unpack_from("16b", b, 192)
    for i in range(256):
        part, quarter, j = i // 128, i % 128 // 32, i % 32
        q = low[part * 64 + quarter % 2 * 32 + j] >> 4 * (quarter // 2) & 15
        q |= (high[part * 32 + j] >> 2 * quarter & 3) << 4
        out.append(half(b, 208) * scales[i // 16] * (q - 32))
    return out


IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def iq4_xs(b):
    out, high = [], struct.unpack_from("<H", b, 2)[0]
    for run in range(8):
        scale = (b[4 + run // 2] >> 4 * (run % 2) & 15) | (high >> 2 * run & 3) << 4
        values = low_then_high(b[8 + 16 * run : 24 + 16 * run])
        out += [half(b) * (scale - 32) * IQ4[q] for q in values]
    return out


# kind -> bytes of a block, where its float16 numbers stand, decoder
LAYOUTS = {
    "F32": (4, (), lambda b: struct.unpack("<f", b)),
    "F16": (2, (0,), lambda b: [half(b)]),
    "BF16": (2, (), lambda b: struct.unpack("<f", b"\0\0" + bytes(b))),
    "Q4_0": (18, (0,), lambda b: legacy(b, fifth=False, offset=8)),
    "Q4_1": (20, (0, 2), lambda b: legacy(b, fifth=False, offset=0)),
    "Q5_0": (22, (0,), lambda b: legacy(b, fifth=True, offset=16)),
    "Q5_1": (24, (0, 2), lambda b: legacy(b, fifth=True, offset=0)),
    "Q8_0": (34, (0,), lambda b: [half(b) * q for q in struct.unpack_from("32b", b, 2)]),
    "Q2_K": (84, (80, 82), q2_k),
    "Q3_K": (110, (108,), q3_k),
    "Q4_K": (144, (0, 2), lambda b: q45_k(b, None, b[16:])),
    "Q5_K": (176, (0, 2), lambda b: q45_k(b, b[16:48], b[48:])),
    "Q6_K": (210, (208,), q6_k),
    "IQ4_NL": (18, (0,), lambda b: [half(b) * IQ4[q] for q in low_then_high(b[2:])]),
    "IQ4_XS": (136, (0,), iq4_xs),
}


@pytest.mark.parametrize("kind", QUANTISATIONS)
def test_each_quantisation_by_its_layout(kind, tmp_path, write_gguf):
    width, halves, decode = LAYOUTS[kind]
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, size=(3, 2, width), dtype=np.uint8)
    for at in halves:
        blocks[..., at : at + 2] = rng.normal(size=(3, 2, 1)).astype(np.float16).view(np.uint8)
    if kind in ("F32", "BF16"):  # random bytes may be no number
        floats = rng.normal(size=(3, 2, 1)).astype(np.float32)
        blocks = floats.view(np.uint8)[..., -width:]
    rows = np.ascontiguousarray(blocks.reshape(3, -1))
    file = GGUFFile(write_gguf(tmp_path / "w.gguf", {"w": rows}, kinds={"w": Kind[kind]}))
    expected = np.array([[value for block in row for value in decode(block.tobytes())] for row in blocks])
    assert file.tensors["w"].kind == kind and file.shape("w") == expected.shape
    np.testing.assert_allclose(file.read("w"), expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())


def patch_kind(data, name, kind):
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert data[at] in (Kind.Q8_0, Kind.Q4_1)
    data[at] = kind


def test_all_unreadable_quantisations_are_named(small):
    data = bytearray(small.read_bytes())
    patch_kind(data, b"token_embd.weight", Kind.Q8_K)
    patch_kind(data, struct.pack("<Q", 1) + b"w", 99)
    small.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"2 of 3 tensors .*: token_embd.weight \(Q8_K\), w \(99\)\. .*Q4_K"):
        GGUFFile(small)


def test_rows_that_are_no_whole_blocks_are_named(small):
    data = bytearray(small.read_bytes())
    patch_kind(data, b"token_embd.weight", Kind.Q4_K)
    small.write_bytes(bytes(data))
    with pytest.raises(ValueError, match=r"token_embd.weight \(Q4_K, whose rows of 64 are not a whole number of"):
        GGUFFile(small)


# Parts and damage ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [(10,), (50, 51, 400), (1, 700)])
def test_a_file_in_parts_is_the_same_file(small, tmp_path, cuts):
    data = small.read_bytes()
    paths = [tmp_path / f"part{i}" for i in range(len(cuts) + 1)]
    for path, start, end in zip(paths, (0, *cuts), (*cuts, len(data)), strict=True):
        path.write_bytes(data[start:end])
    whole, parts = GGUFFile(small), GGUFFile(paths)
    assert whole.metadata == parts.metadata and whole.tensors == parts.tensors
    for name in whole.names():
        np.testing.assert_array_equal(whole.read(name), parts.read(name))


@pytest.mark.parametrize("share", [0.01, 0.3, 0.9, 0.97])
def test_truncated(small, share):
    data = small.read_bytes()
    small.write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="small.gguf is truncated: .*Download or copy it again"):
        GGUFFile(small)


def test_damaged_header(small):
    data = small.read_bytes()
    tokens = data.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    small.write_bytes(data[:tokens] + b"\xff" * 7 + data[tokens + 7 :])  # a count beyond anything that fits
    with pytest.raises(ValueError, match="small.gguf is truncated: its header is incomplete"):
        GGUFFile(small)
    small.write_bytes(data.replace("é".encode(), b"\xff\xff"))
    with pytest.raises(ValueError, match="is not UTF-8; the file is damaged"):
        GGUFFile(small)


def test_not_a_gguf_file(tmp_path):
    for content in (b"", b"PK\3\4 and then some more bytes than a header has"):
        (tmp_path / "x.gguf").write_bytes(content)
        with pytest.raises(ValueError, match="is not a GGUF file" if content else "truncated"):
            GGUFFile(tmp_path / "x.gguf")
