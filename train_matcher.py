"""
Train the matching network with REINFORCE, then compare it with every other way of choosing exemplars.

    python train_matcher.py                          # after train_lora.py: -> out/matcher, out/results.json
    python train_matcher.py --pool my_pool.jsonl     # your own exemplars
    python train_matcher.py --data my_new.jsonl      # new questions and exemplars, the LoRA as it is
    python train_matcher.py --shots 3                # up to three exemplars a question
    python train_matcher.py --eval_only              # the comparison again, with the matcher already trained
    torchrun --nproc_per_node=2 train_matcher.py     # rollouts shared out over processes

Data, split and model come from the adapter in out/lora, so nothing that the LoRA was trained on is asked
here (nor with --data). Features are the LoRA-tuned model's, computed once. Where answers are labels, a
rehearsal without the model is all the training there is by default (see `rehearse`). The matcher kept has the
best greedy reward on validation questions; test questions are opened once, at the end, for all selectors.
"""

import copy
import functools
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import lora
import matcher as matching
import rl
from data import UserError
from model import GPT, setup


@dataclass
class Task:
    """What there is to choose from, what is asked, and who answers. Parts are "train", "val" and "test"."""

    pool: list  # exemplars; a part chooses from the first pool_sizes[part], see `data.split_groups`
    questions: dict  # {part: examples}
    h: dict  # {part, or "pool": features (N, C)}
    pool_sizes: dict  # {part: n}; the same for all, but that groups bring exemplars of their own
    env: rl.Environment
    reward: dict  # {name: weight}
    shots: int

    def __post_init__(self):
        # {part: (N, n) bool}: the exemplars that each question may get, before `narrow` and any pick
        self.allowed = {part: matching.allowed_exemplars(questions, self.pool[: self.pool_sizes[part]])
                        for part, questions in self.questions.items()}

    @property
    def headline(self):
        """The metric that decides the comparison: the reward's first part, but "exact" in place of "prob"."""
        first = next(iter(self.reward))
        return "exact" if first == "prob" else first

    def h_pool(self, part):
        return self.h["pool"][: self.pool_sizes[part]]


# ---- the loop --------------------------------------------------------------------------------------


def reinforce(task, matcher, optimizer, rng, batch_size, rollouts, score):
    """One update, on B training questions with K rollouts each -> its figures. score(questions, picks) ->
    their rewards, (B K,): the task's, or in rehearsal those of copying."""
    rows = torch.randperm(len(task.questions["train"]), generator=rng)[:batch_size]
    h = task.h["train"][rows]  # (B, C)
    encoded = matcher.encode(task.h_pool("train"))
    allowed = matcher.narrow(h, encoded, task.allowed["train"][rows])  # (B, n)
    picks = matcher.sample(h, encoded, allowed, task.shots, rollouts, rng)  # (B, K, m)
    questions = [task.questions["train"][i] for i in rows for _ in range(rollouts)]
    chosen = matching.as_lists(picks)
    rewards = torch.from_numpy(score(questions, chosen)).view(len(rows), -1)  # (B, K)

    advantage = rl.leave_one_out(rewards)
    log_pi, entropy = matcher.log_prob(h, encoded, picks, allowed)  # (B, K)
    loss = -(advantage * log_pi).mean() + rl.entropy_floor(entropy)
    optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(matcher.parameters(), 1.0, error_if_nonfinite=True)
    optimizer.step()
    return {"reward": rewards.mean().item(), "loss": loss.item(),
            # the share of questions whose rollouts all earned the same
            "no_signal": (rewards == rewards[:, :1]).all(1).double().mean().item(),
            "entropy": entropy.mean().item(), "grad_norm": grad_norm.item(), "calls": len(task.env.asked),
            **rl.collapse_figures(chosen)}


