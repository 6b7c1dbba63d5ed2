"""Logit distillation between tokenizers, against loops over chunks and dictionaries of probabilities."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvdistill.core.segments import END, START, TEXT, UNKNOWN
from kvdistill.losses import (
    TextChunks,
    chunk_divergence,
    chunks_within,
    common_chunks,
    each_token,
    logit_divergence,
    logits_across,
)

# -- chunks -----------------------------------------------------------------------------------------


def spans_of(ends: list[float], roles: list[int] | None = None) -> tuple[Tensor, Tensor]:
    starts = [0.0, *ends][:-1]
    spans = torch.tensor(list(zip(starts, ends, strict=True))).view(-1, 2)
    return spans, torch.tensor(roles or [TEXT] * len(ends), dtype=torch.int64)


def test_chunks_lie_between_the_boundaries_that_both_have() -> None:
    theirs, mine = spans_of([0, 2, 3, 7, 8, 8], [START, TEXT, TEXT, TEXT, TEXT, END]), spans_of([1, 2, 3, 5, 6, 8])
    assert common_chunks(*theirs, *mine).tolist() == [[1, 1, 0, 1], [2, 2, 2, 2], [3, 4, 3, 5]]
    ended = spans_of([1, 2, 3, 5, 6, 8, 8], [TEXT] * 6 + [END])
    assert common_chunks(*theirs, *ended).tolist()[-1] == [5, 5, 6, 6]


def test_what_cannot_be_written_and_tokens_without_characters() -> None:
    theirs = spans_of([2, 3, 3, 5], [TEXT, UNKNOWN, TEXT, TEXT])
    assert common_chunks(*theirs, *spans_of([1, 2, 3, 4, 5])).tolist() == [[0, 0, 0, 1], [2, 3, 3, 4]]
    assert common_chunks(*spans_of([4]), *spans_of([3])).tolist() == []
    assert common_chunks(*spans_of([]), *spans_of([])).tolist() == []


def test_a_chunk_needs_tokens_before_it_and_all_of_it() -> None:
    chunks = torch.tensor([[0, 0, 0, 1], [1, 2, 2, 2], [3, 3, 3, 5], [4, 5, 6, 6]])
    all_of_them = torch.ones(6, dtype=torch.bool), torch.ones(7, dtype=torch.bool)
    assert chunks_within(chunks, *all_of_them).tolist() == chunks[1:].tolist()
    learned = torch.tensor([0, 0, 1, 1, 0, 1, 1], dtype=torch.bool)
    assert chunks_within(chunks, all_of_them[0], learned).tolist() == [[1, 2, 2, 2], [4, 5, 6, 6]]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_chunks_cover_a_text_without_gaps_and_are_as_small_as_can_be(widths: list[int], random: Any) -> None:
    whole = sum(widths)
    cuts = sorted(random.sample(range(1, whole), random.randint(0, whole - 1))) if whole > 1 else []
    theirs = [float(sum(widths[: i + 1])) for i in range(len(widths))]
    mine = [float(cut) for cut in [*cuts, whole]]
    found = common_chunks(*spans_of(theirs), *spans_of(mine)).tolist()
    assert [theirs[row[1]] for row in found] == [mine[row[3]] for row in found] == sorted({*theirs} & {*mine})
    assert all(row[0] == before[1] + 1 and row[2] == before[3] + 1 for before, row in pairwise(found))
    assert common_chunks(*spans_of(theirs), *spans_of(theirs)).tolist() == [[i, i, i, i] for i in range(len(theirs))]


# -- the losses, slowly -----------------------------------------------------------------------------

B, S, T, V_THEIRS, V_MINE = 2, 9, 11, 13, 17


def setting(seed: int, top_k: int, *, folds: bool = True) -> dict[str, Any]:
    """Two texts cut into chunks of 1 to 3 tokens on either side; the teacher's K most probable tokens; pieces that are
    the same on both sides, that take several of the student's, and that neither can tell."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    def below(most: int, *size: int) -> Tensor:
        return torch.randint(most, size, generator=generator)

    def one_to_three() -> int:
        return int(below(3, 1)) + 1

    teacher = (2 * draw(B, S, V_THEIRS)).log_softmax(-1)
    logprob, index = teacher.topk(top_k, dim=-1)
    theirs_8, mine_8 = (torch.randperm(size, generator=generator)[:8] for size in (V_THEIRS, V_MINE))
    written, folds_V = torch.full((V_THEIRS, 3), -1), torch.full((V_MINE,), -1)
    for piece in range(V_THEIRS - 1):  # the last one cannot be told
        written[piece, : one_to_three()] = 1
        written[piece] = torch.where(written[piece] > 0, mine_8[below(8, 3)], -1)
    written[theirs_8] = torch.stack([mine_8, *2 * [torch.full((8,), -1)]], dim=1)
    folds_V[mine_8] = mine_8
    for piece in range(V_MINE - 2) if folds else ():
        folds_V[piece] = piece if piece in mine_8.tolist() else int(mine_8[below(8, 1)])
    ids, theirs = below(V_MINE, B, T), below(V_THEIRS, B, S)
    rows = []
    for b in range(B):
        i = j = 1
        while i < S - 3 and j < T - 3:
            n, m = (1, one_to_three()) if int(below(2, 1)) else (one_to_three(), one_to_three())
            rows.append([b, i, i + n - 1, j, j + m - 1])
            if n == 1:  # the student's tokens write what the teacher's does
                choice = [y for y in range(V_THEIRS) if int((written[y] >= 0).sum()) == m]
                if choice and int(below(3, 1)):
                    theirs[b, i] = choice[int(below(len(choice), 1))]
                    ids[b, j : j + m] = written[theirs[b, i], :m]
            i, j = i + n, j + m
    rows_C5 = torch.tensor(rows)
    chunks = TextChunks(rows_C5[:, 0], rows_C5[:, 1:3], rows_C5[:, 3:], theirs, written, folds_V)
    predicts = torch.ones(B, T, dtype=torch.bool)
    predicts[:, -1] = False
    student = draw(B, T, V_MINE).requires_grad_()
    return {"student_logits": student, "predicts_BT": predicts, "input_ids_BT": ids, "topk_index_BSK": index,
            "topk_logprob_BSK": logprob, "chunks": chunks}  # fmt: skip


