"""Models, parallel layouts and training of large language models; the same code on NPU, GPU and CPU."""

__version__ = "0.1.0"
