"""Every error that kandrt raises on purpose.

KandrtError
├── InputError          an argument, prompt, image or array that cannot be used (also a ValueError)
├── CheckpointError     a checkpoint that is missing, damaged or of a kind that is not supported
├── BundleError         a bundle that is missing, damaged, incomplete or of another schema version
├── BackendError        an engine library that is missing, or cannot run what it was given
│   ├── MissingExtraError   a package that is not installed, with the pip line that installs it
│   └── PlacementError      a provider that leaves nodes which compute to another
├── NumericalError      NaN or infinity in the output of a network, or a graph over its tolerance
└── OutputError         something that cannot be written: exists already, not writable, disk full

A message names the thing, what was expected, what was found and what to do about it.
"""

from __future__ import annotations


class KandrtError(Exception):
    """Root of the tree; the command line prints its message without a traceback."""


class InputError(KandrtError, ValueError):
    """A user's argument, prompt, image or array cannot be used."""


class CheckpointError(KandrtError):
    """A checkpoint is missing, damaged, or of a kind that is not supported."""


class BundleError(KandrtError):
    """A bundle is missing, damaged, incomplete, or of another schema version."""


class BackendError(KandrtError):
    """An engine library cannot run what it was given."""


class MissingExtraError(BackendError):
    """A package that an optional feature needs is not installed."""

    def __init__(self, feature: str, package: str, extra: str) -> None:
        super().__init__(
            f"{feature} needs the package {package!r}, which is not installed; run: pip install 'kandrt[{extra}]'"
        )
        self.package = package
        self.extra = extra


class PlacementError(BackendError):
    """A provider of an engine library leaves nodes that compute to another provider."""


class NumericalError(KandrtError):
    """A network gave NaN or infinity, or a graph disagrees with its reference."""


class OutputError(KandrtError):
    """A result cannot be written."""
