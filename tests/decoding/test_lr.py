"LR construction against an Earley recogniser, a textbook LR(1) and hand-checked grammars; the prefix-conditioned automaton against the tables."

import re
from collections import deque
from random import Random

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from modeltc_lab.decoding.grammar import Grammar, GrammarError, Production, Terminal
from modeltc_lab.decoding.lr import (
    ACCEPT,
    END,
    START,
    DepthExceeded,
    GrammarConflict,
    LRTables,
    StackLimit,
    accepts,
    automaton,
    build_dpda,
    build_tables,
    compose,
    glr_accepts,
    lalr,
    lr1,
    matching,
    next_terminals,
    number,
    push_all,
    push_terminal,
    shortest_texts,
    streamline,
    to_arrays,
)

KINDS = ("lalr", "pager", "lr1")


def make(rules: list[tuple[str, tuple[str, ...]]], name: str = "grammar") -> Grammar:
    "A grammar of rules; what has no rule is a terminal."
    left = {a for a, _ in rules}
    names = dict.fromkeys(s for _, r in rules for s in r if s not in left)
    return Grammar(rules[0][0], tuple(Production(*r) for r in rules), tuple(Terminal(t, re.escape(t), literal=True) for t in names), name=name)


def bnf(text: str) -> Grammar:
    "One rule a line, alternatives with `|`."
    return make([(a.strip(), tuple(alt.split())) for line in text.strip().splitlines() for a, r in [line.split("->")] for alt in r.split("|")], text)


class Earley:
    "Recognises and tells what can be continued; sets of (production, dot, origin)."

    def __init__(self, grammar: Grammar):
        self.start = grammar.start
        self.rules = [(p.lhs, p.rhs) for p in grammar.productions]
        self.left = {a for a, _ in self.rules}
        self.empty: set[str] = set()
        while new := {a for a, r in self.rules if set(r) <= self.empty} - self.empty: self.empty |= new
        self.first = (self.close(({(p, 0, 0) for p, (a, _) in enumerate(self.rules) if a == self.start},), 0),)

    def close(self, sets, at):
        here = set(sets[-1])
        todo = list(here)
        def add(item):
            if item not in here:
                here.add(item)
                todo.append(item)
        while todo:
            p, dot, origin = todo.pop()
            a, r = self.rules[p]
            if dot == len(r):
                for q, d, o in list(here if origin == at else sets[origin]):
                    if d < len(self.rules[q][1]) and self.rules[q][1][d] == a: add((q, d + 1, o))
            elif r[dot] in self.left:
                for q, (b, _) in enumerate(self.rules):
                    if b == r[dot]: add((q, 0, at))
                if r[dot] in self.empty: add((p, dot + 1, origin))
        return frozenset(here)

    def step(self, sets, terminal):
        if terminal == END: return sets if any(dot == len(self.rules[p][1]) and o == 0 and self.rules[p][0] == self.start for p, dot, o in sets[-1]) else None
        moved = {(p, d + 1, o) for p, d, o in sets[-1] if d < len(self.rules[p][1]) and self.rules[p][1][d] == terminal}
        return (*sets, self.close((*sets, moved), len(sets))) if moved else None

    def accepts(self, words):
        sets = self.first
        for w in (*words, END):
            if sets is None: return False
            sets = self.step(sets, w)
        return sets is not None


def lr_step(tables: LRTables):
    "One terminal on the tables, as a function of a stack."
    def step(stack, terminal):
        new = list(stack)
        return new if push_terminal(tables, new, tables.column(terminal)) else None
    return step


