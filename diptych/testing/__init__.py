"""For tests, ours and users': mock model, simulated processes and networks. Nothing here is imported by a server."""
