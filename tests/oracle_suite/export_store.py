#!/usr/bin/env python3
"""`tailor model export` against compressed-tensors and transformers, on the tiny models.

A model is packed and exported twice: as stored, and with --dtype bfloat16.
  - Every quantised matrix, decoded by compressed-tensors under the scheme that the exported
    config.json gives it, must be the bfloat16 export's bit for bit, every other tensor its copy;
    and config.json must name exactly the linears that are not quantised.
  - transformers must read the bfloat16 export and compute the logits, bit for bit, of the original
    with its weights replaced by what compressed-tensors decoded. They may be no further from the
    original's than 1.25 times what random errors of the same size do.
  - Where transformers has an architecture for the export as stored, it must read that too and
    compute those logits.
compressed-tensors is installed into the cache the first time; without a package index the check is
skipped (exit code 77).
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "oracle"))
import extra_packages  # noqa: E402
from hugging_face import load_base  # noqa: E402

import torch  # noqa: E402
import transformers  # noqa: E402
from safetensors import safe_open  # noqa: E402

PACKAGES = ("compressed-tensors==0.20.0", "loguru==0.7.3")
NOISE_RATIO = 1.25
TOWERS = ("re:vision_model.*", "re:multi_modal_projector.*")

# Model, options of `tailor model pack`, and whether transformers reads the export as stored. Not so
# fp8 in blocks: of Llama 4 it reads other names, and the tiny models are narrower than a block. Nor
# DeepSeek's experts one by one as INT4.
CASES = {
    "experts": ("llama4_maverick_tiny", ["--format", "int4"], True),
    "all": ("llama4_maverick_tiny",
            ["--format", "int4", "--non-expert-format", "int4", "--group", "16"], True),
    "others": ("llama4_maverick_tiny",
               ["--format", "bf16", "--non-expert-format", "int4"], True),
    "wrapper": ("llama4_conditional_tiny", ["--format", "int4"], True),
    "dense": ("llama_tiny", ["--non-expert-format", "int4"], True),
    "fp8": ("llama4_maverick_tiny", ["--format", "fp8", "--non-expert-format", "fp8"], False),
    "deepseek": ("deepseek_v3_tiny",
                 ["--format", "int4", "--non-expert-format", "int4", "--group", "16"], False),
    "qwen": ("qwen2_tiny", ["--non-expert-format", "int4", "--group", "16"], True),
    "mixed": ("llama4_maverick_tiny", ["--format", "int4", "--non-expert-format", "fp8"], False),
}


def read_tensors(folder):
    """{name: tensor} of a checkpoint, by its index."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in sorted(set(index["weight_map"].values())):
        with safe_open(folder / shard, framework="pt") as file:
            for name in file.keys():
                if index["weight_map"].get(name) != shard:
                    sys.exit(f"{name} lies in {shard}, not where the index has it")
                tensors[name] = file.get_tensor(name)
    if set(tensors) != set(index["weight_map"]):
        sys.exit(f"tensors of the index are missing: {set(index['weight_map']) - set(tensors)}")
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if total != index["metadata"]["total_size"]:
        sys.exit(f"{total} bytes of tensors, the index has {index['metadata']['total_size']}")
    return tensors


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


