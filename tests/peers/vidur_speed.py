"""Vidur beside the simulator: the same requests, memory, batch limits and profiles; seconds of both, and what both predict. Run it with vidur_speed.sh.

Vidur's table of attention times is not in every copy of its repository (it is kept apart, in large-file storage). Where it is missing, a table filled from our roofline stands in, so that Vidur has something to learn from;
both simulators then price attention alike, and what they predict says something about their loops and not about a device. The records say which table it was.
"""

import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from modeltc_lab.core.bench import ratio_interval
from modeltc_lab.core.data import data_hash
from modeltc_lab.core.results import record, results_root, table, write
from modeltc_lab.serving.cost import DEVICES, MODELS, PER_LAYER, VIDUR_MODELS, OperatorTable, Roofline
from modeltc_lab.serving.policies import EngineConfig, Sarathi, VllmLike
from modeltc_lab.serving.token_sim import simulate
from modeltc_lab.serving.workload import Workload

MODEL, DEVICE, TRACE, PAGE, BATCH, LONGEST = "llama-2-7b", "a100-80g", "azure2023_conv", 16, 128, 4096
POLICIES = {"vllm": (VllmLike(0.99), EngineConfig(token_budget=4096, max_batch=BATCH, mixed=False, page=PAGE), ("max_tokens_in_batch", 4096)),
            "sarathi": (Sarathi(0.99), EngineConfig(token_budget=512, max_batch=BATCH, chunked=True, page=PAGE), ("chunk_size", 512))}
FOREST = {"num_estimators": 250, "max_depth": 32, "min_samples_split": 2, "k_fold_cv_splits": 2, "num_training_job_threads": 1}
HERE = Path(__file__).parent


def our_cost():
    "What Vidur counts of a pass: its profiled operators and attention; no output head, no host time."
    roofline = Roofline(replace(MODELS[MODEL], vocab=1), DEVICES[DEVICE], overhead_s=0.0)
    return OperatorTable(roofline, {n: c for n, c in OperatorTable.vidur(roofline).operators.items() if n in PER_LAYER})


def attention_rows(roofline):
    "Attention of one layer in Vidur's columns, milliseconds, from the roofline."
    k, layers, s = roofline.coefficients(), roofline.shape.layers, roofline.shape
    same = {"n_embd": s.hidden, "n_q_head": s.heads, "n_kv_head": s.kv_heads, "block_size": PAGE, "num_tensor_parallel_workers": 1, "max_model_len": LONGEST, "attention_backend": "roofline"}
    took = lambda seconds: 1e3 * (roofline.launch_s + seconds / layers)
    for batch in (1, 2, 3, 4, 6, 8, *range(12, 65, 4), *range(72, BATCH + 1, 8)):
        for kv in range(0, LONGEST + 1, 64):
            yield {**same, "batch_size": batch, "prefill_chunk_size": 0, "kv_cache_size": kv, "is_prefill": False, "time_stats.attn_decode.median": took(max(k[8], k[9]) * batch * kv), "time_stats.attn_prefill.median": ""}
    for kv in range(0, LONGEST + 1, 256):
        for chunk in (*range(8, 64, 8), *range(64, 512, 16), *range(512, LONGEST + 1, 32)):
            if kv + chunk > LONGEST: continue
            area = chunk * kv + chunk * (chunk + 1) / 2
            yield {**same, "batch_size": 1, "prefill_chunk_size": chunk, "kv_cache_size": kv, "is_prefill": True, "time_stats.attn_decode.median": "", "time_stats.attn_prefill.median": took(max(k[6] * area, k[7] * (kv + chunk)))}


def write_rows(path, rows):
    "A CSV file."
    rows = list(rows)
    with open(path, "w", newline="", encoding="utf-8") as f:
        out = csv.DictWriter(f, list(rows[0]))
        out.writeheader()
        out.writerows(rows)
    return path


def traffic(n, rate):
    "The first requests of the trace that Vidur can hold (4096 tokens in all), stretched to a rate."
    w, _ = Workload.load(TRACE).fits(LONGEST - 1)
    return w.head(n).scale(rate)


