"Packing by tiles and tokens: against plain code, brute force and bounds; the faults of the published code, each shown and absent here."

from itertools import permutations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.balance.lengths import vlm_samples
from modeltc_lab.balance.packing import PackPlan
from modeltc_lab.balance.schedule import BalancedBatchSampler, PackedCollator, drift, schedule
from modeltc_lab.balance.vector_packing import (
    _price,
    _rounds,
    _shuffled,
    classes,
    dist_ratio,
    find_patterns,
    idle_share,
    isf,
    pattern_pack,
    search_limits,
    thresholds,
    vector_bound,
)

SAMPLES = vlm_samples()
SIZES = SAMPLES.sizes
FEW = SIZES[np.random.default_rng(0).permutation(len(SIZES))[:2000]]
real = pytest.mark.skipif(SAMPLES.generated, reason="needs the InternVL lists, which are not within reach here")


def plain(sizes, limits, accept, rounds, stop, shuffle):
    "Sampling and filtering as it is written down; packs as lists of samples."
    pool, done = list(range(len(sizes))), []
    for r in range(rounds):
        if not pool: break
        groups, order = [], shuffle(pool, r)
        for i in order:
            total = np.sum([sizes[j] for j in groups[-1]] + [sizes[i]], axis=0) if groups else None
            if groups and (total <= limits).all(): groups[-1].append(i)
            else: groups.append([i])
        full = [g for g in groups if (np.sum([sizes[i] for i in g], axis=0) >= accept).any()]
        if r == rounds - 1 or sum(map(len, full)) < stop * len(pool): return done + groups
        done += full
        kept = {i for g in full for i in g}
        pool = [i for i in order if i not in kept]
    return done


def packs_of(plan): return [plan.pack(i).tolist() for i in range(plan.packs)]


def draw(seed): return lambda pool, r: [pool[i] for i in np.random.default_rng((seed, r)).permutation(len(pool))]


def compiled(sizes, limits, accept, rounds, stop, shuffle):
    "The compiled rounds with given shuffles of numbers."
    rows = np.column_stack([np.arange(len(sizes)), sizes])
    ids, counts = _rounds(rows, np.array(limits), np.array(accept), rounds, stop, lambda pool, r: np.concatenate([pool[pool[:, 0] == i] for i in shuffle(pool[:, 0].tolist(), r)]))
    return [g.tolist() for g in np.split(ids, np.cumsum(counts)[:-1])]


@st.composite
def problems(draw, most=14, resources=(1, 2, 3)):
    "A few samples and limits they fit."
    k = draw(st.sampled_from(resources))
    limits = tuple(draw(st.integers(3, 12)) for _ in range(k))
    rows = draw(st.lists(st.tuples(*(st.integers(0, q) for q in limits)).filter(any), min_size=1, max_size=most))
    return np.array(rows), limits


@given(problems(), st.integers(1, 6), st.sampled_from([0, 1e-3, 0.3]), st.integers(0, 99))
def test_compiled_rounds_equal_the_plain_ones(problem, rounds, stop, seed):
    sizes, limits = problem
    accept = tuple(max(q - 1, 1) for q in limits)
    assert compiled(sizes, limits, accept, rounds, stop, draw(seed)) == plain(sizes, limits, accept, rounds, stop, draw(seed))


def test_compiled_rounds_equal_the_plain_ones_on_real_sizes():
    sizes = FEW[:500]
    assert compiled(sizes, (10, 4096), (10, 3968), 15, 1e-3, draw(3)) == plain(sizes, (10, 4096), (10, 3968), 15, 1e-3, draw(3))


@settings(max_examples=30)
@given(problems(), st.integers(0, 99))
def test_a_partition_within_the_limits(problem, seed):
    sizes, limits = problem
    for plan in (isf(sizes, limits, seed=seed), *([pattern_pack(sizes, limits, seed)] if len(limits) < 3 else [])):
        plan.check(sizes)
        assert sorted(plan.item_ids.tolist()) == list(range(len(sizes))) and (plan.totals <= limits).all() and (plan.docs > 0).all()


