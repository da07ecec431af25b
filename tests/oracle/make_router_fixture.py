#!/usr/bin/env python3
"""Makes the fixture in which a mixture's router is trained too, which PEFT cannot do.

FIXTURES is the folder of golden fixtures: the model, the batches and the optimizer's settings are
those of FIXTURES/llama4_maverick_tiny. OUT receives adapter_init and adapter_final (PEFT's names,
the router as feed_forward.router.lora_A/B.weight), the gradients of step 0 and of all batches
together, and expected.json with a trajectory of 12 steps.

The mathematics is llama4_reference.py, plain torch. Before it is trusted with the router, it has to
reproduce llama4_maverick_tiny/lora, which transformers and PEFT computed.
"""

import argparse
import copy
import json
import math
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from llama4_reference import PEFT_PREFIX, Adapter, Llama4, loss_of

RANK, ALPHA = 2, 4  # a smaller rank than the other fixtures', for smaller files
LINEARS = (
    r".*self_attn\.(q_proj|k_proj|v_proj|o_proj)"
    r"|.*feed_forward\.(gate_proj|up_proj|down_proj)"
    r"|.*shared_expert\.(gate_proj|up_proj|down_proj)"
    r"|.*feed_forward\.router"
)
EXPERT_PARAMETERS = ("feed_forward.experts.down_proj", "feed_forward.experts.gate_up_proj")
B_SCALE = 0.02  # B is not zero, so that A has gradients at step 0
LEAST_MARGIN = 5e-4  # between the two best router logits: far above any rounding of float32
SEEDS = 200
LIMITS = {"loss": 1e-5, "grad_norm": 1e-4, "gradient": 1e-4, "final": 1e-3}


def random_tensor(key, shape, scale):
    generator = np.random.Generator(np.random.Philox(key=zlib.crc32(key.encode())))
    return torch.from_numpy((generator.standard_normal(shape) * scale).astype(np.float32))


def relative_error(a, b):
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12)).item()


def largest_error(found, expected):
    if found.keys() != expected.keys():
        raise SystemExit(f"error: names differ: {sorted(found.keys() ^ expected.keys())[:4]}")
    return max(relative_error(found[name], expected[name]) for name in expected)


class Lesson:
    """The tiny model, its batches and the optimizer's settings."""

    def __init__(self, fixture):
        self.model_dir = fixture / "model"
        self.batches = load_file(fixture / "batches.safetensors")
        self.known = json.loads((fixture / "lora" / "expected.json").read_text())
        self.optimizer = self.known["optimizer"]
        self.tokens_with_loss = self.known["tokens_with_loss"]

    def loss(self, model, batch):
        logits = model.forward(
            self.batches["input_ids"][batch], self.batches["attention_mask"][batch]
        )
        return loss_of(logits, self.batches["labels"][batch])

    def model(self, tensors, config, dtype):
        parameters = {n: t.to(dtype, copy=True).requires_grad_() for n, t in tensors.items()}
        return Llama4(self.model_dir, Adapter(parameters, config), dtype), parameters

    def global_batch(self, tensors, config, dtype=torch.float32):
        """Loss and gradients of all batches as one batch: the mean over all its label tokens."""
        model, parameters = self.model(tensors, config, dtype)
        total, loss_sum = sum(self.tokens_with_loss), 0.0
        for batch, tokens in enumerate(self.tokens_with_loss):
            part = self.loss(model, batch) * (tokens / total)
            part.backward()
            loss_sum += part.item()
        gradients = {name: p.grad.clone() for name, p in parameters.items()}
        return loss_sum, gradients, model.smallest_margin

    def train(self, tensors, config, dtype=torch.float32, stop_below_margin=0.0):
        """12 steps of AdamW. None when routing comes nearer to a tie than `stop_below_margin`."""
        settings = self.optimizer
        model, parameters = self.model(tensors, config, dtype)
        optimizer = torch.optim.AdamW(
            parameters.values(), lr=settings["lr"], betas=settings["betas"], eps=settings["eps"],
            weight_decay=settings["weight_decay"], foreach=False,
        )
        trajectory, step0_gradients = [], None
        for step in range(settings["steps"]):
            batch = step % len(self.tokens_with_loss)
            loss = self.loss(model, batch)
            if model.smallest_margin < stop_below_margin:
                return None
            optimizer.zero_grad()
            loss.backward()
            if step == 0:
                step0_gradients = {name: p.grad.clone() for name, p in parameters.items()}
            norm = torch.nn.utils.clip_grad_norm_(parameters.values(), settings["clip_grad_norm"])
            optimizer.step()
            trajectory.append(
                {"step": step, "batch": batch, "loss": loss.item(), "grad_norm": norm.item()}
            )
        final = {name: p.detach().clone() for name, p in parameters.items()}
        with torch.no_grad():
            final_loss = self.loss(model, 0).item()
        return {
            "trajectory": trajectory,
            "step0_gradients": step0_gradients,
            "final": final,
            "final_loss_batch0": final_loss,
            "margin": model.smallest_margin,
        }


