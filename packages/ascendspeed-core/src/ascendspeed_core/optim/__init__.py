"""Gradients to updates: this project's optimizer, DeepSpeed, schedules, loss scaling."""
