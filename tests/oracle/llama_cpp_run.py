#!/usr/bin/env python3
"""What llama.cpp makes of a GGUF file, as JSON on stdout; run with cyllama on the path.

logits FILE IDS       [[logit]] of every position of a text of token ids, keys and values in float32
greedy FILE PROMPT N  {prompt_ids, ids}: the ids of the prompt's text, the N likeliest next ids
"""

import json
import sys

import cyllama.llama.llama_cpp as llama


class Model(llama.LlamaModel):
    @property
    def n_vocab(self):
        """get_logits() of cyllama 0.2.18 asks for it, and its own class lacks it."""
        return self.get_vocab().n_vocab


class Runner:
    def __init__(self, path, positions):
        llama.llama_backend_init()
        parameters = llama.LlamaModelParams()
        self.model = Model(path_model=path, params=parameters, verbose=False)
        context = llama.LlamaContextParams()
        context.n_ctx = context.n_batch = context.n_ubatch = positions
        context.n_threads = context.n_threads_batch = 2
        context.type_k = context.type_v = 0  # float32
        context.flash_attn_type = 0  # off: it works in float16
        self.context = llama.LlamaContext(model=self.model, params=context, verbose=False)
        self.vocab = self.model.get_vocab()

    def decode(self, ids, first):
        """The logits behind the last of `ids`, which follow `first` others."""
        batch = llama.LlamaBatch(n_tokens=len(ids), embd=0, n_seq_max=1)
        for i, token in enumerate(ids):
            batch.add(token, first + i, [0], i == len(ids) - 1)
        if code := self.context.decode(batch):
            sys.exit(f"llama_decode returned {code}")
        return list(self.context.get_logits())

    def logits(self, ids):
        return [self.decode([token], i) for i, token in enumerate(ids)]

    def greedy(self, prompt, count):
        prompt_ids = list(self.vocab.tokenize(prompt, add_special=False, parse_special=True))
        row = self.decode(prompt_ids, 0)
        ids = []
        for i in range(count):
            ids.append(max(range(len(row)), key=row.__getitem__))
            if self.vocab.is_eog(ids[-1]):
                break
            row = self.decode(ids[-1:], len(prompt_ids) + i)
        return {"prompt_ids": prompt_ids, "ids": ids}


def main():
    command, path = sys.argv[1:3]
    if command == "logits":
        ids = json.loads(sys.argv[3])
        result = Runner(path, max(64, len(ids))).logits(ids)
    elif command == "greedy":
        result = Runner(path, 1024).greedy(sys.argv[3], int(sys.argv[4]))
    else:
        sys.exit(__doc__)
    json.dump(result, sys.stdout)


if __name__ == "__main__":
    main()