def trajectory_error(found, expected, field):
    return max(abs(a[field] / b[field] - 1) for a, b in zip(found, expected, strict=True))


def check_against_peft(lesson, lora_dir):
    """The reference must agree with what transformers and PEFT computed without the router."""
    config = json.loads((lora_dir / "adapter_init" / "adapter_config.json").read_text())
    start = load_file(lora_dir / "adapter_init" / "adapter_model.safetensors")
    run = lesson.train(start, config)
    _, gradients, _ = lesson.global_batch(start, config)
    known = lesson.known["trajectory"]
    step0 = load_file(lora_dir / "expected_grads_step0.safetensors")
    all_batches = load_file(lora_dir / "expected_grads_global_batch.safetensors")
    final = load_file(lora_dir / "adapter_final" / "adapter_model.safetensors")
    errors = {
        "loss": trajectory_error(run["trajectory"], known, "loss"),
        "grad_norm": trajectory_error(run["trajectory"], known, "grad_norm"),
        "gradient": max(
            largest_error(run["step0_gradients"], step0), largest_error(gradients, all_batches)
        ),
        "final": largest_error(run["final"], final),
    }
    for name, limit in LIMITS.items():
        if not errors[name] <= limit:
            raise SystemExit(
                f"error: the reference disagrees with PEFT: {name} is off by {errors[name]:.1e}\n"
                f"  where: {lora_dir}\n"
                f"  mend:  Mend llama4_reference.py; the limit is {limit:.0e}."
            )
    return errors


def adapter_config(template):
    config = copy.deepcopy(template)
    config.update(
        r=RANK, lora_alpha=ALPHA, target_modules=LINEARS,
        target_parameters=list(EXPERT_PARAMETERS),
        base_model_name_or_path="../../../llama4_maverick_tiny/model",
    )
    return config


