"""What mkdocs.yml needs besides mkdocs: pages from outside of docs/, and docstrings as Markdown.

Pages link to each other as on GitHub, by paths in the repository. On the site a link to a page goes to that page, and a
link to any other file of the repository becomes its text.
"""

from __future__ import annotations

import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
# Path in the repository: path on the site.
BROUGHT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "bench/results/README.md": "results.md",
    "tests/gpu/README.md": "gpu-tests.md",
    **{f"bench/results/{path.name}": f"results/{path.name}" for path in (ROOT / "bench/results").glob("*.webp")},
}
ORIGIN = {there: here for here, there in BROUGHT.items()}
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
# Of docs/api.md.
SECTIONS = {name: name.lower() for name in ("PACE", "MADA", "Pullback", "ScheduleFreeAdamW", "backends")}
SECTIONS |= dict.fromkeys(("averaged", "ema_state_dict"), "the-average-of-a-model") | {"clip_coefficient": "clipping"}
ROLE = re.compile(r":(?:class|func|meth|mod):`(\w+(?:\.\w+)*)`")


def on_files(files: Files, config: Any) -> Files:
    for here, there in BROUGHT.items():
        if there.endswith(".md"):
            files.append(File.generated(config, there, content=(ROOT / here).read_text(encoding="utf-8")))
        else:
            files.append(File.generated(config, there, abs_src_path=str(ROOT / here)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    place = page.file.src_uri
    folder = posixpath.dirname(ORIGIN.get(place, f"docs/{place}"))

    def link(found: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, found[1]))
        there = BROUGHT.get(target) or target.removeprefix("docs/")
        if there == target and (ROOT / target).exists():
            return "](repository)"  # no page of the site
        return f"]({posixpath.relpath(there, posixpath.dirname(place) or '.')}{found[2] or ''})"

    return re.sub(r"\[([^][]*)\]\(repository\)", r"\1", LINK.sub(link, markdown))


class Docstrings(griffe.Extension):
    """The docstrings are written for help(): a paragraph `::` before an indented block, roles such as :class:`PACE`,
    doctests, powers with `**`, and formulas between two lines that tests/test_formula.py looks for."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^ *\[(formula: .*|end)\]\n", "", obj.docstring.value, flags=re.M)
            text = re.sub(r"^::\n(\n(?: {2}.*\n|\n)+)", block, text, flags=re.M)
            text = re.sub(r"^>>> .*\n?(?:.+\n?)*", example, text, flags=re.M)
            text = re.sub(r"(\d)\*\*(-?\d)", r"\1^\2", text)
            obj.docstring.value = ROLE.sub(role, text)


def block(found: re.Match[str]) -> str:
    return f"```text\n{textwrap.dedent(found[1]).strip()}\n```\n\n"


def example(found: re.Match[str]) -> str:
    """A doctest as code to copy, with its output as comments."""
    lines = [re.sub(r" +# doctest: .*", "", line) for line in found[0].splitlines()]
    code = [line[4:] if line.startswith((">>> ", "... ")) else f"# {line}" for line in lines]
    return "\n".join(["```python", *code, "```", ""])


def role(found: re.Match[str]) -> str:
    """A link to the section of docs/api.md, which has all docstrings, where there is one: with the page's name, since
    mkdocstrings puts its own prefix before an anchor alone."""
    name = found[1].removeprefix("pace_kernels.")
    section = SECTIONS.get(name)
    return f"[`{name}`](api.md#{section})" if section else f"`{name}`"
