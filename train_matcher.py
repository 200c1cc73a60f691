"""
Train the matching network with REINFORCE, then compare it with every other way of choosing exemplars.

    python train_matcher.py                          # after train_lora.py: -> out/matcher, out/results.json
    python train_matcher.py --pool my_pool.jsonl     # your own exemplars
    python train_matcher.py --shots 3                # up to three exemplars a question
    python train_matcher.py --eval_only              # the comparison again, with the matcher already trained
    torchrun --nproc_per_node=2 train_matcher.py     # rollouts shared out over processes

Data, split and model come from the adapter in out/lora, so that nothing the LoRA was trained on is ever a
training, validation or test question here. Features of pool and questions are computed once and cached. The
checkpoint kept is the one with the best greedy reward on validation questions; test questions are
opened once, at the end, for all selectors together.
"""

import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import lora
import rl
from matcher import (BM25, Matcher, as_lists, cached_features, choose_greedily, entries_by_question, forbidden, limits_of, pool_features, read_settings, select_nearest,
                     select_random)
from model import GPT, setup


def choose_all(matcher, pool, queries, h_pool, h, mask, shots, fixed, seed):
    """{selector: list of picks per query} for every selector but the oracle. mask (B, n): see `forbidden`."""
    z_pool, z = matcher.z(h_pool), matcher.z(h)
    return {"none": [[] for _ in queries], "random": select_random(mask, shots, seed),
            "bm25": BM25([data.query_text(e) for e in pool]).select([data.query_text(q) for q in queries], mask, shots),
            "knn": select_nearest(z, z_pool, mask, shots), "fixed": [[j for j in fixed if not row[j]][:shots] for row in mask],
            "pillow": choose_greedily(matcher, h, h_pool, mask, shots)}


