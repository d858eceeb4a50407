"A vision-language model cut by a plan: the same numbers as one process, whatever the cut; micro-batches without padding; times that add up."
import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.balance.partition import LayerProfile, PipelinePlan
from modeltc_lab.balance.pipeline import (
    CASES,
    Cuts,
    PipelineRun,
    StageModule,
    VLMPackedCollator,
    apply_recompute,
    collator_of,
    loss_tokens,
    micro_sizes,
    pipeline_equality,
    pipeline_run,
    random_samples,
    run_layers,
    split_vlm,
    stage_module,
    toy_groups,
    toy_vlm,
    wire_shape,
)

SMALL = dict(vision_layers=2, llm_layers=2, vision_hidden=32, llm_hidden=32, image=56, vocab=64)
LAYERS = 8  # patches, 2 blocks, projector, embedding, 2 blocks, head


@pytest.fixture(scope="module")
def model(): return toy_vlm(**SMALL, dtype=torch.float64)


def sizes(draw_tiles, draw_text): return np.array([[v, 4 * v + t] for v, t in zip(draw_tiles, draw_text)])


def grads(model): return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def test_the_row_of_layers_is_the_model(model):
    "Logits of a pack against transformers' own forward, sample by sample, with its own attention."
    samples = random_samples([[2, 20], [0, 5], [1, 9], [3, 30]], model)
    oracle = copy.deepcopy(model)
    oracle.model.language_model.config._attn_implementation = "sdpa"
    layers = split_vlm(model)
    with torch.no_grad():
        ours = layers[-1].logits(run_layers(layers[:-1], collator_of(model)(samples)))
        own = torch.cat([oracle(input_ids=s["input_ids"][None], pixel_values=s.get("pixel_values")).logits[0] for s in samples])
    assert (ours - own).abs().max() < 1e-13
    assert sum(p.numel() for layer in layers for p in layer.parameters()) == sum(p.numel() for p in model.parameters())      # nothing is left out, nothing twice


def test_a_document_does_not_see_its_neighbours(model):
    "Other tiles and words in one sample: logits of the others are equal to the bit."
    layers, collate = split_vlm(model), collator_of(model)
    a, b = random_samples([[1, 12], [2, 20], [0, 7]], model), random_samples([[1, 12], [2, 20], [0, 7]], model, seed=9)
    with torch.no_grad(): x, y = (layers[-1].logits(run_layers(layers[:-1], collate(s))) for s in (a, [a[0], b[1], a[2]]))
    assert torch.equal(x[:12], y[:12]) and torch.equal(x[32:], y[32:]) and not torch.equal(x[12:32], y[12:32])


def test_the_fake_tile_changes_nothing(model):
    "A group of text: the tower runs, the loss does not depend on the fake tile, every gradient of the tower is zero and there."
    layers, batch = split_vlm(model), collator_of(model)(random_samples([[0, 10], [0, 6]], model))
    assert batch["image_flags"].tolist() == [0] and loss_tokens([batch]) == 9 + 5
    model.zero_grad()
    first = run_layers(layers, dict(batch))
    first.backward()
    assert all(g is not None and not g.any() for n, g in grads(model).items() if "vision_tower" in n or "projector" in n)
    assert torch.equal(first, run_layers(layers, {**batch, "pixel_values": torch.randn_like(batch["pixel_values"])}))
    model.zero_grad()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(2, 20)), min_size=1, max_size=5), st.integers(0, 99))
def test_a_micro_batch_has_every_token_once(rows, seed):
    fit = VLMPackedCollator(63, 4, (3, 56, 56))
    rng = np.random.default_rng(seed)
    samples = [{"input_ids": [63] * 4 * v + rng.integers(0, 63, t).tolist(), **({"pixel_values": torch.full((v, 3, 56, 56), float(i))} if v else {})} for i, (v, t) in enumerate(rows)]
    b = fit(samples)
    lengths = [4 * v + t for v, t in rows]
    assert b["cu_seqlens"].tolist() == [0, *np.cumsum(lengths)] and b["cu_seqlens"].dtype == torch.int32
    assert b["input_ids"].tolist() == [x for s in samples for x in s["input_ids"]]
    assert b["position_ids"].tolist() == [p for n in lengths for p in range(n)]
    assert (b["labels"][b["cu_seqlens"][:-1].long()] == -100).all() and (b["labels"][b["input_ids"] == 63] == -100).all()
    tiles = sum(v for v, _ in rows)
    assert (len(b["pixel_values"]), int(b["image_flags"].sum())) == (max(tiles, 1), tiles)
    assert b["pixel_values"][:, 0, 0, 0].tolist() == ([float(i) for i, (v, _) in enumerate(rows) for _ in range(v)] or [0.0])


