"""Alignment, fusion and loss by themselves: how much faster than loops, and what share of a training step.

Forward and backward, two teachers, router weights from their NLL: unrotate the student's keys, project, resample in
time where lengths differ, pick layers, standardise, distance, weigh, and back to the student's keys and values and
the projectors. Runs on the CPU and, unchanged, on CUDA; needs ranks 0 and 1 of kvdistill only.

The share is measured where the student's own step (forward, cross-entropy, backward, clipping, AdamW) can be run
beside it, and estimated from its FLOPs and the matrix-product speed measured in the same rounds where it cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.reference import LoopTeacher, loop_loss
from benchmarks.report import Row, print_table, save
from benchmarks.timing import interleave, paired_ratio
from benchmarks.toy import THREADS, ToySetup, ToySize, segment_tensor, toy_model, toy_segments, toy_texts
from kvdistill.align import ChannelStatistics, KVStatistics, MapProjectionAligner, time_map
from kvdistill.core.kv import KV
from kvdistill.core.maps import SparseMap
from kvdistill.core.recipe import AlignRecipe, FuseRecipe, LossRecipe
from kvdistill.core.runtime import pick_device
from kvdistill.fuse import build_fusion
from kvdistill.losses import build_distance, cross_entropy, masked_token_mean
from kvdistill.models import forward_flops, unrotate_keys
from kvdistill.models.describe import ModelShape

TOLERANCE = 2e-4
NUM_TEACHERS = 2
# Qwen2.5 1.5B and 7B, whose KV widths are 256 and 512
BIG_STUDENT = ModelShape("qwen2", 28, 12, 2, 128, 1536, 8960, 151936, True, 1543714304, True, 3)


@dataclass(frozen=True)
class Case:
    """Sizes of one measurement; (layers, KV heads, head size) of either side. stretch: teacher texts are longer."""

    name: str
    student: tuple[int, int, int]
    teacher: tuple[int, int, int]
    batch: int
    tokens: int
    rounds: int
    stretch: bool = False
    step: ToySize | ModelShape | None = None


def cases() -> list[Case]:
    setup = ToySetup()
    small = Case(
        "step-cost size",
        setup.student.kv_shape,
        setup.teacher.kv_shape,
        setup.batch,
        setup.tokens,
        30,
        step=setup.student,
    )
    big = Case("28 layers, KV 256 -> 512", (28, 2, 128), (28, 4, 128), 4, 256, 5, step=BIG_STUDENT)
    return [
        small,
        replace(small, name="step-cost size, texts 1.5x as long", stretch=True, step=None),
        big,
        replace(big, name="28 layers, texts 1.5x as long", stretch=True, step=None),
    ]


def run() -> bool:
    """The table; there is no bar."""
    torch.set_num_threads(THREADS)
    device = pick_device()
    print(f"parts: alignment + fusion + loss, forward and backward, {NUM_TEACHERS} teachers")
    print(f"  {THREADS} threads, {device.type}")
    found = [_measure(case, device) for case in cases()]
    clock = "wall" if device.type == "cuda" else "cpu"
    for kind in ("speed_up", "share"):
        rows = [row for result in found for row in result[kind] if row is not None]
        title = {
            "speed_up": "times as fast as loops per layer, head and example",
            "share": "share of the training step",
        }
        print_table(f"{title[kind]} ({clock} time)", rows)
    tables = {
        "clock": clock,
        "cases": [
            result | {kind: [row.as_dict() for row in result[kind]] for kind in ("speed_up", "share")}
            for result in found
        ],
    }
    save("parts", {"threads": THREADS, "teachers": NUM_TEACHERS, "device": device.type}, tables, device)
    return True


def _measure(case: Case, device: torch.device) -> dict[str, Any]:
    ours, loops, leaves = _build(case, device)
    _check_equal(case, ours, loops, leaves)
    calls = {"ours": lambda: ours().backward(), "loops": lambda: loops().backward()}
    flops = 0
    if isinstance(case.step, ToySize):
        calls["step"] = _student_step(case, case.step, device)
    elif case.step is not None:
        flops, calls["step"] = _matrix_product(case.step, device)
    taken = interleave(calls, warm_up=max(1, case.rounds // 8), rounds=case.rounds, device=device)
    clock = "wall" if device.type == "cuda" else "cpu"
    times = {name: [getattr(moment, clock) for moment in moments] for name, moments in taken.items()}
    speed_up = Row(case.name, paired_ratio(times["loops"], times["ours"]), at_least=True)
    share: list[Row] = []
    if case.step is not None:
        note = "measured"
        if isinstance(case.step, ModelShape):
            tokens = case.batch * case.tokens
            scale = 3 * forward_flops(case.step, tokens, case.batch * case.tokens**2) / flops
            times["step"] = [t * scale for t in times["step"]]
            note = "estimated: a 1.5B student's FLOPs at the matrix-product speed measured here"
        whole = [a + b for a, b in zip(times["ours"], times["step"], strict=True)]
        share = [Row(case.name, paired_ratio(times["ours"], whole), note=note)]
    medians = {name: round(float(torch.tensor(t).median()) * 1e3, 3) for name, t in times.items()}
    print(f"  {case.name}: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in medians.items()))
    sizes = {"student": case.student, "teacher": case.teacher, "batch": case.batch, "tokens": case.tokens}
    return {"name": case.name, **sizes, "rounds": case.rounds, "ms": medians, "speed_up": [speed_up], "share": share}


# -- the two ways ------------------------------------------------------------------------------------------


def _build(case: Case, device: torch.device) -> tuple[Callable[[], Tensor], Callable[[], Tensor], list[Tensor]]:
    """The loss our way, the loss in loops, and the tensors whose gradient both leave."""
    torch.manual_seed(0)
    (L, H, D), (_, G, E), B, T = case.student, case.teacher, case.batch, case.tokens
    S = T * 3 // 2 if case.stretch else T
    lengths = [T - 8 * b for b in range(B)]  # padded, as real batches are
    their_lengths = [n * 3 // 2 if case.stretch else n for n in lengths]
    mine_BT, theirs_BS = segment_tensor(lengths, T).to(device), segment_tensor(their_lengths, S).to(device)
    keys, values = (
        [torch.randn(B, T, H, D, device=device).transpose(1, 2).requires_grad_() for _ in range(L)] for _ in "kv"
    )
    student = KV(tuple(keys), tuple(values), mine_BT > 0, _positions(mine_BT), "rotated")
    rotary = _rotary_model(H, D, device)
    recipe = AlignRecipe(time="segment")
    mapping = time_map("segment", theirs_BS, mine_BT) if case.stretch else None
    nll_BN = torch.rand(B, NUM_TEACHERS, device=device)
    aligners = nn.ModuleList()
    targets, loop_teachers = [], []
    for number in range(NUM_TEACHERS):
        statistics = KVStatistics(*(ChannelStatistics(torch.randn(L, G * E), torch.rand(L, G * E) + 0.5) for _ in "kv"))
        aligner = MapProjectionAligner(recipe, case.teacher, case.student, seed=number, statistics=statistics).to(
            device
        )
        kv = _stored(case, theirs_BS, aligner.teacher_layers)
        aligners.append(aligner)
        targets.append(kv)
        loop_teachers.append(_loop_teacher(case, aligner, kv, statistics, their_lengths, device))
    theta = float(rotary.config.rope_parameters["rope_theta"])
    mine, count = mine_BT > 0, (mine_BT > 0).sum()

    def ours() -> Tensor:
        return _our_loss(student, rotary, list(aligners), targets, mapping, nll_BN, mine, count)

    def loops() -> Tensor:
        return loop_loss(keys, values, [_parts(n) for n in lengths], loop_teachers, nll_BN, theta)

    return ours, loops, [*keys, *values, *aligners.parameters()]


def _our_loss(
    student: KV,
    rotary: nn.Module,
    aligners: Sequence[MapProjectionAligner],
    targets: Sequence[KV],
    mapping: SparseMap | None,
    nll_BN: Tensor,
    mask_BT: Tensor,
    count: Tensor,
) -> Tensor:
    """What `Distiller` does between the student's forward and backward, without its bookkeeping."""
    distance = build_distance(LossRecipe())
    fusion = build_fusion(FuseRecipe(fusion_strategy="competence"), [str(n) for n in range(len(aligners))], 1)
    kv = unrotate_keys(student, rotary)
    weights = fusion.weights(mask_BT.shape[0], mask_BT.device, nll_BN=nll_BN)
    total = torch.zeros((), device=mask_BT.device)
    for number, (aligner, target) in enumerate(zip(aligners, targets, strict=True)):
        source, (goal, _) = aligner.sources(kv), aligner.targets(target, mapping)
        for side in (0, 1):
            total = total + masked_token_mean(distance(source[side], goal[side]), mask_BT, weights[number], count)
    return total


