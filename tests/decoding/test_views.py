"The decoding room's figures and widgets: what they draw is what lexer, parser and masks do."

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.callbacks import InputDeviceState, Points

from modeltc_lab.core.results import record
from modeltc_lab.decoding import commands, views
from modeltc_lab.decoding.grammar import Grammar
from modeltc_lab.decoding.lr import ACCEPT, build_tables
from modeltc_lab.decoding.pre3 import CompiledConstraint, Engine, compile_grammar, merge_equal

SMALL = views.SMALL, views.longest_match(views.SMALL)


def constraint(name):
    "A shipped grammar over the small vocabulary."
    return compile_grammar(Grammar.named(name), views.SMALL)


def example(name, kind="lalr"): return views.study(views.EXAMPLES[name][0], kind)


def table(fig, name): return next(t for t in fig.data if t.type == "table" and t.name == name)


# --- the explorer: what it knows -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [n for n in views.EXAMPLES if n != "letters apart"])
@pytest.mark.parametrize("kind", ["lalr", "lr1"])
def test_following_a_text_is_what_the_matcher_does(name, kind):
    s, text = example(name, kind), views.EXAMPLES[name][1].encode()
    steps, m = views.follow(s, text), s.constraint.matcher()
    assert [len(x.read) for x in steps] == list(range(len(text) + 1))
    for step in steps:
        assert m.threads() == [(step.q, step.stack)] and step.may_end == m.is_accepting
        if len(step.read) < len(text): assert m.accept_bytes(text[len(step.read):len(step.read) + 1])


@pytest.mark.parametrize("name", ["list", "sums", "json"])
def test_the_two_stacks_agree_about_what_comes_next(name):
    "The paper's automaton may hold a shorter stack; it allows the same terminals and moves once a terminal."
    s = example(name)
    for step in views.follow(s, views.EXAMPLES[name][1].encode()):
        assert step.low is not None and len(step.low) <= len(step.stack) and step.low[-1] == step.stack[-1]
        assert s.dpda.allowed(step.low) == {t for t in s.tables.terminals if views.parse(s.tables, step.stack, t)[0] is not None}
        assert len(step.used) == sum(d.startswith("shift") for d in step.did)


def test_a_byte_that_cannot_come_ends_the_reading():
    steps = views.follow(example("json"), b"[1,]")
    assert [x.read for x in steps[-2:]] == [b"[1,", b"[1,"] and steps[-1].refused.startswith("byte 3: ']' cannot come")
    assert steps[-1].stack == steps[-2].stack and not any(x.refused for x in steps[:-1])


def test_actions_are_those_of_the_tables():
    tables = example("sums").tables
    after, did = views.parse(tables, (0,), "NUMBER")
    assert did == (f"shift NUMBER to {after[-1]}",)
    stopped, said = views.parse(tables, after, '")"')
    assert stopped is None and said[-1].startswith('no action on ")" in state') and all(x.startswith("reduce by") for x in said[:-1])  # LALR reduces first, and refuses then
    assert views.parse(tables, after, "$")[1][-1] == "accept"


def test_back_edges_are_the_edges_that_forget():
    "Brute force: compare the height of the parser's stack and of the edge's."
    for name in ("list", "sums", "json"):
        s = example(name)
        for e in s.dpda.edges:
            full, _ = views.parse(s.tables, tuple(reversed(e.match)), e.symbol)
            assert views.turns_off(s.tables, e) == (0 if e.dest == ACCEPT else len(full) - len(e.apply(tuple(reversed(e.match)))))
        assert any(views.turns_off(s.tables, e) for e in s.dpda.edges) == bool(s.dpda.cycles)


