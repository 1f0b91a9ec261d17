"""lm-evaluation-harness over models of ours: `python -m atlas_blocks.recipes.harness`, its own
command line, in which `--model atlas` is one.

N tokens that are packed in a call.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from torch import Tensor

from atlas_blocks import check
from atlas_blocks.recipes import checkpoint, runs
from atlas_blocks.recipes.data import Tokenizer
from atlas_blocks.recipes.generate import stream
from atlas_blocks.recipes.model import LanguageModel
from atlas_blocks.recipes.serving.text import Writer

NEWLINE = 10


@register_model("atlas")
class AtlasLM(TemplateLM):
    """pretrained: a run's folder, a checkpoint, a folder of transformers, or a LanguageModel.

    tokenizer: of a LanguageModel; None: of bytes. pack: tokens of a call: as many requests as fit
    are packed, each as if alone, and longer texts are read in pieces whose state is carried on.
    batch_size: sequences that are generated together. Before a text that has nothing before it
    stands the token that ends documents; where bytes have none, a newline.
    """

    def __init__(
        self,
        pretrained: str | Path | LanguageModel,
        tokenizer: Tokenizer | None = None,
        pack: int = 8192,
        batch_size: int | str | None = 16,
        max_batch_size: int | None = None,
        device: str | None = None,
    ) -> None:
        super().__init__()
        check.at_least("pack", pack, 1)
        model, coder = pretrained, tokenizer or Tokenizer()
        if not isinstance(model, LanguageModel):
            model, coder = _loaded(Path(model))
        # The harness says cuda where nobody has named a device.
        if device is None or (device.startswith("cuda") and not torch.cuda.is_available()):
            device = "cpu"
        self.model = model.to(device).eval()
        self.coder, self.pack = coder, pack
        self.batch_size = batch_size if isinstance(batch_size, int) else 16

    @property
    def eot_token_id(self) -> int:
        return NEWLINE if self.coder.end is None else self.coder.end

    @property
    def tokenizer_name(self) -> str:
        return self.coder.name

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **unused: Any
    ) -> list[int]:
        return self.coder.encode([string])[0].tolist()

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **unused: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        waiting: list[tuple[list[int], list[int]]] = []
        size = 0
        for _, before, after in requests:
            size += len(before) + len(after)
            if waiting and size > self.pack:
                found += self._packed(waiting)
                waiting, size = [], len(before) + len(after)
            waiting.append((before, after))
        found += self._packed(waiting) if waiting else []
        for (key, _, _), answer in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", key, answer)
        return found

    def _packed(self, requests: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Log-probability of what comes after, and whether it is what greedy search gives."""
        rows = [torch.tensor([*before, *after]) for before, after in requests]
        # One at least, where there is nothing to score.
        logits = self._logits([row[: max(1, len(row) - 1)] for row in rows])
        found = []
        for (_, after), row, scores in zip(requests, rows, logits, strict=True):
            scores = scores[len(scores) - len(after) :]
            aim = row[len(row) - len(after) :].to(scores.device)
            each = scores.gather(1, aim[:, None])
            found.append((float(each.sum()), bool((scores.argmax(1) == aim).all())))
        return found

    def _logits(self, rows: list[Tensor]) -> list[Tensor]:
        """Log-probabilities after each token of every row, packed; of one that is longer than
        `pack`, read in pieces."""
        device, vocab = next(self.model.parameters()).device, self.model.config.vocab_size
        lengths = [len(row) for row in rows]
        if len(rows) > 1:
            bounds = torch.tensor([0, *lengths]).cumsum(0)
            logits = self.model(torch.cat(rows).to(device)[None], cu_seqlens=bounds).logits[0]
            return list(logits.float().log_softmax(-1).split(lengths))
        state, parts = None, [torch.empty(0, vocab, device=device)]
        for piece in rows[0].to(device).split(self.pack):
            logits, state = self.model(piece[None], state)
            parts.append(logits[0].float().log_softmax(-1))
        return [torch.cat(parts)]

    @torch.no_grad()
    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each read once from its beginning to its end: no window forgets."""
        device, found = next(self.model.parameters()).device, []
        for (text,) in (request.args for request in requests):
            tokens = torch.tensor([self.prefix_token_id, *self.tok_encode(text)], device=device)
            state, total = None, 0.0
            for first in range(0, len(tokens) - 1, self.pack):
                piece = tokens[first : first + self.pack + 1]
                logits, state = self.model(piece[None, :-1], state)
                scores = logits[0].float().log_softmax(-1).gather(1, piece[1:, None])
                total += float(scores.double().sum())
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return found

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        found: list[str] = []
        for first in range(0, len(requests), self.batch_size):
            found += self._continued(requests[first : first + self.batch_size])
        for request, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return found

    def _continued(self, requests: list[Any]) -> list[str]:
        # Requests of one task have the same settings; those of several come one at a time.
        told = [dict(request.args[1]) for request in requests]
        if any(settings != told[0] for settings in told):
            return [text for request in requests for text in self._continued([request])]
        until = told[0].get("until", [])
        stops = [until] if isinstance(until, str) else [s for s in until if s]
        prompts = [self.tok_encode(request.args[0]) or [self.eot_token_id] for request in requests]
        device = next(self.model.parameters()).device
        writers = [Writer(self.coder, stops) for _ in prompts]
        texts = ["" for _ in prompts]

        def stopped(row: int, token: int) -> bool:
            if token == self.coder.end:
                return True
            texts[row] += writers[row].write(token)
            return writers[row].stopped

        sampled = told[0].get("do_sample", told[0].get("temperature", 0) > 0)
        for _ in stream(
            self.model,
            [torch.tensor(prompt, device=device) for prompt in prompts],
            max_new_tokens=int(told[0].get("max_gen_toks", 256)),
            temperature=told[0].get("temperature", 1.0) if sampled else 0.0,
            top_p=told[0].get("top_p", 1.0),
            stopped=stopped,
        ):
            pass
        return [text + writer.end() for text, writer in zip(texts, writers, strict=True)]


def _loaded(place: Path) -> tuple[LanguageModel, Tokenizer]:
    if not (place / "config.json").is_file():
        saved = runs.newest(place)
        return checkpoint.load(saved), Tokenizer(checkpoint.tokenizer(saved))
    from atlas_blocks.recipes.hugging_face import convert

    model, coder = convert.read_folder("pretrained", place)
    return convert.to_language_model(model), coder


if __name__ == "__main__":
    cli_evaluate()
