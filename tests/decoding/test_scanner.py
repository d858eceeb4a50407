"Lexer states between bytes, against `re` and against reading byte by byte."
import random
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.decoding.grammar import Grammar, GrammarError, Terminal
from modeltc_lab.decoding.scanner import Scanner, _next_bytes
from modeltc_lab.decoding.vocabulary import Vocabulary

POOL = ["a", "ab", "abc?", "a+b", "[a-c]", "b{2,3}", "c(ab)?c", "é|éa", "[^a]b", "ba", "aab?c", "[^b]", "a[ab]c", "a[^é]?"]


def longest(terminals, text):
    out, at = [], 0
    while at < len(text):
        found = max(((n, -i) for n in range(1, len(text) - at + 1) for i, t in enumerate(terminals) if re.fullmatch(t.pattern, text[at:at + n])), default=None)
        if found is None: return None
        out.append((-found[1], text[at:at + found[0]].encode()))
        at += found[0]
    return out


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(POOL), min_size=1, max_size=5, unique=True), st.lists(st.text("abcé€", min_size=1, max_size=9), min_size=5, max_size=15))
def test_longest_match_as_re_finds_it(patterns, texts):
    terminals = [Terminal(f"T{i}", p) for i, p in enumerate(patterns)]
    scanner = Scanner([b"a"])
    labels = [scanner.label(t) for t in terminals]
    scanner.start(labels)
    if any(scanner.endless(m) for m in scanner.members): return       # committed lexemes are another rule, tested below
    for t in texts: assert scanner.lexemes(labels, t.encode()) == longest(terminals, t)


def test_an_endless_lexeme_is_committed_to():
    scanner = Scanner([b"a"])
    labels = [scanner.label(t) for t in (Terminal("Q", "'"), Terminal("STRING", "'([^']|'')*'"), Terminal("A", "a"))]
    assert scanner.lexemes(labels, b"'a''a'") == [(1, b"'a''a'")]
    assert scanner.lexemes(labels, b"'a'a") == [(1, b"'a'"), (2, b"a")]
    assert scanner.lexemes(labels, b"'a''a") is None                  # not 'a' and then a quote and an a
    assert scanner.lexemes(labels, b"'") == [(0, b"'")]


def test_bytes_that_may_come_in_a_character():
    valid = {chr(c).encode()[:n] for c in [*range(0x80, 0x3000), *range(0xD000, 0xD800), *range(0xE000, 0x10040), *range(0x3FFFE, 0x40002), *range(0x10FFC0, 0x110000)] for n in (1, 2, 3, 4)}
    for text in valid:
        whole = len(text) == (2 if text[0] < 0xE0 else 3 if text[0] < 0xF0 else 4)
        coming = _next_bytes(b"x" + text)
        assert (len(coming) == 0) == whole
        for b in coming:
            done = text + bytes([b])
            done += b"".join(bytes([_next_bytes(done)[0]]) for _ in [0] if _next_bytes(done))
            done += b"".join(bytes([_next_bytes(done)[0]]) for _ in [0] if _next_bytes(done))
            done.decode()
    assert {t[:1] + bytes([b]) for t in valid for b in _next_bytes(t[:1])} >= {t[:2] for t in valid if len(t) > 1}


@pytest.mark.parametrize("name", ["json", "sql", "c", "python", "xml"])
def test_every_token_from_a_state_as_byte_by_byte(name):
    vocabulary, rng = Vocabulary.named("smollm2"), random.Random(name)
    scanner, grammar = _SCANNER.setdefault("smollm2", Scanner(vocabulary.tokens)), Grammar.named(name)
    labels = [scanner.label(t) for t in grammar.terminals]
    start = scanner.start(labels)
    q = start
    for _ in range(12):
        want = scanner.want(np.ones(256, bool))
        walk, whole, seen = scanner.walk(q, scanner.everything, want), scanner.texts.whole, {}
        for i in walk.alive: seen[int(whole[i])] = "inside"
        for e in walk.exits:
            for source, target in zip(e.source.tolist(), e.target.tolist()): seen[int(whole[source])] = (e.label, e.prefix + scanner.texts[int(scanner.elements[e.rest][target])])
        for i in rng.sample(whole.tolist(), 1500):
            text, x, n = scanner.texts[i], q, 0
            while n < len(text) and scanner.delta[x, text[n]] >= 0: x, n = int(scanner.delta[x, text[n]]), n + 1
            expected = "inside" if n == len(text) else (int(scanner.emit[x]), scanner.memory[x][1] + text[n:]) if scanner.emit[x] >= 0 else None
            assert seen.get(i) == expected
        ways = np.flatnonzero(scanner.delta[q] >= 0)
        q = int(scanner.delta[q, rng.choice(ways.tolist())]) if len(ways) else start


_SCANNER: dict[str, Scanner] = {}


def test_states_are_shared_by_grammars():
    scanner = Scanner([b"a"])
    string = Terminal("STRING", '"[^"]*"')
    first = scanner.start([scanner.label(string), scanner.label(Terminal("A", "a"))])
    count = len(scanner.members)
    second = scanner.start([scanner.label(Terminal("B", "b")), scanner.label(Terminal("TEXT", '"[^"]*"'))])
    assert scanner.delta[first, ord('"')] == scanner.delta[second, ord('"')]
    assert len(scanner.members) == count + 2                          # the new beginning, and behind the b


def test_too_many_states_are_refused():
    scanner = Scanner([b"a"], limit=1000)
    labels = [scanner.label(t) for t in (Terminal("A", "a"), Terminal("LONG", "a[b-z]{1,4}!"))]
    with pytest.raises(GrammarError, match="LONG with b'.*' read since A was complete"): scanner.start(labels)
