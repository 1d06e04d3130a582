"""Writes csrc/definitions.h, what the kernels know of each optimizer, from pace_kernels/definitions. setup.py runs it
before it compiles; it needs nothing but Python."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "pace_kernels"))

from definitions import DEFINITIONS  # noqa: E402
from definitions.kit import Definition, Operand, Row  # noqa: E402

sys.path.pop(0)

TYPES = {"float": "double", "float?": "std::optional<double>", "int": "int64_t", "bool": "bool"}


def camel(name: str) -> str:
    return "".join(part.capitalize() for part in name.split("_"))


def text(value: str | None) -> str:
    return "nullptr" if value is None else f'"{value}"'


def lines_of(d: Definition) -> list[str]:
    symbols = [f"k{camel(o.symbol)}" for o in d.operands]
    order = [f"{symbols[d.operands.index(e)]}" if isinstance(e, Operand) else "kRow" for e in d.lists]
    row = d.rows[0] if d.rows else Row("", 0)
    bits = "".join(f"{flag} = {1 << k}, " for k, flag in enumerate(d.flags))
    out = [f"struct {d.name}Options {{"]
    out += [f"  {TYPES[o.type]} {o.name};" for o in d.options]
    out += ["  bool capturable;", "", "  // Each option by its name, in the order of the schema, and what it may be."]
    out += ["  template <class Visitor>", "  void visit(const Visitor& visitor) {"]
    out += [f'    visitor("{o.name}", {o.name}, Range::{o.allowed.cpp if o.allowed else "any"});' for o in d.options]
    out += ['    visitor("capturable", capturable, Range::any);', "  }", "};", ""]
    out += [f"struct {d.name}Definition {{", f"  using Options = {d.name}Options;"]
    out += [f'  static constexpr const char* kOp = "{d.op}";']
    out += [f"  enum Operand : int {{ {', '.join(symbols)}, kOperands, kRow = -1 }};"]
    out += ["  static constexpr ListInfo kLists[] = {"]
    for o in d.operands:
        mutable = "true" if o.mutable else "false"
        codec = f"Codec::{o.codec or 'none'}"
        out.append(
            f'      {{"{o.list}", Role::{o.role}, {mutable}, {text(o.empty)}, {codec}, {text(o.beside)}, {o.dither}}},'
        )
    out += ["  };", f"  static constexpr int kOrder[] = {{{', '.join(order)}}};"]
    out += [f'  static constexpr RowInfo kRows{{"{row.list}", {row.numbers}}};']
    extras = [f"k{camel(e.name)}" for e in d.extras]
    out += [f"  enum Extra : int {{ {', '.join([*extras, 'kExtras'])} }};"]
    infos = ", ".join(f'{{"{e.name}", {e.numbers}}}' for e in d.extras)
    out += [f"  static constexpr RowInfo kExtraInfo[] = {{{infos}}};"]
    stochastic = any(o.name == "stochastic_rounding" for o in d.options)
    out += [f"  static constexpr bool kStochastic = {'true' if stochastic else 'false'};"]
    out += [f"  static constexpr bool kScales = {'true' if 'grad_scale' in d.scaling else 'false'};"]
    out += [f"  struct Flag {{ enum : unsigned {{ {bits}values = {1 << len(d.flags)} }}; }};"]
    out += ["", "  template <unsigned kFlags>", "  struct Uses {"]
    out += [f"    static constexpr bool {flag} = (kFlags & Flag::{flag}) != 0;" for flag in d.flags]
    out += ["    static constexpr Use kUses[] = {"]
    out += [f"        {{{o.reads}, {o.writes}}},  // {o.symbol}" for o in d.operands]
    return [*out, "    };", "  };", "};", ""]


def header() -> str:
    lines = ["// Written by csrc/definitions.py from pace_kernels/definitions: change those.", "#pragma once", ""]
    lines += ["#include <cstdint>", "#include <optional>", "", '#include "uses.h"', "", "namespace pace {", ""]
    for definition in DEFINITIONS.values():
        lines += lines_of(definition)
    return "\n".join([*lines, "}  // namespace pace", ""])


def write() -> Path:
    """Writes the header where it is missing or another one, so that what is up to date is not compiled again."""
    path = HERE / "definitions.h"
    if not path.exists() or path.read_text() != header():
        path.write_text(header())
    return path


if __name__ == "__main__":
    write()
