"A real server on loopback with a tiny model: what clients get, what leaves with them, and what a load test counts."

import json
import signal
import subprocess
import sys
from threading import Event, Thread
from time import monotonic

import numpy as np
import pytest

for package in ("fastapi", "uvicorn", "openai", "accelerate", "httpx"): pytest.importorskip(package, reason="pip install 'modeltc_lab[serve]'")

import httpx  # noqa: E402
import torch  # noqa: E402
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from modeltc_lab.core.data import load as load_data  # noqa: E402
from modeltc_lab.serving import server  # noqa: E402
from modeltc_lab.serving.policies import make_policy  # noqa: E402
from modeltc_lab.serving.server import ServerError, load_test, running_server  # noqa: E402
from modeltc_lab.serving.token_sim import SLA  # noqa: E402
from modeltc_lab.serving.workload import Workload  # noqa: E402

PAGE, SLOTS, CAP = 16, 512, 400
PROMPTS = ["Once upon a time there was", "The capital of France", "def f(x):", "0 1 2 3 4 5 6 7", "To be, or not to be", "A"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    "A folder with a Llama of two layers and SmolLM2's tokenizer."
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=49_152, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1024,
                                 eos_token_id=2, bos_token_id=1)).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=load_data("smollm2"), eos_token="<|im_end|>", bos_token="<|im_start|>")
    tokenizer.chat_template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def url(model):
    with running_server(model, "past_future_adaptive", capacity=SLOTS, page=PAGE, max_new_tokens=CAP, device="cpu") as address: yield address


def state(url): return httpx.get(f"{url}/modeltc/state", timeout=30).json()


def until(condition, seconds=20):
    "Wait for a condition with a deadline."
    end, tick = monotonic() + seconds, Event()
    while not (value := condition()):
        assert monotonic() < end, "the condition never held"
        tick.wait(0.01)
    return value


def idle(url): return until(lambda: (s := state(url))["running"] == s["waiting"] == s["listening"] == 0 and s)


def ask(url, prompt, n=20, **more): return httpx.post(f"{url}/v1/completions", json={"prompt": prompt, "max_tokens": n, "ignore_eos": True, **more}, timeout=60)


def text(reply): return reply.json()["choices"][0]["text"]


def together(*calls):
    "Results of calls made at the same time."
    out = [None] * len(calls)
    def run(i): out[i] = calls[i]()
    threads = [Thread(target=run, args=(i,)) for i in range(len(calls))]
    for t in threads: t.start()
    for t in threads: t.join(60)
    return out


def pieces(url, prompt, n, path="/v1/completions", **body):
    "Chunks of a stream."
    with httpx.stream("POST", url + path, json={"prompt": prompt, "max_tokens": n, "stream": True, "ignore_eos": True, **body}, timeout=60) as reply:
        return [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: ")]


def test_text_is_that_of_plain_generation(url, model):
    llama, tokenizer = LlamaForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    for prompt, reply in zip(PROMPTS, together(*(lambda p=p: ask(url, p) for p in PROMPTS))):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        plain = llama.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=20, eos_token_id=-1, pad_token_id=0)[0, ids.shape[1]:]
        assert text(reply) == tokenizer.decode(plain, skip_special_tokens=True)
        assert reply.json()["usage"] == {"prompt_tokens": ids.shape[1], "completion_tokens": 20, "total_tokens": ids.shape[1] + 20}


def test_policies_and_evictions_do_not_change_the_text(model, url):
    want, texts = [text(ask(url, p, 60)) for p in PROMPTS], {}
    for policy in ("aggressive", "conservative"):
        with running_server(model, policy, capacity=192, page=PAGE, max_new_tokens=120, device="cpu") as small:
            texts[policy] = [text(r) for r in together(*(lambda p=p: ask(small, p, 60) for p in PROMPTS))]
            now = idle(small)
        assert now["free_pages"] == now["pages"] == 192 // PAGE and (now["evictions"] > 0) == (policy == "aggressive")
    assert texts["aggressive"] == texts["conservative"] == want


