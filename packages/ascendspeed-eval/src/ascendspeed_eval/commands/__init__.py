"""The commands of `asd-eval`."""
