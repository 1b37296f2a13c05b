"""Scripted teachers for tests; imitating one is not distillation."""

from attar.engines.scripted import ScriptedEngine


class Keyword(ScriptedEngine):
    """Prefers the label whose first letter stands most often in the request."""

    def __init__(self) -> None:
        super().__init__(lambda request, label: 2.0 * request.count(label[0]) - 5.0)
