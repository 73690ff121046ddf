"""Artifacts, checkpoints and small files, on a disk or on S3."""
