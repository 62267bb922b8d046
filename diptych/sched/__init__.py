"""What runs next: queues, the plan of a step, and what its result means. No clock, no I/O, no torch."""
