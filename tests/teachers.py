"""Scripted teachers and judges; imitating one is not distillation."""

import json
import os
import random
import signal
import time
import uuid
from pathlib import Path

from attar.collect.verify import Verdict
from attar.engines.scripted import ScriptedChat


def asked(request):
    """The text of the last message of a request."""
    return request.messages[-1].content


class Sums(ScriptedChat):
    """Adds `a+b`; its odd samples are one too high."""

    def __init__(self):
        super().__init__(self.reply)

    def reply(self, request):
        a, b = asked(request).split("+")
        return f"The sum is {int(a) + int(b) + request.sample % 2}"


class SlowSums(Sums):
    """The same, one every 10 ms; writes down in the file ASKED what it is asked."""

    def reply(self, request):
        time.sleep(0.01)
        with Path(os.environ["ASKED"]).open("a") as handle:
            handle.write(json.dumps([asked(request), request.sample]) + "\n")
        return super().reply(request)


class MortalSums(Sums):
    """The same; notes what it is asked in the folder that the system prompt names, and dies once, at `7+7`."""

    def reply(self, request):
        notes = Path(request.messages[0].content)
        (notes / f"{asked(request)} {request.sample} {uuid.uuid4().hex}.asked").touch()
        died = notes / "died"
        if asked(request) == "7+7" and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().reply(request)


class Steady(ScriptedChat):
    """Writes prompts and answers that depend on the request alone."""

    def __init__(self):
        super().__init__(self.reply)

    def reply(self, request):
        rng = random.Random(f"{asked(request)} {request.sample}")
        return " ".join(f"{rng.getrandbits(40):010x}" for _ in range(6))


class Crowd(ScriptedChat):
    """Writes a new prompt whenever it is asked for one, and answers every prompt."""

    def __init__(self):
        self.grown = 0
        super().__init__(self.reply)

    def reply(self, request):
        if "Write one more prompt" not in asked(request):
            return f"An answer to: {asked(request)}"
        self.grown += 1
        return " ".join(f"{word}{self.grown}" for word in ("alpha", "beta", "gamma", "delta"))


def short(conversation, row):
    """A verifier: at most as many words as the row says."""
    words = len(conversation.messages[-1].content.split())
    return Verdict(words <= row.get("words", 100), f"{words} words")


def truth(conversation, row):
    """A verifier that says only yes or no."""
    return "no" not in conversation.messages[-1].content


def broken(conversation, row):
    """A verifier that says something else."""
    return "fine"
