"""Text as tokens and back: its bytes, or whatever a `tokenizer.json` says."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from atlas_blocks import check
from atlas_blocks.recipes import files
from atlas_blocks.recipes.data.sources import Document, needed

BYTES = "bytes"
END = "<|endoftext|>"
# The names by which tokenizers have the token that ends a document.
ENDS = (END, "<|end_of_text|>", "</s>", "<eos>", "<｜end▁of▁sentence｜>", "[SEP]")
# The tokens of bytes, and the one that ends a document.
LEAST = 256 + 1


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """json: the text of a `tokenizer.json`; None: every byte of UTF-8 is a token.

    What the file says of special tokens, truncation and padding is for encoding single prompts
    of the model that it came with, and is not applied: a token that ends documents is put by
    `prepare`, and text that spells a special token is text.
    """

    json: str | None = None

    def __post_init__(self) -> None:
        if self.json is not None and not self._ids:
            check.fail("tokenizer", "a vocabulary", "an empty one")

    @staticmethod
    def read(file: Path) -> Tokenizer:
        """That of a file. Raises ValueError where it is none."""
        try:
            return Tokenizer(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer: cannot read {file}: {error}") from error

    def write(self, file: Path) -> None:
        """To a tokenizer.json, in one atomic replacement. Bytes have none."""
        assert self.json is not None
        with files.replacing(file) as partial:
            partial.write_text(self.json, encoding="utf-8")

    @functools.cached_property
    def _inner(self) -> Any:
        library = needed("tokenizers", "tokenizer")
        try:
            found = library.Tokenizer.from_str(self.json)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"not a tokenizer.json: {error}") from error
        found.no_truncation()
        found.no_padding()
        found.encode_special_tokens = True
        return found

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return self._inner.get_vocab(with_added_tokens=True)

    @property
    def vocab_size(self) -> int:
        """One more than the highest token."""
        return 256 if self.json is None else max(self._ids.values()) + 1

    @property
    def end(self) -> int | None:
        """The token that ends a document, where there is one."""
        names = () if self.json is None else ENDS
        return next((self._ids[name] for name in names if name in self._ids), None)

    @property
    def name(self) -> str:
        """In words that tell it from others."""
        if self.json is None:
            return BYTES
        return f"{self.vocab_size:,} tokens ({hashlib.sha256(self.json.encode()).hexdigest()[:8]})"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned type that holds every token, little endian."""
        return np.min_scalar_type(self.vocab_size - 1).newbyteorder("<")

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The tokens of every text. Raises ValueError for what the vocabulary has no tokens for."""
        if self.json is None:
            return [np.frombuffer(t.encode(), np.uint8) for t in texts]
        try:
            found = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"tokenizer: cannot encode the text: {error}") from error
        return [np.array(one.ids, self.dtype) for one in found]

    def decode(self, tokens: Sequence[int]) -> bytes:
        """The text of tokens, in UTF-8, without those that stand for none."""
        return bytes(tokens) if self.json is None else self._inner.decode(list(tokens)).encode()


def train_tokenizer(documents: Iterable[Document], size: int) -> Tokenizer:
    """Byte-level BPE of `size` tokens, END among them, or fewer where the text has no more pairs.

    Raises ValueError for a size that bytes alone exceed.
    """
    check.at_least("size", size, LEAST)
    library = needed("tokenizers", "tokenizer")
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(itertools.chain.from_iterable(documents), trainer)
    return Tokenizer(inner.to_str())
