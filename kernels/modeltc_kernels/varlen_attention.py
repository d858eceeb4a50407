"""Attention of documents that lie one behind the other in a pack: every token sees its own document only, forward and backward.

Reading order: references, kernels, work list, launchers, registration. Shapes: T tokens of a pack, B documents whose bounds
are `cu_seqlens` [B+1], h query heads, hk KV heads (h a multiple of hk, `group` = h / hk), e head size. Tokens behind the last
document are padding: zeros come out of them and their lse is minus infinity.
"""

import math

import torch
from torch import Tensor


def _wide(dtype: torch.dtype) -> torch.dtype: return torch.float64 if dtype == torch.float64 else torch.float32


def varlen_attention_ref(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool = True, scale: float | None = None) -> tuple[Tensor, Tensor]:
    "The specification, in fp32 (fp64 stays fp64): each document by itself; outputs [T, h, e] and the log of the softmax sums, lse [h, T]."
    wide, group = _wide(q.dtype), q.shape[1] // k.shape[1]
    scale = 1 / math.sqrt(q.shape[2]) if scale is None else scale
    outs, sums, bounds = [], [], cu_seqlens.tolist()
    for start, stop in zip(bounds, bounds[1:]):
        if start == stop: continue
        keys, values = (t[start:stop].to(wide).repeat_interleave(group, dim=1) for t in (k, v))                 # [s, h, e]
        score = torch.einsum("the,she->hts", q[start:stop].to(wide), keys) * scale
        if causal: score = score.masked_fill(torch.ones(stop - start, stop - start, dtype=torch.bool, device=q.device).triu(1), -math.inf)
        sums.append(score.logsumexp(dim=-1))
        outs.append(torch.einsum("hts,she->the", score.softmax(dim=-1), values))
    rest = q.shape[0] - bounds[-1]
    outs.append(q.new_zeros(rest, *q.shape[1:], dtype=wide))
    sums.append(q.new_full((q.shape[1], rest), -math.inf, dtype=wide))
    return torch.cat(outs).to(q.dtype), torch.cat(sums, dim=1)


def varlen_attention_torch(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool = True, scale: float | None = None) -> Tensor:
    "torch's own attention, document by document, in the type of the inputs; differentiable. Reads `cu_seqlens` on the host."
    bounds = cu_seqlens.tolist()
    outs = [torch.nn.functional.scaled_dot_product_attention(*(t[start:stop].transpose(0, 1)[None] for t in (q, k, v)), is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)
            for start, stop in zip(bounds, bounds[1:]) if stop > start]
    return torch.cat([*outs, q.new_zeros(q.shape[0] - bounds[-1], *q.shape[1:])])


def _check(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None, scale: float | None) -> None:
    "Everything that can be checked without asking the device."
    for name, t in {"q": q, "k": k, "v": v}.items():
        if t.ndim != 3: raise ValueError(f"{name} has shape {tuple(t.shape)}: need 3 dimensions (q [T,h,e], k and v [T,hk,e])")
        if t.device != q.device: raise ValueError(f"{name} is on {t.device}, q on {q.device}: need one device")
        if not t.is_floating_point() or t.dtype != q.dtype: raise ValueError(f"{name} is {t.dtype}, q {q.dtype}: need the same floating type")
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1: raise ValueError(f"cu_seqlens has shape {tuple(cu_seqlens.shape)}: need one dimension, B+1 bounds of B documents")
    if cu_seqlens.dtype not in (torch.int32, torch.int64): raise ValueError(f"cu_seqlens is {cu_seqlens.dtype}: need int32 (int64 is taken too)")
    if k.shape != v.shape: raise ValueError(f"v has shape {tuple(v.shape)}, k {tuple(k.shape)}: need the same")
    (t, h, e), (tk, hk, ek) = q.shape, k.shape
    if t != tk: raise ValueError(f"q has T={t} tokens, k {tk}: need the same; documents attend to themselves")
    if e != ek or e < 1: raise ValueError(f"head size e={e} in q and {ek} in k: need the same, at least 1")
    if hk < 1 or h % hk: raise ValueError(f"h={h} query heads and hk={hk} KV heads: need h to be a multiple of hk")
    if scale is not None and not 0 < scale < math.inf: raise ValueError(f"scale={scale}: need a number above 0, or None for 1/sqrt(e)")
    if max_seqlen is not None and max_seqlen < 0: raise ValueError(f"max_seqlen={max_seqlen}: need the length of the longest document, or None")


def check_bounds(cu_seqlens: Tensor, tokens: int, max_seqlen: int | None = None) -> None:
    "Check what `cu_seqlens` holds. Waits for its device; on the host it costs nothing and is always done."
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0: raise ValueError(f"cu_seqlens[0]={bounds[0]}: need 0")
    for i, (start, stop) in enumerate(zip(bounds, bounds[1:])):
        if stop < start: raise ValueError(f"cu_seqlens[{i + 1}]={stop} after {start}: need bounds that do not fall")
        if max_seqlen is not None and stop - start > max_seqlen: raise ValueError(f"document {i} has {stop - start} tokens, max_seqlen={max_seqlen}: need at least that, or None")
    if bounds[-1] > tokens: raise ValueError(f"cu_seqlens[-1]={bounds[-1]}: need at most T={tokens}, the tokens of q")


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
    check: bool = False,              # also check the bounds when they are on a device, which waits for it
) -> Tensor:                          # [T, h, e], zeros behind the last document
    "Attention inside each document of a pack; differentiable."
    _check(q, k, v, cu_seqlens, max_seqlen, scale)
    if impl not in ("auto", "torch", "triton"): raise ValueError(f"impl={impl!r}: need 'auto', 'torch' or 'triton'")
    if check or (cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()): check_bounds(cu_seqlens, q.shape[0], max_seqlen)
    if impl == "torch" or (impl == "auto" and not q.is_cuda): return varlen_attention_torch(q, k, v, cu_seqlens, causal, scale)
    raise NotImplementedError("impl='triton': the kernel is not there yet; use impl='torch'")
