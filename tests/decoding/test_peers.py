"The packages people use today: the same masks where the language is the same, and adapters, texts and judges that can be trusted."
import random
import re
from functools import lru_cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.compare import decoding as peers
from modeltc_lab.compare.decoding import ENGINES, PERCENTILES, Language, Lexerless, Reference, Tree
from modeltc_lab.core.results import record
from modeltc_lab.decoding.grammar import Grammar
from modeltc_lab.decoding.grammars import GRAMMARS
from modeltc_lab.decoding.pre3 import compile_grammar
from modeltc_lab.decoding.vocabulary import Vocabulary

BYTES = [bytes([b]) for b in range(256)]
PIECES = [b'{"', b'":', b'": ', b'",', b'"}', b"]}", b"]]", b"true", b"nul", b"123", b"1.", b"e-", b"\\u", b"\xc3\xa9", b"\n    ", b"SELECT", b" FROM", b"name", b"((", b"))", b"</", b"/>", b"'' '", b"--", b"==", b" if"]
SMALL = Vocabulary.from_bytes([*BYTES, *PIECES, None], [len(BYTES) + len(PIECES)], name="small")
SAME = {"glrmask": ("json", "arithmetic", "csv", "sql", "c", "python"), "llguidance": ("json", "arithmetic", "csv", "sql"), "xgrammar": ("json", "arithmetic"), "xgrammar_ebnf": ("json", "arithmetic")}
NAMES = ("json", "arithmetic", "csv", "xml", "sql", "c", "python")


def here(name):
    if name not in peers.installed(): pytest.skip(f"{ENGINES[name].package} is not installed (modeltc_lab[peers])")


@lru_cache
def engine(name): return ENGINES[name](SMALL)


def bits(follower):
    follower.fill()
    return np.unpackbits(follower.row.view(np.uint8), bitorder="little")[:SMALL.size].astype(bool)


def walks(name, count, seed):
    "Beginnings of texts, as tokens of the small vocabulary; the first is not text that is ignored."
    rng, m, ignored = random.Random(f"{name} {seed}"), compile_grammar(Grammar.named(name), SMALL).matcher(), peers._ignored_beginnings(Grammar.named(name))
    for _ in range(count):
        m.reset()
        ids = []
        for _ in range(rng.randrange(1, 25)):
            some = [i for i in m.allowed().tolist() if SMALL.tokens[i] and (ids or SMALL.tokens[i][0] not in ignored)]
            if not some: break
            ids.append(rng.choice(some))
            assert m.accept(ids[-1])
        yield ids


@pytest.mark.parametrize(("name", "language"), [(n, l) for n, ls in SAME.items() for l in ls])
def test_masks_are_the_peers(name, language):
    here(name)
    mine, other, lang = engine("modeltc_lab"), engine(name), peers.language_of(language)
    a, b = mine.compile(lang), other.compile(lang)
    ignored = np.array([bool(t) and t[0] in peers._ignored_beginnings(lang.grammar) for t in SMALL.tokens])
    for ids in walks(language, 8, 1):
        f, g = mine.follow(a), other.follow(b)
        for k, i in enumerate(ids):
            x, y = bits(f), bits(g)
            if name == "llguidance": x[ignored & ~y] = False               # it drops ignored text neither at the beginning nor behind the end
            if name == "xgrammar" and not k: x[ignored] = y[ignored] = False
            assert (x == y).all(), (b"".join(SMALL.tokens[j] for j in ids[:k]), [SMALL.tokens[j] for j in np.flatnonzero(x != y)[:5]])
            if name == "llguidance" and not y[i]: break
            assert f.accept(i) and g.accept(i)


@pytest.mark.parametrize("language", NAMES)
def test_masks_are_the_judges(language):
    grammar = Grammar.named(language)
    judge, tree, c = Reference(grammar), Tree(SMALL.tokens), compile_grammar(grammar, SMALL)
    for ids in walks(language, 15, 2):
        text, m = b"".join(SMALL.tokens[i] for i in ids), c.matcher()
        assert m.accept_bytes(text)
        where = judge.read(judge.start(), text)
        right = tree.allowed(judge, where)
        right[list(SMALL.eos_ids)] = judge.may_end(where)
        assert np.flatnonzero(right).tolist() == m.allowed().tolist(), text


