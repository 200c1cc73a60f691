"""
The matching network: which exemplars of the pool should stand in front of this query?

PILLOW (Qi et al. 2023) has two small MLPs, one for the query and one for the pool's prompts; the dot
product of their outputs, over the pool, is a distribution. Here, with h(.) the language model's mean-pooled
final hidden state of a question and l(.) the log of an exemplar's answer length, standardised over the pool:

    state s_t = (query x, exemplars chosen so far)
    a, s     = MLP_q[h(x), mean of chosen h]       query tower: (C,), and the score of *stop*
    b_j, c_j = MLP_p[h(p_j), 10 l(p_j)]            prompt tower: (C,), and the quality of p_j, for whatever query
    u = unit(h(x) + a),    v_j = unit(h(p_j) + b_j)
    pi(. | s_t) = softmax of  exp(tau) * (<u, v_j> + c_j  for every p_j not yet chosen,  s for *stop*)

l is ours: in cross-validation on Dolly it told more about which exemplar helps than the questions' features did,
on test questions no gain was seen (README, "Real data"). It counts tenfold, or one channel among hundreds would
hardly be heard in the steps a run affords.

Both MLPs end in zeros, so before any training the matcher *is* cosine nearest neighbour and learning can
only bend it (ours; ordinary initialisation, `identity=False`, has to find even that by trial and error).
*stop* is an action of its own (ours), because a wrong exemplar is worse than none.

Picks are without replacement: the distribution is renormalised over what is left at every step, so
log pi of a sequence is the exact one (`Matcher.log_prob`; test_all.py enumerates every sequence).

The other selectors it has to beat stand at the end: BM25, nearest neighbour, random, none. (`fixed`, one exemplar
for all queries, and the oracle need the language model: they are in rl.py and train_matcher.py.)

Left out on purpose: attention between query and exemplars, approximate nearest-neighbour indexes (an exact
scan of 100,000 entries takes milliseconds).
"""

import functools
import hashlib
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import (UserError, digest_file, encode_answer, encode_query, has, query_text, read_checkpoint, read_json, read_safetensors, same_question,
                  write_checkpoint, write_json, write_safetensors)
from model import faster_than_float32

STOP = -1  # in a sequence of picks: "no further exemplar"


@functools.cache
def half_is_faster():
    """Whether one query meets a large pool faster in float16, half the bytes to read. Some CPUs and versions of PyTorch convert
    or multiply number by number and are many times slower; the way to know is to try, which takes some 20 ms."""
    return faster_than_float32(torch.float16, 1, 1 << 13) > 1.25


