"The vLLM backend without vLLM: over abstract classes made from the recorded interface. With vLLM, its real manager and scheduler too. And masks in the kernels of others."
import gzip
import importlib.util
import json
import os
import re
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from modeltc_lab.core.data import find
from modeltc_lab.decoding import vllm_backend
from modeltc_lab.decoding.batch import BatchState
from modeltc_lab.decoding.grammar import Grammar, GrammarError
from modeltc_lab.decoding.pre3 import compile_grammar
from modeltc_lab.decoding.vllm_backend import (
    INTERFACE,
    KINDS,
    VARIABLE,
    GrammarBackend,
    RequestGrammar,
    check_interface,
    read_request,
    register,
)
from modeltc_lab.decoding.vocabulary import Vocabulary

ROOT, VOCAB = Path(__file__).resolve().parents[2], 49152
HERE = importlib.util.find_spec("vllm") is not None


def host(name):
    "vLLM's abstract class as recorded."
    method = lambda parameters: abstractmethod(eval(f"lambda self{''.join(f', {p}' for p in parameters)}: None"))
    return type(name, (ABC,), {k: method(v) for k, v in INTERFACE[name].items()})


HOSTS = {name: host(name) for name in INTERFACE}
Request = type("Request", (RequestGrammar, HOSTS["StructuredOutputGrammar"]), {})
Backend = type("Backend", (GrammarBackend, HOSTS["StructuredOutputBackend"]), {"request_class": Request})


def config(drafts=0, compact=False):
    return SimpleNamespace(speculative_config=SimpleNamespace(num_speculative_tokens=drafts) if drafts else None, structured_outputs_config=SimpleNamespace(disable_any_whitespace=compact))


def kind(name): return SimpleNamespace(name=name)          # vLLM's enum has names


@pytest.fixture(scope="module")
def tokenizer(): return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(gzip.open(find("smollm2")).read().decode()), eos_token="<|im_end|>")


@pytest.fixture(scope="module")
def backend(tokenizer):
    torch.set_num_threads(1)
    return Backend(config(), tokenizer, VOCAB)


def bits(mask, at=0, size=None): return np.flatnonzero(np.unpackbits(mask[at].numpy().view(np.uint8), bitorder="little")[:size]).tolist()


def fill(g, mask, at=0):
    g.fill_bitmask(mask, at)
    return bits(mask, at)


# --- kinds of requests


WISHES = [("REGEX", r"^[A-Z]{2}-[0-9]{3,5}$", lambda t: re.fullmatch(r"[A-Z]{2}-[0-9]{3,5}", t)), ("CHOICE", '["tea", "coffee", "tea with milk", "\\u00e9\\n"]', lambda t: t in ("tea", "coffee", "tea with milk", "\u00e9\n")),
          ("GRAMMAR", 'start: "[" (N ("," N)*)? "]"\nN: /[1-9][0-9]?/', json.loads), ("GRAMMAR", 'root ::= "[" (n ("," n)*)? "]" # none\nn ::= [1-9] [0-9]?\n', json.loads),
          ("GRAMMAR", "list = '[', [n, {',', n}], ']'; n = '1' | '2';", json.loads), ("GRAMMAR", 'start: one+\none: x "a" "b" | y "a" "c"\nx: "d"\ny: "d"', lambda t: re.fullmatch("(da[bc])+", t)),
          ("JSON", '{"type": "array", "items": {"enum": ["a", 7]}, "maxItems": 3}', lambda t: all(x in ("a", 7) for x in json.loads(t))),
          ("JSON", '{"type": "object", "properties": {"when": {"type": "string", "format": "date"}}, "required": ["when"], "additionalProperties": false}', lambda t: re.fullmatch(r"\d{4}-\d\d-\d\d", json.loads(t)["when"]))]


