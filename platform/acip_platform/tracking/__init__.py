"""MLflow: runs, the model registry, and the rule that promotes a version."""
