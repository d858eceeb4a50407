"The engine loop: conservation, differential equality, closed forms, and what a policy may not know."

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.serving.memory import OutOfMemory, TokenPool
from modeltc_lab.serving.past_future import FuturePeak, HistoryLengths, KnownLengths, Oracle, PastFuture
from modeltc_lab.serving.policies import Aggressive, Conservative, make_policy
from modeltc_lab.serving.token_sim import (
    A100_80G,
    LLAMA2_7B,
    SLA,
    EngineLimits,
    ModelShape,
    Plan,
    RequestTooLarge,
    Roofline,
    UnitCost,
    simulate,
)
from modeltc_lab.serving.workload import Workload, sharegpt

MAKERS = {"past_future": PastFuture, "interp": lambda: PastFuture(HistoryLengths(window=20, variant="interp")),
          "persistent": lambda: PastFuture(HistoryLengths(window=7, init=5, resample="persistent"), reserve=0.2, combine=0.5),
          "aggressive": Aggressive, "published": lambda: Aggressive(0.9, counts_generated=False), "conservative": Conservative,
          "reserve": lambda: Conservative(8), "future_peak": FuturePeak, "oracle": Oracle}


@st.composite
def traffic(draw):
    n = draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    w = Workload.build("random", np.cumsum(rng.exponential(draw(st.sampled_from([0.0, 0.5, 8.0])), n)), rng.integers(1, 64, n), rng.integers(1, 64, n),
                       max_new_tokens=64)
    if draw(st.booleans()): w = w.closed_loop(draw(st.integers(1, 12)))
    capacity = int((w.prompt + w.sealed_output - 1).max()) + draw(st.integers(0, 120))
    limits = EngineLimits(draw(st.sampled_from([40, 8192])), draw(st.sampled_from([2, 1024])), draw(st.sampled_from([1, 3])), draw(st.booleans()))
    return w, capacity, limits


@settings(max_examples=40, deadline=None)
@given(traffic(), st.sampled_from(sorted(MAKERS)))
def test_readable_and_compiled_loop_agree_and_nothing_is_lost(case, name):
    w, capacity, limits = case
    fast, slow = (simulate(w, MAKERS[name](), capacity, UnitCost(), limits=limits, impl=impl, track_peak=True) for impl in ("numba", "python"))
    assert fast.requests.tobytes() == slow.requests.tobytes()
    assert fast.steps.tobytes() == slow.steps.tobytes()
    r, s = fast.requests, fast.steps
    assert np.all(r["finish_s"] >= r["first_token_s"]) and np.all(r["first_token_s"] > r["arrival_s"])
    assert s["running"].sum() == r["output"].sum()
    assert s["evicted"].sum() == r["evictions"].sum()
    if not limits.overcommit: assert s["admitted"].sum() - s["evicted"].sum() == len(w)
    assert s["used"].max() <= capacity and s["running"].max() <= limits.max_batch
    assert np.all(np.diff(s["time_s"]) > 0)


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
    class Twice(UnitCost):
        def coefficients(self): return 2 * super().coefficients()
    w = sharegpt(150, rate=0.05, seed=3)
    slow = Workload.build("w", 2 * w.arrival_s, w.prompt, w.sealed_output, max_new_tokens=1024)
    a, b = simulate(w, make(), 6000, UnitCost()), simulate(slow, make(), 6000, Twice())
    for field in ("first_token_s", "finish_s", "max_gap_s"): assert np.array_equal(2 * a.requests[field], b.requests[field])


def test_md1_queue():
    "One request at a time, one token each, constant service: the mean wait of an M/D/1 queue."
    rho, n = 0.6, 60_000
    w = Workload.build("md1", np.zeros(n), np.ones(n), np.ones(n)).poisson(rho, seed=1)
    result = simulate(w, Aggressive(), 10, UnitCost(), limits=EngineLimits(max_batch=1))
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
    (lambda: SLA(float("nan"), 1), ValueError, "ttft_s=nan"), (lambda: EngineLimits(admit_every=0), ValueError, "admit_every=0")])
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error) as caught: call()
    assert message in str(caught.value)


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 30), st.booleans()), max_size=40))
def test_pool_conserves_slots(actions):
    pool = TokenPool(100)
    for request, slots, release in actions:
        if release and request in pool.held: pool.release(request)
        elif slots > pool.free:
            with pytest.raises(OutOfMemory): pool.grow(request, slots)
        else: pool.grow(request, slots)
        assert pool.used == sum(pool.held.values()) and 0 <= pool.used <= 100 == pool.used + pool.free