def test_stream(url):
    chunks = pieces(url, "Once upon a time", 30)
    assert "".join(c["choices"][0]["text"] for c in chunks) == text(ask(url, "Once upon a time", 30))
    assert len(chunks) == 31 and chunks[-1]["choices"][0]["finish_reason"] == "length" and chunks[-1]["usage"]["completion_tokens"] == 30


def test_one_token_streams_end(url):
    for i in range(20): assert len(pieces(url, f"Number {i}", 1)) == 2


def test_chat_and_responses(url):
    say = [{"role": "user", "content": "Hello"}]
    plain = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny-llama", "messages": say, "max_tokens": 12}, timeout=60).json()
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={"messages": say, "max_tokens": 12, "stream": True}, timeout=60) as reply:
        chunks = [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: ")]
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == plain["choices"][0]["message"]["content"] != ""
    answer = httpx.post(f"{url}/v1/responses", json={"input": "Hello", "max_output_tokens": 12, "stream": False}, timeout=60).json()
    assert answer["output"][0]["content"][0]["text"] == plain["choices"][0]["message"]["content"]


def test_token_ids_as_prompt(url, model):
    ids = AutoTokenizer.from_pretrained(model)("Once upon a time").input_ids
    reply = ask(url, ids)
    assert text(reply) == text(ask(url, "Once upon a time")) and reply.json()["usage"]["prompt_tokens"] == len(ids)


def test_no_limit_asked_for_means_what_fits(url):
    reply = httpx.post(f"{url}/v1/completions", json={"prompt": list(range(100, 100 + SLOTS - 49)), "ignore_eos": True}, timeout=60).json()
    assert reply["usage"]["completion_tokens"] == 50  # the last token is never stored


def test_the_scheduler_is_ours_and_it_decides(model, url):
    assert state(url)["policy"]["policy"] == "past_future_adaptive" and state(url)["scheduler"] == "GuardedAdaptivePastFutureScheduler"
    traffic, most = Workload.build("w", np.zeros(8), [20] * 8, [60] * 8, max_new_tokens=230), {}
    for policy, kind in (("conservative", "GuardedConservativeScheduler"), ("hf_fifo", "GuardedFIFOScheduler")):
        with running_server(model, policy, capacity=SLOTS, page=PAGE, max_new_tokens=230, device="cpu") as other:
            result = load_test(other, traffic, sample_s=0.02)
            assert state(other)["scheduler"] == kind and result.policy == policy and result.config["failed"] == 0
        most[policy] = result.steps["running"].max()
    assert most["conservative"] == SLOTS // 256 < most["hf_fifo"]


def test_a_scheduler_transformers_made_instead_is_noticed(model, monkeypatch):
    from transformers.generation.continuous_batching.scheduler import SCHEDULER_MAPPING
    llama = LlamaForCausalLM.from_pretrained(model)
    monkeypatch.setattr("modeltc_lab.serving.engine.register_transformers", lambda *a, **k: "fifo")
    create = llama.init_continuous_batching
    def forgetful(**settings):
        settings["continuous_batching_config"].scheduler_type = "unknown"
        return create(**settings)
    llama.init_continuous_batching = forgetful
    with pytest.raises(ServerError, match="made a FIFOScheduler instead of GuardedFIFOScheduler"):
        server._engine(llama, make_policy("aggressive"), capacity=64, page=16, max_batch_tokens=32, max_batch=4, max_new_tokens=8, temperature=0.0)
    assert not any(name.startswith("served_") for name in SCHEDULER_MAPPING)


def test_oversize_requests_are_refused_and_the_others_go_on(url):
    big, long, good, capped = together(lambda: ask(url, list(range(100, 101 + SLOTS)), 1), lambda: ask(url, list(range(100, 300)), 399), lambda: ask(url, "Once upon a time", 200), lambda: ask(url, "A", CAP + 1))
    assert [r.status_code for r in (big, long, good, capped)] == [400, 400, 200, 400] and good.json()["usage"]["completion_tokens"] == 200
    assert f"need at most {SLOTS}" in big.json()["error"]["message"] and "at most 313 reply tokens" in long.json()["error"]["message"] and f"1..{CAP}" in capped.json()["error"]["message"]
    streamed = httpx.post(f"{url}/v1/completions", json={"prompt": list(range(100, 101 + SLOTS)), "stream": True}, timeout=30)
    assert streamed.status_code == 400 and ask(url, list(range(100, 100 + SLOTS)), 1).status_code == 200
    assert (s := idle(url))["free_pages"] == s["pages"] and httpx.get(f"{url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize("change, status, message", [
    ({"prompt": ""}, 400, "empty"), ({"prompt": []}, 400, "empty"), ({"prompt": [1, 49_152]}, 400, "'49152' is no token id"), ({"prompt": ["a", "b"]}, 400, "no token id"), ({"max_tokens": 0}, 400, "max_tokens=0"),
    ({"max_tokens": "7"}, 400, "whole number"), ({"temperature": 0.5}, 400, "temperature=0.5"), ({"stop": ["."]}, 400, "stop="), ({"n": 3}, 400, "n=3"), ({"model": "gpt"}, 404, "this server has 'tiny-llama'")])
