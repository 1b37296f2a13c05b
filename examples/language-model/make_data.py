"""Make conversations.jsonl: the teacher's own answers to short questions.

    python make_data.py TEACHER_FOLDER [--out conversations.jsonl]

628 questions, four about each of 157 things, answered by the teacher at temperature 0.8 (top-k 40), at most 96
tokens. An answer that does not end by then is left out: a student must not learn to stop in the middle of a sentence.
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attar.data.types import Part
from attar.tokens import encode_prompt

ASKED = (
    "What is {thing}? Answer in one sentence.",
    "Explain {thing} to a child in two short sentences.",
    "Give one practical tip about {thing}.",
    "Why does {thing} matter? Answer briefly.",
)
THINGS = """a rainbow; photosynthesis; gravity; a volcano; the moon; a glacier; a thunderstorm; the water cycle
an eclipse
a coral reef; a desert; a rainforest; a river delta; the ocean's tides; an earthquake; a magnet; friction; electricity
a battery; a light bulb; a steam engine; a bicycle; an airplane wing; a lever; a pulley; a compass; a telescope
a microscope; a thermometer; a clock; the heart; the lungs; the brain; a vaccine; sleep; exercise; drinking water
vitamin C; a balanced diet; fiber; brushing teeth; washing hands; sunscreen; stretching; meditation; a first aid kit
bread; yeast; olive oil; soup; tea; coffee; cheese; chocolate; rice; a salad; a kitchen knife; a recipe; leftovers
composting; a vegetable garden; tomatoes; watering plants; pruning; bees; butterflies; spiders; a cat; a dog; a horse
an owl; a whale; a penguin; an elephant; ants; migration; hibernation; camouflage; a food chain; extinction; recycling
solar power; wind power; a dam; insulation; a thermostat; public transport; walking; a traffic light; a bridge; a map
a library; reading; writing a letter; a diary; poetry; a fable; a dictionary; learning a language; grammar; handwriting
a piano; a guitar; rhythm; singing; drawing; watercolor; a photograph; perspective; theatre; dancing; chess; a puzzle
teamwork; listening; saying sorry; patience; curiosity; honesty; gratitude; courage; a habit; a goal; a to-do list
saving money; a budget; a loan; interest; insurance; a receipt; taxes; a contract; a job interview; a resume; an email
a meeting; a deadline; a backup; a password; a computer virus; a search engine; a spreadsheet; a programming loop
a variable; an algorithm; a database; the internet; a printer; a calendar; a fraction; a percentage; an average
a triangle; a circle; prime numbers; a graph; probability"""


def questions() -> list[str]:
    """Every question about every thing."""
    things = [thing.strip() for line in THINGS.splitlines() for thing in line.split(";")]
    return [asked.format(thing=thing) for thing in things for asked in ASKED]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "conversations.jsonl")
    parser.add_argument("--batch", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=96)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.teacher, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(args.teacher, dtype=torch.float32).eval()
    torch.manual_seed(0)
    asked = questions()
    rows, unfinished = [], 0
    for start in range(0, len(asked), args.batch):
        part = asked[start : start + args.batch]
        prompts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
            )
            for question in part
        ]
        batch = tokenizer.pad(
            {"input_ids": [encode_prompt(tokenizer, (Part(prompt, trusted=True),)) for prompt in prompts]},
            return_tensors="pt",
        )
        with torch.inference_mode():
            written = model.generate(
                **batch,
                do_sample=True,
                temperature=0.8,
                top_k=40,
                max_new_tokens=args.max_tokens,
                pad_token_id=tokenizer.eos_token_id,
            )[:, batch["input_ids"].shape[1] :]
        for question, ids in zip(part, written.tolist(), strict=True):
            if tokenizer.eos_token_id not in ids:
                unfinished += 1
                continue
            answer = tokenizer.decode(ids[: ids.index(tokenizer.eos_token_id)]).strip()
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"messages": messages})
        print(f"{start + len(part)} asked, {len(rows)} kept, {unfinished} unfinished", file=sys.stderr, flush=True)
    args.out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main()
