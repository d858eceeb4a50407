"The vLLM plug-in without vLLM: the policy variable, the view and the limit, over a recorded stand-in of vLLM's interface. With vLLM, its real scheduler too."

import importlib.util
import os
import pickle
import subprocess
import sys
from collections import deque
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from modeltc_lab.core.settings import PREFIX
from modeltc_lab.serving import vllm_plugin
from modeltc_lab.serving.past_future import AdaptivePastFuture, HistoryLengths, Oracle, PastFuture
from modeltc_lab.serving.policies import POLICIES, AdmissionPolicy, Conservative
from modeltc_lab.serving.vllm_plugin import PolicyAdmission, check_policy, parse_policy, scheduler_for

ROOT = Path(__file__).resolve().parents[2]
HERE = importlib.util.find_spec("vllm") is not None


def status(name): return SimpleNamespace(name=name)


def block(i, readers=1): return SimpleNamespace(block_id=i, ref_cnt=readers)


class StandInRequest:
    "vLLM's Request as of 0.33.0: what the plug-in reads of it."

    def __init__(self, name, prompt, made=0, cap=50, **other):
        self.request_id, self.num_prompt_tokens, self.num_output_tokens, self.max_tokens, self.num_tokens = name, prompt, made, cap, prompt + made
        self.status, self.num_computed_tokens, self.num_output_placeholders, self.num_preemptions = status("WAITING"), 0, 0, 0
        self.skip_reading_prefix_cache, self.block_hashes, self.num_stale_output_tokens, self.drop_stale_output = False, [], 0, False
        for k, v in other.items(): setattr(self, k, v)


class StandIn:
    "vLLM's Scheduler as of 0.33.0, recorded: names and meanings, an admission loop that looks at the limit only."

    max_num_active_reqs, max_num_running_reqs, max_model_len, block_size, num_spec_tokens, num_lookahead_tokens, num_waiting_for_streaming_input = 8, 8, 512, 16, 0, 0, 0
    limit, finished_recving_kv_req_ids, free = "max_num_active_reqs", frozenset(), 32

    def __init__(self, *args, **kwargs):
        self.given, self.seen = (args, kwargs), []
        self.running, self.waiting, self.kv_holding_waiting, self.requests, self.tables, self.cached = [], deque(), deque(), {}, {}, {}
        pool = SimpleNamespace(num_gpu_blocks=33, get_num_free_blocks=lambda: self.free, get_cached_block=lambda key, groups: self.cached.get(key))
        self.kv_cache_manager = SimpleNamespace(block_pool=pool, enable_caching=False, get_blocks=lambda r: SimpleNamespace(blocks=(self.tables.get(r, []),)))
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=type("MLAAttentionSpec", (type("FullAttentionSpec", (), {}),), {})())])

    def add_request(self, r):
        self.requests[r.request_id] = r
        self.waiting.append(r)

    def schedule(self, *args, **kwargs):
        self.seen.append((getattr(self, self.limit), args, kwargs))
        blocked = lambda r: r.status.name.startswith("WAITING_FOR") and r.request_id not in self.finished_recving_kv_req_ids
        for queue in (self.kv_holding_waiting, self.waiting):
            for r in [r for r in queue if not blocked(r)]:
                if len(self.running) + self.num_waiting_for_streaming_input >= getattr(self, self.limit): break
                queue.remove(r)
                self.running.append(r)
                r.status = status("RUNNING")
        return SimpleNamespace(num_scheduled_tokens={r.request_id: 1 for r in self.running})

    def update_from_output(self, ends=()):
        for r, how in ends:
            r.status = status(how)
            if r in self.running: self.running.remove(r)
        return "as vLLM says"


class Takes(AdmissionPolicy):
    "Admits a fixed number; remembers what it was asked and told."

    name = "takes"

    def __init__(self, k): self.k, self.asked, self.told = k, [], []

    def admit(self, view):
        self.asked.append(view.validate())
        return min(self.k, len(view.queued_ids))

    def on_finish(self, total_output): self.told.append(total_output)

    def on_pass(self): self.told.append("pass")

    def on_evict(self, first, generated, cap): self.told.append((first, generated.tolist(), cap.tolist()))


