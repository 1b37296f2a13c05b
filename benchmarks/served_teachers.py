"""What a served teacher says, beside the same weights in this process.

    python benchmarks/served_teachers.py DIR [--vllm PYTHON] [--tokens 1000] [--entries 20]

DIR holds a causal language model in float32 with its tokenizer and chat template, of an architecture that the GGUF
export knows. PYTHON is the interpreter of an environment that has vLLM; without it that half is left out. Text:
paragraphs of this project's documents, each as the answer to its heading.

vLLM: a server of DIR in float32 is started on the loopback interface and asked for ``prompt_logprobs`` of the token ids
that training would use. Compared with the logits of ``transformers``: the largest difference of a log-probability,
among all entries and among those of at least 1 %, the largest difference of the tail's mass, and how often the same
tokens are listed. llama.cpp: an F16 GGUF file of DIR answers some prompts with ``top_logprobs``; compared with what
``transformers`` says after the same ids.

Progress to stderr; last on stdout, one JSON line.
"""

import argparse
import contextlib
import json
import math
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import torch

LOAD_S = 240
LIKELY = 0.01
ANSWERS, ANSWER_TOKENS = 4, 24


def say(text):
    print(text, file=sys.stderr, flush=True)


def conversations():
    """Headings and the paragraphs below them, in a fixed order."""
    for path in sorted((Path(__file__).parent.parent / "docs").glob("*.md")):
        for section in re.split(r"^#+ ", path.read_text("utf-8"), flags=re.M)[1:]:
            heading, _, body = section.partition("\n")
            for paragraph in re.split(r"\n\s*\n", body):
                words = paragraph.split()
                if 20 <= len(words) <= 120 and paragraph[0].isalpha():
                    ask = {"role": "user", "content": f"What is to be known about: {heading.strip()}?"}
                    yield [ask, {"role": "assistant", "content": " ".join(words)}]


def examples(tokenizer, tokens):
    """Tokenised conversations with so many supervised tokens in all."""
    from attar.data.conversations import parse_conversation
    from attar.tokens import encode_conversation

    found, total = [], 0
    for messages in conversations():
        found += encode_conversation(tokenizer, parse_conversation({"messages": messages}), max_tokens=512)
        total += int(found[-1].supervised.sum())
        if total >= tokens:
            return found
    raise SystemExit(f"the documents hold {total} tokens, {tokens} are wanted")


