"""Which of Optuna's warnings are not shown. Optuna is not imported here."""

from __future__ import annotations

import warnings


def quiet_warnings() -> None:
    """Ignore two of Optuna's warnings: on experimental features, and on choices that are not scalars."""
    warnings.filterwarnings("ignore", message=r".* is experimental \(supported from v")
    warnings.filterwarnings("ignore", message=r"Argument ``\w+`` is an experimental feature")
    warnings.filterwarnings("ignore", message="Choices for a categorical distribution should be")
