"Paged decode attention against its reference, in the interpreter on CPU and on a GPU alike."

import math

import pytest
import torch
from modeltc_kernels.paged_decode import (
    MAX_GROUP,
    MAX_SPLITS,
    RESIDENT,
    check_pages,
    default_splits,
    paged_decode,
    paged_decode_ref,
)
from modeltc_kernels.runtime import INTERPRETED, interpreter_trouble

# fp32: order of summation only. fp16: outputs are rounded to 11 bits and on a GPU the weights are too, each at most 2**-11 off.
# bf16: the same with 8 bits, and the interpreter's rounding drops the tail.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2e-2}


def case(device, lengths, h=4, hk=2, e=64, page=16, dtype=torch.float32, seed=0, spare=3):
    "Random requests on shuffled pages; slots that belong to nobody are NaN."
    g = torch.Generator().manual_seed(seed)
    n, pages_each = len(lengths), [-(-x // page) for x in lengths]
    pages, columns = sum(pages_each) + spare, max([*pages_each, 1])
    order = torch.randperm(pages, generator=g).tolist()
    k = torch.full((pages * page, hk, e), float("nan"))
    v, table = k.clone(), torch.full((n, columns), 2**30, dtype=torch.int32)  # an unused entry must not be followed
    for i, length in enumerate(lengths):
        mine = [order.pop() for _ in range(pages_each[i])]
        table[i, :len(mine)] = torch.tensor(mine, dtype=torch.int32)
        slot = torch.tensor([mine[t // page] * page + t % page for t in range(length)], dtype=torch.long)
        k[slot], v[slot] = torch.randn(length, hk, e, generator=g), torch.randn(length, hk, e, generator=g)
    q = torch.randn(n, h, e, generator=g)
    return [t.to(device=device, dtype=dtype) for t in (q, k, v)] + [table.to(device), torch.tensor(lengths, dtype=torch.int32, device=device), page]


def check(args, tolerance=None, **options):
    "Kernel against the fp64 reference on the same (rounded) inputs."
    q, k, v, *rest = args
    out = paged_decode(q, k, v, *rest, impl="triton", **options)
    ref = paged_decode_ref(q.double(), k.double(), v.double(), *rest, options.get("scale"))
    tolerance = tolerance or TOLERANCE[q.dtype]
    torch.testing.assert_close(out.double(), ref, rtol=tolerance, atol=tolerance)
    return out


@pytest.mark.parametrize("h, hk", [(4, 4), (8, 2), (8, 1)], ids=["GQA 1", "GQA 4", "GQA 8"])
@pytest.mark.parametrize("page", [1, 16])
def test_groups_and_pages(device, h, hk, page): check(case(device, [1, 37], h, hk, page=page))


@pytest.mark.parametrize("e", [64, 96, 128])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_head_sizes_and_types(device, e, dtype): check(case(device, [63, 20], e=e, dtype=dtype))


@pytest.mark.parametrize("h, e, dtype", [(MAX_GROUP, 16, torch.float16), (3, 256, torch.bfloat16), (MAX_GROUP, 128, torch.float32), (1, 20, torch.float32)], ids=str)
def test_corners_have_their_own_launch_options(device, h, e, dtype): check(case(device, [75], h, 1, e, dtype=dtype), num_splits=2)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 63, 64, 65, 200])
def test_lengths(device, length): check(case(device, [length], h=2, hk=1))


def test_long_and_mixed(device): check(case(device, [1000, 0, 3], h=2, hk=1), num_splits=4)


@pytest.mark.parametrize("splits", [1, 2, 3, 5, MAX_SPLITS])
def test_pieces_give_the_same(device, splits):
    "Some pieces are empty when there are more of them than blocks."
    args = case(device, [150, 1], h=2, hk=1)
    torch.testing.assert_close(check(args, num_splits=splits), check(args, num_splits=1), rtol=1e-5, atol=1e-5)


def test_no_kv_gives_zeros(device):
    for splits in (1, 3): assert torch.equal(check(case(device, [0, 5], h=2, hk=1), num_splits=splits)[0].cpu(), torch.zeros(2, 64))


def test_empty_batch(device):
    q, k, v, _, _, page = case(device, [3])
    none = torch.zeros((0, 1), dtype=torch.int32, device=device), torch.zeros(0, dtype=torch.int32, device=device)
    assert paged_decode(q[:0], k, v, *none, page, impl="triton").shape == (0, 4, 64)


def test_strided_query_and_pools(device):
    q, k, v, table, lengths, page = case(device, [40, 9])
    wide = torch.full((2, 4, 3, 64), float("nan"), device=device)
    wide[:, :, 1] = q
    both = torch.stack([k, v], dim=1)  # [slots, 2, hk, e]
    assert not wide[:, :, 1].is_contiguous()
    assert torch.equal(check([wide[:, :, 1], both[:, 0], both[:, 1], table, lengths, page]), check([q, k, v, table, lengths, page]))


def test_extreme_scores(device):
    "Scores far beyond what exp can hold (their own rounding, 2400 x 6e-8, is then the error), and all of them equal."
    q, k, v, *rest = case(device, [70], h=2, hk=1)
    check([q * 300, k, v, *rest], tolerance=2e-3)
    check([q * 0, k, v, *rest])
    check([q, k, v, *rest], scale=0.0)


def test_reference_against_one_loop_per_head(device):
    q, k, v, table, lengths, page = case("cpu", [21, 8], dtype=torch.float64)
    out = paged_decode_ref(q, k, v, table, lengths, page)
    for i in range(2):
        for head in range(4):
            rows = [int(table[i, t // page]) * page + t % page for t in range(int(lengths[i]))]
            score = [float(q[i, head] @ k[r, head // 2]) / math.sqrt(64) for r in rows]
            weight = [math.exp(s - max(score)) for s in score]
            expected = sum(w * v[r, head // 2] for w, r in zip(weight, rows)) / sum(weight)
            torch.testing.assert_close(out[i, head], expected)


def test_auto_is_torch_on_cpu():
    q, k, v, *rest = case("cpu", [9])
    assert torch.equal(paged_decode(q, k, v, *rest), paged_decode_ref(q, k, v, *rest))


@pytest.mark.parametrize("splits", [0, 2])
def test_custom_op(device, splits):
    from modeltc_kernels.paged_decode import _paged_decode_op
    q, k, v, *rest = case(device, [9, 2], h=2, hk=1)
    k, v = k.nan_to_num(), v.nan_to_num()  # opcheck compares inputs before and after, and NaN is not equal to itself
    torch.library.opcheck(_paged_decode_op, (q, k, v, *rest, 0.125, splits))


def test_compiles_whole_and_once_for_all_batch_sizes(device):
    from torch._dynamo.testing import CompileCounterWithBackend
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda *args: paged_decode(*args, 16, impl="triton") * 2, backend=graphs, fullgraph=True, dynamic=True)
    for lengths in ([100, 2, 9], [40, 5], [50, 20, 3, 4, 5]):  # sizes that are equal by chance would be taken for one size
        *args, page = case(device, lengths, h=4, hk=1)
        torch.testing.assert_close(compiled(*args), 2 * paged_decode(*args, page, impl="triton"))
    assert graphs.frame_count == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: make gpu")
def test_cuda_graph():
    q, k, v, *rest = case("cuda", [500, 77], h=8, hk=2, dtype=torch.bfloat16)
    expected, graph = paged_decode(q, k, v, *rest), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): out = paged_decode(q, k, v, *rest)
    q.neg_()
    expected_of_new = paged_decode(q, k, v, *rest)
    graph.replay()
    assert torch.equal(out, expected_of_new) and not torch.equal(out, expected)


def test_default_splits():
    assert default_splits(1, 8, 100_000, 132) == MAX_SPLITS
    assert default_splits(256, 8, 100_000, 132) == 1
    assert default_splits(1, 1, 100, 132) == 1
    assert default_splits(16, 8, 512, 132) == 3
    for n in range(1, 60):
        programs = n * 8 * default_splits(n, 8, 100_000, 132)
        assert programs <= RESIDENT * 132 or programs == n * 8  # one wave, if the batch alone does not fill more


def test_interpreter_trouble_is_said_in_words():
    "Triton 3.6 with numpy 2.4 fails deep inside the interpreter otherwise."
    assert "numpy<2.4" in interpreter_trouble({"triton": (3, 6), "numpy": (2, 4)}.get)
    assert interpreter_trouble({"triton": (3, 9), "numpy": (2, 4)}.get) == interpreter_trouble({"triton": (3, 6), "numpy": (2, 3)}.get) == ""


@pytest.mark.skipif(not INTERPRETED, reason="needs the interpreter")
def test_launcher_says_so(monkeypatch):
    monkeypatch.setattr("modeltc_kernels.paged_decode.interpreter_trouble", lambda: "need numpy below 2.4")
    with pytest.raises(RuntimeError, match="need numpy below 2.4"): paged_decode(*case("cpu", [3]), impl="triton")


def test_triton_on_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setattr("modeltc_kernels.paged_decode.INTERPRETED", False)
    with pytest.raises(RuntimeError, match="q on cpu: need a CUDA tensor, or the interpreter"): paged_decode(*case("cpu", [3]), impl="triton")


@pytest.mark.parametrize("change, message", [
    (dict(page=3), "page_size=3: need a power of two"), (dict(q=lambda q: q[:, :3]), "h=3 query heads and hk=2"), (dict(q=lambda q: q.repeat(1, 33, 1)), "need at most 64 a KV head"), (dict(q=lambda q: q.half()), "need the same of float32"),
    (dict(table=lambda t: t.long()), "page_table is torch.int64: need int32"), (dict(lengths=lambda x: x[:1]), "lengths 1, q has n=2"),
    (dict(k=lambda k: k[:-1]), "need the same"), (dict(q=lambda q: q[0]), "need 3 dimensions"), (dict(q=lambda q: q[..., :32]), "head size e=32"),
    (dict(q=lambda q: q.transpose(1, 2).contiguous().transpose(1, 2)), "need 1; call .contiguous()")], ids=lambda v: str(v)[:30])
def test_errors(device, change, message):
    q, k, v, table, lengths, page = case(device, [9, 2])
    f = lambda name, t: change.get(name, lambda x: x)(t)
    with pytest.raises(ValueError) as error: paged_decode(f("q", q), f("k", k), v, f("table", table), f("lengths", lengths), change.get("page", page), impl="triton")
    assert message in str(error.value)


def test_tensors_on_two_devices(device):
    q, k, v, table, lengths, page = case(device, [9, 2])
    with pytest.raises(ValueError, match="page_table is on meta, q on .*: need one device"): paged_decode(q, k, v, table.to("meta"), lengths, page)


def test_option_errors(device):
    q, k, v, table, lengths, page = case(device, [9, 2])
    for options, message in ((dict(impl="cuda"), "impl='cuda'"), (dict(num_splits=0), "num_splits=0"), (dict(num_splits=99), "num_splits=99")):
        with pytest.raises(ValueError, match=message): paged_decode(q, k, v, table, lengths, page, **options)


def test_page_check(device):
    q, k, v, table, lengths, page = case(device, [20, 2])
    paged_decode(q, k, v, table, lengths, page, check=True)  # unused entries may hold anything
    table[0, 1] = 99
    with pytest.raises(ValueError, match=r"page_table\[0, 1\]=99"): paged_decode(q, k, v, table, lengths, page, check=True)
    with pytest.raises(ValueError, match="need 0 to 32"): check_pages(k, table, lengths + 40, page)
