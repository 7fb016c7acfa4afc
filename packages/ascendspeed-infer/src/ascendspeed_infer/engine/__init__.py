"""The decoding engine: texts share one key-value cache, and enter and leave between passes of the model."""
