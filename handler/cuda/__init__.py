"""The forward pass on a GPU: CUDA graphs, and the kernels that decide on the GPU which rows leave."""
