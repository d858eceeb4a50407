"Attention per document, labels, loss, Trainer in one process; Ulysses, FSDP2, pipeline and a killed Trainer on two ranks."
import copy
import json
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.balance import equality
from modeltc_lab.balance.cost import GroupSpec
from modeltc_lab.balance.packing import pack
from modeltc_lab.balance.parallel import (
    IGNORE,
    PLAN_FILE,
    BalancedTrainer,
    RankError,
    SequenceParallel,
    check_attention,
    checkpoint_layers,
    count_loss_tokens,
    document_bounds,
    exchange,
    global_token_loss,
    normalised_loss,
    register_attention,
    run_ranks,
    shift_labels,
    step_tokens,
    token_losses,
    ulysses_attention,
    varlen_forward,
)
from modeltc_lab.balance.schedule import PackedCollator, document_mask, schedule
from modeltc_lab.core.models import random_llama

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def rows_of(lengths, seed=0, vocab=61):
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(0, vocab, n).tolist()} for n in lengths]


def tiny(**options):
    return random_llama(layers=2, hidden=32, heads=4, kv_heads=2, mlp=48, vocab=61, **options)


# attention

@settings(deadline=None, max_examples=25)
@given(LENGTHS, st.sampled_from([(4, 4), (4, 2), (4, 1)]), st.integers(0, 99))
def test_attention_is_the_dense_one_with_a_document_mask_gradients_too(lengths, heads, seed):
    rng, t = torch.Generator().manual_seed(seed), sum(lengths)
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    q, k, v = (torch.randn(t, h, 4, generator=rng, dtype=torch.float64, requires_grad=True) for h in (heads[0], heads[1], heads[1]))
    weight = torch.randn(t, heads[0], 4, generator=rng, dtype=torch.float64)
    wide = lambda x: x.repeat_interleave(heads[0] // x.shape[1], 1).transpose(0, 1)[None]
    dense = F.scaled_dot_product_attention(wide(q), wide(k), wide(v), attn_mask=document_mask(cu))[0].transpose(0, 1)
    ours = ulysses_attention(q, k, v, cu)
    assert torch.allclose(ours, dense, atol=1e-13)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), (q, k, v)), torch.autograd.grad((dense * weight).sum(), (q, k, v))): assert torch.allclose(a, b, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.lists(LENGTHS, min_size=1, max_size=3))
def test_bounds_come_back_from_restarting_positions(batch):
    width = max(map(sum, batch))
    batch = [[*b, *([1] * (width - sum(b)))] for b in batch]
    positions = torch.tensor([np.concatenate([np.arange(n) for n in b]).tolist() for b in batch])
    assert document_bounds(positions, len(batch)).tolist() == [0, *np.cumsum([n for b in batch for n in b])]


def test_a_model_of_transformers_agrees_with_eager_attention():
    assert check_attention(tiny(), [r["input_ids"] for r in rows_of((5, 1, 9))]) < 1e-5
    model = tiny()
    model.set_attn_implementation(register_attention())
    ids = torch.randint(0, 61, (3, 7), generator=torch.Generator().manual_seed(0))                 # rows of a batch are documents
    with torch.no_grad(): together, alone = model(input_ids=ids, use_cache=False).logits, [model(input_ids=i[None], use_cache=False).logits[0] for i in ids]
    assert torch.allclose(together, torch.stack(alone), atol=1e-5)


@pytest.mark.parametrize("more, words", [
    (dict(attention_mask=torch.zeros(1, 1, 4, 4)), "attention_mask"), (dict(dropout=0.1), "dropout"), (dict(softcap=30.0), "softcap"), (dict(sequence_group=object()), "cu_seq_lens_q"),
    (dict(sliding_window=2), "sliding_window=2 is shorter"), (dict(position_ids=torch.zeros(3, 1, 4, dtype=torch.long)), "position_ids of shape")])
