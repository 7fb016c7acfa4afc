"""Configs of a run: frozen, torch-free, one definition per option.

Import each config from its own module: `config.model`, `config.parallel`, `config.pretrain`.
"""
