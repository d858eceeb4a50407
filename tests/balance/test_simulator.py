"The pipeline's clock: closed forms, a max-plus reference, torch's own schedules, bounds, causes; and the cluster against the schedule's own measure."

from functools import lru_cache
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeltc_lab.balance.cost import CostModel, GroupSpec
from modeltc_lab.balance.packing import pack
from modeltc_lab.balance.partition import analytic_profile, partition
from modeltc_lab.balance.schedule import costs, schedule, step_seconds
from modeltc_lab.balance.simulator import (
    BACKWARD,
    CHUNKED,
    FORWARD,
    INPUT,
    SCHEDULES,
    WEIGHT,
    ClusterSim,
    Link,
    ScheduleError,
    StageTimes,
    _check_order,
    in_flight,
    makespans,
    pipeline_order,
    simulate_pipeline,
    stage_homes,
)

KINDS = ((s, v) for s in SCHEDULES for v in ((2, 3) if s in CHUNKED and s != "zbv" else (2,) if s == "zbv" else (1,)))
KINDS = tuple(KINDS)
small = st.integers(1, 6)


def orders(ranks, micros):
    "Every schedule that takes these numbers."
    for s, v in KINDS:
        rounds = max(1, micros // ranks)
        if s in ("interleaved", "interleaved-zb") and micros % rounds: continue
        yield s, v, pipeline_order(s, ranks, micros, v)


def reference(order, home, f, r, i, w, size, link):
    "End of every operation as a longest path: `end(op) = length + max(end of what it waits for)`, one data rank, times [M, S]."
    stages = f.shape[1]
    place = {tuple(op): (p, k) for p, ops in enumerate(order.tolist()) for k, op in enumerate(ops)}
    kinds = {(op[1], op[2], op[0] == FORWARD): op[0] for op in place if op[0] != WEIGHT}
    sent = {(s, d): [tuple(op) for op in order[home[s]].tolist() if op[1] == s and (op[0] == FORWARD if d == 0 else op[0] in (BACKWARD, INPUT))] for s in range(stages) for d in (0, 1)}

    @lru_cache(None)
    def transfer(op):
        "When what an operation gives has been sent to the neighbour's rank."
        kind, s, m = op
        d = 0 if kind == FORWARD else 1
        queue = sent[s, d]
        at = queue.index(op)
        return max(end(op), transfer(queue[at - 1]) if at else 0.0) + size[m, s if d == 0 else s - 1] / link.bytes_s

    def leaves(op):
        return op[0] != WEIGHT and (op[1] < stages - 1 and home[op[1] + 1] != home[op[1]] if op[0] == FORWARD else op[1] > 0 and home[op[1] - 1] != home[op[1]])

    def comes(op): return transfer(op) + link.latency_s if leaves(op) else end(op)

    @lru_cache(None)
    def end(op):
        kind, s, m = op
        p, k = place[op]
        waits = [0.0]
        if k:
            before = tuple(order[p, k - 1].tolist())
            waits.append(comes(before) if link.blocking and leaves(before) else end(before))
        if kind == FORWARD and s: waits.append(comes((FORWARD, s - 1, m)))
        if kind == WEIGHT: waits.append(end((INPUT, s, m)))
        if kind in (BACKWARD, INPUT):
            waits.append(end((FORWARD, s, m)))
            if s < stages - 1: waits.append(comes((kinds[s + 1, m, False], s + 1, m)))
        length = f[m, s] if kind == FORWARD else w[m, s] if kind == WEIGHT else r[m, s] + i[m, s] + (w[m, s] if kind == BACKWARD else 0.0)
        return length + max(waits)

    return max(comes(op) if link.blocking and leaves(op) else end(op) for op in place)


@settings(max_examples=40)
@given(small, st.integers(1, 12), st.integers(1, 9), st.integers(1, 9))
def test_equal_stages_have_a_closed_form(ranks, micros, f, b):
    for s in ("1f1b", "gpipe"):
        t = simulate_pipeline(([float(f)] * ranks, [float(b)] * ranks), micros=micros, schedule=s)
        assert t.makespan_s == (micros + ranks - 1) * (f + b)
        assert t.causes["bubble"] == pytest.approx((ranks - 1) * (f + b)) and t.causes["data"] == t.causes["stage"] == t.causes["comm"] == 0
        assert t.idle == pytest.approx((ranks - 1) / (micros + ranks - 1))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 6, 8])