def train(task, matcher, optimizer, log, args, keep):
    """REINFORCE from the log's last step on; every `eval_every` steps the matcher is validated and saved."""
    interrupt, start, ddp = data.Interrupt(), time.perf_counter(), task.env.ddp
    [group], score = optimizer.param_groups, functools.partial(task.env.score, task.reward)
    done, best = log[-1]["step"], max(row["held_out"] for row in log if "held_out" in row)
    bar = tqdm(total=args.steps, initial=done, desc="REINFORCE", disable=ddp.rank > 0)
    for step in range(done, args.steps):
        rng = torch.Generator().manual_seed((args.seed << 20) + step)  # a resumed run draws the same
        group["lr"] = args.lr * (1 - step / args.steps)  # late updates, mostly noise, move less
        row = {"step": step + 1, "lr": group["lr"],
               **reinforce(task, matcher, optimizer, rng, args.batch_size, args.rollouts, score),
               "seconds": round(time.perf_counter() - start, 1)}
        log.append(row)
        bar.set_postfix_str(f"reward {row['reward']:.3f}, entropy {row['entropy']:.2f}, {row['calls']} calls")
        bar.update()
        if (step + 1) % args.eval_every == 0 or step + 1 == args.steps:
            row |= validate(task, matcher) | {"calls": len(task.env.asked)}  # validation asks, too
            if better := row["held_out"] > best:
                best = row["held_out"]
            keep(better)
            bar.write(f"step {step + 1:4d}  reward {row['reward']:.3f}  validation {row['held_out']:.3f}"
                      f"{'  (best: saved)' if better else ''}  entropy {row['entropy']:.2f}  "
                      f"no exemplar for {row['held_out_figures']['none']:.0%}")
        if ddp.sum([interrupt.requested])[0] and step + 1 < args.steps:
            keep()
            raise UserError(f"stopped after step {step + 1}, which is saved; go on with --resume")
    bar.close()
    interrupt.end()


def begin(task, matcher, args):
    """Where REINFORCE starts -> the log: on free text it stops where a threshold would, its scale suits the
    pool, it is rehearsed if that helps, and validated."""
    matcher.standardise(task.h_pool("train"))
    # stop_prior None (free text): *stop* starts as the tuned threshold; 0 (short answers): hardly ever
    if args.stop_prior is None:
        matcher.stop_below(threshold_on_training(task, matcher))
    h, encoded = task.h["train"][:256], matcher.encode(task.h_pool("train"))
    allowed = matcher.narrow(h, encoded, task.allowed["train"][:256])
    matcher.sharpen(h, encoded, allowed)
    if args.stop_prior:
        matcher.set_stop_prior(args.stop_prior, h, encoded, allowed)
    row = validate(task, matcher)
    print(f"step    0  validation {row['held_out']:.3f} (untrained)")
    if args.rehearsal:
        before = copy.deepcopy(matcher.state_dict())
        rehearse(task, matcher, args.rehearsal, args.seed)
        rehearsed = validate(task, matcher)
        print(f"step    0  validation {rehearsed['held_out']:.3f} (rehearsed)")
        if rehearsed["held_out"] < row["held_out"]:
            matcher.load_state_dict(before)
        else:
            row = rehearsed
    return [{"step": 0} | row | {"calls": len(task.env.asked)}]


def rehearse(task, matcher, steps, seed):
    """REINFORCE against a model that only copies the exemplar's answer; the real one is not asked.

    Where answers are labels this tells most of what a choice is worth, and it is free: the language model's
    rewards are dear, so few, and few are mostly noise."""
    optimizer, score = torch.optim.Adam(matcher.parameters()), functools.partial(rl.copying, task.pool)
    for step in tqdm(range(steps), desc="rehearsal", disable=task.env.ddp.rank > 0):
        rng = torch.Generator().manual_seed((seed << 20) + step)
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        reinforce(task, matcher, optimizer, rng, batch_size=64, rollouts=8, score=score)


@torch.no_grad()
def validate(task, matcher):
    """Greedy reward on validation questions, and whether the policy has collapsed."""
    encoded = matcher.encode(task.h_pool("val"))
    picks = matching.select_likeliest(matcher, task.h["val"], encoded, task.allowed["val"], task.shots)
    reward = task.env.score(task.reward, task.questions["val"], picks, "validation").mean()
    return {"held_out": float(reward), "held_out_figures": rl.collapse_figures(picks)}


# ---- the comparison, on questions never seen ---------------------------------------------------------


