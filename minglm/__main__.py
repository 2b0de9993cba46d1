"""`python -m minglm` is the command `minglm`."""

from minglm.cli import main

raise SystemExit(main())
