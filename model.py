"""
One decoder for Llama-style and GPT-2-style checkpoints, small enough to read in one sitting.

    part         Llama, SmolLM2, Qwen2, Qwen3, Mistral    GPT-2
    norm         RMSNorm: x / sqrt(mean(x^2) + eps) w     LayerNorm
    positions    rotary, inside attention                 a learned vector added to the embedding
    attention    grouped heads (GQA)                      one key/value head for each query head
    MLP          down(silu(gate(x)) * up(x))              c_proj(gelu(c_fc(x)))

The two families are the same machine with different parts, so there is one `Block` (Vaswani et al. 2017, with
the norms in front), and each part is chosen where it is built. Layers keep Hugging Face's names (`q_proj`,
`c_attn`, ...): LoRA's targets and PEFT's files use them.

PILLOW needs three things of its language model: answers for a ragged batch of prompts (`generate`), the
likelihood of a given answer (`answer_logprobs`) and mean-pooled features (`features`). The first two take a
`PrefixCache`, so that an exemplar is read once, not in every rollout.

    python model.py    # the default model answers, with and without its cache: some seconds

Left out on purpose: tensor parallelism, quantised weights, sliding windows, and all other architectures. A
checkpoint that asks for one of these is refused by name, never run wrongly.
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

import data
from data import UserError, read_json, read_safetensors


@dataclass
class Config:
    """The shape of a decoder. `read_config` reads it from a Hugging Face `config.json`."""

    family: str  # "llama" or "gpt2"
    vocab_size: int  # V
    n_layer: int  # L
    n_head: int  # H
    n_kv_head: int  # KV: each serves H / KV query heads
    n_embd: int  # C
    head_dim: int  # D
    n_ff: int
    n_ctx: int  # the longest text
    norm_eps: float
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None  # Llama 3's, or None
    gelu: str = "tanh"  # GPT-2's gelu_new is this approximation, 4.7e-4 away from the exact one, "none"
    qk_norm: bool = False  # Qwen3: RMSNorm on each head's query and key
    tied: bool = True  # the output head is the embedding matrix
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False


def rope_table(cfg, positions, dtype):
    """Rotary position embedding (Su et al. 2021): (cos, sin), each (N, 1, D), for `positions` (N,).

    The pair (x_i, x_{i+D/2}) of a query or key is turned by position * theta^(-2i/D), so that the two meet at
    an angle that depends on their distance only. The first half of `sin` is negated: see `rotate`.
    Llama 3's scaling slows the low frequencies (Llama 3.1's model card)."""
    i = torch.arange(0, cfg.head_dim, 2, device=positions.device)
    freq = cfg.rope_theta ** (-i.float() / cfg.head_dim)  # (D/2,)
    if s := cfg.rope_scaling:
        turns = s["original_max_position_embeddings"] * freq / (2 * math.pi)  # in the original context
        low, high = s["low_freq_factor"], s["high_freq_factor"]
        keep = ((turns - low) / (high - low)).clamp(0, 1)  # 1: as it was, 0: fully slowed
        freq = keep * freq + (1 - keep) * freq / s["factor"]
    angle = positions[:, None, None].float() * freq  # (N, 1, D/2)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1).to(dtype), torch.cat([-sin, sin], -1).to(dtype)


def rotate(x, rope):
    """Turn the pairs (x_i, x_{i+D/2}) of x (N, heads, D) by the angles of `rope`, two of (N, 1, D)."""
    cos, sin = rope
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)  # x cos + [x2, x1] [-sin, sin]


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(D) + mask) v: queries (B, H, T, D), keys and values (B, KV, S, D) -> (B, H, T, D).

    A key/value head serves G = H / KV query heads (Ainslie et al. 2023): they become G T queries of it, so
    that keys are never repeated. mask (B, 1, G T, S): 0 where a query may look, -inf where not; None: causal.
    PyTorch's fused kernel never writes the scores (T, S) to memory. With short texts on a CPU it is slower: a
    LoRA step takes 1.2 to 1.3 times as long, rollouts 1.14."""
    (B, H, T, D), (KV, S) = q.shape, k.shape[1:3]
    G, fused = H // KV, q.device.type != "cpu" or T * S > 1 << 16
    if fused and mask is None:
        k, v = (t.repeat_interleave(G, 1) for t in (k, v))  # (B, H, S, D)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if mask is None:
        mask = q.new_full((T, T), float("-inf")).triu(1).repeat(G, 1)  # (G T, S)
    q = q.reshape(B, KV, G * T, D)
    if fused:
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, KV, G T, D)
    else:
        y = ((q * D**-0.5) @ k.transpose(2, 3) + mask).softmax(-1) @ v
    return y.reshape(B, H, T, D)  # no view: a CUDA kernel leaves heads and queries the other way round


