"""
Fine-tune a language model with LoRA, on examples that have other examples in front of them.

    python train_lora.py                               # the default model on `styles`: -> out/lora
    python train_lora.py --data dolly --max_tokens 160
    python train_lora.py --data my.jsonl --model path/to/model
    python train_lora.py --full --share_nearest 0 --share_random 0    # full fine-tuning, to compare with
    torchrun --nproc_per_node=2 train_lora.py          # data-parallel, the same losses in float32

An ordinary LoRA (--share_nearest 0 --share_random 0) never sees an exemplar, so one in front of the question
is no help, or harms. Here training examples get one. Where rows name groups, or answers are labels, it can
show just what is asked for: each gets one alike in question and answer, so the LoRA learns to use what it is
shown; what to show is left to the matcher. On other data the nearest by BM25 stands in front of most, a
random one in front of some (which teaches when *not* to copy), none in front of the rest. The loss is on
answers and their end tokens only, the exemplars' too.
"""

import math
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

import data
import lora
import matcher as matching
from data import UserError
from model import GPT, pad, save, setup


@dataclass
class Texts:
    """Training examples, then held-out ones, as token ids, and what may stand in front of each."""

    questions: list  # ids of each question
    answers: list  # ids of each answer, end token last
    n: int  # how many are training examples; the others are held out
    near: Callable  # near(i): the examples nearest to i, nearest first
    shares: tuple  # share of examples that get their nearest in front, that get random ones
    shots: int
    enc: object

    def exemplars(self, rows, rng):
        """For each row its front: a list of the examples that stand in front of it, m at most."""
        fronts = []
        for i in rows:
            u, m, front = rng.random(), rng.randint(1, self.shots), []
            if u < self.shares[0]:
                front = self.near(i)
            elif u < sum(self.shares):
                front = [j for j in rng.sample(range(self.n), min(self.n, m + 1)) if j != i]
            fronts.append(front[:m])
        return fronts

    def batch(self, rows, fronts, device, train_on_exemplars=True):
        """-> ids (B, T), where (N,), targets (N,), lengths (B,): at the flat positions `where` the next token
        is an answer's, `targets`. An exemplar's answer counts while training: it is an example, too, and its
        forward pass is paid for. Its target ends with the end token, though the text goes on."""
        sequences, spots, targets = [], [], []
        between, begin = data.encode(self.enc, data.BETWEEN), len(self.enc.begin_ids)
        for b, (i, front) in enumerate(zip(rows, fronts)):
            ids = []
            for j in [*front, i]:
                ids = ids + between + self.questions[j][begin:] if ids else self.questions[j]
                if train_on_exemplars or j == i:
                    spots += [(b, t) for t, _ in enumerate(self.answers[j], len(ids) - 1)]  # t predicts t + 1
                    targets += self.answers[j]
                ids = ids + self.answers[j][:-1]  # the end token is a target, never an input
            sequences.append(ids)
        ids, lengths = pad(sequences, device)
        where = [b * ids.shape[1] + t for b, t in spots]
        return ids, torch.tensor(where, device=device), torch.tensor(targets, device=device), lengths


def draw_batches(n, batch_size, steps, seed):
    """Rows for every step: each epoch a new permutation, so that none is repeated before all were seen."""
    rng, drawn = random.Random(seed), steps * batch_size
    queue = [i for _ in range(math.ceil(drawn / n)) for i in rng.sample(range(n), n)]
    return [queue[s : s + batch_size] for s in range(0, drawn, batch_size)]


def learning_rate(step, steps, peak, warmup):
    """Rises for `warmup` of the steps, then falls as a cosine to a tenth of the peak."""
    warm = max(1, round(warmup * steps))
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / (steps - warm))))