def test_refusals(url, change, status, message):
    reply = httpx.post(f"{url}/v1/completions", json={"prompt": "A", "max_tokens": 3, **change}, timeout=30)
    assert reply.status_code == status and message in reply.json()["error"]["message"]


def test_routes(url):
    assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "tiny-llama"
    assert [httpx.post(f"{url}/{path}", json={}).status_code for path in ("reset", "load_model", "v1/systemone", "v1/audio/transcriptions")] == [404] * 4
    assert httpx.post(f"{url}/v1/completions", content=b"{", headers={"content-type": "application/json"}).status_code == 422


def test_equal_request_ids_are_kept_apart(url):
    replies = together(*(lambda p=p: httpx.post(f"{url}/v1/completions", json={"prompt": p, "max_tokens": 20, "ignore_eos": True}, headers={"X-Request-ID": "mine"}, timeout=60) for p in PROMPTS))
    assert [text(r) for r in replies] == [text(ask(url, p)) for p in PROMPTS] and len({r.headers["x-request-id"] for r in replies}) == len(PROMPTS)


def test_a_client_that_leaves_gives_its_pages_back(url):
    with httpx.stream("POST", f"{url}/v1/completions", json={"prompt": "Once", "max_tokens": CAP, "stream": True, "ignore_eos": True}, timeout=60) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert (s := state(url))["running"] == 1 and s["free_pages"] < s["pages"]
    assert (s := idle(url))["free_pages"] == s["pages"] and s["passes"] < 10_000


def test_a_client_that_leaves_while_it_waits_for_a_whole_reply(model):
    with running_server(model, "past_future", capacity=1024, page=PAGE, max_new_tokens=1000, device="cpu") as url:
        with pytest.raises(httpx.ReadTimeout): httpx.post(f"{url}/v1/completions", json={"prompt": "Once", "max_tokens": 1000, "ignore_eos": True}, timeout=0.2)
        s = idle(url)
        assert s["free_pages"] == s["pages"] and s["passes"] < 1000, "the reply was made for nobody"


def test_a_killed_client_gives_its_pages_back(url):
    code = f"import httpx\nwith httpx.stream('POST', '{url}/v1/completions', json={{'prompt': 'Once', 'max_tokens': {CAP}, 'stream': True, 'ignore_eos': True}}, timeout=60) as r:\n    for line in r.iter_lines(): print(line, flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as client:
        assert client.stdout.readline().startswith("data: ")
        client.send_signal(signal.SIGKILL)
    assert client.returncode == -signal.SIGKILL and (s := idle(url))["free_pages"] == s["pages"] and ask(url, "A", 3).status_code == 200


