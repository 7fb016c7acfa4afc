"""What `benchmarks/device.py` runs on an accelerator: checks of correctness, then figures of speed and memory."""
