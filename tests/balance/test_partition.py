"Cuts and recomputation against every cut and every choice there is; profiles counted by hand and measured on real models."

import json
from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.balance.cost import HARDWARE, MODELS, Hardware
from modeltc_lab.balance.partition import (
    KINDS,
    METHODS,
    PROFILES,
    DoesNotFit,
    LayerProfile,
    PipelinePlan,
    _again_s,
    _knapsack,
    again_s,
    analytic_profile,
    anchor_cuts,
    bare_profile,
    choose_recompute,
    cut_by,
    find_layers,
    min_max_cuts,
    omnibal_candidates,
    omnibal_partition,
    partition,
    profile_layers,
    rank_bytes,
    recompute_ways,
    savings,
    uniform_cuts,
)
from modeltc_lab.balance.simulator import Link, in_flight, pipeline_order, simulate_pipeline

seeds = st.integers(0, 100_000)


def every_cut(layers, stages):
    "All ways to cut a row."
    return [np.array([0, *c, layers]) for c in combinations(range(1, layers), stages - 1)]


def row(layers, seed, alike=False):
    "A random profile in whole numbers, so that sums are exact; `alike`: two kinds of layers."
    rng = np.random.default_rng(seed)
    n = 2 if alike else layers
    f, act, held = rng.integers(1, 20, n), rng.integers(2, 30, n), rng.integers(1, 15, n)
    which = np.arange(layers) >= layers // 2 if alike else np.arange(layers)
    which = which.astype(int)
    b = np.where(rng.random(layers) < 0.15, 0, 2 * f[which]) if not alike else 2 * f[which]
    keep = np.where(b > 0, act[which], 0)
    return LayerProfile(tuple(map(str, range(layers))), tuple(rng.choice(KINDS, layers)), f[which], b, keep, np.minimum(keep, rng.integers(0, 6, n)[which]), held[which], rng.integers(0, 5, layers), tiles=1)


def best_by_hand(p, stages, micros, memory, everything=False):
    "Fastest slowest stage over all cuts and all choices; inf where nothing fits."
    flight, best = in_flight(pipeline_order("1f1b", stages, micros)), np.inf
    for cuts in every_cut(len(p), stages):
        slowest = 0.0
        for s, (a, b) in enumerate(zip(cuts, cuts[1:])):
            least = np.inf
            for mask in product((False, True), repeat=int(b - a)):
                m = np.array(mask)
                if (m & (p.backward_s[a:b] == 0)).any() or (everything and (~m & (p.backward_s[a:b] > 0) & (savings(p)[a:b] > 0)).any()): continue
                size = p.parameter_bytes[a:b].sum() + flight[s] * np.where(m, p.checkpoint_bytes[a:b], p.activation_bytes[a:b]).sum() + (savings(p)[a:b].max() if m.any() else 0)
                if size <= memory: least = min(least, p.forward_s[a:b].sum() + p.backward_s[a:b].sum() + p.forward_s[a:b][m].sum())
            slowest = max(slowest, least)
        best = min(best, slowest)
    return best


@settings(max_examples=40)
@given(st.integers(1, 14), st.integers(1, 5), seeds)
def test_min_max_is_the_best_of_all_cuts(layers, stages, seed):
    w = np.random.default_rng(seed).integers(1, 50, layers).astype(float)
    if stages > layers:
        with pytest.raises(ValueError, match=f"stages={stages}"): min_max_cuts(w, stages)
        return
    slowest = lambda cuts: max(w[a:b].sum() for a, b in zip(cuts, cuts[1:]))
    cuts, value = min_max_cuts(w, stages)
    assert value == slowest(cuts) == min(map(slowest, every_cut(layers, stages)))
    assert (np.diff(cuts) >= 1).all() and cuts[0] == 0 and cuts[-1] == layers
    assert value <= min(slowest(uniform_cuts(layers, stages)), slowest(anchor_cuts(w, stages))) and value >= max(w.max(), w.sum() / stages)


