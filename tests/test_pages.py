"""Promise: the examples of the pages beside the code run, and what their tables say of names is so."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch

from pace_kernels import PACE

PAGES = Path(__file__).parents[1] / "pace_kernels"


def sections(name: str) -> list[str]:
    return re.split(r"^## ", (PAGES / name).read_text(), flags=re.M)[1:]


@pytest.mark.parametrize("section", sections("MOVING.md"), ids=lambda text: text.partition("\n")[0])
def test_moving(section: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", section, re.S)
    torch.manual_seed(0)
    model, target = torch.nn.Linear(4, 1), torch.randn(4, 1)
    inputs = [torch.randn(16, 4) for _ in range(40)]
    names = {
        "torch": torch,
        "model": model,
        "batches": inputs,
        "loss_of": lambda m, x: (m(x) - x @ target).square().mean(),
    }
    before = names["loss_of"](model, inputs[-1]).item()
    exec(compile(code, "MOVING.md", "exec"), names)
    assert names["validation"] < before
    optimizer = names["optimizer"]
    assert isinstance(optimizer, PACE) and not optimizer.param_groups[0].get("swapped", False)
    if "shipped" in names:
        weight = optimizer.state[model.weight]["ema"]
        assert torch.equal(names["shipped"]["weight"], weight) and not torch.equal(model.weight, weight)


def test_the_arguments_by_position_are_as_named() -> None:
    names = [p.name for p in inspect.signature(PACE).parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert f"`PACE({', '.join(names)})`" in (PAGES / "MOVING.md").read_text()
