"Sweeps on real backends, among them a local dask cluster; timing that refuses wrong answers."

import json
import os
import threading

import numpy as np
import pytest

from modeltc_lab.core.bench import (
    BenchError,
    compare,
    cpu_time,
    gpu_times,
    grid,
    over_seeds,
    ratio_interval,
    run_on,
    sweep,
)


def cube(n, power=3): return n ** power


@pytest.mark.parametrize("backend", ["sequential", "threading", "loky"])
def test_backends_agree(backend): assert sweep(cube, grid(n=range(5), power=(2, 3)), backend=backend, workers=2, progress=False) == [n ** p for n in range(5) for p in (2, 3)]


def test_dask_cluster_of_two_workers():
    distributed = pytest.importorskip("distributed", reason="needs modeltc_lab[cluster]")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1") as cluster, distributed.Client(cluster):
        assert sweep(pow, [{"base": n, "exp": 2} for n in range(6)], backend="dask", progress=False) == [n * n for n in range(6)]


def process(n): return os.getpid()


def nested(n): return sweep(process, grid(n=range(3)), progress=False), os.getpid()


def test_without_a_word_a_sweep_stays_here(): assert set(sweep(process, grid(n=range(3)), progress=False)) == {os.getpid()}


def test_what_surrounds_a_sweep_decides_and_ends():
    with run_on("loky", 2):
        assert os.getpid() not in sweep(process, grid(n=range(3)), progress=False)
        with run_on("sequential"): assert set(sweep(process, grid(n=range(3)), progress=False)) == {os.getpid()}
        assert set(sweep(process, grid(n=range(3)), backend="threading", progress=False)) == {os.getpid()}
        assert os.getpid() not in sweep(process, grid(n=range(3)), progress=False)
    assert set(sweep(process, grid(n=range(3)), progress=False)) == {os.getpid()}


@pytest.mark.parametrize("backend", ["loky", "threading"])
def test_a_sweep_inside_a_point_stays_in_its_process(backend):
    for inner, own in sweep(nested, grid(n=range(3)), backend=backend, workers=2, progress=False): assert set(inner) == {own}


@pytest.mark.parametrize("key, value", [("backend", "loky"), ("workers", "2")])
def test_settings_decide_where_nothing_else_does(key, value, monkeypatch):
    from modeltc_lab.core.settings import settings
    monkeypatch.setenv(f"MODELTC_LAB_{key.upper()}", value)
    settings.cache_clear()
    try:
        with run_on() as place: assert place == {"backend": ("loky", -1), "workers": ("sequential", 1)}[key]
    finally:
        monkeypatch.undo()
        settings.cache_clear()


def test_a_named_backend_takes_the_workers_of_the_settings_and_not_of_another_backend(monkeypatch):
    from modeltc_lab.core.settings import settings
    monkeypatch.setenv("MODELTC_LAB_WORKERS", "2")
    settings.cache_clear()
    together = threading.Barrier(2, timeout=20)  # passed only by two points at a time
    try:
        with run_on("sequential"): assert sorted(sweep(lambda n: together.wait(), grid(n=range(2)), backend="threading", progress=False)) == [0, 1]
    finally:
        monkeypatch.undo()
        settings.cache_clear()


def test_a_connected_client_is_used_and_kept():
    distributed = pytest.importorskip("distributed", reason="needs modeltc_lab[cluster]")
    with distributed.Client(processes=False, dashboard_address=None) as client:
        with run_on("dask"): assert distributed.default_client() is client
        assert client.status == "running"
    with run_on("dask", workers=1):
        own = distributed.default_client()
        assert own is not client and len(own.scheduler_info()["workers"]) == 1
    assert own.status == "closed"


def test_seeds_of_a_point_stay_together():
    assert over_seeds(lambda mean, seed: (mean, seed), grid(mean=(1, 2)), (7, 8, 9), progress=False) == [[(1, 7), (1, 8), (1, 9)], [(2, 7), (2, 8), (2, 9)]]


def test_points_that_are_no_json_are_all_computed():
    "Long arrays look alike when printed; they must not be taken for the same point."
    a, b = np.zeros(5000), np.zeros(5000)
    b[2500] = 1
    assert str(a) == str(b) and sweep(lambda v: v.sum(), [{"v": a}, {"v": b}], progress=False) == [0, 1]


@pytest.mark.parametrize("how, message", [({"backend": "slurm"}, "need one of sequential"), ({"workers": 0}, "workers=0: need at least 1"), ({"backend": "loky", "scheduler": "tcp://h:1"}, "only dask and ray")])
def test_a_place_that_cannot_be(how, message):
    with pytest.raises(ValueError, match=message), run_on(**how): raise AssertionError("not reached")


def test_missing_cluster_package_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ray.util.joblib", None)
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ValueError, match="needs the package ray; install"): sweep(cube, [], backend="ray")


def test_resume_after_a_half_written_line(tmp_path):
    log, calls = tmp_path / "log.jsonl", []
    def counted(n):
        calls.append(n)
        return n
    log.write_text(json.dumps({"function": counted.__qualname__, "point": {"n": 0}, "value": 0}) + '\n{"function": "cou')
    for _ in range(2): assert sweep(counted, grid(n=(0, 1, 2)), resume=log, progress=False) == [0, 1, 2]
    assert calls == [1, 2] and len(log.read_text().splitlines()) == 3


def test_values_of_another_function_are_refused(tmp_path):
    log = tmp_path / "new" / "log.jsonl"
    assert sweep(cube, grid(n=(1, 2)), resume=log, progress=False) == [1, 8]
    with pytest.raises(ValueError, match="values of 'cube', not of 'pow'"): sweep(pow, grid(n=(1, 2)), resume=log, progress=False)


@pytest.mark.parametrize("text", ["12\n", "notes", '{"point": {"n": 1}, "value": 1}\n', "a\nb"])
def test_a_file_that_is_no_sweep_is_refused_and_left_alone(tmp_path, text):
    (log := tmp_path / "notes.txt").write_text(text)
    with pytest.raises(ValueError, match="name another file"): sweep(cube, grid(n=(1,)), resume=log, progress=False)
    assert log.read_text() == text


def test_a_value_that_is_no_json_is_named(tmp_path):
    with pytest.raises(ValueError, match="value of type set is no JSON"): sweep(lambda n: {n}, grid(n=(1,)), resume=tmp_path / "log.jsonl", progress=False)


def test_work_below_the_clocks_tick_has_no_ratio():
    with pytest.raises(BenchError, match="shorter than the clock's tick"): ratio_interval([0.0, 0.0, 1.0], [1.0, 1.0, 1.0])


def test_cpu_time_counts_repeats_and_warmup():
    calls = []
    assert len(cpu_time(lambda: calls.append(1), repeats=4, warmup=3)) == 4 and len(calls) == 7
    with pytest.raises(ValueError, match="repeats=0"): cpu_time(lambda: None, repeats=0)


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
