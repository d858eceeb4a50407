"Varlen attention and its gradients against the reference, in the interpreter on CPU and on a GPU alike."

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from modeltc_kernels import varlen_attention as family
from modeltc_kernels.runtime import INTERPRETED
from modeltc_kernels.varlen_attention import (
    KV_BIG,
    KV_SMALL,
    MAX_GROUP,
    Q_BIG,
    Q_SMALL,
    SHORT,
    TAIL,
    Plan,
    check_bounds,
    prepare,
    rows,
    tile_sizes,
    varlen_attention,
    varlen_attention_bwd,
    varlen_attention_bwd_ref,
    varlen_attention_ref,
)

# fp32: order of summation only. fp16: inputs of the second products and the results are rounded to 11 bits. bf16: the same with 8 bits,
# and the interpreter's rounding drops the tail. Gradients sum over as many as 300 terms of size one.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@pytest.fixture
def low(monkeypatch): monkeypatch.setattr(family, "SHORT", 70)  # large tiles with fewer tokens


def bounds(lengths): return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0).tolist()], dtype=torch.int32)


def case(device, lengths, h=2, hk=1, e=32, dtype=torch.float32, padding=0, seed=0):
    "A pack of documents, and gradients to send back; what stands behind the last document is NaN."
    g, cu = torch.Generator().manual_seed(seed), bounds(lengths)
    t = int(cu[-1]) + padding
    q, k, v, grad = (torch.randn(t, n, e, generator=g) for n in (h, hk, hk, h))
    for x in (q, k, v, grad): x[int(cu[-1]):] = float("nan")
    return [x.to(device=device, dtype=dtype) for x in (q, k, v, grad)] + [cu.to(device)]


def both(args, impl="triton", **options):
    "Outputs, lse and gradients of one implementation."
    q, k, v, grad, cu = args
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = varlen_attention(*inputs, cu, impl=impl, return_lse=True, **options)
    return [out.detach(), lse.detach(), *torch.autograd.grad(out, inputs, grad)]


