"""Tests with real engines: Slurm, Ray, pgbouncer, an S3 server, hosts that are cut off.

Each test has the marker `engines`, so `make test` leaves it out and `make engines` runs it. One file belongs to one engine, and
one process runs it. Without its engine a test is skipped. With HPO_TEST_ENGINES=required, as in CI, that is a failure.
"""