@settings(max_examples=60)
@given(st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=8, max_size=8))
def test_cycles_and_places(rows):
    edges = [{i: t for i, t in enumerate(row)} for row in rows]
    reach = lambda a: (lambda seen: [seen.update(edges[s].values()) for _ in edges for s in list(seen)] and seen)(set(edges[a].values()))
    assert views.in_cycles(edges) == {(a, b) for a, out in enumerate(edges) for b in out.values() if a in reach(b)}
    joined = [{**out, 9: (i + 1) % 8} for i, out in enumerate(edges)]     # everything can be reached
    x, y = views.place_states(joined)
    column = np.rint(x)
    assert column[0] == 0 and all(column[b] <= column[a] + 1 for a, out in enumerate(joined) for b in out.values())
    assert ((0 < y) & (y < 1)).all() and len({(c, round(v, 6)) for c, v in zip(column, y)}) == 8


# --- the explorer: what it draws -----------------------------------------------------------------------------------------

def test_every_state_and_move_is_drawn_once():
    s = example("json")
    fig = views.automaton_explorer(s, views.follow(s, b'{"a":[1')[-1])
    nodes = [t for t in fig.data[:11] if t.mode == "markers+text"]
    assert sorted(int(i) for t in nodes for i in t.text) == list(range(27))
    arrows = sum(list(t.marker.size).count(9) for t in fig.data[:2])
    assert arrows == sum(len(set(out.values())) for out in s.auto.edges)
    top = table(fig, "now").cells.values[1]
    assert top[0] == '<b>{"a":[1</b>' and top[3].endswith('"["')


def test_items_and_edges_of_the_state_looked_at():
    s = example("json")
    step = views.follow(s, b"[1")[-1]
    for state in (0, step.stack[-1], 2):
        fig = views.automaton_explorer(s, step, state)
        assert table(fig, "items").header.values[0] == f"<b>items of {state}</b>" and len(table(fig, "items").cells.values[0]) == min(len(s.auto.items(state)), 30)
        mine = [e for e in s.dpda.edges if e.source == state]
        assert len(table(fig, "edges").cells.values[0]) == max(len(mine), 1) and f"state {state}" in fig.layout.title.text


def test_what_is_too_large_is_said():
    with pytest.raises(ValueError, match="LALR states; at most 110 are drawn"): views.study(views.GRAMMARS["sql"].text)
    many = views.study("\n".join(["start: e0", *(f'e{i}: e{i} "o{i}" e{i + 1} | e{i} "p{i}" e{i + 1} | e{i + 1}' for i in range(14)), 'e14: "(" e0 ")" | "n"']))
    fig = views.automaton_explorer(many, views.follow(many, b"no0n")[-1])
    assert many.dpda is None and "more than 8,000 edges" in table(fig, "edges").cells.values[0][0]


def follow_controls(box, moves):
    "Move the controls one by one; the figure changes and nothing complains."
    state = lambda: json.dumps(box.fig.to_plotly_json(), default=str)
    for name, value in moves:
        before = state()
        box.controls[name].value = value
        assert state() != before and box.message.value == "", (name, box.message.value)
        assert box.children[-1] is box.fig


def test_explorer_follows_every_control_and_a_click():
    box = views.automaton_explorer_widget()
    moves = [("table", "Pager"), ("grammar", "json"), ("table", "LR(1)"), ("bytes", 5), ("state", 7), ("text", "[1, 2]"), ("source", 'start: "a" start | "b"\n')]
    assert set(box.controls) == {name for name, _ in moves}
    follow_controls(box, moves)
    assert box.controls["grammar"].value == "your own" and box.study.kind == "lr1"
    box.controls["text"].value = "aab"
    on_top = box.fig.data[8]
    on_top._dispatch_on_click(Points(point_inds=[0]), InputDeviceState())
    assert box.controls["state"].value == box.steps[-1].stack[-1]
    box.controls["source"].value = views.EXAMPLES["sums"][0]
    assert box.controls["grammar"].value == "sums"


