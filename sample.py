"""
Ask the LoRA-tuned model a question; the matcher puts exemplars in front of it.

    python sample.py --prompt "You write for Hazel. Put this date in Hazel style." --input "2021-03-09"
    python sample.py --prompt "..." --compare            # the same question under every selector
    python sample.py --prompt "..." --explain            # why: the likeliest exemplars and *stop*
    python sample.py --pool my_pool.jsonl                # your exemplars; questions from the terminal
    python sample.py --prompt "..." --select none --temperature 0.8 --top_k 40 --seed 1

Without --prompt it reads questions from standard input until it ends, a line each ("question" or
"question ||| input"). It shows the exemplars it chose with their probabilities, then streams the answer.
"""

import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import data
import lora
import matcher as matching
import rl
from data import UserError, visible
from model import GPT, setup

SELECTORS = ("pillow", "knn", "threshold", "bm25", "random", "none")


@dataclass
class Chooser:
    """What choosing needs beside the pool: the matcher, and the other selectors' settings."""

    matcher: matching.Matcher
    encoded: matching.Encoded
    bm25: matching.BM25
    shots: int
    threshold: float
    rng: np.random.Generator  # of the random selector, over a whole conversation


def ask(env, chooser, question, args):
    """Answer one question under the selector, or under each of them with --compare."""
    if any(data.quote(text) != text for text in question.values()):
        print("(lines that look like a section heading were quoted, so that they stay part of the question)")
    env.prompt(question, [], args.max_new_tokens)  # one that is too long by itself is refused here
    h = env.model.features([data.encode_query(env.enc, question)])  # (1, C)
    matcher, encoded, shots = chooser.matcher, chooser.encoded, chooser.shots
    allowed = matching.allowed_exemplars([question], env.pool)  # (1, n)
    selectors = matching.selectors(matcher, encoded, chooser.bm25, [question], h, allowed, shots,
                                   chooser.threshold, chooser.rng)
    for select in SELECTORS if args.compare else [args.select]:
        if select == "pillow":  # as its selector does, for its probabilities, too
            narrowed = matcher.narrow(h, encoded, allowed)
            picks, chances = matcher.play(h, encoded, narrowed, shots)
            [picks], [chances] = matching.as_lists(picks), chances.tolist()
        else:
            [picks], chances = selectors[select](), []
        print(f"\n[{select}]" + ("" if picks else " no exemplar"))
        if select == "pillow" and args.explain:
            explain(matcher, env.pool, h, encoded, narrowed)
        if select == "pillow" and picks:
            likeness = matching.similarity(matcher.z(h), encoded.z, selectors["knn"]()).item()
            if likeness < chooser.threshold:
                print(f"(the nearest exemplar's similarity is {likeness:.2f}; on training questions "
                      f"exemplars helped above {chooser.threshold:.2f})")
        answer(env, question, picks, chances, args)


def explain(matcher, pool, h, encoded, allowed, k=5):
    """The policy's first choice: the k likeliest exemplars, their similarity and rank as neighbours."""
    [p] = matcher.first_choice(h, encoded, allowed)  # (n + 1,)
    cosine = torch.cosine_similarity(matcher.z(h), encoded.z).masked_fill(~allowed[0], -1.0)  # (n,)
    print("        p  similarity  rank")
    for j in p[:-1].topk(min(k, int(allowed.sum()))).indices.tolist():
        rank = 1 + int((cosine > cosine[j]).sum())
        print(f"    {p[j]:5.3f}  {cosine[j]:10.3f}  {rank:4d}  {line(pool[j])}")
    print(f"    {p[-1]:5.3f}                    stop")


def answer(env, question, picks, chances, args):
    """Show the exemplars that fit, then stream the answer."""
    first, ids, left_out = env.prompt(question, picks, args.max_new_tokens)
    if left_out:
        print(f"({left_out} of {len(picks)} left out: no room beside {args.max_new_tokens} new tokens)")
    for n, j in enumerate(picks[: len(picks) - left_out]):
        print(f"  {n + 1}. {line(env.pool[j])}" + (f"  p = {chances[n]:.2f}" if chances else ""))
    shown, tokens = "", []

    def show(_, token):
        """Print what is certain so far: a character may be spread over several tokens."""
        nonlocal shown
        tokens.append(token)
        text = data.decode(env.enc, tokens).decode("utf-8", errors="ignore")
        print(visible(text[len(shown) :]), end="", flush=True)
        shown = text

    print("> ", end="", flush=True)
    env.model.generate([ids], args.max_new_tokens, args.temperature, env.enc.end_ids, args.top_k,
                       seed=args.seed, prefixes=[first], prefix_cache=env.prefix_cache, on_token=show)
    print(flush=True)


