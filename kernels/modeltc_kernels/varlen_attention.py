"""Attention of documents that lie one behind the other in a pack: every token sees its own document only, forward and backward.

Reading order: references, kernels, work list, launchers, registration. Shapes: T tokens of a pack, B documents whose bounds
are `cu_seqlens` [B+1], h query heads, hk KV heads (h a multiple of hk, `group` = h / hk), e head size. Tokens behind the last
document are padding: zeros come out of them and their lse is minus infinity. A tile holds the query heads of one KV head side
by side: row r is position r // group, head r % group. Which tiles there are, longest first, says a list (`prepare`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from modeltc_kernels.runtime import INTERPRETED, interpreter_trouble  # first: it decides whether triton interprets

import triton  # isort: skip
import triton.language as tl  # isort: skip

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # of the kernel; the references take float64 too
MAX_GROUP = 16   # query heads that share a KV head
MAX_HEAD = 128   # head size
SHORT = 256      # tokens; documents below get tiles of half the rows
TAIL = 16        # large tiles; longer documents do not end in a small one: it would save little, and come last with many keys to see
Q_BIG, Q_SMALL, KV_BIG, KV_SMALL = range(4)  # the four lists: tiles of queries and of keys, large and small
LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)


def _wide(dtype: torch.dtype) -> torch.dtype: return torch.float64 if dtype == torch.float64 else torch.float32


def _default(scale: float | None, e: int) -> float: return 1 / math.sqrt(e) if scale is None else scale


def _documents(cu_seqlens: Tensor) -> list[tuple[int, int]]:
    "Bounds of every document with tokens; waits for the device of `cu_seqlens`."
    bounds = cu_seqlens.tolist()
    return [(start, stop) for start, stop in zip(bounds, bounds[1:]) if stop > start]


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool) -> Tensor:
    "Scores of one document [h, s, s], minus infinity where nothing is seen."
    score = torch.einsum("the,she->hts", q, k) * scale
    return score.masked_fill(torch.ones(len(q), len(q), dtype=torch.bool, device=q.device).triu(1), -math.inf) if causal else score


def varlen_attention_ref(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool = True, scale: float | None = None) -> tuple[Tensor, Tensor]:
    "The specification, in fp32 (fp64 stays fp64): each document by itself; outputs [T, h, e] and the log of the softmax sums, lse [h, T]."
    wide, (t, h, e), group = _wide(q.dtype), q.shape, q.shape[1] // k.shape[1]
    outs, sums, end = [], [], 0
    for start, stop in _documents(cu_seqlens):
        keys, values = (x[start:stop].to(wide).repeat_interleave(group, dim=1) for x in (k, v))  # [s, h, e]
        score = _scores(q[start:stop].to(wide), keys, _default(scale, e), causal)
        sums.append(score.logsumexp(dim=-1))
        outs.append(torch.einsum("hts,she->the", score.softmax(dim=-1), values))
        end = stop
    outs.append(q.new_zeros(t - end, h, e, dtype=wide))
    sums.append(q.new_full((h, t - end), -math.inf, dtype=wide))
    return torch.cat(outs).to(q.dtype), torch.cat(sums, dim=1)


def varlen_attention_bwd_ref(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, causal: bool = True,
                             scale: float | None = None, grad_lse: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    "Gradients of q, k and v by the formulas that the kernels follow: weights anew from `lse`, never a matrix kept from the forward pass."
    wide, e, group = _wide(q.dtype), q.shape[2], q.shape[1] // k.shape[1]
    scale, grads = _default(scale, e), [torch.zeros(x.shape, dtype=wide, device=x.device) for x in (q, k, v)]
    for start, stop in _documents(cu_seqlens):
        part = slice(start, stop)
        dy, y, queries, keys, values = (x[part].to(wide) for x in (grad, out, q, k, v))
        keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
        p = (_scores(queries, keys, scale, causal) - lse[:, part, None].to(wide)).exp()           # [h, t, s]
        delta = torch.einsum("the,the->ht", dy, y) - (0 if grad_lse is None else grad_lse[:, part].to(wide))
        ds = p * (torch.einsum("the,she->hts", dy, values) - delta[:, :, None]) * scale
        grads[0][part] = torch.einsum("hts,she->the", ds, keys)
        for grad_of, weight, other in ((grads[1], ds, queries), (grads[2], p, dy)):
            grad_of[part] = torch.einsum("hts,the->she", weight, other).unflatten(1, (-1, group)).sum(dim=2)
    return grads[0].to(q.dtype), grads[1].to(k.dtype), grads[2].to(v.dtype)


def _varlen_attention_torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, scale: float | None) -> Tensor:
    "torch's own attention, document by document, in the type of the inputs; differentiable. Reads `cu_seqlens` on the host."
    heads_first, outs, end = lambda x: x.transpose(0, 1)[None], [], 0
    for start, stop in _documents(cu_seqlens):
        one = (heads_first(x[start:stop]) for x in (q, k, v))
        outs.append(torch.nn.functional.scaled_dot_product_attention(*one, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1))
        end = stop
    return torch.cat([*outs, q.new_zeros(q.shape[0] - end, *q.shape[1:])])


@triton.jit
def _dot(a, b, acc, IEEE: tl.constexpr):
    if IEEE: return tl.dot(a, b, acc, input_precision="ieee")
    else: return tl.dot(a, b, acc)


@triton.jit
def _load(at, offset, in_row, in_col, ROWS: tl.constexpr, COLS: tl.constexpr, UPCAST: tl.constexpr):
    "A block of rows; `ROWS` and `COLS` say which of the two bounds can be passed at all."
    if ROWS: block = tl.load(at + offset, mask=in_row[:, None] & in_col[None, :], other=0.0)
    elif COLS: block = tl.load(at + offset, mask=in_col[None, :], other=0.0)
    else: block = tl.load(at + offset)
    if UPCAST: block = block.to(tl.float32)
    return block


@triton.jit
def _list(work_ptr, KIND: tl.constexpr):
    "Where a list begins and how many tiles it has."
    first = tl.full((), 0, tl.int32)
    if KIND > 0: first = tl.load(work_ptr + KIND - 1)
    return first, tl.load(work_ptr + KIND) - first


@triton.jit
def _turn(base):
    "The number of this program's tile in the round that begins at `base`: back and forth, so that nobody always gets the longest."
    program, programs = tl.program_id(0), tl.num_programs(0)
    return base + tl.where(base // programs % 2 == 0, program, programs - 1 - program)


@triton.jit
def _entry(work_ptr, turn, kv_heads, KIND: tl.constexpr):
    "Start and length of a document, tile, where its loop stops, KV head; all zero beyond the list, then nothing is done."
    first, many = _list(work_ptr, KIND)
    item = turn // kv_heads
    at, live = work_ptr + 4 * (1 + first + item), item < many
    start = tl.load(at, mask=live, other=0).to(tl.int64)
    return start, tl.load(at + 1, mask=live, other=0), tl.load(at + 2, mask=live, other=0), tl.load(at + 3, mask=live, other=0), (turn % kv_heads).to(tl.int64)


@triton.jit
def _fwd_steps(acc, best, total, q, k_at, v_at, low, high, pos, stop, factor, stride_kt, stride_vt,
               E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, IEEE: tl.constexpr):
    "Keys `low` to `high` of a document, a block at a time; `k_at` and `v_at` point to the first."
    n, col = tl.arange(0, BLOCK_N), tl.arange(0, E_PAD)
    in_col = col < E
    for base in range(low, high, BLOCK_N):
        key = base + n
        k = _load(k_at, n[:, None] * stride_kt + col[None, :], key < stop, in_col, MASKED, E != E_PAD, UPCAST)  # [BLOCK_N, E_PAD]
        v = _load(v_at, n[:, None] * stride_vt + col[None, :], key < stop, in_col, MASKED, E != E_PAD, UPCAST)
        score = _dot(q, tl.trans(k), tl.zeros((q.shape[0], BLOCK_N), tl.float32), IEEE)                         # [BLOCK_M, BLOCK_N]
        if MASKED:
            seen = (key < stop)[None, :]
            if CAUSAL: seen = seen & (key[None, :] <= pos[:, None])
            score = tl.where(seen, score, float("-inf"))
        new = tl.maximum(best, tl.max(score, axis=1) * factor)
        weight = tl.exp2(score * factor - new[:, None])
        shrink = tl.exp2(best - new)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = _dot(weight.to(v.dtype), v, acc * shrink[:, None], IEEE)
        best = new
        k_at += BLOCK_N * stride_kt
        v_at += BLOCK_N * stride_vt
    return acc, best, total, k_at, v_at


@triton.jit
def _fwd_tile(turn, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, work_ptr, factor, tokens, kv_heads,
              stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
              KIND: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
              BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, IEEE: tl.constexpr):
    "A tile of queries: softmax online over the keys of the document; `factor` is scale * log2(e)."
    POS: tl.constexpr = BLOCK_M // GROUP
    row, col = tl.arange(0, BLOCK_M), tl.arange(0, E_PAD)
    step, member, in_col = row // GROUP, row % GROUP, col < E
    start, length, tile, stop, kv_head = _entry(work_ptr, turn, kv_heads, KIND)
    pos = tile + step
    in_row = (step < POS) & (pos < length)
    place = start + tile
    q = _load(q_ptr + place * stride_qt + kv_head * GROUP * stride_qh, (step * stride_qt + member * stride_qh)[:, None] + col[None, :],
              in_row, in_col, True, E != E_PAD, UPCAST)                                                     # [BLOCK_M, E_PAD]
    k_at = k_ptr + start * stride_kt + kv_head * stride_kh
    v_at = v_ptr + start * stride_vt + kv_head * stride_vh
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, E_PAD), tl.float32)
    whole = (tl.minimum(tile + 1, stop) if CAUSAL else stop) // BLOCK_N * BLOCK_N  # blocks up to here are seen by every row
    acc, best, total, k_at, v_at = _fwd_steps(acc, best, total, q, k_at, v_at, 0, whole, pos, stop, factor, stride_kt, stride_vt,
                                              E, E_PAD, BLOCK_N, CAUSAL, False, UPCAST, IEEE)
    acc, best, total, k_at, v_at = _fwd_steps(acc, best, total, q, k_at, v_at, whole, stop, pos, stop, factor, stride_kt, stride_vt,
                                              E, E_PAD, BLOCK_N, CAUSAL, True, UPCAST, IEEE)
    some = total > 0
    safe = tl.where(some, total, 1.0)
    head = kv_head * GROUP + member
    tl.store(lse_ptr + head * tokens + place + step, tl.where(some, (best + tl.log2(safe)) / LOG2E, float("-inf")), mask=in_row)
    tl.store(out_ptr + place * stride_ot + kv_head * GROUP * E + (step * stride_ot + member * E)[:, None] + col[None, :],
             (acc / safe[:, None]).to(out_ptr.dtype.element_ty), mask=in_row[:, None] & in_col[None, :])


@triton.jit
def varlen_attention_fwd_kernel(q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, work_ptr, factor, tokens, kv_heads,
                                stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
                                PERSISTENT: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
                                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, IEEE: tl.constexpr):
    "Every tile of a list, longest first: one a program, or as many as it takes when programs are few."
    if PERSISTENT:
        for base in tl.range(0, _list(work_ptr, KIND)[1] * kv_heads, tl.num_programs(0), disable_licm=True):
            _fwd_tile(_turn(base), q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, work_ptr, factor, tokens, kv_heads, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
                      KIND, CAUSAL, GROUP, E, E_PAD, BLOCK_M, BLOCK_N, UPCAST, IEEE)
    else: _fwd_tile(tl.program_id(0), q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, work_ptr, factor, tokens, kv_heads, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot,
                    KIND, CAUSAL, GROUP, E, E_PAD, BLOCK_M, BLOCK_N, UPCAST, IEEE)


@triton.jit
def varlen_attention_bwd_delta_kernel(grad_ptr, out_ptr, grad_lse_ptr, delta_ptr, tokens, heads, stride_gt, stride_gh, stride_ot, stride_oh,
                                      E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, LSE: tl.constexpr, UPCAST: tl.constexpr):
    "Row sums of grad * out, less the gradient of lse if there is one."
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    head = tl.program_id(1).to(tl.int64)
    col = tl.arange(0, E_PAD)
    in_row, in_col = row < tokens, col < E
    grad = _load(grad_ptr, (row * stride_gt + head * stride_gh)[:, None] + col[None, :], in_row, in_col, True, True, UPCAST)
    out = _load(out_ptr, (row * stride_ot + head * stride_oh)[:, None] + col[None, :], in_row, in_col, True, True, UPCAST)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), axis=1)
    if LSE: delta -= tl.load(grad_lse_ptr + head * tokens + row, mask=in_row, other=0.0)
    tl.store(delta_ptr + head * tokens + row, delta, mask=in_row)


@triton.jit
def _dq_steps(dq, q, grad, lse2, delta, k_at, v_at, low, high, pos, stop, factor, stride_kt, stride_vt,
              E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, IEEE: tl.constexpr):
    "Keys `low` to `high`, as in the forward pass; weights from the softmax sums (`lse2`, in powers of two)."
    n, col = tl.arange(0, BLOCK_N), tl.arange(0, E_PAD)
    in_col = col < E
    for base in range(low, high, BLOCK_N):
        key = base + n
        k = _load(k_at, n[:, None] * stride_kt + col[None, :], key < stop, in_col, MASKED, E != E_PAD, UPCAST)  # [BLOCK_N, E_PAD]
        v = _load(v_at, n[:, None] * stride_vt + col[None, :], key < stop, in_col, MASKED, E != E_PAD, UPCAST)
        nothing = tl.zeros((q.shape[0], BLOCK_N), tl.float32)
        p = tl.exp2(_dot(q, tl.trans(k), nothing, IEEE) * factor - lse2[:, None])                               # [BLOCK_M, BLOCK_N]
        if MASKED:
            seen = (key < stop)[None, :]
            if CAUSAL: seen = seen & (key[None, :] <= pos[:, None])
            p = tl.where(seen, p, 0.0)
        ds = p * (_dot(grad, tl.trans(v), nothing, IEEE) - delta[:, None])
        dq = _dot(ds.to(k.dtype), k, dq, IEEE)
        k_at += BLOCK_N * stride_kt
        v_at += BLOCK_N * stride_vt
    return dq, k_at, v_at


@triton.jit
def _dq_tile(turn, q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, work_ptr, factor, scale, tokens, kv_heads,
             stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh, stride_ot,
             KIND: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
             BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, IEEE: tl.constexpr):
    "Gradient of the queries: the same tiles as in the forward pass."
    POS: tl.constexpr = BLOCK_M // GROUP
    row, col = tl.arange(0, BLOCK_M), tl.arange(0, E_PAD)
    step, member, in_col = row // GROUP, row % GROUP, col < E
    start, length, tile, stop, kv_head = _entry(work_ptr, turn, kv_heads, KIND)
    pos = tile + step
    in_row = (step < POS) & (pos < length)
    place = start + tile
    q = _load(q_ptr + place * stride_qt + kv_head * GROUP * stride_qh, (step * stride_qt + member * stride_qh)[:, None] + col[None, :],
              in_row, in_col, True, E != E_PAD, UPCAST)                                                     # [BLOCK_M, E_PAD]
    grad = _load(grad_ptr + place * stride_gt + kv_head * GROUP * stride_gh, (step * stride_gt + member * stride_gh)[:, None] + col[None, :],
                 in_row, in_col, True, E != E_PAD, UPCAST)
    sums = (kv_head * GROUP + member) * tokens + place + step
    lse2 = tl.load(lse_ptr + sums, mask=in_row, other=0.0) * LOG2E
    delta = tl.load(delta_ptr + sums, mask=in_row, other=0.0)
    k_at = k_ptr + start * stride_kt + kv_head * stride_kh
    v_at = v_ptr + start * stride_vt + kv_head * stride_vh
    dq = tl.zeros((BLOCK_M, E_PAD), tl.float32)
    whole = (tl.minimum(tile + 1, stop) if CAUSAL else stop) // BLOCK_N * BLOCK_N
    dq, k_at, v_at = _dq_steps(dq, q, grad, lse2, delta, k_at, v_at, 0, whole, pos, stop, factor, stride_kt, stride_vt,
                               E, E_PAD, BLOCK_N, CAUSAL, False, UPCAST, IEEE)
    dq, k_at, v_at = _dq_steps(dq, q, grad, lse2, delta, k_at, v_at, whole, stop, pos, stop, factor, stride_kt, stride_vt,
                               E, E_PAD, BLOCK_N, CAUSAL, True, UPCAST, IEEE)
    tl.store(dq_ptr + place * stride_ot + kv_head * GROUP * E + (step * stride_ot + member * E)[:, None] + col[None, :],
             (dq * scale).to(dq_ptr.dtype.element_ty), mask=in_row[:, None] & in_col[None, :])


@triton.jit
def varlen_attention_bwd_dq_kernel(q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, work_ptr, factor, scale, tokens, kv_heads,
                                   stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh, stride_ot,
                                   PERSISTENT: tl.constexpr, KIND: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
                                   BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, IEEE: tl.constexpr):
    "Every tile of a list, longest first: one a program, or as many as it takes when programs are few."
    if PERSISTENT:
        for base in tl.range(0, _list(work_ptr, KIND)[1] * kv_heads, tl.num_programs(0), disable_licm=True):
            _dq_tile(_turn(base), q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, work_ptr, factor, scale, tokens, kv_heads, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh, stride_ot,
                     KIND, CAUSAL, GROUP, E, E_PAD, BLOCK_M, BLOCK_N, UPCAST, IEEE)
    else: _dq_tile(tl.program_id(0), q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dq_ptr, work_ptr, factor, scale, tokens, kv_heads, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh, stride_ot,
                   KIND, CAUSAL, GROUP, E, E_PAD, BLOCK_M, BLOCK_N, UPCAST, IEEE)


@triton.jit
def _dkv_steps(dk, dv, k, v, q_at, grad_at, lse_at, delta_at, low, high, key, stop, factor, tokens, stride_qt, stride_qh, stride_gt, stride_gh,
               GROUP: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr, BLOCK_M: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr, IEEE: tl.constexpr):
    "Positions `low` to `high` of the queries, all heads of the group; masked where some of them do not see some of the keys."
    POS: tl.constexpr = BLOCK_M // GROUP
    row, col = tl.arange(0, BLOCK_M), tl.arange(0, E_PAD)
    step, member, in_col = row // GROUP, row % GROUP, col < E
    for base in range(low, high, POS):
        pos = base + step
        in_row = (step < POS) & (pos < stop)
        q = _load(q_at, (step * stride_qt + member * stride_qh)[:, None] + col[None, :], in_row, in_col, True, E != E_PAD, UPCAST)  # [BLOCK_M, E_PAD]
        grad = _load(grad_at, (step * stride_gt + member * stride_gh)[:, None] + col[None, :], in_row, in_col, True, E != E_PAD, UPCAST)
        lse2 = tl.load(lse_at + member * tokens + step, mask=in_row, other=0.0) * LOG2E
        delta = tl.load(delta_at + member * tokens + step, mask=in_row, other=0.0)
        nothing = tl.zeros((k.shape[0], BLOCK_M), tl.float32)
        p = tl.exp2(_dot(k, tl.trans(q), nothing, IEEE) * factor - lse2[None, :])                               # [BLOCK_N, BLOCK_M]
        if MASKED: p = tl.where(key[:, None] <= pos[None, :], p, 0.0)
        dv = _dot(p.to(grad.dtype), grad, dv, IEEE)
        ds = p * (_dot(v, tl.trans(grad), nothing, IEEE) - delta[None, :])
        dk = _dot(ds.to(q.dtype), q, dk, IEEE)
        q_at += POS * stride_qt
        grad_at += POS * stride_gt
        lse_at += POS
        delta_at += POS
    return dk, dv, q_at, grad_at, lse_at, delta_at


@triton.jit
def varlen_attention_bwd_dkv_kernel(q_ptr, k_ptr, v_ptr, grad_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, work_ptr, factor, scale, tokens, kv_heads,
                                    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh, stride_ot,
                                    KIND: tl.constexpr, SPLIT: tl.constexpr, CAUSAL: tl.constexpr, GROUP: tl.constexpr, E: tl.constexpr, E_PAD: tl.constexpr,
                                    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UPCAST: tl.constexpr, IEEE: tl.constexpr):
    "Gradients of keys and values: a tile of keys meets the queries that see it; the heads of the group are summed in the tile, so nothing is added from outside."
    POS: tl.constexpr = BLOCK_M // GROUP
    n, col = tl.arange(0, BLOCK_N), tl.arange(0, E_PAD)
    in_col = col < E
    start, length, tile, stop, kv_head = _entry(work_ptr, tl.program_id(0), kv_heads, KIND)
    key = tile + n
    in_key = key < length
    place = start + tile
    k = _load(k_ptr + place * stride_kt + kv_head * stride_kh, n[:, None] * stride_kt + col[None, :], in_key, in_col, True, E != E_PAD, UPCAST)  # [BLOCK_N, E_PAD]
    v = _load(v_ptr + place * stride_vt + kv_head * stride_vh, n[:, None] * stride_vt + col[None, :], in_key, in_col, True, E != E_PAD, UPCAST)
    low = tile if CAUSAL else tl.full((), 0, tl.int32)
    q_at = q_ptr + (start + low) * stride_qt + kv_head * GROUP * stride_qh
    grad_at = grad_ptr + (start + low) * stride_gt + kv_head * GROUP * stride_gh
    lse_at = lse_ptr + kv_head * GROUP * tokens + start + low
    delta_at = delta_ptr + kv_head * GROUP * tokens + start + low
    dk = tl.zeros((BLOCK_N, E_PAD), tl.float32)
    dv = tl.zeros((BLOCK_N, E_PAD), tl.float32)
    if SPLIT and CAUSAL:
        diagonal = tl.minimum(tile + (BLOCK_N + POS - 2) // POS * POS, tl.maximum(stop, tile))  # from here on every query sees every key
        dk, dv, q_at, grad_at, lse_at, delta_at = _dkv_steps(dk, dv, k, v, q_at, grad_at, lse_at, delta_at, low, tl.minimum(diagonal, stop), key, stop, factor, tokens,
                                                             stride_qt, stride_qh, stride_gt, stride_gh, GROUP, E, E_PAD, BLOCK_M, True, UPCAST, IEEE)
        low = diagonal
    dk, dv, q_at, grad_at, lse_at, delta_at = _dkv_steps(dk, dv, k, v, q_at, grad_at, lse_at, delta_at, low, stop, key, stop, factor, tokens,
                                                         stride_qt, stride_qh, stride_gt, stride_gh, GROUP, E, E_PAD, BLOCK_M, CAUSAL and not SPLIT, UPCAST, IEEE)
    inside = in_key[:, None] & in_col[None, :]
    at = place * stride_ot + kv_head * E + n[:, None] * stride_ot + col[None, :]
    tl.store(dk_ptr + at, (dk * scale).to(dk_ptr.dtype.element_ty), mask=inside)
    tl.store(dv_ptr + at, dv.to(dv_ptr.dtype.element_ty), mask=inside)


def rows(dtype: torch.dtype) -> tuple[int, int]:
    "Rows of a large and a small tile. Full-precision products do not use the matrix units and take far more registers."
    return (32, 16) if dtype == torch.float32 else (128, 64)


def tile_sizes(dtype: torch.dtype, group: int) -> tuple[int, int, int, int]:
    "Positions a tile of each list covers: queries share a tile with the other heads of their group, keys do not."
    big, small = rows(dtype)
    return big // group, small // group, big, small


def launch_options(kernel: str, dtype: torch.dtype, group: int = 1, big: bool = True) -> dict:
    """Blocks, warps and pipeline stages of `kernel` (fwd, dq, dkv), none of which spills on sm_90 (the compile check looks).

    Large tiles want few loads for each product, small ones that several programs share a processor. The two sums of keys and
    values take so many registers that queries meet them 32 rows at a time or 16, and that a small tile has one loop, always masked.
    """
    tile, warps = rows(dtype)[0 if big else 1], 8 if big else 4
    if dtype == torch.float32: block, options = 16, dict(IEEE=True, num_warps=warps, num_stages=1)
    else: block, options = 64 if big else 32, dict(IEEE=False, num_warps=warps, num_stages=3 if kernel == "fwd" else 2)
    if kernel != "dkv": return dict(BLOCK_M=tile, BLOCK_N=block, **options)
    tight = group & (group - 1) != 0 or (group > 4 and not big)
    return dict(BLOCK_M=16 if tight else min(block, 32), BLOCK_N=tile, SPLIT=big, **options)


def padded(e: int) -> int:
    "Columns of a block: a power of two, and a matrix product needs 16."
    return max(16, 1 << (e - 1).bit_length())


RESIDENT = {"big": 1, "small": 2}  # programs a processor holds, by the registers of the half-precision kernels


@dataclass(frozen=True, eq=False)
class Plan:
    "Which tiles there are, longest first; good for every layer and both directions while the bounds stay the same."

    work: Tensor    # [1 + n, 4] int32: where each of the four lists ends; then start and length of a document, tile, where the loop over the other side stops
    most: tuple[int, int, int, int]   # tiles each list can have
    exact: bool     # has it so many? Otherwise it is a bound, and the device knows
    tokens: int     # T
    sizes: tuple[int, int, int, int]  # positions a tile of each list covers
    causal: bool


def _work(cu_seqlens: Tensor, tokens: int, sizes: tuple[int, int, int, int], causal: bool) -> Tensor:
    """The lists, by tensor operations on the device of `cu_seqlens`, which nobody waits for.

    As long as they could become: T // small + documents of queries and of keys. A document below `SHORT` is cut into small
    tiles, another into large ones, with a small one at its end if that suffices and the document is not long (`TAIL`). Padding is one document more, whose loops are empty.
    """
    bounds = torch.cat([cu_seqlens.long(), torch.full((1,), tokens, dtype=torch.int64, device=cu_seqlens.device)])
    start, length = bounds[:-1], bounds.diff()
    many, counts = length.shape[0], []
    last = torch.arange(many, device=cu_seqlens.device) == many - 1             # the padding: always small tiles
    short = (length < SHORT) | last
    for big, small in (sizes[:2], sizes[2:]):
        rest = length % big
        tail = (rest > 0) & (rest <= small) & (length <= TAIL * big)
        counts += [torch.where(short, 0, (length + big - 1) // big - tail.long()), torch.where(short, (length + small - 1) // small, tail.long())]
    count = torch.cat(counts)                                                   # [4 * many]
    ends = count.cumsum(0)
    place = torch.arange(tokens // sizes[1] + tokens // sizes[3] + 2 * many, device=cu_seqlens.device)
    at = torch.searchsorted(ends, place, right=True)                            # 4 * many: not there
    kind, doc, nth = at // many, at % many, place - (ends - count)[at.clamp(max=4 * many - 1)]
    of_q = kind < 2
    big, small = torch.where(of_q, sizes[0], sizes[2]), torch.where(of_q, sizes[1], sizes[3])
    length_of, is_small = length[doc], kind % 2 == 1
    size = torch.where(is_small, small, big)
    tile = torch.where(is_small & ~short[doc], length_of // big * big, nth * size)
    stop = torch.where(of_q, torch.minimum(tile + size, length_of), length_of) if causal else length_of
    cost = torch.where(of_q, stop, length_of - tile) if causal else length_of
    stop, cost = torch.where(last[doc], 0, stop), torch.where(last[doc], 0, cost)
    order = (kind * 2**32 - cost).argsort(stable=True)                          # by list, and the longest first
    entries = torch.stack([start[doc], length_of, tile, stop], dim=1)[order]
    return torch.cat([ends[many - 1::many][None], entries]).to(torch.int32)


def prepare(
    cu_seqlens: Tensor,               # [B+1] bounds of the documents, on the host or on a device
    tokens: int,                      # T of the pack, padding included
    heads: int,                       # h
    kv_heads: int,                    # hk
    dtype: torch.dtype = torch.bfloat16,  # of q, k and v
    causal: bool = True,
    max_seqlen: int | None = None,    # tokens of the longest document, if known: below `SHORT` no large tiles are launched
    device: torch.device | str | None = None,  # where q will be; None: where `cu_seqlens` is
) -> Plan:
    "The work of a pack, once for all layers. From bounds on the host it is cut to size and sent along; on a device it is made there, and nothing waits."
    _check_kernel(dtype, heads, kv_heads)
    if tokens >= 2**31: raise ValueError(f"tokens={tokens}: need less than 2**31")
    sizes = tile_sizes(dtype, heads // kv_heads)
    known = cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    if known: check_bounds(cu_seqlens, tokens, max_seqlen)
    work = _work(cu_seqlens, tokens, sizes, causal)
    most = tuple(tokens // size + cu_seqlens.shape[0] for size in sizes)
    if max_seqlen is not None and max_seqlen < SHORT: most = (0, most[Q_SMALL], 0, most[KV_SMALL])
    if known:
        ends = work[0].tolist()
        work, most = work[:1 + ends[-1]], tuple(b - a for a, b in zip([0, *ends], ends))
    if device is not None and torch.device(device).type == "cuda" and work.device.type == "cpu": work = work.pin_memory()
    return Plan(work if device is None else work.to(device, non_blocking=True), most, known, tokens, sizes, causal)


def useful_pairs(
    cu_seqlens: Tensor,               # [B+1] bounds of the documents
    causal: bool = True,
) -> int:                             # pairs of a query and a key that it sees, of one head
    "What has to be computed: 4 * h * e operations a pair forward, 10 backward."
    s = cu_seqlens.long().diff()
    return int((s * (s + 1) // 2 if causal else s * s).sum())


def tile_pairs(
    plan: Plan,
    dtype: torch.dtype = torch.bfloat16,  # of q
    group: int = 1,                   # query heads a KV head
) -> Tensor:                          # int64, of each tile of queries (the large, then the small): rows times keys that are multiplied
    "What the forward pass computes; rows hold the whole group, so the sum is to be compared with group * `useful_pairs`."
    ends, tiles = plan.work[0].tolist(), []
    for first, last, big in ((0, ends[Q_BIG], True), (ends[Q_BIG], ends[Q_SMALL], False)):
        block = launch_options("fwd", dtype, group, big)
        tiles.append(block["BLOCK_M"] * block["BLOCK_N"] * -(-plan.work[1 + first:1 + last, 3].long() // block["BLOCK_N"]))
    return torch.cat(tiles)


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, scale: float | None) -> None:
    "Everything that can be checked without asking the device."
    for name, t in {"q": q, "k": k, "v": v}.items():
        if t.ndim != 3: raise ValueError(f"{name} has shape {tuple(t.shape)}: need 3 dimensions (q [T,h,e], k and v [T,hk,e])")
        if t.device != q.device: raise ValueError(f"{name} is on {t.device}, q on {q.device}: need one device")
        if not t.is_floating_point() or t.dtype != q.dtype: raise ValueError(f"{name} is {t.dtype}, q {q.dtype}: need the same floating type")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1: raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: need one dimension, B+1 bounds of B documents")
    if cu_seqlens.dtype not in (torch.int32, torch.int64): raise ValueError(f"cu_seqlens is {cu_seqlens.dtype}: need int32 (int64 is taken too)")
    if cu_seqlens.device not in (q.device, torch.device("cpu")): raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, q on {q.device}: need that device or the CPU")
    if k.shape != v.shape: raise ValueError(f"v has shape {tuple(v.shape)}, k {tuple(k.shape)}: need the same")
    (t, h, e), (tk, hk, ek) = q.shape, k.shape
    if t != tk: raise ValueError(f"q has T={t} tokens, k {tk}: need the same; documents attend to themselves")
    if e != ek or e < 1: raise ValueError(f"head size e={e} in q and {ek} in k: need the same, at least 1")
    if hk < 1 or h < 1 or h % hk: raise ValueError(f"h={h} query heads and hk={hk} KV heads: need h to be a multiple of hk")
    if scale is not None and not 0 < scale < math.inf: raise ValueError(f"scale={scale}: need a number above 0, or None for 1/sqrt(e)")
    if max_seqlen is not None and max_seqlen < 0: raise ValueError(f"max_seqlen={max_seqlen}: need the length of the longest document, or None")


def _check_kernel(dtype: torch.dtype, heads: int, kv_heads: int, e: int = MAX_HEAD) -> None:
    "What the kernel cannot do although the references can."
    if dtype not in DTYPES: raise ValueError(f"q is {dtype}: the kernel needs float32, float16 or bfloat16; or impl='torch'")
    if e > MAX_HEAD: raise ValueError(f"head size e={e}: the kernel needs at most {MAX_HEAD}; or impl='torch'")
    if kv_heads < 1 or heads < 1 or heads % kv_heads: raise ValueError(f"h={heads} query heads and hk={kv_heads} KV heads: need h to be a multiple of hk")
    if heads // kv_heads > MAX_GROUP: raise ValueError(f"h={heads} query heads over hk={kv_heads} KV heads: the kernel needs at most {MAX_GROUP} a KV head; repeat the KV heads, or impl='torch'")


def check_bounds(cu_seqlens: Tensor, tokens: int, max_seqlen: int | None = None) -> None:
    "Check what `cu_seqlens` holds. Waits for its device; on the host it costs little and is always done."
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0: raise ValueError(f"cu_seqlens[0]={bounds[0]}: need 0")
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if stop < start: raise ValueError(f"cu_seqlens[{i + 1}]={stop} after {start}: need bounds that do not fall")
        if max_seqlen is not None and stop - start > max_seqlen: raise ValueError(f"document {i} has {stop - start} tokens, max_seqlen={max_seqlen}: need at least that, or None")
    if bounds[-1] > tokens: raise ValueError(f"cu_seqlens[-1]={bounds[-1]}: need at most T={tokens}, the tokens of q")


def _dense(t: Tensor) -> Tensor:
    "With elements of a head side by side, as the kernels read them; a copy only where they are not."
    return t if t.stride(-1) == 1 or t.shape[-1] == 1 else t.contiguous()


def _launch(kernel, name: str, most: list[int], exact: bool, q: Tensor, hk: int, *args, causal: bool) -> None:
    "The kernel over its list of large and its list of small tiles: a program a tile, so that the device hands out the next longest to whoever is free; where only the device knows how many, as many as it holds."
    shared = dict(CAUSAL=causal, GROUP=q.shape[1] // hk, E=q.shape[2], E_PAD=padded(q.shape[2]), UPCAST=INTERPRETED)
    for kind in (KV_BIG, KV_SMALL) if name == "dkv" else (Q_BIG, Q_SMALL):
        big, programs = kind in (Q_BIG, KV_BIG), most[kind] * hk
        if programs == 0: continue
        options = launch_options(name, q.dtype, q.shape[1] // hk, big)
        if name != "dkv":
            options["PERSISTENT"] = not exact
            if not exact: programs = min(programs, RESIDENT["big" if big else "small"] * (torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1))
        kernel[(programs,)](*args, KIND=kind, **shared, **options)


@torch.library.custom_op("modeltc::varlen_attention", mutates_args=())
def _varlen_attention_op(q: Tensor, k: Tensor, v: Tensor, work: Tensor, most: list[int], exact: bool, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    "Outputs and lse: every row of both belongs to a tile of the work, so nothing is cleared before."
    if INTERPRETED and (trouble := interpreter_trouble()): raise RuntimeError(trouble)
    (t, h, e), hk = q.shape, k.shape[1]
    out, lse = torch.empty((t, h, e), dtype=q.dtype, device=q.device), torch.empty((h, t), dtype=torch.float32, device=q.device)
    if t == 0: return out, lse
    _launch(varlen_attention_fwd_kernel, "fwd", most, exact, q, hk, q, k, v, out, lse, work, scale * LOG2E.value, t, hk,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), h * e, causal=causal)
    return out, lse


@_varlen_attention_op.register_fake
def _(q, k, v, work, most, exact, causal, scale): return torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty((q.shape[1], q.shape[0]), dtype=torch.float32, device=q.device)


def _plan_of(q: Tensor, k: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, causal: bool, plan: Plan | None) -> Plan:
    "The plan, which must be one for these tensors, or a new one."
    if INTERPRETED is False and not q.is_cuda: raise RuntimeError(f"impl='triton' with q on {q.device}: need a CUDA tensor, or the interpreter (set TRITON_INTERPRET=1 before the import)")
    (t, h, e), hk = q.shape, k.shape[1]
    _check_kernel(q.dtype, h, hk, e)
    if plan is None: return prepare(cu_seqlens, t, h, hk, q.dtype, causal, max_seqlen, q.device)
    for name, mine, asked in (("tokens", plan.tokens, t), ("causal", plan.causal, causal), ("tiles", plan.sizes, tile_sizes(q.dtype, h // hk)), ("device", plan.work.device, q.device)):
        if mine != asked: raise ValueError(f"plan has {name} {mine}, the call {asked}: need the same; make it by prepare(cu_seqlens, tokens, heads, kv_heads, dtype, causal, device=...)")
    return plan


def varlen_attention(
    q: Tensor,                        # [T, h, e] queries of all documents, one behind the other
    k: Tensor,                        # [T, hk, e] keys
    v: Tensor,                        # [T, hk, e] values
    cu_seqlens: Tensor,               # [B+1] int32, document i is tokens cu_seqlens[i] to cu_seqlens[i+1]; empty documents allowed
    max_seqlen: int | None = None,    # tokens of the longest document, if known
    causal: bool = True,              # see only tokens up to one's own; False: the whole document
    scale: float | None = None,       # of the scores; None: 1 / sqrt(e)
    impl: str = "auto",               # "torch" (document by document), "triton", or "auto": torch on CPU, the kernel on CUDA
    *,
    plan: Plan | None = None,         # of `prepare`, so that the list is not made again in every layer
    return_lse: bool = False,         # also the log of the softmax sums
    check: bool = False,              # also check bounds that are on a device, which waits for it; without it they must be right
) -> Tensor | tuple[Tensor, Tensor]:  # [T, h, e], zeros behind the last document; lse [h, T]
    "Attention inside each document of a pack; differentiable."
    _check(q, k, v, cu_seqlens, max_seqlen, scale)
    if impl not in ("auto", "torch", "triton"): raise ValueError(f"impl={impl!r}: need 'auto', 'torch' or 'triton'")
    if check or (cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()): check_bounds(cu_seqlens, q.shape[0], max_seqlen)
    if impl == "torch" or (impl == "auto" and not q.is_cuda):
        return varlen_attention_ref(q, k, v, cu_seqlens, causal, scale) if return_lse else _varlen_attention_torch(q, k, v, cu_seqlens, causal, scale)
    plan = _plan_of(q, k, cu_seqlens, max_seqlen, causal, plan)
    out, lse = _varlen_attention_op(_dense(q), _dense(k), _dense(v), plan.work, list(plan.most), plan.exact, causal, _default(scale, q.shape[2]))
    return (out, lse) if return_lse else out


@torch.library.custom_op("modeltc::varlen_attention_bwd", mutates_args=())
def _varlen_attention_bwd_op(grad: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, work: Tensor, most: list[int],
                             exact: bool, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    "Row sums first, then the gradients of keys and values over tiles of keys, those of queries over tiles of queries."
    if INTERPRETED and (trouble := interpreter_trouble()): raise RuntimeError(trouble)
    (t, h, e), hk = q.shape, k.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if t == 0: return dq, dk, dv
    delta, grad = torch.empty((h, t), dtype=torch.float32, device=q.device), _dense(grad)
    varlen_attention_bwd_delta_kernel[(-(-t // 128), h)](grad, out, lse if grad_lse is None else grad_lse.float().contiguous(), delta, t, h, grad.stride(0), grad.stride(1), out.stride(0), out.stride(1),
                                                         E=e, E_PAD=padded(e), BLOCK_M=128, LSE=grad_lse is not None, UPCAST=INTERPRETED, num_warps=4)
    shared = (scale * LOG2E.value, scale, t, hk, q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1), grad.stride(0), grad.stride(1))
    _launch(varlen_attention_bwd_dkv_kernel, "dkv", most, exact, q, hk, q, k, v, grad, lse, delta, dk, dv, work, *shared, hk * e, causal=causal)
    _launch(varlen_attention_bwd_dq_kernel, "dq", most, exact, q, hk, q, k, v, grad, lse, delta, dq, work, *shared, h * e, causal=causal)
    return dq, dk, dv


@_varlen_attention_bwd_op.register_fake
def _(grad, grad_lse, q, k, v, out, lse, work, most, exact, causal, scale): return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def varlen_attention_bwd(
    grad: Tensor,                     # [T, h, e] of the outputs
    q: Tensor,                        # [T, h, e]
    k: Tensor,                        # [T, hk, e]
    v: Tensor,                        # [T, hk, e]
    out: Tensor,                      # [T, h, e] what the forward pass gave
    lse: Tensor,                      # [h, T] fp32, its softmax sums
    cu_seqlens: Tensor,               # [B+1] int32
    causal: bool = True,
    scale: float | None = None,
    impl: str = "auto",               # "torch" (the reference), "triton", or "auto"
    *,
    plan: Plan | None = None,
    grad_lse: Tensor | None = None,   # [h, T] gradient of lse, if it was used
) -> tuple[Tensor, Tensor, Tensor]:   # gradients of q, k and v
    "The backward pass by itself, for those who merge softmax sums over ranks; autograd calls the same kernels."
    _check(q, k, v, cu_seqlens, None, scale)
    for name, t, shape in (("grad", grad, q.shape), ("out", out, q.shape), ("lse", lse, (q.shape[1], q.shape[0]))):
        if t.shape != shape: raise ValueError(f"{name} has shape {tuple(t.shape)}: need {tuple(shape)}")
    if impl not in ("auto", "torch", "triton"): raise ValueError(f"impl={impl!r}: need 'auto', 'torch' or 'triton'")
    if impl == "torch" or (impl == "auto" and not q.is_cuda): return varlen_attention_bwd_ref(grad, q, k, v, out, lse, cu_seqlens, causal, scale, grad_lse)
    plan = _plan_of(q, k, cu_seqlens, None, causal, plan)
    return _varlen_attention_bwd_op(grad, grad_lse, _dense(q), _dense(k), _dense(v), out, lse.contiguous(), plan.work, list(plan.most), plan.exact, causal, _default(scale, q.shape[2]))


def _setup(ctx, inputs, output) -> None:
    q, k, v, work, ctx.most, ctx.exact, ctx.causal, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output, work)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, grad_lse):
    q, k, v, out, lse, work = ctx.saved_tensors
    if grad is None and grad_lse is None: return (None,) * 8
    grads = _varlen_attention_bwd_op(torch.zeros_like(out) if grad is None else grad, grad_lse, q, k, v, out, lse, work, ctx.most, ctx.exact, ctx.causal, ctx.scale)
    return *grads, None, None, None, None, None


_varlen_attention_op.register_autograd(_backward, setup_context=_setup)
