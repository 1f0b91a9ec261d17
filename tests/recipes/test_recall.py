"""One-shot associations are still learnt by a memory whose errors are online."""

import pytest
import torch
import torch.nn.functional as F

from atlas_blocks import AtlasBlockConfig, AtlasMemoryConfig
from atlas_blocks.recipes.model import LanguageModelConfig
from atlas_blocks.recipes.tasks import IGNORE, RecallTask, accuracy


@pytest.mark.slow
def test_a_two_layer_model_learns_to_recall_eight_pairs():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    task = RecallTask(length=128, pairs=8)
    memory = AtlasMemoryConfig(
        memory="matrix", update="gd", window=1, feature_map="identity", momentum=False
    )
    model = LanguageModelConfig(
        name="recall",
        vocab_size=task.vocab_size,
        dim=64,
        heads=2,
        depth=2,
        block=AtlasBlockConfig(memory),
    ).build()
    steps, peak = 500, 3e-3
    optimizer = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.95), weight_decay=0.1)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / 50) * (1 - 0.9 * step / steps)
        tokens, targets = task.sample(32, generator)
        logits = model(tokens).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    tokens, targets = task.sample(256, generator)
    with torch.no_grad():
        assert accuracy(model(tokens).logits, targets) > 0.95
