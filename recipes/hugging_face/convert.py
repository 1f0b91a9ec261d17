"""Our checkpoints as folders of transformers, and back: weights, config and tokenizer."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from atlas_blocks import AtlasMemory, check
from atlas_blocks.recipes import checkpoint, files
from atlas_blocks.recipes.data import Tokenizer
from atlas_blocks.recipes.data.sources import needed
from atlas_blocks.recipes.hugging_face.model import AtlasConfig, AtlasForCausalLM
from atlas_blocks.recipes.model import LanguageModel

# Beginnings of names: ours, and those of AtlasForCausalLM.
NAMES = (
    (r"embedding\.", "model.embed_tokens."),
    (r"blocks\.(\d+)\.", r"model.layers.\1.block."),
    (r"norm\.", "model.norm."),
    (r"head\.", "lm_head."),
)
BACK = (
    (r"model\.embed_tokens\.", "embedding."),
    (r"model\.layers\.(\d+)\.block\.", r"blocks.\1."),
    (r"model\.norm\.", "norm."),
    (r"lm_head\.", "head."),
)


def from_language_model(model: LanguageModel, **options: Any) -> AtlasForCausalLM:
    """The same model for transformers, with copies of its weights.

    options: what AtlasConfig has beside the model's own, such as eos_token_id.
    Raises ValueError for memories with sketch tables of their own, as the first checkpoints had.
    """
    for name, part in model.named_modules():
        if isinstance(part, AtlasMemory) and part.buckets is not None:
            check.fail(f"{name}.buckets", "the sketch of its config", "tables of its own")
    found: Any = AtlasForCausalLM(AtlasConfig.of(model.config, **options))
    dtype = model.embedding.weight.dtype
    tensors = {_renamed(n, NAMES): t for n, t in model.state_dict().items()}
    if model.head is None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    found = found.to(dtype)
    found.load_state_dict(tensors)
    found.config.dtype = dtype
    return found.train(model.training)


def to_language_model(model: AtlasForCausalLM) -> LanguageModel:
    """The same model for this library's own training, serving and export, with copies of its
    weights. Raises ValueError where they are not those that its config builds (LoRA is merged
    first)."""
    if not isinstance(model, AtlasForCausalLM):
        check.fail("model", "an AtlasForCausalLM", type(model).__name__)
    found = model.config.language_model().build().to(model.model.embed_tokens.weight.dtype)
    tensors = {_renamed(n, BACK): t for n, t in model.state_dict().items()}
    if found.head is None:
        tensors.pop("head.weight", None)
    try:
        found.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"model: {' '.join(str(error).split())}") from None
    return found.train(model.training)


def to_folder(source: Path, folder: Path) -> None:
    """Write the checkpoint `source` as transformers' `save_pretrained` would, its tokenizer too."""
    text = checkpoint.tokenizer(source)
    end = Tokenizer(text).end
    # Both before anything is written.
    model = from_language_model(checkpoint.load(source), eos_token_id=end)
    tokenizer = tokenizer_of(text)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        check.fail("out", "a new or empty folder", folder)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def to_checkpoint(folder: Path, out: Path) -> None:
    """Write the folder of an AtlasForCausalLM as a checkpoint of this library's."""
    if out.suffix != ".safetensors":
        check.fail("out", "a file name that ends in .safetensors", out)
    files.check_writable("out", out)
    model, coder = read_folder("source", folder)
    checkpoint.save(out, to_language_model(model), tokenizer=coder.json or "")


def read_folder(name: str, folder: Path, kind: Any = AtlasForCausalLM) -> tuple[Any, Tokenizer]:
    """The model of a folder, and what its tokens are: bytes where it has no tokenizer.json.

    kind: the class that reads it. Raises ValueError, which names the argument `name`, for any file
    that is damaged or no such model's.
    """
    try:
        coder = Tokenizer(tokenizer_text(folder) or None)
        if kind is AtlasForCausalLM:
            config = AtlasConfig.from_pretrained(folder)
            of = config.architectures or []
            if config.model_type != "atlas" or "AtlasForCausalLM" not in of:
                check.fail("config.json", "an AtlasForCausalLM", config.architectures)
        return kind.from_pretrained(folder, local_files_only=True), coder
    except Exception as error:  # each of the libraries behind it raises its own
        raise ValueError(f"{name}: cannot read {folder}: {error}") from error


def is_folder(path: Path) -> bool:
    """Whether it is a model's folder as transformers writes it."""
    return (path / "config.json").is_file()


def tokenizer_of(text: str | None) -> PreTrainedTokenizerFast:
    """That of transformers for a tokenizer.json, or for bytes."""
    library: Any = needed("tokenizers", "tokenizer")
    inner = _bytes(library) if text is None else library.Tokenizer.from_str(text)
    end, names = Tokenizer(text).end, {}
    if end is not None:
        # Masks say what is padding; any token may stand there.
        names = {"eos_token": inner.id_to_token(end), "pad_token": inner.id_to_token(end)}
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, clean_up_tokenization_spaces=False, **names
    )


def tokenizer_text(folder: Path) -> str:
    """The tokenizer.json of a folder; empty for that of bytes, and where there is none."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        return ""
    text = file.read_text(encoding="utf-8")
    found = needed("tokenizers", "tokenizer").Tokenizer.from_str(text)
    return "" if found.get_vocab() == _alphabet() else text


def _alphabet() -> dict[str, int]:
    """Every byte by the character that byte-level tokenizers write for it."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


def _bytes(library: Any) -> Any:
    """A tokenizer whose tokens are the bytes of UTF-8."""
    found = library.Tokenizer(library.models.BPE(vocab=_alphabet(), merges=[]))
    found.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = library.decoders.ByteLevel()
    return found


def _renamed(name: str, table: tuple[tuple[str, str], ...]) -> str:
    for old, new in table:
        name, count = re.subn(f"^{old}", new, name)
        if count:
            break
    return name