@settings(max_examples=40)
@given(st.integers(1, 10), seeds, st.booleans())
def test_the_knapsack_is_the_best_of_all_choices(n, seed, alike):
    rng = np.random.default_rng(seed)
    save, cost = rng.integers(0, 3 if alike else 20, n).astype(float), rng.integers(1, 3 if alike else 20, n).astype(float)
    for need in (0.5, save.sum() / 3, save.sum() / 2, save.sum(), save.sum() + 1):
        fits = [cost[list(m)].sum() for k in range(n + 1) for m in combinations(range(n), k) if save[list(m)].sum() >= need]
        mask, state = _knapsack(save, cost, need, 100_000)
        assert state == (0 if fits else 1)
        if fits: assert save[mask].sum() >= need and cost[mask].sum() == min(fits)
    if n > 6: assert _knapsack(rng.random(n), rng.random(n), 1e-9, 2)[1] == 2     # too many choices is said


@settings(max_examples=25)
@given(st.integers(2, 5), st.integers(1, 3), st.integers(1, 5), seeds)
def test_cuts_and_recomputation_together_are_the_best_of_all(layers, stages, micros, seed):
    p = row(layers, seed)
    stages = min(stages, layers)
    for memory in np.quantile([p.parameter_bytes.sum(), 3 * (p.parameter_bytes + p.activation_bytes * stages).sum() / stages], [0.0, 0.3, 0.6, 1.0]).round():
        for recompute in ("joint", "full"):
            expected = best_by_hand(p, stages, micros, memory, recompute == "full")
            if not np.isfinite(expected):
                with pytest.raises(DoesNotFit, match=r"stage \d needs \d+ bytes"): partition(p, stages, micros, memory_bytes=memory, recompute=recompute, refine=False)
                continue
            plan = partition(p, stages, micros, memory_bytes=memory, recompute=recompute, refine=False)
            assert plan.bound_s == pytest.approx(expected) and plan.stage_s.max() == pytest.approx(expected)
            assert (plan.stage_bytes <= memory).all() and not (plan.recompute & (p.backward_s == 0)).any()
            moved = partition(p, stages, micros, memory_bytes=memory, recompute=recompute)
            assert moved.simulate().makespan_s <= plan.simulate().makespan_s + 1e-9 and (moved.stage_bytes <= memory).all() and moved.bound_s == plan.bound_s


@settings(max_examples=25)
@given(st.integers(4, 20), st.integers(2, 4), seeds, st.booleans())
def test_never_worse_than_two_steps_and_better_with_more_memory(layers, stages, seed, alike):
    p = row(layers, seed, alike)
    high = float((p.parameter_bytes + stages * p.activation_bytes).sum())
    last = np.inf
    for memory in np.linspace(high / stages / 2, high, 6):
        plans = {}
        for way, (method, recompute) in {"joint": ("dp", "joint"), "two": ("omnibal", "greedy"), "exact cuts": ("dp", "greedy"), "full": ("dp", "full"), "none": ("dp", "none")}.items():
            try: plans[way] = partition(p, stages, 8, method, memory, recompute)
            except DoesNotFit: continue
            assert (plans[way].stage_bytes <= memory).all()
        if "joint" not in plans:
            assert not plans                                                          # where it does not fit nothing else does
            continue
        ours = plans["joint"].simulate().makespan_s
        assert all(ours <= other.simulate().makespan_s * (1 + 1e-9) for way, other in plans.items() if way in ("two", "none"))
        if "full" in plans: assert plans["joint"].bound_s <= plans["full"].bound_s + 1e-9
        assert plans["joint"].bound_s <= last + 1e-9
        last = plans["joint"].bound_s
        for other in plans.values(): assert other.stage_s.max() >= plans["joint"].bound_s - 1e-9


