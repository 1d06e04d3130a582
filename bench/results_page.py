"""The page of results, `bench/results/README.md`, from the JSON files beside it and nothing else: `make results`.

    python bench/results_page.py [--folder bench/results]

Every section names the command that measures it. What has no JSON file yet is left out, and said so. JSON files of more
than 2 kB are packed: `x.json` becomes `x.json.xz`. The figures are drawn anew. The tables of README.md and docs/
between the comments `<!-- results: NAME -->` and `<!-- end -->` are written too.
"""

from __future__ import annotations

import argparse
import importlib
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH.parent / folder) for folder in ("bench", "examples", "research", "tools")]

from harness import Case, from_json, load, markdown, markdown_table, pack, quartiles  # noqa: E402


@dataclass(frozen=True)
class Section:
    title: str
    pattern: str  # of its JSON files
    command: str
    render: Callable[[dict[str, Any], Path], str]  # given the JSON and its path


def machine_line(about: dict[str, Any]) -> str:
    where = about.get("gpu") or f"{about['cpu']}, {about['threads']} threads, {about.get('cpu_isa') or about['isa']}"
    return f"{where}; torch {about['torch']}, Python {about['python']}; {about['date'][:10]}."


def picture(path: Path, text: str) -> str:
    return f"![{text}]({path.name})"


def beside(cases: Sequence[Case], keys: Sequence[str], ours: str = "pace") -> str:
    """These rows, a column for each case: milliseconds, × ours, the share of the bandwidth at which this process read
    and wrote memory in place; on a GPU the milliseconds of the host as well."""
    on_gpu = bool(cases[0].copy_samples)
    what = "ms, × PACE, share of the in-place bandwidth" + ", ms of the host" * on_gpu
    lines = [[what, *(f"{case.title}, {str(case.dtype).removeprefix('torch.')}" for case in cases)]]
    for key in keys:
        line, name = [], key
        for case in cases:
            result = case.result(key)
            if result is None or not result.samples:
                line.append("–")
                continue
            name, ratio = result.row.name, case.against(result, ours)
            ms = 1e3 * quartiles(result.samples)[1]
            parts = [f"{ms:,.{2 if ms < 10 else 1 if ms < 1000 else 0}f}", "–" if ratio is None else f"{ratio:.2f}"]
            parts.append(f"{100 * case.share(result):.0f} %")
            line.append("; ".join([*parts, *([f"{1e3 * quartiles(result.host_samples)[1]:.2f}"] * on_gpu)]))
        lines.append([name, *line])
    return markdown_table(lines)


def step(kept: dict[str, Any], path: Path) -> str:
    import bench_step

    rows = {row.key: row for row in bench_step.ROWS}
    shapes = {title: shapes for title, shapes in bench_step.SIZES.values()}
    cases = [from_json(saved, rows, shapes[saved["title"]]) for saved in kept["cases"]]
    return f"{machine_line(kept['machine'])}\n\n{beside(cases, bench_step.PICTURED)}"


def peers(kept: dict[str, Any], path: Path) -> str:
    import bench_peers as command

    cases, image = [command.case_of(saved, kept) for saved in kept["cases"]], path.with_suffix(".webp")
    command.draw(cases, image, command.where(kept), command.PICTURED, command.OUR_KEYS)
    versions = ", ".join(f"{name} {found}" for name, found in kept["packages"].items() if found)
    said = (
        f"{command.where(kept)}. {versions}. Where not all rows fit into memory together, they take turns in several "
        "waves with PACE in each: ratios are of the same minutes, milliseconds of two rows may not be. Weight decay: "
        f"{kept['weight_decay']}. The JSON file has all rows, with their samples, states and peaks."
    )
    return f"{said}\n\n{beside(cases, command.PICTURED)}\n\n{picture(image, 'time of a step, × PACE')}"


def gpu(kept: dict[str, Any], path: Path) -> str:
    import gpu as command

    cases = command.cases_of(kept, command.rows_for(torch.device("cuda")))
    stages = [f"- {name}: {stage['summary']}" for name, stage in kept["stages"].items()]
    stages += [f"    - failed: `{name}`" for name in kept["stages"].get("tests", {}).get("failures", [])]
    shown = [key for key in ("gpt2:float32:main", "gpt2:bfloat16:main", "1.7b:bfloat16:main") if key in cases]
    keys = list(dict.fromkeys(result.row.key for key in shown for result in cases[key].results))
    table = beside([cases[key] for key in shown], keys, keys[0])
    return "\n\n".join([command.notice(kept), "\n".join(stages), *kept.get("notes", []), table])


def throughput(kept: dict[str, Any], path: Path) -> str:
    import throughput as command

    return command.as_markdown(kept)


