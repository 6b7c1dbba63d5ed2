"""Losses against slow references: loops over tokens in Python floats, scipy, and one-line definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp, rel_entr, softmax

from kvdistill.core.errors import AlignmentError, RecipeError
from kvdistill.core.recipe import LossRecipe
from kvdistill.losses import (
    KV_DISTANCES,
    HybridKVLoss,
    L1KVLoss,
    MercatorKVLoss,
    MSEKVLoss,
    SmoothL1KVLoss,
    build_distance,
    cross_entropy,
    kv_weight_at,
    logit_distillation,
    masked_token_mean,
    prediction_mask,
)

L, B, T, C = 2, 3, 5, 7
SETTINGS = LossRecipe(smooth_l1_beta=0.4, mercator_alpha=0.9, mercator_beta=0.3, hybrid_share=0.7)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def reference(kind: str, s: list[float], t: list[float]) -> float:
    """The definition, one token at a time."""
    if kind == "mse":
        return sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / len(s)
    if kind == "l1":
        return sum(abs(a - b) for a, b in zip(s, t, strict=True)) / len(s)
    if kind == "smooth_l1":
        parts = [abs(a - b) for a, b in zip(s, t, strict=True)]
        return sum(d * d / 0.8 if d < 0.4 else d - 0.2 for d in parts) / len(s)
    if kind == "hybrid":
        return 0.7 * reference("mse", s, t) + 0.3 * reference("mercator", s, t)
    size_s, size_t = math.sqrt(sum(a * a for a in s)), math.sqrt(sum(b * b for b in t))
    cosine = sum(a * b for a, b in zip(s, t, strict=True)) / (size_s * size_t)
    return 0.9 * (1 - cosine) + 0.3 * (math.log(size_s) - math.log(size_t)) ** 2


@pytest.mark.parametrize("kind", KV_DISTANCES)
def test_distance_is_its_definition(kind: str) -> None:
    distance = build_distance(SETTINGS.model_copy(update={"kind": kind}))
    source, target = draw(L, B, T, C), draw(L, B, T, C, seed=1) * 2
    expected = [
        reference(kind, s, t) for s, t in zip(source.view(-1, C).tolist(), target.view(-1, C).tolist(), strict=True)
    ]
    np.testing.assert_allclose(distance(source, target).view(-1), expected, rtol=2e-5, atol=1e-6)


def test_recipe_reaches_every_setting() -> None:
    built = {kind: build_distance(SETTINGS.model_copy(update={"kind": kind})) for kind in KV_DISTANCES}
    mercator = MercatorKVLoss(alpha=0.9, beta=0.3)
    assert built == {
        "mse": MSEKVLoss(),
        "smooth_l1": SmoothL1KVLoss(beta=0.4),
        "l1": L1KVLoss(),
        "mercator": mercator,
        "hybrid": HybridKVLoss(share=0.7, mercator=mercator),
    }
    with pytest.raises(RecipeError, match=r"loss\.kind"):
        build_distance(SETTINGS.model_copy(update={"kind": "euclid"}))


@pytest.mark.parametrize("kind", KV_DISTANCES)
def test_gradient_of_both_sides(kind: str) -> None:
    distance = build_distance(SETTINGS.model_copy(update={"kind": kind}))
    source = draw(2, 3, 4, dtype=torch.float64).requires_grad_()
    target = draw(2, 3, 4, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(distance, (source, target))


@pytest.mark.parametrize("kind", KV_DISTANCES)
@pytest.mark.parametrize("zero", ["source", "target", "both", "equal"])
def test_zero_vectors_are_finite(kind: str, zero: str) -> None:
    distance = build_distance(SETTINGS.model_copy(update={"kind": kind}))
    source, target = draw(T, C), draw(T, C, seed=1)
    source = torch.zeros(T, C) if zero in ("source", "both") else source
    target = torch.zeros(T, C) if zero in ("target", "both") else source.clone() if zero == "equal" else target
    source.requires_grad_()
    value = distance(source, target)
    (grad,) = torch.autograd.grad(value.sum(), source)
    assert value.isfinite().all() and grad.isfinite().all()
    if zero == "equal":
        assert value.abs().max() < 1e-6 and grad.abs().max() < 1e-6


def test_mercator_is_smooth_at_zero() -> None:
    source = (draw(3, 4, dtype=torch.float64) * 1e-5).requires_grad_()
    source.data[0] = 0
    target = draw(3, 4, seed=1, dtype=torch.float64)
    assert torch.autograd.gradcheck(MercatorKVLoss(), (source, target), eps=1e-8, rtol=1e-3)
    assert MercatorKVLoss(beta=0.0)(target, 100 * target).abs().max() < 1e-6  # direction only, as in the original


@pytest.mark.parametrize("kind", KV_DISTANCES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_accumulate_in_fp32(kind: str, dtype: torch.dtype) -> None:
    distance = build_distance(SETTINGS.model_copy(update={"kind": kind}))
    source = draw(L, B, T, C).to(dtype).requires_grad_()
    target = draw(L, B, T, C, seed=1).to(dtype)
    value = distance(source, target)
    value.sum().backward()
    assert value.dtype == torch.float32 and source.grad.dtype == dtype
    torch.testing.assert_close(value, distance(source.detach().float(), target.float()))


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises((AlignmentError, TypeError)):  # TypeError: jaxtyping's own check, where its hook is on
        MSEKVLoss()(draw(L, B, T, C), draw(L, B, T, C + 1))


# -- reduction --------------------------------------------------------------------------------


def random_mask(seed: int = 3) -> torch.Tensor:
    mask_BT = torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) < 0.6
    mask_BT[1] = False  # an example without real tokens
    return mask_BT


@pytest.mark.parametrize("shape", [None, (B,), (B, T), (L, B, T), (1, B, 1), (L, B, 1), (1, B, T)])
@pytest.mark.parametrize("per_layer_mask", [False, True])
def test_masked_token_mean_is_the_loop(shape: tuple[int, ...] | None, per_layer_mask: bool) -> None:
    distance = draw(L, B, T).abs()
    mask = torch.rand(L, B, T, generator=torch.Generator().manual_seed(4)) < 0.5 if per_layer_mask else random_mask()
    weight = None if shape is None else draw(*shape, seed=5).abs()
    full_mask = mask.expand(L, B, T)
    full_weight = torch.ones(L, B, T)
    if weight is not None:
        full_weight = (weight[:, None] if weight.ndim == 1 else weight).expand(L, B, T)
    total = 0.0
    for l in range(L):
        for b in range(B):
            for t in range(T):
                if full_mask[l, b, t]:
                    total += float(distance[l, b, t]) * float(full_weight[l, b, t])
    assert float(masked_token_mean(distance, mask, weight, 11)) == pytest.approx(total / L / 11, rel=1e-5)
    as_tensor = masked_token_mean(distance, mask, weight, torch.tensor(11))
    assert float(as_tensor) == pytest.approx(total / L / 11, rel=1e-5)


def test_no_token_at_all_is_zero() -> None:
    mask_BT = torch.zeros(B, T, dtype=torch.bool)
    distance = draw(L, B, T).requires_grad_()
    for count in (0, torch.tensor(0)):
        loss = masked_token_mean(distance, mask_BT, None, count)
        loss.backward()
        assert loss.item() == 0 and distance.grad.abs().max() == 0
    logits = draw(B, T, 9).requires_grad_()
    ids = torch.zeros(B, T, dtype=torch.long)
    index, logprob = torch.arange(4).expand(B, T, 4), draw(B, T, 4).log_softmax(-1) - 0.1
    loss = cross_entropy(logits, ids, mask_BT, 0) + logit_distillation(logits, index, logprob, mask_BT, None, 2.0, 0)
    loss.backward()
    assert loss.item() == 0 and logits.grad.abs().max() == 0


@pytest.mark.parametrize("kind", KV_DISTANCES)
def test_splitting_a_batch_changes_nothing(kind: str) -> None:
    """One batch of 6, or micro-batches of 1, 3 and 2 with the count of all six: same sum, same gradient."""
    batch, V = 6, 9
    mask_BT = torch.rand(batch, T, generator=torch.Generator().manual_seed(7)) < 0.6
    weight_B, target = draw(batch, seed=2).abs(), draw(L, batch, T, C, seed=1)
    ids = torch.arange(batch * T).view(batch, T) % V
    topk_index = torch.stack(
        [torch.randperm(V, generator=torch.Generator().manual_seed(i))[:4] for i in range(batch * T)]
    )
    topk_index = topk_index.view(batch, T, 4)
    topk_logprob = draw(batch, T, 4, seed=6).log_softmax(-1) - 0.3
    distance = build_distance(SETTINGS.model_copy(update={"kind": kind}))
    results = []
    for parts in ([6], [1, 3, 2]):
        source, logits = draw(L, batch, T, C).requires_grad_(), draw(batch, T, V, seed=8).requires_grad_()
        total, start = torch.zeros(()), 0
        for size in parts:
            at = slice(start, start + size)
            count, mask, weight = mask_BT.sum(), mask_BT[at], weight_B[at]
            loss = masked_token_mean(distance(source[:, at], target[:, at]), mask, weight, count)
            loss = loss + cross_entropy(logits[at], ids[at], mask, count)
            loss = loss + logit_distillation(
                logits[at], topk_index[at], topk_logprob[at], prediction_mask(mask), weight, 1.5, count
            )
            loss.backward()
            total, start = total + loss.detach(), start + size
        results.append((total, source.grad, logits.grad))
    for whole, split in zip(*results, strict=True):
        torch.testing.assert_close(whole, split, rtol=1e-6, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    left=st.integers(0, 4),
    right=st.integers(0, 4),
    kind=st.sampled_from(sorted(KV_DISTANCES)),
    junk=st.floats(-1e3, 1e3),
)
def test_padding_changes_nothing(left: int, right: int, kind: str, junk: float) -> None:
    """Extra columns on either side, whatever they hold, change neither loss nor gradient."""
    V = 9

    def pad(x: torch.Tensor, axis: int, value: float) -> torch.Tensor:
        def column(n: int) -> torch.Tensor:
            return torch.full((*x.shape[:axis], n, *x.shape[axis + 1 :]), value, dtype=x.dtype)

        return torch.cat([column(left), x, column(right)], dim=axis)

    distance = build_distance(SETTINGS.model_copy(update={"kind": kind}))
    mask_BT = random_mask()
    mask_BT[:, 0] = False  # the first token is never a label; left padding must not make it one
    source, logits = draw(L, B, T, C).requires_grad_(), draw(B, T, V, seed=8).requires_grad_()
    target, ids, weight_BT = draw(L, B, T, C, seed=1), torch.arange(B * T).view(B, T) % V, draw(B, T, seed=2).abs()
    losses, grads = [], []
    for change in (lambda x, axis, value: x, pad):
        mask = change(mask_BT, 1, False)
        kv = masked_token_mean(
            distance(change(source, 2, junk), change(target, 2, -junk)), mask, change(weight_BT, 1, 1.0), 7
        )
        ce = cross_entropy(change(logits, 1, junk), change(ids, 1, 3), mask, 7)
        losses.append(torch.stack([kv, ce]))
        grads.append(torch.autograd.grad(kv + ce, (source, logits)))
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0], grads[1])


# -- cross entropy and logit distillation -------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_is_the_loop(dtype: torch.dtype) -> None:
    V = 11
    logits = draw(B, T, V).to(dtype).requires_grad_()
    ids = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    mask_BT = random_mask()
    mask_BT[0, 0] = True  # a label at column 0 has nothing before it and is left out
    total = 0.0
    for b in range(B):
        for t in range(1, T):
            if mask_BT[b, t]:
                total -= log_softmax(logits[b, t - 1].detach().double().numpy())[ids[b, t]]
    loss = cross_entropy(logits, ids, mask_BT, 13)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(total / 13, rel=1e-5)
    loss.backward()
    used = prediction_mask(mask_BT)
    assert (logits.grad[~used] == 0).all() and (logits.grad[used] != 0).any() and not used[:, -1].any()


def kl_reference(z, index, logprob, temperature, V):
    """One position in float64, with scipy: sum up the rest, temper, KL."""
    z, logprob = z.astype(np.float64), logprob.astype(np.float64)
    rest = [v for v in range(V) if v not in set(index.tolist())]
    student, teacher = list(z[index]), list(logprob)
    if rest:
        student.append(logsumexp(z[rest]))
        teacher.append(math.log(1 - np.exp(logprob).sum()))
    p, q = softmax(np.array(teacher) / temperature), softmax(np.array(student) / temperature)
    return temperature**2 * rel_entr(p, q).sum()


@pytest.mark.parametrize("K", [1, 4, 10, 11])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_logit_distillation_is_the_loop(K: int, temperature: float) -> None:
    V = 11
    student, teacher = draw(B, T, V).requires_grad_(), draw(B, T, V, seed=1)
    logprob, index = teacher.log_softmax(-1).topk(K)
    mask_BT, weight_B = random_mask(), draw(B, seed=2).abs()
    total = 0.0
    for b in range(B):
        for t in range(T):
            if mask_BT[b, t]:
                z, i, p = (x[b, t].detach().numpy() for x in (student, index, logprob))
                total += float(weight_B[b]) * kl_reference(z, i, p, temperature, V)
    loss = logit_distillation(student, index, logprob, mask_BT, weight_B, temperature, 13)
    assert loss.item() == pytest.approx(total / 13, rel=1e-4)
    loss.backward()
    assert student.grad.isfinite().all() and (student.grad[~mask_BT] == 0).all()


def test_full_vocabulary_is_hinton_exactly() -> None:
    V, tau = 11, 3.0
    student, teacher = draw(B, T, V).requires_grad_(), draw(B, T, V, seed=1)
    logprob, index = teacher.log_softmax(-1).topk(V)
    mask_BT = torch.ones(B, T, dtype=torch.bool)
    loss = logit_distillation(student, index, logprob, mask_BT, None, tau, B * T)
    expected = tau**2 * torch.nn.functional.kl_div(
        (student / tau).log_softmax(-1).flatten(0, 1), (teacher / tau).softmax(-1).flatten(0, 1), reduction="batchmean"
    )
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x, student)[0] for x in (loss, expected)))


def test_logit_distillation_gradient_and_bounds() -> None:
    V, K = 6, 3
    student, teacher = draw(2, 3, V, dtype=torch.float64).requires_grad_(), draw(2, 3, V, seed=1, dtype=torch.float64)
    logprob, index = teacher.log_softmax(-1).topk(K)
    mask_BT = torch.ones(2, 3, dtype=torch.bool)

    def loss(z, k=K, tau=1.7):
        values, places = teacher.log_softmax(-1).topk(k)
        return logit_distillation(z, places, values, mask_BT, None, tau, 6)

    assert torch.autograd.gradcheck(loss, (student,))
    assert loss(teacher.clone()).item() == pytest.approx(0, abs=1e-12)  # the teacher itself
    assert loss(student, K, 1.0).item() <= loss(student, V, 1.0).item()  # data processing
    for excess in (0.0, 1e-6):  # a teacher whose top-k holds everything, or more by rounding: no rest, not NaN
        everything = (logprob - logprob.logsumexp(-1, keepdim=True) + excess).float()
        alone = logit_distillation(student.float(), index, everything, mask_BT, None, 1.0, 6)
        log_q = student.float().gather(-1, index) - student.float().logsumexp(-1, keepdim=True)
        expected = (everything.exp() * (everything - log_q)).sum() / 6
        torch.testing.assert_close(alone, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("K", [2, 4])
def test_a_token_the_teacher_rules_out(K: int) -> None:
    """Log-probability -inf, as for vocabulary a model masks: no term and no gradient from it, not NaN."""
    student = draw(1, 1, 4).requires_grad_()
    logprob = torch.tensor([0.3, 0.0, 0.7, 0.0]).log()[:K].view(1, 1, K)
    index, mask_BT = torch.arange(K).view(1, 1, K), torch.ones(1, 1, dtype=torch.bool)
    loss = logit_distillation(student, index, logprob, mask_BT, None, 1.0, 1)
    (grad,) = torch.autograd.grad(loss, student)
    p = torch.tensor([0.3, 0.0, 0.7, 0.0]) if K == 4 else torch.tensor([0.3, 0.0, 0.7])
    z = (
        student.detach()[0, 0]
        if K == 4
        else torch.cat([student[0, 0, :2], student[0, 0, 2:].logsumexp(0)[None]]).detach()
    )
    assert loss.item() == pytest.approx(rel_entr(p.double().numpy(), softmax(z.double().numpy())).sum(), rel=1e-5)
    torch.testing.assert_close(grad[0, 0, :2], student.detach()[0, 0].softmax(0)[:2] - p[:2])


def test_logits_are_not_changed_in_place() -> None:
    logits = draw(B, T, 9)
    before = logits.clone()
    logprob, index = draw(B, T, 9, seed=1).log_softmax(-1).topk(3)
    logit_distillation(logits, index, logprob, torch.ones(B, T, dtype=torch.bool), None, 1.0, 5)
    assert torch.equal(logits, before)


# -- warm-up ----------------------------------------------------------------------------------


def test_kv_weight_warm_up() -> None:
    assert [kv_weight_at(s, 100, 20.0, 0.04) for s in range(6)] == pytest.approx([5, 10, 15, 20, 20, 20])
    assert [kv_weight_at(s, 100, 20.0, 4) for s in range(6)] == pytest.approx([5, 10, 15, 20, 20, 20])
    assert kv_weight_at(0, 100, 20.0, 0) == 20 and kv_weight_at(0, 100, 20.0, 1) == 20
    assert kv_weight_at(50, 100, 0.0, 0.1) == 0
    assert all(kv_weight_at(s, 10, 1.0, 1000) < 0.011 for s in range(10))  # longer than the run: never full


def test_the_kv_weight_fades_out_as_it_rose() -> None:
    steps = range(10)
    faded = [kv_weight_at(s, 10, 20.0, 0, 0.4) for s in steps]
    assert faded == pytest.approx([20, 20, 20, 20, 20, 20, 20, 15, 10, 5])
    assert faded == [kv_weight_at(s, 10, 20.0, 0, 4) for s in steps]
    assert faded == pytest.approx([kv_weight_at(9 - s, 10, 20.0, 4) for s in steps])
    both = [kv_weight_at(s, 6, 12.0, 6, 6) for s in range(6)]
    assert both == pytest.approx([2, 4, 6, 6, 4, 2])  # where they meet the smaller holds
    assert all(kv_weight_at(s, 10, 7.0, 0, 0) == 7.0 for s in steps)
