"transformers' continuous batching under our policies: the simulator's schedule page by page, sealed lengths, real tokens, nothing left behind."
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig
from transformers.generation.continuous_batching.requests import RequestState
from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING

from modeltc_lab.core.models import random_llama
from modeltc_lab.serving.cost import DEVICES, MODELS, Roofline, UnitCost
from modeltc_lab.serving.engine import (
    OWN_ATTENTION,
    PAGE_SIZE,
    HFExecutor,
    PolicyScheduler,
    register_transformers,
    stub_model,
)
from modeltc_lab.serving.past_future import AdaptivePastFuture, HistoryLengths, Oracle, PastFuture
from modeltc_lab.serving.policies import (
    AdmissionPolicy,
    Aggressive,
    Conservative,
    HFFifo,
    HFPrefillFirst,
    NewTokenRatio,
    make_policy,
)
from modeltc_lab.serving.token_sim import simulate
from modeltc_lab.serving.validation import mismatches
from modeltc_lab.serving.workload import RequestTooLarge, Workload

logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
POLICIES = {"hf_fifo": HFFifo, "fifo without margin": lambda: HFFifo(0.0), "fifo, large margin": lambda: HFFifo(0.5), "hf_prefill_first": HFPrefillFirst, "past_future": PastFuture,
            "feedback": lambda: PastFuture(margin="feedback"), "past_future_adaptive": AdaptivePastFuture, "aggressive": lambda: Aggressive(0.9), "conservative": Conservative,
            "new_token_ratio": NewTokenRatio, "future_peak": lambda: make_policy("future_peak"), "oracle": Oracle}


@pytest.fixture(scope="module")
def stub(): return stub_model()


@pytest.fixture(scope="module")
def tiny(): return random_llama(layers=2, hidden=64, heads=4, kv_heads=2, mlp=128, vocab=128)


def traffic(seed: int, clients: bool = False) -> Workload:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(20, 50))
    arrival = np.sort(rng.choice([0.0, 0.5, 5.0], n) * rng.integers(0, 3, n)) if seed % 2 else np.cumsum(rng.exponential(0.5, n))
    w = Workload.build("random", arrival, rng.integers(1, 65, n), rng.integers(1, 65, n), max_new_tokens=64)
    return w.closed_loop(int(rng.integers(2, 16))) if clients else w


@pytest.mark.parametrize("name", POLICIES)
def test_the_simulator_schedules_like_transformers(name, stub):
    "Batch, tokens, pages, evictions and times of every pass are equal, whatever the pages, the budget and the traffic."
    for seed in range(4):
        rng = np.random.default_rng(seed)
        w, policy = traffic(seed, clients=seed == 3), POLICIES[name]()
        executor = HFExecutor(stub, int(rng.integers(144, 400)), int(rng.choice([4, 16])), int(rng.choice([16, 64, 256])), int(rng.choice([3, 20, 1024])))
        real = executor.run(w, policy, clock=UnitCost(), progress=False).result
        sim = simulate(w, policy, executor.capacity, UnitCost(), engine=executor.engine(policy), record=True, check=True)
        assert real.requests.tobytes() == sim.requests.tobytes()
        assert real.steps.tobytes() == sim.steps.tobytes()
        assert len(real.batches) == len(sim.batches) and all(np.array_equal(a, b) for a, b in zip(real.batches, sim.batches))
        fast = simulate(w, policy, executor.capacity, UnitCost(), engine=executor.engine(policy), impl="numba")
        assert fast.requests.tobytes() == sim.requests.tobytes() and fast.steps.tobytes() == sim.steps.tobytes()


def test_the_cases_above_include_evictions(stub):
    "A comparison without evictions would prove little."
    runs = [HFExecutor(stub, 150, 4, 64).run(traffic(s), Aggressive(1.0), clock=UnitCost(), progress=False).result.requests["evictions"].sum() for s in range(3)]
    assert min(runs) > 0


