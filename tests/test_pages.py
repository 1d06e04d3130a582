"""Promise: README and the pages of docs say what is so: their code runs when it is pasted alone, their links lead
somewhere, and what their tables say of names holds."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import pace_kernels
from pace_kernels import MADA, PACE, ScheduleFreeAdamW

ROOT = Path(__file__).parents[1]
WRITTEN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*WRITTEN, ROOT / "CHANGELOG.md", ROOT / "bench/results/README.md", ROOT / "tests/gpu/README.md"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def without_blocks(path: Path) -> str:
    return re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.S | re.M)


each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)
each_written = pytest.mark.parametrize("page", WRITTEN, ids=name_of)

# ---- code ----

# Imported by a block: it takes seconds, and is skipped where the package is not there.
HEAVY = ("accelerate", "datasets", "deepspeed", "lightning", "transformers", "trl")
# Blocks that leave something behind in their process: a process group, an engine, an accelerator.
APART = re.compile(r"init_process_group|import deepspeed|Accelerator\(|SFTTrainer")


@dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    code: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def needs(self) -> list[str]:
        return [name for name in HEAVY if re.search(rf"^(from|import) {name}\b", self.code, re.M)]


def blocks() -> Iterator[Block]:
    for path in WRITTEN:
        text = path.read_text(encoding="utf-8")
        for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M):
            yield Block(name_of(path), text[: found.start()].count("\n") + 2, found[1], found[2])


BLOCKS = list(blocks())
PYTHON = [
    pytest.param(block, id=str(block), marks=[pytest.mark.slow] if block.needs or APART.search(block.code) else [])
    for block in BLOCKS
    if block.language == "python"
]
# What is so after a block, beside that it ran to its end: by a page and a name that only this block makes.
AFTER: dict[tuple[str, str], str] = {
    ("README.md", "optimizer"): "same(torch.load('averaged.pt'), optimizer.ema_state_dict(model))",
    ("docs/mixed-precision.md", "norm"): "norm > 0 and all(s['step'] == 1 for s in optimizer.state.values())",
    ("docs/checkpoints.md", "saved"): "same(saved['optimizer'], optimizer.state_dict())",
    ("docs/moving.md", "validation"): "validation < before and not optimizer.param_groups[0].get('swapped', False)",
    ("docs/moving.md", "shipped"): "same(shipped['weight'], optimizer.state[model.weight]['ema'])",
    ("docs/moving.md", "clamped"): "0 <= clamped <= 1",
    ("docs/transformers.md", "trainer"): "same(model.state_dict(), trainer.optimizer.optimizer.ema_state_dict(model))",
    ("docs/lightning.md", "trainer"): "same(model.state_dict(), trainer.optimizers[0].ema_state_dict(model))",
    ("docs/trl.md", "trainer"): "same(model.state_dict(), trainer.optimizer.optimizer.ema_state_dict(model))",
    ("docs/accelerate.md", "averages"): "averages.keys() == model.state_dict().keys()",
    ("docs/deepspeed.md", "averages"): "averages.keys() == model.state_dict().keys()",
    ("docs/sharding.md", "averages"): "averages.keys() == model.state_dict().keys()",
    ("docs/mada.md", "optimizer"): "not optimizer.param_groups[0]['learn']",
}
SAME = """
def same(a, b):
    import torch
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
"""


def checks(block: Block) -> list[str]:
    return [
        check
        for (page, name), check in AFTER.items()
        if page == block.page and re.search(rf"\b{name}\b.* = |as {name}:", block.code)
    ]


@pytest.mark.parametrize("block", PYTHON)
@pytest.mark.filterwarnings("ignore")
def test_a_block_runs_alone(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in block.needs:
        if find_spec(name) is None:
            pytest.skip(f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    if APART.search(block.code):
        run_apart(block)
        return
    torch.manual_seed(0)
    names: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("\n" * (block.line - 1) + block.code, str(ROOT / block.page), "exec"), names)
    if "validation" in names:
        torch.manual_seed(0)
        names["before"] = torch.nn.Linear(4, 1)(names["batches"][0]).square().mean().item()
    exec(SAME, names)
    for check in checks(block):
        assert eval(check, names), check


def test_the_script_that_resumes_ends_as_one_that_was_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = next(block.code for block in BLOCKS if block.page == "docs/checkpoints.md" and "start" in block.code)
    stopped = code.replace("    optimizer.zero_grad()", "    assert step < 25\n    optimizer.zero_grad()")
    shipped = []
    for folder, scripts in (("whole", [code]), ("resumed", [stopped, code])):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        for script in scripts:
            torch.seed()  # the script itself has to bring back what it drew
            with pytest.raises(AssertionError) if script is stopped else contextlib.nullcontext():
                exec(script, {})
        shipped.append(torch.load("averaged.pt"))
    assert all(torch.equal(shipped[0][name], shipped[1][name]) for name in shipped[0])


def run_apart(block: Block) -> None:
    code = "\n".join([block.code, SAME, *(f"assert {check}" for check in checks(block))])
    if "deepspeed" in block.needs:  # it would compile an operator for the CPU for half a minute
        code = f"import sys, deepspeed\nsys.modules['deepspeed.comm.torch'].build_shm_op = lambda: None\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_check_belongs_to_a_block() -> None:
    found = [check for block in BLOCKS if block.language == "python" for check in checks(block)]
    assert set(AFTER.values()) <= set(found)


def test_each_block_says_its_language() -> None:
    assert [str(block) for block in BLOCKS if block.language not in ("python", "sh", "text")] == []
    assert sum(block.language == "python" for block in BLOCKS) > 20


def test_no_line_of_code_is_cut_off_on_the_site() -> None:
    for block in BLOCKS:
        assert all(len(line) <= 92 or block.language == "text" for line in block.code.splitlines()), str(block)


def test_commands_are_there() -> None:
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.M))
    lines = [line.partition("#")[0].split() for b in BLOCKS if b.language == "sh" for line in b.code.splitlines()]
    written = "".join(path.read_text(encoding="utf-8") for path in WRITTEN)
    lines += [found.split() for found in re.findall(r"`((?:make|python) [^`]+)`", written)]
    for words in filter(None, lines):
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            del words[0]
        tool, *rest = words
        tool = Path(tool).name
        assert tool in ("make", "python", "pip", "uv"), words
        if tool == "make":
            assert rest[0] in targets, words
        elif tool == "python" and not rest[0].startswith("-"):
            assert (ROOT / rest[0]).exists(), words
        elif tool in ("pip", "uv"):
            assert "install" in rest and rest[-1] in (".", '"setuptools>=77"'), words


@each_page
def test_lists_are_lists_on_the_site_too(page: Path) -> None:
    """GitHub takes a list behind a line of text, and one that is indented by 2; Python-Markdown takes neither."""
    lines = without_blocks(page).splitlines()
    for before, line in zip(["", *lines], lines, strict=False):
        if found := re.match(r"( *)([-*]|\d+\.) ", line):
            assert len(found[1]) % 4 == 0, line
            assert found[1] or not before.strip() or re.match(r" |([-*]|\d+\.) ", before), line


# ---- links ----


def without_code(page: Path) -> str:
    return re.sub(r"`[^`\n]*`", "", without_blocks(page))


def anchors(path: Path) -> set[str]:
    """Those of the headings, as GitHub and mkdocs.yml make them."""
    titles = re.findall(r"^#+ (.*)$", without_blocks(path), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    text = without_code(page)
    links = re.findall(r"\]\(([^)]*)\)", text.replace("[]", "[.]"))
    assert not re.search(r"\]\[|^\[[^]]+\]:", text, re.M), "links are written in place"
    for link in links:
        if re.match(r"\w+:", link):
            assert re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]{2,}(/[\w./~%#?=&-]*)?", link), link
            assert "arxiv" not in link or re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", link), link
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


@each_written
def test_files_in_the_text_are_there(page: Path) -> None:
    text = without_blocks(page)
    folders = "bench|csrc|docs|examples|pace_kernels|research|tests|tools|triton_kernels"
    for found in re.findall(rf"`((?:{folders})/[^\s`:,]+)", text):
        assert list(ROOT.glob(found.rstrip("/"))) or found == "csrc/definitions.h", found


# Names in code that are not ours: of torch, trainers and files that they write; and, in the changelog, of what is gone.
THEIRS = {"DefaultLoadPlanner", "FSDPStrategy", "allow_partial_load", "recipe_state"}
GONE = {"MOVING", "swap_"}


@functools.cache
def names_in_code() -> set[str]:
    """All words of the code but this file's, and the names of its files."""
    ends = (".py", ".pyi", ".h", ".cuh", ".cu", ".cpp", ".yaml", ".toml")
    tops = ("bench", "csrc", "examples", "pace_kernels", "research", "tests", "tools", "triton_kernels")
    files = [ROOT / name for name in ("Makefile", "pyproject.toml", "setup.py")]
    files += [path for top in tops for path in (ROOT / top).rglob("*") if path.suffix in ends]
    texts = (path.read_text(encoding="utf-8") for path in files if path != Path(__file__))
    return {path.stem for path in files}.union(*(re.findall(r"[A-Za-z_]\w*", text) for text in texts))


