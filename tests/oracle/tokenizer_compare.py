#!/usr/bin/env python3
"""Documents and the ids that the Python package `tokenizers` gives for them, one JSON line each.

    tokenizer_compare.py TOKENIZER_DIR OUT.jsonl [--count 20000] [--seed 1]

The test Tokenizer.equals_hugging_face_on_many_documents reads OUT and compares. With
TAILOR_TEST_TOKENIZERS=DIR[:DIR...] it does so for other tokenizers too.
"""
import argparse
import glob
import json
import random
import unicodedata

from tokenizers import Tokenizer

WORDS = """the of and to in is don't I'll we've they're it's CAN'T Naïve façade Über straße кошка Привет мир
数据 机器学习 日本語 テスト こんにちは 안녕하세요 한국어 हिन्दी नमस्ते தமிழ் ไทย ภาษา עברית שלום العربية مرحبا ελληνικά
Việt Nam ngôn ngữ Łódź İstanbul e\u0301te\u0301 A\u030angstro\u0308m \u1e9b\u0323 \u212b ﬁ ½ Ⅷ ² ₂ x86_64 v1.2.3 3.14 1,000,000 2024-11-23 0xFF
https://example.org/a?b=c&d=e#f user@example.com C++ -> => == != <<>> :: /* */ // # @ $x {a:1} [0] (x) "quoted" `code`""".split()
CODE = ["def f(x):\n    return x ** 2\n", "for (int i = 0; i < n; ++i) {\n\ta[i] += b[i];\n}\n",
        "SELECT * FROM t WHERE id IN (1, 2, 33);\n", "<div class=\"a\">text</div>\r\n", "\t\t  if not x:\n\n\n        pass\n",
        "{\"key\": [1, 2.5e-3, null, true]}\n", "#include <vector>\n\n", "$ ls -la | grep '^d' && echo \"ok\"\n", "\\frac{a}{b} \\sum_{i=0}^{n}\n"]
SPACES = [" ", "  ", "   ", "\t", "\n", "\r\n", "\n\n", " \n ", "\u00a0", "\u3000", "\u2028", "\u200b", "\x85", "\x0b", "\x0c", "\x1c", " " * 20, "\n" * 7]
EMOJI = ["😀", "👩‍👩‍👧‍👦", "🇩🇪", "👍🏽", "❤️", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "✅", "→", "…", "“", "”", "—", "™", "∑", "√"]
PLANES = [(0x20, 0x7E), (0x00, 0x1F), (0xA0, 0x17F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x900, 0xDFF), (0xE00, 0xE7F),
          (0x1100, 0x11FF), (0x1E00, 0x1FFF), (0x2000, 0x2BFF), (0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xF900, 0xFB4F),
          (0xFE00, 0xFFEF), (0x1D400, 0x1D7FF), (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF)]


def code_point(rng):
    while True:
        first, last = rng.choice(PLANES)
        c = chr(rng.randint(first, last))
        if unicodedata.category(c) not in ("Cs", "Cn"):
            return c


def files(rng, limit):
    names = [n for p in ("/usr/share/perl/**/*.p[ml]", "/usr/lib/python3/**/*.py", "/usr/lib/python3.11/**/*.py", "/usr/include/*.h", "/usr/share/doc/*/copyright")
             for n in glob.glob(p, recursive=True)]
    rng.shuffle(names)
    for name in names[:limit]:
        try:
            with open(name, encoding="utf-8", newline="") as f:
                text = f.read(200_000)
        except (OSError, UnicodeDecodeError):
            continue
        at = rng.randrange(max(1, len(text)))
        yield text[at:at + rng.randint(50, 3000)]


def documents(rng, count, added):
    made = 0
    for text in files(rng, count // 20):
        made += 1
        yield text
    while made < count:
        made += 1
        kind = rng.randrange(7)
        n = rng.randint(0, 40)
        if kind == 0:
            yield "".join(rng.choice(WORDS) + rng.choice(SPACES if rng.random() < .2 else [" "]) for _ in range(n))
        elif kind == 1:
            yield "".join(rng.choice(CODE) for _ in range(rng.randint(1, 6)))
        elif kind == 2:
            yield "".join(code_point(rng) for _ in range(n * 3))
        elif kind == 3:
            yield "".join(rng.choice(rng.choice([WORDS, SPACES, EMOJI, CODE, list("'\"aAzZ09_-. ")])) for _ in range(n))
        elif kind == 4:
            parts = [WORDS, SPACES, added or ["<x>"], ["<|", "|>", "<", ">", "<|im_", "</think"]]
            yield "".join(rng.choice(rng.choice(parts)) for _ in range(n))
        elif kind == 5:
            yield rng.choice(["a", " ", "\n", "=", "-", "0", "ab", "哈", "\u0301", "'s"]) * rng.randint(1, 300)
        else:
            yield "".join(chr(rng.choice([rng.randint(32, 126), rng.randint(0, 0x24F), rng.randint(9, 13)])) for _ in range(n * 2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokenizer_dir")
    parser.add_argument("out")
    parser.add_argument("--count", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    path = options.tokenizer_dir + "/tokenizer.json"
    oracle = Tokenizer.from_file(path)
    with open(path, encoding="utf-8") as f:
        added = [t["content"] for t in json.load(f)["added_tokens"]][:200]
    rng = random.Random(options.seed)
    with open(options.out, "w", encoding="utf-8") as out:
        batch = []
        def write():
            for text, encoding in zip(batch, oracle.encode_batch(batch, add_special_tokens=False)):
                decoded = oracle.decode(encoding.ids, skip_special_tokens=False)
                out.write(json.dumps({"text": text, "ids": encoding.ids, "decoded": decoded}) + "\n")
            batch.clear()
        for text in documents(rng, options.count, added):
            batch.append(text)
            if len(batch) == 500:
                write()
        write()


if __name__ == "__main__":
    main()
