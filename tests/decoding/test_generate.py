"A grammar inside a real model, and at the command line."
import json
import re
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, LogitsProcessor

from modeltc_lab.core.cli import main
from modeltc_lab.core.models import load_model, random_llama, smollm2_folder
from modeltc_lab.decoding.commands import effects, mask, read_grammar
from modeltc_lab.decoding.generate import ConstraintLogitsProcessor, generate
from modeltc_lab.decoding.grammar import Grammar, GrammarError
from modeltc_lab.decoding.pre3 import compile_grammar
from modeltc_lab.decoding.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def tokenizer(): return AutoTokenizer.from_pretrained(smollm2_folder())


@pytest.fixture(scope="module")
def vocabulary(tokenizer): return Vocabulary.from_tokenizer(tokenizer, eos_ids=[2, 0], size=49152)


@pytest.fixture(scope="module")
def noise():
    "A model that knows nothing: every token is about equally likely."
    torch.set_num_threads(1)
    return random_llama(layers=1, hidden=32, heads=2, kv_heads=1, mlp=32, vocab=49152)


POINT = r'''
start: "{" "\"x\"" ":" INT "," "\"y\"" ":" INT "}"
INT: /-?[0-9]{1,4}/
'''


@pytest.mark.parametrize("options", [{"do_sample": False}, {"do_sample": True, "num_return_sequences": 3}, {"num_beams": 4, "do_sample": False}, {"num_beams": 3, "num_return_sequences": 3, "do_sample": False},
                                     {"num_beams": 2, "do_sample": True, "top_k": 5}], ids=lambda o: " ".join(o))
def test_whatever_is_searched_is_in_the_grammar(noise, tokenizer, vocabulary, options):
    torch.manual_seed(0)
    c = compile_grammar(Grammar.from_lark(POINT, name="point"), vocabulary)
    texts = generate(noise, tokenizer, c, ["one", "a longer prompt"], 60, **options)
    assert len(texts) == 2 * options.get("num_return_sequences", 1)
    for t in texts: assert set(json.loads(t)) == {"x", "y"} and c.matcher().accept_bytes(t.encode())


def test_each_prompt_has_its_grammar(noise, tokenizer, vocabulary):
    a, b = compile_grammar(Grammar.from_regex("[ab]{5}"), vocabulary), compile_grammar(Grammar.from_regex("[0-9]{3}"), vocabulary)
    torch.manual_seed(1)
    texts = generate(noise, tokenizer, [a, b, None], ["x", "y", "z"], 12, do_sample=True)
    assert re.fullmatch("[ab]{5}", texts[0]) and re.fullmatch("[0-9]{3}", texts[1])


def test_a_processor_serves_many_generations(noise, tokenizer, vocabulary):
    c = compile_grammar(Grammar.from_regex("[0-9]{2}-[0-9]{2}"), vocabulary)
    processor = ConstraintLogitsProcessor(c)
    for seed in range(3):
        torch.manual_seed(seed)
        inputs = tokenizer(["go"] * 2, return_tensors="pt")
        out = noise.generate(**inputs, max_new_tokens=20, do_sample=True, logits_processor=[processor], eos_token_id=[2, 0], pad_token_id=2)
        for t in tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True): assert re.fullmatch("[0-9]{2}-[0-9]{2}", t)


def test_assisted_generation_takes_tokens_back(noise, tokenizer, vocabulary):
    c = compile_grammar(Grammar.from_lark(POINT, name="point"), vocabulary)
    inputs = tokenizer(["go"], return_tensors="pt")
    other = random_llama(layers=1, hidden=32, heads=2, kv_heads=1, mlp=32, vocab=49152, seed=5)
    common = dict(max_new_tokens=40, do_sample=False, eos_token_id=[2, 0], pad_token_id=2)
    plain = noise.generate(**inputs, logits_processor=[ConstraintLogitsProcessor(c)], **common)
    helped = noise.generate(**inputs, logits_processor=[ConstraintLogitsProcessor(c)], assistant_model=other, **common)
    assert plain.tolist() == helped.tolist()


