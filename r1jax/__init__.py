"""open-r1 rebuilt in JAX. Importing the package does nothing: every command is a module (`python -m r1jax.train`)."""

__version__ = "0.1.0"
