"""What the oracle scripts share: the three-part error, loading a base model, reading rows."""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

# Towers of a multimodal checkpoint: loading its language model leaves them over, rightly.
OTHER_TOWERS = ("vision_model.", "multi_modal_projector.")


class Problem(Exception):
    """What happened, where, and how to mend it."""

    def __init__(self, what, where, mend):
        super().__init__(what)
        self.what, self.where, self.mend = what, where, mend

    def __str__(self):
        return f"error: {self.what}\n  where: {self.where}\n  mend:  {self.mend}"


def run_main(main):
    try:
        sys.exit(main())
    except Problem as problem:
        print(problem, file=sys.stderr)
        sys.exit(1)


def load_base(model_dir, dtype, attention="eager", experts=None):
    """The model in `model_dir`, with every weight of its architecture found in its files."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    if not (Path(model_dir) / "config.json").is_file():
        raise Problem(
            "no model is here", Path(model_dir) / "config.json", "Name a Hugging Face model folder."
        )
    options = {"experts_implementation": experts} if experts else {}
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=dtype, attn_implementation=attention, output_loading_info=True, **options
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = [key for key in report[kind] if not str(key).startswith(OTHER_TOWERS)]
        if keys:
            raise Problem(
                f"the base model has {kind.replace('_', ' ')}: {sorted(keys)[:5]}",
                model_dir,
                "Complete the checkpoint, or correct its config.json.",
            )
    model.config.use_cache = False
    return model


def read_rows(path, length=None):
    """The tokenised rows of a JSONL file: dicts with input_ids and, of the same length, labels."""
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                row = json.loads(line)
                if not row["input_ids"] or len(row["input_ids"]) != len(row["labels"]):
                    raise ValueError("input_ids and labels must be of one length, not empty")
                rows.append(row)
                if length is not None and len(rows) == length:
                    break
    except OSError as error:
        what = f"rows cannot be read: {error.strerror}"
        raise Problem(what, path, "Name a JSONL file.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise Problem(
            f"this is not a tokenised row: {error!r}",
            f"{path}, line {number}",
            'Write {"input_ids": [...], "labels": [...]} on every line.',
        ) from None
    if not rows:
        raise Problem("there are no rows", path, "Put at least one row into the file.")
    return rows
