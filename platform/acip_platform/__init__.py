"""Ray, MLflow, S3 and HTTP around `acip`, the pure method."""

import logging

from acip import renamed

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # what it says at import is not for the readers of a job's log
renamed.install("acip_platform")
