"""From a checkpoint folder to a bundle; the only layer that imports PyTorch."""
