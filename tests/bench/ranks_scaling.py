#!/usr/bin/env python3
"""Two ranks on two cores against one rank on one core, the same work: steps of a recipe, interleaved.

usage: ranks_scaling.py TAILOR RECIPE [key=value...] [--ranks 2] [--rounds 3] [--steps 8] [--rows 8]

Each rank has one thread, and as many cores are given as there are ranks (no more than there are), so
that the ratio says what sharing costs: 2.0 would be free. Takes the fastest of the middle steps of all
rounds (the first step warms up), prints tokens a second, the ratio, what was exchanged and what of it
computing waited for, the CPU seconds of a rank's threads, and the memory each rank took beyond an
empty process: a run of the tiny model of the tests. Makes and removes its run folders below --scratch.
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


def threads_seconds(pid):
    """CPU seconds by name of a process's threads so far."""
    out = {}
    try:
        for task in os.listdir(f"/proc/{pid}/task"):
            with open(f"/proc/{pid}/task/{task}/stat") as file:
                name, rest = file.read().rsplit(")", 1)
            fields = rest.split()
            name = name.split("(", 1)[1] + ("" if task != str(pid) else " (main)")
            out[name] = out.get(name, 0) + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except OSError:
        pass
    return out


def empty_bytes(options, scratch):
    """Peak RSS of a rank of nearly nothing: the program, its libraries and what they begin with."""
    golden = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../golden/llama4_maverick_tiny/model")
    with open(f"{scratch}/rows.jsonl", "w") as rows:
        rows.write('{"input_ids": [1, 2, 3, 4, 5, 6]}\n' * 8)
    with open(f"{scratch}/empty.yaml", "w") as recipe:
        recipe.write(f"name: empty\nbase_model: {golden}\ndata: {{train: [{scratch}/rows.jsonl], sequence_len: 24}}\n"
                     "training: {max_steps: 2, num_epochs: 50}\ncost: {price: {usd_per_gpu_hour: 0.1}}\n")
    empty = argparse.Namespace(**{**vars(options), "recipe": f"{scratch}/empty.yaml", "keys": [], "rows": 2, "steps": 2})
    return run(empty, 1, f"{scratch}/empty")[1][0]


def busy_seconds():
    """CPU seconds of the whole machine so far, and of them those that other machines took (steal)."""
    with open("/proc/stat") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    tick = os.sysconf("SC_CLK_TCK")
    return (sum(ticks) - ticks[3] - ticks[4]) / tick, ticks[7] / tick


def run(options, ranks, folder, cores=None):
    words = [options.tailor, "train", options.recipe, f"machine.ranks={ranks}",
             f"training.global_batch_rows={options.rows}", f"training.max_steps={options.steps}",
             "training.eval_every_steps=0", "data.validation=null", "compute.threads=1",
             f"output_dir={folder}", f"cost.ledger={folder}.db", *options.keys]
    cores = ",".join(str(core) for core in cores or sorted(os.sched_getaffinity(0))[:ranks])
    process = subprocess.Popen(["taskset", "-c", cores, *words], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True)
    peaks, seconds = {}, {}

    def watch():
        while process.poll() is None:
            for pid in children(process.pid) or [process.pid]:
                peaks[pid] = max(peaks.get(pid, 0), peak_bytes(pid))
                for name, cpu in threads_seconds(pid).items():
                    of = seconds.setdefault(pid, {})
                    of[name] = max(of.get(name, 0), cpu)
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
    if options.threads:
        for pid, of in sorted(seconds.items()):
            print(f"  {ranks} rank(s), process {pid}: " +
                  ", ".join(f"{name} {cpu:.2f} s" for name, cpu in sorted(of.items(), key=lambda item: -item[1]) if cpu > 0.05))
    return max(steps, key=lambda step: step["tokens_per_second"]), sorted(peaks.values(), reverse=True)[:ranks], steps


def runs_apart(options, count, folder):
    """Tokens a second of so many runs of one rank at once, each on a core of its own with its part of the rows."""
    alone = argparse.Namespace(**{**vars(options), "rows": max(1, options.rows // count), "threads": False})
    cores = sorted(os.sched_getaffinity(0))
    speeds = [0.0] * count

    def one(index):
        _, _, steps = run(alone, 1, f"{folder}_{index}", [cores[index % len(cores)]])
        # The middle ones: at the ends the others may not run.
        speeds[index] = sorted(step["tokens_per_second"] for step in steps)[len(steps) // 2]

    threads = [threading.Thread(target=one, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(speeds)


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
    parser.add_argument("--threads", action="store_true", help="CPU seconds of each rank's threads")
    options = parser.parse_args()
    scratch = tempfile.mkdtemp(dir=options.scratch)
    best, peaks, waited, apart = {}, {}, [], 0
    began, own = busy_seconds(), os.times()
    empty = empty_bytes(options, scratch)
    for number in range(options.rounds):
        for ranks in (1, options.ranks):
            step, peak, steps = run(options, ranks, os.path.join(scratch, f"run{number}_{ranks}"))
            peaks[ranks] = peak
            if ranks not in best or step["tokens_per_second"] > best[ranks]["tokens_per_second"]:
                best[ranks] = step
            if ranks > 1:
                apart = max(apart, runs_apart(options, ranks, os.path.join(scratch, f"apart{number}")))
                waited += [s["exchange_exposed_seconds"] / s["seconds"] for s in steps]
    shutil.rmtree(scratch)
    print(f"an empty process: {empty / 1e6:.0f} MB")
    for ranks, step in best.items():
        print(f"{ranks} rank(s): {step['tokens_per_second']:8.1f} tokens/s, peak RSS a rank beyond an empty process "
              + ", ".join(f"{(peak - empty) / 1e6:.0f} MB" for peak in peaks[ranks]))
    step = best[options.ranks]
    waited.sort()
    print(f"exchanged a step {step['exchange_bytes'] / 1e6:.1f} MB over all ranks "
          f"(weights {step['exchange_weight_bytes'] / 1e6:.1f}, factors {step['exchange_factor_bytes'] / 1e6:.1f}, "
          f"gradients {step['exchange_gradient_bytes'] / 1e6:.1f}), "
          f"{step['exchange_seconds']:.3f} s of a step's {step['seconds']:.3f} s, "
          f"of it computing waited {step['exchange_exposed_seconds']:.3f} s "
          f"(median of all steps: {100 * waited[len(waited) // 2]:.1f} % of the step)")
    one = best[1]["tokens_per_second"]
    ended, times = busy_seconds(), os.times()
    ours = times.children_user + times.children_system - own.children_user - own.children_system
    print(f"ratio {step['tokens_per_second'] / one:.2f}; {options.ranks} runs of one rank each, that share nothing but the "
          f"machine, at once: {apart / one:.2f}")
    print(f"while measuring, other programs took {ended[0] - began[0] - ours:.1f} CPU seconds, other machines "
          f"{ended[1] - began[1]:.1f}, ours {ours:.1f}")


main()
