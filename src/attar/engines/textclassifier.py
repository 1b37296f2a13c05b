"""Trained text classifiers: a network, how text becomes its input, and the folder that holds both."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from attar.errors import ModelError

__all__ = [
    "CONFIG_FILE",
    "Bag",
    "Encoded",
    "HuggingFaceClassifier",
    "TextClassifier",
    "TinyClassifier",
    "TinyConfig",
    "TinyNet",
    "load_text_classifier",
    "log_probs",
    "ngram_ids",
]

CONFIG_FILE = "attar.json"


Encoded = tuple[list[int], ...]
"""the ids of one text, one list for each table that the network looks them up in"""


class TextClassifier(Protocol):
    """What training, export and serving need of a classifier."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What it answers with."""

    @property
    def module(self) -> nn.Module:
        """The network."""

    def encode(self, text: str) -> Encoded:
        """Ids of one text, at least one in each list."""

    def collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """The module's input for some texts, padded."""

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write everything that serving needs into an existing folder, floating-point weights as ``dtype``."""


@torch.inference_mode()
def log_probs(classifier: TextClassifier, texts: Sequence[str], batch_size: int = 64) -> npt.NDArray[np.float32]:
    """Log-probabilities of the labels, [texts, labels]."""
    device = next(classifier.module.parameters()).device
    tables = []
    for start in range(0, len(texts), batch_size):
        rows = [classifier.encode(text) for text in texts[start : start + batch_size]]
        batch = {key: value.to(device) for key, value in classifier.collate(rows).items()}
        tables.append(classifier.module(**batch).logits.float().log_softmax(-1).cpu().numpy())
    return np.concatenate(tables)


def _pad(rows: Sequence[list[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Ids and mask, [rows, longest]."""
    width = max(map(len, rows))
    ids = torch.tensor([row + [padding] * (width - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])


@dataclass(frozen=True)
class TinyConfig:
    """Everything that shapes a tiny classifier."""

    form: Literal["embeddings", "ngrams"]
    labels: tuple[str, ...]
    tokens: int
    """rows of the token table: the tokenizer's vocabulary; 0 for the form ``ngrams``"""
    buckets: int
    """rows of the hashed n-gram table"""
    width: int
    hidden: int
    dropout: float
    token_dropout: float
    max_tokens: int


class Bag(nn.Module):
    """A mean of table rows, weighted by a learned importance of each row."""

    def __init__(self, rows: int, width: int, token_dropout: float) -> None:
        super().__init__()
        self.table = nn.Embedding(rows, width)
        nn.init.normal_(self.table.weight, std=0.3)
        self.importance = nn.Embedding(rows, 1)
        nn.init.zeros_(self.importance.weight)
        self._token_dropout = token_dropout

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """[texts, width] from ids and mask [texts, ids]."""
        visible = mask != 0
        if self.training and self._token_dropout:
            kept = visible & (torch.rand(ids.shape, device=ids.device) >= self._token_dropout)
            visible = torch.where(kept.any(1, keepdim=True), kept, visible)
        importance = self.importance(ids).squeeze(-1).masked_fill(~visible, float("-inf"))
        pooled: Tensor = (importance.softmax(-1)[:, :, None] * self.table(ids)).sum(1)
        return pooled


class TinyNet(nn.Module):
    """Bags of tokens and of hashed n-grams, side by side, then one hidden layer."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.bags = nn.ModuleDict({"ngrams": Bag(config.buckets, config.width, config.token_dropout)})
        if config.form == "embeddings":
            self.bags["tokens"] = Bag(config.tokens, config.width, config.token_dropout)
        width = config.width * len(self.bags)
        self.head = nn.Sequential(
            nn.LayerNorm(width),
            nn.Dropout(config.dropout),
            nn.Linear(width, config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, len(config.labels)),
        )

    def start_tokens_from(self, rows: Tensor) -> None:
        """Put these rows [tokens, width] into the token table."""
        self.bags["tokens"].get_submodule("table").get_parameter("weight").data.copy_(rows)

    def forward(self, **inputs: Tensor) -> SequenceClassifierOutput:
        """Logits [texts, labels] from ``<bag>_ids`` and ``<bag>_mask`` [texts, ids] of each bag."""
        pooled = [bag(inputs[f"{name}_ids"], inputs[f"{name}_mask"]) for name, bag in self.bags.items()]
        return SequenceClassifierOutput(logits=self.head(torch.cat(pooled, -1)))


def ngram_ids(text: str, buckets: int) -> list[int]:
    """Hashed features of a text: words, pairs of words, and character 3- to 5-grams inside words."""
    words = re.findall(r"\w+|[^\w\s]", text.casefold())
    grams = [*words, *(f"{a} {b}" for a, b in itertools.pairwise(words))]
    for word in words:
        fenced = f"<{word}>"
        grams += [f"#{fenced[i : i + n]}" for n in (3, 4, 5) for i in range(len(fenced) - n + 1)]
    return [zlib.crc32(gram.encode()) % buckets for gram in grams]


# N-grams a token, at most, when a text is cut to the longest input.
_NGRAMS_PER_TOKEN = 16


class TinyClassifier:
    """A :class:`TinyNet` with its features."""

    def __init__(self, config: TinyConfig, module: TinyNet, tokenizer: Tokenizer | None) -> None:
        self.config = config
        self.labels = config.labels
        self.module = module
        self._tokenizer = tokenizer

    def encode(self, text: str) -> Encoded:
        """N-gram ids and, for the form ``embeddings``, token ids; an empty text gets id 0."""
        grams = ngram_ids(text, self.config.buckets)[: _NGRAMS_PER_TOKEN * self.config.max_tokens] or [0]
        if self._tokenizer is None:
            return (grams,)
        # After a space, so that the first word is the same token as in the middle of a sentence.
        ids: list[int] = self._tokenizer.encode(" " + text.lower(), add_special_tokens=False).ids
        return grams, ids[: self.config.max_tokens] or [0]

    def collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pad with id 0, which the mask hides."""
        batch = {}
        for name, lists in zip(self.module.bags, zip(*rows, strict=True), strict=True):
            batch[f"{name}_ids"], batch[f"{name}_mask"] = _pad(lists, 0)
        return batch

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write weights, configuration and tokenizer."""
        state = {name: value.detach().to(dtype).contiguous() for name, value in self.module.state_dict().items()}
        save_file(state, folder / "model.safetensors")
        (folder / CONFIG_FILE).write_text(json.dumps({"kind": "tiny", **asdict(self.config)}, indent=2), "utf-8")
        if self._tokenizer is not None:
            (folder / "tokenizer.json").write_text(self._tokenizer.to_str(pretty=False), "utf-8")

    @classmethod
    def load(cls, folder: Path) -> TinyClassifier:
        """Load what :meth:`save` wrote; computes in float32 whatever the stored type."""
        values = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        values.pop("kind")
        config = TinyConfig(**{**values, "labels": tuple(values["labels"])})
        module = TinyNet(config)
        state = load_file(folder / "model.safetensors")
        module.load_state_dict({name: value.float() for name, value in state.items()})
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")) if config.form == "embeddings" else None
        return cls(config, module.eval(), tokenizer)


class HuggingFaceClassifier:
    """Any sequence-classification model that transformers loads."""

    def __init__(self, labels: tuple[str, ...], module: Any, tokenizer: Any, max_tokens: int) -> None:
        self.labels = labels
        self.module = module
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    def encode(self, text: str) -> Encoded:
        """Ids with the tokenizer's own special tokens, cut at the longest input."""
        return (self._tokenizer(text, truncation=True, max_length=self._max_tokens).input_ids,)

    def collate(self, rows: Sequence[Encoded]) -> dict[str, Tensor]:
        """Pad on the right with the tokenizer's padding token."""
        ids, mask = _pad([row[0] for row in rows], self._tokenizer.pad_token_id)
        return {"input_ids": ids, "attention_mask": mask}

    def save(self, folder: Path, dtype: torch.dtype) -> None:
        """Write a folder that transformers loads as well."""
        state = {
            name: value.detach().to(dtype) if value.is_floating_point() else value
            for name, value in self.module.state_dict().items()
        }
        self.module.save_pretrained(folder, state_dict=state)
        self._tokenizer.save_pretrained(folder)
        about = {"kind": "hf", "labels": list(self.labels), "max_tokens": self._max_tokens}
        (folder / CONFIG_FILE).write_text(json.dumps(about, indent=2), "utf-8")

    @classmethod
    def load(cls, folder: Path) -> HuggingFaceClassifier:
        """Load what :meth:`save` wrote."""
        about = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
        return cls.from_pretrained(str(folder), tuple(about["labels"]), about["max_tokens"])

    @classmethod
    def from_pretrained(cls, name: str, labels: tuple[str, ...], max_tokens: int) -> HuggingFaceClassifier:
        """Take a model from a folder or the hub and give it these labels.

        Raises:
            ModelError: transformers cannot load it as a sequence classifier, or its tokenizer has no padding token.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(name)
            module = AutoModelForSequenceClassification.from_pretrained(
                name,
                dtype=torch.float32,
                num_labels=len(labels),
                id2label=dict(enumerate(labels)),
                label2id={label: i for i, label in enumerate(labels)},
                ignore_mismatched_sizes=True,
            )
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ModelError(
                f"student.model: hf:{name} is no sequence classifier that transformers can load ({reason})"
            ) from error
        if tokenizer.pad_token_id is None:
            raise ModelError(f"student.model: the tokenizer of hf:{name} has no padding token; set one and save it")
        module.config.pad_token_id = tokenizer.pad_token_id
        return cls(labels, module.eval(), tokenizer, max_tokens)


def load_text_classifier(folder: Path) -> TextClassifier:
    """Load a trained classifier from its folder.

    Raises:
        ModelError: the folder holds none.
    """
    about = folder / CONFIG_FILE
    if not about.is_file():
        raise ModelError(f"{folder} holds no trained classifier ({CONFIG_FILE} is missing)")
    kind = json.loads(about.read_text("utf-8"))["kind"]
    loaders: dict[str, Callable[[Path], TextClassifier]] = {
        "tiny": TinyClassifier.load,
        "hf": HuggingFaceClassifier.load,
    }
    if kind not in loaders:
        raise ModelError(f"{about}: kind {kind!r} is unknown; this attar loads {', '.join(loaders)}")
    return loaders[kind](folder)
