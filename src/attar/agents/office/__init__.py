"""A small, deterministic office for demos and tests, and a script that solves its tasks."""

from attar.agents.office.environment import Office
from attar.agents.office.expert import OfficeExpert

__all__ = ["Office", "OfficeExpert"]
