"""How much of an answer survives compression: documents whose answers are known."""