@contextlib.contextmanager
def vllm(python, folder, log):
    """A server of the folder; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--served-model-name", "teacher"),
        *(
            "--dtype",
            "float32",
            "--enforce-eager",
            "--max-model-len",
            "1024",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ),
    ]
    settings = {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env={**os.environ, **settings}, start_new_session=True
        )
        try:
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            while True:
                with contextlib.suppress(OSError, urllib.error.URLError):
                    direct.open(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                if process.poll() is not None or time.perf_counter() - started > LOAD_S:
                    raise SystemExit(f"vLLM did not start: {log.read_text(errors='replace')[-2000:]}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}/v1", time.perf_counter() - started
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


@torch.no_grad()
def local_logs(engine, example):
    """Log-probabilities [supervised tokens, vocabulary] by the weights in this process."""
    places = torch.from_numpy(np.flatnonzero(example.supervised)) - 1
    ids = torch.from_numpy(example.ids).long()[None]
    return engine.model(ids).logits[0, places].double().log_softmax(-1).numpy()


def white_box(engine, url, load_s, found, entries):
    from attar.engines.served import load_served
    from attar.recipe.chat import ChatTeacher
    from attar.signals.served import supervised_places, top_k_of, vocabulary_size

    teacher = ChatTeacher(model="openai:teacher", base_url=url, timeout_s=120, total_timeout_s=120, concurrency=16)
    served = load_served(teacher, vocabulary_size(engine.tokenizer))

    def ask(example):
        return served.prompt_top(example.ids.tolist(), supervised_places(example), entries)

    list(served.each(ask, found[:2]))
    started = time.perf_counter()
    answers = list(served.each(ask, found))
    seconds = time.perf_counter() - started
    started = time.perf_counter()
    wanted = [local_logs(engine, example) for example in found]
    local_seconds = time.perf_counter() - started
    worst = likely = tail = own = 0.0
    masses, same, rows = [], 0, 0
    for example, answer, logs in zip(found, answers, wanted, strict=True):
        picked = np.take_along_axis(logs, answer.ids, 1)
        apart = np.abs(picked - answer.log_probs)
        worst = max(worst, float(apart.max()))
        likely = max(likely, float(apart[picked >= math.log(LIKELY)].max(initial=0.0)))
        best = np.sort(np.argpartition(-logs, entries, 1)[:, :entries], 1)
        same += int((np.sort(answer.ids, 1) == best).all(1).sum())
        mass = np.exp(picked).sum(1)
        said = np.exp(top_k_of(answer, served.vocabulary).log_tail.double().numpy())
        tail = max(tail, float(np.abs(said - (1 - mass)).max()))
        own = max(own, float(np.abs(answer.own - logs[np.arange(len(logs)), example.ids[example.supervised]]).max()))
        masses += mass.tolist()
        rows += len(logs)
    tokens = sum(map(len, found))
    return {
        "entries": entries,
        "supervised_tokens": rows,
        "prompt_tokens": tokens,
        "largest_log_prob_difference": worst,
        "largest_of_likely": likely,
        "largest_of_given_tokens": own,
        "largest_tail_difference": tail,
        "same_entries": round(same / rows, 4),
        "mass_mean": round(float(np.mean(masses)), 4),
        "mass_p10": round(float(np.quantile(masses, 0.1)), 4),
        "tokens_per_s": round(tokens / seconds, 1),
        "local_tokens_per_s": round(tokens / local_seconds, 1),
        "load_s": round(load_s, 1),
    }


def answered(engine, folder, entries):
    """``top_logprobs`` of llama.cpp's answers."""
    from attar.data.types import Message
    from attar.engines.api import ApiEngine
    from attar.engines.base import ChatRequest
    from attar.engines.flow import Limits
    from attar.engines.gguf import load_gguf
    from attar.engines.served import ServedTeacher
    from attar.engines.servers import Server
    from attar.errors import CapabilityError
    from attar.students.export_lm import export_gguf

    path = folder / "model.gguf"
    export_gguf(
        engine.model,
        engine.tokenizer,
        path,
        probes=[found.ids[:64].tolist() for found in examples(engine.tokenizer, 100)],
    )
    llama = load_gguf(str(path), tokenizer=engine.tokenizer, context_tokens=1024, threads=2)
    server = Server("openai", "teacher", f"{llama.address}/v1", "none", "nowhere")
    box = ServedTeacher(server, vocabulary=len(engine.tokenizer), timeout_s=60, total_timeout_s=60, concurrency=1)
    try:
        box.prompt_top([1, 2, 3], [1, 2], entries)
        refused = None
    except CapabilityError as error:
        refused = str(error)
    api = ApiEngine(server, Limits(1, 120, 120))
    questions = [messages[:1] for messages in conversations()][:: max(1, 40 // ANSWERS)][:ANSWERS]
    requests = [
        ChatRequest(
            tuple(Message(m["role"], m["content"]) for m in asked), ANSWER_TOKENS, temperature=0, top_logprobs=entries
        )
        for asked in questions
    ]
    started = time.perf_counter()
    answers = dict(api.chat(requests))
    seconds = time.perf_counter() - started
    texts = [engine.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in range(len(engine.tokenizer))]
    times = Counter(texts)
    # llama.cpp's answers name tokens by their text; halves of characters have one and the same.
    id_of = {text: i for i, text in enumerate(texts) if times[text] == 1}
    worst = likely = 0.0
    compared = skipped = tokens = 0
    masses = []
    for number, asked in enumerate(questions):
        prompt = engine.tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        records = answers[number].top_logprobs
        written = [id_of[record.token] for record in records]
        with torch.no_grad():
            logits = engine.model(torch.tensor([[*prompt, *written]])).logits[0, len(prompt) - 1 : -1]
        logs = logits.double().log_softmax(-1).numpy()
        for row, record in zip(logs, records, strict=True):
            tokens += 1
            masses.append(sum(math.exp(value) for _, value in record.top))
            for text, value in record.top:
                if text not in id_of:
                    skipped += 1
                    continue
                apart = abs(value - row[id_of[text]])
                compared += 1
                worst = max(worst, apart)
                likely = max(likely, apart if value >= math.log(LIKELY) else 0.0)
    say(f"llama.cpp, asked for what vLLM gives: {refused}")
    return {
        "entries": entries,
        "scores_prompts": refused is None,
        "answered_tokens": tokens,
        "compared_entries": compared,
        "left_out_entries": skipped,
        "largest_log_prob_difference": worst,
        "largest_of_likely": likely,
        "mass_mean": round(float(np.mean(masses)), 4),
        "tokens_per_s": round(tokens / seconds, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--vllm", metavar="PYTHON")
    parser.add_argument("--tokens", type=int, default=1000)
    parser.add_argument("--entries", type=int, default=20)
    options = parser.parse_args()
    from attar.engines.local import load_local

    engine = load_local(f"hf:{options.folder}", dtype="float32", device=torch.device("cpu"))
    result = {"model": options.folder.name, "cores": os.cpu_count(), "vllm": None, "llama_cpp": None}
    with tempfile.TemporaryDirectory() as folder:
        if options.vllm:
            found = examples(engine.tokenizer, options.tokens)
            say("vLLM loads the model")
            with vllm(options.vllm, options.folder, Path(folder) / "vllm.log") as (url, load_s):
                say(f"vLLM took {load_s:.0f} s; it scores {len(found)} conversations")
                result["vllm"] = white_box(engine, url, load_s, found, options.entries)
                say(json.dumps(result["vllm"]))
        say("llama.cpp answers")
        result["llama_cpp"] = answered(engine, Path(folder), options.entries)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
