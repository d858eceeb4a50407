"Grammars in transformers' continuous batching: every request writes what it writes alone, whatever the company, the memory and the way it is started."
import copy
import gc
import re

import numpy as np
import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import FutureRequestState, RequestState, RequestStatus

from modeltc_lab.core.models import random_llama
from modeltc_lab.decoding.batch import apply_rows_
from modeltc_lab.decoding.continuous import Carried, RequestConstraints, generate_batch, mask_rows
from modeltc_lab.decoding.generate import ConstraintLogitsProcessor
from modeltc_lab.decoding.grammar import Grammar
from modeltc_lab.decoding.pre3 import compile_grammar
from modeltc_lab.decoding.vocabulary import Vocabulary

END, PAD = 30, 31
GREEDY = dict(do_sample=False, eos_token_id=END, pad_token_id=PAD)


@pytest.fixture(scope="module")
def vocabulary(): return Vocabulary.from_bytes([*(bytes([c]) for c in b"abcdefghij0123456789+-()., "), b"ab", b"10", b"((", None], [END], size=31)


@pytest.fixture(scope="module")
def rules(vocabulary):
    made = [Grammar.from_regex("[a-j]{4,30}"), Grammar.from_regex("[0-9]{3}-[0-9]{2,20}"), Grammar.from_lark('start: sum\nsum: atom | sum "+" atom\natom: /[0-9]+/ | "(" sum ")"')]
    return [*(compile_grammar(g, vocabulary) for g in made), compile_grammar(Grammar.from_lark('start: one+\none: x "a" "b" | y "a" "c"\nx: "d"\ny: "d"'), vocabulary, table="glr"), None]


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return random_llama(layers=1, hidden=32, heads=2, kv_heads=1, mlp=32, vocab=32)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 30, rng.integers(2, 12)).tolist() for _ in range(20)]


def small(blocks=1000, **more): return ContinuousBatchingConfig(num_blocks=blocks, page_size=4, max_batch_tokens=64, **more)


@pytest.fixture(scope="module")
def alone(model, rules, prompts):
    "What `generate` writes for each prompt by itself."
    out = []
    for i, prompt in enumerate(prompts):
        c = rules[i % 5]
        more = {} if c is None else {"logits_processor": [ConstraintLogitsProcessor(c)]}
        out.append(model.generate(torch.tensor([prompt]), max_new_tokens=30, **GREEDY, **more)[0, len(prompt):].tolist())
    return out


@pytest.mark.parametrize("settings", [dict(), dict(blocks=28), dict(max_requests_per_batch=3)], ids=["room", "thrown out", "three at a time"])
def test_each_writes_what_it_writes_alone(model, rules, prompts, alone, settings, monkeypatch):
    reset = []
    again = RequestState.create_equivalent_initial_request
    monkeypatch.setattr(RequestState, "create_equivalent_initial_request", lambda self: reset.append(self.request_id) or again(self))
    replies = generate_batch(model, prompts, [rules[i % 5] for i in range(20)], 30, GenerationConfig(**GREEDY), small(**settings), timeout_s=300)
    assert [r.generated_tokens for r in replies] == alone and not any(r.error for r in replies)
    assert bool(reset) == (settings == dict(blocks=28))              # with so little memory, requests really were thrown out and read again


def test_samples_are_in_the_language(model, rules, prompts, vocabulary):
    torch.manual_seed(0)
    config = GenerationConfig(do_sample=True, temperature=1.5, top_k=3, num_return_sequences=3, eos_token_id=END)
    replies = generate_batch(model, prompts[:5], rules, 60, config, small(per_request_processors=True), timeout_s=300)
    assert len(replies) == 15 and len({tuple(r.generated_tokens) for r in replies[:3]}) > 1
    for i, pattern in ((0, "[a-j]{4,30}"), (1, "[0-9]{3}-[0-9]{2,20}"), (3, "(da[bc])+")):
        for r in replies[3 * i:3 * i + 3]:
            if r.generated_tokens[-1] == END: assert re.fullmatch(pattern, vocabulary.text_of(r.generated_tokens).decode())
    assert all(r.generated_tokens[-1] == END for r in replies[:6])


def test_requests_join_and_leave_while_others_run(model, rules, prompts, alone, vocabulary):
    manager = model.init_continuous_batching(GenerationConfig(**GREEDY), small())
    grammars = RequestConstraints(vocabulary)
    grammars.install(manager)
    manager.start()
    try:
        number, done, sent = {}, {}, 0
        while len(done) < 20:
            while sent < 20 and sent < 4 + len(done):                # never more than four at once
                number[grammars.add_request(manager, prompts[sent], rules[sent % 5], max_new_tokens=30)] = sent
                sent += 1
            out = manager.get_result(timeout=60)
            assert out is not None and out.error is None
            done[number[out.request_id]] = out.generated_tokens
        assert [done[i] for i in range(20)] == alone
        out = None
    finally: manager.stop(block=True)
    manager.batch_processor = None
    gc.collect()
    assert len(grammars.read) == 8 and not grammars.place            # places were used again, and all are free


