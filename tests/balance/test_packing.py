"Packing: partitions, naive packers in the same order, exact optima, brute-force bounds, pieces of long documents."

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from modeltc_lab.balance.lengths import long_context_mix
from modeltc_lab.balance.packing import (
    METHODS,
    OVERSIZE,
    PackPlan,
    _descending,
    count_tree,
    lower_bound,
    pack,
    tree_above,
    tree_add,
    tree_below,
)


@st.composite
def problems(draw, most=120):
    "Lengths and a capacity: ordinary, all equal, all of capacity, powers of two, one document, mostly tiny."
    capacity = draw(st.integers(1, 300))
    one = st.integers(1, capacity)
    kind = draw(st.sampled_from(("any", "equal", "full", "powers", "one", "tiny")))
    if kind == "one": return [draw(one)], capacity
    if kind == "full": return [capacity] * draw(st.integers(1, 20)), capacity
    if kind == "equal": return [draw(one)] * draw(st.integers(1, most)), capacity
    if kind == "powers": return [min(2**e, capacity) for e in draw(st.lists(st.integers(0, 8), min_size=1, max_size=most))], capacity
    return draw(st.lists(one if kind == "any" else st.integers(1, max(1, capacity // 10)), min_size=1, max_size=most)), capacity


def contents(plan): return [plan.pack(i).tolist() for i in range(plan.packs)]


def verify(plan, lengths):
    "An independent check that a plan of whole documents is a partition within capacity."
    assert sorted(j for p in contents(plan) for j in p) == list(range(len(lengths)))
    for p in contents(plan): assert p and sum(lengths[j] for j in p) <= plan.capacity
    assert plan.sizes[:, 0].tolist() == [lengths[j] for p in contents(plan) for j in p]


@pytest.mark.parametrize("method", METHODS)
@given(problem=problems())
def test_every_document_is_in_one_pack(method, problem):
    lengths, capacity = problem
    plan = pack(lengths, capacity, method, seed=3)
    verify(plan, lengths)
    plan.check(lengths)
    assert lower_bound(lengths, capacity).bins <= plan.packs
    if method != "next_fit": assert plan.packs <= 2 * sum(lengths) / capacity + 1 or method == "isf"


def naive(lengths, capacity, best):
    "Best or first fit decreasing by looking at every pack; best fit takes the smallest room, of equal ones the pack that came by it last."
    rooms, changed, packs = [], [], []
    for time, j in enumerate(sorted(range(len(lengths)), key=lambda j: -lengths[j])):
        fits = [((room, -changed[p]) if best else (p,), p) for p, room in enumerate(rooms) if room >= lengths[j]]
        p = min(fits)[1] if fits else len(rooms)
        if not fits: rooms.append(capacity), changed.append(0), packs.append([])
        rooms[p] -= lengths[j]
        changed[p] = time
        packs[p].append(j)
    return [sorted(p) for p in packs]


@given(problems(200))
@example(([5, 5, 5, 5], 10))
@example(([7, 3, 3, 7, 2, 8, 1, 9], 10))
def test_best_fit_is_the_naive_best_fit(problem): assert contents(pack(*problem, "bfd")) == naive(*problem, best=True)


@given(problems(200))
@example(([6, 4, 4, 6, 5, 5], 10))
def test_first_fit_is_the_naive_first_fit(problem): assert contents(pack(*problem, "ffd")) == naive(*problem, best=False)


def test_large_mixes_are_the_naive_ones():
    mix = long_context_mix(3000, 60, seed=5)
    for capacity in (131_072, 40_000):
        lengths = np.minimum(mix, capacity).tolist()
        assert contents(pack(lengths, capacity, "bfd")) == naive(lengths, capacity, True) and contents(pack(lengths, capacity, "ffd")) == naive(lengths, capacity, False)


@given(problems(60))
def test_next_fit_goes_in_order(problem):
    lengths, capacity = problem
    plan, room, expected = pack(lengths, capacity, "next_fit"), 0, 0
    assert plan.item_ids.tolist() == list(range(len(lengths)))
    for x in lengths:
        if x > room: room, expected = capacity, expected + 1
        room -= x
    assert plan.packs == expected


def optimum(lengths, capacity):
    "Fewest packs, proved by CP-SAT: documents above half a pack have one each, and of equal packs the first are used."
    cp_model = pytest.importorskip("ortools.sat.python.cp_model", reason="the exact optimum needs ortools (modeltc_lab[dev])")
    lengths, most = sorted(lengths, reverse=True), pack(lengths, capacity, "ffd").packs
    large = sum(2 * n > capacity for n in lengths)
    m = cp_model.CpModel()
    used = [m.new_bool_var("") for _ in range(most)]
    x = [[m.new_bool_var("") if p <= j else 0 for p in range(most)] if j >= large else [int(p == j) for p in range(most)] for j in range(len(lengths))]
    for row in x[large:]: m.add_exactly_one([v for v in row if not isinstance(v, int)])
    for p in range(most): m.add(sum(n * row[p] for n, row in zip(lengths, x)) <= capacity * used[p])
    for p in range(1, most): m.add_implication(used[p], used[p - 1])
    m.minimize(sum(used))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers, solver.parameters.random_seed, solver.parameters.max_deterministic_time = 1, 0, 30
    assert solver.solve(m) == cp_model.OPTIMAL
    return round(solver.objective_value)


@pytest.mark.parametrize("seed", range(12))
def test_against_the_optimum(seed):
    "At most 30 documents: L2 <= optimum <= best fit <= 11/9 optimum + 6/9 (Dosa), and on these cases best fit has the optimum's packs or one more."
    rng = np.random.default_rng(seed)
    n, capacity = int(rng.integers(8, 31)), int(rng.integers(20, 200))
    lengths = (rng.integers(1, capacity + 1, n) if seed % 3 else np.clip(np.rint(rng.lognormal(np.log(capacity / 4), 0.7, n)), 1, capacity)).astype(int).tolist()
    best = optimum(lengths, capacity)
    assert lower_bound(lengths, capacity).bins <= best
    for method in ("bfd", "ffd"):
        found = pack(lengths, capacity, method).packs
        assert best <= found <= 11 / 9 * best + 6 / 9
    assert pack(lengths, capacity).packs - best <= 1


def test_a_case_that_best_fit_does_not_solve():
    "Three packs would do (6+2+2, 5+5, 4+3+3), best fit needs more or as many; the bound never claims more than is needed."
    lengths = [4, 3, 3, 4, 3, 3, 5, 5]
    assert optimum(lengths, 10) == 3 and lower_bound(lengths, 10).bins == 3 and pack(lengths, 10).packs in (3, 4)


def brute_l2(lengths, capacity):
    "Martello and Toth's bound, one threshold after the other."
    found = 0
    for k in range(capacity // 2 + 1):
        alone = [x for x in lengths if x > capacity - k]
        large = [x for x in lengths if capacity / 2 < x <= capacity - k]
        small = sum(x for x in lengths if k <= x <= capacity / 2)
        found = max(found, len(alone) + len(large) + max(0, -(-(small - (len(large) * capacity - sum(large))) // capacity)))
    return found


@given(problems())
@example(([7, 7, 7, 4], 10))
@example(([1], 1))
def test_the_bound_is_the_brute_force_one(problem):
    bound = lower_bound(*problem)
    assert bound.l2 == brute_l2(*problem) and bound.volume == -(-sum(problem[0]) // problem[1]) and bound.bins == max(bound.l2, bound.volume)


def test_best_fit_meets_the_bound_on_the_mix():
    "on the long-context mix no packing has fewer packs."
    mix = long_context_mix()
    for capacity in (131_072, 32_768):
        lengths = np.minimum(mix, capacity)
        assert pack(lengths, capacity).packs == lower_bound(lengths, capacity).bins


@given(st.integers(1, 5000), st.lists(st.tuples(st.integers(0, 5000), st.integers(-3, 5003)), max_size=80))
def test_the_tree_is_a_multiset(capacity, steps):
    tree, have = count_tree(capacity), [0] * (capacity + 1)
    for key, ask in steps:
        key %= capacity + 1
        delta = -have[key] if have[key] > 2 else 1
        tree_add(tree, key, delta)
        have[key] += delta
        inside = [x for x, n in enumerate(have) if n]
        assert tree_below(tree, ask) == max((x for x in inside if x <= ask), default=-1)
        assert tree_above(tree, ask) == min((x for x in inside if x >= ask), default=-1)


def test_the_tree_at_its_ends():
    for capacity in (1, 31, 32, 1023, 1024, 32_768, 131_072, 1 << 20):
        tree = count_tree(capacity)
        assert tree_below(tree, capacity) == tree_above(tree, 0) == -1
        tree_add(tree, 0, 1)
        tree_add(tree, capacity, 2)
        assert (tree_below(tree, capacity - 1), tree_above(tree, 1), tree_below(tree, 10**9), tree_above(tree, -5), tree_below(tree, -1), tree_above(tree, capacity + 1)) == (0, capacity, capacity, 0, -1, -1)


@given(st.lists(st.integers(1, 40), max_size=100))
def test_sorting_is_stable(lengths): assert _descending(np.array(lengths, np.int64), 40).tolist() == sorted(range(len(lengths)), key=lambda j: -lengths[j])


def test_random_packs_have_the_papers_imbalance():
    "ISF packs of 128K on four ranks in random order; the paper has an attention balance ratio of 0.506, the generated mix 0.523."
    a = np.random.default_rng(0).permutation(pack(long_context_mix(), 131_072, "isf").squares)
    a = a[:len(a) // 4 * 4].reshape(-1, 4)
    assert abs(((a.max(1, keepdims=True) - a).sum(1) / (4 * a.max(1))).mean() - 0.523) < 0.015


def test_seeds():
    mix = long_context_mix(3000, 10, seed=1)
    a, b, c = (pack(mix, 131_072, "isf", seed=s) for s in (1, 1, 2))
    assert contents(a) == contents(b) != contents(c)
    for method in ("bfd", "ffd", "next_fit"): assert contents(pack(mix, 131_072, method, seed=1)) == contents(pack(mix, 131_072, method, seed=2))


def test_sampling_and_filtering_keeps_full_groups():
    "All packs but those of the last round have at most 128 tokens to spare; more rounds leave fewer of the others."
    mix = long_context_mix(50_000, 100, seed=2)
    loose = [int((131_072 - pack(mix, 131_072, "isf", rounds=r).tokens > 128).sum()) for r in (1, 5, 30)]
    assert loose[0] > loose[1] > loose[2] and pack(mix, 131_072, "isf").packs <= 1.02 * lower_bound(mix, 131_072).bins


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(1, 40), st.sampled_from(METHODS))
def test_pieces_tile_their_documents(lengths, capacity, method):
    plan = pack(lengths, capacity, method, oversize="split")
    plan.check(lengths)
    covered = [np.zeros(n, int) for n in lengths]
    for j, start, size in zip(plan.item_ids, plan.starts, plan.lengths): covered[j][start:start + size] += 1
    assert all((c == 1).all() for c in covered) and sum(plan.lengths) == sum(lengths) and (plan.tokens <= capacity).all()
    assert plan.partial == (max(lengths) > capacity)
    assert (plan.lengths > 0).all() and all(plan.starts % capacity == 0)


@given(st.lists(st.integers(1, 90), min_size=1, max_size=40), st.integers(1, 40), st.sampled_from(METHODS))
def test_truncated_and_dropped(lengths, capacity, method):
    short = pack(lengths, capacity, method, oversize="truncate")
    short.check(lengths)
    assert sorted(zip(short.item_ids.tolist(), short.lengths.tolist())) == [(j, min(n, capacity)) for j, n in enumerate(lengths)] and not short.starts.any()
    kept = pack(lengths, capacity, method, oversize="drop")
    kept.check(lengths)
    assert kept.dropped.tolist() == [j for j, n in enumerate(lengths) if n > capacity]
    assert sorted(kept.item_ids.tolist()) == [j for j, n in enumerate(lengths) if n <= capacity] and not kept.partial
    if max(lengths) > capacity:
        with pytest.raises(ValueError, match=rf"lengths\[{kept.dropped[0]}\]={lengths[kept.dropped[0]]} is more than capacity={capacity} \({len(kept.dropped)} of"): pack(lengths, capacity, method)


@pytest.mark.parametrize("arguments, said", [
    (([], 10), "got none"), (([0], 10), r"lengths\[0\]=0"), (([4, -1], 10), r"lengths\[1\]=-1"), (([float("nan")], 10), r"lengths\[0\]=nan"), (([4], 0), "capacity=0"), (([4], 10.5), "capacity=10.5"), (([4], True), "capacity=True"),
    (([4], 2**40), "capacity="), (([4], 10, "spfhp"), "method='spfhp'"), (([4], 10, "bfd", 0, "keep"), "oversize='keep'"), (([4], 10, "isf", 0, "error", 0), "rounds=0"), (([11], 10), r"lengths\[0\]=11 is more than capacity=10")])
def test_bad_arguments(arguments, said):
    with pytest.raises(ValueError, match=said): pack(*arguments)


def test_bad_bounds():
    with pytest.raises(ValueError, match=r"lengths\[1\]=12 is more than capacity=10"): lower_bound([3, 12], 10)
    with pytest.raises(ValueError, match="capacity=-1"): lower_bound([3], -1)


def plan_of(*packs, sizes, limits=(10,), **more):
    ids = [j for p in packs for j in p]
    return PackPlan.build(ids, np.cumsum([0, *map(len, packs)]), np.asarray(sizes)[ids], limits, **more)


@pytest.mark.parametrize("plan, said", [
    (lambda s: plan_of([0, 1], [2], sizes=s), "pack 0 holds 11"), (lambda s: plan_of([0], [1], sizes=s), "document 2 is in no pack"), (lambda s: plan_of([0], [1], [2, 2], sizes=s), "document 2 is in more than one pack"),
    (lambda s: plan_of([0], [], [1, 2], sizes=s), "pack 1 is empty"), (lambda s: plan_of([0], [1], sizes=s, dropped=[1, 2]), "document 1 is dropped, and is in a pack"), (lambda s: plan_of([0], [1, 2], sizes=[*s[:2], 3]), "document 2 is placed with another size"),
    (lambda s: PackPlan.build([0, 1, 3], [0, 1, 2, 3], [6, 5, 2], (10,)), "names document 3 of 3"), (lambda s: PackPlan.build([0, 1, 2], [0, 1, 3], s, (10,), starts=[0, 1, 0], partial=True), "pieces of document 1 do not follow"),
    (lambda s: PackPlan.build([0, 0, 1, 2], [0, 1, 2, 3, 4], [3, 2, 5, 2], (10,), starts=[0, 3, 0, 0], partial=True), "document 0 is placed with another size")])
def test_check_finds(plan, said):
    with pytest.raises(ValueError, match=said): plan([6, 5, 2]).check([6, 5, 2])


def test_check_allows_what_is_right():
    plan_of([2, 1], [0], sizes=[6, 5, 2]).check([6, 5, 2])
    plan_of([1], [0], sizes=[6, 5, 2], dropped=[2]).check([6, 5, 2])
    plan_of([0, 1], sizes=[[1, 4], [2, 6]], limits=(3, 10)).check([[1, 4], [2, 6]])
    with pytest.raises(ValueError, match="pack 0 holds 3 of resource 0, more than its limit of 2"): plan_of([0, 1], sizes=[[1, 4], [2, 6]], limits=(2, 10)).check([[1, 4], [2, 6]])
    with pytest.raises(ValueError, match="document 1 is placed with another size"): plan_of([0, 1], sizes=[[1, 4], [2, 6]], limits=(3, 10)).check([[1, 4], [1, 6]])


@pytest.mark.parametrize("call, said", [
    (lambda: PackPlan.build([0], [0, 2], [3], (10,)), "offsets"), (lambda: PackPlan.build([0, 1], [0, 2, 1, 2], [3, 1], (10,)), "offsets"), (lambda: PackPlan.build([0], [0, 1], [[3, 1]], (10,)), "limits"),
    (lambda: PackPlan.build([0], [0, 1], [3], (10,), starts=[0, 1]), "starts"), (lambda: PackPlan.from_assignment([0, -1], [3, 1], (10,)), "pack_of"), (lambda: PackPlan.from_assignment([0, 5], [3, 1], (10,), packs=2), "pack_of")])
def test_bad_plans(call, said):
    with pytest.raises(ValueError, match=said): call()


@given(problems(60), st.integers(0, 99))
def test_sums_by_pack(problem, seed):
    lengths, capacity = problem
    plan = pack(lengths, capacity, "isf", seed=seed)
    for i, p in enumerate(contents(plan)):
        mine = [lengths[j] for j in p]
        assert (plan.tokens[i], plan.squares[i], plan.docs[i]) == (sum(mine), sum(x * x for x in mine), len(mine))
    assert plan.utilisation == pytest.approx(sum(lengths) / (capacity * plan.packs)) and plan.totals.shape == (plan.packs, 1)
    order = np.random.default_rng(seed).permutation(plan.packs)[:max(1, plan.packs // 2)]
    some = plan.select(order)
    assert contents(some) == [contents(plan)[i] for i in order] and (some.squares == plan.squares[order]).all()
    assert contents(plan.select(plan.docs > 1)) == [p for p in contents(plan) if len(p) > 1]


def test_empty_packs_and_plans():
    "An empty pack sums to 0 and an empty plan has no packs: groups that were emptied by filling others have one."
    plan = PackPlan.from_assignment([0, 2], [3, 4], (10,), packs=4)
    assert plan.tokens.tolist() == [3, 0, 4, 0] and plan.squares.tolist() == [9, 0, 16, 0]
    none = PackPlan.build([], [0], [], (10,))
    assert (none.packs, none.items, none.tokens.tolist()) == (0, 0, []) and np.isnan(none.utilisation)
    none.check(np.zeros((0, 1)))


def test_saved_and_read_back(tmp_path):
    plan = pack([25, 7, 10], 10, oversize="split")
    plan.save(tmp_path / "plan.npz")
    again = PackPlan.load(tmp_path / "plan.npz")
    assert all((getattr(plan, n) == getattr(again, n)).all() for n in ("item_ids", "offsets", "sizes", "starts", "dropped")) and (plan.limits, plan.partial) == (again.limits, again.partial)
    (tmp_path / "other.npz").write_text("no plan")
    with pytest.raises(ValueError, match="is not a plan"): PackPlan.load(tmp_path / "other.npz")
    np.savez(tmp_path / "half.npz", item_ids=plan.item_ids)
    with pytest.raises(ValueError, match="is not a plan"): PackPlan.load(tmp_path / "half.npz")
    with pytest.raises(IndexError, match="i=9"): plan.pack(9)
    assert set(OVERSIZE) == {"error", "drop", "truncate", "split"}


def test_planning_needs_no_torch():
    code = "import sys, modeltc_lab.balance.packing, modeltc_lab.balance.lengths; print({'torch', 'transformers', 'ortools', 'datasets', 'pandas', 'plotly'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "set()"


def plain(lengths, capacity):
    "Best fit decreasing over a list of bins; used against TRL's as well."
    return len(naive(lengths, capacity, True))


@settings(max_examples=10)
@given(problem=problems(80))
def test_as_many_packs_as_trl(problem):
    "Differential: TRL's best fit has the same number of packs; capacities that are no powers of two included."
    datasets, trl = pytest.importorskip("datasets"), pytest.importorskip("trl", reason="needs trl (modeltc_lab[peers])")
    lengths, capacity = problem
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in lengths]}).with_format("arrow")
    theirs = trl.pack_dataset(rows, capacity, "bfd", map_kwargs={"batch_size": None})
    ours = pack(lengths, capacity)
    assert len(theirs) == ours.packs == plain(lengths, capacity)
    assert sorted(len(r) for r in theirs.with_format(None)["input_ids"]) == sorted(ours.tokens.tolist())