@settings(max_examples=25)
@given(st.integers(4, 12), st.integers(2, 3), seeds)
def test_the_exact_choice_at_given_cuts_is_never_worse_than_the_greedy_one(layers, stages, seed):
    p, cuts = row(layers, seed), uniform_cuts(layers, stages)
    none = rank_bytes(p, cuts, np.zeros(layers, bool), "1f1b", 1, 4)
    full = rank_bytes(p, cuts, (savings(p) > 0) & (p.backward_s > 0), "1f1b", 1, 4)
    for part in (0.0, 0.3, 0.7, 1.0):
        memory = np.maximum(np.minimum(none, full), full + part * (none - full))
        masks = {m: choose_recompute(p, cuts, m, memory, p, "1f1b", 1, 4) for m in ("joint", "greedy")}
        for m in masks.values(): assert (rank_bytes(p, cuts, m, "1f1b", 1, 4) <= memory + 1e-9).all()
        for a, b in zip(cuts, cuts[1:]): assert (again_s(p) * masks["joint"])[a:b].sum() <= (again_s(p) * masks["greedy"])[a:b].sum()


def test_the_table_of_recompute_seconds_agrees_with_the_choice():
    p = row(9, 3)
    flight, memory = np.array([3.0, 2.0]), np.array([90.0, 70.0])
    table = _again_s(p.parameter_bytes, p.activation_bytes, savings(p) * (p.backward_s > 0), again_s(p), savings(p), flight, memory, 10_000)
    for s, (i, j) in product(range(2), combinations(range(10), 2)):
        need = p.parameter_bytes[i:j].sum() + flight[s] * p.activation_bytes[i:j].sum() - memory[s]
        able = np.where(p.backward_s > 0, savings(p), 0)[i:j]
        mask, state = (np.zeros(j - i, bool), 0) if need <= 0 else _knapsack(able, again_s(p)[i:j], (need + savings(p)[i:j].max()) / flight[s], 10_000)
        assert table[s, i, j] == (np.inf if state else again_s(p)[i:j][mask].sum())
    assert not _again_s(p.parameter_bytes, np.arange(9.0), np.arange(1.0, 10), np.random.default_rng(0).random(9), np.ones(9), flight, memory, 3).size


@settings(max_examples=30)
@given(st.integers(4, 14), st.integers(2, 5), st.integers(0, 2), st.integers(1, 6), seeds)
def test_the_papers_candidates_are_the_best_of_their_whole_list(layers, stages, radius, top, seed):
    p, link = row(layers, seed), Link(0.0, 3.0)
    if stages > layers: return
    anchor, mean = anchor_cuts(p.forward_s, stages), p.forward_s.sum() / stages
    near = [np.array([0, *c, layers]) for c in product(*(range(a - radius, a + radius + 1) for a in anchor[1:-1]))]
    near = [c for c in near if (np.diff(c) > 0).all()]
    sums = lambda c: np.array([p.forward_s[a:b].sum() for a, b in zip(c, c[1:])])
    score = sorted(sums(c).var() / mean**2 + (p.output_bytes[c[1:-1] - 1] / 3.0).sum() / mean for c in near)
    cuts, ours, seen = omnibal_candidates(p, stages, radius, top, link)
    assert seen == len(near) and ours == pytest.approx(score[:top]) and len({tuple(c) for c in cuts}) == len(cuts)
    for c, v in zip(cuts, ours): assert sums(c).var() / mean**2 + (p.output_bytes[c[1:-1] - 1] / 3.0).sum() / mean == pytest.approx(v)


def test_bytes_are_those_of_the_worst_moment_on_the_clock():
    p, micros = row(11, 5), 6
    plan = partition(p, 3, micros, memory_bytes=0.8 * partition(p, 3, micros).stage_bytes.max(), refine=False)
    kept = np.where(plan.recompute, p.checkpoint_bytes, p.activation_bytes)
    rows = plan.simulate().rows()
    for s, (a, b) in enumerate(zip(plan.cuts, plan.cuts[1:])):
        begin = {r["micro"]: r["start_s"] for r in rows if r["rank"] == s and r["kind"] == "forward"}
        end = {r["micro"]: r["end_s"] for r in rows if r["rank"] == s and r["kind"] == "backward"}
        held = max(sum(begin[m] <= x < end[m] for m in begin) for x in begin.values())
        again = savings(p)[a:b].max() if plan.recompute[a:b].any() else 0
        assert plan.stage_bytes[s] == p.parameter_bytes[a:b].sum() + held * kept[a:b].sum() + again
    assert plan.recompute.any()
    again_rows = {r["rank"] for r in rows if r["kind"] == "recompute"}
    assert again_rows == {s for s in range(3) if plan.recompute_s[s] > 0}


