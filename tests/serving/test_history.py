"The past: the window of finished lengths and the draws from it."

import bisect

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeltc_lab.serving.past_future import HistoryLengths, KnownLengths, Oracle, PastFuture, uniforms
from modeltc_lab.serving.policies import AdmissionView
from modeltc_lab.serving.studies import decision_case, policy_draws, resort_admit, warmed

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=30)


@given(lengths, st.integers(1, 12))
def test_window_holds_the_last_lengths_sorted(values, window):
    model = HistoryLengths(window=window)
    for v in values: model.observe(v)
    assert model.lengths.tolist() == sorted(values[-window:])


@given(lengths, st.integers(0, 70), st.integers(1, 70), st.floats(0, 0.999999), st.sampled_from(["step", "interp"]))
def test_support(values, generated, cap, u, variant):
    model = HistoryLengths(window=30, init=values, variant=variant)
    total = int(model.quantile(generated, cap, u))
    assert generated < total <= max(cap, generated + 1)
    if variant == "step": assert total in {min(v, max(cap, generated + 1)) for v in values if v > generated} | {cap, generated + 1}


@given(lengths, st.integers(0, 59), st.floats(0, 0.999999))
def test_step_inverts_the_conditional_distribution(values, generated, u):
    above = sorted(values)[bisect.bisect_right(sorted(values), generated):]
    expected = above[int(u * len(above))] if above else 99
    assert int(HistoryLengths(window=30, init=values).quantile(generated, 99, u)) == max(expected, generated + 1)


def test_interpolation_reaches_between_and_to_the_cap():
    model = HistoryLengths(window=4, init=[10, 20], variant="interp")
    assert model.quantile(0, 100, np.array([0.0, 1 / 6, 1 / 3, 0.5, 2 / 3, 5 / 6])).tolist() == [1, 5, 10, 15, 20, 60]


def test_draws_are_a_function_of_seed_request_future_and_turn_only():
    a = uniforms(3, 7, 4, [10, 11, 12])
    np.random.seed(1)
    np.random.random(100)
    assert np.array_equal(a, uniforms(3, 7, 4, [10, 11, 12]))
    assert np.array_equal(a[:, [2, 0]], uniforms(3, 7, 4, [12, 10]))
    others = [uniforms(4, 7, 4, [10, 11, 12]), uniforms(3, 8, 4, [10, 11, 12]), uniforms(3, 7, 4, [13, 14, 15])]
    assert all(not np.any(a == b) for b in others) and not np.any(a[0] == a[1])


def test_uniforms_are_uniform():
    values = np.sort(uniforms(0, 1, 5, np.arange(4000)).ravel())
    gap = np.abs(values - (np.arange(len(values)) + 0.5) / len(values)).max()
    assert gap < 1.95 / np.sqrt(len(values))  # Kolmogorov-Smirnov at p = 0.001


@pytest.mark.parametrize("n", [0, 1, 5, 33, 128, 300])
def test_compiled_decision_equals_the_resort(n):
    for seed in range(4):
        view, history = decision_case(n, seed=seed)
        policy = warmed(history, seed=seed)
        draws = policy_draws(policy, view)
        assert policy.admit(view) == resort_admit(view, policy.length_model.lengths.tolist(), draws, int(view.capacity * 0.95))


def test_persistent_draws_do_not_change_between_decisions():
    view, history = decision_case(50)
    fixed, fresh = (PastFuture(HistoryLengths(init=history.tolist(), resample=r)) for r in ("persistent", "every_pass"))
    assert len({fixed.admit(view) for _ in range(20)}) == 1
    assert len({fresh.admit(view) for _ in range(20)}) > 1


def test_general_length_model_gives_the_same_decision_as_the_oracle():
    view, _ = decision_case(30)
    truth = np.random.default_rng(0).integers(2600, 4000, 46)
    oracle = Oracle()
    oracle.unseal(truth)
    assert PastFuture(KnownLengths(truth), reserve=0).admit(view) == oracle.admit(view)


def test_share_of_futures_is_monotone():
    view, history = decision_case(10)
    answers = []
    for share in (0.2, 0.6, 1.0):
        policy = PastFuture(HistoryLengths(init=history.tolist()), combine=share)
        answers.append(policy.admit(view))
    assert answers == sorted(answers, reverse=True)


@pytest.mark.parametrize("make, message", [
    (lambda: PastFuture(reserve=-0.1), "reserve=-0.1"), (lambda: PastFuture(combine="mean"), "combine='mean'"), (lambda: PastFuture(combine=0.0), "combine=0.0"),
    (lambda: HistoryLengths(resample="never"), "resample='never'"), (lambda: HistoryLengths(init=[3, 0]), "init=0"),
    (lambda: HistoryLengths().observe(-3), "total_output=-3")])
def test_bad_settings_are_named(make, message):
    with pytest.raises(ValueError) as error: make()
    assert message in str(error.value)


def test_view_validation():
    ints = lambda *v: np.array(v, np.int64)
    good = dict(capacity=10, ids=ints(0), held=ints(4), generated=ints(1), cap=ints(9), queued_ids=ints(1), queued_prompt=ints(2), queued_generated=ints(0), queued_cap=ints(9))
    AdmissionView(**good).validate()
    for change, message in (({"held": ints(11)}, "held=11"), ({"queued_prompt": ints(-1)}, "queued_prompt=-1"), ({"cap": ints(1, 2)}, "differ in length"),
                            ({"frozen": 11}, "frozen=11")):
        with pytest.raises(ValueError, match=message): AdmissionView(**{**good, **change}).validate()
