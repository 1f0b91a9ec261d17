"""OpenAI's HTTP API over a `Service`: completions, chat, models; and sessions."""

from __future__ import annotations

import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from atlas_blocks.recipes.sampling import Sampling
from atlas_blocks.recipes.serving import protocol
from atlas_blocks.recipes.serving.protocol import ChatRequest, CompletionRequest, Refused, parse
from atlas_blocks.recipes.serving.service import (
    Asking,
    Closed,
    Disconnected,
    Failed,
    Prompt,
    Service,
)
from atlas_blocks.recipes.serving.sessions import NONE, InUse, Session, Sessions

MAX_TOKENS = 256  # where a request does not say


def create_app(service: Service) -> FastAPI:
    """The application; the service starts and stops with it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    app = FastAPI(title=f"atlas-blocks: {service.name}", lifespan=lifespan)
    began = int(time.time())

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        line = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(protocol.error_body(error.status_code, line), error.status_code)

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if not service.alive:
            raise Refused(503, None, "health: the engine has stopped")
        engine = service.engine
        waiting = len(engine.waiting) + len(engine.reading)
        return {"status": "ok", "running": len(engine.sequences), "waiting": waiting}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {
            "id": service.name,
            "object": "model",
            "created": began,
            "owned_by": "atlas-blocks",
        }
        return {"object": "list", "data": [model]}

    @app.post("/v1/completions", openapi_extra=_body(CompletionRequest))
    async def completions(request: Request) -> Response:
        asked = parse(CompletionRequest, await request.body())
        return await _answered(service, asked, request)

    @app.post("/v1/chat/completions", openapi_extra=_body(ChatRequest))
    async def chat_completions(request: Request) -> Response:
        asked = parse(ChatRequest, await request.body())
        return await _answered(service, asked, request)

    @app.get("/v1/sessions")
    async def sessions() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name} for name in _sessions(service).names()]}

    @app.delete("/v1/sessions/{name}")
    async def delete(name: str) -> dict[str, Any]:
        try:
            there = _sessions(service).delete(name)
        except ValueError as error:
            raise _of_session(error) from error
        if not there:
            raise Refused(404, "session", f"session: there is none called {name!r}")
        return {"id": name, "deleted": True}

    return app


def _body(kind: type[protocol.Request]) -> dict[str, Any]:
    """What /docs shows of a request."""
    schema = kind.model_json_schema()
    whole = _inlined(schema, schema.pop("$defs", {}))
    return {"requestBody": {"content": {"application/json": {"schema": whole}}, "required": True}}


def _inlined(schema: Any, parts: dict[str, Any]) -> Any:
    """With its parts in their places, as it stands inside of another document."""
    if isinstance(schema, list):
        return [_inlined(one, parts) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].rpartition("/")[2]], parts)
    return {name: _inlined(value, parts) for name, value in schema.items()}


# --- requests ---------------------------------------------------------------------------------


async def _answered(service: Service, asked: protocol.Request, request: Request) -> Response:
    prompts, size = await run_in_threadpool(_prompts, service, asked)
    answer = _Answer(service, asked, size, [len(p.samplings) for p in prompts])
    asking = service.ask(prompts)
    events = asking.answers(request.receive)
    if asked.stream:
        return _Stream(answer.streamed(events), asking)
    try:
        return JSONResponse(await answer.whole(events))
    except Failed as error:
        return JSONResponse(protocol.error_body(500, str(error)), 500)
    except Disconnected:
        return Response(status_code=499)  # to nobody
    finally:
        asking.leave()


class _Stream(StreamingResponse):
    """Server-sent events, after which nothing is left to be answered."""

    def __init__(self, events: AsyncIterator[str], asking: Asking) -> None:
        headers = {"Cache-Control": "no-cache"}
        super().__init__(events, media_type="text/event-stream", headers=headers)
        self._asking = asking

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._asking.leave()


def _prompts(service: Service, asked: protocol.Request) -> tuple[list[Prompt], int]:
    """What the request asks the engine for, and how many tokens its prompts have."""
    if asked.model not in (None, service.name):
        raise Refused(404, "model", f"model: {asked.model!r} is not served, {service.name!r} is")
    if asked.n > service.engine.max_batch:
        raise Refused(400, "n", f"n: at most {service.engine.max_batch}, got {asked.n}")
    with _session(service, asked) as session:
        chat = isinstance(asked, ChatRequest)
        texts = _encoded(service, asked, session.found is not None)
        if asked.session is not None and len(texts) > 1:
            raise Refused(400, "prompt", f"prompt: one, with a session, got {len(texts)}")
        stop_ids = [*asked.stop_token_ids, *(service.chat.stop_ids if chat else ())]
        if service.tokenizer.end is not None:
            stop_ids.append(service.tokenizer.end)
        stop = [*asked.stop, *(service.chat.stop if chat else ())]
        seed = secrets.randbelow(2**31) if asked.seed is None else asked.seed
        prompts = []
        for number, tokens in enumerate(texts):
            samplings = [
                Sampling(
                    _max_tokens(asked),
                    asked.temperature,
                    asked.top_p,
                    asked.repetition_penalty,
                    seed + number * asked.n + i,
                    tuple(stop_ids),
                )
                for i in range(asked.n)
            ]
            prompts.append(session.prompt(tokens, samplings, stop))
        return prompts, sum(map(len, texts))


def _max_tokens(asked: protocol.Request) -> int:
    given = [asked.max_tokens, getattr(asked, "max_completion_tokens", None), MAX_TOKENS]
    return next(n for n in given if n is not None)


def _encoded(service: Service, asked: protocol.Request, begun: bool) -> list[list[int]]:
    """The tokens of every prompt. begun: they come after something."""
    try:
        if isinstance(asked, ChatRequest):
            name, messages = "messages", [m.model_dump(exclude_none=True) for m in asked.messages]
            found = [service.chat.encode(messages, begun)]
        else:
            assert isinstance(asked, CompletionRequest)
            name, found = "prompt", [_tokens(service, one) for one in asked.prompt]
    except UnicodeEncodeError as error:
        raise Refused(400, None, f"body: not valid Unicode ({error.reason})") from error
    except ValueError as error:
        raise Refused(400, None, str(error)) from error
    vocab = service.model.config.vocab_size
    if any(not 0 <= token < vocab for tokens in found for token in tokens):
        raise Refused(400, name, f"{name}: tokens must be in [0, {vocab - 1}]")
    return found


def _tokens(service: Service, prompt: str | list[int]) -> list[int]:
    return service.tokenizer.encode([prompt])[0].tolist() if isinstance(prompt, str) else prompt


# --- sessions ---------------------------------------------------------------------------------


def _sessions(service: Service) -> Sessions:
    if service.sessions is None:
        raise Refused(400, "session", "session: the server was started without --sessions")
    return service.sessions


def _of_session(error: ValueError) -> Refused:
    return Refused(409 if isinstance(error, InUse) else 400, "session", str(error))


@dataclass(frozen=True)
class _Taken:
    """What a request goes on from and keeps. found: None where there is none yet."""

    sessions: Sessions | None = None
    name: str = ""
    found: Session | None = None
    saved: bool = False

    def prompt(self, tokens: list[int], samplings: list[Sampling], stop: list[str]) -> Prompt:
        unread = [] if self.found is None else [int(self.found.unread)]
        read = [token for token in unread if token != NONE] + tokens
        if not read:
            raise Refused(400, "prompt", "prompt: must have at least one token, got none")
        state = None if self.found is None else self.found.state
        if not self.saved or self.sessions is None:
            return Prompt(read, samplings, stop, state)
        before = 0 if self.found is None else int(self.found.tokens)
        sessions, name = self.sessions, self.name

        def keep(state: Any, last: int | None, count: int) -> None:
            sessions.save(name, state, last, before + len(tokens) + count)

        return Prompt(read, samplings, stop, state, keep, lambda: sessions.release(name))


@contextlib.contextmanager
def _session(service: Service, asked: protocol.Request) -> Iterator[_Taken]:
    """The request's; given back at once where the request is refused, else when it is over."""
    name = asked.session
    if name is None:
        if asked.save_session and "save_session" in asked.model_fields_set:
            raise Refused(
                400, "save_session", "save_session: needs a session to be saved, got none"
            )
        yield _Taken()
        return
    sessions, saved = _sessions(service), asked.save_session
    if saved and asked.n > 1:
        raise Refused(400, "n", f"n: must be 1 where the session is saved, got {asked.n}")
    try:
        if saved:
            sessions.take(name)
    except ValueError as error:
        raise _of_session(error) from error
    try:
        try:
            found = sessions.load(name)
        except ValueError as error:
            raise _of_session(error) from error
        if found is None and not saved:
            raise Refused(404, "session", f"session: there is none called {name!r}")
        yield _Taken(sessions, name, found, saved)
    except BaseException:
        if saved:
            sessions.release(name)
        raise


