"""Commands of the evaluation suite: ``python -m evaluation record|evaluate|evaluate-test``."""

from __future__ import annotations

import argparse
import sys
import warnings


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m evaluation", description=__doc__)
    parser.add_argument("command", choices=["record", "evaluate", "evaluate-test"])
    parser.add_argument("--seeds", type=int, default=5, help="how many seeds: 0, 1, ...")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[], help="names of runs")
    parser.add_argument("--verbose", action="store_true", help="show every sick run")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    if options.command == "record":
        from evaluation.recording import record_all

        record_all(seeds, options.only)
        return 0
    from evaluation.report import evaluate, evaluate_test

    if options.command == "evaluate":
        return evaluate(seeds, options.only, verbose=options.verbose)
    return evaluate_test(seeds)


if __name__ == "__main__":
    sys.exit(main())
