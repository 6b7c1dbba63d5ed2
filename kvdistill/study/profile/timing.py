"""Time and memory of a training step of the arm, its parts, and the same student's step on cross-entropy alone.

A step here is one micro-batch and one update: reading, forward, backward, clipping, AdamW with learning rate 0, so
that the student stays what it was. Steps of both kinds alternate, so that another program's load meets both alike.
Parts are timed inside real steps, around the functions that training calls; what is left of the forward pass is
losses, routing and rotations. On a GPU each part waits for the device, whole steps wait once.

Memory is what a step adds at its highest: on a GPU the allocator's peak over what stood before; on a CPU the tensors
that torch's operations make, counted as they come and go (scratch space inside an operation is not seen).
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from kvdistill.arms.arm import Arm
from kvdistill.arms.batches import BatchMaker, token_counts
from kvdistill.arms.distiller import Distiller
from kvdistill.study.profile.shapes import first_batches

_WARM_UP = 1
PATIENCE_S = 20.0  # for timed steps, where a step is slow
_OF_ALIGNER = {
    "targets": "teacher_alignment",
    "teacher_channels": "teacher_alignment",
    "teacher_queries": "teacher_alignment",
    "student_channels": "projection",
    "student_queries": "projection",
    "project": "projection",
}
PARTS = (
    "reading",
    "teacher_forward",
    "student_forward",
    "teacher_alignment",
    "projection",
    "loss",
    "backward",
    "update",
)


class PartClock:
    """Seconds by part. Of nested parts only the outermost counts."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open = False
        self.seconds = dict.fromkeys(PARTS, 0.0)

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        if self._open:
            yield
            return
        self._open, begun = True, self.now()
        try:
            yield
        finally:
            self.seconds[name] += self.now() - begun
            self._open = False

    @contextmanager
    def watching(self, distiller: Distiller) -> Iterator[None]:
        """While open, the functions that a step is made of count as their parts."""
        watched: list[tuple[Any, str, str]] = [(distiller, "_run_student", "student_forward")]
        for aligner in distiller.aligners.values():
            watched += [(aligner, method, part) for method, part in _OF_ALIGNER.items()]
            projectors = [getattr(aligner, what, None) for what in ("proj_k", "proj_v", "proj_q")]
            watched += [(projector, "forward", "projection") for projector in projectors if projector is not None]
        for module, method, part in watched:
            object.__setattr__(module, method, self._timed(getattr(module, method), part))
        try:
            yield
        finally:
            for module, method, _ in watched:
                object.__delattr__(module, method)

    def _timed(self, function: Callable[..., Any], part: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.part(part):
                return function(*args, **kwargs)

        return timed


class LiveTensors(TorchDispatchMode):
    """Bytes of the tensors that operations made while it was on and that still live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, Any] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in tree_iter((args, kwargs)):
            self._meet(tensor, made_here=False)
        out = func(*args, **kwargs)
        for tensor in tree_iter(out):
            self._meet(tensor, made_here=True)
        return out

    def _meet(self, tensor: Any, *, made_here: bool) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if made_here else 0
        self._known[key] = weakref.ref(storage, lambda _: self._gone(key, size))
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.now -= size


class _Steps:
    """Training steps of one module on batches of one maker, one after another.

    optimizer: of a module that holds this one's parameters: both kinds of steps share its state, or there would be two.
    """

    def __init__(
        self, arm: Arm, distiller: Distiller, maker: BatchMaker, optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        self._arm, self._distiller, self._maker = arm, distiller, maker
        trained = [p for p in distiller.parameters() if p.requires_grad]
        self._trained, betas = trained, arm.recipe.train.adam_betas
        # a parameter that this module lacks has no gradient, and is passed over
        self.optimizer = optimizer or torch.optim.AdamW(trained, lr=0.0, betas=betas, weight_decay=0.0)

    def step(self, numbers: list[int], clock: PartClock | None = None) -> None:
        """clock: for its parts; else nothing waits for the device."""
        arm, train, device = self._arm, self._arm.recipe.train, self._arm.device
        clock = clock or PartClock(torch.device("cpu"))
        with clock.part("reading"):
            batch = self._maker(numbers).to(device)
        with clock.part("teacher_forward"):
            batch = arm.run_teachers(batch)
        counts = token_counts(batch, self._distiller.arm).to(device=device, dtype=torch.float32).clamp_min(1.0)
        kv_weight = arm.recipe.loss.kv_weight
        with torch.autocast(device.type, torch.bfloat16, enabled=train.bf16):
            loss = self._distiller(batch, counts, kv_weight=kv_weight).loss
        with clock.part("backward"):
            loss.backward()
        with clock.part("update"):
            if train.max_grad_norm:
                torch.nn.utils.clip_grad_norm_(self._trained, train.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def whole(self, numbers: list[int]) -> float:
        """Seconds of a step, as it runs."""
        clock = PartClock(self._arm.device)
        begun = clock.now()
        self.step(numbers)
        return clock.now() - begun

    def parts(self, numbers: list[int]) -> tuple[float, dict[str, float]]:
        """Seconds of a step and of each of its parts. On a GPU parts wait for it, and the whole is slower for that."""
        clock = PartClock(self._arm.device)
        begun = clock.now()
        with clock.watching(self._distiller):
            self.step(numbers, clock)
        whole = clock.now() - begun
        clock.seconds["loss"] = whole - sum(clock.seconds.values())
        return whole, clock.seconds

    def peak_bytes(self, numbers: list[int]) -> int:
        device = self._arm.device
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            self.step(numbers)
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device) - before
        with LiveTensors() as live:
            self.step(numbers)
        return live.peak


def num_timed(step_s: float, most: int) -> int:
    """How many steps of each kind are timed: as many as PATIENCE_S has room for, odd, at least 1."""
    fitting = int(PATIENCE_S / (2 * max(step_s, 1e-9)))
    return max(1, min(most, fitting - (fitting + 1) % 2))


def num_steps_in_all(arm: Arm, num_steps: int) -> int:
    """Steps that `step_figures` takes, of both kinds, for its progress."""
    return 2 * (_WARM_UP + num_steps + 1) + (num_steps if arm.device.type == "cuda" else 0)


def step_figures(arm: Arm, num_steps: int, progress: Callable[[float], None] = lambda share: None) -> dict[str, Any]:
    """Of the parts, the whole and cross-entropy alone: medians over `num_steps` steps in milliseconds; peak bytes.

    Of whole steps the fastest too: what a machine with other work says beside its median. progress: given the share of
    steps that are done.
    """
    numbers = first_batches(arm, 3)
    plain_arm = arm.recipe.model_copy(update={"teachers": []})
    taught = _Steps(arm, arm.distiller.train(), arm.batches("train"))
    plain = _Steps(
        arm,
        Distiller(arm.distiller.student, plain_arm).train(),
        BatchMaker(arm.batches("train").examples, arm.experiment.tokenizer.pad_token_id),
        taught.optimizer,
    )
    on_gpu, total, done = arm.device.type == "cuda", num_steps_in_all(arm, num_steps), 0
    taught_s: list[float] = []
    plain_s: list[float] = []
    parts: list[dict[str, float]] = []
    for i in range(_WARM_UP + num_steps):
        one = numbers[i % len(numbers)]
        whole_s, parts_s = taught.parts(one)
        if on_gpu and i >= _WARM_UP:
            whole_s, done = taught.whole(one), done + 1
        plain_step_s = plain.whole(one)
        done += 2
        progress(done / total)
        if i >= _WARM_UP:
            taught_s.append(whole_s)
            plain_s.append(plain_step_s)
            parts.append(parts_s)
    step_ms, plain_ms = (1000 * statistics.median(seconds) for seconds in (taught_s, plain_s))
    peak, plain_peak = (steps.peak_bytes(numbers[0]) for steps in (taught, plain))
    return {
        "batch_size": arm.recipe.train.batch_size,
        "steps": num_steps,
        "parts_ms": {name: 1000 * statistics.median(one[name] for one in parts) for name in PARTS},
        "whole_ms": step_ms,
        "cross_entropy_ms": plain_ms,
        "fastest_ms": 1000 * min(taught_s),
        "cross_entropy_fastest_ms": 1000 * min(plain_s),
        "ratio": step_ms / plain_ms,
        "memory": "peak of the GPU's allocator over what stood before the step"
        if on_gpu
        else "live tensors made by torch operations; scratch inside an operation is not seen",
        "peak_bytes": peak,
        "cross_entropy_peak_bytes": plain_peak,
        "memory_ratio": peak / max(1, plain_peak),
    }
