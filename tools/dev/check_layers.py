#!/usr/bin/env python3
"""Holds the one rule about folders (docs/architecture.md): includes go to the right only.

    tests -> any;  tools -> trainer -> adapters -> recipes -> data -> base

base, data, recipes, adapters and trainer/cuda include no header of LibTorch; of tools only tools/compute may.
No two headers define a type of the same name in the same namespace: the program would hold both, and the linker
would take one's destructor for the other's.
Prints each offence as file:line and exits 1 when there is one.
"""

import re
import sys
from pathlib import Path

ORDER = ["base", "data", "recipes", "adapters", "trainer", "tools"]
WITHOUT_TORCH = ("base/", "data/", "recipes/", "adapters/", "tools/", "trainer/cuda/")
TORCH_ALLOWED_BELOW = ("tools/compute/",)
TORCH = re.compile(r"^(torch|ATen|c10|c10d|caffe2)/")
INCLUDE = re.compile(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]')
NAMESPACE = re.compile(r"^namespace ([\w:]*) ?\{", re.MULTILINE)
TYPE = re.compile(r"^(?:struct|class|enum class) (\w+)(?: final)?(?: : [^;{]+)? \{", re.MULTILINE)
SUFFIXES = {".h", ".cpp", ".cu", ".cuh", ".inc"}


def offences(root):
    for layer, folder in enumerate(ORDER):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix not in SUFFIXES:
                continue
            name = path.relative_to(root).as_posix()
            text = path.read_text(encoding="utf-8", errors="replace")
            for number, line in enumerate(text.splitlines(), 1):
                match = INCLUDE.match(line)
                if not match:
                    continue
                included = match.group(1)
                first = included.split("/")[0]
                if first == "tests" or first in ORDER and ORDER.index(first) > layer:
                    yield f"{name}:{number}: {folder} may not include {included}"
                no_torch = name.startswith(WITHOUT_TORCH) and not name.startswith(
                    TORCH_ALLOWED_BELOW
                )
                if no_torch and TORCH.match(included):
                    yield f"{name}:{number}: no LibTorch here, found {included}"
                brings_torch = included.startswith(
                    ("tools/compute/", "trainer/")
                ) and not included.startswith(WITHOUT_TORCH[-1])
                if no_torch and brings_torch:
                    yield f"{name}:{number}: {included} brings LibTorch along"


def types_defined_twice(root):
    first = {}
    for folder in ORDER:
        for path in sorted((root / folder).rglob("*.h")):
            name = path.relative_to(root).as_posix()
            text = path.read_text(encoding="utf-8", errors="replace")
            spaces = [(match.start(), match.group(1)) for match in NAMESPACE.finditer(text)]
            for match in TYPE.finditer(text):
                space = next((at for start, at in reversed(spaces) if start < match.start()), "")
                if not space:  # unnamed, or outside
                    continue
                before = first.setdefault((space, match.group(1)), name)
                if before != name:
                    line = text.count("\n", 0, match.start()) + 1
                    yield f"{name}:{line}: {space}::{match.group(1)} is a type of {before} already"


def main():
    root = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).resolve().parents[2])
    found = list(offences(root)) + list(types_defined_twice(root))
    print("\n".join(found) if found else "includes follow the order of the folders, no type is there twice")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
