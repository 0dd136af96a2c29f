"""The platform in one process, with a clock, ids, disk, bucket, SQL commits, ClickHouse and crashes that a seed gives.

What runs is the library. What stands around it is made here: see docs/simulation.md.
"""
