"""What a run reports: metrics, MFU, TensorBoard, a watchdog, the first number that is not finite, pictures."""