def threshold_on_training(task, matcher):
    """The similarity above which training questions, the first 200, gain by their nearest exemplar."""
    h, questions, allowed = (x["train"][:200] for x in (task.h, task.questions, task.allowed))
    z, z_pool = matcher.z(h), matcher.z(task.h_pool("train"))
    near = matching.select_nearest(z, z_pool, allowed, task.shots)
    behind, alone = (task.env.score(task.reward, questions, p, "threshold") for p in (near, [[]] * len(near)))
    return matching.tune_threshold(matching.similarity(z, z_pool, near), torch.from_numpy(behind - alone))


def oracle(task, matcher, chosen, best, tried):
    """For each test question the best of all selectors' choices and its `tried` nearest, reference in hand.
    best (N,): the highest score so far; where nothing can be better, the neighbours are not tried."""
    z, z_pool = matcher.z(task.h["test"]), matcher.z(task.h_pool("test"))
    near = matching.select_nearest(z, z_pool, task.allowed["test"], tried)
    perfect = 0 if task.headline == "logprob" else 1  # the highest score there is
    tries = [[picks[b] for picks in chosen.values()] + [[j] for j in near[b] if best[b] < perfect]
             for b in range(len(near))]
    questions = [q for q, some in zip(task.questions["test"], tries) for _ in some]
    scores = task.env.score({task.headline: 1.0}, questions, sum(tries, []), "oracle")
    ends = np.cumsum([len(some) for some in tries])
    return [some[int(np.argmax(scores[end - len(some) : end]))] for some, end in zip(tries, ends)]


@torch.no_grad()
def compare(task, matcher, threshold, args, sft):
    """-> ({selector: {metric: (N,) array}}, {selector: picks})."""
    test, logprob = task.questions["test"], "logprob" in task.reward
    answered = min(args.n_answers, len(test)) if task.headline == "logprob" else len(test)
    # {metric: how many of the test questions}
    metrics = dict.fromkeys(rl.SCORES, answered) | ({"logprob": len(test)} if logprob else {})

    def measure(env, picks, what):
        return {x: env.score({x: 1.0}, test[:n], picks[:n], f"test: {what}") for x, n in metrics.items()}

    fixed = rl.best_fixed(task.env, task.reward, task.questions["train"], task.allowed["train"], args.seed)
    encoded, allowed = matcher.encode(task.h_pool("test")), task.allowed["test"]
    bm25 = matching.BM25([data.query_text(e) for e in task.pool])
    selectors = matching.selectors(matcher, encoded, bm25, test, task.h["test"], allowed, task.shots,
                                   threshold, args.seed)
    chosen = {selector: choose() for selector, choose in selectors.items()}
    chosen["fixed"] = [[j for j in fixed if row[j]][: task.shots] for row in allowed]
    scores = {selector: measure(task.env, picks, selector) for selector, picks in chosen.items()}
    best = np.max([by_metric[task.headline] for by_metric in scores.values()], 0)
    chosen["oracle"] = oracle(task, matcher, chosen, best, args.oracle)
    scores["oracle"] = measure(task.env, chosen["oracle"], "oracle")
    if sft:
        name = f"{sft.fingerprint} {sft.embed.weight.dtype}"
        env = rl.Environment(sft, task.env.enc, [], args.max_new_tokens, name, args.memo, ddp=task.env.ddp)
        scores["sft"] = measure(env, [[]] * len(test), "sft")
    return scores, chosen


@torch.no_grad()
def swap_pool(task, matcher):
    """PILLOW's promise is another pool and nothing retrained. Where the pool grows: how nearest neighbour and
    matcher do when only exemplars that training and validation never saw may be chosen."""
    old = task.pool_sizes["val"]
    if old == len(task.pool):
        return {}
    h, encoded, allowed = task.h["test"], matcher.encode(task.h["pool"][old:]), task.allowed["test"][:, old:]
    chosen = {"knn": matching.select_nearest(matcher.z(h), encoded.z, allowed, task.shots),
              "pillow": matching.select_likeliest(matcher, h, encoded, allowed, task.shots)}
    return {selector: task.env.score({task.headline: 1.0}, task.questions["test"],
                                     [[j + old for j in row] for row in picks], "swapped pool").mean().item()
            for selector, picks in chosen.items()}


