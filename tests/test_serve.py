"""The server: what `Model` says, for many clients at once, and one line for what is wrong.

Requests go to the application itself, over ASGI: no client library, and a client that goes away is
a message like others. One test starts the command.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import signal
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_run
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model
from tolerances import PREFILL_STEP_F32

import xlstm_distill
from xlstm_distill.cli import main
from xlstm_distill.errors import UserError
from xlstm_distill.generate import Batch, Row
from xlstm_distill.linearize import linearize
from xlstm_distill.model import state_nbytes
from xlstm_distill.testing import assert_close

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from xlstm_distill.serve import MAX_WAITING, ChatRequest, CompletionRequest, Server, listen

TEACHER = tiny_run.teacher()
STUDENT = linearize(TEACHER, window=8, sinks=2)
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _repeatable(monkeypatch) -> None:
    """Requests without a seed have the same one in each run: what they sample may be empty."""
    monkeypatch.setattr("secrets.randbits", random.Random(0).getrandbits)


# ---- a client -----------------------------------------------------------------------------------


@asynccontextmanager
async def served(model=STUDENT, **bounds: int) -> AsyncIterator[Server]:
    server = Server(model, "tiny", **bounds)
    async with server.app.router.lifespan_context(server.app):
        yield server


async def send(
    server: Server,
    path: str,
    body: Any = None,
    gone: asyncio.Event | None = None,
) -> tuple[int, bytes]:
    """Status and body of the answer; the client goes away when `gone` is set."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    over = asyncio.Event()
    messages = [{"type": "http.request", "body": data}]
    status, answer = 0, b""

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await (over if gone is None else gone).wait()
        return {"type": "http.disconnect"}

    async def hear(message: dict[str, Any]) -> None:
        nonlocal status, answer
        status = message.get("status", status)
        answer += message.get("body", b"")

    scope = {
        "type": "http",
        "asgi": {"spec_version": "2.3"},
        "method": "GET" if body is None else "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"host", b"127.0.0.1:8000")],
    }
    await server.app(scope, receive, hear)
    over.set()
    return status, answer


async def ask(server: Server, path: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    """The answer to a request that must be served."""
    status, answer = await send(server, path, {"model": "tiny", **body})
    assert status == 200, answer
    return json.loads(answer)


def answered(path: str = COMPLETIONS, model=STUDENT, **body: Any) -> dict[str, Any]:
    async def work() -> dict[str, Any]:
        async with served(model) as server:
            return await ask(server, path, **body)

    return asyncio.run(work())


def refused(status: int, message: str, path: str, body: Any, **bounds: int) -> None:
    async def work() -> tuple[int, bytes]:
        async with served(**bounds) as server:
            return await send(server, path, body)

    found, answer = asyncio.run(work())
    error = json.loads(answer)["error"]
    assert found == status and message in error["message"], answer
    assert "\n" not in error["message"] and set(error) == {"message", "type", "param", "code"}


def events(answer: bytes) -> list[dict[str, Any]]:
    lines = answer.decode().split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def rests(server: Server) -> bool:
    """Nothing is held for anybody, a moment later."""
    engine = server.engine
    for _ in range(100):
        if not (engine.batch.rows or engine.waiting or engine.jobs or engine.batch._state):
            return True
        await asyncio.sleep(0.01)
    return False


# ---- what is said -------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{"temperature": 0}, {"seed": 5, "temperature": 0.7, "top_p": 0.9}])
def test_texts_are_those_of_generate(how):
    text = "The river"
    ids = STUDENT.tokenizer.encode(text)
    wanted = STUDENT.generate(text, 30, how["temperature"], how.get("top_p", 1), how.get("seed", 0))
    found = answered(prompt=text, max_tokens=30, **how)
    assert found["object"] == "text_completion" and found["choices"][0]["text"] == wanted
    assert found["usage"]["prompt_tokens"] == len(ids)
    several = answered(prompt=[ids, ids, [5]], max_tokens=30, **how)["choices"]
    assert several[0]["text"] == wanted and [c["index"] for c in several] == [0, 1, 2]
    assert (several[1]["text"] == wanted) == (how["temperature"] == 0)  # draws of its own
    messages = [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}]
    chat = answered(CHAT, messages=messages, max_tokens=20, **how)["choices"][0]["message"]
    prompt = STUDENT.tokenizer.apply_chat_template([{"role": "user", "content": "Hello?"}])
    alike = STUDENT.generate(
        prompt, 20, how["temperature"], how.get("top_p", 1), how.get("seed", 0)
    )
    assert chat == {"role": "assistant", "content": alike}


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_n_choices_of_a_prompt_have_streams_of_their_own(temperature):
    ids = [STUDENT.tokenizer.encode(text) for text in ("The river", "Bread")]
    how = {"max_tokens": 20, "temperature": temperature, "seed": 5}
    found = answered(prompt=ids, n=3, best_of=3, **how)
    rows = [prompt for prompt in ids for _ in range(3)]  # index = prompt * n + i
    wanted = STUDENT.generate_batch(rows, 20, temperature, seed=5)
    choices = found["choices"]
    assert [c["index"] for c in choices] == list(range(6))
    assert [c["text"] for c in choices] == [STUDENT.tokenizer.decode(new) for new in wanted]
    assert len({c["text"] for c in choices[:3]}) == (3 if temperature else 1)
    assert found["usage"]["prompt_tokens"] == sum(map(len, ids))  # as OpenAI counts
    assert found["usage"]["completion_tokens"] == sum(map(len, wanted))
    alone = answered(prompt=[ids[0]], **how)["choices"][0]
    assert alone == choices[0]


