"""Requests and answers in the shape of OpenAI's API.

What is not served is refused by name, and so is a field that is unknown: nothing is ignored that
would change an answer. `repetition_penalty`, `stop_token_ids` and `return_token_ids` are vLLM's;
`session` and `save_session` are ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

# Fields of OpenAI's API, with the values that ask for nothing.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": (),
    "functions": (),
    "logit_bias": ({},),
    "logprobs": (False,),
    "modalities": (["text"],),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "suffix": (),
    "tool_choice": ("none",),
    "tools": ([],),
    "top_logprobs": (0,),
}


class Refused(Exception):
    """A request that gets no answer but this. field: what of it is wrong."""

    def __init__(self, status: int, field: str | None, message: str) -> None:
        super().__init__(message)
        self.status, self.field = status, field

    def body(self) -> dict[str, Any]:
        return error_body(self.status, str(self), self.field)


def error_body(status: int, message: str, field: str | None = None) -> dict[str, Any]:
    """In one line."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    line = _unicode(" ".join(message.split()))
    name = None if field is None else _unicode(field)
    return {"error": {"message": line, "type": kind, "param": name, "code": None}}


def _unicode(text: str) -> str:
    """JSON may spell what is none: half of a surrogate pair."""
    return text.encode(errors="replace").decode()


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(_Strict):
    include_usage: bool = False


class Request(_Strict):
    """What both kinds have in common."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=0)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    n: int = Field(1, ge=1)
    seed: int | None = Field(None, ge=0)
    stop: list[str] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: bool = False
    session: str | None = None
    save_session: bool = True
    user: str | None = None  # clients send it, for somebody else's statistics

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        strings = [value] if isinstance(value, str) else value
        if isinstance(strings, list) and "" in strings:
            raise ValueError("must be strings that are not empty")
        return strings

    @field_validator("stop_token_ids")
    @classmethod
    def _not_negative(cls, value: list[int]) -> list[int]:
        if any(token < 0 for token in value):
            raise ValueError("must be tokens")
        return value


class CompletionRequest(Request):
    prompt: Any

    @field_validator("prompt")
    @classmethod
    def _texts_or_tokens(cls, value: Any) -> list[str | list[int]]:
        """One or several, as texts or as tokens."""
        if isinstance(value, str) or _is_tokens(value):
            return [value]
        several = isinstance(value, list) and len(value) > 0
        if several and all(isinstance(one, str) for one in value):
            return value
        if several and all(map(_is_tokens, value)):
            return value
        raise ValueError("must be a text, the tokens of one, or a list of either")


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


class Part(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, value: Any) -> Any:
        if not isinstance(value, list):
            return value
        return "".join(Part.model_validate(part).text for part in value)


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=0)


R = TypeVar("R", bound=Request)


def parse(kind: type[R], body: bytes) -> R:
    """The request of a body. Raises Refused."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, None, f"body: expected JSON, got {error}") from None
    if not isinstance(data, dict):
        raise Refused(400, None, f"body: expected an object, got {_shown(data)}")
    # What is null is as if it were not there.
    data = {name: value for name, value in data.items() if value is not None}
    for name in sorted(NOT_SERVED.keys() & data.keys()):
        value = data.pop(name)
        if not any(_alike(value, idle) for idle in NOT_SERVED[name]):
            raise Refused(400, name, f"{name}: it is not served, got {_shown(value)}")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise _refused(error.errors()[0]) from None


def _alike(value: Any, idle: Any) -> bool:
    return value == idle and isinstance(value, bool) == isinstance(idle, bool)


def _refused(error: Mapping[str, Any]) -> Refused:
    """Of one of pydantic's errors."""
    path = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error["loc"])[1:]
    says = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if error["type"] == "missing":
        says = "is missing"
    elif error["type"] == "extra_forbidden":
        says = "there is no such field"
    else:
        says += f", got {_shown(error['input'])}"
    # A name that is no Unicode lies nowhere.
    field = str(error["loc"][0]) if error["loc"] else None
    return Refused(400, field, f"{path or 'body'}: {says}")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- answers ----------------------------------------------------------------------------------


def envelope(kind: str, number: str, created: int, model: str, choices: list) -> dict[str, Any]:
    """What every answer, or part of one, lies in."""
    return {"id": number, "object": kind, "created": created, "model": model, "choices": choices}


def usage(prompt: int, cached: int, completion: int) -> dict[str, Any]:
    """cached: those of the prompt that had been read before."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
