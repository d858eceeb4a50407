"Masks, against parsers that know nothing of the engine: a lexer by automata and a parser by tables for real grammars, Earley's algorithm for random ones."
import pickle
import random
from base64 import b64decode
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from modeltc_lab.core.data import load
from modeltc_lab.decoding import pre3
from modeltc_lab.decoding.batch import BatchState, StackLimit, ThreadLimit
from modeltc_lab.decoding.grammar import Grammar, GrammarError, Production, Terminal
from modeltc_lab.decoding.lr import END, GrammarConflict, build_tables, next_terminals, push_terminal
from modeltc_lab.decoding.pre3 import CompiledConstraint, compile_grammar, merge_equal
from modeltc_lab.decoding.regular import terminal_dfa
from modeltc_lab.decoding.vocabulary import Vocabulary

SMOL = Vocabulary.named("smollm2")
GRAMMARS = ["json", "arithmetic", "csv", "xml", "sql", "c", "python", "published_arithmetic", "published_json_left", "published_json_right", "published_statement"]


@lru_cache
def compiled(name: str, table: str = "auto") -> CompiledConstraint: return compile_grammar(Grammar.named(name), SMOL, table=table)  # type: ignore[arg-type]


class Reference:
    "Does some text of the language begin so? Lexemes one after the other by each terminal's own automaton, the longest first; terminals by the tables."

    def __init__(self, grammar: Grammar):
        self.grammar, self.tables, self.open, self.known = grammar, build_tables(grammar), {}, {}
        self.autos = {t.name: terminal_dfa(t) for t in grammar.terminals}
        order = sorted(range(len(grammar.terminals)), key=lambda i: (-grammar.terminals[i].priority, not grammar.terminals[i].literal, i))
        self.rank = {grammar.terminals[i].name: k for k, i in enumerate(order)}

    def begin(self): return ((0,), b"")

    def candidates(self, stack):
        if stack not in self.known: self.known[stack] = sorted({*next_terminals(self.tables, list(stack)), *self.grammar.ignore} - {END}, key=self.rank.__getitem__)
        return self.known[stack]

    def step(self, alive, byte): return {t: y for t, x in alive.items() if (y := int(self.autos[t].delta[x, byte])) >= 0}

    def endless(self, alive, path=()):
        "Can it go on for ever from here without completing a lexeme?"
        key = frozenset(alive.items())
        if key in path: return True
        if key not in self.open:
            after = {frozenset(a.items()) for b in range(256) if (a := self.step(alive, b)) and not any(self.autos[t].accept[x] for t, x in a.items())}
            self.open[key] = any(self.endless(dict(a), (*path, key)) for a in after)
        return self.open[key]

    def read(self, state, text):
        "The state behind the text (stack, bytes of the unfinished lexeme), or None."
        stack, text = state[0], state[1] + text
        while True:
            alive, best, n, committed = {t: 0 for t in self.candidates(stack)}, None, 0, False
            while alive and n < len(text):
                alive = self.step(alive, text[n])
                n += 1
                done = [t for t, x in alive.items() if self.autos[t].accept[x]]
                if done: best, committed = (n, done[0]), False
                elif alive and best: committed = committed or self.endless(alive)
            if alive: return stack, text
            if best is None or committed: return None
            if best[1] not in self.grammar.ignore:
                after = list(stack)
                assert push_terminal(self.tables, after, self.tables.columns[best[1]])
                stack = tuple(after)
            text = text[best[0]:]


def texts(name: str, seed: int, count: int) -> list[bytes]:
    "Walks that choose evenly among the allowed tokens: odd texts, deep stacks."
    rng, out = random.Random(f"{name} {seed}"), []
    for _ in range(count):
        m, text = compiled(name).matcher(), b""
        for _ in range(rng.randrange(1, 25)):
            ids = [i for i in m.allowed().tolist() if SMOL.tokens[i]]
            if not ids: break
            short = [i for i in ids if len(SMOL.tokens[i] or b"") <= 2]
            token = rng.choice(short if short and rng.random() < 0.5 else ids)
            assert m.accept(token)
            text += SMOL.tokens[token] or b""
        out.append(text)
    return out


