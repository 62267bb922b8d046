"""The three roles of a server, as hooks of the one engine loop."""
