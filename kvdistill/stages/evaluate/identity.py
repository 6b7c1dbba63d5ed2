"""What identifies a model in the folder of its answers: weights, tokenizer, and how prompts begin. No paths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvdistill.core.files import sha256_file, sha256_of
from kvdistill.data.tokenizers import fingerprint_tokenizer


def identify(model: str, config: Any, tokenizer: Any, dtype: str, *, begins_with_bos: bool) -> dict[str, Any]:
    """Checksums of a folder's weights and config, or hub id and commit; the tokenizer's fingerprint; the dtype."""
    return {
        "model": _weights(model, config),
        "tokenizer": _tokenizer(tokenizer),
        "dtype": dtype,
        "begins_with_bos": begins_with_bos,
    }


def _weights(model: str, config: Any) -> dict[str, Any]:
    folder = Path(model)
    if folder.is_dir():
        files = sorted([*folder.glob("*.safetensors"), folder / "config.json"])
        return {"sha256": sha256_of({file.name: sha256_file(file) for file in files})}
    return {"hub": model, "revision": getattr(config, "_commit_hash", None)}


def _tokenizer(tokenizer: Any) -> str:
    """Pieces, rules, roles and the chat template, which a fingerprint of the pieces leaves out."""
    pieces = (
        fingerprint_tokenizer(tokenizer)
        if tokenizer.is_fast
        else sha256_of([tokenizer.get_vocab(), {k: str(v) for k, v in tokenizer.special_tokens_map.items()}])
    )
    return sha256_of([pieces, tokenizer.chat_template])
