"""Breaks what comes from outside, and counts what became of it.

    python -m benchmarks.outside replies --draws 500 --seed 0
    python -m benchmarks.outside files --draws 500 --seed 0

replies: what a chat model's server says, and how it says it over HTTP.
files: model folders and configs.

Printed is a row for each kind of fault. Three endings must stay 0:

    unexpected   a traceback, or an error that the program did not foresee
    not mended   an end that the next command, with the fault gone, cannot go on from
    over bounds  more memory or time than a fault may take
"""

from __future__ import annotations

import argparse
import importlib

from benchmarks.outside.tally import Tally


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=("replies", "files"))
    parser.add_argument("--draws", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    part = importlib.import_module(f"benchmarks.outside.{asked.part}")
    tally: Tally = part.main(asked.draws, asked.seed)
    print(tally.table())
    print("\n".join(tally.notes))
    raise SystemExit(bool(tally.bad))


if __name__ == "__main__":
    main()