def compare(one, first, other, second, terminals, n: int) -> int:
    "Walk all strings of up to n terminals on two recognisers; every refusal and every end must agree. Returns the strings both can continue."
    level, seen = [(first, second)], 0
    for k in range(n + 1):
        new = []
        for a, b in level:
            for t in (*terminals, END) if k < n else (END,):
                x, y = one(a, t), other(b, t)
                assert (x is None) == (y is None), (t, a, b)
                if x is not None and t != END: new.append((x, y))
        seen += len(level)
        if len(new) > 400: new = new[::len(new) // 200]
        level = new
    return seen


@st.composite
def grammars(draw, tail: bool = False):
    "Small clean grammars, empty alternatives allowed."
    names, terminals = "SABCD"[:draw(st.integers(2, 5))], "abcd"[:draw(st.integers(2, 4))]
    symbol = st.one_of(st.sampled_from(terminals), st.sampled_from(names))
    side = st.lists(symbol, max_size=3).map(tuple)
    rules = [(a, r) for a in names for r in draw(st.lists(side, min_size=1, max_size=3, unique=True))]
    if tail: rules += [("S", (draw(st.sampled_from(terminals)), *draw(st.sampled_from([("S",), ("A",), ("a", "S")]))))]
    alive: set[str] = set(terminals)
    while new := {a for a, r in rules if set(r) <= alive} - alive: alive |= new
    assume("S" in alive)
    rules = [(a, r) for a, r in dict.fromkeys(rules) if set(r) <= alive]
    reach, todo = {"S"}, ["S"]
    while todo:
        new = {s for a, r in rules if a == todo[-1] for s in r} - reach
        todo.pop()
        reach |= new
        todo += [s for s in new if s in names]
    rules = sorted(((a, r) for a, r in rules if a in reach), key=lambda rule: names.index(rule[0]))
    assume(reach & set(terminals))
    return make(rules)


@st.composite
def contexts(draw):
    "Grammars that LALR often merges too far: what an `A`, `B` or `C` is follows only from the letters on both sides of the same text."
    rng = Random(draw(st.integers(0, 2**32)))
    names = "ABC"[:rng.randint(2, 3)]
    rules = [("S", (before, rng.choice(names), after)) for before in "abx"[:rng.randint(2, 3)] for after in rng.sample("def", rng.randint(1, 3))]
    for n in names: rules += [(n, ("c",)), *([(n, ("g", rng.choice(names)))] if rng.random() < 0.5 else []), *([(n, ("h", rng.choice(names), "h"))] if rng.random() < 0.5 else [])]
    used, todo = {"S"}, ["S"]
    while todo:
        new = {s for a, r in rules if a == todo[-1] for s in r if s in names} - used
        todo.pop()
        used |= new
        todo += new
    return make([rule for rule in dict.fromkeys(rules) if rule[0] in used])


def free(grammar: Grammar, kind: str) -> LRTables | None:
    "Tables of one kind, None if there is a conflict."
    try: return build_tables(grammar, kind)
    except GrammarConflict: return None


quick = settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))


@quick
@given(st.one_of(grammars(), contexts()))
def test_tables_read_the_language(grammar):
    oracle, n = Earley(grammar), 6
    for kind in KINDS:
        if (tables := free(grammar, kind)) is None: continue
        compare(lr_step(tables), list(START), oracle.step, oracle.first, tables.terminals[:-1], n)
    try:
        tables = build_tables(grammar, "glr")
        step = lambda stacks, t: (lambda got: (got[0] or None) if t != END else (stacks if got[1] else None))(push_all(tables, stacks, tables.column(t)))
        compare(step, {START}, oracle.step, oracle.first, tables.terminals[:-1], n)
    except StackLimit: pass


@quick
@given(st.one_of(grammars(), contexts()))
def test_what_may_come_next_is_what_can_be_continued(grammar):
    assume(tables := free(grammar, "lalr") or free(grammar, "pager"))
    oracle, step, level = Earley(grammar), lr_step(tables), [(list(START), Earley(grammar).first)]
    for _ in range(5):
        for stack, sets in level: assert next_terminals(tables, stack) == {t for t in tables.terminals if oracle.step(sets, t) is not None}
        level = [(s, e) for stack, sets in level for t in tables.terminals[:-1] if (s := step(stack, t)) is not None and (e := oracle.step(sets, t)) is not None][:60]


