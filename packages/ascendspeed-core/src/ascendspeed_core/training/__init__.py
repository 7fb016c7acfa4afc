"""Train a model: read `trainer.Trainer.train`, then `step.train_step`."""
