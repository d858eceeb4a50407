"The batch on the device against the batch of the host: every mask of random walks, the way back, and any order of the sequences; a GPU where there is one, else the interpreter."

import random
from functools import lru_cache

import numpy as np
import pytest
import torch

from modeltc_lab.core.data import load
from modeltc_lab.decoding.batch import BatchState, StackLimit
from modeltc_lab.decoding.device import DeviceBatch, tables_of
from modeltc_lab.decoding.grammar import Grammar
from modeltc_lab.decoding.pre3 import CompiledConstraint, compile_grammar
from modeltc_lab.decoding.vocabulary import Vocabulary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
QUERY = r"""
start: "select" columns "from" NAME ("where" cond)? ("limit" INT)?
columns: "*" | NAME ("," NAME)*
cond: simple (("and" | "or") simple)*
simple: NAME OP value | "not" simple | "(" cond ")"
value: INT | TEXT | NAME | "(" start ")"
OP: "=" | "<" | "<=" | "<>"
NAME: /[a-z]+/
INT: /[0-9]+/
TEXT: /'[^']*'/
%ignore " "
"""
# Lexemes that are only seen to be shorter bytes later, inside one another: they are read again, across tokens, in the middle of being read again.
AGAIN = 'start: (A | AB | ABC | B | BCX | C | CXX | X | ABCXXY)+\nA: "a"\nAB: "ab"\nABC: "abc"\nB: "b"\nBCX: "bcxb"\nC: "c"\nCXX: "cxxa"\nX: "x"\nABCXXY: "abcxxy"\n'
GRAMMARS = {"json": Grammar.json, "query": lambda: Grammar.from_lark(QUERY, name="query"), "again": lambda: Grammar.from_lark(AGAIN, name="again"), **{n: (lambda n=n: Grammar.named(n)) for n in ("arithmetic", "csv", "xml")}}
PIECES = [bytes([b]) for b in b'{}[]()<>=/+-*.,:"\' \n0123456789abcdefilmnorstuwxy'] + [b"]}", b"]]", b'": "', b'",', b"true", b"12", b"3.", b"select ", b" from", b" where", b" not (", b"))", b") or", b"})", b", ", b"'x'", b"<a", b"</", b"/>",
          "é".encode()[:1], "é".encode()[1:], b"abcxx", b"bcx", b"xxy", b"a,b"]
VOCABULARY = Vocabulary.from_bytes([*PIECES, None], [len(PIECES)], size=len(PIECES) + 40)   # a word of padding
IMPLS = pytest.mark.parametrize("impl", ["torch", "triton"])


@lru_cache
def compiled(name: str) -> CompiledConstraint: return compile_grammar(GRAMMARS[name](), VOCABULARY, saturate="full")


def masks_of(batch):
    "Masks of either kind of batch, as a list."
    device = isinstance(batch, DeviceBatch)
    out = torch.zeros((len(batch), batch.engine.width), dtype=torch.int32, device=batch.device if device else "cpu")
    batch.fill_bitmask(out if device else out.numpy())
    return out.cpu()


def beside(mine, host):
    "Both are at the same place."
    s, t = mine.state, host.state
    on = np.flatnonzero(t.grammar >= 0).tolist()
    for name in ("q", "sp", "over", "logged", "length"): assert [int(getattr(s, name)[b]) for b in on] == [int(getattr(t, name)[b]) for b in on], name
    for b in on: assert s.stack[b].tolist() == t.stack[b, :t.sp[b]].tolist() + [0] * (mine.max_depth - int(t.sp[b]))
    masks = masks_of(mine)
    assert torch.equal(masks, masks_of(host))
    return masks


def allowed(mask): return np.flatnonzero(np.unpackbits(mask.numpy().view(np.uint8), bitorder="little")[:VOCABULARY.size]).tolist()


