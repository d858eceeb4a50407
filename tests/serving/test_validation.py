"The protocol that says how right the simulator is: with a known truth it must come out right, and it must be able to come out wrong."
import json
import logging
from dataclasses import replace
from time import thread_time

import numpy as np
import pytest

from modeltc_lab.core.models import random_llama
from modeltc_lab.core.results import pick, read
from modeltc_lab.serving.cost import Calibrated, Recorded
from modeltc_lab.serving.engine import HFExecutor, stub_model
from modeltc_lab.serving.past_future import AdaptivePastFuture
from modeltc_lab.serving.policies import Aggressive, HFFifo
from modeltc_lab.serving.token_sim import SLA, simulate
from modeltc_lab.serving.validation import (
    Protocol,
    calibrate,
    calibration_traffic,
    figures,
    fixed_schedule,
    interval,
    mismatches,
    noise_floor,
    planning_s,
    relative_errors,
    token_gaps,
    validate,
    validation_records,
)
from modeltc_lab.serving.views import checked_runs, error_budget, simulator_check
from modeltc_lab.serving.workload import Workload

logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
TRUTH = Calibrated(np.array([4e-3, 2e-5, 8e-5, 1e-6, 5e-8, 6e-5, 0.0, 1e-6, 6e-8]), 32)
SMALL = Protocol(traces=("sharegpt",), loads=(0.6, 1.1), policies=("past_future_adaptive", "hf_fifo"), requests=40, repeats=3, rounds=1, capacity=2048, longest=192, most=16)


@pytest.fixture(scope="module")
def emulated():
    "The whole protocol on an engine whose passes take exactly what a planted cost model says."
    return validate(replace(SMALL, clock=TRUTH), stub_model(), progress=False)


def test_with_a_known_truth_every_error_is_zero(emulated):
    report, cases = emulated
    assert report["schedule_mismatches"] == 0 and report["passes_compared"] == sum(len(c.real.plans) for c in cases) > 500
    assert max(e["p90"] for e in report["iteration_error"].values()) < 1e-6
    assert max(report["end_to_end"]["mean_absolute"].values()) < 1e-4 and max(report["control"]["mean_absolute"].values()) < 1e-4
    assert max(report["noise_floor"]["mean_absolute"].values()) < 1e-12
    assert abs(report["throughput_error"]["mean"]) < 1e-4 and report["calibration"]["clock"] == "Calibrated"


def test_with_a_wrong_cost_the_errors_say_so():
    "A cost model that is 20 % low: passes are 20 % low, the queue makes more of it, the schedule stays exact."
    low = replace(TRUTH, coefficients=0.8 * TRUTH.coefficients)
    report, _ = validate(replace(SMALL, clock=TRUTH), stub_model(), low, progress=False)
    assert report["schedule_mismatches"] == 0
    assert report["control"]["busy"]["mean"] == pytest.approx(-0.2, abs=1e-6)
    assert all(e["bias"] == pytest.approx(-0.2, abs=1e-6) for e in report["iteration_error"].values())
    assert report["e2e_error"]["mean"] < -0.2 and report["busy_error"]["mean"] < -0.1


def test_calibration_finds_a_planted_cost():
    "Fitted to traffic made for it, the model predicts traffic it has not seen."
    executor = HFExecutor(stub_model(), 2048, 16, 256)
    fitted = calibrate(executor, clock=TRUTH, rounds=1, longest=192, most=16, progress=False)
    run = executor.run(_short(30), HFFifo(), clock=TRUTH, progress=False)
    predicted = np.array([fitted.iteration(p) for p in run.plans])
    assert abs(predicted / run.seconds - 1).max() < 1e-5
    assert fitted.provenance["engine"].startswith("transformers") and fitted.provenance["passes"] > 200


def _short(n: int) -> Workload:
    rng = np.random.default_rng(n)
    return Workload.build("short", np.cumsum(rng.exponential(0.05, n)), rng.integers(1, 300, n), rng.integers(1, 40, n), max_new_tokens=64)