def test_what_attention_cannot_do_it_refuses(more, words):
    x = torch.zeros(1, 2, 4, 8)
    with pytest.raises(ValueError, match=words): varlen_forward(torch.nn.Module(), x, x, x, **more)
    with pytest.raises(ValueError, match="a cache"): varlen_forward(torch.nn.Module(), x, torch.cat([x, x], 2), torch.cat([x, x], 2))


def test_padding_in_a_batch_is_refused_and_a_mask_of_ones_is_not():
    model = tiny()
    model.set_attn_implementation(register_attention())
    ids, mask = torch.zeros(2, 5, dtype=torch.long), torch.ones(2, 5, dtype=torch.long)
    model(input_ids=ids, attention_mask=mask, use_cache=False)
    mask[0, 0] = 0
    with pytest.raises(ValueError, match="without padding"): model(input_ids=ids, attention_mask=mask, use_cache=False)


def test_bounds_are_not_remembered_for_positions_that_changed():
    model = tiny()
    model.set_attn_implementation(register_attention())
    ids, positions = torch.arange(6)[None], torch.tensor([[0, 1, 2, 0, 1, 2]])
    with torch.no_grad():
        first = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        positions.copy_(torch.tensor([[0, 1, 0, 1, 2, 3]]))
        assert not torch.equal(first, model(input_ids=ids, position_ids=positions, use_cache=False).logits)
        assert torch.equal(model(input_ids=ids, position_ids=positions, use_cache=False).logits, model(input_ids=ids, position_ids=positions.clone(), use_cache=False).logits)


def test_nothing_leaks_between_documents():
    model, rows = equality.exact_llama(layers=2), equality.documents()
    for i in range(len(rows)):
        found = equality.leak(model, rows, i)
        assert found["others"] == 0 < found["itself"]


# labels and loss

@settings(deadline=None, max_examples=50)
@given(LENGTHS, st.integers(0, 99))
def test_targets_are_the_next_token_of_the_same_document(lengths, seed):
    rng = np.random.default_rng(seed)
    rows = [{"input_ids": r["input_ids"], "labels": np.where(rng.random(len(r["input_ids"])) < 0.3, IGNORE, r["input_ids"]).tolist()} for r in rows_of(lengths, seed)]
    expected = [t for r in rows for t in [*r["labels"][1:], IGNORE]]
    batch = PackedCollator()(rows)
    assert shift_labels(batch["labels"], batch["cu_seq_lens_q"])[0].tolist() == expected
    plain = torch.tensor([[t for r in rows for t in r["labels"]]])                                 # first tokens not yet hidden
    before = plain.clone()
    assert shift_labels(plain, batch["cu_seq_lens_q"])[0].tolist() == expected and torch.equal(plain, before)
    assert count_loss_tokens(plain, batch["cu_seq_lens_q"]) == sum(t != IGNORE for t in expected) == step_tokens([batch])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=5), st.integers(0, 99))
def test_the_global_loss_does_not_depend_on_how_tokens_are_divided(ranks, seed):
    "Ranks of documents: the mean over ranks is the mean over all predictions; of one rank, token and sample means are what they say."
    rng = torch.Generator().manual_seed(seed)
    batches = [PackedCollator()(rows_of(r, seed)) for r in ranks]
    logits = [torch.randn(*b["labels"].shape, 61, generator=rng, dtype=torch.float64) for b in batches]
    each = [F.cross_entropy(l[0, a:e - 1], b["labels"][0, a + 1:e], reduction="none") for l, b in zip(logits, batches) for a, e in zip(b["cu_seq_lens_q"].tolist(), b["cu_seq_lens_q"][1:].tolist()) if e - a > 1]
    tokens = step_tokens(batches)
    parts = [global_token_loss(l, b["labels"], tokens, len(ranks), b["cu_seq_lens_q"]) for l, b in zip(logits, batches)]
    assert tokens == sum(map(len, each))
    assert abs(sum(parts) / len(ranks) - (torch.cat(each).mean() if each else 0)) < 1e-12
    targets, cu = shift_labels(batches[0]["labels"], batches[0]["cu_seq_lens_q"]), batches[0]["cu_seq_lens_q"]
    first = each[:sum(n > 1 for n in ranks[0])]
    hand = {"token_mean": torch.cat(first).mean(), "sample_mean": torch.stack([e.mean() for e in first]).mean(), "sum": torch.cat(first).sum()} if first else dict.fromkeys(("token_mean", "sample_mean", "sum"), torch.zeros(()))
    for kind, value in hand.items(): assert abs(normalised_loss(logits[0], targets, kind, cu_seqlens=cu) - value) < 1e-12