def walk(names, impl, steps, seed, max_depth=96, history=6):
    "Allowed tokens, refused ones, none at all, the way back and a new beginning."
    rng, constraints = random.Random(seed), [None if n is None else compiled(n) for n in names]
    mine, host = DeviceBatch(constraints, DEVICE, impl=impl, max_depth=max_depth, history=history), BatchState(constraints, max_depth, history)
    longest = 0
    for _ in range(steps):
        masks = beside(mine, host)
        tokens = []
        for b, m in enumerate(masks):
            ids, wild = allowed(m), rng.random()
            deep = host.state.sp[b] > max_depth // 2                     # the host narrows masks near the top; and no token may spell what must come
            tokens.append(-1 if deep or wild < 0.05 or not ids else rng.randrange(VOCABULARY.size) if wild < 0.15 else rng.choice(ids))
        what = mine.advance_(torch.tensor(tokens, device=DEVICE))
        assert (what == 0).tolist() == host.advance_(tokens).tolist()
        for b, (token, m) in enumerate(zip(tokens, masks)):
            if names[b] and token >= 0 and host.state.length[b]: assert int(what[b]) != 0 or bool(m[token >> 5] >> (token & 31) & 1), "read, but not allowed"
        if rng.random() < 0.25:
            back = [rng.randrange(max(int(n), 1)) for n in mine.state.kept]
            mine.rollback_(torch.tensor(back, device=DEVICE))
            host.rollback_(back)
        longest = max(longest, int(host.state.length.max()))
        ended = np.flatnonzero(host.terminated)
        if len(ended) and rng.random() < 0.5:
            mine.reset(mine.terminated)
            host.reset(ended.tolist())
    beside(mine, host)
    assert not set(mine.flags().tolist()) - {0, 1, 3} and longest > min(steps // 4, 12)


@pytest.mark.parametrize("seed", range(3))
def test_walks_by_the_reference(seed): walk(["json", "query", "arithmetic", None, "csv", "xml", "again", "json", "query"], "torch", 120, seed)


@pytest.mark.parametrize("seed", range(2))
def test_walks_by_the_kernel(seed): walk(["query", "again", None, "xml", "json", "again"], "triton", 18, seed)


def test_the_real_vocabulary():
    "Texts of a data set in tokens of a model, several tokens a lexeme and several lexemes a token."
    smol = Vocabulary.named("smollm2")
    json = compile_grammar(Grammar.json(), smol, saturate="full")
    mine, host = DeviceBatch([json, json], DEVICE, impl="torch"), BatchState([json, json])
    also = DeviceBatch([json, json], DEVICE, impl="triton")
    by_text = {t: i for i, t in enumerate(smol.tokens) if t}
    for n, text in enumerate((b'{"name": "caf\xc3\xa9 \\u00e9", "items": [1, -2.5e+3, [true, null], {}], "x": {"y": [[[]]]}}', b'[["a", "b"], {"k": "]}"}, 0.125, [{"z": [false]}]]')):
        while text:
            size = next(k for k in range(min(12, len(text)), 0, -1) if text[:k] in by_text)
            tokens, text = torch.tensor([by_text[text[:size]], -1][::(-1) ** n], device=DEVICE), text[size:]
            assert mine.advance_(tokens).tolist() == also.advance_(tokens).tolist() == [0, 0] and host.advance_(tokens.tolist()).all()
            assert mine.row_ids().tolist() == also.row_ids().tolist() == host.row_ids().tolist()
    for name in ("q", "sp", "stack", "over", "row", "log", "logged", "peak", "length", "kept", "marks", "what", "flag"): assert torch.equal(getattr(mine.state, name), getattr(also.state, name)), name
    assert min(host.state.length) > 15 and load("smollm2") is not None


@IMPLS
def test_any_order_and_alone(impl):
    "Every sequence does what it would do alone, wherever it stands."
    names, rng = ["json", "query", None, "again"], random.Random(8)
    constraints, steps = [n and compiled(n) for n in names], 6 if impl == "triton" else 25
    alone = [DeviceBatch([c, compiled("json")], DEVICE, impl=impl, max_depth=64) for c in constraints]
    texts, rows = [], []
    for batch in alone:
        tokens, found = [], []
        for _ in range(steps):
            ids = allowed(masks_of(batch)[0])
            tokens.append(rng.choice(ids))
            batch.advance_(torch.tensor([tokens[-1], -1], device=DEVICE))
            found.append(int(batch.row_ids()[0]))
        texts.append(tokens)
        rows.append(found)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]):
        batch = DeviceBatch([constraints[i] for i in order], DEVICE, impl=impl, max_depth=64)
        for k in range(steps):
            batch.advance_(torch.tensor([texts[i][k] for i in order], device=DEVICE))
            assert batch.row_ids().tolist() == [rows[i][k] for i in order]
        for place, i in enumerate(order):
            for name in ("q", "sp", "stack", "over", "logged", "length"): assert torch.equal(getattr(batch.state, name)[place], getattr(alone[i].state, name)[0])
        source = torch.tensor([2, 0, 0, 3], device=DEVICE)
        before = [t.clone() for t in batch.state]
        batch.reorder_(source)
        for t, x in zip(batch.state, before): assert torch.equal(t, x[source])
        assert batch.constraints == [constraints[order[i]] for i in source.tolist()]