@settings(max_examples=20)
@given(st.lists(st.integers(1, LAYERS - 1), min_size=1, max_size=4, unique=True), st.booleans())
def test_any_cuts_compute_the_same(cuts, recompute):
    "Stages chained by hand, their wires padded, against the whole model: loss and gradients."
    model = toy_vlm(**SMALL, dtype=torch.float64)
    batch = collator_of(model)(random_samples([[2, 20], [0, 5]], model))
    loss = run_layers(split_vlm(model), dict(batch))
    loss.backward()
    whole = grads(model)
    model.zero_grad()
    plan = Cuts((0, *sorted(cuts), LAYERS), (recompute,) * LAYERS)
    x, number = torch.tensor([0]), torch.tensor([0])
    for rank in range(len(cuts) + 1):
        stage = stage_module(model, plan, rank, (5, 64))
        stage.batches = [dict(batch)]
        x = stage(x, None if rank == 0 else number)
        assert tuple(x.shape) == (stage.wire_out or (1,))
    x.backward()
    assert torch.equal(x, loss)
    for name, g in grads(model).items(): torch.testing.assert_close(g, whole[name], rtol=0, atol=1e-15)


def test_recomputation_draws_the_same_dropout():
    def once(flags):
        model = toy_vlm(**SMALL, dropout=0.2)
        stage = StageModule(split_vlm(model), None, None)
        apply_recompute(stage, flags)
        stage.batches = [collator_of(model)(random_samples([[2, 20], [0, 5]], model))]
        torch.manual_seed(1)
        loss = stage(torch.tensor([0]))
        loss.backward()
        return loss, list(grads(model).values())
    (kept, g), (some, h), (again, k) = once([False] * LAYERS), once([i % 2 == 0 for i in range(LAYERS)]), once([True] * LAYERS)
    assert torch.equal(kept, again) and torch.equal(kept, some) and all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(g, h, k))
    torch.manual_seed(2)                                                                  # and dropout is there at all
    model = toy_vlm(**SMALL, dropout=0.2)
    assert not torch.equal(kept, run_layers(split_vlm(model), collator_of(model)(random_samples([[2, 20], [0, 5]], model))))


def test_two_ranks_equal_one_process():
    "torch's engine on two processes in double precision: four cuts, two schedules, recomputation, a frozen tower; one micro-batch is nothing but text."
    found = pipeline_equality()
    assert set(found) == set(CASES)
    for name, e in found.items():
        assert e["loss"] < 1e-12 and e["gradients"] < 1e-12 and e["largest"] > 1e-3, name
        assert e["missing"] == 0 and e["compared"] > (20 if "frozen" in name else 50), name
    assert len({e["value"] for e in found.values()}) == 1
    assert found["cut in the tower, tower frozen"]["compared"] < found["cut in the tower"]["compared"]


@pytest.fixture(scope="module")
def run(): return pipeline_run(("uniform", "dp"), micro_batches=4, repeats=2, vision_layers=3, llm_layers=3, image=56, limits=(15, 300))


def test_stages_do_the_same_wherever_they_are_cut(run):
    "Real steps of two partitions: equal losses, every operation of every micro-batch timed."
    values = [x for losses in run.losses.values() for x in losses]
    assert max(values) - min(values) < 1e-5 and len(values) == 4
    for m in run.plans:
        assert run.forward_s[m].shape == (2, 4, 2) and (run.forward_s[m] > 0).all() and (run.backward_s[m] > 0).all()
        assert (run.wall_s[m] > 0.5 * run.stage_s(m).max(1)).all()
    assert run.plans["uniform"].cuts.tolist() != run.plans["dp"].cuts.tolist() or run.imbalance("uniform") < 1.3


def test_replay_is_between_its_bounds(run):
    for m in run.plans:
        for r in range(2):
            stage = run.stage_s(m)[r]
            assert stage.max() <= run.replayed(m, r).makespan_s <= stage.sum() + 1e-9
        assert run.predicted_stage_s(m).max() <= run.predicted(m).makespan_s
    assert {r.metric for r in run.records()} >= {"step, measured CPU", "step, predicted", "speed-up over uniform, measured CPU"}


