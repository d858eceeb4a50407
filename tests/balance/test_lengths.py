"Lengths: bad numbers are named, the generated mix has the paper's figures, files and data sets are read right."

import gzip
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeltc_lab.balance.lengths import (
    TILE_TOKENS,
    VLM_SUBSETS,
    Samples,
    check_lengths,
    check_sizes,
    describe,
    generated_vlm_samples,
    lengths_of,
    long_context_mix,
    read_lengths,
    read_samples,
    vlm_samples,
)
from modeltc_lab.core.data import DataError


@pytest.mark.parametrize("values, said", [
    ([3, 0], r"lengths\[1\]=0"), ([3, -4, 0], r"lengths\[1\]=-4"), ([float("nan"), 2], r"lengths\[0\]=nan"), ([1, float("inf")], r"lengths\[1\]=inf"), ([2.5], r"lengths\[0\]=2\.5"),
    ([[1, 2]], "shape"), ([], "got none"), (["a"], "values of type"), ([True, False], "values of type bool"), (7, "shape"), ([2**63], r"lengths\[0\]"), ([None, 2], "values of type"), ([1e30], r"lengths\[0\]")])
def test_bad_lengths_are_named(values, said):
    with pytest.raises(ValueError, match=said): check_lengths(values)


@given(st.lists(st.integers(1, 2**40), min_size=1, max_size=30), st.sampled_from([np.int64, np.uint64, np.float64]))
def test_good_lengths_pass(values, kind):
    found = check_lengths(np.array(values, dtype=kind))
    assert found.dtype == np.int64 and found.tolist() == values


def test_int64_is_not_copied():
    a = np.array([1, 2, 3])
    assert check_lengths(a) is a


@pytest.mark.parametrize("values, said", [([[1, 2], [0, 0]], r"sizes\[1\]=\[0, 0\]"), ([[1, -2]], r"sizes\[0, 1\]=-2"), ([1, 2], "shape"), (np.zeros((0, 2), int), "got none"), ([[1.0, float("nan")]], r"sizes\[0, 1\]=nan")])
def test_bad_sizes_are_named(values, said):
    with pytest.raises(ValueError, match=said): check_sizes(values)


def test_the_mix_has_the_papers_figures():
    "random batches of one on eight ranks, mean length; the other two figures need packs and are checked where those are made."
    mix = long_context_mix()
    assert len(mix) == 941_344 and (mix >= 8192).sum() >= 1900 and mix.max() <= 131_072 and mix.min() >= 16
    assert abs(mix.mean() - 982) < 12 and abs(np.median(mix) - 480) < 5
    t = mix[:len(mix) // 8 * 8].reshape(-1, 8)       # shuffled already
    dbr = ((t.max(1, keepdims=True) - t).sum(1) / (8 * t.max(1))).mean()
    assert 0.63 <= dbr <= 0.645


def test_the_mix_is_shuffled_and_repeats_by_seed():
    a, b, c = (long_context_mix(5000, 500, seed=s) for s in (4, 4, 5))
    assert (a == b).all() and (a != c).any() and len(a) == 5500
    halves = [(h > 40_000).mean() for h in (a[:2750], a[2750:])]
    assert min(halves) > 0.4 * max(halves)
    with pytest.raises(ValueError, match="longs=-1"): long_context_mix(3, -1)
    with pytest.raises(ValueError, match="at least one"): long_context_mix(0, 0)


def test_describe_is_numpys():
    a = long_context_mix(500, 5)
    d = describe(a)
    assert d["n"] == 505 and d["tokens"] == a.sum() and d["p90"] == np.percentile(a, 90) and d["max"] == a.max()


def check_vlm(s, n):
    "What was counted on the four lists before."
    assert len(s) == n and s.names == ("tiles", "tokens")
    for name, (count, by_tiles, (p50, _, p99)) in VLM_SUBSETS.items():
        mine = s.select(s.labels == name)
        text = mine.tokens - TILE_TOKENS * mine.column("tiles")
        assert abs(len(mine) / n - count / 70_706) < 0.01 and set(mine.column("tiles")) == set(by_tiles)
        assert abs(np.median(text) / p50 - 1) < 0.06 and abs(np.percentile(text, 99) / p99 - 1) < 0.08 and text.min() > 0     # image tokens are inside


def test_the_real_lists():
    s = vlm_samples()
    if s.generated: pytest.skip("the InternVL lists are in no data folder here")
    check_vlm(s, 70_706)
    for name, (count, by_tiles, quantiles) in VLM_SUBSETS.items():
        mine = s.select(s.labels == name)
        text = mine.tokens - TILE_TOKENS * mine.column("tiles")
        assert len(mine) == count and {int(v): int((mine.column("tiles") == v).sum()) for v in by_tiles} == by_tiles
        assert np.percentile(text, [50, 90, 99]).round().astype(int).tolist() == list(quantiles)
    drawn, again, many = vlm_samples(300, seed=1), vlm_samples(300, seed=1), vlm_samples(100_000, seed=1)
    assert (drawn.sizes == again.sizes).all() and len(many) == 100_000 and "replacement" in many.source and "replacement" not in drawn.source


def test_generated_samples(): check_vlm(generated_vlm_samples(70_706, seed=2), 70_706)


def test_out_of_reach_is_said(monkeypatch):
    def nothing(name): raise DataError("no such data")
    monkeypatch.setattr("modeltc_lab.balance.lengths.find", nothing)
    s = vlm_samples(40)
    assert s.generated and len(s) == 40 and "generated" in s.source


def test_samples_check_themselves():
    with pytest.raises(ValueError, match="labels: got 1"): Samples([[1, 2], [3, 4]], ("a", "tokens"), "x", labels=np.array(["a"]))
    with pytest.raises(ValueError, match="mask of shape"): Samples([[1, 2], [3, 4]], ("a", "tokens"), "x").select([True])


LENGTHS = [30, 20, 5]
FILES = {"a.txt": "30\n20 5\n", "a.csv": "30\n20\n5\n", "head.csv": "tokens\n30\n20\n5\n", "b.csv": "id,tokens\n1,30\n2,20\n3,5\n", "a.json": "[30, 20, 5]", "b.json": '{"id": [1, 2, 3], "length": [30, 20, 5]}',
         "c.json": '[{"length": 30}, {"length": 20}, {"length": 5}]', "a.jsonl": "30\n20\n5\n", "b.jsonl": '{"x": 1, "num_tokens": 30}\n{"x": 1, "num_tokens": 20}\n\n{"x": 2, "num_tokens": 5}\n',
         "ids.jsonl": "\n".join(json.dumps({"input_ids": [7] * n}) for n in LENGTHS), "float.csv": "30.0\n20\n5\n"}


@pytest.mark.parametrize("name", FILES)
def test_files(name, tmp_path):
    (tmp_path / name).write_text(FILES[name])
    assert read_lengths(tmp_path / name).tolist() == LENGTHS
    (tmp_path / (name + ".gz")).write_bytes(gzip.compress(FILES[name].encode()))
    assert read_lengths(str(tmp_path / (name + ".gz"))).tolist() == LENGTHS


def test_binary_files(tmp_path):
    np.save(tmp_path / "a.npy", np.array(LENGTHS, np.int32))
    assert read_lengths(tmp_path / "a.npy").tolist() == LENGTHS
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"id": [9, 8, 7], "tokens": LENGTHS, "input_ids": [[1] * n for n in LENGTHS]}), tmp_path / "a.parquet")
    assert read_lengths(tmp_path / "a.parquet").tolist() == read_lengths(tmp_path / "a.parquet", "input_ids").tolist() == LENGTHS
    assert read_lengths(tmp_path / "a.parquet", "id").tolist() == [9, 8, 7]


