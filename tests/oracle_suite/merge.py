#!/usr/bin/env python3
"""Merged models in transformers: `tailor merge` writes them, transformers loads them as it loads any model.

The reference is transformers + PEFT with base and adapter apart. In float32 the merged model's logits must be PEFT's
and greedy generation its tokens; in the base's own type the loss of the logits may differ as rounding does. `peft`
also lets PEFT merge and compares the weights: ours are rounded once, PEFT's experts twice.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "oracle"))
import hugging_face  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

LOGITS = 2e-5  # absolute, float32: tests/golden/README.md
NEW_TOKENS = 24


def load(folder, dtype):
    return hugging_face.load_base(folder, dtype).eval()


def merge(program, base, adapter, out, *flags):
    command = [program, "merge", "--base", base, "--adapter", adapter, "--out", out, *flags]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{command}\nended with {done.returncode}:\n{done.stderr}{done.stdout}")


def answers(model, prompts):
    with torch.no_grad():
        logits = [model(prompt).logits for prompt in prompts]
        tokens = [
            model.generate(prompt, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0)
            for prompt in prompts
        ]
    return logits, tokens


def largest(ours, theirs):
    return max(float((a.float() - b.float()).abs().max()) for a, b in zip(ours, theirs))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("program", type=Path, help="the built tailor")
    parser.add_argument("name", help="a model of tests/golden with a lora/ run")
    arguments = parser.parse_args()
    folder = ROOT / "tests" / "golden" / arguments.name
    base, adapter = folder / "model", folder / "lora" / "adapter_final"
    torch.manual_seed(0)
    prompts = [torch.randint(1, 256, (1, length)) for length in (3, 11, 20)]
    with tempfile.TemporaryDirectory(prefix="tailor_oracle_") as work:
        work = Path(work)
        wanted = answers(peft.PeftModel.from_pretrained(load(base, torch.float32), adapter).eval(), prompts)
        merge(arguments.program, base, adapter, work / "wide", "--dtype", "float32")
        found = answers(load(work / "wide", torch.float32), prompts)
        worst = largest(found[0], wanted[0])
        print(f"float32: largest difference of a logit {worst:.1e}")
        if not worst <= LOGITS:
            sys.exit(f"more than {LOGITS}")
        if any(not torch.equal(a, b) for a, b in zip(found[1], wanted[1])):
            sys.exit("greedy generation differs from PEFT's")
        unchanged = answers(load(base, torch.float32), prompts)
        if not largest(unchanged[0], wanted[0]) > 100 * LOGITS:
            sys.exit("the adapter changes too little to tell anything")
        merge(arguments.program, base, adapter, work / "narrow", "--dtype", "bfloat16")
        rounded = answers(load(work / "narrow", torch.float32), prompts)
        plain = peft.PeftModel.from_pretrained(load(base, torch.bfloat16), adapter).merge_and_unload()
        theirs = answers(plain.float().eval(), prompts)
        ours_off, theirs_off = largest(rounded[0], wanted[0]), largest(theirs[0], wanted[0])
        print(f"bfloat16 weights: largest difference of a logit {ours_off:.1e}, of PEFT's own merge {theirs_off:.1e}")
        if not ours_off <= 2 * theirs_off:
            sys.exit("more than twice PEFT's")


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    hugging_face.run_main(main)
