"Run Vidur once and say what each part took. Runs inside Vidur's own environment, from its checkout: `python vidur_child.py OUT.json [options of vidur.main]`."

import atexit
import json
import sys
import time
from pathlib import Path


def timed(call):
    "What a call gives, with its wall and processor seconds."
    wall, cpu = time.perf_counter(), time.process_time()
    value = call()
    return value, {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def simulator(options):
    "A simulator with its predictors, made from the command's options."
    from vidur.config import SimulationConfig
    from vidur.simulator import Simulator
    from vidur.utils.random import set_seeds
    sys.argv = ["vidur.main", *options]
    config = SimulationConfig.create_from_cli_args()
    set_seeds(config.seed)
    made = Simulator(config)
    atexit.unregister(made._write_output)  # timed below instead
    return made


def main(out, *options):
    "Set up, run, write; then the times and what happened to every request."
    sim, setup = timed(lambda: simulator(options))
    requests = sorted((event._request for _, event in sim._event_queue), key=lambda r: r.id)
    _, run = timed(sim.run)
    _, write = timed(sim._write_output)
    from vidur.entities import Batch
    figures = [[r.arrived_at, r.prefill_completed_at, r.completed_at, r.num_restarts] for r in requests]
    Path(out).write_text(json.dumps({"setup": setup, "run": run, "write": write, "batches": Batch.generate_id(), "requests": figures}))


if __name__ == "__main__": main(*sys.argv[1:])
