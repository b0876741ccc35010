"""The model and its tokenizer, as prefill and decode workers both need them."""