# --- answers ----------------------------------------------------------------------------------


@dataclass
class _Choice:
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    reason: str | None = None


class _Answer:
    """Of one request: whole, or as it comes."""

    def __init__(
        self, service: Service, asked: protocol.Request, size: int, counts: Sequence[int]
    ) -> None:
        self.asked, self.chat = asked, isinstance(asked, ChatRequest)
        self.model, self.created = service.name, int(time.time())
        self.number = f"{'chatcmpl' if self.chat else 'cmpl'}-{secrets.token_hex(12)}"
        self.size, self.cached, self.completion = size, 0, 0
        self.choices = [_Choice() for _ in range(sum(counts))]

    async def whole(self, events: AsyncGenerator[Any, None]) -> dict[str, Any]:
        """Raises as `Asking.answers`."""
        async with contextlib.aclosing(events):
            async for event in events:
                if isinstance(event, Closed):
                    self.cached += event.cached
                    continue
                choice = self.choices[event.choice]
                choice.text += event.text
                choice.tokens += event.tokens
                choice.reason = event.reason
        self.completion = sum(len(choice.tokens) for choice in self.choices)
        kind = "chat.completion" if self.chat else "text_completion"
        choices = [self._choice(i, c) for i, c in enumerate(self.choices)]
        return self._in(kind, choices) | {"usage": self._usage()}

    def _choice(self, index: int, choice: _Choice) -> dict[str, Any]:
        found: dict[str, Any] = {"index": index, "finish_reason": choice.reason, "logprobs": None}
        if self.chat:
            found["message"] = {"role": "assistant", "content": choice.text}
        else:
            found["text"] = choice.text
        return found | self._ids(choice.tokens)

    async def streamed(self, events: AsyncGenerator[Any, None]) -> AsyncIterator[str]:
        """Server-sent events."""
        kind = "chat.completion.chunk" if self.chat else "text_completion"
        try:
            async with contextlib.aclosing(events):
                if self.chat:
                    for index in range(len(self.choices)):
                        role = {"role": "assistant", "content": ""}
                        yield _event(self._in(kind, [self._part(index, role, None)]))
                async for event in events:
                    if isinstance(event, Closed):
                        self.cached += event.cached
                        continue
                    self.completion += len(event.tokens)
                    if not (event.text or event.reason or self.asked.return_token_ids):
                        continue
                    content = {"content": event.text} if event.text else {}
                    part = self._part(
                        event.choice, content if self.chat else event.text, event.reason
                    )
                    yield _event(self._in(kind, [part | self._ids(event.tokens)]))
        except Failed as error:
            yield _event(protocol.error_body(500, str(error)))
            return
        except Disconnected:
            return
        if self.asked.stream_options.include_usage:
            yield _event(self._in(kind, []) | {"usage": self._usage()})
        yield "data: [DONE]\n\n"

    def _part(self, index: int, content: Any, reason: str | None) -> dict[str, Any]:
        key = "delta" if self.chat else "text"
        return {"index": index, key: content, "finish_reason": reason, "logprobs": None}

    def _ids(self, tokens: list[int]) -> dict[str, Any]:
        return {"token_ids": tokens} if self.asked.return_token_ids else {}

    def _in(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return protocol.envelope(kind, self.number, self.created, self.model, choices)

    def _usage(self) -> dict[str, Any]:
        return protocol.usage(self.size, self.cached, self.completion)


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
