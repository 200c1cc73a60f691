"""
The reinforcement-learning half of PILLOW: rewards, the language model as an environment, the baseline.

In a rollout the matcher picks exemplars for a question until it stops; exemplars and question go to the
LoRA-tuned language model; the reward, once, at the end, is how good its answer is, or how likely the
reference. The update is plain REINFORCE (Williams 1992) with the leave-one-out baseline (Kool et al. 2019):
with K rollouts of one question

    grad = 1/K sum_k (R_k - b_k) grad log pi(picks_k | question),    b_k = mean of the other K - 1 rewards

b_k does not depend on picks_k, so the gradient stays unbiased, and a question whose rollouts all earned the
same teaches nothing, as it should. One term stands beside it: the policy's entropy is held up where it
falls below a floor, for a policy that is certain explores no more. The gradient's norm is clipped at 1.

The language model is by far the dearest part and greedy decoding is deterministic: `Environment` remembers
the outcome of every (question, exemplars in order), so it is asked only about what was never tried before.

    python rl.py      # a bandit of four arms: the gradient and the curve, with and without the baseline

Left out on purpose: PPO's clipped ratio, a critic, division by the standard deviation, reward models.
"""

import contextlib
import hashlib
import json
import unicodedata
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
from model import PrefixCache

# ---- rewards: a weighted sum of scores -------------------------------------------------------------


def exact(answer, reference):
    """1.0 when the answer is the reference, up to white space."""
    return float(data.canonical(answer).split() == data.canonical(reference).split())


def words(text):
    """Lower-cased runs of letters, digits and their marks; where there are none, the symbols."""
    text = data.canonical(text).lower()
    spaced = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in text).split()
    return spaced or [c for c in text if not c.isspace()]


def rouge_l(answer, reference):
    """ROUGE-L F1 (Lin 2004): 2PR / (P + R), P and R = longest common subsequence / words of either text. No
    stemming; else English splits as in the usual implementation. Two empty texts agree (1.0)."""
    a, b = words(answer), words(reference)
    if not a or not b:
        return float(a == b)
    row = [0] * (len(b) + 1)  # row[j]: longest common subsequence of a[:i] and b[:j]
    for x in a:
        left_above = 0
        for j, y in enumerate(b, 1):
            row[j], left_above = (left_above + 1 if x == y else max(row[j], row[j - 1])), row[j]
    return 2 * row[-1] / (len(a) + len(b))


SCORES = {"exact": exact, "rouge": rouge_l}  # of (answer, reference), 0 to 1
# They ask for no answer: the reference's log-likelihood per token, and its probability. The probability
# is what `exact` would be on average if answers were sampled, without the noise of sampling.
LIKELIHOODS = "logprob", "prob"


def parse_reward(text):
    """'exact', 'rouge', 'logprob', 'prob' or a mix such as 'rouge:0.5,logprob:0.5' -> {name: weight}."""
    names, parts = (*SCORES, *LIKELIHOODS), [part.strip().partition(":") for part in text.split(",")]
    with contextlib.suppress(ValueError):
        reward = {name: float(weight or 1) for name, _, weight in parts if name in names}
        if len(reward) == len(parts) and all(0 < weight < np.inf for weight in reward.values()):
            return reward
    raise data.UserError(f"--reward {text}: use {', '.join(names)}, or a mix such as rouge:0.5,logprob:0.5")


# ---- the language model as an environment that remembers ------------------------------------------------


