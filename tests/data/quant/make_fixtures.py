"""Writes fixtures/{int4,nf4,fp8}.safetensors: what the formats' owners make of the same numbers.

    pip install --target DIR --no-deps bitsandbytes==0.50.2 compressed-tensors==0.20.0 loguru
    PYTHONPATH=DIR python make_fixtures.py

in an environment with torch (2.11), safetensors, numpy, pydantic and transformers. Weights are not
stored: weights() here and in golden_test.cpp give the same floats. Nothing needs a GPU.
"""

from fractions import Fraction
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

FIXTURES = Path(__file__).parent / "fixtures"


def weights(rows, columns, seed):
    """Bell-shaped floats: the sum of four 20-bit uniforms, times 2^(row mod 5 - 8)."""
    state, out = seed, np.empty(rows * columns, dtype=np.float64)
    for i in range(out.size):
        total = 0
        for _ in range(4):
            state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
            total += state >> 12
        out[i] = (total - 2 * 2**20) * 2.0**-20 * 2.0 ** (i // columns % 5 - 8)
    return torch.from_numpy(out.astype(np.float32).reshape(rows, columns))


def fnv(array):
    value = 14695981039346656037
    for byte in array.tobytes():
        value = ((value ^ byte) * 1099511628211) & 0xFFFFFFFFFFFFFFFF
    return f"{value:016x}"


def int4():
    tensors = {}
    for rows, columns, group in [(4, 256, 128), (5, 96, 32), (3, 20, 20), (3, 13, 1)]:
        name = f"{rows}x{columns}g{group}"
        args = QuantizationArgs(num_bits=4, type="int", symmetric=True, strategy="group", group_size=group)
        w = weights(rows, columns, rows * columns)
        grouped = w.reshape(rows, columns // group, group)
        scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args)
        scale = scale.bfloat16()
        codes = quantize(w, scale, None, args, dtype=torch.int8)
        packed = pack_to_int32(codes, 4)
        unpacked = unpack_from_int32(packed, 4, w.shape)
        assert torch.equal(unpacked, codes)
        decoded = dequantize(unpacked, scale, None, args)
        assert decoded.dtype == torch.bfloat16
        tensors |= {f"{name}.weight_packed": packed, f"{name}.weight_scale": scale, f"{name}.codes": codes,
                    f"{name}.decoded": decoded,
                    f"{name}.squared_error": (decoded.double() - w.double()).square().sum().reshape(1)}
    save_file(tensors, FIXTURES / "int4.safetensors")


def reference_map_codes(values):
    """bitsandbytes' quantize_blockwise in its torch form: the nearest entry of the map. Its CPU library
    looks up x rounded to 16 bits, which now and then gives the next one."""
    key = torch._C.DispatchKey.CompositeExplicitAutograd
    return torch.ops.bitsandbytes.quantize_blockwise.default._op_dk(key, values, bnb.create_dynamic_map(), 256)


def correct_mean(values):
    exact = sum(Fraction(x) for x in values) / len(values)
    near = np.float32(float(exact))
    around = [near, np.nextafter(near, np.float32(-np.inf)), np.nextafter(near, np.float32(np.inf))]
    return min(around, key=lambda x: abs(Fraction(float(x)) - exact))


def nf4():
    tensors = {"nf4": bnb.get_4bit_type("nf4", device="cpu"), "dynamic_map": bnb.create_dynamic_map()}
    metadata = {}
    for rows, columns in [(4, 64), (9, 71), (3, 5), (130, 130)]:
        name = f"{rows}x{columns}"
        w = weights(rows, columns, rows * columns)
        packed, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
        absmax = torch.ops.bitsandbytes.quantize_4bit.default(w, 64, "nf4", torch.uint8)[1]
        state.absmax, state.state2.absmax = reference_map_codes(absmax - state.offset)
        decoded = bnb.dequantize_4bit(packed, state)
        state.dtype = torch.bfloat16
        decoded_bf16 = bnb.dequantize_4bit(packed, state)
        tensors |= {f"{name}.codes": packed.reshape(-1), f"{name}.offset": state.offset.reshape(1),
                    f"{name}.mean": torch.tensor([correct_mean(absmax.tolist())]),
                    f"{name}.second": state.state2.absmax, f"{name}.bytes": state.absmax}
        if rows * columns < 1000:
            tensors |= {f"{name}.decoded": decoded, f"{name}.decoded_bf16": decoded_bf16}
        metadata |= {f"{name}.decoded": fnv(decoded.numpy()),
                     f"{name}.decoded_bf16": fnv(decoded_bf16.view(torch.int16).numpy())}
    save_file(tensors, FIXTURES / "nf4.safetensors", metadata)


def fp8():
    """e4m3 by torch; blocks as in DeepSeek-V3's inference/kernel.py weight_dequant: the code to
    float32, times the block's scale, to the default dtype."""
    tensors = {"e4m3": torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num(0.0)}
    metadata = {}
    for rows, columns, block_rows, block_columns in [(18, 40, 16, 16), (3, 21, 1, 21), (130, 260, 128, 128)]:
        name = f"{rows}x{columns}b{block_rows}x{block_columns}"
        w = weights(rows, columns, rows * columns)
        codes, decoded = torch.empty(w.shape, dtype=torch.uint8), torch.empty_like(w)
        scales = torch.empty(-(-rows // block_rows), -(-columns // block_columns))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = (slice(i * block_rows, (i + 1) * block_rows), slice(j * block_columns, (j + 1) * block_columns))
                scales[i, j] = w[at].abs().max() / 448
                code = (w[at] / scales[i, j]).to(torch.float8_e4m3fn)
                codes[at] = code.view(torch.uint8)
                decoded[at] = code.float() * scales[i, j]
        tensors[f"{name}.scales"] = scales
        if rows * columns < 1000:
            tensors |= {f"{name}.codes": codes, f"{name}.decoded": decoded, f"{name}.decoded_bf16": decoded.bfloat16()}
        metadata |= {f"{name}.codes": fnv(codes.numpy()), f"{name}.decoded": fnv(decoded.numpy()),
                     f"{name}.decoded_bf16": fnv(decoded.bfloat16().view(torch.int16).numpy())}
    save_file(tensors, FIXTURES / "fp8.safetensors", metadata)


def how_often():
    """For docs/formats/weights.md: how often torch's mean is the correctly rounded one, and the CPU
    library's map codes are the nearest."""
    same, nearest, count, matrices = 0, 0, 0, 100
    for seed in range(matrices):
        w = torch.randn(256, 1024, generator=torch.Generator().manual_seed(seed)) * 0.02
        absmax = torch.ops.bitsandbytes.quantize_4bit.default(w, 64, "nf4", torch.uint8)[1]
        mean = absmax.mean()
        same += bool(correct_mean(absmax.tolist()) == np.float32(mean))
        nearest += int((reference_map_codes(absmax - mean)[0] == bnb.quantize_blockwise(absmax - mean, blocksize=256)[0]).sum())
        count += absmax.numel()
    print(f"offset is the correctly rounded mean in {same} of {matrices} matrices [256, 1024]")
    print(f"the CPU library's scale bytes are the nearest in {nearest / count:.4%}")


if __name__ == "__main__":
    FIXTURES.mkdir(exist_ok=True)
    int4()
    nf4()
    fp8()
    how_often()
