"""Tokenizers: the built-in one of single characters, local and hub ones, and trimming to what some texts need.

All come out as plain fast tokenizers (`PreTrainedTokenizerFast`) that `AutoTokenizer` loads back from a folder.
One rule for roles: what the tokenizer itself says; where it says nothing, beginning-of-text is its `cls` (or there
is none and nothing is put in front), end-of-text is its `sep`, and padding is end-of-text, which is harmless because
padding is known by its mask and never by its id. So Qwen2.5 pads with `<|endoftext|>`, GPT-2 and Llama-3 with their
end-of-text. Knows no task.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from tokenizers import Encoding, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from kvdistill.core.errors import DataError
from kvdistill.core.files import sha256_of
from kvdistill.core.hub import hub_reachable

CHARACTERS = "characters"
_CHUNK = 1000  # texts; what is known of each of their pieces takes much more memory than the texts
SYMBOLS = "0123456789+-*=;:?., "
_ROLES = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}


def character_tokenizer(extra_symbols: Iterable[str] = "") -> PreTrainedTokenizerFast:
    """One ASCII character, one token: SYMBOLS, then the bytes of `extra_symbols`; decoding restores the text.

    A byte-level BPE without a single merge (so a character beyond ASCII is one token per UTF-8 byte). In this form it
    also survives transformers 5, whose AutoTokenizer rebuilds the tokenizer of every `qwen2` folder as a byte-level
    BPE of its own from the saved vocabulary and merges, whatever class and rules were saved.
    """
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    given = [letter for symbol in SYMBOLS for letter in cut.pre_tokenize_str(symbol)[0][0]]
    extra = sorted({letter for symbol in extra_symbols for letter in cut.pre_tokenize_str(symbol)[0][0]} - set(given))
    vocabulary = {symbol: number for number, symbol in enumerate([*_ROLES.values(), *given, *extra])}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=_ROLES["unk_token"]))
    backend.pre_tokenizer = cut
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **_ROLES)


def load_tokenizer(
    name: str, root: str | None = None, place: str = "data.tokenizer", *, texts: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """`characters`, a folder, `root:NAME` (data.root/tokenizers/NAME) or a hub id, with its roles settled.

    `root:NAME or ID`: the folder where data.root has it, else the hub id.
    texts: for `characters`, the texts it has to be able to write. Raises DataError with the fix for a name that leads
    nowhere, a hub out of reach, and a tokenizer that is not a fast one.
    """
    if name == CHARACTERS:
        symbols: set[str] = set()
        for text in texts:
            symbols.update(text)
        return character_tokenizer(symbols)
    folder = _find_folder(name, root, place)
    name = name.split(" or ")[-1].strip()
    in_gguf = [] if folder is None or (folder / "tokenizer.json").is_file() else sorted(folder.glob("*.gguf"))
    if folder is not None and not in_gguf and not (folder / "tokenizer.json").is_file():
        raise DataError(
            f"{folder} holds no tokenizer.json",
            place=place,
            fix="give the folder of a fast tokenizer (save_pretrained of one writes it)",
        )
    local_only = folder is not None or not hub_reachable()
    try:
        if in_gguf:
            found: Any = AutoTokenizer.from_pretrained(str(folder), gguf_file=in_gguf[0].name)
        else:
            found = PreTrainedTokenizerFast.from_pretrained(str(folder or name), local_files_only=local_only)
    except Exception as error:  # a stranger's file: the libraries raise whatever they come across in it
        reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
        what, fix = f"cannot load a fast tokenizer from {folder}: {reason}", "check its tokenizer.json"
        if folder is None:
            why = "the hub cannot be reached and it is not in the local cache" if local_only else reason
            what = f"cannot load tokenizer {name!r}: {why}"
            fix = "check the id and the network, or give a folder, `root:NAME` with data.root=DIR, or `characters`"
        raise DataError(what, place=place, fix=fix) from error
    return settle_roles(found, place=place)


def settle_roles(tokenizer: PreTrainedTokenizerFast, *, place: str = "data.tokenizer") -> PreTrainedTokenizerFast:
    """The same pieces and ids as a plain fast tokenizer with end-of-text and padding (the rule above)."""
    eos = tokenizer.eos_token or tokenizer.sep_token
    if eos is None:
        raise DataError(
            "the tokenizer has no end-of-text token",
            place=place,
            fix="set eos_token in its tokenizer_config.json to a token of its vocabulary",
        )
    roles = {
        "bos_token": tokenizer.bos_token or tokenizer.cls_token,
        "eos_token": eos,
        "pad_token": tokenizer.pad_token or eos,
        "unk_token": tokenizer.unk_token,
    }
    return _plain(tokenizer.backend_tokenizer, roles, tokenizer.chat_template, tokenizer.model_max_length)


def with_end_token(
    tokenizer: PreTrainedTokenizerFast, end: str, *, special: Iterable[str] = ()
) -> PreTrainedTokenizerFast:
    """The same pieces and ids, with `end` (a token of its vocabulary) as end-of-text. `special`, `end`: such tokens,
    which a text that is tokenized as plain text cannot hold."""
    backend, definition, marked = tokenizer.backend_tokenizer, _definition(tokenizer), {end, *special}
    if any(not token["special"] and token["content"] in marked for token in definition["added_tokens"]):
        for token in definition["added_tokens"]:
            token["special"] |= token["content"] in marked
        backend = Tokenizer.from_str(json.dumps(definition))
    roles = {role: getattr(tokenizer, role) for role in _ROLES} | {"eos_token": end}
    return _plain(backend, roles, tokenizer.chat_template, tokenizer.model_max_length)


def as_read(tokenizer: PreTrainedTokenizerFast, *, template: str) -> PreTrainedTokenizerFast:
    """A copy that puts around a text, when it is simply called, what `encode_rows` puts there, and nothing else.

    template: `plain`: beginning-of-text in front, where the tokenizer has one; `chat`: nothing, since the template
    writes its own. So that a model saved beside it is asked by plain transformers as it was trained.
    """
    copied = _plain(
        tokenizer.backend_tokenizer,
        {role: getattr(tokenizer, role) for role in _ROLES},
        tokenizer.chat_template,
        tokenizer.model_max_length,
    )
    bos, number = copied.bos_token, copied.bos_token_id
    begins = template == "plain" and bos is not None
    copied.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0" if begins else "$A:0",
        pair=f"{bos}:0 $A:0 $B:0" if begins else "$A:0 $B:0",
        special_tokens=[(bos, number)] if begins else [],
    )
    return copied


def fingerprint_tokenizer(tokenizer: PreTrainedTokenizerFast) -> str:
    """SHA-256 over pieces, merges, rules and roles: equal exactly when two tokenizers do the same."""
    roles = {role: getattr(tokenizer, role) for role in _ROLES}
    return sha256_of([_definition(tokenizer), roles])


def encode_plain(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[Encoding]:
    """Ids and offsets of each text, whole, as plain text: what looks like a special token is spelt out."""
    backend = tokenizer.backend_tokenizer
    if backend.padding is not None:
        backend.no_padding()
    if backend.truncation is not None:
        backend.no_truncation()
    if not backend.encode_special_tokens:
        backend.encode_special_tokens = True  # transformers' own calls set these three as they need them
    return backend.encode_batch(list(texts), add_special_tokens=False)


def trim_tokenizer(
    tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]
) -> tuple[PreTrainedTokenizerFast, dict[int, int]]:
    """A byte-level BPE tokenizer with only the pieces that `texts` use, and old id -> new id of the pieces kept.

    texts: gone through once, and a second time to compare, a chunk at a time; of an iterator, which cannot be gone
    through again, the texts that brought in a new piece are compared.
    Kept are those pieces, the pieces and merges that build them, all 256 bytes (so any other text still round-trips),
    and every added token. New ids are dense and in the old order. A kept merge sequence reproduces the old pieces
    because BPE applies the lowest-ranked merge at hand, and those applied are all kept in their order.
    Raises DataError for other kinds of tokenizer, and where a text would encode differently after all.
    """
    definition = _definition(tokenizer)
    model = definition["model"]
    _require_byte_level(definition)
    numbers, witnesses = _used_ids(tokenizer, texts)
    pieces = {number: piece for piece, number in model["vocab"].items()}
    used = {pieces[number] for number in numbers if number in pieces}
    merges = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]]
    kept, kept_merges = _close_over_merges(used | set(pre_tokenizers.ByteLevel.alphabet()), merges)
    added = {token["id"]: token["content"] for token in definition["added_tokens"]}
    old_ids = sorted({model["vocab"][piece] for piece in kept} | set(added))
    id_map = {old: new for new, old in enumerate(old_ids)}
    trimmed = settle_roles(_rebuild(tokenizer, definition, id_map, [m for m in merges if m in kept_merges]))
    for chunk in _chunks(witnesses):
        for text, old, new in zip(chunk, encode_plain(tokenizer, chunk), encode_plain(trimmed, chunk), strict=True):
            if [id_map.get(number) for number in old.ids] != new.ids:
                raise DataError(
                    f"trimming would change how {text[:60]!r} is tokenized",
                    place="data.trim_vocabulary",
                    fix="set data.trim_vocabulary=false for this tokenizer, and report it",
                )
    return trimmed, id_map


def require_covered(
    tokenizer: PreTrainedTokenizerFast, whole: PreTrainedTokenizerFast | None, texts: Iterable[str], place: str
) -> None:
    """DataError for a text that a tokenizer made of other seeds' texts cannot write, or not as the whole one does."""
    for text in texts:
        pieces = tokenizer.tokenize(text)
        if tokenizer.unk_token in pieces if whole is None else pieces != whole.tokenize(text):
            raise DataError(
                f"the tokenizer of this run was made of other seeds' texts, and cannot write {text[:40]!r}",
                place=place,
                fix="give all seeds at once in a new run_dir, or a tokenizer that is not made of (or trimmed to) texts",
            )