def test_a_stop_cuts_the_text_and_ends_the_row():
    whole = answered(prompt="The river", max_tokens=40, temperature=0)["choices"][0]
    assert whole["finish_reason"] == "length"
    stop = whole["text"][5:7]
    cut = answered(prompt="The river", max_tokens=40, temperature=0, stop=["\x00no", stop, ""])
    assert cut["choices"][0]["text"] == whole["text"].partition(stop)[0]
    assert cut["choices"][0]["finish_reason"] == "stop" and cut["usage"]["completion_tokens"] < 40


def test_logprobs_are_those_of_score():
    ids = STUDENT.tokenizer.encode("A lighthouse keeper counts ships \u00e9")
    found = answered(prompt=[ids], echo=True, logprobs=3, max_tokens=1, temperature=0, n=2)
    choice, alike = found["choices"]
    assert alike == {**choice, "index": 1}
    scores = choice["logprobs"]
    new = STUDENT.generate_batch([ids], 1, 0.0, stop_ids=())[0]
    logp = STUDENT.score(np.array([[*ids, *new]]))[0]
    assert scores["token_logprobs"][0] is None and len(scores["tokens"]) == len(ids) + 1
    assert_close(np.array(scores["token_logprobs"][1:]), logp, PREFILL_STEP_F32, "served log p")
    best = STUDENT.topk(np.array([ids]), 3)[1][0]
    for position, top in enumerate(scores["top_logprobs"][1:]):
        assert_close(np.sort([*top.values()])[::-1], best[position], PREFILL_STEP_F32, "top log p")
        own = scores["token_logprobs"][position + 1]
        if scores["tokens"][position + 1] in top:
            assert top[scores["tokens"][position + 1]] == own  # what lm_eval's test of greed reads
    assert choice["text"].startswith("A lighthouse keeper counts ships \u00e9")
    assert scores["tokens"][-3:-1] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert scores["text_offset"][:3] == [0, 1, 2] and scores["text_offset"][-1] == len(ids) - 1
    assert answered(prompt=[ids], echo=True, max_tokens=0)["choices"][0]["text"] == (
        STUDENT.tokenizer.decode(ids)
    )
    chat = answered(
        CHAT,
        messages=[{"role": "user", "content": "Hi"}],
        max_completion_tokens=4,
        logprobs=True,
        top_logprobs=2,
        temperature=0,
    )
    content = chat["choices"][0]["logprobs"]["content"]
    assert len(content) == 4 and all(
        e["logprob"] == e["top_logprobs"][0]["logprob"] for e in content
    )