# ---- plumbing: skip on a first reading -----------------------------------------------------------------


def summarise(task, scores, chosen):
    """The figures of results.json that come from the comparison."""
    test = task.questions["test"]
    pairs = [("pillow", s) for s in scores if s not in ("pillow", "oracle")] + [("knn", "none")]
    groups = [e["group"] for e in test] if all("group" in e for e in test) else None  # they share exemplars

    def interval(metric, a, b):
        difference = scores[a][metric] - scores[b][metric]
        return rl.bootstrap(difference, groups and groups[: len(difference)])

    paired = {metric: {f"{a}-{b}": interval(metric, a, b) for a, b in pairs} for metric in scores["none"]}
    mean = {s: {metric: x.mean().item() for metric, x in found.items()} for s, found in scores.items()}
    none, pillow, best = (mean[s][task.headline] for s in ("none", "pillow", "oracle"))
    n = len(scores["none"]["exact"])
    answers = task.env.outcomes("answer", test[:n], chosen["pillow"][:n])  # [text, cut short?], remembered
    return {"n_test": len(test), "n_answers": n, "headline": task.headline,
            "metrics": mean, "paired": paired[task.headline], "paired_by_metric": paired,
            "gap_closed": (pillow - none) / (best - none) if best > none else None,
            "collapse": rl.collapse_figures(chosen["pillow"]), "n_pool": len(task.pool),
            "n_matcher_train": len(task.questions["train"]),
            "dropped_exemplars": sum(task.env.prompt(q, picks, task.env.new_tokens(task.reward, q))[2]
                                     for q, picks in zip(test, chosen["pillow"])),
            "cut_answers": sum(cut for _, cut in answers),
            "empty_answers": sum(not text for text, _ in answers),
            "empty_references": sum(not e["output"] for e in test)}


def report(r):
    """Print results.json as a table."""
    words = f" ({r['n_answers']} of them answered in words)" if r["n_answers"] < r["n_test"] else ""
    print(f"\n{r['n_test']} test questions{words}, {r['llm_calls']:,} calls to train")
    metrics = list(r["metrics"]["none"])
    print("selector  ", *(f"{x:>9s}" for x in metrics), f"  pillow minus it ({r['headline']}, 95 %)")
    for selector, means in r["metrics"].items():
        mean, low, high = r["paired"].get(f"pillow-{selector}", [None] * 3)
        minus = "" if mean is None else f"   {mean:+.3f}  [{low:+.3f}, {high:+.3f}]"
        print(f"{selector:10s}" + "".join(f"{means[x]:10.3f}" for x in metrics) + minus)
    if r["gap_closed"] is not None:
        print(f"gap closed between none and oracle: {r['gap_closed']:.2f}")
    if swapped := r["swapped_pool"]:
        print("from exemplars never seen before:", *(f"{who} {x:.3f}" for who, x in swapped.items()))


# what the flags default to: for short answers, where these are labels, and with logprob in the reward
SHORT = {"n_train": 6000, "steps": 180, "batch_size": 8, "lr": 1e-3, "eval_every": 60, "candidates": 0,
         "stop_prior": 0.0, "rehearsal": 0}
LABELS = SHORT | {"steps": 0, "rehearsal": 1000}  # after which real rewards added nothing that showed
FREE_TEXT = {"n_train": 2000, "steps": 60, "batch_size": 32, "lr": 4e-4, "eval_every": 10, "candidates": 8,
             "stop_prior": None, "rehearsal": 0}


