"""ProbVLM: an embedding is reconstructed as a generalised Gaussian, whose variance is how hard that is (arXiv 2307.00398)."""

from models.probvlm.adaptor import ProbVLMAdaptor

__all__ = ["ProbVLMAdaptor"]