@torch.inference_mode()
def held_out_loss(model, texts, ddp):
    """Mean loss per answer token of held-out questions, with exemplars in the training shares. The exemplars'
    own answers, without groups training answers, do not count: they are memorised as it goes on."""
    model.eval()
    rows = list(range(texts.n, len(texts.questions)))
    fronts = texts.exemplars(rows, random.Random(0))
    length = [sum(len(texts.questions[j]) for j in [*front, i]) for i, front in zip(rows, fronts)]
    order = sorted(range(len(rows)), key=length.__getitem__)
    total = count = 0
    for s in range(0, len(order), 32):
        if some := order[s : s + 32][ddp.rank :: ddp.world]:
            batch = texts.batch([rows[b] for b in some], [fronts[b] for b in some], model.device, False)
            total, count = total + model.loss(*batch).item(), count + len(batch[2])
    total, count = ddp.sum([total, count])
    model.train()
    return total / count


@dataclass
class Run:
    """A training run: what trains, and how."""

    model: GPT
    trainable: list
    masters: list  # float32 copies of bfloat16 weights, which would round small updates away
    optimizer: torch.optim.Optimizer

    def round(self):
        """The masters' values, rounded, into the weights that they are copies of."""
        for p, master in zip(self.trainable, self.masters):
            if p is not master:
                p.data.copy_(master)


def train(run, texts, log, args, ddp, keep):
    """From the log's last step on, with the held-out loss and a checkpoint every `eval_every` -> the best."""
    done, best = len(log), min((row["held_out"] for row in log if "held_out" in row), default=math.inf)
    batches, interrupt = draw_batches(texts.n, args.batch_size, args.steps, args.seed), data.Interrupt()
    start, tokens, model = time.perf_counter(), 0, run.model.train()
    bar = tqdm(total=args.steps, initial=done, desc="SFT" if args.full else "LoRA", disable=ddp.rank > 0)
    for step in range(done, args.steps):
        torch.manual_seed((args.seed << 20) + step)  # from the step's number: a resumed run draws the same
        rows = batches[step]
        fronts = texts.exemplars(rows, random.Random(f"{args.seed} {step}"))
        n = sum(len(texts.answers[j]) for i, front in zip(rows, fronts) for j in [*front, i])
        mine = slice(ddp.rank, None, ddp.world)  # each process takes its share of the batch
        batch = texts.batch(rows[mine], fronts[mine], model.device)
        loss = model.loss(*batch) / n
        model.zero_grad()
        loss.backward()
        ddp.sum_gradients(run.trainable)
        for p, master in zip(run.trainable, run.masters):
            master.grad = p.grad.float()
        grad_norm = torch.nn.utils.clip_grad_norm_(run.masters, 1.0)
        loss = ddp.sum([loss.item()])[0]
        if not math.isfinite(loss + grad_norm.item()):
            raise UserError(f"step {step + 1}: loss {loss}, gradient {grad_norm.item()}; try a smaller --lr")
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(step, args.steps, args.lr, args.warmup)
        run.optimizer.step()
        run.round()

        seconds = time.perf_counter() - start
        tokens += int(batch[3].sum()) * ddp.world
        row = {"step": step + 1, "loss": loss, "grad_norm": grad_norm.item(), "lr": group["lr"],
               "tokens_per_s": round(tokens / seconds), "seconds": round(seconds, 1)}
        log.append(row)
        bar.set_postfix_str(f"loss {loss:.3f}, {tokens / seconds:,.0f} tok/s")
        bar.update()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            row["held_out"] = held_out_loss(model, texts, ddp)
            if not math.isfinite(row["held_out"]):  # a checkpoint of this step would lead nowhere
                raise UserError(f"step {step + 1}: held-out loss {row['held_out']}; try a smaller --lr")
            if better := row["held_out"] < best:
                best = row["held_out"]
            keep(better)
            bar.write(f"step {step + 1:4d}  loss {loss:.3f}  held-out {row['held_out']:.3f}"
                      f"{'  (best: saved)' if better else ''}")
        if ddp.sum([interrupt.requested])[0] and step + 1 < args.steps:  # asked once: it may change any time
            keep()
            raise UserError(f"stopped after step {step + 1}, which is saved; go on with --resume")
    bar.close()
    interrupt.end()
    return best