def test_a_step_without_a_prediction_is_zero_and_so_is_its_gradient():
    model = tiny().train()
    model.set_attn_implementation(register_attention())
    batch = SequenceParallel((1,)).shard(PackedCollator()([]))
    targets = batch.pop("shift_labels")
    assert step_tokens([{"shift_labels": targets}]) == 0
    loss = global_token_loss(model(**batch, use_cache=False).logits, targets, 0, world=4, shifted=True)
    loss.backward()
    assert loss.item() == 0 and all(p.grad is not None and p.grad.abs().max() == 0 for p in model.parameters())
    assert global_token_loss(torch.randn(1, 3, 5), torch.full((1, 3), IGNORE), torch.tensor(0), shifted=True).item() == 0


def test_half_precision_logits_are_summed_in_single():
    logits = torch.full((1, 4, 8), 3.0, dtype=torch.bfloat16)
    assert token_losses(logits, torch.zeros(1, 4, dtype=torch.long)).dtype == torch.float32
    with pytest.raises(ValueError, match="kind='mean'"): normalised_loss(logits, torch.zeros(1, 4, dtype=torch.long), "mean")
    with pytest.raises(ValueError, match="cu_seqlens"): normalised_loss(logits, torch.zeros(1, 4, dtype=torch.long), "sample_mean")


# degrees

