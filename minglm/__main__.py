"""`python -m minglm` is the command `minglm`."""

from minglm.cli import main

if __name__ == "__main__":  # processes that are started from this one read this file, too
    raise SystemExit(main())
