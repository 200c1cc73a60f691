"""
One decoder for Llama-style and GPT-2-style checkpoints, small enough to read in one sitting.

The two families are the same machine with different parts:

    part         Llama, SmolLM2, Qwen2                  GPT-2
    norm         RMSNorm                                LayerNorm
    positions    rotary, inside attention               a learned vector added to the embedding
    attention    grouped heads (GQA)                    one key/value head per query head
    MLP          down(silu(gate(x)) * up(x))            c_proj(gelu(c_fc(x)))

so there is one `Block`, and each part is chosen where it is built. Leaf modules keep their Hugging
Face names (`q_proj`, `c_attn`, ...), which is what LoRA targets and PEFT files speak of; `hf_keys`
is the explicit map from our parameters to a checkpoint's.

Beyond logits, PILLOW needs three things of its language model, all here: answers for a ragged batch
of prompts (`generate`), the likelihood of a given answer (`answer_logprobs`) and mean-pooled
features (`features`). The first two accept a `PrefixCache`: an exemplar's keys and values do not
depend on the query behind it, so they are computed once per pool entry instead of once per rollout.

Try it:

    python -c "import model; m = model.GPT.from_pretrained('smollm2-135m'); print(m.config)"

Left out on purpose: training of anything but causal language modelling, tensor parallelism,
quantised weights, sliding windows, and every architecture beyond the families above (they are refused
by name, never run wrongly). q/k/v and gate/up stay separate matrices: with packed weights (`linear`)
one fused product is no faster, and LoRA would have to know about it.
"""

import functools
import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import (UserError, atomic_write, fingerprint, read_json, read_safetensors, resolve_model,
                  write_safetensors)


def ids_of(value, where):
    """A config's eos_token_id, which may be absent, one id, or a list of ids -> tuple of ids."""
    ids = tuple(value) if isinstance(value, list) else () if value is None else (value,)
    if not all(type(i) is int and i >= 0 for i in ids):
        raise UserError(f"{where}: eos_token_id = {value!r} is no token id")
    return ids