def engine(k=0, base=StandIn, **extra): return type("Engine", (PolicyAdmission, base), {"template": Takes(k), **extra})()


def arrive(s, *requests):
    for r in requests: s.add_request(r)
    return requests


# --- the policy variable


@pytest.mark.parametrize("text, kind, seen", [
    ("past_future", PastFuture, {"reserve": 0.05}), ("past_future:reserve=0.1,futures=3,combine=0.8", PastFuture, {"reserve": 0.1, "futures": 3, "combine": 0.8}),
    ("past_future:margin=feedback,reserve=0", PastFuture, {"margin": "feedback", "reserve": 0}), ("past_future:thin=False", PastFuture, {"thin": False}),
    ("past_future_adaptive:strength=4", AdaptivePastFuture, {"strength": 4, "reserve": 0.0}), ("conservative:output_reserve=None", Conservative, {"output_reserve": None}),
    ("past_future_adaptive:window=50,init=7,variant=interp,resample=persistent", AdaptivePastFuture, {"window": 50, "init": 7, "variant": "interp", "resample": "persistent"})])
def test_policy_text(text, kind, seen):
    made = parse_policy(text)
    assert type(made) is kind and {k: made.describe()[k] for k in seen} == seen


@pytest.mark.parametrize("text, words", [
    ("", "need one of aggressive"), ("Past_future", "need one of"), ("past_future:", "setting ''"), ("past_future:reserve", "reserve=..."), ("past_future:rserve=1", "'rserve'"),
    ("past_future:reserve=high", "reserve=high: need float or int"), ("past_future:futures=2.0", "futures=2.0: need int"), ("past_future:thin=1", "thin=1: need bool"), ("past_future:futures=True", "need int"),
    ("past_future:reserve=1.5", "reserve=1.5"), ("past_future:seed=1,seed=2", "more than once"), ("past_future:length_model=None", "'length_model'"), ("aggressive:window=5", "'window'"),
    ("future_peak:assumed=0", "assumed=0"), ("oracle:seed=1", "no settings"), ("past_future:init=[1,2]", "'2]'"), ("past_future:combine=min", "combine='min'"), ("past_future:reserve=nan", "need float")])
def test_policy_text_refused(text, words):
    with pytest.raises(ValueError) as e: parse_policy(text)
    assert words in str(e.value) and str(e.value).startswith(f"MODELTC_VLLM_POLICY={text!r}: ")


def test_every_policy_by_name_or_with_a_reason():
    parse_policy("aggressive")
    refused = set()
    for name in POLICIES:
        try: check_policy(parse_policy(name))
        except ValueError as e:
            assert name in str(e)
            refused.add(name)
    assert refused == {"hf_fifo", "hf_prefill_first", "static", "dynamic", "oracle"}


def test_lengths_are_for_an_oracle():
    check_policy(Oracle(), np.array([1]))
    with pytest.raises(ValueError, match="needs them"): check_policy(PastFuture(), np.array([1]))
    with pytest.raises(ValueError, match="needs them"): check_policy(Oracle())


def test_variable_is_read_when_an_engine_starts(monkeypatch):
    named = type("Named", (PolicyAdmission, StandIn), {})
    monkeypatch.delenv(vllm_plugin.VARIABLE, raising=False)
    assert named().admission.name == "past_future"
    monkeypatch.setenv(vllm_plugin.VARIABLE, "past_future_adaptive:strength=3")
    assert named().admission.describe()["strength"] == 3
    monkeypatch.setenv(vllm_plugin.VARIABLE, "static")
    with pytest.raises(ValueError, match="static batch"): named()


def test_the_variable_is_no_setting_of_the_workbench(): assert not vllm_plugin.VARIABLE.startswith(PREFIX)   # which refuses names it does not know


# --- without vLLM