def engine(model, **sizes):
    "transformers' manager as the server makes it, with transformers' own FIFO and no margin."
    return server._engine(LlamaForCausalLM.from_pretrained(model), make_policy("hf_fifo", margin=0.0), **{"capacity": 128, "page": 32, "max_batch_tokens": 128, "max_batch": 8, "max_new_tokens": 97, "temperature": 0.0, **sizes})


def test_the_queue_goes_on_when_everybody_who_ran_is_cancelled_after_an_eviction(model):
    manager = engine(model)
    try:
        scheduler = manager.batch_processor.scheduler
        with manager.pause():
            for i in range(3): manager.add_request(list(range(100, 130)), request_id=str(i), max_new_tokens=97, eos_token_id=-1)
        until(lambda: scheduler.block_new_requests)
        with manager.pause():
            running, waiting = list(scheduler.active_requests), list(scheduler.waiting_requests)
            for r in running: manager.cancel_request(r)
        done = [manager.get_result(timeout=20) for _ in waiting]
        assert running and waiting and {d.request_id for d in done} == set(waiting) and all(len(d.generated_tokens) == 97 for d in done)
        times, lost = scheduler.evicted[waiting[0]]
        assert times >= 1 and lost >= 30 and scheduler.evictions >= len(waiting)
    finally: manager.stop(hard_stop=True)


def test_a_cancellation_that_comes_before_its_request(model):
    manager = engine(model)
    try:
        scheduler = manager.batch_processor.scheduler
        manager.cancel_request("early")
        until(lambda: "early" in scheduler._early)
        manager.add_request([100, 101], request_id="early", max_new_tokens=90, eos_token_id=-1)
        manager.add_request([100, 101], request_id="other", max_new_tokens=3, eos_token_id=-1)
        assert manager.get_result(timeout=20).request_id == "other" and not scheduler.active_requests and manager.get_result(timeout=0.01) is None
    finally: manager.stop(hard_stop=True)


def test_load_test_reports_every_request(url):
    rng = np.random.default_rng(0)
    w = Workload.build("mixed", np.zeros(20), [*rng.integers(5, 60, 19), 600], rng.integers(1, 40, 20)).poisson(50, 0)
    result = load_test(url, w, seed=3)
    rows, fine = result.requests, np.arange(20) < 19
    assert len(rows) == 20 and result.config["failed"] == 1 and result.config["errors"] == {"HTTP 400": 1} and "600 tokens" in result.config["examples"]["HTTP 400"]
    assert (np.isfinite(rows["finish_s"]) == fine).all() and (rows["output"] == w.sealed_output).all() and (rows["prompt"] == w.prompt).all() and (rows["arrival_s"] == w.arrival_s).all()
    r = rows[fine]
    assert (r["arrival_s"] < r["first_token_s"]).all() and (r["first_token_s"] <= r["finish_s"]).all() and (r["max_gap_s"] <= r["finish_s"] - r["first_token_s"]).all() and (r["max_gap_s"][r["output"] > 1] > 0).all()
    s = result.summary(SLA(60, 60))
    assert s["requests"] == 20 and s["unfinished"] == 1 and s["sla_attainment"] == 0.95 and s["goodput_rps"] == pytest.approx(19 / result.span_s) and 0 < s["kv_use_mean"] < 1
    assert result.span_s >= rows["finish_s"][fine].max() and result.config["late_p99_s"] >= 0 and result.policy == "past_future_adaptive"


def test_a_sealed_length_ends_the_reply_and_no_policy_sees_it(url):
    chunks = pieces(url, "Once upon a time", 50, stop_after=7)
    assert len(chunks) == 8 and chunks[-1]["choices"][0]["finish_reason"] == "stop" and "".join(c["choices"][0]["text"] for c in chunks) == text(ask(url, "Once upon a time", 7)) == text(ask(url, "Once upon a time", 50, stop_after=7))
    for length, message in ((0, "need 1..50"), (51, "need 1..50"), ("7", "whole number")): assert message in ask(url, "A", 50, stop_after=length).json()["error"]["message"]