@dataclass
class Config:
    """The shape of a decoder. `from_hf` reads it from a Hugging Face `config.json`."""

    family: str = "llama"  # "llama" or "gpt2"
    vocab_size: int = 256
    n_layer: int = 2
    n_head: int = 4
    n_kv_head: int = 2
    n_embd: int = 64  # C
    head_dim: int = 16  # D
    n_ff: int = 128
    n_ctx: int = 512
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's, or None
    gelu: str = "tanh"  # GPT-2's "gelu_new" is the tanh approximation, 4.7e-4 away from the exact one
    tied: bool = True  # the output head is the embedding matrix
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    eos_ids: tuple = ()

    @classmethod
    def from_hf(cls, hf, where="config.json"):
        """`hf`: the parsed config.json. Raises UserError naming whatever this decoder does not do."""
        kind = hf.get("model_type")

        def refuse(what):
            raise UserError(f"{where}: {what} is not supported")

        if kind not in ("llama", "qwen2", "gpt2"):
            refuse(f"model_type {kind!r} (llama, qwen2 and gpt2 are)")
        if hf.get("quantization_config"):
            refuse("a quantised checkpoint")
        eos = ids_of(hf.get("eos_token_id"), where)
        try:
            if kind == "gpt2":
                gelu = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}.get(
                    hf.get("activation_function", "gelu_new")
                )
                if gelu is None:
                    refuse(f"activation_function {hf['activation_function']!r}")
                for flag in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
                    if hf.get(flag):
                        refuse(flag)
                if hf.get("scale_attn_weights") is False:
                    refuse("scale_attn_weights false")
                C, H = hf["n_embd"], hf["n_head"]
                cfg = cls("gpt2", hf["vocab_size"], hf["n_layer"], H, H, C, C // H, hf.get("n_inner") or 4 * C,
                           hf["n_positions"], hf.get("layer_norm_epsilon", 1e-5), gelu=gelu,
                           tied=hf.get("tie_word_embeddings", True), qkv_bias=True, o_bias=True, mlp_bias=True,
                           eos_ids=eos)
            else:
                if hf.get("hidden_act", "silu") != "silu":
                    refuse(f"hidden_act {hf['hidden_act']!r}")
                if hf.get("use_sliding_window"):
                    refuse("use_sliding_window")
                # transformers 5 writes both rope settings into one dict, earlier versions into two keys
                rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
                scaling = rope.get("rope_type", rope.get("type", "default"))
                if scaling not in ("default", "llama3"):
                    refuse(f"rope scaling {scaling!r}")
                C, H = hf["hidden_size"], hf["num_attention_heads"]
                qwen = kind == "qwen2"
                cfg = cls("llama", hf["vocab_size"], hf["num_hidden_layers"], H, hf.get("num_key_value_heads") or H, C,
                           hf.get("head_dim") or C // H, hf["intermediate_size"], hf["max_position_embeddings"],
                           hf.get("rms_norm_eps", 1e-6),
                           rope.get("rope_theta", hf.get("rope_theta", 10000.0)),
                           rope if scaling == "llama3" else None,
                           tied=hf.get("tie_word_embeddings", False), qkv_bias=qwen or hf.get("attention_bias", False),
                           o_bias=not qwen and hf.get("attention_bias", False), mlp_bias=hf.get("mlp_bias", False),
                           eos_ids=eos)
        except KeyError as e:
            raise UserError(f"{where}: the setting {e} is missing") from None
        except (TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
            raise UserError(f"{where}: a setting is of the wrong kind ({e})") from None
        limits = {"vocab_size": 1 << 22, "n_layer": 1024, "n_head": 1024, "n_kv_head": 1024, "n_embd": 1 << 17, "head_dim": 1024,
                  "n_ff": 1 << 20, "n_ctx": 1 << 28}  # far above any model, far below what would hang the machine
        for key, most in limits.items():
            if type(getattr(cfg, key)) is not int or not 0 < getattr(cfg, key) <= most:
                refuse(f"{key} = {getattr(cfg, key)!r}")
        numbers = {"norm_eps": cfg.norm_eps, "rope_theta": cfg.rope_theta}
        if cfg.rope_scaling:
            numbers |= {k: cfg.rope_scaling.get(k) for k in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}
        for key, value in numbers.items():
            if type(value) not in (int, float) or not 0 < value < 1e30:
                refuse(f"{key} = {value!r}")
        if cfg.n_head % cfg.n_kv_head or cfg.family == "llama" and cfg.head_dim % 2 or kind == "gpt2" and cfg.head_dim * cfg.n_head != cfg.n_embd:
            refuse(f"{cfg.n_head} heads of {cfg.head_dim} over {cfg.n_kv_head} key/value heads")
        return cfg


class FrozenRMSNorm(torch.autograd.Function):
    """RMSNorm whose weight does not train, with the backward pass written out.

        y = w x r,  r = 1 / sqrt(mean(x^2) + eps)          dx = r (g - x r^2 mean(g x)),  g = w dy

    Only x and r are kept, and half as many passes over memory are made as by autograd's: on a CPU,
    61 norms are a tenth of a LoRA step.
    """

    @staticmethod
    def forward(ctx, x, weight, eps):
        n = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (B, T, 1)
        r = (n * n / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, r)
        return (x * r).to(x.dtype).mul_(weight)

    @staticmethod
    def backward(ctx, dy):
        x, weight, r = ctx.saved_tensors
        g = dy * weight
        mean = torch.linalg.vecdot(g, x).unsqueeze(-1).float() / x.shape[-1]  # (B, T, 1)
        return torch.addcmul(g * r, x, -r.pow(3) * mean).to(dy.dtype), None, None


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019): LayerNorm without the centring."""

    def __init__(self, C, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(C)), eps

    def forward(self, x):
        if torch.is_grad_enabled() and not self.weight.requires_grad:  # LoRA training
            return FrozenRMSNorm.apply(x, self.weight, self.eps)
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class FrozenHeadLoss(torch.autograd.Function):
    """Sum of -log softmax(h W^T)[target] for a head W that does not train; h (N, C), targets (N,).

    d loss / d logits = softmax - onehot is known as soon as the logits are, so dh = (softmax - onehot) W is
    worked out on the spot, some rows at a time: the (N, V) logits of a whole batch, by far the largest
    tensor of a training step, never exist.
    """

    @staticmethod
    def forward(ctx, h, owner, W, targets):
        total, dh = h.new_zeros((), dtype=torch.float32), torch.empty_like(h)
        for s in range(0, len(h), 64):
            p = product(owner, h[s:s + 64], W).float()  # (n, V)
            y = targets[s:s + 64, None]
            log_z = p.logsumexp(-1, keepdim=True)  # (n, 1)
            total += (log_z - p.gather(1, y)).sum()
            if ctx.needs_input_grad[0]:
                p = p.sub_(log_z).exp_()
                p.scatter_add_(1, y, -torch.ones_like(log_z))
                dh[s:s + 64] = product(owner, p.to(h.dtype), W, transposed=True)
        ctx.save_for_backward(dh)
        return total

    @staticmethod
    def backward(ctx, d):
        return ctx.saved_tensors[0] * d, None, None, None


def rope_table(cfg, positions, dtype):
    """Rotary position embedding (Su et al. 2021): (cos, sin), each (..., 1, D), for `positions` (...).

    The first half of `sin` is negated, so that with roll(x, D/2) = [x2, x1] the rotation is one
    line in `rotate`. Llama 3's scaling stretches the low frequencies only (Llama 3.1's model card).
    """
    i = torch.arange(0, cfg.head_dim, 2, device=positions.device).float()
    freq = cfg.rope_theta ** (-i / cfg.head_dim)  # (D/2,)
    if s := cfg.rope_scaling:
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # turns over the original context
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as it was, 0: fully stretched
        freq = keep * freq + (1 - keep) * freq / s["factor"]
    angle = positions[..., None, None].float() * freq  # (..., 1, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x, rope):
    """Rotate pairs (x_i, x_{i+D/2}) of `x` (N, H, D) by the angles in `rope`, two of (N, 1, D)."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


