"""
Make a row of README's Results again, by the commands that it prints.

    python .ci/results.py styles --seed 1
    python .ci/results.py banking77 --per 10       # the pool: 10 exemplars a label
    python .ci/results.py new_labels               # Banking77, split by label: those of the test are new;
                                                   # then a matcher is trained on questions about new ones
    python .ci/results.py dolly --data my.jsonl    # a file of the same fields in place of the download
    python .ci/results.py alpaca --big             # 494 M parameters
    python .ci/results.py dolly --probe            # on training questions: what could a choice of eight gain?
    python .ci/results.py styles --features        # the nearest by features of the base model, of the tuned

Everything goes to out/ROW-SEED (and a name for what else was asked for), where a run that was cut short is
gone on with. Dolly and Alpaca take an ordinary LoRA, which never saw an exemplar; --exemplars: our default.
"""

import argparse
import collections
import shlex
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
import torch

import data
import matcher as matching
import rl
import train_matcher
from model import GPT

BIG = "Qwen/Qwen2.5-Coder-0.5B-Instruct"
ORDINARY = "--share_nearest 0 --share_random 0"


def run(script, flags):
    print("$ python", script, flags, flush=True)
    if status := subprocess.run([sys.executable, script, *shlex.split(flags)]).returncode:
        sys.exit(status)  # the script has said why


def few_a_label(rows, few):
    """The first `few` rows of each label."""
    kept, count = [], collections.Counter()
    for e in rows:
        count[e["output"]] += 1
        if count[e["output"]] <= few:
            kept.append(e)
    return kept


def pool_of(source, args):
    """The LoRA-training part of a source, as train_lora.py will split it."""
    rows = data.keep_short(data.load_tokenizer(args.model), data.load_examples(source), 256)
    return data.split(rows, args.seed)["pool"]


def train(out, args):
    """The scripts in turn: LoRA, full fine-tuning to compare with unless `sft` is None, the matcher."""
    common = f"--seed {args.seed} --out {out.as_posix()} --model {shlex.quote(args.model)} --resume"
    source, lora, sft, pool = args.data or args.row, "", None, None
    matcher = "--n_test 800"  # all there are: narrower intervals than by default
    few = args.big and not torch.cuda.is_available()  # of everything: on a CPU 494 M take hours
    if args.row == "banking77":
        sft = None if args.per > 2 else "--lr 1e-4" if args.big else "--lr 3e-4"
        pool = few_a_label(pool_of(source, args), args.per)
        if few:
            matcher = "--n_train 3000 --n_test 400"
    elif args.row == "new_labels":
        source, sft = f"{out.as_posix()}/rows.json", "--lr 3e-4"
        rows = few_a_label(data.load_examples(args.data or "banking77"), 45)
        rows = [e | {"group": e["output"]} for e in rows]
        data.write_json(source, rows)
    elif args.row != "styles":
        lora, sft = "" if args.exemplars else ORDINARY, "--lr 5e-6" if args.big else ""
        matcher += " --n_answers 200"
        if few:
            matcher = "--n_train 400 --steps 20 --n_val 64 --n_test 240 --n_answers 30 --oracle 1"
        if few or args.row == "alpaca":
            pool = pool_of(source, args)[: 1000 if few else 4000]
    if args.big:
        lora += " --lr 5e-4"
    if few:
        matcher += " --cache_gb 2.5"
    if pool:
        data.write_json(out / "pool.json", pool)
        matcher += f" --pool {out.as_posix()}/pool.json"
    tuning = f"--data {shlex.quote(source)} {common} --steps {args.steps} --eval_every {args.steps // 2}"
    run("train_lora.py", f"{tuning} {lora}")
    if sft is not None:
        run("train_lora.py", f"{tuning} --full {ORDINARY} {sft}")
        matcher += f" --sft {out.as_posix()}/full"
    matcher += f" --memo {out.as_posix()}/memo.jsonl"  # a comparison that was cut short, too, is gone on with
    run("train_matcher.py", f"{common} {matcher}")
    if args.row == "new_labels":  # the LoRA knows none of these; the matcher learns from questions about them
        parts = data.split(rows, args.seed)
        new = train_matcher.unknown(rows, parts["lora_train"] + parts["lora_val"])
        data.write_json(out / "new.json", [e | {"group": None} for e in new])
        o = out.as_posix()
        run("train_matcher.py", f"{common} {matcher} --out {o}/taught --lora {o}/lora --data {o}/new.json")


def load(out, **flags):
    """What train_matcher.load makes of the row in `out`."""
    sys.argv = ["train_matcher.py", "--out", str(out)]
    for name, value in flags.items():
        sys.argv += [f"--{name}", str(value)]
    if (out / "pool.json").exists():
        sys.argv += ["--pool", str(out / "pool.json")]
    return train_matcher.load(*train_matcher.read_flags(), data.Processes())[1:]


