"""Ray, MLflow, S3 and HTTP around `acip`, the pure method."""

import logging

# what these say at import and at the first use of a database is not for the readers of a job's log
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
logging.getLogger("mlflow").setLevel(logging.WARNING)
logging.getLogger("alembic").setLevel(logging.WARNING)
