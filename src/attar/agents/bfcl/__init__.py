"""BFCL v4, the Berkeley Function Calling Leaderboard, as environments; data and checkers come from ``bfcl-eval``."""

from attar.agents.bfcl.multi import MultiTurn
from attar.agents.bfcl.single import SingleTurn, grade

__all__ = ["MultiTurn", "SingleTurn", "grade"]