def test_the_worst_micro_batch_sets_the_memory():
    p = analytic_profile("internvl-6b-20b", tp=4)
    typical, worst = (partition(p, 4, 32, memory_bytes=40 * 2**30, worst=w, refine=False) for w in (None, (12, 5120)))
    assert worst.bound_s > typical.bound_s and worst.recompute.sum() > typical.recompute.sum()
    heavy = p.at(12, 5120)
    assert (rank_bytes(heavy, worst.cuts, worst.recompute, "1f1b", 1, 32) <= 40 * 2**30).all()
    assert (rank_bytes(heavy, typical.cuts, typical.recompute, "1f1b", 1, 32) > 40 * 2**30).any()
    assert worst.times.forward_s.sum() == pytest.approx(p.forward_s.sum())            # times stay those of the typical one


@pytest.mark.parametrize("schedule,chunks", [("gpipe", 1), ("zb-h1", 1), ("interleaved", 2), ("looped_bfs", 2), ("zbv", 2)])
def test_other_schedules(schedule, chunks):
    p = analytic_profile("internvl-6b-20b", tp=4)
    free = partition(p, 4, 16, schedule=schedule, chunks=chunks)
    assert free.stages == 4 * chunks and free.ranks == 4 and len(free.stage_bytes) == 4
    limit = 0.75 * free.stage_bytes.max()
    plan = partition(p, 4, 16, schedule=schedule, chunks=chunks, memory_bytes=limit)
    assert (plan.stage_bytes <= limit).all() and plan.recompute.any() and plan.simulate().makespan_s > free.simulate().makespan_s
    assert free.simulate().makespan_s == simulate_pipeline(free.times, micros=16, schedule=schedule, chunks=chunks).makespan_s


def test_a_limit_for_each_rank():
    p = row(10, 1, True)
    even = partition(p, 2, 4)
    big = float(even.stage_bytes.max())
    odd = partition(p, 2, 4, memory_bytes=[big, 0.6 * big])
    assert (odd.stage_bytes <= [big, 0.6 * big]).all() and odd.stage_bytes[1] < even.stage_bytes[1] + big
    with pytest.raises(ValueError): partition(p, 2, 4, memory_bytes=[big, big, big])


# max / mean stage and makespan / ideal, computed before by another program on the same layers
BEFORE = {("uniform", 4): (1.202, 1.290), ("uniform", 8): (1.221, 1.433), ("anchor", 4): (1.005, 1.099), ("anchor", 8): (1.039, 1.249), ("omnibal", 4): (1.005, 1.099), ("omnibal", 8): (1.039, 1.249),
          ("dp", 4): (1.005, 1.099), ("dp", 8): (1.039, 1.251)}


@pytest.mark.parametrize("stages", [4, 8])
def test_another_program_finds_the_same(stages):
    for way in ("uniform", "anchor", "omnibal", "dp"):
        plan = cut_by(way, bare_profile(), stages, 32)
        assert (plan.imbalance, plan.simulate().ratio) == pytest.approx(BEFORE[way, stages], abs=0.004), way
    worst = cut_by("parameters", bare_profile(), stages, 32)
    assert worst.imbalance > 1.5 and 1.3 < worst.simulate().ratio / cut_by("dp, moved", bare_profile(), stages, 32).simulate().ratio < 1.6


def test_plans_on_every_preset_keep_their_promises():
    for name, stages in product(PROFILES, (4, 16)):
        p = analytic_profile(name)
        plans = {w: cut_by(w, p, stages, 32) for w in ("parameters", "uniform", "anchor", "omnibal", "dp", "dp, moved")}
        span = {w: x.simulate().makespan_s for w, x in plans.items()}
        assert span["dp, moved"] == min(span.values()), name
        assert all(x.stage_s.max() >= plans["dp"].bound_s - 1e-12 for x in plans.values())
        assert plans["dp"].stage_s.max() == pytest.approx(plans["dp"].bound_s)