def _check_equal(case: Case, ours: Callable[[], Tensor], loops: Callable[[], Tensor], leaves: Sequence[Tensor]) -> None:
    """Same loss and same gradients, or there is nothing to time."""
    found = []
    for loss in (ours, loops):
        value = loss()
        found.append([value, *torch.autograd.grad(value, leaves)])
    for a, b in zip(*found, strict=True):
        if not torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE * b.detach().abs().max().item()):
            raise AssertionError(f"{case.name}: ours and the loops differ by {(a - b).detach().abs().max().item():.3g}")


def _positions(segments_BT: Tensor) -> Tensor:
    return torch.arange(segments_BT.shape[1], device=segments_BT.device).expand_as(segments_BT)


def _rotary_model(heads: int, size: int, device: torch.device) -> Any:
    return toy_model(ToySize(layers=1, hidden=heads * size, heads=heads, kv_heads=heads, vocab=8), 0, device)


def _stored(case: Case, segments_BS: Tensor, layers: Sequence[int]) -> KV:
    """Random targets laid out as the store's batches are: token-major, all layers and K and V in one tensor."""
    (_, G, E), (B, S) = case.teacher, segments_BS.shape
    kv_BSM2GE = torch.randn(B, S, len(layers), 2, G, E, device=segments_BS.device)
    keys, values = (tuple(kv_BSM2GE[:, :, m, side].transpose(1, 2) for m in range(len(layers))) for side in (0, 1))
    return KV(keys, values, segments_BS > 0, _positions(segments_BS), "unrotated", layers=tuple(layers))


