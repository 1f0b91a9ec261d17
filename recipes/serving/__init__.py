"""Serving a trained model: many sequences in one batch, sessions on disk, OpenAI's HTTP API."""
