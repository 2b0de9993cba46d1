"""What GLM-4.5's authors say about their choices, tried at classroom scale: one change at a time.

`python -m minglm.train.ablations` makes the runs, `--report` writes docs/ablations.md from those that are finished.
"""