Classes = dict[Any, float]


def slow_terms(case: dict[str, Any]) -> list[tuple[tuple[int, int], Classes, Classes]]:
    """Of every term its place, and by class the probabilities of teacher and student, in dictionaries."""
    chunks, found = case["chunks"], []
    written = [[x for x in row if x >= 0] for row in chunks.written_VL.tolist()]
    folds = chunks.folds_V.tolist()
    for b, (i0, i1), (j0, j1) in zip(
        *(x.tolist() for x in (chunks.row_C, chunks.theirs_C2, chunks.mine_C2)), strict=True
    ):
        theirs, mine = chunks.ids_BS[b].tolist(), case["input_ids_BT"][b].tolist()
        student = case["student_logits"].detach().softmax(-1)[b].tolist()

        def teacher(i: int, b: int = b) -> dict[int, float]:
            pairs = zip(case["topk_index_BSK"][b, i].tolist(), case["topk_logprob_BSK"][b, i].tolist(), strict=True)
            return {index: math.exp(logprob) for index, logprob in pairs}

        def of_student(q_V: list[float], classes: Classes) -> Classes:
            q = dict.fromkeys(classes, 0.0) | {"rest": 0.0}
            for piece, value in enumerate(q_V):
                q[piece if piece in classes else folds[piece] if folds[piece] in classes else "rest"] += value
            return q

        if i0 == i1:
            for t in range(j1 - j0 + 1):
                p: Classes = {}
                for piece, value in teacher(i0 - 1).items():
                    told = mine[j0 : j1 + 1] if piece == theirs[i0] else written[piece]
                    if told[:t] == mine[j0 : j0 + t] and len(told) > t:
                        p[told[t]] = p.get(told[t], 0.0) + value
                if t:
                    p = {key: value / sum(p.values()) for key, value in p.items()}
                if p:
                    q = of_student(student[j0 + t - 1], p)
                    p["rest"] = 0.0 if t else 1 - sum(p.values())
                    found.append(((b, j0 + t - 1), p, q))
                else:
                    found.append(((b, j0 + t - 1), {}, {}))
            continue
        p_chunk, goes_on = 1.0, 1.0
        for i in range(i0, i1 + 1):
            here = teacher(i - 1)
            gold = here.get(theirs[i], min(1 - sum(here.values()), min(here.values())))
            p_chunk, goes_on = p_chunk * gold, goes_on * (gold if i > i0 else 1.0)
        follows = math.prod(student[j - 1][mine[j]] for j in range(j0 + 1, j1 + 1))
        p = {}
        for piece, value in teacher(i0 - 1).items():
            value *= 1 - goes_on if piece == theirs[i0] else 1.0
            if piece != theirs[i0] and written[piece][: j1 - j0 + 1] == mine[j0 : j1 + 1]:
                p_chunk += value
            elif written[piece]:
                p[written[piece][0]] = p.get(written[piece][0], 0.0) + value
        q_V = list(student[j0 - 1])
        q_chunk = q_V[mine[j0]] * follows
        q_V[mine[j0]] *= 1 - follows
        q = of_student(q_V, p) | {"chunk": q_chunk}
        p |= {"chunk": p_chunk, "rest": 1 - p_chunk - sum(p.values())}
        found.append(((b, j0 - 1), p, q))
    return found