def test_zero_bubble_closed_forms(ranks):
    for micros in (2 * ranks, 3 * ranks, 5 * ranks):
        one = np.ones(ranks)
        for f, i, w in ((1, 1, 1), (2, 2, 2), (3, 3, 1)):
            t = simulate_pipeline(StageTimes(f * one, (i + w) * one, weight_s=w * one), micros=micros, schedule="zb-h1")
            assert t.makespan_s == micros * (f + i + w) + (ranks - 1) * (f + i - w)      # arXiv 2401.10241, table 2
        t = simulate_pipeline(StageTimes(np.ones(2 * ranks), 2 * np.ones(2 * ranks)), micros=micros, schedule="zbv")
        rows = t.rows()
        for p in range(ranks):
            mine = [r for r in rows if r["rank"] == p]
            assert mine[-1]["end_s"] - mine[0]["start_s"] == 6 * micros                  # no rest between first and last


@settings(max_examples=25)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 10_000), st.sampled_from([Link(), Link(0.3, 2.0), Link(0.1, 0.7, True), Link(0.2, float("inf"), True)]))
def test_a_longest_path_reference(ranks, micros, seed, link):
    rng = np.random.default_rng(seed)
    for s, v, order in orders(ranks, micros):
        home, shape = stage_homes(s, ranks, v), (micros, ranks * v)
        f, r, b, size = (rng.uniform(0, 2, shape) for _ in range(4))
        w = b * rng.uniform(0, 1, shape)
        r *= rng.integers(0, 2, shape)
        t = simulate_pipeline(StageTimes(f, b, r, w, size), schedule=s, chunks=v, link=link)
        assert t.makespan_s == pytest.approx(reference(order, home, f, r, b - w, w, size, link), rel=1e-12)


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 8), st.integers(1, 3), st.integers(0, 10_000))
def test_bounds_causes_and_rows(ranks, micros, data, seed):
    rng = np.random.default_rng(seed)
    for s, v, order in orders(ranks, micros):
        shape = (data, micros, ranks * v)
        f, b = rng.uniform(0.1, 2, shape), rng.uniform(0.1, 3, shape)
        t = simulate_pipeline(StageTimes(f, b, 0.3 * f, output_bytes=1.0), schedule=s, chunks=v, link=Link(0.01, 20.0, bool(seed % 2)), allreduce_s=0.2)
        free = simulate_pipeline(StageTimes(f, b, 0.3 * f), schedule=s, chunks=v)
        assert t.makespan_s >= free.makespan_s >= free.bound_s - 1e-12 and free.bound_s >= free.ideal_s - 1e-12
        work = (1.3 * f + b).sum()
        assert t.ideal_s == pytest.approx(work / (data * ranks)) and t.busy_s.sum() == pytest.approx(work)
        assert sum(t.causes.values()) == pytest.approx(t.makespan_s - t.ideal_s) and sum(t.idle_by_cause.values()) == pytest.approx(t.idle)
        assert t.causes["comm"] >= 0.2 - 1e-9
        rows = t.rows(idle=True)
        for p in range(t.ranks):
            mine = [x for x in rows if x["rank"] == p]
            assert mine[0]["start_s"] == 0 and mine[-1]["end_s"] == pytest.approx(t.makespan_s)
            assert all(x["end_s"] == pytest.approx(y["start_s"]) for x, y in zip(mine, mine[1:]))   # rows and gaps tile the time of a rank


@settings(max_examples=30)
@given(st.integers(1, 8), st.integers(1, 20))
def test_no_schedule_deadlocks_and_every_operation_is_there_once(ranks, micros):
    for s, v, order in orders(ranks, micros):
        _check_order(order, stage_homes(s, ranks, v), micros, ranks * v)
        assert simulate_pipeline(StageTimes(np.ones(ranks * v), np.ones(ranks * v)), micros=micros, schedule=s, chunks=v).makespan_s >= 2 * v * micros
        assert simulate_pipeline(StageTimes(np.zeros(ranks * v), np.zeros(ranks * v)), micros=micros, schedule=s, chunks=v).makespan_s == 0