def test_one_that_cannot_go_on_ends_alone(model, rules, prompts, alone, vocabulary):
    nested = compile_grammar(Grammar.from_lark("start: r0" + "".join(f'\nr{i}: "(" r{i + 1} ")"' for i in range(9)) + '\nr9: "a"'), vocabulary)
    manager = model.init_continuous_batching(GenerationConfig(**GREEDY), small())
    grammars = RequestConstraints(vocabulary, max_depth=8)
    grammars.install(manager)
    manager.start()
    try:
        names = [grammars.add_request(manager, prompts[0], c, max_new_tokens=30) for c in (nested, rules[0], nested)]
        got = {}
        while len(got) < 3:
            out = manager.get_result(timeout=60)
            got[out.request_id] = out
    finally: manager.stop(block=True)
    assert got[names[1]].generated_tokens == alone[0] and got[names[1]].error is None
    for n in (names[0], names[2]): assert "nested" in got[n].error and set(got[n].generated_tokens) <= {vocabulary.tokens.index(b"("), vocabulary.tokens.index(b"((")}


def test_a_token_from_elsewhere_ends_its_request(rules, vocabulary):
    grammars = RequestConstraints(vocabulary)
    states = [RequestState(request_id=str(i), initial_tokens=[1, 2], logit_processor_kwargs={"constraint": Carried(rules[0])}) for i in range(2)]
    for s in states: s._status = RequestStatus.DECODING
    future = [FutureRequestState(s, True, {}, 1) for s in states]
    first = grammars.prepare_tensor_args(future)
    states[0].generated_tokens, states[1].generated_tokens = [0, 5], [0, 12]      # 12 is a digit
    rows = grammars.prepare_tensor_args(future)
    assert rows[1] == -1 and "token 12" in states[1].error and states[0].error is None and rows[0] >= 0
    assert first[0] == first[1] and states[1].update_and_check_completion(3, None) and states[1].generated_tokens == [0, 12]


def test_a_copied_request_carries_the_same_constraint(rules):
    state = RequestState(request_id="a", initial_tokens=[1], logit_processor_kwargs={"constraint": Carried(rules[0])})
    assert state.fork("b").logit_processor_kwargs["constraint"].constraint is rules[0]
    assert copy.copy(Carried(rules[0])).constraint is rules[0] and state.create_equivalent_initial_request().logit_processor_kwargs["constraint"].constraint is rules[0]


@pytest.mark.parametrize("columns", [64, 70, 90, 40])
def test_rows_on_a_device_are_rows_on_the_host(columns):
    rng = np.random.default_rng(0)
    table = rng.integers(-2**31, 2**31, (5, 2)).astype(np.int32)
    ids, scores = rng.integers(-1, 5, 40).astype(np.int32), torch.randn(40, columns)
    once = scores.clone()
    apply_rows_(once, table, ids)
    assert torch.equal(once, mask_rows(scores, torch.from_numpy(table), torch.from_numpy(ids)))


def test_the_path_of_a_device(model, rules, prompts, alone, vocabulary, monkeypatch):
    "Row numbers gathered from a table of fixed size, as on a GPU, and what happens when it is full."
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    replies = generate_batch(model, prompts, [rules[i % 5] for i in range(20)], 30, GenerationConfig(**GREEDY), small(), timeout_s=300)
    assert [r.generated_tokens for r in replies] == alone
    grammars = RequestConstraints(vocabulary, max_rows=1)
    with pytest.raises(ValueError, match="raise max_rows"): grammars(torch.zeros(1, 31), torch.tensor([-1], dtype=torch.int32))


def test_what_is_refused(model, rules, prompts, vocabulary):
    with pytest.raises(ValueError, match="one for each prompt"): generate_batch(model, prompts[:2], rules)
    with pytest.raises(ValueError, match="model.generate_batch"): generate_batch(model, prompts[:1], [None])
    with pytest.raises(ValueError, match="use_async_batching=False"): generate_batch(model, prompts[:1], rules[:1], continuous_batching_config=small(use_async_batching=True))
    if not torch.cuda.is_available():                                 # transformers cannot offload to memory it cannot pin, and its loop ends at once
        with pytest.raises(RuntimeError, match="pin"): generate_batch(model, prompts[:2], rules[:2], 8, GenerationConfig(**GREEDY), small(cpu_offload_space=0.01))
    manager = model.init_continuous_batching(GenerationConfig(**GREEDY), small())
    grammars = RequestConstraints(vocabulary)
    with pytest.raises(ValueError, match="call install first"): grammars.add_request(manager, prompts[0], rules[0])
    grammars.install(manager)
    other = compile_grammar(Grammar.from_regex("a"), Vocabulary.from_bytes([b"a", None], [1]))
    with pytest.raises(ValueError, match="same Vocabulary object"): grammars.add_request(manager, prompts[0], other)
    with pytest.raises(TypeError, match="expected Carried"): manager.logit_processor.check_kwargs({"constraint": rules[0]})
    manager.batch_processor = object()
    with pytest.raises(ValueError, match="before it is started"): grammars.install(manager)
    with pytest.raises(ValueError, match="columns"): grammars(torch.zeros(1, 20), torch.tensor([-1]))


def test_a_constraint_of_generate_is_not_taken_for_one_of_these():
    assert ConstraintLogitsProcessor.supports_continuous_batching is False