class Textbook:
    "Canonical LR(1) as in any textbook: sets of (production, dot, one terminal)."

    def __init__(self, grammar: Grammar):
        self.rules = [(p.lhs, p.rhs) for p in grammar.productions] + [("start'", (grammar.start,))]
        self.left = {a for a, _ in self.rules}
        self.first: dict[str, set[str]] = {a: set() for a in self.left}
        grew = True
        while grew:
            before = {a: set(f) for a, f in self.first.items()}
            for a, r in self.rules: self.first[a] |= self.begin(r)
            grew = before != self.first
        self.states, self.edges = [self.closure({(len(self.rules) - 1, 0, END)})], []
        for state in self.states:
            self.edges.append({})
            for x in sorted({self.rules[p][1][d] for p, d, _ in state if d < len(self.rules[p][1])}):
                to = self.closure({(p, d + 1, a) for p, d, a in state if d < len(self.rules[p][1]) and self.rules[p][1][d] == x})
                if to not in self.states: self.states.append(to)
                self.edges[-1][x] = self.states.index(to)

    def begin(self, symbols):
        out = set()
        for s in symbols:
            if s not in self.left: return out | {s}
            out |= self.first[s] - {""}
            if "" not in self.first[s]: return out
        return out | {""}

    def closure(self, items):
        items, todo = set(items), list(items)
        while todo:
            p, d, a = todo.pop()
            r = self.rules[p][1]
            if d == len(r) or r[d] not in self.left: continue
            for b in self.begin((*r[d + 1:], a)):
                for q, (left, _) in enumerate(self.rules):
                    if left == r[d] and (q, 0, b) not in items:
                        items.add((q, 0, b))
                        todo.append((q, 0, b))
        return frozenset(items)

    def core(self, state): return frozenset((p, d) for p, d, _ in state if d or p == len(self.rules) - 1)

    def wants(self, items):
        "(terminal, action) pairs of a set of items."
        return {(a, p) for p, d, a in items if d == len(self.rules[p][1])} | {(self.rules[p][1][d], "shift") for p, d, _ in items if d < len(self.rules[p][1]) and self.rules[p][1][d] not in self.left}

    def clashing(self, items):
        seen = [t for t, _ in self.wants(items)]
        return {t for t in seen if seen.count(t) > 1}


def reductions(auto):
    "Multiset of the reductions of all states, by kernel, as names."
    n = auto.numbered
    return sorted((k, p, tuple(n.names(bits))) for k, rs in zip(auto.kernels, auto.reductions) for p, bits in rs)


@settings(quick, max_examples=300)
@given(st.one_of(grammars(), contexts()))
def test_states_and_lookaheads_are_the_textbooks(grammar):
    book, n = Textbook(grammar), number(grammar)
    assume(len(book.states) < 120)
    canonical, pager, small = lr1(n), lr1(n, merge=True), lalr(n)
    merged: dict[frozenset, set] = {}
    for s in book.states: merged.setdefault(book.core(s), set()).update(s)
    assert len(canonical.kernels) == len(book.states) >= len(pager.kernels) >= len(small.kernels) == len(merged)
    def of(states): return sorted((tuple(sorted(n.start[p] + d for p, d in book.core(s))), p, tuple(t for t in n.terminals if (p, len(book.rules[p][1]), t) in s)) for s in states for p in {p for p, d, _ in s if d == len(book.rules[p][1])})
    assert reductions(canonical) == of(book.states)
    by_core = lambda auto: {k: rs for k, rs in zip(auto.kernels, map(sorted, auto.reductions))}
    assert reductions(small) == of([set(v) for v in merged.values()]) and len(by_core(small)) == len(small.kernels)
    clean = not any(map(book.clashing, book.states))
    assert (free(grammar, "lr1") is not None) == clean == (free(grammar, "pager") is not None)       # Pager: conflicts of LR(1) and no others
    assert (free(grammar, "lalr") is not None) == (not any(map(book.clashing, merged.values())))
    assert clean or free(grammar, "lalr") is None


