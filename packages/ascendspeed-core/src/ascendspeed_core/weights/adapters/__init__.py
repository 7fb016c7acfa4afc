"""LoRA adapters: peft's files, this project's checkpoints, adapters of AscendSpeed 2023."""
