"""A memory in the layer list of x-transformers, in the place of its second attention.

pip install x-transformers
python examples/with_x_transformers.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper

from atlas_blocks import AtlasMemory, Block


class Mixer(nn.Module):
    """What x-transformers calls as a layer: x [B, T, dim] -> y, within its norm and residual."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, **unused: object) -> Tensor:
        return self.block(x)[0]


def language_model(vocab_size: int, dim: int, heads: int, length: int) -> AutoregressiveWrapper:
    # "a" is attention, "f" a layer that is given x alone.
    decoder = Decoder(dim=dim, heads=heads, custom_layers=("a", "f", "f", "f"))
    decoder.layers[2][1] = Mixer(AtlasMemory(dim, heads))
    # Its cache holds keys and values: a layer in front of it sees the last token alone.
    decoder.can_cache_kv = False
    model = TransformerWrapper(num_tokens=vocab_size, max_seq_len=length, attn_layers=decoder)
    return AutoregressiveWrapper(model)


if __name__ == "__main__":
    model = language_model(97, 64, 4, 64)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(20):
        loss = model((torch.arange(32) + 3 * torch.arange(8)[:, None] + step) % 97)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(step, loss.item())
    print(model.generate(torch.arange(8)[None], 8, temperature=0.0))
