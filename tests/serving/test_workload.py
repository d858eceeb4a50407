"Workloads: files of every kind, and errors that name file, row and field."

import gzip
import json

import numpy as np
import pytest

from modeltc_lab.serving.workload import (
    Workload,
    WorkloadError,
    dist,
    generated,
    prefix_blocks,
    servegen,
    service_cap,
    sharegpt,
)

ROWS = [(0.0, 12, 5), (0.5, 30, 7), (2.25, 8, 1)]


def csv_text(rows=ROWS, header="arrival_s,prompt_tokens,output_tokens"):
    return "\n".join([header, *(",".join(map(str, r)) for r in rows)]) + "\n"


def write(folder, name, text):
    path = folder / name
    if name.endswith(".gz"): path.write_bytes(gzip.compress(text.encode()))
    else: path.write_text(text)
    return path


def jsonl(rows=ROWS, clock="arrival_s", scale=1):
    return "\n".join(json.dumps({clock: a * scale, "prompt_tokens": p, "output_tokens": o, "block_ids": [1, p][:2 if p > 8 else 1]}) for a, p, o in rows)


def plain(**how):
    return "\n".join(json.dumps({k: v for k, v in json.loads(line).items() if k != "block_ids"}) for line in jsonl(**how).splitlines())


def as_parquet(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    path = folder / "t.parquet"
    pq.write_table(pa.table({"arrival_s": [r[0] for r in ROWS], "prompt_tokens": [r[1] for r in ROWS], "output_tokens": [r[2] for r in ROWS]}), path)
    return path


@pytest.mark.parametrize("make", [
    lambda d: write(d, "t.csv", csv_text()), lambda d: write(d, "t.csv.gz", csv_text()), lambda d: write(d, "t.jsonl", plain()),
    lambda d: write(d, "t.jsonl.gz", plain(clock="arrival_ms", scale=1000)), as_parquet], ids=["csv", "csv.gz", "jsonl", "jsonl.gz in ms", "parquet"])
def test_every_kind_of_file_reads_alike(tmp_path, make):
    w = Workload.load(make(tmp_path))
    assert w.arrival_s.tolist() == [0, 0.5, 2.25] and w.prompt.tolist() == [12, 30, 8] and w.sealed_output.tolist() == [5, 7, 1]
    assert set(w.cap.tolist()) == {8}


def test_block_ids_are_kept(tmp_path):
    w = Workload.load(write(tmp_path, "t.jsonl", jsonl()), block_tokens=8)
    assert w.part(1).block_ids == [[1, 30], [1]] and w.fits(16)[0].block_ids == [[1, 12], [1]]
    assert {x.block_tokens for x in (w, w.part(1), w.scale(3), w.gamma(1, 2), *w.split(1), w.fits(16)[0], w.with_cap(99))} == {8}


@pytest.mark.parametrize("name, text, message", [
    ("a.csv", csv_text([(0, 5, 5), (1, -2, 5)]), "a.csv, row 3, field 'prompt_tokens': got -2"),
    ("a.csv", csv_text([(0, 5, 0)]), "a.csv, row 2, field 'output_tokens': got 0"),
    ("a.csv", csv_text([(0, 5, 1.5)]), "row 2, field 'output_tokens': got 1.5, need a whole number"),
    ("a.csv", csv_text([(3, 5, 5), (1, 5, 5)]), "a.csv, row 3, field 'arrival_s': 1 comes after 3; sort"),
    ("a.csv", csv_text([("x", 5, 5)]), "row 2, field 'arrival_s': got 'x', need a number"),
    ("a.csv", csv_text([("nan", 5, 5)]), "field 'arrival_s': got nan"),
    ("a.csv", csv_text([(-1, 5, 5)]), "field 'arrival_s': got -1"),
    ("a.csv", csv_text() + "3,4\n", "a.csv, row 5"),
    ("a.csv", csv_text(header="t,prompt_tokens,out"), "field 'output_tokens': missing"),
    ("b.jsonl", jsonl() + "\n{oops", "b.jsonl, row 4: not JSON"),
    ("b.jsonl", "[1]", "b.jsonl, row 1: need a JSON object, got list"),
    ("b.jsonl", '{"prompt_tokens": 3, "output_tokens": 1}\n{"prompt_tokens": 3}', "row 2, field 'output_tokens': missing"),
    ("b.jsonl", jsonl(), "b.jsonl, row 1, field 'block_ids': 2 blocks of 512 tokens for a prompt of 12, need at most 1"),
    ("b.jsonl", '{"prompt_tokens": 3, "output_tokens": 1, "block_ids": [4]}\n{"prompt_tokens": 3, "output_tokens": 1}', "row 2, field 'block_ids': got None"),
    ("b.jsonl", '{"prompt_tokens": 3, "output_tokens": 1, "block_ids": ["a"]}', "row 1, field 'block_ids': got ['a'], need a list of whole numbers"),
    ("c.xlsx", "", "c.xlsx: need a .csv, .jsonl or .parquet"),
    ("d.csv.gz", None, "d.csv.gz: cannot be read")])
def test_bad_files_are_named(tmp_path, name, text, message):
    path = write(tmp_path, name, text) if text is not None else tmp_path / name
    if text is None: path.write_bytes(b"not gzip")
    with pytest.raises(WorkloadError) as error: Workload.load(path)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_empty_file_is_an_empty_workload(tmp_path):
    assert len(Workload.load(write(tmp_path, "e.csv", "arrival_s,prompt_tokens,output_tokens\n"))) == 0


def test_azure_trace_as_described():
    if not Workload.available("azure2023_conv"): pytest.skip("azure2023_conv is not within reach; put it into a data folder")
    w = Workload.load("azure2023_conv")
    assert (len(w), int(w.sealed_output.max()), int(w.prompt.max()), int(w.cap[0])) == (19_366, 1000, 14_050, 1024)
    assert w.rate == pytest.approx(19_365 / w.arrival_s[-1])


def test_generated_workloads_are_labelled_and_repeatable():
    for name in ("sharegpt", "dist-1", "dist-2", "dist-3"):
        w = generated(name)
        assert w is not None and w.generated and "generated" in w.name
    assert generated("azure2023_conv") is None
    assert np.array_equal(sharegpt(50, seed=3).prompt, sharegpt(50, seed=3).prompt)
    assert not np.array_equal(sharegpt(50, seed=3).prompt, sharegpt(50, seed=4).prompt)
    assert dist(2, 2000).prompt.min() >= 3000 and dist(2, 2000).sealed_output.max() <= 5000


def test_poisson_gaps():
    gaps = np.diff(sharegpt(20_000, rate=5).arrival_s)
    assert gaps.mean() == pytest.approx(0.2, rel=0.03) and gaps.std() / gaps.mean() == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("value, cap", [(1, 2), (2, 2), (3, 4), (1000, 1024), (1024, 1024), (1025, 2048)])
def test_service_cap(value, cap): assert service_cap(np.array([1, value])) == cap


@pytest.mark.parametrize("call, message", [
    (lambda w: w.scale(-1), "rate=-1"), (lambda w: w.poisson(float("inf")), "rate=inf"), (lambda w: w.closed_loop(0), "clients=0"),
    (lambda w: w.with_cap(3), "give at least"), (lambda w: w.part(3, 1), "part(3, 1)"), (lambda w: dist(4), "which=4"),
    (lambda w: w.gamma(1, cv=0), "cv=0"), (lambda w: w.gamma(-2, cv=1), "rate=-2"), (lambda w: w.gamma(1, cv=float("nan")), "cv=nan"),
    (lambda w: w.mmpp((1, -1), (1, 1)), "rates=(1, -1)"), (lambda w: w.mmpp((0, 0), (1, 1)), "one above 0"), (lambda w: w.mmpp((), ()), "at least one"),
    (lambda w: w.mmpp((1, 2), (1, 0)), "dwell_s=(1, 0)"), (lambda w: w.mmpp((1, 2), (1,)), "one dwell time for each rate"),
    (lambda w: w.split(1.2), "at=1.2"), (lambda w: w.split(-1), "at=-1"), (lambda w: w.split(21), "at=21"), (lambda w: w.split(True), "at=True"),
    (lambda w: w.split(float("nan")), "at=nan"),
    (lambda w: prefix_blocks([[1]], 0), "block_tokens=0"), (lambda w: Workload.build("x", [0], [1], [1], block_tokens=0), "block_tokens=0"),
    (lambda w: Workload.build("x", [0], [1], [1], block_ids=[]), "0 rows of block_ids for 1 prompts"),
    (lambda w: servegen("huge"), "pool='huge': need one of deepseek-r1"), (lambda w: servegen(n=-1), "n=-1")])
def test_bad_shaping_is_named(call, message):
    with pytest.raises(WorkloadError) as error: call(sharegpt(20))
    assert message in str(error.value)
