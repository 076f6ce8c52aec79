"""Bundles whose networks compute in 8 bits: static scales, chosen by what real requests bring to every layer."""
