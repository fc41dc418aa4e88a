"""PyTorch layers for low-rank tensor adapters."""