def test_tables_of_samples(tmp_path):
    (tmp_path / "v.csv").write_text("name,tiles,tokens\na,1,300\nb,0,40\n")
    s = read_samples(tmp_path / "v.csv")
    assert s.sizes.tolist() == [[1, 300], [0, 40]] and s.names == ("tiles", "tokens") and not s.generated
    assert read_samples(tmp_path / "v.csv", ("tokens",)).sizes.tolist() == [[300], [40]]
    with pytest.raises(ValueError, match="column='images': v.csv has name, tiles, tokens"): read_samples(tmp_path / "v.csv", ("images", "tokens"))


@pytest.mark.parametrize("name, text, said", [
    ("a.csv", "1\n0\n", r"lengths of a.csv\[1\]=0"), ("a.csv", "3\nx\n", "row 1: got 'x'"), ("a.csv", "", "is empty"), ("a.csv", "3,4\n5\n", "between 1 and 2 columns"), ("a.csv", "a,b\n1,2\n", "say which holds"), ("a.csv", "tokens\n", "got none"),
    ("a.json", "{", "is no JSON"), ("a.json", "7", "need a list"), ("a.jsonl", '{"length": 3}\n{"size": 4}', "same fields"), ("a.bin", "3", "are not read"), ("a.txt", "3 nan", r"\[1\]=nan"), ("a.txt", "", "got none"),
    ("a.csv", "length,tokens\n1,2\n", "say which holds")])
def test_bad_files_are_named(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=said): read_lengths(tmp_path / name)


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="there is no such file"): read_lengths(tmp_path / "none.csv")
    (tmp_path / "b.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="is not UTF-8"): read_lengths(tmp_path / "b.csv")


def test_data_sets():
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * n for n in (3, 1, 0, 8)], "n": [3, 1, 2, 8], "text": ["a"] * 4})
    assert lengths_of(rows.select([3, 0])).tolist() == [8, 3] and lengths_of(rows, "n").tolist() == [3, 1, 2, 8]
    assert lengths_of(rows.select([1, 3, 0]).sort("n", reverse=True)).tolist() == [8, 3, 1]
    many = datasets.concatenate_datasets([rows.select([0, 1])] * 3)
    assert lengths_of(many).tolist() == [3, 1] * 3
    with pytest.raises(ValueError, match=r"\[2\]=0"): lengths_of(rows)
    with pytest.raises(ValueError, match="tokenise it first"): lengths_of(rows, "text")
    with pytest.raises(ValueError, match="column='ids'"): lengths_of(rows, "ids")
