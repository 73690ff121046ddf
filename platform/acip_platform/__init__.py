"""Ray, MLflow, S3 and HTTP around `acip`, the pure method."""