def slow_kl(p: Classes, q: Classes, temperature: float) -> float:
    if not p:
        return 0.0
    p, q = ({k: v ** (1 / temperature) for k, v in x.items()} for x in (p, q))
    p, q = ({k: v / sum(x.values()) for k, v in x.items()} for x in (p, q))
    return temperature**2 * sum(v * math.log(v / q[k]) for k, v in p.items() if v > 0)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize(("seed", "top_k"), [(1, 5), (2, 9), (3, 12), (4, 5), (5, 2)])
def test_spans_by_a_slow_reference(seed: int, top_k: int, folds: bool, temperature: float) -> None:
    case = setting(seed, top_k, folds=folds)
    found = chunk_divergence(**case, form="spans", temperature=temperature)
    expected = {place: slow_kl(p, q, temperature) for place, p, q in slow_terms(case)}
    places = list(zip(found.row_N.tolist(), found.place_N.tolist(), strict=True))
    assert sorted(places) == sorted(expected) and len(set(places)) == len(places)
    # beside a class of nothing the reference has 0 and the loss the least number there is
    assert found.divergence_N.tolist() == pytest.approx([expected[place] for place in places], rel=1e-8, abs=1e-10)
    assert bool((found.divergence_N >= -1e-9).all())
    assert {"chunk" in p for _, p, _ in slow_terms(case)} == {True, False}, "both kinds of chunks are there"


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("top_k", [5, V_THEIRS])
def test_sorted_by_a_slow_reference(top_k: int, temperature: float) -> None:
    case = setting(4, top_k)
    found = chunk_divergence(**case, form="sorted", temperature=temperature)
    assert found.row_N.tolist() == case["chunks"].row_C.tolist()
    for c, value in enumerate(found.divergence_N.tolist()):
        b, i, j = int(case["chunks"].row_C[c]), int(case["chunks"].theirs_C2[c, 0]), int(case["chunks"].mine_C2[c, 0])
        p = sorted(case["topk_logprob_BSK"][b, i - 1].exp().tolist(), reverse=True)
        q = sorted(case["student_logits"][b, j - 1].softmax(-1).tolist(), reverse=True)
        p, q = [*p, 1 - sum(p) if top_k < V_THEIRS else 0.0], [*q[:top_k], sum(q[top_k:])]
        p, q = ([max(v, 0) ** (1 / temperature) for v in x] for x in (p, q))
        p, q = ([v / sum(x) for v in x] for x in (p, q))
        assert value == pytest.approx(sum(abs(a - b) for a, b in zip(p, q, strict=True)), abs=1e-7)


