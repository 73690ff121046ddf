"""Fleets of jobs: fleet files, the job queue, leases, and events from workers."""