def vidur_options(policy, trace, blocks, attention, work):
    "The command line of vidur.main."
    name, limit = POLICIES[policy][2]
    scheduler, forest, replay = f"--{policy}_scheduler_config_", "--random_forrest_execution_time_predictor_config_", "--trace_request_generator_config_"
    given = {"--replica_config_model_name": VIDUR_MODELS[MODEL], "--replica_config_device": "a100", "--replica_scheduler_config_type": policy, "--request_generator_config_type": "trace_replay",
             f"{replay}trace_file": trace, f"{replay}max_tokens": LONGEST, f"{scheduler}num_blocks": blocks, f"{scheduler}block_size": PAGE, f"{scheduler}batch_size_cap": BATCH, f"{scheduler}watermark_blocks_fraction": 0.01,
             f"{scheduler}{name}": limit, "--metrics_config_output_dir": work / "out", "--metrics_config_cache_dir": work / f"cache_{policy}", **{forest + k: v for k, v in FOREST.items()}}
    if attention is not None: given[f"{forest}attention_input_file"] = attention
    return [str(p) for pair in given.items() for p in pair] + ["--no-metrics_config_store_plots", "--no-metrics_config_enable_chrome_trace"]


def command(argv, cwd, extra):
    "Run a command to its end: wall and processor seconds of all of it."
    before, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([str(a) for a in argv], cwd=cwd, env={**os.environ, **extra}, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"{' '.join(map(str, argv[:3]))} ...: exit {done.returncode}\n{done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": time.perf_counter() - wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


def vidur(python, checkout, options, work):
    "One run of Vidur: seconds of its parts and of the whole command, and its requests."
    out = work / "vidur.json"
    whole = command([python, HERE.resolve() / "vidur_child.py", out, *options], checkout, {"PYTHONPATH": str(checkout), "WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"})
    return {**json.loads(out.read_text()), "whole": whole}


def ours(w, policy, slots, cost, impl):
    "One run of the simulator: its seconds and its result."
    admission, engine, _ = POLICIES[policy]
    wall, cpu = time.perf_counter(), time.process_time()
    result = simulate(w, admission, slots, cost, engine=engine, impl=impl)
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}, result


def our_command(trace, policy, slots):
    "`modeltc-lab sim` on the same requests: seconds of the whole command."
    engine = POLICIES[policy][1]
    kind = ["--engine", "own"] if engine.chunked else ["--engine", "alternating", "--admit-every", 1]
    return command([sys.executable, "-m", "modeltc_lab", "sim", "--trace", trace, "--policy", policy, "--capacity", slots, "--watermark", 0.99, "--cost", "operators", "--token-budget", engine.token_budget,
                    "--max-batch", engine.max_batch, "--page", engine.page, *kind, "--json"], Path.cwd(), {"OMP_NUM_THREADS": "1"})


