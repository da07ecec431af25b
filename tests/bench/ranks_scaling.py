#!/usr/bin/env python3
"""Two ranks on two cores against one rank on one core, the same work: steps of a recipe, interleaved.

usage: ranks_scaling.py TAILOR RECIPE [key=value...] [--ranks 2] [--rounds 3] [--steps 8] [--rows 8]

Each rank has one thread and is bound to a core of its own, so that the ratio says what sharing
costs: 2.0 would be free. Takes the fastest of the middle steps of all rounds (the first step warms
up), prints tokens a second, the ratio, what was exchanged and what of it computing waited for, and
the memory each rank took beyond an empty process. Makes and removes its run folders below --scratch.
"""
import argparse
import json
import os
import shutil
import subprocess
import tempfile
import threading
import time


def peak_bytes(pid):
    try:
        with open(f"/proc/{pid}/status") as status:
            for line in status:
                if line.startswith("VmHWM"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def children(pid):
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def run(options, ranks, folder):
    words = [options.tailor, "train", options.recipe, f"machine.ranks={ranks}",
             f"training.global_batch_rows={options.rows}", f"training.max_steps={options.steps}",
             "training.eval_every_steps=0", "data.validation=null", "compute.threads=1",
             f"output_dir={folder}", f"cost.ledger={folder}.db", *options.keys]
    cores = ",".join(str(core) for core in sorted(os.sched_getaffinity(0))[:ranks])
    process = subprocess.Popen(["taskset", "-c", cores, *words], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    peaks = {}

    def watch():
        while process.poll() is None:
            for pid in children(process.pid) or [process.pid]:
                peaks[pid] = max(peaks.get(pid, 0), peak_bytes(pid))
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    said = process.stderr.read()
    watcher.join()
    if process.wait() != 0:
        raise SystemExit(f"{' '.join(words)}\n{said}")
    with open(f"{folder}/metrics.jsonl") as file:
        steps = [json.loads(line) for line in file]
    shutil.rmtree(folder)
    os.remove(f"{folder}.db")
    steps = [step for step in steps if "loss" in step][1:]
    return max(steps, key=lambda step: step["tokens_per_second"]), sorted(peaks.values(), reverse=True)[:ranks], steps


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("tailor")
    parser.add_argument("recipe")
    parser.add_argument("keys", nargs="*")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--scratch", default=None)
    options = parser.parse_args()
    scratch = tempfile.mkdtemp(dir=options.scratch)
    best, peaks, waited = {}, {}, []
    for number in range(options.rounds):
        for ranks in (1, options.ranks):
            step, peak, steps = run(options, ranks, os.path.join(scratch, f"run{number}_{ranks}"))
            peaks[ranks] = peak
            if ranks not in best or step["tokens_per_second"] > best[ranks]["tokens_per_second"]:
                best[ranks] = step
            if ranks > 1:
                waited += [s["exchange_exposed_seconds"] / s["seconds"] for s in steps]
    shutil.rmtree(scratch)
    for ranks, step in best.items():
        print(f"{ranks} rank(s): {step['tokens_per_second']:8.1f} tokens/s, peak RSS a rank "
              + ", ".join(f"{peak / 1e6:.0f} MB" for peak in peaks[ranks]))
    step = best[options.ranks]
    waited.sort()
    print(f"exchanged a step {step['exchange_bytes'] / 1e6:.1f} MB over all ranks, "
          f"{step['exchange_seconds']:.3f} s of a step's {step['seconds']:.3f} s, "
          f"of it computing waited {step['exchange_exposed_seconds']:.3f} s "
          f"(median of all steps: {100 * waited[len(waited) // 2]:.1f} % of the step)")
    print(f"ratio {best[options.ranks]['tokens_per_second'] / best[1]['tokens_per_second']:.2f}")


main()