@pytest.mark.parametrize("page", [*WRITTEN, ROOT / "CHANGELOG.md", ROOT / "tests/gpu/README.md"], ids=name_of)
def test_names_in_the_text_are_there(page: Path) -> None:
    """A word in code that has a capital letter or an underscore is a class, an option, a variable, a test, a file."""
    text = without_blocks(page)
    words = {word for span in re.findall(r"`([^`\n]+)`", text) for word in re.findall(r"[A-Za-z_]\w*", span)}
    names = {word for word in words if len(word) > 1 and word[0] != "_" and ("_" in word or word[0].isupper())}
    assert names - names_in_code() <= THEIRS | (GONE if page.name == "CHANGELOG.md" else set())


@each_written
def test_arguments_in_the_text_are_those_of_what_is_called(page: Path) -> None:
    """Of `PACE(..., state_bits=8)` and the like, and of `optimizer.method(...)`."""
    text = without_blocks(page)
    for span in re.findall(r"`([^`\n]+)`", text):
        try:
            tree = ast.parse(span, mode="eval")
        except SyntaxError:
            continue  # a command, a fragment
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            where, _, method = name.rpartition(".")
            owners = [PACE, MADA] if where == "optimizer" else [MADA] if where == "MADA" else [pace_kernels]
            target = next((getattr(owner, method) for owner in owners if hasattr(owner, method)), None)
            if not callable(target) or where not in ("", "MADA", "optimizer", "pace_kernels"):
                continue  # of torch or a trainer, or not of these optimizers
            known = set(inspect.signature(target).parameters)
            if method == "preset":  # it passes the others on
                known |= set(inspect.signature(MADA).parameters)
            assert {word.arg for word in call.keywords} <= known | {None}, span


