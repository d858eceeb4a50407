"Hierarchical packing: equal to a naive version, every document once, the plan in one call, bad input."

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.balance.cost import DEFAULT_COST, CostModel, GroupSpec
from modeltc_lab.balance.hbp import (
    FILLS,
    SPLIT,
    PackingPlan,
    check_plans,
    group_of,
    hierarchical_pack,
    joined,
    plan_packing,
    planning,
)
from modeltc_lab.balance.lengths import long_context_mix
from modeltc_lab.balance.packing import lower_bound, pack
from modeltc_lab.balance.schedule import metrics, schedule


def naive(lengths, limits, method="bfd", fill="greedy"):
    "Algorithms 2, 5 and 6 with lists: packs of each group, as sorted lists of documents."
    pools = [[j for j, x in enumerate(lengths) if low < x <= high] for low, high in zip([0, *limits], limits)]
    out = []
    for i in reversed(range(len(limits))):
        made = pack([lengths[j] for j in pools[i]], limits[i], method) if pools[i] else None
        packs = [[pools[i][j] for j in made.pack(p)] for p in range(made.packs)] if made else []
        room = lambda p: limits[i] - sum(lengths[j] for j in p)
        for p in sorted(packs, key=room) if fill == "shortest_room" else packs:
            for pool in reversed(pools[:i] if fill != "none" else []):
                while fits := [j for j in pool if lengths[j] <= room(p)]:
                    best = max(fits, key=lambda j: (lengths[j], -j))
                    p.append(best)
                    pool.remove(best)
        out.append([sorted(p) for p in packs])
    return out[::-1]


def listed(plans): return [[sorted(p.pack(i).tolist()) for i in range(p.packs)] for p in plans]


LIMITS = st.lists(st.sampled_from([4, 7, 8, 16, 20, 32, 50, 64]), min_size=1, max_size=4, unique=True).map(sorted)


@st.composite
def cases(draw):
    "Lengths of which every group has at least one."
    limits = draw(LIMITS)
    shape = draw(st.sampled_from(["any", "equal", "largest", "powers"]))
    element = {"any": st.integers(1, limits[-1]), "equal": st.just(limits[0]), "largest": st.just(limits[-1]), "powers": st.sampled_from([2**k for k in range(7) if 2**k <= limits[-1]])}[shape]
    return draw(st.permutations([*draw(st.lists(element, max_size=40)), *limits])), limits


@settings(max_examples=60, deadline=None)
@given(cases(), st.sampled_from(["bfd", "ffd", "next_fit"]), st.sampled_from(FILLS))
def test_equal_to_the_naive_version(case, method, fill):
    lengths, limits = case
    plans = hierarchical_pack(lengths, limits, method, fill)
    check_plans(plans, lengths)
    assert listed(plans) == naive(lengths, limits, method, fill)
    for i, p in enumerate(plans):                                              # a group holds nothing longer than itself; without fill nothing shorter than its range
        assert p.capacity == limits[i]
        if fill == "none" and p.items: assert p.lengths.min() > (limits[i - 1] if i else 0)
        assert p.packs >= (lower_bound(p.lengths, p.capacity).bins if p.items else 0)


@pytest.mark.parametrize("fill", FILLS)
def test_equal_to_the_naive_version_with_isf(fill):
    rng = np.random.default_rng(3)
    lengths = np.concatenate([rng.integers(1, 400, 250), rng.integers(400, 4097, 25)])
    assert listed(hierarchical_pack(lengths, (512, 1024, 4096), "isf", fill)) == naive(lengths.tolist(), [512, 1024, 4096], "isf", fill)


def test_fill_takes_what_fits_longest_first():
    "Rooms of 28: 20 goes, then 8, then nothing; the group of the short ones is empty and the schedule knows what to do with that."
    plans = hierarchical_pack([100, 20, 8, 100, 25], (64, 128))
    assert listed(plans) == [[[1, 2]], [[0, 4], [3]]] or listed(plans) == [[], [[0, 4], [1, 2, 3]]]
    assert listed(plans) == naive([100, 20, 8, 100, 25], [64, 128])
    s = schedule(plans, 2)
    s.check()
    m = metrics(s)
    assert m["bins"] == sum(p.packs for p in plans) and m["utilisation"] <= 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_group_that_was_eaten(accumulate):
    "All short documents went into long packs: a plan of no packs is scheduled, measured, saved."
    plans = hierarchical_pack([100, 20, 8], (64, 128))
    assert [p.packs for p in plans] == [0, 1]
    s = schedule(plans, 2, accumulate=accumulate)
    s.check()
    m = metrics(s)
    assert (s.steps, m["bins"], m["empty"], m["groups"][0]["steps"]) == (1, 1, 2 * accumulate - 1, 0) and set(s.group) == {1}
    json.dumps(m)