def test_packs_before_the_last_round_reach_a_threshold():
    left = []
    plan = isf(FEW, (10, 4096), rounds=6, stop=0, left=left)
    early = np.cumsum(plan.docs) <= len(FEW) - left[4]
    assert len(left) == 6 and left[-1] == 0 and early.sum() > 100
    assert ((plan.totals[early] >= (10, 4096 - 128)).any(axis=1)).all() and not ((plan.totals[~early] >= (10, 4096 - 128)).any(axis=1)).all()


def test_the_seed_decides():
    assert packs_of(isf(FEW, (9, 4096), seed=5)) == packs_of(isf(FEW, (9, 4096), seed=5)) != packs_of(isf(FEW, (9, 4096), seed=6))
    assert packs_of(pattern_pack(FEW, (9, 4096), seed=5)) == packs_of(pattern_pack(FEW, (9, 4096), seed=5)) != packs_of(pattern_pack(FEW, (9, 4096), seed=6))


def test_large_numbers_do_not_overflow():
    sizes = np.array([[1, 2**40], [2, 2**41], [1, 2**41 - 5]])
    assert isf(sizes, (3, 2**42)).totals[:, 1].sum() == sizes[:, 1].sum()


def test_all_orders_are_equally_likely():
    state, seen = np.array([7], np.uint64), dict.fromkeys(permutations(range(4)), 0)
    for _ in range(24_000): seen[tuple(_shuffled(np.arange(4).reshape(-1, 1), state)[:, 0].tolist())] += 1
    assert sum((c - 1000)**2 / 1000 for c in seen.values()) < 60          # 23 degrees of freedom, one in 30,000


def test_the_shuffle_through_buckets_is_a_permutation_without_pattern():
    state, n = np.array([3], np.uint64), 20_000
    one, two = (_shuffled(np.column_stack([np.arange(n), np.arange(n) * 2]), state) for _ in range(2))
    assert np.array_equal(np.sort(one[:, 0]), np.arange(n)) and (one[:, 1] == 2 * one[:, 0]).all() and (one != two).any()
    assert abs(np.corrcoef(np.arange(n), one[:, 0])[0, 1]) < 0.03 and abs(np.corrcoef(one[:-1, 0], one[1:, 0])[0, 1]) < 0.03


# --- bounds and patterns


def fewest(sizes, limits):
    "Fewest packs by trying every partition."
    best = len(sizes)

    def place(i, open_):
        nonlocal best
        if len(open_) >= best: return
        if i == len(sizes):
            best = len(open_)
            return
        for j, total in enumerate(open_):
            if (total + sizes[i] <= limits).all(): place(i + 1, [*open_[:j], total + sizes[i], *open_[j + 1:]])
        place(i + 1, [*open_, sizes[i]])

    place(0, [])
    return best


