"""Make the student that a recipe describes, untrained."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from attar.engines.textclassifier import HuggingFaceClassifier, TextClassifier, TinyClassifier, TinyConfig, tiny_net
from attar.errors import CapabilityError, ModelError
from attar.recipe import ClassifyRecipe

__all__ = ["build_classifier", "reduce_rows", "teacher_table"]


def reduce_rows(table: Tensor, width: int) -> Tensor:
    """The first ``width`` principal components of a table's rows, each row then scaled to the mean length 1.

    Model2Vec (Minish Lab 2024) reduces token representations this way before it pools them.

    Args:
        table: [rows, dimensions].
        width: at most dimensions.

    Returns:
        [rows, width], float32.
    """
    centred = (table - table.mean(0)).double()
    values, vectors = torch.linalg.eigh(centred.T @ centred)
    del values
    # An eigenvector's sign is arbitrary; fixing it makes the same table give the same rows everywhere.
    components = vectors.flip(1)[:, :width]
    signs = components.gather(0, components.abs().argmax(0, keepdim=True)).sign()
    reduced = centred @ (components * signs)
    rows: Tensor = (reduced / reduced.norm(dim=1).mean()).float()
    return rows


def teacher_table(recipe: ClassifyRecipe) -> tuple[Tensor, Tokenizer]:
    """The teacher's token embeddings [vocabulary, width], and its tokenizer."""
    from attar.engines.load import load_teacher
    from attar.engines.local import LocalEngine

    engine = load_teacher(recipe)
    if not isinstance(engine, LocalEngine):
        raise CapabilityError(
            f"student.form: convolutions starts from the teacher's weights, and {recipe.teacher.model} shows none; "
            "set student.form: ngrams"
        )
    backend = getattr(engine.tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ModelError(f"the tokenizer of {recipe.teacher.model} is not a fast one; set student.form: ngrams")
    return engine.model.get_input_embeddings().weight.detach().float().cpu(), backend


# Hiding tokens from convolutions costs more than it gives; a bag of n-grams needs it (docs/students.md).
_TOKEN_DROPOUT = {"convolutions": 0.0, "ngrams": 0.3}


class _Builder:
    """Keeps what is the same for every seed."""

    def __init__(self, recipe: ClassifyRecipe) -> None:
        self._recipe = recipe
        self._start: tuple[Tensor, Tokenizer] | None = None

    def __call__(self, seed: int) -> TextClassifier:
        recipe, student = self._recipe, self._recipe.student
        torch.manual_seed(seed)
        if student.model != "tiny":
            name = student.model.removeprefix("hf:")
            path = Path(name).expanduser()
            return HuggingFaceClassifier.from_pretrained(
                str(path) if path.exists() else name, recipe.data.labels, student.max_tokens
            )
        rows, tokenizer = self._teacher_rows() if student.form == "convolutions" else (None, None)
        config = TinyConfig(
            form=student.form,
            labels=recipe.data.labels,
            rows=student.buckets if rows is None else len(rows),
            width=student.width,
            units=student.units,
            dropout=student.dropout,
            token_dropout=_TOKEN_DROPOUT[student.form] if student.token_dropout is None else student.token_dropout,
            max_tokens=student.max_tokens,
        )
        return TinyClassifier(config, tiny_net(config, rows), tokenizer)

    def _teacher_rows(self) -> tuple[Tensor, Tokenizer]:
        if self._start is None:
            table, tokenizer = teacher_table(self._recipe)
            width = self._recipe.student.width
            if width > table.shape[1]:
                raise CapabilityError(f"student.width: {width} is more than the teacher's {table.shape[1]} dimensions")
            self._start = reduce_rows(table, width), tokenizer
        return self._start


def build_classifier(recipe: ClassifyRecipe) -> _Builder:
    """A function of the seed that makes the student; the teacher is loaded at most once.

    Raises (when called):
        CapabilityError: the student needs the teacher's weights, and the teacher shows none.
        ModelError: there is no such student model.
    """
    return _Builder(recipe)
