"""`mamba_ssm.ops.triton`; nothing here uses Triton."""