@pytest.mark.parametrize("name, value, said", [
    ("source", 'start: "a', "line 1"), ("source", 'start: b', "&#x27;b&#x27;"), ("source", "start: start\n", "start"), ("source", "", "start"), ("grammar", "letters apart", "reduce/reduce conflict"),
    ("source", "start: a\n" + "a: " + " | ".join(f'"{chr(97 + i % 26)}{i}" "x{i}"' for i in range(120)), "at most 110 are drawn")])
def test_wrong_grammars_are_explained_and_the_figure_stays(name, value, said):
    box = views.automaton_explorer_widget("sums")
    shown = box.fig.layout.title.text
    box.controls[name].value = value
    assert said in box.message.value and "Traceback" not in box.message.value and box.fig.layout.title.text == shown
    box.controls["grammar"].value = "json"
    assert box.message.value == "" and box.fig.layout.title.text != shown


def test_explorer_of_a_text_that_is_refused_and_of_none():
    box = views.automaton_explorer_widget("sums", "1+)")
    assert "the next is refused" in box.fig.layout.title.text and "cannot come" in table(box.fig, "now").cells.values[1][6]
    box.controls["text"].value = ""
    assert len(box.steps) == 1 and table(box.fig, "now").cells.values[1][0] == "nothing"
    box.controls["text"].value = "<b>"
    assert "refused" in box.fig.layout.title.text and "<b>" not in table(box.fig, "now").cells.values[1][6].replace("<b></b>", "")


# --- the lens ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["json", "arithmetic", "csv", "xml", "sql", "c"])
def test_effects_at_once_are_the_effects_one_by_one(name):
    c, rng = constraint(name), np.random.default_rng(0)
    for _ in range(3):
        m = c.matcher()
        for _ in range(12):
            allowed = m.allowed()
            assert views.effects(m, allowed) == {k: sorted(v) for k, v in commands.effects(m).items()}
            m.accept(int(rng.choice(allowed)))
            if m.terminated: break


def test_lens_counts_what_the_matcher_allows():
    c = constraint("json")
    tokens = SMALL[1]('{"name": [1, {}, "x"]}')
    lens, m = views.mask_lens(c, tokens), c.matcher()
    assert len(lens.masks) == len(tokens) + 1 and lens.refused == ""
    for mask in lens.masks:
        assert mask.allowed == len(m.allowed()) == sum(map(len, mask.groups.values())) and mask.stack == m.threads()[0][1] and mask.may_end == m.is_accepting
        assert (m.engine.rows[mask.row] == m.row()).all() and 1 <= mask.looked <= len(mask.stack)
        if mask.token >= 0: m.accept(mask.token)
    again = views.mask_lens(c, tokens)
    assert [x.missed for x in again.masks] == [0] * len(again.masks)


def test_only_the_states_that_were_read_decide():
    "A stack with something else below what was read has the same row."
    c = constraint("json")
    lens = views.mask_lens(c, SMALL[1]('{"k": {"name": [[1'))
    mask = lens.masks[-1]
    other = views.mask_lens(c, SMALL[1]('[{"k": {"name": [[1')).masks[-1]
    assert mask.looked < len(mask.stack) and mask.stack[-mask.looked:] == other.stack[-mask.looked:] and mask.row == other.row


def test_first_walk_misses_and_counts_it():
    engine, g = Engine(views.SMALL), merge_equal(Grammar.json())
    before = engine.misses
    lens = views.mask_lens(CompiledConstraint(engine, engine.add(g, build_tables(g)), False), SMALL[1]("[1, 2, 3]"))
    assert lens.masks[0].missed > 0 and sum(m.missed for m in lens.masks) <= engine.misses - before
    assert lens.masks[-2].missed == 0  # the third number is like the second


