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


def by_position(kind: type) -> dict[str, object]:
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


def test_the_arguments_by_position_are_as_named() -> None:
    assert f"`PACE({', '.join(by_position(PACE))})`" in (PAGES / "MOVING.md").read_text()


# Of the published pace-optimizer, which is on no package index that CI has: its source, read in 2026.
PUBLISHED = {
    "lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "lambda_pullback": 0.0,
    "clamp_pullback": True, "beta_ema": 0.01, "use_ema_eval": False, "ema_kappa": None, "ema_rho": 0.0,
    "ema_gamma": 1.0, "ema_update_freq": 1, "log_stats": False,
}  # fmt: skip


def test_the_defaults_that_differ_are_told() -> None:
    ours = by_position(PACE)
    assert [*ours][1:] == [*PUBLISHED]
    differ = [name for name, default in PUBLISHED.items() if ours[name] != default]
    rows = [", ".join(f"{name}={values[name]}" for name in differ) for values in (PUBLISHED, ours)]
    (told,) = [line for line in sections("MOVING.md")[1].splitlines() if "by default |" in line]
    assert told.replace("1e-4", "0.0001").startswith(f"| `{rows[0]}` by default | `{rows[1]}` by default;")


def test_what_is_told_of_schedulefree() -> None:
    module = pytest.importorskip("schedulefree")
    theirs, ours, section = by_position(module.AdamWScheduleFree), by_position(PACE), sections("MOVING.md")[2]
    names = [name for name in theirs if name != "foreach"]
    assert f"`AdamWScheduleFree({', '.join(names)})`" in section and theirs["weight_lr_power"] == 2
    row = " | ".join(f"`lr={x['lr']}`, `weight_decay={x['weight_decay']}` by default" for x in (theirs, ours))
    assert f"| {row} |" in section


# ---- With other software ---------------------------------------------------------------------------------------------

OTHER_SOFTWARE = (PAGES.parent / "docs" / "with-other-software.md").read_text()


def tests_named() -> list[tuple[str, str]]:
    return re.findall(r"`([\w/]+\.py)::(\w+)`", OTHER_SOFTWARE)


def test_each_test_that_the_page_names_is_there() -> None:
    assert len(tests_named()) > 30
    for file, name in tests_named():
        assert re.search(rf"^def {name}\(", (Path(__file__).parent / file).read_text(), re.M), (file, name)


def test_each_row_names_its_test() -> None:
    rows = [line for line in OTHER_SOFTWARE.split("\n## ")[1].splitlines() if line.startswith("| ")]
    for row in rows[2:]:
        assert re.fullmatch(r"(`[\w/]+\.py::\w+`(, )?)+", row.rstrip(" |").rpartition(" | ")[2]), row
