"""Promise: `make docs` builds the site strictly, it fetches nothing from elsewhere, and a browser reads each page."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOOKS = ROOT / "tools" / "docs_site.py"
OWN = ROOT / ".venv-docs" / "bin" / "python"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PYTHON = next(
    (
        python
        for python, there in (
            (str(OWN), OWN.exists()),
            (sys.executable, importlib.util.find_spec("mkdocs") is not None),
        )
        if there
    ),
    None,
)
if PYTHON is None:
    pytest.skip("mkdocs is not installed: make docs installs it", allow_module_level=True)


def build(target: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [
        str(PYTHON),
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--config-file",
        str(config),
        "--site-dir",
        str(target),
    ]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("site")
    done = build(target)
    assert done.returncode == 0, done.stderr
    return target


def pages(site: Path) -> list[str]:
    return sorted(path.name for path in site.glob("*.html") if path.name != "404.html")


def test_it_is_built_strictly(site: Path) -> None:
    written = {path.stem for path in (ROOT / "docs").glob("*.md")}
    brought = {"index", "contributing", "changelog", "results", "gpu-tests"}
    assert {name.removesuffix(".html") for name in pages(site)} == written | brought
    api = (site / "api.html").read_text()
    for name in ("PACE", "MADA", "Pullback", "ScheduleFreeAdamW"):
        assert f'href="#{name.lower()}"' in api
    # What is written for help() is Markdown here.
    assert "[formula" not in api and ":class:" not in api and "<p>::" not in api and "lambda_pullback" in api
    assert "&gt;&gt;&gt;" not in api and "doctest" not in api and "2**" not in api


def test_anchors_exist_and_private_names_do_not(site: Path) -> None:
    """Also those of docstrings, which mkdocs does not check."""
    texts = {name: (site / name).read_text() for name in pages(site)}
    anchors = {name: set(re.findall(r' id="?([^\s">]+)', text)) for name, text in texts.items()}
    links = [
        (n, page or n, anchor) for n, t in texts.items() for page, anchor in re.findall(r'href="([^":#?]*)#([^"]+)"', t)
    ]
    assert len(links) > 500
    assert [link for link in links if link[1] in anchors and link[2] not in anchors[link[1]] | {"__skip"}] == []
    assert not [anchor for anchor in anchors["api.html"] if re.search(r"pace_kernels\S*\._", anchor)]
    for name in ("UseAverage", "optimizer_from", "AveragingMixin", "step_in_backward"):
        assert re.search(rf"<h[2-5][^>]*>(?:(?!</h).)*{name}", texts["api.html"], re.DOTALL), name


def test_a_link_that_leads_nowhere_ends_the_build(tmp_path: Path) -> None:
    for folder in ("docs", "tools", "bench/results", "tests/gpu"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copytree(ROOT / "pace_kernels", tmp_path / "pace_kernels", ignore=shutil.ignore_patterns("*.so"))
    for name in ("mkdocs.yml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    with (tmp_path / "docs" / "theory.md").open("a") as page:
        page.write("\n[gone](pace.md#no-such-heading)\n")
    done = build(tmp_path / "site", tmp_path / "mkdocs.yml")
    assert done.returncode != 0 and "no-such-heading" in done.stderr


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for name in pages(site):
        text = (site / name).read_text()
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", text):
            assert not re.search(r"""(?:src|href)=["']?(?:https?:)?//""", tag), (name, tag)


# Loads every page in turn, and writes the title of each.
READER = """<!doctype html><title>reader</title><ol></ol><iframe width=1200 height=900></iframe><script>
const names = NAMES, frame = document.querySelector("iframe"), list = document.querySelector("ol");
frame.onload = () => setTimeout(() => {
  const page = frame.contentDocument;
  if (frame.dataset.name) {
    const entry = document.createElement("li");
    const broken = [...page.images].filter((image) => image.complete && !image.naturalWidth).length;
    entry.textContent = `${frame.dataset.name}|${page.querySelector("h1")?.textContent}|${broken}`;
    list.append(entry);
  }
  if (names.length) { frame.dataset.name = names.shift(); frame.src = frame.dataset.name; }
}, 100);
frame.src = "about:blank";
</script>"""


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def read(site: Path, names: list[str], address: str, profile: Path) -> tuple[dict[str, tuple[str, int]], list[str]]:
    """Of each page that a browser has read, the heading and the number of pictures that are missing; and what the
    console said."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"there is no browser: {', '.join(BROWSERS)}")
    (site / "reader.htm").write_text(READER.replace("NAMES", repr(names)))
    command = [
        *(browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"),
        *(
            "--enable-logging=stderr",
            f"--virtual-time-budget={1000 * len(names) + 5000}",
            "--dump-dom",
            f"{address}/reader.htm",
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    found = re.findall(r"<li>([^|<]*)\|([^|<]*)\|(\d+)</li>", done.stdout)
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return {name: (heading, int(broken)) for name, heading, broken in found}, console


def test_a_browser_reads_each_page(site: Path, address: str, tmp_path: Path) -> None:
    read_pages, console = read(site, pages(site), address, tmp_path)
    assert sorted(read_pages) == pages(site)
    assert console == []
    assert all(heading not in ("", "undefined") and not broken for heading, broken in read_pages.values()), read_pages


def test_what_a_page_gets_wrong_is_seen(site: Path, address: str, tmp_path: Path) -> None:
    bad = "<h1>bad</h1><img src='gone.png'><script>console.error('wrong'); nothing_of_this_name()</script>"
    (site / "bad.htm").write_text(bad)
    read_pages, console = read(site, ["bad.htm"], address, tmp_path)
    assert read_pages == {"bad.htm": ("bad", 1)}
    assert any("wrong" in line for line in console) and any("nothing_of_this_name" in line for line in console)
