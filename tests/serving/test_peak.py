"The future: peak memory of a batch, against walking through every step."

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.serving.past_future import _fit_prefix, _peak, admissible_prefix, peak_pages, peak_tokens

batches = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 25)), max_size=8)


def walk(batch, page=1):
    "Slots in use at every future step, in whole pages."
    steps = range(max((r for _, r in batch), default=0) + 1)
    return max((sum(-(-(c + t) // page) * page for c, r in batch if r >= t) for t in steps), default=0)


def columns(batch):
    return np.array([c for c, _ in batch], np.int64), np.array([r for _, r in batch], np.int64)


@given(batches)
def test_peak_equals_walk_in_every_implementation(batch):
    held, left = columns(batch)
    assert int(peak_tokens(held, left)) == _peak(held, left) == _peak.py_func(held, left) == walk(batch)


@given(batches, st.integers(1, 9))
def test_pages_bound_exact_unpaged(batch, page):
    held, left = columns(batch)
    exact = peak_pages(held, left, page)
    assert exact == walk(batch, page)
    assert int(peak_tokens(held, left, page)) >= exact >= int(peak_tokens(held, left))


@given(batches, st.tuples(st.integers(0, 40), st.integers(0, 25)), st.randoms())
def test_invariances(batch, extra, random):
    held, left = columns(batch)
    peak = int(peak_tokens(held, left))
    shuffled = list(batch)
    random.shuffle(shuffled)
    assert int(peak_tokens(*columns(shuffled))) == peak
    assert int(peak_tokens(*columns([*batch, extra]))) >= peak
    assert held.sum() <= peak <= (held + left).sum()
    if batch and left.min() > 0: assert int(peak_tokens(held + 1, left - 1)) == peak  # a step later, nobody gone: same peak


@given(batches, batches, st.integers(0, 400))
def test_prefix_is_the_longest_that_fits(running, queue, budget):
    fits = [k for k in range(len(queue) + 1) if walk(running + queue[:k]) <= budget]
    held, left = columns(running + queue)
    n = len(running)
    expected = max(fits, default=0)
    assert fits == list(range(len(fits)))
    assert admissible_prefix(held, left, n, budget) == expected
    assert _fit_prefix.py_func(held[:n], left[:n], held[n:], left[n:], budget) == expected


@settings(max_examples=20)
@given(st.integers(1, 4), st.integers(0, 5))
def test_leading_axes(rows, n):
    rng = np.random.default_rng(rows * 10 + n)
    held, left = rng.integers(0, 30, (2, rows, n)), rng.integers(0, 20, (2, rows, n))
    peaks = peak_tokens(held, left)
    assert peaks.shape == (2, rows)
    assert all(int(peaks[i, j]) == walk(list(zip(held[i, j].tolist(), left[i, j].tolist()))) for i in range(2) for j in range(rows))


@pytest.mark.parametrize("bad, message", [
    (lambda: peak_tokens([1], [1], page=0), "page=0"), (lambda: peak_tokens([1], [-2]), "got 1 and -2"),
    (lambda: peak_pages([1, 2], [1], 4), "need the same"), (lambda: admissible_prefix([1], [1], -1, 5), "n_running=-1")])
def test_bad_input_is_named(bad, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")): bad()
