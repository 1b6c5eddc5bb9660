"""SHINE: a hypernetwork that reads a context once and writes it into the weights of the model that read it."""

__version__ = "0.1.0"