def record(kept: dict[str, Any], path: Path) -> str:
    """Tables of an experiment whose script is gone, as it made them."""
    tables = (f"{table['title']}\n\n{table_of(table)}" for table in kept["tables"])
    said = "\n".join(f"- {sentence}" for sentence in kept.get("said", ()))
    return "\n\n".join([f"{kept['made']} {kept['by']}.", *tables, said])


def table_of(kept: dict[str, Any]) -> str:
    return markdown_table([kept["heads"], *kept["rows"]])


def tables_of(module: str) -> Callable[[dict[str, Any], Path], str]:
    """An experiment of research/ that has tables alone."""

    def rendered(kept: dict[str, Any], path: Path) -> str:
        text: str = importlib.import_module(module).render(kept)
        return text

    return rendered


protocol, storage = tables_of("protocol"), tables_of("storage")


def variants(kept: dict[str, Any], path: Path) -> str:
    """How much was run, when and where: the tables are in docs."""
    head = protocol(kept, path).split("\n\n")[:2]
    return "\n\n".join(head) + " The tables are in `docs/benchmarks.md`."


def demo(kept: dict[str, Any], path: Path) -> str:
    import train_lm as command

    command.plot(kept, path.with_suffix(".webp"))
    said = (
        f"{kept['cpu']}, {kept['processes']} processes of one thread, {kept['cpu_seconds']} s of CPU time; torch "
        f"{kept['torch']}, Python {kept['python']}; {kept['date'][:10]}. {kept['steps']} steps, seeds: {kept['seeds']}."
    )
    shown = picture(path.with_suffix(".webp"), "held-out loss over learning rates")
    return "\n\n".join([f"{said} {command.says(kept)}", markdown_table(command.cells(kept)), shown])


def convex(kept: dict[str, Any], path: Path) -> str:
    import convex as command

    runs = [command.Run(**run) for run in kept["runs"]]
    image = path.with_suffix(".webp")
    command.draw(runs, image)
    return "\n\n".join(
        [f"{machine_line(kept['machine'])} {kept['steps']:,} steps.", f"```\n{command.table(runs)}\n```",
         picture(image, "regret, x and ρ over steps")]
    )  # fmt: skip


def theory(kept: dict[str, Any], path: Path) -> str:
    import theory as command

    command.draw(kept, path.with_suffix(".webp"))
    points = [*kept["points"], *(point for pair in kept["proposition_3"] for point in pair)]
    off = [abs(p["simulated"] - p["closed_form"]) / p["standard_error"] for p in points]
    said = (
        f"{machine_line(kept['machine'])} {len(points)} limiting errors, each simulated with {kept['coordinates']:,} "
        f"coordinates, beside the closed form: off by {statistics.median(off):.1f} standard errors in the median, "
        f"{max(off):.1f} at most."
    )
    image = picture(path.with_suffix(".webp"), "the limiting error over the gain, and Proposition 3")
    return f"{said}\n\n{image}\n\n{command.tables(kept)}"


