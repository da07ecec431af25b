#!/usr/bin/env python3
"""Loads a base model and a LoRA adapter with transformers and PEFT, and measures rows of tokens.

Prints one JSON document: loss is the mean over all label tokens of all rows, losses the mean of
each row. Rows run one by one, so nothing depends on packing or padding. Computes with eager
attention, in float32 unless told otherwise. Fails when an adapter tensor was missing or left over, or when the adapter does
not change the base's logits.

Router factors, which PEFT cannot load into Llama 4, are added to the router's weight.
"""

import argparse
import json
import sys
from pathlib import Path

from hugging_face import Problem, load_base, read_rows, run_main

import torch
import torch.nn.functional as F

import router_lora


def logits_of(model, row):
    """[T, V] of one row, float32."""
    input_ids = torch.tensor([row["input_ids"]])
    with torch.no_grad():
        return model(input_ids=input_ids, use_cache=False).logits[0].float()


def load_adapter(base, adapter_dir):
    """The base with the adapter on it, and the number of adapter tensors."""
    import peft

    try:
        config = peft.PeftConfig.from_pretrained(adapter_dir)
        state = peft.utils.load_peft_weights(str(adapter_dir), device="cpu")
    except (OSError, ValueError) as error:
        raise Problem(
            f"the adapter cannot be read: {error}",
            adapter_dir,
            "Name a folder with adapter_config.json and adapter_model.safetensors.",
        ) from None
    config.base_model_name_or_path = None  # the caller names the base; PEFT would warn
    tensors = len(state)
    router_factors = router_lora.take_router_factors(state)
    if router_factors:
        config.exclude_modules = r".*\.router"
    model, missing, unexpected = base, [], []
    try:
        if state:
            model = peft.get_peft_model(base, config)
            result = peft.set_peft_model_state_dict(model, state)
            missing = [key for key in result.missing_keys if "lora_" in key]
            unexpected = result.unexpected_keys
        router_lora.attach(base, router_factors, config)
    except (RuntimeError, ValueError, AttributeError) as error:
        raise Problem(
            f"the adapter does not fit: {error}",
            adapter_dir,
            "Compare its shapes and targets with the base model's.",
        ) from None
    for kind, keys in (("missing", missing), ("unexpected", unexpected)):
        if keys:
            raise Problem(
                f"{len(keys)} adapter tensors are {kind}: {sorted(keys)[:5]}",
                adapter_dir,
                "Make adapter_config.json's targets and the tensor names agree.",
            )
    return model, tensors


def measure(model, rows):
    """Losses, accuracy and logits of all rows. Labels are shifted here, as Hugging Face does."""
    row_losses, loss_sum, token_count, right_count, logits = [], 0.0, 0, 0, []
    for row in rows:
        logits.append(logits_of(model, row))
        predicted, labels = logits[-1][:-1], torch.tensor(row["labels"])[1:]
        keep = labels != -100
        if not keep.any():
            row_losses.append(None)
            continue
        losses = F.cross_entropy(predicted[keep].double(), labels[keep], reduction="none")
        row_losses.append(losses.mean().item())
        loss_sum += losses.sum().item()
        token_count += len(losses)
        right_count += (predicted[keep].argmax(-1) == labels[keep]).sum().item()
    if token_count == 0:
        raise Problem("no row has a label token", "ROWS.jsonl", "Give labels other than -100.")
    summary = {
        "loss": loss_sum / token_count,
        "losses": row_losses,
        "argmax_accuracy": right_count / token_count,
        "tokens": token_count,
    }
    return summary, logits


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: peft_check_adapter.py model adapter rows.jsonl",
    )
    parser.add_argument("model_dir", metavar="MODEL_DIR", type=Path)
    parser.add_argument("adapter_dir", metavar="ADAPTER_DIR", type=Path)
    parser.add_argument(
        "rows", metavar="ROWS.jsonl", type=Path,
        help='lines of {"input_ids": [...], "labels": [...]}',
    )
    parser.add_argument(
        "--logits-file", type=Path,
        help="also write row.0, row.1, ... [T, V] to this safetensors file",
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32",
        help="of the base model; PEFT keeps the factors in float32 (default: %(default)s)",
    )
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    rows = read_rows(arguments.rows)
    base = load_base(arguments.model_dir, getattr(torch, arguments.dtype)).eval()
    base_logits = logits_of(base, rows[0])
    model, tensors = load_adapter(base, arguments.adapter_dir)
    summary, logits = measure(model.eval(), rows)
    difference = (logits[0] - base_logits).abs().max().item()
    if difference == 0:
        raise Problem(
            "the adapter changes nothing: the first row's logits equal the base's bit for bit",
            arguments.adapter_dir,
            "See that it was trained (B is zero at first) and names the modules of this base.",
        )
    if arguments.logits_file:
        from safetensors.torch import save_file

        save_file({f"row.{i}": row for i, row in enumerate(logits)}, arguments.logits_file)
        summary["logits_file"] = str(arguments.logits_file)
    summary.update(adapter_tensors=tensors, largest_change_of_logits=difference)
    json.dump(summary, sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    run_main(main)
