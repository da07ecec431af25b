#!/usr/bin/env python3
"""A tiny DeepSeek V3 on one row longer than its original context, as transformers and PEFT compute it.

Writes a folder laid out as tests/golden's: model/, batches.safetensors, adapter/, and expected.safetensors with the
logits, every position's loss and the gradient of every factor, with the adapter on. YaRN stretches 4,096 positions to
16,384 with mscale and mscale_all_dim of different sizes, so that cosines and sines are scaled as well as the softmax.
Weights are random, from a seed, and large enough that attention looks at some positions far more than at others. There
are two experts, and both are chosen: a tie in the routing would hide what is compared. Values are as wide as keys, for
LibTorch's attention without score matrices; other widths have fixtures of their own.
"""

import argparse
import sys
from pathlib import Path

from hugging_face import load_base, run_main

import torch

from peft_make_adapter import fill, random_tensor

ORIGINAL, FACTOR = 4096, 4.0
TARGETS = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]


def make_model(folder):
    import transformers

    config = transformers.DeepseekV3Config(
        vocab_size=96, hidden_size=48, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=3, n_shared_experts=1, n_routed_experts=2, n_group=1, topk_group=1,
        num_experts_per_tok=2, first_k_dense_replace=1, q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=8,
        qk_rope_head_dim=16, v_head_dim=24, max_position_embeddings=int(ORIGINAL * FACTOR), num_mtp_layers=0,
        rope_parameters={
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": FACTOR, "original_max_position_embeddings": ORIGINAL,
            "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 0.6,
        },
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 1 / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 0.1
            if "q_b_proj" in name or "kv_b_proj" in name:
                scale *= 2
            parameter.copy_(random_tensor(f"long {name}", parameter.shape, scale))
            if "norm" in name:
                parameter.add_(1)
    model.save_pretrained(folder)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: make_long_context.py out --positions 16384",
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--positions", type=int, default=int(ORIGINAL * FACTOR))
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    import peft
    from safetensors.torch import save_file

    torch.set_num_threads(arguments.threads)
    arguments.out.mkdir(parents=True, exist_ok=True)
    make_model(arguments.out / "model")
    base = load_base(arguments.out / "model", torch.float32, attention="sdpa")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"))
    fill(model, 0, 0.1)
    model.save_pretrained(arguments.out / "adapter")

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(base.config.vocab_size, (1, arguments.positions), generator=generator)
    # The last quarter repeats the first: what far attention can find is worth finding.
    ids[:, -arguments.positions // 4 :] = ids[:, : arguments.positions // 4]
    save_file({"input_ids": ids[None], "labels": ids[None].clone(), "attention_mask": torch.ones_like(ids)[None]},
              arguments.out / "batches.safetensors")
    logits = model(input_ids=ids).logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
    losses.mean().backward()
    expected = {"logits": logits.detach().contiguous(), "losses": losses.detach()}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            expected["gradient." + name.replace(".default", "")] = parameter.grad.contiguous()
    save_file(expected, arguments.out / "expected.safetensors")
    return 0


if __name__ == "__main__":
    run_main(main)
