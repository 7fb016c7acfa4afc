"""The commands of `asd-core`."""
