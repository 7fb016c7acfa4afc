"""Turn text into training data for large language models; installs and runs without torch."""

__version__ = "0.1.0"
