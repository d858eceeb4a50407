"A grammar inside a real model, and at the command line."
import json
import re

import pytest
import torch
from transformers import AutoTokenizer

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