def test_a_stop_token_is_scored_but_not_written():
    """lm_eval leaves out the last score, of the one token that it asks for: there must be one."""
    model = random_model("hybrid")
    model.tokenizer = TEACHER.tokenizer
    first = model.generate_batch([[9, 8]], 1, 0.0, stop_ids=())[0][0]
    model.config = model.config.model_copy(update={"eos_token_ids": [first]})
    found = answered(
        model=model, prompt=[[9, 8]], echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    assert len(found["choices"][0]["logprobs"]["token_logprobs"]) == 3
    assert found["choices"][0]["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_a_stream_tells_the_same_in_pieces(path):
    if path == COMPLETIONS:
        body = {"prompt": ["The river", "Bread"], "logprobs": 1, "echo": True}
    else:
        body = {"messages": [{"role": "user", "content": "Hello?"}], "logprobs": True}
    body |= {"model": "tiny", "max_tokens": 30, "seed": 2, "stop": "e", "n": 2}

    async def work() -> tuple[dict[str, Any], list[dict[str, Any]]]:
        async with served() as server:
            whole = await ask(server, path, **body)
            options = {"stream": True, "stream_options": {"include_usage": True}}
            _, answer = await send(server, path, {**body, **options})
            assert await rests(server)
            return whole, events(answer)

    whole, pieces = asyncio.run(work())
    *pieces, last = pieces
    assert len(whole["choices"]) == (4 if path == COMPLETIONS else 2)
    assert last["usage"] == whole["usage"] and last["choices"] == []
    for index, choice in enumerate(whole["choices"]):
        mine = [p["choices"][0] for p in pieces if p["choices"][0]["index"] == index]
        assert [p["finish_reason"] for p in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] == choice["finish_reason"]
        if path == COMPLETIONS:
            assert "".join(p["text"] for p in mine) == choice["text"]
            for key, values in choice["logprobs"].items():
                assert [v for p in mine for v in p["logprobs"][key]] == values
        else:
            assert pieces[0]["object"] == "chat.completion.chunk"
            assert "".join(p["delta"]["content"] for p in mine) == choice["message"]["content"]
            assert [p["delta"].get("role") for p in mine] == ["assistant"] + [None] * (
                len(mine) - 1
            )


# ---- what tools send ----------------------------------------------------------------------------
# Word for word, but for the texts and max_tokens; `answered` adds the name of the model.


def evalplus(temperature: float, n: int) -> dict[str, Any]:
    """evalplus 0.3.1: gen/util/openai_request.py."""
    task = "Please provide a self-contained Python script:\n```python\ndef area(w, h):\n```"
    system = {"role": "system", "content": "You are a helpful assistant good at coding."}
    return {
        "messages": [system, {"role": "user", "content": task}],
        "max_tokens": 24,  # 768
        "n": n,
        "temperature": temperature,
        "top_p": 0.95,
    }


def test_evalplus():
    greedy = answered(CHAT, **evalplus(0.0, 1))
    prompt = STUDENT.tokenizer.apply_chat_template(evalplus(0.0, 1)["messages"])
    (choice,) = greedy["choices"]
    assert choice["message"]["content"] == STUDENT.generate(prompt, 24)
    sampled = answered(CHAT, **evalplus(0.8, 4))
    assert [c["index"] for c in sampled["choices"]] == [0, 1, 2, 3]
    assert len({c["message"]["content"] for c in sampled["choices"]}) == 4
    assert sampled["usage"]["prompt_tokens"] == greedy["usage"]["prompt_tokens"]


def test_mt_bench():
    """FastChat 0.2.36: chat_completion_openai of llm_judge/common.py, for both turns."""
    messages = [{"role": "system", "content": "You give helpful answers."}]
    for question in ("Write of Hawaii.", "Begin each sentence with A."):
        messages.append({"role": "user", "content": question})
        how = {"n": 1, "temperature": 0.7, "max_tokens": 32}  # 1024
        (choice,) = answered(CHAT, messages=messages, **how)["choices"]
        assert choice["message"]["content"] and choice["finish_reason"] in ("stop", "length")
        messages.append({"role": "assistant", "content": choice["message"]["content"]})


def test_lm_eval_log_likelihood():
    """lm_eval 0.4.13: `_create_payload` and `parse_logprobs` of local-completions."""
    context, rest = map(STUDENT.tokenizer.encode, ("The river rises", " in the hills"))
    body = {
        "prompt": [context + rest, context],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    }
    scores = answered(**body)["choices"][0]["logprobs"]
    own, top = (scores[key][len(context) : -1] for key in ("token_logprobs", "top_logprobs"))
    logp = STUDENT.score(np.array([context + rest]))[0, len(context) - 1 :]
    assert_close(np.array(own), logp, PREFILL_STEP_F32, "served log p")
    best = STUDENT.topk(np.array([context + rest]), 1)[0][0, len(context) - 1 : -1, 0]
    greedy = [p == max(best.values()) for p, best in zip(own, top, strict=True)]
    assert greedy == (best == rest).tolist()


NEUTRAL = {
    "response_format": {"type": "text"},
    "metadata": {"run": "3"},
    "store": False,
    "tools": [],
    "tool_choice": "none",
    "parallel_tool_calls": True,
    "suffix": "",
    "user": "me",
    "service_tier": "auto",
    "presence_penalty": 0.0,
    "frequency_penalty": 0,
    "logit_bias": {},
}


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_what_changes_nothing_is_passed_over(path):
    body: dict[str, Any] = {"max_tokens": 8, "seed": 1}
    if path == COMPLETIONS:
        body |= {"prompt": "The river"}
    else:
        body |= {"messages": [{"role": "user", "content": "Hello?"}]}
    plain = answered(path, **body)["choices"]
    assert answered(path, **body, **NEUTRAL)["choices"] == plain
    nothing = dict.fromkeys([*NEUTRAL, "n", "stop", "logprobs", "never_heard_of"])
    assert answered(path, **body, **nothing)["choices"] == plain


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("response_format", {"type": "json_object"}),
        ("store", True),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("suffix", "the end"),
        ("presence_penalty", 0.5),
        ("logit_bias", {"5": 1}),
    ],
)
def test_what_would_change_the_answer_is_refused(path, key, value):
    only = json.dumps(NEUTRAL[key]).removesuffix(".0")
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    body = GOOD if path == COMPLETIONS else chat
    refused(400, f"{key}: only {only} is served", path, {**body, key: value})


