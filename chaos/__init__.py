"""Chaos: what the engine survives, counted. Real workers, a real Postgres, faults, and a checker.

    producers -> history, a file outside Postgres
    producers -> Postgres <- workers of `anton work`, killed, frozen, cut off
    then: drain, and compare the history with what the database holds

    python -m chaos --minutes 30 --seed 1        the table of docs/reliability.md, and benchmarks/results/chaos.json

The product knows nothing of it: fail points and planted bugs are put into the worker's process from here.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # their code starts the servers