def test_a_measured_run_replays_without_a_mismatch(tiny):
    for policy in (AdaptivePastFuture(), HFFifo()):
        executor = HFExecutor(tiny, 320, 16, 64)
        run = executor.run(traffic(5), policy, progress=False)
        found = mismatches(run, traffic(5), policy, executor)
        assert found.pop("passes") == len(run.plans) and set(found.values()) == {0}


def test_a_wrong_engine_is_noticed(tiny):
    "The comparison can fail: replayed with another budget or another policy it does."
    executor = HFExecutor(tiny, 320, 16, 64)
    run = executor.run(traffic(5), HFFifo(), progress=False)
    assert mismatches(run, traffic(5), HFFifo(), replace(executor, token_budget=32))["batches"] > 0
    assert mismatches(run, traffic(5), Conservative(), executor)["batches"] > 0
    assert mismatches(run, traffic(5), HFFifo(), replace(executor, page=4))["pages"] > 0


@pytest.mark.parametrize("name", ["hf_fifo", "hf_prefill_first", "past_future", "past_future_adaptive", "aggressive", "new_token_ratio", "conservative"])
def test_greedy_replies_are_those_of_generate(name, tiny):
    "Under every policy, in little memory, and with requests sent back, each reply is what the model alone would say."
    w = traffic(7).at_once().head(16)
    w = replace(w, sealed_output=np.minimum(w.sealed_output, 30))
    executor = HFExecutor(tiny, 110, 4, 32)
    run = executor.run(w, POLICIES[name](), progress=False)
    if name in ("hf_fifo", "aggressive", "hf_prefill_first"): assert run.result.requests["evictions"].sum() > 0
    prompts, wrong = executor.prompts(w), 0
    for prompt, reply, n in zip(prompts, run.replies, w.sealed_output.tolist()):
        ids = torch.tensor([prompt])
        alone = tiny.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)[0, len(prompt):].tolist()
        assert len(reply) == n
        wrong += reply != alone
    assert wrong == 0


def test_smollm2_answers_the_same_under_every_policy():
    "A real model, real words, its own end of text."
    from modeltc_lab.core.models import load_model, smollm2_folder
    transformers = pytest.importorskip("transformers")
    tokenizer, model = transformers.AutoTokenizer.from_pretrained(smollm2_folder()), load_model("smollm2")
    asked = ["What is the capital of France?", "Name a colour.", "Say hello.", "Count to five.", "What do bees make?"]
    prompts = [tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True) for q in asked]
    prompts = [list(p["input_ids"] if hasattr(p, "keys") else p) for p in prompts]
    eos, longest = tokenizer.eos_token_id, 12
    w = Workload.build("questions", np.zeros(len(asked)), [len(p) for p in prompts], np.full(len(asked), longest))
    alone = []
    for p in prompts:
        said = model.generate(torch.tensor([p]), max_new_tokens=longest, do_sample=False)[0, len(p):].tolist()
        alone.append(said)
    assert "Paris" in tokenizer.decode(alone[0])
    for policy in (AdaptivePastFuture(), HFFifo(0.0)):
        run = HFExecutor(model, max(len(p) for p in prompts) + 2 * longest + 64, 4, 64, max_batch=3).run(replace(w, sealed_output=np.array([len(a) for a in alone])), policy, prompts=prompts, eos=eos, progress=False)
        assert run.replies == alone


def test_true_lengths_are_sealed(stub):
    "Policies fed two workloads that look alike and end differently make the same first decision."
    rng = np.random.default_rng(1)
    long, short = (Workload.build("x", np.zeros(30), np.full(30, 20), o, max_new_tokens=64) for o in (np.full(30, 64), rng.integers(1, 9, 30)))
    for name in ("past_future", "past_future_adaptive", "new_token_ratio", "aggressive", "conservative"):
        first = [HFExecutor(stub, 400, 4, 256).run(w, POLICIES[name](), clock=UnitCost(), progress=False).result.batches[0] for w in (long, short)]
        assert np.array_equal(*first)


