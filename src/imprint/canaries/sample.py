"""Texts of a base's own making: like its data, and so unlikely that none of them is there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from imprint.canaries.make import Samples

if TYPE_CHECKING:
    from torch import nn

TEMPERATURE = 1.5
TOKENS = 32
BATCH = 64


def sampler(model: nn.Module, tokenizer: Any) -> Samples:
    """Draws texts of 32 tokens at temperature 1.5, batch by batch; the same seed draws the same.

    A text begins where the tokenizer says that one does, at its end token else, and holds no special token.
    """
    import torch

    device = next(model.parameters()).device
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    special = torch.tensor(
        sorted({*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}), dtype=torch.long
    )

    @torch.inference_mode()
    def draw(count: int, seed: int) -> list[str]:
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same on every device
        texts: list[str] = []
        while len(texts) < count:
            ids_BT = torch.full((min(BATCH, count - len(texts)), 1), begin or 0)
            for _ in range(TOKENS):
                logits_BV = model(input_ids=ids_BT.to(device), use_cache=False).logits[:, -1].float().cpu()
                logits_BV[:, special] = -torch.inf
                logits_BV[:, len(tokenizer) :] = -torch.inf  # rows of the table that stand for nothing
                chosen = torch.multinomial((logits_BV / TEMPERATURE).softmax(-1), 1, generator=generator)
                ids_BT = torch.cat([ids_BT, chosen], 1)
            texts += [tokenizer.decode(ids) for ids in ids_BT[:, 1:].tolist()]
        return texts

    return draw