@functools.cache
def can_pack(dtype):
    """Whether this PyTorch build and CPU multiply from oneDNN's own layout; the way to know is to try."""
    try:
        w = torch.ops.mkldnn._reorder_linear_weight(torch.ones(64, 64, dtype=dtype))
        return torch.ops.mkldnn._linear_pointwise(torch.ones(1, 64, dtype=dtype), w, None, "none", [], "").sum() == 64 * 64
    except (RuntimeError, AttributeError):  # NotImplementedError is a RuntimeError
        return False


def product(owner, x, weight, bias=None, transposed=False):
    """x W^T + b, or x W if `transposed`, for a weight (out, in) that does not train: on a CPU from a packed copy of it,
    which `owner` (a module) remembers.

    oneDNN multiplies blocked matrices. Given a plain one, F.linear re-orders it in every call, which costs up to a tenth of
    the product with 1,500 rows and up to as much as the product itself with few: from packed copies a LoRA step runs 1.05 and
    a decoding step of 64 rows 1.2 to 1.4 times as fast, to the same last bit in bfloat16. The price is one copy of the weight,
    and in training another for x W; `packing` turns both off.
    """
    if not (owner.packing and x.device.type == "cpu" and can_pack(x.dtype)):
        owner.packed = None  # copies of before packing was turned off would stay in memory, with the weight they were made of
        return x @ weight if transposed else F.linear(x, weight, bias)
    now = weight.data_ptr(), weight._version  # merging LoRA changes the first, an optimiser the second
    if owner.packed is None or owner.packed[0] != now:
        # the weight itself is kept beside its copies, so that no other tensor can get its address meanwhile
        owner.packed = now, weight.data, {}
    copies = owner.packed[2]
    if transposed not in copies:
        plain = weight.detach().t().contiguous() if transposed else weight.detach()
        copies[transposed] = torch.ops.mkldnn._reorder_linear_weight(plain)
    return torch.ops.mkldnn._linear_pointwise(x, copies[transposed], bias, "none", [], "")


