import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear

from modeltc_lab.serving import cost
from modeltc_lab.serving.cost import (
    DEVICES,
    FEATURES,
    MODELS,
    VIDUR_MODELS,
    VIDUR_NODES,
    Calibrated,
    Curve,
    Device,
    ModelShape,
    OperatorTable,
    Plan,
    Recorded,
    Roofline,
    SimulationError,
    UnitCost,
    calibration_plans,
)
from modeltc_lab.serving.workload import Workload

A100, SMALL = DEVICES["a100-80g"], ModelShape("small", 2, 64, 4, 2, 16, 128, 500)
TRUTH = np.array([2e-3, 4e-6, 1e-6, 3e-9, 5e-11, 2e-6, 1e-7, 1e-9, 2e-11])
PROFILES = pytest.mark.skipif(not Workload.available("vidur_linear_ops"), reason="needs the data set vidur_linear_ops")


def chunks(parts, decodes=()):
    "A plan by brute force: one (new, total) pair a prompt, one total a decode; the causal mask is counted row by row."
    area = sum(sum(s - q + 1 + i for i in range(q)) for q, s in parts)
    return Plan(sum(q for q, _ in parts) + len(decodes), len(parts) + len(decodes), len(parts), area, sum(s for _, s in parts), len(decodes), sum(decodes))


plans = st.builds(lambda parts, decodes, swapped: chunks([(q, q + before) for q, before in parts], decodes)._replace(swapped=swapped),
                  st.lists(st.tuples(st.integers(1, 300), st.integers(0, 900)), max_size=3), st.lists(st.integers(1, 3000), max_size=20), st.integers(0, 5000))


def table(tp=1, max_tokens=64):
    "A small hand-made table: one operator of each layer, one of each pass, and collectives."
    return OperatorTable(Roofline(SMALL, A100, tp), {"mlp_up_proj": Curve.of([1, 16, 100], [2e-6, 3e-6, 9e-6]), "emb": Curve.of([1, 50], [1e-6, 4e-6])},
                         Curve.of([128, 12_800], [5e-6, 50e-6]) if tp > 1 else None, max_tokens)


MODELS_TO_TRY = {"unit": UnitCost(0.25), "roofline": Roofline(SMALL, A100), "roofline, 4 devices": Roofline(SMALL, A100, 4), "table": table(), "table, 2 devices": table(2),
                 "fitted": Calibrated(TRUTH, 64), "fitted, noisy": Calibrated(TRUTH, 64, np.array([0.9, 1.0, 1.3]), "residual", 5)}