def test_models_are_listed_and_told_one_by_one():
    async def work() -> list[tuple[int, bytes]]:
        async with served() as server:
            paths = ("/v1/models", "/v1/models/tiny", "/v1/models/a/b")
            return [await send(server, path) for path in paths]

    (_, many), (_, one), (status, other) = asyncio.run(work())
    assert json.loads(many) == {"object": "list", "data": [json.loads(one)]}
    assert json.loads(one)["id"] == "tiny" and json.loads(one)["object"] == "model"
    assert status == 404 and "'a/b' is not served here; 'tiny' is" in other.decode()


# ---- many clients -------------------------------------------------------------------------------


def test_64_clients_are_served_in_one_batch(monkeypatch):
    prompts = [f"{n}: {tiny_run.TEXT[n % 4][: 3 + n]}" for n in range(64)]
    running = []
    step = Batch.step

    def counted(batch: Batch) -> list[Row]:
        running.append(len(batch.running))
        return step(batch)

    monkeypatch.setattr(Batch, "step", counted)

    async def work() -> list[str]:
        async with served() as server:

            async def one(n: int) -> str:
                body = {"prompt": prompts[n], "max_tokens": 40 + n % 3, "temperature": 0}
                if n % 2:
                    return (await ask(server, **body))["choices"][0]["text"]
                _, answer = await send(
                    server, COMPLETIONS, body | {"model": "tiny", "stream": True}
                )
                return "".join(p["choices"][0]["text"] for p in events(answer))

            texts = await asyncio.gather(*(one(n) for n in range(64)))
            assert await rests(server)
            return texts

    found = asyncio.run(work())
    assert max(running) >= 60 and len(running) <= 50  # one by one there would be 2,600 steps
    assert found == [STUDENT.generate(p, 40 + n % 3) for n, p in enumerate(prompts)]