def read_flags():
    p, number = data.parser(__doc__), data.number

    def depends(name, kind, text):
        labels = f", where they are labels {LABELS[name]}" if LABELS[name] != SHORT[name] else ""
        text += f"; default: for short answers {SHORT[name]}{labels}, for free text {FREE_TEXT[name]}"
        p.add_argument(f"--{name}", type=kind, help=text)

    p.add_argument("--data", help="other questions and exemplars than those of the LoRA's data, new labels "
                   "for example; what the LoRA was trained on is left out")
    p.add_argument("--pool", help="file of exemplars to choose from; default: those of the data")
    p.add_argument("--lora", help="folder of the adapter; default: OUT/lora")
    p.add_argument("--shots", type=number(int, 1, 16), default=1, help="the most exemplars a question")
    p.add_argument("--reward", type=rl.parse_reward, help="of the reference: prob (p of the whole) or "
                   "logprob (log p per token); of an answer: exact or rouge; or a mix, rouge:0.5,logprob:0.5"
                   "; default: prob if answers are short, else logprob")
    depends("n_train", number(int, 1), "training questions, at most")
    depends("steps", number(int, 0), "REINFORCE steps")
    depends("batch_size", number(int, 1), "questions a step")
    depends("lr", number(float, 0, 1), "Adam's learning rate at the start; it falls to zero")
    depends("eval_every", number(int, 1), "steps between checkpoints")
    depends("candidates", number(int, 0), "choose among the nearest so many exemplars; 0: all")
    p.add_argument("--stop_prior", type=number(float, 0, 0.99), help="probability of stopping at once before "
                   "anything is learnt; default: 0, so *stop* is hardly ever tried; with the reward logprob "
                   "the policy starts as the tuned threshold")
    depends("rehearsal", number(int, 0), "updates before those, without the model: is the exemplar's answer "
            "the reference?")
    p.add_argument("--rollouts", type=number(int, 2), default=4, help="K, rollouts a question")
    p.add_argument("--hidden", type=number(int, 1, 65536), default=256, help="width of both MLPs")
    p.add_argument("--max_new_tokens", type=number(int, 1), default=48, help="length limit of an answer")
    p.add_argument("--n_val", type=number(int, 1), default=96, help="validation questions, at most")
    p.add_argument("--n_test", type=number(int, 1), default=256, help="test questions, at most")
    p.add_argument("--n_answers", type=number(int, 1), default=256,
                   help="of these, how many are answered in words where likelihood decides")
    p.add_argument("--oracle", type=number(int, 0), default=2, help="nearest exemplars that the oracle tries")
    p.add_argument("--cache_gb", type=number(float, 0), default=1.0, help="memory for the exemplars' cache")
    p.add_argument("--memo", help="JSONL file of outcomes shared between runs with the same adapter")
    p.add_argument("--sft", help="a fully fine-tuned model, out/full, to compare with")
    p.add_argument("--eval_only", action="store_true", help="no training: compare with OUT/matcher; "
                   "what is not typed, but --lora, is as it was trained")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = p.parse_args()
    if args.eval_only:
        training = [name for name in SHORT if name != "n_train"]  # by those the threshold is tuned again
        data.pointless(p, args, "--eval_only", "resume", "rollouts", "hidden", "n_val", *training)
    return args, p


def settle(p, made_with, examples, pool):
    """Parse again: what is not typed is as `made_with` says, else as suits these examples."""
    short = np.median([len(e["output"]) for e in examples]) <= 40  # characters
    p.set_defaults(**{"reward": "prob" if short else "logprob"} | made_with)
    labels = data.are_labels(examples, pool)
    kind = FREE_TEXT if "logprob" in p.parse_args().reward else LABELS if labels else SHORT
    p.set_defaults(**kind | made_with)
    return p.parse_args()


def read_adapter(folder, out):
    """What the adapter in `folder` says of the data, split and model it was trained with."""
    if not (folder / "adapter_config.json").exists():
        raise UserError(f"{folder}: no adapter there yet; run python train_lora.py --out {out} first")
    match data.read_json(folder / "adapter_config.json", dict).get("pillow"):
        case {"data": str(), "seed": int(), "max_tokens": int(), "fingerprint": str(), "model": str(),
              "rows": str()} as adapter:
            return adapter
    raise UserError(f"{folder}: made by another program; train one with train_lora.py")


def read_matcher(folder, adapter):
    """The settings of a matcher whose training has ended, as they would be typed now, and its "llm_calls"."""
    settings = matching.load(folder)[1]
    if "llm_calls" not in settings:
        raise UserError(f"{folder}: its training did not end; go on with --resume")
    reward = ",".join(f"{name}:{weight}" for name, weight in settings["reward"].items())
    settings |= {"reward": reward, "dtype": settings["dtype"].removeprefix("torch.")}
    if settings.get("rows") == adapter["rows"]:
        settings["data"] = adapter["data"]  # however they were called then
    if settings.get("pool"):
        settings["pool"] = str(folder / "pool.json")  # the file it was may be gone
    return settings


