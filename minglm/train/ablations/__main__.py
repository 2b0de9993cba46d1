"""The command."""

import argparse
import sys
from pathlib import Path

from minglm.train.ablations.claims import STEPS, chosen

PAGE = Path("docs/ablations.md")


def main(given: list[str] | None = None) -> int:
    """Train small models that differ in one thing each, and report. Finished runs are kept, interrupted ones go on."""
    parser = argparse.ArgumentParser(prog="python -m minglm.train.ablations", description=main.__doc__)
    parser.add_argument("--only", default="", metavar="NAME,…", help="these models or claims (default all)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each model (default 3)")
    parser.add_argument("--folder", type=Path, default=Path("runs/ablations"), help="default runs/ablations")
    parser.add_argument("--minutes", type=float, help="begin no further run after so many")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of each run (default {STEPS})")
    parser.add_argument("--threads", type=int, help="default: all cores, or MINGLM_THREADS")
    parser.add_argument("--list", action="store_true", help="show the models and stop")
    parser.add_argument("--report", action="store_true", help="write the page from the finished runs and stop")
    parser.add_argument("--page", type=Path, default=PAGE, help=f"where --report writes (default {PAGE})")
    asked = parser.parse_args(given)
    try:
        _act(asked)
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _act(asked: argparse.Namespace) -> None:
    from minglm.train.ablations.report import table_of_models, write_report
    from minglm.train.ablations.run import run_all

    if asked.seeds < 1 or asked.steps < 1:
        raise ValueError(f"--seeds {asked.seeds} --steps {asked.steps}: wanted 1 or more of each")
    variants = chosen(filter(None, asked.only.split(",")))
    if asked.list:
        print(table_of_models(variants))
    elif asked.report:
        write_report(asked.folder, asked.page)
        print(f"wrote {asked.page}")
    else:
        run_all(asked.folder, variants, asked.seeds, asked.steps, asked.minutes, asked.threads)


if __name__ == "__main__":
    sys.exit(main())