def features(out):
    """The nearest neighbour, untrained, on validation questions: by which features is it the best?"""
    task, settings, *_ = load(out, n_train=1, n_val=300, n_test=1)
    questions, allowed, rewards = task.questions["val"], task.allowed["val"], {}
    base = GPT.from_pretrained(settings["model"], task.env.model.embed.weight.dtype, task.env.model.device)
    h = matching.cached_features(base, task.env.enc, task.pool + questions, "the base model")
    h_pool, h = h[: task.pool_sizes["val"]], h[len(task.pool) :]
    z = {}
    for name, pool, asked in (("base", h_pool, h), ("tuned", task.h_pool("val"), task.h["val"])):
        m = matching.Matcher(pool.shape[1])
        m.standardise(pool)
        z[name] = m.z(asked), m.z(pool)
    z["both"] = [torch.cat(each, -1) for each in zip(*z.values())]
    for name, (asked, pool) in z.items():
        picks = matching.select_nearest(asked, pool, allowed, task.shots)
        rewards[name] = task.env.score(task.reward, questions, picks, name)
        print(f"{name:6s} {rewards[name].mean():.3f}")
    for name in ("base", "both"):
        print("tuned minus {}: {:+.3f} [{:+.3f}, {:+.3f}]".format(
            name, *rl.bootstrap(rewards["tuned"] - rewards[name])))


def probe(out, k=8):
    """How much of what the best of the k nearest gains over the nearest can a judge find: one that knows
    likeness, rank and length, and one that has seen the reference, too?"""
    task, *_ = load(out, n_train=400, n_val=1, n_test=1)
    n = len(task.questions["train"])
    questions, h_pool, pool = task.questions["train"], task.h_pool("train"), task.pool
    m = matching.Matcher(h_pool.shape[1])
    m.standardise(h_pool)
    z, z_pool = m.z(task.h["train"]), m.z(h_pool)
    near = np.array(matching.select_nearest(z, z_pool, task.allowed["train"], k))  # (n, k)
    R = np.stack([task.env.score({"logprob": 1}, questions, near[:, [j]].tolist(), f"rank {j + 1}")
                  for j in range(k)], 1)  # (n, k)

    def blind(i, j):
        alike = matching.similarity(z[[i]], z_pool, [[near[i, j]]]).item()
        return alike, np.log1p(j), np.log1p(len(pool[near[i, j]]["output"]))

    def seeing(i, j):
        ours, theirs = pool[near[i, j]]["output"], questions[i]["output"]
        a, b = rl.words(ours), rl.words(theirs)
        return (*blind(i, j), rl.rouge_l(ours, theirs), abs(np.log1p(len(ours)) - np.log1p(len(theirs))),
                len(set(a) & set(b)) / (1 + len(set(b))), float(a[:1] == b[:1]))

    def judge(sees, ridge=10):
        """Five-fold ridge regression on R, all centred within a question: gain of its choice over the
        nearest."""
        X = np.array([[sees(i, j) for j in range(k)] for i in range(n)])  # (n, k, features)
        X, Y = (X - X.mean(1, keepdims=True)) / X.std((0, 1)), R - R.mean(1, keepdims=True)
        gain = np.zeros(n)
        for held in (np.arange(n) % 5 == fold for fold in range(5)):
            A, y = X[~held].reshape(-1, X.shape[-1]), Y[~held].ravel()
            w = np.linalg.solve(A.T @ A + ridge * np.eye(A.shape[1]), A.T @ y)
            gain[held] = R[held, (X[held] @ w).argmax(1)] - R[held, 0]
        return gain

    found = {"the best of eight": R.max(1) - R[:, 0], "any of the eight": R.mean(1) - R[:, 0],
             "a judge of likeness, rank, length": judge(blind),
             "a judge that has seen the reference": judge(seeing)}
    for what, gain in found.items():
        print("{} minus the nearest: {:+.3f} [{:+.3f}, {:+.3f}]".format(what, *rl.bootstrap(gain)))


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("row", choices=["styles", "banking77", "new_labels", "dolly", "alpaca"])
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--per", type=int, default=2, help="exemplars a label")
    p.add_argument("--data", help="a file in place of the download")
    p.add_argument("--model", help="another model")
    p.add_argument("--big", action="store_true", help=f"the settings for 494 M; model: {BIG}")
    p.add_argument("--exemplars", action="store_true", help="a LoRA that has seen exemplars")
    p.add_argument("--steps", type=int, default=64, help="of LoRA and SFT")
    p.add_argument("--probe", action="store_true", help="after the row was made: judges of its exemplars")
    p.add_argument("--features", action="store_true", help="after the row was made: whose features are best")
    args = p.parse_args()
    name = f"{args.row}-{args.seed}" + f"-{args.per}" * (args.per > 2)
    name += f"-{args.steps}steps" * (args.steps != 64)
    out = Path("out") / (name + "-big" * args.big + "-exemplars" * args.exemplars)
    args.model = args.model or (BIG if args.big else "smollm2-135m")
    probe(out) if args.probe else features(out) if args.features else train(out, args)


if __name__ == "__main__":
    data.run(main)