@pytest.mark.parametrize("name", GRAMMARS)
def test_masks_as_the_reference_says(name):
    c, reference, rng = compiled(name), Reference(Grammar.named(name)), random.Random(name)
    tokens = [i for i, t in enumerate(SMOL.tokens) if t]
    for text in texts(name, 1, 12):
        m, state = c.matcher(), reference.begin()
        assert m.accept_bytes(text)
        state = reference.read(state, text)
        assert state is not None
        row = m.row()
        allowed = m.allowed().tolist()
        for i in rng.sample(tokens, 150) + rng.sample(allowed, min(len(allowed), 60)):
            if not SMOL.tokens[i]: continue
            bit = bool(row[i >> 5] >> (i & 31) & 1)
            assert bit == (reference.read(state, SMOL.tokens[i]) is not None), (text, SMOL.tokens[i], bit)


@pytest.mark.parametrize("name", GRAMMARS)
def test_a_token_is_accepted_just_when_its_bit_is_set(name):
    c, rng = compiled(name), random.Random(name)
    for text in texts(name, 2, 4):
        m = c.matcher()
        assert m.accept_bytes(text)
        row, before = m.row().copy(), m.threads()
        for i in rng.sample(range(SMOL.size), 2000):
            ok = m.accept(i)
            assert ok == bool(row[i >> 5] >> (i & 31) & 1)
            if ok: m.rollback()
            assert m.threads() == before and not m.terminated


ADVERSARIAL = [b"]}, ", b'": {"', b"]]]]", b'\\"', b"\n        ", b"\xc3", b"\xa9", b"}}}}", b'":', b"```", b'\\u', b"e-", b"**", b"))", b'""', b"</", b"/>", b"--", b"==", b"' '"]


@pytest.mark.parametrize("name", ["json", "python", "sql", "xml"])
def test_odd_tokens_everywhere(name):
    base = [bytes([b]) for b in range(256)]
    vocabulary = Vocabulary.from_bytes([*base, *ADVERSARIAL, *(a + b for a in ADVERSARIAL for b in ADVERSARIAL), None], [256 + len(ADVERSARIAL) + len(ADVERSARIAL)**2])
    c, reference = compile_grammar(Grammar.named(name), vocabulary), Reference(Grammar.named(name))
    for text in texts(name, 3, 10):
        for cut in range(0, len(text), max(1, len(text) // 4)):
            m, state = c.matcher(), reference.read(reference.begin(), text[:cut])
            assert m.accept_bytes(text[:cut]) and state is not None
            row = m.row()
            for i, token in enumerate(vocabulary.tokens):
                if token: assert bool(row[i >> 5] >> (i & 31) & 1) == (reference.read(state, token) is not None), (text[:cut], token)


def earley(productions, start, text):
    "Is the text the beginning of a sentence, and is it one?"
    by = {}
    for p in productions: by.setdefault(p.lhs, []).append(p.rhs)
    chart = [{(start, rhs, 0, 0) for rhs in by[start]}]
    for i in range(len(text) + 1):
        todo = list(chart[i])
        while todo:
            left, rhs, dot, origin = todo.pop()
            new = set()
            if dot < len(rhs) and rhs[dot] in by:
                new = {(rhs[dot], r, 0, i) for r in by[rhs[dot]]}
                if any(x[0] == rhs[dot] and x[3] == i and x[2] == len(x[1]) for x in chart[i]): new.add((left, rhs, dot + 1, origin))
            elif dot == len(rhs): new = {(a, r, d + 1, o) for a, r, d, o in chart[origin] if d < len(r) and r[d] == left}
            for x in new - chart[i]:
                chart[i].add(x)
                todo.append(x)
        if i == len(text): break
        chart.append({(a, r, d + 1, o) for a, r, d, o in chart[i] if d < len(r) and r[d] == text[i]})
        if not chart[-1]: return False, False
    return True, any(a == start and d == len(r) and o == 0 for a, r, d, o in chart[-1])


symbols = st.sampled_from(["a", "b", "c", "S", "T", "U"])
rules = st.lists(st.tuples(st.sampled_from("STU"), st.lists(symbols, max_size=3).map(tuple)), min_size=2, max_size=8)
LETTERS = [b"a", b"b", b"c", b"ab", b"ba", b"cc", b"abc", b"aab", b"bca", None]


def small(rules, name="small"):
    "A grammar of single letters; None if it has no sentence."
    found = dict.fromkeys(Production(a, r) for a, r in rules)
    productive, size = set("abc"), -1
    while size != (size := len(productive)): productive |= {p.lhs for p in found if set(p.rhs) <= productive}
    found = [p for p in found if set(p.rhs) <= productive and p.lhs in productive]
    reached, size = {"S"}, -1
    while size != (size := len(reached)): reached |= {s for p in found if p.lhs in reached for s in p.rhs}
    found = [p for p in found if p.lhs in reached]
    letters = sorted(reached & set("abc"))
    if "S" not in productive or not letters: return None
    return Grammar("S", tuple(found), tuple(Terminal(x, x, literal=True) for x in letters), name=name)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])