@settings(max_examples=40)
@given(st.integers(2, 5), st.integers(1, 8), st.integers(0, 10_000))
def test_longer_operations_never_end_earlier(ranks, micros, seed):
    rng = np.random.default_rng(seed)
    f, b = rng.uniform(0, 2, (1, micros, ranks)), rng.uniform(0, 2, (1, micros, ranks))
    more = f + rng.uniform(0, 1, f.shape) * (rng.random(f.shape) < 0.2)
    for s in ("gpipe", "1f1b", "zb-h1"): assert simulate_pipeline((more, b), schedule=s).makespan_s >= simulate_pipeline((f, b), schedule=s).makespan_s


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(1, 12), st.integers(0, 100))
def test_micro_batches_under_way_are_those_seen_on_the_clock(ranks, micros, seed):
    rng = np.random.default_rng(seed)
    for s, v, order in orders(ranks, micros):
        t = simulate_pipeline(StageTimes(rng.uniform(0.5, 1, ranks * v), rng.uniform(0.5, 1, ranks * v)), micros=micros, schedule=s, chunks=v)
        rows, peak = t.rows(), np.zeros(ranks * v, int)
        for stage in range(ranks * v):
            begin = {r["micro"]: r["start_s"] for r in rows if r["stage"] == stage and r["kind"] == "forward"}
            end = {r["micro"]: r["end_s"] for r in rows if r["stage"] == stage and r["kind"] in ("backward", "weight")}
            peak[stage] = max(sum(begin[m] <= x < end[m] for m in begin) for x in begin.values())
        assert (peak == in_flight(order)).all()
    assert (in_flight(pipeline_order("1f1b", ranks, micros)) == np.minimum(micros, ranks - np.arange(ranks))).all()


