"""
LoRA by hand (Hu et al. 2021, arXiv 2106.09685), in PEFT's file format.

A linear layer y = W x is frozen and a product of two thin matrices is trained beside it:

    y = W x + (alpha / r) B A x        A (r, in) random, B (out, r) zero, so training starts at W

`inject` walks the model and puts a `LoRALinear` around every layer whose name is a target; `merge`
folds the product into W, so that rollouts run at the speed of the plain model; `save` and `load` use
`adapter_config.json` + `adapter_model.safetensors` as PEFT does: either program reads the other's.

Try it:

    python -c "import model, lora; m = model.GPT.from_pretrained('smollm2-135m'); print(lora.inject(m, 8, 16))"

Left out on purpose: adapters on embeddings and on the output head (merging one into a *tied* head
would change the embedding too), DoRA, several adapters at once, per-layer ranks. Files that ask for
these are refused.
"""

import contextlib
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError, digest_file, read_json, read_safetensors, write_json, write_safetensors
from model import hf_keys


class LowRank(torch.autograd.Function):
    """y + s * (x A^T) B^T, with the backward pass written out.

    Autograd would do the same; written by hand it keeps x A^T (r numbers a token) and x itself, scales the
    thin matrix instead of the wide one, and adds into y in place: in a training step on a CPU that is
    memory traffic saved in each of 210 layers.
    """

    @staticmethod
    def forward(ctx, y, x, A, B, s):
        A, B = A.to(x.dtype), B.to(x.dtype)
        x2 = x.flatten(0, -2)
        z = x2 @ A.t()  # (N, r)
        y.flatten(0, -2).addmm_(z, B.t(), alpha=s)
        ctx.save_for_backward(x2, z, A, B)
        ctx.s, ctx.shape = s, x.shape
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        x2, z, A, B = ctx.saved_tensors
        d = dy.flatten(0, -2)  # (N, out)
        dz = (d @ B) * ctx.s  # (N, r)
        dA = (dz.t() @ x2).float()  # (r, in)
        dB = (d.t() @ z).float() * ctx.s  # (out, r)
        dx = (dz @ A).view(ctx.shape) if ctx.needs_input_grad[1] else None
        return dy, dx, dA, dB, None


class LoRALinear(nn.Module):
    """A frozen nn.Linear with a low-rank update beside it. Adapters stay in float32, whatever the base is."""

    def __init__(self, base, r, scale, dropout=0.0):
        super().__init__()
        self.base, self.r, self.scale, self.dropout = base, r, scale, dropout
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.original = None  # the base weight, while merged
        self.merged = None  # (merged weight, version of A and B it was made of), once merged
        self.active = True  # False inside `bare`: the frozen layer alone

    def delta(self):
        """(alpha / r) B A: (out, in) float32."""
        return self.scale * (self.lora_B @ self.lora_A)

    def forward(self, x):
        y = self.base(x)
        if self.original is not None or not self.active:
            return y
        if self.dropout and self.training:
            x = F.dropout(x, self.dropout)
        return LowRank.apply(y, x, self.lora_A, self.lora_B, self.scale)


