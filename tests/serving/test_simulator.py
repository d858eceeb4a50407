"The engine loop: conservation, differential equality, closed forms, and what a policy may not know."

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.serving.cost import (
    DEVICES,
    MODELS,
    Calibrated,
    ModelShape,
    Plan,
    Recorded,
    Roofline,
    SimulationError,
    UnitCost,
)
from modeltc_lab.serving.past_future import (
    AdaptivePastFuture,
    FuturePeak,
    HistoryLengths,
    KnownLengths,
    Oracle,
    PastFuture,
)
from modeltc_lab.serving.policies import POLICIES, Aggressive, Conservative, EngineConfig, make_policy
from modeltc_lab.serving.token_sim import SLA, Fleet, simulate
from modeltc_lab.serving.workload import RequestTooLarge, Workload, sharegpt

LLAMA2_7B, A100_80G = MODELS["llama-2-7b"], DEVICES["a100-80g"]

MAKERS = {"past_future": PastFuture, "interp": lambda: PastFuture(HistoryLengths(window=20, variant="interp")),
          "persistent": lambda: PastFuture(HistoryLengths(window=7, init=5, resample="persistent"), reserve=0.2, combine=0.5),
          "aggressive": Aggressive, "published": lambda: Aggressive(0.9, counts_generated=False), "conservative": Conservative,
          "reserve": lambda: Conservative(8), "future_peak": FuturePeak, "short_peak": lambda: FuturePeak(0.5, 10), "oracle": Oracle,
          "adaptive": AdaptivePastFuture, "feedback": lambda: PastFuture(HistoryLengths(window=30), margin="feedback", strength=10.0),
          **{name: (lambda name=name: make_policy(name)) for name in ("new_token_ratio", "hf_fifo", "hf_prefill_first", "vllm", "sarathi", "static", "dynamic", "lightllm")}}


@st.composite
def engines(draw):
    "Any engine at all."
    pick = lambda *values: draw(st.sampled_from(values))
    chunked, static = draw(st.booleans()), pick(False, False, False, True)
    return EngineConfig(
        token_budget=pick(5, 40, 8192), max_batch=pick(4, 1024), chunked=chunked, mixed=draw(st.booleans()), prefill_first=chunked and draw(st.booleans()),
        join="static" if static else "continuous", min_batch=pick(1, 3) if static else 1, max_delay_s=pick(0.0, 2.5), admit_every=pick(1, 3), overcommit=pick(False, False, True),
        reserve_prompt=draw(st.booleans()), evict=pick("recompute", "swap"), victim=pick("newest", "fewest"), page=pick(1, 1, 4, 16), cache=pick(0, 64, 10**6), host=pick(0, 90, 10**6),
        lookahead=pick(0, 0, 1), schedule_s=pick(0.0, 0.125))


