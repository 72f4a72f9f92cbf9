"""Judge a model, layer by layer, against the float64 definition of Kimi Linear: `python -m verify kimi_linear`."""
