"""Drive vLLM's real scheduler, step by step, under our policies: `vllm_scheduler.sh` makes the environment this needs.

Everything of vLLM that plans a step is real: configuration, scheduler, KV cache manager, block pool, requests. Two things stand in: the forward pass, which returns
prepared tokens, and, in one check, a grammar that accepts everything. `--quick` runs fewer seeds and writes no record.
"""

import json
import os
import sys
import tempfile
from collections import deque
from concurrent.futures import Future
from importlib import metadata
from pathlib import Path
from time import perf_counter, process_time
from types import SimpleNamespace

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import numpy as np
import torch
from vllm.config import CacheConfig, DeviceConfig, ModelConfig, SchedulerConfig, SpeculativeConfig, VllmConfig
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from modeltc_lab.core.results import record, write
from modeltc_lab.serving import vllm_plugin
from modeltc_lab.serving.policies import AdmissionPolicy
from modeltc_lab.serving.vllm_plugin import VARIABLE, parse_policy, scheduler_for

BLOCK, STOP, VOCAB, LONGEST = 16, 0, 64, 256
POLICIES = ("past_future:init=60", "past_future_adaptive:init=60", "aggressive", "conservative", "new_token_ratio", "oracle")
MODEL = dict(architectures=["LlamaForCausalLM"], model_type="llama", hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
             vocab_size=VOCAB, max_position_embeddings=4096, torch_dtype="float32")
TALLY = {"checks": 0, "failed": 0}


def ensure(fact, what, **seen):
    "Count a check; say what failed."
    TALLY["checks"] += 1
    if fact: return
    TALLY["failed"] += 1
    if TALLY["failed"] <= 20: print("FAILED", what, seen)


def config(folder, *, blocks=64, block=BLOCK, budget=256, seqs=64, caching=False, asynchronous=False, order="fcfs", watermark=0.0, active=None, drafts=0, name=None):
    "vLLM's own configuration of a small Llama, without weights."
    (Path(folder) / "config.json").write_text(json.dumps(MODEL))
    model = ModelConfig(model=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=1024)
    scheduler = SchedulerConfig(max_num_seqs=seqs, max_num_batched_tokens=budget, max_model_len=1024, is_encoder_decoder=False, enable_chunked_prefill=True, async_scheduling=asynchronous,
                                policy=order, watermark=watermark, max_num_active_seqs=active, scheduler_cls=name)
    cache = CacheConfig(block_size=block, enable_prefix_caching=caching)
    guess = dict(speculative_config=SpeculativeConfig(method="ngram", num_speculative_tokens=drafts, prompt_lookup_max=3, prompt_lookup_min=1)) if drafts else {}
    made = VllmConfig(model_config=model, scheduler_config=scheduler, cache_config=cache, device_config=DeviceConfig("cpu"), **guess)
    cache.num_gpu_blocks = blocks
    return made


def cache_of(blocks, block=BLOCK, spec=FullAttentionSpec, **extra):
    return KVCacheConfig(num_blocks=blocks, kv_cache_tensors=[], kv_cache_groups=[KVCacheGroupSpec(["layer"], spec(block_size=block, num_kv_heads=1, head_size=16, dtype=torch.float32, **extra))])


def build(cls, folder, *, blocks=64, block=BLOCK, **settings):
    "A scheduler of this class."
    made = config(folder, blocks=blocks, block=block, **settings)
    return cls(vllm_config=made, kv_cache_config=cache_of(blocks, block), structured_output_manager=StructuredOutputManager(made), block_size=block, log_stats=False)