# --- a vocabulary of eight tokens, where everything can be counted

EIGHT = [b"a", b"b", b"c", b"ab", b"bc", None, None, b"aa"]
ENDS, UNUSED = [5, 6], 9             # two end tokens; the model has two columns more than there are tokens


@pytest.fixture(scope="module")
def eight(): return Vocabulary.from_bytes(EIGHT, ENDS)


@pytest.fixture(scope="module")
def tiny(): return random_llama(layers=1, hidden=32, heads=2, kv_heads=1, mlp=32, vocab=10)


def written(model, processor, prompts, **options):
    "What is behind the prompts; they are padded on the left."
    longest = max(map(len, prompts))
    ids = torch.tensor([[UNUSED] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    more = {} if processor is None else {"logits_processor": processor if isinstance(processor, list) else [processor]}
    return model.generate(ids, attention_mask=mask, **{"eos_token_id": ENDS, "pad_token_id": UNUSED, "do_sample": False, "max_new_tokens": 12, **more, **options})[:, longest:].tolist()


def trimmed(row):
    "Up to its first end token."
    at = next((i for i, t in enumerate(row) if t in ENDS), len(row) - 1)
    return row[:at + 1]


def sentences(c, most):
    "All sequences of tokens of the grammar with an end token, by brute force over a matcher of its own."
    out, todo = [], [()]
    while todo:
        prefix = todo.pop()
        m = c.matcher()
        for t in prefix: assert m.accept(t)
        for t in m.allowed().tolist():
            if t in ENDS: out.append((*prefix, t))
            elif len(prefix) < most: todo.append((*prefix, t))
    return out


def scored(model, prompt, rows):
    "Sum of the log probabilities of each continuation."
    out = []
    for row in rows:
        with torch.no_grad(): logits = model(torch.tensor([[*prompt, *row]])).logits[0].log_softmax(-1)
        out.append(float(sum(logits[len(prompt) - 1 + i, t] for i, t in enumerate(row))))
    return out


@pytest.mark.parametrize("seed", range(3))
def test_beams_find_what_brute_force_finds(eight, seed):
    model = random_llama(layers=1, hidden=32, heads=2, kv_heads=1, mlp=32, vocab=10, seed=seed, initializer_range=0.5)
    rules = [compile_grammar(Grammar.from_regex(r), eight) for r in ("[ab]{1,3}c?", "a(bc|cb)?a", "(abc){1,2}|b{2,3}")]
    for c in rules:
        prompt = [3, 1, 4 + seed]
        every = sentences(c, 7)
        scores = scored(model, prompt, every)
        best = sorted(zip(scores, every), reverse=True)[:4]
        beams = dict(num_beams=64, num_return_sequences=4, length_penalty=0.0, early_stopping="never", max_new_tokens=8)
        found = [trimmed(r) for r in written(model, ConstraintLogitsProcessor(c), [prompt], **beams)]
        assert [tuple(r) for r in found] == [s for _, s in best], (best, found)


def test_beams_of_equal_prompts_keep_their_grammars(tiny, eight):
    a, b = (compile_grammar(Grammar.from_regex(r), eight) for r in ("(a|b){4}c", "(a|b){4}a"))     # alike but for the last token
    for options in (dict(num_beams=3), dict(num_beams=4, num_return_sequences=4), dict(do_sample=True, num_return_sequences=4), dict(do_sample=True, num_beams=2, temperature=3.0)):
        torch.manual_seed(0)
        rows = written(tiny, ConstraintLogitsProcessor([a, b]), [[1, 2], [1, 2]], **options)
        for i, row in enumerate(rows):
            text = eight.text_of(trimmed(row)).decode()
            assert trimmed(row)[-1] in ENDS and re.fullmatch("[ab]{4}" + "ca"[i * 2 // len(rows)], text), (options, rows)


def test_a_batch_writes_what_each_prompt_writes_alone(tiny, eight):
    rules = [compile_grammar(Grammar.from_regex(r), eight) for r in ("(ab)+c{0,3}", "[abc]{2,8}", "b*a")] + [None]
    prompts = [[1], [2, 3, 4, 5], [7, 7], [1, 2, 3]]
    together = written(tiny, ConstraintLogitsProcessor(rules), prompts)
    for prompt, c, row in zip(prompts, rules, together):
        lone, = written(tiny, None if c is None else ConstraintLogitsProcessor(c), [prompt])
        assert trimmed(row) == trimmed(lone)


class Follower:
    "A processor that is told the truth by a matcher which reads the whole text anew each time."

    def __init__(self, rules, ours): self.rules, self.ours, self.calls = rules, ours, 0

    def __call__(self, ids, scores, prompt):
        out = self.ours(ids, scores)
        times = len(ids) // len(self.rules)
        for b, row in enumerate(ids.tolist()):
            c, m = self.rules[b // times], None
            if c is not None: m = c.matcher(history=64)
            kept = torch.isfinite(out[b]).nonzero().flatten().tolist()
            if m is None:
                assert kept == list(range(scores.shape[1]))
                continue
            for t in row[prompt:]:
                if m.terminated or not (0 <= t < c.engine.vocabulary.size) or not m.accept(t): break
            assert kept == m.allowed().tolist(), (row, prompt)
            self.calls += 1
        return out


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequence_of_calls(data):
    "Steps, swaps within a prompt's group, tokens taken back, wrong tokens, several at once after that, new prompts: the mask is always that of the text."
    vocabulary = Vocabulary.from_bytes(EIGHT, ENDS)
    rules = [compile_grammar(Grammar.from_regex(r), EIGHT_VOCABULARY) for r in ("(ab|c)*", "a{2,9}b?")] + [None]
    assert vocabulary.size == EIGHT_VOCABULARY.size
    follow = Follower(rules, ConstraintLogitsProcessor(rules, history=data.draw(st.sampled_from([2, 256]), label="history")))
    times, rng = data.draw(st.integers(1, 3), label="sequences a prompt"), np.random.default_rng(data.draw(st.integers(0, 10**6), label="seed"))
    prompt, rows = 0, None
    for what in data.draw(st.lists(st.sampled_from(["step", "step", "step", "swap", "back", "wrong", "new"]), min_size=3, max_size=25), label="what"):
        if rows is None or what == "new":
            prompt = int(rng.integers(1, 4))
            start = rng.integers(0, 10, (3, prompt))
            rows = np.repeat(start, times, 0)
            follow.ours.reset()
        else:
            if what == "swap":
                order = np.concatenate([g * times + rng.integers(0, times, times) for g in range(3)])
                rows = rows[order]
            if what == "back" and rows.shape[1] > prompt + 1: rows = rows[:, :int(rng.integers(prompt + 1, rows.shape[1]))]
            new = []
            for b, row in enumerate(rows.tolist()):
                c = rules[b // times]
                m = None if c is None else c.matcher()
                if m is not None:
                    for t in row[prompt:]:
                        if m.terminated or t >= 8 or not m.accept(t): break
                allowed = list(range(10)) if m is None or what == "wrong" else m.allowed().tolist()
                new.append(int(rng.choice(allowed)))
            rows = np.concatenate([rows, np.array(new)[:, None]], 1)
        follow(torch.from_numpy(rows.copy()), torch.zeros(len(rows), 10), prompt)
    assert follow.calls


EIGHT_VOCABULARY = Vocabulary.from_bytes(EIGHT, ENDS)


@pytest.mark.parametrize("helper", ["another model", "prompt lookup", "a model that breaks the rules"])
@pytest.mark.parametrize("pattern", ["(ab|bc|c){4,9}", "a+b+c+", "(abc)*"])
def test_candidates_are_taken_or_taken_back(tiny, eight, helper, pattern):
    c, prompt = compile_grammar(Grammar.from_regex(pattern), eight), [0, 1, 2, 0, 1, 2, 0]
    plain = written(tiny, ConstraintLogitsProcessor(c), [prompt])
    processor = ConstraintLogitsProcessor(c)
    if helper == "prompt lookup": helped = written(tiny, processor, [prompt], prompt_lookup_num_tokens=4)
    else:
        other = random_llama(layers=1, hidden=32, heads=2, kv_heads=1, mlp=32, vocab=10, seed=3)
        if helper == "another model": helped = written(tiny, processor, [prompt], assistant_model=other)
        else:
            class Lawless(LogitsProcessor):
                "Calls the processor for the model that is helped only."
                def __call__(self, ids, scores): return processor(ids, scores) if sum(scores.shape) and not other.asked else scores
            other.asked = False
            forward = other.generate
            def generate(*args, **kwargs):
                other.asked = True
                try: return forward(*args, **kwargs)
                finally: other.asked = False
            other.generate = generate
            helped = written(tiny, [Lawless()], [prompt], assistant_model=other)
    assert helped == plain and c.matcher().accept_bytes(eight.text_of(trimmed(plain[0])))


def test_a_longer_prompt_is_a_new_generation(tiny, eight):
    "A conversation: the second prompt holds the first one and its reply."
    c = compile_grammar(Grammar.from_regex("ab+c"), eight)
    processor = ConstraintLogitsProcessor(c)
    first, = written(tiny, processor, [[1, 2, 3]])
    second, = written(tiny, processor, [[1, 2, 3, *trimmed(first), 7, 7]])
    again, = written(tiny, ConstraintLogitsProcessor(c), [[1, 2, 3, *trimmed(first), 7, 7]])
    assert second == again and re.fullmatch("ab+c", eight.text_of(trimmed(second)).decode()) or len(second) == 12
    processor.reset()
    assert written(tiny, processor, [[1, 2, 3]]) == [first]


@pytest.mark.parametrize("options", [dict(max_new_tokens=3), dict(max_new_tokens=3, forced_eos_token_id=5), dict(max_new_tokens=4, num_beams=3, forced_eos_token_id=6)], ids=["cut", "end forced", "end forced on beams"])
def test_a_text_that_is_cut_is_a_beginning(tiny, eight, options):
    c = compile_grammar(Grammar.from_regex("(abc){4,}"), eight)
    for row in written(tiny, ConstraintLogitsProcessor(c), [[1], [2, 3]], **options):
        assert c.matcher().accept_bytes(eight.text_of(t for t in row if t < 8 and t not in ENDS)) and (row[-1] in ENDS) == ("forced_eos_token_id" in options)


def test_contradictions_are_errors(tiny, eight):
    c = compile_grammar(Grammar.from_regex("ab"), eight)
    with pytest.raises(ValueError, match="others have left none"): written(tiny, ConstraintLogitsProcessor(c), [[1], [2, 3]], min_new_tokens=6)
    with pytest.raises(ValueError, match="others have left none"): written(tiny, ConstraintLogitsProcessor(c), [[1]], suppress_tokens=[0, 3])
    with pytest.raises(ValueError, match="one for each prompt"): written(tiny, ConstraintLogitsProcessor([c, c]), [[1], [2], [3]])


def test_each_end_token_ends(eight):
    c = compile_grammar(Grammar.from_regex("a"), eight)
    for end in ENDS:
        class Likes(LogitsProcessor):
            def __call__(self, ids, scores):
                scores[:, end] += 100
                return scores
        model = random_llama(layers=1, hidden=32, heads=2, kv_heads=1, mlp=32, vocab=10)
        assert trimmed(written(model, [Likes(), ConstraintLogitsProcessor(c)], [[1]])[0]) == [0, end]


def test_columns_and_kinds_of_logits(eight):
    c = compile_grammar(Grammar.from_regex("[ab]+"), eight)
    for kind, width in product((torch.float32, torch.float16, torch.bfloat16), (8, 10, 64, 65)):
        scores = torch.randn(3, width).to(kind)
        out = ConstraintLogitsProcessor(c)(torch.tensor([[1]] * 3), scores)
        assert out.dtype == kind and torch.isfinite(out[0]).nonzero().flatten().tolist() == [0, 1, 3, 7] and torch.equal(out[:, [0, 1, 3, 7]], scores[:, [0, 1, 3, 7]])
    with pytest.raises(ValueError, match="wider"): ConstraintLogitsProcessor(c)(torch.tensor([[1]]), torch.zeros(1, 7))


def test_a_model_in_half_precision(eight):
    c = compile_grammar(Grammar.from_regex("(ab|c){3,5}"), eight)
    model = random_llama(layers=1, hidden=32, heads=2, kv_heads=1, mlp=32, vocab=10).to(torch.bfloat16)
    for options in (dict(), dict(num_beams=3), dict(do_sample=True, num_return_sequences=3)):
        for row in written(model, ConstraintLogitsProcessor(c), [[1], [2, 3]], **options): assert re.fullmatch("(ab|c){3,5}", eight.text_of(trimmed(row)).decode())


def test_grammars_and_prompts_are_counted(noise, tokenizer, vocabulary):
    c = compile_grammar(Grammar.from_regex("[ab]{5}"), vocabulary)
    with pytest.raises(ValueError, match="prompts= 1"): generate(noise, tokenizer, [c, c], ["x"], 4, num_beams=4, do_sample=False)


def test_logits_of_allowed_tokens_are_untouched(vocabulary):
    c = compile_grammar(Grammar.json(), vocabulary)
    ids, scores = torch.tensor([[1, 5]]), torch.randn(1, 49152)
    out = ConstraintLogitsProcessor(c)(ids, scores)
    allowed = c.matcher().allowed()
    assert torch.equal(out[0, allowed], scores[0, allowed]) and int(torch.isfinite(out).sum()) == len(allowed)


def test_a_grammar_of_everything_changes_nothing(tokenizer):
    model = load_model("smollm2")
    c = compile_grammar(Grammar.from_regex("(?s:.)+"), Vocabulary.from_tokenizer(tokenizer, eos_ids=[2, 0], size=model.config.vocab_size))
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Say hello in French."}], tokenize=False, add_generation_prompt=True)
    inputs = tokenizer([prompt], return_tensors="pt")
    free = model.generate(**inputs, max_new_tokens=30, do_sample=False, eos_token_id=[2, 0], pad_token_id=2)
    assert generate(model, tokenizer, c, [prompt], 30, do_sample=False) == tokenizer.batch_decode(free[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def test_effects_partition_the_mask(vocabulary):
    m = compile_grammar(Grammar.named("sql"), vocabulary).matcher()
    m.accept_bytes(b"SELECT a FROM t WHERE b = 1")
    groups = effects(m)
    assert sorted(i for g in groups.values() for i in g) == m.allowed().tolist()
    assert len(groups) > 10 and any(len(k.split()) > 3 for k in groups)      # tokens that complete one lexeme and begin another


def test_commands(capsys, tmp_path):
    file = tmp_path / "g.gbnf"
    file.write_text('root ::= "a" ("b" | "c")+')
    assert not main(["mask", "--grammar", str(file), "--text", "ab", "--token", "d"])
    out = capsys.readouterr().out
    assert "may end here" in out and "'d' may not come next: byte 0: 'd' cannot come" in out
    assert not main(["compile", "--grammar", "json", "--full", "--json"])
    facts = json.loads(capsys.readouterr().out)
    assert facts["complete"] and facts["tokens"] == 49152 and facts["lr_states"] == 27
    assert main(["mask", "--grammar", "json", "--text", "[1,]"]) == 2
    assert "byte 3" in capsys.readouterr().err
    assert main(["mask", "--grammar", "json", "--regex", "a"]) == 2


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "a.lark").write_text("start: b")
    with pytest.raises(GrammarError, match="'b'"): read_grammar(str(tmp_path / "a.lark"))
    with pytest.raises(ValueError, match="cannot be read"): mask(grammar=str(tmp_path / "none.lark"))
