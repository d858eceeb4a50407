"Workloads: files of every kind, and errors that name file, row and field."

import gzip
import json

import numpy as np
import pytest

from modeltc_lab.serving.workload import Workload, WorkloadError, dist, generated, service_cap, sharegpt

ROWS = [(0.0, 12, 5), (0.5, 30, 7), (2.25, 8, 1)]


def csv_text(rows=ROWS, header="arrival_s,prompt_tokens,output_tokens"):
    return "\n".join([header, *(",".join(map(str, r)) for r in rows)]) + "\n"


def write(folder, name, text):
    path = folder / name
    if name.endswith(".gz"): path.write_bytes(gzip.compress(text.encode()))
    else: path.write_text(text)
    return path


def jsonl(rows=ROWS, clock="arrival_s", scale=1):
    return "\n".join(json.dumps({clock: a * scale, "prompt_tokens": p, "output_tokens": o, "block_ids": [1, p]}) for a, p, o in rows)


def as_parquet(folder):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    path = folder / "t.parquet"
    pq.write_table(pa.table({"arrival_s": [r[0] for r in ROWS], "prompt_tokens": [r[1] for r in ROWS], "output_tokens": [r[2] for r in ROWS]}), path)
    return path


@pytest.mark.parametrize("make", [
    lambda d: write(d, "t.csv", csv_text()), lambda d: write(d, "t.csv.gz", csv_text()), lambda d: write(d, "t.jsonl", jsonl()),
    lambda d: write(d, "t.jsonl.gz", jsonl(clock="arrival_ms", scale=1000)), as_parquet], ids=["csv", "csv.gz", "jsonl", "jsonl.gz in ms", "parquet"])
def test_every_kind_of_file_reads_alike(tmp_path, make):
    w = Workload.load(make(tmp_path))
    assert w.arrival_s.tolist() == [0, 0.5, 2.25] and w.prompt.tolist() == [12, 30, 8] and w.sealed_output.tolist() == [5, 7, 1]
    assert set(w.cap.tolist()) == {8}


def test_block_ids_are_kept(tmp_path):
    assert Workload.load(write(tmp_path, "t.jsonl", jsonl())).part(1).block_ids == [[1, 30], [1, 8]]


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
    (lambda w: w.with_cap(3), "give at least"), (lambda w: w.part(3, 1), "part(3, 1)"), (lambda w: dist(4), "which=4")])
def test_bad_shaping_is_named(call, message):
    with pytest.raises(WorkloadError) as error: call(sharegpt(20))
    assert message in str(error.value)
