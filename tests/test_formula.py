"""Promise: one formula text, the same in every language and in the README."""

from __future__ import annotations

import os
import re
import textwrap
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
CODE = {"csrc/rules/{}.h", "pace_kernels/torch_rules/{}.py", "triton_kernels/{}.py"}
PLACES = {
    "PACE": {"README.md", "pace_kernels/pace.py", *(place.format("pace") for place in CODE)},
    "MADA": {"README.md", "pace_kernels/mada.py", *(place.format("mada") for place in CODE)},
    "Pullback": {"README.md", "pace_kernels/pullback.py", *(place.format("pullback") for place in CODE)},
    "ScheduleFreeAdamW": {
        "README.md",
        "pace_kernels/schedule_free.py",
        *(place.format("schedule_free") for place in CODE),
    },
    "MADA hypergradients": {place.format("mada") for place in CODE},
}


def blocks() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    files = [ROOT / "README.md", *ROOT.glob("csrc/**/*.h"), *ROOT.glob("*_kernels/**/*.py")]
    for path in files:
        text = re.sub(r"(?m)^// ?", "", path.read_text())
        for name, body in re.findall(r"\[formula: ([^\]]+)\]\n(.*?)\n[ \t]*\[end\]", text, re.S):
            found.setdefault(name, {})[str(path.relative_to(ROOT))] = textwrap.dedent(body)
    return found


@pytest.mark.parametrize("rule", PLACES)
def test_the_formula_is_the_same_everywhere(rule: str) -> None:
    texts = blocks()[rule]
    assert set(texts) >= PLACES[rule]
    assert len(set(texts.values())) == 1, texts


def test_no_formula_is_written_in_one_place_only() -> None:
    for rule, texts in blocks().items():
        assert len(texts) > 1, rule
        assert len(set(texts.values())) == 1, rule


def test_the_examples_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training, pulling, free, scaling, saving = re.findall(
        r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S
    )
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(compile(training, "README.md", "exec"), names)
    assert (tmp_path / "averaged.pt").exists()
    model, optimizer = names["model"], names["optimizer"]
    optimizer.zero_grad()
    names |= {"scaler": torch.amp.GradScaler("cpu"), "loss": model(torch.ones(64, 32)).square().mean()}
    for short in (pulling, free):
        exec(compile(short, "README.md", "exec"), {"torch": names["torch"], "model": model})
    before = model.weight.detach().clone()
    exec(compile(scaling, "README.md", "exec"), names)
    assert names["norm"] > 0 and not torch.equal(model.weight, before)
    exec(compile(saving, "README.md", "exec"), names | {"os": os, "zipfile": zipfile})
    assert (tmp_path / "checkpoint.pt").exists()
