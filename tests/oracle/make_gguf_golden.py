#!/usr/bin/env python3
"""Writes tests/golden/gguf: blocks of every type that Tailor reads, and what PyPI's gguf makes of them.

blocks.safetensors   TYPE.bytes: random blocks; TYPE.values: their float32 numbers by gguf.dequantize
                     to_q8_0.values, to_q8_0.bytes: gguf.quantize to Q8_0
"""

from pathlib import Path

import gguf
import numpy as np
from safetensors.numpy import save_file

TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K", "F16", "BF16")
SCALES = {"Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q5_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2],
          "Q5_K": [0, 2], "Q6_K": [208]}  # where a block holds float16 numbers
BLOCKS = 3


def main():
    numbers = np.random.default_rng(7)
    out = {}
    for name in TYPES:
        kind = gguf.GGMLQuantizationType[name]
        block, size = gguf.GGML_QUANT_SIZES[kind]
        blocks = BLOCKS if block > 1 else 64
        raw = numbers.integers(0, 256, (blocks, size), dtype=np.uint8)
        for at in SCALES.get(name, []):
            scale = numbers.normal(0, 0.01, blocks).astype(np.float16)
            raw[:, at:at + 2] = scale.view(np.uint8).reshape(blocks, 2)
        if block == 1:
            raw[:, 1] &= 0xBB  # no infinities
        out[f"{name}.bytes"] = raw.reshape(-1)
        out[f"{name}.values"] = gguf.dequantize(raw.reshape(-1), kind).astype(np.float32).reshape(-1)
    values = numbers.normal(0, 1, (64, 32)).astype(np.float32)
    values[:8] *= np.float32(10) ** np.arange(-8, 8, 2, dtype=np.float32)[:, None]
    values[8] = 0
    values[9] = np.linspace(-127, 127, 32, dtype=np.float32) / 2  # halves between codes
    out["to_q8_0.values"] = values.reshape(-1)
    out["to_q8_0.bytes"] = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0).reshape(-1)
    folder = Path(__file__).resolve().parents[1] / "golden" / "gguf"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(out, folder / "blocks.safetensors")


if __name__ == "__main__":
    main()
