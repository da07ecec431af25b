#!/usr/bin/env python3
"""An OpenAI-compatible server for tests, whose numbers are the golden ones of transformers and PEFT.

Serves `base` and `tuned` of a golden folder, for the two rows of its batch 0. MODE says what is wrong:
truth, no_echo (only vLLM's prompt_logprobs), ignored (tuned is base), differs (twice the change),
other_base (both from another model), slow, not_json, bad_request, needs_key, broken, null, short.
Writes its port into PORT_FILE, and each request as a line of JSON into LOG.
"""

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

golden, mode, port_file, log = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), Path(sys.argv[4])
IDS = load_file(golden / "batches.safetensors")["input_ids"][0]
BASE = load_file(golden / "expected_forward.safetensors")["logits"]
TUNED = load_file(golden / "lora" / "expected_after_training.safetensors")["logits_adapter"]


def logits_of(model):
    if mode == "other_base":
        rolled = {"base": BASE, "tuned": TUNED}[model]
        return np.roll(rolled, 7, axis=-1)
    if model == "tuned" and mode != "ignored":
        return 2 * TUNED - BASE if mode == "differs" else TUNED
    return BASE


def log_probabilities(model, prompt):
    """Of prompt[1:], from the golden logits of the row that begins with it."""
    for row in range(len(IDS)):
        if list(IDS[row][: len(prompt)]) == prompt:
            x = logits_of(model)[row][: len(prompt) - 1].astype(np.float64)
            x -= x.max(-1, keepdims=True)
            x -= np.log(np.exp(x).sum(-1, keepdims=True))
            return [float(x[t, prompt[t + 1]]) for t in range(len(prompt) - 1)]
    return None


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def answer(self, document, status=200):
        body = document if isinstance(document, bytes) else json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def begin(self, body):
        with open(log, "a", encoding="utf-8") as file:
            key = self.headers.get("Authorization")
            file.write(json.dumps({"path": self.path, "body": body, "key": key}) + "\n")
        if mode == "needs_key" and self.headers.get("Authorization") != "Bearer secret":
            self.answer({"error": {"message": "who are you?"}}, 401)
            return False
        return True

    def do_GET(self):
        if not self.begin(None):
            return
        if mode == "not_json":
            return self.answer(b"<html>a web page</html>")
        self.answer({"object": "list", "data": [
            {"id": "base", "parent": None}, {"id": "tuned", "parent": "base"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.begin(body):
            return
        if mode == "slow":
            time.sleep(20)
        if mode == "broken":
            return self.answer({"error": {"message": "out of memory"}}, 500)
        if mode == "bad_request":
            return self.answer({"error": {"message": "logprobs are\nnot allowed"}}, 400)
        values = log_probabilities(body["model"], body["prompt"])
        if values is None:
            return self.answer({"error": {"message": "not a golden row"}}, 400)
        if mode == "null":
            values[1] = None
        choice = {"index": 0, "text": "", "logprobs": {"token_logprobs": [-1.0]}}
        if body.get("echo") and mode not in ("no_echo", "short"):
            choice["logprobs"]["token_logprobs"] = [None, *values, -1.0]
        if "prompt_logprobs" in body and mode != "short":
            choice["prompt_logprobs"] = [None] + [
                {str(token): {"logprob": value, "rank": 1}}
                for token, value in zip(body["prompt"][1:], values)]
        self.answer({"id": "x", "object": "text_completion", "choices": [choice]})


server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
port_file.with_suffix(".new").write_text(str(server.server_address[1]))
port_file.with_suffix(".new").rename(port_file)
server.serve_forever()
