"""AsymVLM: a text is a distribution on the unit sphere, an image a point on it (arXiv 2505.11029)."""

from models.asymvlm.adaptor import PowerSphericalAdaptor, VonMisesFisherAdaptor

__all__ = ["PowerSphericalAdaptor", "VonMisesFisherAdaptor"]
