"""The forward pass on a GPU: CUDA graphs, and the kernels that decide there which rows leave."""