def load_sft(folder, model, adapter, ddp):
    """The fully tuned model, if it is of the same shape, tokenizer and split."""
    ddp.first(lambda: data.resolve_model(folder))
    sft = GPT.from_pretrained(folder, model.embed.weight.dtype, model.device)
    its, ours = ((x.config, data.digest_file(x.folder / "tokenizer.json"), data.end_ids(x.folder))
                 for x in (sft, model))
    if its != ours:
        raise UserError(f"--sft {folder}: its shape or tokenizer is not that of the adapter's model")
    if (sft.folder / "pillow.json").exists():
        made_with = data.read_json(sft.folder / "pillow.json", dict)
        if any(made_with.get(k) != adapter[k] for k in ("seed", "rows")):  # these two make the split
            raise UserError(f"--sft {folder}: trained on another split than the adapter")
    return sft


def load(args, p, ddp):
    """-> (flags, task, settings of the run, the SFT model or None, what else results.json says)."""
    folder = Path(args.lora or args.out / "lora")
    adapter = read_adapter(folder, args.out)
    made_with = {"data": adapter["data"], "model": adapter["model"]}
    if args.eval_only:
        made_with |= read_matcher(args.out / "matcher", adapter)
    args.data, args.pool = args.data or made_with["data"], args.pool or made_with.get("pool")
    ddp.first(lambda: [data.fetch_examples(name) for name in (adapter["data"], args.data, args.pool)])
    trained_on = data.load_examples(adapter["data"], f"{folder} was trained on")
    examples = trained_on if args.data == adapter["data"] else data.load_examples(args.data)
    own_pool = data.load_pool(args.pool) if args.pool else None
    args = settle(p, made_with, examples, own_pool or examples)
    device, dtype = setup(args, ddp)
    ddp.first(lambda: data.resolve_model(args.model))
    model, enc = GPT.from_pretrained(args.model, dtype, device), data.load_tokenizer(args.model)
    if adapter["fingerprint"] != model.fingerprint:
        raise UserError(f"{folder}: made for {adapter['model']}, whose weights are not those of {args.model} "
                        "here, or by another version; train it again")
    parts, kept = divide(args, enc, trained_on, examples, adapter, folder)
    pool, digest = own_pool or parts["pool"], lora.digest(folder)
    made_from = {"rows": data.digest_rows(kept), "lora_seed": adapter["seed"], "dtype": str(dtype),
                 "fingerprint": model.fingerprint, "adapter": digest, "template": data.TEMPLATE_VERSION,
                 "pool_size": len(pool), "pool_rows": data.digest_rows(pool)}
    if any(made_with.get(k, made_from[k]) != made_from[k] for k in ("rows", "fingerprint", "adapter")):
        raise UserError(f"{args.out / 'matcher'}: trained on other rows, or with another model or adapter; "
                        "train it again")
    sft = load_sft(args.sft, model, adapter, ddp) if args.sft else None

    questions = {"train": parts["matcher_train"][: args.n_train], "val": parts["val"][: args.n_val],
                 "test": parts["test"][: args.n_test]}
    pool_sizes = dict.fromkeys(questions, len(pool)) if own_pool else parts["pool_sizes"]
    every = [q for part in questions.values() for q in part]
    lora.load(model, folder)
    lora.merge(model)  # features and rollouts at the speed of the plain model
    h = matching.cached_features(model, enc, pool + every, "pool and questions", digest)
    h = dict(zip(["pool", *questions], h.split([len(pool), *map(len, questions.values())])))
    env = rl.Environment(model, enc, pool, args.max_new_tokens, f"{model.fingerprint} {digest} {dtype}",
                         args.memo, cache_bytes=int(args.cache_gb * 2**30), ddp=ddp)
    for question in every:  # one that is too long is found now
        env.prompt(question, [], env.new_tokens(args.reward, question))
    places = ("out", "resume", "threads", "device", "eval_only", "memo", "sft", "cache_gb")
    settings = {k: v for k, v in vars(args).items() if k not in places} | made_from
    about = {k: settings[k] for k in ("model", "data", "shots", "seed", "dtype")}
    about["examples"] = {"read": len(examples), "kept": len(kept), "max_tokens": adapter["max_tokens"]}
    return args, Task(pool, questions, h, pool_sizes, env, args.reward, args.shots), settings, sft, about


