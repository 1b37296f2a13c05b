"""The commented recipe that ``attar init`` writes."""

from __future__ import annotations

from pathlib import Path

from attar.errors import UsageError
from attar.workspace import write_atomic

__all__ = ["write_template"]

_RECIPE = """\
# A recipe of attar: distil a classifier-like decision of a large model into a small one.
# Paths count from this file. `attar check` tells what is missing; `attar run` does the work.
name: my-task
task: classify

data:
  labels: [yes-label, no-label]   # the answers that are possible
  pool: pool.jsonl                # {"text": "..."} a line: requests to learn from, no labels needed
  dev: dev.jsonl                  # {"text": "...", "label": "..."}: to try prompts on, and to estimate the prior
  calibration: calibration.jsonl  # labelled: for the student's confidence; never trained on
  test: test.jsonl                # labelled: for the evidence; 300 or more make a verdict possible
  on_bad_line: stop               # or skip: leave out lines that cannot be used, and count them

teacher:
  model: hf:PATH-OF-YOUR-MODEL    # a folder that transformers loads, or hf:FILE.gguf
  # label_words: {yes-label: ["yes", sure, fine]}   # the words that are scored for a label; the first is shown
  calibration: batch              # none | contextual | batch | prototypical (with several words a label)
  prior: estimated                # of the last two: estimated (from dev) | uniform | {label: share}
  prompts:                        # several are averaged
    - template: |-
        Decide: {{ labels | join(" or ") }}.

        {% for example in examples %}Request: {{ example.text }}
        Answer: {{ example.word }}

        {% endfor %}Request: {{ text }}
        Answer:
      examples:
        - {text: "a request that is clearly one", label: yes-label}
        - {text: "a request that is clearly the other", label: no-label}

student:
  model: tiny                     # or hf:FOLDER of a sequence classifier
  form: convolutions              # starts from the teacher's token embeddings; ngrams works with any teacher

distill:
  objectives:
    - {kind: logit, temperature: 1.0}             # the teacher's distribution
    # - {kind: response, weight: 0.5}             # the teacher's hard label
    # - {kind: response, labels: gold, weight: 1} # gold labels, where the pool has some

evaluate:
  ship_if: {retention: 0.90, speedup: 5, cost_ratio: 10}  # each on the lower end of its interval
"""


def write_template(folder: Path) -> Path:
    """Write ``attar.yaml`` into a folder.

    Raises:
        UsageError: there is one already.
    """
    path = folder / "attar.yaml"
    if path.exists():
        raise UsageError(f"{path} exists and is kept; name another folder")
    write_atomic(path, _RECIPE.encode())
    return path