@pytest.mark.parametrize("wish", WISHES, ids=lambda w: f"{w[0].lower()} {w[1][:20]}")
def test_what_is_written_is_in_the_language(backend, tokenizer, wish):
    name, spec, judge = wish
    rng, mask, ended = np.random.default_rng(0), backend.allocate_token_bitmask(1), 0
    likely = {tokenizer.encode(t)[0] for t in '"]},' if len(tokenizer.encode(t)) == 1}
    for _ in range(8):
        g, tokens = backend.compile_grammar(kind(name), spec, {2, 0}), []
        while not g.is_terminated() and len(tokens) < 60:
            ids = fill(g, mask)
            first = [i for i in ids if i in (2, 0) or i in likely]
            tokens.append(int(rng.choice(first if first and rng.random() < 0.5 else ids)))
            assert g.accept_tokens("r", tokens[-1:])
        if g.is_terminated():
            ended += 1
            text = tokenizer.decode(tokens[:-1])
            assert judge(text) or judge(text) == []
    assert ended and (name.lower(), spec) in backend.known


def test_json_objects_with_and_without_white_space(backend, tokenizer):
    tight = Backend(config(compact=True), tokenizer, VOCAB)
    for b, wide in ((backend, True), (tight, False)):
        for spec in (("JSON_OBJECT", ""), ("JSON", '{"type": "object"}')):
            def reads(text, b=b, spec=spec): return b.compile_grammar(kind(spec[0]), spec[1], {2}).accept_tokens("r", [*tokenizer.encode(text), 2])
            assert reads('{"a":[1,{}]}') and not reads("[1]") and not reads('"a"') and reads('{"a": [1 , {} ]}') == wide


@pytest.mark.parametrize("wrong", [("regex", "(?=a)b"), ("regex", "a("), ("choice", "[]"), ("choice", '"a"'), ("choice", "[1]"), ("choice", "{"), ("grammar", 'start: "a" missing'), ("grammar", 'root ::= "a" missing'), ("grammar", 'root ::= "a'),
                                   ("json", "{"), ("json", '{"type": "nothing"}'), ("structural_tag", "{}"), ("something", "")])
def test_what_cannot_be_read(wrong):
    with pytest.raises(ValueError): read_request(*wrong)


def test_kinds_are_those_of_the_errors():
    with pytest.raises(GrammarError, match=", ".join(KINDS)): read_request("structural_tag", "{}")


@given(st.lists(st.text(alphabet="ab(.*\\\n\"\u00e9", max_size=4), min_size=1, max_size=4).filter(any))
@settings(max_examples=60, deadline=None)
def test_choices_are_these_and_no_others(choices):
    v = Vocabulary.from_bytes([bytes([b]) for b in range(256)] + [None], [256])
    c = compile_grammar(read_request("choice", json.dumps(choices)), v)
    for text in {*choices, *(t[:-1] for t in choices if t), *(t + "a" for t in choices)}: assert (c.matcher().refusal(text.encode(), end=True) is None) == (text in choices)


# --- one request, against a matcher that reads everything anew


LETTERS = Vocabulary.from_bytes([b"a", b"b", b"ab", b"c", b"(", b")", None, None, b"))"], [70], size=71)
RULES = [compile_grammar(g, LETTERS) for g in (Grammar.from_lark('start: "a" start | "b"'), Grammar.from_lark('start: "(" start ")" | "c"'), Grammar.from_regex("(ab|c)*"))] + \
        [compile_grammar(Grammar.from_lark('start: one+\none: x "a" "b" | y "a" "a"\nx: "c"\ny: "c"'), LETTERS, table="glr")]


def by_reading(c, stops, tokens):
    "Allowed tokens after these, by reading all of them; None: one cannot come; True: the text has ended before."
    m = c.matcher(history=600)
    for t in tokens:
        if m.terminated: return True
        if not 0 <= t < 70 or not m.accept(70 if t in stops else t): return None
    if m.terminated: return True
    ids = set(m.allowed().tolist())
    return sorted(ids - {70} - stops | (stops if 70 in ids else set()))


