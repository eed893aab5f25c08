"""The server over HTTP, asked by the `openai` client and by those who ask wrongly."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import serve_cases
from retention import cli
from retention.serve import command, models
from retention.serve.app import Limits
from serve_cases import SECONDS, Endless, Scripted, Served, served

NAME = "folder"
CHAT: list[Any] = [{"role": "user", "content": "the quick"}]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    limits = Limits(max_prompt_tokens=500, max_new_tokens=5000, max_body_bytes=20_000)
    model = serve_cases.folder_model()
    model = model._replace(network=Endless(model.network))
    with served(model, limits, slots=8, prefill_tokens=32) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_is_lost(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test."""
    yield
    if "server" in request.fixturenames:
        engine = request.getfixturevalue("server").engine
        assert engine.wait_until_idle(SECONDS)
        assert len(engine._free) == engine.slots


def client_of(server: Served, **more: Any) -> openai.OpenAI:
    return openai.OpenAI(
        **{"base_url": server.url, "api_key": "any", "max_retries": 0, "timeout": SECONDS, **more}
    )


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with client_of(server) as made:
        yield made


def metric(server: Served, name: str) -> float:
    page = httpx.get(f"{server.root}/metrics").text
    return float(re.search(rf"^{re.escape(name)} (\S+)$", page, re.MULTILINE)[1])


# ---- answers ------------------------------------------------------------------------------------


