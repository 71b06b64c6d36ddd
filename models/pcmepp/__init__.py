"""PCME++: image and text are diagonal Gaussians, and a pair matches with a probability that falls with their expected distance (arXiv 2305.18171)."""

from models.pcmepp.adaptor import PCMEPPAdaptor

__all__ = ["PCMEPPAdaptor"]
