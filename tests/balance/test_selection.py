import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.balance.cost import MODELS, CostModel, GroupSpec
from modeltc_lab.balance.selection import (
    PAPER_STRATEGIES,
    AnalyticProfiler,
    Measurement,
    TorchProfiler,
    _rank_attention,
    degrees_of,
    documents_of,
    find_best,
    layer_bytes,
    live_peak,
    min_checkpoint_layers,
    paper_iteration,
    profile_groups,
    select_groups,
    strategies,
)

H100 = AnalyticProfiler("llama3.1-8b", "h100", world=32)


@dataclass
class Made:
    "A profiler whose numbers are made up: memory and time grow with tokens a rank, checkpointing frees memory and costs time."

    keep: float = 10.0         # bytes a token and layer
    kept: float = 1.0          # of it when checkpointed
    peak: float = 30.0         # bytes a token besides
    bend: float = 0.0          # how far free memory is from a straight line
    fixed_s: float = 1e-3
    square: float = 1e-6
    share_s: float = 1e-4      # a rank more
    layers: int = 12
    heads: int = 8
    world: int = 16
    memory_bytes: float = 1e5
    dies_above: float = math.inf  # used bytes at which a step does not run at all
    asked: list = field(default_factory=list)

    def free(self, length, sp, gc_layers):
        t = math.ceil(length / sp)
        used = t * ((self.layers - gc_layers) * self.keep + gc_layers * self.kept + self.peak) + self.bend * t * gc_layers * (self.layers - gc_layers)
        self.asked.append((length, sp, gc_layers))
        return -math.inf if used > self.dies_above else self.memory_bytes - used

    def measure(self, length, sp, gc_layers):
        free = self.free(length, sp, gc_layers)
        return Measurement(math.inf if free == -math.inf else self.fixed_s + (1e-5 * length + self.square * length) / sp * (1 + gc_layers / self.layers / 3) + self.share_s * (sp - 1), free)


made = st.builds(Made, keep=st.floats(1.5, 30), kept=st.floats(0, 1.4), peak=st.floats(0, 200), bend=st.floats(-.05, .05), fixed_s=st.floats(0, 1), square=st.floats(0, 1e-4), share_s=st.floats(0, .1),
                 layers=st.integers(1, 15), memory_bytes=st.floats(1e3, 1e6))


def brute_layers(p, length, sp, margin):
    return next((c for c in range(p.layers + 1) if p.free(length, sp, c) >= margin * p.memory_bytes), None)


def brute_best(p, length, degrees, margin):
    "Every degree and every number of layers."
    found = [(p.measure(length, sp, c).seconds * sp / length, sp, c) for sp in degrees if sp <= length for c in range(p.layers + 1) if p.free(length, sp, c) >= margin * p.memory_bytes]
    return min(found, default=None)


@given(made, st.integers(1, 5000), st.sampled_from([1, 2, 4]), st.sampled_from([0.0, .05, .3]))
@settings(max_examples=150, deadline=None)
def test_fewest_layers(p, length, sp, margin):
    "As by trying every number, also where memory is no straight line; what is chosen fits."
    found = min_checkpoint_layers(p, length, sp, margin)
    assert found == brute_layers(p, length, sp, margin)


@given(made, st.integers(1, 5000), st.sampled_from([0.0, .05]))
@settings(max_examples=100, deadline=None)
def test_best_strategy(p, length, margin):
    "As by trying every degree and number of layers."
    best, brute = find_best(p, length, (1, 2, 4, 8), margin), brute_best(p, length, (1, 2, 4, 8), margin)
    assert (best is None) == (brute is None)
    if best: assert best.token_s == pytest.approx(brute[0], rel=1e-12) and (best.sp, best.gc_layers) == brute[1:]