class Schemes:
    """quantization_config as its readers understand it: the scheme of a linear, or None."""

    def __init__(self, config):
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.utils.match import match_name

        self.match = match_name
        self.deepseek = config["quant_method"] == "fp8"
        if self.deepseek:
            self.plain = config["modules_to_not_convert"]
            if config["weight_block_size"] != [128, 128]:
                sys.exit(f"block size {config['weight_block_size']}")
            return
        self.config = QuantizationConfig.model_validate(config)
        formats = {
            group.format or self.config.format for group in self.config.config_groups.values()}
        if len(formats) > 1 and self.config.format != "mixed-precision":
            sys.exit(f"format {self.config.format} for {formats}")

    def of(self, module):
        if self.deepseek:
            inside = any(module == name or module.startswith(name + ".") for name in self.plain)
            return None if inside else "fp8"
        if any(self.match(module, name) for name in self.config.ignore):
            return None
        found = [
            group for group in self.config.config_groups.values()
            if any(target == "Linear" or self.match(module, target) for target in group.targets)]
        if len(found) != 1:
            sys.exit(f"{module} is targeted by {len(found)} groups and not ignored")
        return found[0]

    def decode(self, module, parts):
        """The weight of a quantised module from its tensors, as bfloat16."""
        from compressed_tensors.compressors import BaseCompressor

        scheme = self.of(module)
        if scheme is None:
            sys.exit(f"{module} is quantised, config.json says it is not")
        if self.deepseek:
            if set(parts) != {"weight", "weight_scale_inv"}:
                sys.exit(f"{module} has {sorted(parts)}")
            weight, scale = parts["weight"].float(), parts["weight_scale_inv"]
            wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
            return (weight * wide[: weight.shape[0], : weight.shape[1]]).bfloat16()
        form = scheme.format or self.config.format
        form = getattr(form, "value", form)
        compressor = BaseCompressor.get_value_from_registry(form)
        if set(parts) != set(compressor.compression_param_names(scheme)):
            sys.exit(f"{module} has {sorted(parts)}, which {form} does not")
        if form == "pack-quantized" and parts["weight_scale"].dtype != torch.bfloat16:
            sys.exit(f"{module} has scales of {parts['weight_scale'].dtype}")
        return compressor.decompress(dict(parts), scheme)["weight"].bfloat16()


def decode_export(folder):
    """{name: bfloat16 tensor} of an export as stored, and the names of its quantised modules."""
    config = json.loads((folder / "config.json").read_text())
    schemes = Schemes(config["quantization_config"])
    tensors = read_tensors(folder)
    modules = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        modules.setdefault(module, {})[part] = tensor
    decoded, quantised, linears = {}, set(), set()
    for module, parts in modules.items():
        if any(part.startswith("weight_") for part in parts):
            if "bias" in parts:
                decoded[module + ".bias"] = parts.pop("bias").bfloat16()
            decoded[module + ".weight"] = schemes.decode(module, parts)
            quantised.add(module)
            continue
        for part, tensor in parts.items():
            kept = part == "e_score_correction_bias" and tensor.dtype == torch.float32
            decoded[f"{module}.{part}"] = tensor if kept else tensor.bfloat16()
            if tensor.dim() == 2 and "embed_tokens" not in module:
                linears.add(module)
                if schemes.of(module) is not None:
                    sys.exit(f"{module} is not quantised, config.json says it is")
    if not quantised:
        sys.exit("nothing is quantised")
    if not schemes.deepseek:
        unknown = [name for name in schemes.config.ignore
                   if not name.startswith("re:") and not name.endswith("lm_head")
                   and name not in linears]
        if unknown:
            sys.exit(f"config.json ignores what is not there: {unknown}")
    return decoded, quantised


def fuse_experts(tensors, inputs_first):
    """Experts one by one as one tensor a layer, gate and up side by side: [experts, in, out], as
    Llama 4 is published, or [experts, out, in], as transformers holds DeepSeek's.
    """
    out, experts = {}, {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name)
        if found is None:
            out[name] = tensor
            continue
        experts.setdefault(found[1], {}).setdefault(found[3], {})[int(found[2])] = tensor
    for base, parts in experts.items():
        stacked = {
            name: torch.stack([of[i] for i in range(len(of))]) for name, of in parts.items()}
        gate_up = torch.cat((stacked["gate_proj"], stacked["up_proj"]), dim=1)
        for name, tensor in (("gate_up_proj", gate_up), ("down_proj", stacked["down_proj"])):
            out[f"{base}.{name}"] = tensor.transpose(1, 2) if inputs_first else tensor
    return out


def load_wrapper(folder, dtype):
    """The multimodal model, whose config.json names the modules below `language_model.`."""
    model, report = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=dtype, attn_implementation="eager", output_loading_info=True)
    keys = [*report["missing_keys"], *report["unexpected_keys"], *report["mismatched_keys"]]
    if keys:
        sys.exit(f"the wrapper does not find or does not know {keys[:5]}")
    return model


