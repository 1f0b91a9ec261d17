"""A recipe under Lightning: its Trainer, and Fabric around a loop of your own.

pip install lightning
python examples/with_lightning.py
"""

from __future__ import annotations

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from atlas_blocks.recipes import build


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class LanguageModule(lightning.LightningModule):
    def __init__(self, recipe: str) -> None:
        super().__init__()
        self.model = build(recipe)

    def training_step(self, tokens: Tensor, index: int) -> Tensor:
        loss = loss_of(self.model(tokens).logits, tokens)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 5e-3)


def with_fabric(recipe: str, texts: list[Tensor], **options: object) -> list[float]:
    """The loss of every piece of long texts int [B, T], the memory carried from piece to piece."""
    fabric = lightning.Fabric(devices=1, **options)
    model = build(recipe)
    model, optimizer = fabric.setup(model, torch.optim.AdamW(model.parameters(), 5e-3))
    losses = []
    for tokens in texts:
        state = None
        for piece in tokens.split(16, 1):
            logits, state = model(piece, state)
            loss = loss_of(logits, piece)
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()
            losses.append(loss.item())
            state = state.detach()  # the next piece's gradients end here
    return losses


if __name__ == "__main__":
    rows = torch.arange(32) + 3 * torch.arange(32)[:, None]
    loader = torch.utils.data.DataLoader(rows, batch_size=4)
    trainer = lightning.Trainer(max_epochs=2, logger=False, enable_checkpointing=False)
    trainer.fit(LanguageModule("atlas-mag-tiny"), loader)
    print(with_fabric("atlas-mag-tiny", list(loader)))
