#!/usr/bin/env python3
"""The peer: LoRA fine-tuning on the CPU with transformers and PEFT. Prints one JSON document.

Rows come from chats (--data), which are tokenised and packed here, or ready-made (--tokenized),
which are fed exactly as they stand, in file order, --batch rows a step, so that Tailor and this
peer train on identical tokens. --dump-tokenized writes the rows a --data run used.

Training is AdamW (betas 0.9 and 0.95, no decay), a constant learning rate, gradients clipped at
1.0, the loss a mean over the step's label tokens. Times leave out the first steps. On a shared
machine even tokens_per_cpu_second suffers: threads wait for each other. Look at load_average.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "oracle"))
from hugging_face import Problem, load_base, read_rows, run_main

LINEARS = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
BETAS, CLIP = (0.9, 0.95), 1.0
EVALUATION_BATCH = 8


def peak_rss_mb():
    """Largest resident set since the last reset."""
    with open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    return None


def reset_peak_rss():
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass  # then the peak covers loading as well


def comma_list(text):
    return [part for part in text.split(",") if part]


def add_lora(base, arguments):
    import peft

    if arguments.init_adapter:
        return peft.PeftModel.from_pretrained(
            base, arguments.init_adapter, is_trainable=True,
            autocast_adapter_dtype=not arguments.bf16_adapter,
        )
    is_pattern = any(sign in arguments.targets for sign in "*|\\(")
    config = peft.LoraConfig(
        r=arguments.rank,
        lora_alpha=arguments.alpha,
        lora_dropout=0.0,
        target_modules=arguments.targets if is_pattern else comma_list(arguments.targets),
        target_parameters=comma_list(arguments.target_params) or None,
        task_type="CAUSAL_LM",
    )
    # PEFT's own choice is float32 factors on a bfloat16 base.
    return peft.get_peft_model(base, config, autocast_adapter_dtype=not arguments.bf16_adapter)


def training_rows(arguments, tokenizer):
    """An endless iterator of rows."""
    import chat_rows

    if arguments.tokenized:
        rows = read_rows(arguments.tokenized)
        for number, row in enumerate(rows, start=1):
            if len(row.get("position_ids", ())) != len(row["input_ids"]):
                raise Problem(
                    "the row has no position_ids of its length",
                    f"{arguments.tokenized}, line {number}",
                    "Write positions that begin at 0 with each packed document.",
                )
        return itertools.cycle(rows)
    chats = chat_rows.read_chats(arguments.data, tokenizer, arguments.seq_len)
    return chat_rows.pack(chats, arguments.seq_len)


def held_out_rows(path, tokenizer, arguments):
    import chat_rows

    with open(path, encoding="utf-8") as file:
        is_chat = "messages" in json.loads(file.readline() or "{}")
    if is_chat:
        chats = chat_rows.read_chats(path, tokenizer, arguments.seq_len)
        return list(itertools.islice(chats, arguments.held_rows))
    rows = read_rows(path, arguments.held_rows)
    for row in rows:
        row.setdefault("position_ids", list(range(len(row["input_ids"]))))
    return rows


def evaluate(model, rows, pad_id):
    """Loss and accuracy over all label tokens; exact_rows: rows whose every label is the argmax."""
    import torch

    import chat_rows

    model.eval()
    loss_sum, tokens, right, exact = 0.0, 0, 0, 0
    with torch.no_grad():
        for start in range(0, len(rows), EVALUATION_BATCH):
            batch = chat_rows.collate(rows[start : start + EVALUATION_BATCH], pad_id)
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1]
            keep = labels != chat_rows.NO_LOSS
            loss_sum += torch.nn.functional.cross_entropy(
                logits[keep].float(), labels[keep], reduction="sum"
            ).item()
            hits = logits.argmax(-1) == labels
            tokens += keep.sum().item()
            right += (hits & keep).sum().item()
            exact += (hits | ~keep).all(1).sum().item()
    model.train()
    return {
        "loss": loss_sum / tokens,
        "token_accuracy": right / tokens,
        "exact_rows": exact / len(rows),
        "rows": len(rows),
        "tokens": tokens,
    }


class Clock:
    """Wall and CPU seconds of one step."""

    def __enter__(self):
        self.wall, self.cpu = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_):
        self.wall = time.perf_counter() - self.wall
        self.cpu = time.process_time() - self.cpu


def train(model, rows, pad_id, arguments):
    """(the rows used, what was measured)."""
    import torch

    import chat_rows

    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=arguments.lr, betas=BETAS, weight_decay=0.0)
    model.train()
    used, steps, started = [], [], time.perf_counter()
    while len(steps) < arguments.steps:
        taken = [next(rows) for _ in range(arguments.batch)]
        batch = chat_rows.collate(taken, pad_id, None if arguments.tokenized else arguments.seq_len)
        with Clock() as clock:
            loss = model(**batch).loss
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(parameters, CLIP)
            optimizer.step()
            optimizer.zero_grad()
        steps.append({
            "loss": loss.item(),
            "grad_norm": norm.item(),
            "tokens": sum(chat_rows.without_padding(row, pad_id) for row in taken),
            "label_tokens": (batch["labels"][:, 1:] != chat_rows.NO_LOSS).sum().item(),
            "seconds": clock.wall,
            "cpu_seconds": clock.cpu,
        })
        used.extend(taken)
        if arguments.time_limit and time.perf_counter() - started > arguments.time_limit:
            break
    return used, steps


def summarise(steps, untimed):
    timed = steps[min(untimed, len(steps) - 1) :]

    def total(key, of=timed):
        return sum(step[key] for step in of)

    return {
        "steps": len(steps),
        "timed_steps": len(timed),
        "tokens_per_second": total("tokens") / total("seconds"),
        "tokens_per_cpu_second": total("tokens") / total("cpu_seconds"),
        # Nearest to a quiet machine's speed when others come and go.
        "fastest_step_tokens_per_second": max(s["tokens"] / s["seconds"] for s in timed),
        "cores_used": total("cpu_seconds") / total("seconds"),
        "median_step_seconds": statistics.median(step["seconds"] for step in timed),
        "tokens": total("tokens", steps),
        "label_tokens": total("label_tokens", steps),
        "train_seconds": total("seconds", steps),
        "losses": [round(step["loss"], 6) for step in steps],
        "grad_norms": [round(step["grad_norm"], 6) for step in steps],
    }


def write_rows(path, rows):
    with open(path, "w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: peer_peft.py model --tokenized rows.jsonl --steps 30 --dtype bf16",
    )
    parser.add_argument("model", metavar="MODEL_DIR", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data", type=Path, help="chats, one JSON document a line")
    source.add_argument("--tokenized", type=Path, help="packed rows, fed exactly as they stand")
    parser.add_argument("--dump-tokenized", type=Path, help="write the rows trained on here")
    parser.add_argument("--held", type=Path, help="held-out chats or token rows")
    parser.add_argument("--held-rows", type=int, default=200, help="use this many (default 200)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=4, help="rows a step (default 4)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a row (default 256)")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument(
        "--targets", default=LINEARS,
        help="modules, commas between, or a regular expression (default: %(default)s)",
    )
    parser.add_argument("--target-params", default="", help="3-D expert parameters, commas between")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of the base")
    parser.add_argument("--bf16-adapter", action="store_true", help="factors in bfloat16 too")
    parser.add_argument("--init-adapter", type=Path, help="train on from this PEFT folder")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--experts", help="transformers' experts_implementation, such as eager")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation (default sdpa)")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--time-limit", type=float, help="stop after so many seconds of training")
    parser.add_argument("--untimed", type=int, default=3, help="warm-up steps (default 3)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, help="write the adapter to this folder")
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    import peft
    import torch
    import transformers

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    dtype = torch.float32 if arguments.dtype == "fp32" else torch.bfloat16
    load_before = os.getloadavg()[0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.model)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    rows = training_rows(arguments, tokenizer)
    base = load_base(arguments.model, dtype, arguments.attention, arguments.experts)
    model = add_lora(base, arguments)
    if arguments.checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": False})
    result = {
        "peer": "transformers + peft",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "settings": {
            key: str(value) if isinstance(value, Path) else value
            for key, value in vars(arguments).items()
        },
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    held = held_out_rows(arguments.held, tokenizer, arguments) if arguments.held else None
    if held:
        result["held_before"] = evaluate(model, held, pad_id)
    reset_peak_rss()
    used, steps = train(model, rows, pad_id, arguments)
    result.update(summarise(steps, arguments.untimed))
    result["peak_rss_mb"] = peak_rss_mb()
    if held:
        result["held_after"] = evaluate(model, held, pad_id)
    if arguments.save:
        model.save_pretrained(arguments.save)
    if arguments.dump_tokenized:
        write_rows(arguments.dump_tokenized, used)
    result["load_average"] = {"before": load_before, "after": os.getloadavg()[0]}
    json.dump(result, sys.stdout)
    print()
    return 0


if __name__ == "__main__":
    run_main(main)
