"""`qkernels info`."""
