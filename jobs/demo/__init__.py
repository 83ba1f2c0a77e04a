"""The demo: a synthetic shop (or a replayed dataset), its simulated visitors, and the live view of what they gain."""