@pytest.mark.parametrize("read, text, parts", [
    (b'{"a": 1', b"]", ("byte 0: ']' cannot come behind NUMBER", "shift NUMBER", 'no action on "]" in state')), (b"[", b"tru,", ("byte 3", 'in the middle of "true"', "the lexer refuses it")),
    (b"", b"x", ("byte 0", "no terminal begins with 'x'")), (b'{"a"', b"1", ("behind STRING", "no action on NUMBER in state")), (b"[1", b"2]]", ("byte 2: ']' cannot come", 'then on "]" reduce by array', 'no action on "]" in state')), (b"[1", b", 2]", ())])
def test_refusal_names_byte_and_action(read, text, parts):
    c = constraint("json")
    said = views.refusal(c, read, text)
    assert bool(said) == bool(parts) and all(p in said for p in parts), said
    m = c.matcher()
    assert (not read or m.accept_bytes(read)) and m.accept_bytes(text) == (said == "")


def test_lens_of_refused_and_of_ambiguous():
    lens = views.mask_lens(constraint("json"), SMALL[1]("[1 2]"))
    assert lens.masks[-1].read == b"[1 " and "cannot come" in lens.refused
    fig = views.token_mask_lens(lens, len(lens.masks) - 1)
    assert "refused" in table(fig, "now").cells.values[1][1]
    twice = compile_grammar(Grammar.from_lark('start: start "," start | "1"', name="twice"), views.SMALL, table="glr")
    with pytest.raises(ValueError, match="'twice' has conflicts"): views.mask_lens(twice, [])


def test_lens_draws_every_allowed_token_and_every_step():
    lens = views.mask_lens(constraint("sql"), SMALL[1]("SELECT a FROM t"))
    for step in range(len(lens.masks)):
        fig = views.token_mask_lens(lens, step, bars=5)
        steps, groups = ([t for t in fig.data if t.type == "bar" and (t.xaxis == "x2") == low] for low in (False, True))
        assert sum(int(v) for t in groups for v in t.x) == lens.masks[step].allowed and sum(len(t.x) for t in groups) <= 5
        assert sorted(y for t in steps for y in t.y if y is not None) == sorted(m.allowed for m in lens.masks)
        assert fig.data[3].x == (step,) and fig.layout.title.text.startswith(f"step {step}: {lens.masks[step].allowed:,} of")
    with pytest.raises(ValueError, match="step=99: need 0.."): views.token_mask_lens(lens, 99)


def test_lens_widget_follows_every_control():
    box = views.token_mask_lens_widget(source=SMALL)
    moves = [("step", 3), ("forced", "]"), ("text", '{"a": 1}'), ("grammar", "arithmetic")]
    assert set(box.controls) == {"forget", *(name for name, _ in moves)}
    follow_controls(box, moves)
    assert box.controls["text"].value == views.LENS_TEXTS["arithmetic"] and box.controls["step"].value == 0
    box.controls["text"].value = box.controls["text"].value + "+1"
    known = sum(m.missed for m in box.lens.masks)
    box.controls["forget"].click()
    assert sum(m.missed for m in box.lens.masks) > known and box.message.value == ""
    box.controls["forced"].value = "nonsense$"
    assert "refused" in box.fig.layout.title.text


def test_lens_widget_says_what_is_wrong():
    from modeltc_lab.decoding.vocabulary import Vocabulary
    few = Vocabulary.from_bytes([b"[", b"]", b"1", b",", None], [4], name="few")
    box = views.token_mask_lens_widget(text="[1]", source=(few, views.longest_match(few)))
    shown = box.fig.layout.title.text
    box.controls["text"].value = "[1, x]"
    assert "no token of &#x27;few&#x27; writes" in box.message.value and box.fig.layout.title.text == shown
    box.controls["text"].value = "[1,1]"
    assert box.message.value == ""


def test_without_data_the_small_vocabulary_is_named(monkeypatch):
    def nowhere(name): raise views.DataError(name)
    monkeypatch.setattr(views, "find", nowhere)
    vocabulary, encode = views.real_vocabulary()
    assert "built in" in vocabulary.name and b"".join(vocabulary.tokens[i] for i in encode('{"name": "é"}')) == '{"name": "é"}'.encode()


