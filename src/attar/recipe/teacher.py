"""A model that answers, how it is reached, and what it costs."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from attar.recipe.part import Part, Positive

__all__ = ["Budget", "TeacherModel", "TokenPrice"]


class TokenPrice(Part):
    """What a server bills."""

    input_usd_per_million_tokens: float = Field(ge=0, strict=False)
    output_usd_per_million_tokens: float = Field(ge=0, strict=False)
    cached_input_usd_per_million_tokens: float | None = Field(default=None, ge=0, strict=False)
    """as any other input where nothing is said"""
    batch_share: float = Field(default=1.0, gt=0, le=1, strict=False)
    """what batch mode bills of these"""


class Budget(Part):
    """What a run may spend on its teacher, over all its starts."""

    usd: float | None = Field(default=None, gt=0, strict=False)
    """None: no limit"""


class TeacherModel(Part):
    """The expensive model."""

    model: str
    """`hf:FOLDER`, `hf:FILE.gguf`, `gguf:FILE`, `vllm:FOLDER`, `openai:NAME`, `anthropic:NAME`, or a class of the
    user's, `package.module:Class`"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    licence: str | None = None
    terms: Literal["acknowledged"] | None = None
    """that you may train on this teacher's answers although its terms restrict it; `attar check` asks where it must"""
    tokens_per_batch: Positive = 512
    """of one forward pass of a model in this process"""
    base_url: str | None = None
    """of the server that speaks the provider's protocol; None: the provider's own"""
    api_key_env: str | None = None
    """environment variable that holds the key; None: the provider's usual one at the provider, no key elsewhere"""
    max_tokens: Positive | None = None
    """of one answer, reasoning included; what a call can cost at most follows from it"""
    timeout_s: float = Field(default=120.0, gt=0, strict=False)
    """of one attempt"""
    total_timeout_s: float = Field(default=1800.0, gt=0, strict=False)
    """of one request, all attempts and waits between them included"""
    concurrency: Positive = 64
    """requests in flight, at most; how many there are follows from what the server bears"""
    batch: bool = False
    """send requests in the provider's batch mode: cheaper, answered within a day"""
    price: TokenPrice | None = None
    """None: the list price at the provider"""

    @model_validator(mode="after")
    def _of_a_server(self) -> Self:
        scheme = self.model.partition(":")[0]
        if scheme not in ("openai", "anthropic"):
            defaults = TeacherModel.model_construct(model="")
            for key in (
                "base_url",
                "api_key_env",
                "timeout_s",
                "total_timeout_s",
                "concurrency",
                "batch",
                "price",
            ):
                if getattr(self, key) != getattr(defaults, key):
                    raise ValueError(f"teacher.{key} belongs to openai:NAME and anthropic:NAME, not to {self.model}")
        if self.batch and scheme != "openai":
            raise ValueError(f"teacher.batch: true needs openai:NAME, teacher.model is {self.model}")
        if self.total_timeout_s < self.timeout_s:
            raise ValueError(f"teacher.total_timeout_s is {self.total_timeout_s}, less than timeout_s {self.timeout_s}")
        return self