def test_an_oracle_without_a_reserve_is_never_wrong(stub):
    "With true lengths and whole prompts in the budget nobody is sent back, and the memory at its fullest is what was planned."
    for seed in range(3):
        w = traffic(seed)
        run = HFExecutor(stub, 256, 4, 4096).run(w, Oracle(), clock=UnitCost(), progress=False)
        assert run.result.requests["evictions"].sum() == 0 and run.result.steps["used"].max() <= 256


def test_an_emulated_run_takes_the_time_of_its_cost_model(stub):
    cost = Roofline(MODELS["smollm2-135m"], DEVICES["h100-sxm"])
    run = HFExecutor(stub, 400, 16, 64).run(traffic(2), HFFifo(), clock=cost, progress=False)
    np.testing.assert_allclose(run.seconds, [cost.iteration(p) for p in run.plans], rtol=1e-6)
    assert run.clock == "Roofline" and (np.diff(run.result.steps["start_s"]) > 0).all()


def test_everything_is_put_back(tiny):
    torch.manual_seed(3)
    state, threads, attention, known = torch.get_rng_state(), torch.get_num_threads(), tiny.config._attn_implementation, dict(SCHEDULER_MAPPING)
    HFExecutor(tiny, 320, 16, 64).run(traffic(5).head(5), PastFuture(), progress=False)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    assert tiny.config._attn_implementation == attention and SCHEDULER_MAPPING == known
    with pytest.raises(RuntimeError, match="broken"): HFExecutor(tiny, 320, 16, 64).run(traffic(5).head(5), Broken(), progress=False)
    assert SCHEDULER_MAPPING == known and torch.get_num_threads() == threads


class Broken(AdmissionPolicy):
    name = "broken"

    def admit(self, view): raise RuntimeError("broken")


def test_plain_transformers_takes_the_policy_by_name(tiny):
    "`generate_batch` with our scheduler: same replies as its own, and the policy has learnt every length."
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 128, n).tolist() for n in (5, 30, 12, 7, 20)]
    settings = lambda scheduler: ContinuousBatchingConfig(**{PAGE_SIZE: 16}, num_blocks=12, max_batch_tokens=64, scheduler_type=scheduler, **OWN_ATTENTION)
    config = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=9)
    learnt: list[int] = []
    policy = PastFuture()
    policy.on_finish = learnt.append
    try:
        name = register_transformers(policy, max_new_tokens=9)
        assert issubclass(SCHEDULER_MAPPING[name], PolicyScheduler)
        said = [tiny.generate_batch(prompts, generation_config=config, continuous_batching_config=settings(s), progress_bar=False) for s in ("fifo", name)]
        assert [o.generated_tokens for o in said[0].values()] == [o.generated_tokens for o in said[1].values()]
    finally: SCHEDULER_MAPPING.pop(name)


def _scheduler(stub, policy, sharing=False):
    "A scheduler over a real cache, without a loop."
    name = register_transformers(policy)
    settings = ContinuousBatchingConfig(**{PAGE_SIZE: 4}, num_blocks=20, max_batch_tokens=64, scheduler_type=name, allow_block_sharing=sharing, use_async_batching=False, use_cuda_graph=False, **OWN_ATTENTION)
    manager = stub.init_continuous_batching(GenerationConfig(do_sample=False, eos_token_id=-1), settings)
    try: manager.batch_processor = manager._create_batch_processor()
    finally: SCHEDULER_MAPPING.pop(name)
    return manager, manager.batch_processor


def test_a_block_is_lifted_when_everybody_was_cancelled(stub):
    "transformers clears its block when a request finishes; cancelled ones do not finish."
    _, processor = _scheduler(stub, Conservative())
    s = processor.scheduler
    s.add_waiting_request(RequestState("a", [1] * 8, max_new_tokens=4))
    s.block_new_requests = True
    planned, *_ = s.schedule_batch(64, 80)
    assert [f.state.request_id for f in planned] == ["a"]


