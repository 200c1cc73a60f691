"""
Ours against transformers + PEFT on the same weights, dtype, threads and inputs: README's table of speeds.

    python test_all.py --bench [lora rollouts features] [--model FOLDER or NAME]
"""

import os
import random
import types

import numpy as np
import torch
import torch.nn.functional as F

import data
import lora
import model
import rl
import train_lora
from test_all import Skip, need, seconds

PARTS = "lora", "rollouts", "features"


def race(what, unit, amount, mine, peer):
    """One line: amount a second of either, and theirs / ours as median [lowest .. highest] of five rounds.

    They run in turn: the machine's speed drifts, a ratio of neighbours does not."""
    mine()  # warm up
    peer()
    times = np.array([[seconds(mine), seconds(peer)] for _ in range(5)])
    rates = "".join(f" {amount / t:9,.1f}" for t in np.median(times, 0))
    ratio = times[:, 1] / times[:, 0]
    low, middle, high = ratio.min(), np.median(ratio), ratio.max()
    print(f"{what:58s}{rates} {unit:10s} {middle:5.2f} x [{low:.2f} .. {high:.2f}]", flush=True)


def padded_left(prompts):
    """(ids, mask), each (B, T), as transformers wants them to go on writing."""
    T = max(map(len, prompts))
    return (torch.tensor([[0] * (T - len(p)) + p for p in prompts]),
            torch.tensor([[0] * (T - len(p)) + [1] * len(p) for p in prompts]))


def by_length(prompts, batch):
    """Lists of at most `batch` indices, of prompts of like length: a peer pads little, too."""
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    return [order[s : s + batch] for s in range(0, len(order), batch)]


