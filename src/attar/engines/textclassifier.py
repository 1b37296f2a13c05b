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
    "ConvolutionNet",
    "HuggingFaceClassifier",
    "NgramNet",
    "TextClassifier",
    "TinyClassifier",
    "TinyConfig",
    "TinyNet",
    "load_text_classifier",
    "log_probs",
    "ngram_ids",
    "tiny_net",
]

CONFIG_FILE = "attar.json"


class TextClassifier(Protocol):
    """What training, export and serving need of a classifier."""

    @property
    def labels(self) -> tuple[str, ...]:
        """What it answers with."""

    @property
    def module(self) -> nn.Module:
        """The network."""

    def encode(self, text: str) -> list[int]:
        """Ids of one text, at least one."""

    def collate(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
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

    form: Literal["convolutions", "ngrams"]
    labels: tuple[str, ...]
    rows: int
    """of the table: the tokenizer's vocabulary, or the buckets that n-grams are hashed into"""
    width: int
    """of a row"""
    units: int
    """filters of each window, or units of the hidden layer"""
    dropout: float
    token_dropout: float
    max_tokens: int


def _drop(mask: Tensor, share: float) -> Tensor:
    """What stays visible, bool [texts, ids], when this share of a text's features is hidden; never nothing."""
    visible = mask != 0
    if not share:
        return visible
    kept = visible & (torch.rand(mask.shape, device=mask.device) >= share)
    return torch.where(kept.any(1, keepdim=True), kept, visible)


class ConvolutionNet(nn.Module):
    """Windows of 1 to 4 tokens, of each filter its strongest answer (Kim 2014, arXiv:1408.5882)."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.rows, config.width)
        self.windows = nn.ModuleList(nn.Conv1d(config.width, config.units, size, padding=size - 1) for size in _WINDOWS)
        self.head = nn.Sequential(
            nn.Dropout(config.dropout), nn.Linear(len(_WINDOWS) * config.units, len(config.labels))
        )
        self._token_dropout = config.token_dropout

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Logits [texts, labels] from ids and mask [texts, tokens]."""
        visible = _drop(attention_mask, self._token_dropout if self.training else 0.0)
        rows = (self.table(input_ids) * visible[:, :, None]).transpose(1, 2)
        strongest = []
        for size, window in zip(_WINDOWS, self.windows, strict=True):
            # A window that lies on padding alone does not count: its bias would make the answer depend on the batch.
            reached = nn.functional.pad(attention_mask, (size - 1, 0), value=1)
            strongest.append((window(rows).relu() * reached[:, None]).amax(-1))
        return SequenceClassifierOutput(logits=self.head(torch.cat(strongest, -1)))


class NgramNet(nn.Module):
    """A mean of hashed n-grams, weighted by a learned importance of each row, then one hidden layer."""

    def __init__(self, config: TinyConfig) -> None:
        super().__init__()
        self.table = nn.Embedding(config.rows, config.width)
        nn.init.normal_(self.table.weight, std=0.3)
        self.importance = nn.Embedding(config.rows, 1)
        nn.init.zeros_(self.importance.weight)
        self.head = nn.Sequential(
            nn.LayerNorm(config.width),
            nn.Dropout(config.dropout),
            nn.Linear(config.width, config.units),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.units, len(config.labels)),
        )
        self._token_dropout = config.token_dropout

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Logits [texts, labels] from ids and mask [texts, n-grams]."""
        visible = _drop(attention_mask, self._token_dropout if self.training else 0.0)
        importance = self.importance(input_ids).squeeze(-1).masked_fill(~visible, float("-inf"))
        pooled = (importance.softmax(-1)[:, :, None] * self.table(input_ids)).sum(1)
        return SequenceClassifierOutput(logits=self.head(pooled))


TinyNet = ConvolutionNet | NgramNet
_WINDOWS = (1, 2, 3, 4)
_FORMS: dict[str, type[TinyNet]] = {"convolutions": ConvolutionNet, "ngrams": NgramNet}


def tiny_net(config: TinyConfig, rows: Tensor | None = None) -> TinyNet:
    """A new network; ``rows`` [rows, width] is what its table starts from."""
    module = _FORMS[config.form](config)
    if rows is not None:
        module.table.weight.data.copy_(rows)
    return module


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
    """A tiny network and what its ids mean: tokens where it has a tokenizer, else n-grams."""

    def __init__(self, config: TinyConfig, module: TinyNet, tokenizer: Tokenizer | None) -> None:
        self.config = config
        self.labels = config.labels
        self.module = module
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        """Token or n-gram ids; an empty text gets id 0."""
        if self._tokenizer is None:
            return ngram_ids(text, self.config.rows)[: _NGRAMS_PER_TOKEN * self.config.max_tokens] or [0]
        # After a space, so that the first word is the same token as in the middle of a sentence.
        ids: list[int] = self._tokenizer.encode(" " + text.lower(), add_special_tokens=False).ids
        return ids[: self.config.max_tokens] or [0]

    def collate(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """Pad with id 0, which the mask hides."""
        ids, mask = _pad(rows, 0)
        return {"input_ids": ids, "attention_mask": mask}

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
        module = tiny_net(config)
        state = load_file(folder / "model.safetensors")
        module.load_state_dict({name: value.float() for name, value in state.items()})
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")) if config.form == "convolutions" else None
        return cls(config, module.eval(), tokenizer)


class HuggingFaceClassifier:
    """Any sequence-classification model that transformers loads."""

    def __init__(self, labels: tuple[str, ...], module: Any, tokenizer: Any, max_tokens: int) -> None:
        self.labels = labels
        self.module = module
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens

    def encode(self, text: str) -> list[int]:
        """Ids with the tokenizer's own special tokens, cut at the longest input."""
        ids: list[int] = self._tokenizer(text, truncation=True, max_length=self._max_tokens).input_ids
        return ids

    def collate(self, rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """Pad on the right with the tokenizer's padding token."""
        ids, mask = _pad(rows, self._tokenizer.pad_token_id)
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
