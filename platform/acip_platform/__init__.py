"""Ray, MLflow, S3 and HTTP around `acip`, the pure method."""

import logging

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # what it says at import is not for the readers of a job's log
