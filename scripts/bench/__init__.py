"""The benchmark: kandrt and what users would take instead, side by side in one run."""