def test_figures_by_hand():
    "Stage times that were measured twice as long as foretold; equal stages have a closed form."
    p = LayerProfile(tuple("abcd"), ("llm",) * 4, np.array([1.0, 1, 1, 3]), np.array([2.0, 2, 2, 6]), *[np.ones(4)] * 4, tokens=8, squares=64)
    plans = {m: PipelinePlan(p, np.array(c), np.zeros(4, bool), 3, m, "none") for m, c in {"uniform": (0, 2, 4), "dp": (0, 3, 4)}.items()}
    sizes = np.array([[1, 8, 64]] * 3)
    said = {m: plan.times_for(*sizes.T) for m, plan in plans.items()}
    made = PipelineRun(plans, p, sizes, "1f1b", {m: 2 * t.forward_s[None] for m, t in said.items()}, {m: 2 * t.backward_s[None] for m, t in said.items()}, {m: np.array([100.0]) for m in plans}, {m: [1.0] for m in plans})
    assert made.imbalance("uniform") == pytest.approx(4 / 3) and made.imbalance("dp") == pytest.approx(1.0)
    assert made.figures("dp")["error of the step's CPU time"][1] == [pytest.approx(-50.0)]
    assert made.predicted("dp").makespan_s == pytest.approx((3 + 2 - 1) * 9)                       # (M + P - 1)(f + b)
    assert made.speedup("uniform", "dp")["measured CPU"] == pytest.approx(made.speedup("uniform", "dp")["predicted"])


def test_sizes_of_micro_batches(): assert micro_sizes([np.array([[1, 30], [2, 10]]), np.array([[0, 5]])]).tolist() == [[3, 40, 1000], [1, 5, 25]]


def test_groups_of_a_toy_keep_their_limits():
    groups = toy_groups(6, (15, 480), seed=3)
    assert len(groups) == 6 and all(g[:, 0].sum() <= 15 and g[:, 1].sum() <= 480 and (g[:, 1] >= 16 * g[:, 0] + 2).all() for g in groups)
    with pytest.raises(ValueError, match="micro_batches=9"): toy_groups(9, (300, 9600))


def test_what_is_on_the_wire(model):
    layers = split_vlm(model)
    assert [wire_shape(layer, model, (5, 64)) for layer in layers[:-1]] == [(5, 17, 32)] * 3 + [(5, 4, 32)] + [(64, 32)] * 3
    with pytest.raises(ValueError, match="nothing can be sent behind a head"): wire_shape(layers[-1], model, (5, 64))


@pytest.mark.parametrize("call, text", [
    (lambda m: toy_vlm(image=100), "image=100"), (lambda m: split_vlm(m.model.language_model), "need transformers' InternVL"), (lambda m: stage_module(m, Cuts((0, 3, 3, LAYERS), (False,) * LAYERS), 0, (4, 64)), "made for another model"),
    (lambda m: stage_module(m, Cuts((0, 4, LAYERS), (False,) * 3), 0, (4, 64)), "recompute: 3 flags"), (lambda m: stage_module(m, Cuts((0, 4, LAYERS), (False,) * LAYERS), 2, (4, 64)), "the plan has 2 stages"),
    (lambda m: collator_of(m)([]), "samples: got none"), (lambda m: collator_of(m)([{"input_ids": [63, 1]}]), "1 image tokens for 0 tiles"), (lambda m: collator_of(m)([{"input_ids": [63] * 4 + [1], "pixel_values": torch.zeros(1, 3, 28, 28)}]), "tiles of shape"),
    (lambda m: collator_of(m)([{"input_ids": [1, 2], "labels": [1]}]), "labels of shape"), (lambda m: random_samples([[1, 5]], m), "leave 1 tokens"), (lambda m: pipeline_equality({"x": {"cut": (2, 3)}}), "3 stages for ranks=2")])
def test_bad_input_is_named(model, call, text):
    with pytest.raises(ValueError, match=text): call(model)


def test_a_group_over_the_limits_is_refused(model):
    stage = stage_module(model, Cuts((0, 2, LAYERS), (False,) * LAYERS), 0, (1, 64))
    stage.batches = [collator_of(model)(random_samples([[2, 20]], model))]
    with pytest.raises(ValueError, match="the wire holds 1"): stage(torch.tensor([0]))

