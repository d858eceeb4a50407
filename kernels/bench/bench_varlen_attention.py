"""Varlen attention on a GPU, forward and backward, beside what a user would otherwise run and beside what the machine can do.

    PYTHONPATH=.:kernels python kernels/bench/bench_varlen_attention.py [--out FILE] [--only TEXT]

Correctness first: a pack of awkward documents must agree with the fp64 reference and the pack to be timed with torch's own
attention document by document, outputs and gradients, or nothing is timed. Peers: compiled flex attention with a block mask of
the documents, whose making is timed apart, as the making of our list is; torch's varlen_attn and flash_attn where they can be
had; scaled_dot_product_attention with a dense mask. A rate counts the operations that are of use (4 h e a pair of a query and a
key that it sees, 10 more backward), whatever a way computes beyond them. Bounds: the operations at the rate of a large matrix
product, or the bytes at the bandwidth of a copy, both measured in the same run; and the share of our tiles that is of use.
Times are CUDA events with a cold cache.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 1, 0)]

import numpy as np  # noqa: E402
from bench_paged_decode import copy_bandwidth, relative_error  # noqa: E402
from modeltc_kernels.runtime import INTERPRETED  # noqa: E402
from modeltc_kernels.varlen_attention import (  # noqa: E402
    prepare,
    tile_pairs,
    useful_pairs,
    varlen_attention,
    varlen_attention_bwd_ref,
    varlen_attention_ref,
)
from rows import row, save  # noqa: E402

from modeltc_lab.core.bench import gpu_times  # noqa: E402

FLUSH = 1 << 30
ERROR_LIMIT = 1e-2     # of the size of outputs and gradients: rounding to bf16 should leave about half of it
PACK = 16384           # tokens
AWKWARD = [1, 130, 0, 257, 64, 255, 256, 15]
EXPERIMENT = "varlen_attention_speed"


def mixes():
    "Name -> (documents, query heads, KV heads, head size, causal). Packs of the generated long-context mix and of the vision-language lists, as they are packed."
    from modeltc_lab.balance.lengths import long_context_mix, vlm_samples
    from modeltc_lab.balance.packing import pack
    text = long_context_mix(20_000, 40)
    plan = pack(text[text <= PACK], PACK, "isf")
    full = np.flatnonzero(plan.tokens > 0.98 * PACK)
    order, lengths = full[plan.squares[full].argsort()], lambda p, i: p.lengths[p.offsets[i]:p.offsets[i + 1]].tolist()
    vlm = pack(np.minimum(vlm_samples(5_000).sizes[:, -1], PACK), PACK, "isf")
    middle = vlm.squares.argsort()[vlm.packs // 2]
    llama = (32, 8, 128, True)
    return {"16K pack, middle": (lengths(plan, order[len(order) // 2]), *llama), "16K pack, shortest documents": (lengths(plan, order[0]), *llama),
            "16K pack, one document": ([PACK], *llama), "16K pack, documents of 480": ([480] * (PACK // 480), *llama), "16K pack, middle, e=64": (lengths(plan, order[len(order) // 2]), 14, 2, 64, True),
            "VLM pack, language model": (lengths(vlm, middle), 48, 8, 128, True), "VLM pack, vision tower": ([1025] * 16, 25, 25, 128, False)}


def case(lengths, h, hk, e, causal, device="cuda", seed=0):
    "Random q, k, v and gradients of a pack, and its bounds on the host."
    g, t = torch.Generator(device=device).manual_seed(seed), sum(lengths)
    return [torch.randn(t, n, e, generator=g, device=device, dtype=torch.bfloat16) for n in (h, hk, hk, h)] + [torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)]


def with_gradients(attend, q, k, v, grad):
    "Outputs and the three gradients."
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    out = attend(*inputs)
    return [out, *torch.autograd.grad(out, inputs, grad)]


def gate(attend, args, causal, exact):
    "The largest relative error of outputs and gradients; raises on one that is too large. `exact`: against the fp64 reference, for small packs."
    q, k, v, grad, cu = args
    found = with_gradients(lambda *x: attend(*x, cu, causal), q, k, v, grad)
    if exact:
        wide = [x.double() for x in (q, k, v)]
        out, lse = varlen_attention_ref(*wide, cu, causal)
        expected = [out, *varlen_attention_bwd_ref(grad.double(), *wide, out, lse, cu, causal)]
    else: expected = with_gradients(lambda *x: varlen_attention(*x, cu, causal=causal, impl="torch"), q, k, v, grad)
    errors = [relative_error(x, y) for x, y in zip(found, expected)]
    for name, error in zip(("out", "dq", "dk", "dv"), errors):
        if not error <= ERROR_LIMIT: raise ValueError(f"{name} has relative error {error:.2g} against the reference, allowed {ERROR_LIMIT}: the kernel is wrong and is not timed")
    return max(errors)


def ours(q, k, v, cu, causal): return varlen_attention(q, k, v, cu, causal=causal, impl="triton")


def heads_first(x): return x.transpose(0, 1)[None]


def dense(cu, causal, device):
    "The mask of a pack as a matrix, and attention with it."
    doc = torch.repeat_interleave(torch.arange(len(cu) - 1), cu.diff().long()).to(device)
    seen = doc[:, None] == doc[None, :]
    if causal: seen &= torch.ones_like(seen).tril()
    return lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), attn_mask=seen, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1)


def flex(cu, causal, device, compiled=True):
    "Flex attention with a block mask of the documents: the attention, and a call that makes the mask."
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention
    torch._dynamo.reset()
    doc, t = torch.repeat_interleave(torch.arange(len(cu) - 1), cu.diff().long()).to(device), int(cu[-1])
    def sees(b, h, i, j): return (doc[i] == doc[j]) & (i >= j) if causal else doc[i] == doc[j]
    make = torch.compile(create_block_mask, dynamic=False) if compiled else create_block_mask
    attend, build = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention, lambda: make(sees, None, None, t, t, device=device)
    mask = build()
    return lambda q, k, v: attend(heads_first(q), heads_first(k), heads_first(v), block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])[0].transpose(0, 1), build


def torch_varlen(cu, causal, device):
    "torch's own varlen attention."
    import inspect

    from torch.nn.attention.varlen import varlen_attn
    at, longest, names = cu.to(device), int(cu.diff().max()), inspect.signature(varlen_attn).parameters
    side = dict(window_size=(-1, 0) if causal else (-1, -1)) if "window_size" in names else dict(is_causal=causal)

    def attend(q, k, v):
        if q.shape[1] != k.shape[1] and "enable_gqa" not in names: k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        more = dict(enable_gqa=True) if q.shape[1] != k.shape[1] else {}
        return varlen_attn(q, k, v, at, at, longest, longest, **side, **more)
    return attend


def flash(cu, causal, device):
    "The flash_attn package."
    from flash_attn import flash_attn_varlen_func
    at, longest = cu.to(device), int(cu.diff().max())
    return lambda q, k, v: flash_attn_varlen_func(q, k, v, at, at, longest, longest, causal=causal)


def ways_of(args, causal, device):
    "Every way of attending in one pack: name -> (implementation, attention, call that prepares the pack or None). What cannot be had, or is wrong, is left out and said."
    q, k, v, grad, cu = args
    h, hk, t, at = q.shape[1], k.shape[1], len(q), cu.to(device)
    plan = prepare(cu, t, h, hk, q.dtype, causal, device=device)
    made = prepare(at, t, h, hk, q.dtype, causal)
    ways = {"varlen_attention": ("modeltc_kernels", lambda q, k, v: varlen_attention(q, k, v, cu, causal=causal, impl="triton", plan=plan), lambda: prepare(cu, t, h, hk, q.dtype, causal, device=device)),
            "varlen_attention, list made on the device": ("modeltc_kernels", lambda q, k, v: varlen_attention(q, k, v, at, causal=causal, impl="triton", plan=made), lambda: prepare(at, t, h, hk, q.dtype, causal))}
    peers = {"flex attention": lambda: flex(cu, causal, device), "varlen_attn of torch": lambda: (torch_varlen(cu, causal, device), None), "flash_attn": lambda: (flash(cu, causal, device), None),
             "SDPA, dense mask": lambda: (dense(cu, causal, device), lambda: dense(cu, causal, device))}
    expected = None
    for name, get in peers.items():
        try:
            attend, build = get()
            found = with_gradients(attend, q, k, v, grad)
            if expected is None: expected = with_gradients(lambda *x: varlen_attention(*x, cu, causal=causal, impl="torch"), q, k, v, grad)
            error = max(relative_error(x, y) for x, y in zip(found, expected))
            if not error <= ERROR_LIMIT: raise ValueError(f"relative error {error:.2g}")
            ways[name] = (name.split()[0] if name == "flash_attn" else "torch", attend, build)
        except Exception as error:  # it is not installed, needs a compiler, or more memory
            print(f"{name} is left out: {type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0][:120]}")
    return ways


def matmul_rate(n=8192):
    "Operations a second of a large product in bf16."
    a, b = (torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / sorted(gpu_times(lambda: a @ b, 20))[10]


def operations(cu, h, e, causal): return 4 * h * e * useful_pairs(cu, causal)


def floor(cu, h, hk, e, causal, rate, copy, both=False):
    "Seconds that no way can be below: operations at the rate of a product, or every tensor read or written once at the bandwidth of a copy."
    t, ops = int(cu[-1]), operations(cu, h, e, causal)
    forward = 2 * t * e * (2 * h + 2 * hk)                       # q, out, k, v
    return max((3.5 if both else 1) * ops / rate, (forward + (2 * t * e * (4 * h + 4 * hk) if both else 0)) / copy)  # q, out, grad, dq; k, v, dk, dv


def measure(name, lengths, h, hk, e, causal, rate, copy, device):
    "Records of one pack."
    args = case(lengths, h, hk, e, causal)
    error = max(gate(ours, case(AWKWARD, h, hk, e, causal), causal, True), gate(ours, args, causal, False))
    q, k, v, grad, cu = args
    plan = prepare(cu, len(q), h, hk, q.dtype, causal)
    config = dict(documents=len(lengths), longest=max(lengths), tokens=len(q), h=h, hk=hk, e=e, causal=causal, dtype="bfloat16", copy_bytes_per_s=copy, matmul_flops=rate)
    options, out = dict(device=device, x_name="pack", x=name, config=config), []
    add = lambda method, metric, unit, samples, implementation="modeltc_kernels": out.append(row(EXPERIMENT, method, metric, unit, samples, implementation=implementation, **options))
    add("varlen_attention", "relative error", "ratio", [error])
    add("varlen_attention", "useful share of tiles", "ratio", [h // hk * useful_pairs(cu, causal) / int(tile_pairs(plan, q.dtype, h // hk).sum())])
    ops, medians = operations(cu, h, e, causal), {}
    for method, (implementation, attend, build) in ways_of(args, causal, "cuda").items():
        if build is not None: add(method, "preparation", "us", [1e6 * s for s in gpu_times(build, 20)], implementation)
        for metric, both, call in (("forward", False, lambda: attend(q, k, v)), ("forward and backward", True, lambda: with_gradients(attend, q, k, v, grad))):
            if both: seconds = gpu_times(call, 30, flush_bytes=FLUSH)
            else:
                with torch.no_grad(): seconds = gpu_times(call, 30, flush_bytes=FLUSH)
            medians[method, metric] = sorted(seconds)[len(seconds) // 2]
            add(method, metric, "us", [1e6 * s for s in seconds], implementation)
            add(method, f"{metric}, rate", "TFLOP/s", [(3.5 if both else 1) * ops / s / 1e12 for s in seconds], implementation)
            add(method, f"{metric}, share of the bound", "ratio", [floor(cu, h, hk, e, causal, rate, copy, both) / s for s in seconds], implementation)
    for metric in ("forward", "forward and backward"):
        if ("flex attention", metric) in medians: add("varlen_attention", f"{metric}, flex attention's time over ours", "ratio", [medians["flex attention", metric] / medians["varlen_attention", metric]])
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the rows here instead of docs/results")
    parser.add_argument("--only", default="", help="time the packs whose name contains this; needs --out")
    args = parser.parse_args()
    if args.only and not args.out:
        print("bench_varlen_attention: --only needs --out FILE: the record in docs/results holds every pack", file=sys.stderr)
        return 2
    if INTERPRETED or not torch.cuda.is_available():
        print("bench_varlen_attention: no CUDA device, or TRITON_INTERPRET is set; interpreted speed means nothing, so nothing is timed. Run `make gpu` on a machine with a GPU.", file=sys.stderr)
        return 2
    chosen = {name: mix for name, mix in mixes().items() if args.only in name}
    if not chosen:
        print(f"bench_varlen_attention: --only {args.only!r} names none of {list(mixes())}", file=sys.stderr)
        return 2
    device, copy, rate, rows = torch.cuda.get_device_name(), copy_bandwidth(), matmul_rate(), []
    print(f"{device}: copy {copy / 1e12:.2f} TB/s, product {rate / 1e12:.0f} TFLOP/s")
    for name, mix in chosen.items():
        try: found = measure(name, *mix, rate, copy, device)
        except ValueError as error:
            print(f"bench_varlen_attention: {name}: {error}", file=sys.stderr)
            return 1
        rows += found
        middle = [(r["method"], r["metric"], sorted(r["samples"])[len(r["samples"]) // 2]) for r in found]
        print(f"{name}: " + "; ".join(f"{m} {metric.removesuffix(', rate')} {value:.0f} TFLOP/s" for m, metric, value in middle if metric.endswith("rate")), flush=True)
    print(f"{len(rows)} records in {save(rows, args.out)}")
    return 0


if __name__ == "__main__": sys.exit(main())