# ---- plumbing: skip on a first reading -----------------------------------------------------------------


def read_flags():
    p, number = data.parser(__doc__), data.number
    p.add_argument("--data", default="styles", help="styles, alpaca, dolly, banking77, or a file of your own")
    p.add_argument("--steps", type=number(int, 1), default=64, help="optimiser steps")
    p.add_argument("--batch_size", type=number(int, 1), default=8, help="examples a step, over all processes")
    p.add_argument("--lr", type=number(float, 0), help="peak learning rate; default: 2e-3, with --full "
                   "1e-4; for 0.5 B parameters try 5e-4 and 5e-6")
    p.add_argument("--warmup", type=number(float, 0, 1), default=0.1, help="share of steps in which it rises")
    p.add_argument("--rank", type=number(int, 1, 4096), default=8, help="r, the adapter's rank")
    p.add_argument("--alpha", type=number(float, 0), default=16, help="the update is scaled by alpha / r")
    p.add_argument("--targets", default="all", help="layers with an adapter, as q_proj,v_proj")
    p.add_argument("--dropout", type=number(float, 0, 0.99), default=0.0, help="dropout in front of A")
    p.add_argument("--share_nearest", type=number(float, 0, 1), help="share behind their nearest (BM25); "
                   "default: 0.7, where rows name groups or answers are labels 1")
    p.add_argument("--share_random", type=number(float, 0, 1), help="share behind random ones; default: 0.1, "
                   "as far as the nearest leave it")
    p.add_argument("--shots", type=number(int, 1, 16), default=1, help="the most exemplars an example")
    p.add_argument("--max_tokens", type=number(int, 8), default=256, help="longest question + answer kept")
    p.add_argument("--eval_every", type=number(int, 1), default=32, help="steps between checkpoints")
    p.add_argument("--full", action="store_true", help="train every weight: a model folder in OUT/full")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = p.parse_args()
    if (args.share_nearest or 0) + (args.share_random or 0) > 1:
        p.error("--share_nearest and --share_random together exceed 1")
    if args.full:
        data.pointless(p, args, "--full", "rank", "alpha", "targets", "dropout")
    if args.lr is None:
        args.lr = 1e-4 if args.full else 2e-3
    if args.share_nearest == args.share_random == 0:
        data.pointless(p, args, "both shares of exemplars 0", "shots")
    return args, p


def load_texts(args, n_ctx, enc, parts):
    """Encode the LoRA's training and held-out examples, and find what may stand in front of each."""
    rows, n = parts["lora_train"] + parts["lora_val"][:64], len(parts["lora_train"])
    questions, answers = ([code(enc, e) for e in rows] for code in (data.encode_query, data.encode_answer))
    if args.share_nearest is None:
        args.share_nearest = min(1.0 if can_show_the_answer(rows) else 0.7, 1 - (args.share_random or 0))
    if args.share_random is None:
        args.share_random = min(0.1, 1 - args.share_nearest)
    shares = args.share_nearest, args.share_random
    between = len(data.encode(enc, data.BETWEEN))
    lengths = sorted(len(q) + len(a) + between for q, a in zip(questions, answers))
    if (longest := sum(lengths[-1 - args.shots * any(shares) :])) > n_ctx:
        raise UserError(f"--max_tokens {args.max_tokens} and --shots {args.shots} let an example take "
                        f"{longest:,} tokens; the model's context is {n_ctx}")
    return Texts(questions, answers, n, neighbours(rows, n, args.shots), shares, args.shots, enc)


def can_show_the_answer(rows):
    """Whether one row can show just what another asks for: they name groups, or their answers are labels."""
    return all("group" in e for e in rows) or data.are_labels(rows, rows)