@IMPLS
def test_the_way_back_is_exact_to_the_bit(impl):
    "Forward, back by any number, forward again: all of the state, and both rings as far as they are remembered."
    rng, names = random.Random(3), ["json", "again", "query"]
    batch = DeviceBatch([compiled(n) for n in names], DEVICE, impl=impl, max_depth=48, history=20)
    kept = ("grammar", "q", "sp", "stack", "over", "row", "logged", "length", "kept")
    trail = []
    for _ in range(12):
        trail.append([getattr(batch.state, n).clone() for n in kept])
        tokens = torch.tensor([rng.choice(allowed(m)) for m in masks_of(batch)], device=DEVICE)
        assert batch.advance_(tokens).tolist() == [0] * 3
    for back in (12, 1, 5):
        saved = [t.clone() for t in batch.state]
        batch.rollback_(back)
        for n, x in zip(kept, trail[-back]): assert torch.equal(getattr(batch.state, n), x), n
        batch.rollback_(torch.tensor([0, 12 - back, 12 - back + 1], device=DEVICE))
        assert batch.flags().tolist() == [0, 0, 6]
        for n, x, y, z in zip(kept, trail[-back], trail[0], trail[-back]): assert torch.equal(getattr(batch.state, n)[0], x[0]) and torch.equal(getattr(batch.state, n)[1], y[1]) and torch.equal(getattr(batch.state, n)[2], z[2])
        for t, x in zip(batch.state, saved): t.copy_(x)
    with pytest.raises(ValueError, match="sequence 0 was to take back"):
        batch.rollback_(13)
        batch.check()


@IMPLS
def test_a_refused_token_does_not_cost_the_oldest_one(impl):
    batch = DeviceBatch([compiled("json")], DEVICE, impl=impl, max_depth=16, history=2)
    first = batch.state.q.clone()
    for token in (b"[", b"[", b"=", b","): batch.advance_(torch.tensor([PIECES.index(token)], device=DEVICE))
    assert batch.state.length.tolist() == [2] and batch.flags().tolist() == [1]
    batch.rollback_(2)
    assert torch.equal(batch.state.q, first) and batch.state.sp.tolist() == [1] and batch.flags().tolist() == [1]


@IMPLS
def test_what_was_written_over_is_not_taken_back(impl):
    "Two ways back, one after the other, may together not go further than one."
    batch, host = DeviceBatch([compiled("query")], DEVICE, impl=impl, max_depth=16, history=4), BatchState([compiled("query")], 16, 64)
    for token in (b"select ", b"a", b",", b"b", b" from", b" "):
        batch.advance_(torch.tensor([PIECES.index(token)], device=DEVICE))
        host.advance_([PIECES.index(token)])
    batch.rollback_(3)
    host.rollback_([3])
    beside(batch, host)
    batch.rollback_(2)
    assert batch.flags().tolist() == [6]
    beside(batch, host)
    batch.rollback_(1)
    host.rollback_([1])
    beside(batch, host)
    assert batch.state.kept.tolist() == [0]


