"""Ray, MLflow, S3 and HTTP around `acip`, the pure method."""

import logging

from acip import renamed

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # its messages at import do not belong in the log of a job
renamed.install("acip_platform")
