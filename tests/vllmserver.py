"""A scripted server in vLLM's place: answers in the JSON that vLLM 0.32 sends, from a model in this process.

The shape of every reply was taken down from a real server; the limits and messages are its own. What it does wrong is
up to a test.
"""

import json
import threading

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from servers import Reply, ScriptedServer, error


class Vllm(ScriptedServer):
    """Serves the model in a folder as ``teacher``.

    Args:
        folder: of the model and its tokenizer.
        cap: ``--max-logprobs``.
        length: ``--max-model-len``.
        reads: ids that are given -> ids that are read; what a server does that tokenises anew.
        counts: ids that are given -> how many it says it read; None for how many it did.
        says: (number of the request, choice) -> the choice that is sent.
        gives: logits [tokens, vocabulary] -> what is sent as log-probabilities.
        before: (number of the request, body) -> a reply in place of an answer, or None.
    """

    def __init__(
        self, folder, *, cap=20, length=512, reads=None, counts=None, says=None, gives=None, before=None, name="teacher"
    ):
        super().__init__(self._reply)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.cap, self.length, self.name = cap, length, name
        self.reads, self.counts, self.says, self.before = reads, counts, says, before
        self.gives = gives or (lambda logits: logits.log_softmax(-1))
        self.prompts = []
        self._turn = threading.Lock()

    def _reply(self, number, body, path):
        if path == "/v1/models":
            card = {"id": self.name, "object": "model", "owned_by": "vllm", "max_model_len": self.length}
            return Reply({"object": "list", "data": [card]})
        reply = self.before(number, body) if self.before else None
        if reply is not None:
            return reply
        if body["model"] != self.name:
            return error(404, f"The model `{body['model']}` does not exist.", "NotFoundError")
        wanted = body.get("prompt_logprobs")
        if wanted is not None and wanted > self.cap:
            return error(
                400,
                f"Requested prompt logprobs of {wanted}, which is greater than max allowed: {self.cap} "
                f"(parameter=prompt_logprobs, value={wanted})",
                400,
            )
        with self._turn, torch.no_grad():
            self.prompts.append(body["prompt"])
            return self._answer(number, body, wanted)

    def _answer(self, number, body, wanted):
        given = body["prompt"]
        read = self.reads(given) if self.reads else given
        written = self._write(read, body["max_tokens"], body.get("ignore_eos", False))
        counted = self.counts(given) if self.counts else len(read)
        usage = {"prompt_tokens": counted, "completion_tokens": len(written), "total_tokens": counted + len(written)}
        ended = bool(written) and written[-1] == self.tokenizer.eos_token_id and not body.get("ignore_eos")
        choice = {
            "index": 0, "text": self.tokenizer.decode(written), "logprobs": None,
            "finish_reason": "stop" if ended else "length", "stop_reason": None,
            "token_ids": written, "prompt_token_ids": given,
            "prompt_logprobs": None if wanted is None else self._rows(given, read, wanted), "routed_experts": None,
        }  # fmt: skip
        choice = self.says(number, choice) if self.says else choice
        if body.get("stream"):
            return _stream(choice)
        return Reply({"id": "cmpl-1", "object": "text_completion", "created": 1, "model": self.name,
                      "choices": [choice], "usage": usage})  # fmt: skip

    def _write(self, ids, n, past):
        ids = list(ids)
        start = len(ids)
        while len(ids) - start < n and (past or start == len(ids) or ids[-1] != self.tokenizer.eos_token_id):
            ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
        return ids[start:]

    def _rows(self, given, read, wanted):
        table = self.gives(self.model(torch.tensor([read])).logits[0].float())
        # What a server that adds or drops tokens says of the given ones stands at the end.
        offset = len(read) - len(given)
        rows = [None]
        for place in range(1, len(given)):
            values = table[place - 1 + offset]
            best = values.topk(min(wanted, len(values)))
            rank = 1 + int((values > values[given[place]]).sum())
            entries = [(given[place], rank), *((int(token), n) for n, token in enumerate(best.indices, 1))]
            rows.append({str(token): self._entry(values, token, place_in) for token, place_in in entries})
        return rows

    def _entry(self, values, token, rank):
        value = max(float(values[token]), -9999.0)
        return {"logprob": value, "rank": rank, "decoded_token": self.tokenizer.decode([token])}


def _stream(choice):
    chunks = []
    for number, token in enumerate(choice["token_ids"]):
        last = number == len(choice["token_ids"]) - 1
        part = {**choice, "token_ids": [token], "finish_reason": choice["finish_reason"] if last else None}
        part.pop("prompt_logprobs")
        chunks.append("data: " + json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": [part]}) + "\n\n")
    return Reply(("".join(chunks) + "data: [DONE]\n\n").encode(), headers={"Content-Type": "text/event-stream"})
