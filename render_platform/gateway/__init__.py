"""The serving component: accepts jobs, queues them, forwards them to inference backends, meters and bills them."""
