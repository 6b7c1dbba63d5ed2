"""Whether a model's keys and values can be captured, unrotated, and its attention made again: found out by running it.

Families differ in ways that no list keeps up with: layers that do not rotate, a norm after the rotation, other
channels that turn, a window, a bias on distances. So a small model of the same make (`small.py`) reads a dozen tokens:

  keys       every layer hands over its keys and values, all of one size; that changes no output, and a decoder's
             tokens do not see what comes after them.
  unrotated  the same tokens at positions p and p + 5, and each token alone at position 0, have the same unrotated keys
             and values in every layer, and these are what the model put into its rotation.
  attention  softmax(q.k) with the captured scaling and rule (`AttentionRule`), times the values, is what the layer
             gave on.

Each is exact, with the largest error relative to the largest number, or refused with a reason. Nothing in between.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from kvdistill.core.errors import KVDistillError
from kvdistill.core.kv import KV
from kvdistill.models.capture import KVCapture
from kvdistill.models.describe import describe_config, describe_model, refuse_mixture
from kvdistill.models.forward import run_inputs
from kvdistill.models.rope import rotate_keys, unrotate_keys
from kvdistill.models.small import first_line, small_model
from kvdistill.models.structure import auto_class, from_modeling_file, model_kind, numbered_attention

TOLERANCE = (
    5e-3  # relative to the largest number: float32 noise grows with depth; what is wrong is off by a tenth or so
)
TOKENS, SHIFT = 12, 5


@dataclass(frozen=True)
class Verdict:
    """error: the largest, where exact. reason: why not, where refused. note: what else there is to say."""

    error: float = 0.0
    reason: str = ""
    note: str = ""

    @property
    def is_exact(self) -> bool:
        return not self.reason


@dataclass(frozen=True)
class Probe:
    """What can be done with a model (module docstring); each needs the one before."""

    keys: Verdict
    unrotated: Verdict
    attention: Verdict


def probe_config(config: PreTrainedConfig, attention: str = "eager") -> Probe:
    """`probe_model` of a small model with this configuration. Never raises: what goes wrong is the reason.

    attention: the implementation that runs it.
    """
    try:
        refuse_mixture(config, config.model_type)
        shape = describe_config(config)  # as large as it is, without memory for weights
    except KVDistillError as error:
        return _refused(error.what)
    except Exception as error:  # whatever a family's own code says
        if "Unrecognized configuration class" in str(error):
            return _refused(f"{auto_class(config).__name__} does not know it: it reads more than text")
        return _refused(f"it cannot be made from its configuration ({first_line(error)})")
    if not shape.is_captured:
        return _refused("its attention bypasses transformers' attention interface")
    probes: list[Probe] = []
    for keep in (True, False):  # some tie the size of a head to the number of channels, although both have a key
        try:
            probes.append(probe_model(small_model(config, attention, keep_head_size=keep)))
        except KVDistillError as error:
            probes.append(_refused(error.what))
        if probes[-1].keys.is_exact:
            return probes[-1]
    return probes[0]


def probe_model(model: PreTrainedModel) -> Probe:
    """What can be done with this model; it reads a few short texts. Best in float32: errors stand out there."""
    try:
        describe_model(model)
        with torch.no_grad():
            return _probe(model)
    except KVDistillError as error:
        return _refused(error.what)
    except Exception as error:  # whatever a family's own code says
        return _refused(f"it does not run on a text alone ({first_line(error)})")


def _refused(reason: str) -> Probe:
    return Probe(Verdict(reason=reason), Verdict(reason=reason), Verdict(reason=reason))


def _probe(model: PreTrainedModel) -> Probe:
    device = next(model.parameters()).device
    embeddings: Any = model.get_input_embeddings()
    words = embeddings.weight.shape[0] - 3  # the first few may be padding and the like
    ids = torch.arange(TOKENS, device=device)[None] * 7 % words + 3
    here = torch.arange(TOKENS, device=device)[None]
    kv, entered, left, states = _run(model, ids, here)
    layers = [*kv.keys, *kv.values]
    if not all(bool(torch.isfinite(x).all()) for x in layers):
        return _refused("its keys or values are not finite")
    sizes = {tuple(x.shape[1::2]) for x in layers}
    if len(sizes) > 1:
        return _refused(f"keys and values have different (heads, size): {sorted(sizes)}")
    shape = describe_model(model)
    if sizes != {(shape.num_kv_heads, shape.head_size)}:
        return _refused(f"(heads, size) of keys is {sizes.pop()}, by its sizes {(shape.num_kv_heads, shape.head_size)}")
    changed = _off(states, _plain_run(model, ids, here))
    if not changed < TOLERANCE:
        return _refused(f"capturing its keys changes what it computes (off by {changed:.2g})")
    if model_kind(model.config) == "decoder":  # it is read for next tokens: none may look ahead
        other = torch.cat([ids[:, :-1], ids[:, :1]], dim=1)
        pairs = zip(kv.keys, _run(model, other, here)[0].keys, strict=True)
        ahead = max(_off(a[:, :, :-1], b[:, :, :-1]) for a, b in pairs)
        if not ahead < TOLERANCE:
            return _refused(f"it is taken for a decoder, and its tokens see what comes after them (off by {ahead:.2g})")
    return Probe(Verdict(changed), _unrotated(model, ids, kv, entered), _attention(kv, left))


# -- running ------------------------------------------------------------------------------------------


class _Watch(KVCapture):
    """A capture that also keeps what each layer's attention gave on, [B, T, Q, D] (inside a `with`)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, None, queries=True, stop_early=False)
        self.given: dict[int, Tensor] = {}

    def note_output(self, module: nn.Module, output: Tensor) -> None:
        self.given[self._numbers[id(module)]] = output