class FrozenLinear(torch.autograd.Function):
    """`product` with its backward pass, dx = dy W: of a layer that does not train nothing else is asked."""

    @staticmethod
    def forward(ctx, x, owner, weight, bias):
        ctx.owner, ctx.weight = owner, weight
        return product(owner, x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        return product(ctx.owner, dy, ctx.weight, transposed=True), None, None, None


def linear(owner, x, weight, bias=None):
    """x W^T + b, by whatever is fastest for a weight that trains or does not."""
    if torch.is_grad_enabled() and (weight.requires_grad or bias is not None and bias.requires_grad):
        owner.packed = None  # it is about to change
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and x.requires_grad:
        return FrozenLinear.apply(x, owner, weight, bias)
    return product(owner, x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear through `linear`; one that LoRA froze trains nothing, and is multiplied from packed copies."""

    packing, packed = True, None

    def forward(self, x):
        return linear(self, x, self.weight, self.bias)


@dataclass
class Batch:
    """What the layers of one forward pass share.

    Rows of unequal length are padded on the right to (B, T), but only attention has to know rows from tokens:
    everything else runs on the N real tokens as a flat (N, C), where padding costs nothing.
    """

    B: int
    T: int
    real: torch.Tensor | None  # (N,): where the real tokens stand in the flattened (B, T); None: all are real
    rope: tuple | None
    cache: object = None

    def spread(self, x):
        """(N, ...) -> (B, T, ...), zeros at padding."""
        if self.real is not None:
            flat = x.new_zeros(self.B * self.T, *x.shape[1:])
            flat[self.real] = x  # not index_copy_: Apple's GPUs lack it, or get it wrong, depending on PyTorch's version
            x = flat
        return x.view(self.B, self.T, *x.shape[1:])

    def gather(self, x):
        """(B, T, ...) -> (N, ...): the real tokens."""
        x = x.flatten(0, 1)
        return x if self.real is None else x.index_select(0, self.real)


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.H, self.KV, self.D = cfg.n_head, cfg.n_kv_head, cfg.head_dim
        C, q, kv = cfg.n_embd, cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
        if cfg.family == "gpt2":
            self.c_attn, self.c_proj = Linear(C, 3 * C), Linear(C, C)
        else:
            self.q_proj = Linear(C, q, bias=cfg.qkv_bias)
            self.k_proj = Linear(C, kv, bias=cfg.qkv_bias)
            self.v_proj = Linear(C, kv, bias=cfg.qkv_bias)
            self.o_proj = Linear(q, C, bias=cfg.o_bias)
        self.gpt2 = cfg.family == "gpt2"

    def forward(self, x, batch, layer):
        """x (N, C) -> (N, C)."""
        B, T = batch.B, batch.T
        q, k, v = self.c_attn(x).chunk(3, -1) if self.gpt2 else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(-1, (-1, self.D)) for t in (q, k, v))  # (N, H or KV, D)
        if batch.rope is not None:
            q, k = rotate(q, batch.rope), rotate(k, batch.rope)
        q, k, v = (batch.spread(t).transpose(1, 2) for t in (q, k, v))  # (B, H or KV, T, D)
        # Padding stands on the right, so causality already hides it from every real token: without a cache,
        # or with one that was empty, no other mask is needed.
        bias = None
        if batch.cache is not None:
            k, v, bias = batch.cache.write(layer, k, v)  # k, v (B, KV, S, D)
        S, G = k.shape[2], self.H // self.KV
        if x.device.type == "cpu" and T * S <= 1 << 16:
            # PyTorch's fused attention is slow on CPUs, backwards and with few queries; short sequences fit two plain
            # products. The G query heads of a key/value head become G*T queries of it: keys are never repeated.
            if bias is None:
                bias = x.new_full((T, T), float("-inf")).triu_(1).repeat(G, 1)  # (G*T, T)
            q, k, v = q.reshape(B * self.KV, G * T, self.D), k.reshape(B * self.KV, S, self.D), v.reshape(B * self.KV, S, self.D)
            y = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=self.D ** -0.5).softmax(-1) @ v
        elif bias is None:
            y = F.scaled_dot_product_attention(q, k.repeat_interleave(G, 1), v.repeat_interleave(G, 1), is_causal=True)
        else:
            y = F.scaled_dot_product_attention(q.reshape(B, self.KV, G * T, self.D), k, v, attn_mask=bias.view(B, self.KV, G * T, S))
        y = batch.gather(y.reshape(B, self.H, T, self.D).transpose(1, 2)).flatten(1)  # (N, H*D)
        return self.c_proj(y) if self.gpt2 else self.o_proj(y)


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        C, M, bias = cfg.n_embd, cfg.n_ff, cfg.mlp_bias
        self.gelu = cfg.gelu if cfg.family == "gpt2" else None
        if self.gelu:
            self.c_fc, self.c_proj = Linear(C, M), Linear(M, C)
        else:
            self.gate_proj, self.up_proj = Linear(C, M, bias=bias), Linear(C, M, bias=bias)
            self.down_proj = Linear(M, C, bias=bias)

    def forward(self, x):
        if self.gelu:
            return self.c_proj(F.gelu(self.c_fc(x), approximate=self.gelu))
        gate, up = F.silu(self.gate_proj(x)), self.up_proj(x)
        return self.down_proj(gate * up if torch.is_grad_enabled() else gate.mul_(up))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        norm = nn.LayerNorm if cfg.family == "gpt2" else RMSNorm
        self.norm1, self.attn = norm(cfg.n_embd, eps=cfg.norm_eps), Attention(cfg)
        self.norm2, self.mlp = norm(cfg.n_embd, eps=cfg.norm_eps), MLP(cfg)

    def forward(self, x, batch, layer, where=None):
        """x (N, C) -> (N, C), or (n, C) at the n rows `where` alone: behind the last attention no token looks at another."""
        x = x + self.attn(self.norm1(x), batch, layer)
        x = x if where is None else x[where]
        return x + self.mlp(self.norm2(x))


class KVCache:
    """Keys and values of B rows in preallocated slots.

    Every row writes the same slots in the same step; rows of unequal length simply leave holes, which
    `valid` marks. A slot is storage, not a position: RoPE was applied with the true position of the
    token, so where it lies does not matter. For a batch behind exemplars the slots are

        [ exemplar, padded to P | query, padded to Q | answer tokens ... ]
    """

    def __init__(self, cfg, B, slots, like, memory=None):
        shape = 2, cfg.n_layer, B, cfg.n_kv_head, slots, cfg.head_dim
        if memory is None or len(memory) < math.prod(shape) or (memory.dtype, memory.device) != (like.dtype, like.device):
            memory = torch.empty(math.prod(shape), dtype=like.dtype, device=like.device)
        # zeros: slots not yet written are masked, but garbage there could be NaN, and 0 * NaN is NaN
        self.memory, self.kv = memory, memory[:math.prod(shape)].view(shape).zero_()
        self.valid = torch.zeros(B, slots, dtype=torch.bool, device=like.device)
        self.next_position = torch.zeros(B, dtype=torch.long, device=like.device)
        self.used = 0
        self.heads = cfg.n_kv_head, cfg.n_head // cfg.n_kv_head
        self.bias = None

    def begin(self, lengths, T):
        """Announce T new slots of which row b uses `lengths[b]`; returns their positions (B, T)."""
        B, t = len(lengths), torch.arange(T, device=self.valid.device)
        start, self.used = self.used, self.used + T
        self.valid[:, start:self.used] = t < lengths[:, None]
        positions = self.next_position[:, None] + t
        self.next_position += lengths
        self.bias = None
        if start > 0:
            # Additive mask (B*KV, G*T, S) over all slots. Inside the new slots it is causal for padding too, so that
            # no row is ever fully masked (softmax over nothing is NaN).
            see = self.valid[:, None, :].repeat(1, T, 1)  # (B, T, S)
            see[..., start:self.used] = t[:, None] >= t
            bias = torch.zeros_like(see, dtype=self.kv.dtype).masked_fill_(~see, float("-inf"))
            KV, G = self.heads
            self.bias = bias[:, None, None].expand(B, KV, G, T, -1).reshape(B * KV, G * T, -1)
        return positions

    def write(self, layer, k, v):
        """Store this layer's new k, v (B, KV, T, D) -> the keys and values to attend to, and their additive mask."""
        T = k.shape[2]
        self.kv[0, layer, :, :, self.used - T:self.used] = k
        self.kv[1, layer, :, :, self.used - T:self.used] = v
        return (k, v, None) if self.bias is None else (self.kv[0, layer], self.kv[1, layer], self.bias)

    def keep(self, rows):
        """Keep only `rows`, in ascending order: finished answers leave the batch, the others move up."""
        for new, old in enumerate(rows):
            if new < old:
                self.kv[:, :, new] = self.kv[:, :, old]
        self.kv, self.valid, self.next_position = self.kv[:, :, :len(rows)], self.valid[rows], self.next_position[rows]


def pad(rows, device=None, fill=0):
    """list of id lists -> (B, T) right-padded ids, (B,) lengths. What stands in the padding does not matter."""
    lengths = torch.tensor([len(r) for r in rows])
    out = torch.full((len(rows), int(lengths.max())), fill)
    for b, r in enumerate(rows):
        out[b, :len(r)] = torch.as_tensor(r)
    return out.to(device), lengths.to(device)


class GPT(nn.Module):
    packing, packed = True, None  # see `product`: for the tied output head
    memory = None  # the last batch's keys and values, for the next: fresh pages from the system take longer than clearing old ones

    def __init__(self, cfg):
        super().__init__()
        self.config = cfg
        # without initial values: to draw those for nothing, nn.Embedding imports a second's worth of PyTorch
        table = lambda rows: nn.Embedding.from_pretrained(torch.empty(rows, cfg.n_embd), freeze=False)
        self.embed, self.pos_embed = table(cfg.vocab_size), table(cfg.n_ctx) if cfg.family == "gpt2" else None
        self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
        norm = nn.LayerNorm if cfg.family == "gpt2" else RMSNorm
        self.norm = norm(cfg.n_embd, eps=cfg.norm_eps)
        self.folder, self.fingerprint = None, ""  # set by from_pretrained
        self.lm_head = None if cfg.tied else Linear(cfg.n_embd, cfg.vocab_size, bias=False)

    @property
    def device(self):
        return self.embed.weight.device

    @property
    def head(self):
        """The output head: the module that remembers its packed copies, and the weight (V, C)."""
        return (self, self.embed.weight) if self.lm_head is None else (self.lm_head, self.lm_head.weight)

    # ---- forward -------------------------------------------------------------------------------

    def hidden(self, ids, cache=None, lengths=None, where=None):
        """ids (B, T), right-padded -> final hidden states (B, T, C), after the last norm, zeros at padding.

        lengths (B,): how many tokens of each row are real; None: all of them. With a cache, what was cached
        stands in front and the new tokens are added to it. where (n,): flat positions in (B, T), of real tokens, whose
        states alone are wanted -> (n, C); the last block's MLP is spared the rest.
        """
        B, T = ids.shape
        t = torch.arange(T, device=ids.device)
        real = (t < lengths[:, None]).flatten().nonzero()[:, 0] if lengths is not None and T > 1 else None
        batch = Batch(B, T, real if real is not None and len(real) < B * T else None, None, cache)
        positions = batch.gather(t.expand(B, T) if cache is None else cache.begin(lengths, T))  # (N,)
        x = self.embed(batch.gather(ids))  # (N, C)
        if self.pos_embed is not None:
            x = x + self.pos_embed(positions)
        else:
            batch.rope = rope_table(self.config, positions, x.dtype)
        rows = where if where is None or batch.real is None else torch.searchsorted(batch.real, where)
        for layer, block in enumerate(self.blocks):
            x = block(x, batch, layer, rows if layer == self.config.n_layer - 1 else None)
        return batch.spread(self.norm(x)) if where is None else self.norm(x)

    def logits(self, h):
        """Final hidden states (..., C) -> logits (..., V). Called only where logits are used."""
        return linear(self.head[0], h, self.head[1])

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V)."""
        return self.logits(self.hidden(ids))

    def loss(self, ids, where, targets, lengths=None):
        """Sum of -log p(target) over chosen positions of ids (B, T): flat positions (N,), their next tokens (N,)."""
        h = self.hidden(ids, None, lengths).flatten(0, 1)[where]  # (N, C): the head is applied to these only
        owner, weight = self.head
        if weight.requires_grad:
            return F.cross_entropy(self.logits(h).float(), targets, reduction="sum")
        return FrozenHeadLoss.apply(h, owner, weight, targets)

    # ---- what PILLOW asks of a language model --------------------------------------------------

    @torch.inference_mode()
    def features(self, prompts, batch_size=32):
        """Mean of the final hidden states over each prompt's real tokens: (N, C) float32, on the CPU."""
        out = torch.zeros(len(prompts), self.config.n_embd)
        self.check(prompts, 0)
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # equal lengths together: little padding
        for s in range(0, len(order), batch_size):
            rows = order[s:s + batch_size]
            ids, lengths = pad([prompts[i] for i in rows], self.device)
            h = self.hidden(ids, None, lengths)  # (B, T, C), zeros at padding
            out[rows] = (h.sum(1, dtype=torch.float32) / lengths[:, None]).cpu()
        return out

    @torch.inference_mode()
    def answer_logprobs(self, prompts, answers, prefixes=None, prefix_cache=None, batch_size=64):
        """Sum of log p(answer | prompt) over its tokens: (N,) float32. Lists of id lists; see `generate`."""
        out = torch.zeros(len(prompts))
        self.check(prompts, 0)
        self.check([p + a for p, a in zip(prompts, answers)], 0, prefixes, prefix_cache)
        for rows, cache in self._batches(prompts, prefixes, prefix_cache, batch_size, [len(a) for a in answers]):
            ids, lengths = pad([prompts[i] + answers[i] for i in rows], self.device)
            # the state at token t predicts token t + 1
            spots = [(n, len(prompts[i]) - 1 + j, y) for n, i in enumerate(rows) for j, y in enumerate(answers[i])]
            b, t, y = torch.tensor(spots, dtype=torch.long, device=self.device).view(-1, 3).unbind(1)  # row, position, token
            h = self.hidden(ids, cache, lengths, b * ids.shape[1] + t)
            # some rows at a time: the (N, V) logits of a whole batch would go through memory, not through the CPU's caches
            logp = torch.cat([-F.cross_entropy(self.logits(some).float(), target, reduction="none") for some, target in zip(h.split(64), y.split(64))])
            out[rows] = torch.zeros(len(rows), device=self.device).index_add_(0, b, logp).cpu()
        return out

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, eos_ids=None, top_k=None, seed=None,
                 prefixes=None, prefix_cache=None, batch_size=64, on_token=None):
        """Continue prompts of unequal length: list of id lists -> list of id lists, without prompt and end token.

        temperature 0 is greedy; `top_k` limits sampling to the k likeliest tokens; `seed` makes it repeatable.
        eos_ids: ids that end an answer; None means the checkpoint's own, () means never stop early.
        prefixes: per prompt an entry of `prefix_cache` that stands in front of it, or None.
        on_token(row, id) is called for every new token, as it appears.
        """
        if temperature < 0:
            raise ValueError("temperature must be 0 (greedy) or positive")
        eos = set(self.config.eos_ids if eos_ids is None else eos_ids)
        self.check(prompts, max_new_tokens, prefixes, prefix_cache)
        rng = torch.Generator(self.device)
        rng.manual_seed(seed) if seed is not None else rng.seed()
        answers = [[] for _ in prompts]
        if max_new_tokens < 1:
            return answers
        for rows, cache in self._batches(prompts, prefixes, prefix_cache, batch_size, [max_new_tokens] * len(prompts)):
            ids, lengths = pad([prompts[i] for i in rows], self.device)
            last = torch.arange(len(rows), device=self.device) * ids.shape[1] + lengths - 1  # each row's last real token
            h = self.hidden(ids, cache, lengths, last)  # (B, C)
            done = set()
            while True:
                next_ids = self._pick(self.logits(h).float(), temperature, top_k, rng)  # (B,)
                for b, (i, token) in enumerate(zip(rows, next_ids.tolist())):
                    if i in done:
                        continue
                    if token not in eos:
                        answers[i].append(token)
                        if on_token:
                            on_token(i, token)
                    if token in eos or len(answers[i]) == max_new_tokens:
                        done.add(i)
                if len(done) == len(rows):
                    break
                # Copying the cache costs about one step, so finished rows leave a quarter of the batch at a time.
                if len(done) * 4 >= len(rows):
                    alive = [b for b, i in enumerate(rows) if i not in done]
                    cache.keep(alive)
                    rows, next_ids, done = [rows[b] for b in alive], next_ids[alive], set()
                h = self.hidden(next_ids[:, None], cache, torch.ones_like(next_ids))[:, 0]  # (B, C)
        return answers

    def _batches(self, prompts, prefixes, prefix_cache, batch_size, new):
        """Yield (rows, cache) with prompts of like length together, the cache filled with their prefixes and with room for
        each prompt and its new[i] further tokens."""
        prefixes = prefixes or [None] * len(prompts)
        size = lambda i: (prefix_cache.length(prefixes[i]) if prefixes[i] is not None else 0, len(prompts[i]))
        order = sorted(range(len(prompts)), key=lambda i: (sum(size(i)), i))
        for s in reversed(range(0, len(order), batch_size)):  # the longest first: all others fit into their memory
            rows = order[s:s + batch_size]
            kvs = [prefix_cache[prefixes[i]] if prefixes[i] is not None else None for i in rows]
            P, Q = max(size(i)[0] for i in rows), max(len(prompts[i]) + new[i] for i in rows)
            slots = -(-(P + Q) // 32) * 32  # whole vectors: softmax is slow on what remains
            cache = KVCache(self.config, len(rows), slots, self.embed.weight, self.memory)
            self.memory = cache.memory
            if P:
                lengths = torch.tensor([size(i)[0] for i in rows], device=self.device)
                cache.begin(lengths, P)
                for b, kv in enumerate(kvs):
                    if kv is not None:
                        cache.kv[:, :, b, :, :kv.shape[3]] = kv
            yield rows, cache

    @staticmethod
    def _pick(logits, temperature, top_k, rng):
        """logits (B, V) float32 -> the next id of each row (B,)."""
        if temperature == 0:
            return logits.argmax(-1)
        if top_k:
            top, ids = logits.topk(min(top_k, logits.shape[-1]))
            return ids.gather(-1, torch.multinomial((top / temperature).softmax(-1), 1, generator=rng))[:, 0]
        return torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)[:, 0]

    def check(self, prompts, new, prefixes=None, prefix_cache=None):
        """Raise ValueError for an empty prompt, an id outside the vocabulary or one that outgrows the context."""
        for n, p in enumerate(prompts):
            before = prefix_cache.length(prefixes[n]) if prefixes and prefixes[n] is not None else 0
            if not p:
                raise ValueError(f"prompt {n} is empty")
            if before + len(p) + new > self.config.n_ctx:
                raise ValueError(f"prompt {n}: {before + len(p)} tokens + {new} new ones exceed the context of {self.config.n_ctx}")
            if min(p) < 0 or max(p) >= self.config.vocab_size:
                raise ValueError(f"prompt {n} holds an id outside the vocabulary of {self.config.vocab_size}")

    # ---- loading -------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=torch.float32, device="cpu"):
        """A short name, a Hub id or a folder in Hugging Face layout -> GPT, in eval mode.

        UserError when the architecture is not supported, or a weight is missing, unexpected, of
        another shape, or not finite: always with the weight's name.
        """
        folder = resolve_model(name_or_dir)
        cfg = Config.from_hf(read_json(folder / "config.json", dict), folder / "config.json")
        if (folder / "generation_config.json").exists():  # chat models end their turns with more than one id
            more = read_json(folder / "generation_config.json", dict).get("eos_token_id")
            cfg.eos_ids = tuple(dict.fromkeys(cfg.eos_ids + ids_of(more, folder / "generation_config.json")))
        with torch.device("meta"):  # shapes only: no time or memory spent on initial values
            model = cls(cfg)
        index = folder / "model.safetensors.index.json"
        files = ["model.safetensors"]
        if index.exists():
            shards = read_json(index, dict).get("weight_map")
            if not isinstance(shards, dict) or not shards or not all(isinstance(f, str) and Path(f).name == f for f in shards.values()):
                raise UserError(f"{index}: it does not name safetensors files")
            files = sorted(set(shards.values()))
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        wanted = {}  # checkpoint name -> (our name, stored transposed?)
        for ours, (theirs, transposed) in hf_keys(cfg).items():
            wanted[theirs] = ours, transposed
        state = {}
        for file in files:
            for theirs, tensor in read_safetensors(folder / file):
                # GPT-2's own checkpoint has no "transformer." in front; buffers (causal masks, RoPE tables)
                # were once saved as if they were weights
                name = theirs if theirs in wanted else "transformer." + theirs
                if name not in wanted:
                    if theirs.endswith((".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq")) or theirs == "lm_head.weight" and cfg.tied:
                        continue
                    raise UserError(f"{folder / file}: the weight {theirs!r} has no place in a {cfg.family} model")
                ours, transposed = wanted[name]
                want = shapes[ours][::-1] if transposed else shapes[ours]
                if tuple(tensor.shape) != want:
                    raise UserError(f"{folder / file}: {theirs!r} has shape {tuple(tensor.shape)}, config.json asks for {want}")
                tensor = tensor.to(device, dtype)
                state[ours] = tensor.t().contiguous() if transposed else tensor
        if missing := sorted(set(shapes) - set(state)):
            raise UserError(f"{folder}: the weight {hf_keys(cfg)[missing[0]][0]!r} is missing"
                            + (f", and {len(missing) - 1} more" if missing[1:] else ""))
        model.load_state_dict(state, assign=True)
        if sum(p.nbytes for p in model.parameters()) > 1 << 30:  # a second copy of a large model is too dear
            for m in model.modules():
                m.packing = False
        model.folder, model.fingerprint = folder, fingerprint(folder)
        return model.eval()

    def save_pretrained(self, folder, source):
        """Write weights and a copy of `source`'s config and tokenizer: a folder that `--model` accepts."""
        keys, state = hf_keys(self.config), self.state_dict()
        tensors = {theirs: (state[ours].t() if t else state[ours]).contiguous() for ours, (theirs, t) in keys.items()}
        write_safetensors(Path(folder) / "model.safetensors", tensors, {"format": "pt"})
        for name in ("config.json", "tokenizer.json", "generation_config.json"):
            if (Path(source) / name).exists():
                with atomic_write(Path(folder) / name) as temp:
                    shutil.copyfile(Path(source) / name, temp)


