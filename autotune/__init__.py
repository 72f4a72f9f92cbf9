"""Time what verify accepts: `python -m autotune bench` compares, on one device, ours with other people's."""