def measure(checkout, python, commit, n, rate, repeats, work):
    "All records."
    w, cost, out = traffic(n, rate), our_cost(), []
    blocks = Roofline(MODELS[MODEL], DEVICES[DEVICE]).kv_capacity // PAGE
    columns = lambda *names: (dict(zip(names, row)) for row in zip(w.arrival_s.tolist(), w.prompt.tolist(), w.sealed_output.tolist()))
    trace, own_trace = write_rows(work / "trace.csv", columns("arrived_at", "num_prefill_tokens", "num_decode_tokens")), write_rows(work / "own.csv", columns("arrival_s", "prompt_tokens", "output_tokens"))
    profiled = (checkout / f"data/profiling/compute/a100/{VIDUR_MODELS[MODEL]}/attention.csv").is_file()
    attention = None if profiled else write_rows(work / "attention.csv", attention_rows(cost.roofline))
    config = {"vidur commit": commit, "attention table of Vidur": "its own" if profiled else "filled from our roofline, its own is not in the checkout", "requests": n, "rate": rate, "capacity": blocks * PAGE, "model": MODEL,
              "device": DEVICE, "max_batch": BATCH, "page": PAGE, "forest": FOREST}
    for policy in POLICIES:
        options = vidur_options(policy, trace, blocks, attention, work)
        common = dict(config={**config, "policy": policy}, data=TRACE, data_hash=data_hash(TRACE))
        note = lambda method, metric, unit, samples, **more: out.append(record("serving", "token_sim_vidur", f"{method}, {policy}", metric, unit, samples, implementation=method.split()[0], **{**common, **more}))
        cold = vidur(python, checkout, options, work)  # trains its forests and fills its caches
        theirs, bare, fast, slow, command_ = [], [], [], [], []
        for impl in ("numba", "python"): ours(w, policy, blocks * PAGE, cost, impl)
        our_command(own_trace, policy, blocks * PAGE)
        for _ in range(repeats):  # turn by turn, so that both meet the same machine
            theirs.append(vidur(python, checkout, options, work))
            bare.append(vidur(python, checkout, [*options, "--no-metrics_config_write_metrics"], work))
            fast.append(ours(w, policy, blocks * PAGE, cost, "numba"))
            slow.append(ours(w, policy, blocks * PAGE, cost, "python"))
            command_.append(our_command(own_trace, policy, blocks * PAGE))
        seconds = lambda runs, part, kind: [r[part][kind] for r in runs]
        for kind, said in (("cpu", "processor time"), ("wall", "wall time")):
            loop, empty, own, readable = seconds(theirs, "run", kind), seconds(bare, "run", kind), [t[kind] for t, _ in fast], [t[kind] for t, _ in slow]
            note("vidur", f"event loop, {said}", "s", loop)
            note("vidur", f"event loop that keeps no metrics, {said}", "s", empty)
            note("vidur", f"setting up with warm caches, {said}", "s", seconds(theirs, "setup", kind))
            note("vidur", f"setting up with cold caches, {said}", "s", [cold["setup"][kind]])
            note("vidur", f"writing its metrics, {said}", "s", seconds(theirs, "write", kind))
            note("vidur", f"whole command, {said}", "s", seconds(theirs, "whole", kind))
            note("modeltc_lab", f"simulate, {said}", "s", own)
            note("modeltc_lab", f"simulate, readable loop, {said}", "s", readable)
            note("modeltc_lab", f"whole command, {said}", "s", [c[kind] for c in command_])
            for what, a, b in (("simulate over Vidur's event loop", own, loop), ("simulate over Vidur's event loop that keeps no metrics", own, empty), ("readable loop over Vidur's event loop", readable, loop),
                                ("whole command over Vidur's, its caches warm", [c[kind] for c in command_], seconds(theirs, "whole", kind))):
                note("modeltc_lab", f"speed-up, {what}, {said}", "x", [float(np.median(b) / np.median(a)), *ratio_interval(a, b)])
        arrived, first, finished, restarts = np.array(theirs[0]["requests"]).T
        result = fast[0][1]
        note("vidur", "passes", "passes", [theirs[0]["batches"]])
        note("modeltc_lab", "passes", "passes", [len(result.steps)])
        note("vidur", "evictions", "evictions", [restarts.sum()])
        note("modeltc_lab", "evictions", "evictions", [result.requests["evictions"].sum()])
        for metric, a, b in (("TTFT", first - arrived, result.ttft_s), ("E2E", finished - arrived, result.e2e_s)):
            for p in (50, 90, 99):
                note("vidur", metric, "s", [np.percentile(a, p)], x_name="percentile", x=p)
                note("modeltc_lab", metric, "s", [np.percentile(b, p)], x_name="percentile", x=p)
                note("modeltc_lab", f"{metric}, against Vidur", "%", [100 * (np.percentile(b, p) / np.percentile(a, p) - 1)], x_name="percentile", x=p)
    return out


def main():
    "Measure, write the records, print them."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="of microsoft/vidur")
    parser.add_argument("python", help="interpreter of Vidur's environment")
    parser.add_argument("--commit", help="of the checkout, where git does not know it")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rate", type=float, default=3.0, help="requests per second")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--results", type=Path, help="folder for the records; default: results_dir of the settings")
    said = parser.parse_args()
    checkout = said.checkout.resolve()
    commit = said.commit or subprocess.run(["git", f"--git-dir={checkout / '.git'}", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    if not commit: parser.error(f"{said.checkout} is no git checkout: name its commit with --commit")
    with tempfile.TemporaryDirectory() as work: records = measure(checkout, said.python, commit, said.requests, said.rate, said.repeats, Path(work))
    print(table(records, rows=("method", "x"), cols="metric"), f"\n{len(records)} records in {write(records, said.results or results_root())}")


if __name__ == "__main__": main()
