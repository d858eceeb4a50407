"""Constrained decoding on a GPU: what a step of a batch costs, beside the memory's own speed and beside xgrammar.

    PYTHONPATH=.:kernels python kernels/bench/bench_constrained.py [--out FILE] [--vocabulary qwen|made]

Correctness first: a batch is walked beside the batch of the host, and masks, choices and states must be equal, or nothing is
timed. Sequences stand at different places of JSON texts. Parts of a step by CUDA events with a cold cache; whole steps, launched
one by one and replayed as a graph, by the clock of the host over many steps in a row, since there the host is part of the
cost. Bound: V x n x 2 bytes at the bandwidth of a plain copy, which is what one writing of all logits takes; a choice that
does not write logits may be below it. xgrammar does its own way: masks filled on the host, copied, applied by its Triton
kernel; the tokens come to the host for it. Where it is not installed its row is missing and the run says so.
"""

import argparse
import importlib
import sys
import time
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 1, 0)]

import numpy as np  # noqa: E402
from bench_paged_decode import copy_bandwidth  # noqa: E402
from modeltc_kernels.constrained import row_lists  # noqa: E402
from modeltc_kernels.runtime import INTERPRETED  # noqa: E402
from rows import row, save  # noqa: E402

from modeltc_lab.core.bench import gpu_times  # noqa: E402

BATCHES = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
COLUMNS = 151_936   # of the logits of a model with the vocabulary below, padding included
FLUSH = 1 << 30
STEPS = 64          # whole steps in a row
TEXTS = [b'{"id": 1, "name": "caf\\u00e9", "tags": ["a", "b", []], "size": {"w": -1.5e3, "h": null}}', b'[[["deep", [1, 2, [true, false]]], "x"], {"k": "}]"}]', b'["one string, somewhat longer than the others: 0123456789"]', b'{"a": {"b": {"c": {"d": {"e": [0, 0.25, 1e-7]}}}}}']


def made_vocabulary(size=COLUMNS):
    "As many tokens as a large model has, out of nothing but a seed: all bytes, JSON's own pieces, random words."
    from modeltc_lab.decoding.vocabulary import Vocabulary
    rng, letters = np.random.default_rng(0), np.frombuffer(b"etaoinshrdlucmfwypvbgkjqxz0123456789 _", np.uint8)
    tokens = dict.fromkeys([bytes([b]) for b in range(256)] + [b'": "', b'", "', b'":', b"},", b"}}", b"]]", b"]}", b"[[", b'{"', b"true", b"false", b"null", b", ", b": "])
    while len(tokens) < size - 300: tokens[rng.choice(letters, rng.integers(2, 10)).tobytes()] = None
    return Vocabulary.from_bytes([*tokens, None], eos_ids=[len(tokens)], size=size)


def vocabulary_of(name):
    "The vocabulary of a real model from the data registry, or one made here."
    from modeltc_lab.decoding.vocabulary import Vocabulary
    return made_vocabulary() if name == "made" else Vocabulary.named(name, size=COLUMNS)


def tokens_of(vocabulary, text):
    "A text in the longest tokens that fit."
    by_text = {t: i for i, t in enumerate(vocabulary.tokens) if t}
    out = []
    while text:
        size = next(k for k in range(min(24, len(text)), 0, -1) if text[:k] in by_text)
        out.append(by_text[text[:size]])
        text = text[size:]
    return out


def placed(constraint, texts, n, device, **options):
    "A batch whose sequences stand at different places of different texts; and the token that each of them reads next."
    from modeltc_lab.decoding.device import DeviceBatch
    batch = DeviceBatch([constraint] * n, device, **options)
    at = [(i // len(texts)) * 5 % len(texts[i % len(texts)]) for i in range(n)]
    for k in range(max(at, default=0)):
        batch.advance_(torch.tensor([texts[i % len(texts)][k] if k < at[i] else -1 for i in range(n)], device=device))
    return batch, torch.tensor([texts[i % len(texts)][at[i]] for i in range(n)], device=device)


def gate(batch, steps=12, seed=0):
    "Walk beside the batch of the host by the greatest allowed logit; raises where anything differs."
    from modeltc_lab.decoding.batch import BatchState
    batch.reset()
    host, n, g = BatchState(batch.constraints, batch.max_depth, batch.history), len(batch), torch.Generator(device=batch.device).manual_seed(seed)
    for _ in range(steps):
        logits = torch.randn(n, batch.engine.vocabulary.size, generator=g, device=batch.device, dtype=torch.float32).to(torch.bfloat16)
        expected, mine, best = logits.cpu(), logits.clone(), batch.argmax(logits)
        host.apply_(expected)
        batch.apply_(mine)
        if not torch.equal(mine.cpu(), expected): raise ValueError("masked logits differ from the host's: the kernels are wrong and are not timed")
        if not torch.equal(best.cpu(), expected.float().argmax(1)): raise ValueError("chosen tokens differ from the host's: the kernels are wrong and are not timed")
        batch.advance_(best)
        host.advance_(best.cpu().numpy())
        if batch.row_ids().tolist() != host.row_ids().tolist(): raise ValueError("masks after a token differ from the host's: the kernels are wrong and are not timed")
    batch.reset()


def in_a_row(step, steps=STEPS, repeats=10):
    "Seconds a step, by the clock, the device waited for at the end."
    for _ in range(3): step()
    out = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps): step()
        torch.cuda.synchronize()
        out.append((time.perf_counter() - start) / steps)
    return out


def recorded(step):
    "A step as a CUDA graph."
    with torch.cuda.stream(stream := torch.cuda.Stream()): step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): step()
    return graph.replay