def test_experiments_give_records():
    out = omnibal_partition(micro_batches=8, profiles=("siglip-0.4b-8b",))
    assert {r.method for r in out} >= {"dp", "omnibal"} and {r.x for r in out} == {4, 8} and all(r.config["micro_batches"] == 8 for r in out)
    ways = recompute_ways(analytic_profile("internvl-6b-20b", tp=4), 4, 8, 36 * 2**30)
    assert "joint" in ways and all((w.stage_bytes <= 36 * 2**30).all() for w in ways.values())


def test_times_of_micro_batches_agree_with_the_carried_over_profile():
    p = analytic_profile("internvl-6b-20b", tiles=9, tokens=4096, squares=4096 * 1135.0)
    plan = partition(p, 4, 8, memory_bytes=420 * 2**30)
    rng = np.random.default_rng(0)
    v, t, q = rng.integers(1, 13, (2, 3)), rng.integers(500, 6000, (2, 3)), rng.integers(10**5, 10**7, (2, 3))
    times = plan.times_for(v, t, q)
    assert np.asarray(times.forward_s).shape == (2, 3, 4)
    for i, j in product(range(2), range(3)):
        other = PipelinePlan(p.at(v[i, j], t[i, j], q[i, j]), plan.cuts, plan.recompute, 8, "dp", "joint").times
        for name in ("forward_s", "backward_s", "recompute_s", "weight_s", "output_bytes"): assert np.asarray(getattr(times, name))[i, j] == pytest.approx(np.asarray(getattr(other, name))), name
    same = plan.times_for([p.tiles], [p.tokens], [p.squares])
    assert np.asarray(same.forward_s)[0] == pytest.approx(plan.forward_s) and np.asarray(same.backward_s)[0] == pytest.approx(plan.backward_s)


def test_counted_by_hand():
    h = Hardware("unit", 1.0, matmul_efficiency=1.0, attention_efficiency=1.0, memory_bandwidth=1e30)
    p = analytic_profile("internvl-6b-20b", tiles=2, tokens=1000, squares=3e5, hardware=h)
    at = {k: p.kinds.index(k) for k in KINDS}
    assert [p.kinds.count(k) for k in KINDS] == [45, 1, 1, 48, 1]
    assert p.forward_s[at["vit"]] == 2 * 12 * 3200**2 * 2050 + 4 * 3200 * 2 * 1025**2
    llm = 6144 * (6144 + 2 * 8 * 128) + 6144**2 + 3 * 6144 * 16384
    assert p.forward_s[at["llm"]] == 2 * llm * 1000 + 2 * 6144 * 3e5 and p.square_forward_s[at["llm"]] == 2 * 6144 * 3e5
    assert p.backward_s[at["llm"]] == 2 * 2 * llm * 1000 + 2.5 * 2 * 6144 * 3e5 and p.weight_s[at["llm"]] == 2 * llm * 1000
    assert p.forward_s[at["head"]] == pytest.approx(2 * 6144 * 92553 * 1000) and p.parameter_bytes[at["embedding"]] == 18 * 6144 * 92553
    assert p.forward_s[at["projector"]] == 2 * (12800 * 6144 + 6144**2) * 512
    assert p.output_bytes[at["vit"]] == 2 * 2050 * 3200 and p.output_bytes[at["projector"]] == 2 * 512 * 6144 and p.output_bytes[at["llm"]] == 2 * 1000 * 6144
    assert p.activation_bytes[at["vit"]] == 2 * 2050 * (8 * 3200 + 2 * 12800)
    half = analytic_profile("internvl-6b-20b", tiles=2, tokens=1000, hardware="h100", tp=2)
    whole = analytic_profile("internvl-6b-20b", tiles=2, tokens=1000, hardware="h100")
    assert (half.parameter_bytes * 2 == whole.parameter_bytes).all() and half.forward_s[at["llm"]] > whole.forward_s[at["llm"]] / 2 + 2 * HARDWARE["h100"].link_latency_s


