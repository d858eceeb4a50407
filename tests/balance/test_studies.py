import itertools
from dataclasses import replace

import numpy as np
import pytest

from modeltc_lab.balance.cost import CostModel, GroupSpec
from modeltc_lab.balance.studies import (
    CASES,
    ORDERS,
    PAPER,
    PAPER_DATA,
    Case,
    beside_paper,
    case_groups,
    case_run,
    case_schedule,
    cost_fit,
    generator_run,
    hbp_ablation,
    hbp_generator,
    hbp_orders,
    replay,
    small_llama,
    timed_packs,
)
from modeltc_lab.core.results import record, table


@pytest.fixture(scope="module")
def ablation():
    return hbp_ablation(cases=("8B, + balance", "8B, + hierarchy"), scale=.01)


def test_every_row_has_its_base_and_its_groups():
    "The row compared with is there, is its own base, and every row's strategies fit its world."
    for name, case in CASES.items():
        assert CASES[case.base].base == case.base
        groups = case_groups(case)
        assert groups[-1].length == case.capacity and all(case.world % g.sp == 0 for g in groups)
        assert len(groups) == 1 if name in (case.base, "8B, one group, sorted") or "packer" in name else len(groups) > 1
    assert {n for n in PAPER if n not in CASES} == {"8B, packer SPFHP", "8B, FlexSP"}  # of the paper only


def test_ablation_by_hand(ablation):
    "The base row is drawn in though it was not asked for; days and speed-up are what the schedule says, step by step."
    value = {(r.method, r.metric): r.samples for r in ablation}
    assert {m for m, _ in value} == {"8B, one group", "8B, + hierarchy", "8B, + balance"}
    for seed in (0, 1):
        days = {}
        for name in ("8B, one group", "8B, + balance"):
            made = case_schedule(CASES[name], seed, .01)
            cost, total = CostModel.analytic("llama3.1-8b", "h100"), 0.0
            for s in range(made.steps):
                g, packs = made.step(s)
                plan, group = made.plans[g], made.groups[g]
                seconds = [float(cost.seconds(*(0, 0, 0) if p < 0 else (plan.tokens[p], plan.squares[p], plan.docs[p]), group.sp, group.gc_layers)) for p in packs.ravel()]
                total += max(seconds)
            days[name] = total * 32 / 86400
            assert value[name, "GPU days"][seed] == pytest.approx(days[name], rel=1e-9)
        assert value["8B, + balance", "speed-up"][seed] == pytest.approx(days["8B, one group"] / days["8B, + balance"], rel=1e-9)


def test_ablation_has_the_papers_order(ablation):
    value = {(r.method, r.metric): r.median for r in ablation}
    assert value["8B, + balance", "ABR"] < value["8B, + hierarchy", "ABR"] < value["8B, one group", "ABR"] and value["8B, one group", "CR"] == 1
    assert 1 < value["8B, + hierarchy", "speed-up"] < value["8B, + balance", "speed-up"]
    for r in ablation: assert r.domain == "balance" and r.experiment == "hbp_ablation" and len(r.samples) == 2 and r.config["cost"] == "counted for llama3.1-8b on h100" and r.config["groups"][-1] == [131072, 8, 29]


def test_table_beside_the_paper(ablation):
    "The paper's figures stand beside ours, its speed-up from its days; a figure it does not print leaves no column."
    text = beside_paper(ablation)
    head, rows = text.splitlines()[0], {line.split(" | ")[0].strip("| "): line for line in text.splitlines()[2:]}
    assert head.count("paper") == 4 and "idle | GPU days" in head  # ABR, CR, GPU days, speed-up; not idle
    assert "| 5.22 |" in rows["8B, one group"] and "| 0.506 |" in rows["8B, one group"] and "| 1.40 |" in rows["8B, + balance"] and "| 1.16 |" in rows["8B, + hierarchy"]
    assert len({line.count("|") for line in text.splitlines()}) == 1
    assert beside_paper([]) == table([]) and beside_paper(ablation, lambda n: False) == table([])
    assert "packer" not in beside_paper(ablation, lambda n: "balance" in n) and len(beside_paper(ablation, lambda n: "balance" in n).splitlines()) == 3


def test_seeds_decide(ablation):
    "The same seed gives the same figures, another one others."
    again = case_run("8B, + hierarchy", 0, .01)
    assert again == case_run("8B, + hierarchy", 0, .01) != case_run("8B, + hierarchy", 1, .01)
    assert again["ABR"] == next(r.samples[0] for r in ablation if r.method == "8B, + hierarchy" and r.metric == "ABR")


def test_no_document_is_lost():
    for name in ("8B, one group", "8B, + balance", "8B, no filling", "DeepSeek-V2, HBP"):
        made = case_schedule(CASES[name], 0, .01)
        made.check()
        assert sum(p.items for p in made.plans) == 9_413
    with pytest.raises(ValueError, match="does not fit on 4 ranks"): case_groups(Case("x", "llama3.1-70b", "one", world=4))


