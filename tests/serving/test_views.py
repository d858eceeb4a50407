"The serving room's figures and widgets: what they draw is what happened."

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plotly.callbacks import InputDeviceState, Points

from modeltc_lab.serving import views
from modeltc_lab.serving.past_future import Oracle
from modeltc_lab.serving.policies import Aggressive, make_policy
from modeltc_lab.serving.token_sim import SLA, STEP, Fleet, simulate
from modeltc_lab.serving.workload import Workload, sharegpt

SLA_TIGHT = SLA(8.0, 0.5)


@pytest.fixture(scope="module")
def runs():
    "Forty seconds of chat in a small memory, under three policies."
    w = sharegpt(100, rate=2.5, seed=3)
    return [simulate(w, make_policy(name), 9000) for name in ("aggressive", "conservative", "oracle")]


def passes(rows):
    "Steps from (start, stop, worker, used)."
    steps = np.zeros(len(rows), STEP)
    for name, column in zip(("start_s", "time_s", "worker", "used"), zip(*rows)): steps[name] = column
    steps["passes"] = 1
    return steps


def total_at(steps, t):
    "Brute force: what the workers that are in a pass at time t use together."
    return sum(int(s["used"]) for s in steps if s["start_s"] <= t < s["time_s"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.integers(0, 50)), min_size=1, max_size=12), min_size=1, max_size=3))
def test_curve_is_the_sum_over_workers_and_rests_when_idle(workers):
    rows = []
    for worker, plan in enumerate(workers):
        clock = 0
        for pause, length, used in plan:
            rows.append((clock + pause, clock + pause + length, worker, used))
            clock += pause + length
    steps = passes(sorted(rows, key=lambda r: r[1]))
    result = type("Run", (), {"steps": steps, "config": {}})()
    x, y = views._curve(result, "used", points=10_000)
    at = lambda t: y[np.flatnonzero(x <= t)[-1]] if (x <= t).any() else 0
    assert all(at(t + 0.5) == total_at(steps, t + 0.5) for t in range(int(steps["time_s"].max()) + 1)) and y[-1] == 0


def test_thinning_keeps_the_peak_and_the_end(runs):
    for r in runs:
        for points in (5, 50, 500):
            x, y = views._curve(r, "used", points=points)
            assert len(x) <= points and y.max() == r.steps["used"].max() and x[-1] == np.float32(r.steps["time_s"].max())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 2), st.floats(0.01, 2)), min_size=1, max_size=30), st.floats(0, 3))
def test_merged_passes_cover_the_same_busy_time(plan, gap):
    stop = np.cumsum([a + b for a, b in plan])
    steps = passes([(s - length, s, 0, 0) for s, (_, length) in zip(stop, plan)])
    start, length, busy, count = views.merge_passes(steps, gap)
    assert count.sum() == len(steps) and np.isclose((length * busy).sum(), sum(b for _, b in plan))
    assert (start[1:] - (start + length)[:-1] > gap).all() and (busy <= 1 + 1e-9).all()
    assert len(start) == 1 + sum(a > gap for a in (steps["start_s"][1:] - steps["time_s"][:-1]))


def test_race_counts_good_requests_and_evictions(runs):
    fig = views.policy_race(runs, SLA_TIGHT)
    for i, r in enumerate(runs):
        kv, evictions, queue, good = fig.data[4 * i:4 * i + 4]
        assert good.y[-1] == r.good(SLA_TIGHT).sum() and (np.diff(good.y) >= 0).all() and good.y[0] == 0
        assert evictions.customdata.sum() == r.requests["evictions"].sum() and queue.y.max() == r.steps["queued"].max()
        assert kv.y.max() == pytest.approx(100 * r.steps["used"].max() / r.capacity, rel=1e-5)
    assert runs[0].requests["evictions"].sum() > 0 == runs[2].requests["evictions"].sum()
    assert fig.layout.title.text.startswith(f"Aggressive: {runs[0].good(SLA_TIGHT).sum()} of 100 requests (oracle {runs[2].good(SLA_TIGHT).sum()})")


