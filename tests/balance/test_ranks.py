"Processes that are started, fail in every way, and are gone afterwards."
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from modeltc_lab.balance.parallel import RankError, _cause, run_ranks

HEAD = "import os, signal, sys, time\nimport torch, torch.distributed as dist\nfrom modeltc_lab.balance.parallel import arguments, init, report\n"


def started(folder, code, name="a_worker", head=HEAD + "me = init()\n", **run):
    (Path(folder) / f"{name}.py").write_text(head + code)
    return run_ranks(name, run.pop("arguments", {"pids": str(folder)}), paths=[folder], **run)


PIDS = "open(f\"{arguments()['pids']}/pid{me.rank}\", 'w').write(str(os.getpid()))\ndist.barrier()\n"


def gone(folder):
    "Is no rank of this job left?"
    alive = [p for p in folder.glob("pid*") if Path(f"/proc/{p.read_text()}").exists()]
    return not alive and len(list(folder.glob("pid*"))) == 2


def test_answers_come_back_in_order_of_ranks(tmp_path):
    out = started(tmp_path, "x = torch.arange(3.) * (me.rank + 1)\ndist.all_reduce(x)\nreport({'rank': me.rank, 'world': me.world, 'sum': x, 'threads': torch.get_num_threads(), 'a': arguments()['a']})",
                  arguments={"a": [1, None, "é"]})
    assert out == [{"rank": r, "world": 2, "sum": [0.0, 3.0, 6.0], "threads": 1, "a": [1, None, "é"]} for r in range(2)]


@pytest.mark.parametrize("code, rank, exit_code, words", [
    ("if me.rank == 1: os.kill(os.getpid(), signal.SIGKILL)\ndist.barrier()", 1, -9, "SIGKILL"),
    ("if me.rank == 0: sys.exit(7)\ndist.barrier()", 0, 7, "exit code 7"),
], ids=["killed", "exits"])
def test_a_rank_that_dies_ends_the_job_and_is_named(tmp_path, code, rank, exit_code, words):
    with pytest.raises(RankError, match=f"rank {rank} of 2") as e: started(tmp_path, PIDS + code)
    assert e.value.rank == rank and e.value.code == exit_code and words in str(e.value)
    assert gone(tmp_path)


def test_a_rank_that_hangs_is_named_with_the_line_where_it_stands(tmp_path):
    code = "def stuck():\n    while True: signal.pause()\nif me.rank == 0: stuck()\ndist.barrier()"
    with pytest.raises(RankError, match="rank 0 of 2") as e: started(tmp_path, PIDS + code, collective_s=1.0)
    assert e.value.code is None and "in stuck" in e.value.log and "rank 1: exit code 1" in str(e.value)
    assert gone(tmp_path)


def test_the_whole_job_has_a_limit(tmp_path):
    head = "import os, signal\nopen(f\"{os.environ['PIDS']}/pid{os.environ['RANK']}\", 'w').write(str(os.getpid()))\nsignal.pause()"
    with pytest.MonkeyPatch.context() as m, pytest.raises(RankError, match="did not end within 1.5 s"):
        m.setenv("PIDS", str(tmp_path))
        started(tmp_path, "", head=head, timeout_s=1.5)
    assert not [p for p in tmp_path.glob("pid*") if Path(f"/proc/{p.read_text()}").exists()]


def test_a_rank_without_an_answer_and_one_that_cannot_start(tmp_path):
    with pytest.raises(RankError, match="without calling report"): started(tmp_path, "", ranks=1)
    with pytest.raises(RankError, match="No module named"): run_ranks("modeltc_lab.no_such_module", {}, ranks=1)


def test_ranks_end_with_the_process_that_started_them(tmp_path):
    "Both hold a pipe open; it closes when the last of them is gone."
    os.mkfifo(tmp_path / "alive")
    (tmp_path / "a_worker.py").write_text(HEAD + "me = init()\ndist.barrier()\nalive = os.open(arguments()['alive'], os.O_WRONLY)\nos.write(alive, b'x')\nsignal.pause()")
    starter = f"from modeltc_lab.balance.parallel import run_ranks\nrun_ranks('a_worker', {{'alive': {str(tmp_path / 'alive')!r}}}, paths=[{str(tmp_path)!r}])"
    end = os.open(tmp_path / "alive", os.O_RDONLY | os.O_NONBLOCK)
    parent = subprocess.Popen([sys.executable, "-c", starter])

    def heard():
        assert select.select([end], [], [], 120)[0], "nothing was heard of the ranks"
        return os.read(end, 2)
    ready = b""
    while len(ready) < 2: ready += heard()
    parent.kill()
    parent.wait()
    assert heard() == b""
    os.close(end)


def test_the_same_worker_runs_under_torchrun(tmp_path):
    (tmp_path / "a_worker.py").write_text(HEAD + "me = init('gloo')\nx = torch.tensor(arguments()['n'])\ndist.all_reduce(x)\nreport({'sum': x})")
    (tmp_path / "arguments.json").write_text('{"n": 4}')
    run = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "a_worker", str(tmp_path / "arguments.json")],
                         cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count('{"sum": 8}') == 2


@pytest.mark.parametrize("run, words", [
    (dict(ranks=0), "ranks=0: need a whole number"), (dict(ranks=2.0), "ranks=2.0"), (dict(backend="mpi"), "backend='mpi': need one of gloo, nccl"),
    (dict(timeout_s=0), "timeout_s=0"), (dict(collective_s=float("nan")), "collective_s=nan")])
def test_bad_input_is_refused_before_anything_starts(run, words):
    with pytest.raises(ValueError, match=words): run_ranks("modeltc_lab.no_such_module", {}, **run)


def test_more_cuda_ranks_than_devices_are_refused():
    import torch
    with pytest.raises(ValueError, match="one CUDA device a rank"): run_ranks("x", {}, ranks=torch.cuda.device_count() + 1, backend="nccl")


def test_blame():
    lost, late, own = {"time": 1.0, "text": "RuntimeError: Connection closed by peer"}, {"time": 1.0, "text": "RuntimeError: Timed out waiting 10ms"}, {"time": 2.0, "text": "KeyError: 'x'"}
    assert _cause([1, -signal.SIGSEGV, 1], {0: lost, 2: lost}) == 1
    assert _cause([1, 1], {0: lost, 1: own}) == 1
    assert _cause([1, None, 1], {0: late, 2: lost}) == 1
    assert _cause([1, 1], {0: lost, 1: {"time": 0.5, "text": late["text"]}}) == 1