@pytest.mark.skipif(HERE, reason="vllm is installed: tests/peers/check_vllm.py has the classes themselves")
def test_without_vllm():
    for name in vllm_plugin.SCHEDULERS:
        with pytest.raises(ImportError, match="install vllm beside modeltc_lab"): getattr(vllm_plugin, name)
    with pytest.raises(ImportError, match="No module named 'vllm'"): scheduler_for("aggressive")
    with pytest.raises(ValueError, match="static batch"): scheduler_for("static")                 # what is wrong with the policy is said first
    with pytest.raises(AttributeError, match="has no attribute 'Scheduler'"): vllm_plugin.Scheduler
    assert not hasattr(vllm_plugin, "__path__")


def test_import_is_light():
    run = subprocess.run([sys.executable, "-c", "import sys, modeltc_lab.serving.vllm_plugin; print([m for m in ('vllm', 'torch', 'transformers') if m in sys.modules])"],
                         capture_output=True, text=True, cwd=ROOT)
    assert run.stdout.strip() == "[]", run.stderr[-500:]


def test_classes_by_their_dotted_path(monkeypatch):
    "What vLLM does with --scheduler-cls, over stand-in modules: import the module, get the attribute; and a child process unpickles the class by that path."
    host, ahead = type("Scheduler", (StandIn,), {}), type("AsyncScheduler", (StandIn,), {})
    for name, members in (("vllm", {}), ("vllm.v1", {}), ("vllm.v1.core", {}), ("vllm.v1.core.sched", {}), ("vllm.v1.core.sched.scheduler", {"Scheduler": host}), ("vllm.v1.core.sched.async_scheduler", {"AsyncScheduler": ahead})):
        module = type(sys)(name)
        vars(module).update(members, __path__=[])
        monkeypatch.setitem(sys.modules, name, module)
    for name in vllm_plugin.SCHEDULERS: monkeypatch.delitem(vars(vllm_plugin), name, raising=False)
    try:
        for name, parent, passes in (("PastFutureScheduler", host, 0), ("AsyncPastFutureScheduler", ahead, 1)):
            cls = getattr(vllm_plugin, name)
            assert issubclass(cls, parent) and cls is getattr(vllm_plugin, name) and cls.ahead == passes and pickle.loads(pickle.dumps(cls)) is cls
        made = scheduler_for("past_future_adaptive:strength=2", asynchronous=True, max_new_tokens=99)
        assert issubclass(made, ahead) and made("a", b=1).given == (("a",), {"b": 1}) and made().admission.length_model.lengths.max() == 99
        assert scheduler_for(Oracle(), lengths=[5, 6])().admission._lengths.tolist() == [5, 6]
    finally:
        for name in vllm_plugin.SCHEDULERS: vars(vllm_plugin).pop(name, None)


# --- the view


def test_view_by_hand():
    "Two running requests share two blocks; one has a token in flight, one reads its prompt still; a candidate would share one block more."
    s = engine()
    s.kv_cache_manager.enable_caching = True
    a, b, c, d = arrive(s, StandInRequest("a", 70, 10), StandInRequest("b", 60), StandInRequest("c", 50, block_hashes=["p", "q", "r"]), StandInRequest("d", 20, 7, cap=9, block_hashes=["x"]))
    shared = [block(1, 2), block(2, 2)]
    s.tables, s.running, s.waiting = {"a": [*shared, block(3), block(4), block(5)], "b": [*shared, block(6)]}, [a, b], deque([c, d])
    s.cached, a.num_output_placeholders, s.free = {"p": [shared[0]], "q": [shared[1]], "r": [s.tables["a"][2]], "x": [block(9, 0)]}, 1, 32 - 6
    v = s.view([], [c, d])
    assert (v.capacity, v.page, v.frozen) == (512, 16, 48)                       # blocks 1, 2, and 3 because c would share it
    assert v.held.tolist() == [70 + 11 - 1 - 48, 60 - 1 - 32] and v.generated.tolist() == [11, 0] and v.cap.tolist() == [50, 50]
    assert v.queued_prompt.tolist() == [50 - 48, 20] and v.queued_generated.tolist() == [0, 7] and v.queued_cap.tolist() == [50, 9]   # nobody reads block 9: no gift
    assert v.ids.tolist() == [0, 1] and v.queued_ids.tolist() == [2, 3]
    s.kv_cache_manager.enable_caching = False
    assert s.view([], [c]).queued_prompt.tolist() == [50] and s.view([], [c]).frozen == 32
    c.skip_reading_prefix_cache, s.kv_cache_manager.enable_caching = True, True
    assert s.view([], [c]).queued_prompt.tolist() == [50]


