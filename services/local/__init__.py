"""A whole cluster on one machine: embedded store, prefill, decode on Ray, gateway."""