def _plain_run(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> Tensor:
    """What comes out without a capture."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    runs, inputs = run_inputs(model, model_kind(model.config) == "decoder", ids, mask, positions)
    return runs(**inputs)[0]  # type: ignore[no-any-return]


def _run(model: PreTrainedModel, ids: Tensor, positions: Tensor) -> tuple[KV, list[Tensor], list[Tensor], Tensor]:
    """KV as attention sees it, every tensor that entered the rotation, what attention gave on, layer by layer, and
    what comes out in the end."""
    mask = torch.ones_like(ids, dtype=torch.bool)
    runs, inputs = run_inputs(model, model_kind(model.config) == "decoder", ids, mask, positions)
    entered: list[Tensor] = []
    capture = _Watch(model)
    with _watched_rotation(model, entered), capture:
        states = runs(**inputs)[0]
    kv = capture.kv(mask, positions).detach()
    return kv, entered, [capture.given[layer] for layer in kv.layers], states


@contextmanager
def _watched_rotation(model: nn.Module, entered: list[Tensor]) -> Iterator[None]:
    """While open, whatever the rotation of the model's file is handed is noted: the only way to see what enters it."""
    numbered = numbered_attention(model)
    apply = from_modeling_file(numbered[0][1], "apply_rotary_pos_emb") if numbered else None
    if apply is None:
        yield
        return
    names = list(inspect.signature(apply).parameters)

    def noting(*args: Any, **kwargs: Any) -> Any:
        given = [*args, *kwargs.values()]
        entered.extend(x.detach() for x in given[: 2 if names[1] == "k" else 1])
        return apply(*args, **kwargs)

    file = sys.modules[apply.__module__]
    places = [m for m in {file, *(sys.modules.get(type(x).__module__) for _, x in numbered)} if m is not None]
    kept = [m for m in places if getattr(m, "apply_rotary_pos_emb", None) is apply]
    try:
        for module in kept:
            module.apply_rotary_pos_emb = noting  # type: ignore[attr-defined]
        yield
    finally:
        for module in kept:
            module.apply_rotary_pos_emb = apply  # type: ignore[attr-defined]


def _off(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the largest number."""
    scale = float(theirs.abs().max())
    return float((ours.float() - theirs.float()).abs().max()) / (scale or 1.0)


# -- the three questions --------------------------------------------------------------------------------


def _unrotated(model: PreTrainedModel, ids: Tensor, kv: KV, entered: list[Tensor]) -> Verdict:
    if kv.rope == "none":
        return Verdict(note="no rotation")
    try:
        plain = unrotate_keys(kv, model)
    except KVDistillError as error:
        return Verdict(reason=error.what)
    positions = kv.positions_BT
    moved = unrotate_keys(_run(model, ids, positions + SHIFT)[0], model)
    alone = unrotate_keys(_run(model, ids.T, torch.zeros_like(ids.T))[0], model)
    first = unrotate_keys(_run(model, ids.T, torch.full_like(ids.T, SHIFT))[0], model)
    worst = 0.0
    for what, one, other in (("at positions p and p + 5", plain, moved), ("alone, at 0 and 5", alone, first)):
        for side in ("keys", "values", "queries"):
            pairs = zip(kv.layers, getattr(one, side), getattr(other, side), strict=True)
            for layer, a, b in pairs:
                off = _off(a, b)
                worst = max(worst, off)
                if not off < TOLERANCE:
                    return Verdict(
                        reason=f"the same tokens {what} have other unrotated {side} in layer {layer} "
                        f"(off by {off:.2g} of the largest)"
                    )
    back = rotate_keys(plain, model)
    worst = max([worst, *(_off(a, b) for a, b in zip(back.keys, kv.keys, strict=True))])
    for layer, key, kept in zip(kv.layers, plain.keys, kv.keys, strict=True):
        turned = _off(key, kept) > TOLERANCE
        offs = [_entered_off(key, x) for x in entered]
        if entered and turned:
            off = min(offs)
            worst = max(worst, off)
            if not off < TOLERANCE:
                return Verdict(
                    reason=f"the unrotated keys of layer {layer} are not what enters its rotation (off by {off:.2g})"
                )
    if not worst < TOLERANCE:
        return Verdict(reason=f"keys rotated again are not what they were (off by {worst:.2g})")
    return Verdict(worst)


def _entered_off(key_BHTD: Tensor, entered: Tensor) -> float:
    """How far a key is from what entered a rotation: the same tensor, its first channels, or heads after tokens."""
    best = float("inf")
    for x in (entered, entered.transpose(1, 2) if entered.ndim == 4 else entered):
        if x.ndim == 4 and x.shape[:3] == key_BHTD.shape[:3] and x.shape[3] <= key_BHTD.shape[3]:
            best = min(best, _off(key_BHTD[..., : x.shape[3]], x))
    return best


def _attention(kv: KV, left: list[Tensor]) -> Verdict:
    """Whether softmax(q.k)v, by the captured scaling and rules, is what each layer's attention gave on."""
    worst = 0.0
    place = torch.arange(TOKENS, device=kv.mask_BT.device)
    assert kv.scaling is not None
    for i, layer in enumerate(kv.layers):
        rule, (q, k, v) = kv.rules[i], (kv.queries[i], kv.keys[i], kv.values[i])
        if rule.biased:
            return Verdict(reason="it adds to q.k by the distance of two tokens, which is not captured")
        group = q.shape[1] // k.shape[1]
        logits = q.float() @ k.repeat_interleave(group, 1).float().mT * kv.scaling[i]
        logits = logits if rule.cap is None else rule.cap * torch.tanh(logits / rule.cap)
        logits = logits.masked_fill(~rule.sees(place[:, None], place), -torch.inf)
        if rule.sink is not None:
            logits = torch.cat([logits, rule.sink.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], dim=-1)
        read = logits.softmax(-1)[..., :TOKENS] @ v.repeat_interleave(group, 1).float()
        given = left[i].reshape(read.shape[0], TOKENS, -1)
        off = _off(read.transpose(1, 2).flatten(2), given)
        worst = max(worst, off)
        if not off < TOLERANCE:
            return Verdict(reason=f"attention made again of queries and keys is off by {off:.2g} in layer {layer}")
    return Verdict(worst)
