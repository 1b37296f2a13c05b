"""The teacher's labelling pass against scoring each request with its whole prompt.

    python benchmarks/label_throughput.py [--requests 48] [--rounds 3]

Both sides score the same requests of the router's pool under the first prompt of its recipe, with the same model in
the same process, in turn; the best round of each counts. The plain side is what one would write first: every prompt
whole, in padded batches of 8, head at the last position only. The last line is JSON.
"""

import argparse
import json
import sys
import time

import torch
from transformers.utils import logging

from attar.data.files import read_jsonl
from attar.demo import demo_files, teacher_folder
from attar.engines.local import load_local
from attar.progress import Silent
from attar.recipe import load_recipe
from attar.signals.labels import LabelQuestion
from attar.tokens import encode_plain, encode_prompt

BATCH = 8


@torch.inference_mode()
def plain(engine, prompts, words):
    tokenizer, model = engine.tokenizer, engine.model
    first = [encode_plain(tokenizer, " " + word)[0] for word in words]
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    rows = []
    for start in range(0, len(encoded), BATCH):
        batch = encoded[start : start + BATCH]
        width = max(map(len, batch))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in batch])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=1).logits[:, -1]
        rows.append(logits.log_softmax(-1)[:, first])
    return torch.cat(rows).numpy()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    logging.disable_progress_bar()
    folder = teacher_folder(Silent())
    recipe = load_recipe(demo_files() / "attar.yaml", [f"teacher.model=hf:{folder}"])
    question = LabelQuestion(recipe)
    words = question.scored
    engine = load_local(recipe.teacher.model, device=torch.device("cpu"))
    texts = [row["text"] for row in read_jsonl(recipe.data.pool)[: args.requests]]
    prompts = [question.prompts(text)[0] for text in texts]
    engine.score(prompts[:2], words)
    best = {"packed": float("inf"), "plain": float("inf")}
    for number in range(args.rounds):
        start = time.perf_counter()
        packed = engine.score(prompts, words).log_probs
        best["packed"] = min(best["packed"], time.perf_counter() - start)
        start = time.perf_counter()
        whole = plain(engine, prompts, words)
        best["plain"] = min(best["plain"], time.perf_counter() - start)
        difference = float(abs(packed - whole).max())
        print(f"round {number}: {best}, largest difference {difference:.1e}", file=sys.stderr)
        if difference > 1e-2:
            sys.exit("the two sides do not score alike")
    result = {
        "speedup": round(best["plain"] / best["packed"], 2),
        "packed_requests_per_s": round(len(texts) / best["packed"], 1),
        "plain_requests_per_s": round(len(texts) / best["plain"], 1),
        "prompt_tokens": len(encode_prompt(engine.tokenizer, prompts[0])),
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
