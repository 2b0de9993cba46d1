"""A solution of the exercise `verify`."""

import numpy as np


def verify(drafts, q, p, u, v):
    def draw(probs):
        return int(np.argmax(np.cumsum(probs) > v))

    kept = []
    for i, token in enumerate(drafts):
        if u[i] * q[i][token] >= p[i][token]:
            rest = np.maximum(p[i] - q[i], 0)  # what is still owed: the common part was served by acceptances
            return [*kept, draw(rest / rest.sum())]
        kept.append(int(token))
    return [*kept, draw(p[len(drafts)])]