def test_rows_share_one_x_axis_and_do_not_overlap(runs):
    for fig in (views.policy_race(runs), views.serving_timeline(runs[0]), views.goodput_frontier(frontier_rows(runs))):
        assert {t.xaxis for t in fig.data} <= {None, "x"} and fig.layout.hoversubplots == "axis" and fig.layout.xaxis.showspikes
        rows = sorted(tuple(fig.layout["yaxis" + (t.yaxis or "y")[1:]].domain) for t in fig.data)
        rows = sorted(set(rows))
        assert rows[0][0] == 0 and rows[-1][1] == 1 and all(a[1] < b[0] for a, b in zip(rows, rows[1:]))
        assert all(fig.layout["yaxis" + (t.yaxis or "y")[1:]].title.text for t in fig.data)


def test_unfair_races_are_refused(runs):
    other = simulate(sharegpt(100, rate=2.5, seed=4), Oracle(), 9000)
    for bad, message in (([], "results: none"), ([runs[0], runs[0]], "'aggressive' twice"), ([runs[0], other], "'oracle' served other requests than 'aggressive'")):
        with pytest.raises(ValueError, match=message): views.policy_race(bad)


def test_timeline_holds_every_pass_and_the_shown_requests(runs):
    r = runs[0]
    fig = views.serving_timeline(r, SLA_TIGHT)
    spans = [t for t in fig.data if t.yaxis == "y2"]
    assert sum(t.customdata[:, 0].sum() for t in spans) == len(r.steps)
    whole, read, made = len(r.steps), r.steps["prefill_tokens"] > 0, r.steps["decodes"] > 0
    assert [t.customdata[:, 0].sum() for t in spans] == [(read & ~made).sum(), (read & made).sum(), whole - read.sum()]
    waiting, good, late = fig.data[:3]
    assert list(waiting.y) == list(range(views.BARS)) and sorted([*good.y, *late.y]) == list(waiting.y)
    assert set(good.y) == set(np.flatnonzero(r.good(SLA_TIGHT)[:views.BARS])) and len(late.y) > 0
    assert np.allclose(np.asarray(waiting.base) + waiting.x, r.requests["first_token_s"][:views.BARS], atol=1e-3)


@pytest.mark.parametrize("request_id", [0, 59, 60, 80, 99])
def test_marked_request_is_on_the_screen(runs, request_id):
    r, fig = runs[0], views.serving_timeline(runs[0], SLA_TIGHT, request_id)
    row = r.requests[request_id]
    assert request_id in fig.data[0].y and len(fig.data[0].y) == views.BARS
    mark = fig.data[3]
    assert set(mark.y) == {request_id} and mark.x[0] == row["arrival_s"] and mark.x[-1] == row["finish_s"] and sorted(mark.x) == list(mark.x)
    waited, read = (float(x) for x in re.match(r"request \d+: wait ([\d.]+) s, prefill ([\d.]+) s", fig.layout.title.text).groups())
    assert waited + read == pytest.approx(row["first_token_s"] - row["arrival_s"], abs=0.011) and len(fig.layout.title.text) < 85
    assert (fig.layout.shapes[0].x0, fig.layout.shapes[0].x1) == (row["arrival_s"], row["finish_s"])
    verdict = "good" if r.good(SLA_TIGHT)[request_id] else "late"
    assert f"{row['output']} tokens" in fig.layout.title.text and fig.layout.title.text.endswith(verdict)


def test_life_of_a_lone_request_adds_up():
    r = simulate(Workload.build("one", [0.0], [100], [5]), Aggressive(), 1000)
    a = views.life(r, 0, SLA())
    assert a["ttft_s"] == a["prefill_s"] == r.steps["time_s"][0] and a["finish_s"] == r.steps["time_s"][-1] and (a["evictions"], a["good"]) == (0, True)
    with pytest.raises(ValueError, match="request=1: need 0..0"): views.life(r, 1, SLA())


