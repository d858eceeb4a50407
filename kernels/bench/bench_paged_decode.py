"""Paged decode attention on a GPU, beside what a user would otherwise run and beside the memory's own speed.

    PYTHONPATH=.:kernels python kernels/bench/bench_paged_decode.py [--out FILE]

Correctness first: a kernel that does not agree with its reference is not timed. Peers: gather the pages and call
scaled_dot_product_attention; that call and flex attention on KV gathered beforehand, which is work they are spared. Bound:
the bandwidth of a plain copy, measured in the same run. Times are CUDA events with a cold cache; overwriting the cache takes
longer than the host needs to launch what is timed, so the host's time is not in them.
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[i]) for i in (2, 1, 0)]

from modeltc_kernels.paged_decode import paged_decode, paged_decode_ref  # noqa: E402
from modeltc_kernels.runtime import INTERPRETED  # noqa: E402
from rows import row, save  # noqa: E402

from modeltc_lab.core.bench import gpu_times  # noqa: E402

H, HK, E = 32, 8, 128
SHAPES = [(1, 512), (1, 4096), (1, 32768), (8, 2048), (8, 32768), (64, 512), (64, 2048), (64, 8192), (256, 512), (256, 2048)]
FLUSH = 1 << 30
ERROR_LIMIT = 1e-2  # of the output's own size: rounding of weights and outputs to bf16 should leave about a fifth of it


def copy_bandwidth(bytes_=2 << 30):
    "Bytes a second of a device-to-device copy, read and written counted."
    a = torch.empty(bytes_, dtype=torch.int8, device="cuda").zero_()
    b = torch.empty_like(a)
    return 2 * bytes_ / sorted(gpu_times(lambda: b.copy_(a), 20, flush_bytes=FLUSH))[10]


def case(n, kv, page, device="cuda"):
    "Full pages in random order."
    pages = n * -(-kv // page)
    table = torch.randperm(pages, device=device, dtype=torch.int32).view(n, -1)
    k, v = (torch.randn(pages * page, HK, E, device=device, dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(n, H, E, device=device, dtype=torch.bfloat16)
    return q, k, v, table, torch.full((n,), kv, device=device, dtype=torch.int32)


def gather(pool, table, page):
    "The pages of every request side by side: [n, hk, kv, e]."
    return pool.view(-1, page, HK, E)[table.long()].flatten(1, 2).transpose(1, 2)


def sdpa(q, k, v): return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def flex():
    "Flex attention, compiled anew for each shape; an error where it cannot be had."
    from torch.nn.attention.flex_attention import flex_attention
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda q, k, v: compiled(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def relative_error(out, ref):
    "Root mean square of the difference over that of the reference: outputs shrink as the KV grows, so an absolute bound says nothing."
    return float((out.double() - ref.double()).norm() / ref.double().norm())


def gate(kernel, args, page):
    "The largest relative error on the first and last request, full and of ragged lengths; raises on one that is too large."
    q, k, v, table, lengths = args
    ends, worst = [0, len(q) - 1], 0.0
    ragged = (lengths * torch.rand(len(q), device=q.device)).to(torch.int32).clamp(min=1)
    for some in (lengths, ragged):
        error = relative_error(kernel(q, k, v, table, some, page)[ends], paged_decode_ref(q[ends].double(), k, v, table[ends], some[ends], page))
        worst = max(worst, error)
        if not error <= ERROR_LIMIT: raise ValueError(f"relative error {error:.2g} against the reference, allowed {ERROR_LIMIT}: the kernel is wrong and is not timed")
    return worst


def ways_of(args, page):
    "Every way of doing one shape: name -> (implementation, call)."
    q, k, v, table, _ = args
    kg, vg = gather(k, table, page).contiguous(), gather(v, table, page).contiguous()
    ways = {"paged_decode": ("modeltc_kernels", lambda: paged_decode(*args, page)),
            "gather + SDPA": ("torch", lambda: sdpa(q, gather(k, table, page), gather(v, table, page))),
            "SDPA on gathered KV": ("torch", lambda: sdpa(q, kg, vg))}
    try:
        attend = flex()
        error = relative_error(attend(q, kg, vg), sdpa(q, kg, vg))
        if not error <= ERROR_LIMIT: raise ValueError(f"relative error {error:.2g} against SDPA")
        ways["flex on gathered KV"] = ("torch", lambda: attend(q, kg, vg))
    except Exception as error:  # it needs a compiler on the machine
        print(f"flex attention is left out: {type(error).__name__}: {str(error).strip().splitlines()[0][:120]}")
    return ways


def measure(n, kv, page, copy, device):
    "Records of one shape."
    args = case(n, kv, page)
    error = gate(paged_decode, args, page)
    config = dict(n=n, kv=kv, page=page, h=H, hk=HK, e=E, dtype="bfloat16", copy_bytes_per_s=copy)
    options = dict(device=device, x_name="n x kv, page", x=f"{n} x {kv}, {page}", config=config)
    moved, out = 2 * n * kv * HK * E * 2, [row("paged_decode_speed", "paged_decode", "relative error", "ratio", [error], **options)]
    for method, (implementation, call) in ways_of(args, page).items():
        seconds = gpu_times(call, 40, flush_bytes=FLUSH)
        options["implementation"] = implementation
        out.append(row("paged_decode_speed", method, "time", "us", [1e6 * s for s in seconds], **options))
        out.append(row("paged_decode_speed", method, "share of copy bandwidth", "ratio", [moved / s / copy for s in seconds], **options))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the rows here instead of docs/results")
    args = parser.parse_args()
    if INTERPRETED or not torch.cuda.is_available():
        print("bench_paged_decode: no CUDA device, or TRITON_INTERPRET is set; interpreted speed means nothing, so nothing is timed. Run `make gpu` on a machine with a GPU.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device, copy, rows = torch.cuda.get_device_name(), copy_bandwidth(), []
    print(f"{device}: copy {copy / 1e12:.2f} TB/s")
    for n, kv in SHAPES:
        for page in (1, 16):
            try: found = measure(n, kv, page, copy, device)
            except ValueError as error:
                print(f"bench_paged_decode: n {n}, kv {kv}, page {page}: {error}", file=sys.stderr)
                return 1
            rows += found
            middle = {(r["method"], r["metric"]): sorted(r["samples"])[len(r["samples"]) // 2] for r in found}
            shown = [f"{m} {t:.1f} us ({middle[m, 'share of copy bandwidth']:.0%})" for (m, metric), t in middle.items() if metric == "time"]
            print(f"n {n:4d} kv {kv:6d} page {page:3d}  " + "  ".join(shown), flush=True)
    print(f"{len(rows)} records in {save(rows, args.out)}")
    return 0


if __name__ == "__main__": sys.exit(main())
