#!/usr/bin/env python3
"""The job files of `tailor launch` before the validators of their own projects.

    kubernetes  every object of the golden Job files, strictly (unknown fields refused), by kubernetes-validate
    trainjob    the golden TrainJob, read by the models of kubeflow-trainer-api; no field may be left over
    skypilot    the golden tasks, read by sky.Task.from_yaml

The same for what the built program writes for a shipped recipe. The packages are installed into the
cache the first time (kubernetes-validate 120 MB, kubeflow-trainer-api 20, skypilot 460 and a minute);
without a package index a check is skipped (exit code 77).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import extra_packages

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden" / "launch"
PACKAGES = {
    "kubernetes": ("kubernetes-validate==1.37.0",),
    "trainjob": ("kubeflow-trainer-api==2.3.0", "PyYAML==6.0.3"),
    "skypilot": ("skypilot==0.14.1",),
}
SHIPPED = {
    "kubernetes": ["kubernetes", "r1-4xh100", "--image", "registry.example/tailor:0.1", "--volume", "v"],
    "trainjob": ["kubernetes", "r1-4xh100", "--image", "registry.example/tailor:0.1", "--volume", "v",
                 "--kind", "TrainJob", "machine.ranks=8"],
    "skypilot": ["skypilot", "r1-4xh100", "--bucket", "s3://bucket/tailor"],
}
KUBERNETES_VERSION = "1.33"


def written(program, case):
    """What the built program writes for a shipped recipe, whose plan needs no weights."""
    done = subprocess.run([program, "launch", *SHIPPED[case], "--dry-run"], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"tailor launch {SHIPPED[case]} exited with {done.returncode}:\n{done.stderr}")
    return done.stdout


def texts(program, case, pattern):
    named = {path.name: path.read_text() for path in sorted(GOLDEN.glob(pattern))}
    if not named:
        sys.exit(f"no golden files {pattern}")
    named["the program's"] = written(program, case)
    return named


def check_kubernetes(program):
    import kubernetes_validate
    import yaml
    for name, text in texts(program, "kubernetes", "kubernetes_*.yaml").items():
        kinds = []
        for document in yaml.safe_load_all(text):
            kinds.append(document["kind"])
            if document["kind"] != "TrainJob":
                kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)
        print(f"{name}: {', '.join(kinds)}")
    # The validator must be able to refuse, or it says nothing.
    broken = list(yaml.safe_load_all(next(iter(texts(program, "kubernetes", "kubernetes_*.yaml").values()))))[-1]
    broken["spec"]["podFailurePolicy"]["rules"][0]["action"] = 7
    try:
        kubernetes_validate.validate(broken, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError:
        return
    sys.exit("kubernetes-validate accepts a broken job")


def check_trainjob(program):
    import yaml
    from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
    for name, text in texts(program, "trainjob", "kubernetes_train_job.yaml").items():
        job = [one for one in yaml.safe_load_all(text) if one["kind"] == "TrainJob"]
        if len(job) != 1:
            sys.exit(f"{name}: {len(job)} TrainJobs")
        # A model drops fields it does not know: what comes out must be what went in.
        back = TrainerV1alpha1TrainJob.from_dict(job[0]).to_dict()
        if json.dumps(back, sort_keys=True) != json.dumps(job[0], sort_keys=True):
            sys.exit(f"{name}: read as\n{json.dumps(back, indent=1)}\nwritten was\n{json.dumps(job[0], indent=1)}")
        print(f"{name}: TrainJob with {back['spec']['trainer']['numNodes']} nodes")


def check_skypilot(program):
    os.environ["SKYPILOT_DISABLE_USAGE_COLLECTION"] = "1"
    with tempfile.TemporaryDirectory() as home:
        os.environ["HOME"] = home
        import sky
        for name, text in texts(program, "skypilot", "skypilot_*.yaml").items():
            # The recipe's file must be there to be copied, and buckets are looked up in the cloud.
            recipe = Path(home) / "recipe.yaml"
            recipe.write_text("x")
            text = re.sub(r"^(  \"?/tmp/tailor/[^:]*: ).*$", lambda m: m.group(1) + str(recipe), text, flags=re.M)
            text, buckets = re.subn(r"^  /work:\n    source: .*\n    mode: MOUNT_CACHED\n", "", text, flags=re.M)
            if buckets != 1:
                sys.exit(f"{name}: no bucket at /work")
            file = Path(home) / "task.yaml"
            file.write_text(text)
            task = sky.Task.from_yaml(str(file))
            resources = list(task.resources)[0]
            recovery = resources.job_recovery
            if recovery["recover_on_exit_codes"] != [75] or recovery["max_restarts_on_errors"] != 0:
                sys.exit(f"{name}: recovery is {recovery}")
            parsed = subprocess.run(["bash", "-n"], input=task.run, text=True, capture_output=True)
            if parsed.returncode != 0:
                sys.exit(f"{name}: bash cannot read its script:\n{parsed.stderr}")
            print(f"{name}: {task.num_nodes} x {resources.accelerators}, spot {resources.use_spot}")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("program")
    parser.add_argument("case", choices=PACKAGES)
    arguments = parser.parse_args()
    sys.path.insert(0, str(extra_packages.obtain(*PACKAGES[arguments.case])))
    {"kubernetes": check_kubernetes, "trainjob": check_trainjob, "skypilot": check_skypilot}[arguments.case](
        os.path.abspath(arguments.program))


if __name__ == "__main__":
    main()