def check(args, tolerance=None, **options):
    "Kernels against the fp64 reference on the same (rounded) inputs."
    q, k, v, grad, cu = args
    found, end = both(args, **options), int(cu[-1])
    options = {k: v for k, v in options.items() if k in ("causal", "scale")}
    out, lse = varlen_attention_ref(*(x[:end].double() for x in (q, k, v)), cu, **options)
    expected = [out, lse, *varlen_attention_bwd_ref(*(x[:end].double() for x in (grad, q, k, v)), out, lse, cu, **options)]
    tolerance = tolerance or TOLERANCE[q.dtype]
    for name, mine, ref in zip(("out", "lse", "dq", "dk", "dv"), found, expected):
        live, rest = (mine[:, :end], mine[:, end:]) if name == "lse" else (mine[:end], mine[end:])
        torch.testing.assert_close(live.double(), ref, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")
        assert (rest == (-math.inf if name == "lse" else 0)).all(), name
    return found


def bounded(cu, tokens, h, hk, dtype, causal=True):
    "A plan as a device makes it: nobody on the host knows how many tiles there are."
    sizes = tile_sizes(dtype, h // hk)
    return Plan(family._work(cu, tokens, sizes, causal), tuple(tokens // s + len(cu) for s in sizes), False, tokens, sizes, causal)


# --- the references ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("causal", [True, False])
def test_reference_against_one_loop_per_head(causal):
    q, k, v, _, cu = case("cpu", [4, 0, 3], h=4, hk=2, e=5, dtype=torch.float64)
    out, lse = varlen_attention_ref(q, k, v, cu, causal)
    for start, stop in ((0, 4), (4, 7)):
        for t in range(start, stop):
            for head in range(4):
                score = [float(q[t, head] @ k[s, head // 2]) / math.sqrt(5) for s in range(start, t + 1 if causal else stop)]
                weight = [math.exp(s) for s in score]
                torch.testing.assert_close(out[t, head], sum(w * v[start + i, head // 2] for i, w in enumerate(weight)) / sum(weight))
                assert math.isclose(float(lse[head, t]), math.log(sum(weight)), rel_tol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_of_the_reference_are_those_of_autograd(causal):
    q, k, v, grad, cu = case("cpu", [6, 1, 9], h=4, hk=2, e=8, dtype=torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, lse = varlen_attention_ref(*inputs, cu, causal)
    grad_lse = torch.randn_like(lse)
    for mine, auto in zip(varlen_attention_bwd_ref(grad, q, k, v, out, lse, cu, causal, grad_lse=grad_lse), torch.autograd.grad((out, lse), inputs, (grad, grad_lse))):
        torch.testing.assert_close(mine, auto, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("h, hk", [(2, 2), (6, 2)])
def test_the_way_of_torch_is_exact_in_fp64(causal, h, hk):
    q, k, v, grad, cu = args = case("cpu", [5, 0, 12, 1], h, hk, 16, torch.float64)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    out, (ref, lse) = varlen_attention(*inputs, cu, causal=causal), varlen_attention_ref(q, k, v, cu, causal)
    torch.testing.assert_close(out, ref, rtol=1e-12, atol=1e-12)
    for mine, exact in zip(torch.autograd.grad(out, inputs, grad), varlen_attention_bwd_ref(grad, q, k, v, ref, lse, cu, causal)): torch.testing.assert_close(mine, exact, rtol=1e-12, atol=1e-12)
    with_lse = varlen_attention(q, k, v, cu, causal=causal, return_lse=True)
    assert torch.equal(with_lse[0], ref) and torch.equal(with_lse[1], lse) and len(both(args, impl="torch", causal=causal)) == 5


def test_auto_is_torch_on_cpu():
    q, k, v, _, cu = case("cpu", [9, 3], padding=2)
    out = varlen_attention(q, k, v, cu)
    assert torch.equal(out, varlen_attention(q, k, v, cu, impl="torch")) and torch.equal(out[12:], torch.zeros(2, 2, 32))


# --- the kernels ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("h, hk", [(2, 2), (4, 2), (7, 1), (MAX_GROUP, 1)], ids=["GQA 1", "GQA 2", "GQA 7", "GQA most"])
@pytest.mark.parametrize("causal", [True, False])
def test_groups(device, h, hk, causal): check(case(device, [15, 4], h, hk, dtype=torch.float16), causal=causal)


@pytest.mark.parametrize("e, dtype", [(64, torch.float32), (128, torch.bfloat16), (20, torch.bfloat16), (96, torch.float16), (1, torch.float32)], ids=str)
def test_head_sizes_and_types(device, e, dtype): check(case(device, [18, 5], e=e, dtype=dtype))


@pytest.mark.parametrize("lengths", [[1], [17, 1, 15], [0, 64, 0, 0], [65], [SHORT], [SHORT + 1]], ids=str)
def test_lengths(device, lengths): check(case(device, lengths, h=1, hk=1, dtype=torch.float16))


@pytest.mark.parametrize("lengths", [[69, 70], [127, 2], [129], [193]], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_large_and_small_tiles_meet(device, low, lengths, causal): check(case(device, lengths, h=1, hk=1, dtype=torch.float16), causal=causal)


def test_large_tiles_of_grouped_heads(device, low): check(case(device, [75, 20], h=4, hk=1, e=64, dtype=torch.bfloat16))


def test_padding_gives_zeros_and_is_not_read(device, low):
    found = check(case(device, [30, 70], padding=80, dtype=torch.float16))
    assert not any(x.isnan().any() for x in found)
    only = both(case(device, [], padding=3))
    assert all(torch.equal(x, torch.zeros_like(x)) for i, x in enumerate(only) if i != 1)


def test_no_tokens(device): assert [x.numel() for x in both(case(device, [0]))] == [0] * 5


def test_extreme_scores(device):
    "Scores far beyond what exp can hold (their own rounding, 2400 x 6e-8, is then the error), and all of them equal."
    q, k, v, grad, cu = case(device, [20, 6], h=1)
    check([q * 300, k, v, grad / 300, cu], tolerance=2e-3)
    check([q * 0, k, v, grad, cu])
    check([q, k, v, grad, cu], scale=3.0, tolerance=5e-4)


def test_strided_inputs_and_gradients(device):
    q, k, v, grad, cu = args = case(device, [10, 3], h=2, hk=2)
    fused = torch.stack([q, k, v, grad], dim=1).flatten(1, 2)  # [T, 4 * h, e], as of one projection
    parts = [fused[:, i * 2:i * 2 + 2] for i in range(4)]
    assert not parts[0].is_contiguous()
    plain = check(args)
    for mine, other in zip(both([*parts, cu]), plain): assert torch.equal(mine, other)
    turned = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in (q, k, v, grad)]  # elements of a head are not side by side
    for mine, other in zip(both([*turned, cu]), plain): assert torch.equal(mine, other)
    check([q, k, v, torch.ones((), device=device).expand(grad.shape), cu])


def test_one_document_does_not_see_another(device, low):
    "Change a document: nothing of the others moves by a bit, in the outputs or in the gradients."
    args = case(device, [17, 75, 20], h=2, hk=1, dtype=torch.bfloat16)
    before, part = both(args), slice(17, 92)
    for x in args[:4]: x[part] = torch.randn_like(x[part]) * 50
    for x, y, heads_first in zip(before, both(args), (False, True, False, False, False)):
        x, y = (x.transpose(0, 1), y.transpose(0, 1)) if heads_first else (x, y)
        assert torch.equal(x[:17], y[:17]) and torch.equal(x[92:], y[92:]) and not torch.equal(x[part], y[part])


def test_a_token_does_not_see_later_ones(device):
    args = case(device, [60], dtype=torch.float16)
    before = varlen_attention(*args[:3], args[4], impl="triton")
    for x in args[1:3]: x[40:] = torch.randn_like(x[40:])
    after = varlen_attention(*args[:3], args[4], impl="triton")
    assert torch.equal(before[:40], after[:40]) and not torch.equal(before[40:], after[40:])


@pytest.mark.parametrize("causal", [True, False])
def test_few_programs_give_the_same_as_many(device, low, causal):
    "A plan of a device: programs go on to the next tile, back and forth. Interpreted, every bit is the same; two compiled kernels may round differently."
    args = case(device, [9, 0, 72], h=2, hk=2, dtype=torch.float16, padding=5)
    exact, plan = prepare(args[-1].cpu(), 86, 2, 2, torch.float16, causal, device=device), bounded(args[-1], 86, 2, 2, torch.float16, causal)
    assert exact.exact and not plan.exact and prepare(args[-1], 86, 2, 2, torch.float16, causal).exact is (device == "cpu")
    for x, y in zip(both(args, causal=causal, plan=exact), both(args, causal=causal, plan=plan)): torch.testing.assert_close(x, y, rtol=0 if INTERPRETED else 1e-3, atol=0 if INTERPRETED else 1e-3)


def test_twice_the_same_gives_the_same_bits(device):
    args = case(device, [30, 3], h=4, hk=1, dtype=torch.bfloat16)
    for x, y in zip(both(args), both(args)): assert torch.equal(x, y)


def test_short_documents_need_no_large_tiles(device):
    args = case(device, [30, 9], dtype=torch.float16)
    plan = prepare(args[-1], 39, 2, 1, torch.float16, max_seqlen=30)
    assert plan.most[Q_BIG] == plan.most[KV_BIG] == 0 and plan.most[Q_SMALL] > 0
    for x, y in zip(both(args), both(args, max_seqlen=30)): assert torch.equal(x, y)


def test_gradient_of_the_softmax_sums(device):
    q, k, v, grad, cu = case(device, [13, 5], h=1)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    (out, lse), (ref, ref_lse) = varlen_attention(*inputs, cu, impl="triton", return_lse=True), varlen_attention_ref(*exact, cu)
    grad_lse = torch.randn_like(lse)
    for given in (((out, lse), (ref, ref_lse), (grad, grad_lse)), ((lse,), (ref_lse,), (grad_lse,))):
        mine, theirs = (torch.autograd.grad(o, i, [g.to(o[0].dtype) for g in given[2]], retain_graph=True, allow_unused=True) for o, i in ((given[0], inputs), (given[1], exact)))
        for x, y in zip(mine, theirs): torch.testing.assert_close(x.double(), torch.zeros_like(x).double() if y is None else y, rtol=2e-5, atol=2e-5)


def test_backward_by_itself(device):
    q, k, v, grad, cu = args = case(device, [33, 12], dtype=torch.float16)
    out, lse, *expected = both(args)
    for x, y in zip(varlen_attention_bwd(grad, q, k, v, out, lse, cu, impl="triton"), expected): assert torch.equal(x, y)
    for x, y in zip(varlen_attention_bwd(grad, q, k, v, out, lse, cu, impl="torch"), expected): torch.testing.assert_close(x, y, rtol=4e-3, atol=4e-3)
    with pytest.raises(ValueError, match=r"lse has shape \(45, 2\): need \(2, 45\)"): varlen_attention_bwd(grad, q, k, v, out, lse.T, cu)


def test_frozen_inputs(device):
    q, k, v, grad, cu = case(device, [9], h=1)
    out = varlen_attention(q.requires_grad_(), k, v, cu, impl="triton")
    (dq,) = torch.autograd.grad(out, (q,), grad)
    assert torch.equal(dq, both([q, k, v, grad, cu])[2])


def test_custom_ops(device):
    q, k, v, grad, cu = case(device, [3, 1], h=1, dtype=torch.float32)
    plan = prepare(cu, 4, 1, 1, torch.float32)
    rest = (plan.work, list(plan.most), plan.exact, True, 0.2)
    torch.library.opcheck(family._varlen_attention_op, (*(x.clone().requires_grad_() for x in (q, k, v)), *rest))
    out, lse = varlen_attention_ref(q, k, v, cu, scale=0.2)
    torch.library.opcheck(family._varlen_attention_bwd_op, (grad, None, q, k, v, out, lse, *rest))


def test_compiles_whole_with_gradients_and_once_for_all_packs(device):
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v, cu: varlen_attention(q, k, v, cu, impl="triton") * 2, backend=graphs, fullgraph=True, dynamic=True)
    for lengths in ([7, 2, 2], [9, 5]):  # sizes that are equal by chance would be taken for one size
        q, k, v, grad, cu = args = case(device, lengths, h=2, hk=1, dtype=torch.float16)
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = compiled(*inputs, cu)
        expected = both(args)
        torch.testing.assert_close(out, 2 * expected[0])
        for x, y in zip(torch.autograd.grad(out, inputs, grad), expected[2:]): torch.testing.assert_close(x, 2 * y)
    assert graphs.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make gpu")
def test_cuda_graph():
    "Bounds on the device: the list is made there, so new bounds of the same number replay in the same graph."
    q, k, v, grad, cu = case("cuda", [500, 77, 447], h=8, hk=2, e=64, dtype=torch.bfloat16)
    inputs = [x.requires_grad_() for x in (q, k, v)]
    step = lambda: torch.autograd.grad(varlen_attention(*inputs, cu), inputs, grad)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream): step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): grads = step()
    cu.copy_(bounds([10, 900, 114]))
    graph.replay()
    for x, y in zip(grads, step()): assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make gpu")
def test_offsets_beyond_32_bits():
    t, stride = 2100, 2**20
    wide = torch.zeros(t * stride, dtype=torch.float16, device="cuda")
    q = torch.as_strided(wide, (t, 1, 64), (stride, 64, 1))
    q.copy_(torch.randn(t, 1, 64, device="cuda"))
    small, cu = q.contiguous(), bounds([50, t - 50]).cuda()
    assert torch.equal(varlen_attention(q, q, q, cu), varlen_attention(small, small, small, cu))


# --- the list of tiles ---------------------------------------------------------------------------------------------------

def lists(plan):
    "The four lists of a plan as rows."
    ends = plan.work[0].tolist()
    return [plan.work[1 + a:1 + b].tolist() for a, b in zip([0, *ends], ends)]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("h, dtype", [(1, torch.bfloat16), (4, torch.bfloat16), (7, torch.float16), (2, torch.float32)], ids=str)
def test_every_token_is_in_one_tile_and_the_longest_come_first(h, dtype, causal):
    hypothesis = pytest.importorskip("hypothesis", reason="only kernels are installed")
    some = hypothesis.strategies.lists(hypothesis.strategies.one_of(hypothesis.strategies.integers(0, 40), hypothesis.strategies.integers(200, 1100)), max_size=12)

    @hypothesis.settings(max_examples=25, deadline=None)
    @hypothesis.given(some, hypothesis.strategies.integers(0, 300))
    def holds(lengths, padding):
        cu, tokens = bounds(lengths), sum(lengths) + padding
        plan, sizes = prepare(cu, tokens, h, 1, dtype, causal), tile_sizes(dtype, h)
        assert plan.most == tuple(len(x) for x in lists(plan)) and len(plan.work) == 1 + sum(plan.most)
        assert all(m <= b for m, b in zip(plan.most, bounded(cu, tokens, h, 1, dtype, causal).most))
        for kinds in ((Q_BIG, Q_SMALL), (KV_BIG, KV_SMALL)):
            covered = torch.zeros(tokens, dtype=torch.int64)
            for kind in kinds:
                costs = []
                for start, length, tile, stop in lists(plan)[kind]:
                    last = min(tile + sizes[kind], length)
                    assert 0 <= tile < last
                    covered[start + tile:start + last] += 1
                    real = start < int(cu[-1])
                    assert (start, start + length) in ({*zip(cu.tolist(), cu.tolist()[1:])} if real else {(int(cu[-1]), tokens)})
                    assert stop == (0 if not real else last if causal and kind in (Q_BIG, Q_SMALL) else length)
                    assert kind in (Q_SMALL, KV_SMALL) or length >= SHORT and (last - tile > sizes[kind + 1] or length > TAIL * sizes[kind])
                    costs.append(0 if not real else length - tile if causal and kind in (KV_BIG, KV_SMALL) else stop)
                assert costs == sorted(costs, reverse=True)
            assert (covered == 1).all()
    holds()


def test_a_plan_serves_only_what_it_was_made_for(device):
    q, k, v, _, cu = case(device, [9, 2])
    for change, message in ((dict(tokens=12), "plan has tokens 12, the call 11"), (dict(causal=False), "plan has causal False"), (dict(dtype=torch.float16), "plan has tiles"), (dict(kv_heads=2), "plan has tiles")):
        plan = prepare(cu, **{**dict(tokens=11, heads=2, kv_heads=1, dtype=torch.float32), **change})
        with pytest.raises(ValueError, match=message): varlen_attention(q, k, v, cu, impl="triton", plan=plan)


def test_rows_of_a_tile_hold_every_group():
    for dtype in family.DTYPES:
        for kernel in ("fwd", "dq", "dkv"):
            for big in (True, False):
                for group in range(1, MAX_GROUP + 1):
                    options = family.launch_options(kernel, dtype, group, big)
                    assert options["BLOCK_M"] >= group and options["BLOCK_N" if kernel == "dkv" else "BLOCK_M"] == rows(dtype)[not big]


# --- errors --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (dict(q=lambda q: q[:, :3]), "h=3 query heads and hk=2"), (dict(q=lambda q: q.half()), "k is torch.float32, q torch.float16"), (dict(q=lambda q: q.long()), "need the same floating type"), (dict(q=lambda q: q[0]), "need 3 dimensions"),
    (dict(q=lambda q: q[..., :16]), "head size e=16"), (dict(k=lambda k: k[:-1]), "need the same"), (dict(q=lambda q: q[:-1]), "q has T=10 tokens, k 11"), (dict(cu=lambda c: c.float()), "cu_seqlens is torch.float32: need int32"),
    (dict(cu=lambda c: c[None]), "need one dimension"), (dict(cu=lambda c: c + 1), "cu_seqlens[0]=1: need 0"), (dict(cu=lambda c: c.flip(0) - c[-1]), "cu_seqlens[1]=-2 after 0"), (dict(cu=lambda c: c * 2), "cu_seqlens[-1]=22: need at most T=11")],
    ids=lambda v: str(v)[:30])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_errors(change, message, impl):
    q, k, v, _, cu = case("cpu", [9, 2], h=4, hk=2)
    f = lambda name, t: change.get(name, lambda x: x)(t)
    with pytest.raises(ValueError) as error: varlen_attention(f("q", q), f("k", k), v, f("cu", cu), impl=impl)
    assert message in str(error.value)


@pytest.mark.parametrize("options, message", [
    (dict(impl="cuda"), "impl='cuda': need"), (dict(scale=0.0), "scale=0.0: need a number above 0"), (dict(scale=-1), "scale=-1"), (dict(scale=math.nan), "scale=nan"), (dict(max_seqlen=8), "document 0 has 9 tokens, max_seqlen=8"), (dict(max_seqlen=-1), "max_seqlen=-1")], ids=str)
def test_option_errors(options, message):
    q, k, v, _, cu = case("cpu", [9, 2])
    with pytest.raises(ValueError, match=message): varlen_attention(q, k, v, cu, **options)


def test_what_only_the_kernel_refuses(device):
    for options, message in ((dict(dtype=torch.float64), "q is torch.float64: the kernel needs float32"), (dict(e=129), "head size e=129: the kernel needs at most 128"), (dict(h=MAX_GROUP + 1), f"at most {MAX_GROUP} a KV head")):
        q, k, v, _, cu = case(device, [3], **options)
        with pytest.raises(ValueError, match=message): varlen_attention(q, k, v, cu, impl="triton")
        assert varlen_attention(q, k, v, cu, impl="torch").shape == q.shape


def test_tensors_on_two_devices(device):
    q, k, v, _, cu = case(device, [9, 2])
    with pytest.raises(ValueError, match="k is on meta, q on .*: need one device"): varlen_attention(q, k.to("meta"), v, cu)
    with pytest.raises(ValueError, match="cu_seqlens is on meta, q on .*: need that device or the CPU"): varlen_attention(q, k, v, cu.to("meta"))


def test_bounds_on_a_device_are_checked_when_asked():
    with pytest.raises(ValueError, match=r"cu_seqlens\[-1\]=5: need at most T=4"): check_bounds(bounds([2, 3]), 4)
    check_bounds(bounds([2, 3]), 5, 3)


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr(family, "INTERPRETED", False)
    q, k, v, _, cu = case("cpu", [3])
    with pytest.raises(RuntimeError, match="q on cpu: need a CUDA tensor, or the interpreter"): varlen_attention(q, k, v, cu, impl="triton")


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
def test_launcher_says_so(monkeypatch):
    monkeypatch.setattr(family, "interpreter_trouble", lambda: "need numpy below 2.4")
    q, k, v, _, cu = case("cpu", [3])
    with pytest.raises(RuntimeError, match="need numpy below 2.4"): varlen_attention(q, k, v, cu, impl="triton")


# --- the benchmark -------------------------------------------------------------------------------------------------------

BENCH = Path(__file__).resolve().parents[2] / "kernels/bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_varlen_attention
    return bench_varlen_attention


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("options, message", [((), "nothing is timed"), (("--only", "VLM"), "nothing is timed")], ids=str)
def test_nothing_is_timed_without_a_gpu(tmp_path, options, message):
    done = subprocess.run([sys.executable, BENCH / "bench_varlen_attention.py", "--out", tmp_path / "rows.json", *options], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_gate(bench, device):
    "It lets the kernel through, and nothing that is wrong in one place only."
    args = bench.case([9, 20], 2, 1, 32, True, device)
    assert max(bench.gate(bench.ours, args, True, exact) for exact in (True, False)) < bench.ERROR_LIMIT
    right = lambda q, k, v, cu, causal: varlen_attention(q, k, v, cu, causal=causal, impl="torch")
    wrong = {"out": lambda *a: right(*a) * 1.02, "dq": lambda q, *a: right(q.detach() + 0 * q, *a), "dk": lambda q, k, *a: right(q, k.detach() + 1.05 * (k - k.detach()), *a),
             "dv": lambda q, k, v, *a: right(q, k, v.detach() + 1.05 * (v - v.detach()), *a), "out ": lambda q, k, v, cu, c: right(q, k, v, cu[[0, 2]], c), "out  ": lambda q, k, v, cu, c: right(q, k, v, cu, False)}
    for name, kernel in wrong.items():
        with pytest.raises(ValueError, match=f"{name.strip()} has relative error .*: the kernel is wrong and is not timed"): bench.gate(kernel, args, True, True)


@pytest.mark.parametrize("causal", [True, False])
def test_peers_compute_the_same(bench, device, causal, monkeypatch, capsys):
    monkeypatch.setattr(bench, "flex", lambda cu, causal, device, plain=bench.flex: plain(cu, causal, device, compiled=False))
    args = bench.case([20, 11], 4, 2, 16, causal, device)
    ways = bench.ways_of(args, causal, device)
    assert {"varlen_attention", "varlen_attention, list made on the device", "SDPA, dense mask"} <= ways.keys()
    q, k, v, _, cu = args
    expected = varlen_attention_ref(q.double(), k.double(), v.double(), cu, causal)[0]
    for name, (_, attend, build) in ways.items():
        assert bench.relative_error(attend(q, k, v), expected) < bench.ERROR_LIMIT, name
        if build is not None: build()
    if device == "cpu": assert "varlen_attn of torch is left out" in capsys.readouterr().out  # it is for CUDA only


def test_bounds_of_the_benchmark(bench):
    cu = bounds([3, 0, 5])
    assert bench.useful_pairs(cu) == 6 + 15 and bench.useful_pairs(cu, False) == 9 + 25 and bench.operations(cu, 2, 10, True) == 4 * 2 * 10 * 21
    assert bench.floor(bounds([4096]), 32, 8, 128, True, 1e15, 3e12) == pytest.approx(4 * 32 * 128 * 4096 * 4097 / 2 / 1e15)  # long documents: operations
    assert bench.floor(bounds([16] * 256), 32, 8, 128, True, 1e15, 3e12) == pytest.approx(4096 * 128 * 2 * 80 / 3e12)         # short ones: bytes


@pytest.mark.parametrize("causal", [True, False])
def test_pairs_of_tiles_against_a_count(causal):
    lengths, group, dtype = [300, 5, 0, 129], 4, torch.bfloat16
    plan, found = prepare(bounds(lengths), 434, group, 1, dtype, causal), []
    for kind in (Q_BIG, Q_SMALL):
        block = family.launch_options("fwd", dtype, group, kind == Q_BIG)
        for _, _, _, stop in lists(plan)[kind]: found.append(sum(block["BLOCK_M"] * block["BLOCK_N"] for _ in range(0, stop, block["BLOCK_N"])))
    assert family.tile_pairs(plan, dtype, group).tolist() == found and sum(found) > group * family.useful_pairs(bounds(lengths), causal)
