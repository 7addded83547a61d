"""What training depends on, after a look, is what it was before."""

from __future__ import annotations

import warnings
from contextlib import nullcontext

import pytest
import torch

import models
import tdgeom as tg


@pytest.mark.slow
def test_a_loader_with_persistent_workers_goes_on_where_training_is():
    """It has one iterator, which a look over the same loader would begin anew."""
    from torch.utils.data import DataLoader

    ids = torch.arange(32 * 6).reshape(32, 6) % 40 + 1
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]

    def losses(watched):
        model = models.gpt2().train()
        generator = torch.Generator().manual_seed(1)
        loader = DataLoader(
            data, batch_size=8, shuffle=True, num_workers=1, persistent_workers=True, generator=generator
        )
        watch = tg.GeometryWatch(loader, every=3, budget=None, metrics="spectrum") if watched else None
        found = []
        for _ in range(2):
            for batch in loader:
                with watch.step(model) if watch else nullcontext():
                    torch.manual_seed(len(found))
                    loss = model(**batch, labels=batch["input_ids"]).loss
                    found.append(float(loss))
        return found

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, watched = losses(False), losses(True)
    assert len(plain) == 8 and watched == plain
