"JSON Schema against the package `jsonschema`: the official suite, random schemas, walks that sample from the mask; errors name keyword and place."
import json
import random
from decimal import Decimal
from functools import lru_cache

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modeltc_lab.decoding.grammar import Grammar, GrammarError
from modeltc_lab.decoding.json_schema import Budget, UnsupportedSchema, from_json_schema
from modeltc_lab.decoding.lr import build_tables
from modeltc_lab.decoding.pre3 import compile_grammar
from modeltc_lab.decoding.schema_studies import coverage, exact_engine, labeller, made_instances, suite_cases
from modeltc_lab.decoding.vocabulary import Vocabulary

TOKENS = [bytes([b]) for b in range(128)] + ["é".encode(), "😀".encode()[:2], "😀".encode()[2:], b'{"', b'":', b'", "', b'"}', b"]}", b"[]", b"{}", b"true", b"null", b"12", b'":{"', b'"a"', b'"a":', b", ", b"\\u00"]


def small() -> Vocabulary: return Vocabulary.from_bytes([*TOKENS, None], eos_ids=(len(TOKENS),))


def compiled(schema, **options):
    "A constraint in a vocabulary of its own."
    return compile_grammar(from_json_schema(schema, **options), Vocabulary.from_bytes([*(bytes([b]) for b in range(256)), None], eos_ids=(256,)))


def accepts(constraint, text: str) -> bool:
    m = constraint.matcher()
    return m.accept_bytes(text.encode()) and m.is_accepting


@lru_cache(1)
def suite():
    return coverage(exact_engine, [c for c in suite_cases() if not c.group.endswith("formats")])


def test_required_suite_is_exact():
    "Every required test of drafts 7 and 2020-12 whose schema compiles has the right answer; the one exception is a meta-schema with its own vocabulary."
    wrong = [(o.case.group, o.case.id, i.about) for o in suite() if o.case.group in ("draft7", "draft2020-12") for i, a in zip(o.case.instances, o.accepted) if a != i.valid]
    assert {(g, i) for g, i, _ in wrong} <= {("draft2020-12", "vocabulary: schema that uses custom metaschema with with no validation vocabulary")}


def test_what_the_required_suite_refuses():
    "Only uniqueItems without an enumeration, and a divisibility by 0.123456789."
    refused = {(o.case.id.split(":")[0], o.why) for o in suite() if o.case.group in ("draft7", "draft2020-12") and o.status != "compiled"}
    assert refused <= {("defs", "uniqueItems"), ("definitions", "uniqueItems"), ("ref", "uniqueItems"), ("uniqueItems", "uniqueItems"), ("multipleOf", "multipleOf")}


def test_nothing_invalid_comes_in():
    "Beyond the required part too, except where content is an annotation here."
    wrong = {o.case.id.split(":")[0] for o in suite() for i, a in zip(o.case.instances, o.accepted) if a and not i.valid}
    assert wrong <= {"optional/content"}


# random schemas
NAMES = ["a", "b", "c"]
SCALARS = st.sampled_from([None, True, False, 0, 1, 2, 1.5, -3, "", "a", "ab", "b"])


def _object(inner):
    return st.fixed_dictionaries({}, optional={
        "properties": st.dictionaries(st.sampled_from(NAMES), inner, max_size=3), "required": st.lists(st.sampled_from(NAMES), max_size=2, unique=True), "additionalProperties": inner,
        "patternProperties": st.dictionaries(st.sampled_from(["^a", "b", "."]), inner, max_size=1), "propertyNames": st.sampled_from([{"maxLength": 1}, {"pattern": "a"}, {"enum": ["a", "c"]}]),
        "dependentRequired": st.dictionaries(st.sampled_from(NAMES), st.lists(st.sampled_from(NAMES), max_size=1), max_size=1), "dependentSchemas": st.dictionaries(st.sampled_from(NAMES), inner, max_size=1),
        "unevaluatedProperties": inner}).map(lambda s: {**s})


def _array(inner):
    return st.fixed_dictionaries({}, optional={
        "prefixItems": st.lists(inner, min_size=1, max_size=2), "items": inner, "contains": inner, "minItems": st.integers(0, 2), "maxItems": st.integers(0, 3), "minContains": st.integers(0, 2), "maxContains": st.integers(1, 2), "unevaluatedItems": inner})


LEAF = st.one_of(st.booleans(), st.sampled_from([{"type": t} for t in ("string", "integer", "number", "null", "boolean", "object", "array")] + [{"type": ["string", "null"]}]), st.builds(lambda v: {"const": v}, SCALARS),
                 st.builds(lambda v: {"enum": v}, st.lists(SCALARS, min_size=1, max_size=3)), st.sampled_from([{"minimum": 1}, {"maximum": 1.5}, {"exclusiveMinimum": 0}, {"multipleOf": 2}, {"minLength": 1}, {"maxLength": 1}, {"pattern": "a"}, {"pattern": "^a?$"}]))
