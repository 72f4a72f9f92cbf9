"""transformers' models with KDA on our ops: `enable()`, `disable()`, `describe(model)`; see `kimi_linear.hf.switch`."""

from kimi_linear.hf.describe import LayerRun, describe
from kimi_linear.hf.switch import KNOWN, Enabled, disable, enable

__all__ = ["KNOWN", "Enabled", "LayerRun", "describe", "disable", "enable"]
