"""From recorded requests to the tensors that heads are trained with."""
