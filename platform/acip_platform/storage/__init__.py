"""Folders and objects on disks and on S3."""
