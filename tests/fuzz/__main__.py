"""Fuzzes the command line by hand: ``python -m tests.fuzz --seconds 3600``."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from .harness import FAMILIES, Worker, run_for, run_one


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=float, default=600.0, help="budget (default: 600)")
    parser.add_argument("--seed", default="0", help="of the cases (default: 0)")
    parser.add_argument("--families", nargs="+", choices=tuple(FAMILIES), default=tuple(FAMILIES))
    parser.add_argument("--again", nargs=2, metavar=("FAMILY", "SEED"), help="run one case and show what it printed")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="deepgen-fuzz-") as folder:
        if chosen.again:
            worker = Worker(Path(folder))
            case, answer, wrong = run_one(worker, *chosen.again, Path(folder))
            worker.close()
            print(
                f"deepgen {' '.join(map(repr, case.argv))}\n{answer['stdout']}\n{answer['stderr']}\n{answer}\n{wrong}"
            )
            return int(wrong is not None)
        count, faults = run_for(chosen.seconds, chosen.seed, Path(folder), tuple(chosen.families))
    print("\n".join(faults))
    print(f"{count} cases, {len(faults)} faults")
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main())
