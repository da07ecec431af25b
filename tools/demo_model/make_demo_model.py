#!/usr/bin/env python3
"""Makes a small real model to try Tailor with, as a Hugging Face checkpoint folder.

  dense    SmolLM2-135M-Instruct as LlamaForCausalLM: 135 M parameters, 269 MB
  llama4   the same knowledge as Llama4ForCausalLM, shaped as Maverick: every second layer a
           mixture of 8 experts, top-1, with a shared expert: 302 M parameters, 605 MB. It answers
           as the dense model does; see upcycle.py.
  deepseek_v3
           likewise as DeepseekV3ForCausalLM, shaped as R1: latent attention, all layers but the
           first mixtures of 4 experts, 2 of them for a token: 330 M parameters

The source is a package of 93 MB, downloaded once. The same machine always writes the same bytes.
OUT_DIR appears complete or not at all; a finished one is left alone.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from demo_data import wordnet
from demo_data.problem import Problem, run_main
from demo_model import source

SCRIPT_VERSION = 1  # raise it when the written bytes change: older outputs are then made anew
STAMP_NAME = "demo_model.json"
CALIBRATION_TOKENS = 4096
DEFAULT_EXPERTS = {"llama4": 8, "deepseek_v3": 4}
THREADS = 2  # fixed, since the order of sums, and so the last bits, may depend on it


def make_stamp(arguments):
    stamp = {
        "made_by": "tools/demo_model/make_demo_model.py",
        "script_version": SCRIPT_VERSION,
        "source": source.DESCRIPTION,
        "arch": arguments.arch,
    }
    if arguments.arch != "dense":
        stamp["experts"] = arguments.experts
    return stamp


def read_stamp(out_dir):
    try:
        return json.loads((out_dir / STAMP_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def is_finished(out_dir, stamp):
    """Whether `out_dir` is what this call would write. Sizes catch files cut short or deleted."""
    found = read_stamp(out_dir)
    if found is None:
        return False
    sizes = found.pop("bytes", {})
    return found == stamp and all(
        (out_dir / name).is_file() and (out_dir / name).stat().st_size == size
        for name, size in sizes.items()
    )


def refuse_foreign_folder(out_dir):
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        if read_stamp(out_dir) is None:
            raise Problem(
                "OUT_DIR holds something this script did not write",
                out_dir,
                "Name another folder, or delete this one yourself.",
            )


def write_model(arguments, folder):
    """Returns the number of parameters."""
    # Imported late: --help and a finished output should not wait for torch.
    import torch
    from demo_model import checkpoint_writer, dense_llama, gguf_model, upcycle

    torch.set_num_threads(THREADS)
    gguf = gguf_model.GgufModel(source.obtain_gguf(arguments.cache))
    config, tensors, side_files = gguf.config(), gguf.tensors(), gguf.side_files()
    if arguments.arch == "dense":
        return checkpoint_writer.write_checkpoint(
            folder, config, tensors.items(), side_files, shard_bytes=1_000_000_000
        )
    text = wordnet.gloss_text(wordnet.read_synsets(arguments.wordnet))
    token_ids = gguf.tokenizer().encode(text).ids[:CALIBRATION_TOKENS]
    target = upcycle.ARCHITECTURES[arguments.arch](
        dense_llama.DenseLlama(config, tensors), arguments.experts, token_ids
    )
    return checkpoint_writer.write_checkpoint(
        folder, target.config, target.tensors(), side_files
    )


def replace_folder(new, out_dir):
    """Moves `new` to `out_dir`; an older output steps aside first, since rename needs room."""
    if out_dir.exists():
        old = new.with_name(new.name + ".old")
        os.rename(out_dir, old)
        os.rename(new, out_dir)
        shutil.rmtree(old)
    else:
        os.rename(new, out_dir)


def make(arguments):
    out_dir, stamp = arguments.out_dir.absolute(), make_stamp(arguments)
    if is_finished(out_dir, stamp):
        print(f"{out_dir} is already there")
        return 0
    refuse_foreign_folder(out_dir)
    started = time.monotonic()
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        model = staging / "model"
        model.mkdir()
        parameters = write_model(arguments, model)
        stamp["bytes"] = {path.name: path.stat().st_size for path in sorted(model.iterdir())}
        stamp_text = json.dumps(stamp, indent=2) + "\n"
        (model / STAMP_NAME).write_text(stamp_text, encoding="utf-8")
        replace_folder(model, out_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    megabytes = sum(stamp["bytes"].values()) / 1e6
    seconds = time.monotonic() - started
    print(f"{out_dir}: {parameters / 1e6:.0f} M parameters, {megabytes:.0f} MB, {seconds:.0f} s")
    return 0


def parse_arguments():
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="example: tools/demo_model/make_demo_model.py build/demo/maverick --arch llama4",
    )
    parser.add_argument("out_dir", metavar="OUT_DIR", type=Path)
    parser.add_argument(
        "--arch", choices=("llama4", "deepseek_v3", "dense"), default="llama4", help="default: llama4"
    )
    parser.add_argument(
        "--experts", type=int,
        help="routed experts of a layer, even (default: 8 for llama4, 4 for deepseek_v3)",
    )
    parser.add_argument(
        "--cache", metavar="DIR", type=Path, default=source.default_cache(),
        help="where the download is kept (default: %(default)s)",
    )
    parser.add_argument(
        "--wordnet", metavar="DIR", type=Path, default=wordnet.DEFAULT_FOLDER,
        help="WordNet, whose definitions are the text routers are set up on (default: %(default)s)",
    )
    arguments = parser.parse_args()
    if arguments.experts is None:
        arguments.experts = DEFAULT_EXPERTS.get(arguments.arch, 8)
    if arguments.experts < 2 or arguments.experts % 2 or arguments.experts > 256:
        parser.error("--experts must be an even number from 2 to 256: experts come in pairs")
    return arguments


def main():
    arguments = parse_arguments()
    try:
        return make(arguments)
    except OSError as error:
        raise Problem(
            f"the demo model cannot be written: {error.strerror}",
            error.filename or arguments.out_dir,
            "Make room or choose another folder; the model needs up to 1 GB.",
        ) from None


if __name__ == "__main__":
    run_main(main)
