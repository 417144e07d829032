"""The Mamba layers of transformers on our operations."""
