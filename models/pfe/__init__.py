"""PFE: an embedding is kept and given a variance, learnt from the likelihood that true pairs agree (arXiv 1904.09658)."""

from models.pfe.adaptor import PFEAdaptor

__all__ = ["PFEAdaptor"]
