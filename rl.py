"""
The reinforcement-learning half of PILLOW: rewards, the language model as an environment, REINFORCE.

An episode is one query. The matcher picks exemplars until it stops; exemplars + query go to the LoRA-tuned
language model; its answer against the reference is the reward, once, at the end. The update is plain
REINFORCE (Williams 1992) with the leave-one-out baseline (Kool et al. 2019): with K rollouts of one query

    grad = 1/K sum_k (R_k - b_k) grad log pi(picks_k | query),    b_k = mean of the other K - 1 rewards

b_k does not depend on picks_k, so the gradient stays unbiased, and a query whose rollouts all earned the
same teaches nothing, as it should. No division by the standard deviation, no critic, no ratio clipped as in PPO; only
the gradient's norm is held to 1, and an entropy term acts below a floor.

The language model is by far the dearest part, and greedy decoding is deterministic: `Environment` remembers
the answer for every (query, exemplars in order), so it is asked only about combinations never tried before.

Left out on purpose: PPO, reward models, rewards for partial answers.
"""

import contextlib
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from model import PrefixCache

# ---- rewards -----------------------------------------------------------------------------------


def exact(answer, reference):
    """1.0 when the answer is the reference, up to white space."""
    return float(answer.split() == reference.split())


def rouge_l(answer, reference):
    """ROUGE-L F1 (Lin 2004) over lower-cased words and numbers: 2PR / (P + R), P and R = LCS / length.

    Two empty texts agree (1.0); one empty text never does (0.0). The same tokens as the usual
    implementation, without stemming: runs of a-z and 0-9 (other scripts: any letter or digit run).
    """
    a, b = (re.findall(r"[^\W_]+", t.lower()) for t in (answer, reference))
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)  # row[j]: longest common subsequence of a[:i] and b[:j]
    for x in a:
        left_above = 0
        for j, y in enumerate(b, 1):
            row[j], left_above = (left_above + 1 if x == y else max(row[j], row[j - 1])), row[j]
    return 2 * row[-1] / (len(a) + len(b))


def parse_reward(text):
    """'exact', 'rouge', 'logprob' or a mix such as 'rouge:0.5,logprob:0.5' -> {name: weight}."""
    weights = {}
    for part in text.split(","):
        name, _, weight = part.strip().partition(":")
        if name in weights:
            raise data.UserError(f"--reward {text}: {name} stands there twice")
        try:
            weights[name] = float(weight or 1)
        except ValueError:
            raise data.UserError(f"--reward {text}: {weight!r} is not a number") from None
        if name not in ("exact", "rouge", "logprob") or not 0 < weights[name] < np.inf:
            raise data.UserError(f"--reward {text}: rewards are exact, rouge and logprob, as in rouge or rouge:0.5,logprob:0.5")
    return weights


# ---- the language model as an environment --------------------------------------------------------


def prompt_room(model, enc, query, new):
    """-> (the question's ids, how many tokens of exemplars fit in front); UserError when it alone is too long."""
    ids = data.encode_query(enc, query)
    room = model.config.n_ctx - new - len(ids)
    if room < 0:
        raise data.UserError(f"the question {query['instruction'][:40]!r} takes {len(ids)} tokens; with {new} for the answer "
                             f"that exceeds the model's context of {model.config.n_ctx}")
    return ids, room


