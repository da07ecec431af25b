#!/usr/bin/env python3
"""The built program against transformers and PEFT, on the tiny models, both ways.

ours: `tailor train` writes an adapter; PEFT must load it and give `tailor eval`'s loss on every row.
peft: PEFT writes an adapter; `tailor eval` must give PEFT's loss on every row.
bfloat16: with one adapter, our bfloat16 losses may be no further from the float32 losses than
1.2 times PEFT's own bfloat16 losses are.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ORACLE = ROOT / "tests" / "oracle"
FLOAT32_LOSS = 1e-5  # relative: tests/golden/README.md
BFLOAT16_RATIO = 1.2
VOCABULARY = 256

MIXTURE_PARAMETERS = "feed_forward.experts.gate_up_proj,feed_forward.experts.down_proj"
MIXTURE_TARGETS = (
    r".*self_attn\.(q_proj|k_proj|v_proj|o_proj)|.*feed_forward\.(gate_proj|up_proj|down_proj)"
    r"|.*shared_expert\.(gate_proj|up_proj|down_proj)"
)

# Recipes' lora sections for `tailor train`.
OURS = {
    "llama4_maverick_tiny": "{rank: 6, alpha: 12, expert_rank: 2, expert_alpha: 5,"
    " targets: [attention, dense_mlp, shared_expert, experts]}",
    "llama4_maverick_tiny.router": "{rank: 3, alpha: 6, expert_rank: 3, expert_alpha: 6,"
    " targets: [all]}",
    "llama4_maverick_tiny.few": "{rank: 4, alpha: 8, expert_rank: 5, expert_alpha: 8,"
    " targets: [layers.0.self_attn.q_proj, shared_expert.up_proj, experts.down_proj]}",
    "llama4_maverick_tiny.gate_up": "{rank: 4, alpha: 8, expert_rank: 2, expert_alpha: 8,"
    " targets: [model.layers.1.feed_forward.experts.down_proj, experts.gate_up_proj]}",
    "deepseek_v3_tiny": "{rank: 6, alpha: 12, expert_rank: 2, expert_alpha: 5,"
    " targets: [attention, kv_b_proj, dense_mlp, shared_expert, experts]}",
    "deepseek_v3_tiny.router": "{rank: 3, alpha: 6, expert_rank: 3, expert_alpha: 6,"
    " targets: [all]}",
    "qwen2_tiny": "{rank: 5, alpha: 7, targets: [attention, dense_mlp]}",
    # Two of eight experts a layer, chosen by a scan of the training rows.
    "llama4_maverick_tiny.chosen": "{rank: 4, alpha: 8, expert_rank: 3, expert_alpha: 6,"
    " targets: [attention, experts], experts: CHOSEN}",
    "llama_tiny": "{rank: 5, alpha: 7, targets: [attention, dense_mlp]}",
    "llama_tiny.rslora": "{rank: 9, alpha: 6, rslora: true, targets: [q_proj, down_proj]}",
}
# Options of peft_make_adapter.py.
PEFT = {
    "llama4_maverick_tiny": ["--rank", "4", "--alpha", "10", "--targets", MIXTURE_TARGETS,
                             "--target-params", MIXTURE_PARAMETERS],
    "llama4_maverick_tiny.patterns": [
        "--rank", "4", "--alpha", "8", "--targets", MIXTURE_TARGETS,
        "--target-params", MIXTURE_PARAMETERS,
        "--rank-pattern", '{"q_proj": 2, "experts.gate_up_proj": 3, "experts.down_proj": 6}',
        "--alpha-pattern", '{"layers.1.self_attn.o_proj": 20, "experts.down_proj": 3}'],
    "llama4_maverick_tiny.experts": ["--rank", "2", "--alpha", "8", "--rslora", "--targets",
                                     "q_proj", "--target-params",
                                     "feed_forward.experts.down_proj"],
    "llama4_maverick_tiny.gate_up": ["--rank", "2", "--alpha", "8", "--targets", "v_proj",
                                     "--target-params", "feed_forward.experts.gate_up_proj"],
    "deepseek_v3_tiny": [
        "--rank", "4", "--alpha", "10", "--targets",
        r".*self_attn\.(q_a_proj|q_b_proj|kv_a_proj_with_mqa|kv_b_proj|o_proj)",
        # MLPs among the modules would be taken for the experts: adapters/peft_files.cpp.
        "--target-params", "mlp.experts.gate_up_proj,mlp.experts.down_proj,mlp.gate.weight,"
        "mlp.gate_proj.weight,mlp.up_proj.weight,mlp.down_proj.weight,"
        "mlp.shared_experts.gate_proj.weight,mlp.shared_experts.up_proj.weight,"
        "mlp.shared_experts.down_proj.weight"],
    "qwen2_tiny": ["--rank", "3", "--alpha", "8", "--targets", "q_proj,k_proj,v_proj,up_proj"],
    "llama_tiny": ["--rank", "3", "--alpha", "8", "--rslora", "--targets",
                   "q_proj,v_proj,gate_proj,down_proj", "--alpha-pattern", '{"v_proj": 24}'],
}


def write_rows(path, count, seed):
    """Sequences with something to learn, and a prompt without loss."""
    numbers = random.Random(seed)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            length = numbers.randrange(6, 41)
            start, step = numbers.randrange(VOCABULARY), numbers.choice((3, 7, 11))
            ids = [(start + step * i) % VOCABULARY for i in range(length)]
            for i in range(length):
                if numbers.random() < 0.1:
                    ids[i] = numbers.randrange(VOCABULARY)
            prompt = numbers.randrange(length - 3)
            labels = [-100] * prompt + ids[prompt:]
            file.write(json.dumps({"input_ids": ids, "labels": labels}) + "\n")


class Case:
    def __init__(self, program, name, work):
        self.program, self.work = program, work
        self.model = ROOT / "tests" / "golden" / name.split(".")[0] / "model"
        self.rows, self.adapter = work / "rows.jsonl", work / "adapter"
        self.environment = {
            **os.environ, "TAILOR_CACHE": str(work / "cache"), "TAILOR_DATA": str(work / "data"),
        }

    def run(self, command):
        done = subprocess.run(
            [str(part) for part in command], env=self.environment, capture_output=True, text=True
        )
        if done.returncode != 0:
            sys.exit(f"{command}\nended with {done.returncode}:\n{done.stderr}{done.stdout}")
        return done.stdout

    def train(self, lora):
        write_rows(self.work / "train.jsonl", 60, "train")
        recipe = self.work / "recipe.yaml"
        if "CHOSEN" in lora:
            chosen = self.work / "chosen.yaml"
            self.run([self.program, "experts", "scan", "--model", self.model, "--data",
                      self.work / "train.jsonl", "--count", "2", "--out", chosen])
            lora = lora.replace("CHOSEN", str(chosen))
        recipe.write_text(
            f"name: oracle\nbase_model: {self.model}\noutput_dir: {self.work / 'run'}\n"
            f"lora: {lora}\n"
            f"data: {{train: [{self.work / 'train.jsonl'}], sequence_len: 48}}\n"
            "training: {micro_batch_size: 2, gradient_accumulation_steps: 2, max_steps: 6,"
            " learning_rate: 2.0e-2, warmup_steps: 0}\n"
            "compute: {dtype: float32, threads: 2}\n"
            "cost: {price: {usd_per_gpu_hour: 0.10}}\n",
            encoding="utf-8",
        )
        self.run([self.program, "train", recipe])
        self.adapter = self.work / "run" / "adapter"

    def make_with_peft(self, options):
        script = ORACLE / "peft_make_adapter.py"
        self.run([sys.executable, script, self.model, self.adapter, "--b-scale", "0.1", *options])

    def our_losses(self, dtype):
        document = json.loads(self.run([
            self.program, "eval", "--model", self.model, "--adapter", self.adapter,
            "--data", self.rows, "--dtype", dtype, "--per-row", "--json", "--threads", "2",
        ]))
        return [row["loss"] for row in document["per_row"]]

    def peft_losses(self, dtype):
        script = ORACLE / "peft_check_adapter.py"
        document = json.loads(self.run([
            sys.executable, script, self.model, self.adapter, self.rows, "--dtype", dtype,
        ]))
        return document["losses"]

    def compare_float32(self):
        write_rows(self.rows, 40, "rows")
        ours, peft = self.our_losses("float32"), self.peft_losses("float32")
        if len(ours) != len(peft):
            sys.exit(f"{len(ours)} rows of ours, {len(peft)} of PEFT's")
        worst = max(abs(a / b - 1) for a, b in zip(ours, peft))
        print(f"{len(ours)} rows, largest relative difference of a row's loss {worst:.1e}")
        if not worst <= FLOAT32_LOSS:
            sys.exit(f"more than {FLOAT32_LOSS}:\nours {ours}\nPEFT {peft}")

    def compare_bfloat16(self):
        # Rounding may send a token to another expert, which moves a loss far more than the rest:
        # the square errors of many rows are compared, not the largest.
        write_rows(self.rows, 400, "bfloat16")
        exact = self.peft_losses("float32")

        def error(losses):
            return math.sqrt(sum((a - b) ** 2 for a, b in zip(losses, exact)) / len(exact))

        ours, peft = error(self.our_losses("bfloat16")), error(self.peft_losses("bfloat16"))
        print(f"bfloat16 error of {len(exact)} rows: ours {ours:.2e}, PEFT's {peft:.2e},"
              f" ratio {ours / peft:.2f}")
        if not 0 < ours <= BFLOAT16_RATIO * peft:
            sys.exit(f"ours is more than {BFLOAT16_RATIO} times PEFT's")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: run.py build/bin/tailor ours llama_tiny",
    )
    parser.add_argument("program", type=Path, help="the built tailor")
    parser.add_argument("check", choices=("ours", "peft", "bfloat16"))
    parser.add_argument("name", help="a key of OURS or PEFT in this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tailor_oracle_") as work:
        case = Case(arguments.program.resolve(), arguments.name, Path(work))
        if arguments.check == "ours":
            case.train(OURS[arguments.name])
        else:
            case.make_with_peft(PEFT[arguments.name])
        case.compare_bfloat16() if arguments.check == "bfloat16" else case.compare_float32()


if __name__ == "__main__":
    main()
