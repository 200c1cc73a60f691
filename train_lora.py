"""
Fine-tune a language model with LoRA so that it *uses* an exemplar when it is given one.

    python train_lora.py                               # styles, SmolLM2-135M -> out/lora
    python train_lora.py --data dolly --max_tokens 160
    python train_lora.py --data my.jsonl --model path/to/model
    python train_lora.py --full --share_nearest 0 --share_random 0    # full fine-tuning, without exemplars, for train_matcher.py --sft out/full
    torchrun --nproc_per_node=2 train_lora.py          # data-parallel, the same losses

Ordinary LoRA never sees an exemplar, and then one in front of the question hurts a small model more than
it helps. So some training examples get one: the nearest other training example, or a random one (which
teaches when *not* to copy), or none. The shares are --share_nearest and --share_random. --share_nearest 0
--share_random 0 is plain LoRA.

The loss is on answers and their end tokens only: the question's, and those of the exemplars in front of it.
"""

import math
import random
import time

import torch
from tqdm import tqdm

import data
import lora
import matcher
from model import GPT, pad, setup


def draw_batches(n, batch_size, steps, seed):
    """Index lists for every step: each epoch a new permutation, so that no example is seen twice before all were once."""
    rng, queue, batches = random.Random(seed), [], []
    for _ in range(steps):
        while len(queue) < batch_size:
            queue += rng.sample(range(n), n)
        batches.append(queue[:batch_size])
        del queue[:batch_size]
    return batches


def with_exemplars(rows, n, near, shares, shots, rng):
    """For each row a list of exemplars: its nearest with shares[0], random ones with shares[1], else none.

    near: {row: its nearest training examples, nearest first}; how many is drawn from 1 .. shots.
    """
    out = []
    for i in rows:
        u, m = rng.random(), rng.randint(1, shots)
        if u < shares[0]:
            out.append(near[i][:m])
        elif u < sum(shares):
            out.append(rng.sample([j for j in rng.sample(range(n), min(n, m + 1)) if j != i][:m], min(m, n - 1)))
        else:
            out.append([])
    return out


def make_batch(rows, exemplars, queries, answers, between, device, exemplars_count=True):
    """-> ids (B, T), where (N,) flat positions whose next token is an answer token, targets (N,) those tokens, lengths (B,).

    An exemplar's answer counts as well, while training: it is a training example behind what stands before it, and its
    tokens have been paid for. Its target ends with the end token, though the text goes on with `between`.
    """
    sequences, spots, targets = [], [], []
    for i, front in zip(rows, exemplars):
        ids = []
        for j in [*front, i]:
            ids = ids + (between if ids else []) + queries[j]
            if exemplars_count or j == i:
                spots.append((len(sequences), len(ids) - 1, len(answers[j])))
                targets += answers[j]
            ids = ids + answers[j][:-1]  # nothing is predicted after the end token
        sequences.append(ids)
    ids, lengths = pad(sequences, device)
    where = [b * ids.shape[1] + first + t for b, first, n in spots for t in range(n)]
    return ids, torch.tensor(where, device=device), torch.tensor(targets, device=device), lengths