class Case:
    def __init__(self, program, name, work):
        self.model, pack, self.readable = CASES[name]
        self.deepseek = self.model == "deepseek_v3_tiny"
        self.wrapper = self.model == "llama4_conditional_tiny"
        self.source = ROOT / "tests" / "golden" / self.model / "model"
        self.stored, self.decoded = work / "stored", work / "decoded"
        environment = {
            **os.environ, "TAILOR_CACHE": str(work / "cache"), "TAILOR_DATA": str(work / "data")}

        def run(*command):
            done = subprocess.run([str(part) for part in command], env=environment,
                                  capture_output=True, text=True)
            if done.returncode != 0:
                sys.exit(f"{command}\nended with {done.returncode}:\n{done.stderr}{done.stdout}")

        store = work / "store"
        run(program, "model", "pack", self.source, "--to", store, *pack)
        towers = ["--towers-from", self.source] if self.wrapper else []
        run(program, "model", "export", store, "--to", self.stored, "--max-shard-size", "100KB",
            *towers)
        run(program, "model", "export", store, "--to", self.decoded, "--dtype", "bfloat16",
            "--max-shard-size", "100KB", *towers)

    def compare_values(self):
        """Returns compressed-tensors' values, by the names of the bfloat16 export."""
        decoded, quantised = decode_export(self.stored)
        ours = read_tensors(self.decoded)
        wanted = decoded if self.deepseek else fuse_experts(decoded, inputs_first=True)
        if set(wanted) != set(ours):
            sys.exit(f"names differ: {sorted(set(wanted) ^ set(ours))}")
        for name, tensor in ours.items():
            if not same_bits(tensor, wanted[name]):
                sys.exit(f"{name}: {tensor.dtype} {tuple(tensor.shape)} differs from"
                         f" {wanted[name].dtype} {tuple(wanted[name].shape)}")
        print(f"{len(quantised)} quantised matrices decoded as compressed-tensors does,"
              f" {len(ours)} tensors equal bit for bit")
        return fuse_experts(wanted, inputs_first=False) if self.deepseek else wanted

    def compare_logits(self, values):
        torch.manual_seed(0)
        ids = torch.randint(256, (8, 48))

        def logits(model):
            with torch.no_grad():
                return model.eval()(input_ids=ids, use_cache=False).logits

        load = load_wrapper if self.wrapper else load_base
        original = load(self.source, torch.bfloat16)
        exact = logits(load(self.source, torch.float32))
        ours = logits(load(self.decoded, torch.bfloat16))
        named = {**dict(original.named_parameters()), **dict(original.named_buffers())}
        scales = {}
        for name, value in values.items():
            own = named[name]
            scales[name] = (value.float() - own.data.float()).square().mean().sqrt()
            own.data.copy_(value)
        if not same_bits(ours, logits(original)):
            sys.exit("logits of the bfloat16 export are not those of its weights in the original")
        if self.readable:
            as_stored = logits(load(self.stored, torch.bfloat16))
            if not same_bits(ours, as_stored):
                sys.exit("logits of the export as stored, decoded by transformers, are others:"
                         f" {(ours - as_stored).abs().max()}")
        # Random errors of the same size, several times: what this quantisation may cost.
        noisy = load(self.source, torch.float32)
        named = {**dict(noisy.named_parameters()), **dict(noisy.named_buffers())}
        clean = {name: tensor.data.clone() for name, tensor in named.items()}
        distances = []
        for _ in range(4):
            for name, scale in scales.items():
                named[name].data.copy_(clean[name] + torch.randn_like(clean[name]) * scale)
            distances.append((logits(noisy) - exact).square().mean().sqrt().item())
        distance = (ours.float() - exact).square().mean().sqrt().item()
        noise = sum(distances) / len(distances)
        print(f"logits: {distance:.3e} from the original's, {noise:.3e} under random errors of the"
              f" same size{', as stored the same' if self.readable else ''}")
        if not 0 < distance <= NOISE_RATIO * noise:
            sys.exit(f"more than {NOISE_RATIO} times as far")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: export_store.py build/bin/tailor experts")
    parser.add_argument("program", type=Path, help="the built tailor")
    parser.add_argument("case", choices=CASES)
    arguments = parser.parse_args()
    folder = "-".join(package.replace("==", "-") for package in PACKAGES)
    sys.path.insert(0, str(extra_packages.obtain(*PACKAGES, flags=["--no-deps"], folder=folder)))
    with tempfile.TemporaryDirectory(prefix="tailor_oracle_") as work:
        case = Case(arguments.program.resolve(), arguments.case, Path(work))
        case.compare_logits(case.compare_values())


if __name__ == "__main__":
    main()
