"""An OpenAI-compatible server on loopback: `/v1/models`, `/v1/completions`, `/v1/chat/completions`.

All requests are continued in one batch (`generate.Batch`): their rows join it between two steps and
leave it when they end or when their client goes away. What it holds is bounded: the bytes of a
request, the tokens of a row (the model's context), the rows of the batch, the memory of their
states, and those that wait.
This is the one module that imports starlette and uvicorn (the extra `serve`).
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import json
import secrets
import socket
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, cast

import uvicorn
from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .errors import UserError, validated
from .generate import Batch, Row, Scored, StopStrings, random_stream
from .model import Model, state_nbytes
from .tokenizer import Tokenizer

HOST = "127.0.0.1"
MAX_ROWS = 64
MAX_WAITING = 256
MAX_STATE = 4 << 30
"""Most bytes of the states of all rows (one row is always served); joining takes a copy more."""
_MAX_BODY = 4 << 20
"""Most bytes of a request."""
_MAX_TOP = 20
"""Most alternatives of a token, as in OpenAI's API."""
_MAX_STOPS = 16
_MAX_N = 128
"""Most choices of a prompt, as in OpenAI's API."""
_TOKENS_AT_ONCE = 8192
"""Most tokens, padding counted, of the prompts that join at once: bounds activations, and how long
running rows wait."""
_CHAT_TOKENS = 1024
"""Most tokens of a chat's answer that names no number: room is kept for all of them."""
_GRACE_SECONDS = 3
"""How long open requests may take after Ctrl-C."""

Json = dict[str, Any]


class _RefusedError(Exception):
    """A request that is not served: the status, and one line that says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(" ".join(message.split()))
        self.status = status


# ---- the batch ----------------------------------------------------------------------------------


class Job:
    """The rows of one request. `changed` is set after every step; `failure` is an error of ours."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.changed = asyncio.Event()
        self.failure: str | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.failure is not None or all(row.reason is not None for row in self.rows)


class Engine:
    """One batch for all jobs. Its methods are called in the event loop; only the batch's own work
    is done in another thread, one call at a time."""

    def __init__(self, model: Model, max_rows: int, max_waiting: int, max_state: int) -> None:
        self.model, self.max_rows, self.max_waiting = model, max_rows, max_waiting
        self.max_state = max_state
        self.batch = Batch(model)
        self.waiting: deque[Row] = deque()
        self.jobs: set[Job] = set()
        self._work = asyncio.Event()

    def enter(self, job: Job) -> None:
        """Let the rows of a job wait for their place; _RefusedError if too many wait."""
        if len(self.waiting) + len(job.rows) > self.max_waiting:
            raise _RefusedError(429, f"{len(self.waiting)} prompts wait already; try again later")
        self.waiting.extend(job.rows)
        self.jobs.add(job)
        self._work.set()

    def leave(self, job: Job) -> None:
        """Nobody wants more of a job: rows that still run end, their states are freed."""
        self.jobs.discard(job)
        for row in job.rows:
            if row.reason is None:
                row.reason = "left"
        self.waiting = deque(row for row in self.waiting if row.reason is None)
        self._work.set()

    async def run(self) -> None:
        """Steps, and rows that join between them, until cancelled."""
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "batch") as thread:
            while True:
                if not self.waiting and not self.batch.rows:
                    self._work.clear()
                    await self._work.wait()
                joining = self._admitted()
                try:
                    if joining:
                        await loop.run_in_executor(thread, self.batch.join, joining)
                    await loop.run_in_executor(thread, self.batch.step)
                except Exception as error:  # of one batch: later ones are served
                    self._fail(joining, f"{type(error).__name__}: {error}")
                for job in self.jobs:
                    job.changed.set()

    def _admitted(self) -> list[Row]:
        """Waiting rows that join now: as many as fit, first come, first served."""
        running = self.batch.running
        rows: list[Row] = []
        while self.waiting:
            more = [*rows, self.waiting[0]]
            together = [*running, *more]
            longest = max(len(row.prompt) for row in more)
            if rows and longest * len(more) > _TOKENS_AT_ONCE:
                break
            # Room for all that they may write: a state that has joined is never turned away.
            tokens = max(len(row.prompt) + row.max_new_tokens for row in together)
            too_large = state_nbytes(self.model.config, tokens, len(together)) > self.max_state
            if len(together) > self.max_rows or (len(together) > 1 and too_large):
                break
            rows.append(self.waiting.popleft())
        return rows

    def _fail(self, joining: Sequence[Row], message: str) -> None:
        lost = {*joining, *self.batch.running}
        self.batch = Batch(self.model)
        for job in self.jobs:
            if not lost.isdisjoint(job.rows):
                job.failure = " ".join(message.split())


