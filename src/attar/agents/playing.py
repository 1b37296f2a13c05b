"""Episodes in a file: those that are not there yet are played, and what was cut off goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from attar.agents.environments import Environment, Task
from attar.agents.episodes import Asking, Limits, Try, play
from attar.data.conversations import BadRow
from attar.data.episodes import Episode
from attar.data.journal import Journal
from attar.engines.base import ChatEngine
from attar.errors import RunError, WorkspaceError
from attar.progress import Progress, track

__all__ = ["Stage", "play_all", "read_episodes", "tries_of"]

# Episodes that end because of the engine, one after another, before it is held to be gone.
_HOPELESS = 8


@dataclass(frozen=True)
class Stage:
    """Where episodes are played, and within what."""

    make: Callable[[], Environment]
    limits: Limits
    at_once: int
    seed: int


def tries_of(tasks: Sequence[Task], trials: int) -> list[Try]:
    """Every trial of every task; all tasks once, then again."""
    return [Try(task, trial) for trial in range(trials) for task in tasks]


def read_episodes(path: Path) -> list[Episode]:
    """The episodes of a file.

    Raises:
        WorkspaceError: a row is none.
    """
    episodes = []
    for number, row in enumerate(Journal(path, mend=False).rows(), start=1):
        try:
            episodes.append(Episode.read(row))
        except BadRow as bad:
            raise WorkspaceError(f"{path} line {number} is no episode ({bad}); delete the file, and run again") from bad
    return episodes


def play_all(
    engine: Callable[[], ChatEngine],
    stage: Stage,
    tries: Sequence[Try],
    path: Path,
    *,
    policy: str,
    asking: Asking,
    progress: Progress,
    name: str,
) -> list[Episode]:
    """Play the tries whose episodes are not in the file; each is on the disk before the next is taken in.

    An episode that the engine cut short is not kept, and is played anew by the next call.

    Args:
        engine: gives the engine; called only where something is to be played.
        stage: where.
        tries: what to play.
        path: a file that only grows.
        policy: see :func:`attar.agents.episodes.play`.
        asking: likewise.
        progress: where to report.
        name: of the work, for progress.

    Returns:
        An episode for each try, in their order.

    Raises:
        RunError: the engine failed too often.
        Stopped: budget or quota is used up, or the engine is gone; the same call goes on from there.
    """
    journal = Journal(path)
    found = {(episode.task, episode.trial): episode for episode in read_episodes(path)}
    missing = [tried for tried in tries if (tried.task.id, tried.trial) not in found]
    with track(progress, name, len(tries)) as step:
        step.advance(len(tries) - len(missing))
        failed = 0
        lost: list[str] = []
        if missing:
            episodes = play(
                engine(),
                stage.make,
                missing,
                policy=policy,
                seed=stage.seed,
                limits=stage.limits,
                asking=asking,
                at_once=stage.at_once,
            )
            for episode in episodes:
                if episode.stopped == "engine":
                    failed += 1
                    lost.append(f"{episode.task} ({', '.join(episode.meta.get('counts', {})) or 'content_filter'})")
                    if failed == _HOPELESS:
                        break
                    continue
                failed = 0
                journal.append([episode.wire])
                found[episode.task, episode.trial] = episode
                step.advance()
            episodes.close()
    if lost:
        raise RunError(
            f"{name}: the engine failed in {len(lost)} episodes: {', '.join(lost[:3])}; what ended is kept, and the "
            "same command plays the others again"
        )
    return [found[tried.task.id, tried.trial] for tried in tries]