@given(made, st.lists(st.integers(64, 5000), min_size=1, max_size=5, unique=True), st.sampled_from([0.0, .02, .2]))
@settings(max_examples=100, deadline=None)
def test_groups_by_brute_force(p, lengths, tolerance):
    "Algorithm 1 from a search over every length, degree and number of layers."
    brute = {l: brute_best(p, l, (1, 2, 4, 8), .05) for l in lengths}
    if brute[max(lengths)] is None:
        with pytest.raises(ValueError, match="does not fit with any SP degree"): select_groups(p, lengths, (1, 2, 4, 8))
        return
    fastest = min(b[0] for b in brute.values() if b)
    l_best, l_max = max(l for l, b in brute.items() if b and b[0] <= fastest * (1 + tolerance)), max(lengths)
    expected = {l_best, l_max}
    for l, source in ((l_best // brute[l_best][1], "best"), (l_max // brute[l_max][1], "max")):
        if (source == "best" or l >= l_best) and (l in expected or brute_layers(p, l, 1, .05) is not None): expected.add(l)
    groups = select_groups(p, lengths, (1, 2, 4, 8), tolerance=tolerance)
    assert [g.length for g in groups] == sorted(expected)
    for g in groups: assert p.free(g.length, g.sp, g.gc_layers) >= .05 * p.memory_bytes
    for g in groups:
        if g.length not in (l_best, l_max): assert g.sp == 1


def test_few_measurements_suffice():
    "A straight line needs five: both ends, the number found, one fewer."
    p = Made(layers=64, memory_bytes=1e6)
    min_checkpoint_layers(p, 2000, 1)
    assert len(p.asked) <= 5


def test_a_step_that_does_not_run():
    "Out of memory at the low end: the search starts where it does run."
    p = Made(dies_above=1.1e5)
    for length in (900, 1500, 2000, 2400): assert min_checkpoint_layers(p, length, 1) == brute_layers(p, length, 1, .05)
    assert min_checkpoint_layers(Made(dies_above=5e4, memory_bytes=6e4), 1000, 1, 0.0) == brute_layers(Made(dies_above=5e4, memory_bytes=6e4), 1000, 1, 0.0)


def test_checkpointing_that_frees_nothing_is_an_error():
    for kept in (10.0, 12.0):
        with pytest.raises(ValueError, match=r"length=2000, sp=1: free memory went from .* checkpointing must free memory"): min_checkpoint_layers(Made(keep=10.0, kept=kept), 2000, 1)
    assert min_checkpoint_layers(Made(keep=10.0, kept=12.0), 10, 1) == 0  # nothing has to be checkpointed, nothing is asked of it


def test_the_papers_choice():
    "Llama-3.1-8B on 32 H100: groups [16K, 128K], degrees [1, 8], layers within one of the paper's, times within 5 %."
    groups = select_groups(H100)
    assert [(g.length, g.sp) for g in groups] == [(16384, 1), (131072, 8)]
    whole = replace(H100, document=None)
    for length, sp, gc, seconds in PAPER_STRATEGIES:
        assert abs(min_checkpoint_layers(H100, length, sp) - gc) <= 1
        if seconds: assert paper_iteration(whole, length, sp, gc) == pytest.approx(seconds, rel=.05)


def test_selection_says_what_it_tried():
    chosen = profile_groups(H100, max_length=65536)
    assert chosen.longest.length == 65536 and {s.length for s in chosen.profiled} == {8192, 16384, 32768, 65536} and chosen.infeasible == ()
    tight = profile_groups(H100, (16384, 131072, 40_000), (8,))
    assert tight.infeasible == () and [g.length for g in tight.groups][-1] == 131072
    only = profile_groups(H100, (32768, 16384), (1,), max_length=16384)  # candidates above the longest document are left out
    assert [g.length for g in only.groups] == [16384]
    assert profile_groups(H100, (20_000, 30_000, 32_768), (1, 2)).infeasible == ()


def test_memory_is_divided_by_the_ranks():
    for sp in (1, 2, 4, 8):
        a, b = H100.used_bytes(8192 * sp, sp, 7), H100.used_bytes(8192, 1, 7)
        assert a == pytest.approx(b)
    assert layer_bytes(H100.shape, 16) - layer_bytes(H100.shape, 8) == 2 * (8 * 128 * 2 + 8 * 128)  # eight more copies of K and V, and of the rotated K
    assert H100.used_bytes(8192, 1, 8)["activations"] == pytest.approx(24 / 32 * H100.used_bytes(8192, 1, 0)["activations"])
    assert AnalyticProfiler("llama3.1-8b", world=64).used_bytes(1, 1, 0)["state"] == pytest.approx(16 * MODELS["llama3.1-8b"].weights / 64)


@given(st.integers(1, 10_000), st.none() | st.integers(1, 12_000))
@settings(max_examples=50, deadline=None)
def test_profiled_documents(length, document):
    parts = documents_of(length, document)
    assert sum(parts) == length and len(set(parts[:-1])) <= 1 and max(parts) <= (document or length)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: find_best(H100, 8192, (3,)), "world=32: sp=3"), (lambda: find_best(AnalyticProfiler("qwen2.5-0.5b", world=8), 8192, (4,)), "heads=14: sp=4"), (lambda: find_best(H100, 8192, (64,)), "more ranks share a pack than there are"),
    (lambda: strategies(H100, 8192, ()), r"sp_degrees=\(\)"), (lambda: select_groups(H100, ()), r"lengths=\(\)"), (lambda: select_groups(H100, (8192,), memory_margin=1.0), "memory_margin=1.0"), (lambda: select_groups(H100, (8192,), tolerance=-1), "tolerance=-1"),
    (lambda: select_groups(H100, (0,)), "length=0"), (lambda: select_groups(AnalyticProfiler("llama3.1-70b", world=8)), "max_length=131072: does not fit .* no candidate does"), (lambda: select_groups(H100, sp_degrees=(1,)), "16384 is the longest that does"),
    (lambda: AnalyticProfiler("llama3.1-8b", world=0), "world=0"), (lambda: AnalyticProfiler("llama3.1-8b", document=0), "document=0"), (lambda: AnalyticProfiler("no model"), "model='no model'")])
