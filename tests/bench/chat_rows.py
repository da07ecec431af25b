"""Chats to token rows, and rows to batches, for the peers Tailor is measured against.

A row is {"input_ids", "labels", "position_ids"}, three lists of one length. Several chats may share
a row (packing); position_ids then begin at 0 with each: so transformers tells them apart.
"""

import itertools
import json

from hugging_face import Problem

import torch

NO_LOSS = -100


def encode_chat(tokenizer, messages):
    """Loss on the last assistant message and its end-of-turn token, as Tailor has it by default."""
    prompt = tokenizer.apply_chat_template(
        messages[:-1], add_generation_prompt=True, tokenize=False
    )
    whole = tokenizer.apply_chat_template(messages, tokenize=False).rstrip("\n")
    if not whole.startswith(prompt):
        raise ValueError("the chat template does not put the answer after the prompt")
    prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
    answer_ids = tokenizer(whole[len(prompt):], add_special_tokens=False).input_ids
    input_ids = prompt_ids + answer_ids
    return {
        "input_ids": input_ids,
        "labels": [NO_LOSS] * len(prompt_ids) + answer_ids,
        "position_ids": list(range(len(input_ids))),
    }


def read_chats(path, tokenizer, sequence_length):
    """Yields encoded chats in file order; chats longer than a row are left out."""
    count = 0
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                chat = encode_chat(tokenizer, json.loads(line)["messages"])
                if len(chat["input_ids"]) <= sequence_length:
                    count += 1
                    yield chat
    except OSError as error:
        raise Problem(f"chats cannot be read: {error.strerror}", path, "Name a file.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(
            f"this is not a chat: {error!r}", f"{path}, line {number}",
            'Write {"messages": [{"role": ..., "content": ...}, ...]} on every line.',
        ) from None
    if not count:
        raise Problem("there are no chats short enough", path, "Raise --seq-len.")


def pack(chats, sequence_length):
    """Yields rows for ever: chats in order, again from the start at the end, next fit."""
    row = {"input_ids": [], "labels": [], "position_ids": []}
    for chat in itertools.cycle(chats):
        if len(row["input_ids"]) + len(chat["input_ids"]) > sequence_length:
            yield row
            row = {"input_ids": [], "labels": [], "position_ids": []}
        for key, values in row.items():
            values.extend(chat[key])
        # The token before belongs to another chat and must not predict this one's first.
        row["labels"][-len(chat["input_ids"])] = NO_LOSS


def without_padding(row, pad_id):
    """Length of the row without trailing padding that carries no loss."""
    length = len(row["input_ids"])
    for token, label in zip(reversed(row["input_ids"]), reversed(row["labels"])):
        if token != pad_id or label != NO_LOSS:
            break
        length -= 1
    return length


def collate(rows, pad_id, width=None):
    """int64 tensors [rows, width]. Padding is a document of its own, at each row's end.

    No attention mask: from position_ids alone, transformers builds the mask that keeps documents
    apart; given both, it would not.
    """
    width = width or max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": torch.full((len(rows), width), pad_id),
        "labels": torch.full((len(rows), width), NO_LOSS),
        "position_ids": torch.zeros((len(rows), width), dtype=torch.long),
    }
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        for key, tensor in batch.items():
            tensor[index, :length] = torch.tensor(row[key])
        batch["position_ids"][index, length:] = torch.arange(width - length)
    return batch
