"Regular expressions as automata over bytes, against `re`."
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.decoding.grammar import GrammarError, Terminal
from modeltc_lab.decoding.regular import DFA, _ask, _single, dfa, terminal_dfa, utf8

CHARS = "abB0_ é\u212aſ€😀\n"
atoms = st.one_of(st.sampled_from(CHARS).map(re.escape), st.sampled_from([r"\w", r"\d", r"\s", ".", r"[^a]", "[a-z]", "[é-€]", r"[^\w]", r"[^\s\d]", "(?i:b)", "(?i:[a-k])", "(?s:.)", r"(?a:\w)", r"(?ai:k)"]))
patterns = st.recursive(atoms, lambda p: st.one_of(
    st.tuples(p, p).map("".join), st.tuples(p, p).map(lambda x: f"(?:{x[0]}|{x[1]})"), st.tuples(p, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}"])).map(lambda x: f"(?:{x[0]}){x[1]}")), max_leaves=8)
texts = st.text(CHARS, max_size=6)


@settings(max_examples=300, deadline=None)
@given(patterns, st.lists(texts, min_size=5, max_size=20))
def test_same_texts_as_re(pattern, samples):
    auto = dfa(pattern)
    for t in samples: assert auto.matches(t.encode()) == (re.fullmatch(pattern, t) is not None)


@settings(max_examples=100, deadline=None)
@given(patterns, patterns, st.lists(texts, min_size=5, max_size=20))
def test_boolean_operations(a, b, samples):
    both, less, either = dfa(a) & dfa(b), dfa(a) - dfa(b), dfa(a) | dfa(b)
    for t in samples:
        x, y = re.fullmatch(a, t) is not None, re.fullmatch(b, t) is not None
        assert [m.matches(t.encode()) for m in (both, less, either)] == [x and y, x and not y, x or y]
    assert ((dfa(a) - either).empty, (both - dfa(b)).empty) == (True, True)


def distinguished(auto: DFA) -> int:
    "Number of states that some text tells apart (Moore's rounds), the dead one left out."
    full = np.vstack([np.where(auto.delta < 0, len(auto.table), auto.delta), np.full(256, len(auto.table))])
    block = np.append(auto.accept, False).astype(int)
    while True:
        new = np.unique(np.column_stack([block, block[full]]), axis=0, return_inverse=True)[1].ravel()
        if new.max() == block.max(): return len(np.unique(new[:-1][new[:-1] != new[-1]]))
        block = new


@settings(max_examples=150, deadline=None)
@given(patterns)
def test_smallest_and_without_dead_ends(pattern):
    auto = dfa(pattern)
    assert distinguished(auto) == len(auto.table)
    assert len(np.unique(auto.table, axis=1).T) == auto.table.shape[1]
    shortest = auto.shortest()
    assert shortest is not None and re.fullmatch(pattern, shortest.decode())


def test_every_character_of_a_range():
    for low, high in [(0x75, 0x8A), (0x7F0, 0x810), (0xFFF0, 0x10010)]:
        for char in range(low - 3, high + 4):
            text = chr(char).encode()
            hit = any(len(s) == len(text) and all(a <= b <= c for b, (a, c) in zip(text, s)) for s in utf8(low, high))
            assert hit == (low <= char <= high)


@pytest.mark.parametrize("char", [*"aiksZK0_", "é", "ß", "Σ", "\u212a"])
def test_case_is_folded_as_re_does(char):
    assert _single(ord(char), re.I | re.U) == _ask(f"(?i:{re.escape(char)})")


def test_no_half_characters_and_no_surrogates():
    auto = dfa("(?s:.)+")
    rng = random.Random(1)
    for _ in range(2000):
        text = bytes(rng.choices([0x41, 0xC3, 0xA9, 0xED, 0xA0, 0x80, 0xF4, 0x90, 0xE2, 0x82, 0xAC], k=rng.randrange(1, 5)))
        try: valid = bool(text.decode())
        except UnicodeDecodeError: valid = False
        assert auto.matches(text) == valid


def test_counted_repetition_is_counted():
    auto = dfa('"(?:[^"\\\\]|\\\\.){3,200}"')
    for n in (0, 2, 3, 4, 199, 200, 201): assert auto.matches(b'"' + b"\\n" * n + b'"') == (3 <= n <= 200)


@pytest.mark.parametrize(("terminal", "message"), [
    (Terminal("A", "a*"), "matches the empty text"), (Terminal("A", "a", exclude=("[a-c]",)), "matches no text"), (Terminal("A", "a", also=("b",)), "matches no text"),
    (Terminal("A", "a(?=b)"), "looks ahead"), (Terminal("A", r"(a)\1"), "refers back"), (Terminal("A", "(a|b)*a(a|b){30}"), "states")])
def test_refused(terminal, message):
    with pytest.raises(GrammarError, match=message): terminal_dfa(terminal)
