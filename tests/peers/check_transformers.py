"What this package relies on in the installed transformers, checked: one JSON object on the last line, exit status 1 when something differs."
import json
import logging
import sys
from collections import Counter

import numpy as np
import torch
import transformers

from modeltc_lab.core.models import random_llama
from modeltc_lab.serving.cost import UnitCost
from modeltc_lab.serving.engine import HFExecutor, stub_model
from modeltc_lab.serving.past_future import AdaptivePastFuture, Oracle, PastFuture
from modeltc_lab.serving.policies import Aggressive, Conservative, HFFifo, HFPrefillFirst, NewTokenRatio
from modeltc_lab.serving.token_sim import simulate
from modeltc_lab.serving.workload import Workload

logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
POLICIES = (HFFifo, lambda: HFFifo(0.0), lambda: HFFifo(0.5), HFPrefillFirst, PastFuture, AdaptivePastFuture, lambda: Aggressive(0.9), Conservative, NewTokenRatio, Oracle)


def traffic(rng: np.random.Generator, n: int = 50) -> Workload:
    w = Workload.build("random", np.cumsum(rng.exponential(rng.choice([0.1, 0.5, 3.0]), n)), rng.integers(1, 65, n), rng.integers(1, 65, n), max_new_tokens=64)
    return w.closed_loop(int(rng.integers(2, 16))) if rng.random() < 0.3 else w


def schedules(counts: Counter, seeds: int) -> None:
    "Emulated runs against the simulator: every pass, every page, every time."
    stub = stub_model()
    for seed in range(seeds):
        for make in POLICIES:
            rng, policy = np.random.default_rng(seed), make()
            w, executor = traffic(rng), HFExecutor(stub, int(rng.integers(144, 600)), int(rng.choice([4, 16, 32])), int(rng.choice([16, 64, 256])), int(rng.choice([3, 20, 1024])))
            real = executor.run(w, policy, clock=UnitCost(), progress=False).result
            sim = simulate(w, policy, executor.capacity, UnitCost(), engine=executor.engine(policy), record=True)
            equal = len(real.steps) == len(sim.steps) and real.requests.tobytes() == sim.requests.tobytes()
            differ = sum(a != b or not np.array_equal(x, y) for a, b, x, y in zip(real.steps, sim.steps, real.batches, sim.batches))
            counts["passes"] += len(real.steps)
            counts["mismatches"] += differ + (not equal and not differ)
            counts["evictions"] += int(real.requests["evictions"].sum())


def replies(counts: Counter) -> None:
    "Greedy replies in little memory against those of the model alone."
    model, rng = random_llama(layers=2, hidden=64, heads=4, kv_heads=2, mlp=128, vocab=128), np.random.default_rng(0)
    w = Workload.build("at once", np.zeros(20), rng.integers(1, 60, 20), rng.integers(1, 40, 20), max_new_tokens=64)
    for make in POLICIES:
        executor = HFExecutor(model, 130, 4, 32)
        run = executor.run(w, make(), progress=False)
        for prompt, reply, n in zip(executor.prompts(w), run.replies, w.sealed_output.tolist()):
            ids = torch.tensor([prompt])
            alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, do_sample=False, pad_token_id=0)[0, len(prompt):].tolist()
            counts["replies"] += 1
            counts["replies that differ"] += reply != alone


def main() -> int:
    counts: Counter = Counter({"mismatches": 0, "replies that differ": 0})
    schedules(counts, int(sys.argv[1]) if len(sys.argv) > 1 else 4)
    replies(counts)
    print(json.dumps({"version": transformers.__version__, **counts}))
    return int(counts["mismatches"] or counts["replies that differ"])


if __name__ == "__main__": raise SystemExit(main())
