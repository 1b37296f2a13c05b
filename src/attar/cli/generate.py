"""The verb that has a teacher generate training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from attar.cli.app import DryOption, JsonOption, RecipeArgument, SetOption, app
from attar.cli.terminal import Terminal

if TYPE_CHECKING:
    from attar.collect.generate import Generated, Planned
    from attar.collect.generate.estimate import Range
    from attar.collect.generate.store import Spend


@app.command("generate")
def _generate(
    recipe: RecipeArgument = Path("attar.yaml"),
    overrides: SetOption = None,
    as_json: JsonOption = False,
    dry_run: DryOption = False,
) -> None:
    """Have the teacher answer prompts, keep what passes: collect.generate -> raw/."""
    from attar.collect.generate import generate, plan
    from attar.errors import Stopped
    from attar.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    if dry_run:
        planned = plan(loaded)
        if as_json:
            print(json.dumps({"plan": planned.to_json()}))
        else:
            _print_plan(planned)
        return
    result = generate(loaded, progress=Terminal())
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        _print_result(result)
    if not result.complete:
        listed = ", ".join(f"{reason} ({n})" for reason, n in result.unanswered.items())
        raise Stopped(f"requests failed that may do better: {listed}; the same command asks them again")


def _print_plan(planned: Planned) -> None:
    if planned.kept:
        print(f"{planned.kept} answers are kept already")
    for name, part in (("prompts", planned.prompts), ("answers", planned.answers), ("judge", planned.judge)):
        if part is not None and part.calls[1]:
            print(f"{name}: {_range(part)}")
    if planned.usd is not None:
        print(f"in all: {_dollars(planned.usd)}")
    if planned.judge_is_teacher:
        print("the judge is the teacher itself, and models favour what they wrote")


def _range(part: Range) -> str:
    counts = (
        f"{_span(part.calls)} calls, {_span(part.prompt_tokens)} tokens asked, "
        f"{_span(part.completion_tokens)} tokens answered"
    )
    return f"{counts}, {'price not known' if part.usd is None else _dollars(part.usd)}"


def _span(values: tuple[int, int]) -> str:
    return f"{values[0]:,}" if values[0] == values[1] else f"{values[0]:,} to {values[1]:,}"


def _dollars(usd: tuple[float, float]) -> str:
    return f"${usd[0]:.4f}" if usd[0] == usd[1] else f"${usd[0]:.4f} to ${usd[1]:.4f}"


def _print_result(result: Generated) -> None:
    of = "" if result.target is None else f" of {result.target}"
    print(f"{result.folder}/generated.jsonl: {result.kept}{of} kept")
    print(f"{result.folder}/rejected.jsonl: {sum(result.rejected.values())} rejected")
    for reason, n in result.rejected.items():
        print(f"  {n} {reason}")
    if result.prompts_written or result.prompts_dropped:
        dropped = "".join(f", {n} {reason}" for reason, n in result.prompts_dropped.items())
        print(f"{result.folder}/prompts.jsonl: {result.prompts_written} prompts written{dropped}")
    for reason, n in result.skipped.items():
        print(f"  {n} prompts skipped: {reason}")
    print(f"teacher: {_spent(result.teacher)}")
    if result.judge is not None:
        print(f"judge: {_spent(result.judge)}{', the teacher itself' if result.judge_is_teacher else ''}")


def _spent(spend: Spend) -> str:
    tokens = f"{spend.calls:,} calls, {spend.prompt_tokens:,} tokens asked, {spend.completion_tokens:,} answered"
    return f"{tokens}, {'price not known' if spend.usd is None else f'${spend.usd:.4f}'}"
