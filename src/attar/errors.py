"""The exceptions of attar. Every message names the thing, the value seen, the value wanted and the cure.

AttarError
├── UsageError            the recipe or the call is wrong (exit code 2)
│   ├── RecipeError           a key, a value or a combination in the recipe
│   ├── DataError             a file of the user's: missing, empty, malformed, mislabelled
│   │   └── BadTools              tools that no agent could be offered
│   ├── ModelError            a path or name that is no model
│   ├── MissingExtra          an optional dependency that this feature needs
│   └── CapabilityError       an engine cannot give what an objective needs
├── PreflightRefused      a check found something that would waste the run (exit code 3)
├── Stopped               a limit ended the run, which can be resumed (exit code 5)
│   └── BudgetExceeded        the next call could cost more than is left
├── RunError              the run itself failed (exit code 1)
│   ├── WorkspaceError        the run folder: locked, foreign, damaged
│   ├── NoSpaceError          the disk is full
│   ├── EnvironmentLost       an environment plays no more: a call did not come back, or its server is gone
│   └── TrainingError         a loss that is not a number
└── Interrupted           Ctrl-C (exit code 130); the run can be resumed
"""

from __future__ import annotations

import importlib
from types import ModuleType

__all__ = [
    "AttarError",
    "BadTools",
    "BudgetExceeded",
    "CapabilityError",
    "DataError",
    "EnvironmentLost",
    "Interrupted",
    "MissingExtra",
    "ModelError",
    "NoSpaceError",
    "PreflightRefused",
    "RecipeError",
    "RunError",
    "Stopped",
    "TrainingError",
    "UsageError",
    "WorkspaceError",
    "require",
]


class AttarError(Exception):
    """Anything that attar raises on purpose."""

    exit_code = 1


class UsageError(AttarError, ValueError):
    """The recipe or the call is wrong."""

    exit_code = 2


class RecipeError(UsageError):
    """A key, a value or a combination of values in the recipe."""


class DataError(UsageError):
    """A data file that is missing, empty, malformed or mislabelled."""


class BadTools(DataError):
    """Tools that no agent could be offered."""


class ModelError(UsageError):
    """A model path or name that cannot be loaded."""


class MissingExtra(UsageError, ImportError):
    """An optional dependency is not installed."""


class CapabilityError(UsageError):
    """An engine cannot give what was asked of it."""


class PreflightRefused(AttarError):
    """A preflight check found something that would waste the run."""

    exit_code = 3


class Stopped(AttarError):
    """A limit, of money, quota or time, ended the run; it can be resumed."""

    exit_code = 5


class BudgetExceeded(Stopped):
    """The next call could cost more than is left of the budget."""


class RunError(AttarError, RuntimeError):
    """The run failed."""


class WorkspaceError(RunError):
    """The run folder is locked, belongs to another recipe, or is damaged."""


class NoSpaceError(RunError):
    """The disk is full."""


class EnvironmentLost(RunError):
    """An instance of an environment that plays no more: a call of it did not come back, or its server is gone."""


class TrainingError(RunError):
    """Training produced something that cannot be trained on."""


class Interrupted(AttarError):
    """The user stopped the run; it can be resumed."""

    exit_code = 130


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Args:
        module: the module to import.
        extra: the extra of attar that installs it.

    Raises:
        MissingExtra: the module is not installed; the message gives the command that installs it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtra(f'{module} is not installed: pip install "attar[{extra}]"') from error
