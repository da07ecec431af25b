#!/usr/bin/env python3
"""Writes the demo's training data: a small task with one right answer, out of WordNet.

The user names a word and its definition; the answer is JSON with the word's class and what it is
a kind of. OUT_DIR receives wordnet.train.jsonl and wordnet.held.jsonl, one chat a line:

    {"messages": [{"role": "user", "content": "Classify the noun \\"whole\\": ..."},
                  {"role": "assistant", "content": "{\\"class\\": ..., \\"is_a\\": ...}"}]}

The same WordNet always gives the same bytes. No row appears twice, and no headword appears on both
sides, so the held-out loss cannot be lowered by remembering words.
"""

import argparse
import hashlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo_data import wordnet
from demo_data.problem import Problem, run_main

HELD_OUT_SHARE = 20  # one headword in this many is held out
SHORTEST_DEFINITION, LONGEST_DEFINITION = 12, 160  # characters; outside are stubs and essays


def number_of(text):
    """A number that only depends on the text: the order and the split hang on it."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def is_plain_word(word):
    return word.replace(" ", "").replace("-", "").isalpha()


def tag_rows(synsets):
    """Yields (headword, question, answer) of every synset the task can use."""
    for synset in synsets.values():
        definition = synset.definition
        if not SHORTEST_DEFINITION <= len(definition) <= LONGEST_DEFINITION:
            continue
        if not is_plain_word(synset.headword) or not synset.hypernyms:
            continue
        parent = synsets.get((synset.part, synset.hypernyms[0]))
        if parent is None:
            continue
        question = f'Classify the {synset.part} "{synset.headword}": {definition}'
        answer = json.dumps({"class": synset.lexicographer_file, "is_a": parent.headword})
        yield synset.headword, question, answer


def split_rows(rows):
    """(train, held): questions once each, in an order that looks shuffled, split by headword."""
    first_of_question = {}
    for headword, question, answer in rows:
        first_of_question.setdefault(question, (headword, answer))
    train, held = [], []
    for question in sorted(first_of_question, key=number_of):
        headword, answer = first_of_question[question]
        is_held = number_of("headword " + headword.lower()) % HELD_OUT_SHARE == 0
        (held if is_held else train).append((question, answer))
    return train, held


def chat_line(question, answer):
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return json.dumps({"messages": messages}, ensure_ascii=False) + "\n"


def write_rows(path, rows, count):
    if count > len(rows):
        raise Problem(
            f"{count} rows are wanted and WordNet gives {len(rows)}",
            path,
            f"Ask for {len(rows)} or fewer.",
        )
    partial = path.with_name(path.name + ".partial")
    with open(partial, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(chat_line(question, answer) for question, answer in rows[:count])
    os.replace(partial, path)


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: tools/demo_data/make_demo_data.py build/demo/data --train 1000 --held 100",
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument("--train", type=int, default=4000, help="training rows (default 4000)")
    parser.add_argument("--held", type=int, default=400, help="held-out rows (default 400)")
    parser.add_argument(
        "--wordnet", metavar="DIR", type=Path, default=wordnet.DEFAULT_FOLDER,
        help=f"folder with data.noun and data.verb (default {wordnet.DEFAULT_FOLDER})",
    )
    arguments = parser.parse_args()
    if arguments.train < 1 or arguments.held < 1:
        parser.error("--train and --held must be at least 1")
    return arguments


def main():
    arguments = parse_arguments()
    train, held = split_rows(tag_rows(wordnet.read_synsets(arguments.wordnet)))
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    for name, rows, count in (("train", train, arguments.train), ("held", held, arguments.held)):
        path = arguments.out_dir / f"wordnet.{name}.jsonl"
        write_rows(path, rows, count)
        print(f"{path}: {count} of {len(rows)} rows")
    return 0


if __name__ == "__main__":
    run_main(main)
