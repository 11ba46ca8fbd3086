"""A Pyro model as a density of its latent variables."""

__all__: list[str] = []