def main():
    p = data.parser(__doc__)
    p.add_argument("--pool", help="JSON / JSONL file of exemplars to choose from; default: the pool of the data (see data.split)")
    p.add_argument("--lora", help="folder of the adapter; default: OUT/lora")
    p.add_argument("--shots", type=data.number(int, 1, 16), help="the most exemplars in front of a question; default: 1, with --eval_only as the matcher was trained")
    p.add_argument("--reward", help="exact, rouge, logprob, or a mix such as rouge:0.5,logprob:0.5 (the comparison goes by the first); default: exact for styles, else logprob; with --eval_only as the matcher was trained")
    p.add_argument("--steps", type=data.number(int, 0), default=80, help="REINFORCE steps")
    p.add_argument("--batch_size", type=data.number(int, 1), default=16, help="questions a step")
    p.add_argument("--rollouts", type=data.number(int, 2), default=4, help="K, rollouts a question (the baseline needs two)")
    p.add_argument("--lr", type=data.number(float, 0), default=1e-3, help="Adam's learning rate")
    p.add_argument("--hidden", type=data.number(int, 1, 65536), default=256, help="width of the towers")
    p.add_argument("--candidates", type=data.number(int, 0), default=0, help="let the policy choose among the nearest so many only; 0: the whole pool")
    p.add_argument("--entropy_floor", type=data.number(float, 0), default=0.3, help="nats of policy entropy below which it is held back")
    p.add_argument("--entropy_weight", type=data.number(float, 0), default=0.05, help="how strongly")
    p.add_argument("--stop_prior", type=data.number(float, 0, 0.99), default=0.0, help="probability of stopping at once before anything is learnt; 0: next to none")
    p.add_argument("--no_stop", action="store_true", help="take the stop action away: always --shots exemplars")
    p.add_argument("--ordinary_init", action="store_true", help="towers that do not start as the identity (for comparison)")
    p.add_argument("--max_new_tokens", type=data.number(int, 1), help="length limit of an answer; default: 48, with --eval_only as the matcher was trained")
    p.add_argument("--eval_every", type=data.number(int, 1), default=10, help="steps between validations and checkpoints")
    p.add_argument("--n_train", type=data.number(int, 1), help="use only so many matcher-train questions")
    p.add_argument("--n_val", type=data.number(int, 1), default=96, help="validation questions, at most")
    p.add_argument("--n_test", type=data.number(int, 1), default=800, help="test questions, at most")
    p.add_argument("--n_answers", type=data.number(int, 1), default=800, help="of these, how many count for ROUGE-L and exact match when the likelihood decides: answering takes longest")
    p.add_argument("--oracle", type=data.number(int, 0), default=4, help="the oracle tries so many nearest exemplars for each question, and every other selector's choice")
    p.add_argument("--cache_gb", type=data.number(float, 0), default=1.0, help="memory for the exemplars' keys and values (0.02 MB a token for the default model)")
    p.add_argument("--memo", help="JSONL file of outcomes shared between runs with the same adapter")
    p.add_argument("--sft", help="folder of a fully fine-tuned model (train_lora.py --full), compared without exemplars")
    p.add_argument("--eval_only", action="store_true", help="no training, whatever its flags say: compare with the matcher in OUT/matcher, and with its pool; writes OUT/results.json anew")
    p.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    args = p.parse_args()
    if args.eval_only and args.resume:
        p.error("--resume has nothing to go on with under --eval_only")
    if args.no_stop:
        data.pointless(p, args, "--no_stop", "stop_prior")
    folder, state_path, matcher_settings = args.out / "matcher", args.out / "last_matcher.safetensors", {}
    if args.eval_only:
        matcher_settings = read_settings(folder)
        if args.seed == p.get_default("seed"):
            args.seed = matcher_settings["seed"]
        if not args.pool and matcher_settings["pool"]:
            args.pool = folder / "pool.json"  # the file it was may be gone
    args.shots = args.shots or matcher_settings.get("shots", 1)
    args.max_new_tokens = args.max_new_tokens or matcher_settings.get("max_new_tokens", 48)
    if 0 < args.candidates < args.shots:
        p.error(f"--candidates {args.candidates} are fewer than --shots {args.shots}")
    ddp = data.Processes()
    start = time.perf_counter()

    # ---- load: adapter first, it says which data, split and model it was made with ---------------------
    lora_folder = Path(args.lora or args.out / "lora")
    if not (lora_folder / "adapter_config.json").exists():
        raise data.UserError(f"{lora_folder}: no adapter there yet; run python train_lora.py --out {args.out} first")
    adapter_settings = data.read_json(lora_folder / "adapter_config.json", dict).get("pillow")
    if not data.has(adapter_settings, data=str, seed=int, max_tokens=int, fingerprint=str, model=str):
        raise data.UserError(f"{lora_folder}: this adapter does not say which data it was trained on; train it with train_lora.py")
    name = adapter_settings["model"] if args.model == p.get_default("model") else args.model
    default_reward = ",".join(f"{k}:{v}" for k, v in matcher_settings["reward"].items()) if matcher_settings else "exact" if adapter_settings["data"] == "styles" else "logprob"
    weights = rl.parse_reward(args.reward or default_reward)
    headline = next(iter(weights))  # of a mix, the first: it decides the comparison
    examples = data.load_examples(adapter_settings["data"], f"{lora_folder} was trained on")
    own_pool = data.load_examples(args.pool, "--pool") if args.pool else None
    device, dtype = setup(args)
    ddp.first(lambda: data.resolve_model(name))
    model, enc = GPT.from_pretrained(name, dtype, device), data.load_tokenizer(name)
    if adapter_settings["fingerprint"] != model.fingerprint:
        raise data.UserError(f"{lora_folder}: the adapter was made for {adapter_settings['model']} ({adapter_settings['fingerprint']}), not for {name} ({model.fingerprint})")
    short = data.keep_short(enc, examples, adapter_settings["max_tokens"], adapter_settings["data"])
    if adapter_settings.get("rows", same := data.digest_rows(short)) != same:
        raise data.UserError(f"{adapter_settings['data']}: no longer the rows that the adapter in {lora_folder} was trained on, so some of those would be test questions now; train it again")
    parts = data.split(short, adapter_settings["seed"])
    train, val, test = parts["matcher_train"][:args.n_train], parts["val"][:args.n_val], parts["test"][:args.n_test]
    pool = own_pool or parts["pool"]
    sizes = dict.fromkeys(("train", "val", "test"), len(pool)) if own_pool else parts["pool_sizes"]
    if args.shots > sizes["train"]:
        raise data.UserError(f"--shots {args.shots} is more than the pool's {sizes['train']} exemplars")

    # what does not fit or is too long is found now, not after the training
    sft = GPT.from_pretrained(args.sft, dtype, device) if args.sft else None
    if sft and (sft.config != model.config or data.digest_file(sft.folder / "tokenizer.json") != data.digest_file(model.folder / "tokenizer.json")):
        raise data.UserError(f"--sft {args.sft}: its shape or tokenizer is not that of {name}, from which it should have been tuned")
    if sft and (sft.folder / "pillow.json").exists():
        sft_settings = data.read_json(sft.folder / "pillow.json", dict)
        for k in ("seed", "rows"):  # these two make the split
            if k in adapter_settings and sft_settings.get(k) != adapter_settings[k]:
                raise data.UserError(f"--sft {args.sft}: trained with {k} = {sft_settings.get(k)!r}, the adapter with {adapter_settings[k]!r}: test questions here may be its training questions")
    for question in train + val + test:
        rl.prompt_room(model, enc, question, args.max_new_tokens)

    everything = pool + train + val + test
    h = cached_features(model, enc, everything, "pool and questions")
    h_pool, h_train, h_val, h_test = h.split([len(pool), len(train), len(val), len(test)])
    h_pool = pool_features(enc, pool, h_pool)
    lora.load(model, lora_folder)
    lora.merge(model, keep_base=False)  # rollouts run at the speed of the plain model
    adapter = lora.digest(lora_folder)
    env = rl.Environment(model, enc, pool, args.max_new_tokens, f"{model.fingerprint} {adapter} {dtype}", args.memo, cache_bytes=int(args.cache_gb * 2**30), ddp=ddp)

    c, tokens = model.config, sum(map(len, env.prefix_cache.entries))
    whole = 2 * c.n_layer * c.n_kv_head * c.head_dim * dtype.itemsize * tokens / 2**30
    if whole > args.cache_gb and ddp.rank == 0:
        print(f"keys and values of the whole pool take {whole:.1f} GB, --cache_gb holds {args.cache_gb:g}: many may be worked out again and again; --cache_gb {math.ceil(whole)} is faster where memory allows")

    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items() if k not in ("resume", "threads", "device", "eval_only", "memo", "sft", "cache_gb")}
    settings |= {"model": name, "data": adapter_settings["data"], "lora_seed": adapter_settings["seed"], "reward": weights, "fingerprint": model.fingerprint,
                 "adapter": adapter, "template": data.TEMPLATE_VERSION, "pool_size": len(pool), "pool_rows": data.digest_rows(pool), "dtype": str(dtype)}

    # ---- train -----------------------------------------------------------------------------------------
    torch.manual_seed(args.seed)
    matcher = Matcher(model.config.n_embd, args.hidden, not args.no_stop, not args.ordinary_init, args.candidates)
    n = sizes["train"]
    matcher.standardise(h_pool[:n])
    optimizer = torch.optim.Adam(matcher.parameters(), lr=args.lr)
    asking = entries_by_question(pool)
    mask_val = forbidden(val, asking, sizes["val"])

    def mask_of(rows):
        return forbidden([train[i] for i in rows], asking, n)

    step, best, log = 0, -np.inf, []

    def validate():
        """Greedy on validation questions, whose houses (for styles) neither the LoRA nor the matcher ever trained on."""
        picks = choose_greedily(matcher, h_val, h_pool[:sizes["val"]], mask_val, args.shots)
        try:
            return float(env.score(weights, val, picks).mean()), rl.collapse_figures(picks, sizes["val"])
        except FloatingPointError as e:
            raise data.UserError(data.halted(step, e, val, state_path)) from None

    def checkpoint():
        names = [k for k, _ in matcher.named_parameters()]
        adam = {f"{k}.{m}": optimizer.state[q][m] for k, q in zip(names, matcher.parameters()) if q in optimizer.state for m in ("exp_avg", "exp_avg_sq")}
        data.write_checkpoint(state_path, matcher.state_dict() | adam,
                              {"step": step, "best": best, "log": log, "settings": settings, "asked": sorted(env.asked), "cut": sorted(env.cut & env.asked),
                               "memo": {k: v for k, v in env.memo.items() if k in env.asked}})  # what else a --memo knows, it keeps
        data.write_lines(args.out / "log_matcher.jsonl", log)

    if args.resume and (saved := data.read_checkpoint(state_path, step=int, best=float, log=list, settings=dict, asked=list, cut=list, memo=dict)):
        tensors, saved = saved
        data.same_settings(settings, saved["settings"], state_path, free=("steps", "n_test", "n_answers", "oracle"))
        step, best, log = saved["step"], saved["best"], saved["log"]
        with data.fitting(state_path):
            env.asked, env.memo, env.cut = set(saved["asked"]), env.memo | saved["memo"], env.cut | set(saved["cut"])
            matcher.load_state_dict({k: tensors[k] for k in matcher.state_dict()})
            for k, q in matcher.named_parameters():
                if f"{k}.exp_avg" in tensors:
                    m, v = (tensors[f"{k}.{name}"].view_as(q) for name in ("exp_avg", "exp_avg_sq"))
                    optimizer.state[q] = {"step": torch.tensor(float(step)), "exp_avg": m, "exp_avg_sq": v}
        print(f"resumed at step {step}")
    if args.eval_only:
        step = args.steps
        if saved := data.read_checkpoint(state_path, asked=list):
            env.asked = set(map(str, saved[1]["asked"]))
    elif step == 0:
        if args.stop_prior:
            with torch.no_grad():
                some, prompts = h_train[:512], matcher.prompts(h_pool[:n])
                matcher.set_stop_prior(args.stop_prior, some, prompts, **limits_of(matcher, some, prompts, mask_of(range(len(some)))))
        best, figures = validate()
        log.append({"step": 0, "held_out": best, **figures, "calls": len(env.asked), "seconds": round(time.perf_counter() - start, 1)})
        print(f"step    0  held-out {best:.3f} (untrained)")
        if ddp.rank == 0:
            data.write_json(folder / "pool.json", pool)
            matcher.save(folder, settings)

    interrupt = data.Interrupt()
    bar = tqdm(range(step, args.steps), initial=step, total=args.steps, desc="REINFORCE", disable=ddp.rank > 0)
    for step in bar:
        rng = torch.Generator().manual_seed((args.seed << 20) + step)  # from the step's number: a resumed run draws the same
        rows = torch.randperm(len(train), generator=rng)[:args.batch_size]
        B, K, mask = len(rows), args.rollouts, mask_of(rows.tolist())
        with torch.no_grad():
            prompts = matcher.prompts(h_pool[:n])
            limits = limits_of(matcher, h_train[rows], prompts, mask)
            many = {k: m.repeat_interleave(K, 0) for k, m in limits.items() if m is not None}
            picks, _ = matcher.act(h_train[rows].repeat_interleave(K, 0), prompts, args.shots, rng, **many)
        queries = [train[i] for i in rows.tolist() for _ in range(K)]
        try:
            rewards = torch.from_numpy(env.score(weights, queries, as_lists(picks))).view(B, K)
            row = rl.reinforce_step(matcher, optimizer, h_pool[:n], h_train[rows], picks.view(B, K, -1), rewards,
                                    args.entropy_floor, args.entropy_weight, limits)
        except FloatingPointError as e:
            raise data.UserError(data.halted(step, e, queries[::K], state_path)) from None
        row |= {"step": step + 1, "lr": args.lr, "calls": len(env.asked), **rl.collapse_figures(as_lists(picks), n), "seconds": round(time.perf_counter() - start, 1)}
        log.append(row)
        step += 1
        bar.set_postfix_str(f"reward {row['reward']:.3f}, entropy {row['entropy']:.2f}, {row['calls']} calls")
        if step % args.eval_every == 0 or step == args.steps:
            row["held_out"], figures = validate()
            row |= {"held_out_figures": figures, "calls": len(env.asked)}  # validation asks, too
            better = row["held_out"] > best
            best = max(best, row["held_out"])
            if ddp.rank == 0:
                if better:
                    matcher.save(folder, settings)
                checkpoint()
            bar.write(f"step {step:4d}  reward {row['reward']:.3f}  held-out {row['held_out']:.3f}{'  (best: saved)' if better else ''}  entropy {row['entropy']:.2f}"
                      f"  {figures['distinct']} exemplars in use, none for {figures['none']:.0%}")
        if ddp.sum([interrupt.requested])[0]:
            if ddp.rank == 0:
                checkpoint()
            raise data.UserError(f"stopped after step {step}, which is saved; go on with --resume")
    bar.close()
    interrupt.end()
    calls, train_seconds = len(env.asked), time.perf_counter() - start

    # ---- compare, on questions never seen --------------------------------------------------------------
    matcher, matcher_settings = Matcher.load(folder)
    if (matcher_settings.get("fingerprint"), matcher_settings.get("adapter")) != (model.fingerprint, adapter):
        raise data.UserError(f"{folder}: this matcher was trained with another model or adapter; train it again without --eval_only")
    fixed = rl.best_fixed(env, weights, train, mask_of, n, args.seed)
    mask = forbidden(test, asking, len(pool))
    chosen = choose_all(matcher, pool, test, h_pool, h_test, mask, args.shots, fixed, args.seed)
    scores = {}  # {selector: {metric: (N,) array}}
    answered = min(args.n_answers, len(test)) if headline == "logprob" else len(test)
    metrics = {"exact": answered, "rouge": answered} | ({"logprob": len(test)} if "logprob" in weights else {})  # questions each is measured on

    def measure(env, picks, what):
        return {m: env.score({m: 1.0}, test[:n], picks[:n], f"test: {what}") for m, n in metrics.items()}

    for selector, picks in chosen.items():
        scores[selector] = measure(env, picks, selector)
    swapped = {}
    if sizes["val"] < len(pool):  # PILLOW's promise: another pool, nothing retrained. Here, one with no exemplar ever seen
        new = slice(sizes["val"], None)
        picks = {"knn": select_nearest(matcher.z(h_test), matcher.z(h_pool[new]), mask[:, new], args.shots),
                 "pillow": choose_greedily(matcher, h_test, h_pool[new], mask[:, new], args.shots)}
        for selector, ps in picks.items():
            ps = [[j + sizes["val"] for j in row] for row in ps]
            swapped[selector] = float(env.score({headline: 1.0}, test, ps, "test: swapped pool").mean())
    # the oracle: for each question the best of everything tried for it, with the reference in hand
    near = select_nearest(matcher.z(h_test), matcher.z(h_pool), mask, args.oracle)
    solved = np.max([v[headline] for v in scores.values()], 0) == (0 if headline == "logprob" else 1)  # nothing can do better
    tries = [[ps[b] for ps in chosen.values()] + ([] if solved[b] else [[j] for j in near[b]]) for b in range(len(test))]
    flat = env.score({headline: 1.0}, [q for q, t in zip(test, tries) for _ in t], [ps for t in tries for ps in t], "oracle")
    ends = np.cumsum([len(t) for t in tries])
    chosen["oracle"] = [t[int(np.argmax(flat[e - len(t):e]))] for t, e in zip(tries, ends)]
    scores["oracle"] = measure(env, chosen["oracle"], "oracle")
    if args.sft:
        env_sft = rl.Environment(sft, enc, [], args.max_new_tokens, f"{sft.fingerprint} {dtype}", args.memo, ddp=ddp)
        scores["sft"] = measure(env_sft, [[] for _ in test], "sft")

    def against_all(metric):
        """Paired differences with their intervals: pillow minus every other selector, and nearest neighbour minus none."""
        pairs = [("pillow", s) for s in scores if s not in ("pillow", "oracle")] + [("knn", "none")]
        houses = [e.get("house") for e in test[:metrics[metric]]]  # of styles: their questions share exemplars
        return {f"{a}-{b}": rl.bootstrap(scores[a][metric] - scores[b][metric], houses if all(houses) else None) for a, b in pairs}

    head = {s: v[headline] for s, v in scores.items()}
    paired_by_metric = {m: against_all(m) for m in metrics}
    paired = paired_by_metric[headline]
    gap = head["oracle"].mean() - head["none"].mean()
    trained_with = {k: v for k, v in matcher_settings.items() if k not in ("matcher", "weights")}
    settings = trained_with | {k: settings[k] for k in ("shots", "reward", "pool", "pool_size", "pool_rows", "max_new_tokens", "seed", "n_test", "n_answers", "oracle")}
    results = {"model": name, "data": adapter_settings["data"], "n_test": len(test), "n_answers": answered, "shots": args.shots, "seed": args.seed, "headline": headline,
               "metrics": {s: {m: float(a.mean()) for m, a in v.items()} for s, v in scores.items()}, "paired": paired,
               "paired_by_metric": paired_by_metric, "examples": {"read": len(examples), "kept": len(short), "max_tokens": adapter_settings["max_tokens"]},
               "gap_closed": float((head["pillow"].mean() - head["none"].mean()) / gap) if gap else None, "llm_calls": calls, "swapped_pool": swapped,
               "seconds": {"train": round(train_seconds, 1), "all": round(time.perf_counter() - start, 1)},
               "collapse": rl.collapse_figures(chosen["pillow"], len(pool)), "cut_answers": len(env.cut & env.asked),
               "empty_answers": sum(env.memo.get(k) == "" for k in env.asked), "dropped_exemplars": env.dropped,
               "empty_references": sum(not e["output"] for e in test), "n_pool": len(pool), "n_matcher_train": len(train),
               "peak_memory_mb": data.peak_memory(), "dtype": str(dtype), "settings": settings}
    if ddp.rank == 0:
        print(f"\n{len(test)} test questions{f' ({answered} of them answered in words)' if answered < len(test) else ''}, pool of {len(pool)}, {calls:,} distinct LLM calls to train, {train_seconds / 60:.1f} min")
        print(f"{'selector':10s}" + "".join(f"{m:>10s}" for m in metrics) + f"   pillow minus it ({headline}, 95 % interval)")
        for s, v in results["metrics"].items():
            against = paired.get(f"pillow-{s}")
            print(f"{s:10s}" + "".join(f"{v[m]:10.3f}" for m in metrics) + (f"   {against[0]:+.3f}  [{against[1]:+.3f}, {against[2]:+.3f}]" if against else ""))
        if gap:
            print(f"gap closed between none and oracle: {results['gap_closed']:.2f}")
        if swapped:
            print(f"with a pool of the {len(pool) - sizes['val']} exemplars never seen in training alone: pillow {swapped['pillow']:.3f}, knn {swapped['knn']:.3f}")
        data.write_json(args.out / "results.json", results)


if __name__ == "__main__":
    data.run(main)
