#!/usr/bin/env python3
"""What `tailor plan --probe` says of a run on this machine beside what the run then does.

usage: tests/bench/plan_vs_measured.py [--steps 20] [--rounds 1] [RECIPE ...]

For demo-dense, demo-maverick and demo-r1, or the recipes named: plans with --probe and --data, trains
the steps, and prints seconds a step (median, the first two left out) and peak memory of the process,
planned / measured. Makes the demo's models and data where they are missing. Nothing else should run.
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
TAILOR = ROOT / "build/release/bin/tailor"
MODELS = {"demo-dense": ("models/smollm2-135m", "dense"),
          "demo-maverick": ("models/smollm2-maverick", "llama4"),
          "demo-r1": ("models/smollm2-r1", "deepseek_v3")}


def prepare(recipe):
    if recipe in MODELS and not (ROOT / MODELS[recipe][0] / "config.json").exists():
        folder, arch = MODELS[recipe]
        subprocess.run([sys.executable, "tools/demo_model/make_demo_model.py", folder, "--arch",
                        arch], cwd=ROOT, check=True, stdout=sys.stderr)
    if not (ROOT / "data/wordnet.train.jsonl").exists():
        subprocess.run([sys.executable, "tools/demo_data/make_demo_data.py", "data"], cwd=ROOT,
                       check=True, stdout=sys.stderr)


def planned(recipe, overrides):
    run = subprocess.run([TAILOR, "plan", recipe, "--probe", "--data", "--json", *overrides],
                         cwd=ROOT, check=True, stdout=subprocess.PIPE)
    plan = json.loads(run.stdout)
    return (plan["seconds_per_step"]["value"], plan["host_bytes_peak"]["value"],
            plan["seconds_per_step"]["working"])


def measured(recipe, overrides, folder):
    child = subprocess.Popen([TAILOR, "train", recipe, f"output_dir={folder}", *overrides],
                             cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        sys.exit(f"tailor train {recipe} ended with {os.waitstatus_to_exitcode(status)}")
    lines = [json.loads(line) for line in open(pathlib.Path(folder) / "metrics.jsonl")]
    seconds = [line["seconds"] for line in lines if "loss" in line and "step" in line]
    return statistics.median(seconds[2:]), usage.ru_maxrss * 1024


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    print("recipe          seconds a step: planned  measured  ratio   memory: planned  measured  ratio")
    for recipe in given.recipes or MODELS:
        prepare(recipe)
        overrides = [f"training.max_steps={given.steps}", "training.eval_every_steps=0"]
        for _ in range(given.rounds):
            step, memory, working = planned(recipe, overrides)
            with tempfile.TemporaryDirectory() as folder:
                took, peak = measured(recipe, overrides, folder + "/run")
            print(f"{recipe:15} {step:24.3f} {took:9.3f} {step / took:6.2f} {memory / 1e9:13.2f} GB"
                  f" {peak / 1e9:6.2f} GB {memory / peak:6.2f}", flush=True)
            print(f"  {working}", file=sys.stderr)


if __name__ == "__main__":
    main()