def steps_of(batch, tokens, logits):
    "The parts of a step and whole steps; every step reads a token and takes it back, so that it can be repeated."
    def advance():
        batch.advance_(tokens)
        batch.rollback_(1)

    def whole():
        advance()
        batch.apply_(logits)

    def chosen():
        advance()
        batch.argmax(logits)
    return advance, whole, chosen


def xgrammar_step(vocabulary, texts, batch, tokens, logits):
    "The same step by xgrammar: tokens to the host, matchers, masks filled there, copied, applied; None where it cannot be had."
    try: xgrammar = importlib.import_module("xgrammar")
    except ImportError:
        print("xgrammar is not installed: its rows are left out")
        return None
    info = xgrammar.TokenizerInfo([t or b"" for t in vocabulary.tokens], xgrammar.VocabType.RAW, vocab_size=vocabulary.size, stop_token_ids=list(vocabulary.eos_ids))
    compiled = xgrammar.GrammarCompiler(info).compile_builtin_json_grammar()
    n = len(tokens)
    matchers = [xgrammar.GrammarMatcher(compiled, max_rollback_tokens=4) for _ in range(n)]
    for i, m in enumerate(matchers):
        for t in texts[i % len(texts)][:int(batch.state.length[i])]:
            if not m.accept_token(t):
                print("xgrammar refuses a text of the benchmark: its rows are left out")
                return None
    words = xgrammar.allocate_token_bitmask(n, vocabulary.size).pin_memory()

    def step():
        for m, t in zip(matchers, tokens.tolist()):
            if m.accept_token(t): m.rollback(1)
        for i, m in enumerate(matchers): m.fill_next_token_bitmask(words, i)
        xgrammar.apply_token_bitmask_inplace(logits, words.to(logits.device, non_blocking=True))
    return step


def measure(constraint, vocabulary, texts, n, copy, device, data):
    "Records of one batch size."
    batch, tokens = placed(constraint, texts, n, "cuda")
    logits = torch.randn(n, COLUMNS, device="cuda").to(torch.bfloat16)
    fill = torch.zeros(n, batch.engine.width, dtype=torch.int32, device="cuda")
    advance, whole, chosen = steps_of(batch, tokens, logits)
    one, seeds = torch.ones(n, device="cuda"), torch.arange(n, device="cuda")
    config = dict(n=n, columns=COLUMNS, dtype="bfloat16", grammar=constraint.grammar.name, vocabulary=data, copy_bytes_per_s=copy)
    options, out, bound = dict(device=device, x_name="sequences", config=config), [], n * COLUMNS * 2 / copy
    add = lambda method, metric, seconds, **more: out.append(row("constrained_step", method, metric, "us", [1e6 * s for s in seconds], **{**options, **more}, x=n))
    add("bound: logits written once", "time", [bound], implementation="copy")
    parts = {"advance_classify and take_back": advance, "gather_apply": lambda: batch.apply_(logits), "masked_argmax": lambda: batch.argmax(logits),
             "masked_topk_sample k=20": lambda: batch.sample(logits, 20, one, seeds), "fill_bitmask": lambda: batch.fill_bitmask(fill)}
    for method, call in parts.items(): add(method, "time", gpu_times(recorded(call), 40, flush_bytes=FLUSH))
    for method, step in (("advance, apply", whole), ("advance, argmax", chosen)):
        add(method, "step, launched", in_a_row(step))
        add(method, "step, replayed", in_a_row(recorded(step)))
    theirs = xgrammar_step(vocabulary, texts, batch, tokens, logits)
    if theirs: add("xgrammar: fill, copy, apply", "step, launched", in_a_row(theirs, steps=8), implementation="xgrammar")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the rows here instead of docs/results")
    parser.add_argument("--vocabulary", default="qwen", choices=("qwen", "made"), help="qwen: from the data registry; made: as large, from a seed")
    args = parser.parse_args()
    if INTERPRETED or not torch.cuda.is_available():
        print("bench_constrained: no CUDA device, or TRITON_INTERPRET is set; interpreted speed means nothing, so nothing is timed. Run `make gpu` on a machine with a GPU.", file=sys.stderr)
        return 2
    from modeltc_lab.decoding.grammar import Grammar
    from modeltc_lab.decoding.pre3 import compile_grammar
    try: vocabulary = vocabulary_of(args.vocabulary)
    except (OSError, ValueError) as error:
        print(f"bench_constrained: the vocabulary cannot be had ({error}); say --vocabulary made for one that needs no data", file=sys.stderr)
        return 1
    constraint = compile_grammar(Grammar.json(), vocabulary, saturate="full")
    texts, device, copy, rows = [tokens_of(vocabulary, t) for t in TEXTS], torch.cuda.get_device_name(), copy_bandwidth(), []
    print(f"{device}: copy {copy / 1e12:.2f} TB/s; {constraint.stats['rows']} masks, {int((row_lists(torch.from_numpy(constraint.engine.rows[:constraint.engine.count]))[1] >= 0).sum())} of them as lists")
    try: gate(placed(constraint, texts, 16, "cuda")[0])
    except ValueError as error:
        print(f"bench_constrained: {error}", file=sys.stderr)
        return 1
    for n in BATCHES:
        found = measure(constraint, vocabulary, texts, n, copy, device, args.vocabulary)
        rows += found
        print(f"n {n:4d}  " + "  ".join(f"{r['method']}{'' if r['metric'] == 'time' else ' ' + r['metric'].split()[1]} {sorted(r['samples'])[len(r['samples']) // 2]:.1f} us" for r in found), flush=True)
    print(f"{len(rows)} records in {save(rows, args.out)}")
    return 0


if __name__ == "__main__": sys.exit(main())
