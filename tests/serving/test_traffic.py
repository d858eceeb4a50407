"Traffic: arrival laws against closed forms, shared prefixes against brute force, ServeGen and ArXiv against their sources."

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import modeltc_lab.core.data as data
from modeltc_lab.core.data import DataError
from modeltc_lab.serving.workload import (
    GENERATED,
    POOLS,
    SHAREGPT_CONTEXT,
    SHAREGPT_OUTPUT,
    SHAREGPT_PERCENTILE,
    Workload,
    WorkloadError,
    _renewal,
    arxiv,
    dist,
    mmpp_times,
    prefix_blocks,
    servegen,
    sharegpt,
)


def need(*names):
    for name in names:
        if not Workload.available(name): pytest.skip(f"{name} is not within reach; put it into a data folder")


@pytest.fixture(scope="module")
def chat(): return sharegpt(40_000)


@pytest.mark.parametrize("cv", [0.2, 1.0, 2.5])
def test_gamma_gaps_have_the_mean_and_spread_asked_for(chat, cv):
    w = chat.closed_loop(4).gamma(5, cv, seed=1)
    gaps = np.diff(w.arrival_s)
    assert w.clients is None and w.arrival_s[0] == 0 and gaps.mean() == pytest.approx(0.2, rel=5 * cv / 200)
    assert w.interarrival_cv == pytest.approx(cv, rel=0.05) and w.rate == pytest.approx(1 / gaps.mean())
    assert abs(np.corrcoef(gaps[1:], gaps[:-1])[0, 1]) < 0.03
    assert np.array_equal(w.prompt, chat.prompt) and np.array_equal(w.arrival_s, chat.gamma(5, cv, seed=1).arrival_s)


def test_gamma_with_cv_one_is_poisson_in_law(chat):
    gaps = np.sort(np.diff(chat.gamma(3, 1, seed=2).arrival_s))
    steps = np.arange(1, len(gaps) + 1) / len(gaps)
    assert np.abs(1 - np.exp(-3 * gaps) - steps).max() < 1.63 / len(gaps) ** 0.5  # Kolmogorov-Smirnov, 1 %


@pytest.mark.parametrize("rates, dwell", [((2, 20), (30, 10)), ((0, 8), (5, 5)), ((1, 6, 3), (10, 5, 20)), ((4,), (7,))])
def test_mmpp_mean_rate(rates, dwell):
    n, r, d = 300_000, np.array(rates), np.array(dwell)
    times = mmpp_times(n, rates, dwell, np.random.default_rng(3))
    assert np.all(np.diff(times) >= 0) and n / times[-1] == pytest.approx(r @ d / d.sum(), rel=0.03)


def test_mmpp_dispersion_and_equal_rates():
    s = np.array([1 / 3, 1.0])
    times = mmpp_times(400_000, (2, 12), 1 / s, np.random.default_rng(4))
    counts = np.histogram(times, np.arange(0, times[-1], 100))[0]
    limit = 1 + 2 * (2 - 12) ** 2 * s.prod() / (s.sum() ** 2 * (2 * s[1] + 12 * s[0]))
    assert counts.var() / counts.mean() == pytest.approx(limit, rel=0.15) and limit > 5
    gaps = np.diff(mmpp_times(50_000, (5, 5), (1, 2), np.random.default_rng(5)))
    assert gaps.std() / gaps.mean() == pytest.approx(1, abs=0.02)


def test_mmpp_starts_in_the_stationary_state():
    first = [mmpp_times(1, (1e6, 1e-6), (1, 3), np.random.default_rng(seed))[0] < 1e-3 for seed in range(2000)]
    assert np.mean(first) == pytest.approx(0.25, abs=0.04)


def test_silent_state_sends_nothing():
    gaps = np.diff(sharegpt(5000).mmpp((0, 100), (50, 1), seed=1).arrival_s)
    assert (gaps > 5).mean() < 0.02 and gaps[gaps > 5].sum() > 0.9 * gaps.sum()


@pytest.mark.parametrize("cv", [0.3, 1, 4])
def test_renewal_is_stationary(cv):
    rng = np.random.default_rng(6)
    runs = [_renewal(rng, 0.5, cv, 10) for _ in range(6000)]
    halves = np.array([[np.sum(t < 5), np.sum(t >= 5)] for t in runs])
    error = halves.std(0) / len(runs) ** 0.5
    assert np.all(np.abs(halves.mean(0) - 2.5) < 4 * error)


def test_at_once(chat):
    w = chat.head(9).at_once()
    assert not w.arrival_s.any() and np.isnan(w.rate) and np.isnan(w.interarrival_cv)


@given(st.integers(0, 60), st.data())
def test_split_keeps_every_request(n, draw):
    w = sharegpt(n, seed=n)
    at = draw.draw(st.one_of(st.integers(0, n), st.floats(0, 1)))
    one, two = w.split(at)
    assert len(one) == (at if isinstance(at, int) else round(at * n))
    assert np.array_equal(np.r_[one.sealed_output, two.sealed_output], w.sealed_output)
    assert np.allclose(np.diff(two.arrival_s), np.diff(w.arrival_s)[len(one):]) and (len(two) == 0 or two.arrival_s[0] == 0)