def test_errors_name_what_is_wrong(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_degrees_divide_ranks_and_heads():
    assert degrees_of(H100) == (1, 2, 4, 8, 16, 32) and degrees_of(AnalyticProfiler("qwen2.5-32b", world=24)) == (1, 2, 4, 8) and degrees_of(AnalyticProfiler("qwen2.5-0.5b", world=8)) == (1, 2)
    assert degrees_of(H100, (8, 1, 8)) == (1, 8)


@pytest.fixture(scope="module")
def llama():
    "A small Llama in double precision."
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, vocab_size=60)).double()


def gradients(model, run):
    "Gradients a step leaves behind, caught before it clears them."
    import torch
    caught = {}
    hooks = [p.register_post_accumulate_grad_hook(lambda p, n=n: caught.__setitem__(n, p.grad.clone())) for n, p in model.named_parameters()]
    run()
    for h in hooks: h.remove()
    return torch.cat([caught[n].flatten() for n in sorted(caught)])


def test_a_profiled_step_is_a_training_step(llama):
    "Gradients of the packed step are those of the documents one by one, and checkpointing changes none of them."
    import torch
    import torch.nn.functional as F
    profiler = TorchProfiler(llama, memory_bytes=1e9)
    documents = [7, 1, 20]
    own = gradients(llama, profiler.step(documents, 1, 0))
    for gc in (1, 3): assert torch.equal(gradients(llama, profiler.step(documents, 1, gc)), own)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 60, (1, 28)))
    mask = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool).tril() for n in documents])[None, None]
    def eager():
        llama.config._attn_implementation = "eager"
        logits = llama(input_ids=ids, position_ids=torch.cat([torch.arange(n) for n in documents])[None], attention_mask=torch.zeros(1, 1, 28, 28, dtype=torch.float64).masked_fill(~mask, -torch.inf), use_cache=False).logits
        F.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="sum").backward()
        for p in llama.parameters(): p.grad.zero_()
    assert (gradients(llama, eager) - own).abs().max() < 1e-6 * own.abs().max()


