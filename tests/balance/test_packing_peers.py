"The comparison with peers: what they give back is checked, the plain-Python packer and the samplers do what they say, records are complete."

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeltc_lab.balance.cost import GroupSpec
from modeltc_lab.balance.hbp import hierarchical_pack
from modeltc_lab.balance.lengths import Samples, generated_vlm_samples, long_context_mix
from modeltc_lab.balance.packing import lower_bound, pack
from modeltc_lab.balance.schedule import metrics, schedule
from modeltc_lab.compare.balance import (
    BATCH,
    CONTESTANTS,
    Batches,
    as_plan,
    flat,
    in_steps,
    length_grouped,
    mix_of,
    naive_isf,
    packing,
    packing_peers,
    sampling_peers,
    take_part,
)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(0, 9))
def test_packs_are_recognised(lengths, seed):
    "Lengths only, in any order of packs: the plan is a partition with the same totals."
    plan = pack(lengths, 40, "isf", seed=seed)
    order = np.random.default_rng(seed).permutation(plan.packs)
    given = [[lengths[j] for j in plan.pack(i)] for i in order]
    again = as_plan(flat(given), lengths, 40)
    assert again.tokens.tolist() == [sum(p) for p in given] and sorted(again.item_ids.tolist()) == list(range(len(lengths)))


@pytest.mark.parametrize("packs, said", [([[5, 3]], "hold 2 documents of 8 tokens, need the 3 of 17"), ([[5, 3], [9], [3]], "hold 4"), ([[5, 4], [9]], "hold 3 documents of 18"), ([[9, 5], [3]], "pack 0 holds 14"), ([[9], [], [5, 3]], "pack 1 is empty")])
def test_wrong_packs_are_refused(packs, said):
    with pytest.raises(ValueError, match=said): as_plan(flat(packs), [9, 5, 3], 10)


@given(st.lists(st.integers(1, 300), min_size=1, max_size=80), st.integers(1, 6), st.integers(0, 5))
def test_plain_python_rounds(lengths, rounds, seed):
    "A partition; before the last round only groups that are nearly full are kept, so of the others only the last round's remain."
    packs = naive_isf(lengths, 300, rounds, seed, slack=40)
    totals = [sum(lengths[j] for j in p) for p in packs]
    assert sorted(j for p in packs for j in p) == list(range(len(lengths))) and max(totals) <= 300
    loose = [i for i, t in enumerate(totals) if t < 260]
    assert not loose or all(i >= loose[0] for i in range(loose[0], len(totals))) and naive_isf(lengths, 300, rounds, seed, slack=40) == packs
    assert len(naive_isf(lengths, 300, 1, seed, slack=40)) >= lower_bound(lengths, 300).bins


def test_the_hierarchy_has_the_papers_figures():
    "groups of 16K and 128K, sorted: share of tokens that communicate 0.173 in the paper and 0.162 in the mix; imbalance of attention about 0.002."
    plans = hierarchical_pack(long_context_mix(), (16_384, 131_072))
    m = metrics(schedule(plans, 32, (GroupSpec(16_384), GroupSpec(131_072, 8)), balance="sort", key="attention"))
    assert abs(m["cr"] - 0.162) < 0.008 and m["abr"] < 0.004


def test_missing_peers_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "binpacking", None)
    with pytest.raises(ImportError, match="needs the package binpacking .*packing_peers.sh"): take_part(["bfd", "binpacking"])
    with pytest.raises(ValueError, match="contestant 'megatron'"): packing_peers(contestants=["megatron"])


def test_a_missing_source_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "llamafactory", None)
    with pytest.raises(ImportError, match="needs the package llamafactory"): take_part(["LLaMA-Factory, whole table"])


@pytest.mark.parametrize("name", ["TRL, whole table", "TRL, batches of 1000"])
def test_trl_takes_part(name):
    pytest.importorskip("trl", reason="needs trl (modeltc_lab[peers])")
    lengths = mix_of(2500)
    call, read = CONTESTANTS[name].make(lengths, 131_072)
    plan = as_plan(read(call()), lengths, 131_072)
    assert plan.packs == pack(lengths, 131_072).packs if "whole" in name else plan.packs == sum(pack(lengths[i:i + 1000], 131_072).packs for i in (0, 1000, 2000))


def test_records_of_packing():
    out = packing(sizes=(3000,), repeats=1)
    by = {(r.method, r.metric): r.median for r in out}
    assert by["bfd", "packs"] >= by["lower bound", "packs"] and by["bfd", "packs above the bound"] == by["bfd", "packs"] - by["lower bound", "packs"]
    assert {m for m, _ in by} == {"lower bound", "bfd", "ffd", "isf", "next_fit", "hbp"} and all(r.config["capacity"] == 131_072 and r.x == 3000 for r in out)


def test_records_beside_a_peer():
    out = packing_peers(contestants=("bfd", "ISF in plain Python"), documents=2000, repeats=3)
    faster = [r for r in out if r.unit == "x"]
    assert {r.method for r in faster} == {"ISF in plain Python"} and all(len(r.samples) == 3 and min(r.samples) > 0 for r in faster)
    assert {r.metric for r in out if r.method == "bfd"} == {r.metric for r in out if r.unit != "x"}


def test_mixes_of_other_sizes():
    assert len(mix_of(941_344)) == 941_344 and (mix_of(941_344) == long_context_mix()).all() and len(mix_of(5000)) == 5000


def test_fixed_batches_by_hand():
    s = Samples([[1, 300], [3, 900], [5, 1500], [1, 500], [1, 700]], ("tiles", "tokens"), "by hand")
    b = Batches.fixed(s, np.array([0, 1, 3, 2, 4]), 2)
    assert b.tiles.tolist() == [4, 6] and b.tokens.tolist() == [1800, 3000] and b.pad == pytest.approx((600 / 1800 + 1000 / 3000) / 2)
    f = b.figures(2)
    assert f["dist ratio, tiles", "1"] == pytest.approx(2 / 12) and f["dist ratio, tokens", "1"] == pytest.approx(1200 / 6000)


def test_packed_batches_hold_everything():
    s = generated_vlm_samples(600, seed=1)
    from modeltc_lab.balance.vector_packing import isf
    plan = isf(s.sizes, (10, 4096))
    b = Batches.packed(plan, in_steps(plan, "window:32", 8))
    assert (b.tiles.sum(), b.tokens.sum(), b.pad) == (s.sizes[:, 0].sum(), s.sizes[:, 1].sum(), 0) and b.tiles.max() <= 10 and len(b.tiles) % 8 == 0


def test_the_length_grouped_order():
    s = generated_vlm_samples(900, seed=2)
    order = length_grouped(s.tokens, BATCH, seed=3)
    assert sorted(order.tolist()) == list(range(900)) and (order == length_grouped(s.tokens, BATCH, seed=3)).all()
    assert Batches.fixed(s, order, BATCH).pad < 0.3 * Batches.fixed(s, np.random.default_rng(0).permutation(900), BATCH).pad


def test_records_of_samplers(seed=0):
    out = sampling_peers(samples=generated_vlm_samples(500, seed=seed), seeds=(seed,), limits=(15, 4608))
    by = {(r.method, r.metric): r.median for r in out}
    assert by["fixed batches, random order", "pad ratio"] > by["fixed batches, LengthGroupedSampler", "pad ratio"] > by["isf, limits (15, 4608), random", "pad ratio"] == 0
    assert by["isf, limits (15, 4608), window:32", "idle"] < by["fixed batches, LengthGroupedSampler", "idle"] and all(r.data_hash is None for r in out)
