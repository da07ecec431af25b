#!/usr/bin/env python3
"""What `tailor plan --probe` says of a run on this machine beside what the run then does.

usage: tests/bench/plan_vs_run.py [--steps 16] [--rounds 2] [CASE ...]

CASE is one of those below, or a recipe with overrides in one word ("demo-dense lora.rank=16"). Each is planned
with --probe and then trained for some steps. Prints seconds a step (median, the first two left out) and the
process's peak memory, planned / measured, and beside it what the plan says without a probe. Makes the demo's
models and data where they are missing. Run it from the sources, with nothing else on the machine; what others
took of it meanwhile is printed. Ends with 1 where a ratio is beyond 15 % (steps) or 5 % (memory).
"""
import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
TAILOR = ROOT / "build/release/bin/tailor"
CASES = {
    "maverick": ["demo-maverick"],
    "maverick-int4-disk": ["demo-maverick", "base.format=int4", "base.device_memory=0", "base.host_memory=0"],
    "dense": ["demo-dense"],
    "r1": ["demo-r1"],
}
MODELS = {"demo-maverick": ("models/smollm2-maverick", "llama4"), "demo-dense": ("models/smollm2-135m", "dense"),
          "demo-r1": ("models/smollm2-r1", "deepseek_v3")}


def prepare(recipe):
    if recipe in MODELS and not (ROOT / MODELS[recipe][0] / "config.json").exists():
        folder, arch = MODELS[recipe]
        subprocess.run([sys.executable, "tools/demo_model/make_demo_model.py", folder, "--arch", arch], cwd=ROOT,
                       check=True, stdout=sys.stderr)
    if not (ROOT / "data/wordnet.train.jsonl").exists():
        subprocess.run([sys.executable, "tools/demo_data/make_demo_data.py", "data"], cwd=ROOT, check=True,
                       stdout=sys.stderr)


def busy_seconds():
    fields = [int(x) for x in open("/proc/stat").readline().split()[1:]]
    return sum(fields[0:3]) / os.sysconf("SC_CLK_TCK")


def planned(environment, words, *flags):
    run = subprocess.run([TAILOR, "plan", *words, *flags, "--json"], cwd=ROOT, env=environment,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if run.returncode != 0:
        sys.exit(f"tailor plan {' '.join(words)} ended with {run.returncode}: {run.stderr}")
    return json.loads(run.stdout)


def trained(environment, words, steps, folder):
    """Median seconds of a step, peak memory, and seconds that others took of the cores."""
    began, busy = time.monotonic(), busy_seconds()
    child = subprocess.Popen([TAILOR, "train", *words, f"output_dir={folder}"], cwd=ROOT, env=environment,
                             stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    error = child.stderr.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    if status != 0:
        sys.exit(f"tailor train {' '.join(words)} ended with {os.waitstatus_to_exitcode(status)}: {error}")
    others = busy_seconds() - busy - usage.ru_utime - usage.ru_stime
    share = others / (os.cpu_count() * (time.monotonic() - began))
    lines = [json.loads(line) for line in open(pathlib.Path(folder) / "metrics.jsonl")]
    seconds = [line["seconds"] for line in lines if "loss" in line and "step" in line]
    assert len(seconds) == steps
    return statistics.median(seconds[2:]), usage.ru_maxrss * 1024, share


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    print("case                 seconds a step: no probe, --probe, run   ratio    memory: plan      run   ratio"
          "   others' share", flush=True)
    good = True
    for case in given.cases or CASES:
        words = CASES.get(case) or case.split()
        prepare(words[0])
        words = words + [f"training.max_steps={given.steps}", "training.eval_every_steps=0"]
        cache = pathlib.Path(os.environ.get("TAILOR_CACHE") or os.path.expanduser("~/.cache/tailor"))
        # A cache that is the user's but for measured steps: the plan without a probe must know none.
        with tempfile.TemporaryDirectory(dir=cache.parent, prefix=".plan_vs_run.") as folder:
            own = pathlib.Path(folder) / "cache"
            own.mkdir()
            for entry in cache.iterdir():
                if entry.name != "steps":
                    (own / entry.name).symlink_to(entry)
            environment = dict(os.environ, TAILOR_CACHE=str(own))
            before = planned(environment, words)["seconds_per_step"]["value"]
            for round_ in range(given.rounds):
                plan = planned(environment, words, "--probe")
                step, memory = plan["seconds_per_step"]["value"], plan["host_bytes_peak"]["value"]
                took, peak, share = trained(environment, words, given.steps, f"{folder}/run{round_}")
                print(f"{case[:20]:20} {before:24.3f} {step:8.3f} {took:7.3f} {step / took:7.2f}"
                      f" {memory / 1e9:14.3f} GB {peak / 1e9:6.3f} {memory / peak:7.3f} {share:10.0%}", flush=True)
                print(f"  {plan['seconds_per_step']['working']}", file=sys.stderr, flush=True)
                good = good and abs(step / took - 1) <= 0.15 and abs(memory / peak - 1) <= 0.05
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
