"""Who owns which page of the KV cache: the pool and its leases, the radix tree, the audit. No torch."""
