"""Paged decode attention on a GPU, beside what a user would otherwise run and beside the memory's own speed.

    PYTHONPATH=.:kernels python kernels/bench/bench_paged_decode.py [--out FILE]

Correctness first: a kernel that does not agree with its reference is not timed. Peers: gather the pages and call
scaled_dot_product_attention (with and without the gather). Bound: the bandwidth of a plain copy, measured in the same run.
Times are CUDA events with a cold cache.
"""

import argparse
import math
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from modeltc_kernels.paged_decode import paged_decode, paged_decode_ref  # noqa: E402
from rows import row, save  # noqa: E402

H, HK, E = 32, 8, 128
SHAPES = [(1, 4096), (1, 32768), (8, 2048), (64, 512), (64, 2048), (64, 8192), (256, 512), (256, 2048)]
FLUSH = 256 << 20


def times(call, repeats=40, warmup=10):
    "Seconds of each repeat by CUDA events; the cache is overwritten in between."
    flush = torch.empty(FLUSH, dtype=torch.int8, device="cuda")
    for _ in range(warmup): call()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [s.elapsed_time(e) * 1e-3 for s, e in events]


def copy_bandwidth(bytes_=2 << 30):
    "Bytes a second of a device-to-device copy, read and written counted."
    a = torch.empty(bytes_, dtype=torch.int8, device="cuda").zero_()
    b = torch.empty_like(a)
    return 2 * bytes_ / sorted(times(lambda: b.copy_(a), 20))[10]


def case(n, kv, page):
    "Full pages in random order."
    pages = n * -(-kv // page)
    table = torch.randperm(pages, device="cuda", dtype=torch.int32).view(n, -1)
    k, v = (torch.randn(pages * page, HK, E, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    q = torch.randn(n, H, E, device="cuda", dtype=torch.bfloat16)
    return q, k, v, table, torch.full((n,), kv, device="cuda", dtype=torch.int32)


def gather(pool, table, page):
    "The pages of every request side by side: [n, hk, kv, e]."
    return pool.view(-1, page, HK, E)[table.long()].flatten(1, 2).transpose(1, 2)


def sdpa(q, k, v):
    return torch.nn.functional.scaled_dot_product_attention(q[:, :, None], k, v, scale=1 / math.sqrt(E), enable_gqa=True)[:, :, 0]


def gate(args, page):
    "Refuse to time what is wrong."
    q, k, v, table, lengths = args
    some = slice(0, 2)
    ref = paged_decode_ref(q[some].double(), k.double() if k.numel() < 1 << 26 else k, v.double() if v.numel() < 1 << 26 else v, table[some], lengths[some], page)
    torch.testing.assert_close(paged_decode(*args, page)[some].double(), ref.double(), rtol=2e-2, atol=2e-2)


def measure(n, kv, page, copy, device):
    "Every way of doing one shape."
    args = case(n, kv, page)
    gate(args, page)
    q, k, v, table, _ = args
    kg, vg = gather(k, table, page).contiguous(), gather(v, table, page).contiguous()
    ways = {"paged_decode": lambda: paged_decode(*args, page), "gather + SDPA": lambda: sdpa(q, gather(k, table, page), gather(v, table, page)),
            "SDPA on gathered KV": lambda: sdpa(q, kg, vg)}
    moved, out = 2 * n * kv * HK * E * 2, []
    for method, call in ways.items():
        seconds = times(call)
        config = dict(n=n, kv=kv, page=page, h=H, hk=HK, e=E, dtype="bfloat16", copy_bytes_per_s=copy)
        options = dict(device=device, x_name="n x kv, page", x=f"{n} x {kv}, {page}", config=config, implementation="modeltc_kernels" if method == "paged_decode" else "torch")
        out.append(row("paged_decode_speed", method, "time", "us", [1e6 * s for s in seconds], **options))
        out.append(row("paged_decode_speed", method, "share of copy bandwidth", "ratio", [moved / s / copy for s in seconds], **options))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="write the rows here instead of docs/results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_paged_decode: no CUDA device; interpreted speed means nothing, so nothing is timed. Run `make gpu` on a machine with a GPU.", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device, copy, rows = torch.cuda.get_device_name(), copy_bandwidth(), []
    print(f"{device}: copy {copy / 1e12:.2f} TB/s")
    for n, kv in SHAPES:
        for page in (1, 16):
            found = measure(n, kv, page, copy, device)
            rows += found
            middle = {(r["method"], r["metric"]): sorted(r["samples"])[len(r["samples"]) // 2] for r in found}
            print(f"n {n:4d} kv {kv:6d} page {page:3d}  " + "  ".join(f"{m} {middle[m, 'time']:.1f} us ({middle[m, 'share of copy bandwidth']:.0%})"
                                                                       for m in ("paged_decode", "gather + SDPA", "SDPA on gathered KV")), flush=True)
    print(f"{len(rows)} records in {save(rows, args.out)}")
    return 0


if __name__ == "__main__": sys.exit(main())
