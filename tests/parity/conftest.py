"""Prints the parity table after the run."""

from tests.parity.table import ROWS

HEADER = ("model", "logits", "MTP", "gradients", "same experts")


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    terminalreporter.write_sep("-", "worst error against transformers and torch (float32)")
    width = max(len(name) for name in ROWS)
    terminalreporter.write_line("  ".join([HEADER[0].ljust(width), *(h.rjust(12) for h in HEADER[1:])]))
    for name, row in ROWS.items():
        cells = [row.get(h, "–") for h in HEADER[1:]]
        terminalreporter.write_line("  ".join([name.ljust(width), *(c.rjust(12) for c in cells)]))