def test_one_rank_of_a_group_does_its_share(llama):
    "Operations of a rank's step: half of the tokens in every layer, all of them in attention with half of the heads; so half of everything."
    from torch.utils.flop_counter import FlopCounterMode
    profiler, count = TorchProfiler(llama, world=4, memory_bytes=1e9), {}
    for sp in (1, 2, 4):
        run = profiler.step([64, 64], sp, 0)
        with FlopCounterMode(display=False) as c: run()
        count[sp] = c.get_total_flops()
    assert count[1] == 2 * count[2] == 4 * count[4]


def test_rank_attention_keeps_documents_apart():
    import torch
    q, k, v = (torch.randn(1, h, 10, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(h)) for h in (4, 2, 2))
    out, _ = _rank_attention(None, q, k, v, None, packed_documents=(3, 7))
    v2 = v.clone()
    v2[:, :, :3] += 1
    other, _ = _rank_attention(None, q, k, v2, None, packed_documents=(3, 7))
    assert torch.equal(out[:, 3:], other[:, 3:]) and not torch.equal(out[:, :3], other[:, :3])
    shared, _ = _rank_attention(None, q, k, v, None, packed_documents=(20, 20), sharers=4)  # 4 ranks, 2 KV heads: copies
    assert shared.shape == (1, 10, 4, 8)


def test_live_bytes():
    "Counted by hand: views cost nothing, what is dropped no longer counts, what is known never does."
    import torch
    known = torch.zeros(100)
    def work():
        a = torch.zeros(1000)          # 4000
        b = a.view(10, 100) + 1        # 8000
        del a
        c = b * 2                      # 8000: a is gone
        d = known[:50]                 # a view of what is known
        torch.cat([c, b])              # 16000
        assert d.shape == (50,)
    assert live_peak(work, [known]) == 16_000
    assert live_peak(lambda: None) == 0


def test_checkpointing_frees_memory(llama):
    profiler = TorchProfiler(llama, memory_bytes=1e9, document=16)
    free = [profiler.free(256, 1, c) for c in range(4)]
    assert free == sorted(free) and free[0] < free[3]
    assert min_checkpoint_layers(replace_memory(profiler, 1e9 - free[1] + 100), 256, 1, 0.0) == 1


def replace_memory(profiler, memory_bytes):
    "The same model where memory is as much as one checkpointed layer asks for."
    return TorchProfiler(profiler.model, memory_bytes=memory_bytes, document=profiler.document)


def test_a_profile_is_measured_once_and_feeds_the_cost_model(llama):
    profiler = TorchProfiler(llama, world=2, memory_bytes=1e9, document=16, repeats=1, warmup=0, hardware="h100")
    first = profiler.measure(64, 2, 1)
    assert profiler.measure(64, 2, 1) is first and len(profiler.records) == 1
    assert profiler.records[0] | {"seconds": 0} == {"tokens": 64, "squares": 4 * 256, "docs": 4, "sp": 2, "gc_layers": 1, "seconds": 0}
    assert first.seconds - profiler.records[0]["seconds"] == pytest.approx(float(CostModel.analytic(profiler.shape, "h100").exchange_seconds(64, 2, 1)))
    assert AnalyticProfiler(profiler.shape, cost=CostModel(2.0), world=1).measure(10, 1, 0).seconds == 20
    with pytest.raises(ValueError, match="memory_bytes=0"): TorchProfiler(llama)
    with pytest.raises(ValueError, match="repeats=0"): TorchProfiler(llama, memory_bytes=1.0, repeats=0)


def test_groups_are_plain():
    assert all(isinstance(g, GroupSpec) for g in select_groups(H100))