@settings(max_examples=40)
@given(problems(most=7, resources=(1, 2)), st.sampled_from([2, 5, 128]))
def test_bound_and_patterns_enclose_the_optimum(problem, steps):
    sizes, limits = problem
    assert vector_bound(sizes, limits, steps).bins <= fewest(sizes, limits) <= pattern_pack(sizes, limits, steps=steps).packs
    assert vector_bound(sizes, limits).volume == max(-(-sizes[:, j].sum() // limits[j]) for j in range(len(limits)))


def test_bound_and_patterns_enclose_what_a_solver_finds():
    from ortools.sat.python import cp_model
    for seed in range(4):
        sizes, q, most = SIZES[np.random.default_rng(seed).integers(0, len(SIZES), 16)], (9, 4096), 12
        m = cp_model.CpModel()
        x = [[m.new_bool_var("") for _ in range(most)] for _ in sizes]
        used = [m.new_bool_var("") for _ in range(most)]
        for row in x: m.add_exactly_one(row)
        for b, j in product(range(most), (0, 1)): m.add(sum(int(s[j]) * x[i][b] for i, s in enumerate(sizes)) <= q[j] * used[b])
        for b in range(most - 1): m.add(used[b] >= used[b + 1])
        m.minimize(sum(used))
        solver = cp_model.CpSolver()
        solver.parameters.num_workers, solver.parameters.random_seed = 1, 0
        assert solver.solve(m) == cp_model.OPTIMAL
        best = round(solver.objective_value)
        assert vector_bound(sizes, q).bins <= best <= pattern_pack(sizes, q).packs <= best + 1


@settings(max_examples=30)
@given(problems(most=30, resources=(2,)))
def test_an_unfinished_search_for_patterns_still_gives_a_bound(problem):
    sizes, limits = problem
    kinds = classes(sizes, limits, up=False)
    assert find_patterns(kinds, passes=1).bound <= find_patterns(kinds).value + 1e-6
    assert find_patterns(kinds).bound == pytest.approx(find_patterns(kinds).value, rel=1e-5)


@settings(max_examples=30)
@given(problems(most=30, resources=(2,)), st.sampled_from([2, 3, 128]))
def test_what_fits_in_units_fits(problem, steps):
    sizes, limits = problem
    kinds = classes(sizes, limits, steps)
    found = find_patterns(kinds)
    assert (found.columns @ kinds.sizes <= kinds.caps).all() and (found.uses @ found.columns >= kinds.demand - 1e-6).all()
    largest = np.array([sizes[kinds.which == c].max(axis=0) for c in range(len(kinds.demand))])
    assert (found.columns @ largest <= limits).all()


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)).filter(any), min_size=1, max_size=4, unique=True), st.lists(st.floats(0, 1), min_size=4, max_size=4))
def test_pricing_equals_enumeration(sizes, duals):
    sizes, caps = np.array(sizes), np.array([6, 7])
    duals = np.array(duals[:len(sizes)])
    most = [int(min(c // s for s, c in zip(row, caps) if s)) for row in sizes]
    every = [np.array(n) for n in product(*(range(m + 1) for m in most)) if (np.array(n) @ sizes <= caps).all()]
    best, patterns, prices = _price(sizes, duals, caps)
    assert best == pytest.approx(max(n @ duals for n in every), abs=1e-9)
    for c in range(len(sizes)): assert prices[c] == pytest.approx(max(n @ duals for n in every if n[c]), abs=1e-9) == pytest.approx(patterns[c] @ duals, abs=1e-9) and patterns[c, c]


@pytest.mark.parametrize("limits", [(9, 4096), (10, 4096), (12, 4096), (15, 4608), (20, 6144)])
def test_patterns_are_near_the_bound_and_below_random_rounds(limits):
    bound, patterns = vector_bound(SIZES, limits).bins, pattern_pack(SIZES, limits)
    patterns.check(SIZES)
    assert bound <= patterns.packs <= isf(SIZES, limits).packs
    if not SAMPLES.generated: assert patterns.packs <= 1.003 * bound


@real
def test_two_fives_do_not_fit_nine_tiles():
    bound = vector_bound(SIZES, (9, 4096))
    assert bound.volume == 31_042 and bound.pattern > 1.25 * bound.volume
    assert pattern_pack(SIZES, (9, 4096)).packs == bound.pattern


def test_too_many_kinds_are_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="too many for patterns"): pattern_pack(np.column_stack([rng.integers(1, 99, 5000), rng.integers(1, 9000, 5000)]), (100, 9000))


# --- ratios and limits


def ratio(values, ranks):
    "Dist Ratio, step by step."
    steps = [list(values[i:i + ranks]) for i in range(0, len(values), ranks)]
    steps[-1] += [0] * (ranks - len(steps[-1]))
    return np.mean([sum(max(s) - x for x in s) / (max(s) * len(s)) for s in steps])


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 6))
def test_ratios_against_loops(values, ranks):
    steps = [values[i:i + ranks] for i in range(0, len(values), ranks)]
    assert dist_ratio(values, ranks) == pytest.approx(ratio(values, ranks))
    assert idle_share(values, ranks) == pytest.approx(1 - sum(values) / ranks / sum(map(max, steps)))
    assert dist_ratio(values, 1) == 0 and idle_share([3] * ranks * 2, ranks) == 0


