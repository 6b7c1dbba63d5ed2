"""How long a text a model can read: models with learned positions have a row of weights for each, and no more."""

from __future__ import annotations

import re

from torch import Tensor, nn

_NAME = re.compile(r"(^|\.)(wpe|\w*positions?(al)?_embed\w*|\w*embed_position\w*)$")


def most_positions(model: nn.Module) -> int | None:
    """The longest text, in tokens, that all tables of positions in a model have a row for; None: no limit.

    Relative biases (T5), rotary positions and ALiBi set none. A meta-device model will do.
    """
    found: list[int] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _NAME.search(name):
            # OPT and BART leave the first rows out, RoBERTa those up to padding
            skipped = getattr(module, "offset", 0) or (0 if module.padding_idx is None else module.padding_idx + 1)
            found.append(module.num_embeddings - skipped)
        if isinstance(table := getattr(module, "pos_encoding", None), Tensor):  # CTRL's sinusoids
            found.append(len(table))
    return min(found, default=None)
