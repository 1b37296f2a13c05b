"""BFCL v4, the Berkeley Function Calling Leaderboard, as environments: its data and checkers come from ``bfcl-eval``."""

from attar.agents.bfcl.single import SingleTurn, grade

__all__ = ["SingleTurn", "grade"]