def torch_order(name, v, ranks, micros):
    "What torch.distributed.pipelining would do, without its transfers."
    import torch.distributed.pipelining.schedules as S
    kinds = {S.FORWARD: FORWARD, S.FULL_BACKWARD: BACKWARD, S.BACKWARD_INPUT: INPUT, S.BACKWARD_WEIGHT: WEIGHT}
    plain = lambda ops: [(kinds[a.computation_type], a.stage_index, a.microbatch_index) for a in ops if a is not None and a.computation_type in kinds]
    if name == "gpipe": return [plain(ops) for ops in S.ScheduleGPipe._get_pipeline_order(SimpleNamespace(_num_stages=ranks, _n_microbatches=micros)).values()]
    rounds = max(1, micros // ranks)
    me = SimpleNamespace(_stages=[None] * v, n_local_stages=v, pp_group_size=ranks, _n_microbatches=micros, num_stages=ranks * v, microbatches_per_round=micros // rounds, number_of_rounds=rounds)
    cls = {"looped_bfs": S.ScheduleLoopedBFS, "interleaved": S.ScheduleInterleaved1F1B, "zb-h1": S.ScheduleInterleavedZeroBubble, "interleaved-zb": S.ScheduleInterleavedZeroBubble, "zbv": S.ScheduleZBVZeroBubble}[name]
    return [plain(cls._calculate_single_rank_operations(me, r)) for r in range(ranks)]


def torch_1f1b(ranks, micros, rank):
    "What torch's 1F1B engine calls on its stage when it runs: its printed order numbers the last rank's micro-batches differently."
    import torch.distributed.pipelining.schedules as S
    done = []
    none = lambda *a, **k: []
    stage = SimpleNamespace(stage_index=rank, num_stages=ranks, is_first=rank == 0, is_last=rank == ranks - 1, get_fwd_recv_ops=none, get_fwd_send_ops=none, get_bwd_recv_ops=none, get_bwd_send_ops=none,
                            perform_reduce_grad=none, forward_one_chunk=lambda m, *a, **k: done.append((FORWARD, rank, m)), backward_one_chunk=lambda m, **k: done.append((BACKWARD, rank, m)),
                            clear_runtime_states=none, has_backward=True)
    me = SimpleNamespace(_stage=stage, _num_stages=ranks, _n_microbatches=micros, _stage_initialized=True, _stage_forward_initialized=True, _stage_backward_initialized=True, _has_backward=True, _check_inputs=lambda a, k, t, losses, *r: (a, k),
                         _initialize_stage=none, _maybe_compute_loss=none, _maybe_get_loss=none, _update_losses=none, grad_scale=None, scale_grads=False, _loss_fn=None)
    S.Schedule1F1B._step_microbatches(me, [()] * micros, [{}] * micros, None, None)
    return done


@pytest.mark.parametrize("name,v", [k for k in KINDS if k[0] != "1f1b"])
def test_orders_are_those_of_torch(name, v):
    compared = 0
    for ranks in range(1, 8):
        for micros in (*range(1, 10), 12, 14, 18):
            try: ours = pipeline_order(name, ranks, micros, v)
            except ValueError: continue
            assert [[tuple(op) for op in ops] for ops in ours.tolist()] == torch_order(name, v, ranks, micros), (ranks, micros)
            compared += 1
    assert compared > 60


def test_1f1b_is_what_torch_does():
    for ranks in range(1, 7):
        for micros in range(1, 10):
            ours = pipeline_order("1f1b", ranks, micros).tolist()
            for r in range(ranks): assert [tuple(op) for op in ours[r]] == torch_1f1b(ranks, micros, r), (ranks, micros, r)


def test_orders_of_ones_own_are_checked():
    order = pipeline_order("1f1b", 2, 2)
    times = ([1.0] * 2, [2.0] * 2)
    assert simulate_pipeline(times, micros=2, schedule=order).makespan_s == simulate_pipeline(times, micros=2).makespan_s
    swapped = order[::-1].copy()
    with pytest.raises(ScheduleError, match="does not have its stage"): simulate_pipeline(times, micros=2, schedule=swapped)
    assert simulate_pipeline(times, micros=2, schedule=swapped, homes=[1, 0]).makespan_s == simulate_pipeline(times, micros=2).makespan_s
    twice = order.copy()
    twice[0, 1] = twice[0, 0]
    with pytest.raises(ScheduleError, match="stage 0, micro-batch 0: need one forward"): simulate_pipeline(times, micros=2, schedule=twice)
    late = order.copy()
    late[1] = [[BACKWARD, 1, 0], [FORWARD, 1, 0], [FORWARD, 1, 1], [BACKWARD, 1, 1]]
    with pytest.raises(ScheduleError, match="waits for another"): simulate_pipeline(times, micros=2, schedule=late)


@pytest.mark.parametrize("call,text", [
    (lambda: pipeline_order("2f2b", 2, 2), "schedule='2f2b'"), (lambda: pipeline_order("1f1b", 0, 2), "ranks=0"), (lambda: pipeline_order("1f1b", 2, 2, 2), "chunks=2"), (lambda: pipeline_order("zbv", 2, 2, 3), "chunks=3"),
    (lambda: pipeline_order("interleaved", 4, 10, 2) is None or pipeline_order("interleaved", 4, 9, 2), "micros=9"), (lambda: simulate_pipeline(3.0), "plan=float"), (lambda: simulate_pipeline(([1.0, 2.0], [1.0, 2.0, 3.0])), "fit together"),
    (lambda: simulate_pipeline(([1.0, np.nan], [1.0, 2.0]), micros=2), "forward_s: need finite"), (lambda: simulate_pipeline(StageTimes([1.0], [1.0], weight_s=[2.0]), micros=1), "weight_s: need at most"),
    (lambda: simulate_pipeline((np.ones((3, 2)), np.ones((3, 2))), micros=4), "micros=4"), (lambda: Link(-1.0), "latency_s=-1"), (lambda: Link(0.0, 0.0), "bytes_s=0"), (lambda: simulate_pipeline(([1.0] * 3, [1.0] * 3), micros=3, schedule="zbv"), "chunks=2"),
    (lambda: ClusterSim(world=6, pp=4), "world=6"), (lambda: ClusterSim(tp=5, world=10), "tp=5"), (lambda: ClusterSim(meet="epoch"), "meet='epoch'")])
def test_errors_name_the_argument(call, text):
    with pytest.raises(ValueError) as e: call()
    assert text in str(e.value)


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 6), st.integers(1, 4), st.integers(0, 100))
def test_many_steps_at_once(steps, data, micros, stages, seed):
    rng = np.random.default_rng(seed)
    f = rng.uniform(0, 1, (steps, data, micros, stages))
    own = [simulate_pipeline(StageTimes(x, 2 * x, output_bytes=1.0), link=Link(0.1, 5.0), allreduce_s=[0.1] * stages).makespan_s for x in f]
    assert makespans(StageTimes(f, 2 * f, output_bytes=1.0), link=Link(0.1, 5.0), allreduce_s=[0.1] * stages) == pytest.approx(own)


@pytest.fixture(scope="module")
def plans():
    "A short and a long group of packs."
    rng = np.random.default_rng(0)
    return pack(rng.integers(50, 4000, 300), 4096), pack(rng.integers(5000, 16000, 40), 16384)