def workload(seed, n=120, families=0, longest_prompt=200, mean=60, every=2):
    "Prompts, hidden replies and arrival steps. With families, prompts of a family begin alike."
    rng = np.random.default_rng(seed)
    stems = [rng.integers(1, VOCAB, 96).tolist() for _ in range(families)]
    prompts = [(stems[rng.integers(families)] if families else []) + rng.integers(1, VOCAB, rng.integers(10, longest_prompt)).tolist() for _ in range(n)]
    lengths = np.minimum(rng.geometric(1 / mean, n), LONGEST)
    return SimpleNamespace(prompts=prompts, lengths=lengths.tolist(), arrival=(np.arange(n) // every).tolist(), seed=seed)


class Recorder(AdmissionPolicy):
    "A policy, and what it was asked and told."

    name = "recorder"

    def __init__(self, inner):
        self.inner, self.sees_true_lengths, self.engine = inner, inner.sees_true_lengths, inner.engine
        self.asked, self.finished, self.evicted, self.passes = [], [], 0, 0

    def admit(self, view):
        k = self.inner.admit(view)
        self.asked.append((view, k))
        return k

    def on_finish(self, total_output):
        self.finished.append(total_output)
        self.inner.on_finish(total_output)

    def on_pass(self):
        self.passes += 1
        self.inner.on_pass()

    def on_evict(self, first, generated, cap):
        self.evicted += first
        self.inner.on_evict(first, generated, cap)

    def reset(self, max_new_tokens=None): self.inner.reset(max_new_tokens)

    def unseal(self, lengths): self.inner.unseal(lengths)


class Runner:
    "The forward pass: one prepared token for everybody whose tokens have all been read, and with drafts sometimes several."

    def __init__(self, w, drafts=0):
        self.w, self.drafts, self.sampled, self.rng = w, drafts, {}, np.random.default_rng(w.seed + 1)

    def token(self, i, j): return STOP if j + 1 >= self.w.lengths[i] else 1 + (i * 31 + j * 7) % (VOCAB - 1)

    def run(self, s, out):
        "What the model returns for a planned step; called before the next one is planned."
        tokens = []
        for r in out.num_scheduled_tokens:
            request, i, done = s.requests[r], int(r), self.sampled.get(r, 0)
            drafts = len(out.scheduled_spec_decode_tokens.get(r, ()))
            reads = request.num_computed_tokens - drafts >= request.num_prompt_tokens + done
            made = [self.token(i, done + k) for k in range(1 + (int(self.rng.integers(drafts + 1)) if drafts else 0))] if reads else []
            self.sampled[r] = done + len(made)
            tokens.append(made)
        ids = list(out.num_scheduled_tokens)
        return ModelRunnerOutput(req_ids=ids, req_id_to_index={r: k for k, r in enumerate(ids)}, sampled_token_ids=tokens)

    def propose(self, s, out):
        ids = [r for r in out.num_scheduled_tokens if r in s.requests]
        s.update_draft_token_ids(DraftTokenIds(ids, [[1] * self.drafts for _ in ids]))


def ask(w, i, **settings):
    "Request number i."
    sampling = SamplingParams(max_tokens=LONGEST, stop_token_ids=[STOP], **settings.pop("sampling", {}))
    return Request(request_id=str(i), prompt_token_ids=w.prompts[i], sampling_params=sampling, pooling_params=None, block_hasher=HASHER, arrival_time=float(i), **settings)


def exact(s, view, holding):
    "The view, against every block of the pool and vLLM's own search for cached prefixes."
    manager, running = s.kv_cache_manager, [*s.running, *holding]
    number = {n: r for r, n in s._number.items()}
    hits = [[b for b in manager.get_computed_blocks(number[i])[0].blocks[0]] for i in view.queued_ids]
    hits = [h[:next((k for k, b in enumerate(h) if not b.ref_cnt), len(h))] for h in hits]
    wanted = {b.block_id for h in hits for b in h}
    owner = {b.block_id: r for r in running for b in manager.get_blocks(r.request_id).blocks[0]}
    used = [b for b in manager.block_pool.blocks if b.ref_cnt > 0 and not b.is_null]
    own = {r.request_id: {b.block_id for b in used if owner.get(b.block_id) is r and b.ref_cnt == 1 and b.block_id not in wanted} for r in running}
    ensure(view.frozen == BLOCK * (len(used) - sum(map(len, own.values()))), "frozen blocks", view=view.frozen)
    ensure(view.queued_prompt.tolist() == [number[i].num_prompt_tokens + s._extra - BLOCK * len(h) for i, h in zip(view.queued_ids, hits)], "prompt of candidates")
    ensure(view.ids.tolist() == [s._number[r] for r in running], "order of the running")
    ensure(view.generated.tolist() == [r.num_output_tokens + r.num_output_placeholders for r in running], "progress of the running")
    ensure(view.queued_generated.tolist() == [number[i].num_output_tokens for i in view.queued_ids], "progress of those who were thrown out")
    taken = [len(manager.get_blocks(r.request_id).blocks[0]) - len(own[r.request_id]) for r in running]
    ensure(view.held.tolist() == [r.num_prompt_tokens + r.num_output_tokens + r.num_output_placeholders - 1 + s._extra - BLOCK * t for r, t in zip(running, taken)], "tokens held")


def joined_rightly(s, before, limit, out, evicted, k, view):
    "Who joined is the head of what the policy let in; who of them did not join had no room in this step."
    number = {n: r for r, n in s._number.items()}
    joined, allowed = [s._number[r] for r in s.running if r not in before], k if before else max(k, 1)
    ensure(joined == view.queued_ids[:len(joined)].tolist() and len(joined) <= allowed, "joined", joined=joined, allowed=allowed)
    if len(joined) >= min(allowed, len(view.queued_ids)) or evicted: return len(joined)
    spent, nxt = out.total_num_scheduled_tokens, number[view.queued_ids[len(joined)]]
    need = -(-nxt.num_tokens // s.block_size) + s.kv_cache_manager.watermark_blocks * bool(s.running)
    ensure(spent + 1 + s.num_spec_tokens > s.max_num_scheduled_tokens or need > s.kv_cache_manager.block_pool.get_num_free_blocks() or len(s.running) >= limit, "somebody was kept out", allowed=allowed, joined=joined)
    return len(joined)


def drive(s, w, *, depth=1, drafts=0, abort=(), order=None, ours=True, every=7):
    "Serve a workload; depth 2 plans a step before the tokens of the last one are known. `late`: replies that ended after their request had been thrown out, with its last output still on the way."
    runner, flight, sent, step, steps, joined, late = Runner(w, drafts), deque(), 0, 0, 0, 0, 0
    requests, pool, chunks, waits, fullest = {}, s.kv_cache_manager.block_pool, {}, 0, 0
    free_at_start, limit, abort = pool.get_num_free_blocks(), s.max_num_active_reqs, dict(abort)
    while sent < len(w.prompts) or s.has_unfinished_requests() or flight:
        while sent < len(w.prompts) and w.arrival[sent] <= step:
            requests[sent] = ask(w, sent, **({"priority": order(sent)} if order else {}))
            s.add_request(requests[sent])
            sent += 1
        if step in abort: s.finish_requests([str(i) for i in abort[step]], RequestStatus.FINISHED_ABORTED)
        if ours and step % every == 0 and (candidates := s._candidates(limit)): exact(s, s.view(s._holding(), candidates), s._holding())
        before, asked = list(s.running), len(s.admission.asked) if ours else 0
        was = {r: r.num_preemptions for r in before}
        out = s.schedule()
        evicted = [r for r in before if r.num_preemptions > was[r]]
        ensure(s.max_num_active_reqs == limit and 0 <= pool.get_num_free_blocks() < pool.num_gpu_blocks, "limit and blocks after a step")
        ensure(out.total_num_scheduled_tokens <= s.max_num_scheduled_tokens and len(s.running) <= limit, "budget of a step")
        if ours and len(s.admission.asked) > asked:
            ensure(len(s.admission.asked) == asked + 1, "asked once a step")
            joined += joined_rightly(s, before, limit, out, evicted, s.admission.asked[-1][1], s.admission.asked[-1][0])
        fullest = max(fullest, pool.num_gpu_blocks - 1 - pool.get_num_free_blocks())
        for r, n in out.num_scheduled_tokens.items(): chunks.setdefault(r, []).append(n)
        if out.total_num_scheduled_tokens:
            flight.append((out, runner.run(s, out)))
            steps, waits = steps + 1, 0
        waits += not out.total_num_scheduled_tokens
        if flight and (len(flight) >= depth or not out.total_num_scheduled_tokens):
            planned, tokens = flight.popleft()
            outside = [r for r in s.requests.values() if r.status == RequestStatus.PREEMPTED]
            s.update_from_output(planned, tokens)
            late += sum(r.is_finished() for r in outside)
            if drafts: runner.propose(s, planned)
        step += 1
        if waits > len(w.prompts) + 10: break
    ensure(not s.has_unfinished_requests() and sent == len(w.prompts), "everybody was served", left=len(s.running), waiting=len(s.waiting))
    ensure(pool.get_num_free_blocks() == free_at_start and not s.running and not s.waiting, "all blocks came back")
    replies = {i: list(r.output_token_ids) for i, r in requests.items()}
    needed = sum(len(p) + len(replies[i]) - 1 for i, p in enumerate(w.prompts))
    return SimpleNamespace(replies=replies, requests=requests, steps=steps, joined=joined, late=late, fullest=fullest, preempted=sum(r.num_preemptions for r in requests.values()), chunks=chunks,
                           tokens=sum(map(len, replies.values())), vain=sum(map(sum, chunks.values())) - needed)


def whole(w, run, without=()):
    "Every reply is the one prepared for its request, and vLLM ended it."
    for i, reply in run.replies.items():
        if i in without: continue
        want = [1 + (i * 31 + j * 7) % (VOCAB - 1) for j in range(w.lengths[i] - 1)] + [STOP]
        ensure(reply == want and run.requests[i].status.name in vllm_plugin.ENDED, "reply", request=i, got=len(reply), want=len(want))


def ours(policy, w, *, asynchronous=False, lengths=None):
    "vLLM's scheduler under a recorded policy."
    made = parse_policy(policy) if isinstance(policy, str) else policy
    return scheduler_for(Recorder(made), asynchronous=asynchronous, lengths=w.lengths if made.sees_true_lengths else lengths)


def told(s, run, without=()):
    "The policy has heard of every reply that ended, once, and of everybody who was thrown out, once."
    ends = sorted(len(reply) for i, reply in run.replies.items() if i not in without and run.requests[i].status.name in vllm_plugin.ENDED)
    ensure(sorted(s.admission.finished) == ends, "finished replies", told=len(s.admission.finished), ended=len(ends))


def race(folder, seeds, rows):
    "The same workload for every policy and for vLLM's own scheduler, plain and asynchronous."
    for mode, asynchronous in (("plain", False), ("async", True)):
        for seed in seeds:
            w, settings = workload(seed), dict(blocks=64, asynchronous=asynchronous)
            theirs = drive(build(AsyncScheduler if asynchronous else Scheduler, folder, **settings), w, depth=1 + asynchronous, ours=False)
            whole(w, theirs)
            ensure(theirs.preempted > 0, "too little memory for vLLM's own admission")
            rows.setdefault((mode, "vLLM itself"), []).append(theirs)
            for name in POLICIES:
                s = build(ours(name, w, asynchronous=asynchronous), folder, **settings)
                run = drive(s, w, depth=1 + asynchronous)
                whole(w, run)
                told(s, run)
                ensure({i: len(r) for i, r in run.replies.items()} == {i: len(r) for i, r in theirs.replies.items()}, "token counts equal to vLLM's own", policy=name)
                ensure(s.admission.evicted == sum(r.num_preemptions > 0 for r in run.requests.values()), "first evictions", policy=name)
                ensure(s.admission.passes > 0 and run.joined == len(w.prompts) + run.preempted - run.late, "passes and joins", policy=name, joined=run.joined)
                if name in ("oracle", "conservative"): ensure(run.preempted == 0, "no preemption", policy=name, mode=mode, seed=seed, preempted=run.preempted)
                rows.setdefault((mode, name.partition(":")[0]), []).append(run)
        ensure(sum(r.preempted for r in rows[mode, "aggressive"]) > 0, "aggressive admission pays with preemptions")


def shared_prefixes(folder, seeds):
    "Prompts that begin alike, with the prefix cache on: the view counts what is shared once, and the oracle is still never wrong."
    for seed in seeds:
        w = workload(seed, families=3, longest_prompt=120)
        for asynchronous in (False, True):
            cold = drive(build(ours("oracle", w, asynchronous=asynchronous), folder, asynchronous=asynchronous), w, depth=1 + asynchronous)
            for name in ("oracle", "past_future:init=60", "aggressive"):
                s = build(ours(name, w, asynchronous=asynchronous), folder, caching=True, asynchronous=asynchronous)
                run = drive(s, w, depth=1 + asynchronous, every=3)
                whole(w, run)
                told(s, run)
                ensure(any(v.frozen for v, _ in s.admission.asked), "somebody shared a prefix")
                ensure(sum(map(sum, run.chunks.values())) < sum(map(sum, cold.chunks.values())), "shared prefixes are not computed again")
                if name == "oracle": ensure(run.preempted == 0 and run.steps <= cold.steps, "oracle with a prefix cache", preempted=run.preempted, steps=(run.steps, cold.steps))


def to_the_last_slot(folder, seeds):
    "Blocks of one token leave no slack: the oracle fills the memory and still never runs out of it, one step ahead or not."
    for seed in seeds:
        w = workload(seed, n=60)
        for asynchronous in (False, True):
            run = drive(build(ours("oracle", w, asynchronous=asynchronous), folder, blocks=700, block=1, asynchronous=asynchronous), w, depth=1 + asynchronous, every=10**9)
            whole(w, run)
            ensure(run.preempted == 0 and run.fullest >= 680, "to the last slot", preempted=run.preempted, fullest=run.fullest)


def far_ahead(folder, seeds):
    "Two steps ahead, output of a request that was thrown out is still on its way when the next step is planned: vLLM steps over it, and so does the view."
    for seed in seeds:
        w = workload(seed)
        s = build(ours("aggressive", w, asynchronous=True), folder, asynchronous=True)
        run = drive(s, w, depth=3)
        whole(w, run)
        told(s, run)
        ensure(run.preempted > 0, "somebody was thrown out")


def cut_prompts(folder, seeds):
    "A token budget smaller than the prompts."
    for seed in seeds:
        w = workload(seed, longest_prompt=400)
        for name in ("past_future:init=60", "oracle"):
            run = drive(build(ours(name, w), folder, budget=64, seqs=32), w)
            whole(w, run)
            ensure(any(c[0] == 64 and sum(c) > 64 for c in run.chunks.values()) and max(map(max, run.chunks.values())) <= 64, "prompts were cut")
            if name == "oracle": ensure(run.preempted == 0, "oracle with cut prompts", preempted=run.preempted)


def aborts(folder, seeds):
    "Clients that leave, running and waiting, teach the policy nothing and lose no blocks; so does a reset of the prefix cache that sends everybody back."
    for seed in seeds:
        for asynchronous in (False, True):
            w, rng = workload(seed), np.random.default_rng(seed)
            gone = rng.choice(len(w.prompts), 30, replace=False)
            at = {}
            for i in gone: at.setdefault(int(w.arrival[i] + rng.integers(0, 200)), []).append(int(i))
            s = build(ours("past_future_adaptive:init=60", w, asynchronous=asynchronous), folder, caching=True, asynchronous=asynchronous)
            run = drive(s, w, depth=1 + asynchronous, abort=at)
            left = {i for i, r in run.requests.items() if r.status == RequestStatus.FINISHED_ABORTED}
            ensure(0 < len(left) <= 30, "somebody left")
            whole(w, run, without=left)
            told(s, run)
    w = workload(0, n=4, every=4)
    s = build(ours("past_future", w), folder)
    for i in range(4): s.add_request(ask(w, i))
    s.schedule()
    s.reset_prefix_cache(reset_running_requests=True)
    ensure(s.admission.evicted == 0 and len(s.waiting) == 4, "a reset is no eviction")


def orders_and_limits(folder):
    "vLLM's priorities, its watermark and its own limit of active requests stand."
    w = workload(3)
    for settings in (dict(order="priority"), dict(watermark=0.1), dict(active=4), dict(order="priority", asynchronous=True)):
        s = build(ours("past_future:init=60", w, asynchronous=settings.get("asynchronous", False)), folder, **settings)
        run = drive(s, w, depth=1 + settings.get("asynchronous", False), order=(lambda i: i % 3) if "order" in settings else None)
        whole(w, run)
        told(s, run)
    never = type("Never", (AdmissionPolicy,), {"name": "never", "admit": lambda self, view: 0})()
    run = drive(build(ours(never, w), folder), w)
    whole(w, run)
    ensure(run.preempted == 0 and run.steps >= sum(w.lengths), "a policy that never admits serves one at a time")


def draft_tokens(folder, seeds):
    "Speculative decoding: several tokens a step, and room for drafts that are thrown away. Requests grow at different speeds, so even the oracle's plan is an estimate."
    for seed in seeds:
        w, out = workload(seed), {}
        for name in ("past_future:init=60", "oracle", "aggressive"):
            s = build(ours(name, w), folder, drafts=3)
            run = drive(s, w, drafts=3)
            ensure(s._extra == 3, "room for drafts", extra=s._extra)
            whole(w, run)
            told(s, run)
            ensure(max(max(c[1:], default=1) for c in run.chunks.values()) > 1, "drafts were verified")
            out[name] = run.preempted
        ensure(out["oracle"] < out["aggressive"] and out["past_future:init=60"] < out["aggressive"], "plans help with drafts", preempted=out)


def grammars(folder):
    "Requests that wait for a grammar are no candidates until it is there; a grammar that fails ends its request and stalls nobody."
    w = workload(5, n=4, every=4)
    s = build(ours("aggressive", w), folder)
    made = [ask(w, i, sampling={"structured_outputs": StructuredOutputsParams(regex="a*")} if i in (0, 1) else {}) for i in range(4)]
    for r in made[:2]: r.structured_output_request.grammar = Future()
    for r in made: s.add_request(r)
    s.schedule()
    ensure([r.request_id for r in s.running] == ["2", "3"] and s.admission.asked[-1][0].queued_ids.tolist() == [2, 3], "stepped over")
    made[0].structured_output_request._grammar.set_result(SimpleNamespace(accept_tokens=lambda *a: True))
    s.schedule()
    ensure([r.request_id for r in s.running] == ["2", "3", "0"], "joined when its grammar was there")
    s = build(ours("past_future", w), folder)
    broken = ask(w, 0, sampling={"structured_outputs": StructuredOutputsParams(regex="a*")})
    broken.structured_output_request.grammar = Future()
    broken.structured_output_request._grammar.set_exception(ValueError("no such grammar"))
    s.add_request(broken)
    out = s.schedule()
    s.update_from_output(out, ModelRunnerOutput(req_ids=[], req_id_to_index={}))
    ensure(broken.is_finished() and not s.waiting and not s.admission.finished, "a broken grammar ends its request", status=str(broken.status))


def names(folder):
    "What --scheduler-cls resolves to, and how it fails."
    path = "modeltc_lab.serving.vllm_plugin."
    for name, host in (("PastFutureScheduler", Scheduler), ("AsyncPastFutureScheduler", AsyncScheduler)):
        for text, policy in ((None, "past_future"), ("past_future_adaptive:strength=2", "past_future_adaptive")):
            os.environ.pop(VARIABLE, None)
            if text: os.environ[VARIABLE] = text
            cls = config(folder, asynchronous=host is AsyncScheduler, name=path + name).scheduler_config.get_scheduler_cls()
            ensure(issubclass(cls, host) and cls is getattr(vllm_plugin, name) and cls.__name__ == name, "class by its dotted path", got=str(cls))
            ensure(build(cls, folder, asynchronous=host is AsyncScheduler).admission.name == policy, "policy of the variable")
    for text, words in (("past_future:strength", "strength=..."), ("nobody", "need one of"), ("static", "static batch"), ("oracle", "an oracle needs them")):
        os.environ[VARIABLE] = text
        ensure(words in complaint(lambda: build(vllm_plugin.PastFutureScheduler, folder)), "a wrong variable stops the server", text=text)
    os.environ.pop(VARIABLE)
    made = config(folder)
    windows = cache_of(64, spec=SlidingWindowSpec, sliding_window=32)
    cls = scheduler_for("past_future")
    ensure("SlidingWindowSpec" in complaint(lambda: cls(vllm_config=made, kv_cache_config=windows, structured_output_manager=StructuredOutputManager(made), block_size=BLOCK)), "one kind of attention")
    w = workload(0, n=4, every=4)
    s = build(cls, folder)
    for i in range(4): s.add_request(ask(w, i))
    s.max_num_running_reqs = 1                                    # the older name of the limit: vLLM admits all the same, and stops itself
    ensure(complaint(s.schedule) is not None and len(s.running) > 1, "the older limit holds nobody back")


def complaint(call):
    "What a call raises, as text; None when it does not."
    try: call()
    except (ValueError, AssertionError) as e: return str(e)
    return None


def decision_ms(folder):
    "Processor time of one decision with its view: a full batch, a queue, shared prefixes."
    w = workload(1, n=240, families=4, longest_prompt=300, every=240)
    s = build(scheduler_for("past_future:init=60"), folder, blocks=2000, seqs=128, budget=8192, caching=True)
    for i in range(240): s.add_request(ask(w, i))
    runner = Runner(w)
    for _ in range(6):
        out = s.schedule()
        s.update_from_output(out, runner.run(s, out))
    took, waiting = [], s._candidates(64)
    for _ in range(200):
        start = process_time()
        s.admission.admit(s.view([], s._candidates(64)))
        took.append(1e3 * (process_time() - start))
    return took, len(s.running), len(waiting)


def records(rows, seeds, cost, wall_s):
    "What the notebook's tables are rendered from."
    common = dict(implementation="modeltc_lab in vLLM's scheduler", seed=list(seeds), wall_s=wall_s)
    out = []
    for (mode, name), runs in rows.items():
        settings = dict(x_name="scheduling", x=mode, config={"blocks": 64, "block": BLOCK, "token_budget": 256, "max_num_seqs": 64, "requests": len(runs[0].requests), "longest_reply": LONGEST})
        theirs = dict(common, implementation="vLLM") if name == "vLLM itself" else common
        for metric, unit, value in (("requests", "requests", lambda r: len(r.requests)), ("steps", "steps", lambda r: r.steps), ("preemptions", "times", lambda r: r.preempted),
                                    ("computed in vain", "tokens", lambda r: r.vain), ("throughput", "tokens/step", lambda r: r.tokens / r.steps)):
            out.append(record("serving", "vllm_plugin", name, metric, unit, [value(r) for r in runs], **settings, **theirs))
    took, running, waiting = cost
    out.append(record("serving", "vllm_plugin", "past_future", "decision time", "ms", np.percentile(took, [5, 50, 95]).tolist(), **common, config={"running": running, "candidates": waiting, "samples": "percentiles 5, 50, 95"}))
    out.append(record("serving", "vllm_plugin", "tests/peers/check_vllm.py", "checks", "checks", [TALLY["checks"]], **common))
    return [r.model_copy(update={"versions": {**r.versions, "vllm": metadata.version("vllm")}}) for r in out]


def main(quick):
    started, rows, seeds = perf_counter(), {}, range(2 if quick else 5)
    with tempfile.TemporaryDirectory() as folder:
        race(folder, seeds, rows)
        shared_prefixes(folder, seeds)
        to_the_last_slot(folder, seeds)
        far_ahead(folder, seeds)
        cut_prompts(folder, seeds)
        aborts(folder, seeds)
        draft_tokens(folder, seeds)
        orders_and_limits(folder)
        grammars(folder)
        names(folder)
        cost = decision_ms(folder)
    for (mode, name), runs in rows.items():
        print(f"{mode:6s}{name:22s} steps {[r.steps for r in runs]}  preempted {[r.preempted for r in runs]}  tokens/step {np.median([r.tokens / r.steps for r in runs]):.2f}")
    print(f"vllm {metadata.version('vllm')}: {TALLY['checks']} checks, {TALLY['failed']} failed; a decision takes {np.median(cost[0]):.2f} ms at {cost[1]} running, {cost[2]} candidates; {perf_counter() - started:.0f} s")
    if TALLY["failed"]: return 1
    if not quick: print(write(records(rows, seeds, cost, perf_counter() - started)))
    return 0


init_none_hash(sha256)
HASHER = get_request_block_hasher(BLOCK, sha256)
if __name__ == "__main__": sys.exit(main("--quick" in sys.argv[1:]))
