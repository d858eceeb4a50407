"Experiments give the same records wherever their runs go: this process, processes here, a dask cluster of two workers."

import json
import os

import pytest

from modeltc_lab.core import cli
from modeltc_lab.core.bench import run_on, sweep
from modeltc_lab.core.settings import settings
from modeltc_lab.serving import studies
from modeltc_lab.serving.cost import UnitCost
from modeltc_lab.serving.past_future import AdaptivePastFuture, PastFuture
from modeltc_lab.serving.policies import NewTokenRatio
from modeltc_lab.serving.workload import sharegpt


@pytest.fixture(scope="module")
def cluster():
    "Address of a dask scheduler with two workers."
    distributed = pytest.importorskip("distributed", reason="needs modeltc_lab[cluster]")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, host="127.0.0.1") as cluster: yield cluster.scheduler_address


@pytest.fixture
def environment(monkeypatch):
    "Set variables of the environment and read the settings again; undone afterwards."
    def put(**values):
        for name, value in values.items(): monkeypatch.setenv(f"MODELTC_LAB_{name.upper()}", value)
        settings.cache_clear()
    yield put
    monkeypatch.undo()
    settings.cache_clear()


def small():
    "Every kind of study: by policy and mix, by rate, whole results, all of them with seeds or draws."
    memory = studies.memory_behaviour(seeds=(0, 1), policies=("past_future", "past_future_persistent", "aggressive"), n=150)
    policies = {"past_future": PastFuture(seed=4), "past_future_adaptive": AdaptivePastFuture(), "new_token_ratio": NewTokenRatio()}
    rows = studies.frontier(sharegpt(150, seed=2), policies, 20_000, UnitCost(0.02), rates=(1, 3, 5), progress=False)
    return [(r.method, r.metric, r.x, r.samples) for r in memory], rows, [(r.policy, r.requests.tobytes(), r.steps.tobytes()) for r in studies.race_results()]


@pytest.fixture(scope="module")
def here():
    with run_on("sequential"): return small()


@pytest.mark.parametrize("backend, workers", [("loky", 2), ("threading", 2)])
def test_processes_and_threads_on_this_machine(here, backend, workers):
    with run_on(backend, workers): assert small() == here


def test_a_dask_cluster_of_two_workers(here, cluster):
    with run_on("dask", scheduler=cluster): assert small() == here


def test_the_environment_is_one_switch(here, cluster, environment):
    environment(backend="dask", scheduler=cluster)
    assert small() == here


def test_runs_reach_both_workers_of_the_cluster(cluster):
    from distributed import Client
    with run_on("dask", scheduler=cluster): studies.memory_behaviour(seeds=range(6), policies=("oracle",), n=150)
    with Client(cluster) as client:
        modules = client.run(lambda: __import__("sys").modules.get("modeltc_lab.serving.studies") is not None)
        assert len(modules) == 2 and all(modules.values())


def test_run_with_an_option(cluster, capsys, tmp_path, monkeypatch):
    whole = studies.memory_behaviour
    monkeypatch.setattr(studies, "memory_behaviour", lambda full: whole(seeds=(0, 1), policies=("oracle", "past_future"), n=150))
    found = {}
    for name, options in (("here", []), ("there", ["--backend", "dask", "--scheduler", cluster])):
        assert cli.main(["run", "serving/past_future_memory", "--results", str(tmp_path / name), *options]) == 0
        found[name] = [(r["method"], r["metric"], r["x"], r["samples"]) for r in json.loads(next((tmp_path / name).rglob("*.json")).read_text())]
    capsys.readouterr()
    assert found["here"] == found["there"] and len(found["here"]) == 24


@pytest.mark.parametrize("options, message", [
    (["--backend", "slurm"], "backend='slurm': need one of sequential, loky, threading, dask, ray"), (["--workers", "0"], "workers=0: need at least 1, or -1"),
    (["--scheduler", "tcp://127.0.0.1:1"], "scheduler='tcp://127.0.0.1:1' with backend='sequential': only dask and ray have one")])
def test_mistakes(options, message, capsys, tmp_path):
    assert cli.main(["run", "serving/past_future_memory", "--results", str(tmp_path), *options]) == 2
    out, err = capsys.readouterr()
    assert message in err and out == "" and len(err.splitlines()) == 1


def test_nobody_answers(capsys, tmp_path):
    dask = pytest.importorskip("dask", reason="needs modeltc_lab[cluster]")
    with dask.config.set({"distributed.comm.timeouts.connect": "1s"}):
        assert cli.main(["run", "serving/past_future_memory", "--results", str(tmp_path), "--backend", "dask", "--scheduler", "tcp://127.0.0.1:1"]) == 2
    assert "no dask scheduler answers there" in capsys.readouterr().err and not list(tmp_path.rglob("*.json"))


def test_what_is_timed_stays_in_this_process(monkeypatch):
    "The seconds of a frontier are processor time of this process, so its points must be run here."
    where = []
    monkeypatch.setattr(studies, "over_seeds", lambda *a, **k: [[{"holds to": 1.0, "best goodput": 1.0, "longest gap there, p99": 1.0}] * 3] * len(studies.SYSTEMS))
    monkeypatch.setattr(studies, "frontier", lambda *a, **k: where.extend(sweep(lambda n: os.getpid(), [{"n": 0}], progress=False)) or [])
    with run_on("loky", 2):
        assert sweep(lambda n: os.getpid(), [{"n": 0}], progress=False) != [os.getpid()]
        studies.frontier_study()
    assert where == [os.getpid()]
