"""Latency, throughput and memory of one arm, in a process of its own.

Every arm is measured by the same code: a warm-up, requests one at a time, then whole batches in rounds. A process of
its own keeps one arm's memory out of another's.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from attar.errors import RunError
from attar.recipe import ClassifyRecipe

__all__ = ["measure"]

_WARM_UP = 5


def measure(
    recipe: ClassifyRecipe, folder: Path | None, calibration: dict[str, Any], texts: list[str]
) -> dict[str, Any]:
    """Measure an arm.

    Returns:
        ``latency_ms`` (one value a request), ``seconds_a_request`` (one value a round of batches), ``memory_mb``
        (resident, after answering) and ``parameters``.

    Raises:
        RunError: the process failed; its last lines are in the message.
    """
    job = {
        "recipe": recipe.dump(),
        "folder": None if folder is None else str(folder),
        "calibration": calibration,
        "texts": texts,
    }
    # A fixed string: the job itself comes on standard input.
    done = subprocess.run(
        [sys.executable, "-c", "from attar.evaluate.speed import _worker; _worker()"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
        env=_environment(),
    )
    if done.returncode:
        raise RunError(f"measuring {folder or 'the teacher'} failed: {done.stderr.strip()[-500:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _resident_mb() -> float:
    import psutil

    resident = psutil.Process().memory_info().rss / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return round(min(resident, peak), 1)


def _worker() -> None:
    job = json.load(sys.stdin)
    from attar.evaluate.tasks import open_arm
    from attar.recipe import ClassifyRecipe

    recipe = ClassifyRecipe.model_validate(job["recipe"])
    folder = Path(job["folder"]) if job["folder"] else None
    if folder is None or not (folder / "idf.npy").is_file():
        import os

        import torch

        torch.set_num_threads(recipe.run.threads or os.cpu_count() or 1)
    arm = open_arm(recipe, folder, job["calibration"])
    texts = job["texts"]

    def cycle(n: int, start: int = 0) -> list[str]:
        return [texts[(start + i) % len(texts)] for i in range(n)]

    for text in cycle(_WARM_UP):
        arm.answer([text])
    latency = []
    for text in cycle(recipe.evaluate.latency_requests):
        start = time.perf_counter()
        arm.answer([text])
        latency.append((time.perf_counter() - start) * 1000)
    batch = recipe.evaluate.throughput_requests
    rounds = []
    for number in range(recipe.evaluate.throughput_rounds):
        requests = cycle(batch, number * batch)
        start = time.perf_counter()
        arm.answer(requests)
        rounds.append((time.perf_counter() - start) / batch)
    result = {
        "latency_ms": latency,
        "seconds_a_request": rounds,
        "memory_mb": _resident_mb(),
        "parameters": arm.engine.parameters,
    }
    sys.stdout.write(json.dumps(result) + "\n")
