"""The commands of `asd-data`."""
