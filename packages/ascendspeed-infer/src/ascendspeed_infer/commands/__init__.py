"""The commands of `asd-infer`."""
