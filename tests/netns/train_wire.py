#!/usr/bin/env python3
"""What `tailor train` puts on the wire: two ranks on two hosts, counted by /proc/net/dev.

usage: train_wire.py TAILOR     exits with 77 where two_hosts.sh cannot make hosts

A run of few steps and one of more: the difference is that of steps alone. A frozen weight crosses
packed, (N - 1) / N of it on a pass, forward and backward, the head's once; metrics.jsonl counts it apart from factors
and gradients.
"""
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FEW, MORE = 2, 7


def tell(text):
    raise SystemExit("error: " + text)


def make_inputs(tailor, work):
    config = json.loads((HERE.parent / "golden/llama4_maverick_tiny/model/config.json").read_text())
    config.update(hidden_size=512, intermediate_size=512, intermediate_size_mlp=1024, num_local_experts=16,
                  num_attention_heads=8, num_key_value_heads=2, head_dim=64)
    (work / "model").mkdir()
    (work / "model/config.json").write_text(json.dumps(config))
    subprocess.run([tailor, "model", "synthesise", work / "model", "--to", work / "store", "--layers", "4"],
                   check=True, capture_output=True)
    with open(work / "rows.jsonl", "w") as rows:
        for row in range(64):
            rows.write(json.dumps({"input_ids": [(row * 31 + i * 7) % 256 for i in range(24)]}) + "\n")
    (work / "recipe.yaml").write_text(f"""name: wire
base_model: {work}/store
lora: {{rank: 1, alpha: 2, targets: [attention]}}
data: {{train: [{work}/rows.jsonl], sequence_len: 24}}
training: {{micro_batch_size: 1, num_epochs: 50, eval_every_steps: 0, global_batch_rows: 4}}
compute: {{threads: 1}}
machine: {{ranks: 2}}
cost: {{price: {{usd_per_gpu_hour: 0.10}}, ledger: {work}/ledger.db}}
""")


def train(tailor, work, steps):
    """Bytes that went each way, and the lines of metrics.jsonl."""
    out = work / f"run{steps}"
    command = (f"TAILOR_CACHE={work}/cache TAILOR_DATA={work}/data {tailor} train {work}/recipe.yaml "
               f"training.max_steps={steps} output_dir={out}")
    done = subprocess.run([HERE / "two_hosts.sh", "--rate", "2gbit", "--delay", "0ms", command, command],
                          capture_output=True, text=True)
    if done.returncode == 77:
        print(done.stdout)
        sys.exit(77)
    if done.returncode != 0:
        tell(f"training ended with {done.returncode}\n{done.stdout}{done.stderr}")
    cable = [line for line in done.stderr.splitlines() if line.startswith("cable: ")][-1].split()
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (int(cable[1]), int(cable[6])), [line for line in lines if "loss" in line]


def main():
    tailor = Path(sys.argv[1]).resolve()
    work = Path(tempfile.mkdtemp(prefix="tailor-wire-"))
    try:
        make_inputs(tailor, work)
        few, before = train(tailor, work, FEW)
        more, lines = train(tailor, work, MORE)
        # Of the head's file all but the final norm, which every rank reads for itself.
        packed = sum(file.stat().st_size for file in (work / "store/layers").iterdir())
        head = (work / "store/head.tiles").stat().st_size - 8192
    finally:
        shutil.rmtree(work)
    count = MORE - FEW
    # A step's line has some of what is gathered ahead for the next; over a whole run that comes out.
    def counted(of, what):
        return sum(line[f"exchange_{what}_bytes"] for line in of)
    each = {what: (counted(lines, what) - counted(before, what)) / count / 2 for what in ("weight", "factor", "gradient")}
    wire = [(b - a) / count for a, b in zip(few, more)]
    print(f"packed {packed} + {head} bytes; a step and rank: " +
          ", ".join(f"{what}s {size:.0f}" for what, size in each.items()) +
          f"; on the wire {wire[0]:.0f} and {wire[1]:.0f}")
    should = (2 * packed + head) / 2  # forward and backward, and the head in between; half of it
    for what, got, want, tolerance in (
            ("the counted weights are not those of the store", each["weight"], should, 0.001),
            *(("the wire does not carry what was counted", got, sum(each.values()), 0.02) for got in wire),
            *(("the weights on the wire are not the packed ones", got - each["factor"] - each["gradient"], should, 0.02)
              for got in wire)):
        print(f"{got / want:.4f}")
        if abs(got / want - 1) > tolerance:
            tell(f"{what}: {got:.0f} bytes a step, {want:.0f} were to be expected")
    if min(each["factor"], each["gradient"]) <= 0:
        tell("factors and gradients are not counted")
    if any(line["exchange_exposed_seconds"] is None for line in lines):
        tell("exposed communication is not told")
    # bf16 would be about four times as much.
    print("ok")


main()
