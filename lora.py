"""
LoRA by hand (Hu et al. 2021, arXiv 2106.09685), in PEFT's file format.

A linear layer y = W x is frozen and a product of two thin matrices is trained beside it:

    y = W x + (alpha / r) B A x        A (r, in) random, B (out, r) zero, so training starts at W

`inject` puts a `LoRALinear` around every target layer; `merge` folds the product into W, so that the model
runs at its plain speed; `save` and `load` use PEFT's files, so that either program reads the other's.

    python lora.py      # a layer wrapped, trained and merged

Left out on purpose, and refused where a file asks for it: adapters on embeddings and on the output head
(merging one into a *tied* head would change the embedding too), DoRA, several at once, ranks per layer.
"""

import contextlib
import hashlib
import json
import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
from data import UserError
from model import hf_name


class LoRALinear(nn.Module):
    """A frozen nn.Linear with a low-rank update beside it. A and B stay in float32, whatever the base is."""

    def __init__(self, base, r, scale, dropout=0.0):
        super().__init__()
        self.base, self.scale, self.dropout = base, scale, dropout
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, device=base.weight.device))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, r, device=base.weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x):  # (N, in) -> (N, out)
        y = self.base(x)
        x = F.dropout(x, self.dropout, self.training)
        low = F.linear(x, self.lora_A.to(x.dtype))  # (N, r)
        return torch.addmm(y, low, self.lora_B.to(x.dtype).t(), alpha=self.scale)  # one pass over the wide y


def layers(model):
    """{name: module} of the LoRA layers, in the model's order."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def parameters(model):
    """What trains: every A and B."""
    return [p for m in layers(model).values() for p in (m.lora_A, m.lora_B)]


def inject(model, r=8, alpha=16, targets="all", dropout=0.0, rslora=False):
    """Freeze `model` and wrap its target layers.

    targets: names such as "q_proj,v_proj"; "all" stands for every linear layer of the blocks, a name for
    every layer whose full name, ours or Hugging Face's, ends in it. rslora: scale by alpha / sqrt(r)
    (Kalajdzievski 2023). UserError when a name matches no layer."""
    if layers(model):
        raise UserError("the model carries an adapter already")
    every, chosen = linear_layers(model), set()
    for t in targets.split(","):
        hits = {n for n, theirs in every.items() if t == "all" or ends_in(t, n, theirs)}
        if not hits:
            leaves = sorted({n.split(".")[-1] for n in every})
            raise UserError(f"--targets: no layer is called {t!r}; this model has {', '.join(leaves)}")
        chosen |= hits
    wrap(model, [n for n in every if n in chosen], r, alpha, dropout, rslora)  # in the model's order


def wrap(model, names, r, alpha, dropout, rslora):
    model.requires_grad_(False)
    scale = alpha / math.sqrt(r) if rslora else alpha / r
    for name in names:
        layer = LoRALinear(model.get_submodule(name), r, scale, dropout)
        model.set_submodule(name, layer.train(model.training))
    model.lora_config = {"r": r, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora}


@torch.no_grad()
def merge(model):
    """W <- W + (alpha / r) B A in every layer, which is a plain one again."""
    for name, m in layers(model).items():
        w = m.base.weight
        w.data = (w.float() + m.scale * (m.lora_B @ m.lora_A)).to(w.dtype)
        model.set_submodule(name, m.base)


# ---- plumbing: skip on a first reading -----------------------------------------------------------------


def linear_layers(model):
    """{our name of every linear layer of the blocks: Hugging Face's}, wrapped or not."""
    return {n: hf_name(model.config, n)[0] for n, m in model.named_modules()
            if n.startswith("blocks.") and isinstance(m, nn.Linear | LoRALinear) and not n.endswith(".base")}


def ends_in(target, *names):
    """As PEFT: a layer is meant by its whole name or by what follows one of the dots in it."""
    return any(f".{name}".endswith(f".{target}") for name in names)


def target_names(model):
    """The wrapped layers as PEFT knows them: by last name where all of that name are, else by whole name."""
    every, wrapped = linear_layers(model), layers(model)
    last = {n: n.split(".")[-1] for n in every}
    partly = {last[n] for n in every if n not in wrapped}
    return sorted({every[n] if last[n] in partly else last[n] for n in wrapped})


def save(model, folder, base_model="", extra=None):
    """Write the adapter alone, in PEFT's format. `extra`: our own settings, kept under the key "pillow"
    with the digest of the weights (`matcher.save` says why)."""
    every, path = linear_layers(model), Path(folder) / "adapter_model.safetensors"
    tensors = {f"base_model.model.{every[n]}.{half}.weight": getattr(m, half)
               for n, m in layers(model).items() for half in ("lora_A", "lora_B")}
    data.write_safetensors(path, tensors, {"format": "pt"})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(base_model),
              "bias": "none", "fan_in_fan_out": model.config.family == "gpt2", "inference_mode": True,
              "target_modules": target_names(model), **model.lora_config}
    if extra:
        config["pillow"] = extra | {"weights": data.digest_file(path)}
    data.write_json(Path(folder) / "adapter_config.json", config)


