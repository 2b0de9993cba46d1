"""`python -m minglm` is the command `minglm`."""

import sys


def main() -> int:
    """The command, whose imports may take a second and be interrupted."""
    try:
        from minglm.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("\nminglm: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":  # processes that are started from this one read this file, too
    raise SystemExit(main())