@pytest.mark.parametrize("noise", [0.05, 0.3])
def test_a_fit_to_noisy_times_is_not_low(noise):
    "Weights taken from the measured times would bias the fit by about minus twice the variance; these do not."
    plans = [p for w in calibration_traffic(2048, 192, 16) for p in HFExecutor(stub_model(), 2048, 16, 256).run(w, HFFifo(), clock=TRUTH, progress=False).plans][:2000]
    true = np.array([TRUTH.iteration(p) for p in plans])
    off = []
    for seed in range(4):
        noisy = true * np.random.default_rng(seed).lognormal(-noise**2 / 2, noise, len(true))
        off.append(sum(Calibrated.fit(plans, noisy).iteration(p) for p in plans) / true.sum() - 1)
    assert abs(np.mean(off)) < 0.25 * noise**2 + 0.004


def test_traffic_of_the_calibration_fits_and_tells_features_apart():
    traffic = calibration_traffic(4096, 512, 48)
    assert all((w.prompt + w.sealed_output - 1).max() <= 4096 for w in traffic)
    plans = [p for w in traffic for p in HFExecutor(stub_model(), 4096, 16, 256).run(w, HFFifo(), clock=TRUTH, progress=False).plans]
    columns = np.array([(1, p.tokens, p.decode_kv, p.prefill_area, p.rows, p.tokens * (p.prefill_kv + p.decode_kv)) for p in plans], float)
    assert np.linalg.cond(columns / np.linalg.norm(columns, axis=0)) < 100
    assert {p.kind for p in plans} == {"prefill", "decode", "mixed"}


@pytest.fixture(scope="module")
def served():
    executor, w = HFExecutor(random_llama(layers=1, hidden=32, heads=2, kv_heads=1, mlp=64, vocab=64), 512, 16, 64), _short(25)
    return executor, w, executor.run(w, AdaptivePastFuture(), progress=False)


def test_the_real_schedule_with_its_own_times_is_the_real_run(served):
    _, _, run = served
    again = fixed_schedule(run, Recorded(run.seconds))
    for field in ("first_token_s", "finish_s", "max_gap_s"): np.testing.assert_allclose(again.requests[field], run.result.requests[field], rtol=1e-9)
    assert figures(again, SLA()) == pytest.approx(figures(run.result, SLA()), nan_ok=True)


def test_twice_the_time_of_every_pass_is_twice_the_time_spent(served):
    _, _, run = served
    assert figures(fixed_schedule(run, Recorded(2 * run.seconds)), SLA())["busy"] == pytest.approx(2 * run.seconds.sum())


def test_gaps_add_up_to_the_time_between_first_and_last_token(served):
    executor, w, run = served
    r = run.result.requests
    gaps = token_gaps(run.result)
    assert len(gaps) == (w.sealed_output - 1).sum() and gaps.sum() == pytest.approx((r["finish_s"] - r["first_token_s"]).sum()) and gaps.max() == pytest.approx(r["max_gap_s"].max())
    with pytest.raises(ValueError, match="simulate with record=True"): token_gaps(simulate(w, AdaptivePastFuture(), 512))


def test_the_time_a_policy_takes_to_plan_is_found(served):
    executor, _, _ = served
    assert planning_s(executor, Slow()) > 0.5 * Slow.seconds


class Slow(Aggressive):
    "Takes its time after every pass with decodes."

    seconds = 1e-3

    def on_pass(self):
        end = thread_time() + self.seconds
        while thread_time() < end: continue


def test_noise_and_intervals_by_hand():
    assert noise_floor([{"a": 1.0}, {"a": 1.0}, {"a": 4.0}])["a"] == pytest.approx((2 * abs(1 - 2.5) / 2.5 + 3 / 1) / 3)
    assert noise_floor([{"a": 2.0, "b": float("nan")}] * 5) == {"a": 0.0}
    mean, low, high = interval([1.0] * 10)
    assert mean == low == high == 1.0
    mean, low, high = interval(np.random.default_rng(0).normal(5, 1, 400))
    assert low < 5 < high and (high - low) == pytest.approx(2 * 1.96 / 20, rel=0.2)
    assert relative_errors({"a": 2.0, "zero": 0.0, "none": float("nan")}, {"a": 3.0, "zero": 1.0, "none": 1.0}) == {"a": 0.5}
    with pytest.raises(ValueError, match="need at least 3"): noise_floor([{"a": 1.0}] * 2)


def test_a_trace_that_is_too_short_is_refused():
    with pytest.raises(ValueError, match="requests that fit"): replace(SMALL, requests=40, capacity=64, longest=16).traffic("sharegpt")