@pytest.mark.parametrize("language", NAMES)
def test_the_judges_know_good_from_bad(language):
    judge, loose = Reference(Grammar.named(language)), Lexerless(Grammar.named(language))
    for text in GRAMMARS[language].good:
        for j in (judge, loose): assert (k := j.read(j.start(), text.encode())) >= 0 and j.may_end(k), text
    for text in GRAMMARS[language].bad:
        assert (k := judge.read(judge.start(), text.encode())) < 0 or not judge.may_end(k), text


def test_without_a_lexer_the_language_is_no_smaller():
    judge, loose = Reference(Grammar.named("sql")), Lexerless(Grammar.named("sql"))
    for ids in walks("sql", 15, 3):
        text = b"".join(SMALL.tokens[i] for i in ids)
        assert judge.read(judge.start(), text) >= 0 and loose.read(loose.start(), text) >= 0
    assert judge.read(judge.start(), b"SELECT a WHEREb =") < 0 <= loose.read(loose.start(), b"SELECT a WHEREb =")


@pytest.mark.parametrize("language", NAMES)
def test_printed_for_lark_it_is_the_same_language(language):
    grammar = Grammar.named(language)
    again = Grammar.from_lark(peers.as_lark(grammar), name="again")
    assert len(again.productions) == len(grammar.productions) and len(again.terminals) == len(grammar.terminals)
    a, b = compile_grammar(grammar, SMALL).matcher(), compile_grammar(again, SMALL).matcher()
    for ids in walks(language, 5, 4):
        for m in (a, b): m.reset()
        for i in ids:
            assert a.allowed().tolist() == b.allowed().tolist()
            assert a.accept(i) and b.accept(i)


@settings(max_examples=200, deadline=None)
@given(st.recursive(st.sampled_from([r"a", r"\-", r"[^a\-\]]", r"[x-z/]", r"\.", "k", r"\n", r'"', r"\\", "[&~^]"]), lambda inner: st.one_of(
    st.tuples(inner, inner).map("".join), st.tuples(inner, inner).map(lambda p: f"(?:{p[0]}|{p[1]})"), st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "*?"])).map(lambda p: f"(?:{p[0]}){p[1]}"), inner.map(lambda p: f"(?i:{p})")), max_leaves=6),
    st.text(alphabet="aAkK\u212axyz-/.\n\"\\]^&~b", max_size=6))
def test_regular_expressions_mean_the_same_when_printed(pattern, text):
    printed = peers.regex_text(pattern)
    assert "(?i" not in printed and bool(re.fullmatch(printed, text)) == bool(re.fullmatch(pattern, text)), printed


@pytest.mark.parametrize("name", ["json", "schema", "arithmetic", "sql", "c", "python"])
def test_documents_are_of_their_language(name):
    rng = random.Random(3)
    judge = Reference(Grammar.named("json" if name == "schema" else name))
    for _ in range(15):
        text = peers.document(name, rng)
        assert (k := judge.read(judge.start(), text.encode())) >= 0 and judge.may_end(k), text


@pytest.mark.parametrize("vocabulary", peers.VOCABULARIES)
def test_tokens_write_their_text(vocabulary):
    vocab, encode, rng = Vocabulary.named(vocabulary), peers.encoder(vocabulary), random.Random(1)
    for name in ("json", "sql"):
        text = peers.document(name, rng)
        assert b"".join(vocab.tokens[i] for i in encode(text)) == text.encode()
    assert max(map(len, (vocab.tokens[i] for i in encode("the measurement of engineering")))) > 4


@given(st.lists(st.sampled_from([b"a", b"b", b"c"]), min_size=1, max_size=8), st.permutations([b"ab", b"bc", b"ca", b"abc", b"aa", b"bca"]))
def test_merging_is_greedy_by_rank(letters, order):
    ranks, piece = {t: i for i, t in enumerate([b"a", b"b", b"c", *order])}, b"".join(letters)
    found = [list(ranks)[i] for i in peers.merged(piece, ranks)]
    assert b"".join(found) == piece and all(a + b not in ranks for a, b in zip(found, found[1:]))