@IMPLS
def test_a_full_stack_is_said_and_harms_nobody(impl):
    json, open_ = compiled("json"), PIECES.index(b"[")
    batch, host = DeviceBatch([json, json], DEVICE, impl=impl, max_depth=6), BatchState([json], 1024)
    for i in range(7):
        what = batch.advance_(torch.tensor([open_, open_ if i < 3 else -1], device=DEVICE))
        if i < 6: host.advance_([open_])
    assert what.tolist() == [4, 0] and batch.state.length.tolist() == [6, 3] and int(batch.row_ids()[0]) == int(host.row_ids()[0])
    with pytest.raises(StackLimit, match="max_depth=6: sequence 0"): batch.check()
    batch.rollback_(torch.tensor([4, 0], device=DEVICE))
    assert batch.advance_(torch.tensor([PIECES.index(b"]]"), open_], device=DEVICE)).tolist() == [0, 0]


def test_logits_as_on_the_host():
    "Masked in place, chosen from and drawn from, in any row of a larger batch."
    constraints = [compiled("json"), None, compiled("query")]
    mine, host = DeviceBatch(constraints, DEVICE, impl="triton"), BatchState(constraints)
    for token in (b"[", b"select "):
        ids = [PIECES.index(token) if bool(m[PIECES.index(token) >> 5] >> (PIECES.index(token) & 31) & 1) else -1 for m in masks_of(mine)]
        mine.advance_(torch.tensor(ids, device=DEVICE))
        host.advance_(ids)
    g = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.randn(5, VOCABULARY.size + 9, generator=g).to(dtype)
        rows, expected, out = [4, 0, 2], logits.clone(), logits.to(DEVICE)
        part = expected[rows].clone()
        host.apply_(part)
        expected[rows] = part
        mine.apply_(out, torch.tensor(rows, device=DEVICE))
        assert torch.equal(out.cpu(), expected)
        assert mine.argmax(logits.to(DEVICE), torch.tensor(rows, device=DEVICE)).tolist() == part.float().argmax(1).tolist()
    one, seeds = torch.ones(3, device=DEVICE), torch.arange(3, device=DEVICE)
    drawn = mine.sample(logits[rows].to(DEVICE), 2, one, seeds)
    assert torch.equal(drawn, mine.sample(logits.to(DEVICE), 2, one, seeds, torch.tensor(rows, device=DEVICE))) and all(d in p.float().topk(2).indices for d, p in zip(drawn.cpu(), part))


def test_tables_are_copied_once():
    json = compiled("json")
    for name in ("query", "again"): compiled(name)
    a, b = DeviceBatch([json], DEVICE), DeviceBatch([json, compiled("query")], DEVICE)
    assert a.tables is b.tables is tables_of(json.engine, a.device)
    other = compile_grammar(Grammar.from_lark('start: "[" start? "]"', name=f"brackets {random.random()}"), VOCABULARY, saturate="full")
    c = DeviceBatch([other, json], DEVICE)
    assert c.tables is not a.tables and len(c.tables.where) > len(a.tables.where)
    assert a.put(0, compiled("query")) is False and a.put(0, other) is True and a.tables is c.tables
    for batch in (b, c): assert batch.row_ids().tolist() == BatchState(batch.constraints).row_ids().tolist()


def test_what_the_device_cannot_follow():
    lazy = compile_grammar(Grammar.from_lark('start: "a"', name="lazy"), VOCABULARY)
    with pytest.raises(ValueError, match="compile it with saturate='full', or use BatchState"): DeviceBatch([lazy])
    glr = compile_grammar(Grammar.from_lark('start: start start | "a"', name="glr"), VOCABULARY, table="glr", saturate="full")
    with pytest.raises(ValueError, match="ambiguous"): DeviceBatch([glr])
    small = compile_grammar(Grammar.json(), Vocabulary.from_bytes([b"[", b"]", None], [2]), saturate="full")
    with pytest.raises(ValueError, match="2 vocabularies"): DeviceBatch([small, compiled("json")])
    batch = DeviceBatch([compiled("json")])
    with pytest.raises(ValueError, match="another vocabulary"): batch.put(0, small)
    with pytest.raises(ValueError, match="'lazy'"): batch.put(0, lazy)
    with pytest.raises(ValueError, match="bool for each of the 1 sequences"): batch.reset(torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="as int64"): batch.reorder_(torch.zeros(1, dtype=torch.int32))
    batch.advance_(torch.tensor([VOCABULARY.size]))
    with pytest.raises(ValueError, match=f"the tokens 0 to {VOCABULARY.size - 1}"): batch.check()