def sharded(kept: dict[str, Any], path: Path) -> str:
    lines = [
        f"{machine_line(kept['machine'])} Two processes (gloo), {kept['rounds']} rounds; medians of rank 0.",
        "",
        "| | plain, ms | sharded, ms | ratio |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in kept["rows"]:
        plain, shards = (row["ms"][kind][1] for kind in ("plain", "sharded"))
        lines.append(f"| {row['rule']}, {row['size']} | {plain:.2f} | {shards:.2f} | {row['ratio']:.2f} |")
    return "\n".join(lines)


def host(kept: dict[str, Any], path: Path) -> str:
    """A table a case: µs of a step, and its ratio to AdamW(fused=True)'s, by the number of tensors."""
    parts = [f"{machine_line(kept['machine'])} One thread: µs of its own time, and ratios to AdamW fused."]
    cases: dict[str, dict[str, dict[int, dict[str, Any]]]] = {}
    for result in kept["results"]:
        cases.setdefault(result["case"], {}).setdefault(result["row"], {})[result["tensors"]] = result
    for title, rows in cases.items():
        counts = sorted({count for row in rows.values() for count in row})
        lines = [f"| {title} | {' | '.join(f'{count:,} tensors' for count in counts)} |"]
        lines.append("| --- |" + " ---: |" * len(counts))
        for name, row in rows.items():
            cells = []
            for count in counts:
                found = row[count]
                low, middle, high = found["against_adamw_fused"]
                ratio = "" if low == high else f", {middle:.2f}"  # to itself
                cells.append(f"{found['microseconds'][1]:,.1f}{ratio}")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def compressed(kept: dict[str, Any], path: Path) -> str:
    import bench_compressed as command

    rows, (_, shapes) = {row.key: row for row in command.ROWS}, command.SIZES["gpt2"]
    heads = {command.FLOAT32: "/ PACE float32", command.REFERENCE: "/ AdamW float32"}
    tables = (markdown(from_json(saved, rows, shapes), heads) for saved in kept["cases"])
    return "\n\n".join([machine_line(kept["machine"]), *tables])


# ---- the tables of README.md and of docs/ ----

PEERS = {
    "pace": "**PACE**",
    "adamw-fused": "`AdamW(fused=True)`",
    "adamw-foreach": "`AdamW(foreach=True)`",
    "adamw-ema": "`AdamW(fused=True)` + `AveragedModel`",
    "adamw-ema-pytorch": "`AdamW(fused=True)` + ema-pytorch",
    "pullback-adamw": "`Pullback(AdamW(fused=True))`",
    "pullback-adamw-0": "the same without a pull: an average alone",
    "pace-eager": "PACE in eager torch",
    "schedulefree": "schedulefree",
    "schedule-free": "**ScheduleFreeAdamW**",
    "deepspeed": "DeepSpeed CPUAdam",
    "heavyball": "heavyball AdamW",
    "optimi": "optimi AdamW",
    "bnb-8bit": "bitsandbytes AdamW8bit",
    "torchao-8bit": "torchao AdamW8bit",
    "mada": "**MADA**, all six learned",
    "mada-adamw": "MADA, preset `adamw`",
    "mada-lion": "MADA, preset `lion`",
    "popt-lion": "pytorch_optimizer Lion",
    "mada-adan": "MADA, preset `adan`",
    "popt-adan": "pytorch_optimizer Adan",
}


def gpt2_of_peers(folder: Path) -> tuple[dict[str, Any], Case, float]:
    """What was kept, the case of GPT-2 in float32, and PACE's milliseconds in it."""
    import bench_peers as command

    kept = load(folder / "peers.json")
    case = next(
        command.case_of(saved, kept)
        for saved in kept["cases"]
        if (saved["size"], saved["dtype"]) == ("gpt2", "float32")
    )
    return kept, case, 1e3 * quartiles(case.result("pace").samples)[1]


def peers_of_docs(folder: Path) -> str:
    """GPT-2 in float32. Milliseconds are the ratio times PACE's median, so that rows of several waves compare."""
    kept, case, pace = gpt2_of_peers(folder)
    lines = [f"| GPT-2 124M, float32 | × PACE | ms, where PACE takes {pace:.0f} | state, bytes / parameter |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for key, name in PEERS.items():
        result = case.result(key)
        ratio = result and case.against(result, "pace")
        if result and not ratio:
            lines.append(f"| {name} | – | – | {result.missing} |")
        if ratio:
            lines.append(f"| {name} | {ratio:.2f} | {ratio * pace:,.0f} | {result.state_bytes / case.numel:.0f} |")
    where = f"{machine_line(kept['machine'])} Weight decay: {kept['weight_decay']}."
    return f"{where}\n\n" + "\n".join(lines)


def protocol_of_docs(folder: Path, name: str = "protocol.json") -> str:
    import protocol as command

    return command.short(load(folder / name))


def finetuning_of_docs(folder: Path) -> str:
    return protocol_of_docs(folder, "protocol-finetuning.json")


def variants_of_docs(folder: Path) -> str:
    import protocol as command

    return command.varied(load(folder / "protocol-variants.json"))


COSTS = {
    "adamw-fused": "`AdamW(fused=True)`",
    "adamw-ema": "`AdamW(fused=True)` + `AveragedModel`",
    "pace": "**PACE**",
    "mada-adamw": "MADA, preset `adamw`",
    "mada": "**MADA**, all six learned",
    "schedulefree": "schedulefree's `AdamWScheduleFree`",
}


def costs(folder: Path) -> str:
    """What a step takes and holds: alone on a CPU, as in `peers`, and within a training step on a GPU."""
    kept, case, pace = gpt2_of_peers(folder)
    gpu = load(folder / "throughput-nvidia-h100-80gb-hbm3.json")
    cpu = kept["machine"]
    lines = ["| | CPU, ms per step | H100, ms per training step | state, bytes per parameter |"]
    lines.append("| --- | ---: | ---: | ---: |")
    for key, name in COSTS.items():
        result, row = case.result(key), gpu["rows"].get(key)
        alone = f"{case.against(result, 'pace') * pace:,.0f}"
        whole = f"{1e3 * row['seconds_median']:.2f}" if row else "–"
        lines.append(f"| {name} | {alone} | {whole} | {result.state_bytes / case.numel:.0f} |")
    where = f"CPU: {cpu['cpu']}, {cpu['threads']} threads, {cpu['cpu_isa']}, torch {cpu['torch'].partition('+')[0]}."
    return "\n".join(lines) + f"\n\n{where} H100: torch {gpu['machine']['torch'].partition('+')[0]}, bfloat16 autocast."


TABLES = {
    "peers": peers_of_docs,
    "protocol": protocol_of_docs,
    "finetuning": finetuning_of_docs,
    "variants": variants_of_docs,
    "costs": costs,
}
PAGES = ("README.md", "docs/benchmarks.md")


def with_tables(text: str, folder: Path) -> str:
    def table(found: re.Match[str]) -> str:
        return f"{found[1]}\n\n{TABLES[found[2]](folder)}\n\n{found[3]}"

    return re.sub(r"(<!-- results: (\w+) -->)\n.*?\n(<!-- end -->)", table, text, flags=re.S)


# ---- the page ----

SECTIONS = (
    Section("Against every peer", "peers.json", "make bench-peers PEERS='--out bench/results --fresh'", peers),
    Section("Steps on a CPU", "step.json", "python bench/bench_step.py --out bench/results", step),
    Section("What a step costs the host", "host.json", "python bench/bench_step.py --host --out bench/results", host),
    Section(
        "Compressed states: time on a CPU",
        "compressed.json",
        "python bench/bench_compressed.py --out bench/results",
        compressed,
    ),
    Section("Steps on a GPU", "gpu-*.json", "make gpu", gpu),
    Section("Whole training steps", "throughput-*.json", "python bench/throughput.py --out bench/results", throughput),
    Section("PACE by the protocol", "protocol.json", "python research/protocol.py --minutes 50", protocol),
    Section(
        "Fine-tuning by the protocol", "protocol-finetuning.json", "python research/protocol.py --fine-tuning", protocol
    ),
    Section("Fine-tuning SmolLM2", "protocol-smollm.json", "python research/protocol.py --smollm", protocol),
    Section("Variants", "protocol-variants.json", "python research/protocol.py --variants", variants),
    Section("PACE's strength", "strength.json", "python research/strength.py", tables_of("strength")),
    Section("PACE before the protocol", "pace.json", "git checkout 02a36d1; make pace", record),
    Section("MADA after long runs", "starts.json", "python research/starts.py", tables_of("starts")),
    Section("MADA before the protocol", "mada.json", "git checkout 02a36d1; make mada", record),
    Section("Quality of compressed states", "storage.json", "python research/storage.py --out bench/results", storage),
    Section("The demo", "demo.json", "make demo; cp out/results.json bench/results/demo.json", demo),
    Section("Adam at the wrong end", "convex.json", "python research/convex.py --out bench/results", convex),
    Section("What the theory says", "theory.json", "python research/theory.py --out bench/results", theory),
    Section("Shards", "sharded.json", "python bench/bench_sharded.py --out bench/results", sharded),
)

PACKED_FROM = 2_000  # bytes

INTRODUCTION = """\
# What was measured

Written by `make results` from the JSON files in this folder, of which large ones are packed (`xzcat`). Each section
names the command that measures it again. `bench/harness.py` says how steps are timed: the rows of a table in one
process, round-robin in shuffled order, behind a walk that leaves no operand in the caches; medians and quartiles,
ratios round by round. An experiment keeps the runs that it finds in its JSON file: give another `--out`, or remove the
file, to measure everything again.
"""


def squeezed(text: str) -> str:
    """Tables without the spaces around cells, which show nothing and are a seventh of the page."""
    rows = re.compile(r"^\|.*\|$", re.M)
    return rows.sub(lambda row: re.sub(r" *\| *", "|", row[0]).replace("---", "-"), text)


def page(folder: Path) -> str:
    parts = [INTRODUCTION]
    for section in SECTIONS:
        names = {path.name.removesuffix(".xz") for path in folder.glob(f"{section.pattern}*")}
        paths = [folder / name for name in sorted(names)]
        body = [section.render(load(path), path) for path in paths]
        parts.append(f"## {section.title}\n\n`{section.command}`")
        parts += [text.strip() for text in body] or ["Not measured yet."]
    return squeezed("\n\n".join(part.strip() for part in parts)) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--folder", type=Path, default=BENCH / "results")
    arguments = parser.parse_args(argv)
    for path in arguments.folder.glob("*.json"):
        if path.stat().st_size > PACKED_FROM:
            pack(path)
    path = arguments.folder / "README.md"
    path.write_text(page(arguments.folder), encoding="utf-8")
    print(f"written: {path}")
    if arguments.folder.resolve() == BENCH / "results":
        for name in PAGES:
            text = BENCH.parent / name
            text.write_text(with_tables(text.read_text(encoding="utf-8"), arguments.folder), encoding="utf-8")
            print(f"written: {text}, its tables")
    return 0


if __name__ == "__main__":
    sys.exit(main())