@quick
@given(grammars())
def test_conflicts_are_real_and_shortest(grammar):
    book = Textbook(grammar)
    assume(len(book.states) < 120 and any(map(book.clashing, book.states)))
    with pytest.raises(GrammarConflict) as caught: build_tables(grammar)
    error, tables, auto, oracle = caught.value, build_tables(grammar, "glr"), automaton(grammar), Earley(grammar)
    assert error.certain and len(error.readings) == 2 and error.readings[0].prefix == error.readings[1].prefix
    for reading in error.readings:
        head = reading.prefix if error.terminal == END else (*reading.prefix, error.terminal)
        assert reading.sentence[:len(head)] == head and (error.terminal != END or reading.sentence == head)
        assert oracle.accepts(reading.sentence)
        stack = list(START)
        for s in reading.stack: stack.append(auto.moves(stack[-1])[s])
        if reading.action.startswith("reduce"):
            p = next(p for p, r in enumerate(grammar.productions) if reading.action == f"reduce by {r.lhs} -> {' '.join(r.rhs) or 'nothing'}")
            del stack[len(stack) - len(grammar.productions[p].rhs):]
            stack.append(auto.moves(stack[-1])[grammar.productions[p].lhs])
        elif reading.action.startswith("shift"):
            stack.append(auto.moves(stack[-1])[error.terminal])
        rest = reading.sentence[len(reading.prefix):] if not reading.action.startswith("shift") else reading.sentence[len(head):]
        try:
            stacks = {tuple(stack)}
            for t in rest: stacks = push_all(tables, stacks, tables.column(t), 200)[0]
            assert reading.action == "accept" or push_all(tables, stacks, tables.column(END), 200)[1]
        except StackLimit: pass
    n = number(grammar)
    cost = {n.symbol(s): len(text) for s, text in enumerate(shortest_texts(n))}
    far = {0: 0}
    todo = deque([0])
    while todo:
        s = todo.popleft()
        for x, to in book.edges[s].items():
            if far[s] + cost[x] < far.get(to, 10**9):
                far[to] = far[s] + cost[x]
                todo.append(to)
    assert len(error.readings[0].prefix) == min(far[s] for s in far if book.clashing(book.states[s]))


APART = """
S -> a A d | b B d | a B e | b A e
A -> c
B -> c
"""
DANGLING = "stmt -> if stmt | if stmt else stmt | other"
JSON = """
value -> object | array | string | number | true | false | null
object -> { } | { members }
members -> pair | members , pair
pair -> string : value
array -> [ ] | [ elements ]
elements -> value | elements , value
"""
POWERS = """
sum -> sum + prod | sum - prod | prod
prod -> prod * sign | prod / sign | sign
sign -> - sign | power
power -> atom ^ sign | atom
atom -> n | ( sum )
"""
HARD = [   # the published code builds none of these
    "E -> E + M | M\nM -> M * F | F\nF -> ( E ) | 1",
    "V -> { P } | [ L ] | s\nP -> P , M | M\nM -> s : V\nL -> L , V | V",
    "V -> { P } | [ L ] | s\nP -> M , P | M\nM -> s : V\nL -> V , L | V",
    "S -> i S e S | o | b S b",
]
PARITY = "S -> A a | B b\nA -> x B\nB -> x A | y"
MORE = [
    APART,
    "E -> n | n + E | n - E",
    "S -> a S b | ",
    "A -> x B | z\nB -> y A | z z",
    "A -> f A A | o",
    "L -> x R\nR -> , L | ",
    "S -> ( S ) S | ",
    "S -> X X\nX -> a X | b",
    "T -> p | p > T | ( T ) | ( T ) > T",
    PARITY,
]


def test_state_counts():
    assert [len(automaton(bnf(JSON), k).kernels) for k in KINDS] == [26, 26, 56]
    assert [len(automaton(bnf(POWERS), k).kernels) for k in KINDS] == [22, 22, 42]
    assert [len(automaton(bnf(APART), k).kernels) for k in KINDS] == [13, 14, 14]


def test_auto_takes_the_first_without_conflict():
    assert [build_tables(bnf(g)).kind for g in (JSON, POWERS, APART)] == ["lalr", "lalr", "pager"]
    assert free(bnf(APART), "lalr") is None and free(bnf(APART), "lr1") is not None


def test_a_conflict_of_merged_states_names_both_ways():
    with pytest.raises(GrammarConflict, match="only merged states clash; use table='auto'") as e: build_tables(bnf(APART), "lalr")
    assert (e.value.kind, e.value.terminal, e.value.certain) == ("reduce/reduce", "d", False)
    assert [(r.action, r.prefix, r.sentence) for r in e.value.readings] == [("reduce by A -> c", ("a", "c"), ("a", "c", "d")), ("reduce by B -> c", ("b", "c"), ("b", "c", "d"))]


