"""The commands of `python -m kimi_linear`, one module each."""