def test_split_counts_and_shares_differ():
    w = sharegpt(10)
    assert [len(p) for at in (1, 1.0, 0, 0.25) for p in w.split(at)] == [1, 9, 10, 0, 0, 10, 2, 8]


def test_fits_is_the_simulators_limit():
    w = Workload.build("w", [1, 2, 4, 7], [10, 10, 50, 1], [5, 6, 1, 1])
    small, left_out = w.fits(14)
    assert (small.prompt.tolist(), small.sealed_output.tolist(), small.arrival_s.tolist(), left_out) == ([10, 1], [5, 1], [0, 6], 2)
    assert w.fits(0)[1] == 4 and len(w.fits(0)[0]) == 0 and w.fits(50)[1] == 0


TOKENS = st.lists(st.lists(st.integers(0, 1), max_size=9), max_size=7)


@given(TOKENS, st.integers(1, 3))
def test_prefix_ids_are_equal_exactly_where_prefixes_are(prompts, size):
    rows = prefix_blocks(prompts, size)
    assert [len(r) for r in rows] == [len(p) // size for p in prompts]
    places = [(i, k) for i, row in enumerate(rows) for k in range(len(row))]
    for i, k in places:
        for j, m in places:
            same = k == m and prompts[i][:(k + 1) * size] == prompts[j][:(k + 1) * size]
            assert (rows[i][k] == rows[j][m]) == same
    ids = {i for row in rows for i in row}
    assert ids == set(range(len(ids)))


@given(TOKENS, st.integers(1, 3))
def test_shared_prefix_against_brute_force(prompts, size):
    prompts = [p for p in prompts if p]
    w = Workload.build("w", np.arange(len(prompts)), [len(p) for p in prompts], [1] * len(prompts), block_ids=prefix_blocks(prompts, size), block_tokens=size)
    saved = 0
    for i, p in enumerate(prompts):
        known = (k for k in range((len(p) - 1) // size, 0, -1) if any(q[:k * size] == p[:k * size] and len(q) >= k * size for q in prompts[:i]))
        saved += next(known, 0) * size
    assert w.shared_prefix() == pytest.approx(saved / max(sum(map(len, prompts)), 1))


def test_shared_prefix_without_ids_is_zero(): assert sharegpt(5).shared_prefix() == 0 and "shared_prefix" not in sharegpt(5).describe()


def test_mooncake_shares_prefixes():
    need("mooncake_conversation")
    w = Workload.load("mooncake_conversation")
    assert w.block_tokens == 512 and w.shared_prefix() == pytest.approx(0.3734, abs=1e-4) == w.describe()["shared_prefix"]
    total = sum(int(p) // 512 for p in w.prompt)
    repeats = total - len({i for p, ids in zip(w.prompt, w.block_ids) for i in ids[:p // 512]})
    assert w.shared_prefix() <= repeats * 512 / w.prompt.sum()


def test_describe_by_hand():
    w = Workload.build("w", [0, 1, 3], [10, 20, 60], [1, 2, 3], block_ids=[[0], [0, 1], [0, 1]], block_tokens=10)
    d = w.describe()
    assert (d["name"], d["requests"], d["generated"]) == ("w", 3, False) and d["rate"] == pytest.approx(2 / 3) and d["interarrival_cv"] == pytest.approx(0.5 / 1.5)
    assert (d["prompt_mean"], d["prompt_p50"], d["output_mean"], d["output_p50"]) == (30, 20, 2, 2)
    assert d["prompt_p99"] == pytest.approx(20 + 0.98 * 40) and d["shared_prefix"] == pytest.approx((10 + 20) / 90)
    assert np.isnan(dist(1, 0).describe()["output_mean"])


def test_embedded_sharegpt_percentiles_are_the_measured_ones():
    need("sharegpt_quantiles")
    table = data.load("sharegpt_quantiles")
    rows = [int(np.flatnonzero(table["percentile"] == p)[0]) for p in SHAREGPT_PERCENTILE]
    for column, embedded in (("context_any_turn", SHAREGPT_CONTEXT), ("output_any_turn", SHAREGPT_OUTPUT)):
        assert np.maximum(table[column][rows], 1).tolist() == list(embedded)


def test_arxiv_keeps_pairs_and_says_what_is_generated():
    need("arxiv")
    table = data.load("arxiv_summarization_lengths")
    pairs = set(zip(table["prompt_tokens"].tolist(), table["output_tokens"].tolist()))
    w = arxiv(500, rate=2, seed=1)
    assert set(zip(w.prompt.tolist(), w.sealed_output.tolist())) <= pairs and "generated arrivals" in w.name and "arrivals generated" in w.note
    assert (len(w), int(w.cap[0])) == (500, 4096) and w.rate == pytest.approx(2, rel=0.2)
    assert not np.array_equal(w.prompt, arxiv(500, seed=2).prompt) and len(Workload.load("arxiv_summarization_lengths")) == len(table["prompt_tokens"])
    with pytest.raises(WorkloadError, match="n=99999: need 0 to"): arxiv(99_999)


def windows(pool):
    rates = data.load(f"servegen_{pool}_rates")
    total = np.bincount(rates["window_start_s"] // 600, rates["rate_rps"])
    return rates, total


@pytest.mark.parametrize("pool", [p for p in POOLS if POOLS[p]])
def test_servegen_follows_rates_and_lengths_of_its_source(pool):
    need(f"servegen_{pool}")
    rates, total = windows(pool)
    at = int(total.argmax()) * 600
    w = servegen(pool, n=15_000, seed=1)
    assert w.generated and "generated" in w.name and f"from second {at} " in w.note and w.arrival_s[0] == 0
    here = rates["window_start_s"] == at
    share = dict(zip(rates["client"][here].tolist(), (rates["rate_rps"][here] / total.max()).tolist()))
    pmfs = {r["client"]: r["pmf"] for r in data.load(f"servegen_{pool}_clients") if r["t0"] == at // 21_600 * 21_600 and r["pmf"]}
    aggregate = data.load(f"servegen_{pool}_aggregate")["pmf"]
    borrowed = sum(s for c, s in share.items() if c not in pmfs)
    count = int(w.note.rsplit(": ", 1)[1].split(" of ")[0])
    assert count / len(w) == pytest.approx(borrowed, abs=0.08) and (pool != "deepseek-r1" or count == 0)
    for values, field in ((w.prompt, "input_tokens"), (w.sealed_output, "output_tokens")):
        tail = 0.0
        for c, s in share.items():
            pmf = pmfs.get(c, aggregate)[field]
            v, p = np.array(pmf["v"]), np.array(pmf["p"])
            tail += s * p[v <= np.median(values)].sum() / p.sum()
        assert np.mean(values <= np.median(values)) == pytest.approx(tail, abs=0.06)


@pytest.mark.parametrize("pool", [p for p in POOLS if not POOLS[p]])
def test_pools_without_clients_take_the_aggregate(pool):
    need(f"servegen_{pool}")
    w = servegen(pool, n=3000, rate=5)
    assert w.note.endswith("3000 of 3000") and w.rate == pytest.approx(5) and set(w.cap.tolist()) == {16_384}
    pmf = data.load(f"servegen_{pool}_aggregate")["pmf"]["output_tokens"]
    v, p = np.maximum(pmf["v"], 1), np.array(pmf["p"]) / np.sum(pmf["p"])
    assert set(w.sealed_output.tolist()) <= set(v.tolist()) and abs(w.sealed_output.mean() - v @ p) < 5 * w.sealed_output.std() / 3000 ** 0.5


def test_servegen_moves_through_the_day_and_begins_anew():
    need("servegen_deepseek-r1")
    _, total = windows("deepseek-r1")
    w = servegen(n=36_000, start_s=85_900, seed=3)
    counts = np.histogram(w.arrival_s, np.arange(0, 1801, 600))[0]
    expected = 600 * np.array([total[143], total[0], total[1]])
    assert np.all(np.abs(counts - expected) < 9 * expected ** 0.5)


def test_servegen_is_repeatable_and_rate_only_stretches_time():
    need("servegen_deepseek-r1")
    own, slow, other = servegen(n=800, seed=2), servegen(n=800, seed=2, rate=3), servegen(n=800, seed=4)
    assert np.array_equal(own.sealed_output, slow.sealed_output) and not np.array_equal(own.sealed_output, other.sealed_output)
    assert np.allclose(slow.arrival_s, own.arrival_s * own.rate / 3) and set(own.cap.tolist()) == {32_768}
    assert len(servegen(n=0)) == 0 and len(servegen(n=1, rate=2)) == 1


def test_servegen_clients():
    need("servegen_deepseek-r1")
    w = servegen(n=400, clients=1, seed=5)
    supports = [set(np.maximum(r["pmf"]["output_tokens"]["v"], 1).tolist()) for r in data.load("servegen_deepseek-r1_clients") if r["pmf"]]
    assert "clients heard: 1;" in w.note and any(set(w.head(50).sealed_output.tolist()) <= s for s in supports)
    for bad, message in (({"clients": 0}, "clients=0: need 1 to"), ({"clients": 500}, "clients=500: need 1 to"), ({"start_s": -1}, "start_s=-1"),
                         ({"start_s": 86_400}, "start_s=86400: need 0 <= start_s < 86400"), ({"rate": 0}, "rate=0")):
        with pytest.raises(WorkloadError, match=message): servegen(**bad)


def test_generated_names_load_or_say_what_is_missing(monkeypatch):
    for name in GENERATED:
        if Workload.available(name) and not name.startswith("servegen_m"): assert len(Workload.load(name)) > 0
    monkeypatch.setattr(data, "folders", lambda: [])
    assert Workload.available("sharegpt") and not Workload.available("servegen_deepseek-r1") and not Workload.available("arxiv")
    for name in ("servegen_deepseek-r1", "servegen_m-mid", "arxiv"):
        with pytest.raises(DataError, match="is in no data folder"): Workload.load(name)