@settings(max_examples=120, deadline=None)
@given(st.data())
def test_any_sequence_of_calls(data):
    c, stops = data.draw(st.sampled_from(RULES), label="rules"), set(data.draw(st.sampled_from([[6], [6, 7], [7, 3], [69]]), label="stops"))
    g, tokens, mask = Request(c, stops), [], torch.zeros((2, 5), dtype=torch.int32)
    any_token = st.one_of(st.integers(-1, 9), st.sampled_from([69, 70, 71, *stops]))
    for what in data.draw(st.lists(st.sampled_from(["good", "good", "any", "validate", "back", "reset", "fill"]), max_size=20), label="what"):
        now = by_reading(c, stops, tokens)
        if what == "reset":
            g.reset()
            tokens = []
        elif what == "back":
            n = data.draw(st.integers(0, len(tokens)), label="n")
            g.rollback(n)
            tokens = tokens[:len(tokens) - n]
        elif what == "validate":
            tried = data.draw(st.lists(any_token if now is True or not now else st.one_of(any_token, st.sampled_from(now)), max_size=6), label="tried")
            n = 0
            while n < len(tried) and by_reading(c, stops, tokens + tried[:n]) is not True and by_reading(c, stops, tokens + tried[:n + 1]) is not None: n += 1
            assert g.validate_tokens(list(tried)) == tried[:n]
        elif what in ("good", "any"):
            token = data.draw(st.sampled_from(now) if what == "good" and now not in (True, []) else any_token, label="token")
            read = g.accept_tokens("r", [token])
            assert read == (now is True or by_reading(c, stops, [*tokens, token]) is not None)
            if read and now is not True: tokens.append(token)
        now = by_reading(c, stops, tokens)
        assert g.is_terminated() == (now is True)
        if now is not True: assert fill(g, mask, 1) == (now or list(range(160))) and bits(mask, 0) == []


def test_several_tokens_across_the_end():
    g = Request(RULES[0], {6, 7})
    assert g.accept_tokens("r", [0, 2, 7, 3, 3]) and g.is_terminated()
    g.rollback(1)
    assert not g.is_terminated() and g.validate_tokens([6, 0]) == [6] and not g.is_terminated()
    g.rollback(2)
    assert g.accept_tokens("r", [1]) and not g.accept_tokens("r", [1])
    g.rollback(1)
    assert g.validate_tokens([0] * 300 + [1, 6]) == [0] * 300 + [1, 6]      # more than can be taken back
    with pytest.raises(ValueError, match="never end"): Request(RULES[0], [70, -1])


def test_a_text_that_is_too_deep_is_refused_and_the_mask_is_open():
    g, mask = Request(RULES[1], {6}, max_depth=8), torch.zeros((1, 3), dtype=torch.int32)
    depth = 0
    while len(ids := fill(g, mask)) < 96 and 4 in ids:
        assert g.accept_tokens("r", [4])
        depth += 1
    if len(ids) == 96:
        assert not any(g.accept_tokens("r", [t]) for t in (3, 4, 5)) and not g.is_terminated()
    g.rollback(depth)
    assert fill(g, mask) == [3, 4]