def line(exemplar):
    middle = f" | {exemplar['input']}" if exemplar["input"] else ""
    return visible(f"{exemplar['instruction']}{middle} -> {exemplar['output']}")[:300]


# ---- plumbing: skip on a first reading -----------------------------------------------------------------


def read_flags():
    p = data.parser(__doc__)
    p.add_argument("--prompt", help="the question; without it, questions are read from standard input")
    p.add_argument("--input", default="", help="text the instruction is about")
    p.add_argument("--pool", help="file of exemplars; default: the pool the matcher was trained with")
    p.add_argument("--lora", help="folder of the adapter; default: OUT/lora")
    p.add_argument("--shots", type=data.number(int, 1), help="the most exemplars; default: as in training")
    p.add_argument("--select", choices=SELECTORS, default="pillow", help="who chooses the exemplars")
    p.add_argument("--compare", action="store_true", help="answer under every selector, one after the other")
    p.add_argument("--explain", action="store_true", help="show the policy behind the matcher's choice")
    p.add_argument("--temperature", type=data.number(float, 0), default=0.0, help="0: the likeliest token")
    p.add_argument("--top_k", type=data.number(int, 0), default=0, help="sample among the likeliest; 0: all")
    p.add_argument("--max_new_tokens", type=data.number(int, 1), default=128, help="limit of the answer")
    args = p.parse_args()
    if args.prompt is not None and not args.prompt.strip():
        p.error("--prompt is empty")
    if args.input and args.prompt is None:
        p.error("--input needs --prompt")
    if args.compare:
        data.pointless(p, args, "--compare", "select")
    elif args.select != "pillow":
        useless = ["explain", "pool", "shots"] if args.select == "none" else ["explain"]
        data.pointless(p, args, f"--select {args.select}", *useless)
    if not args.temperature:
        data.pointless(p, args, "--temperature 0", "top_k")
    return args, p


@torch.no_grad()
def load(args, p):
    """-> (environment, chooser)."""
    lora_folder, folder = Path(args.lora or args.out / "lora"), args.out / "matcher"
    matcher, settings = matching.load(folder)
    p.set_defaults(model=settings["model"], shots=settings["shots"])  # what is not typed
    args = p.parse_args()
    pool = data.load_pool(args.pool or folder / "pool.json")
    device, dtype = setup(args)
    model, enc = GPT.from_pretrained(args.model, dtype, device), data.load_tokenizer(args.model)
    digest = lora.digest(lora_folder)
    if (settings["fingerprint"], settings["adapter"]) != (model.fingerprint, digest):
        raise UserError(f"{folder}: of another model or adapter; run train_matcher.py --out {args.out}")
    lora.load(model, lora_folder)
    lora.merge(model)
    encoded = matcher.encode(matching.cached_features(model, enc, pool, "the pool", digest))
    env = rl.Environment(model, enc, pool, args.max_new_tokens, block=1)  # only the chosen one
    bm25, rng = matching.BM25([data.query_text(e) for e in pool]), np.random.default_rng(args.seed)
    return env, Chooser(matcher, encoded, bm25, args.shots, settings.get("threshold", -1.0), rng)


@torch.no_grad()
def main():
    args, p = read_flags()
    env, chooser = load(args, p)
    if args.prompt is not None:
        return ask(env, chooser, {"instruction": args.prompt, "input": args.input, "output": ""}, args)
    terminal = sys.stdin.isatty()
    if terminal:
        print("question, or question ||| input; end with Ctrl-D (Ctrl-Z on Windows)")
    with contextlib.suppress(KeyboardInterrupt, EOFError):  # both end a conversation
        while True:
            typed = input("\n? " if terminal else "")
            if typed.strip():
                text, _, more = typed.partition("|||")
                try:
                    question = {"instruction": text.strip(), "input": more.strip(), "output": ""}
                    ask(env, chooser, question, args)
                except UserError as error:  # one bad question does not end the conversation
                    print(visible(f"error: {error}"), file=sys.stderr)


if __name__ == "__main__":
    data.run(main)