@dataclass
class Batch:
    """What the layers of one forward pass share.

    Rows of unequal length are padded on the right to (B, T), but only attention has to know rows from tokens:
    everything else runs on the N real tokens as a flat (N, C), where padding costs nothing."""

    B: int
    T: int
    real: torch.Tensor | None  # (N,): where the real tokens stand in the flat (B T,); None: all are real
    cache: object  # a KVCache, or None
    rope: tuple | None = None

    def spread(self, x):
        """(N, ...) -> (B, T, ...), zeros at padding."""
        if self.real is not None:
            tokens, x = x, x.new_zeros(self.B * self.T, *x.shape[1:])
            x[self.real] = tokens  # not index_copy_: on Apple's GPUs some versions of PyTorch get it wrong
        return x.view(self.B, self.T, *x.shape[1:])

    def gather(self, x):
        """(B, T, ...) -> (N, ...): the real tokens."""
        return x.flatten(0, 1) if self.real is None else x.flatten(0, 1)[self.real]


class Attention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.D, self.gpt2 = cfg.head_dim, cfg.family == "gpt2"
        C, q, kv = cfg.n_embd, cfg.n_head * cfg.head_dim, cfg.n_kv_head * cfg.head_dim
        if self.gpt2:  # Linear, below, is nn.Linear, but faster where nothing trains
            self.c_attn, self.c_proj = Linear(C, 3 * C), Linear(C, C)
        else:
            self.q_proj = Linear(C, q, bias=cfg.qkv_bias)
            self.k_proj, self.v_proj = Linear(C, kv, bias=cfg.qkv_bias), Linear(C, kv, bias=cfg.qkv_bias)
            self.o_proj = Linear(q, C, bias=cfg.o_bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(self.D, cfg.norm_eps) if cfg.qk_norm else None for _ in "qk")

    def forward(self, x, batch, layer):
        """x (N, C) -> (N, C)."""
        qkv = self.c_attn(x).chunk(3, -1) if self.gpt2 else (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        q, k, v = (t.unflatten(-1, (-1, self.D)) for t in qkv)  # (N, H or KV, D)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if batch.rope is not None:
            q, k = rotate(q, batch.rope), rotate(k, batch.rope)
        q, k, v = (batch.spread(t).transpose(1, 2) for t in (q, k, v))  # (B, H or KV, T, D)
        mask = None  # padding stands on the right, so causality already hides it from every real token
        if batch.cache is not None:
            k, v, mask = batch.cache.write(layer, k, v)  # k, v (B, KV, S, D)
        y = attend(q, k, v, mask)  # (B, H, T, D)
        y = batch.gather(y.transpose(1, 2)).flatten(1)  # (N, H D)
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
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        norm = nn.LayerNorm if cfg.family == "gpt2" else nn.RMSNorm
        self.norm1, self.attn = norm(cfg.n_embd, eps=cfg.norm_eps), Attention(cfg)
        self.norm2, self.mlp = norm(cfg.n_embd, eps=cfg.norm_eps), MLP(cfg)

    def forward(self, x, batch, layer):
        x = x + self.attn(self.norm1(x), batch, layer)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    def __init__(self, cfg):
        """Shapes only: no time or memory is spent on values, which from_pretrained brings."""
        super().__init__()
        self.config = cfg
        # nn.Embedding itself draws values, for which it imports a second's worth of PyTorch
        table = functools.partial(nn.Embedding.from_pretrained, freeze=False)
        with torch.device("meta"):
            self.embed = table(torch.empty(cfg.vocab_size, cfg.n_embd))
            self.pos_embed = table(torch.empty(cfg.n_ctx, cfg.n_embd)) if cfg.family == "gpt2" else None
            self.blocks = nn.ModuleList(Block(cfg) for _ in range(cfg.n_layer))
            self.norm = (nn.LayerNorm if cfg.family == "gpt2" else nn.RMSNorm)(cfg.n_embd, eps=cfg.norm_eps)
            self.lm_head = Linear(cfg.n_embd, cfg.vocab_size, bias=False)  # `load` ties it where cfg.tied

    @property
    def device(self):
        return self.embed.weight.device

    def hidden(self, ids, lengths=None, cache=None):
        """ids (B, T), right-padded -> final hidden states (B, T, C), after the last norm, zeros at padding.
        lengths (B,): how many tokens of each row are real; None: all of them. With a KVCache, what was cached
        stands in front, and the new tokens are added to it."""
        B, T = ids.shape
        t = torch.arange(T, device=ids.device)
        if lengths is None:
            lengths = torch.full((B,), T, device=ids.device)
        padded = T > 1 and bool((lengths < T).any())
        batch = Batch(B, T, (t < lengths[:, None]).flatten().nonzero()[:, 0] if padded else None, cache)
        positions = batch.gather(t.expand(B, T) if cache is None else cache.begin(lengths, T))  # (N,)
        x = self.embed(batch.gather(ids))  # (N, C)
        if self.pos_embed is not None:
            x = x + self.pos_embed(positions)
        else:
            batch.rope = rope_table(self.config, positions, x.dtype)
        for layer, block in enumerate(self.blocks):
            x = block(x, batch, layer)
        return batch.spread(self.norm(x))

    def forward(self, ids):
        """ids (B, T) -> logits (B, T, V). V is large: others take only the logits that they use."""
        return self.lm_head(self.hidden(ids))

    def loss(self, ids, where, targets, lengths=None):
        """Sum of -log p(target) over flat positions `where` (N,) in ids (B, T); targets (N,): next tokens."""
        h = self.hidden(ids, lengths).flatten(0, 1)[where]  # (N, C)
        return F.cross_entropy(self.lm_head(h).float(), targets, reduction="sum")

    @torch.inference_mode()
    def generate(self, prompts, max_new_tokens, temperature=0.0, eos_ids=(), top_k=None, seed=None,
                 prefixes=None, prefix_cache=None, batch_size=64, on_token=None):
        """Continue prompts of unequal length: id lists -> id lists, without prompt and end token.

        temperature 0 is greedy; `top_k` limits sampling to the k likeliest tokens; a `seed` makes it repeat.
        eos_ids: ids that end an answer, as a tokenizer's end_ids.
        prefixes: for each prompt the index in `prefix_cache` of what stands in front of it, or None.
        on_token(row, id) is called for every new token, as it appears. ValueError: see `check`."""
        rng = torch.Generator(self.device)
        rng.manual_seed(seed) if seed is not None else rng.seed()
        answers, new = [[] for _ in prompts], [max_new_tokens] * len(prompts)
        for rows, cache in self._batches(prompts, prefixes, prefix_cache, batch_size, new):
            ids, lengths = pad([prompts[i] for i in rows], self.device)
            alive = range(len(rows))
            for _ in range(max_new_tokens):
                h = self.hidden(ids, lengths, cache)[range(len(rows)), lengths - 1]  # (B, C): of last tokens
                next_ids = pick_token(self.lm_head(h).float(), temperature, top_k, rng)  # (B,)
                token = next_ids.tolist()
                alive = [b for b in alive if token[b] not in eos_ids]
                for b in alive:
                    answers[rows[b]].append(token[b])
                    if on_token:
                        on_token(rows[b], token[b])
                if not alive:
                    break
                # copying the cache costs about a step: finished rows leave a quarter of the batch at a time
                if len(alive) <= 0.75 * len(rows):
                    cache.keep(alive)
                    rows, next_ids, alive = [rows[b] for b in alive], next_ids[alive], range(len(alive))
                ids, lengths = next_ids[:, None], torch.ones_like(next_ids)
        return answers

    @torch.inference_mode()
    def answer_logprobs(self, prompts, answers, prefixes=None, prefix_cache=None, batch_size=64):
        """Sum of log p(answer given prompt) over its tokens: (N,) float32. Id lists; see `generate`."""
        out, new = torch.zeros(len(prompts)), [len(a) for a in answers]
        for rows, cache in self._batches(prompts, prefixes, prefix_cache, batch_size, new):
            ids, lengths = pad([prompts[i] + answers[i] for i in rows], self.device)
            # the state at token t predicts token t + 1: (row, t, next token) for each token of an answer
            spots = [(b, t, y) for b, i in enumerate(rows)
                     for t, y in enumerate(answers[i], len(prompts[i]) - 1)]
            b, t, y = torch.tensor(spots, dtype=torch.long, device=self.device).view(-1, 3).unbind(1)
            h = self.hidden(ids, lengths, cache)[b, t]  # (N, C)
            logp = [-F.cross_entropy(self.lm_head(some).float(), ys, reduction="none")
                    for some, ys in zip(h.split(64), y.split(64))]  # some at a time: (N, V) is large
            # added up on the CPU: a GPU adds in another order every time
            out[rows] = torch.zeros(len(rows)).index_add_(0, b.cpu(), torch.cat(logp).cpu())
        return out

    @torch.inference_mode()
    def features(self, prompts, batch_size=32):
        """Mean of the final hidden states over each prompt's real tokens: (N, C) float32, on the CPU."""
        out = torch.zeros(len(prompts), self.config.n_embd)
        self.check(prompts, [0] * len(prompts))
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # little padding
        for s in range(0, len(order), batch_size):
            rows = order[s:s + batch_size]
            ids, lengths = pad([prompts[i] for i in rows], self.device)
            h = self.hidden(ids, lengths)  # (B, T, C), zeros at padding
            out[rows] = (h.sum(1, dtype=torch.float32) / lengths[:, None]).cpu()
        return out

    def _batches(self, prompts, prefixes, prefix_cache, batch_size, new):
        """Yield (rows, cache): texts of like length together, the cache filled with what stands in front of
        them, with room for each prompt and its new[i] further tokens."""
        prefixes = prefixes or [None] * len(prompts)
        front = [0 if j is None else len(prefix_cache.entries[j]) for j in prefixes]
        self.check(prompts, [f + n for f, n in zip(front, new)])
        order = sorted(range(len(prompts)), key=lambda i: front[i] + len(prompts[i]) + new[i])
        for s in reversed(range(0, len(order), batch_size)):  # longest first: the others fit into its memory
            rows = order[s:s + batch_size]
            P, Q = max(front[i] for i in rows), max(len(prompts[i]) + new[i] for i in rows)
            slots = -(-(P + Q) // 32) * 32  # whole vectors: softmax is slow on what remains
            cache = KVCache(self.config, len(rows), slots, self.embed.weight)
            if P:
                cache.begin(torch.tensor([front[i] for i in rows], device=self.device), P)
                for b, i in enumerate(rows):
                    if prefixes[i] is not None:
                        cache.kv[:, :, b, :, :front[i]] = prefix_cache[prefixes[i]]
            yield rows, cache

    def check(self, prompts, more):
        """ValueError: a prompt is empty, has an unknown id, or with more[i] others outgrows the context."""
        V, room = self.config.vocab_size, self.config.n_ctx
        for n, (p, others) in enumerate(zip(prompts, more)):
            if not p or min(p) < 0 or max(p) >= V:
                raise ValueError(f"prompt {n} is empty, or holds an id outside the vocabulary of {V}")
            if len(p) + others > room:
                raise ValueError(f"prompt {n}: {len(p)} + {others} tokens exceed the context of {room}")

    @classmethod
    def from_pretrained(cls, name_or_dir, dtype=torch.float32, device="cpu"):
        """A short name, a Hub id or a folder in Hugging Face's layout -> GPT, in eval mode. UserError when a
        setting is not supported, or a weight missing, unexpected, of another shape or type, or not finite."""
        return load(data.resolve_model(name_or_dir), dtype, device)


def pick_token(logits, temperature, top_k, rng):
    """logits (B, V) float32 -> the next id of each row (B,)."""
    if temperature < 1e-6:  # dividing by so little overflows
        return logits.argmax(-1)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng)[:, 0]


def pad(rows, device=None):
    """id lists -> (B, T) right-padded ids, (B,) lengths. What stands in the padding does not matter."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True)
    return ids.to(device), torch.tensor([len(r) for r in rows], device=device)


class KVCache:
    """Keys and values of B rows in preallocated slots:

        [ exemplar, padded to P | question, padded to Q | answer tokens ... ]

    Every row writes the same slots in the same step; rows of unequal length leave holes, which `valid` marks.
    A slot is storage, not a position: RoPE was applied with the token's true position, wherever it lies."""

    def __init__(self, cfg, B, slots, like):
        # zeros: slots not yet written are masked, but garbage there could be NaN, and 0 * NaN is NaN
        self.kv = like.new_zeros(2, cfg.n_layer, B, cfg.n_kv_head, slots, cfg.head_dim)
        self.valid = torch.zeros(B, slots, dtype=torch.bool, device=like.device)
        self.next_position = torch.zeros(B, dtype=torch.long, device=like.device)
        self.used, self.groups, self.mask = 0, cfg.n_head // cfg.n_kv_head, None

    def begin(self, lengths, T):
        """Announce T new slots of which row b uses `lengths[b]`; returns their positions (B, T)."""
        t = torch.arange(T, device=self.valid.device)
        start, self.used = self.used, self.used + T
        self.valid[:, start:self.used] = t < lengths[:, None]
        positions = self.next_position[:, None] + t
        self.next_position = self.next_position + lengths
        if start > 0:
            # what is valid, and among the new slots what came before; so too for padding: no row is ever
            # fully masked (softmax over nothing is NaN)
            see = self.valid[:, None, :].repeat(1, T, 1)  # (B, T, S)
            see[..., start:self.used] = t[:, None] >= t
            mask = torch.zeros_like(see, dtype=self.kv.dtype).masked_fill_(~see, float("-inf"))
            self.mask = mask.repeat(1, self.groups, 1)[:, None]  # (B, 1, G T, S), see `attend`
        return positions

    def write(self, layer, k, v):
        """Store this layer's new k, v (B, KV, T, D) -> the keys and values to attend to, and their mask."""
        T = k.shape[2]
        self.kv[0, layer, :, :, self.used - T:self.used] = k
        self.kv[1, layer, :, :, self.used - T:self.used] = v
        return (k, v, None) if self.mask is None else (self.kv[0, layer], self.kv[1, layer], self.mask)

    def keep(self, rows):
        """Keep only `rows`, in ascending order: finished answers leave the batch, the others move up."""
        for new, old in enumerate(rows):
            if new < old:
                self.kv[:, :, new] = self.kv[:, :, old]
        self.kv = self.kv[:, :, :len(rows)]
        self.valid, self.next_position = self.valid[rows], self.next_position[rows]


class PrefixCache:
    """Keys and values of what stands in front of a prompt, computed once: cache[i] is (2, L, KV, P, D).

    entries: id lists, the pool's exemplars. At the very front an exemplar's keys and values are the same
    whatever follows, so every rollout behind it shares them, exactly. (A second exemplar's depend on the
    first: a pool of n has n^2 of those, few asked for twice, so they are simply part of the prompt.)

    They are computed in fixed blocks, never in the order of asking: rounding depends on what shares a batch,
    and an interrupted run must end bit for bit like a whole one. A block has at most `block` entries and
    8,192 tokens, padding included. Beyond `max_bytes` the least recently used are forgotten."""

    def __init__(self, model, entries, block=16, max_bytes=1 << 30):
        self.model, self.entries, self.max_bytes = model, entries, max_bytes
        self.kv, self.bytes = {}, 0
        self.blocks, rows = {}, []  # {index: all indices of its block}
        for i in sorted(range(len(entries)), key=lambda i: len(entries[i])):  # like lengths together
            if len(entries[i]) > model.config.n_ctx:
                break  # this and all longer ones can stand in front of nothing
            if len(rows) == block or (len(rows) + 1) * len(entries[i]) > 8192:
                rows = []
            rows.append(i)
            self.blocks[i] = rows

    @torch.inference_mode()
    def __getitem__(self, i):
        if i not in self.kv:
            rows = self.blocks[i]
            ids, lengths = pad([self.entries[j] for j in rows], self.model.device)
            cache = KVCache(self.model.config, len(rows), ids.shape[1], self.model.embed.weight)
            self.model.hidden(ids, lengths, cache)
            for b, j in enumerate(rows):
                if j not in self.kv:  # it may have outlived others of its block
                    self.kv[j] = cache.kv[:, :, b, :, :len(self.entries[j])].clone()
                    self.bytes += self.kv[j].nbytes
        self.kv[i] = self.kv.pop(i)  # dicts keep the order of insertion: the oldest is the first
        while self.bytes > self.max_bytes and len(self.kv) > 1:
            self.bytes -= self.kv.pop(next(iter(self.kv))).nbytes
        return self.kv[i]


# ---- plumbing: skip on a first reading -----------------------------------------------------------
# Settings of a config.json that change no answer: training, bookkeeping, how others generate by default. One
# that `read_config` takes is honoured; any other is refused by name unless it says null, false, 0 or nothing.
CHANGE_NO_ANSWER = set("""
    architectures torch_dtype dtype transformers_version transformers.js_config tokenizer_class name_or_path
    unsloth_version unsloth_fixed is_llama_config attention_dropout attn_pdrop embd_pdrop resid_pdrop
    initializer_range gradient_checkpointing use_cache pretraining_tp return_dict is_decoder output_attentions
    output_past output_hidden_states attn_implementation bos_token_id eos_token_id pad_token_id sep_token_id
    id2label label2id num_labels problem_type finetuning_task task_specific_params predict_special_tokens
    n_ctx prefix max_sequence_length max_window_layers summary_type summary_use_proj summary_activation
    summary_proj_to_labels summary_first_dropout max_length min_length do_sample early_stopping num_beams
    num_beam_groups diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty
    no_repeat_ngram_size bad_words_ids num_return_sequences suppress_tokens begin_suppress_tokens
    remove_invalid_values""".split())


class Settings:
    """A config.json whose settings are taken one by one, each checked; `left` is what nobody took."""

    def __init__(self, values, where):
        self.left, self.where = dict(values), where

    def refuse(self, key, value, why="is not supported"):
        raise UserError(f"{self.where}: {key} = {value!r:.60} {why}")

    def take(self, key, kind, *default, among=None):
        """The value, of type `kind`, numbers in a sensible range; `default` where it is absent or null."""
        value = self.left.pop(key, None)
        if value is None and default:
            return default[0]
        if type(value) is not kind and (kind, type(value)) != (float, int):
            self.refuse(key, value, "is missing" if value is None else f"is no {kind.__name__}")
        in_range = 0 < value < {int: 1 << 24, float: 1e30}[kind] if kind in (int, float) else True
        if not in_range or among and value not in among:
            self.refuse(key, value)
        return value


def read_config(hf, where):
    """A parsed config.json -> Config, defaults as in transformers. UserError names what we do not do."""
    s = Settings(hf, where)
    kind = s.take("model_type", str, among=data.MODEL_TYPES)
    if kind == "gpt2":
        s.take("scale_attn_weights", bool, True, among=(True,))
        gelus = {"gelu_new": "tanh", "gelu_pytorch_tanh": "tanh", "gelu": "none"}
        C, H = s.take("n_embd", int), s.take("n_head", int)
        cfg = Config("gpt2", s.take("vocab_size", int), s.take("n_layer", int), H, H, C, C // H,
                     s.take("n_inner", int, 4 * C), s.take("n_positions", int),
                     s.take("layer_norm_epsilon", float, 1e-5),
                     tied=s.take("tie_word_embeddings", bool, True),
                     gelu=gelus[s.take("activation_function", str, "gelu_new", among=gelus)])
    else:
        s.take("hidden_act", str, "silu", among=("silu", "swish"))
        C, H = s.take("hidden_size", int), s.take("num_attention_heads", int)
        bias = kind in ("llama", "qwen3") and s.take("attention_bias", bool, False)
        cfg = Config("llama", s.take("vocab_size", int), s.take("num_hidden_layers", int), H,
                     s.take("num_key_value_heads", int, H), C,
                     s.take("head_dim", int, 128 if kind == "qwen3" else C // H),
                     s.take("intermediate_size", int), s.take("max_position_embeddings", int),
                     s.take("rms_norm_eps", float, 1e-6), *read_rope(s), qk_norm=kind == "qwen3",
                     tied=s.take("tie_word_embeddings", bool, False), qkv_bias=bias or kind == "qwen2",
                     o_bias=bias, mlp_bias=kind == "llama" and s.take("mlp_bias", bool, False))
        s.take("partial_rotary_factor", float, 1.0, among=(1.0,))
        if s.left.get("layer_types") == ["full_attention"] * cfg.n_layer:
            s.left.pop("layer_types")
        # Mistral slides over 4096 tokens unless it says otherwise, Qwen only if told to
        window = s.left.setdefault("sliding_window", 4096 if kind == "mistral" else None)
        off = kind in ("qwen2", "qwen3") and not s.left.get("use_sliding_window")
        if off or kind == "mistral" and type(window) is int and window >= cfg.n_ctx:
            s.left.pop("sliding_window")
    for key, value in s.left.items():
        if value and key not in CHANGE_NO_ANSWER and not key.startswith("_"):
            s.refuse(key, value)
    D = cfg.head_dim
    fits = H * D == C if kind == "gpt2" else D % 2 == 0
    if not fits or H % cfg.n_kv_head or cfg.n_layer > 1024 or H * D > 1 << 20:
        s.refuse("the shape", f"{cfg.n_layer} layers, {H} heads of {D}, {cfg.n_kv_head} key/value heads")
    return cfg


def read_rope(s):
    """-> rope_theta, and Llama 3's scaling or None. transformers 5 writes both into rope_parameters, earlier
    versions into rope_theta and rope_scaling; what is given twice has to agree."""
    new, old = s.take("rope_parameters", dict, {}), s.take("rope_scaling", dict, {})
    for key, value in (*new.items(), *old.items()):
        key = "rope_type" if key == "type" else key
        if s.left.get(key) is None:
            s.left[key] = value
        elif value not in (None, s.left[key]):
            s.refuse(key, value, f"contradicts {s.left[key]!r:.30}")
    keys = "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
    llama3 = s.take("rope_type", str, "default", among=("default", "llama3")) == "llama3"
    return s.take("rope_theta", float, 10000.0), {k: s.take(k, float) for k in keys} if llama3 else None


HF_NAMES = {  # what Hugging Face's checkpoints call differently
    "gpt2": {"embed": "transformer.wte", "pos_embed": "transformer.wpe", "blocks": "transformer.h",
             "norm": "transformer.ln_f", "norm1": "ln_1", "norm2": "ln_2"},
    "llama": {"embed": "model.embed_tokens", "blocks": "model.layers", "norm": "model.norm",
              "attn": "self_attn", "norm1": "input_layernorm", "norm2": "post_attention_layernorm"}}
BUFFERS = ".attn.bias", ".attn.masked_bias", "rotary_emb.inv_freq", "position_ids"  # once saved like weights


def hf_name(cfg, ours):
    """(the name of our parameter or layer in a Hugging Face checkpoint, whether it is stored transposed).
    GPT-2's Conv1D keeps weights as (in, out); attn.c_proj is square: no check of shapes would tell."""
    theirs = ".".join(HF_NAMES[cfg.family].get(part, part) for part in ours.split("."))
    return theirs, ".c_" in ours and "weight" in ours


def weight_files(folder):
    """Where a model folder keeps its weights; as in transformers one file counts more than shards."""
    path, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if path.exists() or not index.exists():
        return [path]
    with data.fitting(index):
        return [folder / Path(name).name for name in sorted(set(read_json(index)["weight_map"].values()))]


def load(folder, dtype, device):
    """The model in `folder`: see GPT.from_pretrained."""
    cfg = read_config(read_json(folder / "config.json", dict), folder / "config.json")
    model, state = GPT(cfg), {}
    places = {}  # {Hugging Face's name: (ours, whether it is stored transposed, the shape it is stored in)}
    for ours, p in model.named_parameters():
        theirs, transposed = hf_name(cfg, ours)
        places[theirs] = ours, transposed, tuple(p.t().shape if transposed else p.shape)
    top = hf_name(cfg, "embed")[0].split(".")[0] + "."  # left out where a model was saved without its head
    stored = ((path, *each) for path in weight_files(folder) for each in read_safetensors(path, BUFFERS))
    for path, name, tensor in stored:
        if not (place := places.get(name) or places.get(top + name)):
            raise UserError(f"{path}: the weight {name!r} has no place in a model of this config.json")
        ours, transposed, want = place
        if tensor.shape != want:
            raise UserError(f"{path}: {name!r} has shape {tuple(tensor.shape)}, config.json asks for {want}")
        state[ours] = (tensor.t() if transposed else tensor).to(device, dtype).contiguous()
    one = state.get("embed.weight", state.get("lm_head.weight"))
    if cfg.tied and one is not None:  # as transformers 5: one stands for both, a copy is a tie, others count
        cfg.tied = torch.equal(state.setdefault("embed.weight", one), state.setdefault("lm_head.weight", one))
    if missing := [theirs for theirs, (ours, *_) in places.items() if ours not in state]:
        more = f", and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(f"{folder}: the weight {missing[0]!r} is missing{more}")
    model.load_state_dict(state, assign=True)
    if cfg.tied:
        model.lm_head.weight = model.embed.weight
    if sum(p.nbytes for p in model.parameters()) > 1 << 30:  # a second copy of a large model is too dear
        for m in model.modules():
            m.packing = False
    model.folder, model.fingerprint = folder, data.fingerprint(folder)
    return model.eval()


def save(model, folder):
    """Write weights, config (head and type as now) and tokenizer: a folder for --model."""
    named = ((hf_name(model.config, name), p) for name, p in model.named_parameters())
    state = {theirs: p.t() if transposed else p for (theirs, transposed), p in named}
    data.write_safetensors(folder / "model.safetensors", state, {"format": "pt"})
    config = read_json(model.folder / "config.json", dict) | {"tie_word_embeddings": model.config.tied}
    kind = str(model.embed.weight.dtype).removeprefix("torch.")
    config |= {key: kind for key in ("dtype", "torch_dtype") if key in config}
    data.write_json(folder / "config.json", config)
    for name in ("tokenizer.json", *data.EXTRAS):
        if (model.folder / name).exists():
            with data.atomic_write(folder / name) as temp:
                shutil.copyfile(model.folder / name, temp)


# ---- fast versions of a plain operation ------------------------------------------------------------


@functools.cache
def can_pack(dtype):
    """Whether this PyTorch build and CPU multiply from oneDNN's own layout; the way to know is to try."""
    try:
        w = torch.ops.mkldnn._reorder_linear_weight(torch.ones(64, 64, dtype=dtype))
        y = torch.ops.mkldnn._linear_pointwise(torch.ones(1, 64, dtype=dtype), w, None, "none", [], "")
        return bool(y.sum() == 64 * 64)
    except (RuntimeError, AttributeError):  # NotImplementedError is a RuntimeError
        return False


class Linear(nn.Linear):
    """nn.Linear; where nothing trains, on a CPU, multiplied from a packed copy of its weight.

    oneDNN multiplies blocked matrices. Given a plain one it re-orders it in every call, which with few rows
    takes as long as the product: without copies rollouts take 1.14 times as long, features 1.10. A copy costs
    the weight's memory (`packing` turns it off), and is made anew when the weight changes."""

    packing, packed = True, None

    def forward(self, x):
        if torch.is_grad_enabled() or not (self.packing and x.device.type == "cpu" and can_pack(x.dtype)):
            self.packed = None
            return super().forward(x)
        now = self.weight.data_ptr(), self.weight._version  # changed by a merge, and by an optimiser
        if self.packed is None or self.packed[0] != now:
            # the weight is kept beside its copy, so that no other tensor can get its address meanwhile
            self.packed = now, self.weight.data, torch.ops.mkldnn._reorder_linear_weight(self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed[2], self.bias, "none", [], "")


# ---- devices and types ---------------------------------------------------------------------------


def pick_device(name="auto"):
    """'auto' -> cuda, then mps, then cpu."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise UserError(f"--device {name}: {str(e).splitlines()[0]}") from None
    return name


def pick_dtype(name, device):
    """-> (dtype, the reason, for the user to read). On a CPU 'auto' measures: bfloat16 is up to 4x faster
    where the instructions exist (AVX512-BF16, AMX, Arm BF16), and slower than float32 where they do not."""
    if name != "auto":
        return getattr(torch, name), "as asked"
    if device.startswith("cuda"):
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "this GPU has it") if fast else (torch.float32, "this GPU has no bfloat16")
    if device != "cpu":
        return torch.float32, f"the safe choice on {device}"
    best, threads = {torch.float32: math.inf, torch.bfloat16: math.inf}, torch.get_num_threads()
    torch.set_num_threads(1)  # and the best of many tries: beside other work the answer must be the same
    for n in range(20):
        for dtype in best:
            x, w = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
            start = time.perf_counter()
            F.linear(x, w)
            best[dtype] = min(best[dtype], time.perf_counter() - start)
        ratio = best[torch.float32] / best[torch.bfloat16]
        if n > 2 and ratio < 0.5:  # it has no such instructions; do not spend seconds on it
            break
    torch.set_num_threads(threads)
    reason = f"this CPU multiplies {ratio:.1f}x as fast in bfloat16"
    return torch.bfloat16 if ratio > 1.5 else torch.float32, reason


def setup(args, ddp=None):
    """-> (device, dtype) from the common flags, for all processes those of the first; says which and why."""
    if args.threads:
        torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    dtype, reason = (ddp or data.Processes()).gather(pick_dtype(args.dtype, device))[0]
    print(f"{device}, {str(dtype).removeprefix('torch.')} ({reason}), {torch.get_num_threads()} threads")
    return device, dtype


# ---- a lesson: python model.py ---------------------------------------------------------------------


def lesson():
    """The default model answers, with and without the cache; two answers are weighed."""
    m, enc = GPT.from_pretrained("smollm2-135m"), data.load_tokenizer("smollm2-135m")
    n = sum(p.numel() for p in m.parameters())
    print(f"{m.config.n_layer} blocks, {n:,} weights, {m.config.vocab_size:,} tokens; float32 on the CPU\n")
    example = {"instruction": "Write the plural of the noun.", "input": "horse", "output": ""}
    question, new = data.encode_query(enc, example), 16
    m.generate([question], 1)  # what is done once, at the first call, is no part of the speed
    start = time.perf_counter()
    cached = m.generate([question], new)[0]
    fast, ids, start = time.perf_counter() - start, list(question), time.perf_counter()
    with torch.inference_mode():
        for _ in range(new):  # what an answer is: the whole text through the model for each new token
            ids.append(int(m(torch.tensor([ids]))[0, -1].argmax()))
    slow = time.perf_counter() - start
    print(data.decode(enc, question + cached).decode("utf-8", "replace"))
    print(f"\nwith the cache {new / fast:.0f} tokens/s, without {new / slow:.0f}")
    print("the same answer" if ids == question + cached else "another answer: this must not happen")
    answers = ["horses", "cow"]
    ids = [data.encode_answer(enc, example | {"output": a}) for a in answers]
    logp = m.answer_logprobs([question] * 2, ids)
    print("log p of an answer:", ", ".join(f"{a!r} {p:.1f}" for a, p in zip(answers, logp.tolist())))


if __name__ == "__main__":
    data.run(lesson)