@real
@pytest.mark.parametrize("limits, rounds, tiles, tokens, idle", [((9, 4096), 1, 0.234, 0.266, 0.250), ((9, 4096), 50, 0.278, 0.315, 0.298), ((10, 4096), 50, 0.014, 0.101, 0.059),
                                                                 ((12, 4096), 50, 0.131, 0.177, 0.152), ((15, 4608), 50, 0.007, 0.054, 0.027), ((20, 6144), 50, 0.004, 0.050, 0.023)])
def test_ratios_of_random_rounds_on_the_real_lists(limits, rounds, tiles, tokens, idle):
    "measured before by another program."
    plan = isf(SIZES, limits, rounds=rounds)
    totals = plan.totals[np.random.default_rng(2).permutation(plan.packs)]
    assert (dist_ratio(totals[:, 0], 8), dist_ratio(totals[:, 1], 8)) == pytest.approx((tiles, tokens), abs=0.01)
    assert idle_share(totals @ (1025 * 5.9 / 20, 1), 8) == pytest.approx(idle, abs=0.01)


@real
def test_the_search_sees_which_tiles_add_up():
    found = search_limits(SIZES, 2, at_most=20_000)
    by_tiles = {v: min(t.idle for t in found.trials if t.limits[0] == v) for v in {t.limits[0] for t in found.trials}}
    assert found.complete and found.limits[0] == 10 and by_tiles[9] > 3 * by_tiles[10]
    assert search_limits(SIZES, 3.5, at_most=20_000).limits[0] in (15, 16)


def test_the_search_never_drops_a_sample_and_says_what_it_tried():
    for score in ("idle", "omnibal"):
        found = search_limits(FEW, 3, score)
        assert found.limits in [t.limits for t in found.trials] and found.accept == thresholds(found.limits) and found.best.score == min(t.score for t in found.trials if 3 <= t.samples_per_pack <= 4)
        assert all((FEW.max(axis=0) <= t.limits).all() for t in found.trials)
        isf(FEW, found.limits).check(FEW)


def test_the_search_repeats_itself():
    assert search_limits(FEW, 3) == search_limits(FEW, 3)


def test_a_search_without_time_says_so():
    found = search_limits(FEW, 3, budget_s=1e-9)
    assert not found.complete and len(found.trials) == 1


# --- faults of the published code, as small models of its behaviour, and what happens here


def published_round(sizes, ids, seed, limits):
    "One grouping as published: oversize samples are passed over, also where the walk ends."
    order = list(range(len(ids)))
    np.random.RandomState(seed).shuffle(order)
    groups, group, total = [], [], np.zeros(2, int)
    for k, i in enumerate(order):
        if (sizes[ids[i]] > limits).any(): continue
        if group and (total + sizes[ids[i]] > limits).any(): groups, group, total = [*groups, group], [], np.zeros(2, int)
        group, total = [*group, ids[i]], total + sizes[ids[i]]
        if k == len(ids) - 1: groups.append(group)
    return groups


def published_isf(sizes, limits, accept, rounds, seed):
    "Rounds as published; also the seeds used and the samples of each round."
    seeds, pools = [seed], [len(sizes)]
    groups, done = published_round(sizes, list(range(len(sizes))), seed, limits), []
    for r in range(rounds - 1):
        full = [g for g in groups if sizes[g][:, 0].sum() == accept[0] or sizes[g][:, 1].sum() >= accept[1]]
        done, pool = done + full, [i for g in groups for i in g if g not in full]
        seeds, pools = [*seeds, seed + r], [*pools, len(pool)]
        groups = published_round(sizes, pool, seed + r, limits)
    return done + groups, seeds, pools


def replay(seed):
    "The shuffles of the published code: the first seed twice."
    def shuffle(pool, r):
        order = list(range(len(pool)))
        np.random.RandomState(seed + max(r - 1, 0)).shuffle(order)
        return [pool[i] for i in order]
    return shuffle