def test_timeline_of_unfinished_and_of_many_workers():
    w = sharegpt(60, rate=20, seed=1)
    cut = simulate(w, Aggressive(), 9000, until_s=4.0)
    open_end = [i for i, r in enumerate(cut.requests) if not np.isfinite(r["finish_s"])]
    never = [i for i in open_end if not np.isfinite(cut.requests["first_token_s"][i])]
    assert never and "no first token" in views.serving_timeline(cut, SLA_TIGHT, never[-1]).layout.title.text
    fig = views.serving_timeline(cut, SLA_TIGHT, open_end[0])
    assert open_end and "unfinished" in fig.layout.title.text and all(np.isfinite(np.asarray(v, float)).all() for t in fig.data for v in (t.x, t.y))
    two = simulate(w, Aggressive(), 9000, fleet=Fleet(2))
    fig = views.serving_timeline(two, SLA_TIGHT)
    assert list(fig.layout.yaxis2.ticktext) == ["0 prefill", "0 mixed", "0 decode", "1 prefill", "1 mixed", "1 decode"]
    assert sum(t.customdata[:, 0].sum() for t in fig.data if t.yaxis == "y2") == len(two.steps)


def frontier_rows(runs): return [views.frontier_row(r, 2.5, SLA_TIGHT) for r in runs]


def test_frontier_row_counts_after_the_warm_up(runs):
    for r in runs:
        row, arrival = views.frontier_row(r, 2.5, SLA_TIGHT), r.requests["arrival_s"]
        counts = arrival >= arrival[0] + views.WARMUP * (arrival[-1] - arrival[0])
        counts &= arrival < arrival[-1]  # the window ends at the last arrival
        seconds = (1 - views.WARMUP) * (arrival[-1] - arrival[0])
        assert row["goodput_rps"] == pytest.approx(r.good(SLA_TIGHT)[counts].sum() / seconds)
        assert row["attainment"] == pytest.approx(r.good(SLA_TIGHT)[counts].mean()) and row["ttft_p50"] == pytest.approx(np.median(r.ttft_s[counts]))


def made_up(shares, policy="oracle"):
    return [dict(policy=policy, rate=rate, goodput_rps=rate * a, attainment=a, ttft_p99=1.0, mtpot_p99=0.1, seed=s) for rate, seeds in shares.items() for s, a in enumerate(seeds)]


def test_saturation_is_the_last_rate_before_the_first_failure():
    assert views.saturation_rate(made_up({1: [1], 2: [0.9], 3: [0.89], 4: [1]}), "oracle") == 2
    assert views.saturation_rate(made_up({4: [0.5], 2: [1], 3: [1, 0.2, 0.95]}), "oracle") == 3       # any order; median over seeds
    assert views.saturation_rate(made_up({1: [0.5], 2: [1]}), "oracle") is None
    assert views.saturation_rate(made_up({1: [0.5], 2: [0.4]}), "oracle", kept=0.5) == 1


def test_frontier_draws_every_run_and_marks_saturation():
    rows = made_up({1: [1, 1], 2: [0.95, 0.85], 3: [0.3, 0.2]}, "past_future") + made_up({1: [1, 1], 2: [1, 1], 3: [1, 0.5]})
    fig = views.goodput_frontier(rows, SLA_TIGHT)
    points = [t for t in fig.data if t.mode == "markers" and t.name == "Past-Future" and t.yaxis == "y"][0]
    assert sorted(zip(points.x, points.y)) == sorted((r["rate"], r["goodput_rps"]) for r in rows[:6])
    mark = {t.name: (*t.x, *np.round(t.y, 9)) for t in fig.data if t.name.endswith("saturates")}
    assert mark == {"Past-Future saturates": (2.0, 1.8), "Oracle saturates": (2.0, 2.0)}
    assert ": Past-Future 2, Oracle 2" in fig.layout.title.text
    assert ": Oracle none" in views.goodput_frontier(made_up({1: [0.1]})).layout.title.text
    never = views.goodput_frontier([{**rows[0], "ttft_p99": float("inf")}])
    assert any(t.yaxis == "y2" and list(t.y) == [None] for t in never.data)  # nobody was served: no point, and no error


def test_frontier_refuses_what_it_cannot_draw():
    rows = made_up({1: [1]})
    for bad, settings_, message in (([], {}, "rows: none"), (rows, dict(percentile="p50"), r"rows\[0\]: no 'ttft_p50'"), (rows, dict(metric="joy"), "metric='joy'"),
                                    ([{k: v for k, v in rows[0].items() if k != "attainment"}], {}, "no 'attainment'"), (made_up({1: [1]}, "coin"), {}, "method='coin' has no look")):
        with pytest.raises(ValueError, match=message): views.goodput_frontier(bad, **settings_)