def test_blocks_of_nobody_are_frozen():
    "Blocks in use that no running request holds: a connector still sends them."
    s = engine()
    (a,) = arrive(s, StandInRequest("a", 30, 3))
    s.running, s.waiting, s.tables, s.free = [a], deque(), {"a": [block(1), block(2), block(3)]}, 32 - 5
    assert s.view([], []).frozen == 2 * 16


@pytest.mark.parametrize("extra, more", [({}, 0), ({"ahead": 1}, 1), ({"num_spec_tokens": 3}, 3), ({"num_spec_tokens": 3, "num_lookahead_tokens": 3, "ahead": 1}, 7)])
def test_room_beyond_the_tokens(extra, more):
    s = engine(**extra)
    a, b = arrive(s, StandInRequest("a", 30, 3), StandInRequest("b", 40, cap=1000))
    s.running = [a]
    v = s.view([], [b])
    assert v.held.tolist() == [32 + more] and v.queued_prompt.tolist() == [40 + more] and v.queued_cap.tolist() == [min(512 - 40, 512 - more - 40 + 1)]


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 40), st.integers(1, 60)), min_size=1, max_size=6))
def test_cap_is_beyond_the_progress(requests):
    "Whatever a request has made, the policy sees a cap above it and nobody larger than the memory."
    s = engine()
    v = s.view([], arrive(s, *(StandInRequest(str(i), *r) for i, r in enumerate(requests))))
    assert (v.queued_cap > v.queued_generated).all() and (v.queued_cap <= [max(c, g + 1) for _, g, c in requests]).all() and (v.queued_prompt - 1 + v.queued_cap <= v.capacity).all()


@pytest.mark.parametrize("spec, words", [(["SlidingWindowSpec"], "SlidingWindowSpec"), (["FullAttentionSpec", "MambaSpec"], "MambaSpec"), ([], r"\[\]")])
def test_one_kind_of_attention(spec, words):
    class Mixed(StandIn):
        def __init__(self):
            super().__init__()
            self.kv_cache_config.kv_cache_groups = [SimpleNamespace(kv_cache_spec=type(n, (), {})()) for n in spec]
    with pytest.raises(ValueError, match=f"kv_cache_groups=.*{words}.*full attention"): engine(base=Mixed)


def test_layers_of_one_kind_in_one_group():
    full, window = (SimpleNamespace(kv_cache_specs={"a": type("FullAttentionSpec", (), {})(), "b": type(n, (), {})()}) for n in ("FullAttentionSpec", "SlidingWindowSpec"))
    assert vllm_plugin._full_attention(full) and not vllm_plugin._full_attention(window)


# --- who may join


@pytest.mark.parametrize("k, joined", [(0, 1), (1, 1), (2, 2), (5, 5), (99, 6)])
def test_the_limit_is_the_policy_s(k, joined):
    s = engine(k)
    arrive(s, *(StandInRequest(str(i), 10) for i in range(6)))
    s.schedule(True, extra=1)
    assert [r.request_id for r in s.running] == [str(i) for i in range(joined)]                    # nothing runs: somebody must join
    assert s.seen == [(max(min(k, 6), 1), (True,), {"extra": 1})] and s.max_num_active_reqs == 8   # arguments pass through, the limit is back
    s.schedule()
    assert len(s.running) == min(joined + k, 6)


