#!/usr/bin/env python3
"""What a run logs, read back by those it is for.

    tensorboard  the event files of a run of two attempts, read by the tensorboard package: every scalar of
                 metrics.jsonl at its step, once
    mlflow       the same over REST from a real MLflow server on a file store, which the check starts; a resumed
                 run goes on with its MLflow run

The packages are installed into the cache the first time (tensorboard 160 MB, mlflow 830 and a minute or two);
without a package index a check is skipped (exit code 77).
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import extra_packages

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"tensorboard": "tensorboard==2.21.0", "mlflow": "mlflow==3.17.2"}
SCALARS = {"train/loss": "loss", "train/learning_rate": "learning_rate", "train/grad_norm": "grad_norm"}


def train(program, work, *more):
    rows = work / "rows.jsonl"
    if not rows.exists():
        rows.write_text("".join(
            json.dumps({"input_ids": [(row % 4 * 50 + i * 7) % 256 for i in range(6 + row % 17)]}) + "\n"
            for row in range(40)))
    done = subprocess.run(
        [program, "train", str(work / "recipe.yaml"), *more], capture_output=True, text=True,
        env={**os.environ, "TAILOR_DATA": str(work / "data"), "TAILOR_CACHE": str(work / "cache")})
    if done.returncode not in (0, 76):
        sys.exit(f"tailor train exited with {done.returncode}:\n{done.stderr}")
    return done


def two_attempts(program, work, logging):
    """The first is stopped by its budget after a step or some, the second goes on to the end."""
    (work / "recipe.yaml").write_text(f"""
name: tiny
base_model: {ROOT}/tests/golden/llama4_maverick_tiny/model
output_dir: {work}/run
lora: {{rank: 4, alpha: 8, targets: [all]}}
data: {{train: [{work}/rows.jsonl], validation: {{split: 0.1}}, sequence_len: 24}}
training: {{micro_batch_size: 2, num_epochs: 50, max_steps: 12, learning_rate: 5.0e-3, eval_every_steps: 5}}
compute: {{threads: 1}}
cost: {{price: {{usd_per_gpu_hour: 0.10}}, project: "team a"}}
logging: {logging}
""")
    first = train(program, work, "--over-budget", "budget.gpu_hours=0.0000001")
    if first.returncode != 76:
        sys.exit(f"the first attempt was to be stopped by its budget:\n{first.stderr}")
    train(program, work, "--resume")
    steps = {}
    for line in (work / "run/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "loss" in row:
            steps[row["step"]] = row
    if sorted(steps) != list(range(1, 13)):
        sys.exit(f"metrics.jsonl has steps {sorted(steps)}")
    return steps


def compare(tag, found, steps, key):
    if sorted(found) != sorted(steps):
        sys.exit(f"{tag}: steps {sorted(found)}, {len(steps)} were taken")
    for step, value in found.items():
        if abs(value - steps[step][key]) > 1e-6 * abs(steps[step][key]) + 1e-12:
            sys.exit(f"{tag}: {value} at step {step}, metrics.jsonl has {steps[step][key]}")
    print(f"{tag}: {len(found)} steps as in metrics.jsonl")


def check_tensorboard(program, folder, work):
    sys.path.insert(0, str(folder))
    from tensorboard.backend.event_processing import event_accumulator
    steps = two_attempts(program, work, "{}")
    events = event_accumulator.EventAccumulator(str(work / "run"), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    for tag, key in SCALARS.items():
        scalars = events.Scalars(tag)
        found = {one.step: one.value for one in scalars}
        if len(found) != len(scalars):
            sys.exit(f"{tag}: a step is there twice")
        compare(tag, found, steps, key)
    if not any(tag.startswith("recipe") for tag in events.Tags()["tensors"]):
        sys.exit(f"the recipe is not among {events.Tags()}")


def check_mlflow(program, folder, work):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    env = {**os.environ, "PYTHONPATH": str(folder), "MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet"}
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1",
         "--backend-store-uri", f"sqlite:///{work}/mlflow.db", "--default-artifact-root", f"{work}/artifacts"],
        stdout=open(work / "server.log", "w"), stderr=subprocess.STDOUT, env=env, cwd=work,
        start_new_session=True)

    def call(path, body=None):
        request = urllib.request.Request(
            f"{address}/api/2.0/mlflow/{path}", data=json.dumps(body).encode() if body is not None else None,
            headers={"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=2).read()
                break
            except OSError:
                if server.poll() is not None:
                    sys.exit(f"the server ended:\n{(work / 'server.log').read_text()}")
                time.sleep(0.5)
        steps = two_attempts(program, work, f'{{mlflow: "{address}"}}')
        experiment = call("experiments/get-by-name?experiment_name=team%20a")["experiment"]["experiment_id"]
        runs = call("runs/search", {"experiment_ids": [experiment]})["runs"]
        if len(runs) != 1:
            sys.exit(f"{len(runs)} MLflow runs, one was to be gone on with")
        run = runs[0]
        if run["info"]["status"] != "FINISHED":
            sys.exit(f"status {run['info']['status']}")
        params = {one["key"]: one["value"] for one in run["data"]["params"]}
        if params["lora.rank"] != "4":
            sys.exit(f"lora.rank is {params.get('lora.rank')}")
        for tag, key in SCALARS.items():
            history = call(f"metrics/get-history?run_id={run['info']['run_id']}&metric_key={tag.replace('/', '%2F')}"
                           "&max_results=1000")["metrics"]
            compare(tag, {int(one.get("step", 0)): one["value"] for one in history}, steps, key)
    finally:
        os.killpg(server.pid, 15)
        server.wait()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("case", choices=PACKAGES)
    arguments = parser.parse_args()
    folder = extra_packages.obtain(PACKAGES[arguments.case])
    with tempfile.TemporaryDirectory() as work:
        {"tensorboard": check_tensorboard, "mlflow": check_mlflow}[arguments.case](
            arguments.program, folder, Path(work))


main()