def test_fill_costs_communication():
    lengths = long_context_mix(20_000, 60)
    m = {f: metrics(schedule(hierarchical_pack(lengths, SPLIT, "isf", f), 32, SPLIT)) for f in FILLS}
    assert m["none"]["cr"] < m["greedy"]["cr"] and m["none"]["utilisation"] < m["greedy"]["utilisation"]
    assert m["none"]["cr"] == pytest.approx(lengths[lengths > 16384].sum() / lengths.sum())


def test_groups_by_length():
    assert group_of(np.array([1, 8, 9, 16, 17]), (GroupSpec(8), GroupSpec(16), GroupSpec(32))).tolist() == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("oversize, packed, dropped", [("drop", 90, [1]), ("truncate", 90 + 64, []), ("split", 290, [])])
def test_too_long(oversize, packed, dropped):
    lengths = [20, 200, 30, 40]
    plans = hierarchical_pack(lengths, (32, 64), oversize=oversize)
    assert sum(int(p.lengths.sum()) for p in plans) == packed and plans[-1].dropped.tolist() == dropped
    check_plans(plans, lengths)
    whole = joined(plans)
    if oversize == "split":
        mine = whole.item_ids == 1
        pieces = sorted(zip(whole.starts[mine], whole.lengths[mine]))
        assert pieces == [(0, 64), (64, 64), (128, 64), (192, 8)]
    assert [p.partial for p in plans] == ([False, False] if oversize == "drop" else [False, True] if oversize == "truncate" else [any(1 in x for x in g) for g in listed(plans)])


def test_check_plans_finds_what_is_wrong():
    from dataclasses import replace
    lengths = [20, 60, 30, 40]
    a, b = hierarchical_pack(lengths, (32, 64), fill="none")
    with pytest.raises(ValueError): check_plans((a,), lengths)                                          # documents are missing
    with pytest.raises(ValueError): check_plans((a, replace(b, item_ids=b.item_ids * 0)), lengths)
    with pytest.raises(ValueError, match="group 10"): check_plans((replace(a, limits=(10,)), b), lengths)


@pytest.mark.parametrize("arguments, message", [
    (dict(lengths=[5, 0]), "lengths\\[1\\]=0"), (dict(lengths=[-3]), "lengths\\[0\\]=-3"), (dict(lengths=[1.0, float("nan")]), "lengths\\[1\\]=nan"), (dict(lengths=[]), "at least one document"),
    (dict(lengths=[5, 129]), "lengths\\[1\\]=129 is more than capacity=128"), (dict(groups=()), "at least one group"), (dict(groups=(64, 64)), "length 64 occurs twice"), (dict(groups=(0, 64)), "length=0"),
    (dict(lengths=[5, 6]), "the group of length 128 gets none of the 2 documents \\(those of 65 to 128 tokens; the longest has 6\\)"), (dict(lengths=[100]), "the group of length 64 gets none"),
    (dict(fill="some"), "fill='some': need one of greedy"), (dict(method="best"), "method='best'"), (dict(oversize="cut"), "oversize='cut'"), (dict(lengths=[500], oversize="drop"), "nothing is left to pack")])
def test_hierarchical_pack_refuses(arguments, message):
    with pytest.raises(ValueError, match=message): hierarchical_pack(**({"lengths": [5, 100], "groups": (64, 128)} | arguments))


# --- one call ---

@pytest.fixture(scope="module")
def mix(): return long_context_mix(60_000, 130, seed=1)


def test_plan_in_one_call(mix):
    plan = plan_packing(mix)
    check_plans(plan.plans, mix)
    plan.schedule.check()
    s = plan.summary()
    assert set(s) >= {"bins", "lower_bound", "utilisation", "idle", "abr", "dbr", "cr", "plan_s"}
    assert [g["length"] for g in s["groups"]] == [16384, 131072] and [g["sp"] for g in s["groups"]] == [1, 8]           # the paper's own choice for this model
    assert s["bins"] - s["lower_bound"] <= 2 and s["lost_tokens"] == 0 and s["tokens"] == mix.sum() and 0 < s["plan_s"] < 600 and plan.bound == s["lower_bound"]
    assert metrics(plan.schedule) == plan.metrics
    json.dumps(s)
    random = plan_packing(mix, groups=[GroupSpec(131072, 8, 29)], method="isf", balance="random")
    assert plan.metrics["makespan_s"] < 0.8 * random.metrics["makespan_s"] and plan.metrics["idle"] < 0.05 < random.metrics["idle"]


