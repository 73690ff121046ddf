"""Fleets of calibrations: fleet files, the job queue, leases, and events from workers."""