class Pieces(SequenceParallel):
    "A rank of a group that is not there: what it would be given."

    def __init__(self, degree, place): self.degree, self._at, self.world = degree, place, degree

    @property
    def group(self): return "the group"

    @property
    def place(self): return self._at


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(1, 9), max_size=6), st.integers(2, 5))
def test_pieces_make_up_the_pack_and_padding_is_a_document_of_its_own(lengths, sp):
    batch = PackedCollator()(rows_of(lengths))
    pieces, t = [Pieces(sp, r).shard(batch, pad_token_id=9) for r in range(sp)], batch["input_ids"].shape[1]
    joined = {n: torch.cat([p[n] for p in pieces], 1)[0] for n in ("input_ids", "position_ids", "shift_labels")}
    pad = len(joined["input_ids"]) - t
    assert {p["input_ids"].shape for p in pieces} == {(1, -(-t // sp))} and 0 <= pad < sp
    assert joined["input_ids"][:t].tolist() == batch["input_ids"][0].tolist() and joined["position_ids"].tolist() == [*batch["position_ids"][0].tolist(), *range(pad)]
    assert joined["shift_labels"].tolist() == [*shift_labels(batch["labels"], batch["cu_seq_lens_q"])[0].tolist(), *[IGNORE] * pad]
    bounds = [*batch["cu_seq_lens_q"].tolist(), *([t + pad] if pad else [])]
    assert all(p["cu_seq_lens_q"].tolist() == bounds and p["max_length_q"] == max(np.diff(bounds)) and p["sequence_group"] == "the group" for p in pieces)


@pytest.mark.parametrize("make, words", [
    (lambda: SequenceParallel((1, 2)), "sp=2: more than world=1"), (lambda: SequenceParallel((1,), world=8), "world=8: the plan is for 8 ranks, 1 run"),
    (lambda: SequenceParallel(()), "degrees="), (lambda: SequenceParallel((0,)), "degrees="), (lambda: SequenceParallel((1,)).use(2), r"sp=2: need one of \(1,\)"),
    (lambda: exchange(torch.zeros(1), None, "mpi"), "impl='mpi'"), (lambda: Pieces(2, 0).shard({**PackedCollator()(rows_of((4,))), "pixel_values": torch.zeros(1)}), "pixel_values")])
def test_degrees_that_cannot_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words): make()


def test_layers_are_recomputed_as_told_and_nothing_changes():
    model = tiny().train()
    ids, grads, seen = torch.arange(9)[None], [], []
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: seen.append(0))
    for count in (0, 1, 2, 0):
        checkpoint_layers(model, count)
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append(model.model.embed_tokens.weight.grad.clone())
    handle.remove()
    assert len(seen) == 1 + 2 + 2 + 1 and all(torch.equal(g, grads[0]) for g in grads)
    with pytest.raises(ValueError, match="count=3: the model has 2 layers"): checkpoint_layers(model, 3)
    with pytest.raises(ValueError, match="GradientCheckpointingLayer"): checkpoint_layers(torch.nn.Linear(1, 1), 0)


# Trainer

def a_trainer(folder, plan, rows, model=None, **options):
    from transformers import Trainer, TrainingArguments

    class Balanced(BalancedTrainer, Trainer): pass
    settings = dict(use_cpu=True, gradient_accumulation_steps=plan.accumulate, num_train_epochs=2, learning_rate=0.1, lr_scheduler_type="constant", optim="sgd", max_grad_norm=0.0, save_steps=2, logging_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False)
    return Balanced(model=tiny() if model is None else model, args=TrainingArguments(str(folder), **{**settings, **options}), train_dataset=rows, schedule=plan)


def test_trainer_is_the_loop_it_stands_for_over_two_epochs_and_resumes(tmp_path):
    lengths = np.random.default_rng(0).integers(2, 20, 23)
    rows, plan = rows_of(lengths), schedule(pack(lengths, 32), 1, GroupSpec(32, gc_layers=1), accumulate=2, balance="random")
    model = tiny().train()
    model.set_attn_implementation(register_attention())
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(2):
        order = plan.epoch(epoch)
        for s in range(plan.steps):
            batches = [PackedCollator()([rows[i] for i in order.item_ids(s, m, 0)]) for m in range(2)]
            for b in batches: global_token_loss(model(**{n: v for n, v in b.items() if n != "labels"}, use_cache=False).logits, b["labels"], step_tokens(batches), cu_seqlens=b["cu_seq_lens_q"]).backward()
            sgd.step()
            sgd.zero_grad()
    assert plan.steps > 2
    trainer = a_trainer(tmp_path, plan, rows)
    trainer.train()
    assert all(torch.equal(a, b) for a, b in zip(trainer.model.parameters(), model.parameters()))
    at = (plan.steps + 1) // 2 * 2                                                                 # a checkpoint of the second epoch, or its beginning
    again = a_trainer(tmp_path, plan, rows)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{at}"))
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), model.parameters()))
    other = schedule(pack(lengths, 32), 1, accumulate=2, balance="random", seed=1)
    with pytest.raises(ValueError, match="resume with the plan that was saved"): a_trainer(tmp_path, other, rows).train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / f"checkpoint-{at}" / PLAN_FILE).read_text())["fingerprint"] == plan.fingerprint()


def test_trainer_takes_datasets_cut_documents_and_evaluates(tmp_path):
    from datasets import Dataset
    lengths = np.array([5, 40, 9, 3])
    rows = Dataset.from_list([{**r, "text": "is left alone"} for r in rows_of(lengths)])
    plan = schedule(pack(lengths, 16, oversize="split"), 1, accumulate=1)
    trainer = a_trainer(tmp_path, plan, rows, num_train_epochs=1)
    trainer.eval_dataset = Dataset.from_list(rows_of((7, 8)))
    trainer.train()
    assert trainer.state.global_step == plan.steps and np.isfinite(trainer.evaluate()["eval_loss"])


