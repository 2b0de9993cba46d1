"""Learning by doing: exercises that name the mistake, and models with real bugs to be found.

from minglm.learn import check, case, hint
check("router", my_router)
"""

from minglm.learn.check import Report, case, check, replay
from minglm.learn.hints import hint

__all__ = ["Report", "case", "check", "hint", "replay"]