def test_records_hold_what_the_figure_needs(emulated):
    records = validation_records(*emulated, "engine_validation")
    runs = checked_runs(records)
    assert len(runs) == 4 and len({(r.method, r.metric, r.x) for r in records}) == len(records)
    for run in runs:
        for metric in ("ttft", "gap", "e2e"):
            figure = simulator_check(records, run, metric)
            assert {t.name for t in figure.data} >= {"real", "simulated", "decode", "simulator", "engine against itself"}
    mine = {(r.method, r.metric): r for r in records if r.x == runs[0]}
    parts = error_budget(mine, "ttft mean")
    assert parts["cost of passes"] + parts["queue"] == pytest.approx(parts["together"])
    with pytest.raises(ValueError, match="mismatches=2"): error_budget(mine, "ttft mean", 2)
    with pytest.raises(ValueError, match="metric='x'"): simulator_check(records, runs[0], "x")
    with pytest.raises(ValueError, match="need one of"): simulator_check(records, "nobody")


def test_validate_quick(capsys, tmp_path):
    "The command as a user runs it, on this machine's processor: the schedule is exact, and every part is there."
    from modeltc_lab.core.cli import main
    assert main(["validate", "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schedule_mismatches"] == 0 and report["passes_compared"] > 500
    assert len(report["end_to_end"]["runs"]) == 4 and report["noise_floor"]["repeats"] == 5 and set(report["iteration_error"]) >= {"decode", "mixed"}
    error = report["throughput_error"]
    assert error["low"] <= error["mean"] <= error["high"] and report["speedup"]["factor"] > 50
    small = ["validate", "--quick", "--requests", "12", "--repeats", "3", "--policy", "hf_fifo", "--longest", "64", "--most", "4"]
    assert main([*small, "--load", "0.5", "--results", str(tmp_path)]) == 0
    told, (written,) = capsys.readouterr().out, tmp_path.rglob("*.json")
    assert told.startswith("schedule: 0 mismatches in ") and "; throughput " in told and "full load" not in told        # half the load is not the full one
    records = read("serving", "engine_validation", tmp_path)
    assert written.parent.name == "engine_validation" and pick(records, metric="mismatches").median == 0 and checked_runs(records) == ["sharegpt, 50%, hf_fifo"] and records[0].config["model"] == "random"


def test_the_commands_refuse(capsys, tmp_path):
    from modeltc_lab.core.cli import main
    (tmp_path / "file").write_text("")
    for words, text in ((["validate", "--clock", "sun"], "--clock 'sun'"), (["validate", "--device", "tpu"], "--device 'tpu'"), (["validate", "--sla", "1"], "--sla '1'"), (["validate", "--model", "no/where"], "model='no/where'"),
                        (["validate", "--repeats", "2"], "repeats=2: need at least 3"), (["validate", "--load", "0"], "0.0 is no load"), (["validate", "--policy", "nobody"], "policy='nobody'"), (["validate", "--prompt-over", "0"], "prompt_over=0"),
                        (["validate", "--longest", "4"], "requests that fit 8 tokens"), (["validate", "--most", "0"], "most=0"), (["validate", "--results", str(tmp_path / "file" / "x")], "results folder"),
                        (["calibrate", str(tmp_path / "no" / "x.json")], "its folder does not exist"), (["validate", "--device", "cuda", "--clock", "cpu"], "--clock cpu")):
        assert main(words) == 2 and text in capsys.readouterr().err


def test_calibrate_writes_what_sim_reads(capsys, tmp_path):
    from modeltc_lab.core.cli import main
    out = tmp_path / "mine.json"
    assert main(["calibrate", str(out), "--longest", "64", "--most", "4", "--rounds", "1", "--capacity", "1024"]) == 0
    assert "written to" in capsys.readouterr().out and Calibrated.from_json(out).provenance["settings"]["capacity"] == 1024
    assert main(["sim", "--trace", "sharegpt", "--requests", "20", "--capacity", "20000", "--cost", str(out), "--json"]) == 0


def test_a_replay_in_the_wrong_order_is_seen(served):
    executor, w, run = served
    assert mismatches(run, w, HFFifo(0.9), executor)["batches"] > 0
