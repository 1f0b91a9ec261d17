"""Messages as a prompt: in ChatML, written out as text, or by a Jinja template.

    <|im_start|>user
    Hello<|im_end|>
    <|im_start|>assistant

A template is what Hugging Face keeps beside a tokenizer: a chat_template.jinja, or the
"chat_template" of a tokenizer_config.json.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from atlas_blocks import check
from atlas_blocks.recipes.data import Tokenizer
from atlas_blocks.recipes.data.sources import needed

Message = Mapping[str, str]
START, END = "<|im_start|>", "<|im_end|>"
# The names by which tokenizers have the token that ends a turn.
ENDS = (END, "<|eot_id|>", "<|end|>", "<end_of_turn>")


class Chat:
    """stop: strings at which a turn ends; stop_ids: tokens at which it does."""

    def __init__(self, tokenizer: Tokenizer, template: Path | None = None) -> None:
        """Raises ValueError for a template that cannot be read."""
        self._tokenizer = tokenizer
        self._template, self._words = (None, {}) if template is None else _read(template)
        self.stop = (END,) if self._template is None else ()
        self.stop_ids: tuple[int, ...] = ()
        if self._inner is not None:
            names = {*ENDS, self._words.get("eos_token", END)}
            ids = (self._inner.token_to_id(name) for name in sorted(names))
            self.stop_ids = tuple(token for token in ids if token is not None)

    @functools.cached_property
    def _inner(self) -> Any:
        """A tokenizer to which text that spells a special token is that token."""
        if self._tokenizer.json is None:
            return None
        found = needed("tokenizers", "tokenizer").Tokenizer.from_str(self._tokenizer.json)
        found.no_truncation()
        found.no_padding()
        return found

    def encode(self, messages: Sequence[Message], begun: bool = False) -> list[int]:
        """The tokens of the messages and of the begin of an answer.

        begun: they follow an answer, after whose end the template has a line break. Raises
        ValueError for messages that a template refuses.
        """
        text = ("\n" if begun else "") + self.render(messages)
        if self._inner is None:
            return self._tokenizer.encode([text])[0].tolist()
        return self._inner.encode(text, add_special_tokens=False).ids

    def render(self, messages: Sequence[Message]) -> str:
        """The same as text."""
        if self._template is None:
            turns = (f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages)
            return "".join(turns) + f"{START}assistant\n"
        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=True, **self._words
            )
        except Exception as error:  # whatever a template raises
            raise ValueError(f"messages: the chat template refuses them: {error}") from error


def _read(file: Path) -> tuple[Any, dict[str, str]]:
    """The template, and the special tokens that it may name."""
    try:
        text = file.read_text(encoding="utf-8")
        config = json.loads(text) if file.suffix == ".json" else {"chat_template": text}
        found = config["chat_template"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"chat-template: cannot read {file}: {error}") from error
    if not (isinstance(found, str) and found.strip()):
        check.fail("chat-template", 'a string as "chat_template"', repr(found))
    words = {}
    for name in ("bos_token", "eos_token"):
        token = config.get(name)
        words[name] = token.get("content", "") if isinstance(token, dict) else token or ""
    return _compiled(found, file), words


def _compiled(source: str, file: Path) -> Any:
    # Imported here: most models have no template.
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> NoReturn:
        raise jinja2.TemplateError(message)

    environment.globals["raise_exception"] = refuse
    try:
        return environment.from_string(source)
    except jinja2.TemplateError as error:
        raise ValueError(f"chat-template: {file}: {error}") from error
