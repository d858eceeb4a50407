"""Paged decode attention: one query token a request against keys and values scattered over pages.

The memory-bound inner step of LLM serving (vLLM's PagedAttention, flash-decoding's split over the sequence). Reading order:
reference, kernels, launcher, registration. Shapes: n requests, h query heads, hk KV heads (h a multiple of hk), e head size,
`slots = pages * page_size` token slots, `max_pages` columns of the page table.
"""

import math

import torch
from torch import Tensor

from modeltc_kernels.runtime import INTERPRETED, interpreter_trouble  # first: it decides whether triton interprets

import triton  # isort: skip
import triton.language as tl  # isort: skip

MAX_SPLITS = 32  # pieces one request's KV is cut into at most
MIN_PIECE = 128  # KV tokens, no piece is made shorter to fill the device
RESIDENT = 3     # programs a processor holds at once, by the shared memory and registers of the half-precision kernel
MAX_GROUP = 64   # query heads that share a KV head
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def paged_decode_ref(q: Tensor, k_pool: Tensor, v_pool: Tensor, page_table: Tensor, lengths: Tensor, page_size: int,
                     scale: float | None = None) -> Tensor:
    "The specification, in fp32 (fp64 stays fp64): gather the pages of each request, attend, zeros where there is no KV."
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    n, h, e = q.shape
    group = h // k_pool.shape[1]
    scale = 1 / math.sqrt(e) if scale is None else scale
    out = torch.zeros(n, h, e, dtype=wide, device=q.device)
    for i in range(n):
        length = int(lengths[i])
        if length == 0: continue
        token = torch.arange(length, device=q.device)
        slot = page_table[i, token // page_size].long() * page_size + token % page_size
        k, v = (pool[slot].to(wide).repeat_interleave(group, dim=1) for pool in (k_pool, v_pool))  # [length, h, e]
        score = torch.einsum("he,the->ht", q[i].to(wide), k) * scale
        out[i] = torch.einsum("ht,the->he", score.softmax(dim=-1), v)
    return out.to(q.dtype)


@triton.jit
def paged_decode_fwd_kernel(q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, part_ptr, lse_ptr, scale, heads, splits,
                            stride_qn, stride_qh, stride_ks, stride_kh, stride_vs, stride_vh, stride_tn,
                            GROUP: tl.constexpr, GROUP_PAD: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, PAGE: tl.constexpr,
                            BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, IEEE: tl.constexpr):
    "One request, one KV head with its group of query heads, one piece of the sequence."
    request = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    row = tl.arange(0, GROUP_PAD)
    col = tl.arange(0, E_PAD)
    in_row, in_col = row < GROUP, col < E
    head = kv_head * GROUP + row
    q = tl.load(q_ptr + request * stride_qn + head[:, None] * stride_qh + col[None, :],
                mask=in_row[:, None] & in_col[None, :], other=0.0)                                   # [GROUP_PAD, E_PAD]
    if UPCAST: q = q.to(tl.float32)
    length = tl.load(length_ptr + request)
    piece = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    start = split * piece
    stop = tl.minimum(start + piece, length)
    best = tl.full((GROUP_PAD,), float("-inf"), tl.float32)
    total = tl.zeros((GROUP_PAD,), tl.float32)
    acc = tl.zeros((GROUP_PAD, E_PAD), tl.float32)
    for base in range(start, stop, BLOCK_N):
        token = base + tl.arange(0, BLOCK_N)
        live = token < stop
        page = tl.load(table_ptr + request * stride_tn + token // PAGE, mask=live, other=0).to(tl.int64)
        slot = page * PAGE + token % PAGE
        inside = live[:, None] & in_col[None, :]
        k = tl.load(k_ptr + slot[:, None] * stride_ks + kv_head * stride_kh + col[None, :], mask=inside, other=0.0)  # [BLOCK_N, E_PAD]
        v = tl.load(v_ptr + slot[:, None] * stride_vs + kv_head * stride_vh + col[None, :], mask=inside, other=0.0)
        if UPCAST:
            k = k.to(tl.float32)
            v = v.to(tl.float32)
        if IEEE: score = tl.dot(q, tl.trans(k), input_precision="ieee")
        else: score = tl.dot(q, tl.trans(k))                                                          # [GROUP_PAD, BLOCK_N]
        score = tl.where(live[None, :], score * scale, float("-inf"))
        new = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp(score - new[:, None])
        shrink = tl.exp(best - new)
        total = total * shrink + tl.sum(weight, axis=1)
        if IEEE: gain = tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        else: gain = tl.dot(weight.to(v.dtype), v)
        acc = acc * shrink[:, None] + gain
        best = new
    some = total > 0
    acc = acc / tl.where(some, total, 1.0)[:, None]
    lse = tl.where(some, best + tl.log(tl.where(some, total, 1.0)), float("-inf"))
    place = (request * heads + head) * splits + split
    tl.store(part_ptr + place[:, None] * E + col[None, :], acc.to(part_ptr.dtype.element_ty), mask=in_row[:, None] & in_col[None, :])
    tl.store(lse_ptr + place, lse, mask=in_row)


@triton.jit
def paged_decode_merge_kernel(part_ptr, lse_ptr, out_ptr, splits, E: tl.constexpr, E_PAD: tl.constexpr, SPLITS_PAD: tl.constexpr):
    "Weigh the pieces of one request and head by their share of the softmax."
    place = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS_PAD)
    col = tl.arange(0, E_PAD)
    there, in_col = split < splits, col < E
    lse = tl.load(lse_ptr + place * splits + split, mask=there, other=float("-inf"))
    best = tl.max(lse, axis=0)
    some = best > float("-inf")
    weight = tl.where(there, tl.exp(lse - tl.where(some, best, 0.0)), 0.0)
    part = tl.load(part_ptr + (place * splits + split)[:, None] * E + col[None, :], mask=there[:, None] & in_col[None, :], other=0.0)
    total = tl.sum(weight, axis=0)
    out = tl.sum(part * weight[:, None], axis=0) / tl.where(some, total, 1.0)
    tl.store(out_ptr + place * E + col, out.to(out_ptr.dtype.element_ty), mask=in_col)


def launch_options(dtype: torch.dtype, group_pad: int = 16, e_pad: int = 128) -> dict:
    """Block, warps and pipeline stages, none of which spills on sm_90 (the compile check looks).

    Page numbers are loaded before the keys they point to, so half of the stages go to that chain: five leave two blocks of
    keys and values in flight. Full-precision products take the registers instead: smaller blocks, more warps.
    """
    if dtype == torch.float32: return dict(BLOCK_N=32 if group_pad * e_pad <= 4096 else 16, IEEE=True, num_warps=8, num_stages=2)
    return dict(BLOCK_N=64 if e_pad <= 128 else 32, IEEE=False, num_warps=4 if group_pad <= 32 else 8, num_stages=5)


def _power(n: int) -> int:
    "The smallest power of two that is not below `n`."
    return 1 << max(n - 1, 0).bit_length()


def padded(group: int, e: int) -> tuple[int, int]:
    "Rows and columns of a program's blocks: powers of two, and a matrix product needs 16."
    return max(16, _power(group)), max(16, _power(e))


def default_splits(n: int, kv_heads: int, max_length: int, processors: int) -> int:
    "Pieces a sequence is cut into: as many as the device can hold at once, none shorter than `MIN_PIECE`."
    wanted = RESIDENT * processors // max(n * kv_heads, 1)
    return max(1, min(wanted, MAX_SPLITS, max_length // MIN_PIECE))


def _check(q: Tensor, k_pool: Tensor, v_pool: Tensor, page_table: Tensor, lengths: Tensor, page_size: int, num_splits: int | None) -> None:
    "Everything that can be checked without asking the device."
    tensors = {"q": (q, 3), "k_pool": (k_pool, 3), "v_pool": (v_pool, 3), "page_table": (page_table, 2), "lengths": (lengths, 1)}
    for name, (t, ndim) in tensors.items():
        if t.ndim != ndim: raise ValueError(f"{name} has shape {tuple(t.shape)}: need {ndim} dimensions (q [n,h,e], pools [slots,hk,e], page_table [n,max_pages], lengths [n])")
        if t.device != q.device: raise ValueError(f"{name} is on {t.device}, q on {q.device}: need one device")
    for name, t in (("q", q), ("k_pool", k_pool), ("v_pool", v_pool)):
        if t.dtype not in DTYPES or t.dtype != q.dtype: raise ValueError(f"{name} is {t.dtype}, q {q.dtype}: need the same of float32, float16, bfloat16")
        if t.numel() and t.stride(-1) != 1: raise ValueError(f"{name} has stride {t.stride(-1)} in its last dimension: need 1; call .contiguous() first")
    for name, t in (("page_table", page_table), ("lengths", lengths)):
        if t.dtype != torch.int32: raise ValueError(f"{name} is {t.dtype}: need int32")
        if t.numel() and t.stride(-1) != 1: raise ValueError(f"{name} has stride {t.stride(-1)} in its last dimension: need 1; call .contiguous() first")
    if k_pool.shape != v_pool.shape: raise ValueError(f"v_pool has shape {tuple(v_pool.shape)}, k_pool {tuple(k_pool.shape)}: need the same")
    (n, h, e), (slots, hk, ek) = q.shape, k_pool.shape
    if e != ek or not 1 <= e <= 256: raise ValueError(f"head size e={e} in q and {ek} in k_pool: need the same, 1 to 256")
    if hk < 1 or h % hk: raise ValueError(f"h={h} query heads and hk={hk} KV heads: need h to be a multiple of hk")
    if h // hk > MAX_GROUP: raise ValueError(f"h={h} query heads over hk={hk} KV heads: need at most {MAX_GROUP} a KV head; repeat the KV heads, or impl='torch'")
    if page_size < 1 or page_size & (page_size - 1): raise ValueError(f"page_size={page_size}: need a power of two")
    if slots % page_size: raise ValueError(f"k_pool has {slots} slots, page_size={page_size}: need whole pages")
    if page_table.shape[0] != n or lengths.shape[0] != n: raise ValueError(f"page_table has {page_table.shape[0]} rows and lengths {lengths.shape[0]}, q has n={n}: need the same")
    if num_splits is not None and not 1 <= num_splits <= MAX_SPLITS: raise ValueError(f"num_splits={num_splits}: need 1 to {MAX_SPLITS}, or None")


def check_pages(k_pool: Tensor, page_table: Tensor, lengths: Tensor, page_size: int) -> None:
    "Check what the device holds: lengths and page numbers in range. Waits for the device, so it is asked for by `check=True`."
    room, pages = page_table.shape[1] * page_size, k_pool.shape[0] // page_size
    if lengths.numel() and (int(lengths.min()) < 0 or int(lengths.max()) > room): raise ValueError(f"lengths are {int(lengths.min())} to {int(lengths.max())}: need 0 to {room}, the room of page_table")
    used = torch.arange(page_table.shape[1], device=page_table.device)[None] * page_size < lengths[:, None]
    bad = used & ((page_table < 0) | (page_table >= pages))
    if bool(bad.any()):
        i, j = (int(v) for v in bad.nonzero()[0])
        raise ValueError(f"page_table[{i}, {j}]={int(page_table[i, j])}: need 0 to {pages - 1}")


@torch.library.custom_op("modeltc::paged_decode", mutates_args=())
def _paged_decode_op(q: Tensor, k_pool: Tensor, v_pool: Tensor, page_table: Tensor, lengths: Tensor, page_size: int, scale: float,
                     num_splits: int) -> Tensor:
    "Launch the two kernels; the number of pieces is chosen here when it is 0, out of sight of a tracer."
    if INTERPRETED and (trouble := interpreter_trouble()): raise RuntimeError(trouble)
    (n, h, e), hk = q.shape, k_pool.shape[1]
    out = torch.empty((n, h, e), dtype=q.dtype, device=q.device)
    if n == 0 or h == 0: return out
    if num_splits == 0:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
        num_splits = default_splits(n, hk, page_table.shape[1] * page_size, processors)
    part = out if num_splits == 1 else torch.empty((n, h, num_splits, e), dtype=torch.float32, device=q.device)
    lse = torch.empty((n, h, num_splits), dtype=torch.float32, device=q.device)
    group = h // hk
    group_pad, e_pad = padded(group, e)
    paged_decode_fwd_kernel[(n, hk, num_splits)](
        q, k_pool, v_pool, page_table, lengths, part, lse, scale, h, num_splits,
        q.stride(0), q.stride(1), k_pool.stride(0), k_pool.stride(1), v_pool.stride(0), v_pool.stride(1), page_table.stride(0),
        GROUP=group, GROUP_PAD=group_pad, E=e, E_PAD=e_pad, PAGE=page_size,
        UPCAST=INTERPRETED, **launch_options(q.dtype, group_pad, e_pad))
    if num_splits > 1: paged_decode_merge_kernel[(n * h,)](part, lse, out, num_splits, E=e, E_PAD=e_pad, SPLITS_PAD=_power(num_splits), num_warps=2)
    return out


@_paged_decode_op.register_fake
def _(q, k_pool, v_pool, page_table, lengths, page_size, scale, num_splits): return torch.empty(q.shape, dtype=q.dtype, device=q.device)


def paged_decode(
    q: Tensor,                        # [n, h, e] one query token a request; fp32, fp16 or bf16, last dimension dense
    k_pool: Tensor,                   # [slots, hk, e] keys, slots = pages * page_size
    v_pool: Tensor,                   # [slots, hk, e] values
    page_table: Tensor,               # [n, max_pages] int32, pages of each request in order
    lengths: Tensor,                  # [n] int32, KV tokens of each request, 0 allowed
    page_size: int,                   # tokens a page, a power of two
    *,
    scale: float | None = None,       # of the scores; None: 1 / sqrt(e)
    num_splits: int | None = None,    # pieces a sequence is cut into; None: enough to fill the device
    impl: str = "auto",               # "torch" (the reference), "triton", or "auto": torch on CPU, the kernel on CUDA
    check: bool = False,              # also check lengths and page numbers, which waits for the device; without it they must be right
) -> Tensor:                          # [n, h, e], zeros for a request without KV
    "Attention of one new token a request over its paged KV; nothing is read from a page beyond a request's length."
    _check(q, k_pool, v_pool, page_table, lengths, page_size, num_splits)
    if check: check_pages(k_pool, page_table, lengths, page_size)
    if impl not in ("auto", "torch", "triton"): raise ValueError(f"impl={impl!r}: need 'auto', 'torch' or 'triton'")
    if impl == "torch" or (impl == "auto" and not q.is_cuda): return paged_decode_ref(q, k_pool, v_pool, page_table, lengths, page_size, scale)
    if not q.is_cuda and not INTERPRETED: raise RuntimeError(f"impl='triton' with q on {q.device}: need a CUDA tensor, or the interpreter (set TRITON_INTERPRET=1 before the import)")
    return _paged_decode_op(q, k_pool, v_pool, page_table, lengths, page_size, 1 / math.sqrt(q.shape[2]) if scale is None else scale, num_splits or 0)