class Environment:
    """Answers and likelihoods of a merged language model behind chosen exemplars, each worked out once.

    model: a GPT with its adapter merged; pool: list of examples; max_new_tokens: length limit of an answer.
    memo_path: JSONL in which every outcome is kept as it is found; it may be shared between runs of the
    same model and adapter (`fingerprint`), and what it holds is not computed again.
    `asked` holds the distinct calls of this run, remembered or not: the honest price of an experiment; `cut` those
    whose answer hit the length limit.
    """

    def __init__(self, model, enc, pool, max_new_tokens, fingerprint="", memo_path=None, batch_size=64, cache_bytes=1 << 30,
                 block=16, ddp=None):
        self.model, self.enc, self.pool, self.ddp = model, enc, pool, ddp or data.Processes()
        self.max_new_tokens, self.batch_size, self.fingerprint = max_new_tokens, batch_size, fingerprint
        self.exemplars = [data.encode_exemplar(enc, e) for e in pool]
        self.opening = data.encode(enc, data.OPENING)  # what follows an exemplar begins with it, whatever it is: cached, too
        self.prefix_cache = PrefixCache(model, [ids + self.opening for ids in self.exemplars], block=block, max_bytes=cache_bytes)
        self.pool_keys = [data.digest(e) for e in pool]
        self.memo, self.asked, self.cut, self.dropped = {}, set(), set(), 0
        self.memo_path = Path(memo_path) if memo_path else None
        if self.memo_path:
            self.read_memo()

    def read_memo(self):
        try:
            with open(self.memo_path, "a", encoding="utf-8") as f:  # a memo that cannot be written is a mistake to find now
                line = "\n"
                for _, line in data.read_lines(self.memo_path, errors="replace"):
                    # a line cut short by an interruption is an outcome to find again
                    with contextlib.suppress(data.UserError, TypeError, ValueError):
                        key, outcome, *cut = data.parse_json(line, self.memo_path)
                        self.memo[key] = outcome
                        if cut:
                            self.cut.add(key)
                f.write("" if line.endswith("\n") else "\n")
        except OSError as error:
            raise data.UserError(f"--memo {self.memo_path}: {error.strerror}") from None

    def key(self, kind, query, picks):
        parts = [self.fingerprint, kind, str(self.max_new_tokens) if kind == "answer" else "", data.digest(query)]
        return hashlib.sha256("|".join(parts + [self.pool_keys[p] for p in picks]).encode()).hexdigest()[:32]

    def prompt(self, query, picks, new):
        """-> (entry of the prefix cache or None, ids of all the rest), dropping exemplars, last-chosen first, until `new` more tokens fit."""
        ids, room = prompt_room(self.model, self.enc, query, new)
        picks = list(picks)
        while sum(len(self.exemplars[p]) for p in picks) > room:
            picks.pop()
            self.dropped += 1
        pieces, n = [self.exemplars[p] for p in picks] + [ids], len(self.opening)
        if picks and len(pieces[1]) > n and pieces[1][:n] == self.opening:
            return picks[0], sum(pieces[1:], [])[n:]
        return None, sum(pieces, [])  # no exemplar; or a question whose first characters melt into the opening's last token

    def outcomes(self, kind, queries, picks, progress=None):
        """kind "answer": the greedy answer's text. kind "logprob": mean log-likelihood a token of the reference.

        queries: examples; picks: a list of pool indices for each. Returns a list, in order.
        """
        keys = [self.key(kind, q, p) for q, p in zip(queries, picks)]
        self.asked.update(keys)
        wanted = str if kind == "answer" else float
        missing = {k: i for i, k in reversed(list(enumerate(keys))) if not isinstance(self.memo.get(k), wanted)}
        rows = sorted(missing.values())
        bar = tqdm(total=len(rows), desc=progress, unit="call", leave=False, disable=not rows or progress is None or self.ddp.rank > 0)
        # a bounded chunk at a time: progress is seen, and an interruption loses at most one chunk
        for s in range(0, len(rows), 4 * self.batch_size):
            everyone = rows[s:s + 4 * self.batch_size]
            chunk = everyone[self.ddp.rank::self.ddp.world]  # each process asks about its share, all learn every answer
            references = [data.encode_answer(self.enc, queries[i]) if kind == "logprob" else [] for i in chunk]
            new = [len(r) if kind == "logprob" else self.max_new_tokens for r in references]
            first, ids = zip(*(self.prompt(queries[i], picks[i], n) for i, n in zip(chunk, new))) if chunk else ((), ())
            if kind == "answer":
                answers = self.model.generate(list(ids), self.max_new_tokens, eos_ids=self.enc.end_ids, prefixes=first,
                                              prefix_cache=self.prefix_cache, batch_size=self.batch_size)
                found = [(data.decode(self.enc, a).decode("utf-8", errors="replace").strip(), len(a) == self.max_new_tokens) for a in answers]
            else:
                total = self.model.answer_logprobs(list(ids), references, prefixes=first, prefix_cache=self.prefix_cache,
                                                   batch_size=self.batch_size)
                found = [(t / len(r), False) for t, r in zip(total.tolist(), references)]
            found = {i: outcome for part in self.ddp.gather(dict(zip(chunk, found))) for i, outcome in part.items()}
            for i, (outcome, cut) in found.items():
                if kind == "logprob" and not np.isfinite(outcome):
                    raise FloatingPointError(f"the reward of {queries[i]['instruction']!r} behind exemplars {picks[i]} is {outcome}")
                self.memo[keys[i]] = outcome
                if cut:
                    self.cut.add(keys[i])
            if self.memo_path and self.ddp.rank == 0:
                with open(self.memo_path, "a", encoding="utf-8") as f:
                    f.writelines(json.dumps([keys[i], self.memo[keys[i]]] + [True] * (keys[i] in self.cut)) + "\n" for i in everyone)
            bar.update(len(everyone))
        bar.close()
        return [self.memo[k] for k in keys]

    def score(self, weights, queries, picks, progress=None):
        """Reward of each (query, picks): sum of weight * reward over `weights`; (N,) float64 array."""
        total = np.zeros(len(queries))
        if "exact" in weights or "rouge" in weights:
            answers = self.outcomes("answer", queries, picks, progress)
        for name, weight in weights.items():
            if name == "logprob":
                total += weight * np.array(self.outcomes("logprob", queries, picks, progress))
            else:
                score = exact if name == "exact" else rouge_l
                total += weight * np.array([score(a, q["output"]) for a, q in zip(answers, queries)])
        return total