def test_a_completion_and_its_stream(client: openai.OpenAI, server: Served):
    options: dict = {"model": NAME, "prompt": "the quick", "max_tokens": 30, "temperature": 0}
    whole = client.completions.create(**options)
    (choice,) = whole.choices
    assert choice.finish_reason == "length"
    assert len(choice.text) > 5
    assert choice.logprobs is None
    tokens = len(server.engine.model.text.encode("the quick"))
    assert whole.usage.prompt_tokens == tokens
    assert whole.usage.completion_tokens == 30
    assert whole.usage.total_tokens == tokens + whole.usage.completion_tokens
    chunks = list(
        client.completions.create(**options, stream=True, stream_options={"include_usage": True})
    )
    assert len(chunks) > 3
    assert "".join(x.choices[0].text for x in chunks[:-1]) == choice.text
    reasons = [x.choices[0].finish_reason for x in chunks[:-1]]
    assert reasons == [None] * (len(reasons) - 1) + [choice.finish_reason]
    assert all(x.usage is None for x in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({x.id for x in chunks}) == 1
    # Nothing said is 16 tokens.
    assert client.completions.create(model=NAME, prompt="x").usage.completion_tokens == 16


def test_a_chat_and_its_stream(client: openai.OpenAI, server: Served):
    options: dict = {"model": NAME, "messages": CHAT, "max_tokens": 30, "temperature": 0}
    whole = client.chat.completions.create(**options)
    (choice,) = whole.choices
    assert choice.message.role == "assistant"
    chunks = list(client.chat.completions.create(**options, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(x.choices[0].delta.content or "" for x in chunks) == choice.message.content
    assert chunks[-1].choices[0].finish_reason == choice.finish_reason
    assert all(x.usage is None for x in chunks)
    # It is the template's text that is completed.
    text = "<user>the quick</s><assistant>"
    same = client.completions.create(model=NAME, prompt=text, max_tokens=30, temperature=0)
    assert same.choices[0].text == choice.message.content
    assert same.usage == whole.usage
    # An answer goes back as it came; parts are one text.
    parts = [{"type": "text", "text": "the "}, {"type": "text", "text": "quick"}]
    messages = [{"role": "user", "content": parts}, choice.message.model_dump(), *CHAT]
    longer = client.chat.completions.create(**{**options, "messages": messages})
    said = f"<user>the quick</s><assistant>{choice.message.content}</s>{text}"
    assert longer.usage.prompt_tokens == len(server.engine.model.text.encode(said))
    assert client.chat.completions.create(
        model=NAME, messages=CHAT, max_completion_tokens=3, stop="zzz", user="x", tools=[]
    )


def test_a_stream_as_it_is_sent(server: Served):
    body = {"model": NAME, "prompt": "the", "max_tokens": 9, "temperature": 0, "stream": True}
    response = httpx.post(f"{server.url}/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end = response.text.removesuffix("\n\n").split("\n\n")
    assert end == "data: [DONE]"
    assert len(events) > 2
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events)


def test_several_choices(client: openai.OpenAI):
    options: dict = {"model": NAME, "max_tokens": 8, "seed": 11, "temperature": 1}
    whole = client.completions.create(prompt=["the", "fox;"], n=2, **options)
    assert [x.index for x in whole.choices] == [0, 1, 2, 3]
    again = client.completions.create(prompt=["the", "fox;"], n=2, **options, stream=True)
    texts = [""] * 4
    for chunk in again:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [x.text for x in whole.choices]
    assert len(set(texts)) == 4
    for i, prompt in enumerate(("the", "the", "fox;", "fox;")):
        alone = client.completions.create(prompt=prompt, **{**options, "seed": 11 + i})
        assert alone.choices[0].text == texts[i]
    chats = client.chat.completions.create(messages=CHAT, n=3, **options)
    assert len({x.message.content for x in chats.choices}) == 3


def test_prompts_of_tokens(client: openai.OpenAI, server: Served):
    encode = server.engine.model.text.encode
    options: dict = {"model": NAME, "max_tokens": 6, "temperature": 0}
    wanted = client.completions.create(prompt=["the quick", "素早い"], **options)
    tokens = [encode("the quick"), encode("素早い")]
    got = client.completions.create(prompt=tokens, **options)
    assert [x.text for x in got.choices] == [x.text for x in wanted.choices]
    alone = client.completions.create(prompt=tokens[1], **options)
    assert alone.choices[0].text == wanted.choices[1].text


def test_log_probabilities_are_the_models(client: openai.OpenAI, server: Served):
    model = server.engine.model
    options: dict = {"model": NAME, "max_tokens": 12, "temperature": 1.5, "seed": 3}
    text = "<user>the quick</s><assistant>"
    completion = client.completions.create(prompt=text, logprobs=4, **options)
    logprobs = completion.choices[0].logprobs
    ids = torch.tensor([model.text.encode(text)])
    chat = client.chat.completions.create(messages=CHAT, logprobs=True, top_logprobs=2, **options)
    content = chat.choices[0].logprobs.content
    assert len(content) == len(logprobs.tokens)
    assert b"".join(bytes(x.bytes) for x in content).decode(errors="replace") == (
        completion.choices[0].text
    )
    names = {}
    for token in range(model.network.vocabulary):
        part = model.text.token_bytes(token)
        names[part] = token
    with torch.no_grad():
        for place, x in enumerate(content):
            logits = model.network.inner._model(ids, use_cache=False).logits[0, -1]
            logits[0] = Endless.NEVER
            own = logits.log_softmax(-1)
            token = names[bytes(x.bytes)]
            # float32, by sums in another order.
            assert x.logprob == pytest.approx(own[token].item(), abs=1e-4)
            assert logprobs.token_logprobs[place] == x.logprob
            best = own.topk(4)
            assert [names[bytes(y.bytes)] for y in x.top_logprobs] == best.indices[:2].tolist()
            assert [y.logprob for y in x.top_logprobs] == pytest.approx(
                best.values[:2].tolist(), abs=1e-4
            )
            top = logprobs.top_logprobs[place]
            assert len(top) in (4, 5)  # the one chosen is always there
            assert top[logprobs.tokens[place]] == x.logprob
            ids = torch.cat((ids, torch.tensor([[token]])), dim=1)
    streamed = list(client.completions.create(prompt=text, logprobs=4, **options, stream=True))
    parts = [x.choices[0].logprobs for x in streamed if x.choices[0].logprobs]
    assert [token for x in parts for token in x.tokens] == logprobs.tokens
    assert [offset for x in parts for offset in x.text_offset] == logprobs.text_offset
    assert logprobs.text_offset[0] == 0
    assert client.completions.create(prompt=text, logprobs=0, **options).choices[0].logprobs.tokens


def test_stop_strings_and_characters_over_the_borders_of_tokens():
    model = serve_cases.folder_model()
    said = "für die 🦊 素早い"
    script = [*model.text.encode(said), *model.text.ends]
    model = model._replace(network=Scripted(model.network, script))
    with served(model) as server, client_of(server) as client:
        options: dict = {"model": NAME, "prompt": [[5]], "max_tokens": 100, "temperature": 0}
        # Some of its tokens are parts of characters.
        parts = [model.text.token_bytes(token).decode("utf-8", "replace") for token in script]
        assert sum("\N{REPLACEMENT CHARACTER}" in part for part in parts) > 1
        whole = client.completions.create(**options).choices[0]
        assert (whole.text, whole.finish_reason) == (said, "stop")
        chunks = list(client.completions.create(**options, stream=True))
        assert "".join(x.choices[0].text for x in chunks) == said
        assert not any("\N{REPLACEMENT CHARACTER}" in x.choices[0].text for x in chunks)
        for stop, text in (("🦊", "für die "), (["x", " die"], "für"), ("早い", "für die 🦊 素")):
            choice = client.completions.create(**options, stop=stop).choices[0]
            assert (choice.text, choice.finish_reason) == (text, "stop")
            chunks = list(client.completions.create(**options, stop=stop, stream=True))
            assert "".join(x.choices[0].text for x in chunks) == text


def test_models(client: openai.OpenAI):
    assert [x.id for x in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError, match="model: expected 'folder', got 'other'"):
        client.models.retrieve("other")


# ---- many at once -------------------------------------------------------------------------------


def test_64_streams_at_once_some_of_which_are_left(server: Served):
    """Each answer is the one it has alone, and whoever leaves takes nothing along."""
    prompts = ["the quick", "η", "fox; die schöne", "x" * 60, "🦊", "素早い"]
    asked = [
        {
            "prompt": f"{prompts[i % 6]} {i}",
            "max_tokens": 2 + i % 23,
            "temperature": i % 3 / 2,
            "seed": i,
        }
        for i in range(64)
    ]
    leavers = {"model": NAME, "prompt": "the", "max_tokens": 5000, "temperature": 1}
    cancelled = metric(server, 'retention_requests_total{outcome="cancelled"}')

    async def everything() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=server.url, api_key="any", max_retries=0, timeout=SECONDS
        ) as client:

            async def ask(options: dict) -> str:
                stream = await client.completions.create(model=NAME, **options, stream=True)
                return "".join([x.choices[0].text async for x in stream])

            async def leave() -> None:
                stream = await client.completions.create(**leavers, stream=True)
                async for _ in stream:
                    await stream.close()
                    return

            unanswered = [
                asyncio.create_task(client.completions.create(**leavers)) for _ in range(6)
            ]
            while server.engine.load < 6:
                await asyncio.sleep(0.01)
            others = asyncio.gather(*map(ask, asked), *(leave() for _ in range(6)))
            await asyncio.sleep(0.3)
            for task in unanswered:
                assert task.cancel()
            return (await others)[: len(asked)]

    together = asyncio.run(everything())
    assert server.engine.wait_until_idle(SECONDS)
    assert metric(server, 'retention_requests_total{outcome="cancelled"}') == cancelled + 12
    assert metric(server, "retention_slots_in_use") == 0
    assert metric(server, "retention_queue_length") == 0
    with client_of(server) as client:
        for options, got in list(zip(asked, together, strict=True))[::4]:
            alone = client.completions.create(model=NAME, **options)
            assert alone.choices[0].text == got
    assert len(set(together)) > 40


def test_a_full_queue():
    limits = Limits(max_new_tokens=10**6)
    with served(serve_cases.run_model(), limits, slots=1, max_queue=1) as server:
        options: dict = {"model": "run", "prompt": "x", "max_tokens": 10**6}
        with client_of(server) as client:
            running = client.completions.create(**options, stream=True)
            next(iter(running))
            waiting = client.completions.create(**{**options, "max_tokens": 2}, stream=True)
            with pytest.raises(openai.RateLimitError) as error:
                client.completions.create(**options)
            assert error.value.response.headers["retry-after"] == "1"
            assert error.value.code == "queue_full"
            with pytest.raises(openai.BadRequestError, match="n: expected at most 2 choices"):
                client.completions.create(**options, n=3)
            assert metric(server, 'retention_requests_total{outcome="rejected"}') == 1
            running.close()
            assert len(list(waiting)) >= 1
            assert client.completions.create(**{**options, "max_tokens": 3})


def test_a_request_that_fails():
    model = serve_cases.run_model()

    class Failing(serve_cases.Wrapped):
        armed = False

        def step(self, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
            if self.armed and (tokens == ord("!")).any():
                raise RuntimeError("no such product")
            return super().step(tokens, slots)

    network = Failing(model.network)
    with served(model._replace(network=network)) as server, client_of(server) as client:
        network.armed = True
        options: dict = {"model": "run", "max_tokens": 5, "temperature": 0}
        message = "the model failed on this request: RuntimeError: no such product"
        with pytest.raises(openai.InternalServerError, match=message):
            client.completions.create(**options, prompt="x!")
        with pytest.raises(openai.APIError, match=message):
            list(client.completions.create(**options, prompt="x!", stream=True))
        assert client.completions.create(**options, prompt="x")
        assert metric(server, 'retention_requests_total{outcome="failed"}') == 2
        assert metric(server, 'retention_requests_total{outcome="finished"}') == 1


# ---- what is asked wrongly ----------------------------------------------------------------------


def refused(response: httpx.Response, status: int, message: str = "") -> dict:
    """The error of an answer, in OpenAI's form."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "\n" not in error["message"]
    assert error["message"].startswith(message)
    return error


@pytest.mark.parametrize(
    ("path", "body", "status", "message"),
    [
        ("completions", {"prompt": None}, 400, "prompt: expected text"),
        ("completions", {"prompt": []}, 400, "prompt: expected text"),
        ("completions", {"prompt": [1, "x"]}, 400, "prompt: expected text"),
        ("completions", {"prompt": [[1], []]}, 400, "prompt: expected text"),
        ("completions", {"prompt": [True]}, 400, "prompt: expected text"),
        ("completions", {"prompt": [320]}, 400, "prompt: expected tokens of 0 to 319, got 320"),
        ("completions", {"prompt": [-1]}, 400, "prompt: expected tokens of 0 to 319, got -1"),
        ("completions", {"prompt": ""}, 400, "prompt: expected at least one token, got none"),
        ("completions", {"prompt": "x" * 501}, 400, "prompt: expected at most 500 tokens, got "),
        ("completions", {"max_tokens": 0}, 400, "max_tokens: expected greater than or equal to 1"),
        ("completions", {"max_tokens": 5001}, 400, "max_tokens: expected at most 5000, got 5001"),
        ("completions", {"max_tokens": "5"}, 400, "max_tokens: expected a valid integer, got '5'"),
        ("completions", {"max_tokens": True}, 400, "max_tokens: expected a valid integer, got Tr"),
        ("completions", {"temperature": -0.1}, 400, "temperature: expected greater than or equal"),
        ("completions", {"temperature": 2.1}, 400, "temperature: expected less than or equal to"),
        ("completions", {"top_p": 1.1}, 400, "top_p: expected less than or equal to 1, got 1.1"),
        ("completions", {"n": 0}, 400, "n: expected greater than or equal to 1, got 0"),
        ("completions", {"n": 129}, 400, "n: expected less than or equal to 128, got 129"),
        ("completions", {"seed": 1.5}, 400, "seed: expected a valid integer"),
        ("completions", {"stop": ["a", ""]}, 400, "stop: expected a text or a list of at most 16"),
        ("completions", {"stop": ["a"] * 17}, 400, "stop: expected a text or a list of at most 1"),
        ("completions", {"stop": 5}, 400, "stop: expected a text or a list of at most 16"),
        ("completions", {"logprobs": 21}, 400, "logprobs: expected less than or equal to 20"),
        ("completions", {"logprobs": True}, 400, "logprobs: expected a valid integer, got True"),
        ("completions", {"stream": "yes"}, 400, "stream: expected a valid boolean, got 'yes'"),
        ("completions", {"stream_options": {}}, 400, "stream_options: expected with stream = tru"),
        ("completions", {"echo": True}, 400, "echo: not supported here, expected none, got True"),
        ("completions", {"echo": 0}, 400, "echo: not supported here"),
        ("completions", {"suffix": "x"}, 400, "suffix: not supported here"),
        ("completions", {"best_of": 2}, 400, "best_of: not supported here"),
        ("completions", {"logit_bias": {"5": 1}}, 400, "logit_bias: not supported here"),
        ("completions", {"frequency_penalty": 0.5}, 400, "frequency_penalty: not supported here"),
        ("completions", {"nonsense": 1}, 400, "nonsense: not a parameter that is known here"),
        ("completions", {"messages": CHAT}, 400, "messages: not a parameter that is known here"),
        ("completions", {"model": "other"}, 404, "model: expected 'folder', got 'other'"),
        ("completions", {"model": 5}, 400, "model: expected a valid string, got 5"),
        ("chat/completions", {"messages": []}, 400, "messages: List should have at least 1 item"),
        ("chat/completions", {"messages": "hi"}, 400, "messages: expected a valid list, got 'hi'"),
        ("chat/completions", {"messages": [{}]}, 400, "messages.0.role: expected, and missing"),
        ("chat/completions", {"tools": [{}]}, 400, "tools: not supported here"),
        ("chat/completions", {"tool_choice": "auto"}, 400, "tool_choice: not supported here"),
        ("chat/completions", {"response_format": {"type": "json_object"}}, 400, "response_format"),
        ("chat/completions", {"top_logprobs": 3}, 400, "top_logprobs: expected with logprobs = tr"),
        ("chat/completions", {"logprobs": 3}, 400, "logprobs: expected a valid boolean, got 3"),
        (
            "chat/completions",
            {"messages": [{"role": "tool", "content": "x"}]},
            400,
            "messages.0.role: expected 'system', 'developer', 'user' or 'assistant', got 'tool'",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "messages.0.content: expected text, or a list of parts of type 'text', got",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "developer", "content": "x"}]},
            400,
            "messages: the model's chat template refuses them: no developers here",
        ),
        (
            "chat/completions",
            {"max_completion_tokens": 5001},
            400,
            "max_completion_tokens: expected at most 5000, got 5001",
        ),
    ],
)
def test_bad_requests(server: Served, path: str, body: dict, status: int, message: str):
    invalid = metric(server, 'retention_requests_total{outcome="invalid"}')
    good = {"prompt": "x"} if path == "completions" else {"messages": CHAT}
    response = httpx.post(f"{server.url}/{path}", json={"model": NAME, **good, **body})
    error = refused(response, status, message)
    if error["code"] != "unknown" and message.partition(":")[0] in body:
        assert error["param"] == message.partition(":")[0].partition(".")[0]
    assert metric(server, 'retention_requests_total{outcome="invalid"}') == invalid + 1


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
FIELDS = [
    *("model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "seed", "stop"),
    *("stream", "stream_options", "logprobs", "top_logprobs", "tools", "echo", "user"),
]


@settings(
    deadline=None, max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    path=st.sampled_from(["completions", "chat/completions"]),
    body=st.dictionaries(st.sampled_from(FIELDS) | st.text(), json_values, max_size=4),
    complete=st.booleans(),
)
def test_any_body_has_an_answer(server: Served, path: str, body: dict, complete: bool):
    """A good one, or one that says what is wrong: never an error of the server's own."""
    if complete:
        good = {"prompt": "x"} if path == "completions" else {"messages": CHAT}
        body = {"model": NAME, "max_tokens": 2, **good, **body}
    response = httpx.post(
        f"{server.url}/{path}",
        content=json.dumps(body).encode(),
        headers={"content-type": "application/json"},
        timeout=SECONDS,
    )
    if response.status_code != 200:
        assert response.status_code in (400, 404)
        refused(response, response.status_code)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (b"", "application/json", "body: expected, and missing"),
        (b"{", "application/json", "body: expected JSON"),
        (b"[]", "application/json", "body: expected a JSON object, got []"),
        (b"5", "application/json", "body: expected a JSON object, got 5"),
        (b'{"model": "\xff"}', "application/json", "There was an error parsing the body"),
        (b"[" * 15_000, "application/json", "There was an error parsing the body"),
        (b"{}", "text/plain", "body: expected a JSON object, got b'{}'"),
        (b'{"model": "\\ud800", "prompt": "x"}', "application/json", "body: expected text of w"),
        (b'{"model": "folder", "prompt": "\\ud800"}', "application/json", "body: exp"),
        (b'{"model": "folder", "prompt": "x", "\\ud800": 1}', "application/json", "body: exp"),
        (b'{"model": "folder", "prompt": "x", "temperature": NaN}', "application/json", "tempera"),
        (
            b'{"model": "folder", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
            "application/json",
            "",
        ),
    ],
)
def test_bodies_that_are_none(server: Served, content: bytes, kind: str, message: str):
    response = httpx.post(
        f"{server.url}/completions", content=content, headers={"content-type": kind}
    )
    refused(response, 400, message)


def test_other_paths_and_methods(server: Served):
    error = refused(httpx.get(f"{server.root}/v2/none"), 404, "no such path: '/v2/none'")
    assert error["code"] == "not_found"
    refused(httpx.get(f"{server.url}/completions"), 405)


def test_bodies_beyond_the_limit(server: Served):
    url = f"{server.url}/completions"
    body = json.dumps({"model": NAME, "prompt": "x" * 20_000}).encode()
    pieces = (body[i : i + 1000] for i in range(0, len(body), 1000))
    # One whose size is known is refused before it is read.
    for content, got in ((body, str(len(body))), (pieces, "more")):
        headers = {"content-type": "application/json"}
        error = refused(httpx.post(url, content=content, headers=headers), 413)
        assert error["message"] == f"body: expected at most 20000 bytes, got {got}"


def test_a_key():
    with served(serve_cases.run_model(), Limits(api_key="sesame")) as server:
        with client_of(server, api_key="sesame") as client:
            assert client.completions.create(model="run", prompt="x", max_tokens=1)
        for key in ("Sesame", "sesam", "sesame!", "x"):
            with client_of(server, api_key=key) as client:
                for ask in (
                    client.models.list,
                    lambda: client.completions.create(model="run", prompt="x"),
                ):
                    with pytest.raises(openai.AuthenticationError, match="api_key: expected"):
                        ask()
        for headers in ({}, {"Authorization": "Basic sesame"}, {"Authorization": "sesame"}):
            error = refused(httpx.get(f"{server.url}/models", headers=headers), 401)
            assert error["code"] == "invalid_api_key"
        # Whoever watches the server has none.
        assert httpx.get(f"{server.root}/health").json() == {"status": "ok"}
        assert "retention_slots 4.0" in httpx.get(f"{server.root}/metrics").text


# ---- the command --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `retention train`, for a step."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "text.py").write_bytes(b"def f(x):\n    return x\n" * 200)
    sizes = "--layers 1 --hidden-size 32 --heads 2 --device cpu --steps 1 --batch-size 2"
    few = "--block-size 16 --warmup 1 --eval-every 1 --eval-blocks 1 --checkpoint-every 1"
    data = ["--data", str(folder / "text.py"), "--out", str(folder / "tiny")]
    assert cli.main(["train", *sizes.split(), *few.split(), *data]) == 0
    return folder / "tiny"


class Process:
    """`retention serve` as a process of its own."""

    def __init__(self, run: Path, *options: str, **environment: str):
        start = [sys.executable, "-m", "retention.cli", "serve", "--model", str(run)]
        self.process = subprocess.Popen(
            [*start, "--port", "0", "--device", "cpu", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.said = self.process.stdout.readline()
        self.root = re.search(r"http://\S+(?=:)", self.said)[0]

    def ended(self) -> tuple[int, str]:
        """Exit code and standard error."""
        _, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, err


@pytest.fixture
def start(run: Path) -> Iterator[Callable[..., Process]]:
    made = []

    def begin(*options: str, **environment: str) -> Process:
        made.append(Process(run, *options, **environment))
        return made[-1]

    yield begin
    for process in made:
        process.process.kill()
        process.process.communicate()


def test_sigterm_under_load(start: Callable[..., Process]):
    """What runs and what waits is finished, and nothing else is begun."""
    process = start("--slots", "4", "--served-model-name", "tiny!", RETENTION_API_KEY="sesame")
    assert re.fullmatch(
        r"tiny! on http://127\.0\.0\.1:\d+: 4 slots of [\d,]+ bytes on cpu, batches of [\d, ]*4\n",
        process.said,
    )
    options: dict = {"model": "tiny!", "prompt": "def f", "temperature": 0, "stream": True}
    with openai.OpenAI(
        base_url=f"{process.root}/v1", api_key="sesame", max_retries=0, timeout=SECONDS
    ) as client:
        # The server cannot end while this one is read, however slow the others are to begin.
        long = client.completions.create(**options, max_tokens=4000)
        streams = [client.completions.create(**options, max_tokens=150) for _ in range(8)]
        texts = [""] * 8

        def read(i: int) -> None:
            texts[i] = "".join(x.choices[0].text for x in streams[i])

        threads = [threading.Thread(target=read, args=(i,)) for i in range(8)]
        process.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + SECONDS
        while httpx.get(f"{process.root}/health").status_code != 503:
            assert time.monotonic() < deadline
        with pytest.raises(openai.InternalServerError, match="the server is shutting down") as e:
            client.completions.create(**options, max_tokens=1)
        assert e.value.status_code == 503
        long.close()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(texts)) == 1
    assert len(texts[0].encode()) >= 100
    code, err = process.ended()
    assert code == 0
    assert re.fullmatch(r"retention serve: finishing \d answers, for at most 30 seconds\n", err)


def test_answers_that_take_too_long_are_cut_off(run: Path, monkeypatch, capsys):
    more = ["--shutdown-seconds", "0.3", "--max-new-tokens", "10000000", "--slots", "1"]
    running = serve_cases.Running(["serve", "--model", str(run), *more], monkeypatch)
    url = f"{running.url}/v1/completions"
    body = {"model": "tiny", "prompt": "x", "max_tokens": 10**7, "stream": True, "temperature": 0}
    with httpx.stream("POST", url, json=body, timeout=SECONDS) as response:
        lines = response.iter_lines()
        next(lines)
        ending = threading.Thread(target=running.end, daemon=True)  # as a signal does
        ending.start()
        deadline = time.monotonic() + SECONDS
        *_, error, end = (line for line in lines if line and time.monotonic() < deadline)
    assert json.loads(error.removeprefix("data: "))["error"]["message"] == (
        "the server is shutting down"
    )
    assert end == "data: [DONE]"
    ending.join()
    assert running.code == 0
    assert capsys.readouterr().err.splitlines() == [
        "retention serve: finishing 1 answers, for at most 0.3 seconds",
        "retention serve: 1 answers are cut off",
    ]


def test_without_an_engine_there_is_no_server(monkeypatch: pytest.MonkeyPatch, capsys):
    """The process ends, for what keeps it running to start it anew."""

    class Gone(serve_cases.Wrapped):
        armed = False

        def step(self, tokens: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
            if self.armed:
                raise torch.AcceleratorError("no such device")
            return super().step(tokens, slots)

    model = serve_cases.run_model()
    network = Gone(model.network)
    monkeypatch.setattr(models, "load", lambda *_: model._replace(network=network))
    running = serve_cases.Running(["serve", "--slots", "2"], monkeypatch)
    network.armed = True
    message = "the engine has failed: AcceleratorError: no such device"
    with openai.OpenAI(base_url=f"{running.url}/v1", api_key="any", max_retries=0) as client:
        with pytest.raises(openai.InternalServerError, match=message) as error:
            client.completions.create(model="run", prompt="x")
        assert error.value.status_code == 503
    running.thread.join(SECONDS)
    assert not running.thread.is_alive()
    assert running.code == 1
    assert capsys.readouterr().err.endswith(f"retention serve: error: {message}\n")


def fails(capsys: pytest.CaptureFixture[str], *options: object) -> str:
    """What `retention serve` says in one line, with exit code 2."""
    try:
        code = cli.main(["serve", *map(str, options)])
    except SystemExit as end:
        code = end.code
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, "")
    assert captured.err.count("\n") == 1
    return captured.err


def test_what_cannot_be_served(run: Path, tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "nonsense"}')
    start = "retention serve: error: "
    cpu = ["--device", "cpu", "--port", 0]
    for options, message in (
        (["--model", tmp_path / "none"], f"--model: {tmp_path / 'none'}: no such folder\n"),
        (["--model", tmp_path / "file"], f"--model: {tmp_path / 'file'}: is not a folder\n"),
        (["--model", tmp_path / "empty"], "--model: "),
        (["--model", tmp_path / "other"], f"--model: {tmp_path / 'other'}: "),
        (["--model", run, "--host", "256.0.0.1"], "--host, --port: cannot bind 256.0.0.1:0: "),
        (["--model", run, "--device", "cuda:77"], "--device: 'cuda:77' is not available here"),
        (["--model", run, "--api-key", " x"], "--api-key: expected a key of ASCII, without"),
        (["--model", run, "--api-key", ""], "--api-key: expected a key of ASCII, without"),
        (["--port", "65536"], "argument --port: expected an integer from 0 to 65535, got '65536'"),
        (["--slots", 0], "argument --slots: expected a positive integer, got '0'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ):
        assert fails(capsys, *cpu, *options).startswith(start + message)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = fails(capsys, "--model", run, "--device", "cpu", "--port", port)
        message = f"--host, --port: cannot bind 127.0.0.1:{port}: Address already in use\n"
        assert said == start + message
    monkeypatch.setenv(command.API_KEY, "ключ")
    assert "RETENTION_API_KEY: expected a key" in fails(capsys, *cpu, "--model", run)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert fails(capsys, *cpu) == (
        f"{start}needs uvicorn, not installed here: pip install 'power-retention[serve]'\n"
    )


def test_folders_of_both_kinds(run: Path, tmp_path: Path):
    cpu = torch.device("cpu")
    said: list[str] = []

    def load(path: Path, dtype: str | None = None, name: str | None = None) -> Any:
        return models.load(path, cpu, dtype, torch.float32, name, said.append)

    folder = serve_cases.make_folder(tmp_path / "coder", torch.bfloat16)
    for model, name, dtype in (
        (load(run), "tiny", torch.float32),
        (load(run, "bfloat16", "small"), "small", torch.bfloat16),
        (load(folder), "coder", torch.bfloat16),
        (load(folder, "float32"), "coder", torch.float32),
    ):
        assert model.name == name
        model.network.allocate(2)
        assert {memory.dtype for memory in model.network.memories} == {dtype}
        with serve_cases.engine_of(model, slots=2, batch_invariance=False) as engine:
            waiting = serve_cases.Waiting(engine, "the quick", max_tokens=5)
            assert isinstance(waiting.end(), serve_cases.Done)
    assert model.text.ends == {0}
    assert not said


def test_slots_from_free_memory(monkeypatch: pytest.MonkeyPatch):
    """As on a GPU: a share of what is free, however much a slot takes."""
    model = serve_cases.run_model()
    assert command._slots(model.network) == 16
    monkeypatch.setattr(model.network, "device", torch.device("cuda", 0))
    each = model.network.slot_bytes()
    for slots in (1, 7, 255, 256, 300):
        free = int(each * slots / command._SHARE_FOR_SLOTS) + 8
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 2 * free))
        assert command._slots(model.network) == min(slots, 256)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (each, 2 * each))
    with pytest.raises(command.UsageError, match=f"and one takes {each:,}; name a number"):
        command._slots(model.network)


def test_an_open_address_without_a_key_is_said(capsys):
    lines: list[str] = []
    for host, key, count in (
        ("127.0.0.1", None, 0),
        ("::1", None, 0),
        ("localhost", None, 0),
        ("0.0.0.0", "x", 0),
        ("0.0.0.0", None, 1),
        ("example.org", None, 1),
    ):
        lines.clear()
        command._warn(host, Limits(api_key=key), lines.append)
        assert len(lines) == count