def test_frozen_parts():
    at = lambda p, k: p.kinds.index(k)
    p = analytic_profile("internvl-6b-20b")
    cold = analytic_profile("internvl-6b-20b", frozen=("vit",))
    assert cold.backward_s[:45].sum() == 0 == cold.activation_bytes[:45].sum() and cold.parameter_bytes[0] == p.parameter_bytes[0] / 9
    assert cold.backward_s[at(cold, "projector")] == pytest.approx(cold.forward_s[at(cold, "projector")])     # only weights: nothing in front wants a gradient
    assert cold.backward_s[at(cold, "llm")] == p.backward_s[at(p, "llm")]
    warm = analytic_profile("internvl-6b-20b", frozen=("vit", "llm", "embedding", "head"))
    i = at(warm, "llm")
    assert warm.weight_s[i] == 0 and warm.backward_s[i] == pytest.approx(p.backward_s[i] - p.weight_s[i]) and 0.9 < warm.backward_s[i] / warm.forward_s[i] < 1.2
    plan = partition(cold, 4, 8, memory_bytes=350 * 2**30)
    assert not plan.recompute[:45].any()                                               # nothing is kept there, so nothing is computed again


def test_configurations_of_real_models():
    from transformers import (
        AutoConfig,
        CLIPVisionConfig,
        InternVLConfig,
        InternVLVisionConfig,
        LlamaConfig,
        LlavaConfig,
    )
    text = LlamaConfig(hidden_size=256, intermediate_size=688, num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2, vocab_size=1000)
    p = analytic_profile(text, tokens=512)
    assert set(p.kinds) == {"embedding", "llm", "head"} and p.kinds.count("llm") == 6 and p.tiles == 0
    p = analytic_profile(InternVLConfig(vision_config=InternVLVisionConfig(hidden_size=128, num_hidden_layers=5, num_attention_heads=4, intermediate_size=512, image_size=112), text_config=text), tiles=3, tokens=512)
    assert p.kinds.count("vit") == 5 and p.output_bytes[0] == 2 * 3 * 65 * 128
    p = analytic_profile(LlavaConfig(vision_config=CLIPVisionConfig(), text_config=text), tiles=2, tokens=900)
    assert p.kinds.count("vit") == 12 and p.kinds.count("projector") == 1
    p = analytic_profile(AutoConfig.for_model("qwen2_5_vl"), tiles=2, tokens=900)
    assert p.kinds.count("vit") == 32 and partition(p, 4, 8).stages == 4
    assert analytic_profile("smollm2-135m").parameter_bytes[-1] == 0                    # tied: the head holds nothing of its own
    assert set(MODELS) >= {m for v, m, _ in PROFILES.values()} - {"internlm2-20b-vl", "internlm2.5-7b"}


def test_round_trips(tmp_path):
    p = analytic_profile("internvl-0.3b-7b")
    p.save(tmp_path / "p.json")
    assert LayerProfile.load(tmp_path / "p.json").to_dict() == p.to_dict()
    for more in ({}, {"memory_bytes": 60 * 2**30, "worst": (12, 6000)}, {"link": Link(1e-5, 1e10), "schedule": "zbv", "chunks": 2}):
        plan = partition(p, 4, 8, **more)
        plan.save(tmp_path / "plan.json")
        assert PipelinePlan.load(tmp_path / "plan.json").summary() == plan.summary()
    for text, error in (("{", "no JSON"), ("{}", "not a plan"), ("[]", "not a plan")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match=error): PipelinePlan.load(tmp_path / "bad.json")
    (tmp_path / "bad.json").write_text(json.dumps({"names": ["a"]}))
    with pytest.raises(ValueError, match="no .*kinds"): LayerProfile.load(tmp_path / "bad.json")


