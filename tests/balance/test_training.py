"Training on two real ranks: the right documents, the right loss, the same losses after a rank was killed, and errors that say what is wrong."
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modeltc_lab.balance import training
from modeltc_lab.balance.cost import CostModel
from modeltc_lab.balance.parallel import RankError, normalised_loss, shift_labels, token_losses
from modeltc_lab.balance.schedule import PackedCollator, costs
from modeltc_lab.balance.training import (
    Comparison,
    Documents,
    OrderRun,
    Setup,
    calibration_packs,
    corpus,
    fit_setup,
    load_seconds,
    make_order,
    mixed_lengths,
    slug,
    step_loads,
    text_tokens,
    train,
)

TINY = Setup(documents=26, median=30, longest=128, capacity=128, layers=1, hidden=32, heads=2, kv_heads=1, mlp=48, dtype="float64")
COST = CostModel(token_s=1e-5, square_s=2e-8, doc_s=1e-4, step_s=1e-3)


def one_process(plan, setup):
    "The same training in this process alone: every document by itself, one gradient a step."
    model, documents = setup.model(), Documents(setup.lengths, setup.data, setup.tokenizer, setup.seed)
    optimizer, losses = torch.optim.AdamW(model.parameters(), setup.lr, weight_decay=setup.weight_decay), []
    for s in range(plan.steps):
        ids = [i for m in range(plan.accumulate) for r in range(0, plan.world, plan.spec(s).sp) for i in plan.item_ids(s, m, r)]
        rows = [PackedCollator()([documents[i]]) for i in ids]
        targets = [shift_labels(b.pop("labels")) for b in rows]
        summed = sum(token_losses(model(**b).logits, t).sum() for b, t in zip(rows, targets))
        loss = summed / sum(int((t >= 0).sum()) for t in targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), setup.clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def trained():
    "One job: a flat order, one under hierarchical packing with a changing degree, one with accumulation, one sharded."
    plans = {"flat": make_order("window:2", TINY, cost=COST), "shared": make_order("hbp:window:2", TINY, cost=COST), "accumulated": make_order("lpt", TINY, cost=COST, accumulate=2)}
    return train({**plans, "sharded": plans["flat"]}, TINY, changes={"sharded": {"parallel": "fsdp"}}, evaluate_every=2)


@pytest.mark.parametrize("name", ["flat", "shared", "accumulated", "sharded"])
def test_two_ranks_train_like_one_process(trained, name):
    "Losses of every step, after optimizer steps, in double precision: packs, ranks, sequence parallelism, accumulation and sharding change nothing."
    run = trained[name]
    np.testing.assert_allclose(run.loss, one_process(run.plan, TINY), rtol=0, atol=1e-11)
    if name == "shared": assert {run.plan.spec(s).sp for s in range(run.plan.steps)} == {1, 2}


def test_every_rank_reads_what_the_plan_says(trained):
    for run in trained.values():
        assert run.ids == [[[run.plan.item_ids(s, m, r).tolist() for m in range(run.plan.accumulate)] for r in range(2)] for s in range(run.plan.steps)]
        assert int(run.tokens.sum()) == int((TINY.lengths - 1).sum())
        assert run.cpu_s.shape == run.wall_s.shape == (run.plan.steps, 2) and (run.cpu_s > 0).all() and 0 <= run.idle < 1


def test_orders_end_evaluated_on_text_kept_apart(trained):
    for run in trained.values(): assert run.held_out[-1, 0] == run.plan.steps and (run.held_out[:, 1] < math.log(256) + 1).all()
    assert trained["flat"].held_out[:, 1] == pytest.approx(trained["sharded"].held_out[:, 1], abs=1e-10)


def test_a_killed_rank_ends_the_job_and_resume_reads_exactly_the_rest(trained, tmp_path):
    "SIGKILL before step 3; checkpoints every 2 steps: the second start begins with step 2, reads the remaining documents, ends with the same losses to the bit."
    whole, plan = trained["flat"], trained["flat"].plan
    assert plan.steps >= 4
    with pytest.raises(RankError, match="rank 1 of 2") as caught: train({"flat": plan}, TINY, folder=tmp_path, save_every=2, kill={"rank": 1, "step": 3})
    assert (caught.value.rank, caught.value.code) == (1, -9)
    again = train({"flat": plan}, TINY, folder=tmp_path, save_every=2, resume=True)["flat"]
    assert again.first == 2
    rest = Counter(i for s in again.ids[2:] for r in s for m in r for i in m)
    assert rest == Counter(range(TINY.documents)) - Counter(i for s in whole.ids[:2] for r in s for m in r for i in m)
    assert again.ids == whole.ids and again.loss.tolist() == whole.loss.tolist()


def test_step_loads_are_what_the_schedule_costs():
    "Seconds from loads equal the schedule's own, entry by entry; a shared pack is on every rank that shares it."
    for order in ("random", "hbp:sort"):
        plan = make_order(order, TINY, cost=COST)
        ours, theirs = load_seconds(COST, step_loads(plan)), costs(plan, COST)
        for s in range(plan.steps):
            own = theirs[plan.offsets[s]:plan.offsets[s + 1]].reshape(plan.accumulate, -1).repeat(plan.spec(s).sp, axis=1)
            np.testing.assert_allclose(ours[s], own.sum(0), rtol=1e-12)