def test_dangling_else_is_shown_ambiguous():
    with pytest.raises(GrammarConflict) as e: build_tables(bnf(DANGLING))
    assert e.value.readings[0].prefix == ("if", "if", "other") and e.value.kind == "shift/reduce"
    assert {r.sentence for r in e.value.readings} == {("if", "if", "other", "else", "other")}
    assert {r.action for r in e.value.readings} == {"shift else", "reduce by stmt -> if stmt"}
    for words in ("if if other else other", "table='glr'", "stmt -> if stmt . else stmt"): assert words in str(e.value)


def test_palindromes_are_refused_with_two_texts():
    with pytest.raises(GrammarConflict) as e: build_tables(bnf("p -> a p a | b p b | "))
    assert e.value.readings[0].prefix == ("a",) and {"".join(r.sentence) for r in e.value.readings} == {"aa", "aaaa"}


@pytest.mark.parametrize("text", ["a -> a | x", "a -> b | c | x\nb -> x\nc -> x", "a -> a b | x\nb -> "])
def test_rules_that_repeat_themselves_are_conflicts(text):
    with pytest.raises(GrammarConflict) as e: build_tables(bnf(text))
    assert e.value.kind == "reduce/reduce" or e.value.readings[0].action.startswith("shift")


def test_glr_follows_both_readings():
    tables = build_tables(bnf(DANGLING), "glr")
    assert list(tables.alternatives.values()) == [(int(tables.action[next(iter(tables.alternatives))]), -1)]
    for text, good in [("if if other else other", True), ("if other else other", True), ("if other else", False), ("other else other", False), ("", False)]:
        assert glr_accepts(tables, text.split()) is good
    with pytest.raises(GrammarError, match="use glr_accepts"): accepts(tables, ["other"])
    even = build_tables(bnf("p -> a p a | b p b | "), "glr")
    assert [glr_accepts(even, w) for w in ("abba", "abab", "", "a" * 10)] == [True, False, True, True]
    with pytest.raises(StackLimit, match="cap=3 parallel stacks at 'a'"): glr_accepts(even, "a" * 12, cap=3)
    with pytest.raises(StackLimit): glr_accepts(build_tables(bnf("a -> b a x | y\nb -> "), "glr"), "yx")


def test_accept_beside_a_reduction_is_kept():
    tables = build_tables(bnf("a -> a | x"), "glr")
    assert ACCEPT in next(iter(tables.alternatives.values())) and glr_accepts(tables, "x") and not glr_accepts(tables, "xx")


def test_lalr_reduces_before_it_sees_the_error():
    tables = build_tables(bnf("E -> E + T | T\nT -> ( E ) | n"))
    stack = list(START)
    for t in "(n": push_terminal(tables, stack, tables.column(t))
    assert tables.action[stack[-1], tables.column(END)] < 0 and next_terminals(tables, stack) == {"+", ")"}
    before = list(stack)
    assert not push_terminal(tables, stack, tables.column(END)) and stack != before


@pytest.mark.parametrize("text", [*HARD, *MORE, JSON, POWERS])
def test_dpda_is_the_lr_parser(text):
    tables = build_tables(bnf(text))
    dpda = build_dpda(tables)
    assert dpda.exact
    assert compare(lr_step(tables), list(START), dpda.step, list(START), tables.terminals[:-1], 8) >= 9
    keys = [(e.source, e.symbol, e.match) for e in dpda.edges]
    assert not any(a[:2] == b[:2] and a[2] == b[2][:len(a[2])] for i, a in enumerate(keys) for j, b in enumerate(keys) if i != j)      # at most one move
    assert all(e.match[0] == e.source and e.match[:len(e.pop)] == e.pop and len(e.match) <= dpda.depth for e in dpda.edges)


@pytest.mark.parametrize("text", HARD)
def test_hard_grammars_on_every_kind_of_table(text):
    oracle = Earley(bnf(text))
    for kind in KINDS:
        dpda = build_dpda(tables := build_tables(bnf(text), kind))
        compare(dpda.step, list(START), oracle.step, oracle.first, tables.terminals[:-1], 8)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(grammars(tail=True))