@pytest.mark.parametrize("call,text", [
    (lambda p: partition(p, 97, 4), "stages=97"), (lambda p: partition(p, 0, 4), "stages=0"), (lambda p: partition(p, 4, 0), "micro_batches=0"), (lambda p: partition(p, 4, 4, method="best"), "method='best'"),
    (lambda p: partition(p, 4, 4, recompute="some"), "recompute='some'"), (lambda p: partition(p, 4, 4, memory_bytes=-1), "memory_bytes=-1"), (lambda p: partition(p, 4, 4, worst=analytic_profile("smollm2-135m")), "worst"),
    (lambda p: partition(p, 4, 4, memory_bytes=2**30), "even with everything computed again"), (lambda p: partition(p, 4, 4, method="uniform", memory_bytes=2**30), "at these cuts"),
    (lambda p: partition(p, 4, 4, memory_bytes=120 * 2**30, recompute="none"), "allow recompute='joint'"), (lambda p: analytic_profile("gpt"), "model='gpt'"), (lambda p: analytic_profile(tokens=0), "tokens=0"), (lambda p: analytic_profile(frozen=("tower",)), "'tower'"),
    (lambda p: LayerProfile((), (), *[np.zeros(0)] * 6), "names=()"), (lambda p: LayerProfile(("a",), ("attention",), *[np.ones(1)] * 6), "'attention'"), (lambda p: LayerProfile(("a",), ("vit",), *[np.ones(1)] * 6), "tiles=0"),
    (lambda p: LayerProfile(("a",), ("llm",), np.array([-1.0]), *[np.ones(1)] * 5), "forward_s[0]=-1"), (lambda p: LayerProfile(("a",), ("llm",), np.ones(2), *[np.ones(1)] * 5), "forward_s: shape (2,)"), (lambda p: p.at(-1, 5), "tiles=-1"),
    (lambda p: omnibal_candidates(p, 4, -1), "radius=-1")])
def test_errors_name_the_argument(call, text):
    with pytest.raises(ValueError) as e: call(analytic_profile("internvl-6b-20b"))
    assert text in str(e.value)


def toy_llama(layers=3, **more):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=211, hidden_size=48, intermediate_size=96, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, **more))
    return model, {"input_ids": torch.randint(0, 211, (1, 96), generator=torch.Generator().manual_seed(1)), "use_cache": False}


def test_a_measured_profile_of_a_language_model():
    import torch
    model, batch = toy_llama()
    p = profile_layers(model, batch, repeats=2)
    assert p.names == ("model.embed_tokens", "model.layers.0", "model.layers.1", "model.layers.2", "model.norm", "lm_head") and p.kinds == ("embedding", "llm", "llm", "llm", "llm", "head")
    assert (p.tiles, p.tokens, p.squares) == (0.0, 96.0, 96.0**2) and p.source.startswith("measured")
    assert p.parameter_bytes.sum() == 16 * sum(x.numel() for x in model.parameters())
    assert (p.output_bytes[:5] == 96 * 48 * 4).all() and (p.checkpoint_bytes[1:] == 96 * 48 * 4).all()
    assert p.activation_bytes[1] == p.activation_bytes[2] > p.checkpoint_bytes[1] and (p.weight_s <= p.backward_s).all() and (p.forward_s > 0).all()
    kept, own = {}, {x.untyped_storage().data_ptr() for x in model.parameters()}

    def note(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t): logits = model(**batch).logits
    whole = sum(n for k, n in kept.items() if k not in own)
    assert whole <= p.activation_bytes.sum() <= 1.3 * whole and logits.requires_grad    # layer by layer the inputs are counted again: the plan is on the safe side
    assert all(x.grad is None for x in model.parameters())                              # profiling leaves no gradients behind
    assert partition(p, 2, 4, memory_bytes=1.05 * partition(p, 2, 4).stage_bytes.max()).stages == 2


