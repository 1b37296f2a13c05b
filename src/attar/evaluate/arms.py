"""The arms of a chat task, and what each answered: asked once, and read from the run folder from then on."""

from __future__ import annotations

import gc
import io
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attar.engines.heads import head_of
from attar.engines.load import served, teacher_files, tokenizer_place
from attar.evaluate import evidence
from attar.evaluate.answers import GGUF_FILE, Served, open_writer, subject_arguments
from attar.evaluate.cases import Cases, Reading, read_cases
from attar.evaluate.language import Floats, TeacherStates, load_student, read, states_of
from attar.evaluate.served import ServedReads, read_served, read_server, shown_entries
from attar.evaluate.speed import measure
from attar.progress import track
from attar.recipe import ChatRecipe
from attar.workspace import Run, write_atomic

__all__ = ["Arm", "Measured"]

_WARM_UP = 2


@dataclass(frozen=True)
class Arm:
    """One model, of each seed."""

    name: str
    models: list[str]
    """as ``load_local`` takes them"""
    folders: list[Path]
    """where they are; of a served teacher, where its tokenizer is"""
    ggufs: list[Path]
    """where their GGUF files are, if there are any"""
    dtype: str
    """that transformers computes in; ``auto``: as stored"""


def _arms(recipe: ChatRecipe, run: Run) -> list[Arm]:
    """Those that are measured, the teacher first."""
    teacher = recipe.teacher
    gguf = run.path("export", "teacher", "seed-0", GGUF_FILE)
    place = tokenizer_place(recipe) if served(recipe) else teacher_files(recipe)
    arms = [Arm("teacher", [teacher.model], [place], [gguf], teacher.dtype)]
    seeds = {"base": [0], "control": list(recipe.train.seeds), "student": list(recipe.train.seeds)}
    if run.stages["train"]["counts"]["control_equals_student"]:
        del seeds["control"]
    for name, of_arm in seeds.items():
        folders = [run.path("export", name, f"seed-{seed}") for seed in of_arm]
        models, ggufs = [f"hf:{folder}" for folder in folders], [folder / GGUF_FILE for folder in folders]
        arms.append(Arm(name, models, folders, ggufs, "auto"))
    return arms