def test_shared_prefixes_count_once(stub):
    "Two requests with a common beginning: the view freezes what they share and gives each only its own."
    manager, processor = _scheduler(stub, Conservative(), sharing=True)
    s, common = processor.scheduler, [5] * 16
    for r, tail in (("a", [1, 2, 3]), ("b", [4, 5, 6])):
        manager.add_request(common + tail, request_id=r, max_new_tokens=16)
        for _ in range(2):
            assert processor.prepare_next_batch()
            manager._generation_step() if hasattr(manager, "current_batch") else processor._generation_step(stub)
            processor.update_batch()
    view = s.view([])
    if not s.pool.shared(): pytest.skip("this version of transformers copies a prefix instead of sharing it while both run")
    assert view.validate().frozen == 16 and view.held.sum() + view.frozen <= view.capacity
    assert (view.held < 16).all() and s.pool.free * 4 + view.frozen + sum(4 * -(-h // 4) for h in view.held + 1) >= view.capacity - 8


@pytest.mark.parametrize("make, text", [
    (lambda m: HFExecutor(m, 100, page=2), "page=2: transformers' pages hold at least 4"), (lambda m: HFExecutor(m, 10, page=16), "capacity=10: need at least 1 page"),
    (lambda m: HFExecutor(object(), 100), "model=object"), (lambda m: HFExecutor(m, 100, threads=0), "threads=0"),
    (lambda m: HFExecutor(m, 100).run(traffic(1), HFFifo(), clock="gpu"), "clock='gpu': need 'cpu', 'wall' or a cost model"),
    (lambda m: HFExecutor(m, 256).run(traffic(1), HFFifo(), prompts=[[1]]), "prompts: need as many as requests"),
    (lambda m: register_transformers("static"), "its idea is the engine's static batch"), (lambda m: register_transformers("nobody"), "policy='nobody'"),
    (lambda m: register_transformers(PastFuture(), reserve=0.1), "settings go with a policy given by name"),
    (lambda m: register_transformers("oracle"), "true lengths are for an oracle"), (lambda m: register_transformers("past_future", lengths=[1, 2]), "true lengths are for an oracle")])
def test_bad_input(make, text, stub):
    with pytest.raises(ValueError, match=text.replace("(", r"\(")): make(stub)


def test_a_request_that_cannot_fit_is_refused_before_anything_runs(stub):
    with pytest.raises(RequestTooLarge, match="needs 128 token slots alone"): HFExecutor(stub, 100).run(Workload.build("x", [0], [65], [64]), HFFifo())


def test_history_begins_where_it_is_told(stub):
    "A policy with a past is copied with it, and the caller's own is not changed by the run."
    policy = PastFuture(HistoryLengths(init=[3] * 50))
    before = policy.length_model.values().tolist() if hasattr(policy.length_model, "values") else None
    run = HFExecutor(stub, 400, 4, 256).run(traffic(1), policy, clock=UnitCost(), progress=False)
    assert len(run.replies) == len(traffic(1)) and (before is None or policy.length_model.values().tolist() == before)


def test_a_reply_that_ends_itself_counts_as_long_as_it_was(tiny):
    "With an end-of-text token a reply may be shorter than its sealed length; the result says what was made."
    w, executor = traffic(5).head(10), HFExecutor(tiny, 320, 16, 64)
    free = executor.run(w, HFFifo(), progress=False)
    eos = free.replies[0][min(2, len(free.replies[0]) - 1)]
    run = executor.run(w, HFFifo(), eos=eos, progress=False)
    assert [len(r) for r in run.replies] == run.result.requests["output"].tolist()
    for whole, cut in zip(free.replies, run.replies): assert cut == whole[:whole.index(eos) + 1 if eos in whole else None]
    assert run.result.requests["output"][0] <= 3


def test_nothing_to_serve_is_an_empty_result(stub):
    run = HFExecutor(stub, 100).run(Workload.build("none", [], [], []), HFFifo(), progress=False)
    assert len(run.result.requests) == len(run.plans) == 0 and run.replies == []