class Matcher(nn.Module):
    """C: feature width. hidden: width of the towers' MLPs. `stop=False` takes the stop action away.

    candidates: choose among the nearest so many entries only (see `nearest`); 0: the whole pool.
    """

    def __init__(self, C, hidden=256, stop=True, identity=True, candidates=0, tau=math.log(20.0)):
        super().__init__()
        self.settings = {"C": C, "hidden": hidden, "stop": stop, "identity": identity, "candidates": candidates}
        self.candidates = candidates
        self.query_mlp = nn.Sequential(nn.Linear(2 * C, hidden), nn.GELU(), nn.Linear(hidden, C + 1))  # +1: stop
        self.prompt_mlp = nn.Sequential(nn.Linear(C + 1, hidden), nn.GELU(), nn.Linear(hidden, C + 1))  # +1: length; quality
        if identity:
            for mlp in (self.query_mlp, self.prompt_mlp):
                nn.init.zeros_(mlp[-1].weight)
                nn.init.zeros_(mlp[-1].bias)
        self.tau = nn.Parameter(torch.tensor(float(tau)))
        self.identity, self.stop = identity, stop
        self.register_buffer("mean", torch.zeros(C + 1))
        self.register_buffer("std", torch.ones(C + 1))

    def standardise(self, pool_features):
        """Take mean and std from the pool (n, C + 1). A channel that never varies keeps scale 1."""
        self.mean.copy_(pool_features.mean(0))
        std = pool_features.std(0, correction=0)
        self.std.copy_(torch.where(std > 1e-6, std, 1.0))

    def z(self, features):
        """Standardised features of questions: (N, C), or an exemplar's (N, C + 1) -> (N, C)."""
        C = self.settings["C"]
        return (features[:, :C] - self.mean[:C]) / self.std[:C]

    def prompts(self, features, single=False):
        """Pool features (n, C + 1) -> v (n, C) unit vectors, quality (n,), z (n, C), and v in float16 or None: what every query meets.

        single: queries will come one at a time. Then reading v is what a choice from a large pool costs: in float16 it takes a third
        or less where the CPU is up to it, elsewhere laid out channel by channel half. (64 queries at once are slower in float16.)
        """
        z, length = self.z(features), (features[:, -1:] - self.mean[-1]) / self.std[-1]
        out = self.prompt_mlp(torch.cat([z, 10 * length], -1))  # (n, C + 1)
        v = F.normalize((z if self.identity else 0) + out[:, :-1], dim=-1)
        v_half = None
        if single and len(v) >= 1 << 12 and not torch.is_grad_enabled():
            if half_is_faster():
                v_half = v.half()
            else:
                v = v.t().contiguous().t()
        return v, out[:, -1], z, v_half

    def logits(self, query, pool, chosen, forbidden=None, candidates=None):
        """Unnormalised log pi of every action.

        query (B, C) features; pool: from `prompts`; chosen (B, t) pool indices picked so far.
        forbidden (B, n) bool: entries this query must not see (itself and its copies).
        candidates (B, n) bool: if given, only these may be chosen.
        Returns (B, n + 1), the last column being *stop*; -inf where not allowed.
        """
        v, quality, z_pool, v_half = pool
        z = self.z(query)
        context = z_pool[chosen].mean(1) if chosen.shape[1] else torch.zeros_like(z)  # (B, C)
        out = self.query_mlp(torch.cat([z, context], -1))  # (B, C + 1)
        u = F.normalize((z if self.identity else 0) + out[:, :-1], dim=-1)
        cosine = u @ v.t() if v_half is None else (u.half() @ v_half.t()).float()
        scores = torch.cat([cosine + quality, out[:, -1:]], -1)  # (B, n + 1)
        blocked = torch.zeros_like(scores, dtype=torch.bool)
        if chosen.shape[1]:
            blocked.scatter_(1, chosen, True)
        if forbidden is not None:
            blocked[:, :-1] |= forbidden
        if candidates is not None:
            blocked[:, :-1] |= ~candidates
        blocked[:, -1] = False
        if not self.stop:  # then stop remains only where nothing else does
            blocked[:, -1] = ~blocked[:, :-1].all(1)
        if v_half is not None:
            # A cosine of float16 vectors summed in float32 is off by 0.0015 at most (three roundings of 2^-11 each, by Cauchy-Schwarz): whatever
            # may really be the best is within twice that of the best found, and is worked out again. The choice is exact.
            possible = scores.masked_fill(blocked, float("-inf"))
            b, j = (possible[:, :-1] >= possible.amax(1, keepdim=True) - 0.003).nonzero().unbind(1)
            scores[b, j] = (u[b] * v[j]).sum(-1) + quality[j]
        return (scores * self.tau.exp()).masked_fill(blocked, float("-inf"))

    @torch.no_grad()
    def set_stop_prior(self, p, query, pool, **limits):
        """Set the score of *stop* so that the policy, before it learns, stops at once with probability p for the median query.

        Starting at 0, far below any neighbour's cosine, it would hardly ever be tried, so never learnt.
        """
        none = torch.zeros(len(query), 0, dtype=torch.long)
        others = self.logits(query, pool, none, **limits)[:, :-1].logsumexp(-1)  # (B,)
        self.query_mlp[-1].bias[-1] = (others.median() + math.log(p / (1 - p))) / self.tau.exp()

    def act(self, query, pool, shots, generator=None, **limits):
        """Up to `shots` picks for each query (B, C): greedy, or sampled when a generator is given.

        Returns picks (B, shots), STOP from where an episode ended, and each pick's probability (B, shots).
        """
        B = query.shape[0]
        picks, probs = torch.full((B, shots), STOP), torch.ones(B, shots)
        rows = torch.arange(B)  # episodes that go on all have the same number of exemplars so far
        for t in range(shots):
            limit = {k: m[rows] for k, m in limits.items() if m is not None}
            p = self.logits(query[rows], pool, picks[rows, :t], **limit).softmax(-1)  # (b, n + 1)
            a = p.argmax(-1) if generator is None else torch.multinomial(p, 1, generator=generator)[:, 0]
            probs[rows, t] = p.gather(1, a[:, None])[:, 0].detach()
            n = p.shape[1] - 1
            picks[rows, t] = torch.where(a == n, STOP, a)
            rows = rows[a != n]
            if not len(rows):
                break
        return picks, probs

    def log_prob(self, query, pool, picks, **limits):
        """Exact log pi of whole episodes: query (B, C), picks (B, m) -> log-probability (B,), entropy (B,).

        log pi(a_1 .. a_m | x) = sum_t log pi(a_t | s_t), up to and including the stop; entropy is the mean over
        the decisions an episode really took.
        """
        B, m = picks.shape
        logp, entropy = query.new_zeros(B), query.new_zeros(B)
        decisions = query.new_zeros(B)
        rows = torch.arange(B)
        for t in range(m):
            limit = {k: mask[rows] for k, mask in limits.items() if mask is not None}
            lp = self.logits(query[rows], pool, picks[rows, :t], **limit).log_softmax(-1)  # (b, n + 1)
            a = picks[rows, t]
            a = torch.where(a == STOP, lp.shape[1] - 1, a)
            logp = logp.index_add(0, rows, lp.gather(1, a[:, None])[:, 0])
            entropy = entropy.index_add(0, rows, -(lp.exp() * lp.clamp(min=-1e4)).sum(-1))  # 0 log 0 = 0
            decisions = decisions.index_add(0, rows, torch.ones_like(logp[rows]))
            rows = rows[picks[rows, t] != STOP]
            if not len(rows):
                break
        return logp, entropy / decisions

    def save(self, folder, settings):
        """matcher.safetensors (towers, feature mean and std) and config.json (`settings` say what it was made with)."""
        path = Path(folder) / "matcher.safetensors"
        write_safetensors(path, {k: v.contiguous() for k, v in self.state_dict().items()})
        write_json(Path(folder) / "config.json", {"matcher": self.settings, "weights": digest_file(path), **settings})  # see lora.save

    @classmethod
    def load(cls, folder):
        """-> (matcher, settings). UserError when a file is missing, damaged, or does not fit."""
        folder = Path(folder)
        settings = read_json(folder / "config.json", dict)
        shape = settings.get("matcher")
        if not isinstance(shape, dict) or any(type(shape.get(k)) is not int or not 0 < shape[k] <= 1 << 16 for k in ("C", "hidden")):
            raise UserError(f"{folder / 'config.json'}: not a matcher's settings")
        candidates = shape.get("candidates", 0)
        if type(candidates) is not int or candidates < 0:
            raise UserError(f"{folder / 'config.json'}: candidates = {candidates!r} is no number of candidates")
        matcher = cls(shape["C"], shape["hidden"], bool(shape.get("stop", True)), bool(shape.get("identity", True)), candidates)
        state, wanted = dict(read_safetensors(folder / "matcher.safetensors")), matcher.state_dict()
        if set(state) != set(wanted) or any(state[k].shape != wanted[k].shape for k in wanted) or settings.get("weights") != digest_file(folder / "matcher.safetensors"):
            raise UserError(f"{folder / 'matcher.safetensors'}: its weights are not those that config.json describes")
        matcher.load_state_dict(state)
        return matcher, settings


