"""What the assets are given: the platform, and the Dagster instance of a state folder."""
