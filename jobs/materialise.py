"""The old name of jobs/materialize.py, kept for one release."""

import runpy
import sys
import warnings
from pathlib import Path

if __name__ == "__main__":
    message = "jobs/materialise.py is now called jobs/materialize.py; the old name will stop working in the next release."
    warnings.warn(message, FutureWarning, 1)
    sys.argv[0] = str(Path(__file__).with_name("materialize.py"))
    runpy.run_path(sys.argv[0], run_name="__main__")
