"""`make bench-peers` runs with whatever is installed, says why a peer is missing, and lets no peer spoil the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
BENCH = ROOT / "bench"
ONE_CASE = ("--sizes", "gpt2", "--dtypes", "bfloat16")
pytest.importorskip("matplotlib", reason="the scripts under bench/ draw")


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return pytest.importorskip("bench_peers")


def test_a_quick_run_prints_what_its_file_renders_to(peers: ModuleType, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, str(BENCH / "bench_peers.py"), "--quick", *ONE_CASE, "--out", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    numbers = json.loads((tmp_path / "peers.json").read_text(encoding="utf-8"))
    assert run.stdout == peers.render(numbers) + "\n"
    assert (tmp_path / "peers.webp").read_bytes()[8:12] == b"WEBP"

    assert [case["dtype"] for case in numbers["cases"]] == ["bfloat16"]
    for case in numbers["cases"]:
        here = [row for row in peers.ROWS if row.key != peers.AUTOGRAD]
        assert [row["key"] for row in case["rows"]] == [row.key for row in here]
        for row, entry in zip(here, case["rows"], strict=True):
            assert ("seconds_median" in entry) != bool(entry["missing"])
            if not row.package:
                assert not entry["missing"], entry
            if entry["missing"]:
                assert f"{row.name}: not measured, {entry['missing']}" in run.stdout
        # A second run would keep this case, but for a peer that has come or gone.
        rows = [row for row in here if row.key != peers.LION]
        assert peers.is_complete(case, here, case["excluded"])
        assert not peers.is_complete(case, rows, case["excluded"])
        assert not peers.is_complete(case, here, {**case["excluded"], peers.REFERENCE: "gone"})
    assert peers.earlier(tmp_path / "peers.json", numbers) == numbers["cases"]
    assert peers.earlier(tmp_path / "peers.json", {**numbers, "rounds": 4}) == []
    assert peers.earlier(tmp_path / "none.json", numbers) == []


def test_state_is_what_is_held_and_not_what_is_claimed(peers: ModuleType) -> None:
    """Of the rows that come with torch, which are always there: the bytes counted are those of the rule."""
    harness = sys.modules["harness"]
    for row in (row for row in peers.ROWS if not row.package and row.key != peers.AUTOGRAD):
        parameters = harness.make_parameters([(10_000,)], torch.float32, torch.device("cpu"))
        contender = peers.guarded(row)(parameters)
        for _ in range(2):
            contender.step()
        assert harness.bytes_of(contender.state()) / 10_000 == pytest.approx(row.held(torch.float32), abs=0.05), row.key


def test_a_quantized_tensor_counts_as_what_it_is_made_of(peers: ModuleType) -> None:
    class Quantized:
        def __init__(self) -> None:
            self.codes, self.scale = torch.zeros(512, dtype=torch.uint8), torch.zeros(2)

        def __tensor_flatten__(self) -> tuple[list[str], None]:
            return ["codes", "scale"], None

    map_of_both = torch.zeros(256)
    state = [{"exp_avg": Quantized(), "map": map_of_both}, {"exp_avg": Quantized(), "map": map_of_both}]
    assert sys.modules["harness"].bytes_of(state) == 2 * (512 + 8) + 1024


def test_a_peer_that_is_not_there_is_a_row_with_the_reason(
    peers: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def peer(package: str, module: str) -> object:
        return peers.Peer("x", "X", peers.of(module, "X"), **peers.moves(2), package=package, module=module)

    monkeypatch.setattr(peers, "REASONS", tmp_path / "peers.json")
    assert peers.excluded([peer("absent-one", "absent_one")], False) == {
        "x": "absent-one is not installed (make bench-peers installs it)"
    }
    (tmp_path / "peers.json").write_text(json.dumps({"absent-two": "ERROR: No matching distribution"}))
    assert peers.excluded([peer("absent-two", "absent_two")], False) == {
        "x": "absent-two could not be installed: ERROR: No matching distribution"
    }
    (tmp_path / "broken_peer.py").write_text("raise OSError('no such library')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert peers.excluded([peer("broken", "broken_peer")], False) == {
        "x": "broken cannot be imported: OSError: no such library"
    }


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda p: p.grad.zero_(), "changes the gradients"),
        (lambda p: setattr(p, "grad", None), "changes the gradients"),
        (lambda p: None, "does not move the weights"),
    ],
)
def test_a_step_that_would_spoil_the_other_rows_is_refused(peers: ModuleType, spoil: object, said: str) -> None:
    harness = sys.modules["harness"]
    parameters = harness.make_parameters([(3,), (50, 10)], torch.float32, torch.device("cpu"))
    gradients = [p.grad for p in parameters]

    def make(some: list[nn.Parameter]) -> object:
        return harness.Contender(lambda: [spoil(p) for p in some])

    with pytest.raises(RuntimeError, match=said):
        peers.checked(make)(parameters).step()
    assert all(p.grad is g and g.abs().sum() > 0 for p, g in zip(parameters, gradients, strict=True))


def test_gradients_of_its_own_are_fresh_before_each_step(peers: ModuleType) -> None:
    harness = sys.modules["harness"]
    parameters = harness.make_parameters([(3,), (50, 10)], torch.float32, torch.device("cpu"))
    shared = [p.grad for p in parameters]
    before = [g.clone() for g in shared]
    seen = []

    def step() -> None:
        for p in parameters:
            seen.append(p.grad.clone())
            p.data.sub_(p.grad.mul_(0.5))

    contender = peers.checked(peers.with_gradients_of_its_own(lambda _: harness.Contender(step)))(parameters)
    for _ in range(2):
        contender.prepare()
        contender.step()
    assert all(p.grad is g for p, g in zip(parameters, shared, strict=True))
    assert all(map(torch.equal, shared + seen, 3 * before))


def test_each_peer_has_a_name_in_the_extra_and_one_of_ours_to_compare_with(peers: ModuleType) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 has it")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {text.partition(">=")[0] for text in project["optional-dependencies"]["peers"]}
    assert named == {row.package for row in peers.ROWS if row.package}
    for row in peers.ROWS:
        assert (row.ours in peers.OUR_KEYS) == (row.key not in peers.OUR_KEYS), row.key
        assert row.note, row.key


def test_the_reason_is_the_line_that_tells_it(monkeypatch: pytest.MonkeyPatch, peers: ModuleType) -> None:
    from install_peers import run, why_failed

    assert why_failed("Collecting x\nERROR: No matching distribution found for x\n\nnotice\n").endswith("found for x")
    assert why_failed("ninja: build stopped\nRuntimeError: no compiler\n") == "RuntimeError: no compiler"
    assert why_failed("") == "no output"
    assert run([sys.executable, "-c", "raise SystemExit('gone')"], 60) == "gone"
    assert run([sys.executable, "-c", "print()"], 60) == ""
    assert run([sys.executable, "-c", "import time; time.sleep(60)"], 0.2) == "it took more than 0.2 s"