def main():
    p = data.parser(__doc__)
    p.add_argument("--data", default="styles", help="styles, alpaca, dolly, or a JSON / JSONL file in Alpaca's or Dolly's format")
    p.add_argument("--steps", type=data.number(int, 1), default=64, help="optimiser steps")
    p.add_argument("--batch_size", type=data.number(int, 1), default=8, help="examples per step, over all processes")
    p.add_argument("--lr", type=data.number(float, 0), help="peak learning rate; default: 2e-3, with --full 1e-4")
    p.add_argument("--warmup", type=data.number(float, 0, 1), default=0.1, help="share of the steps in which the learning rate rises; then a cosine to a tenth of it")
    p.add_argument("--weight_decay", type=data.number(float, 0), default=0.0, help="AdamW's")
    p.add_argument("--rank", type=data.number(int, 1), default=8, help="r, the adapter's rank")
    p.add_argument("--alpha", type=data.number(float, 0), default=16, help="the update is scaled by alpha / r")
    p.add_argument("--targets", default="all", help="layers that get an adapter, such as q_proj,v_proj; all: every linear layer of the blocks")
    p.add_argument("--dropout", type=data.number(float, 0, 0.99), default=0.0, help="dropout in front of A")
    p.add_argument("--share_nearest", type=data.number(float, 0, 1), default=0.7, help="share of training examples behind their nearest neighbour")
    p.add_argument("--share_random", type=data.number(float, 0, 1), default=0.1, help="share of training examples behind a random exemplar")
    p.add_argument("--shots", type=data.number(int, 1, 16), default=1, help="the most exemplars in front of a training example")
    p.add_argument("--max_tokens", type=data.number(int, 8), default=256, help="longest question + answer that is kept")
    p.add_argument("--eval_every", type=data.number(int, 1), default=32, help="steps between held-out losses and checkpoints")
    p.add_argument("--full", action="store_true", help="train every weight instead of an adapter; saved as a model folder in out/full")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = p.parse_args()
    if args.share_nearest + args.share_random > 1:
        p.error("--share_nearest and --share_random together exceed 1")
    if args.full:
        data.pointless(p, args, "--full", "rank", "alpha", "targets", "dropout")
    if args.lr is None:
        args.lr = 1e-4 if args.full else 2e-3
    if not args.share_nearest + args.share_random:
        data.pointless(p, args, "both shares of exemplars 0", "shots")

    # ---- load --------------------------------------------------------------------------------------
    ddp = data.Processes()
    if args.batch_size < ddp.world:
        p.error(f"--batch_size {args.batch_size} is less than the {ddp.world} processes")
    kind = "full" if args.full else "lora"
    folder, state_path = args.out / kind, args.out / f"last_{kind}.safetensors"
    settings = {k: str(v) if k == "out" else v for k, v in vars(args).items() if k not in ("resume", "threads", "device")}
    device, dtype = setup(args)
    examples = data.load_examples(args.data)  # a mistake in the data is found before a model is downloaded
    ddp.first(lambda: data.resolve_model(args.model))
    model = GPT.from_pretrained(args.model, dtype, device)
    enc = data.load_tokenizer(args.model)
    examples = data.keep_short(enc, examples, args.max_tokens, args.data)
    parts = data.split(examples, args.seed)
    train, val = parts["lora_train"], parts["lora_val"][:64]
    settings |= {"fingerprint": model.fingerprint, "template": data.TEMPLATE_VERSION, "n_train": len(train), "dtype": str(dtype), "rows": data.digest_rows(examples)}

    queries = [data.encode_query(enc, e) for e in train + val]
    answers = [data.encode_answer(enc, e) for e in train + val]
    between = data.encode(enc, data.BETWEEN)
    shares = args.share_nearest, args.share_random
    lengths = sorted(len(q) + len(a) + len(between) for q, a in zip(queries, answers))
    longest = sum(lengths[-1 - args.shots if any(shares) else -1:])
    if longest > model.config.n_ctx:
        raise data.UserError(f"--max_tokens {args.max_tokens} and --shots {args.shots} let a training example take {longest:,} tokens; the model's context is {model.config.n_ctx}")

    near = {}
    if args.share_nearest:
        h = matcher.cached_features(model, enc, train + val, "training questions")
        h = (h - h[:len(train)].mean(0)) / h[:len(train)].std(0).clamp(min=1e-6)
        nearest = matcher.select_nearest(h, h[:len(train)], None, args.shots + 1)  # + 1: it finds itself
        near = {i: [j for j in found if j != i][:args.shots] for i, found in enumerate(nearest)}

    if args.full:
        trainable = list(model.parameters())
    else:
        torch.manual_seed(args.seed)
        lora.inject(model, args.rank, args.alpha, args.targets, args.dropout)
        trainable = lora.parameters(model)
    n_train, n_all = sum(t.numel() for t in trainable), sum(t.numel() for t in model.parameters())
    print(f"{n_train:,} of {n_all:,} parameters train ({n_train / n_all:.2%}); {len(train):,} training and {len(val):,} held-out examples")

    # Small updates to a bfloat16 weight are rounded away, so the optimiser owns float32 copies of such weights.
    masters = [t if t.dtype == torch.float32 else t.detach().float().requires_grad_() for t in trainable]
    optimizer = torch.optim.AdamW(masters, lr=args.lr, weight_decay=args.weight_decay, betas=(0.9, 0.95) if args.full else (0.9, 0.999), fused=True)

    step, best, log = 0, float("inf"), []
    if args.resume and (saved := data.read_checkpoint(state_path, step=int, log=list, settings=dict)):
        tensors, saved = saved
        data.same_settings(settings, saved["settings"], state_path)
        with data.fitting(state_path), torch.no_grad():
            step, best, log = saved["step"], float("inf") if saved["best"] is None else float(saved["best"]), saved["log"]
            for i, (t, m) in enumerate(zip(trainable, masters)):
                m.copy_(tensors[f"{i}.weight"].view_as(m))
                t.copy_(m)
                optimizer.state[m] = {"step": torch.tensor(float(step), device=device), "exp_avg": tensors[f"{i}.m"].view_as(m).to(device),
                                      "exp_avg_sq": tensors[f"{i}.v"].view_as(m).to(device)}
        del tensors  # its weights are copied: with --full half a gigabyte, which would stay for the whole run
        print(f"resumed at step {step}")

    def learning_rate(step):
        warm = max(1, round(args.warmup * args.steps))
        if step < warm:
            return args.lr * (step + 1) / warm
        return args.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / max(1, args.steps - warm))))

    @torch.inference_mode()
    def held_out_loss():
        """Mean loss of an answer token of held-out questions, behind training exemplars in the training shares. The exemplars'
        own answers do not count: they are training answers, and the better memorised the longer training goes on."""
        model.eval()
        rows = list(range(len(train), len(train) + len(val)))
        exemplars = with_exemplars(rows, len(train), near, shares, args.shots, random.Random(0))
        order = sorted(range(len(rows)), key=lambda b: sum(len(queries[j]) for j in [*exemplars[b], rows[b]]))
        total = count = 0
        for s in range(0, len(order), 32):
            if some := order[s:s + 32][ddp.rank::ddp.world]:
                batch = make_batch([rows[b] for b in some], [exemplars[b] for b in some], queries, answers, between, device, exemplars_count=False)
                total, count = total + model.loss(*batch).item(), count + len(batch[2])
        total, count = ddp.sum([total, count])
        model.train()
        return total / count

    def checkpoint():
        tensors = {}
        for i, m in enumerate(masters):
            s = optimizer.state[m]
            tensors |= {f"{i}.weight": m.detach(), f"{i}.m": s["exp_avg"], f"{i}.v": s["exp_avg_sq"]}
        data.write_checkpoint(state_path, tensors, {"step": step + 1, "best": best if math.isfinite(best) else None, "log": log, "settings": settings})
        data.write_lines(args.out / f"log_{kind}.jsonl", log)

    def stopped(what):
        return data.UserError(data.halted(step, what, [train[i] for i in batches[step]], state_path) + "; try a smaller --lr")

    # ---- loop --------------------------------------------------------------------------------------
    interrupt = data.Interrupt()
    model.train()
    batches = draw_batches(len(train), args.batch_size, args.steps, args.seed)
    start, tokens = time.perf_counter(), 0
    bar = tqdm(range(step, args.steps), initial=step, total=args.steps, desc="LoRA" if not args.full else "SFT", disable=ddp.rank > 0)
    for step in bar:
        rng = random.Random(f"{args.seed} {step}")  # from the step's number: a resumed run draws the same
        torch.manual_seed((args.seed << 20) + step)
        exemplars = with_exemplars(batches[step], len(train), near, shares, args.shots, rng)
        n_tokens = sum(len(answers[j]) for i, front in zip(batches[step], exemplars) for j in [*front, i])
        mine = slice(ddp.rank, None, ddp.world)
        batch = make_batch(batches[step][mine], exemplars[mine], queries, answers, between, device)
        loss = model.loss(*batch) / n_tokens
        for t in trainable:
            t.grad = None
        loss.backward()
        ddp.sum_gradients(trainable)
        for t, m in zip(trainable, masters):
            m.grad = t.grad if m is t else t.grad.float()
        grad_norm = torch.nn.utils.clip_grad_norm_(masters, 1.0)
        loss = ddp.sum([loss.item()])[0]
        if not (math.isfinite(loss) and torch.isfinite(grad_norm)):
            raise stopped(f"loss {loss}, gradient norm {grad_norm.item()}")
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step)
        optimizer.step()
        for t, m in zip(trainable, masters):
            if m is not t:
                t.data.copy_(m)
        tokens += int(batch[3].sum()) * ddp.world
        seconds = time.perf_counter() - start
        row = {"step": step + 1, "loss": loss, "grad_norm": grad_norm.item(), "lr": learning_rate(step),
               "tokens_per_s": round(tokens / seconds), "seconds": round(seconds, 1)}
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            row["held_out"] = held_out_loss()
            if not math.isfinite(row["held_out"]):
                raise stopped(f"held-out loss {row['held_out']}")
            better = row["held_out"] < best
            best = min(best, row["held_out"])
            log.append(row)
            if ddp.rank == 0:
                if better and args.full:
                    model.save_pretrained(folder, model.folder)
                    data.write_json(folder / "pillow.json", settings)
                elif better:
                    lora.save(model, folder, args.model, settings)
                checkpoint()
            bar.write(f"step {step + 1:4d}  loss {loss:.3f}  held-out {row['held_out']:.3f}{'  (best: saved)' if better else ''}")
        else:
            log.append(row)
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tok/s")
        if ddp.sum([interrupt.requested])[0] and step + 1 < args.steps:
            if ddp.rank == 0:
                checkpoint()
            raise data.UserError(f"stopped after step {step + 1}, which is saved; go on with --resume")
    bar.close()
    if ddp.rank == 0:
        where = "" if args.out == p.get_default("out") else f" --out {args.out}"
        print(f"best held-out loss {best:.3f}; " + (f"model in {folder}" if args.full else f"adapter in {folder}; next: python train_matcher.py{where}"))


if __name__ == "__main__":
    data.run(main)