SCHEMAS = st.recursive(LEAF, lambda inner: st.one_of(
    _object(inner), _array(inner), st.builds(lambda k, x: {k: x}, st.sampled_from(["allOf", "anyOf", "oneOf"]), st.lists(inner, min_size=1, max_size=3)), st.builds(lambda x: {"not": x}, inner),
    st.builds(lambda i, t, e: {"if": i, "then": t, "else": e}, inner, inner, inner), st.builds(lambda x, y: {**x, **y} if isinstance(x, dict) and isinstance(y, dict) else x, inner, _object(inner))), max_leaves=6)
VALUES = st.recursive(SCALARS, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from([*NAMES, "ab"]), inner, max_size=3)), max_leaves=5)
RELAXED = settings(max_examples=50, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


@RELAXED
@given(SCHEMAS, st.lists(VALUES, min_size=12, max_size=12))
def test_random_schemas_and_values(schema, values):
    "Compact or pretty, a text is a sentence just if its value is valid."
    valid = labeller(schema, 2020)
    try: c = compiled(schema, draft="draft2020-12")
    except Budget: return
    except GrammarError as e:
        assert "no value meets" in str(e)
        assert not any(valid(v) for v in values)
        return
    assert not c.ambiguous
    for v in values:
        assert accepts(c, json.dumps(v, separators=(",", ":"))) == valid(v), (schema, v)
        assert accepts(c, json.dumps(v, indent=2)) == valid(v), (schema, v)


@RELAXED
@given(SCHEMAS, st.integers(0, 10**6))
def test_orders_agree_on_the_defined_one(schema, seed):
    "Every way to treat the order of keys accepts only what any order accepts."
    texts = [i.text for i in made_instances(schema, 2020, seed, 3)]
    try: free, auto, fixed = (compiled(schema, draft="draft2020-12", order=o) for o in ("any", "auto", "defined"))
    except Budget: return
    except GrammarError: return
    for t in texts:
        if accepts(fixed, t) or accepts(auto, t): assert accepts(free, t)


def counts_keys(schema) -> bool:
    "Does a repeated key matter in this schema? See the limits in the notebook."
    text = json.dumps(schema)
    return any(w in text for w in ("minProperties", "maxProperties")) or any(w in text for w in ('"not"', '"oneOf"', '"if"', "dependent", "unevaluated")) and any(w in text for w in ("additionalProperties", "patternProperties", "unevaluated", "propertyNames"))


def exact_float(text: str) -> float:
    "A grammar reads decimal digits; a text that a double rounds is not for this comparison."
    if Decimal(repr(float(text))) != Decimal(text): raise LookupError("rounded")
    return float(text)


def repeated(pairs):
    if len({k for k, _ in pairs}) < len(pairs): raise LookupError("a repeated key")
    return dict(pairs)


@RELAXED
@given(SCHEMAS, st.integers(0, 10**6))
def test_walks_end_in_valid_values(schema, seed):
    "Sampling uniformly from the mask never gets stuck, and what is complete is valid (also where a key is repeated and the last one counts)."
    rng, valid = random.Random(seed), labeller(schema, 2020)
    try: c = compile_grammar(from_json_schema(schema, draft="draft2020-12", max_ws_run=1), small())
    except GrammarError: return
    for _ in range(4):
        m, text = c.matcher(), b""
        for step in range(60):
            allowed = m.allowed().tolist()
            assert allowed, (schema, text)
            ends = [t for t in allowed if t == len(TOKENS) or TOKENS[t][:1] in (b"}", b"]", b'"', b",") or step < 20]
            token = rng.choice(ends or allowed)
            if token == len(TOKENS): break
            assert m.accept(token)
            text += TOKENS[token]
        if not m.is_accepting: continue
        try: text.decode()
        except UnicodeDecodeError: pytest.fail(f"{text!r} is not UTF-8")
        try: value = json.loads(text, object_pairs_hook=repeated if counts_keys(schema) else None, parse_float=exact_float)
        except LookupError: continue
        assert valid(value), (schema, text)


def test_repeated_keys_do_not_make_valid():
    s = {"properties": {"a": {"type": "integer"}}, "required": ["b"]}
    c = compiled(s)
    assert not accepts(c, '{"a": "x", "a": 1, "b": 0}') and not accepts(c, '{"a": 1, "a": "x", "b": 0}') and accepts(c, '{"a": 1, "a": 2, "b": 0}')
    n = compiled({"not": s})
    assert not accepts(n, '{"b": 0, "a": "x", "a": 1}') and accepts(n, '{"b": 0, "a": 1, "a": "x"}')
    closed = compiled({**s, "properties": {"a": {}, "b": {}}, "additionalProperties": False})
    assert not accepts(closed, '{"b": 0, "b": 0}') and accepts(closed, '{"a": 0, "b": 0}')


def test_a_refused_name_is_no_unknown_key():
    c = compiled({"properties": {"a": False, "b": {"type": "integer"}}})
    assert not accepts(c, '{"a": 1}') and not accepts(c, '{"b": "x"}') and accepts(c, '{"c": 1, "b": 2}')
    assert not accepts(c, r'{"\u0061": 1}')
    endless = compiled({"properties": {"a": {"$ref": "#/$defs/e"}}, "$defs": {"e": {"type": "object", "properties": {"e": {"$ref": "#/$defs/e"}}, "required": ["e"]}}})
    assert not accepts(endless, '{"a": {"e": 1}}') and accepts(endless, '{"b": 1}')


@pytest.mark.parametrize("schema, place", [
    ({"properties": {"a/b": {"items": {"pattern": "(a)\\1"}}}}, "#/properties/a~1b/items/pattern"), ({"uniqueItems": True}, "#/uniqueItems"), ({"allOf": [{"minLength": 9999}]}, "#/allOf/0/minLength"),
    ({"$schema": "http://json-schema.org/draft-03/schema#"}, "#/$schema"), ({"multipleOf": 0.123456789}, "#/multipleOf")])
def test_unsupported_names_its_place(schema, place):
    with pytest.raises(UnsupportedSchema) as e: from_json_schema(schema)
    assert e.value.pointer == place and place in str(e.value) and e.value.keyword == place.rsplit("/", 1)[1]
    if "$schema" not in schema: assert place in from_json_schema(schema, lenient=True).warnings[0]


@pytest.mark.parametrize("schema, words", [
    ("{", "not JSON"), (3, "object or a boolean"), ({"type": "strin"}, "not a schema"), ({"required": "a"}, "#.required: not a schema"), ({"$ref": "#/nowhere"}, "nowhere to be found"), ({"$ref": "http://example.org/x"}, "nothing is fetched"),
    ({"$ref": "#"}, "comes back to itself"), ({"anyOf": [{"$ref": "#"}, {"type": "null"}]}, "comes back to itself"), (False, "no value meets"), ({"type": "object", "required": ["a"], "properties": {"a": {"$ref": "#"}}}, "no value meets")])
def test_malformed(schema, words):
    with pytest.raises(GrammarError, match=words): from_json_schema(schema)


@pytest.mark.parametrize("options, words", [({"order": "random"}, "auto"), ({"whitespace": "tabs"}, "compact"), ({"formats": "check"}, "annotate"), ({"escapes": "all"}, "usual"), ({"draft": "draft5"}, "draft7"), ({"max_ws_run": -1}, "from 0"), ({"whitespace": "compact", "max_ws_run": 1}, "any")])
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words): from_json_schema({}, **options)


