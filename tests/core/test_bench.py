"Sweeps on real backends, among them a local dask cluster; timing that refuses wrong answers."

import json

import pytest

from modeltc_lab.core.bench import BenchError, compare, gpu_times, grid, ratio_interval, sweep


def cube(n, power=3): return n ** power


@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
def test_backends_agree(backend): assert sweep(cube, grid(n=range(5), power=(2, 3)), backend=backend, n_jobs=2, progress=False) == [n ** p for n in range(5) for p in (2, 3)]


def test_dask_cluster_of_two_workers():
    distributed = pytest.importorskip("distributed", reason="needs modeltc_lab[cluster]")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1") as cluster, distributed.Client(cluster):
        assert sweep(pow, [{"base": n, "exp": 2} for n in range(6)], backend="dask", progress=False) == [n * n for n in range(6)]


def test_missing_cluster_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray.util.joblib", None)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ValueError, match="needs the package ray; install"): sweep(cube, [], backend="ray")


def test_resume_after_a_half_written_line(tmp_path):
    log, calls = tmp_path / "log.jsonl", []
    def counted(n):
        calls.append(n)
        return n
    log.write_text(json.dumps({"point": {"n": 0}, "value": 0}) + '\n{"point": {"n": 1}, "va')
    assert sweep(counted, grid(n=(0, 1, 2)), resume=log, progress=False) == [0, 1, 2] and calls == [1, 2]


def test_equal_points_are_computed_once():
    calls = []
    assert sweep(lambda n: calls.append(n) or n, [{"n": 1}, {"n": 1}], progress=False) == [1, 1] and calls == [1]


def test_compare_refuses_what_does_not_agree():
    with pytest.raises(BenchError, match="do not agree"): compare(lambda: 1, lambda: 2, check=lambda: False)


def test_interval_holds_the_truth():
    low, high = ratio_interval([1.0, 1.1, 0.9] * 5, [3.0, 3.3, 2.7] * 5)
    assert low <= 3.0 <= high and high - low < 1.5


def test_gpu_times_needs_a_gpu():
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available(): assert min(gpu_times(lambda: torch.zeros(1 << 20, device="cuda"), repeats=3)) > 0
    else:
        with pytest.raises(BenchError, match="make gpu"): gpu_times(lambda: None)
