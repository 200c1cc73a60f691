"""
The matching network: which exemplars of the pool should stand in front of this question?

PILLOW (Qi et al. 2023, arXiv 2312.05621) has two small MLPs, one for the question and one for the pool's
exemplars; the dot product of their outputs, over the pool, is a distribution. ("Ours" marks what the paper
does not say.) h(.) is the LoRA-tuned language model's mean-pooled final hidden state of a question, or of an
exemplar without its answer; z(.) is the same, standardised by the training pool's mean and std:

    f(.) = MLP_shared[z(.)]                          as wide as z: what both towers add to it
    a, s = MLP_question[z(x), mean of the chosen z]  the question tower's own; s, the score of *stop*
    u    = unit(z(x) + f(x) + a)                     question tower
    v_j  = unit(z(p_j) + f(p_j))                     exemplar tower
    pi(. | x, chosen) = softmax of  exp(tau) * (<u, v_j>  for every p_j that is allowed,  s for *stop*)

Both MLPs end in zeros, so among exemplars an untrained matcher takes the nearest by cosine; learning bends it
(ours; with ordinary initial values it would have to find even that by trial and error). The towers share f
(ours): an exemplar counts by its question, so what makes two of these alike is learnt once, from both sides;
with two separate MLPs `styles` took 320 steps, not 180, and ended lower. *stop* is an action of its own
(ours): a wrong exemplar is worse than none. exp(tau), how sharply the policy tells scores apart, is learnt;
it starts where the pool makes it start (`sharpen`).

An exemplar is *allowed* unless it asks the very question, was chosen before, or is not among the
`candidates` nearest by z. The softmax is over what is allowed in each step, so the log pi of a sequence of
picks, the sum of its steps', is exact.

    python matcher.py      # the policy over a tiny pool, before and after one update

Left out on purpose: attention between question and exemplars, approximate nearest-neighbour indexes (an
exact scan of 100,000 exemplars takes milliseconds).
"""

import functools
import hashlib
import math
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import data
from data import UserError

STOP = -1  # in a sequence of picks: "no further exemplar"


class Encoded(NamedTuple):
    """What the policy needs of the pool, worked out once by `Matcher.encode`."""

    v: torch.Tensor  # (n, C) unit vectors
    z: torch.Tensor  # (n, C) standardised features


