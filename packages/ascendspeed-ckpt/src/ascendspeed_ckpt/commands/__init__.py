"""The commands of `asd-ckpt`."""
