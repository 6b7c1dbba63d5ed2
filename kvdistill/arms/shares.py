"""How much of the gradient each term of the loss has: norms, shares, and whether a term pulls as cross-entropy does.

A curve of the KV term may look healthy while its gradient is 3 % of cross-entropy's, and all of it is clipped together.
Profiling asks for the gradient on all that the student learns. Training asks, now and then, for the one on the keys and
values of its highest layers: the backward pass goes no further down for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

KINDS = ("ce", "kv", "logit")  # what a term's name begins with
WANTED = 0.5  # of the norm of cross-entropy's gradient: what a proposed weight gives the KV terms


def gradient_shares(parts: Mapping[str, Tensor], at: Sequence[Tensor]) -> dict[str, dict[str, float | None]]:
    """By kind of term, and by teacher for kinds that have any (`kv/one`): {"norm", "share", "cosine"}.

    Args:
        parts: each term of the loss as it enters it, with graph (`DistillOutput.parts`). The graph is kept.
        at: what the gradient is taken of. Nothing is added to anybody's `.grad`.

    share: of the sum of the kinds' norms. cosine: with cross-entropy's gradient; None where one of them is 0.
    """

    def gradient(names: Sequence[str]) -> list[Tensor]:
        total = torch.stack([parts[name] for name in names]).sum()
        if not total.requires_grad:
            return [torch.zeros_like(x) for x in at]
        found = torch.autograd.grad(total, at, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, at, strict=True)]

    def dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
        return sum(float(a.flatten().float() @ b.flatten().float()) for a, b in zip(one, other, strict=True))

    of_ce = gradient([name for name in ("ce", "answer") if name in parts])  # behind latents the answer is apart
    squares, with_ce = {"ce": dot(of_ce, of_ce)}, {"ce": dot(of_ce, of_ce)}
    for kind in KINDS[1:]:
        teachers: dict[str, list[str]] = {}
        for name in parts:
            if name.startswith(f"{kind}/"):
                whose = name if kind == "logit" else name.rpartition("/")[0]  # kv/one/k and kv/one/v are one
                teachers.setdefault(whose, []).append(name)
        total: list[Tensor] = []
        for whose, names in teachers.items():
            found = gradient(names)
            squares[whose], with_ce[whose] = dot(found, found), dot(found, of_ce)
            total = found if not total else [a + b for a, b in zip(total, found, strict=True)]
        if total:
            squares[kind], with_ce[kind] = dot(total, total), dot(total, of_ce)
    norms = {name: square**0.5 for name, square in squares.items()}
    whole = sum(norms.get(kind, 0.0) for kind in KINDS)
    return {
        name: {
            "norm": norm,
            "share": norm / whole if whole else None,
            "cosine": with_ce[name] / (norm * norms["ce"]) if norm and norms["ce"] else None,
        }
        for name, norm in norms.items()
    }


def proposed_weight(weight: float, shares: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The `kv_weight` at which the KV terms' gradient has WANTED times the norm of cross-entropy's; None: not defined.

    Of these weights and these texts: shares move while a student learns, so training logs them.
    """
    ce, kv = shares["ce"]["norm"], shares.get("kv", {}).get("norm")
    if not ce or not kv or not ce < float("inf") or not kv < float("inf"):
        return None
    return float(f"{weight * WANTED * ce / kv:.2g}")