def test_hybrid_adds_what_has_no_counterpart() -> None:
    cases = (setting(seed, 12) for seed in range(1, 20))
    case = next(case for case in cases if int(case["chunks"].written_VL[-1, 0]) < 0)
    hybrid, spans = (chunk_divergence(**case, form=form, temperature=1.0) for form in ("hybrid", "spans"))
    more = len(spans.divergence_N)
    assert torch.equal(hybrid.divergence_N[:more], spans.divergence_N)
    told, folds = case["chunks"].written_VL[:, 0].tolist(), case["chunks"].folds_V.tolist()
    some = 0.0
    for c, value in enumerate(hybrid.divergence_N[more:].tolist()):
        b, i, j = int(case["chunks"].row_C[c]), int(case["chunks"].theirs_C2[c, 0]), int(case["chunks"].mine_C2[c, 0])
        assert (int(hybrid.row_N[more + c]), int(hybrid.place_N[more + c])) == (b, j - 1)
        theirs = case["topk_index_BSK"][b, i - 1].tolist(), case["topk_logprob_BSK"][b, i - 1].exp().tolist()
        p = sorted((v for k, v in zip(*theirs, strict=True) if told[k] < 0), reverse=True)
        mine = case["student_logits"][b, j - 1].softmax(-1).tolist()
        q = sorted((v for k, v in enumerate(mine) if folds[k] < 0), reverse=True)
        p, q = (([*x] + 12 * [0.0])[:12] for x in (p, q))
        assert value == pytest.approx(sum(abs(a - b) for a, b in zip(p, q, strict=True)), abs=1e-9)
        some += sum(p)
    assert some > 0


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case, found = setting(1, 5), []
    for most in (1 << 22, 3 * V_MINE):
        monkeypatch.setattr(logits_across, "_BLOCK_ELEMENTS", most)
        loss = chunk_divergence(**case, form="spans", temperature=1.0).divergence_N
        found.append((loss, torch.autograd.grad(loss.sum(), case["student_logits"])[0]))
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12)


@pytest.mark.parametrize("form", ["spans", "sorted", "hybrid"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_gradients(form: Any, temperature: float) -> None:
    case = setting(1, 5)
    logits = case.pop("student_logits")
    assert torch.autograd.gradcheck(
        lambda x: chunk_divergence(x, **case, form=form, temperature=temperature).divergence_N,
        (logits,),
        eps=1e-7,
        atol=1e-5,
    )


@pytest.mark.parametrize("top_k", [4, V_MINE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_tokenizer_against_itself_is_plain_distillation_to_the_bit(top_k: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(top_k)
    logits = torch.randn(B, T, V_MINE, generator=generator, dtype=dtype).requires_grad_()
    teacher = torch.randn(B, T, V_MINE, generator=generator, dtype=dtype).log_softmax(-1)
    logprob, index = teacher.topk(top_k, dim=-1)
    ids = torch.randint(V_MINE, (B, T), generator=generator)
    predicts = torch.zeros(B, T, dtype=torch.bool)
    predicts[0, 2:9] = predicts[1, 3:7] = True
    for temperature in (1.0, 2.0):
        plain = logit_divergence(logits, index, logprob, predicts, temperature)
        (of_plain,) = torch.autograd.grad(plain.sum(), logits)
        for form in ("spans", "hybrid"):
            chunks = each_token(predicts, ids, V_MINE)
            across = chunk_divergence(logits, predicts, ids, index, logprob, chunks, form, temperature)
            own = across.divergence_N[: len(plain)]
            assert torch.equal(own, plain) and not across.divergence_N[len(plain) :].any()
            assert torch.equal(torch.autograd.grad(own.sum(), logits)[0], of_plain)
            assert torch.equal(torch.stack([across.row_N, across.place_N], dim=1)[: len(plain)], predicts.nonzero())
        # the head may have run at these positions only
        here = chunk_divergence(logits[predicts][None], predicts, ids, index, logprob, chunks, "spans", temperature)
        assert torch.equal(here.divergence_N, plain)


@pytest.mark.parametrize("form", ["spans", "hybrid", "sorted"])
def test_extremes_give_no_nan(form: Any) -> None:
    """Sure students, sure teachers, teachers that know nothing that the student has, pieces beyond the tokenizer."""
    for sharp, nothing in ((1.0, True), (200.0, False), (200.0, True)):
        case = setting(3, 7)
        logits = (sharp * case.pop("student_logits").detach().float()).requires_grad_()
        case["topk_logprob_BSK"] = (sharp * case["topk_logprob_BSK"].float()).log_softmax(-1)
        if nothing:
            none = {"written_VL": torch.full((V_THEIRS - 3, 2), -1), "folds_V": torch.full((V_MINE - 2,), -1)}
            case["chunks"] = TextChunks(**{**vars(case["chunks"]), **none})
        found = chunk_divergence(logits, **case, form=form, temperature=1.0).divergence_N
        (grad,) = torch.autograd.grad(found.sum(), logits)
        assert found.isfinite().all() and grad.isfinite().all(), (sharp, nothing)
