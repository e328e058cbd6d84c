"""`python -m benchmarks [NAME...]`: races every row whose name starts with a NAME (without one: all)."""

import argparse
import importlib
import json
import os
import pkgutil
import subprocess
import sys
from dataclasses import asdict

import benchmarks
from benchmarks.harness import TUNED_HEAP, Outcome, Row, machine, race

HEADS = (
    "row",
    "work",
    "peer",
    "ours ms",
    "peer ms",
    "faster",
    "goal",
    "ours MiB",
    "peer MiB",
    "share",
    "goal",
)


def rows() -> list[Row]:
    """The `ROWS` of every file of this folder."""
    names = [
        m.name for m in pkgutil.iter_modules(benchmarks.__path__) if not m.ispkg and m.name != "__main__"
    ]
    modules = [importlib.import_module(f"benchmarks.{name}") for name in sorted(names)]
    return [row for module in modules for row in getattr(module, "ROWS", ())]


def cells(outcome: Outcome) -> tuple[str, ...]:
    """An outcome as the table shows it."""
    share = f"<= {outcome.memory_goal:.2f}" if outcome.memory_goal is not None else ""
    return (
        outcome.name + ("" if outcome.met else " (short of its goal)"),
        outcome.work,
        outcome.peer,
        f"{outcome.ours * 1e3:.1f}",
        f"{outcome.theirs * 1e3:.1f}",
        f"{outcome.faster:.2f}x",
        f">= {outcome.goal:.2f}x",
        f"{outcome.our_peak:.1f}",
        f"{outcome.their_peak:.1f}",
        f"{outcome.share:.2f}",
        share,
    )


def table(outcomes: list[Outcome], markdown: bool) -> str:
    """All outcomes, in columns or as a Markdown table."""
    lines = [HEADS, *(cells(outcome) for outcome in outcomes)]
    if markdown:
        lines.insert(1, tuple("---" for _ in HEADS))
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def in_tuned_heap(names: list[str], seconds: float) -> tuple[str, list[Outcome]]:
    """The same races in a process whose heap keeps its pages."""
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        *names,
        "--json",
        "--heap",
        "default",
        "--seconds",
        str(seconds),
    ]
    done = subprocess.run(
        command, env={**os.environ, **TUNED_HEAP}, stdout=subprocess.PIPE, text=True, check=True
    )
    told = json.loads(done.stdout)
    return told["machine"], [Outcome(**outcome) for outcome in told["outcomes"]]


def main() -> int:
    """Runs the rows asked for and prints what they showed; 2 if there is none of that name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="start of a row's name; none: all rows")
    parser.add_argument("--heap", choices=("default", "tuned", "both"), default="default")
    parser.add_argument("--seconds", type=float, default=8.0, help="CPU seconds for each row (default 8)")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    parser.add_argument("--json", action="store_true", help="the outcomes as JSON")
    parser.add_argument("--list", action="store_true", help="only name the rows")
    asked = parser.parse_args()
    chosen = [row for row in rows() if not asked.names or row.name.startswith(tuple(asked.names))]
    if not chosen:
        parser.error(f"no row starts with {' or '.join(asked.names)}; --list names them")
    if asked.list:
        print("\n".join(f"{row.name}: {row.work}, against {row.peer}" for row in chosen))
        return 0
    runs: list[tuple[str, list[Outcome]]] = []
    if asked.heap != "tuned":
        runs.append((machine(), [race(row, asked.seconds) for row in chosen]))
    if asked.heap != "default":
        runs.append(in_tuned_heap(asked.names, asked.seconds))
    for told, outcomes in runs:
        if asked.json:
            print(json.dumps({"machine": told, "outcomes": [asdict(outcome) for outcome in outcomes]}))
        else:
            print(f"{told}\n\n{table(outcomes, asked.markdown)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