def test_rows_wait_where_their_states_have_no_room():
    most = state_nbytes(TEACHER.config, 300, 2)  # of full attention: more room for more tokens
    assert state_nbytes(TEACHER.config, 300, 3) > most >= state_nbytes(TEACHER.config, 260, 2)

    async def work() -> None:
        async with served(TEACHER, max_state=most) as server:
            whole = ask(server, prompt=["The", "A", "Bread", "def"], max_tokens=280, temperature=0)
            asking = asyncio.create_task(whole)
            while not server.engine.batch.running:
                await asyncio.sleep(0.001)
            assert len(server.engine.batch.running) == 2 and len(server.engine.waiting) == 2
            texts = [choice["text"] for choice in (await asking)["choices"]]
            assert texts == [TEACHER.generate(p, 280) for p in ("The", "A", "Bread", "def")]
            assert await rests(server)
            large = await ask(server, prompt="The", max_tokens=500, temperature=0)  # is alone
            assert large["choices"][0]["text"] == TEACHER.generate("The", 500)

    asyncio.run(work())


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_frees_what_it_had(stream):
    body = {"model": "tiny", "prompt": ["The", "A"], "max_tokens": 400, "stream": stream}
    body |= {"temperature": 0}

    async def work() -> None:
        async with served(max_rows=2) as server:
            gone = asyncio.Event()
            leaving = asyncio.create_task(send(server, COMPLETIONS, body, gone))
            while len(server.engine.batch.running) < 2:
                await asyncio.sleep(0.001)
            waits = asyncio.create_task(send(server, COMPLETIONS, body, gone))
            stays = asyncio.create_task(ask(server, prompt="Bread", max_tokens=5, temperature=0))
            while len(server.engine.waiting) < 3:
                await asyncio.sleep(0.001)
            gone.set()
            text = (await stays)["choices"][0]["text"]
            assert text == STUDENT.generate("Bread", 5)
            await asyncio.gather(leaving, waits)
            assert await rests(server)

    asyncio.run(work())


def test_what_fails_inside_is_500_and_the_next_is_served(monkeypatch):
    async def work() -> None:
        async with served() as server:
            with monkeypatch.context() as patch:
                patch.setattr(STUDENT, "head_logits", lambda hidden: 1 / 0)
                body = {"model": "tiny", "prompt": "The"}
                status, answer = await send(server, COMPLETIONS, body)
                assert (
                    status == 500 and "ZeroDivisionError" in json.loads(answer)["error"]["message"]
                )
                _, streamed = await send(server, COMPLETIONS, {**body, "stream": True})
                assert "ZeroDivisionError" in streamed.decode()
            found = await ask(server, prompt="The", max_tokens=5, temperature=0)
            assert found["choices"][0]["text"] == STUDENT.generate("The", 5)
            assert await rests(server)

    asyncio.run(work())


# ---- what is refused ----------------------------------------------------------------------------

GOOD = {"model": "tiny", "prompt": "The", "max_tokens": 2}