class Environment:
    """Outcomes of a merged language model with chosen exemplars in front, each worked out once.

    fingerprint: names the model and adapter; memo_path: a JSONL file of outcomes, shared between runs.
    `asked` holds this run's distinct calls, remembered or not: the honest price of an experiment."""

    def __init__(self, model, enc, pool, max_new_tokens, fingerprint="", memo_path=None,
                 cache_bytes=1 << 30, block=None, ddp=None):
        self.model, self.enc, self.pool, self.ddp = model, enc, pool, ddp or data.Processes()
        self.max_new_tokens, self.fingerprint = max_new_tokens, fingerprint
        self.exemplars = [data.encode_exemplar(enc, e) for e in pool]
        block = block or (16 if len(pool) <= 1000 else 1)  # of a large pool few are picked: one at a time
        self.prefix_cache = PrefixCache(model, self.exemplars, block=block, max_bytes=cache_bytes)
        self.names = [data.digest(e) for e in pool]
        self.memo_path, self.asked = memo_path, set()
        self.memo = read_memo(Path(memo_path)) if memo_path else {}  # {key: [answer, cut?] or log-likelihood}

    def score(self, reward, questions, picks, progress=None):
        """What each question earns behind its picks, (N,) float64 array. reward: {name: weight}."""
        rewards = np.zeros(len(questions))
        for name, weight in reward.items():
            if name in SCORES:
                answers = self.outcomes("answer", questions, picks, progress)
                each = [SCORES[name](answer, q["output"]) for (answer, _), q in zip(answers, questions)]
            else:
                each = self.outcomes("logprob", questions, picks, progress)  # per token
            if name == "prob":
                each = np.exp(each) ** [len(data.encode_answer(self.enc, q)) for q in questions]
            rewards += weight * np.array(each)
        return rewards

    def outcomes(self, kind, questions, picks, progress=None):
        """kind "answer": [greedy answer, cut short?]; "logprob": the reference's log-likelihood per token."""
        keys = [self.key(kind, q, p) for q, p in zip(questions, picks)]
        self.asked.update(keys)
        new = list({k: i for i, k in enumerate(keys) if k not in self.memo}.values())  # one of each new key
        quiet = not (new and progress) or self.ddp.rank > 0
        bar = tqdm(total=len(new), desc=progress, unit="call", leave=False, disable=quiet)
        for s in range(0, len(new), 256):  # an interruption loses at most one chunk
            chunk = new[s : s + 256]
            mine = chunk[self.ddp.rank :: self.ddp.world]  # a process asks about its share, all learn all
            found = self.ask(kind, [questions[i] for i in mine], [picks[i] for i in mine])
            for part in self.ddp.gather({keys[i]: outcome for i, outcome in zip(mine, found)}):
                self.memo |= part
            if self.memo_path and self.ddp.rank == 0:
                with open(self.memo_path, "a", encoding="utf-8") as file:  # "\n" first: one may be cut short
                    file.writelines("\n" + json.dumps([keys[i], self.memo[keys[i]]]) for i in chunk)
            bar.update(len(chunk))
        bar.close()
        return [self.memo[k] for k in keys]

    def ask(self, kind, questions, picks):
        if not questions:  # of few new ones a process's share may be none
            return []
        references = [data.encode_answer(self.enc, q) for q in questions]
        new = [self.max_new_tokens if kind == "answer" else len(r) for r in references]
        first, ids, _ = zip(*map(self.prompt, questions, picks, new))
        behind = {"prefixes": first, "prefix_cache": self.prefix_cache}
        if kind == "answer":
            answers = self.model.generate(ids, self.max_new_tokens, eos_ids=self.enc.end_ids, **behind)
            texts = [data.decode(self.enc, a).decode("utf-8", errors="replace") for a in answers]
            return [[text, len(a) == self.max_new_tokens] for text, a in zip(texts, answers)]
        total = self.model.answer_logprobs(ids, references, **behind)
        if not torch.isfinite(total).all():
            raise data.UserError(f"a reference's log-likelihood is {total.min().item()}; try --dtype float32")
        return [t / len(r) for t, r in zip(total.tolist(), references)]

    def new_tokens(self, reward, question):
        """How many tokens may follow: an answer's, or the reference's where its likelihood counts."""
        likely = any(name in reward for name in LIKELIHOODS)
        return max(self.max_new_tokens, len(data.encode_answer(self.enc, question)) if likely else 0)

    def prompt(self, question, picks, new):
        """exemplars + question -> (index of the first exemplar, which is cached, or None; ids of the rest;
        how many exemplars, from the last, did not fit beside `new` more tokens)."""
        ids, limit = data.encode_query(self.enc, question), self.model.config.n_ctx
        room = limit - new - len(ids)
        if room < 0:
            start = question["instruction"][:40]
            raise data.UserError(f"the question {start!r} takes {len(ids)} tokens; with {new} for the answer "
                                 f"that exceeds the model's context of {limit}")
        fit = list(picks)
        while sum(len(self.exemplars[p]) for p in fit) > room:
            fit.pop()
        if not fit:
            return None, ids, len(picks)
        rest = data.join(self.enc, [self.exemplars[p] for p in fit] + [ids])[len(self.exemplars[fit[0]]) :]
        return fit[0], rest, len(picks) - len(fit)

    def key(self, kind, question, picks):
        limit = str(self.max_new_tokens) if kind == "answer" else ""
        parts = [self.fingerprint, kind, limit, data.digest(question), *(self.names[p] for p in picks)]
        return hashlib.sha256("|".join(parts).encode()).hexdigest()[:32]


def copying(pool, questions, picks):
    """What a model would earn that only copies: 1.0 where a pick's answer is the reference, (N,) float64. It
    is always `exact`, whatever the reward: one of your own needs --rehearsal 0."""
    return np.array([float(any(exact(pool[j]["output"], q["output"]) for j in p))
                     for q, p in zip(questions, picks)])


# ---- REINFORCE ---------------------------------------------------------------------------------------------


def leave_one_out(rewards):
    """Rewards (B, K) minus the mean of the other K - 1 of their question: (R_k - mean of all) K / (K - 1)."""
    K = rewards.shape[1]
    return (rewards - rewards.mean(1, keepdim=True)) * (K / (K - 1))