def test_older_layout():
    "Before max_num_active_reqs and kv_holding_waiting: another name for the limit, and for the queue of those who were stepped over."
    class Older(StandIn):
        limit = "max_num_running_reqs"
        def __init__(self):
            super().__init__()
            self.skipped_waiting = deque()
            del self.kv_holding_waiting
        def schedule(self):
            self.kv_holding_waiting = self.skipped_waiting
            try: return super().schedule()
            finally: del self.kv_holding_waiting
    kept = StandIn.max_num_active_reqs
    try:
        del StandIn.max_num_active_reqs
        s = engine(1, Older)
        arrive(s, StandInRequest("a", 10), StandInRequest("b", 10))
        s.skipped_waiting.append(StandInRequest("c", 10))
        s.schedule()
    finally: StandIn.max_num_active_reqs = kept
    assert [r.request_id for r in s.running] == ["c"] and s.admission.asked[0].queued_ids.tolist() == [2, 0, 1] and s.max_num_running_reqs == 8


def test_the_limit_comes_back_when_a_step_fails():
    class Fails(StandIn):
        def schedule(self): raise RuntimeError(str(self.max_num_active_reqs))
    s = engine(3, Fails)
    arrive(s, *(StandInRequest(str(i), 10) for i in range(6)))
    with pytest.raises(RuntimeError, match="^3$"): s.schedule()
    assert s.max_num_active_reqs == 8


def test_places_run_out():
    s = engine(9)
    arrive(s, *(StandInRequest(str(i), 10) for i in range(12)))
    s.num_waiting_for_streaming_input = 3                              # sessions that wait for their user take places, too
    s.schedule()
    assert len(s.running) == 5 and len(s.admission.asked[0].queued_ids) == 5
    s.schedule()
    assert len(s.admission.asked) == 1                                 # no place, no question
    s = engine(9)
    arrive(s, *(StandInRequest(str(i), 200) for i in range(8)))
    s.schedule()
    assert len(s.admission.asked[0].queued_ids) == 3                   # one beyond what the memory holds is enough to ask about


def test_who_is_no_candidate():
    "vLLM steps over these, so the policy must not count them in."
    s = engine(1)
    grammar = lambda g: {"status": status("WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR"), "structured_output_request": SimpleNamespace(grammar=g)}
    rows = {"compiling": grammar(None), "broken": grammar(ValueError("no such grammar")), "compiled": grammar("a grammar"), "in flight": {"status": status("PREEMPTED"), "num_stale_output_tokens": 1},
            "dropped": {"status": status("PREEMPTED"), "num_stale_output_tokens": 1, "drop_stale_output": True}, "back": {"status": status("PREEMPTED")}, "fresh": {}}
    arrive(s, *(StandInRequest(n, 10, **r) for n, r in rows.items()))
    assert [r.request_id for r in s._candidates(9)] == ["compiled", "dropped", "back", "fresh"]
    assert [r.request_id for r in s._candidates(2)] == ["compiled", "dropped"]


def test_only_the_blocked_wait():
    "Nobody to ask about: vLLM keeps its limit, because it must still look at those who wait."
    s = engine(0)
    arrive(s, StandInRequest("a", 10, status=status("WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR"), structured_output_request=SimpleNamespace(grammar=None)))
    s.schedule()
    assert s.seen[0][0] == 8 and not s.admission.asked and not s.running


def test_waiting_requests_with_blocks():
    "Loaded or loading, they count as running: they hold memory, join by themselves, and need a place. Sessions that wait for their user do not count."
    s = engine(1)
    done, loading, paused, a, b = (StandInRequest(n, 30) for n in ("done", "loading", "paused", "a", "b"))
    for r, how in ((done, "WAITING_FOR_REMOTE_KVS"), (loading, "WAITING_FOR_REMOTE_KVS"), (paused, "WAITING_FOR_STREAMING_REQ")): r.status, r.num_computed_tokens = status(how), 29
    arrive(s, a, b)
    s.kv_holding_waiting.extend([done, loading, paused])
    s.tables, s.free, s.finished_recving_kv_req_ids = {n: [block(i), block(i + 1)] for i, n in zip(count(1, 2), ("done", "loading", "paused"))}, 32 - 6, {"done"}
    s.schedule()
    v = s.admission.asked[0]
    assert v.ids.tolist() == [2, 3] and v.held.tolist() == [29, 29] and v.frozen == 2 * 16 and v.queued_ids.tolist() == [0, 1]
    assert s.seen[0][0] == 2 and [r.request_id for r in s.running] == ["done", "a"]
    s = engine(0)
    arrive(s, a)
    s.kv_holding_waiting.append(paused)
    s.schedule()
    assert s.running == [a]                                            # nobody runs and nobody will: the engine must not idle