def divide(args, enc, trained_on, examples, adapter, folder):
    """Split the LoRA's data as it was, or --data less what the LoRA was trained on -> (parts, rows split)."""
    kept = data.keep_short(enc, trained_on, adapter["max_tokens"], adapter["data"])
    if data.digest_rows(kept) != adapter["rows"]:
        raise UserError(f"{adapter['data']}: not the rows that {folder} was trained on, so some of those "
                        "would be test questions now; train it again")
    parts = data.split(kept, adapter["seed"])
    if examples is not trained_on:
        kept = data.keep_short(enc, examples, adapter["max_tokens"], args.data)
    if data.digest_rows(kept) != adapter["rows"]:  # other questions, not the same under another name
        parts = data.split(unknown(kept, parts["lora_train"] + parts["lora_val"]), adapter["seed"])
    return parts, kept


def unknown(examples, known):
    """The examples whose question, and whose group, is none of those of `known`."""
    asked, groups = {data.question_key(e) for e in known}, {str(e["group"]) for e in known if "group" in e}
    return [e for e in examples
            if data.question_key(e) not in asked and ("group" not in e or str(e["group"]) not in groups)]


def train_and_save(task, args, settings):
    """Train, from the last checkpoint with --resume; OUT/matcher holds the best by validation reward."""
    folder, path, env = args.out / "matcher", args.out / "last_matcher.safetensors", task.env
    torch.manual_seed(args.seed)
    matcher = matching.Matcher(task.h["pool"].shape[1], args.hidden, args.candidates)
    optimizer = torch.optim.Adam(matcher.parameters(), lr=args.lr)
    tensors = matcher.state_dict(keep_vars=True)

    def keep(better=False):
        if env.ddp.rank > 0:
            return
        if better:
            matching.save(matcher, folder, settings)
        memo = {k: env.memo[k] for k in sorted(env.asked)}  # what else a --memo knows, it keeps
        data.save_run(path, tensors, optimizer, log, settings, memo=memo)

    free = "n_test", "n_answers", "oracle"  # of the comparison: a run that goes on may have others
    if args.resume and (state := data.resume_run(path, tensors, optimizer, settings, free)):
        log, env.asked, env.memo = state["log"], set(state["memo"]), env.memo | state["memo"]
    else:
        log = begin(task, matcher, args)
        if env.ddp.rank == 0:
            path.unlink(missing_ok=True)  # --resume must not go on from one that an earlier run left
            data.write_json(folder / "pool.json", task.pool)
    if log[-1]["step"] == 0:
        keep(better=True)
    train(task, matcher, optimizer, log, args, keep)
    settings["llm_calls"] = len(env.asked)
    env.ddp.gather(None)  # wait for the files of the first


def main():
    args, p = read_flags()
    ddp, start = data.Processes(), time.perf_counter()
    args, task, settings, sft, about = load(args, p, ddp)
    if not args.eval_only:
        train_and_save(task, args, settings)
    matcher, _ = matching.load(args.out / "matcher")  # the best, not the last
    settings["threshold"] = threshold_on_training(task, matcher)  # pool or reward may be new
    if not args.eval_only and ddp.rank == 0:
        matching.save(matcher, args.out / "matcher", settings)  # with the threshold, for sample.py
    trained = time.perf_counter() - start
    scores, chosen = compare(task, matcher, settings["threshold"], args, sft)
    seconds = {"train": round(trained, 1), "all": round(time.perf_counter() - start, 1)}
    results = about | summarise(task, scores, chosen) | {
        "swapped_pool": swap_pool(task, matcher), "llm_calls": settings["llm_calls"], "seconds": seconds,
        "threshold": settings["threshold"], "peak_memory_mb": data.peak_memory(), "settings": settings}
    if ddp.rank == 0:
        data.write_json(args.out / "results.json", results)
        report(results)


if __name__ == "__main__":
    data.run(main)
