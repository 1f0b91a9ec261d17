"""The Omega rule."""