@pytest.mark.parametrize("name", MODELS_TO_TRY)
@given(plan=plans, step=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_parts_add_up_and_nothing_is_free(name, plan, step):
    "The parts sum to the whole, the compiled form is the model, and more work never costs less."
    model = MODELS_TO_TRY[name]
    seconds = model.iteration(plan, step)
    assert sum(model.explain(plan, step).values()) == pytest.approx(seconds, rel=1e-9)
    assert seconds == cost._seconds(model.compiled(), step, plan.tokens, plan.rows, plan.prefill_area, plan.prefill_kv, plan.decode_kv, plan.swapped) > 0
    for field in ("tokens", "rows", "prefill_area", "prefill_kv", "decode_kv", "swapped"):
        assert model.iteration(plan._replace(**{field: getattr(plan, field) + 7}), step) >= seconds


@given(plans)
@settings(max_examples=100, deadline=None)
def test_compiled_against_the_formula(plan):
    "The thirteen coefficients mean what their order says."
    k = np.arange(1, 14) * np.array([1e-3, 1e-6, 1e-6, 1e-4, 1e-6, 1e-5, 1e-10, 1e-8, 1e-9, 3e-9, 1e-7, 2e-9, 1e-11])
    t = k[0] + k[1] * plan.tokens + max(k[2] * plan.tokens, k[3]) + max(k[4] * plan.rows, k[5]) + max(k[6] * plan.prefill_area, k[7] * plan.prefill_kv)
    t += max(k[8], k[9]) * plan.decode_kv + k[10] * plan.swapped + (k[11] + k[12] * plan.tokens) * (plan.prefill_kv + plan.decode_kv)
    none = np.zeros(0)
    assert cost._of_plan(cost.CompiledCost(k, none, none, none, 0), plan, 3) == pytest.approx(t, rel=1e-12)
    assert cost._of_plan(cost.CompiledCost(k, none, none, np.array([2.0]), 9), plan, 3) == pytest.approx(2 * t, rel=1e-12)
    rising = np.array([0.0, 1.0, 3.0])                       # goes on by 2 a token
    assert cost._of_plan(cost.CompiledCost(k, rising, none, none, 0), plan, 3) == pytest.approx(t + (rising[plan.tokens] if plan.tokens < 3 else 3 + 2 * (plan.tokens - 2)), rel=1e-12)


def test_roofline_by_hand():
    "A device of round numbers: 1 FLOP/s, 1 byte/s, efficiencies 1. Every group is a count."
    device, shape = Device("unit", 1, 1, 1e9, 1, link_latency_s=3, host_bandwidth=2, compute_efficiency=1, memory_efficiency=1), SMALL
    weights = 64 * (64 + 2 * 32) + 64 * 64 + 3 * 64 * 128
    assert shape.layer_weights == weights and shape.kv_token_bytes == 2 * 2 * 32 * 2
    plan = Plan(tokens=10, rows=3, prefills=1, prefill_area=36, prefill_kv=8, decodes=2, decode_kv=50, swapped=4)
    one, two = (Roofline(shape, device, tp, launch_s=0, overhead_s=1).explain(plan) for tp in (1, 2))
    by_hand = {"overhead": 1, "communication": 0, "linear": 2 * weights * 2 * 10, "head": 2 * 64 * 500 * 3, "prefill attention": max(4 * 2 * 64 * 36, 256 * 8), "decode attention": 4 * 2 * 64 * 50, "swap": 256 * 4 / 2}
    assert one == pytest.approx(by_hand)
    half = {k: v / 2 for k, v in by_hand.items()} | {"overhead": 1 + 2 * 2 * 3, "communication": 2 * 2 * (10 * 64 * 2) * 2 * (2 - 1) / 2}
    assert two == pytest.approx(half)


def test_kv_heads_are_copied_not_split():
    "Beyond one KV head a device, more devices neither read nor swap less KV each, nor hold more tokens for their memory."
    two, eight = (Roofline(SMALL, A100, tp) for tp in (2, 8))
    assert (two.kv_copies, eight.kv_copies) == (1, 4)
    np.testing.assert_allclose(eight.coefficients()[[7, 9, 10]], two.coefficients()[[7, 9, 10]], rtol=1e-12)
    assert eight.kv_capacity * eight.kv_copies * SMALL.kv_token_bytes <= 0.9 * 8 * A100.memory
    assert eight.kv_capacity == pytest.approx(two.kv_capacity, rel=1e-3)


def test_chunks_cover_the_triangle():
    "A prompt cut anywhere reads the same query-key pairs in sum, and costs no less."
    whole, cut = chunks([(100, 100)]), [chunks([(30, 30)]), chunks([(50, 80)]), chunks([(20, 100)])]
    assert sum(p.prefill_area for p in cut) == whole.prefill_area == 100 * 101 // 2
    assert all(p.prefill_area == q * s - q * (q - 1) // 2 for p, (q, s) in zip(cut, ((30, 30), (50, 80), (20, 100))))
    assert sum(MODELS_TO_TRY["roofline"].iteration(p) for p in cut) > MODELS_TO_TRY["roofline"].iteration(whole)


@given(st.lists(st.tuples(st.integers(1, 60), st.floats(1e-6, 1e-3)), min_size=1, max_size=40))
@settings(max_examples=80, deadline=None)
def test_curve_is_the_nearest_that_never_falls(points):
    "Against a general bounded least-squares solver on the increments of the logarithm; and inside the range of the data."
    size, seconds = np.array(points).T
    curve = Curve.of(size, seconds)
    grid = np.unique(size)
    medians = np.array([np.median(seconds[size == g]) for g in grid])
    steps = np.tril(np.ones((len(grid), len(grid))))
    best = lsq_linear(steps, np.log(medians), bounds=(np.r_[-np.inf, np.zeros(len(grid) - 1)], np.inf), method="bvls", tol=1e-14)
    np.testing.assert_allclose(np.log(curve.seconds), steps @ best.x, atol=1e-6)
    assert (np.diff(curve.seconds) >= 0).all() and medians.min() * (1 - 1e-9) <= curve.seconds.min() and curve.seconds.max() <= medians.max() * (1 + 1e-9)
    assert float(curve(2 * grid[-1])) == pytest.approx(2 * curve.seconds[-1]) and curve.provenance(grid[0]) == "exact" and curve.provenance(grid[-1] + 1) == "extrapolated"


def test_one_slow_measurement_stays_where_it_is():
    seconds = np.full(100, 1e-5)
    seconds[10] = 2e-5
    assert Curve.of(np.arange(1, 101), seconds).seconds[-1] < 1.01e-5


@pytest.mark.parametrize("max_tokens", [1, 30, 64, 5000])
@pytest.mark.parametrize("tp", [1, 2])
def test_table_by_hand_whatever_its_length(tp, max_tokens):
    "Looked up, interpolated and extrapolated; the length of the compiled table changes nothing."
    model = table(tp, max_tokens)
    for n in (1, 8, 16, 64, 99, 100, 101, 700, 20_000):
        plan = Plan(n, 0, 0, 0, 0, 0, 0)
        up, emb = (np.interp(n, x, y) * max(1, n / x[-1]) for x, y in (([1, 16, 100], [2e-6, 3e-6, 9e-6]), ([1, 50], [1e-6, 4e-6])))
        expected = 2 * up + emb + (2 * 2 * np.interp(n * 128, [128, 12_800], [5e-6, 50e-6]) * max(1, n / 100) if tp > 1 else 0)
        head = max(0, 64 * 500 * 2 / tp / (A100.bandwidth * 0.8))
        assert model.iteration(plan) - 2e-3 - 2 * 5e-6 - head == pytest.approx(expected, rel=1e-6)
    known = {n: model.provenance(Plan(n, 1, 0, 0, 0, 1, 9)) for n in (16, 17, 101)}
    assert [known[n]["mlp_up_proj"] for n in known] == ["exact", "interpolated", "extrapolated"] and known[16]["emb"] == "interpolated"
    assert {known[16][n] for n in ("head", "decode attention", "overhead")} == {"analytic"} and set(known[16]) == set(model.explain(Plan(16, 1, 0, 0, 0, 1, 9)))


@PROFILES
def test_shapes_are_those_profiled():
    "The columns of the profiles name the same shapes."
    t = cost.load("vidur_linear_ops")
    for name, published in VIDUR_MODELS.items():
        row = {c: set(t[c][t["model"] == published].tolist()) for c in ("n_head", "n_kv_head", "n_embd", "n_expanded_embd")}
        s = MODELS[name]
        assert row == {"n_head": {s.heads}, "n_kv_head": {s.kv_heads}, "n_embd": {s.hidden}, "n_expanded_embd": {s.mlp}}


@PROFILES
@pytest.mark.parametrize("device, tp", [("a100-80g", 1), ("h100-sxm", 8)])
def test_left_out_points_are_predicted(device, tp):
    "Fitted to every other size, the rest is within a few percent, better than by a running maximum; and the raw rows are matched at their sizes."
    t, isotonic, running = cost.load("vidur_linear_ops"), [], []
    rows = (t["gpu"] == VIDUR_NODES[device][0]) & (t["tp"] == tp) & (t["model"] == VIDUR_MODELS["llama-2-7b"])
    for op in ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj"):
        size = np.unique(t["num_tokens"][rows])
        took = np.array([np.median(t[f"{op}_ms"][rows & (t["num_tokens"] == s)]) for s in size])
        isotonic += (Curve.of(size[::2], took[::2])(size[1:-1:2]) / took[1:-1:2] - 1).tolist()
        running += (np.interp(size[1:-1:2], size[::2], np.maximum.accumulate(took[::2])) / took[1:-1:2] - 1).tolist()
    assert np.median(np.abs(isotonic)) < 0.03 and abs(np.mean(isotonic)) < 0.02
    assert np.percentile(np.abs(isotonic), 90) < np.percentile(np.abs(running), 90)


@PROFILES
@pytest.mark.parametrize("model, device, tp", [("llama-2-7b", "a100-80g", 1), ("llama-3-70b", "a100-80g", 8), ("qwen-72b", "h100-sxm", 4)])
def test_published_table_agrees_with_itself(model, device, tp):
    t = OperatorTable.vidur(Roofline(MODELS[model], DEVICES[device], tp))
    for n in (1, 100, 4096, 4097, 32_768, 32_769, 100_000):
        plan = chunks([(n, n)]) if n < 5000 else Plan(n, 1, 1, 0, 0, 0, 0)
        assert t.iteration(plan) == pytest.approx(sum(t.explain(plan).values()), rel=1e-9)


@pytest.mark.parametrize("t_star", [16, 128, 512])
def test_planted_coefficients_come_back(t_star):
    design = [*calibration_plans(), *[Plan(8, 8, 0, 0, 0, 8, 900, swapped) for swapped in (100, 1000, 5000)]]
    truth = Calibrated(TRUTH, t_star)
    found = Calibrated.fit(design, [truth.iteration(p) for p in design])
    assert found.t_star == t_star
    np.testing.assert_allclose(found.coefficients, TRUTH, rtol=1e-5)
    np.testing.assert_allclose(found.residuals, 1, rtol=1e-6)


def test_the_design_tells_features_apart():
    "Columns of the design, scaled alike, are far from dependent; those of a log of decodes alone are as good as one."
    def condition(passes):
        columns = cost._features(passes, 128)[:, [0, 2, 3, 5]]
        return np.linalg.cond(columns / np.linalg.norm(columns, axis=0))
    assert np.linalg.matrix_rank(cost._features(calibration_plans(), 128)[:, :6]) == 6
    assert condition(calibration_plans()) < 20 < 1e6 < condition([Plan(b, b, 0, 0, 0, b, 400 * b) for b in range(1, 60)])


def test_the_fit_is_the_bounded_optimum():
    "On collinear rows an unconstrained fit goes below zero; ours is the optimum of a general bounded solver instead."
    rng = np.random.default_rng(0)
    log = [Plan(b, b, 0, 0, 0, b, 400 * b + int(d)) for b, d in zip(rng.integers(1, 40, 60), rng.normal(0, 60, 60))]
    seconds = np.array([0.01 + 2e-4 * p.tokens for p in log]) * rng.normal(1, 0.1, 60)
    found = Calibrated.fit(log, seconds, t_stars=(8,))
    raw = cost._features(log, 8)
    used = np.abs(raw).max(0) > 0
    free = np.linalg.lstsq(raw[:, used] / seconds[:, None], np.ones(60), rcond=None)[0]
    level = seconds
    for _ in range(4):                                    # weighted by the fitted time, as the fit says
        rows = raw[:, used] / level[:, None]
        scale = np.linalg.norm(rows, axis=0)
        level = raw[:, used] @ (lsq_linear(rows / scale, seconds / level, bounds=(0, np.inf), method="bvls", tol=1e-14).x / scale)
    assert free.min() < 0 <= found.coefficients.min()
    np.testing.assert_allclose(raw @ found.coefficients, level, rtol=1e-6)


def test_held_out_passes_by_kind():
    "With 5 % of noise the unseen passes are met within it, and the report counts them by kind."
    rng = np.random.default_rng(3)
    truth = Calibrated(TRUTH, 128)
    design = calibration_plans() * 3
    fitted = Calibrated.fit(design, np.array([truth.iteration(p) for p in design]) * rng.normal(1, 0.05, len(design)))
    unseen = [chunks([(n, n)]) for n in (50, 700)] + [chunks([], [300] * b) for b in (3, 30, 60)] + [chunks([(200, 900)], [500] * 10)]
    report = fitted.report(unseen, [truth.iteration(p) for p in unseen])
    assert {kind: r["passes"] for kind, r in report.items()} == {"prefill": 2, "decode": 3, "mixed": 1}
    assert all(r["median"] < 0.05 and r["median"] <= r["p90"] and abs(r["bias"]) <= r["p90"] + 1e-12 for r in report.values())
    slower = fitted.report(unseen, [2 * fitted.iteration(p) for p in unseen])
    assert all(r["median"] == pytest.approx(0.5) and r["p90"] == pytest.approx(0.5) and r["bias"] == pytest.approx(-0.5) for r in slower.values())


def test_noise_is_drawn_by_pass_and_seed():
    "Every residual is drawn about equally often, the same pass gets the same one, another seed other ones."
    ratios, plan = np.array([0.8, 0.9, 1.0, 1.1, 1.2]), Plan(8, 8, 0, 0, 0, 8, 4000)
    calm = Calibrated(TRUTH, 64)
    one, again, other = ([Calibrated(TRUTH, 64, ratios, "residual", s).iteration(plan, i) / calm.iteration(plan) for i in range(5000)] for s in (1, 1, 2))
    assert one == again and np.mean(np.array(one) == np.array(other)) == pytest.approx(0.2, abs=0.03)
    drawn = np.array([np.isclose(one, r).mean() for r in ratios])
    assert drawn.sum() == 1 and np.abs(drawn - 0.2).max() < 0.03


def test_a_file_brings_the_model_back(tmp_path):
    path = tmp_path / "mine.json"
    model = Calibrated(TRUTH, 64, np.array([0.9, 1.1]), "residual", 7)
    model.to_json(path)
    back = Calibrated.from_json(path)
    assert [back.iteration(p, 4) for p in calibration_plans()] == [model.iteration(p, 4) for p in calibration_plans()]


@pytest.mark.parametrize("change", [{"t_star": "x"}, {"t_star": None}, {"t_star": -1}, {"seed": "q"}, {"seed": 2**63}, {"residuals": [[1.0]]}, {"residuals": [None]}, {"residuals": [-1.0]},
                                    {"coefficients": ["a"] * 7}, {"coefficients": [1.0]}, {"noise": "loud"}, {"extra": 1}, {"kind": "other"}])
def test_a_spoilt_file_is_named(tmp_path, change):
    path = tmp_path / "mine.json"
    Calibrated(TRUTH, 64, np.array([1.0]), "residual").to_json(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="mine.json: not a calibrated model"): Calibrated.from_json(path)


def test_the_recording_ends():
    replay = Recorded([0.5, 0.25])
    assert [replay.iteration(Plan(9, 1, 1, 45, 9, 0, 0), s) for s in (0, 1)] == [0.5, 0.25] and replay.explain(Plan(1, 1, 0, 0, 0, 1, 1), 1) == {"recorded": 0.25}
    assert np.isnan(cost._of_plan(replay.compiled(), Plan(1, 1, 0, 0, 0, 1, 1), 2))
    for step in (2, -1):
        with pytest.raises(SimulationError, match=f"pass {step}: the recording has 2 passes"): replay.iteration(Plan(1, 1, 0, 0, 0, 1, 1), step)


def test_features_are_named_in_order():
    assert len(FEATURES) == 9 and cost._features([Plan(3, 2, 1, 5, 6, 1, 7, 8)], 4).tolist() == [[1, 4, 3, 7, 5, 2, 8, 13, 39]]


@pytest.mark.parametrize("call, message", [
    (lambda: UnitCost(0), "seconds=0"), (lambda: Roofline(SMALL, A100, tp=0), "tp=0"), (lambda: Roofline(SMALL, A100, tp=1.5), "tp=1.5"), (lambda: Roofline(SMALL, A100, tp=float("nan")), "tp=nan"),
    (lambda: Roofline(SMALL, A100, launches_per_layer=-9), "launches_per_layer=-9"), (lambda: Roofline(SMALL, A100, launch_s=-1), "launch_s=-1"), (lambda: replace(A100, link_latency_s=float("nan")), "link_latency_s=nan"),
    (lambda: replace(A100, host_bandwidth=0), "host_bandwidth=0"), (lambda: replace(SMALL, layers=-2), "layers=-2"), (lambda: replace(SMALL, kv_heads=0), "kv_heads=0"), (lambda: replace(SMALL, kv_heads=3), "kv_heads=3"),
    (lambda: replace(SMALL, weight_bytes=0), "weight_bytes=0"), (lambda: ModelShape.from_hf(object()), "no whole number num_hidden_layers"), (lambda: table(max_tokens=0), "max_tokens=0"), (lambda: replace(table(2), all_reduce=None), "all_reduce=None"),
    (lambda: Curve.of([1, 2, 3], [1, 2]), "size and seconds"), (lambda: Curve.of([1, 2], [0, 1]), "seconds: need"), (lambda: Curve.of([0, 2], [1, 1]), "size=0"), (lambda: Recorded([[0.1]]), r"shape \(1, 1\)"),
    (lambda: Calibrated(TRUTH, float("nan")), "t_star=nan"), (lambda: Calibrated(-TRUTH, 1), "coefficients="), (lambda: Calibrated(TRUTH, 1, noise="residual"), "no residuals were kept"),
    (lambda: Calibrated.fit(calibration_plans()[:9], np.ones(9), t_stars=()), "t_stars"), (lambda: Calibrated(TRUTH, 1).report(calibration_plans(), [1.0]), "49 plans and 1 times")])
def test_errors_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message): call()
