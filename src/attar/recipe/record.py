"""The recorder's part of a recipe."""

from __future__ import annotations

import re
import urllib.parse
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from attar.recipe.part import Part, Positive

__all__ = ["Record"]


class Record(Part):
    """Where the recorder stands, and what it keeps."""

    upstream: str
    """the API that is recorded: what `base_url` was, e.g. `https://api.openai.com`"""
    folder: Path | None = Field(default=None, strict=False)
    """`raw` in the run folder where nothing is said"""
    host: str = "127.0.0.1"
    """address to listen on; one that other machines reach needs a token"""
    port: Annotated[int, Field(ge=0, le=65535)] = 8100
    """0 takes a free one"""
    token_env: str | None = None
    """environment variable with the token that callers must send"""
    workload: str = Field(default="default", min_length=1)
    """of calls that name none"""
    keep_days: Positive | None = None
    """age at which rows are erased; None keeps them until they are deleted"""
    redact: tuple[Literal["email", "key", "phone"], ...] = Field(default=("email", "key", "phone"), strict=False)
    """what is taken out before anything is written"""
    patterns: dict[str, str] = Field(default_factory=dict)
    """the user's own: name -> regular expression; what it finds becomes `[NAME]`"""
    segment_mb: Positive = 64
    """size of one file"""
    queue_mb: Positive = 256
    """of recordings that may wait for the disk in memory; more are lost, and counted"""
    max_body_mb: Positive = 64
    """of a request; a larger one is refused"""
    connect_timeout_s: float = Field(default=10.0, gt=0, strict=False)
    timeout_s: float = Field(default=600.0, gt=0, strict=False)
    """between two bytes from upstream, and before the first"""

    @model_validator(mode="after")
    def _possible(self) -> Record:
        parts = urllib.parse.urlsplit(self.upstream)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise ValueError(f"upstream: {self.upstream!r} is no address; wanted http(s)://HOST[:PORT][/PATH]")
        for name, pattern in self.patterns.items():
            try:
                found = re.compile(pattern).match("")
            except re.error as error:
                raise ValueError(f"patterns.{name}: {pattern!r} is no regular expression ({error})") from error
            if found or not re.fullmatch(r"\w+", name):
                wanted = "find something" if found else "have a name of letters, digits and _"
                raise ValueError(f"patterns.{name}: {pattern!r} must {wanted}")
        return self
