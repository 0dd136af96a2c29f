"""What operators act on: how many GPUs are needed, and who is told when something is wrong.

Above the pipeline, which gives the figures; below the gateway, the commands and the Dagster layer, which show them.
"""
