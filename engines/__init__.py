"""What runs a graph: tensor specs, sessions, backends, and the bundle on disk."""