def test_bounds():
    refused(413, "more than 4194304 bytes", COMPLETIONS, b" " * (1 << 22) + b"{}")
    refused(429, "try again later", COMPLETIONS, {**GOOD, "prompt": ["a"] * 3}, max_waiting=2)
    refused(400, "512", COMPLETIONS, {**GOOD, "max_tokens": 510})
    refused(400, "more than the context", COMPLETIONS, {**GOOD, "prompt": [5] * 513})
    refused(400, "at most 256", COMPLETIONS, {**GOOD, "prompt": ["a"] * (MAX_WAITING + 1)})
    refused(400, "129 prompts with n 2", COMPLETIONS, {**GOOD, "prompt": ["a"] * 129, "n": 2})
    refused(400, "n: Input should be less than", COMPLETIONS, {**GOOD, "n": 129})
    refused(400, "best_of must equal n", COMPLETIONS, {**GOOD, "n": 2, "best_of": 3})
    refused(400, "best_of must equal n", COMPLETIONS, {**GOOD, "n": 2, "best_of": 1})
    refused(400, "stop: 17 strings", COMPLETIONS, {**GOOD, "stop": ["a"] * 17})
    refused(404, "'gpt-4' is not served", COMPLETIONS, {**GOOD, "model": "gpt-4"})
    refused(404, "Not Found", "/v1/embeddings", GOOD)
    refused(405, "Method Not Allowed", "/v1/models", GOOD)
    refused(400, "expected a JSON object", COMPLETIONS, [GOOD])
    refused(400, "not valid JSON", COMPLETIONS, b"[" * 100_000)
    refused(400, "token ids are 0..258", COMPLETIONS, {**GOOD, "prompt": [259]})
    refused(400, "max_tokns: unknown key", COMPLETIONS, {**GOOD, "max_tokns": 2})


NOT_NUMBERS = st.one_of(st.text(), st.lists(st.integers()), st.booleans(), st.just(float("nan")))
WRONG: dict[str, st.SearchStrategy[Any]] = {
    "model": st.one_of(st.integers(), st.text().filter(lambda s: s != "tiny")),
    "max_tokens": st.one_of(NOT_NUMBERS, st.integers(max_value=-1), st.integers(min_value=513)),
    "temperature": st.one_of(NOT_NUMBERS, st.floats(max_value=-1e-9), st.just(float("inf"))),
    "top_p": st.one_of(NOT_NUMBERS, st.floats(max_value=0), st.floats(min_value=1.001)),
    "seed": st.one_of(NOT_NUMBERS, st.integers(max_value=-1), st.floats()),
    "n": st.one_of(NOT_NUMBERS, st.integers(max_value=0), st.integers(min_value=129)),
    "stream": st.one_of(st.integers(), st.text()),
    "stop": st.one_of(st.integers(), st.lists(st.integers(), min_size=1)),
    "logit_bias": st.dictionaries(st.text(), st.floats(), min_size=1),
}
OF_COMPLETIONS = {
    "prompt": st.one_of(
        st.integers(),
        st.just([]),
        st.dictionaries(st.text(), st.text()),
        st.lists(st.one_of(st.floats(), st.booleans(), st.just([])), min_size=1),
        st.lists(st.integers(min_value=259), min_size=1),
        st.lists(st.integers(max_value=-1), min_size=1),
        st.just("\ud800"),
    ),
    "logprobs": st.one_of(NOT_NUMBERS, st.integers(min_value=21), st.integers(max_value=-1)),
    "echo": st.integers(),
}
MESSAGES = st.lists(
    st.one_of(
        st.text(),
        st.dictionaries(st.sampled_from(["role", "content"]), st.integers()),
        st.fixed_dictionaries({"role": st.just("user"), "content": st.lists(st.integers())}),
    )
)
OF_CHAT = {"messages": MESSAGES, "logprobs": st.integers(), "echo": st.just(True)}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@st.composite
def malformed(draw) -> tuple[str, Any]:
    """A path and a body that is wrong in one place."""
    path = draw(st.sampled_from([COMPLETIONS, CHAT]))
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    body = dict(GOOD if path == COMPLETIONS else chat)
    kind = draw(st.sampled_from(["bytes", "missing", "value", "unknown", "no object"]))
    if kind == "bytes":
        return path, draw(st.binary(max_size=30))
    if kind == "no object":
        return path, draw(JSON.filter(lambda value: not isinstance(value, dict)))
    if kind == "missing":
        del body[draw(st.sampled_from([key for key in body if key != "max_tokens"]))]
    elif kind == "unknown":
        known = {*CompletionRequest.model_fields, *ChatRequest.model_fields}
        body[draw(st.text().filter(lambda key: key not in known))] = draw(
            JSON.filter(lambda value: value is not None)
        )
    else:
        wrong = WRONG | (OF_COMPLETIONS if path == COMPLETIONS else OF_CHAT)
        key = draw(st.sampled_from(sorted(wrong)))
        body[key] = draw(wrong[key])
    return path, body


