"""How KV pages move from a prefill to a decode server: links, data plane, hand-over protocol, rendezvous. No torch."""
