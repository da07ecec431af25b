#!/usr/bin/env python3
"""Wall time of `tailor plan`, warm and with its files out of the page cache.

usage: tests/bench/plan_cold.py [--runs 20] [RECIPE [key=value...]]

Cold: before each run the program, the libraries it loads and recipes/ are dropped from the page cache
(posix_fadvise; what another process has mapped stays). Prints minimum, median and maximum in ms.
"""
import os
import pathlib
import re
import statistics
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TAILOR = ROOT / "build/release/bin/tailor"


def files():
    linked = subprocess.run(["ldd", TAILOR], stdout=subprocess.PIPE, text=True).stdout
    yield TAILOR
    yield from (pathlib.Path(path) for path in re.findall(r"(/\S+) \(0x", linked))
    yield from (path for path in (ROOT / "recipes").rglob("*") if path.is_file())


def drop(paths):
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def milliseconds(command, runs, before):
    out = []
    for _ in range(runs):
        before()
        began = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        out.append(1e3 * (time.perf_counter() - began))
        if done.returncode not in (0, 66):
            sys.exit(f"{command} ended with {done.returncode}")
    return out


def main():
    words = sys.argv[1:]
    runs = 20
    if words[:1] == ["--runs"]:
        runs, words = int(words[1]), words[2:]
    cases = [words] if words else [
        ["maverick-a100", "training.max_steps=469"],
        ["maverick-a100", "training.max_steps=1875", "training.gradient_accumulation_steps=2"],
        ["maverick-a100", "training.max_steps=469", "--on", "a100-40gb,a100-80gb,4xh100,1xh200"]]
    paths = list(files())
    for case in cases:
        command = [str(TAILOR), "plan", *case]
        for name, before in (("warm", lambda: None), ("cold", lambda: drop(paths))):
            took = milliseconds(command, runs, before)
            print(f"{name}  {min(took):5.0f} / {statistics.median(took):5.0f} / {max(took):5.0f} ms"
                  f"   tailor plan {' '.join(case)}", flush=True)


if __name__ == "__main__":
    main()