# --- what the policy is told


def test_finished_replies_only():
    s = engine(9)
    names = ("FINISHED_STOPPED", "FINISHED_LENGTH_CAPPED", "FINISHED_REPETITION", "FINISHED_ABORTED", "FINISHED_IGNORED", "FINISHED_ERROR")
    made = arrive(s, *(StandInRequest(n, 10, 20 + i) for i, n in enumerate(names)), StandInRequest("pooling", 10), StandInRequest("out", 10, 33, status=status("PREEMPTED")))
    s.running = [*made[:-1]]
    s.waiting = deque([made[-1]])
    assert s.update_from_output([(r, r.request_id) for r in made[:-2]] + [(made[-2], "FINISHED_STOPPED"), (made[-1], "FINISHED_STOPPED")]) == "as vLLM says"
    assert s.admission.told == [20, 21, 22, 33]                        # the last one ended with output that was under way when it was thrown out
    s.update_from_output()
    assert len(s.admission.told) == 4                                  # once each, also while vLLM still keeps the request


def test_evictions_and_passes():
    s = engine(9)
    a, b, c = arrive(s, StandInRequest("a", 10, 5), StandInRequest("b", 10, 6), StandInRequest("c", 10))
    s.schedule()
    s.schedule()
    assert s.admission.told == []                                      # their prompts are being read: no decodes yet
    for r in (a, b): r.num_computed_tokens = r.num_tokens - 1
    s.schedule()
    assert s.admission.told == ["pass"]
    class Tight(StandIn):
        def schedule(self):
            for r in self.running[1:]:
                r.status, r.num_preemptions = status("PREEMPTED"), r.num_preemptions + 1
                self.waiting.appendleft(r)
            del self.running[1:]
            return SimpleNamespace(num_scheduled_tokens={"a": 1})
    s = engine(9, Tight)
    s.running = list(arrive(s, *(StandInRequest(n, 10, 5, num_computed_tokens=14, num_preemptions=p) for n, p in (("a", 0), ("b", 0), ("c", 1)))))
    s.waiting.clear()
    s.schedule()
    assert s.admission.told == [(1, [5], [50])]                        # two were thrown out, one of them for the first time; one stays


def test_each_engine_has_its_own_policy():
    cls = type("Engine", (PolicyAdmission, StandIn), {"template": PastFuture(HistoryLengths(init=9))})
    first, second = cls(), cls()
    first.admission.on_finish(77)
    assert first.admission.length_model.lengths.max() == 77 and second.admission.length_model.lengths.max() == 9 and cls.template.length_model.lengths.max() == 9


def test_numbers_are_in_order_of_arrival_and_are_not_kept():
    s = engine(9)
    arrive(s, *(StandInRequest(str(i), 10) for i in range(3)))
    s.add_request(s.requests["1"])                                     # a session goes on: vLLM knows the request already
    assert sorted(s._number.values()) == [0, 1, 2]
    s.waiting.clear()
    s.requests.clear()
    assert len(s._number) == 0


@pytest.mark.skipif(not HERE, reason="vllm is not installed; tests/peers/vllm_scheduler.sh makes an environment that has it")
def test_vllm_s_own_scheduler():
    run = subprocess.run([sys.executable, str(ROOT / "tests" / "peers" / "check_vllm.py"), "--quick"], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
