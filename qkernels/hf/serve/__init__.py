"""The server behind `qkernels serve`: that of transformers, on packed weights and our layers."""