def test_masks_lie_in_the_memory_of_the_tensor(backend):
    big = torch.zeros((4, 2000), dtype=torch.int32)
    view = big[:, :(VOCAB + 31) // 32]                                      # rows with a stride of their own
    g = backend.compile_grammar(kind("REGEX"), "[ab]{3}", {2})
    g.fill_bitmask(view, 2)
    assert big[2].any() and not big[[0, 1, 3]].any() and not big[2, view.shape[1]:].any()
    mask = backend.allocate_token_bitmask(3)
    assert mask.shape == (3, VOCAB // 32) and mask.dtype == torch.int32 and bool((mask == -1).all()) and bits(mask, 0) == list(range(VOCAB))


# --- the backend


def test_vocabularies_that_are_wider_or_narrower(tokenizer):
    wide = Backend(config(drafts=100), tokenizer, VOCAB + 40)
    g, mask = wide.compile_grammar(kind("REGEX"), "a?", {2, VOCAB + 3}), wide.allocate_token_bitmask(1)
    assert mask.shape[1] == -(-(VOCAB + 40) // 32) and {2, VOCAB + 3} <= set(fill(g, mask)) and max(fill(g, mask)) == VOCAB + 3
    assert g.matcher.batch.history == 101 and g.accept_tokens("r", [VOCAB + 3]) and g.is_terminated()
    narrow = Backend(config(), tokenizer, 1000)
    assert narrow.allocate_token_bitmask(1).shape[1] * 32 == VOCAB
    assert backend_ends(tokenizer) == [2]


def backend_ends(tokenizer):
    b = Backend(config(), tokenizer, VOCAB)
    return [i for i in fill(b.compile_grammar(kind("REGEX"), "a?"), b.allocate_token_bitmask(1)) if b.vocabulary.tokens[i] is None]


def test_a_full_engine_is_replaced(tokenizer):
    b = Backend(config(), tokenizer, VOCAB)
    b.most = 2
    made = [b.compile_grammar(kind("REGEX"), f"{x}{{3}}", {2}) for x in "abcd"]
    assert [g.matcher.engine is b.engine for g in made] == [False, False, True, True] and len(b.known) == 2
    assert b.compile_grammar(kind("REGEX"), "d{3}", {2}).matcher.constraint is made[3].matcher.constraint
    b.cache_mb = 0.001
    assert b.compile_grammar(kind("REGEX"), "e", {2}).matcher.engine is not made[3].matcher.engine
    for g, x in zip(made, "abcd"): assert g.accept_tokens("r", [*tokenizer.encode(3 * x), 2]) and g.is_terminated()
    b.destroy()
    assert not b.known


def test_a_request_that_needs_too_many_lexer_states_is_refused(tokenizer):
    b = Backend(config(), tokenizer, VOCAB)
    b.states = 500
    good, engine = b.compile_grammar(kind("REGEX"), "[ab]{2,5}", {2}), b.engine
    with pytest.raises(GrammarError, match="lexer has more than"): b.compile_grammar(kind("GRAMMAR"), "start: (A | B)+\nA: /[ab]/\nB: /[ab]{9}c/", {2})
    assert b.engine is not engine and good.accept_tokens("r", [*tokenizer.encode("abab"), 2]) and good.is_terminated()


def test_threads(tokenizer):
    "Requests are compiled in threads while others are filled and read: each gets what it gets alone."
    b, wrong = Backend(config(), tokenizer, VOCAB), []
    specs = [("REGEX", f"[{x}-z]{{1,4}}(?:{x}{x})+;") for x in "abcdefghij"] + [("GRAMMAR", f'start: "{x}" start "{x}" | "(" start ")" | /[0-9]+/') for x in "abcdefghij"]
    want = {}
    for k, spec in enumerate(specs):
        alone, rng, mask = Backend.compile_grammar(b2 := b if k % 2 else Backend(config(), tokenizer, VOCAB), kind(spec[0]), spec[1], {2}), np.random.default_rng(k), torch.zeros((1, VOCAB // 32), dtype=torch.int32)
        assert b2 is not None
        want[k] = walk(alone, rng, mask)
    fresh = Backend(config(), tokenizer, VOCAB)

    def work(part):
        try:
            for k in part:
                g = fresh.compile_grammar(kind(specs[k][0]), specs[k][1], {2})
                if walk(g, np.random.default_rng(k), torch.zeros((1, VOCAB // 32), dtype=torch.int32)) != want[k]: wrong.append(k)
        except Exception as e: wrong.append(e)
    threads = [threading.Thread(target=work, args=(range(i, 20, 4),)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not wrong


def walk(g, rng, mask, steps=12):
    "Masks along a random text."
    out = []
    for _ in range(steps):
        if g.is_terminated(): break
        ids = fill(g, mask)
        out.append(hash(mask.numpy().tobytes()))
        assert g.accept_tokens("r", [int(rng.choice(ids))])
    return out


# --- the switch


def test_interface():
    for ours, name in ((GrammarBackend, "StructuredOutputBackend"), (RequestGrammar, "StructuredOutputGrammar")): check_interface(ours, HOSTS[name])
    class More(ABC):
        @abstractmethod
        def find_jump_string(self): ...
    class Other(ABC):
        @abstractmethod
        def rollback(self, num_tokens, keep): ...
    with pytest.raises(TypeError, match="does not have"): check_interface(RequestGrammar, More)
    with pytest.raises(TypeError, match="passes keep"): check_interface(RequestGrammar, Other)


def test_the_switch(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert register() is None
    monkeypatch.setenv(VARIABLE, "guidance")
    with pytest.raises(ValueError, match="xgrammar or outlines"): register()


@pytest.mark.skipif(HERE, reason="vllm is installed")
def test_without_vllm_the_error_names_it(monkeypatch):
    monkeypatch.setenv(VARIABLE, "xgrammar")
    for call in (register, vllm_backend.backend_class):
        with pytest.raises(ImportError, match="install vllm"): call()


def test_the_plug_in_is_declared():
    import tomllib
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["vllm.general_plugins"]
    assert points == {"modeltc_lab": "modeltc_lab.decoding.vllm_backend:register"}


@pytest.mark.skipif(not HERE, reason="vllm is not installed; tests/peers/vllm_structured.sh makes an environment that has it")
def test_vllm_s_own_manager_and_scheduler():
    run = subprocess.run([sys.executable, str(ROOT / "tests" / "peers" / "check_vllm_structured.py"), "--quick"], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]


# --- our masks in the kernels of others


def masks(tokenizer, columns):
    "Bitmasks of a batch, and the logits they leave by our own means."
    v = Vocabulary.from_tokenizer(tokenizer, eos_ids=[2], size=VOCAB)
    b = BatchState([compile_grammar(Grammar.json(), v), None, compile_grammar(Grammar.from_regex("[a-z]{3}"), v)])
    b.advance_([tokenizer.encode('{"')[0], -1, tokenizer.encode("ab")[0]])
    out, logits = torch.zeros((3, VOCAB // 32), dtype=torch.int32), torch.randn((3, columns), generator=torch.Generator().manual_seed(0))
    b.fill_bitmask(out.numpy())
    ours = logits.clone()
    b.apply_(ours)
    return out, logits, ours


@pytest.mark.parametrize("columns", [VOCAB, VOCAB + 64])
def test_xgrammar_applies_our_masks(tokenizer, columns):
    xgrammar = pytest.importorskip("xgrammar", reason="xgrammar is not installed; tests/peers/vllm_structured.sh makes an environment that has it")
    out, logits, ours = masks(tokenizer, columns)
    xgrammar.apply_token_bitmask_inplace(logits, out, indices=[0, 2], vocab_size=VOCAB)
    assert torch.equal(logits[:, :VOCAB], ours[:, :VOCAB])
    assert out.shape == xgrammar.allocate_token_bitmask(3, VOCAB).shape and out.dtype == xgrammar.allocate_token_bitmask(3, VOCAB).dtype


def test_llguidance_applies_our_masks(tokenizer):
    applied = pytest.importorskip("llguidance.torch", reason="llguidance is not installed; tests/peers/vllm_structured.sh makes an environment that has it")
    out, logits, ours = masks(tokenizer, VOCAB)
    applied.apply_token_bitmask_inplace(logits, out)
    assert torch.equal(logits, ours)
