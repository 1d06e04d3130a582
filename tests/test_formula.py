"""Promise: one formula text, the same in every language and in the README."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PLACES = {
    "PACE": {"README.md", "csrc/rules/pace.h", "pace_kernels/pace.py", "pace_kernels/torch_rules/pace.py"},
    "MADA": {"README.md", "csrc/rules/mada.h", "pace_kernels/mada.py", "pace_kernels/torch_rules/mada.py"},
    "MADA hypergradients": {"csrc/rules/mada.h", "pace_kernels/torch_rules/mada.py"},
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


def test_the_example_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})
    assert (tmp_path / "averaged.pt").exists()