def _used_ids(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> tuple[set[int], Iterable[str]]:
    """The ids that the texts are made of, and the texts to compare afterwards."""
    stream = iter(texts)
    used: set[int] = set()
    witnesses: list[str] = []
    for chunk in _chunks(stream):
        for text, encoding in zip(chunk, encode_plain(tokenizer, chunk), strict=True):
            before = len(used)
            used.update(encoding.ids)
            if len(used) > before:
                witnesses.append(text)
    return used, witnesses if stream is texts else texts


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Different texts of a chunk, once each: what a chat template writes around every text need not be read again."""
    stream = iter(texts)
    while chunk := list(dict.fromkeys(islice(stream, _CHUNK))):
        yield chunk


def _find_folder(name: str, root: str | None, place: str) -> Path | None:
    """The folder that `name` stands for: of `A or B or C` the first that is there. None for a hub id at the end."""
    for choice in (os.path.expandvars(choice.strip()) for choice in name.split(" or ")):
        folder = Path(choice).expanduser()
        if choice.startswith("root:"):
            folder = Path(root or "").expanduser() / "tokenizers" / choice.removeprefix("root:")
        if folder.is_dir() and (root is not None or not choice.startswith("root:")):
            return folder
    if choice.startswith("root:"):
        if root is None:
            raise DataError(f"{choice} needs data.root", place=place, fix="set data.root=DIR (with tokenizers/)")
        beside = folder.parent
        there = sorted(path.name for path in beside.iterdir() if path.is_dir()) if beside.is_dir() else []
        raise DataError(
            f"no tokenizer folder {folder}",
            place=place,
            fix=f"there are: {', '.join(there)}" if there else f"make {beside}/NAME with a tokenizer.json in it",
        )
    if choice.startswith((".", "/", "~")) or choice.count("/") > 1:
        raise DataError(
            f"no such folder: {choice}", place=place, fix="give a folder, `root:NAME`, `characters`, or a hub id"
        )
    return None


def _plain(
    backend: Tokenizer, roles: Mapping[str, str | None], chat_template: Any, model_max_length: int
) -> PreTrainedTokenizerFast:
    backend = copy.deepcopy(backend)
    backend.no_padding()
    backend.no_truncation()
    named = {role: token for role, token in roles.items() if token is not None}
    plain = PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, model_max_length=model_max_length, **named
    )
    plain.chat_template = chat_template
    return plain


def _definition(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    definition = json.loads(tokenizer.backend_tokenizer.to_str())
    return definition | {"truncation": None, "padding": None}


def _require_byte_level(definition: Mapping[str, Any]) -> None:
    model = definition["model"]
    whole = model["type"] == "BPE" and all(byte in model["vocab"] for byte in pre_tokenizers.ByteLevel.alphabet())
    if not whole or '"ByteLevel"' not in json.dumps([definition["pre_tokenizer"], definition["decoder"]]):
        raise DataError(
            f"only byte-level BPE tokenizers can be trimmed, this one is {model['type']}",
            place="data.trim_vocabulary",
            fix="set data.trim_vocabulary=false, or use a Qwen, Llama-3 or GPT-2 tokenizer",
        )


def _close_over_merges(used: Iterable[str], merges: Sequence[tuple[str, ...]]) -> tuple[set[str], set[tuple[str, ...]]]:
    """`used` with every piece on the way to them, and the merges on the way.

    The merges inside a finished piece do not depend on its neighbours, so each piece is built on its own. A piece that
    its merges do not reach (Llama-3 looks whole words up first) stays as a piece.
    """
    ranks = {merge: rank for rank, merge in enumerate(merges)}
    kept: set[str] = set()
    kept_merges: set[tuple[str, ...]] = set()
    for piece in used:
        kept.add(piece)
        parts = list(piece)
        while len(parts) > 1:
            pairs = list(pairwise(parts))
            best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
            if pairs[best] not in ranks:
                break
            parts[best : best + 2] = ["".join(pairs[best])]
            kept_merges.add(pairs[best])
            kept.update((*pairs[best], parts[best]))
    return kept, kept_merges


def _rebuild(
    tokenizer: PreTrainedTokenizerFast,
    definition: dict[str, Any],
    id_map: Mapping[int, int],
    merges: Sequence[tuple[str, ...]],
) -> PreTrainedTokenizerFast:
    """The tokenizer again, from its definition with new ids."""
    vocabulary = definition["model"]["vocab"].items()
    kept = {piece: id_map[number] for piece, number in vocabulary if number in id_map}
    processor = copy.deepcopy(definition["post_processor"])
    _renumber_processor(processor, id_map)
    new = definition | {
        "model": definition["model"] | {"vocab": kept, "merges": [list(merge) for merge in merges]},
        "added_tokens": [token | {"id": id_map[token["id"]]} for token in definition["added_tokens"]],
        "post_processor": processor,
    }
    roles = {role: getattr(tokenizer, role) for role in (*_ROLES, "cls_token", "sep_token")}
    return _plain(Tokenizer.from_str(json.dumps(new)), roles, tokenizer.chat_template, tokenizer.model_max_length)


def _renumber_processor(processor: dict[str, Any] | None, id_map: Mapping[int, int]) -> None:
    """New ids in the rules that put special tokens around a text (in place)."""
    if processor is None:
        return
    for inner in processor.get("processors", []):
        _renumber_processor(inner, id_map)
    if processor["type"] == "TemplateProcessing":
        for special in processor["special_tokens"].values():
            special["ids"] = [id_map[number] for number in special["ids"]]
    for role in ("sep", "cls"):
        if isinstance(processor.get(role), list):
            processor[role] = [processor[role][0], id_map[processor[role][1]]]