def test_dpda_of_random_grammars(grammar):
    assume(tables := free(grammar, "pager"))
    try: dpda = build_dpda(tables, depth=8, limit=3000)
    except DepthExceeded: return
    def sure(stack, terminal):
        try: return dpda.step(stack, terminal)
        except DepthExceeded: return False
    lr, level = lr_step(tables), [(list(START), list(START))]
    for _ in range(9):
        new = []
        for a, b in level:
            for t in tables.terminals:
                if (y := sure(b, t)) is False: continue
                assert (y is None) == ((x := lr(a, t)) is None), (t, a, b)
                if x is not None and t != END: new.append((x, y))
        level = new[::len(new) // 150 + 1]


@pytest.mark.parametrize(("text", "turn"), [("list -> v , list | v", "v ,"), ("E -> n | n + E | n - E", "n + n -"), ("L -> x R\nR -> , L | ", "x ,"), (HARD[3], "i o e"), ("A -> x B | z\nB -> y A | z z", "x y"), ("T -> p | p > T | ( T ) | ( T ) > T", "( p > p ) >")])
def test_idle_turns_leave_the_stack(text, turn):
    tables = build_tables(bnf(text))
    dpda = build_dpda(tables)
    assert dpda.exact and dpda.cycles
    stack, tall = list(START), list(START)
    for t in turn.split() * 12:
        stack = dpda.step(stack, t)
        assert push_terminal(tables, tall, tables.column(t))
        assert dpda.allowed(stack) == next_terminals(tables, tall)
    assert len(tall) > 20 and len(stack) < 8


def test_turns_that_matter_are_kept():
    dpda = build_dpda(build_tables(bnf(PARITY)))
    (cycle,) = dpda.cycles
    assert dpda.exact and len(cycle) == 2 and len(set(cycle)) == 1           # an even number of turns may go, one may not
    assert [dpda.accepts("x" * n + "y" + end) for n in (6, 7) for end in "ab"] == [False, True, True, False]
    nest = build_dpda(build_tables(bnf("s -> x s y | z")))
    assert nest.exact and not nest.cycles and nest.accepts("xxxzyyy") and not nest.accepts("xxxzyy")
    dpda = build_dpda(build_tables(bnf("S -> x S | M\nM -> x M t | ")), depth=6)
    assert not dpda.exact and not dpda.cycles
    assert [dpda.accepts(w) for w in ("xxt", "xtt", "xxx", "xxtt")] == [True, False, True, True]
    with pytest.raises(DepthExceeded, match="depth=6: reading"): dpda.accepts("x" * 9)


def run_bundles(bundles, words):
    "Run whole words of merged edges; at most one fits."
    def go(stack, at):
        if stack is None or at > len(words): return at == len(words) + 1
        text = (*words, END)
        return any(go([*stack[:len(stack) - len(b.pop)], *b.push] if b.dest != ACCEPT else None, at + len(w)) for b in bundles if b.source == stack[-1] and tuple(stack[:-len(b.match) - 1:-1]) == b.match for w in b.words if text[at:at + len(w)] == w)
    return go([0], 0)


@pytest.mark.parametrize("text", [*HARD, "S -> [ L ] | t r u e | n u l l\nL -> L , S | S", "list -> v , list | v"])
def test_streamlined_edges_are_fewer_and_read_the_same(text):
    tables = build_tables(bnf(text))
    dpda = build_dpda(tables)
    bundles = streamline(dpda)
    assert len(bundles) < len(dpda.edges) or all(len(b.words) == 1 == len(b.words[0]) for b in bundles)
    step, level = lr_step(tables), {(): list(START)}
    for _ in range(7):
        for words in level:
            for t in ((), *((t,) for t in tables.terminals[:-1])): assert run_bundles(bundles, words + t) == accepts(tables, words + t), words + t
        level = dict([((*w, t), s) for w, stack in level.items() for t in tables.terminals[:-1] if (s := step(stack, t)) is not None][:40])


@pytest.mark.parametrize("text", [JSON, POWERS, HARD[3]])
def test_arrays_find_the_same_edges(text):
    dpda = build_dpda(build_tables(bnf(text)))
    arrays, level = to_arrays(dpda), [list(START)]
    assert arrays["match"].shape[0] == len(dpda.edges) == arrays["offset"][-1]
    for _ in range(6):
        for stack in level:
            fit = matching(arrays, stack)
            assert {dpda.tables.terminals[c] for c in arrays["symbol"][fit]} == dpda.allowed(stack) == next_terminals(dpda.tables, stack)
            for k in fit:
                if arrays["dest"][k] == ACCEPT: continue
                new = [*stack[:len(stack) - arrays["pop"][k]], *(int(s) for s in arrays["push"][k] if s >= 0)]
                assert new == dpda.step(stack, dpda.tables.terminals[arrays["symbol"][k]]) and new[-1] == arrays["dest"][k]
        level = [s for stack in level for t in dpda.tables.terminals[:-1] if (s := dpda.step(stack, t)) is not None][:60]


def test_two_edges_in_one_do_what_both_do():
    dpda = build_dpda(tables := build_tables(bnf(POWERS)))
    level, tried = [list(START)], 0
    for _ in range(5):
        for stack in level:
            for one in dpda.edges:
                if one.dest == ACCEPT or (between := one.apply(stack)) is None: continue
                for other in dpda.edges:
                    if (after := other.apply(between)) is None: continue
                    match, pop, push = compose(one, other)
                    assert tuple(reversed(stack[len(stack) - len(match):])) == match and [*stack[:len(stack) - len(pop)], *push] == after
                    tried += 1
        level = [s for stack in level for t in tables.terminals[:-1] if (s := dpda.step(stack, t)) is not None][::3][:30]
    assert tried > 50


@pytest.mark.parametrize(("grammar", "words"), [
    (Grammar("a", (Production("a", ("b",)),), ()), "rule 'a' uses 'b', which is neither a terminal nor a rule"),
    (bnf("a -> x | b\nb -> x b"), "'b' derives no text"),
    (bnf("a -> b\nb -> a"), "'a' derives no text"),
    (Grammar("s", (Production("a", ()),), ()), "start='s' has no rule; choose one of a"),
    (Grammar("a", (Production("a", ("x",)),), (Terminal("x", "x"), Terminal("a", "a"))), "'a' names a terminal and also a rule"),
    (Grammar("a", (Production("a", ("$",)),), (Terminal("$", "x"),)), "'\\$' names a terminal and also"),
    (Grammar("a", (Production("a", ("ws",)),), (Terminal("ws", " "),), frozenset({"ws"})), "uses 'ws', which the lexer drops"),
])
def test_unusable_grammars_say_why(grammar, words):
    with pytest.raises(GrammarError, match=words): build_tables(grammar)


def test_arguments_are_checked():
    tables = build_tables(bnf(JSON))
    with pytest.raises(ValueError, match="table='slr': choose auto, lalr"): build_tables(bnf(JSON), "slr")
    with pytest.raises(ValueError, match="kind='slr'"): automaton(bnf(JSON), "slr")
    with pytest.raises(GrammarError, match="terminal='x' is not in grammar"): accepts(tables, ["x"])
    with pytest.raises(GrammarError, match="the automaton is deterministic"): build_dpda(build_tables(bnf(DANGLING), "glr"))
    with pytest.raises(DepthExceeded, match="limit=5"): build_dpda(tables, limit=5)
    with pytest.raises(ValueError, match="depth=0"): build_dpda(tables, depth=0)


def test_table_layout():
    g = Grammar("s", (Production("s", ("x", "s")), Production("s", ())), (Terminal("x", "x"), Terminal("ws", " ")), frozenset({"ws"}))
    t = build_tables(g)
    assert t.terminals == ("x", END) and t.nonterminals == ("s",) and t.action.dtype == t.goto.dtype == t.prod_len.dtype == t.prod_lhs.dtype == np.int16
    assert t.prod_len.tolist() == [2, 0] and t.prod_lhs.tolist() == [0, 0] and not t.alternatives
    assert (t.goto >= -1).all() and t.action.max() == ACCEPT and t.action[t.goto[0, 0], 1] == ACCEPT and t.states == 4
    assert t.action[0, 0] > 0 and t.action[0, 1] == -2
