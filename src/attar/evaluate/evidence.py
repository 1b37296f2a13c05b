"""What the evaluations of all tasks are made of: an arm's speed and cost, the decision, the provenance."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from attar import __version__
from attar.engines.load import teacher_fingerprint
from attar.evaluate import stats, verdict
from attar.recipe import Recipe
from attar.terms import terms_of
from attar.workspace import Run, write_json

__all__ = [
    "bootstrap",
    "decision",
    "opening",
    "provenance",
    "size_mb",
    "speed_record",
    "stored",
    "training_curves",
]


def bootstrap(recipe: Recipe) -> dict[str, Any]:
    """The keyword arguments of every estimate."""
    settings = recipe.evaluate
    return {"confidence": settings.confidence, "resamples": settings.resamples, "seed": recipe.run.seed}


def stored(path: Path, make: Callable[[], Any]) -> Any:
    """A JSON value that is made once and read from then on, so that a killed evaluation goes on."""
    if not path.exists():
        write_json(path, make())
    return json.loads(path.read_text("utf-8"))


def size_mb(path: Path) -> float:
    """A file, or those files of a folder that serving needs, in 10^6 bytes."""
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file() and p.name != "curves.json"]
    return sum(file.stat().st_size for file in files) / 1e6


def speed_record(recipe: Recipe, speed: Mapping[str, Any], costs: Sequence[float]) -> dict[str, Any]:
    """What the report says about an arm's speed.

    Args:
        recipe: how estimates are made.
        speed: what ``attar.evaluate.speed.measure`` returned.
        costs: US dollars for one request, one value a round.
    """
    latency = np.array(speed["latency_ms"])
    return {
        "latency_ms": {
            "p50": float(np.median(latency)),
            "p95": float(np.percentile(latency, 95)),
            # A median over a constant: the interval of the median itself.
            "ci_p50": stats.ratio_of_medians(latency, [1.0], **bootstrap(recipe)).to_json()["ci"],
            "n": len(latency),
        },
        "throughput_per_s": 1 / float(np.mean(speed["seconds_a_request"])),
        "memory_mb": speed["memory_mb"],
        "parameters": speed["parameters"],
        "cost_usd_per_1k": 1000 * float(np.mean(costs)),
    }


def decision(
    recipe: Recipe,
    retention: stats.Estimate,
    latency_ms: Mapping[str, Sequence[float]],
    costs: Mapping[str, Sequence[float]],
    one_off_usd: float,
) -> dict[str, Any]:
    """The keys of an evaluation that say whether to ship.

    Args:
        recipe: its thresholds.
        retention: quality kept.
        latency_ms: of ``teacher`` and ``student``, one value a request.
        costs: of both, US dollars for one request, one value a round.
        one_off_usd: the teacher's signals and the training.
    """
    settings = recipe.evaluate
    speedup = stats.ratio_of_medians(latency_ms["teacher"], latency_ms["student"], **bootstrap(recipe))
    cost_ratio = verdict.cost_ratio(settings, costs["teacher"], costs["student"], recipe.run.seed)
    decided, reasons = verdict.verdict(settings, {"retention": retention, "speedup": speedup, "cost_ratio": cost_ratio})
    return {
        "verdict": decided,
        "reasons": reasons,
        "retention": retention.to_json(),
        "speedup_p50": speedup.to_json(),
        "cost_ratio": cost_ratio.to_json(),
        "break_even": verdict.break_even(
            float(np.mean(costs["teacher"])), float(np.mean(costs["student"])), one_off_usd
        ),
    }


def opening(recipe: Recipe) -> dict[str, Any]:
    """The keys of an evaluation that the recipe alone decides, and the time."""
    settings = recipe.evaluate
    return {
        "schema": 1,
        "name": recipe.name,
        "task": recipe.task,
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "confidence": settings.confidence,
        "thresholds": settings.ship_if.model_dump(),
        "machine_price": settings.machine.model_dump(),
    }


def training_curves(recipe: Recipe, run: Run, arms: Sequence[str]) -> dict[str, Any]:
    """The losses of each arm's first seed."""
    folder = f"seed-{recipe.train.seeds[0]}"
    return {arm: json.loads(run.path("models", arm, folder, "curves.json").read_text("utf-8")) for arm in arms}


def provenance(recipe: Recipe, run: Run, student: str, licence: str | None, packages: Sequence[str]) -> dict[str, Any]:
    """Where the evidence comes from.

    Args:
        recipe: names the teacher.
        run: holds the data.
        student: what the student was made from.
        licence: of the data.
        packages: whose versions count.
    """
    versions = {"attar": __version__, "python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed as a package"
    outputs = run.outputs_of("curate")
    teacher = recipe.teacher
    terms = terms_of(teacher.model, teacher.licence, elsewhere=getattr(teacher, "base_url", None) is not None)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {
        "teacher": recipe.teacher.model,
        "student": student,
        "licences": sorted({x for x in (recipe.teacher.licence, licence) if x}) or ["not stated"],
        "terms": {
            "training on its answers": terms.use,
            "acknowledged": teacher.terms == "acknowledged",
            "says": terms.words,
            "list of": terms.date,
        },
        "hashes": {
            "teacher": teacher_fingerprint(recipe, run),
            **{n: outputs[f"data/{n}.jsonl"] for n in ("train", "val", "test") if f"data/{n}.jsonl" in outputs},
        },
        "versions": versions,
        "seed": recipe.run.seed,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {memory:.0f} GiB, {platform.system()}",
    }
