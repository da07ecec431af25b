#!/usr/bin/env python3
"""How much of what an adapter gained on held-out rows its merge keeps, by the base's format.

    retained = (loss of the base - loss of the merge) / (loss of the base - loss of base and adapter apart)

The base as it is, and packed and exported as fp8 (128 x 128 blocks) and as INT4 (experts; groups of 128, 64 or 32): all three losses are of that
base. The INT4 base is also merged with --dtype bfloat16.

usage: merge_gain.py MODEL ADAPTER HELD.jsonl [--limit 100] [--formats bf16 fp8 int4] [--program build/release/bin/tailor] [--work DIR]
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("held", type=Path)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--formats", nargs="+", default=["bf16", "fp8", "int4"], choices=("bf16", "fp8", "int4"))
    parser.add_argument("--program", type=Path, default=Path("build/release/bin/tailor"))
    parser.add_argument("--work", type=Path)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="merge_gain_", dir=arguments.work))

    def tailor(*words) -> dict:
        command = [str(arguments.program.resolve()), *(str(word) for word in words), "--json"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"error: {' '.join(command)}\n{done.stderr[-2000:]}")
        return json.loads(done.stdout)

    def loss(model, *adapter) -> float:
        return tailor("eval", "--model", model, *adapter, "--data", arguments.held, "--limit", arguments.limit)["loss"]

    try:
        for form in arguments.formats:
            base = arguments.model
            if form != "bf16":
                tailor("model", "pack", arguments.model, "--to", work / "store", "--format", form)
                tailor("model", "export", work / "store", "--to", work / form)
                shutil.rmtree(work / "store")
                base = work / form
            before, with_adapter = loss(base), loss(base, "--adapter", arguments.adapter)
            for dtype in ("as_base",) if form != "int4" else ("as_base", "bfloat16"):
                merged = work / "merged"
                report = tailor("merge", "--base", base, "--adapter", arguments.adapter, "--onto", "original", "--out",
                                merged, "--dtype", dtype)
                after = loss(merged)
                retained = (before - after) / (before - with_adapter)
                print(f"{form:5} {dtype:9} base {before:.4f}  with adapter {with_adapter:.4f}  merged {after:.4f}  "
                      f"retained {retained:.4f}  kept {report['kept']:.3f}  change {report['relative_change']:.4f}  "
                      f"error {report['error']:.4f}", flush=True)
                shutil.rmtree(merged)
            if base != arguments.model:
                shutil.rmtree(base)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
