"""dpal-edge: distil a large human-centric vision model into a ViT-Ti, export it, run it on the edge."""

__version__ = "0.1.0"