def neighbours(rows, n, shots):
    """-> near(i), row i's nearest other examples by BM25. Of `rows` the first n are for training.

    They are alike in the question or, where one can show the answer, in question, answer and the shape of
    numbers (every digit a 0). Where rows name a group they are of the same one, and held out if row i is;
    else all are training examples. By words, not by features: so no example has to be read first."""
    grouped, members = all("group" in e for e in rows), {}  # {kind: the rows that may stand in front of it}
    kinds = [(e["group"], i < n) if grouped else None for i, e in enumerate(rows)]
    texts = [data.query_text(e) for e in rows]
    if can_show_the_answer(rows):
        texts = [re.sub(r"\d", "0", text + e["output"]) for text, e in zip(texts, rows)]
    for i, kind in enumerate(kinds):
        if grouped or i < n:  # a held-out answer is never trained on, not even in front of another
            members.setdefault(kind, []).append(i)
    bm25 = {kind: matching.BM25([texts[j] for j in some]) for kind, some in members.items()}

    def near(i):
        others = members[kinds[i]]
        [picks] = bm25[kinds[i]].select([texts[i]], [[j != i for j in others]], shots)
        return [others[j] for j in picks]

    return near


def prepare(model, args):
    """Choose what trains, and its optimiser -> Run."""
    if args.full:
        trainable = list(model.parameters())
    else:
        torch.manual_seed(args.seed)
        lora.inject(model, args.rank, args.alpha, args.targets, args.dropout)
        trainable = lora.parameters(model)
    masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in trainable]
    betas = (0.9, 0.95) if args.full else (0.9, 0.999)
    optimizer = torch.optim.AdamW(masters, lr=args.lr, weight_decay=0.0, betas=betas, fused=True)
    return Run(model, trainable, masters, optimizer)


def main():
    args, p = read_flags()
    ddp = data.Processes()
    if args.batch_size < ddp.world:
        p.error(f"--batch_size {args.batch_size} is less than the {ddp.world} processes")
    kind = "full" if args.full else "lora"
    folder, path = args.out / kind, args.out / f"last_{kind}.safetensors"
    device, dtype = setup(args, ddp)
    ddp.first(lambda: data.fetch_examples(args.data))
    examples = data.load_examples(args.data)  # a mistake in the data is found before a model is downloaded
    ddp.first(lambda: data.resolve_model(args.model))
    model, enc = GPT.from_pretrained(args.model, dtype, device), data.load_tokenizer(args.model)
    examples = data.keep_short(enc, examples, args.max_tokens, args.data)
    texts = load_texts(args, model.config.n_ctx, enc, data.split(examples, args.seed))
    run = prepare(model, args)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "resume", "threads", "device")}
    settings |= {"fingerprint": model.fingerprint, "template": data.TEMPLATE_VERSION, "n_train": texts.n,
                 "dtype": str(dtype), "rows": data.digest_rows(examples)}
    n, everything = (sum(t.numel() for t in ps) for ps in (run.trainable, model.parameters()))
    print(f"{n:,} of {everything:,} parameters train ({n / everything:.2%}); {texts.n:,} training and "
          f"{len(texts.questions) - texts.n:,} held-out examples")
    log, masters = [], {str(i): master for i, master in enumerate(run.masters)}
    if args.resume and (state := data.resume_run(path, masters, run.optimizer, settings)):
        log = state["log"]
        run.round()

    def keep(better=False):
        if ddp.rank > 0:
            return
        if better and args.full:
            save(model, folder)
            data.write_json(folder / "pillow.json", settings)
        elif better:
            lora.save(model, folder, data.origin(args.model), settings)
        data.save_run(path, masters, run.optimizer, log, settings)

    best = train(run, texts, log, args, ddp, keep)
    after = "" if args.full else f"; next: python train_matcher.py --out {args.out}"
    print(f"best held-out loss {best:.3f}, in {folder}{after}")


if __name__ == "__main__":
    data.run(main)
