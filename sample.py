"""
Ask the LoRA-tuned model a question; the matcher puts exemplars in front of it.

    python sample.py --prompt "You write for Hazel. Write the date the way Hazel does." --input "2021-03-09"
    python sample.py --prompt "..." --compare            # the same question under every selector, side by side
    python sample.py --pool my_pool.jsonl                # your exemplars; questions from the terminal
    python sample.py --prompt "..." --select none --temperature 0.8 --top_k 40 --seed 1

Without --prompt it reads questions from standard input until it ends, a line each ("question" or
"question ||| input"). It shows the exemplars it chose with their probabilities, then streams the answer.
"""

import contextlib
import sys
from pathlib import Path

import numpy as np
import torch

import data
import lora
import rl
from matcher import BM25, Matcher, as_lists, cached_features, entries_by_question, forbidden, limits_of, pool_features, read_settings, select_nearest, select_random
from model import GPT, setup

SELECTORS = ("pillow", "knn", "bm25", "random", "none")


def visible(text):
    """Text for the terminal: control characters (colours, cursor movements) are shown, not obeyed."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


def choose(select, matcher, query, h, asking, keys, bm25, shots, rng):
    """-> (pool indices, their probabilities or None) for one query; h (1, C), asking = entries_by_question(pool), keys: of the pool, from matcher.prompts."""
    mask = forbidden([query], asking, len(keys[0]))
    if select == "none":
        return [], None
    if select == "random":
        return select_random(mask, shots, rng)[0], None
    if select == "bm25":
        return bm25.select([data.query_text(query)], mask, shots)[0], None
    if select == "knn":
        return select_nearest(matcher.z(h), keys[2], mask, shots)[0], None
    with torch.no_grad():
        picks, probs = matcher.act(h, keys, shots, **limits_of(matcher, h, keys, mask))
    return as_lists(picks)[0], probs[0].tolist()


def main():
    p = data.parser(__doc__)
    p.add_argument("--prompt", help="the question or instruction; without it, questions are read from standard input")
    p.add_argument("--input", default="", help="text the instruction is about")
    p.add_argument("--pool", help="JSON / JSONL file of exemplars; default: the pool the matcher was trained with")
    p.add_argument("--lora", help="folder of the adapter; default: OUT/lora")
    p.add_argument("--shots", type=data.number(int, 1, 16), help="the most exemplars; default: as the matcher was trained")
    p.add_argument("--select", choices=SELECTORS, default="pillow", help="who chooses the exemplars")
    p.add_argument("--compare", action="store_true", help="answer under every selector, one after the other")
    p.add_argument("--temperature", type=data.number(float, 0, 100), default=0.0, help="0: the likeliest token, always; above: sampling")
    p.add_argument("--top_k", type=data.number(int, 0), default=0, help="sample among the k likeliest tokens only; 0: all")
    p.add_argument("--max_new_tokens", type=data.number(int, 1), default=128, help="length limit of the answer")
    args = p.parse_args()
    if args.prompt is not None and not args.prompt.strip():
        p.error("--prompt is empty")
    if args.input and args.prompt is None:
        p.error("--input needs --prompt")
    if args.compare:
        data.pointless(p, args, "--compare", "select")
    elif args.select == "none":
        data.pointless(p, args, "--select none", "pool", "shots")
    if not args.temperature:
        data.pointless(p, args, "--temperature 0", "top_k")
    selectors = SELECTORS if args.compare else [args.select]

    # ---- load ----------------------------------------------------------------------------------------
    lora_folder, folder = Path(args.lora or args.out / "lora"), args.out / "matcher"
    if not (lora_folder / "adapter_config.json").exists():
        raise data.UserError(f"{lora_folder}: no adapter there yet; run python train_lora.py --out {args.out} first")
    settings = read_settings(folder)
    matcher, _ = Matcher.load(folder)
    pool = data.load_examples(args.pool or folder / "pool.json", "--pool")
    shots = args.shots or settings["shots"]
    if shots > len(pool):
        raise data.UserError(f"--shots {shots} is more than the pool's {len(pool)} exemplars")
    name = settings["model"] if args.model == p.get_default("model") else args.model
    device, dtype = setup(args)
    model, enc = GPT.from_pretrained(name, dtype, device), data.load_tokenizer(name)
    adapter = lora.digest(lora_folder)
    if (settings["fingerprint"], settings["adapter"]) != (model.fingerprint, adapter):
        raise data.UserError(f"{folder}: this matcher was trained with another model or adapter; run python train_matcher.py again")
    with torch.no_grad():
        keys = matcher.prompts(pool_features(enc, pool, cached_features(model, enc, pool, "the pool")), single=True)
    for module in model.modules():
        module.packing = False  # the weights change twice a question (see `ask`): to pack them anew takes longer than it saves
    lora.load(model, lora_folder)
    lora.merge(model)
    asking, bm25 = entries_by_question(pool), BM25([data.query_text(e) for e in pool]) if "bm25" in selectors else None
    env = rl.Environment(model, enc, pool, args.max_new_tokens, block=1)  # a question at a time asks for few exemplars: none is worked out beside them
    rng = np.random.default_rng(args.seed)

    def answer(query, h, select):
        picks, probs = choose(select, matcher, query, h, asking, keys, bm25, shots, rng)
        before = env.dropped
        first, ids = env.prompt(query, picks, args.max_new_tokens)
        picks = picks[:len(picks) - (env.dropped - before)]
        if env.dropped > before:
            print(f"({env.dropped - before} of {env.dropped - before + len(picks)} exemplars left out: the question and {args.max_new_tokens} new tokens leave no room)")
        print(f"\n[{select}]" + ("" if picks else " no exemplar"))
        for n, j in enumerate(picks):
            chance = f"  p = {probs[n]:.2f}" if probs else ""
            e = pool[j]
            print(visible(f"  {n + 1}. {e['instruction']}" + (f" | {e['input']}" if e["input"] else "") + f" -> {e['output']}")[:300] + chance)
        shown, tokens = "", []

        def show(_, token):
            """Print what is certain so far: a character may be spread over several tokens."""
            nonlocal shown
            tokens.append(token)
            text = data.decode(enc, tokens).decode("utf-8", errors="ignore")
            print(visible(text[len(shown):]), end="", flush=True)
            shown = text

        print("> ", end="", flush=True)
        model.generate([ids], args.max_new_tokens, args.temperature, enc.end_ids, args.top_k or None, seed=args.seed,
                       prefixes=[first], prefix_cache=env.prefix_cache, on_token=show)
        print(flush=True)

    def ask(question, text):
        query = {"instruction": question.strip(), "input": text.strip(), "output": ""}
        if any(data.quote(part) != part for part in query.values()):
            print("(lines that look like a section heading were quoted, so that they stay part of the question)")
        env.prompt(query, [], args.max_new_tokens)  # a question that is too long by itself is refused here
        with lora.bare(model):  # features come from the model without its adapter, answers from the two merged
            h = model.features([data.encode_query(enc, query)])
        for select in selectors:
            answer(query, h, select)

    # ---- ask -----------------------------------------------------------------------------------------
    if args.prompt is not None:
        return ask(args.prompt, args.input)
    if sys.stdin.isatty():
        print("question, or question ||| input; end with Ctrl-D (Ctrl-Z on Windows)")
    with contextlib.suppress(KeyboardInterrupt):  # a way to end a conversation, too
        for line in sys.stdin:
            if line.strip():
                question, _, text = line.partition("|||")
                try:
                    ask(question, text)
                except data.UserError as e:  # one bad question does not end the conversation
                    print(visible(f"error: {e}"), file=sys.stderr)


if __name__ == "__main__":
    data.run(main)