class Bench:
    """Ours against transformers + PEFT: the same weights, dtype, threads and inputs."""

    def __init__(self, name):
        try:
            self.peft, self.transformers = need("peft", "transformers")
        except Skip as skip:
            raise data.UserError(f"{skip}: nothing to compare with") from None
        self.transformers.logging.set_verbosity_error()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", os.cpu_count())))
        flags = types.SimpleNamespace(threads=0, device="auto", dtype="auto")
        self.device, self.dtype = model.setup(flags)
        self.folder, self.enc = data.resolve_model(name), data.load_tokenizer(name)
        print(f"{name}\n{'':58s} {'ours':>9s} {'peer':>9s}")

    def models(self, dtype):
        load = self.transformers.AutoModelForCausalLM.from_pretrained
        peer = load(self.folder, dtype=dtype).eval().to(self.device)
        return model.GPT.from_pretrained(self.folder, dtype, self.device), peer

    def lora(self, B=16, T=96, A=16):
        """Steps on texts of T tokens, the last A of them the answer; then on train_lora.py's own batches."""
        cfg = self.models(self.dtype)[0].config
        ids = torch.randint(100, cfg.vocab_size, (B, T), generator=torch.Generator().manual_seed(0))
        where = torch.tensor([b * T + T - A - 1 + t for b in range(B) for t in range(A)])
        equal = [[x.to(self.device) for x in (ids, where, ids[:, -A:].flatten(), torch.full((B,), T))]]
        flags = types.SimpleNamespace(share_nearest=None, share_random=None, shots=1)
        texts = train_lora.load_texts(flags, cfg.n_ctx, self.enc, data.split(data.styles(), 0))
        rows = train_lora.draw_batches(texts.n, 8, 3, 0)
        own = [texts.batch(some, texts.exemplars(some, random.Random(0)), self.device) for some in rows]
        two = "c_attn" if cfg.family == "gpt2" else "q_proj,v_proj"
        for what, targets, batches in ((f"{B} x {T}", two, equal), (f"{B} x {T}", "all", equal),
                                       ("8 of styles", "all", own)):
            mine, peer = self.models(self.dtype)
            lora.inject(mine.train(), 8, 16, targets)
            layers = "all-linear" if targets == "all" else targets.split(",")
            settings = self.peft.LoraConfig(r=8, lora_alpha=16, target_modules=layers)
            peer = self.peft.get_peft_model(peer, settings).train()
            ours = self.steps(mine, lambda m, b: m.loss(*b) / len(b[2]), batches)
            theirs = self.steps(peer, lambda m, x: m(**x).loss, [self.labelled(*b) for b in batches])
            amount = sum(int(lengths.sum()) for *_, lengths in batches)
            race(f"LoRA step, r 8 on {targets}, {what}", "tokens/s", amount, ours, theirs)

    def steps(self, trained, loss, batches):
        optimizer = torch.optim.AdamW([p for p in trained.parameters() if p.requires_grad], 1e-4, fused=True)

        def run():
            for batch in batches:
                loss(trained, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            if self.device == "cuda":
                torch.cuda.synchronize()
        return run

    def labelled(self, ids, where, targets, lengths):
        """A batch of ours as transformers takes it: an answer's end token is an input, too."""
        T = ids.shape[1]
        extra = int((where % T).max() == T - 1)
        x = F.pad(ids, (0, extra))
        labels = torch.full_like(x, -100)
        labels[where // T, where % T + 1] = targets
        mask = torch.arange(T + extra, device=self.device) < lengths[:, None] + extra
        return {"input_ids": x, "attention_mask": mask.long(), "labels": labels}

    def rollouts(self):
        ours, cold, theirs = self.answering(self.dtype)
        race("rollouts: 64 questions behind 32 exemplars, 16 new tokens", "rollouts/s", 64, ours, theirs)
        race("  the same, nothing cached yet", "rollouts/s", 64, cold, theirs)
        ours, _, theirs = self.answering(torch.float32)
        same = sum(a == b for a, b in zip(ours(), theirs()))
        print(f"  identical greedy answers in float32: {same} of 64")

    def answering(self, dtype):
        """-> three functions: ours, ours with nothing cached, theirs at the batch that suits it best."""
        (mine, peer), parts = self.models(dtype), data.split(data.styles(), 0)
        pool, questions = (sorted(parts[k], key=lambda e: len(data.query_text(e))) for k in ("pool", "test"))
        env = rl.Environment(mine, self.enc, pool[-32:], 16)  # the longest
        first, rest, _ = zip(*(env.prompt(q, [i % 32], 16) for i, q in enumerate(questions[-64:])))
        prompts = [env.exemplars[f] + r for f, r in zip(first, rest)]

        def ours(cache=env.prefix_cache):
            return mine.generate(list(rest), 16, eos_ids=(), prefixes=first, prefix_cache=cache)

        def theirs(batch):
            out = [None] * len(prompts)
            for rows in by_length(prompts, batch):
                x, mask = (t.to(self.device) for t in padded_left([prompts[i] for i in rows]))
                y = peer.generate(input_ids=x, attention_mask=mask, do_sample=False, max_new_tokens=16,
                                  min_new_tokens=16, pad_token_id=0, eos_token_id=None)
                for i, answer in zip(rows, y[:, x.shape[1]:].tolist()):
                    out[i] = answer
            return out

        best = min((16, 32, 64), key=lambda n: seconds(lambda: theirs(n)))
        return ours, lambda: ours(rl.PrefixCache(mine, env.exemplars, block=16)), lambda: theirs(best)

    def features(self):
        mine, peer = self.models(self.dtype)
        texts = [data.encode_query(self.enc, e) for e in data.styles()[::18]]

        @torch.inference_mode()
        def theirs():
            for rows in by_length(texts, 32):
                x, lengths = model.pad([texts[i] for i in rows], self.device)
                mask = torch.arange(x.shape[1], device=self.device) < lengths[:, None]
                h = peer.base_model(input_ids=x, attention_mask=mask.long()).last_hidden_state.float()
                ((h * mask[..., None]).sum(1) / lengths[:, None]).cpu()

        race(f"features: {len(texts)} questions of unequal length", "texts/s", len(texts),
             lambda: mine.features(texts), theirs)


def bench(words):
    """words: what stands behind --bench, some of PARTS or none for all, --model and a name."""
    at = words.index("--model") if "--model" in words else len(words)
    name, parts = [*words, "smollm2-135m", "smollm2-135m"][at + 1], words[:at] + words[at + 2 :]
    if unknown := [part for part in parts if part not in PARTS]:
        raise data.UserError(f"--bench {unknown[0]}: use {', '.join(PARTS)}, or nothing for all")
    table = Bench(name)
    for part in parts or PARTS:
        getattr(table, part)()
