"`modeltc-lab sim` as a user meets it."

import json

import numpy as np
import pytest

from modeltc_lab.core.cli import main
from modeltc_lab.serving.cost import Calibrated
from modeltc_lab.serving.workload import Workload

FIELDS = {"policy", "goodput_rps", "goodput_tokens_per_s", "throughput_rps", "sla_attainment", "ttft_s", "tpot_s", "mtpot_s", "e2e_s", "evictions_per_100", "recomputed_tokens",
          "cached_tokens", "swapped_tokens", "kv_use_mean", "unfinished", "requests", "wall_s"}


def run(capsys, *argv):
    code = main(["sim", *argv])
    out = capsys.readouterr()
    return code, out.out, out.err


def test_json_schema(capsys):
    code, out, _ = run(capsys, "--policy", "past_future", "--policy", "oracle", "--requests", "80", "--capacity", "20000", "--json")
    answer = json.loads(out)
    assert code == 0 and [r["policy"] for r in answer["results"]] == ["past_future", "oracle"]
    assert all(set(r) == FIELDS and set(r["ttft_s"]) == set(r["mtpot_s"]) == {"p50", "p90", "p99"} for r in answer["results"])
    assert answer["config"]["capacity"] == 20_000 and answer["config"]["generated"] is True


def test_table_and_report(capsys, tmp_path):
    code, out, _ = run(capsys, "--trace", "dist-3", "--requests", "60", "--policy", "oracle", "--policy", "aggressive", "--report", str(tmp_path / "r.html"))
    assert code == 0 and "oracle" in out and "aggressive" in out and "generated, not recorded" in out
    page = (tmp_path / "r.html").read_text()
    assert "Plotly.newPlot" in page and 'src="http' not in page


def test_frontier(capsys, tmp_path):
    argv = ["--requests", "150", "--capacity", "20000", "--policy", "oracle", "--policy", "conservative", "--frontier"]
    code, out, _ = run(capsys, *argv, "--report", str(tmp_path / "f.html"))
    assert code == 0 and "holds to" in out and "Plotly.newPlot" in (tmp_path / "f.html").read_text()
    code, out, _ = run(capsys, *argv, "--rates", "1,4", "--json")
    rows = json.loads(out)["frontier"]
    assert code == 0 and [(r["policy"], r["rate"]) for r in rows] == [("oracle", 1), ("oracle", 4), ("conservative", 1), ("conservative", 4)]
    assert rows[0]["goodput_rps"] < rows[1]["goodput_rps"]


def test_every_part_of_the_engine_from_the_command_line(capsys, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 4, "hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 1000}))
    (tmp_path / "card.json").write_text(json.dumps({"name": "mine", "flops": 1e13, "bandwidth": 2e11, "memory": 8e9, "link_bandwidth": 1e10}))
    code, out, _ = run(capsys, "--requests", "60", "--model", str(tmp_path / "config.json"), "--device", str(tmp_path / "card.json"), "--policy", "vllm", "--policy", "new_token_ratio", "--page", "8",
                       "--cache", "1000", "--evict", "swap", "--host", "5000", "--lookahead", "1", "--schedule-s", "0.001", "--workers", "2", "--prefill-workers", "1", "--router", "least_tokens",
                       "--arrivals", "gamma", "--rate", "20", "--cv", "3", "--warmup", "0.5", "--drain", "0.2", "--json")
    answer = json.loads(out)
    assert code == 0 and answer["config"]["capacity"] > 10_000 and [r["policy"] for r in answer["results"]] == ["vllm", "new_token_ratio"] and all(r["requests"] < 60 for r in answer["results"])


def test_a_calibrated_cost(capsys, tmp_path):
    Calibrated(np.array([0.01, 0, 1e-5, 0, 0, 0, 0, 0, 0]), 1).to_json(tmp_path / "mine.json")
    code, out, _ = run(capsys, "--requests", "30", "--policy", "oracle", "--cost", str(tmp_path / "mine.json"), "--until", "3", "--json")
    assert code == 0 and json.loads(out)["results"][0]["unfinished"] > 0


def test_own_trace(capsys, tmp_path):
    (tmp_path / "mine.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,100,20\n0.1,50,9\n")
    code, out, _ = run(capsys, "--trace", str(tmp_path / "mine.csv"), "--policy", "past_future", "--json")
    assert code == 0 and json.loads(out)["results"][0]["requests"] == 2


def test_azure(capsys):
    if not Workload.available("azure2023_conv"): pytest.skip("azure2023_conv is not within reach; put it into a data folder")
    code, out, _ = run(capsys, "--trace", "azure2023_conv", "--policy", "past_future", "--policy", "oracle", "--capacity", "120000", "--rate", "3", "--sla", "10,1.5", "--json")
    rows = json.loads(out)["results"]
    assert code == 0 and all(r["requests"] == 19_366 for r in rows) and rows[1]["evictions_per_100"] == 0


@pytest.mark.parametrize("argv, message", [
    (["--policy", "best"], "policy='best'"), (["--sla", "10"], "--sla '10'"), (["--sla", "0,1"], "ttft_s=0"), (["--trace", "nowhere.csv"], "nowhere.csv"),
    (["--trace", "azure2032"], "azure2032"), (["--rate", "-2"], "rate=-2"), (["--capacity", "0"], "capacity=0"), (["--reserve", "1.5"], "reserve=1.5"),
    (["--capacity", "many"], "many"), (["--engine", "fast"], "--engine 'fast'"), (["--page", "0"], "page=0"), (["--router", "near"], "router='near'"), (["--cost", "free"], "--cost 'free'"),
    (["--arrivals", "never"], "--arrivals 'never'"), (["--device", "nowhere.json"], "nowhere.json"), (["--frontier", "--rate", "3"], "--rate 3.0: cannot be combined with --frontier"),
    (["--rates", "1,2"], "add --frontier"), (["--frontier", "--rates", "1,x"], "--rates '1,x'"), (["--until", "0"], "until_s=0"), (["--warmup", "1e9"], "warmup_s="), (["--cv", "0", "--arrivals", "gamma"], "cv=0"), (["--no-such-option"], "no-such-option"), (["--model", "gpt"], "gpt"), (["--max-new-tokens", "2"], "max_new_tokens=2")])
def test_mistakes_are_one_line_and_exit_2(capsys, argv, message):
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and len(err.strip().splitlines()) == 1 and message in err


@pytest.mark.parametrize("rows, message", [
    ("0,5,5\n0,-1,5\n", "bad.csv, row 3, field 'prompt_tokens': got -1"), ("2,5,5\n1,5,5\n", "bad.csv, row 3, field 'arrival_s'"), ("0,5\n", "bad.csv, row 2")])
def test_bad_rows_name_file_row_and_field(capsys, tmp_path, rows, message):
    path = tmp_path / "bad.csv"
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + rows)
    code, _, err = run(capsys, "--trace", str(path))
    assert code == 2 and message in err and len(err.strip().splitlines()) == 1