def read_settings(folder):
    """A saved matcher's settings, which sample.py and --eval_only take over. UserError when they are missing, or do not say enough."""
    path, remedy = folder / "config.json", f"run python train_matcher.py --out {folder.parent} without --eval_only first"
    if not path.exists():
        raise UserError(f"{folder}: no matcher there yet; {remedy}")
    settings = read_json(path, dict)
    if not (has(settings, shots=int, seed=int, reward=dict, max_new_tokens=int, model=str, fingerprint=str, adapter=str)
            and isinstance(settings.get("pool"), str | None) and 1 <= settings["shots"] <= 16 and 0 <= settings["seed"] < 1 << 31 and settings["max_new_tokens"] > 0):
        raise UserError(f"{path}: it does not say what the matcher was made with; {remedy}")
    return settings


def cached_features(model, enc, examples, what, cache="cache"):
    """h(.) of each example's question (its answer left out, so that queries and exemplars are alike): (n, C) float32.

    Every text is embedded once and kept in cache/features/<model>/, under a digest of its text: a new pool
    costs its new entries only. They are worked out 512 at a time, each part written when it is whole; an
    interrupted run repeats the same parts, so its features are the same to the bit.
    """
    store = Path(cache) / "features" / f"{model.fingerprint}-{str(model.embed.weight.dtype).removeprefix('torch.')}"
    known, parts = {}, []
    for path in sorted(store.glob("*.safetensors")):
        tensors, keys = read_checkpoint(path)
        features = tensors.get("features", torch.empty(0)).float()
        if not isinstance(keys, list) or not all(isinstance(k, str) for k in keys) or features.shape != (len(keys), model.config.n_embd):
            raise UserError(f"{path}: a damaged feature file; delete it and run again")
        known |= {k: (len(parts), i) for i, k in enumerate(keys)}
        parts.append(features)
    keys = [hashlib.sha256(query_text(e).encode()).hexdigest()[:24] for e in examples]
    missing = list({k: i for i, k in reversed(list(enumerate(keys))) if k not in known}.values())[::-1]
    bar = tqdm(total=len(missing), desc=f"features of {what}", unit="prompt", disable=not missing)
    for s in range(0, len(missing), 512):
        rows = missing[s:s + 512]
        ids = [encode_query(enc, examples[i]) for i in rows]
        for i, prompt in zip(rows, ids):
            if len(prompt) > model.config.n_ctx:
                raise UserError(f"{what}: the question {examples[i]['instruction'][:40]!r} takes {len(prompt):,} tokens, "
                                f"the model's context is {model.config.n_ctx}")
        fresh = model.features(ids)
        names = [keys[i] for i in rows]
        write_checkpoint(store / (hashlib.sha256("".join(names).encode()).hexdigest()[:24] + ".safetensors"), {"features": fresh}, names)
        known |= {k: (len(parts), i) for i, k in enumerate(names)}
        parts.append(fresh)
        bar.update(len(rows))
    bar.close()
    return torch.stack([parts[known[k][0]][known[k][1]] for k in keys])