def test_equal_to_the_published_code_on_its_shuffles():
    sizes = FEW[:300]
    assert compiled(sizes, (9, 4096), (9, 3968), 12, 0, replay(1024)) == published_isf(sizes, (9, 4096), (9, 3968), 12, 1024)[0]


def test_fault_a_samples_behind_an_oversize_one_are_lost():
    sizes = np.array([[3, 900]] * 5 + [[12, 900]])
    seed = next(s for s in range(100) if (order := list(range(6)), np.random.RandomState(s).shuffle(order))[0][-1] == 5)     # the large one comes last
    assert sum(map(len, published_isf(sizes, (9, 4096), (9, 3968), 1, seed)[0])) == 3                                      # of five that fit
    plan = isf(sizes, (9, 4096), rounds=1, seed=seed, oversize="drop")
    assert sorted(plan.item_ids.tolist()) == [0, 1, 2, 3, 4] and plan.dropped.tolist() == [5]
    with pytest.raises(ValueError, match=r"features\[5\]=\[12, 900\]"): isf(sizes, (9, 4096))


def test_fault_b_there_is_no_early_stop():
    fives, left = np.array([[5, 1300]] * 200), []
    assert published_isf(fives, (9, 4096), (9, 3968), 30, 0)[2] == [200] * 30                                               # nothing will ever be accepted
    isf(fives, (9, 4096), rounds=30, left=left)
    assert left == [0]


def test_fault_c_the_first_seed_is_used_twice():
    fives = np.array([[5, 1300]] * 50)
    assert published_isf(fives, (9, 4096), (9, 3968), 3, 7)[1] == [7, 7, 8]
    state = np.array([7], np.uint64)
    rows = np.arange(50).reshape(-1, 1)
    one, two, three = (_shuffled(rows, state)[:, 0].tolist() for _ in range(3))
    assert one != two != three != one


def test_fault_d_a_lower_threshold_accepts_more():
    sizes = np.array([[9, 100]] * 10)
    published = published_isf(sizes, (9, 4096), (8, 3968), 4, 0)
    assert published[2] == [10, 10, 10, 10]                                                                                  # 9 is not 8, so never accepted
    left = []
    isf(sizes, (9, 4096), accept=(8, 3968), rounds=4, stop=0, left=left)
    assert left == [0]


def test_fault_e_rows_of_a_third_data_set():
    sets = [5, 3, 4]
    published = [i + start for start, n in zip([0, *sets], sets) for i in range(n)]                                           # sizes instead of sums of sizes
    assert sorted(published) != list(range(12))
    plans, first = [], 0
    for g, n in enumerate(sets):
        plans.append(PackPlan.from_assignment(np.arange(n), np.full((n, 1), 100), (128 << g,), ids=first + np.arange(n)))
        first += n
    made = schedule(plans, 2)
    seen = [i for rank in range(2) for s in range(made.steps) for i in made.item_ids(s, 0, rank)]
    assert sorted(seen) == list(range(12))


