"""LoRA on a mixture's router, which PEFT cannot wrap.

Llama 4's router is an nn.Linear whose forward returns two tensors, so PEFT's wrapper breaks on it.
Adding (alpha / r) B A to its weight computes the same, and lets gradients through to A and B.
"""

import math

import torch
from torch.nn.utils import parametrize

PREFIX = "base_model.model."
A_SUFFIX, B_SUFFIX = ".lora_A.weight", ".lora_B.weight"


class AddProduct(torch.nn.Module):
    def __init__(self, lora_a, lora_b, scale):
        super().__init__()
        self.lora_a, self.lora_b = torch.nn.Parameter(lora_a), torch.nn.Parameter(lora_b)
        self.scale = scale

    def forward(self, weight):
        return weight + self.scale * (self.lora_b @ self.lora_a)


def take_router_factors(state):
    """Removes the router's pairs from an adapter's tensors: {module name: (A, B)}."""
    names = [key[: -len(A_SUFFIX)] for key in state if key.endswith(".router" + A_SUFFIX)]
    return {
        name.removeprefix(PREFIX): (state.pop(name + A_SUFFIX), state.pop(name + B_SUFFIX))
        for name in names
    }


def attach(model, factors, config):
    """Adds the factors to `model`'s routers. Returns {module name: AddProduct}."""
    attached = {}
    for name, (lora_a, lora_b) in factors.items():
        rank = lora_a.shape[0]
        scale = config.lora_alpha / (math.sqrt(rank) if config.use_rslora else rank)
        attached[name] = AddProduct(lora_a.float(), lora_b.float(), scale)
        parametrize.register_parametrization(model.get_submodule(name), "weight", attached[name])
    return attached