def pool_features(enc, pool, h):
    """What the prompt tower sees of exemplars: h (n, C) of their questions and the log of their answers' tokens: (n, C + 1)."""
    tokens = torch.tensor([len(encode_answer(enc, e)) for e in pool])  # with the end token, so at least 1
    return torch.cat([h, tokens[:, None].log()], 1)


def rows_at_once(pool):
    """How many queries meet the whole pool at a time: bounded memory, however many there are of either."""
    return max(1, min(1024, (1 << 25) // len(pool)))


def nearest(query, pool, k, forbidden=None):
    """(B, n) bool: the k pool entries most similar to each query (B, C) by cosine, before any learning.

    query and pool are standardised features. Restricting the policy to them keeps large pools learnable.
    """
    mask = torch.zeros(len(query), len(pool), dtype=torch.bool)
    for row, ids in zip(mask, select_nearest(query, pool, forbidden, k)):
        row[ids] = True
    return mask


# ---- what each query may choose, and what the matcher chooses ------------------------------------------


def entries_by_question(pool):
    """{question: the pool's entries that ask it}; made once, for a pool may have 100,000 of them."""
    asking = {}
    for j, e in enumerate(pool):
        asking.setdefault(same_question(e), []).append(j)
    return asking


def forbidden(queries, asking, n):
    """(B, n) bool: those of the pool's first n entries that ask the same question as each query. asking: from `entries_by_question`."""
    mask = torch.zeros(len(queries), n, dtype=torch.bool)
    for b, q in enumerate(queries):
        mask[b, [j for j in asking.get(same_question(q), []) if j < n]] = True
    return mask


def as_lists(picks):
    """(B, m) tensor with STOP -> list of lists of pool indices."""
    return [[p for p in row if p != STOP] for row in picks.tolist()]


def limits_of(matcher, h, pool, mask):
    """The masks under which the matcher chooses, as its methods' keyword arguments: `mask` (B, n) from `forbidden`, and the
    candidates it was trained with, or None. h (B, C); pool: from `prompts`."""
    return {"forbidden": mask, "candidates": nearest(matcher.z(h), pool[2], matcher.candidates, mask) if matcher.candidates else None}


def choose_greedily(matcher, h, h_pool, mask, shots):
    """The matcher's likeliest picks for each query, as lists of pool indices."""
    with torch.no_grad():
        pool, step, picks = matcher.prompts(h_pool), rows_at_once(h_pool), []
        for s in range(0, len(h), step):
            some, few = h[s:s + step], mask[s:s + step]
            picks += as_lists(matcher.act(some, pool, shots, **limits_of(matcher, some, pool, few))[0])
        return picks


# ---- the selectors it is compared with: each returns a list of up to `shots` pool indices per query ----


def select_random(forbidden, shots, seed):
    """forbidden (B, n) bool -> distinct allowed entries, drawn uniformly. seed: a number, or a numpy Generator to go on with."""
    rng = np.random.default_rng(seed)
    allowed = [np.flatnonzero(~row) for row in np.asarray(forbidden)]
    return [rng.choice(a, min(shots, len(a)), replace=False).tolist() for a in allowed]


def select_nearest(query, pool, forbidden, shots):
    """Cosine nearest neighbours of standardised features, nearest first. forbidden (B, n) bool, or None."""
    v, out, step = F.normalize(pool, dim=-1).t(), [], rows_at_once(pool)
    for s in range(0, len(query), step):
        scores = F.normalize(query[s:s + step], dim=-1) @ v
        if forbidden is not None:
            scores = scores.masked_fill(forbidden[s:s + step], float("-inf"))
        top = scores.topk(min(shots, scores.shape[1]), -1)
        for ids, values in zip(top.indices.tolist(), top.values.tolist()):
            out.append([i for i, value in zip(ids, values) if value > float("-inf")])
    return out


class BM25:
    """Okapi BM25 (Robertson & Zaragoza 2009) over the pool's questions: the classic lexical retriever.

    score(q, d) = sum over words w of q:  idf(w) f (k1 + 1) / (f + k1 (1 - b + b |d| / mean |d|)),  f = count of w in d
    idf(w) = log(1 + (n - n_w + 0.5) / (n_w + 0.5))
    """

    def __init__(self, documents, k1=1.5, b=0.75):
        counts = [Counter(self.words(d)) for d in documents]
        length = np.array([sum(c.values()) for c in counts], dtype=np.float64)
        self.n, norm = len(documents), k1 * (1 - b + b * length / max(length.mean(), 1e-9))
        postings = {}
        for i, c in enumerate(counts):
            for w, f in c.items():
                postings.setdefault(w, []).append((i, f))
        self.postings = {}
        for w, pairs in postings.items():
            ids, f = np.array([p[0] for p in pairs]), np.array([p[1] for p in pairs], dtype=np.float64)
            idf = math.log(1 + (self.n - len(ids) + 0.5) / (len(ids) + 0.5))
            self.postings[w] = ids, idf * f * (k1 + 1) / (f + norm[ids])

    @staticmethod
    def words(text):
        return re.findall(r"\w+", text.lower())

    def scores(self, text):
        out = np.zeros(self.n)
        for w in self.words(text):
            if w in self.postings:
                ids, weight = self.postings[w]
                out[ids] += weight
        return out

    def select(self, texts, forbidden, shots):
        """Best first; ties (and queries that share no word with the pool) go by position in the pool."""
        out = []
        for text, row in zip(texts, np.asarray(forbidden)):
            order = np.argsort(-np.where(row, -np.inf, self.scores(text)), kind="stable")
            out.append([int(i) for i in order[:shots] if not row[i]])
        return out