def digest(folder):
    """A short name for an adapter's weights and what is done with them; matchers and memos are tied to it."""
    config = read_config(Path(folder) / "adapter_config.json")
    asked = json.dumps({key: config.get(key) for key in sorted(HONOURED)})
    weights = data.digest_file(Path(folder) / "adapter_model.safetensors")
    return hashlib.sha256((weights + asked).encode()).hexdigest()[:16]


# Settings of adapter_config.json that are honoured, and those that change nothing in a trained adapter
HONOURED = {"peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora", "target_modules",
            "init_lora_weights"}
INERT = {"task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "fan_in_fan_out",
         "inference_mode", "layers_pattern", "loftq_config", "eva_config", "corda_config", "megatron_core",
         "qalora_group_size", "runtime_config", "ensure_weight_tying", "lora_ga_config", "pillow"}
STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")  # they leave the base weight as it is


def read_config(path):
    """adapter_config.json, checked: each setting is honoured, inert, empty, or refused by name."""
    config = {"lora_dropout": 0.0} | data.read_json(path, dict)
    for key, value in config.items():
        empty = value is None or value is False or value in ("none", "", [], {})
        limited = {"peft_type": value == "LORA", "init_lora_weights": value in STARTS}
        if not limited.get(key, empty or key in HONOURED | INERT):
            raise UserError(f"{path}: {key} = {str(value)[:60]!r} is not supported")
    for key, low, high in (("r", 1, 4096), ("lora_alpha", 0, 1e6), ("lora_dropout", 0, 1)):
        value, kinds = config.get(key), (int,) if key == "r" else (int, float)
        if type(value) not in kinds or not low <= value <= high:  # isinstance would take True for an int
            raise UserError(f"{path}: {key} = {str(value)[:20]!r} is not a usable number")
    targets = config.get("target_modules")
    with contextlib.suppress(re.error):
        if targets and (isinstance(targets, list) or isinstance(targets, str) and re.compile(targets)):
            return config
    raise UserError(f"{path}: target_modules = {str(targets)[:60]!r} names no layers")


def load(model, folder):
    """Inject and fill the adapter in `folder` (ours or PEFT's) -> its adapter_config. UserError when it asks
    for what we do not do, or does not fit this model, which then stays as it was."""
    folder = Path(folder)
    config, path = read_config(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
    if layers(model):
        raise UserError(f"{folder}: the model carries an adapter already; load it into a fresh one")
    match config.get("pillow"):
        case {"weights": weights} if weights != data.digest_file(path):
            raise UserError(f"{folder}: adapter_config.json was not written with these weights; train it "
                            "again, or go on with --resume")
    every, targets = linear_layers(model), config["target_modules"]
    if isinstance(targets, str):  # as PEFT: "all-linear", or a regular expression for the whole name
        pattern = ".*" if targets.lower() == "all-linear" else targets
        chosen = [n for n, theirs in every.items() if re.fullmatch(pattern, theirs)]
    else:  # a name that matches nothing beside some that do is passed over, as PEFT does
        chosen = [n for n, theirs in every.items() if any(ends_in(t, theirs) for t in targets)]
    found = {}
    for key, tensor in data.read_safetensors(path):
        # an adapter's own name may stand in front of .weight
        match = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(lora_[AB])(?:\.[^.]+)?\.weight", key)
        if match is None or match.groups() in found:
            raise UserError(f"{path}: the weight {key!r} is not one of a LoRA layer, or stands there twice")
        found[match.groups()] = tensor
    shapes = {}
    for n in chosen:
        base = model.get_submodule(n)
        shapes[every[n], "lora_A"] = config["r"], base.in_features
        shapes[every[n], "lora_B"] = base.out_features, config["r"]
    for key in {**shapes, **found}:
        has = tuple(found[key].shape) if key in found else "missing"
        wants = shapes.get(key, "no place for it")
        if has != wants:
            raise UserError(f"{path}: shape of {'.'.join(key)}: {has}, here {wants}: made for another model")
    wrap(model, chosen, config["r"], config["lora_alpha"], config["lora_dropout"], config.get("use_rslora"))
    for n, m in layers(model).items():
        m.lora_A.data.copy_(found[every[n], "lora_A"])
        m.lora_B.data.copy_(found[every[n], "lora_B"])
    return config


def lesson():
    """A layer of 64 inputs and outputs learns what another one does, through a rank of 4."""
    torch.manual_seed(0)
    base, x = nn.Linear(64, 64, bias=False).requires_grad_(False), torch.randn(256, 64)
    wanted = x @ (base.weight + 0.2 * torch.randn(64, 4) @ torch.randn(4, 64)).t()  # a change of rank 4
    model = nn.Sequential(LoRALinear(base, r=4, scale=2.0))
    n = sum(p.numel() for p in parameters(model))
    print(f"A and B have {n} numbers, W has {base.weight.numel()}.")
    print(f"B is zero, so the start is W: largest difference {(model(x) - base(x)).abs().max().item():.1e}")
    optimizer = torch.optim.Adam(parameters(model), 0.01)
    for step in range(401):
        loss = F.mse_loss(model(x), wanted)
        if step % 100 == 0:
            print(f"step {step:3d}  loss {loss.item():.5f}")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = model(x)
    merge(model)
    print(f"merged: largest difference {(model(x) - trained).abs().max().item():.1e}, one product again")


if __name__ == "__main__":
    lesson()
