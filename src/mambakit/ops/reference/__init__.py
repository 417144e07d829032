"""The definition of every op in plain PyTorch: any device, any float dtype, differentiable twice."""