@given(st.integers(0, 200), st.integers(0, 10**6), st.sampled_from([128, 1024, 4096]), st.floats(0, 1))
def test_mixed_lengths_keep_their_limits(n, seed, longest, share):
    lengths = mixed_lengths(n, longest=longest, long_share=share, seed=seed)
    assert len(lengths) == n and lengths.min(initial=16) >= 16 and lengths.max(initial=0) <= longest
    assert np.array_equal(lengths, mixed_lengths(n, longest=longest, long_share=share, seed=seed))


@given(st.integers(1, 40), st.integers(0, 1000))
def test_documents_for_evaluation_are_apart(n, seed):
    lengths = np.full(n, 64)
    own, held = (Documents(lengths, "tinyshakespeare", "bytes", seed, held_out=h) for h in (False, True))
    assert (own.starts + 64).max() <= held.starts.min() and held.starts.max() + 64 <= len(own.tokens)


def test_text_out_of_reach_is_replaced_and_labelled(monkeypatch):
    monkeypatch.setattr(training, "find_local", lambda name: None)
    text, what = corpus("tinyshakespeare")
    assert len(text) > 100_000 and "standard library" in what and "out of reach" in what


def test_smollm2_tokens_are_renumbered():
    if corpus()[1] != "tinyshakespeare": pytest.skip("tinyshakespeare is out of reach")
    tokens, size, _ = text_tokens(tokenizer="smollm2")
    assert tokens.min() == 0 and tokens.max() == size - 1 == len(np.unique(tokens)) - 1 and size < 49152


def test_calibration_tells_the_prices_apart():
    "Exact seconds in, the same prices out: the packs made for calibration determine every term."
    rows = [{"tokens": sum(p["lengths"]), "squares": sum(n * n for n in p["lengths"]), "docs": len(p["lengths"]), "sp": 1} for p in calibration_packs(Setup(longest=1024, capacity=1024), 30)]
    for r in rows: r["seconds"] = float(COST.seconds(r["tokens"], r["squares"], r["docs"]))
    fitted = fit_setup(Setup(), rows)
    assert (fitted.token_s, fitted.square_s, fitted.doc_s, fitted.step_s) == pytest.approx((1e-5, 2e-8, 1e-4, 1e-3), rel=1e-4)
    for r in rows: assert all(n >= 1 for p in calibration_packs(Setup(), 4) for n in p["lengths"])


def test_comparison_figures_by_hand():
    "Two steps, two ranks: sums of maxima, idle and ratios counted by hand."
    plan = make_order("random", TINY, cost=COST)
    said = load_seconds(COST, step_loads(plan))
    run = OrderRun("random", plan, said * 1.1, said * 0, said, [], np.zeros(plan.steps), np.zeros(plan.steps), np.ones(plan.steps, np.int64), [], np.zeros((0, 2)))
    both = Comparison(TINY, COST, {"random": [run], "sort": [replace_run(run, said * 0.55)]})
    assert both.figures("random")["error of a step, median"][1][0] == pytest.approx(100 * (1 - 1 / 1.1))
    assert both.ratio("random", "sort") == {"measured": [pytest.approx(2.0)], "predicted": [pytest.approx(1.0)]}
    assert run.idle == pytest.approx(1 - said.mean(1).sum() / said.max(1).sum())
    metrics = {(r.method, r.metric) for r in both.records()}
    assert ("sort", "random takes so many times as long, measured") in metrics and ("cost model", "held-out error, median") in metrics


def replace_run(run, seconds): return replace(run, cpu_s=seconds)


def test_sum_and_means_differ_where_packs_do():
    "Why the normaliser matters: per-rank means weigh the same token differently; the global one does not."
    torch.manual_seed(0)
    logits, targets = torch.randn(1, 6, 5, dtype=torch.float64), torch.tensor([[1, 2, -100, 3, -100, -100]])
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    each = token_losses(logits, targets)
    assert normalised_loss(logits, targets, "global", 30, 2, cu).item() == pytest.approx(each.sum().item() * 2 / 30)
    assert normalised_loss(logits, targets, "sample_mean", cu_seqlens=cu).item() == pytest.approx(((each[0] + each[1]) / 2 + each[3]).item() / 2)


@pytest.mark.parametrize("call, text", [
    (lambda: Setup(normaliser="mean"), "normaliser='mean'"), (lambda: Setup(parallel="tp"), "parallel='tp'"), (lambda: Setup(longest=4096), "longest=4096"), (lambda: Setup(documents=0), "documents=0"),
    (lambda: mixed_lengths(3, longest=64), "longest=64"), (lambda: text_tokens(tokenizer="words"), "tokenizer='words'"), (lambda: train({}, TINY), "plans"),
    (lambda: train({"a": make_order("random", TINY)}, TINY, ranks=3), "made for world=2, ranks=3"), (lambda: train({"a": make_order("random", TINY)}, TINY, resume=True), "need a folder"),
    (lambda: Documents(np.array([10**7]), "tinyshakespeare", "bytes", 0), "the longest has 10000000 tokens")])
def test_bad_input_is_named(call, text):
    with pytest.raises(ValueError, match=text.replace("(", r"\(")): call()


def test_names_become_file_names(): assert slug("hbp:window:4") == "hbp-window-4"
