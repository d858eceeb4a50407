"The benchmark refuses what it should, and what it writes can be read. No time is asserted."

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[2] / "kernels/bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import bench_paged_decode
    return bench_paged_decode


def kernel(*args): return bench_call(*args, impl="triton")


def bench_call(*args, **options):
    from modeltc_kernels.paged_decode import paged_decode
    return paged_decode(*args, **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
def test_nothing_is_timed_without_a_gpu(tmp_path):
    done = subprocess.run([sys.executable, BENCH / "bench_paged_decode.py", "--out", tmp_path / "rows.json"], capture_output=True, text=True, env=os.environ)
    assert done.returncode == 2 and "nothing is timed" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_gate_lets_the_kernel_through(bench, device):
    torch.manual_seed(0)
    assert bench.gate(kernel, bench.case(2, 80, 16, device), 16) < bench.ERROR_LIMIT


@pytest.mark.parametrize("wrong", [
    lambda *a: torch.zeros_like(a[0]), lambda *a: bench_call(*a) * 1.02, lambda *a: torch.full_like(a[0], float("nan")),
    lambda q, k, v, t, n, p: bench_call(q, k, v, t, torch.full_like(n, 80), p), lambda q, k, v, t, n, p: bench_call(q, k, v, t.flip(0), n, p)],
    ids=["zeros", "2% off", "NaN", "ignores lengths", "wrong pages"])
def test_gate_refuses_wrong_kernels(bench, device, wrong):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match="the kernel is wrong and is not timed"): bench.gate(wrong, bench.case(2, 80, 16, device), 16)


def test_long_outputs_are_small_and_still_judged(bench):
    "The output of long KV is smaller than an absolute bound for bf16, which zeros would have passed."
    ref = torch.randn(4, 128) * 0.01
    assert torch.allclose(ref.clamp(-0.02, 0.02), torch.zeros_like(ref), atol=2e-2) and bench.relative_error(ref * 0, ref) == 1.0


def test_peers_compute_the_same(bench, device, monkeypatch):
    from torch.nn.attention.flex_attention import flex_attention
    monkeypatch.setattr(bench, "flex", lambda: lambda q, k, v: flex_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0])
    torch.manual_seed(0)
    args = bench.case(2, 48, 16, device)
    outs = {name: call() for name, (_, call) in bench.ways_of(args, 16).items()}
    assert len(outs) == 4
    for name, out in outs.items(): assert bench.relative_error(out, outs["gather + SDPA"]) < bench.ERROR_LIMIT, name


def test_a_peer_that_cannot_be_had_is_left_out(bench, device, monkeypatch, capsys):
    def missing(): raise ImportError("no compiler")
    monkeypatch.setattr(bench, "flex", missing)
    assert len(bench.ways_of(bench.case(1, 16, 16, device), 16)) == 3
    assert "flex attention is left out: ImportError: no compiler" in capsys.readouterr().out


def test_rows_are_records(bench, tmp_path):
    import rows
    made = [rows.row("paged_decode_speed", "paged_decode", "time", "us", [1, 2.5], device="Some GPU 80GB", x_name="n", x="1 x 512, 16", config={"n": 1})]
    path = rows.save(made, tmp_path / "a/b.json")
    (read,) = json.loads(path.read_text())
    assert read["samples"] == [1.0, 2.5] and read["device"] == "some-gpu-80gb" and [p.name for p in path.parent.iterdir()] == ["b.json"]
    results = pytest.importorskip("modeltc_lab.core.results", reason="only kernels are installed: pydantic or the package is missing")
    assert results.Record(**read).median == 1.75