@given(malformed())
@settings(max_examples=150)
def test_malformed_requests_are_4xx_with_one_line(request_):
    path, body = request_

    async def work() -> tuple[int, bytes]:
        async with served() as server:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            return await send(server, path, data)

    status, answer = asyncio.run(work())
    assert 400 <= status < 500, (status, answer)
    message = json.loads(answer)["error"]["message"]
    assert message and len(message.splitlines()) == 1 and len(message) < 1000


# ---- the command --------------------------------------------------------------------------------


def test_a_taken_port_is_told_before_the_model_is_looked_at(tmp_path, capsys):
    with listen(0) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(tmp_path / "no model"), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"--port {port}: " in error and "choose another" in error and "no model" not in error
    # And what it held is free again when the model could not be loaded.
    assert main(["serve", str(tmp_path / "no model"), "--port", str(port)]) != 0
    assert "no model" in capsys.readouterr().err
    listen(port).close()


@pytest.mark.parametrize("port", [-1, 65536])
def test_what_is_no_port_is_refused(port):
    with pytest.raises(UserError, match=f"--port {port}: "):
        listen(port)


@pytest.mark.parametrize(
    ("number", "grace"), [(signal.SIGINT, 60), (signal.SIGINT, 0), (signal.SIGTERM, 0)]
)
def test_the_command_serves_and_stops_on_a_signal(tmp_path, number, grace):
    """Whether or not its last stream ends within the grace."""
    STUDENT.save(tmp_path / "student")
    program = (
        "from xlstm_distill import cli, serve\n"
        f"serve._GRACE_SECONDS = {grace}\n"
        "raise SystemExit(cli.main())"
    )
    command = [sys.executable, "-c", program, "serve", str(tmp_path / "student")]
    package = str(Path(xlstm_distill.__file__).parent.parent)
    process = subprocess.Popen(
        [*command, "--port", "0"],
        env={**os.environ, "PYTHONPATH": package},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = process.stdout.readline()
        address = said.split(" at ")[1].split(";")[0]
        with urllib.request.urlopen(f"{address}/models", timeout=30) as answer:
            (model,) = json.load(answer)["data"]
        assert model["id"] == str(tmp_path / "student")
        body = {"model": model["id"], "prompt": "The", "max_tokens": 400, "n": 64, "stream": True}
        data = json.dumps({**body, "temperature": 0}).encode()
        with urllib.request.urlopen(f"{address}/completions", data, timeout=30) as stream:
            assert stream.readline().startswith(b"data: {")
            process.send_signal(number)  # while somebody listens
            try:
                rest = stream.read()
            except http.client.IncompleteRead as cut:
                rest = cut.partial
        assert b"[DONE]" in rest or grace == 0
        _, errors = process.communicate(timeout=60)
        assert process.returncode == (0 if number == signal.SIGINT else -number), errors
        assert "Traceback" not in errors, errors
    finally:
        process.kill()