# ---- requests -----------------------------------------------------------------------------------


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


_NEUTRAL: Json = {
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "logit_bias": {},
    "response_format": {"type": "text"},
    "store": False,
    "suffix": "",
    "tools": [],
    "tool_choice": "none",
}
"""Of keys that are not served: the value that changes nothing."""


class _Wanted(BaseModel):
    """What both kinds of request may say."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    model: str
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0)
    top_p: float = Field(1.0, gt=0, le=1)
    stop: str | list[str] = Field([], max_length=1 << 10)
    seed: int | None = Field(None, ge=0, lt=1 << 63)
    stream: bool = False
    stream_options: _StreamOptions = _StreamOptions()
    n: int = Field(1, ge=1, le=_MAX_N)
    # The rest decides nothing here.
    metadata: dict[str, Any] = {}
    parallel_tool_calls: bool = True
    service_tier: str = ""
    user: str = ""
    presence_penalty: Any = None
    frequency_penalty: Any = None
    logit_bias: Any = None
    response_format: Any = None
    store: Any = None
    suffix: Any = None
    tools: Any = None
    tool_choice: Any = None

    @field_validator(*_NEUTRAL)
    @classmethod
    def _changes_nothing(cls, value: Any, about: ValidationInfo) -> Any:
        neutral = _NEUTRAL[cast(str, about.field_name)]
        if value != neutral:
            raise ValueError(f"only {json.dumps(neutral)} is served")
        return value

    def stops(self) -> list[str]:
        """Strings that end a text."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stops) > _MAX_STOPS:
            raise UserError(f"stop: {len(stops)} strings, at most {_MAX_STOPS} are served")
        return [stop for stop in stops if stop]