@pytest.mark.parametrize("change, options, words", [
    (dict(world=2), {}, "made for world=2, 1 ranks run"), (dict(), dict(gradient_accumulation_steps=4), "gradient_accumulation_steps=4: the schedule has accumulate=1"), (dict(), dict(gradient_checkpointing=True), "gradient_checkpointing=True")])
def test_trainer_refuses_a_plan_that_does_not_fit(tmp_path, change, options, words):
    rows, plan = rows_of((5, 6, 7)), schedule(pack([5, 6, 7], 16), **{"world": 1, **change})
    with pytest.raises(ValueError, match=words): a_trainer(tmp_path, plan, rows, **options)


# two ranks

@pytest.fixture(scope="module")
def answers():
    "Two ranks that divide a step in every way, then go on with a Trainer run in which a rank was killed: first the error of that run."
    _, plan = equality.trainer_schedule()
    with TemporaryDirectory() as folder:
        with pytest.raises(RankError) as error: run_ranks("modeltc_lab.balance.equality", {"train": {"folder": folder, "kill_at": plan.steps + 1}})
        return error.value, run_ranks("modeltc_lab.balance.equality", {"ways": {"lengths": [5, 9, 1, 3, 7, 4], "heads": 4, "kv_heads": 1, "seed": 5}, "train": {"folder": folder, "resume": True}})


def test_every_way_of_dividing_a_step_gives_the_same_loss_and_gradients(answers):
    found = equality.together(answers[1])
    exact = {n: d for n, d in found["ways"].items() if not n.startswith("biased")}
    assert {"sequence parallel", "FSDP2", "pipeline", "degree 1, 2, 1", "data parallel, a rank without documents", "data parallel, two micro-batches"} <= set(exact)
    assert max(max(d["loss"], d["gradient"]) for d in exact.values()) < 1e-12 and all(d["largest"] > 1e-2 for d in exact.values())
    assert all(d["parameters"] == [found["parameters"]] * 2 or (n.startswith("pipeline") and sum(d["parameters"]) == found["parameters"]) for n, d in exact.items())
    assert min(d["gradient"] for n, d in found["ways"].items() if n.startswith("biased")) > 1e-3
    assert found["leaks"] == 0 < found["changed"]


def test_a_trainer_that_loses_a_rank_resumes_with_exactly_the_documents_that_were_left(answers):
    (error, ends), (_, plan) = answers, equality.trainer_schedule()
    assert (error.rank, error.code) == (1, -9) and "SIGKILL" in str(error)
    assert {g.sp for g in plan.groups} == {1, 2} and (plan.packs < 0).any()
    first = (plan.steps + 1) // 2 * 2
    assert [e["ids"] for e in ends] == [equality.expected_ids(plan, r, 2, first) for r in range(2)]
    assert max(e["parameter"] for e in ends) < 1e-12 < 1e-2 < ends[0]["largest"]


def test_ranks_with_different_plans_are_named_instead_of_waited_for(tmp_path):
    (tmp_path / "a_worker.py").write_text("from modeltc_lab.balance.parallel import SequenceParallel, init, report\nme = init()\nSequenceParallel((1, 2), fingerprint=f'seed {me.rank}')\nreport({})")
    with pytest.raises(RankError, match="rank 0 and rank 1 have different ones"): run_ranks("a_worker", {}, paths=[tmp_path])


def test_equality_needs_documents_to_divide():
    with pytest.raises(ValueError, match="at least 5 documents"): equality.two_ranks(lengths=(3, 4))
    with pytest.raises(ValueError, match="first=2, last=9"): equality.LlamaStage(tiny(), 2, 9)
    model = tiny()
    truth = (1.0, {n: torch.zeros_like(p) for n, p in model.named_parameters()})
    with pytest.raises(ValueError, match="does not know"): equality.distance((1.0, {"other": torch.zeros(1)}), truth)
    moved = {n: t + 1e-3 for n, t in copy.deepcopy(truth[1]).items()}
    assert equality.distance((1.5, moved), truth)["loss"] == 0.5 and abs(equality.distance((1.0, moved), truth)["gradient"] - 1e-3) < 1e-9
