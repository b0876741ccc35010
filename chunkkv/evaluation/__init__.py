"""How much of an answer survives compression: tasks with known answers, and metrics."""
