"""A group as processes on this machine: one supervisor a group, one keeper a container."""
