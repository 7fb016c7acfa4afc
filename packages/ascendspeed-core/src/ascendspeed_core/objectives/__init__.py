"""What is minimised: next-token prediction, DPO."""
