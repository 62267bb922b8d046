"""Large language models served with prefill and decode on different processors."""