def hf_keys(cfg):
    """{our parameter: (name in a Hugging Face checkpoint, stored transposed?)}, for every parameter.

    GPT-2's Conv1D keeps weights as (in, out). One of them, attn.c_proj, is square, so a missing
    transposition would pass every check of shapes: it has to be written down, here.
    """
    if cfg.family == "gpt2":
        top = {"embed.weight": "transformer.wte.weight", "pos_embed.weight": "transformer.wpe.weight",
               "norm.weight": "transformer.ln_f.weight", "norm.bias": "transformer.ln_f.bias"}
        block, parts = "transformer.h", {"norm1": "ln_1", "norm2": "ln_2", "attn.c_attn": "attn.c_attn",
                                         "attn.c_proj": "attn.c_proj", "mlp.c_fc": "mlp.c_fc", "mlp.c_proj": "mlp.c_proj"}
        biased = set(parts)
    else:
        top = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
        block, parts = "model.layers", {"norm1": "input_layernorm", "norm2": "post_attention_layernorm"}
        parts |= {f"attn.{p}_proj": f"self_attn.{p}_proj" for p in "qkvo"}
        parts |= {f"mlp.{p}_proj": f"mlp.{p}_proj" for p in ("gate", "up", "down")}
        biased = {f"attn.{p}_proj" for p in "qkv" if cfg.qkv_bias} | {"attn.o_proj" for _ in "o" if cfg.o_bias}
        biased |= {p for p in parts if p.startswith("mlp.") and cfg.mlp_bias}
    keys = {ours: (theirs, False) for ours, theirs in top.items()}
    if not cfg.tied:
        keys["lm_head.weight"] = ("lm_head.weight", False)
    for i in range(cfg.n_layer):
        for ours, theirs in parts.items():
            keys[f"blocks.{i}.{ours}.weight"] = (f"{block}.{i}.{theirs}.weight", ".c_" in ours)
            if ours in biased:
                keys[f"blocks.{i}.{ours}.bias"] = (f"{block}.{i}.{theirs}.bias", False)
    return keys


