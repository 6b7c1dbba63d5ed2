"""`RoutingRecord`: what the weights did between two logged steps, as the log row's `routing` object.

Each example counts once (the mean over its real tokens), so that long examples do not outvote short ones;
examples without a real token are left out. Sums stay on the weights' device until `row()`, so that a step
costs a few small kernels and no wait. Sees weights, masks and task names only.

Axes: N teachers, L layers, B batch, T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class RoutingRecord:
    """Mean weight per teacher, per layer and per task, and the entropy, since the last `row()`."""

    def __init__(self, teacher_names: Sequence[str], num_layers: int) -> None:
        self.teacher_names, self.num_layers = tuple(teacher_names), num_layers
        self._reset()

    def _reset(self) -> None:
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None  # weights [N, L], entropy, examples
        self._task_sums: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(
        self,
        weights_NLBT: Float[Tensor, "N #L B #T"],
        mask_BT: Bool[Tensor, "B T"],
        tasks: Sequence[str] | None = None,
    ) -> None:
        """Take in one batch. tasks: the task of each example, None: no `by_task`."""
        weights_NLBT = weights_NLBT.float()
        real_BT = mask_BT.to(weights_NLBT.device).float()
        share_BT = real_BT / real_BT.sum(1, keepdim=True).clamp_min(1)  # sums to 1 an example, or to 0
        valid_B = mask_BT.any(1).to(weights_NLBT)
        entropy_LBT = torch.special.entr(weights_NLBT).sum(0)
        mean_NLB = (weights_NLBT * share_BT).sum(-1)
        entropy = (entropy_LBT * share_BT).sum(-1).mean(0).sum()
        layer_NL = mean_NLB.sum(-1).expand(-1, self.num_layers)
        count = valid_B.sum()
        if self._sums is None:
            self._sums = layer_NL, entropy, count
        else:
            self._sums = self._sums[0] + layer_NL, self._sums[1] + entropy, self._sums[2] + count
        if tasks is None:
            return
        rows_BN1 = torch.cat([mean_NLB.mean(1), valid_B[None]]).T  # a weight per teacher; last, 1 where it counts
        names = sorted(set(tasks))
        place_B = torch.tensor([names.index(task) for task in tasks], device=rows_BN1.device)
        sums = rows_BN1.new_zeros(len(names), rows_BN1.shape[1]).index_add_(0, place_B, rows_BN1)
        for name, row in zip(names, sums, strict=True):
            self._task_sums[name] = self._task_sums[name] + row if name in self._task_sums else row

    def state(self) -> dict[str, Any]:
        """What was taken in since the last `row()`, as JSON, for a checkpoint."""
        sums = None if self._sums is None else [part.tolist() for part in self._sums]
        return {"sums": sums, "tasks": {task: row.tolist() for task, row in self._task_sums.items()}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from `state()`; exact, since float32 survives JSON."""
        layers, entropy, count = (torch.tensor(part) for part in state["sums"] or (0.0, 0.0, 0.0))
        self._sums = None if state["sums"] is None else (layers, entropy, count)
        self._task_sums = {task: torch.tensor(row) for task, row in state["tasks"].items()}

    def row(self) -> dict[str, Any]:
        """{"mean": {teacher: w}, "entropy": nats, "by_task": {task: {…}}, "by_layer": [{…}, …]}; starts anew.

        Weights are means over examples; entropy is the mean entropy of the single decisions (0: one teacher
        at a time, log N: all alike), not the entropy of the mean. Empty where nothing was taken in.
        """
        if self._sums is None or float(self._sums[2]) == 0:
            self._reset()
            return {}
        layer_NL, entropy, count = self._sums[0], float(self._sums[1]), float(self._sums[2])
        layers = (layer_NL / count).T.tolist()
        out = {
            "mean": self._named([sum(column) / len(layers) for column in zip(*layers, strict=True)]),
            "entropy": entropy / count,
            "by_task": {
                task: self._named((sums[:-1] / sums[-1]).tolist())
                for task, sums in sorted(self._task_sums.items())
                if float(sums[-1]) > 0
            },
            "by_layer": [self._named(layer) for layer in layers],
        }
        self._reset()
        return out

    def _named(self, values: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.teacher_names, map(float, values), strict=True))
