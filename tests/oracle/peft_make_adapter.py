#!/usr/bin/env python3
"""Makes a random LoRA adapter with PEFT and saves it as PEFT does: what our reader must accept.

B is not zero, so the adapter changes the model. Every number depends only on the seed and the
tensor's name.
"""

import argparse
import json
import math
import sys
import zlib
from pathlib import Path

from hugging_face import Problem, load_base, run_main

import numpy as np
import torch


def random_tensor(key, shape, scale):
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(key.encode())))
    return torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32) * scale)


def fill(model, seed, b_scale):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                scale = 1 / math.sqrt(parameter.shape[1]) if "lora_A" in name else b_scale
                key = f"{seed} {name.replace('.default', '')}"
                parameter.copy_(random_tensor(key, parameter.shape, scale))


def comma_list(text):
    return [part for part in text.split(",") if part]


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: peft_make_adapter.py model out --targets q_proj,v_proj --rank 4 --alpha 8",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    parser.add_argument(
        "--targets", default="q_proj,k_proj,v_proj,o_proj",
        help="module names with commas between, or one regular expression (default: %(default)s)",
    )
    parser.add_argument(
        "--target-params", default="", metavar="NAMES",
        help="3-D expert parameters, such as"
        " feed_forward.experts.gate_up_proj,feed_forward.experts.down_proj",
    )
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=int, default=8)
    parser.add_argument("--rslora", action="store_true", help="scale by alpha / sqrt(rank)")
    parser.add_argument("--rank-pattern", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--alpha-pattern", type=json.loads, default={}, metavar="JSON")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--b-scale", type=float, default=0.02, help="size of B (default 0.02)")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    import peft

    is_pattern = any(sign in arguments.targets for sign in "*|\\(")
    config = peft.LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        use_rslora=arguments.rslora,
        rank_pattern=arguments.rank_pattern,
        alpha_pattern=arguments.alpha_pattern,
        target_modules=arguments.targets if is_pattern else comma_list(arguments.targets),
        target_parameters=comma_list(arguments.target_params) or None,
        task_type="CAUSAL_LM",
    )
    # The base's type does not matter for the factors: PEFT keeps them in float32.
    base = load_base(arguments.model_dir, torch.bfloat16)
    try:
        model = peft.get_peft_model(base, config)
    except ValueError as error:
        raise Problem(
            f"PEFT finds nothing to adapt: {error}",
            f"--targets {arguments.targets} --target-params {arguments.target_params}",
            "Name modules of this model.",
        ) from None
    fill(model, arguments.seed, arguments.b_scale)
    # PEFT keeps names in sets; sorted lists make the file the same at every call.
    saved = model.peft_config["default"]
    for field in ("target_modules", "target_parameters"):
        if isinstance(getattr(saved, field), (set, list)):
            setattr(saved, field, sorted(getattr(saved, field)))
    model.save_pretrained(arguments.out)
    (arguments.out / "README.md").unlink(missing_ok=True)  # a model card about nothing
    names = [name for name, _ in model.named_parameters() if "lora_" in name]
    json.dump({"out": str(arguments.out), "adapter_tensors": len(names)}, sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    run_main(main)