def test_fault_f_short_packs_first():
    packs = isf(FEW, (10, 4096))
    published = np.argsort(packs.tokens // 512, kind="stable")
    assert np.corrcoef(np.arange(packs.packs), packs.tokens[published])[0, 1] > 0.5 and len(set((packs.tokens[published] // 512)[-8:])) >= 1
    made = schedule(packs, 8)
    made.check()
    assert abs(drift(made)) < 0.25


def test_fault_g_the_tail_is_dropped_and_a_rank_keeps_its_shard():
    packs, ranks = isf(FEW, (10, 4096)), 8
    packs = packs.select(np.arange(packs.packs - (packs.packs % ranks == 0)))                                                # a number that leaves a rest
    assert packs.packs % ranks
    published = [range(r * (packs.packs // ranks), (r + 1) * (packs.packs // ranks)) for r in range(ranks)]
    assert len({p for shard in published for p in shard}) < packs.packs
    made = schedule(packs, ranks)
    shard = lambda epoch, rank: {int(p) for s in range(made.steps) if (p := made.epoch(epoch).pack_of(s, 0, rank)[1]) >= 0}
    assert set.union(*(shard(0, r) for r in range(ranks))) == set(range(packs.packs))
    assert shard(0, 3) != shard(1, 3)


def test_fault_h_the_search_goes_down_for_ever():
    sizes = np.array([[1, 40], [40, 4000]] * 20)                                                                             # samples a pack jump over the wanted number
    q, most, steps = 32, 0, 0
    while steps < 1000:                                                                                                      # a maximum that is never reset, limits that follow it
        most, steps = max(most, 5.0), steps + 1
        q -= most > 3
    assert q < 0
    with pytest.raises(ValueError, match="none of"): search_limits(np.tile([[1, 400]], (40, 1)), 50, "omnibal")
    for score in ("idle", "omnibal"):
        try: assert (np.array(search_limits(sizes, 6, score).limits) >= sizes.max(axis=0)).all()
        except ValueError as e: assert "nearest are" in str(e)


def test_fault_i_padding_belongs_to_no_document():
    rows = [{"input_ids": np.arange(1, n + 1)} for n in (5, 6)]
    published = np.array([0, 5, 16])                                                                                         # the end of the last document moved to the padded end
    batch = PackedCollator(pad_to_multiple_of=16)(rows)
    assert np.diff(published)[1] == 11 and batch["cu_seq_lens_q"].tolist() == [0, 5, 11, 16]
    assert (batch["labels"][0, 11:] == -100).all() and batch["position_ids"][0, 11] == 0


def test_fault_j_a_sample_that_cannot_be_read_is_an_error():
    class Rows:
        def __len__(self): return len(FEW)

        def __getitem__(self, i):
            if i == 17: raise OSError("sample 17 is damaged")
            return {"input_ids": np.arange(1, 4)}

    def published(i):
        while True:
            try: return Rows()[i]
            except OSError: i += 100

    assert published(17) is not None                                                                                          # and nobody knows it was another one
    made = schedule(isf(FEW, (10, 4096)), 1)
    with pytest.raises(OSError, match="sample 17"):
        for _ in BalancedBatchSampler(made, 0).loader(Rows(), PackedCollator()): pass


def test_fault_k_a_threshold_is_not_searched_by_running_everything_again():
    published = len(range(4096 - 128, 4096 - 128 - 400, -4))                                                                 # all rounds for every step of 4 tokens
    found = search_limits(FEW, 3)
    assert published == 100 and len({t.limits for t in found.trials}) == len(found.trials)                                     # one run a pair of limits
    assert thresholds((9, 4096)) == (9, 3968) and thresholds((9, 100)) == (9, 100) and thresholds((9, 4096), (8, 3000)) == (8, 3000)


@pytest.mark.parametrize("call, message", [
    (lambda: isf([[1, 1]], (9, 0)), "limits=(9, 0)"), (lambda: isf([[1, 1]], (9.5, 10)), "limits=(9.5, 10)"), (lambda: isf([[1, 1]], (9, 10, 11)), "need 2 numbers"),
    (lambda: isf([[1, np.nan]], (9, 10)), "features[0, 1]=nan"), (lambda: isf(np.zeros((0, 2)), (9, 10)), "features: got none"), (lambda: isf([[1, 1]], (9, 10), stop=1), "stop=1"),
    (lambda: isf([[1, 1]], (9, 10), oversize="truncate"), "oversize='truncate'"), (lambda: isf([[1, 11]], (9, 10)), "does not fit into a pack of [9, 10]"),
    (lambda: pattern_pack([[1, 11]], (9, 10)), "does not fit"), (lambda: pattern_pack([[1, 1]], (9, 10), steps=0), "steps=0"), (lambda: vector_bound([[1, 11]], (9, 10)), "does not fit"),
    (lambda: dist_ratio([1], 0), "ranks=0"), (lambda: search_limits([[1], [2]], 2), "got 1 columns"), (lambda: search_limits([[1, 2]], 0.5), "target_batch=0.5"), (lambda: search_limits([[1, 2]], budget_s=0), "budget_s=0"),
])
def test_bad_input(call, message):
    with pytest.raises(ValueError) as e: call()
    assert message in str(e.value)
