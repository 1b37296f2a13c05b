"""Training data from a teacher: prompts are asked, answers are checked, and what passes is kept (`attar generate`)."""

from attar.collect.generate.estimate import Planned, plan
from attar.collect.generate.run import Generated, generate

__all__ = ["Generated", "Planned", "generate", "plan"]