def layers(model):
    """{name: module} of the LoRA layers, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def inject(model, r=8, alpha=16, targets="all", dropout=0.0, rslora=False):
    """Freeze `model` and wrap its target layers; returns how many parameters now train.

    targets: names such as "q_proj,v_proj" (or a list), or "all" for every linear layer of the blocks. As in PEFT,
    a name stands for every layer whose full name, ours or Hugging Face's, ends in it.
    rslora: scale by alpha / sqrt(r) (Kalajdzievski 2023) instead of alpha / r.
    UserError when r is not positive or a name matches no layer.
    """
    if r < 1:
        raise UserError(f"--rank must be at least 1, not {r}")
    found = {name: m for name, m in model.blocks.named_modules() if isinstance(m, nn.Linear)}
    leaves = sorted({name.split(".")[-1] for name in found})
    if targets == "all":
        targets = leaves
    targets = targets.split(",") if isinstance(targets, str) else list(targets)
    keys = hf_keys(model.config)
    full = {n: (f".blocks.{n}", "." + keys[f"blocks.{n}.weight"][0].removesuffix(".weight")) for n in found}
    hits = {t: [n for n in found if any(name.endswith("." + t) for name in full[n])] for t in targets}
    if unknown := [t for t in targets if not hits[t]]:
        raise UserError(f"--targets: no layer is called {unknown[0]!r}; this model has {', '.join(leaves)}")
    thinnest = min(found[n].in_features for names in hits.values() for n in names)
    if r > thinnest:
        raise UserError(f"--rank {r} is more than the {thinnest} inputs of a layer: nothing would be low-rank about it")
    model.requires_grad_(False)
    for name in sorted({n for names in hits.values() for n in names}, key=list(found).index):
        parent, leaf = name.rsplit(".", 1)
        wrapped = LoRALinear(found[name], r, alpha / math.sqrt(r) if rslora else alpha / r, dropout)
        setattr(model.blocks.get_submodule(parent), leaf, wrapped.train(model.training))
    model.lora_config = {"r": r, "lora_alpha": alpha, "target_modules": targets, "lora_dropout": dropout, "use_rslora": rslora}
    return sum(p.numel() for p in parameters(model))


def parameters(model):
    """The parameters that train: every A and B."""
    return [p for m in layers(model).values() for p in (m.lora_A, m.lora_B)]


@torch.no_grad()
def merge(model, keep_base=True):
    """W <- W + (alpha / r) B A in every layer. Merging twice is merging once.

    The base weight is put aside, because W + D - D is not W in floating point (and in bfloat16 visibly
    so); after an `unmerge` the sum is still there, and merging again only swaps the two, as long as the
    adapter has not changed. keep_base=False saves the memory for programs that never unmerge: the
    wrappers are removed.
    """
    for name, m in layers(model).items():
        if m.original is None:
            version = m.lora_A._version, m.lora_B._version  # counts changes in place, such as an optimiser's
            if m.merged is None or m.merged[1] != version:
                m.merged = (m.base.weight.float() + m.delta()).to(m.base.weight.dtype), version
            m.original, m.base.weight.data = m.base.weight.data, m.merged[0]
        if not keep_base:
            parent, leaf = name.rsplit(".", 1)
            setattr(model.get_submodule(parent), leaf, m.base)


@torch.no_grad()
def unmerge(model):
    """The base weights, bit for bit as they were before `merge`."""
    for m in layers(model).values():
        if m.original is not None:
            m.base.weight.data, m.original = m.original, None


def _peft_names(model):
    """{our layer: its name in a PEFT file}: base_model.model. + the Hugging Face module name."""
    keys = hf_keys(model.config)
    return {name: "base_model.model." + keys[name + ".weight"][0].removesuffix(".weight") for name in layers(model)}


def save(model, folder, base_model="", extra=None):
    """Write the adapter alone, in PEFT's format. `extra`: our own settings, kept under the key "pillow", with the digest of
    the weights: two files cannot be renamed at once, and a kill in between must not pair those of two runs."""
    gpt2 = model.config.family == "gpt2"
    tensors = {}
    for name, theirs in _peft_names(model).items():
        m = model.get_submodule(name)
        tensors[theirs + ".lora_A.weight"] = m.lora_A.detach().float().cpu().contiguous()
        tensors[theirs + ".lora_B.weight"] = m.lora_B.detach().float().cpu().contiguous()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_model),
              "bias": "none", "fan_in_fan_out": gpt2, "inference_mode": True, **model.lora_config}
    path = Path(folder) / "adapter_model.safetensors"
    write_safetensors(path, tensors, {"format": "pt"})
    write_json(Path(folder) / "adapter_config.json", config | ({"pillow": extra | {"weights": digest_file(path)}} if extra else {}))


def digest(folder):
    """A short name for the adapter in a folder, weights and settings: what matchers and memos are tied to."""
    return digest_file(Path(folder) / "adapter_model.safetensors", Path(folder) / "adapter_config.json")


@contextlib.contextmanager
def bare(model):
    """Inside, the model answers as if it had no adapter; afterwards it is as it was, merged or not."""
    merged = any(m.original is not None for m in layers(model).values())
    unmerge(model)
    for m in layers(model).values():
        m.active = False
    try:
        yield model
    finally:
        for m in layers(model).values():
            m.active = True
        if merged:
            merge(model)


# what an adapter_config.json may ask for that we do not do: {setting: the values that ask for nothing}
_REFUSED = {"use_dora": (False, None), "modules_to_save": (None, []), "layers_to_transform": (None, []),
            "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "exclude_modules": (None, []), "bias": ("none", None),
            "lora_bias": (False, None), "trainable_token_indices": (None, [], {}), "target_parameters": (None, []),
            "megatron_config": (None,), "layer_replication": (None, []), "alora_invocation_tokens": (None, [])}


def load(model, folder):
    """Inject and fill the adapter in `folder` (ours or PEFT's); returns its adapter_config as a dict.

    UserError when the file asks for what we do not do, or does not fit this model.
    """
    folder = Path(folder)
    config = read_json(folder / "adapter_config.json", dict)
    if config.get("peft_type") != "LORA":
        raise UserError(f"{folder}: peft_type {config.get('peft_type')!r} is not LORA")
    for key, harmless in _REFUSED.items():
        if config.get(key, harmless[0]) not in harmless:
            raise UserError(f"{folder / 'adapter_config.json'}: {key} = {config[key]!r} is not supported")
    targets, r, alpha = config.get("target_modules"), config.get("r"), config.get("lora_alpha")
    if targets == "all-linear":
        targets = "all"
    if targets != "all" and not (isinstance(targets, list) and targets and all(isinstance(t, str) for t in targets)):
        raise UserError(f"{folder / 'adapter_config.json'}: target_modules = {targets!r} is not a list of names")
    dropout = config.get("lora_dropout") or 0.0
    for key, value, most in (("r", r, 4096), ("lora_alpha", alpha, 1e6), ("lora_dropout", dropout, 0.99)):
        if type(value) not in (int, float) or not 0 <= value <= most or key == "r" and type(value) is not int:
            raise UserError(f"{folder / 'adapter_config.json'}: {key} = {str(value)[:20]!r} is not a usable number")
    path = folder / "adapter_model.safetensors"
    found = dict(read_safetensors(path))
    ours = config.get("pillow")
    if isinstance(ours, dict) and ours.get("weights") not in (None, digest_file(path)):
        raise UserError(f"{folder}: adapter_config.json was not written with these weights; train the adapter again, or go on with --resume")
    inject(model, r, alpha, targets, dropout, bool(config.get("use_rslora")))
    for name, theirs in _peft_names(model).items():
        m = model.get_submodule(name)
        for half, p in (("lora_A", m.lora_A), ("lora_B", m.lora_B)):
            key = f"{theirs}.{half}.weight"
            if key not in found:
                raise UserError(f"{path}: the weight {key!r} is missing: this adapter was made for another model")
            if found[key].shape != p.shape:
                raise UserError(f"{path}: {key!r} has shape {tuple(found[key].shape)}, this model asks for {tuple(p.shape)}")
            p.data.copy_(found.pop(key))
    if found:
        raise UserError(f"{path}: the weight {next(iter(found))!r} has no place in this model")
    return config