def _loop_teacher(
    case: Case,
    aligner: MapProjectionAligner,
    kv: KV,
    statistics: KVStatistics,
    lengths: Sequence[int],
    device: torch.device,
) -> LoopTeacher:
    M, L = case.teacher[0], case.student[0]
    place = [kv.layers.index(((layer + 1) * M - 1) // L) for layer in range(L)]  # layers: ratio
    sides = (statistics.keys, statistics.values)
    return LoopTeacher(
        keys=[kv.keys[i] for i in place],
        values=[kv.values[i] for i in place],
        lengths=[_parts(n) for n in lengths],
        mean=tuple(s.mean_LC.to(device) for s in sides),  # type: ignore[arg-type]
        std=tuple(s.std_LC.to(device) for s in sides),  # type: ignore[arg-type]
        weight=(aligner.proj_k.weight, aligner.proj_v.weight),  # type: ignore[arg-type]
        bias=(aligner.proj_k.bias, aligner.proj_v.bias),
    )


def _parts(num_tokens: int) -> list[int]:
    codes = toy_segments(num_tokens)
    return [codes.count(code) for code in dict.fromkeys(codes)]


# -- the rest of the step ----------------------------------------------------------------------------------


def _student_step(case: Case, size: ToySize, device: torch.device) -> Callable[[], None]:
    """Forward, cross-entropy, backward, clipping and AdamW of the student, without any trainer around it."""
    model = toy_model(size, 0, device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    ids = torch.tensor(toy_texts(case.batch, case.tokens, size.vocab), device=device)
    labels = segment_tensor([case.tokens] * case.batch, case.tokens).to(device) > 1
    count = labels.sum()

    def step() -> None:
        cross_entropy(model(input_ids=ids, use_cache=False).logits, ids, labels, count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()

    return step


def _matrix_product(shape: ModelShape, device: torch.device) -> tuple[int, Callable[[], object]]:
    """The MLP's product of one layer: its FLOPs and a call that does it."""
    x = torch.randn(1024, shape.hidden_size, device=device)
    weight = torch.randn(shape.intermediate_size, shape.hidden_size, device=device)
    return 2 * x.shape[0] * weight.numel(), lambda: x @ weight.T
