"""Callbacks for libraries that run a training loop, each with the real library."""