class CompletionRequest(_Wanted):
    """The body of `/v1/completions`."""

    prompt: Any
    echo: bool = False
    logprobs: int | None = Field(None, ge=0, le=_MAX_TOP)
    best_of: int | None = None

    @model_validator(mode="after")
    def _picks_none(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError(
                f"best_of: {self.best_of} with n {self.n}: all choices that are written are told, "
                "best_of must equal n"
            )
        return self

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of each prompt: of a text, of tokens, or of a list of either."""
        given = self.prompt
        if isinstance(given, str) or (isinstance(given, list) and all(map(_is_token, given))):
            given = [given]
        if not isinstance(given, list) or not given:
            raise UserError("prompt: expected a string, token ids, or a list of either")
        if len(given) * self.n > MAX_WAITING:
            raise UserError(
                f"prompt: {len(given)} prompts with n {self.n}, at most {MAX_WAITING} choices of a "
                "request are served"
            )
        return [self._ids(prompt, tokenizer) for prompt in given]

    @staticmethod
    def _ids(prompt: Any, tokenizer: Tokenizer) -> list[int]:
        if isinstance(prompt, str):
            return tokenizer.encode_prompt(prompt) or [tokenizer.start_id]
        if not isinstance(prompt, list) or not prompt or not all(map(_is_token, prompt)):
            raise UserError("prompt: expected a string or a list of token ids that is not empty")
        return prompt

    @property
    def scores_top(self) -> int | None:
        """Alternatives of every token; None: no log-probabilities."""
        return self.logprobs


class _Message(BaseModel):
    """A turn of a chat; what else it says is for the model's template."""

    model_config = ConfigDict(extra="allow", strict=True)
    role: str
    content: Any


class ChatRequest(_Wanted):
    """The body of `/v1/chat/completions`."""

    messages: list[_Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=_MAX_TOP)
    echo: Literal[False] = False  # known to completions alone

    def prompts(self, tokenizer: Tokenizer) -> list[list[int]]:
        """Token ids of the chat up to where the answer begins."""
        messages = [message.model_dump() for message in self.messages]
        text = tokenizer.apply_chat_template(messages)
        return [tokenizer.encode(text) or [tokenizer.start_id]]

    @property
    def scores_top(self) -> int | None:
        """As for completions."""
        return self.top_logprobs if self.logprobs else None


def _is_token(value: Any) -> bool:
    return type(value) is int


# ---- answers ------------------------------------------------------------------------------------


class _Choice:
    """One row on its way to the client: what it is, and how much of it was sent."""

    def __init__(self, index: int, row: Row, tokenizer: Tokenizer, stops: StopStrings) -> None:
        self.index, self.row = index, row
        self._tokenizer, self._stops = tokenizer, stops
        self._prompt = tokenizer.decode(row.prompt) if row.echo else ""
        self._sent = self._scored = self._offset = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.begun = self.over = False

    def news(self) -> tuple[str, list[Scored], str | None]:
        """Text and scored tokens that were not told yet, and at the end the reason."""
        reason = self.row.reason  # looked at first: what comes later is told later
        scored = self.row.scored[self._scored :]
        text = self._stops.cut(self._tokenizer.decode(self.row.new))
        text = self._prompt + (self._stops.settled(text) if reason is None else text)
        new = text[self._sent :]
        self._sent, self._scored = len(text), self._scored + len(scored)
        self.begun, self.over = True, bool(reason)
        return new, scored, reason

    def completion_logprobs(self, scored: Sequence[Scored]) -> Json:
        """Log-probabilities as `/v1/completions` has them."""
        out: Json = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, logp, top in scored:
            out["tokens"].append(_spelling(self._tokenizer, token))
            out["token_logprobs"].append(logp)
            best = {_spelling(self._tokenizer, t): p for t, p in reversed(top)}
            out["top_logprobs"].append(None if logp is None else best)
            out["text_offset"].append(self._offset)
            self._offset += len(self._decoder.decode(self._tokenizer.decode_bytes([token])))
        return out

    def chat_logprobs(self, scored: Sequence[Scored]) -> Json:
        """Log-probabilities as `/v1/chat/completions` has them."""

        def entry(token: int, logp: float | None) -> Json:
            piece = self._tokenizer.decode_bytes([token])
            text = piece.decode("utf-8", errors="replace")
            return {"token": text, "logprob": logp, "bytes": list(piece)}

        content = [
            {**entry(s.token, s.logp), "top_logprobs": [entry(*t) for t in s.top]} for s in scored
        ]
        return {"content": content}


def _spelling(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that is a part of a character only, by its bytes, as OpenAI does."""
    piece = tokenizer.decode_bytes([token])
    try:
        return piece.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


class _Answer:
    """A job in OpenAI's words, at once or in pieces; `n` of its rows, side by side, have one
    prompt."""

    def __init__(self, chat: bool, name: str, job: Job, choices: list[_Choice], n: int) -> None:
        self.job, self.choices, self._n = job, choices, n
        self._chat, self._scores = chat, job.rows[0].scores_top is not None
        self._id = f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}"
        self._facts = {"created": int(time.time()), "model": name}

    def whole(self) -> Json:
        """The answer of a job that has ended."""
        choices = [self._choice(choice, "message") for choice in self.choices]
        return {**self._head(""), "choices": choices, "usage": self._usage()}

    async def events(self, with_usage: bool) -> AsyncIterator[str]:
        """The answer in server-sent events, as it is made."""
        while not all(choice.over for choice in self.choices):
            await self.job.changed.wait()
            self.job.changed.clear()
            if self.job.failure is not None:
                yield _event(_error(500, self.job.failure))
                return
            for choice in self.choices:
                if not choice.over:
                    piece = self._choice(choice, "delta")
                    yield _event({**self._head(".chunk"), "choices": [piece]})
        if with_usage:
            yield _event({**self._head(".chunk"), "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _head(self, piece: str) -> Json:
        kind = f"chat.completion{piece}" if self._chat else "text_completion"
        return {"id": self._id, "object": kind, **self._facts}

    def _choice(self, choice: _Choice, message: str) -> Json:
        # Clients put pieces together by appending strings: who speaks is said once.
        speaker = {} if choice.begun else {"role": "assistant"}
        text, scored, reason = choice.news()
        found: Json = {"index": choice.index, "finish_reason": reason, "logprobs": None}
        if self._chat:
            found[message] = {**speaker, "content": text}
        else:
            found["text"] = text
        if self._scores:
            words = choice.chat_logprobs if self._chat else choice.completion_logprobs
            found["logprobs"] = words(scored)
        return found

    def _usage(self) -> Json:
        read = sum(len(row.prompt) for row in self.job.rows[:: self._n])
        new = sum(len(row.new) for row in self.job.rows)
        return {"prompt_tokens": read, "completion_tokens": new, "total_tokens": read + new}


def _event(content: Json) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _error(status: int, message: str) -> Json:
    kinds = {429: "rate_limit_error", 500: "server_error"}
    kind = kinds.get(status, "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


class _Events(StreamingResponse):
    """A stream whose end is told, whoever ends it."""

    def __init__(self, content: AsyncIterator[str], at_end: Callable[[], None]) -> None:
        super().__init__(content, media_type="text/event-stream")
        self._at_end = at_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._at_end()


# ---- the application ----------------------------------------------------------------------------


class Server:
    """The routes, and the engine behind them."""

    def __init__(
        self,
        model: Model,
        name: str,
        max_rows: int = MAX_ROWS,
        max_waiting: int = MAX_WAITING,
        max_state: int = MAX_STATE,
    ) -> None:
        if model.tokenizer is None:
            raise UserError(f"{name}: holds no tokenizer; a server needs one")
        self.model, self.name, self.tokenizer = model, name, model.tokenizer
        self.engine = Engine(model, max_rows, max_waiting, max_state)
        self._started = int(time.time())
        self.app = Starlette(
            routes=[
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._one_model),
                Route("/v1/completions", self._completions, methods=["POST"]),
                Route("/v1/chat/completions", self._chat, methods=["POST"]),
            ],
            # A page of another site that is open in a browser reaches loopback, by its own name.
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])],
            exception_handlers={
                _RefusedError: _refusal,
                UserError: _refusal,
                HTTPException: _refusal,
                ClientDisconnect: _refusal,
            },
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Starlette) -> AsyncIterator[None]:
        work = asyncio.create_task(self.engine.run())
        yield
        work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work

    def _facts(self) -> Json:
        facts = {"object": "model", "created": self._started, "owned_by": "xlstm_distill"}
        return {"id": self.name, **facts}

    async def _models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._facts()]})

    async def _one_model(self, request: Request) -> Response:
        self._is_served(request.path_params["model"])
        return JSONResponse(self._facts())

    def _is_served(self, model: str) -> None:
        if model != self.name:
            raise _RefusedError(404, f"model {model!r} is not served here; {self.name!r} is")

    async def _completions(self, request: Request) -> Response:
        wanted = validated(CompletionRequest, await _body(request), "request")
        return await self._answer(
            request, wanted, 16 if wanted.max_tokens is None else wanted.max_tokens
        )

    async def _chat(self, request: Request) -> Response:
        wanted = validated(ChatRequest, await _body(request), "request")
        return await self._answer(
            request, wanted, wanted.max_completion_tokens or wanted.max_tokens
        )

    async def _answer(
        self, request: Request, wanted: CompletionRequest | ChatRequest, new: int | None
    ) -> Response:
        self._is_served(wanted.model)
        stops = StopStrings(self.tokenizer, wanted.stops())
        seed = secrets.randbits(63) if wanted.seed is None else wanted.seed
        prompts = [p for p in wanted.prompts(self.tokenizer) for _ in range(wanted.n)]
        rows = [
            Row(
                prompt,
                self._room(prompt, new),
                random_stream(seed, index),
                wanted.temperature,
                wanted.top_p,
                self.model.config.eos_token_ids,
                stops.reached,
                wanted.scores_top,
                wanted.echo,
            )
            for index, prompt in enumerate(prompts)
        ]
        choices = [_Choice(i, row, self.tokenizer, stops) for i, row in enumerate(rows)]
        job = Job(rows)
        answer = _Answer(isinstance(wanted, ChatRequest), self.name, job, choices, wanted.n)
        self.engine.enter(job)
        if wanted.stream:
            events = answer.events(wanted.stream_options.include_usage)
            return _Events(events, lambda: self.engine.leave(job))
        watch = asyncio.create_task(self._leave_with(request, job))
        try:
            while not job.ended:
                await job.changed.wait()
                job.changed.clear()
        finally:
            watch.cancel()
            self.engine.leave(job)
        if job.failure is not None:
            raise _RefusedError(500, job.failure)
        return JSONResponse(answer.whole())

    def _room(self, prompt: Sequence[int], new: int | None) -> int:
        """Tokens that may be written behind a prompt: `new`, or what the context leaves."""
        config = self.model.config
        vocabulary, context = config.vocab_size, config.max_position_embeddings
        if not all(0 <= token < vocabulary for token in prompt):
            raise UserError(f"prompt: token ids are 0..{vocabulary - 1}")
        if len(prompt) + (1 if new is None else new) > context:
            asked = "an answer" if new is None else f"{new} new ones"
            raise UserError(
                f"prompt: {len(prompt)} tokens and {asked} are more than the context of {context}"
            )
        return min(_CHAT_TOKENS, context - len(prompt)) if new is None else new

    async def _leave_with(self, request: Request, job: Job) -> None:
        """End a job when its client goes away."""
        while (await request.receive())["type"] != "http.disconnect":
            pass
        self.engine.leave(job)
        job.changed.set()


async def _body(request: Request) -> Json:
    """The JSON object that a request holds; null is as good as nothing."""
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > _MAX_BODY:
            raise _RefusedError(413, f"request: more than {_MAX_BODY} bytes")
    try:
        body = json.loads(bytes(data))
    except (ValueError, RecursionError) as error:
        raise _RefusedError(400, f"request: not valid JSON ({error})") from None
    if not isinstance(body, dict):
        raise _RefusedError(400, "request: expected a JSON object")
    return {key: value for key, value in body.items() if value is not None}


async def _refusal(_request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):  # an unknown path, a wrong method
        return JSONResponse(_error(error.status_code, error.detail), error.status_code)
    status = error.status if isinstance(error, _RefusedError) else 400
    return JSONResponse(_error(status, str(error)), status)


def listen(port: int) -> socket.socket:
    """A socket that holds a port on loopback; 0 takes a free one. Who calls before `serve` runs
    waits. Raises UserError where the port is taken or none."""
    try:
        return socket.create_server((HOST, port))
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: {error}; choose another", usage=True) from None


def _until_cancelled(app: ASGIApp) -> ASGIApp:
    """`app`, of which a request that is cancelled just ends: those that outlive the server's grace
    are, and uvicorn would print a traceback for each."""

    async def ended(scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await app(scope, receive, send)

    return ended


def serve(
    model: Model,
    name: str,
    listening: socket.socket,
    max_rows: int = MAX_ROWS,
    ready: Callable[[str], None] = print,
) -> str:
    """Serve until Ctrl-C on a socket of `listen`, which the caller closes. `ready` hears the
    address, which is returned in the end."""
    server = Server(model, name, max_rows)
    address = f"http://{HOST}:{listening.getsockname()[1]}/v1"
    ready(address)
    config = uvicorn.Config(
        _until_cancelled(server.app),
        log_level="warning",
        timeout_graceful_shutdown=_GRACE_SECONDS,
    )
    with contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listening])
    return address
