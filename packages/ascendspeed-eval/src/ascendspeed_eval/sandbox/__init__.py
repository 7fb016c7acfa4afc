"""Run programs that a model wrote, without letting them touch anything."""