def initial_shapes(known_shapes, rank_of_known, lesson):
    """The other fixture's tensors at our rank, and the router's."""
    model = Llama4(lesson.model_dir)
    shapes = {}
    for name, (rows, columns) in known_shapes.items():
        # A is [r, in] or [E r, .]; B is [out, r] or [., r E].
        if ".lora_A." in name:
            shapes[name] = (rows * RANK // rank_of_known, columns)
        else:
            shapes[name] = (rows, columns * RANK // rank_of_known)
    for layer in model.config["moe_layers"]:
        module = f"model.layers.{layer}.feed_forward.router"
        experts, hidden = model.weights[module + ".weight"].shape
        shapes[f"{PEFT_PREFIX}{module}.lora_A.weight"] = (RANK, hidden)
        shapes[f"{PEFT_PREFIX}{module}.lora_B.weight"] = (experts, RANK)
    return dict(sorted(shapes.items()))


def initial_adapter(shapes, seed):
    tensors = {}
    for name, shape in shapes.items():
        scale = 1 / math.sqrt(shape[1]) if ".lora_A." in name else B_SCALE
        tensors[name] = random_tensor(f"router#{seed} {name}", shape, scale)
    return tensors


def find_seed(lesson, shapes, config):
    """The first seed whose routing stays away from ties in all steps and in the global batch."""
    for seed in range(SEEDS):
        tensors = initial_adapter(shapes, seed)
        _, _, margin = lesson.global_batch(tensors, config)
        if margin < LEAST_MARGIN:
            continue
        run = lesson.train(tensors, config, stop_below_margin=LEAST_MARGIN)
        if run is not None:
            return seed, tensors, run
    raise SystemExit(
        f"error: routing comes near a tie with each of {SEEDS} seeds\n"
        f"  where: {lesson.model_dir}\n"
        "  mend:  Raise SEEDS."
    )


def router_part(errors_of):
    return {name: value for name, value in errors_of.items() if ".router." in name}


def write_fixture(lesson, config, shapes, out, peft_errors):
    seed, start, run = find_seed(lesson, shapes, config)
    global_loss, global_gradients, global_margin = lesson.global_batch(start, config)
    exact = lesson.train(start, config, torch.float64)
    no_router = {name: t for name, t in run["step0_gradients"].items() if ".router." not in name}
    for folder, tensors in (("adapter_init", start), ("adapter_final", run["final"])):
        (out / folder).mkdir(parents=True, exist_ok=True)
        save_file(tensors, out / folder / "adapter_model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=1)
        (out / folder / "adapter_config.json").write_text(text)
    save_file(run["step0_gradients"], out / "expected_grads_step0.safetensors")
    save_file(global_gradients, out / "expected_grads_global_batch.safetensors")
    expected = {
        "config": {
            "r": RANK, "lora_alpha": ALPHA, "use_rslora": False,
            "rank_pattern": {}, "alpha_pattern": {},
        },
        "optimizer": lesson.optimizer,
        "trajectory": run["trajectory"],
        "tokens_with_loss": lesson.tokens_with_loss,
        "global_batch_loss": global_loss,
        "seed": seed,
        "min_route_margin_over_training": run["margin"],
        "min_route_margin_global_batch": global_margin,
        "final_loss_batch0": run["final_loss_batch0"],
        "router_grad_norm_step0": {
            name: gradient.norm().item()
            for name, gradient in router_part(run["step0_gradients"]).items()
        },
        "grad_norm_step0_without_router": torch.cat(
            [gradient.flatten() for gradient in no_router.values()]
        ).norm().item(),
        "error_floor_f32_vs_f64": {
            "loss_rel_max": trajectory_error(run["trajectory"], exact["trajectory"], "loss"),
            "grad_norm_rel_max":
                trajectory_error(run["trajectory"], exact["trajectory"], "grad_norm"),
            "grad_rel_norm_max": largest_error(run["step0_gradients"], exact["step0_gradients"]),
            "final_param_rel_norm_max": largest_error(run["final"], exact["final"]),
        },
        "reference_vs_peft_without_router": peft_errors,
        "adapter_tensors": {name: list(shape) for name, shape in shapes.items()},
    }
    (out / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    return expected


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: make_router_fixture.py tests/golden tests/golden/llama4_router_tiny/lora",
    )
    parser.add_argument("fixtures", metavar="FIXTURES", type=Path)
    parser.add_argument("out", metavar="OUT", type=Path)
    return parser.parse_args()


def main():
    arguments = parse_arguments()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    fixture = arguments.fixtures / "llama4_maverick_tiny"
    if not (fixture / "lora" / "expected.json").is_file():
        raise SystemExit(
            f"error: the fixture llama4_maverick_tiny is missing\n  where: {fixture}\n"
            "  mend:  Name the folder that holds it."
        )
    lesson = Lesson(fixture)
    peft_errors = check_against_peft(lesson, fixture / "lora")
    template = json.loads((fixture / "lora/adapter_init/adapter_config.json").read_text())
    config = adapter_config(template)
    shapes = initial_shapes(lesson.known["adapter_tensors"], template["r"], lesson)
    expected = write_fixture(lesson, config, shapes, arguments.out, peft_errors)
    keys = ("seed", "min_route_margin_over_training", "min_route_margin_global_batch",
            "router_grad_norm_step0", "error_floor_f32_vs_f64", "reference_vs_peft_without_router")
    json.dump({key: expected[key] for key in keys}, sys.stdout, indent=1)
    print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
