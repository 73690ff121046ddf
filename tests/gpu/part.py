"""Run one part of check.py in this process: `python -m tests.gpu.part NAME --rows FILE --seconds N --device cuda`."""

import argparse
import importlib
import sys
from pathlib import Path
from typing import Any, cast

# A plain CUDA image has none of these packages. They are blocked on every machine, so that the dry run fails if a part needs one.
BLOCKED_PACKAGES = (
    "ray",
    "mlflow",
    "boto3",
    "botocore",
    "fastapi",
    "pydantic",
    "bitsandbytes",
    "datasets",
    "lm_eval",
    "gguf",
    "bs4",
    "llguidance",
    "jsonschema",
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    cast(dict[str, Any], sys.modules).update(dict.fromkeys(BLOCKED_PACKAGES))
    import torch

    from tests.gpu.report import Report
    from tests.gpu.scale import DRY, FULL, on_device

    if args.device == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device.", file=sys.stderr)
        return 2
    report = Report(args.rows, args.seconds)
    importlib.import_module(f"tests.gpu.{args.name}").run(report, on_device(DRY if args.dry else FULL, args.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