class Matcher(nn.Module):
    """The two towers and the policy they make. B questions, K rollouts, m picks, n exemplars, C features.
    candidates: how many of the nearest exemplars may be chosen; 0: the whole pool."""

    def __init__(self, C, hidden=256, candidates=0):
        super().__init__()
        self.settings = {"C": C, "hidden": hidden, "candidates": candidates}  # what `save` writes
        self.candidates = candidates
        self.question_mlp = nn.Sequential(nn.Linear(2 * C, hidden), nn.GELU(), nn.Linear(hidden, C + 1))
        self.shared_mlp = nn.Sequential(nn.Linear(C, hidden), nn.GELU(), nn.Linear(hidden, C))
        for mlp in (self.shared_mlp, self.question_mlp):  # z + 0: the nearest neighbour
            nn.init.zeros_(mlp[-1].weight)
            nn.init.zeros_(mlp[-1].bias)
        self.tau = nn.Parameter(torch.tensor(math.log(20.0)))  # a placeholder: `sharpen` sets it by the pool
        self.register_buffer("mean", torch.zeros(C))
        self.register_buffer("std", torch.ones(C))

    def standardise(self, h_pool):
        """Take mean and std from the pool's features (n, C). A channel that never varies gets the std 1."""
        std = h_pool.std(0, correction=0)
        self.mean.copy_(h_pool.mean(0))
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def z(self, h):
        return (h - self.mean) / self.std

    def encode(self, h_pool):
        """The pool's features (n, C) -> Encoded."""
        z = self.z(h_pool)
        return Encoded(F.normalize(z + self.shared_mlp(z), dim=-1), z)

    def narrow(self, h, encoded, allowed):
        """Of the allowed exemplars (B, n) only the `candidates` nearest stay: large pools stay learnable."""
        if not self.candidates:
            return allowed
        narrowed = torch.zeros_like(allowed)
        for row, near in zip(narrowed, select_nearest(self.z(h), encoded.z, allowed, self.candidates)):
            row[near] = True
        return narrowed

    def scores(self, h, encoded, chosen, allowed):
        """Unnormalised log pi(. | x, chosen), (B, n + 1): a column per exemplar, -inf if not allowed, then
        *stop*. h (B, C): the questions' features; chosen (B, t): picks so far; allowed (B, n): bool."""
        z = self.z(h)
        # chosen holds STOP, -1, where a rollout is over: what is made of such a row is not used
        context = encoded.z[chosen].mean(1) if chosen.shape[1] else torch.zeros_like(z)  # (B, C)
        a, s = self.question_mlp(torch.cat([z, context], -1)).split([z.shape[1], 1], -1)  # (B, C), (B, 1)
        u = F.normalize(z + self.shared_mlp(z) + a, dim=-1)
        scores = torch.cat([u @ encoded.v.t(), s], -1) * self.tau.exp()  # (B, n + 1)
        allowed = F.pad(allowed, (0, 1), value=True)  # stopping is always allowed
        allowed = allowed.scatter(1, chosen.clamp(min=0), False)
        return scores.masked_fill(~allowed, float("-inf"))

    def first_choice(self, h, encoded, allowed):
        """pi(. | x) before anything is chosen, (B, n + 1)."""
        nothing = torch.zeros(len(h), 0, dtype=torch.long)
        return self.scores(h, encoded, nothing, allowed).softmax(-1)

    def play(self, h, encoded, allowed, shots, generator=None):
        """Up to `shots` picks per question, the likeliest at each step, or sampled if a generator is given ->
        picks (B, m), STOP from where a rollout ended, and each pick's probability (B, m)."""
        picks = torch.full((len(h), shots), STOP)
        chances, going = torch.ones(len(h), shots), torch.ones(len(h), dtype=torch.bool)
        for t in range(shots):
            p = self.scores(h, encoded, picks[:, :t], allowed).softmax(-1)  # (B, n + 1)
            pick = p.argmax(-1) if generator is None else torch.multinomial(p, 1, generator=generator)[:, 0]
            chances[:, t] = torch.where(going, p.gather(1, pick[:, None])[:, 0], 1.0)
            going = going & (pick < p.shape[1] - 1)  # the last column is *stop*
            picks[:, t] = torch.where(going, pick, STOP)
        return picks, chances

    @torch.no_grad()
    def sample(self, h, encoded, allowed, shots, rollouts, generator):
        """K rollouts of each question: picks (B, K, m)."""
        h, allowed = h.repeat_interleave(rollouts, 0), allowed.repeat_interleave(rollouts, 0)
        return self.play(h, encoded, allowed, shots, generator)[0].unflatten(0, (-1, rollouts))

    def log_prob(self, h, encoded, picks, allowed):
        """Exact log pi of whole rollouts, picks (B, K, m) -> log pi (B, K) and entropy (B, K).

        log pi(p_1 .. p_m | x) = sum_t log pi(p_t | x, p_1 .. p_t-1), up to and including the stop; the
        entropy is the mean over the decisions that a rollout really took."""
        B, K, m = picks.shape
        h, allowed, picks = h.repeat_interleave(K, 0), allowed.repeat_interleave(K, 0), picks.flatten(0, 1)
        going = F.pad(picks[:, :-1] != STOP, (1, 0), value=True).float()  # (B K, m): decisions really taken
        log_pi = entropy = torch.zeros(B * K)
        for t in range(m):
            log_p = self.scores(h, encoded, picks[:, :t], allowed).log_softmax(-1)  # (B K, n + 1)
            log_pi = log_pi + going[:, t] * log_p[range(B * K), picks[:, t]]  # STOP, -1, is the last column
            entropy = entropy - going[:, t] * (log_p.exp() * log_p.clamp(min=-1e4)).sum(-1)  # 0 log 0 = 0
        return log_pi.view(B, K), (entropy / going.sum(1)).view(B, K)

    # ---- where learning starts

    @torch.no_grad()
    def sharpen(self, h, encoded, allowed, nats=0.7):
        """Set exp(tau) so that the first choice of questions h (B, C) has an entropy of `nats` in the mean. A
        scale that suits 100 exemplars is too flat for 5,000: sampled picks are then far worse than the
        likeliest, and REINFORCE relearns what nearness knew."""
        low, high = 0.0, 7.0  # bisection: entropy falls with tau
        for _ in range(20):
            self.tau.fill_((low + high) / 2)
            entropy = torch.special.entr(self.first_choice(h, encoded, allowed)).sum(-1).mean()
            low, high = (float(self.tau), high) if entropy > nats else (low, float(self.tau))

    @torch.no_grad()
    def stop_below(self, t):
        """Set the score of *stop* so that the untrained matcher's first pick is that of `select_threshold`.
        Untouched it is 0, so far below the nearest's cosine that *stop* is hardly ever tried, or learnt."""
        self.question_mlp[-1].bias[-1] = t

    @torch.no_grad()
    def set_stop_prior(self, p, h, encoded, allowed):
        """Set the score of *stop* so that the policy, before it learns, stops at once with probability p
        for the median question, at the scale that `sharpen` set."""
        none = torch.zeros(len(h), 0, dtype=torch.long)
        others = self.scores(h, encoded, none, allowed)[:, :-1].logsumexp(-1)  # (B,)
        self.stop_below((others.median() + math.log(p / (1 - p))) / self.tau.exp())


