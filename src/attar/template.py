"""The commented recipes that ``attar init`` writes, one a task."""

from __future__ import annotations

from pathlib import Path

from attar.errors import UsageError
from attar.workspace import write_atomic

__all__ = ["TEMPLATES", "write_template"]

_CLASSIFY = """\
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


_CHAT = """\
# A recipe of attar: distil a language model into a smaller one.
# Paths count from this file. `attar check` tells what is missing; `attar run` does the work.
name: my-student
task: chat

data:
  train: conversations.jsonl      # {"messages": [...], "tools": [...]} a line, in OpenAI's shape
  # val: val.jsonl                # held out of `train` where nothing is said
  # test: test.jsonl
  on_bad_line: stop               # or skip: leave out lines that cannot be used, and count them

curate:
  val_size: 50                    # conversations held out of `train` to choose the checkpoint
  test_size: 50                   # and for the evidence
  max_tokens: 2048                # longer conversations are cut, and counted

teacher:
  model: hf:PATH-OF-YOUR-MODEL    # a folder that transformers loads

student:
  shrink: {layers: 10}            # of the teacher's layers; see docs/language-models.md for widths and vocabulary
  # model: hf:FOLDER              # start from another model with the same tokenizer
  # lora: {rank: 16}              # train adapters, merged at export

distill:
  objectives:
    - {kind: response, weight: 0.3}               # the conversation's own tokens
    - {kind: logit, divergence: forward_kl, temperature: 1.0, weight: 1.0}   # the teacher's probabilities
    # - {kind: feature, match: {model.layers.-1: model.layers.-1}, loss: cosine, weight: 0.1}   # and inner states
  signals: {source: cached, kind: sampled}        # or kind: hidden | top_k, or source: live

train: {epochs: 2, learning_rate: 1.0e-4, tokens_per_batch: 4096}

evaluate:
  ship_if: {retention: 0.90, speedup: 5, cost_ratio: 10}  # each on the lower end of its interval
"""

_AGENT = """\
# A recipe of attar: distil an agent, its reasoning and its tool calls, into a small one.
# Paths count from this file. `attar check` tells what is missing, `attar check --headroom` whether there is anything to
# gain; `attar run` does the work.
name: my-agent
task: agent

environment:
  use: office                     # the small world that comes along; bfcl; or your own, package.module:Class
  # options: {seed: 0}            # of the class
  steps: 12                       # answers of the agent in an episode, at most
  answer_tokens: 256              # of one answer, its reasoning included
# data: {train: episodes.jsonl}   # episodes that were recorded or imported, in place of the teacher's own

teacher:
  model: openai:YOUR-MODEL        # anything that answers with tools: an API, a server (base_url), hf:FOLDER
  max_tokens: 1024
  # base_url: http://127.0.0.1:8000/v1
  # price: {input_usd_per_million_tokens: 1.0, output_usd_per_million_tokens: 4.0}
# budget: {usd: 20}

student:
  model: hf:PATH-OF-A-SMALL-MODEL # instruction-tuned; a template without tools gets one

collect:
  rollout: {tasks: 500}           # of the environment's split `train`, that the teacher plays

curate:
  failed_calls: unlearn           # calls that failed and were mended: keep | unlearn | drop
  # reasoning: {policy: shorten}  # keep | strip | shorten: small students learn worse from long chains

distill:
  objectives:
    - {kind: response}            # behaviour cloning; logit too where the teacher shows its probabilities
  # prune: true                   # train system prompt and tools into the student, and cut them from its prompt
  # relabel: {rounds: 1, tasks: 100}  # the student acts, the teacher says what it would have done

train: {epochs: 2, tokens_per_batch: 4096, learning_rate: 1.0e-4}

evaluate:
  splits: [test]                  # of the environment; the first decides
  ship_if: {retention: 0.90, speedup: 5, cost_ratio: 10}  # each on the lower end of its interval
"""


TEMPLATES = {"classify": _CLASSIFY, "chat": _CHAT, "agent": _AGENT}


def write_template(folder: Path, task: str = "classify") -> Path:
    """Write ``attar.yaml`` into a folder.

    Args:
        folder: made where it is not there.
        task: a key of ``TEMPLATES``.

    Raises:
        UsageError: there is a recipe already, or no such task.
    """
    if task not in TEMPLATES:
        raise UsageError(f"--task {task}: there is no such task; there are {', '.join(TEMPLATES)}")
    path = folder / "attar.yaml"
    if path.exists():
        raise UsageError(f"{path} exists and is kept; name another folder")
    write_atomic(path, TEMPLATES[task].encode())
    return path
