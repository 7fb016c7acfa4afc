"""What a run tells: metrics, monitoring, a watchdog, where numbers stop being finite, pictures."""