def test_auto_leaves_out_groups_without_documents():
    plan = plan_packing([100, 9000, 12_000])
    assert [g.length for g in plan.groups] == [16384]
    assert [g.length for g in plan_packing([40_000, 120_000]).groups] == [131072]
    assert plan_packing([100, 200], capacity=512).groups[0].length <= 512


def test_deterministic(mix):
    a, b, c = (plan_packing(mix, seed=s, method="isf") for s in (5, 5, 6))
    assert a.schedule.fingerprint() == b.schedule.fingerprint() != c.schedule.fingerprint()


def test_saved_and_sampled(tmp_path):
    lengths = np.random.default_rng(0).integers(1, 300, 200)
    plan = plan_packing(lengths, groups=(128, 300), world=4, balance="window:4", accumulate=2, curriculum_steps=2, fill="none")
    plan.save(tmp_path / "p.npz")
    back = PackingPlan.load(tmp_path / "p.npz")
    assert back.summary() == plan.summary() and back.cost == plan.cost and back.groups == plan.groups and back.metrics == plan.metrics
    rows = [i for r in range(4) for b in back.sampler(r) for i in b]
    assert sorted(rows) == list(range(200))
    from modeltc_lab.balance.schedule import write_schedule
    write_schedule(plan.schedule, tmp_path / "s.npz")
    with pytest.raises(ValueError, match="without its measures"): PackingPlan.load(tmp_path / "s.npz")


def test_the_cost_given_is_the_cost_used():
    "Where only tokens cost, packs of equal tokens are balanced in any order."
    lengths = np.tile([100, 28, 64, 64, 128], 40)
    plan = plan_packing(lengths, groups=None, capacity=128, world=4, balance="random", cost=CostModel(1e-3))
    assert plan.metrics["idle"] == pytest.approx(0, abs=1e-12) and plan.metrics["abr"] > 0.05
    assert plan_packing(lengths, groups=None, capacity=128, world=4).cost == DEFAULT_COST


@pytest.mark.parametrize("arguments, message", [
    (dict(groups="best"), "groups='best': need 'auto'"), (dict(groups=(64, 128), capacity=64), "capacity=64: the longest of the groups is 128"), (dict(groups=(GroupSpec(64), GroupSpec(128, 8)), world=4), "more ranks share a pack than there are"),
    (dict(groups=(GroupSpec(64), GroupSpec(128, 8)), world=12), "sp=8 of the group of length 128 does not divide it"), (dict(groups=(GroupSpec(64), GroupSpec(128, 5)), world=10, model="llama3.1-8b"), "does not divide the query heads"),
    (dict(model="gpt-9"), "gpt-9"), (dict(hardware="abacus"), "abacus"), (dict(world=0), "world=0"), (dict(balance="sorted"), "balance='sorted'"), (dict(cost=CostModel(1.0, error=0.2)), "above 15%; measure more steps"),
    (dict(groups=(64, 128), curriculum_steps=500), "curriculum_steps=500: the shortest group, 64, has")])
def test_plan_packing_refuses(arguments, message):
    with pytest.raises(ValueError, match=message): plan_packing(**({"lengths": [5, 100]} | arguments))


def test_generated_mix_gives_the_papers_imbalances():
    "ABR of one group under ISF, ABR and CR of the two groups sorted; a quarter of the data, so with some slack."
    lengths = long_context_mix(939_344 // 4, 500)
    flat = metrics(schedule(pack(lengths, 131072, "isf"), 32, GroupSpec(131072, 8), balance="random"))
    assert flat["abr"] == pytest.approx(0.523, abs=0.05) and flat["cr"] == 1
    m = metrics(schedule(hierarchical_pack(lengths, SPLIT), 32, SPLIT, balance="sort", key="attention"))
    assert m["abr"] < 0.02 and m["cr"] == pytest.approx(0.162, abs=0.02)


def test_planning_records():
    from modeltc_lab.core.results import pick
    records = planning(documents=(5000,), repeats=2)
    assert len(pick(records, method="HBP, BFD", metric="all").samples) == 2
    parts = [pick(records, method="HBP, ISF", metric=m).samples[0] for m in ("packing", "schedule", "measures")]
    assert sum(parts) == pytest.approx(pick(records, method="HBP, ISF", metric="all").samples[0])
    assert pick(records, method="HBP, BFD", metric="packs").median >= pick(records, method="HBP, BFD", metric="lower bound").median
