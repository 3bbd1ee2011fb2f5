"""Watches the gradients of a PyTorch training run."""