def test_the_first_screen_is_short() -> None:
    readme = text_of("README.md")
    assert len(readme.splitlines()) <= 150
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", readme))
    assert linked == {path.name for path in WRITTEN if path.parent.name == "docs"}
    example = next(block for block in BLOCKS if block.page == "README.md" and block.language == "python")
    assert len(example.code.splitlines()) <= 12


# ---- Moving ----


def sections(name: str) -> list[str]:
    return re.split(r"^## ", text_of(name), flags=re.M)[1:]


def by_position(kind: type) -> dict[str, object]:
    parameters = inspect.signature(kind).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


def test_the_arguments_by_position_are_as_named() -> None:
    assert f"`PACE({', '.join(by_position(PACE))})`" in text_of("docs/moving.md")


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
    (told,) = [line for line in sections("docs/moving.md")[1].splitlines() if "by default |" in line]
    assert told.replace("1e-4", "0.0001").startswith(f"| `{rows[0]}` by default | `{rows[1]}` by default;")


def test_what_is_told_of_schedulefree() -> None:
    module = pytest.importorskip("schedulefree")
    theirs, ours, section = by_position(module.AdamWScheduleFree), by_position(PACE), sections("docs/moving.md")[2]
    names = [name for name in theirs if name != "foreach"]
    assert f"`AdamWScheduleFree({', '.join(names)})`" in section and theirs["weight_lr_power"] == 2
    row = " | ".join(f"`lr={x['lr']}`, `weight_decay={x['weight_decay']}` by default" for x in (theirs, ours))
    assert f"| {row} |" in section
    assert [*by_position(ScheduleFreeAdamW)] == [*theirs]


# ---- Memory ----


def test_states_take_the_bytes_of_the_table() -> None:
    rows = [line.split(" | ") for line in text_of("docs/memory.md").splitlines() if line.startswith("| `")]
    assert len(rows) > 10
    for what, held, _ in rows:
        weight = torch.nn.Parameter(torch.ones(1000))
        weight.grad = torch.ones(1000)
        code = what.split("`")[1]
        optimizer = eval(code, {**vars(pace_kernels), "torch": torch, "params": [weight]})
        for _ in range(2):
            optimizer.step()
        states = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
        found = sum(value.numel() * value.element_size() for value in states if value.numel() == 1000)
        assert found == 1000 * int(re.match(r"\d+", held)[0]), what


# ---- With other software ----


def named_tests() -> list[tuple[str, str]]:
    return re.findall(r"`([\w/]+\.py)::(\w+)`", text_of("docs/with-other-software.md"))


def test_each_test_that_the_page_names_is_there() -> None:
    assert len(named_tests()) > 30
    for file, name in named_tests():
        assert re.search(rf"^def {name}\(", (Path(__file__).parent / file).read_text(), re.M), (file, name)


def test_each_row_names_its_test() -> None:
    rows = [line for line in sections("docs/with-other-software.md")[0].splitlines() if line.startswith("| ")]
    for row in rows[2:]:
        assert re.fullmatch(r"(`[\w/]+\.py::\w+`(, )?)+", row.rstrip(" |").rpartition(" | ")[2]), row
