"""ProLIP: image and text are diagonal Gaussians, and variance lowers the logit of every pair that they are in (arXiv 2410.18857)."""

from models.prolip.adaptor import ProLIPAdaptor

__all__ = ["ProLIPAdaptor"]