class PrefixCache:
    """Keys and values of what stands in front of a prompt, computed once per entry: {index: (2, L, KV, P, D)}.

    entries: list of id lists. An exemplar at the very front has the same keys and values whatever
    follows it, so every rollout behind it can share them, exactly. (Behind a *second* exemplar they would
    depend on the first: a pool of n would have n^2 of those, few of them asked for twice, so the second
    and later exemplars are simply part of the prompt.)

    Entries are computed in fixed neighbourhoods of `block`, never in the order of asking: rounding in bfloat16
    depends on what shares a batch, and an interrupted run must end bit for bit like a whole one. No neighbourhood
    has more than `tokens`, padding included, so one book in a pool of short exemplars is worked out alone, if ever.
    The least recently used entries are forgotten beyond `max_bytes`.
    """

    def __init__(self, model, entries, block=16, tokens=8192, max_bytes=1 << 30):
        self.model, self.entries, self.max_bytes = model, entries, max_bytes
        self.kv, self.bytes = {}, 0
        self.blocks, rows = {}, []  # {index: its neighbourhood}
        for i in sorted(range(len(entries)), key=lambda i: len(entries[i])):  # like lengths together
            if len(entries[i]) > model.config.n_ctx:
                break  # this and all longer ones can stand in front of nothing
            if len(rows) == block or (len(rows) + 1) * len(entries[i]) > tokens:
                rows = []
            rows.append(i)
            self.blocks[i] = rows

    def length(self, i):
        return len(self.entries[i])

    def __getitem__(self, i):
        kv = self.kv.pop(i, None)
        if kv is None:
            rows = self.blocks[i]
            ids, lengths = pad([self.entries[j] for j in rows], self.model.device)
            cache = KVCache(self.model.config, len(rows), ids.shape[1], self.model.embed.weight)
            with torch.inference_mode():
                self.model.hidden(ids, cache, lengths)
            for b, j in enumerate(rows):
                if j == i or j not in self.kv:
                    fresh = cache.kv[:, :, b, :, :len(self.entries[j])].clone()
                    self.bytes += fresh.nbytes
                    if j == i:
                        kv = fresh
                    else:
                        self.kv[j] = fresh
            while self.bytes > self.max_bytes and self.kv:  # dicts keep insertion order: oldest first
                self.bytes -= self.kv.pop(next(iter(self.kv))).nbytes
        self.kv[i] = kv
        return kv


