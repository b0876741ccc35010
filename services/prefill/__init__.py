"""The prefill worker: prompts in, stored KV segments out."""
