"""Memory of a training step of a decoder language model, from sizes alone: nothing is loaded to know it.

All figures are bytes on one process. A step has three moments at which memory can be highest; the estimate is that of
the highest. With P parameters, w the width, f the inner width, q and k the widths of queries and keys, L layers, V
entries of the vocabulary, n tokens of a batch (padding included), s supervised ones, b bytes of a weight and c bytes of
a number in computing:

    always      P b weights, 2 P b AdamW's means, the teacher's weights, and P b buckets where gradients are averaged
    teacher     + (3 f' + 4 w') n c         one layer of the teacher at work
    loss        + activations + loss        the student's states are all there, the loss goes into the first layer
    update      + P b gradients + V w b     where head and embeddings are tied, the second gradient of the two

    a layer     l = n (2 (4 + 2 c) w + 2 (q + k) c + 4 f c + 4 h + 8)    two norms, attention (h heads), gated product
    activations = L l + n (4 + c) w + s w c      with checkpoints L n w c in place of L l, and in work l more
    loss        = 4 s w + 4 V w + max(11 C V, V w b, work)      C tokens a chunk, work = 3 n f c

The norms keep their input in float32. The loss makes the gradients of the states and of the head, 4 s w + 4 V w, along
with its value. Scores of attention are not counted: no [tokens, tokens] matrix is built by the
attention that transformers chooses; with `eager` one is.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Literal

from attar.losses.projected import CHUNK_TOKENS, SLICES

__all__ = ["Decoder", "Memory", "estimate"]

Moment = Literal["teacher", "loss", "update"]


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """The sizes of a decoder of Llama's shape: attention, a gated product, two norms a layer."""

    layers: int
    width: int
    inner_width: int
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int
    """rows of the head, padding included"""
    tied: bool
    """whether the head is the table of embeddings"""

    @classmethod
    def from_config(cls, config: Any) -> Decoder:
        """From a ``transformers`` configuration.

        Raises:
            ValueError: it does not say one of the sizes, so that the model is of another shape.
        """
        config = config.get_text_config()
        names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
        missing = [name for name in names if not isinstance(getattr(config, name, None), int)]
        if missing:
            raise ValueError(f"{type(config).__name__} has no {', '.join(missing)}; wanted a decoder of Llama's shape")
        heads = config.num_attention_heads
        return cls(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            inner_width=config.intermediate_size,
            heads=heads,
            key_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
            tied=bool(config.tie_word_embeddings),
        )

    @property
    def layer_parameters(self) -> int:
        """Of one layer; biases are not counted."""
        attention = 2 * self.width * self.head_width * (self.heads + self.key_heads)
        return attention + 3 * self.width * self.inner_width + 2 * self.width

    @property
    def table_parameters(self) -> int:
        """Of the embeddings, and of the head where it is another table."""
        return (1 if self.tied else 2) * self.vocabulary * self.width

    @property
    def parameters(self) -> int:
        """Of all."""
        return self.layers * self.layer_parameters + self.table_parameters + self.width


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one process at the moment when they are most."""

    moment: Moment
    weights: int
    """the student's, with what is gathered of sharded ones, and their copies for mixed precision"""
    gradients: int
    optimiser: int
    teacher: int
    """its weights, and a layer of it at work"""
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """Of all parts; what Python and its libraries take comes on top."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "moment")


def estimate(
    student: Decoder,
    *,
    tokens: int,
    supervised: int,
    teacher: Decoder | None = None,
    weight_bytes: int = 4,
    compute_bytes: int = 4,
    teacher_bytes: int = 4,
    gradient_checkpointing: bool = False,
    accumulation: int = 1,
    processes: int = 1,
    sharded: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
    trained: int | None = None,
) -> Memory:
    """The highest memory of a training step with AdamW; see the module for the formula.

    Args:
        student: its sizes.
        tokens: of a batch on one process, padding included.
        supervised: of them, at most ``tokens``.
        teacher: a live one's sizes; None where signals are cached.
        weight_bytes: 4 for float32, 2 for bfloat16; gradients and AdamW's means are in the weights' format.
        compute_bytes: 2 under mixed precision, else as the weights.
        teacher_bytes: of a number of the teacher.
        gradient_checkpointing: whether layers are computed anew in the backward pass.
        accumulation: batches of an optimiser step.
        processes: how many train together.
        sharded: FSDP2 or DeepSpeed's stage 3, in place of a copy on each process (DDP).
        chunk_tokens: of the loss.
        trained: parameters that are trained, such as those of adapters; None: all.

    Raises:
        ValueError: a number is out of its range.
    """
    for name, value in (("tokens", tokens), ("accumulation", accumulation), ("processes", processes)):
        if value < 1:
            raise ValueError(f"{name} is {value}; wanted at least 1")
    if not 0 <= supervised <= tokens:
        raise ValueError(f"supervised is {supervised}; wanted 0 to the {tokens} tokens")
    parts = processes if sharded else 1
    buckets = processes > 1 and not sharded
    every = student.parameters * weight_bytes
    learned = every if trained is None else trained * weight_bytes
    table = student.vocabulary * student.width
    weights = every // parts
    if sharded and processes > 1:
        weights += _gathered(student, compute_bytes)
    elif compute_bytes < weight_bytes:
        # Autocast keeps the copies that a forward made until it is over, and autograd longer.
        weights += student.parameters * compute_bytes
    kept = learned // parts * buckets
    always = {
        "optimiser": 2 * learned // parts,
        "teacher": _teacher(teacher, teacher_bytes, processes if sharded else 1),
    }
    layer = tokens * (
        2 * (4 + 2 * compute_bytes) * student.width
        + 2 * (student.heads + student.key_heads) * student.head_width * compute_bytes
        + 4 * student.inner_width * compute_bytes
        + 4 * student.heads
        + 8
    )
    ends = (tokens * (4 + compute_bytes) + supervised * compute_bytes) * student.width
    work = 3 * tokens * student.inner_width * compute_bytes
    if gradient_checkpointing:
        activations, work = student.layers * tokens * student.width * compute_bytes + ends, layer + work
    else:
        activations = student.layers * layer + ends
    loss = 4 * supervised * student.width + 4 * table
    # A chunk's logits, and seven parts of a quarter of it, in float32.
    chunk = min(chunk_tokens, max(supervised, 1))
    loss += max((4 + 28 // SLICES) * chunk * student.vocabulary, weight_bytes * table, work)
    accumulated = learned // parts if accumulation > 1 and not buckets else 0
    moments = [
        Memory(
            moment="loss",
            weights=weights,
            gradients=kept + accumulated,
            activations=activations,
            loss=loss,
            **always,
        ),
        Memory(
            moment="update",
            weights=weights,
            gradients=kept + learned // parts + (weight_bytes * table if student.tied and trained is None else 0),
            activations=0,
            loss=0,
            **always,
        ),
    ]
    if teacher is not None:
        at_work = tokens * (3 * teacher.inner_width + 4 * teacher.width) * teacher_bytes
        moments.append(
            Memory(
                moment="teacher",
                weights=weights,
                gradients=kept + accumulated,
                activations=0,
                loss=0,
                optimiser=always["optimiser"],
                teacher=always["teacher"] + at_work,
            )
        )
    return max(moments, key=lambda memory: memory.total)


def _gathered(model: Decoder, number_bytes: int) -> int:
    """What is whole at a time of a sharded model: the tables, the layer at work and the next one."""
    return (model.table_parameters + 2 * model.layer_parameters) * number_bytes


def _teacher(teacher: Decoder | None, number_bytes: int, parts: int) -> int:
    if teacher is None:
        return 0
    share = teacher.parameters * number_bytes // parts
    return share + (_gathered(teacher, number_bytes) if parts > 1 else 0)