def test_orders():
    "Every plan in every order; sorting wins, meeting less often helps, and only random is random."
    records = hbp_orders(scale=.02)
    idle, like = ({(r.method, r.x): r.median for r in records if r.metric == m} for m in ("idle", "likeness"))
    assert len(idle) == 3 * len(ORDERS) and all(0 <= v < 1 for v in idle.values())
    for name in {m for m, _ in idle}:
        assert idle[name, "sort"] <= idle[name, "window:8"] < idle[name, "random"] > idle[name, "random, 4 micro-batches"] > idle[name, "random, 8 micro-batches"]
        assert idle[name, "lpt, 8 micro-batches"] < idle[name, "random, 8 micro-batches"]
        assert like[name, "random"] < .3 < like[name, "sort"]


def test_generator():
    records = hbp_generator(scale=.02)
    value = {(r.method, r.metric): r.median for r in records}
    assert value["documents", "number"] == 18_827 and {m for m, _ in value} == set(PAPER_DATA)
    assert value["one document a rank, 8 ranks", "DBR"] == pytest.approx(.639, abs=.03) and value["HBP 16K and 128K, sorted", "CR"] < .3
    # 8 documents a step: the ratio by hand, in any order of the documents
    from modeltc_lab.balance.lengths import long_context_mix
    lengths = np.random.default_rng(5).permutation(long_context_mix(18_787, 40, 0))[:18_824].reshape(-1, 8)
    assert generator_run(0, .02)["one document a rank, 8 ranks|DBR|share"] == pytest.approx((1 - lengths.mean(1) / lengths.max(1)).mean(), abs=.01)


def test_replay_by_brute_force():
    "Four packs on two ranks: the mean over all pairings, and the pairing of neighbours."
    s = np.array([1.0, 2.0, 4.0, 8.0])
    every = [max(a, b) + max(c, d) for a, b, c, d in itertools.permutations(s)]
    got = replay(s, s, 2, draws=4000)
    assert got["speed-up of balance, measured"] == pytest.approx(np.mean(every) / 10, rel=.01)
    assert got["idle, by predicted cost, measured"] == pytest.approx(1 - 7.5 / 10)
    wrong = replay(s, s[[2, 0, 3, 1]], 2)  # a prediction that pairs 2 with 8: the measured clock says what it is worth
    assert wrong["idle, by predicted cost, measured"] > got["idle, by predicted cost, measured"] and wrong["idle, by predicted cost, predicted"] == pytest.approx(.25)
    with pytest.raises(ValueError, match="ranks=5: only 4 packs were timed"): replay(s, s, 5)


def test_timed_packs_are_those_of_the_plan():
    "Tokens, squares and documents of what was run, from light to heavy; one in four is cut short."
    class Told:
        "Takes a nanosecond for each squared token."
        def __init__(self): self.records = []
        def time(self, documents):
            d = np.array(documents, float)
            assert d.sum() <= 100
            self.records.append({"tokens": d.sum(), "squares": (d**2).sum(), "docs": len(d), "seconds": 1e-9 * (d**2).sum()})
    lengths = np.random.default_rng(0).integers(1, 80, 400)
    rows = timed_packs(Told(), lengths, 100, 40)
    assert len(rows) == 40 and min(r["tokens"] for r in rows) < 60 < 90 < max(r["tokens"] for r in rows)
    assert CostModel.fit([r | {"seconds": r["seconds"] + 1e-9 * r["tokens"]} for r in rows]).square_s == pytest.approx(1e-9, rel=1e-6)


def test_cost_fit_times_real_steps():
    "A few real steps: every figure is there, and a pack twice as full takes longer."
    records = cost_fit(packs=16, capacity=256)
    value = {(r.metric, r.x): r for r in records}
    assert len(value["step", None].samples) == 16 and min(value["step", None].samples) > 0 and len(value["held-out error", None].samples) == 5
    for ranks in (2.0, 4.0, 8.0):
        for clock in ("measured", "predicted"): assert 0 <= value[f"idle, random order, {clock}", ranks].median < 1
        assert value["speed-up of balance, predicted", ranks].median >= 1 - 1e-9  # dealt by the prediction itself
    assert set(records[0].config["prices"]) == {"token_s", "square_s", "doc_s", "step_s"} and "processor time" in records[0].config["clock"]
    with pytest.raises(ValueError, match="size='huge'"): small_llama("huge")


def test_paper_values_are_not_ours():
    "The table never shows a record under the paper's name."
    r = record("balance", "hbp_ablation", "8B, + balance", "ABR", "share", [.5])
    assert beside_paper([r]).splitlines()[2] == "| 8B, + balance | 0.500 | 0.002 |" or "0.00200" in beside_paper([r])
    assert replace(CASES["8B, + balance"], groups=(GroupSpec(131072, 8, 29),)).base == "8B, one group"