def entropy_floor(entropy, floor=0.3, weight=0.05):
    """A loss that pushes the mean entropy up while it is below `floor` nats; else zero."""
    return weight * (floor - entropy.mean()).clamp(min=0)


# ---- the comparison: a selector that needs the language model, figures, intervals -------------------


def best_fixed(env, reward, questions, allowed, seed):
    """Of 16 random exemplars the one that serves all questions best, whatever they ask: a control.

    All on 8 questions each, the best quarter on 32, and so on (successive halving). allowed (N, n) bool:
    where it is not allowed, a question goes without. Returns pool indices, best first."""
    rng = np.random.default_rng(seed)
    left = rng.choice(allowed.shape[1], min(16, allowed.shape[1]), replace=False).tolist()
    order, n, beaten = rng.permutation(len(questions)), 8, []
    while len(left) > 1:
        some = order[:n]
        picks = [[p] if allowed[i, p] else [] for p in left for i in some]
        rewards = env.score(reward, [questions[i] for i in some] * len(left), picks, "fixed")
        mean = rewards.reshape(len(left), -1).mean(1)
        ranked = [left[i] for i in np.argsort(-mean, kind="stable")]
        keep = max(1, len(left) // 4)
        left, beaten, n = ranked[:keep], ranked[keep:] + beaten, n * 4
    return left + beaten


def collapse_figures(picks):
    """Has the policy collapsed onto a few exemplars? distinct: exemplars used; top_pair: share of questions
    with one of the two most used; none: with none. picks: a list of pool indices per question."""
    used = np.bincount(np.array([j for row in picks for j in row], dtype=int))
    top = set(np.argsort(-used)[:2].tolist())
    return {"distinct": int((used > 0).sum()),
            "top_pair": float(np.mean([bool(top & set(row)) for row in picks])),
            "none": float(np.mean([not row for row in picks]))}


def bootstrap(difference, groups=None):
    """[mean, low, high] of paired differences (N,): the 95 % percentile bootstrap interval (Efron 1979).
    groups (N,): questions of a group share what decides them, its exemplars: whole groups are resampled."""
    d = np.asarray(difference, dtype=np.float64)
    group = np.arange(len(d)) if groups is None else np.unique(groups, return_inverse=True)[1]
    total, count = np.bincount(group, d), np.bincount(group)
    rng, means = np.random.default_rng(0), []
    for _ in range(10):  # 10,000 resamples, in parts of less memory
        draws = rng.integers(0, len(total), (1000, len(total)))
        means.append(total[draws].sum(1) / count[draws].sum(1))
    return [float(d.mean()), *np.percentile(np.concatenate(means), [2.5, 97.5]).tolist()]


# ---- plumbing: skip on a first reading -----------------------------------------------------------------


def read_memo(path):
    """The outcomes in a --memo file; a line that an interruption cut short is an outcome to find again."""
    path.touch()  # one that cannot be written is a mistake to find now
    memo = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            key, outcome = json.loads(line)
            match outcome:
                case float() | [str(), bool()]:
                    memo[key] = outcome
    return memo


def lesson():
    """A bandit of four arms that pay 5.0, 5.2, 5.4, 5.6 and some noise; K = 4 rollouts a step."""
    torch.manual_seed(0)
    pays = torch.tensor([5.0, 5.2, 5.4, 5.6])

    def gradient(logits, advantage):
        """REINFORCE's estimate from one step. advantage: a function of the rewards (1, 4)."""
        arms = torch.multinomial(logits.softmax(-1), 4, replacement=True)
        rewards = (pays[arms] + 0.1 * torch.randn(4)).view(1, 4)
        objective = (advantage(rewards) * logits.log_softmax(-1)[arms]).mean()
        return torch.autograd.grad(objective, logits)[0]

    flat = torch.zeros(4, requires_grad=True)
    true = torch.autograd.grad((flat.softmax(-1) * pays).sum(), flat)[0]
    print("the true gradient of the mean reward:", " ".join(f"{g:+.3f}" for g in true))
    for name, advantage in (("no baseline", lambda rewards: rewards), ("leave-one-out", leave_one_out)):
        found = torch.stack([gradient(flat, advantage) for _ in range(4000)])
        mean = " ".join(f"{g:+.3f}" for g in found.mean(0))
        print(f"{name:14s} mean of 4,000 estimates: {mean}   spread of one: {found.std(0).mean():.3f}")
        logits, curve = torch.zeros(4, requires_grad=True), []
        for _ in range(401):
            curve.append((logits.softmax(-1) * pays).sum().item())
            logits = (logits + 0.1 * gradient(logits, advantage)).detach().requires_grad_()
        shown = " ".join(f"{x:.3f}" for x in curve[::100])
        print(f"{'':14s} mean reward after 0, 100 .. 400 steps: {shown}")


if __name__ == "__main__":
    lesson()