class Measured:
    """What the arms answered.

    Args:
        recipe: the job.
        run: its folder, with the stages before done.

    Raises:
        DataError: the held-out conversations have nothing to answer.
        RunError: the exported students do not fit together, or not the teacher.
    """

    def __init__(self, recipe: ChatRecipe, run: Run) -> None:
        self.recipe, self._run = recipe, run
        self.arms = {arm.name: arm for arm in _arms(recipe, run)}
        students = [folder for arm in self.arms.values() if arm.name != "teacher" for folder in arm.folders]
        self.cases: Cases = read_cases(recipe, run, students)
        self.served = served(recipe)
        """whether the teacher answers through its server, wherever that is"""
        here = [arm for arm in self.arms.values() if not (self.served and arm.name == "teacher")]
        self.gguf = all(path.is_file() for arm in here for path in arm.ggufs)
        """whether all arms that run here go through llama.cpp; else none does, so that only like is compared"""
        kept = run.path("evaluate", "states")
        self._teacher: TeacherStates | ServedReads = (
            ServedReads(recipe, self.cases.teacher.tokenizer, kept) if self.served else TeacherStates(recipe, kept)
        )

    @property
    def entries(self) -> int | None:
        """How many tokens a served teacher shows at a position; None where it shows all."""
        return shown_entries(self.recipe) if self.served else None

    def reading(self, arm: str) -> Reading:
        """The conversations as the arm's tokenizer reads them."""
        return self.cases.teacher if arm == "teacher" else self.cases.student

    def tables(self, arm: str) -> Floats:
        """Sums by conversation, [seeds, conversations, COLUMNS]."""
        return np.stack([self._table(arm, number) for number in range(len(self.arms[arm].folders))])

    def _table(self, arm: str, number: int) -> Floats:
        path = self._run.path("evaluate", "answers", f"{arm}-test-{number}.npy")
        if not path.exists():
            reading, teacher = self.reading(arm), self._teacher
            with track(self._run.progress, f"{arm} reads test", self.cases.size) as step:
                if arm == "teacher":
                    if isinstance(teacher, ServedReads):
                        table = read_server(reading, teacher, step)
                    else:
                        table = read(reading, teacher, teacher.head, teacher, None, step)
                else:
                    engine = load_student(self.recipe, self.arms[arm].folders[number])
                    head, states = head_of(engine.model, engine.tokenizer), states_of(engine.model)
                    if isinstance(teacher, ServedReads):
                        table = read_served(reading, states, head, teacher, step)
                    else:
                        table = read(reading, states, head, teacher, self.cases.kept, step)
            content = io.BytesIO()
            np.save(content, table, allow_pickle=False)
            write_atomic(path, content.getvalue())
        loaded: Floats = np.load(path, allow_pickle=False)
        return loaded

    def forget_teacher(self) -> None:
        """Give the memory and the disk of the teacher's states back; tables that are stored do not need them."""
        del self._teacher
        gc.collect()
        shutil.rmtree(self._run.path("evaluate", "states"), ignore_errors=True)

    def _served(self, arm: str, number: int) -> Served:
        place, recipe = self.arms[arm], self.recipe
        folder = place.folders[number]
        longest = max(len(turn.prompt) for turn in self.reading(arm).turns)
        remote = self.served and arm == "teacher"
        return Served(
            engine="server" if remote else "llama.cpp" if self.gguf else "transformers",
            model=str(place.ggufs[number]) if self.gguf and not remote else place.models[number],
            tokenizer=str(folder.parent if folder.is_file() else folder),
            dtype=place.dtype,
            device=recipe.run.device,
            threads=recipe.run.threads,
            # llama.cpp keeps a place free.
            context_tokens=longest + recipe.evaluate.answer_tokens + 1,
            teacher=recipe.teacher.model_dump(mode="json") if remote else None,
        )

    def answers(self, arm: str) -> list[list[list[int]]]:
        """Greedy answers of each seed to each turn, ids of the arm's tokenizer."""
        return [self._stored_answers(arm, number) for number in range(len(self.arms[arm].folders))]

    def _stored_answers(self, arm: str, number: int) -> list[list[int]]:
        prompts = [turn.prompt for turn in self.reading(arm).turns]

        def make() -> list[list[int]]:
            writer = open_writer(self._served(arm, number))
            written: list[list[int]] = []
            with track(self._run.progress, f"{arm} answers", len(prompts)) as step:
                for prompt in prompts:
                    written.append(writer.write(prompt, self.recipe.evaluate.answer_tokens).ids)
                    step.advance()
            return written

        path = self._run.path("evaluate", "answers", f"{arm}-greedy-{number}.json")
        loaded: list[list[int]] = evidence.stored(path, make)
        return loaded

    def speed(self, arm: str) -> dict[str, Any]:
        """Of the first seed."""

        def make() -> dict[str, Any]:
            self._run.progress.note(f"  measuring the speed of {arm}")
            prompts = [turn.prompt for turn in self.reading(arm).turns]
            arguments = subject_arguments(self._served(arm, 0), self.recipe.evaluate.answer_tokens)
            opener = "attar.evaluate.answers:open_subject"
            return measure(self.recipe.evaluate, f"the {arm}", opener, arguments, prompts, warm_up=_WARM_UP)

        result: dict[str, Any] = evidence.stored(self._run.path("evaluate", "speed", f"{arm}.json"), make)
        return result

    def size_mb(self, arm: str) -> float | None:
        """What serving needs on disk, in 10^6 bytes; None of a served teacher."""
        if self.served and arm == "teacher":
            return None
        place = self.arms[arm]
        if self.gguf:
            return evidence.size_mb(place.ggufs[0])
        folder = place.folders[0]
        return evidence.size_mb(folder) - sum(evidence.size_mb(path) for path in folder.glob("*.gguf"))