def test_flat_cluster_agrees_with_the_schedules_own_measure(plans):
    groups, cost = (GroupSpec(4096, 1, 4), GroupSpec(16384, 4, 32)), CostModel.analytic("llama3.1-8b", "h100")
    s = schedule(plans, world=8, groups=groups, cost=cost, accumulate=2, balance="random")
    sim = ClusterSim(world=8, cost=cost)
    t = sim.run(s)
    longest, mean = step_seconds(s, cost)
    assert t.makespan_s == pytest.approx(longest.sum())
    assert sum(t.causes.values()) == pytest.approx(t.makespan_s - t.ideal_s) and t.causes["data"] == pytest.approx(longest.sum() - mean.sum())
    assert t.causes["comm"] > 0                                                  # the long group exchanges
    assert t.idle == pytest.approx(sum(t.idle_by_cause.values()))
    talk = [r for r in t.rows() if r["kind"] == "exchange"]
    assert {int(s.groups[s.group[r["step"]]].sp) for r in talk} == {4}
    micro = ClusterSim(world=8, cost=cost, meet="micro").run(s)
    assert micro.makespan_s == pytest.approx(step_seconds(s, cost, "micro")[0].sum()) and micro.makespan_s >= t.makespan_s
    assert ClusterSim(world=8, cost=cost).run(s, rows=False).summary() == t.summary()
    paid = ClusterSim(world=8, cost=cost, allreduce_s=0.5).run(s)
    assert paid.makespan_s == pytest.approx(t.makespan_s + 0.5 * s.steps) and paid.causes["comm"] == pytest.approx(t.causes["comm"] + 0.5 * s.steps)
    rows = paid.rows(idle=True)
    for p in range(8):
        mine = [r for r in rows if r["rank"] == p]
        assert all(a["end_s"] == pytest.approx(b["start_s"]) for a, b in zip(mine, mine[1:])) and mine[-1]["end_s"] == pytest.approx(paid.makespan_s)


def test_cluster_of_pipelines(plans):
    cost = CostModel.analytic("llama3.1-8b", "h100")
    s = schedule(plans[:1], world=2, cost=cost, accumulate=8, balance="random")
    sim = ClusterSim(world=8, pp=4, cost=cost)
    t = sim.run(s)
    total = 0.0
    for k in range(s.steps):
        seconds = costs(s, cost)[s.offsets[k]:s.offsets[k + 1]].reshape(8, 2).T[:, :, None] / 4 * np.ones(4)
        total += simulate_pipeline((seconds / 3, 2 * seconds / 3), link=sim._link()).makespan_s
    assert t.makespan_s == pytest.approx(total)
    assert sum(t.causes.values()) == pytest.approx(t.makespan_s - t.ideal_s) and t.busy_s.sum() == pytest.approx(costs(s, cost).sum()) and t.ranks == 8
    assert t.causes["bubble"] > 0 and t.causes["data"] > 0 and abs(t.causes["stage"]) < 1e-9
    tensor = ClusterSim(world=16, pp=4, tp=2, cost=cost).run(s, rows=False)
    assert t.makespan_s / 2 < tensor.makespan_s < t.makespan_s and tensor.causes["comm"] > t.causes["comm"]
    deep = ClusterSim(world=8, pp=4, cost=cost, order="interleaved", chunks=2).run(s, rows=False)
    assert deep.causes["bubble"] < 0.7 * t.causes["bubble"]
    long = schedule(plans[1], world=4, groups=GroupSpec(16384, 2, 0), cost=cost, accumulate=4, balance="random")
    both = ClusterSim(world=8, pp=2, cost=cost).run(long)
    assert both.ranks == 8 and both.causes["comm"] > 0 and sum(both.causes.values()) == pytest.approx(both.makespan_s - both.ideal_s)
    assert both.idle == pytest.approx(sum(both.idle_by_cause.values()), abs=1e-9)
    with pytest.raises(ValueError, match="make it with world=8"): ClusterSim(world=8).run(s)


def test_cluster_takes_stage_times_from_a_plan(plans):
    plan = partition(analytic_profile("llama3.1-8b", tokens=4096), 4, 8)
    s = schedule(plans[:1], world=2, accumulate=8, balance="random")
    t = ClusterSim(world=8, pp=4, plan=plan).run(s, rows=False)
    g, packs = s.step(0)
    p = plan.profile.at(0, *(float(np.append(x, 0)[packs[3, 1]]) for x in (s.plans[0].tokens, s.plans[0].squares)))
    f = np.asarray(ClusterSim(world=8, pp=4, plan=plan).stage_times(s, g, packs).forward_s)
    assert f[1, 3] == pytest.approx([p.forward_s[a:b].sum() for a, b in zip(plan.cuts, plan.cuts[1:])])
    assert t.causes["stage"] > 0
    with pytest.raises(ValueError, match="needs 2"): ClusterSim(world=8, pp=2, plan=plan)


def test_a_deep_pipeline_is_fast_to_simulate():
    "The number of sweeps stays far below the number of operations: nothing is tried again and again."
    order = pipeline_order("1f1b", 16, 64)
    assert order.shape == (16, 128, 3)
    t = simulate_pipeline(StageTimes(np.ones(16), 2 * np.ones(16)), micros=64)
    assert t.makespan_s == (64 + 15) * 3 and len(t.start_s) == 16 * 128