@pytest.mark.parametrize("name", [n for n in ENGINES if "grammar" in ENGINES[n].takes and n != "kbnf"])
def test_a_batch_is_its_texts(name):
    here(name)
    e, ids = engine(name), [SMALL.tokens.index(t) for t in (b"[", b"1", b",", b"2", b"]")]
    c = e.compile(Language("json", Grammar.named("json")))
    b, f = e.batch(c, 3), [e.follow(c) for _ in range(3)]
    b.place(2, ids[0])
    assert f[2].accept(ids[0])
    for k in range(4):
        tokens = [ids[k], ids[k], ids[k + 1]]
        b.fill()
        for row, one in zip(b.rows, f):
            one.fill()
            assert (row == one.row).all()
        assert np.all(b.advance(np.array(tokens)))
        assert all(one.accept(t) for one, t in zip(f, tokens))
    assert f[2].may_end() and not f[0].may_end()


@pytest.mark.parametrize("name", [n for n in ENGINES if "schema" in ENGINES[n].takes])
def test_schemas(name):
    here(name)
    fine = engine(name).accepts({"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}}, "required": ["a"], "additionalProperties": False})
    assert [fine(t) for t in ('{"a": 12}', '{"a": 1, "b": "x"}', '{"b": "x"}', '{"a": "1"}', '{"a": 1', '{"a": 1, "b": "z"}', "")] == [True, True, False, False, False, False, False]


def test_what_is_missing_is_named():
    with pytest.raises(ImportError, match=r"no-such-peer .*install modeltc_lab\[peers\]"): peers.peer("no_such_peer")
    with pytest.raises(peers.PeerError, match="modeltc_lab refuses bad"): engine("modeltc_lab").compile(Language("bad", None, {"type": "nothing"}))


def test_a_process_apart():
    assert peers.apart("installed", 60) == peers.installed()
    with pytest.raises(peers.PeerError, match="no end after 0.01 s"): peers.apart("installed", 0.01)
    with pytest.raises(peers.PeerError, match="ended with 1: .*no_such_function"): peers.apart("no_such_function", 60)


def test_percentiles_keep_the_median():
    samples = np.random.default_rng(0).exponential(size=501)
    r = record("decoding", "try", "modeltc_lab", "new text", "us", peers.percentiles(samples))
    assert r.median == pytest.approx(np.median(samples)) and [peers.at(r, p) for p in (99, 100)] == pytest.approx(np.percentile(samples, [99, 100]))
    assert [100 - p for p in PERCENTILES[::-1]] == list(PERCENTILES)


def test_differences_have_causes():
    language = Language("json", Grammar.named("json"))

    class Wrong(peers.Ours):
        def follow(self, compiled, room=None):
            f = super().follow(compiled, room)
            def fill():
                f.fill()
                f.row[ord(" ") >> 5] &= ~np.int32(1 << (ord(" ") & 31))     # never a space
                f.row[ord("x") >> 5] |= np.int32(1 << (ord("x") & 31))      # always an x
            return f._replace(fill=fill)
    e = Wrong(SMALL)
    into = {"positions": 0, "bits": 0, "differ": peers.Counter(), "examples": {}, "from": peers.Counter()}
    judge, loose = Reference(language.grammar), Lexerless(language.grammar)
    tree = Tree(SMALL.tokens)
    for text in (b"", b"[1", b"1"):
        where = judge.read(judge.start(), text)
        right = tree.allowed(judge, where)
        right[list(SMALL.eos_ids)] = judge.may_end(where)
        peers._differences(e, e.compile(language), "document", list(text), text, right, judge.may_end(where), into, loose, {})
    assert into["differ"] == {"refused: ignored text at the beginning or behind the end": 2, "refused: no cause found": 1, "allowed: no cause found": 3}
    assert into["positions"] == 3
