#!/usr/bin/env python3
"""Writes nfc_tables.inc: python3 make_nfc_tables.py > nfc_tables.inc

From Python's Unicode data, cut back to what the Python package `tokenizers` normalizes: its tables
are older (U+09FE, of Unicode 11, is no combining mark there), and ids must equal its ids.
"""
import unicodedata as u

from tokenizers import normalizers

nfc = normalizers.NFC().normalize_str


def combining(c):
    """Canonical combining class in tokenizers: a mark it knows moves before U+0345 (class 240)."""
    if not u.combining(chr(c)) or c == 0x345:
        return u.combining(chr(c))
    return u.combining(chr(c)) if nfc("a\u0345" + chr(c)) != "a\u0345" + chr(c) else 0


points = [c for c in range(0x110000) if not 0xD800 <= c <= 0xDFFF]
hangul = range(0xAC00, 0xD7A4)
classes = {c: combining(c) for c in points}
pairs, compositions = {}, []
for c in points:
    if c in hangul:
        continue
    text = u.decomposition(chr(c))
    if text and not text.startswith("<"):
        pairs[c] = [int(x, 16) for x in text.split()]
for c, parts in pairs.items():
    if len(parts) == 2 and nfc(chr(parts[0]) + chr(parts[1])) == chr(c):
        compositions.append((parts[0], parts[1], c))
seconds = {b for _, b, _ in compositions} | set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))
unstable = [c for c in points if classes[c] or c in seconds or nfc(chr(c)) != chr(c)]


def ranges(values, key=lambda c: 0):
    out = []
    for c in values:
        if out and out[-1][1] == c - 1 and out[-1][2] == key(c):
            out[-1][1] = c
        else:
            out.append([c, c, key(c)])
    return out


def table(kind, name, rows):
    print(f"constexpr {kind} {name}[] = {{")
    line = "   "
    for row in rows:
        item = " {" + ", ".join(hex(x) for x in row) + "},"
        if len(line) + len(item) > 100:
            print(line)
            line = "   "
        line += item
    print(line + "\n};\n")


print(f"// Made by make_nfc_tables.py from Unicode {u.unidata_version}. Not edited by hand.\n")
table("Range", "kUnstable", [r[:2] for r in ranges(unstable)])
table("ClassRange", "kCombiningClass", ranges([c for c in points if classes[c]], lambda c: classes[c]))
table("Decomposition", "kDecompositions", [(c, p[0], p[1] if len(p) > 1 else 0) for c, p in sorted(pairs.items())])
table("Composition", "kCompositions", sorted(compositions))