def test_sealed_lengths_are_learnt(model):
    w = Workload.build("w", np.zeros(8), [20] * 8, [50, 60] * 4, max_new_tokens=120)
    with server._opened(model, "past_future", "127.0.0.1", 0, SLOTS, PAGE, 128, 8, 120, 0.0, "cpu") as (runner, door, _):
        thread = Thread(target=runner.run, args=([door],))
        thread.start()
        try:
            result = load_test(server._address(door), w)
            assert ask(server._address(door), "A", 3).status_code == 200  # the engine reports who finished when it plans again
            scheduler = runner.config.app.cancel.__self__.engine.batch_processor.scheduler
            assert result.config["failed"] == 0 and (result.requests["output"] == w.sealed_output).all() and not scheduler.sealed
            assert sorted(n for n in scheduler.policy.length_model.lengths.tolist() if n < 120)[-8:] == [50] * 4 + [60] * 4
        finally:
            runner.should_exit = True
            thread.join(20)


def test_evictions_reach_the_result(model):
    w = Workload.build("w", np.zeros(6), [20] * 6, [60] * 6, max_new_tokens=120)
    with running_server(model, "aggressive", capacity=192, page=PAGE, max_new_tokens=120, device="cpu") as url:
        result = load_test(url, w)
        assert result.requests["evictions"].sum() == state(url)["evictions"] > 0 and (result.requests["recomputed"] >= 20 * result.requests["evictions"]).all()
        assert (result.requests["output"] == 60).all() and (result.requests["finish_s"] < np.inf).all()


def test_closed_loop_keeps_its_clients_busy(url):
    w = Workload.build("w", np.zeros(12), [10] * 12, [30] * 12).closed_loop(3)
    rows = load_test(url, w, clients=3).requests
    order = np.sort(rows["arrival_s"])
    flying = [(rows["arrival_s"] <= t).sum() - (rows["finish_s"] < t).sum() for t in order]
    assert np.isfinite(rows["finish_s"]).all() and max(flying) == 3 and rows["arrival_s"].max() > rows["finish_s"].min()


def test_waiting_for_a_connection_counts_as_waiting(url):
    w = Workload.build("w", np.zeros(4), [10] * 4, [120] * 4)
    result = load_test(url, w, clients=1)
    order = np.argsort(result.requests["finish_s"])
    assert (result.ttft_s[order][1:] > result.requests["finish_s"][order][:-1]).all() and result.config["late_p99_s"] > server.LATE_S and "the client was late" in result.config["note"]


def test_speed_and_seed(url):
    w = Workload.build("w", [0, 0.4, 0.8], [10] * 3, [2] * 3)
    assert load_test(url, w, speed=4).requests["arrival_s"].tolist() == [0, 0.1, 0.2]
    assert server._prompt(w, 1, (5, 900), 7) == server._prompt(w, 1, (5, 900), 7) != server._prompt(w, 1, (5, 900), 8) and min(server._prompt(w, 0, (5, 9), 0)) >= 5


def test_prompts_share_what_the_trace_shares():
    w = Workload.build("w", [0, 0, 0], [40, 40, 24], [1, 1, 1], block_ids=[[1, 2], [1, 3], [1, 2]], block_tokens=16)
    a, b, c = (server._prompt(w, i, (17, 49_152), 0) for i in range(3))
    assert [len(p) for p in (a, b, c)] == [40, 40, 24] and a[:16] == b[:16] and a[16:32] != b[16:32] and c == a[:24] and a[32:] != b[32:]