def pick_device(name="auto"):
    """'auto' -> cuda, then mps, then cpu."""
    if name != "auto":
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as e:
            raise UserError(f"--device {name}: {str(e).splitlines()[0]}") from None
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def faster_than_float32(dtype, rows, out):
    """How many times as fast this CPU multiplies (rows, 576) by (576, out) in `dtype`: the best of five tries of each."""
    seconds = {}
    for kind in (torch.float32, dtype):
        x, w, runs = torch.ones(rows, 576, dtype=kind), torch.ones(out, 576, dtype=kind), []
        for _ in range(5):
            start = time.perf_counter()
            F.linear(x, w)
            runs.append(time.perf_counter() - start)
        seconds[kind] = min(runs)
    return seconds[torch.float32] / seconds[dtype]


def pick_dtype(name, device):
    """-> (dtype, the reason, for the user to read). On a CPU 'auto' measures: bfloat16 is up to 4x faster where
    the instructions exist (AVX512-BF16, AMX, Arm BF16), and slower than float32 where they do not."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "this GPU has it") if fast else (torch.float32, "this GPU has no bfloat16")
    if device != "cpu":
        return torch.float32, f"the safe choice on {device}"
    ratio = faster_than_float32(torch.bfloat16, 512, 1536)
    return (torch.bfloat16 if ratio > 1.5 else torch.float32), f"this CPU multiplies {ratio:.1f}x as fast in bfloat16"


def setup(args):
    """Threads, device and dtype from the common flags; says what was chosen and why. -> (device, dtype)"""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    dtype, reason = pick_dtype(args.dtype, device)
    print(f"{device}, {str(dtype).removeprefix('torch.')} ({reason}), {torch.get_num_threads()} threads")
    return device, dtype