def follow(box, moves, rebuilt=()):
    "Move the controls one by one; the figure changes, and is another one only where traces came or went."
    state = lambda: (box.fig.layout.title.text, [None if t.y is None else np.asarray(t.y).tolist() for t in box.fig.data])
    for name, value in moves:
        before, fig = state(), box.fig
        box.controls[name].value = value
        assert state() != before, name
        assert (box.fig is not fig) == (name in rebuilt), name
        assert box.children[-1] is box.fig


def test_race_widget_follows_every_control():
    w = sharegpt(60, rate=1.0, seed=1)
    box = views.policy_race_widget(w, capacity=9000)
    moves = [("rate", 5.0), ("reserve", 0.3), ("window", 100), ("futures", 1), ("ttft", 2.0), ("mtpot", 0.15), ("clients", 20), ("policies", ("conservative",)), ("ttft", 30.0)]
    assert set(box.controls) == {name for name, _ in moves}
    follow(box, moves, rebuilt=("policies",))
    assert [r.policy for r in box.results] == ["conservative", "oracle"] and box.results[0].config["clients"] == 20
    shown = box.fig
    box.controls["policies"].value = ()
    assert box.fig is shown  # nothing chosen: the last race stays


def test_another_promise_costs_no_simulation(monkeypatch):
    box = views.policy_race_widget(sharegpt(30, rate=3.0, seed=1), capacity=9000)
    def never(*a, **k): raise AssertionError("simulated again")
    monkeypatch.setattr(views, "simulate", never)
    box.controls["ttft"].value = 1.0
    box.controls["mtpot"].value = 0.1
    with pytest.raises(AssertionError): box.controls["rate"].value = 9.0


def test_timeline_widget_follows_every_control_and_a_click():
    box = views.serving_timeline_widget()
    moves = [("policy", "conservative"), ("rate", 4.0), ("capacity", 7000), ("seed", 5), ("ttft", 2.0), ("mtpot", 0.11), ("request", 20), ("request", 80)]
    assert set(box.controls) == {name for name, _ in moves}
    follow(box, moves)
    assert box.result.policy == "conservative" and box.result.capacity == 7000
    box.fig.data[0]._dispatch_on_click(Points(point_inds=[0]), InputDeviceState())
    assert box.controls["request"].value == 40 and box.fig.layout.title.text.startswith("request 40: ")  # the first bar when 80 is marked
    box.controls["request"].value = -1
    assert box.fig.layout.shapes == ()


def test_timeline_widget_of_your_own_traffic():
    w = Workload.build("mine", [0, 0, 0], [50_000, 10, 10], [10, 20, 30])
    box = views.serving_timeline_widget(w)
    assert "seed" not in box.controls and len(box.result.requests) == 3 and box.result.capacity >= 50_010
    assert [label for label, _ in box.controls["request"].options] == ["none", "0", "1", "2"]


def test_frontier_widget_follows_every_control():
    box = views.goodput_frontier_widget(sharegpt(60, rate=1.0, seed=1), rates=(1.0, 3.0, 9.0))
    moves = [("capacity", 8000), ("ttft", 2.0), ("mtpot", 0.15), ("metric", "attainment"), ("percentile", "p50"), ("policies", ("conservative",)), ("capacity", 20_000)]
    assert set(box.controls) == {name for name, _ in moves}
    follow(box, moves, rebuilt=("policies",))
    assert box.fig.layout.yaxis.title.text == "within the promise (share)" and box.fig.layout.yaxis3.title.text == "MTPOT p50 (s)"
    assert {(r["policy"], r["rate"]) for r in box.rows} == {(p, x) for p in ("conservative", "oracle") for x in (1.0, 3.0, 9.0)}


@pytest.mark.parametrize("name", ["policy_race", "serving_timeline", "goodput_frontier"])
def test_twins_are_small_and_their_controls_matter(name):
    import json
    twin = getattr(views, f"{name}_twin")()
    assert len(json.dumps(twin.payload())) < 1_000_000
    text = [json.dumps(f.to_plotly_json(), default=lambda a: a.tolist()) for f in twin.figures]
    for control, values in enumerate(twin.values):
        for other in range(len(values)):
            if other != twin.default[control]:
                moved = list(twin.default)
                moved[control] = other
                assert text[twin.index(moved)] != text[twin.index(twin.default)], (twin.names[control], values[other])