def test_a_server_of_another_kind(model):
    "Any OpenAI-compatible stream will do: text in the closing chunk, a stream that breaks off, an error in the stream."
    from contextlib import contextmanager

    import uvicorn
    from fastapi import FastAPI
    from fastapi.responses import StreamingResponse
    app, part = FastAPI(), lambda text, end=None: "data: " + json.dumps({"choices": [{"text": text, "finish_reason": end}]}) + "\n\n"
    app.add_api_route("/v1/models", lambda: {"data": [{"id": "theirs"}]})

    @app.post("/v1/completions")
    def complete(body: dict):
        assert body["model"] == "theirs"
        n = len(body["prompt"])
        return StreamingResponse(iter({3: [part("a"), part("b", "stop"), "data: [DONE]\n\n"], 4: [part("a")], 5: [part("a"), 'data: {"error": "lost"}\n\n']}[n]), media_type="text/event-stream")

    @contextmanager
    def running():
        with server._listen("127.0.0.1", 0) as door:
            runner = uvicorn.Server(uvicorn.Config(app, log_level="critical"))
            thread = Thread(target=runner.run, args=([door],))
            thread.start()
            try: yield server._address(door)
            finally:
                runner.should_exit = True
                thread.join(20)

    with running() as url:
        with pytest.raises(ServerError, match="give tokens="): load_test(url, Workload.build("w", [0], [3], [2]))
        result = load_test(url, Workload.build("w", [0, 0, 0], [3, 4, 5], [2, 2, 2]), tokens=(10, 20))
    assert result.requests["output"].tolist() == [2, 2, 2] and np.isfinite(result.requests["finish_s"]).tolist() == [True, False, False]
    assert result.config["errors"] == {"the stream ended before the reply": 1, "error in the stream": 1} and np.isfinite(result.requests["first_token_s"]).all()


def test_the_command_serves_until_it_is_interrupted(model, tmp_path, capsys):
    call = f"from modeltc_lab.serving.server import serve; serve({model!r}, 'past_future', ['reserve=0.1'], port=0, capacity=512, device='cpu')"
    with subprocess.Popen([sys.executable, "-c", call], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as command:
        line = command.stdout.readline()
        url = line.split(" at ")[1].split("/v1")[0]
        assert "policy past_future, 512 KV slots in 16 pages of 32" in line and state(url)["policy"]["reserve"] == 0.1
        (tmp_path / "t.csv").write_text("arrival_s,prompt_tokens,output_tokens\n0,20,5\n0.1,30,6\n0.2,900,5\n")
        server.load(url, str(tmp_path / "t.csv"), sla="5,2")
        told = capsys.readouterr().out
        server.load(url, str(tmp_path / "t.csv"), sla="5,2", json=True)
        answer = json.loads(capsys.readouterr().out)
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=60)
        assert command.returncode == 0 or "KeyboardInterrupt" in said, said[-2000:]   # it ends in order, or says that it was interrupted; not by any other error
    assert "past_future" in told and "1 failed: HTTP 400, the first with: prompt of 900 tokens" in told and [answer["result"][k] for k in ("requests", "unfinished")] == [3, 1]


@pytest.mark.parametrize("settings, message", [
    (dict(policy="best"), "policy='best'"), (dict(policy="oracle"), "knows how long"), (dict(policy="static"), "static"), (dict(capacity=8), "capacity=8"), (dict(page=3), "page=3"), (dict(max_batch=0), "max_batch=0"),
    (dict(port=70_000), "port=70000"), (dict(strength="x", policy="past_future"), "strength")])
def test_a_server_that_cannot_be(model, settings, message):
    with pytest.raises(ValueError, match=message), running_server(model, **{"device": "cpu", "capacity": 512, **settings}): pass


def test_a_port_in_use(model, url):
    with pytest.raises(ServerError, match="cannot be opened"), running_server(model, port=int(url.rsplit(":", 1)[1]), device="cpu"): pass


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(ServerError, match="no such folder"), running_server(str(tmp_path / "nothing")): pass
    with pytest.raises(ServerError, match="cannot be loaded"), running_server(str(tmp_path), device="cpu"): pass