# ---- which exemplars are allowed --------------------------------------------------------------------------


def allowed_exemplars(questions, pool):
    """(B, n) bool: all exemplars but those that ask the very question."""
    number = {}  # the same for rows that ask the same
    ids = torch.tensor([number.setdefault(data.question_key(e), len(number)) for e in [*questions, *pool]])
    return ids[: len(questions), None] != ids[len(questions) :]


# ---- selectors, the matcher and those it has to beat: each at most `shots` pool indices per question


@torch.no_grad()
def select_likeliest(matcher, h, encoded, allowed, shots):
    """The matcher's greedy picks."""
    picks, n = [], at_once(encoded.z)
    for some, rows in zip(h.split(n), allowed.split(n)):  # (b, C), (b, n)
        rows = matcher.narrow(some, encoded, rows)
        picks += as_lists(matcher.play(some, encoded, rows, shots)[0])
    return picks


def as_lists(picks):
    """(..., m) tensor with STOP -> a list of pool indices per rollout."""
    return [[j for j in row if j != STOP] for row in picks.flatten(0, -2).tolist()]


def at_once(pool):
    """How many questions meet the whole pool at a time: some 100 MB of scores, however many there are."""
    return max(1, (1 << 25) // len(pool))


def select_nearest(z, z_pool, allowed, shots):
    """Nearest neighbours by cosine of standardised features z (B, C), z_pool (n, C), nearest first."""
    picks, v, n = [], F.normalize(z_pool, dim=-1).t(), at_once(z_pool)
    for some, rows in zip(z.split(n), allowed.split(n)):  # (b, C), (b, n)
        cosine = (F.normalize(some, dim=-1) @ v).masked_fill(~rows, float("-inf"))  # (b, n)
        near = cosine.topk(min(shots, len(z_pool)), -1).indices.tolist()
        picks += [[j for j in js if row[j]] for js, row in zip(near, rows)]
    return picks


def similarity(z, z_pool, picks):
    """Cosine of each question and its first pick, (B,); -1 where there is none."""
    first = torch.tensor([p[0] if p else STOP for p in picks])
    return torch.where(first == STOP, -1.0, F.cosine_similarity(z, z_pool[first], dim=-1))


def tune_threshold(cosine, gain):
    """The t for which "an exemplar where cosine (N,) > t, else none" has the largest total gain less the
    total's standard error: of N noisy totals the largest flatters, and an exemplar too many does harm.
    gain (N,): reward with the nearest exemplar minus reward without, on training questions."""
    order = torch.argsort(cosine, descending=True)
    total = gain[order].cumsum(0) - gain[order].square().cumsum(0).sqrt()
    best = int(F.pad(total, (1, 0)).argmax())  # how many to take: the first 0, 1 .. N
    beyond = torch.tensor([0.02])  # to take none or all, t lies just outside of what was seen
    edges = torch.cat([cosine.amax() + beyond, cosine[order], cosine.amin() - beyond])
    return float((edges[best] + edges[best + 1]) / 2)  # halfway between the last taken and the first left


def select_threshold(z, z_pool, allowed, shots, t):
    """Nearest neighbours where the nearest is more similar than t, else none: the control for a matcher that
    learns only *when* to take an exemplar."""
    picks = select_nearest(z, z_pool, allowed, shots)
    return [p if c > t else [] for p, c in zip(picks, similarity(z, z_pool, picks).tolist())]


def select_random(allowed, shots, seed):
    """Distinct allowed exemplars, drawn uniformly. seed: a number, or a numpy Generator to go on with."""
    rng = np.random.default_rng(seed)
    rows = [np.flatnonzero(row) for row in np.asarray(allowed)]
    return [rng.choice(row, min(shots, len(row)), replace=False).tolist() for row in rows]


class BM25:
    """Okapi BM25 (Robertson & Zaragoza 2009) over the pool's questions: the classic lexical retriever.

    score(q, d) = sum over words w of q:  idf(w) f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|))
    idf(w) = log(1 + (n - n_w + 0.5) / (n_w + 0.5)),  f = count of w in d,  n_w = documents with w"""

    def __init__(self, documents):
        self.documents = documents

    @functools.cached_property
    def weights(self):
        """{word: (documents that have it, what it adds to their scores)}. Of a large pool this takes seconds,
        so it is made when it is first asked for."""
        k1, b, n, found, weights = 1.5, 0.75, len(self.documents), {}, {}
        counts = [Counter(self.words(d)) for d in self.documents]
        length = np.array([c.total() for c in counts], dtype=np.float64)
        norm = k1 * (1 - b + b * length / length.mean())
        for i, c in enumerate(counts):
            for w, f in c.items():
                found.setdefault(w, []).append((i, f))
        for w, pairs in found.items():
            ids, f = np.array(pairs).T
            idf = math.log(1 + (n - len(ids) + 0.5) / (len(ids) + 0.5))
            weights[w] = ids, idf * f * (k1 + 1) / (f + norm[ids])
        return weights

    @staticmethod
    def words(text):
        return re.findall(r"\w+", text.lower())

    def select(self, texts, allowed, shots):
        """Best first; ties, and questions that share no word with the pool, go by position in the pool."""
        picks = []
        for text, row in zip(texts, np.asarray(allowed)):
            scores = np.zeros(len(self.documents))
            for ids, weight in (self.weights[w] for w in self.words(text) if w in self.weights):
                scores[ids] += weight
            order = np.argsort(-np.where(row, scores, -np.inf), kind="stable")
            picks.append([int(j) for j in order[:shots] if row[j]])
        return picks


def selectors(matcher, encoded, bm25, questions, h, allowed, shots, threshold, seed):
    """{selector: a function that makes its picks for every question}, for all that need no language model."""
    z, z_pool = matcher.z(h), encoded.z
    return {
        "none": lambda: [[] for _ in questions],
        "random": lambda: select_random(allowed, shots, seed),
        "bm25": lambda: bm25.select([data.query_text(q) for q in questions], allowed, shots),
        "knn": lambda: select_nearest(z, z_pool, allowed, shots),
        "threshold": lambda: select_threshold(z, z_pool, allowed, shots, threshold),
        "pillow": lambda: select_likeliest(matcher, h, encoded, allowed, shots),
    }


# ---- plumbing: skip on a first reading ---------------------------------------------------------------------


def cached_features(model, enc, examples, what, adapter="", cache="cache"):
    """h(.) of each question, answers left out, so that questions and exemplars are alike: (N, C) float32.

    Every text is read once; its features stay in cache/features/, in a folder for each model and adapter (its
    digest). New ones are worked out 512 at a time, each part written when it is whole, so an interrupted run
    repeats the same batches and ends with the same bits."""
    kind = str(model.embed.weight.dtype).removeprefix("torch.")
    store = Path(cache) / "features" / "-".join(filter(None, (model.fingerprint, kind, adapter)))
    known = {}  # {digest of a text: (C,)}
    for path in sorted(store.glob("*.safetensors")):
        tensors, part = data.read_checkpoint(path)
        with data.fitting(path):
            known |= zip(part, tensors["features"].view(len(part), model.config.n_embd))
    names = [hashlib.sha256(data.query_text(e).encode()).hexdigest()[:24] for e in examples]
    missing = {name: e for name, e in zip(names, examples) if name not in known}
    new, ids = list(missing), [data.encode_query(enc, e) for e in missing.values()]
    for e, tokens in zip(missing.values(), ids):
        if len(tokens) > model.config.n_ctx:
            start = e["instruction"][:40]
            raise UserError(f"{what}: the question {start!r} is longer than {model.config.n_ctx} tokens")
    bar = tqdm(total=len(new), desc=f"features of {what}", unit="question", disable=not new)
    for s in range(0, len(new), 512):
        part, features = new[s : s + 512], model.features(ids[s : s + 512])
        path = store / f"{hashlib.sha256(''.join(part).encode()).hexdigest()[:24]}.safetensors"
        data.write_checkpoint(path, {"features": features}, part)
        known |= zip(part, features)
        bar.update(len(part))
    bar.close()
    return torch.stack([known[name] for name in names])


def save(matcher, folder, settings):
    """matcher.safetensors (towers, tau, feature mean, std) and config.json (`settings`: what made it). The
    latter names the weights by digest: a kill between the two must not pair those of two runs."""
    path = folder / "matcher.safetensors"
    data.write_safetensors(path, matcher.state_dict())
    more = {"matcher": matcher.settings, "weights": data.digest_file(path)}
    data.write_json(folder / "config.json", settings | more)


def load(folder):
    """-> (matcher, settings) as saved; UserError if a file is missing, damaged, or of another run."""
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no matcher there; run python train_matcher.py --out {folder.parent}")
    settings, path = data.read_json(folder / "config.json", dict), folder / "matcher.safetensors"
    with data.fitting(folder / "config.json"):
        match settings:
            case {"shots": int(shots), "seed": int(), "max_new_tokens": int(), "reward": dict(),
                  "model": str(), "fingerprint": str(), "adapter": str(), "matcher": shape,
                  "dtype": "torch.float32" | "torch.bfloat16", "weights": weights} if (
                      shots >= 1 and weights == data.digest_file(path)):
                matcher = Matcher(**shape)
                matcher.load_state_dict(dict(data.read_safetensors(path)))
                return matcher, settings
        raise ValueError("its settings are not all there, or matcher.safetensors is not the one it names")


def lesson():
    """A pool of four exemplars, one question, and what a single update does to the policy."""
    torch.manual_seed(0)
    h_pool = F.normalize(torch.tensor([[1.0, 0.2], [0.8, -0.6], [-0.5, 1.0], [1.0, 0.1]]), dim=-1)
    h, allowed = torch.tensor([[1.0, 0.1]]), torch.tensor([[True, True, True, False]])
    matcher = Matcher(C=2, hidden=8)

    def show(when):
        [p] = matcher.first_choice(h, matcher.encode(h_pool), allowed)
        print(f"{when:20s}", *(f"p{j} {x:.3f} " for j, x in enumerate(p[:-1])), f"stop {p[-1]:.3f}")

    print("A question near p0 and p1; p3 asks the very question, so it is not allowed.\n")
    show("nearest neighbour:")
    matcher.sharpen(h, matcher.encode(h_pool), allowed)
    show("entropy 0.7 nats:")
    every = [[i, j] for i in [0, 1, 2] for j in [0, 1, 2, STOP] if i != j] + [[STOP, STOP]]
    log_pi, _ = matcher.log_prob(h, matcher.encode(h_pool), torch.tensor([every]), allowed)  # (1, 10)
    total = log_pi.exp().sum()
    print(f"\nThe probabilities of all {len(every)} sequences of up to two picks add up to {total:.6f}.")
    print("Now p1 earns 1, p0 earns 0: one step along (R - b) grad log pi, b the other rollout's reward.\n")
    log_pi, _ = matcher.log_prob(h, matcher.encode(h_pool), torch.tensor([[[1], [0]]]), allowed)  # (1, 2)
    (-torch.tensor([[1.0, -1.0]]) * log_pi).mean().backward()
    torch.optim.SGD(matcher.parameters(), lr=0.05).step()
    show("after the update:")


if __name__ == "__main__":
    lesson()