def test_a_measured_profile_of_a_vision_language_model_and_of_a_row_of_layers():
    pipeline = pytest.importorskip("modeltc_lab.balance.pipeline")
    import torch
    model = pipeline.toy_vlm(vision_layers=2, llm_layers=3)
    g = torch.Generator().manual_seed(0)
    tile, image = model.config.image_seq_length, model.config.image_token_id
    ids = torch.cat([torch.randint(0, image, (10,), generator=g), torch.full((tile,), image), torch.randint(0, image, (30,), generator=g)])
    batch = {"input_ids": ids, "pixel_values": torch.randn(1, 3, 112, 112, generator=g), "labels": ids, "position_ids": torch.arange(len(ids)), "cu_seqlens": torch.tensor([0, len(ids)], dtype=torch.int32), "image_flags": torch.ones(1, dtype=torch.int64)}
    row = profile_layers(pipeline.split_vlm(model), batch, repeats=1)
    assert row.kinds == ("vit", "vit", "vit", "projector", "embedding", "llm", "llm", "llm", "head") and (row.tiles, row.tokens) == (1.0, len(ids))
    assert row.parameter_bytes.sum() == 16 * sum(x.numel() for x in model.parameters()) and (row.backward_s > 0).all()
    found = [(n, k) for n, k, _ in find_layers(model)]
    assert sum(k == "vit" for _, k in found) >= 3 and sum(k == "llm" for _, k in found) >= 3 and ("lm_head", "head") in found and any(k == "projector" for _, k in found)
    for x in model.model.vision_tower.parameters(): x.requires_grad_(False)
    cold = profile_layers(pipeline.split_vlm(model), batch, repeats=1)
    assert (cold.backward_s[:3] == 0).all() and (cold.activation_bytes[:3] == 0).all() and cold.backward_s[3] > 0


def test_a_transformers_model_with_a_tower_is_taken_apart_by_itself():
    import torch
    from transformers import InternVLConfig, InternVLForConditionalGeneration, InternVLVisionConfig, LlamaConfig
    text = LlamaConfig(hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=200)
    vision = InternVLVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=56)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = InternVLForConditionalGeneration(InternVLConfig(vision_config=vision, text_config=text, image_token_id=199, image_seq_length=4, tie_word_embeddings=False))
    g = torch.Generator().manual_seed(0)
    ids = torch.cat([torch.randint(0, 199, (20,), generator=g), torch.full((8,), 199), torch.randint(0, 199, (30,), generator=g)])[None]
    batches = [{"input_ids": ids[:, :n], "pixel_values": torch.randn(2, 3, 56, 56, generator=g), "use_cache": False} for n in (40, 58)]
    p = profile_layers(model, batches, repeats=1)
    assert [p.kinds.count(k) for k in KINDS] == [3, 1, 1, 4, 1] and (p.tiles, p.tokens) == (2.0, 49.0)
    assert p.parameter_bytes.sum() == 16 * sum(x.numel() for x in model.parameters() if x.requires_grad)
    assert p.names.index("model.multi_modal_projector") < p.names.index("model.language_model.layers.0") and p.names[-1] == "lm_head"
    assert partition(p, 3, 4).stages == 3


def test_what_cannot_be_profiled_is_refused():
    import torch
    model, batch = toy_llama()
    with pytest.raises(ValueError, match="not padding"): profile_layers(model, {"input_ids": torch.full((1, 32), 7), "use_cache": False})
    with pytest.raises(ValueError, match="no input_ids"): profile_layers(model, {"tokens": batch["input_ids"]})
    with pytest.raises(ValueError, match="repeats=0"): profile_layers(model, batch, repeats=0)
    with pytest.raises(ValueError, match="no ModuleList"): profile_layers(torch.nn.Linear(3, 3), batch)
    frozen, _ = toy_llama()
    for x in frozen.model.embed_tokens.parameters(): x.requires_grad_(False)
    for x in frozen.model.layers[1].parameters(): x.requires_grad_(False)
    p = profile_layers(frozen, batch, repeats=1)
    assert p.backward_s[0] == 0 and p.weight_s[2] == 0 < p.backward_s[2] and p.parameter_bytes[2] == p.parameter_bytes[1] / 4


def test_methods_are_all_there():
    p = row(12, 0)
    for m in METHODS:
        plan = partition(p, 3, 4, method=m)
        assert plan.method == m and (np.diff(plan.cuts) > 0).all() and plan.summary()["stages"] == 3
    assert (partition(p, 3, 4, method="parameters").cuts == min_max_cuts(p.parameter_bytes, 3)[0]).all()
