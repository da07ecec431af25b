#!/usr/bin/env python3
"""Recomputes the router fixture with transformers and PEFT, and says how far off each number is.

make_router_fixture.py writes it with plain torch. Here the model is transformers', all factors but
the router's are PEFT's, and the router's are added to its weight: two ways that share no code.
"""

import argparse
import json
import sys
from pathlib import Path

from hugging_face import Problem, load_base, run_main

import torch
from safetensors.torch import load_file

import router_lora

LIMITS = {"gradients": 1e-4, "loss": 1e-5, "grad_norm": 1e-4, "final": 1e-3}


def load_adapted(model_dir, adapter_dir):
    """The model, and its factors under the names they have in an adapter file."""
    import peft

    model = load_base(model_dir, torch.float32).eval()
    config = peft.PeftConfig.from_pretrained(adapter_dir)
    config.base_model_name_or_path, config.inference_mode = None, False
    config.exclude_modules = r".*\.router"
    state = peft.utils.load_peft_weights(str(adapter_dir), device="cpu")
    router_factors = router_lora.take_router_factors(state)
    adapted = peft.get_peft_model(model, config)
    peft.set_peft_model_state_dict(adapted, state)
    factors = {
        name.replace(".default", ""): parameter
        for name, parameter in adapted.named_parameters()
        if ".lora_A." in name or ".lora_B." in name
    }
    for name, product in router_lora.attach(model, router_factors, config).items():
        factors[router_lora.PREFIX + name + router_lora.A_SUFFIX] = product.lora_a
        factors[router_lora.PREFIX + name + router_lora.B_SUFFIX] = product.lora_b
    return adapted, factors


def largest_error(found, expected):
    if found.keys() != expected.keys():
        raise Problem(
            f"tensor names differ: {sorted(found.keys() ^ expected.keys())[:4]}",
            "the fixture", "Make it anew with make_router_fixture.py.",
        )
    return max(((found[n] - expected[n]).norm() / expected[n].norm()).item() for n in expected)


def measure(fixtures, lora):
    expected = json.loads((lora / "expected.json").read_text())
    settings, tokens = expected["optimizer"], expected["tokens_with_loss"]
    batches = load_file(fixtures / "llama4_maverick_tiny" / "batches.safetensors")
    model, factors = load_adapted(fixtures / "llama4_maverick_tiny/model", lora / "adapter_init")

    def loss_of(batch):
        return model(**{name: tensor[batch] for name, tensor in batches.items()}).loss

    def gradient_error(file_name):
        return largest_error({n: p.grad for n, p in factors.items()}, load_file(lora / file_name))

    for batch, count in enumerate(tokens):
        (loss_of(batch) * count / sum(tokens)).backward()
    errors = dict.fromkeys(LIMITS, 0.0)
    errors["gradients"] = gradient_error("expected_grads_global_batch.safetensors")
    optimizer = torch.optim.AdamW(
        factors.values(), lr=settings["lr"], betas=settings["betas"], eps=settings["eps"],
        weight_decay=settings["weight_decay"], foreach=False,
    )
    for step in expected["trajectory"]:
        optimizer.zero_grad()
        loss = loss_of(step["batch"])
        loss.backward()
        if step["step"] == 0:
            step0 = gradient_error("expected_grads_step0.safetensors")
            errors["gradients"] = max(errors["gradients"], step0)
        norm = torch.nn.utils.clip_grad_norm_(factors.values(), settings["clip_grad_norm"])
        optimizer.step()
        errors["loss"] = max(errors["loss"], abs(loss.item() / step["loss"] - 1))
        errors["grad_norm"] = max(errors["grad_norm"], abs(norm.item() / step["grad_norm"] - 1))
    final = load_file(lora / "adapter_final" / "adapter_model.safetensors")
    errors["final"] = largest_error({n: p.detach() for n, p in factors.items()}, final)
    return errors


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: check_router_fixture.py tests/golden tests/golden/llama4_router_tiny/lora",
    )
    parser.add_argument("fixtures", metavar="FIXTURES", type=Path)
    parser.add_argument("lora", metavar="LORA_DIR", type=Path)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    torch.set_num_threads(1)
    errors = measure(arguments.fixtures, arguments.lora)
    json.dump({"errors": errors, "limits": LIMITS}, sys.stdout)
    print()
    return 0 if all(errors[name] <= limit for name, limit in LIMITS.items()) else 1


if __name__ == "__main__":
    run_main(main)
