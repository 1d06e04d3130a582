"""Promise: one formula text, the same in every language and in the documentation."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CODE = {"csrc/rules/{}.h", "pace_kernels/torch_rules/{}.py", "triton_kernels/{}.py"}
PLACES = {
    "PACE": {"docs/pace.md", "pace_kernels/pace.py", *(place.format("pace") for place in CODE)},
    "MADA": {"docs/mada.md", "pace_kernels/mada.py", *(place.format("mada") for place in CODE)},
    "Pullback": {"docs/pullback.md", "pace_kernels/pullback.py", *(place.format("pullback") for place in CODE)},
    "ScheduleFreeAdamW": {
        "docs/schedule-free.md",
        "pace_kernels/schedule_free.py",
        *(place.format("schedule_free") for place in CODE),
    },
    "MADA hypergradients": {place.format("mada") for place in CODE},
}


def blocks() -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    files = [*ROOT.glob("docs/*.md"), *ROOT.glob("csrc/**/*.h"), *ROOT.glob("*_kernels/**/*.py")]
    in_code, in_pages = r"\[formula: ([^\]]+)\]\n(.*?)\n[ \t]*\[end\]", r"<!-- formula: (.*?) -->\n```text\n(.*?)\n```"
    for path in files:
        text = re.sub(r"(?m)^// ?", "", path.read_text())
        for name, body in re.findall(in_pages if path.suffix == ".md" else in_code, text, re.S):
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