@given(rules, st.randoms(use_true_random=False))
def test_random_grammars_as_earley_says(rules, rng):
    grammar = small(rules)
    assume(grammar is not None)
    vocabulary = Vocabulary.from_bytes(LETTERS, [len(LETTERS) - 1])
    try: c = compile_grammar(grammar, vocabulary)
    except GrammarConflict:
        try: c = compile_grammar(grammar, vocabulary, table="glr")
        except GrammarError: assume(False)
    try:
        for _ in range(4): walk_as_earley_says(grammar, c, rng)
    except GrammarError as e: assert c.ambiguous and "readings" in str(e)          # more than are followed, and said so


def walk_as_earley_says(grammar, c, rng):
    m, text = c.matcher(), ""
    for _ in range(5):
        ids = set(m.allowed().tolist())
        for i, t in enumerate(LETTERS[:-1]): assert (i in ids) == earley(grammar.productions, "S", text + t.decode())[0], (text, t)
        assert (len(LETTERS) - 1 in ids) == m.is_accepting == earley(grammar.productions, "S", text)[1]
        choice = rng.choice(sorted(ids))
        assert m.accept(choice)
        if m.terminated: break
        text += LETTERS[choice].decode()


@pytest.mark.parametrize("name", ["json", "arithmetic", "published_json_left", "published_statement"])
def test_every_kind_of_table_gives_the_same_rows(name):
    kinds = [compiled(name, t).matcher() for t in ("lalr", "pager", "lr1")]
    rng = random.Random(name)
    for text in texts(name, 4, 6):
        for m in kinds:
            m.reset()
            assert m.accept_bytes(text)
        rows = [m.row() for m in kinds]
        assert (rows[0] == rows[1]).all() and (rows[0] == rows[2]).all()
        assert len({rng.choice([0]), *(m.jump_forward() for m in kinds)}) == 2


@pytest.mark.parametrize("name", ["json", "published_arithmetic", "published_statement"])
def test_full_saturation_leaves_nothing_to_make(name):
    vocabulary = Vocabulary.from_bytes([*(t for t in SMOL.tokens[:6000]), None], [6000])
    lazy, full = compile_grammar(Grammar.named(name), vocabulary), compile_grammar(Grammar.named(name), vocabulary, saturate="full")
    before, rng = full.engine.misses, random.Random(name)
    walked = []
    for _ in range(30):
        m = full.matcher()
        for _ in range(40):
            ids = m.allowed()
            walked.append((m.threads(), m.row().copy()))
            assert m.accept(rng.choice(ids.tolist()))
            if m.terminated: break
    assert full.engine.misses == before and full.complete
    for text in texts(name, 5, 5):
        a, b = lazy.matcher(), full.matcher()
        assert a.accept_bytes(text) and b.accept_bytes(text) and (a.row() == b.row()).all()