# --- the cost board ------------------------------------------------------------------------------------------------------

def times(engines=(("modeltc_lab", 1.0), ("a peer", 4.0)), parts=("tokens read", "masks written"), batches=(1, 16, 128), language="json"):
    return [record("decoding", "batch_speed", engine, part, "us", [scale * n] * 98 + [9 * scale * n] * 2, x_name="sequences", x=n, config={"language": language, "vocabulary": "v"}, device="none")
            for engine, scale in engines for part in parts for n in batches]


def test_board_stacks_the_parts_of_each_engine():
    rows = [*times(), *times((("modeltc_lab", 0.25),), ("rows selected",)), *times((("copy", 0.5),), ("masks written",))]
    fig = views.cost_board(rows, 16, "p50")
    bars = {t.name: dict(zip(t.y, t.x)) for t in fig.data if t.type == "bar"}
    assert bars["advance"] == {"modeltc_lab": 16, "a peer": 64} and bars["classify"] == {"modeltc_lab": 4, "a peer": None} and bars["fill"] == {"modeltc_lab": 12, "a peer": 64} and set(bars["apply"].values()) == {None}
    assert fig.layout.barmode == "stack" and fig.layout.xaxis.type == "log" and "modeltc_lab 32 µs a step; a peer takes 4.0 times" in fig.layout.title.text
    scatters = {t.name: t.x for t in fig.data if t.type == "scatter"}
    assert scatters == {"sum of the parts' p99": (2 * 144, 8 * 144), "copying as many rows": (8, 8)}
    assert views.step_parts(rows, 16, "json, v", "p99")["a peer"] == {"advance": 9 * 64, "fill": 9 * 64}


def test_board_follows_every_control_and_refuses_what_was_not_measured():
    memory = [record("decoding", "row_memory", "modeltc_lab", "rows, memory", "MB", [n / 1e5], x_name="tokens", x=n, config={"grammar": "json"}, device="none") for n in (1000, 2000)]
    box = views.cost_board_widget(times() + times(language="sql"), memory)
    moves = [("batch", 1), ("percentile", "p99"), ("work", "sql, v")]
    assert set(box.controls) == {name for name, _ in moves}
    follow_controls(box, moves)
    assert next(t for t in box.fig.data if t.xaxis == "x2").y == (0.01, 0.02)
    for bad, message in ((dict(batch=2), "batch=2: need one of 1, 16, 128"), (dict(batch=1, percentile="p10"), "percentile='p10'"), (dict(batch=1, work="poetry"), "work='poetry'")):
        with pytest.raises(ValueError, match=message): views.cost_board(times(), **bad)
    with pytest.raises(ValueError, match="modeltc-lab run decoding/batch_speed"): views.cost_board_widget([])
    partial = views.cost_board_widget(times() + times(language="sql", batches=(1,)), [])
    partial.controls["work"].value = "sql, v"
    assert "nothing measured for sql" in partial.message.value


def test_board_twin_of_records(monkeypatch):
    monkeypatch.setattr(views, "read", lambda room, experiment: times() + times(language="sql", batches=(1,)) if experiment == "batch_speed" else [])
    twin = views.cost_board_twin()
    assert twin.values == ((1, 16, 128), ("p50", "p99"), ("json, v",)) and len({f.layout.title.text for f in twin.figures}) == 6


# --- twins ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["automaton_explorer", "token_mask_lens"])
def test_twins_are_small_and_their_controls_matter(name):
    twin = getattr(views, f"{name}_twin")()
    assert len(json.dumps(twin.payload())) < 1_000_000
    titles = [f.layout.title.text for f in twin.figures]
    for control, values in enumerate(twin.values):
        for other in range(len(values)):
            if other != twin.default[control]:
                moved = list(twin.default)
                moved[control] = other
                assert titles[twin.index(moved)] != titles[twin.index(twin.default)], (twin.names[control], values[other])
