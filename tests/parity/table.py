"""Collects what the parity tests measured, for the table at the end."""

ROWS: dict[str, dict[str, str]] = {}


def note(model: str, column: str, value: str) -> None:
    ROWS.setdefault(model, {})[column] = value