@st.composite
def traffic(draw):
    "Up to sixty small requests in a memory that barely holds the largest, with shared prefixes or without."
    n = draw(st.integers(0, 60))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    prompt = rng.integers(1, 64, n)
    blocks = [[int(g) * 10 + i for i in range(-(-int(p) // 16))] for p, g in zip(prompt, rng.integers(0, 3, n))] if draw(st.booleans()) else None
    w = Workload.build("random", np.cumsum(rng.exponential(draw(st.sampled_from([0.0, 0.5, 8.0])), n)), prompt, rng.integers(1, 64, n), max_new_tokens=64, block_ids=blocks, block_tokens=16)
    if draw(st.booleans()): w = w.closed_loop(draw(st.integers(1, 12)))
    return w, int((w.prompt + w.sealed_output - 1).max(initial=1)) + draw(st.integers(15, 140))


@st.composite
def fleets(draw):
    "One worker mostly, or several, or pools apart."
    return Fleet(draw(st.sampled_from([1, 1, 1, 2, 3])), draw(st.sampled_from([0, 0, 0, 1, 2])), draw(st.sampled_from(["round_robin", "least_tokens", "prefix_affinity", "random"])), 0.01, 0.25)


@settings(max_examples=150, deadline=None)
@given(traffic(), engines(), fleets(), st.sampled_from(sorted(MAKERS)), st.sampled_from([float("inf"), float("inf"), 40.0]))
def test_readable_and_compiled_loop_agree_and_nothing_is_lost(case, engine, fleet, name, until):
    "Bit for bit, with the memory recounted after every pass; every request ends once, with exactly its tokens, in a bounded number of passes."
    w, capacity = case
    fast, slow = (simulate(w, MAKERS[name](), capacity, UnitCost(), engine=engine, fleet=fleet, until_s=until, impl=impl, check=impl == "python", track_peak=True) for impl in ("numba", "python"))
    assert fast.requests.tobytes() == slow.requests.tobytes()
    assert fast.steps.tobytes() == slow.steps.tobytes()
    r, s = fast.requests, fast.steps
    assert s["evicted"].sum() == r["evictions"].sum() and np.all(s["used"] <= capacity) and np.all(s["running"] <= engine.max_batch + engine.lookahead * s["running"])
    assert np.all(s["time_s"] > s["start_s"])
    for worker in range(fleet.total): assert np.all(np.diff(s["time_s"][s["worker"] == worker]) > 0)                       # a worker never runs two passes at once
    if until < float("inf"): return
    assert len(r) == len(w) and np.all(np.isfinite(r["finish_s"])) and np.all(r["finish_s"] >= r["first_token_s"]) and np.all(r["first_token_s"] > r["arrival_s"])
    if not engine.lookahead: assert s["decodes"].sum() + (s["prefill_tokens"] > 0).sum() * engine.max_batch >= r["output"].sum() - len(r)
    if not fleet.prefill_workers: assert s["prefill_tokens"].sum() + r["cached"].sum() >= r["prompt"].sum()                 # every prompt was read or found


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_each_system_in_its_own_engine(name):
    w = sharegpt(120, rate=15, seed=4)
    fast, slow = (simulate(w, make_policy(name), 6000, impl=impl, check=impl == "python") for impl in ("numba", "python"))
    assert fast.requests.tobytes() == slow.requests.tobytes() and fast.steps.tobytes() == slow.steps.tobytes()
    assert len(fast.requests) == 120 and np.isfinite(fast.requests["finish_s"]).all()


@pytest.mark.parametrize("name", ["aggressive", "past_future", "new_token_ratio", "vllm"])
@pytest.mark.parametrize("rate, page", [(0.2, 1), (3.0, 16)])
def test_fast_forward_is_stepping(name, rate, page):
    w, engine = sharegpt(80, rate=rate, seed=7), EngineConfig(page=page, schedule_s=0.001)
    step, jump = (simulate(w, make_policy(name), 9000, engine=engine, fast_forward=f) for f in (False, True))
    assert jump.steps["passes"].sum() == len(step.steps) > len(jump.steps)
    for f in ("first_token_s", "finish_s", "max_gap_s"): np.testing.assert_allclose(jump.requests[f], step.requests[f], rtol=1e-9)
    for f in ("evictions", "recomputed"): assert np.array_equal(jump.requests[f], step.requests[f])


def test_fast_forward_stops_at_the_horizon():
    w = Workload.build("one", [0, 50], [5, 5], [400, 3])
    step, jump = (simulate(w, Aggressive(), 1000, UnitCost(), fast_forward=f, until_s=30.0) for f in (False, True))
    assert step.requests.tobytes() == jump.requests.tobytes() and len(step.requests) == 1 and step.requests["max_gap_s"][0] == jump.requests["max_gap_s"][0] == 1


def test_stall_free_chunks_bound_the_gap():
    "A prompt of 1000 arrives while another decodes: whole it stops the other for its whole time, in pieces of 99 for no longer than a piece."
    w = Workload.build("two", [0, 5], [10, 1000], [60, 5])
    per_token = Calibrated(np.array([0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]), 1)
    whole, pieces = (simulate(w, Aggressive(), 2000, per_token, engine=e) for e in (EngineConfig(), EngineConfig(token_budget=100, chunked=True)))
    assert whole.requests["max_gap_s"][0] == 1001 and pieces.requests["max_gap_s"][0] == 100
    apart = simulate(w, Aggressive(), 2000, per_token, engine=EngineConfig(mixed=False))
    assert apart.requests["max_gap_s"][0] == 1002 and not np.any((apart.steps["decodes"] > 0) & (apart.steps["prefill_tokens"] > 0))


def test_swapping_copies_instead_of_computing():
    w = Workload.build("two", [0, 0], [10, 10], [30, 30], max_new_tokens=32)
    again, copied = (simulate(w, Aggressive(1.0), 41, UnitCost(), engine=EngineConfig(evict=e, host=100)) for e in ("recompute", "swap"))
    assert copied.requests["recomputed"].sum() == 0 and copied.requests["swapped"].tolist() == [0, 20] and copied.steps["swapped"].sum() == 40      # out and in
    assert again.requests["recomputed"].tolist() == [0, 20] and again.steps["prefill_tokens"].sum() - copied.steps["prefill_tokens"].sum() == 21     # prompt and reply again
    full = simulate(w, Aggressive(1.0), 41, UnitCost(), engine=EngineConfig(evict="swap", host=19))
    assert full.requests["recomputed"].tolist() == [0, 20]                                                                                          # no room on the host


def test_a_shared_prefix_is_read_once():
    w = Workload.build("same", [0, 10, 20], [100] * 3, [5] * 3, block_ids=[list(range(7))] * 3, block_tokens=16)
    r = simulate(w, Aggressive(), 1000, UnitCost(), engine=EngineConfig(cache=1000, page=4))
    assert r.requests["cached"].tolist() == [0, 96, 96] and r.steps["prefill_tokens"].sum() == 100 + 4 + 4
    together = simulate(Workload.build("same", [0, 2, 2], [100] * 3, [50] * 3, block_ids=[list(range(7))] * 3, block_tokens=16), Aggressive(), 1000, UnitCost(), engine=EngineConfig(cache=1000, page=4))
    assert together.steps["used"].max() <= 96 + 3 * (8 + 52)                                                                                        # the six blocks are counted once


def test_static_batching_waits():
    w = Workload.build("late", [0, 1, 2, 30], [5] * 4, [10] * 4)
    r = simulate(w, make_policy("static"), 1000, UnitCost())
    assert r.requests["first_token_s"].tolist() == [1, 11, 11, 31]                            # the second batch begins when the first has ended
    patient = simulate(w, make_policy("dynamic"), 1000, UnitCost(), engine=EngineConfig(join="static", min_batch=3, max_delay_s=4.0))
    assert patient.requests["first_token_s"].tolist() == [3, 3, 3, 35]                        # a full batch starts at 2, the last request gives up waiting at 34


def test_lookahead_costs_a_pass():
    w = Workload.build("late", [0, 0.5], [5, 5], [3, 3])
    now, ahead = (simulate(w, Aggressive(), 1000, UnitCost(), engine=EngineConfig(lookahead=a)) for a in (0, 1))
    assert now.requests["first_token_s"].tolist() == [1, 2] and ahead.requests["first_token_s"].tolist() == [1, 3]   # arrived after the second pass was planned
    assert ahead.steps["running"].tolist()[3] == 2                                             # the finished one is still in its fourth pass


def test_kv_crosses_the_link_one_at_a_time():
    w = Workload.build("two", [0, 0], [100, 100], [2, 2])
    r = simulate(w, Aggressive(), 1000, UnitCost(), fleet=Fleet(2, 1, "round_robin", link_s_per_token=0.01, link_latency_s=1.0))
    assert r.requests["first_token_s"].tolist() == [1, 1] and r.requests["finish_s"].tolist() == [1 + 2 + 1, 1 + 4 + 1]
    assert r.requests["worker"].tolist() == [0, 1]


def test_routers():
    w = Workload.build("six", np.arange(6) * 0.001, [10, 500, 10, 10, 10, 10], [5] * 6)
    route = lambda router: simulate(w, Aggressive(), 5000, UnitCost(), fleet=Fleet(2, router=router)).requests["worker"].tolist()
    assert route("round_robin") == [0, 1, 0, 1, 0, 1] and route("least_tokens") == [0, 1, 0, 0, 0, 0]
    shared = Workload.build("shared", [0, 0.1, 10, 20], [200, 200, 200, 200], [5] * 4, block_ids=[[0] * 0 + list(range(12)), list(range(20, 32)), list(range(20, 32)), list(range(12))], block_tokens=16)
    affine = simulate(shared, Aggressive(), 5000, UnitCost(), engine=EngineConfig(cache=5000), fleet=Fleet(2, router="prefix_affinity"))
    assert affine.requests["worker"].tolist() == [0, 1, 1, 0] and affine.requests["cached"].tolist() == [0, 0, 192, 192]


def test_recorded_costs_replay_the_clock():
    w = sharegpt(40, rate=5, seed=2)
    first = simulate(w, PastFuture(), 6000)
    again = simulate(w, PastFuture(), 6000, Recorded(first.steps["time_s"] - first.steps["start_s"]))
    for f in ("running", "used", "admitted", "evicted"): assert np.array_equal(first.steps[f], again.steps[f])
    with pytest.raises(SimulationError): simulate(w, PastFuture(), 6000, Recorded(np.full(10, 0.1)))


def test_larger_memory_helps_on_average():
    "Single runs may be anomalous; the mean over seeds may not."
    goodput = [np.mean([simulate(sharegpt(400, rate=6, seed=s), AdaptivePastFuture(), c).goodput(SLA(5, 1)) for s in range(6)]) for c in (8000, 16_000, 32_000)]
    assert goodput == sorted(goodput)


def test_an_evicted_gap_counts_to_the_horizon():
    w = Workload.build("two", [0, 0], [10, 10], [30, 30], max_new_tokens=32)
    r = simulate(w, Aggressive(1.0), 41, UnitCost(), until_s=25.0).requests
    assert r["max_gap_s"][1] == 25 - 11 and np.isinf(r["finish_s"]).all()


@pytest.mark.parametrize("make", [Oracle, FuturePeak, Conservative])
def test_looking_far_enough_ahead_never_evicts(make):
    result = simulate(sharegpt(400, rate=30, seed=1), make(), 8000, track_peak=True)
    assert result.requests["evictions"].sum() == 0
    assert result.steps["used"].max() == result.steps["peak"].max()


def test_known_lengths_through_the_general_path_is_the_oracle():
    w = sharegpt(120, rate=30, seed=1)
    known = simulate(w, PastFuture(KnownLengths(w.sealed_output), reserve=0), 6000)
    oracle = simulate(w, Oracle(), 6000)
    assert known.impl == "python" and oracle.impl == "numba"
    assert known.requests.tobytes() == oracle.requests.tobytes()


@pytest.mark.parametrize("name", [n for n in MAKERS if n != "oracle"])
def test_lengths_are_sealed(name):
    short, long = (Workload.build("w", np.zeros(150), np.full(150, 300), np.full(150, reply), max_new_tokens=800) for reply in (2, 700))
    first = [int(simulate(w, MAKERS[name](), 20_000).steps["admitted"][0]) for w in (short, long)]
    assert first[0] == first[1] > 0


def test_the_oracle_is_not_sealed():
    short, long = (Workload.build("w", np.zeros(150), np.full(150, 300), np.full(150, reply), max_new_tokens=800) for reply in (2, 700))
    assert simulate(short, Oracle(), 20_000).steps["admitted"][0] > simulate(long, Oracle(), 20_000).steps["admitted"][0]


@pytest.mark.parametrize("make", [PastFuture, Aggressive])
def test_power_of_two_scaling_is_exact(make):
    w = sharegpt(150, rate=0.05, seed=3)
    slow = Workload.build("w", 2 * w.arrival_s, w.prompt, w.sealed_output, max_new_tokens=1024)
    a, b = simulate(w, make(), 6000, UnitCost()), simulate(slow, make(), 6000, UnitCost(2.0))
    for field in ("first_token_s", "finish_s", "max_gap_s"): assert np.array_equal(2 * a.requests[field], b.requests[field])


def test_md1_queue():
    "One request at a time, one token each, constant service: the mean wait of an M/D/1 queue."
    rho, n = 0.6, 60_000
    w = Workload.build("md1", np.zeros(n), np.ones(n), np.ones(n)).poisson(rho, seed=1)
    result = simulate(w, Aggressive(), 10, UnitCost(), engine=EngineConfig(max_batch=1))
    wait = (result.ttft_s - 1).mean()
    assert abs(wait / (rho / (2 * (1 - rho))) - 1) < 0.03


def test_burst_without_memory_limit():
    "Everybody at once, room for all: one pass a token for the longest reply."
    w = Workload.build("burst", np.zeros(20), np.full(20, 5), np.arange(1, 21))
    result = simulate(w, Aggressive(), 10_000, UnitCost())
    assert len(result.steps) == 20 and np.array_equal(result.requests["finish_s"], np.arange(1, 21))


def test_eviction_is_paid_for():
    "Two requests outgrow the memory: the newer one stops, and comes back with prompt and reply to prefill."
    w = Workload.build("two", [0, 0], [10, 10], [30, 30], max_new_tokens=32)
    result = simulate(w, Aggressive(1.0), 41, UnitCost())
    old, new = result.requests
    assert (old["evictions"], new["evictions"]) == (0, 1)
    assert new["recomputed"] == 20 and new["max_gap_s"] == 20  # evicted with 10 + 11 - 1 slots, back when the other has ended
    assert result.steps["used"].max() == 40


def test_golden_run():
    "Bless a change of behaviour deliberately."
    result = simulate(sharegpt(300, rate=12, seed=11), PastFuture(seed=5), 9000, UnitCost())
    assert hashlib.sha256(np.stack([result.steps[f] for f in ("used", "running", "queued", "admitted")]).tobytes()).hexdigest()[:16] == "32c4060623e6002e"


def test_roofline_units():
    cost = Roofline(LLAMA2_7B, A100_80G, launch_s=0, overhead_s=0)
    one = Plan(1, 1, 0, 0, 0, 1, 1000)
    read = (LLAMA2_7B.layers * LLAMA2_7B.layer_weights + LLAMA2_7B.hidden * LLAMA2_7B.vocab) * 2 + 1000 * LLAMA2_7B.kv_token_bytes
    assert cost.iteration(one) == pytest.approx(read / (A100_80G.bandwidth * A100_80G.memory_efficiency), rel=1e-9)
    many = Plan(8192, 1, 1, 8192 * 8193 // 2, 8192, 0, 0)
    flops = 2 * LLAMA2_7B.layers * LLAMA2_7B.layer_weights * 8192 + 4 * 32 * 4096 * (8192 * 8193 // 2)
    assert cost.iteration(many) > flops / (A100_80G.flops * A100_80G.compute_efficiency)


def test_shape_from_transformers():
    config = pytest.importorskip("transformers").LlamaConfig(num_hidden_layers=3, hidden_size=64, num_attention_heads=4, num_key_value_heads=2,
                                                             intermediate_size=128, vocab_size=1000)
    shape = ModelShape.from_hf(config)
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.kv_token_bytes) == (3, 2, 16, 2 * 3 * 2 * 16 * 2)


def test_summary_by_hand():
    w = Workload.build("hand", [0, 0, 5], [4, 4, 4], [3, 1, 2])
    s = simulate(w, Aggressive(), 100, UnitCost()).summary(SLA(0.5, 9))
    assert s["goodput_rps"] == 0 and s["sla_attainment"] == 0 and s["ttft_s"]["p50"] == 1
    s = simulate(w, Aggressive(), 100, UnitCost()).summary(SLA(1, 1))
    assert s["sla_attainment"] == 1 and s["goodput_rps"] == 3 / 7 and s["goodput_tokens_per_s"] == 6 / 7


@pytest.mark.parametrize("call, error, message", [
    (lambda: simulate(sharegpt(5), Aggressive(), 3), RequestTooLarge, "capacity=3"), (lambda: make_policy("fifo"), ValueError, "policy='fifo'"),
    (lambda: SLA(float("nan"), 1), ValueError, "ttft_s=nan"), (lambda: EngineConfig(admit_every=0), ValueError, "admit_every=0")])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error) as caught: call()
    assert message in str(caught.value)


def test_a_cache_without_blocks_is_no_cache():
    "A page that could not divide blocks is fine where there are none."
    w = sharegpt(30, rate=5, seed=2)
    runs = [simulate(w, Aggressive(), 6000, engine=EngineConfig(page=48, cache=c), impl=impl) for c, impl in ((0, "numba"), (2000, "numba"), (2000, "python"))]
    assert len({r.requests.tobytes() + r.steps.tobytes() for r in runs}) == 1
