#!/usr/bin/env python3
"""Exported adapters in the PEFT they were exported for, and that PEFT's adapters here.

VERSION MODEL: `tailor adapter export --for peft@VERSION` of the golden adapter must load in that PEFT
    and give `tailor eval`'s loss on every row; an adapter that PEFT writes must give its loss here.
vllm MODEL: the export for vLLM, experts one by one, in the PEFT of tools/requirements.txt, which fuses
    such files when it loads them.

Other versions of PEFT are installed into the cache the first time (1 MB each); without a package
index a check is skipped (exit code 77).
"""

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
import extra_packages  # noqa: E402
import run as suite  # noqa: E402

OWN_VERSION = "0.21.2"


class Export(suite.Case):
    def use_peft(self, version):
        if version != OWN_VERSION:
            self.environment["PYTHONPATH"] = str(
                extra_packages.obtain(f"peft=={version}", flags=["--no-deps"], folder=f"oracle-peft-{version}"))
        found = self.run([sys.executable, "-c", "import peft; print(peft.__version__)"]).strip()
        if found != version:
            sys.exit(f"PEFT {found} was found, not {version}")

    def export(self, adapter, target, *more):
        to = self.work / "exported"
        self.run([self.program, "adapter", "export", adapter, "--for", target, "--base", self.model,
                  "--to", to, *more])
        self.adapter = to


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path, help="the built tailor")
    parser.add_argument("target", help="a version of PEFT, or vllm")
    parser.add_argument("model", choices=("llama4_maverick_tiny", "deepseek_v3_tiny"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tailor_oracle_") as work:
        case = Export(arguments.program.resolve(), arguments.model, Path(work))
        if arguments.target == "vllm":
            case.use_peft(OWN_VERSION)
            case.train("{rank: 4, alpha: 8, expert_rank: 2, expert_alpha: 6,"
                       " targets: [attention, experts]}")
            case.export(case.adapter, "vllm")
            case.compare_float32()
            return
        case.use_peft(arguments.target)
        golden = case.model.parent / "lora" / "adapter_final"
        case.export(golden, f"peft@{arguments.target}")
        case.compare_float32()
        case.adapter = case.work / "made"
        case.make_with_peft(["--rank", "2", "--alpha", "8", "--targets", "q_proj,o_proj",
                             "--target-params", {
                                 "llama4_maverick_tiny": suite.MIXTURE_PARAMETERS,
                                 "deepseek_v3_tiny": "mlp.experts.gate_up_proj,"
                                                     "mlp.experts.down_proj"}[arguments.model]])
        case.compare_float32()


if __name__ == "__main__":
    main()
