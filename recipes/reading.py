"""Models that read a text of any length piece by piece: ours, and those of transformers.

B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.recipes import checkpoint, runs
from atlas_blocks.recipes.data import Tokenizer
from atlas_blocks.recipes.data.sources import needed
from atlas_blocks.recipes.model import LanguageModel

# Writing 5 to it sets the highest of VmHWM to what there is now (proc(5)).
CLEAR, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclasses.dataclass
class Reader:
    """model: a LanguageModel, or a causal one of transformers. fingerprint: of its files, SHA-256.
    has_text: whether it is known what its tokens are in text."""

    name: str
    fingerprint: str
    model: Any
    coder: Tokenizer
    vocab_size: int
    has_text: bool
    device: torch.device

    @torch.no_grad()
    def read(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """logits [B, T, V] after each of tokens int64 [B, T], and what the next call goes on
        from."""
        tokens = tokens.to(self.device)
        if isinstance(self.model, LanguageModel):
            return self.model(tokens, state)
        found = self.model(input_ids=tokens, past_key_values=state, use_cache=True)
        return found.logits, found.past_key_values

    def check_room(self, name: str, tokens: int) -> None:
        """Raises ValueError where the model has no positions for so many tokens."""
        if isinstance(self.model, LanguageModel):
            return
        config = self.model.config
        most = getattr(config, "max_position_embeddings", None)
        # Rotary positions go on; a table of positions ends.
        rotary = getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None)
        if most is not None and not rotary and tokens > most:
            check.fail(name, f"at most {most:,}, the positions of {self.name}", f"{tokens:,}")


def open_reader(place: Path, device: torch.device) -> Reader:
    """Of a run's folder, a checkpoint, or a folder of transformers, in evaluation mode.

    Raises ValueError, which names `checkpoint`, where there is none that can be read.
    """
    if not place.exists():
        check.fail("checkpoint", "a run's folder, a checkpoint, or a folder of transformers", place)
    if not (place / "config.json").is_file():
        saved = runs.newest(place)
        model, text = checkpoint.load(saved, device).eval(), checkpoint.tokenizer(saved)
        coder, size = Tokenizer(text), model.config.vocab_size
        known = text is not None or size <= coder.vocab_size
        return Reader(model.config.name, _digest([saved]), model, coder, size, known, device)
    return _of_transformers(place, device)


def _of_transformers(place: Path, device: torch.device) -> Reader:
    library = needed("transformers", "checkpoint", "hf")
    # Imported here: transformers is an extra, and slow to import.
    from atlas_blocks.recipes.hugging_face import AtlasForCausalLM, convert

    model, coder = convert.read_folder("checkpoint", place, library.AutoModelForCausalLM)
    size, name = int(model.config.vocab_size), place.resolve().name
    if isinstance(model, AtlasForCausalLM):
        model = convert.to_language_model(model)
    weights = [f for form in ("*.safetensors", "*.json") for f in place.glob(form)]
    known = coder.json is not None or size <= coder.vocab_size
    model = model.to(device).eval()
    return Reader(name, _digest(sorted(weights)), model, coder, size, known, device)


def _digest(paths: list[Path]) -> str:
    found = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    return found.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    return _digest([path])


def even(pieces: Iterable[np.ndarray], size: int) -> Iterator[Tensor]:
    """The same tokens in pieces of `size`, int64 [1, size], and what is left over at the end."""
    held: list[np.ndarray] = []
    count = 0
    for piece in pieces:
        while len(piece):
            taken = piece[: size - count]
            held.append(taken)
            count, piece = count + len(taken), piece[len(taken) :]
            if count == size:
                yield torch.from_numpy(np.concatenate(held))[None]
                held, count = [], 0
    if count:
        yield torch.from_numpy(np.concatenate(held))[None]


@torch.no_grad()
def written(reader: Reader, token: int, state: Any, limit: int, done: Any) -> str:
    """The text that greedy search goes on with, up to `limit` tokens, the end of the document, or
    where done(text) is true. token: the first; state: before it."""
    tokens: list[int] = []
    text = ""
    while len(tokens) < limit and not done(text):
        if token == reader.coder.end:
            break
        tokens.append(token)
        text = reader.coder.decode(tokens).decode(errors="replace")
        logits, state = reader.read(torch.tensor([[token]]), state)
        token = int(logits[0, -1].argmax())
    return text


class Peak:
    """The most memory in use since it was made: of a GPU what torch has allocated, else what the
    process has resident, in bytes.

    Where the system does not let the highest be set back, `since_start` is true: it is then that of
    the process since it began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.since_start = device, False
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            CLEAR.write_text("5")
        except OSError:
            self.since_start = True

    def bytes(self) -> int:
        """The most so far."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        if STATUS.is_file():
            lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
            if "VmHWM" in lines:
                return int(lines["VmHWM"].split()[0]) * 1024
        # Imported here: not every system has it.
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
