"""python -m benchmarks [NAME ...]: runs benches, prints their table, writes benchmarks/results/."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

from benchmarks.harness import RESULTS, Run, benches, choose, measure, save, table
from benchmarks.server import server

for _module in ("throughput", "against_graphile", "writes", "pickup", "backlog", "loads", "footprint", "clocks",
                "webhook", "hostile", "lineage", "models", "builds", "reaction", "llm",
                "approve", "approval", "injection", "flow", "ordered"):
    importlib.import_module(f"benchmarks.{_module}")  # registers its benches, in the order of the report


def main() -> int:
    """0 when every bar was met, 1 when one was not, 2 for a wrong command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="a bench or one of its rows; default all")
    parser.add_argument("--quick", action="store_true", help="small sizes, one run, nothing written: does it work?")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each side, at least 1 (default 5)")
    parser.add_argument("--database", metavar="URL", help="a database on the server to use (default: an embedded one)")
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FOLDER", help="where latest.json goes")
    parser.add_argument("--detail", action="store_true", help="print what each figure was made from")
    parser.add_argument("--list", action="store_true", help="print the names and bars")
    arguments = parser.parse_args()
    chosen = choose(arguments.names)
    if arguments.list:
        for one in benches:
            print(one.name, *(f"  {bar.name} {bar} {bar.unit}" for bar in one.bars), sep="\n")
        return 0
    report = []
    with server(arguments.database) as place:
        run = Run(place, arguments.quick, max(1, arguments.repeats))
        print(f"Postgres {place.version}", flush=True)
        for one in chosen:
            rows = measure(one, run)
            report += rows
            print(table(rows) if one is chosen[0] else table(rows).partition("\n")[2], flush=True)
            if arguments.detail:
                for row in rows:
                    print(f"  {row['name']}", json.dumps(row["detail"], default=str), flush=True)
            if not arguments.quick:
                save(rows, arguments.output)
    return 0 if all(row["ok"] for row in report) else 1


if __name__ == "__main__":
    sys.exit(main())