# ---- REINFORCE -----------------------------------------------------------------------------------


def leave_one_out(rewards):
    """rewards (B, K) -> advantages (B, K): each reward minus the mean of the other K - 1 of its query."""
    K = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (K / (K - 1))


def reinforce_step(matcher, optimizer, pool, query, picks, rewards, entropy_floor, entropy_weight, limits):
    """One update from K rollouts of each of B queries.

    pool: features (n, C); query (B, C); picks (B, K, m); rewards (B, K).
    Minimises -mean (R - b) log pi, plus entropy_weight * max(0, entropy_floor - entropy): the policy is left
    alone as long as it explores, and held back only below the floor. Returns a dict for the log.
    """
    B, K, m = picks.shape
    advantage = leave_one_out(rewards)
    limits = {k: v.repeat_interleave(K, 0) for k, v in limits.items() if v is not None}
    logp, entropy = matcher.log_prob(query.repeat_interleave(K, 0), matcher.prompts(pool), picks.view(B * K, m), **limits)
    entropy = entropy.mean()
    loss = -(advantage.flatten().float() * logp).mean() + entropy_weight * (entropy_floor - entropy).clamp(min=0)
    optimizer.zero_grad()
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(matcher.parameters(), 1.0)
    if not torch.isfinite(grad_norm):
        raise FloatingPointError(f"the gradient is {grad_norm}: loss {loss.item()}, rewards {rewards.tolist()}")
    optimizer.step()
    return {"reward": rewards.mean().item(), "baseline": (rewards - advantage).mean().item(), "loss": loss.item(),
            "entropy": entropy.item(), "grad_norm": grad_norm.item(),
            "no_signal": (rewards == rewards[:, :1]).all(1).double().mean().item()}


def collapse_figures(picks, n_pool):
    """Has the policy collapsed onto a few prompts? picks: a list of lists of pool indices, one per query.

    distinct: different exemplars used; top_pair: share of queries that got one of the two most used exemplars;
    none: share of queries that got no exemplar.
    """
    used = np.bincount(np.array([p for ps in picks for p in ps], dtype=int), minlength=max(n_pool, 2))
    top = set(np.argsort(-used)[:2].tolist())
    return {"distinct": int((used > 0).sum()), "top_pair": float(np.mean([bool(top & set(p)) for p in picks])),
            "none": float(np.mean([not p for p in picks]))}


# ---- selectors that need the language model -------------------------------------------------------


def best_fixed(env, weights, queries, mask_of, size, seed, candidates=16):
    """Of `candidates` random exemplars, the one that serves matcher-train queries best, whatever the question; a baseline.

    By successive halving: all of them on 8 questions each, the better quarter on 32, and so on. mask_of(rows) -> (B, size) bool: entries these questions must not see; they go without.
    Returns indices of the pool's first `size` entries, best first.
    """
    rng = np.random.default_rng(seed)
    left = rng.choice(size, min(candidates, size), replace=False).tolist()
    order, n, beaten = rng.permutation(len(queries)), 8, []
    while len(left) > 1:
        some = order[:n]
        mask = mask_of(some)
        picks = [[] if row[p] else [p] for p in left for row in mask]
        score = env.score(weights, [queries[i] for i in some] * len(left), picks, "fixed").reshape(len(left), -1).mean(1)
        ranked = [left[i] for i in np.argsort(-score, kind="stable")]
        keep = max(1, len(left) // 4)
        left, beaten, n = ranked[:keep], ranked[keep:] + beaten, n * 4
    return left + beaten


def bootstrap(difference, groups=None, seed=0, resamples=10_000):
    """Mean of paired differences (N,) with its 95 % percentile bootstrap interval (Efron 1979): [mean, low, high].

    groups (N,): questions of one group share what decides them (one house's exemplars), so whole groups are resampled;
    None: every question is a group of its own.
    """
    d = np.asarray(difference, dtype=np.float64)
    group = np.arange(len(d)) if groups is None else np.unique(groups, return_inverse=True)[1]
    total, count, means = np.bincount(group, d), np.bincount(group), []
    rng = np.random.default_rng(seed)
    for _ in range(resamples // 1000):
        draws = rng.integers(0, len(total), (1000, len(total)))
        means.append(total[draws].sum(1) / count[draws].sum(1))
    return [float(d.mean()), *np.percentile(np.concatenate(means), [2.5, 97.5]).tolist()]