def test_a_batch_is_its_sequences_in_any_order():
    names = ["json", "sql", "arithmetic", "python", "xml"]
    rng = random.Random(5)
    tokens = {n: [] for n in names}
    for n in names:
        m = compiled(n).matcher()
        for _ in range(12):
            ids = [i for i in m.allowed().tolist() if SMOL.tokens[i]]
            tokens[n].append(rng.choice(ids))
            assert m.accept(tokens[n][-1])
    singles = {n: compiled(n).matcher() for n in names}
    order = rng.sample(names, len(names))
    batch, out = BatchState([None if n is None else compiled(n) for n in [*order, None]]), np.zeros((6, (SMOL.size + 31) // 32), np.int32)
    for step in range(12):
        batch.fill_bitmask(out)
        for row, n in zip(out, order): assert (row == singles[n].row()).all()
        assert (out[5] == -1).all()
        assert batch.advance_([*(tokens[n][step] for n in order), 7]).all()
        for n in names: assert singles[n].accept(tokens[n][step])


def test_taking_back_is_exact():
    c, rng = compiled("python"), random.Random(9)
    m, seen = c.matcher(history=32), []
    for _ in range(300):
        if seen and rng.random() < 0.3:
            n = rng.randrange(1, min(len(seen), 8) + 1)
            m.rollback(n)
            state, row = seen[-n]
            del seen[-n:]
            assert m.threads() == state and (m.row() == row).all()
        else:
            ids = [i for i in m.allowed().tolist() if SMOL.tokens[i]]
            seen.append((m.threads(), m.row().copy()))
            seen = seen[-32:]
            assert m.accept(rng.choice(ids))


def test_forks_do_not_disturb_each_other():
    m = compiled("json").matcher()
    assert m.accept_bytes(b'{"a": [1, ')
    f = m.fork()
    before = m.threads()
    assert f.accept_bytes(b'{"b": 2}]}') and f.is_accepting
    assert m.threads() == before and m.accept_bytes(b"3]}") and m.is_accepting


def test_beams_change_places():
    c = compiled("json")
    batch, texts_ = BatchState([c] * 3), [b'{"a"', b"[1", b"tru"]
    for b, text in enumerate(texts_):
        for x in text: assert batch.advance_([SMOL.tokens.index(bytes([x])) if i == b else -1 for i in range(3)])[b]
    ids = batch.row_ids().copy()
    batch.reorder_([1, 1, 0])
    assert batch.row_ids().tolist() == [ids[1], ids[1], ids[0]]
    one = SMOL.tokens.index(b"]")
    assert batch.advance_([one, -1, -1]).all() and batch.row_ids()[1] == ids[1]


def test_what_must_come_next():
    m = compiled("json").matcher()
    assert m.accept_bytes(b"[fa") and m.jump_forward() == b"lse" and m.accept_bytes(b"lse") and m.jump_forward() == b""
    words = compile_grammar(Grammar.from_lark('start: "never" "gonna" ("give" | "let")', name="words"), SMOL)
    assert words.matcher().jump_forward() == b"nevergonna"


def test_the_end_only_where_the_lexeme_is_complete():
    m = compiled("json").matcher()
    for text, ends in ((b"", False), (b"1", True), (b"1.", False), (b"1.5", True), (b"1.5e", False), (b"1.5e3 ", True)):
        m.reset()
        assert m.accept_bytes(text) and m.is_accepting == ends == (SMOL.eos_ids[0] in m.allowed())


def test_refusals_name_the_byte_and_what_could_come():
    m = compiled("json").matcher()
    r = m.refusal(b'{"a": 1, }')
    assert (r.at, r.byte, r.expected) == (9, b"}", ("STRING", "WS")) and "byte 9" in str(r)
    assert m.refusal(b'{"a": 1', end=True).at == 7
    assert m.refusal(b'[1, 2]', end=True) is None
    assert m.threads() == compiled("json").matcher().threads()


def test_deeper_than_the_stack():
    m = compiled("json").matcher(max_depth=32)
    with pytest.raises(StackLimit, match="max_depth=32"): m.accept_bytes(b"[" * 100)
    assert m.accept_bytes(b"[" * 20 + b"]" * 20) and m.is_accepting


def test_too_many_readings():
    c = compile_grammar(Grammar.from_lark('start: a+\na: "x" | "x" "x" | "x" "x" "x" | b "y"\nb: "x" | "x" b | b "x" "x"\n', name="maze"), Vocabulary.from_bytes([b"x", b"y", None], [2]), table="glr")
    m = c.matcher()
    with pytest.raises(ThreadLimit, match="more than 16 readings"):
        for _ in range(40): m.accept(0)


def test_one_pattern_under_two_names():
    grammar = Grammar.from_lark('start: a | b\na: "x" /[0-9]/\nb: "y" DIGIT\nDIGIT: /[0-9]/\n', name="twins")
    assert len(merge_equal(grammar).terminals) == 3
    m = compile_grammar(grammar, SMOL).matcher()
    assert m.accept_bytes(b"x1") and m.is_accepting
    clash = Grammar("s", (Production("s", ("A",)),), (Terminal("A", "x"), Terminal("B", "x")), frozenset("B"))
    with pytest.raises(GrammarError, match="one of them is ignored"): merge_equal(clash)


def test_padding_and_odd_tokens():
    vocabulary = Vocabulary.from_bytes([b"1", b"1", b"", None, b"\xff", b"[", b"[1", b"]"], [3], size=70)
    m = compile_grammar(Grammar.json(), vocabulary).matcher()
    assert m.allowed().tolist() == [0, 1, 5, 6]
    assert not m.accept(2) and not m.accept(4) and not m.accept(69)
    with pytest.raises(ValueError, match="0 to 69"): m.accept(70)
    out = np.zeros(5, np.int32)
    m.fill_bitmask(out)
    assert out.tolist() == [0b1100011, 0, 0, 0, 0]


def test_the_json_parsing_suite():
    "https://github.com/nst/JSONTestSuite: what every parser must take, and what it must refuse."
    m, seen = compiled("json").matcher(max_depth=1024), {"accept": 0, "reject": 0}
    for case in load("json_parsing_suite"):
        if case["expect"] not in seen: continue
        m.reset()
        try: taken = m.accept_bytes(b64decode(case["b64"])) and m.is_accepting
        except StackLimit: taken = False                       # a hundred thousand opening brackets
        assert taken == (case["expect"] == "accept"), case["name"]
        seen[case["expect"]] += 1
    assert min(seen.values()) >= 95


@pytest.mark.parametrize("name", ["json", "arithmetic", "xml", "sql"])
def test_effects_and_automaton_give_the_same_rows(name):
    "The lazy way runs the effects of the tokens on the stack; the automaton reads the stack from the top. Neither knows the other."
    grammar, lazy, rng = merge_equal(Grammar.named(name)), compiled(name), random.Random(name)
    automaton = CompiledConstraint(lazy.engine, lazy.engine.add(grammar, build_tables(grammar)), False)
    assert automaton.automaton.remembered < 0 <= lazy.automaton.remembered
    for _ in range(12):
        a, b = lazy.matcher(), automaton.matcher()
        for _ in range(25):
            assert np.array_equal(a.row(), b.row())
            ids = a.allowed().tolist()
            token = rng.choice([i for i in ids if len(SMOL.tokens[i] or b"") <= 2] or ids) if rng.random() < 0.6 else rng.choice(ids)
            assert a.accept(token) and b.accept(token)
            if a.terminated: break


def test_a_matcher_lives_on_while_others_add_lexer_states():
    "The engine's arrays move when they grow; whoever looks next must look at the new ones."
    vocabulary = Vocabulary.from_bytes([*(bytes([i]) for i in range(256)), None], [256])
    c = compile_grammar(Grammar.from_lark('start: "' + '" "'.join(f"word{i}x" for i in range(40)) + '"\n%ignore " "', name="words"), vocabulary)
    m, text = c.matcher(), b" ".join(b"word%dx" % i for i in range(40))
    assert m.refusal(text) is None and m.accept_bytes(text) and m.is_accepting
    assert m.engine.scanner.closed > 64


def test_an_engine_from_disk_gives_the_same_rows(tmp_path):
    tokens = [b"1", b"+", b"(", b")", b"))", b"+(", b"1)", None]
    grammar = Grammar.from_lark('start: t ("+" t)*\nt: "1" | "(" start ")"', name="kept")
    first, second = (Vocabulary.from_bytes([*tokens], [7]) for _ in range(2))
    a = compile_grammar(grammar, first, cache_dir=tmp_path)
    texts = [b"", b"1", b"((1", b"(1+", b"((((1"]
    def rows(c):
        out = []
        for text in texts:
            m = c.matcher()
            assert m.accept_bytes(text)
            out.append(m.row().tolist())
        return out
    expected = rows(a)
    pre3.save_engine(first, tmp_path)
    pre3._ENGINES.pop(second, None)
    b = compile_grammar(grammar, second, cache_dir=tmp_path)
    misses = b.engine.misses
    assert b.engine is not a.engine and rows(b) == expected and b.engine.misses == misses
    assert compile_grammar(grammar, second).number == b.number


def test_a_damaged_or_foreign_file_is_not_read(tmp_path):
    vocabulary = Vocabulary.from_bytes([b"1", None], [1])
    grammar = Grammar.from_lark('start: "1"', name="one")
    path = pre3.save_engine(vocabulary, tmp_path)
    for content in (path.read_bytes()[:-20], b"", pickle.dumps(print), pickle.dumps(Path("x"))):
        path.write_bytes(content)
        pre3._ENGINES.pop(vocabulary)
        with pytest.warns(UserWarning, match="cannot be read"): c = compile_grammar(grammar, vocabulary, cache_dir=tmp_path)
        assert c.matcher().allowed().tolist() == [0]


def test_a_cache_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    vocabulary = Vocabulary.from_bytes([b"1", b"2", None], [2])
    with pytest.warns(UserWarning, match="nothing is kept"): compile_grammar(Grammar.from_lark('start: "1"', name="one"), vocabulary, cache_dir=tmp_path / "file" / "below")


def test_only_what_is_remembered_is_taken_back():
    "A refused token, tokens taken back before, and a ring written over must not count as memory."
    c = compile_grammar(Grammar.json(), Vocabulary.from_bytes([b"[", b",", b"]", b"1", None], [4]))
    m = c.matcher(history=2)
    assert m.accept(0) and m.accept(0) and not m.accept(1)
    m.rollback(2)
    assert int(m.batch.state.sp[0]) == 1 and m.batch.state.length[0] == 0
    m = c.matcher(history=4)
    for _ in range(8): assert m.accept(0)
    m.rollback(3)
    with pytest.raises(ValueError, match="remembers 1"): m.rollback(3)
    m.rollback(1)
    with pytest.raises(ValueError, match="remembers 0"): m.rollback(1)
    assert m.accept(0) and m.batch.state.kept[0] == 1


@settings(max_examples=60)
@given(st.lists(st.tuples(st.sampled_from("rtb"), st.integers(0, 30)), max_size=60), st.integers(1, 5), st.sampled_from([8, 24, 64]))
def test_taking_back_as_replaying(actions, history, depth):
    "Reads, refused tokens and steps back, against a matcher that reads everything anew."
    tokens = [b"[", b"]", b"]]", b"[[", b"1", b",", b"1]", b",[", b" ", None]
    c = compile_grammar(Grammar.json(), Vocabulary.from_bytes(tokens, [9]))
    m, read, kept = c.matcher(depth, history), [], 0
    for what, n in actions:
        if what == "b":
            n %= history + 1
            if n > kept:
                with pytest.raises(ValueError): m.rollback(n)
                continue
            try: m.rollback(n)
            except ValueError as e:
                assert "cells" in str(e)          # the ring is short: said, and nothing has changed
                continue
            read, kept = read[:len(read) - n], kept - n
        elif not m.terminated:
            try: ok = m.accept(n % 10)
            except StackLimit: continue
            if ok: read, kept = [*read, n % 10], min(kept + 1, history)
    other = c.matcher(depth, 64)
    for t in read: assert other.accept(t)
    assert m.threads() == other.threads() and m.terminated == other.terminated


def test_one_lexeme_alone_is_never_read_again():
    "A pattern that is the whole text keeps no bytes to read again: behind a point the automaton would otherwise remember every text of twenty bytes."
    vocabulary = Vocabulary.from_bytes([*(bytes([i]) for i in range(256)), None], [256])
    c = compile_grammar(Grammar.from_regex(r"[^\n]{0,20}\."), vocabulary)
    m = c.matcher()
    assert m.accept_bytes(b"a.b") and not m.is_accepting and m.accept_bytes(b".") and m.is_accepting
    assert ord("\n") not in m.allowed() and len(c.engine.scanner.members) < 1000
    nothing = compile_grammar(Grammar.from_regex(""), vocabulary).matcher()
    assert nothing.allowed().tolist() == [256] and nothing.is_accepting
