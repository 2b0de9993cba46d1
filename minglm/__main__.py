"""`python -m minglm` is the command `minglm`."""

if __name__ == "__main__":  # processes that are started from this one read this file, too
    try:
        from minglm.cli import main

        raise SystemExit(main())
    except KeyboardInterrupt:  # before there is a command that could say so
        raise SystemExit(130) from None