def test_budgets_hold():
    "Branches that only optional keys tell apart ask for exponentially many cases: an error, not a wait."
    branches = [{"properties": {f"k{i}": {"type": "object", "properties": {f"x{j}": {"type": t} for j, t in enumerate(["string", "integer", "null"][(i + j) % 3] for j in range(6))}} for i in range(8)}} for _ in range(2)]
    hard = {"oneOf": [{"properties": {f"k{i}": {"type": "object", "properties": {f"x{j}": {"type": ["string", "integer", "null"][(i * k + j) % 3]} for j in range(4)}} for i in range(5)}} for k in range(1, 12)]}
    assert branches
    with pytest.raises(Budget) as e: from_json_schema(hard, work=50_000)
    assert "work=" in str(e.value) or "states" in str(e.value)


def test_remotes_anchors_and_dynamic_references():
    tree = {"$id": "https://x.org/tree", "$dynamicAnchor": "node", "type": "object", "properties": {"kids": {"type": "array", "items": {"$dynamicRef": "#node"}}}}
    strict = {"$id": "https://x.org/strict", "$dynamicAnchor": "node", "$ref": "tree", "unevaluatedProperties": False, "$schema": "https://json-schema.org/draft/2020-12/schema"}
    c = compiled(strict, remotes={"https://x.org/tree": tree})
    assert accepts(c, '{"kids": [{"kids": []}]}') and not accepts(c, '{"kids": [{"kid": []}]}')
    assert accepts(compiled({"$ref": "#here", "$defs": {"a": {"$anchor": "here", "type": "null"}}}), "null")


def test_grammar_entry_and_tables():
    g = Grammar.from_json_schema('{"enum": ["a", 1, null, [true]]}', name="four")
    assert g.name == "four" and build_tables(g).kind == "lalr"
    assert [accepts(compile_grammar(g, small()), t) for t in ('"a"', "1.0", "null", "[true]", "[1]", "true")] == [True, True, True, True, False, False]
