"""One decoder, read top to bottom: transformer, attention, mlp, norm, position."""
