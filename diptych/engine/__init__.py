"""One engine: the loop, its roles, the processes around it."""
